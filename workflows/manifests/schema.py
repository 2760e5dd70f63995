"""One Arrow schema for all files of a manifest, and values as Arrow holds them."""

import json
import os
import re
from typing import Any

import pyarrow as pa

from wallaroo.model.errors import InputError
from wallaroo.workflows.manifests.column_types import UNFIT_MARK, Unfit, joined_type
from wallaroo.workflows.manifests.types import Scan
from wallaroo.workflows.outputs.schema import JSON_MARK, json_columns
from wallaroo.workflows.text import first_line


def kind_of(value: Any) -> str:
    """Kind of a JSON value: a scalar's own, `list:` with one kind of scalar, or `json` for anything else."""
    if value is None:
        return "null"
    if isinstance(value, list):
        inner = merged_kind({kind_of(item).replace("nan", "float") for item in value})
        return "json" if inner == "json" or inner.startswith("list:") else f"list:{inner}"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if abs(value) <= 2**53 else "long" if -(2**63) <= value < 2**63 else "json"
    if isinstance(value, float) and value != value:
        return "nan"
    return {float: "float", str: "str"}.get(type(value), "json")


def merged_kind(kinds: set[str]) -> str:
    """Kind that holds the values of all these kinds without loss; `json` if there is none."""
    kinds = kinds - {"null"}
    if "nan" in kinds:
        # pandas writes NaN for "nothing"; it is a number only beside numbers.
        kinds = kinds - {"nan"} if kinds - {"nan", "int", "float"} else kinds - {"nan"} | {"float"}
    if len(kinds) <= 1:
        return next(iter(kinds), "null")
    if kinds <= {"int", "float"}:
        return "float"
    if kinds <= {"int", "long"}:
        return "long"
    if all(kind.startswith("list:") for kind in kinds):
        inner = merged_kind({kind.removeprefix("list:") for kind in kinds})
        return "json" if inner == "json" else f"list:{inner}"
    return "json"


_ARROW = {
    "null": pa.string(),
    "bool": pa.bool_(),
    "int": pa.int64(),
    "long": pa.int64(),
    "float": pa.float64(),
    "str": pa.string(),
    "json": pa.string(),
}


