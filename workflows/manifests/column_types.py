"""Types of columns: how Parquet files store them, and the one type in which two of them join.

Two types join if no value changes. Some values are only known when they are read, such as integers beyond
2^53 beside floats. They are refused then.
"""

import json
import uuid
from typing import Any

import pyarrow as pa
import pyarrow.types as types

from wallaroo.model.errors import InputError
from wallaroo.workflows.text import first_line

UNFIT_MARK = b"wallaroo.types"
"""Key in the metadata of a schema: JSON, column -> the types that it is joined from, each with a file."""


class Unfit(ValueError):
    """A value that the one type of its column cannot hold."""

    def __init__(self, name: str, words: str):
        """Keeps the name of the column.

        Args:
            name: Name of the column.
            words: Arrow's words about the value.
        """
        super().__init__(words)
        self.name = name


def is_json(kind: pa.DataType) -> bool:
    """Whether a type is Arrow's extension type for JSON."""
    return isinstance(kind, pa.JsonType)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Chooses the type in which values of a column are passed on.

    Views become plain types, and extension types of text become text.

    Args:
        kind: Type in the file.

    Returns:
        The plain type.

    Raises:
        ValueError: It is any other extension type.
    """
    if kind == pa.string_view() or isinstance(kind, pa.UuidType) or is_json(kind):
        return pa.string()
    if kind == pa.binary_view():
        return pa.binary()
    if isinstance(kind, pa.Bool8Type):
        return pa.bool_()
    if isinstance(kind, pa.BaseExtensionType):
        raise ValueError(kind.extension_name)
    if types.is_dictionary(kind):
        inner = plain_type(kind.value_type)
        return kind if inner == kind.value_type else pa.dictionary(kind.index_type, inner, kind.ordered)
    if types.is_struct(kind):
        return pa.struct([field.with_type(plain_type(field.type)) for field in kind])
    if types.is_map(kind):
        return pa.map_(plain_type(kind.key_type), plain_type(kind.item_type), kind.keys_sorted)
    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        return pa.list_(plain_type(kind.value_type)) if _is_list_view(kind) else kind
    inner = plain_type(kind.value_type)
    if inner == kind.value_type:
        return kind
    field = kind.value_field.with_type(inner)
    if types.is_fixed_size_list(kind):
        return pa.list_(field, kind.list_size)
    return pa.large_list(field) if types.is_large_list(kind) else pa.list_(field)


def joined_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Finds the type that holds the values of two types unchanged.

    Args:
        one: A type.
        other: Another type.

    Returns:
        The joined type; None if there is none.
    """
    if one == other or types.is_null(other):
        return one
    if types.is_null(one):
        return other
    if types.is_dictionary(one) or types.is_dictionary(other):
        if types.is_dictionary(one) and types.is_dictionary(other) and one.value_type == other.value_type:
            return _unified(one, other)
        inner = [kind.value_type if types.is_dictionary(kind) else kind for kind in (one, other)]
        return joined_type(*inner)
    if types.is_nested(one) or types.is_nested(other):
        return _joined_nested(one, other)
    if types.is_temporal(one) and types.is_temporal(other):
        return _joined_times(one, other)
    both = (one, other)
    if any(map(types.is_decimal, both)):
        return _joined_decimals(one, other)
    if any(map(_is_text, both)) != all(map(_is_text, both)):
        return None
    return _unified(one, other)


_DIGITS = {8: 3, 16: 5, 32: 10, 64: 20}
"""Bits of an integer -> decimal digits that it may have."""


