"""Rows of several outputs that belong together, the differing ones first.

An output is paired with an earlier one of the command by lineage if one was made from the other: a row with
the row that holds its source image. Otherwise rows are paired by id, version and sample. Knows nothing of
HTML, or of how votes are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import DATA_FOLDER
from wallaroo.workflows.outputs.values import flat
from wallaroo.workflows.viewer.index import Index
from wallaroo.workflows.viewer.output import Output, Page
from wallaroo.workflows.viewer.query import Clause, Place, keyset_page, search_clause

SHOWN = ("all", "differing", "unvoted")
_SAME = ("id", "version", "sample")
_OF_EACH = (
    "shard",
    "position",
    "status",
    "sha256",
    "prompt",
    "width",
    "height",
    "text",
    "error_type",
    "error_message",
    "seed",
)


@dataclass(frozen=True)
class Side:
    """The row of one output in a pair."""

    output: int
    """Number of the output."""
    row: dict[str, Any]
    """Its columns."""


@dataclass(frozen=True)
class Pair:
    """Rows of all outputs that belong together."""

    id: str
    """Id of the row in the first output."""
    version: int
    """Version of the row in the first output."""
    sample: int
    """Sample of the row in the first output."""
    prompt: str
    """Prompt of the row in the first output."""
    language: str
    """Language of the row in the first output."""
    differs: bool
    """Whether status or result differ."""
    place: Place
    """Place of the row in the first output."""
    sides: list[Side]
    """The row of each output."""


@dataclass(frozen=True)
class Link:
    """Two outputs of which one was made from the other."""

    child: int
    """Number of the output that was made from the other."""
    parent: int
    """Number of the output that holds its sources."""
    folder: str
    """Start of the paths of the parent's shards."""

    def rows(self) -> str:
        """Returns a join of rows `c` of the child with their sources `p` as SQL.

        A source is known by row_id and digest, also after its output was moved. A source that was not read
        has no digest; it is known by its path.
        """
        folder = self.folder.replace("'", "''")
        return (
            f"o{self.child}.rows AS c JOIN o{self.parent}.rows AS p ON c.source.row_id = p.row_id AND "
            f"coalesce(nullif(c.source.sha256, '') = p.sha256, starts_with(c.source.uri, '{folder}'))"
        )

    def join(self, number: int) -> str:
        """Returns the join of one of the two outputs, as `rN`, to the other one as SQL.

        Of several results of one source the first is joined.
        """
        own, other, joined = ("c", "p", self.parent) if number == self.child else ("p", "c", self.child)
        return (
            f" JOIN (SELECT {other}.row_id AS other, min({own}.row_id) AS own FROM {self.rows()} GROUP BY 1)"
            f" AS l{number} ON l{number}.other = r{joined}.row_id"
            f" JOIN o{number}.rows AS r{number} ON r{number}.row_id = l{number}.own"
        )


