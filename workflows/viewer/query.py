"""Search, SQL filter, facets, order and paging of an output, as SQL over its index.

Paging is by keyset: an address names the row that a page starts after or ends before. So every page costs the
same, and new rows do not shift the pages. Knows nothing of files or HTML.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from wallaroo.model.errors import did_you_mean
from wallaroo.workflows.outputs.schema import RESULT_NAMES, first_name
from wallaroo.workflows.viewer.index import Index, QueryError, checked_expression, quoted

SIZE, RANDOM = "size", "random"
"""Names beside those of columns: the facet of width x height, and the random order."""

OWN_FACETS = ("task", "status", "error_type", SIZE, "language", "mode", "environment_digest")
MAX_VALUES = 24
"""Carried columns with more values are not facets. Our own facets show this many values."""

EARLIER_FACETS = ("task", "status", "error_type", "prompt", "finish_reason", "language", "mode")
"""Columns of an earlier result, carried as `in_<name>`, that may be facets. The others are its numbers and
digests."""

MAX_CARRIED = 12
MAX_CHARACTERS = 4000
"""Longest search or filter."""

FACET_TYPES = ("VARCHAR", "BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "FLOAT", "DOUBLE")


@dataclass(frozen=True)
class Place:
    """Where a page starts (after a row) or, if `backwards`, ends (before it)."""

    shard: int
    """Number of the shard of the row."""
    position: int
    """Of the row in the shard."""
    backwards: bool = False
    """Whether the page ends here."""

    @classmethod
    def parse(cls, text: str, backwards: bool = False) -> "Place":
        """Parses `SHARD.POSITION`.

        Args:
            text: The text.
            backwards: Whether the page ends at this place.

        Returns:
            The place.

        Raises:
            QueryError: The text is not of this form.
        """
        match = re.fullmatch(r"(\d{1,15})\.(\d{1,9})", text)
        if not match:
            raise QueryError(f"the place '{text[:40]}' must be SHARD.POSITION: open the first page.")
        return cls(int(match[1]), int(match[2]), backwards)


@dataclass(frozen=True)
class Query:
    """Which rows to show, in which order."""

    search: str = ""
    """Words that must all occur in the prompt or the answer.

    Quotes make a phrase, a leading minus excludes a word.
    """
    where: str = ""
    """SQL expression over the columns."""
    facets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Facet -> chosen values; a row must have one of them."""
    sort: str = ""
    """A column, RANDOM, or empty for the order of the plan."""
    descending: bool = False
    """Direction of `sort`. Rows without a value come last either way."""
    seed: int = 0
    """Seed of the random order."""

    @classmethod
    def from_parameters(cls, pairs: Iterable[tuple[str, str]]) -> "Query":
        """Reads the parameters of an address.

        Raises:
            QueryError: One is invalid.
        """
        values: dict[str, str] = {}
        facets: dict[str, list[str]] = {}
        for name, value in pairs:
            if name.startswith("f."):
                facets.setdefault(name[2:], []).append(value)
            else:
                values[name] = value.strip()
        for name in ("q", "where"):
            if len(values.get(name, "")) > MAX_CHARACTERS or "\0" in values.get(name, ""):
                raise QueryError(f"{name} has more than {MAX_CHARACTERS:,} characters, or a NUL: shorten it.")
        seed = values.get("seed", "") or "0"
        if not re.fullmatch(r"\d{1,18}", seed):
            raise QueryError(f"seed is '{seed[:40]}', but must be a whole number of at most 18 digits.")
        sort = values.get("sort", "")
        return cls(
            search=values.get("q", ""),
            where=values.get("where", ""),
            facets={name: tuple(dict.fromkeys(chosen)) for name, chosen in facets.items()},
            sort=sort,
            descending=bool(sort) and values.get("dir") == "desc",
            seed=int(seed) if sort == RANDOM else 0,
        )

    def to_parameters(self) -> list[tuple[str, str]]:
        """Returns the parameters that `from_parameters` reads back."""
        pairs = [("q", self.search), ("where", self.where), ("sort", self.sort)]
        pairs += [("dir", "desc")] if self.descending else []
        pairs += [("seed", str(self.seed))] if self.sort == RANDOM else []
        pairs += [(f"f.{name}", value) for name, chosen in self.facets.items() for value in chosen]
        return [(name, value) for name, value in pairs if value]

    @property
    def plain(self) -> bool:
        """Whether this shows all rows in the order of the plan."""
        return self == Query()

    def toggled(self, facet: str, value: str) -> "Query":
        """Returns this query with one value of a facet added, or removed if it was chosen.

        Args:
            facet: Name of the facet.
            value: The value.

        Returns:
            The new query.
        """
        chosen = self.facets.get(facet, ())
        now = tuple(one for one in chosen if one != value) if value in chosen else (*chosen, value)
        facets = {**self.facets, facet: now}
        return dataclasses.replace(self, facets={name: some for name, some in facets.items() if some})


