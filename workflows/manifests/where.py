"""The SQL condition of `--where`, which chooses rows of a manifest."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from wallaroo.workflows.settings import OptionError
from wallaroo.workflows.text import first_line


class Filter:
    """Chooses rows of a manifest by an SQL expression over its columns, with DuckDB.

    The expression sees the rows alone: no file, network, environment or extension. DuckDB ignores case in
    names. If two columns differ only in case, the expression must spell the name exactly.
    """

    def __init__(self, expression: str, schema: pa.Schema):
        """Checks the expression on an empty table.

        Args:
            expression: A condition in DuckDB's SQL.
            schema: Schema of the manifest.

        Raises:
            OptionError: The expression does not fit the columns. The message quotes DuckDB.
        """
        import duckdb

        self.expression, self.error = expression, duckdb.Error
        # The names must be free, since a manifest may use any fixed one.
        taken = {name.lower() for name in schema.names}
        free = (name for name in map("row_{}".format, itertools.count()) if name not in taken)
        self.number = next(free)
        self.aliases = dict(zip(twins(schema.names), free, strict=False))
        self.database = duckdb.connect(
            config={
                "enable_external_access": False,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "python_enable_replacements": False,
                "lock_configuration": True,
                "threads": 1,
            }
        )
        self.condition = expression
        if self.aliases:
            try:
                self.condition = exact_names(expression, self.aliases, self.database)
            except ValueError as error:
                raise self._refused(str(error)) from None
        self.matches(schema.empty_table())

    def matches(self, table: pa.Table) -> np.ndarray:
        """Finds the rows for which the expression is true.

        Args:
            table: Some rows of the manifest.

        Returns:
            bool [rows].

        Raises:
            OptionError: DuckDB refuses the expression for these rows.
        """
        numbers = np.arange(table.num_rows)
        table = table.rename_columns([self.aliases.get(name, name) for name in table.column_names])
        self.database.register("manifest", table.append_column(self.number, pa.array(numbers)))
        query = f"SELECT {self.number} FROM manifest WHERE (\n{self.condition}\n)"
        try:
            if len(self.database.extract_statements(query)) != 1:
                raise self.error("it is more than one expression")
            chosen = self.database.execute(query).fetchnumpy()[self.number]
        except self.error as error:
            raise self._refused(first_line(error)) from None
        mask = np.zeros(table.num_rows, dtype=bool)
        mask[chosen] = True
        return mask

    def _refused(self, words: str) -> OptionError:
        return OptionError(f"where is '{self.expression}', which DuckDB refuses ({words}): correct it.")


def exact_names(expression: str, aliases: Mapping[str, str], database: Any) -> str:
    """Replaces names of columns that differ only in case by unique ones.

    DuckDB's own parser locates the names, so texts and comments stay.

    Args:
        expression: A condition in DuckDB's SQL.
        aliases: Name of a column that differs from another only in case -> a unique name for it.
        database: A connection to DuckDB.

    Returns:
        The expression with unique names.

    Raises:
        ValueError: DuckDB cannot parse the expression, or a name may be any of several columns.
    """
    import duckdb

    head, tail = "SELECT 1 FROM manifest WHERE (\n", "\n)"
    query = f"{head}{expression}{tail}".encode()
    try:
        ((tree,),) = database.execute("SELECT json_serialize_sql(?)", [query.decode()]).fetchall()
    except duckdb.Error as error:
        raise ValueError(first_line(error)) from None
    found = json.loads(tree)
    if found["error"]:
        raise ValueError(first_line(found.get("error_message")))
    lower = {name.lower() for name in aliases}
    places = []
    for node in _columns(found):
        names = node["column_names"]
        index = 1 if len(names) > 1 and names[0].lower() == "manifest" else 0
        if names[index].lower() not in lower:
            continue
        if names[index] not in aliases:
            several = [name for name in aliases if name.lower() == names[index].lower()]
            raise ValueError(f"'{names[index]}' may be {' or '.join(several)}, which differ in case")
        quoted = (f'"{name}"' for name in (aliases[names[index]], *names[index + 1 :]))
        places.append((node["query_location"], node["query_location_length"], ".".join(quoted)))
    for start, length, text in sorted(places, reverse=True):
        query = query[:start] + text.encode() + query[start + length :]
    return query.decode()[len(head) : -len(tail)]


def twins(names: Sequence[str]) -> list[str]:
    """Returns the names that differ from another one only in case."""
    lower = Counter(name.lower() for name in names)
    return [name for name in names if lower[name.lower()] > 1]


def _columns(tree: Any) -> Iterator[dict[str, Any]]:
    """Finds all references to columns in a statement that DuckDB has serialised."""
    if isinstance(tree, dict):
        if tree.get("class") == "COLUMN_REF":
            yield tree
        for inner in tree.values():
            yield from _columns(inner)
    elif isinstance(tree, list):
        for inner in tree:
            yield from _columns(inner)