class Comparison:
    """A comparison of all outputs of a viewer.

    Args:
        index: Of all outputs.
        outputs: The outputs to compare, at least two.
    """

    def __init__(self, index: Index, outputs: Sequence[Output]) -> None:
        self.index, self.outputs = index, outputs
        self._links: tuple[list[int], list[Link | None]] = ([], [])

    @property
    def ready(self) -> bool:
        """Whether every output has indexed rows."""
        return all(self.index.kinds[output.number] for output in self.outputs)

    def settings(self) -> list[tuple[str, list[str]]]:
        """Returns the settings that differ: name and one value an output.

        Of different tasks only those are compared that each of them has.
        """
        found = []
        for output in self.outputs:
            options, config = output.run["options"], output.run["config"]
            found.append(flat({**config, "model": options.get("model", "")}))
        names = sorted({name for one in found for name in one})
        if len({output.task for output in self.outputs}) > 1:
            names = [name for name in names if name == "prompt" or all(name in one for one in found)]
        lines = []
        for name in names:
            values = [str(one.get(name, "")) for one in found]
            if len(set(values)) > 1:
                lines.append((name, values))
        return lines

    def links(self) -> list[Link | None]:
        """Returns how each output but the first is paired.

        Returns:
            The link to an earlier output; None if it is paired with the first one by id, version and sample.

        Raises:
            QueryError: The outputs are too large.
        """
        versions = list(self.index.versions)
        if self._links[0] != versions:
            self._links = versions, [self._link(number) for number in range(1, len(self.outputs))]
        return self._links[1]

    def _link(self, number: int) -> Link | None:
        """Returns the link with the most rows. Several may exist, since equal seeds give equal images."""
        links = [
            Link(child, parent, storage.join(self.outputs[parent].path, DATA_FOLDER, ""))
            for earlier in range(number)
            for child, parent in ((number, earlier), (earlier, number))
        ]
        counts = [
            self.index.ask(f"SELECT count(*) AS n FROM {link.rows()}").column("n")[0].as_py()
            for link in links
        ]
        best = max(range(len(links)), key=counts.__getitem__)
        return links[best] if counts[best] else None

    def _table(self) -> str:
        """Returns a subquery of pairs: columns of the first output, then `x0_status` and so on."""
        columns = ["r0.id AS id", "r0.version AS version", "r0.sample AS sample", "r0.prompt AS prompt"]
        columns += [
            "r0.language AS language",
            "r0.shard AS shard",
            "r0.position AS position",
            "r0.text AS text",
        ]
        source = "o0.rows AS r0"
        differs = []
        for number, link in enumerate([None, *self.links()]):
            columns += [f"r{number}.{name} AS x{number}_{name}" for name in _OF_EACH]
            if number:
                same = " AND ".join(f"r0.{name} = r{number}.{name}" for name in _SAME)
                source += link.join(number) if link else f" JOIN o{number}.rows AS r{number} ON {same}"
                differs.append(
                    f"r0.sha256 IS DISTINCT FROM r{number}.sha256 OR r0.status <> r{number}.status"
                )
        columns.append(f"({' OR '.join(differs)}) AS differs")
        return f"(SELECT {', '.join(columns)} FROM {source})"

    def _where(self, search: str, show: str) -> Clause:
        clauses = [search_clause(search)] if search else []
        if show in ("differing", "unvoted"):
            clauses.append(Clause("differs"))
        if show == "unvoted":
            clauses.append(
                Clause(
                    "NOT EXISTS (FROM votes AS v WHERE " + " AND ".join(f"v.{n} = r.{n}" for n in _SAME) + ")"
                )
            )
        return Clause.all_of(clauses)

    def page(self, search: str, show: str, place: Place | None, count: int, votes: pa.Table) -> Page:
        """Returns one page of pairs.

        Args:
            search: Words that must occur in the prompt of the first output.
            show: One of SHOWN; `unvoted` are differing pairs without a vote.
            place: Where the page starts or ends; None for the first page.
            count: Most pairs of the page.
            votes: From `Votes.table`.

        Returns:
            The page, with a Pair a row.

        Raises:
            QueryError: If the query is too expensive.
        """
        if not self.ready:
            return Page([], True, True)
        rows = keyset_page(
            self.index,
            self._table(),
            self._where(search, show),
            "CASE WHEN differs THEN 0 ELSE 1 END",
            False,
            place,
            count + 1,
            tables={"votes": votes},
        )
        more = len(rows) > count
        if place is not None and place.backwards:
            rows, first, last = (rows[1:] if more else rows), not more, False
        else:
            rows, first, last = rows[:count], place is None, not more
        return Page([self._pair(row) for row in rows], first, last)

    def counts(self, search: str) -> dict[str, int]:
        """Counts the pairs that a search finds.

        Returns:
            Number of `pairs`, and how many of them are `differing`.

        Raises:
            QueryError: The search is invalid.
        """
        if not self.ready:
            return {"pairs": 0, "differing": 0}
        where = self._where(search, "all")
        answer = self.index.ask(
            f"SELECT count(*) AS pairs, count(*) FILTER (differs) AS differing FROM {self._table()} AS r "
            f"WHERE {where.sql}",
            where.values,
        )
        return answer.to_pylist()[0]

    def _pair(self, row: dict[str, Any]) -> Pair:
        sides = [
            Side(output.number, {name: row[f"x{number}_{name}"] for name in _OF_EACH})
            for number, output in enumerate(self.outputs)
        ]
        return Pair(
            row["id"],
            row["version"],
            row["sample"],
            row["prompt"] or "",
            row["language"] or "",
            bool(row["differs"]),
            Place(row["shard"], row["position"]),
            sides,
        )