@dataclass
class Clause:
    """An SQL expression and its parameters."""

    sql: str
    """The expression."""
    values: list[Any] = field(default_factory=list)
    """The values of its question marks, in order."""

    @classmethod
    def all_of(cls, clauses: Iterable["Clause"]) -> "Clause":
        """Joins clauses by AND."""
        some = list(clauses)
        sql = " AND ".join(f"({one.sql})" for one in some) or "true"
        return cls(sql, [value for one in some for value in one.values])


def search_clause(text: str, columns: tuple[str, str] = ("prompt", "text")) -> Clause:
    """Returns the clause of a search in two columns, without regard to case and accents.

    Args:
        text: Words and quoted phrases; those with a leading minus must not occur.
        columns: SQL of the two columns.

    Returns:
        The clause.
    """
    terms = re.findall(r'(-?)(?:"([^"]*)"|(\S+))', text)
    haystack = f"strip_accents(lower(concat_ws(chr(10), {columns[0]}, {columns[1]})))"
    clauses = []
    for minus, phrase, word in terms:
        if phrase or word:
            found = f"contains({haystack}, strip_accents(lower(?)))"
            clauses.append(Clause(f"NOT {found}" if minus else found, [phrase or word]))
    return Clause.all_of(clauses)


class Rows:
    """Queries the indexed rows of one output.

    Args:
        index: Of all outputs.
        number: Of the output.
    """

    def __init__(self, index: Index, number: int) -> None:
        self.index, self.number = index, number
        self._carried: tuple[int, list[str]] | None = None

    @property
    def table(self) -> str:
        """Name of the table in the index."""
        return f"o{self.number}.rows"

    @property
    def columns(self) -> list[str]:
        """Names of the columns for orders and filters."""
        return list(self.index.kinds[self.number])

    def column(self, name: str) -> str:
        """Returns a column or SIZE as SQL.

        Raises:
            QueryError: There is no such column.
        """
        if name == SIZE:
            return "CASE WHEN width > 0 THEN width || '×' || height END"
        if name not in self.index.kinds[self.number]:
            hint = did_you_mean(name, self.columns) or "."
            raise QueryError(f"there is no column '{name[:80]}'{hint}")
        return quoted(name)

    def order(self, query: Query) -> str:
        """Returns the SQL expression that rows are sorted by; ties are broken by shard and position."""
        if query.sort == RANDOM:
            return f"md5('{query.seed}:' || row_id)"
        if not query.sort:
            return "NULL::INTEGER"
        column = self.column(query.sort)
        kind = self.index.kinds[self.number].get(query.sort, "VARCHAR")
        return f"CAST({column} AS VARCHAR)" if kind.startswith("STRUCT") else column

    def base(self, query: Query) -> Clause:
        """Returns the clause of search and filter."""
        clauses = []
        if query.search:
            clauses.append(search_clause(query.search))
        if query.where:
            expression = checked_expression(query.where, self.index.names[self.number])
            clauses.append(Clause(f"\n{expression}\n"))
        return Clause.all_of(clauses)

    def chosen(self, query: Query, but: str = "") -> Clause:
        """Returns the clause of the chosen facets.

        Args:
            query: The query.
            but: Name of a facet to leave out, if any.

        Returns:
            The clause.

        Raises:
            QueryError: There is no such facet.
        """
        clauses = []
        for name, values in query.facets.items():
            if name != but:
                marks = ", ".join("?" for _ in values)
                text = f"coalesce(CAST({self.column(name)} AS VARCHAR), '')"
                clauses.append(Clause(f"{text} IN ({marks})", list(values)))
        return Clause.all_of(clauses)

    def page(self, query: Query, place: Place | None, count: int, columns: str = "*") -> list[dict[str, Any]]:
        """Returns one page.

        Args:
            query: Which rows, in which order.
            place: Where the page starts or ends; None for the first page.
            count: Most rows to return.
            columns: SQL list of columns.

        Returns:
            Rows as dicts, in the order of the query.

        Raises:
            QueryError: If the query is invalid or too expensive.
        """
        where = Clause.all_of([self.base(query), self.chosen(query)])
        return keyset_page(
            self.index, self.table, where, self.order(query), query.descending, place, count, columns
        )

    def count(self, query: Query, place: Place | None = None) -> int:
        """Counts the rows of a query.

        Args:
            query: The query.
            place: Count only the rows before this place.

        Returns:
            The number of rows.

        Raises:
            QueryError: The query is invalid.
        """
        where = Clause.all_of([self.base(query), self.chosen(query)])
        before = Clause("true")
        source = self.table
        if place is not None:
            key, before = keyset(
                self.table, self.order(query), query.descending, dataclasses.replace(place, backwards=True)
            )
            source = f"{self.table}, {key.sql}"
            where = Clause(where.sql, [*key.values, *where.values])
        sql = f"SELECT count(*) AS n FROM {source} WHERE ({where.sql}) AND ({before.sql})"
        return self.index.ask(sql, [*where.values, *before.values]).column("n")[0].as_py()

    def facets(self, query: Query) -> dict[str, list[tuple[str, int]]]:
        """Counts the values of all facets, in one scan.

        The counts of a facet ignore what is chosen in that facet, so they show the alternatives. A facet with
        a single value is left out, except a kind of error.

        Args:
            query: Which rows to count.

        Returns:
            Facet -> (value, rows) pairs, most frequent first.

        Raises:
            QueryError: If the query is invalid or too expensive.
        """
        names = [
            name for name in (*OWN_FACETS, *self._carried_facets()) if name == SIZE or name in self.columns
        ]
        base = self.base(query)
        others = [self.chosen(query, but=name) for name in names]
        texts = [f"coalesce(CAST({self.column(name)} AS VARCHAR), '')" for name in names]
        keys = ", ".join(f"{text} AS wallaroo_k{i}" for i, text in enumerate(texts))
        conditions = ", ".join(f"({clause.sql}) AS wallaroo_c{i}" for i, clause in enumerate(others))
        counts = ", ".join(f"count(*) FILTER (wallaroo_c{i})" for i in range(len(names)))
        sets = ", ".join(f"(wallaroo_k{i})" for i in range(len(names)))
        marks = ", ".join(f"wallaroo_k{i}" for i in range(len(names)))
        sql = f"""SELECT grouping_id({marks}) AS which, coalesce({marks}) AS value, [{counts}] AS counts
            FROM (SELECT {keys}, {conditions} FROM {self.table} WHERE {base.sql})
            GROUP BY GROUPING SETS ({sets})"""
        values = [value for clause in others for value in clause.values] + base.values
        answer = self.index.ask(sql, values).to_pylist()
        found: dict[str, list[tuple[str, int]]] = {}
        every = (1 << len(names)) - 1
        for place, name in enumerate(names):
            which = every ^ (1 << (len(names) - 1 - place))
            mine = [(row["value"], row["counts"][place]) for row in answer if row["which"] == which]
            chosen = query.facets.get(name, ())
            # Rows without an error have no kind of one, which the status says already.
            silent = name in ("error_type", "environment_digest")
            mine = [(value, n) for value, n in mine if value in chosen or (n and (value or not silent))]
            mine += [(value, 0) for value in chosen if value not in dict(mine)]
            mine.sort(key=lambda one: (-one[1], one[0]))
            if name in RESULT_NAMES or name == SIZE:
                mine = [one for i, one in enumerate(mine) if i < MAX_VALUES or one[0] in chosen]
            if len(mine) > 1 or chosen or (mine and name == "error_type"):
                found[name] = mine
        return found

    def _carried_facets(self) -> list[str]:
        """Returns the carried columns with few values."""
        version = self.index.versions[self.number]
        if self._carried is None or self._carried[0] != version:
            kinds = self.index.kinds[self.number]
            source = {name: key for key, name in self.index.names[self.number].items()}
            names = [
                name
                for name, kind in kinds.items()
                if name not in ("shard", "position")
                and _may_be_facet(source.get(name, name))
                and kind in FACET_TYPES
            ]
            few: list[str] = []
            if names:
                counts = ", ".join(f"approx_count_distinct({quoted(name)})" for name in names)
                answer = self.index.ask(f"SELECT [{counts}] AS n FROM {self.table}").column("n")[0].as_py()
                few = [name for name, count in zip(names, answer, strict=True) if 1 < count <= MAX_VALUES]
            self._carried = (version, few[:MAX_CARRIED])
        return self._carried[1]