class Columns:
    """Builds one Arrow schema for all files of a manifest, whatever the order in which they are scanned."""

    def __init__(self) -> None:
        self.files: dict[bytes, tuple[int, str, Scan]] = {}

    def add(self, number: int, path: str, found: Scan) -> None:
        """Adds the columns of a file. Of files with equal columns only the first is kept.

        Args:
            number: Place of the file in the manifest.
            path: Path of the file.
            found: Its scan.
        """
        columns = Scan([], found.schema, found.kinds)
        kinds = [(name, sorted(seen)) for name, seen in found.kinds.items()]
        key = repr(kinds).encode() if found.schema is None else found.schema.serialize().to_pybytes()
        if key not in self.files or number < self.files[key][0]:
            self.files[key] = (number, path, columns)

    def schema(self) -> pa.Schema:
        """Builds the schema.

        Returns:
            The columns in the order in which they first occur. The metadata names those that hold JSON text.

        Raises:
            InputError: A column has types in two files that cannot be joined.
        """
        ordered = sorted(self.files.values(), key=lambda entry: entry[0])
        kinds: dict[str, set[str]] = {}
        for _, _, found in ordered:
            for name, seen in found.kinds.items():
                kinds.setdefault(name, set()).update(seen)
        types: dict[str, tuple[pa.DataType, str]] = {}
        joined: dict[str, list[list[str]]] = {}
        metadata: dict[bytes, bytes] = {}
        for _, path, found in ordered:
            for name, arrow in self._types(found, kinds).items():
                told = joined.setdefault(name, [])
                if str(arrow) not in [kind for kind, _ in told] and not pa.types.is_null(arrow):
                    told.append([str(arrow), path])
                if name in types:
                    arrow = self._together(name, types[name], arrow, path)
                types[name] = (arrow, path)
            if found.schema is not None:
                features = (found.schema.metadata or {}).get(b"huggingface")
                metadata |= {b"huggingface": features} if features and not metadata else {}
        marked = [name for name, seen in kinds.items() if merged_kind(seen) in ("json", "list:null")]
        marked += sorted(_json_everywhere([found.schema for _, _, found in ordered]) - {*marked})
        if several := {name: told for name, told in joined.items() if len(told) > 1}:
            # A reader of a copy of these rows need not know where the files were.
            paths = [path for told in several.values() for _, path in told]
            above = os.path.commonprefix(paths)  # noqa: RUF071 - of addresses too
            start = above.rfind("/") + 1
            short = {n: [[kind, path[start:]] for kind, path in told] for n, told in several.items()}
            metadata[UNFIT_MARK] = json.dumps(short).encode()
        if marked:
            metadata[JSON_MARK] = json.dumps(marked).encode()
        fields = [
            # A column without values is text, so that a file with values can follow.
            pa.field(name, pa.string() if pa.types.is_null(arrow) else arrow)
            for name, (arrow, _) in types.items()
        ]
        return pa.schema(fields, metadata=metadata)

    @staticmethod
    def _types(found: Scan, kinds: dict[str, set[str]]) -> dict[str, pa.DataType]:
        if found.schema is not None:
            return {field.name: field.type for field in found.schema}
        return {name: _arrow_type(merged_kind(kinds[name])) for name in found.kinds}

    @staticmethod
    def _together(name: str, before: tuple[pa.DataType, str], arrow: pa.DataType, path: str) -> pa.DataType:
        kind = joined_type(before[0], arrow)
        if kind is None:
            hint = "give it one type in all files."
            if pa.types.is_timestamp(arrow) or pa.types.is_timestamp(before[0]):
                hint = "give all its values a time zone, or none."
            raise InputError(f"Column '{name}' is {before[0]} in {before[1]} but {arrow} in {path}: {hint}")
        return kind


def _json_everywhere(schemas: list[pa.Schema | None]) -> set[str]:
    """Columns that hold JSON text in some file, and plain text in none."""
    marked: set[str] = set()
    plain: set[str] = set()
    for schema in schemas:
        if schema is not None:
            mine = json_columns(schema)
            marked |= mine
            plain |= {one.name for one in schema if one.name not in mine and not pa.types.is_null(one.type)}
    return marked - plain


def _arrow_type(kind: str) -> pa.DataType:
    if kind.startswith("list:") and kind != "list:null":
        return pa.list_(_ARROW[kind.removeprefix("list:")])
    return _ARROW.get(kind, pa.string())


def to_table(columns: list[Any], schema: pa.Schema, rows: int) -> pa.Table:
    """Builds a table, also one without columns, which still has rows.

    Args:
        columns: Arrays in the order of the schema.
        schema: Schema of the table.
        rows: Number of rows.

    Returns:
        The table.
    """
    if columns:
        return pa.Table.from_arrays(columns, schema=schema)
    return pa.table({"": pa.nulls(rows)}).select([])


def text_table(values: list[dict[str, Any]], schema: pa.Schema, marked: frozenset[str]) -> pa.Table:
    """Builds a table of rows that were read from text.

    Args:
        values: Rows, column -> value.
        schema: Schema of the table. NaN becomes null in columns other than floats.
        marked: Columns whose values become JSON text.

    Returns:
        The table.

    Raises:
        Unfit: The type of a column cannot hold a value.
    """
    columns = []
    for field in schema:
        column = [row.get(field.name) for row in values]
        if not pa.types.is_floating(field.type):
            column = [None if value != value else value for value in column]  # NaN
        if field.name in marked:
            column = [None if value is None else json.dumps(value, ensure_ascii=False) for value in column]
        try:
            columns.append(pa.array(column, field.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise Unfit(field.name, first_line(error)) from error
    return to_table(columns, schema, len(values))


def is_text(text: str) -> bool:
    """Whether text is valid Unicode, without lone surrogates."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def mended(text: str) -> str:
    """Replaces lone surrogates, which stand for invalid bytes, by U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