def _joined_decimals(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Joins decimals and integers. Floats are refused, since few of them are exactly what they display."""
    whole, scale = 0, 0
    for kind in (one, other):
        if types.is_integer(kind):
            whole = max(whole, _DIGITS[kind.bit_width])
        elif types.is_decimal(kind):
            whole, scale = max(whole, kind.precision - kind.scale), max(scale, kind.scale)
        else:
            return None
    if whole + scale > 76:
        return None
    return pa.decimal128(whole + scale, scale) if whole + scale <= 38 else pa.decimal256(whole + scale, scale)


def _is_text(kind: pa.DataType) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _unified(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    two = [pa.schema([("", one)]), pa.schema([("", other)])]
    try:
        return pa.unify_schemas(two, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None


_UNITS = ("s", "ms", "us", "ns")


def _joined_times(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Joins times. Instants of several zones join as instants, and a day as the midnight that begins it."""
    if types.is_timestamp(one) and types.is_timestamp(other):
        if (one.tz is None) != (other.tz is None):
            return None
        unit = max(one.unit, other.unit, key=_UNITS.index)
        return pa.timestamp(unit, one.tz if one.tz == other.tz else "UTC")
    stamps = [kind for kind in (one, other) if types.is_timestamp(kind)]
    if stamps and all(types.is_timestamp(kind) or types.is_date(kind) for kind in (one, other)):
        return stamps[0] if stamps[0].tz is None else None
    return _unified(one, other)


def _joined_nested(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if types.is_struct(one) and types.is_struct(other):
        fields = {field.name: field.type for field in one}
        if len(fields) < one.num_fields or len({field.name for field in other}) < other.num_fields:
            return None
        for field in other:
            kind = joined_type(fields.get(field.name, pa.null()), field.type)
            if kind is None:
                return None
            fields[field.name] = kind
        return pa.struct(list(fields.items()))
    if not (_is_list(one) and _is_list(other)):
        return None
    inner = joined_type(one.value_type, other.value_type)
    if inner is None:
        return None
    large = types.is_large_list(one) or types.is_large_list(other)
    return pa.large_list(inner) if large else pa.list_(inner)


def _is_list_view(kind: pa.DataType) -> bool:
    return bool(types.is_list_view(kind) or types.is_large_list_view(kind))


def _is_read_as_values(kind: pa.DataType) -> bool:
    """Whether a type has one within that Arrow casts wrongly, or not at all, to its plain type.

    The cast of a view of a list has too few offsets, and that of an extension type inside another type
    keeps the bytes of a UUID.
    """
    inner = [kind.field(index).type for index in range(kind.num_fields)]
    wrong = _is_list_view(kind) or isinstance(kind, pa.BaseExtensionType)
    return wrong or any(_is_read_as_values(one) for one in inner)


def _plain_value(value: Any) -> Any:
    """A value with its UUIDs as text."""
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain_value(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain_value, value))
    return value


def _is_list(kind: pa.DataType) -> bool:
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def converted(column: Any, name: str, kind: pa.DataType) -> Any:
    """Converts a column to the type that it has in the manifest.

    Args:
        column: Array or ChunkedArray.
        name: Name of the column, for the error.
        kind: Type of the column in the manifest.

    Returns:
        The converted column.

    Raises:
        Unfit: The type cannot hold a value.
    """
    if isinstance(column.type, pa.UuidType):
        texts = [None if value is None else str(_uuid(value)) for value in column.to_pylist()]
        column = pa.array(texts, pa.string())
    elif isinstance(column.type, (pa.JsonType, pa.Bool8Type)):
        column = column.cast(column.type.storage_type)
    if column.type == kind:
        return column
    if plain_type(column.type) == pa.bool_() and pa.types.is_int8(column.type):
        return column.cast(pa.bool_())
    try:
        if _is_read_as_values(column.type):
            return pa.array(_plain_value(column.to_pylist()), kind)
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise Unfit(name, first_line(error)) from error


def _uuid(value: Any) -> uuid.UUID:
    return value if isinstance(value, uuid.UUID) else uuid.UUID(bytes=value)


def refuse_unfit(error: Unfit, path: str, schema: pa.Schema) -> InputError:
    """Makes the error for a value that the one type of its column cannot hold.

    Args:
        error: From `converted`.
        path: Path of the file.
        schema: Schema of the manifest, with UNFIT_MARK in its metadata.

    Returns:
        The error to raise.
    """
    kind = schema.field(error.name).type
    joined = json.loads((schema.metadata or {}).get(UNFIT_MARK, b"{}")).get(error.name, [])
    others = [f"{other} in {file}" for other, file in joined if not path.endswith(file)]
    mine = next((f" is {own}," for own, file in joined if path.endswith(file)), "")
    where = f", as it is {others[0]}" if others else ""
    return InputError(
        f"Column '{error.name}' of {path}{mine} has a value that {kind} cannot hold{where} "
        f"({str(error)[:150]}): give it one type in all files."
    )