def _may_be_facet(name: str) -> bool:
    """Tells whether a column is carried, and not a number or digest of an earlier result."""
    earlier = first_name(name)
    return name not in RESULT_NAMES and (earlier not in RESULT_NAMES or earlier in EARLIER_FACETS)


def keyset(table: str, order: str, descending: bool, place: Place) -> tuple[Clause, Clause]:
    """Returns the two parts of a keyset condition.

    Args:
        table: Table or subquery with columns `shard` and `position`.
        order: SQL expression that rows are sorted by.
        descending: Direction; NULLs come last either way.
        place: The row to compare with, and the direction.

    Returns:
        A subquery for FROM that looks up the order's value at that row, and the condition that holds for rows
        after it (before it, if `place.backwards`).
    """
    # Names that no column of a manifest has, since a user's filter is in the same statement.
    value = "wallaroo_place.wallaroo_value"
    key = Clause(
        f"(SELECT {order} AS wallaroo_value FROM {table} WHERE shard = ? AND position = ?) AS wallaroo_place",
        [place.shard, place.position],
    )
    forward = not place.backwards
    further = "<" if descending == forward else ">"
    beside = ">" if forward else "<"
    beyond = f"{value} IS NOT NULL AND ({order}) {further} {value}"
    if forward:
        beyond = f"({beyond}) OR ({value} IS NOT NULL AND ({order}) IS NULL)"
    else:
        beyond = f"({beyond}) OR ({value} IS NULL AND ({order}) IS NOT NULL)"
    same = f"(({order}) IS NOT DISTINCT FROM {value} AND (shard, position) {beside} (?, ?))"
    return key, Clause(f"{same} OR {beyond}", [place.shard, place.position])


def keyset_page(
    index: Index,
    table: str,
    where: Clause,
    order: str,
    descending: bool,
    place: Place | None,
    count: int,
    columns: str = "*",
    tables: dict[str, pa.Table] | None = None,
) -> list[dict[str, Any]]:
    """Returns one page of a table.

    Args:
        index: The database.
        table: Table or subquery with columns `shard` and `position`.
        where: Condition on its rows.
        order: SQL expression to sort by; ties are broken by shard and position.
        descending: Direction of `order`; NULLs come last either way.
        place: Where the page starts or ends; None for the first page.
        count: Most rows to return.
        columns: SQL list of columns.
        tables: Arrow tables that the condition may use.

    Returns:
        Rows as dicts, in order.

    Raises:
        QueryError: If DuckDB refuses the query, or it is too expensive.
    """
    source, values = f"{table} AS r", []
    backwards = place is not None and place.backwards
    if place is not None:
        key, beyond = keyset(table, order, descending, place)
        source = f"{source}, {key.sql}"
        where = Clause.all_of([where, beyond])
        values = key.values
    direction = "DESC" if descending != backwards else "ASC"
    nulls = "FIRST" if backwards else "LAST"
    beside = "DESC" if backwards else "ASC"
    sql = f"""SELECT {"r.*" if columns == "*" else columns} FROM {source} WHERE {where.sql}
        ORDER BY ({order}) {direction} NULLS {nulls}, shard {beside}, position {beside} LIMIT {count}"""
    rows = index.ask(sql, [*values, *where.values], tables).to_pylist()
    return rows[::-1] if backwards else rows
