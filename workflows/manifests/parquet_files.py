"""Rows of Parquet files, row group by row group."""

import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.column_types import converted, is_json, plain_type
from wallaroo.workflows.manifests.layouts import picture_column
from wallaroo.workflows.manifests.schema import is_text, mended, to_table
from wallaroo.workflows.manifests.streams import GIT_LFS, pointer
from wallaroo.workflows.manifests.types import (
    BATCH_ROWS,
    PIECE_BYTES,
    PIECE_ROWS,
    Batch,
    ManifestFile,
    Piece,
    Scan,
    check_width,
)
from wallaroo.workflows.outputs.schema import JSON_MARK, json_columns
from wallaroo.workflows.sources.embedded import COLUMN, Cell, with_column

REPEATED_BYTES = 256 << 20
"""Most bytes that a column of a batch of Parquet rows may take, unless REPEATED_TIMES allows more."""
REPEATED_TIMES = 100
"""A column may also take so many times the bytes of its distinct values.

A file of a few kilobytes can repeat a long text very often, and would fill the memory.
"""
DELTA_ROWS = 64
"""Rows that are read at once of a column in which a value may refer to the one before it."""


def open_parquet(file: ManifestFile, **options: Any) -> pq.ParquetFile:
    """Opens a Parquet file with its checksums verified.

    Args:
        file: The file.
        **options: Further arguments of `pyarrow.parquet.ParquetFile`.

    Returns:
        The open file.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: The storage does not serve, or the file is a pointer of Git LFS.
    """
    with storage.explained(file.path):
        filesystem, inner = storage.parquet_filesystem(file.path)
        source = filesystem.open_input_file(inner)
    try:
        return pq.ParquetFile(source, page_checksum_verification=True, **options)
    except pa.ArrowInvalid:
        if not source.closed and source.size() < 1024 and source.read_at(len(GIT_LFS), 0) == GIT_LFS:
            raise pointer(file) from None
        raise


def parquet_batches(
    file: ManifestFile,
    parquet: pq.ParquetFile,
    names: list[str],
    first_row: int = 0,
    groups: Sequence[int] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Reads some columns of a Parquet file in batches of BATCH_ROWS.

    Args:
        file: The file.
        parquet: The file, open.
        names: Columns to read.
        first_row: Number of the first row, for messages.
        groups: Row groups to read; all if None.

    Yields:
        Batches of rows.

    Raises:
        InputError: A column repeats few long values. Raised before these are written out for each row.
    """
    schema, metadata = parquet.schema_arrow, parquet.metadata
    groups = range(metadata.num_row_groups) if groups is None else groups
    texts = [name for name in names if _is_long(schema.field(name).type)]
    encodings = _encodings(metadata, texts, groups)
    # Arrow reads no column with differences as a dictionary.
    plain = {name for name, found in encodings.items() if any(one.startswith("DELTA_") for one in found)}
    options = {"row_groups": groups, "columns": names, "use_threads": False}
    with open_parquet(
        file, metadata=metadata, read_dictionary=[name for name in texts if name not in plain]
    ) as compact:
        if bounds := {name: _encoded(metadata, name, groups) for name in plain}:
            chunks = _bounded(compact.iter_batches(DELTA_ROWS, **options), bounds, file.path, first_row)
        else:
            chunks = compact.iter_batches(BATCH_ROWS, **options)
        for chunk in chunks:
            for index, name in enumerate(chunk.schema.names):
                column, field = chunk.column(index), schema.field(name)
                if pa.types.is_dictionary(column.type):
                    _refuse_repetition(column, name, file.path, first_row)
                    chunk = chunk.set_column(index, field, column.cast(field.type))
            yield chunk
            first_row += chunk.num_rows


def _chunks(metadata: pq.FileMetaData, groups: Sequence[int]) -> Iterator[pq.ColumnChunkMetaData]:
    for group in map(metadata.row_group, groups):
        yield from map(group.column, range(group.num_columns))


def _encodings(metadata: pq.FileMetaData, names: list[str], groups: Sequence[int]) -> dict[str, set[str]]:
    """Column -> the encodings of its pages."""
    found: dict[str, set[str]] = {name: set() for name in names}
    for chunk in _chunks(metadata, groups):
        if chunk.path_in_schema in found:
            found[chunk.path_in_schema].update(chunk.encodings)
    return found


def _encoded(metadata: pq.FileMetaData, name: str, groups: Sequence[int]) -> int:
    """Bytes of a column before it is decoded."""
    chunks = _chunks(metadata, groups)
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == name)


def _bounded(
    chunks: Iterator[pa.RecordBatch], bounds: dict[str, int], path: str, first_row: int
) -> Iterator[pa.RecordBatch]:
    """Joins small batches to batches of BATCH_ROWS.

    Args:
        chunks: The small batches.
        bounds: Column of differences -> its bytes before it is decoded.
        path: Path of the file, for the error.
        first_row: Number of the first row, for the error.

    Raises:
        InputError: A column has very many bytes for what is stored of it.
    """
    held, sizes = list[pa.RecordBatch](), dict.fromkeys(bounds, 0)
    for chunk in chunks:
        held.append(chunk)
        for name, bound in bounds.items():
            sizes[name] += chunk.column(name).nbytes
            if sizes[name] > max(REPEATED_BYTES, REPEATED_TIMES * bound):
                raise InputError(
                    f"Column '{name}' of {path} has {sizes[name] >> 20:,} MiB in "
                    f"{sum(map(len, held)):,} rows from row {first_row} on, which repeat {bound:,} bytes: "
                    f"shorten its values."
                )
        if sum(map(len, held)) >= BATCH_ROWS:
            yield from pa.Table.from_batches(held).combine_chunks().to_batches()
            first_row += sum(map(len, held))
            held, sizes = [], dict.fromkeys(bounds, 0)
    if held:
        yield from pa.Table.from_batches(held).combine_chunks().to_batches()


def _is_long(kind: pa.DataType) -> bool:
    """Whether a value of this type may have any length."""
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(is_kind(kind) for is_kind in kinds)


def _refuse_repetition(column: pa.DictionaryArray, name: str, path: str, first_row: int) -> None:
    values = column.dictionary
    if not _is_long(values.type) or values.nbytes * len(column) <= REPEATED_BYTES:
        return
    size = pc.sum(pc.binary_length(values).take(column.indices)).as_py() or 0
    if size > max(REPEATED_BYTES, REPEATED_TIMES * values.nbytes):
        raise InputError(
            f"Column '{name}' of {path} has {size >> 20:,} MiB in {len(column):,} rows from row {first_row} "
            f"on, which repeat {len(values):,} long values: shorten these."
        )


def scan_parquet(file: ManifestFile) -> Scan:
    """Scans a Parquet file by its footer.

    Args:
        file: The file.

    Returns:
        Its pieces, and the schema in which its values are passed on.

    Raises:
        InputError: It has two columns of one name, too many columns, or one of a type that is not read.
    """
    with open_parquet(file) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
        for name in schema.names:
            if schema.names.count(name) > 1:
                raise InputError(f"{file.path} has two columns named '{name}': rename one.")
        if file.cells:
            schema = _with_references(schema, file)
        schema = _plain(_without_intervals(schema, _intervals(parquet)), file)
        pieces, first, start, rows, size = [], 0, 0, 0, 0
        for group in range(metadata.num_row_groups):
            rows += metadata.row_group(group).num_rows
            size += metadata.row_group(group).total_byte_size
            if rows >= PIECE_ROWS or size >= PIECE_BYTES or group == metadata.num_row_groups - 1:
                if rows:
                    pieces.append(Piece(file, first, rows, start, group + 1))
                first, start, rows, size = first + rows, group + 1, 0, 0
    check_width(file, schema.names)
    return Scan(pieces, schema)


def _intervals(parquet: pq.ParquetFile) -> set[str]:
    """Columns of Parquet's type INTERVAL, which Arrow reads as 12 bytes. DuckDB writes it."""
    columns = map(parquet.schema.column, range(len(parquet.schema)))
    return {one.path for one in columns if one.converted_type == "INTERVAL"}


def _without_intervals(schema: pa.Schema, names: set[str]) -> pa.Schema:
    return pa.schema(
        [field.with_type(pa.string()) if field.name in names else field for field in schema],
        metadata=schema.metadata,
    )


def _interval_text(value: bytes | None) -> str | None:
    """An interval as ISO 8601 has it. Months, days and seconds stay apart, as they have no fixed ratio."""
    if value is None:
        return None
    months, days, milliseconds = struct.unpack("<3I", value)
    seconds = f"{milliseconds // 1000}.{milliseconds % 1000:03}".rstrip("0").rstrip(".")
    text = f"{months}M" if months else ""
    text += f"{days}D" if days else ""
    text += f"T{seconds}S" if milliseconds else ""
    return f"P{text or 'T0S'}"


def _with_references(schema: pa.Schema, file: ManifestFile) -> pa.Schema:
    """Replaces a column that holds pictures by one of references to their rows."""
    name = picture_column(schema.names, file.column)
    index = schema.get_field_index(name)
    if index < 0 or _is_named(schema.field(index).type):
        return schema
    kind = _inner(schema.field(index).type)
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        kind = fields.get("bytes", pa.null())
        if pa.types.is_null(kind) and "path" in fields and _is_named(fields["path"]):
            kind = pa.binary()  # paths alone, as pandas writes them
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)):
        raise InputError(
            f"Column '{name}' of {file.path} is {schema.field(index).type}, but must hold paths, bytes or "
            f"structs of bytes and path: convert it."
        )
    return schema.set(index, pa.field(name, pa.string()))


def _is_named(kind: pa.DataType) -> bool:
    """Whether a column of this type names pictures instead of holding them."""
    kind = _inner(kind)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def _inner(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a list; any other type unchanged."""
    listed = (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )
    return kind.value_type if listed else kind


def _plain(schema: pa.Schema, file: ManifestFile) -> pa.Schema:
    """The schema with the types in which values are passed on. Columns of JSON are marked."""
    fields, marked = [], json_columns(schema)
    for field in schema:
        try:
            if b"ARROW:extension:name" in (field.metadata or {}):
                raise ValueError
            kind = plain_type(field.type)
        except ValueError:
            raise InputError(
                f"Column '{field.name}' of {file.path} has an Arrow extension type, which is not read: "
                f"store it as a plain type, or leave it out."
            ) from None
        if is_json(field.type):
            marked |= {field.name}
        fields.append(field.with_type(kind))
    metadata = dict(schema.metadata or {})
    if marked:
        metadata[JSON_MARK] = json.dumps(sorted(marked)).encode()
    return pa.schema(fields, metadata=metadata)


def read_parquet(piece: Piece, schema: pa.Schema) -> Iterator[Batch]:
    """Reads the rows of some row groups.

    Args:
        piece: The row groups.
        schema: Schema of the manifest.

    Yields:
        Batches of rows. Columns that the file lacks are null.

    Raises:
        Unfit: The type of a column cannot hold a value.
    """
    row = piece.first_row
    with open_parquet(piece.file) as parquet:
        theirs = parquet.schema_arrow
        names = [name for name in schema.names if name in theirs.names]
        intervals = _intervals(parquet)
        picture = picture_column(theirs.names, piece.file.column)
        referred = piece.file.cells and picture in names and not _is_named(theirs.field(picture).type)
        names = [name for name in names if not (referred and name == picture)]
        groups = range(piece.start, min(piece.stop, parquet.metadata.num_row_groups))
        for chunk in parquet_batches(piece.file, parquet, names, row, groups):
            table, faults = _mended_columns(pa.Table.from_batches([chunk]), row)
            for name in intervals.intersection(names):
                texts = pa.array(map(_interval_text, table.column(name).to_pylist()), pa.string())
                table = table.set_column(names.index(name), name, texts)
            columns = [
                converted(table.column(field.name), field.name, field.type)
                if field.name in names
                else pa.nulls(chunk.num_rows, field.type)
                for field in schema
            ]
            if referred:
                place = piece.file.path if picture == COLUMN else with_column(piece.file.path, picture)
                cells = [str(Cell(place, row + index)) for index in range(chunk.num_rows)]
                columns[schema.names.index(picture)] = pa.array(cells, schema.field(picture).type)
            # A batch without columns still has rows.
            yield Batch(row, to_table(columns, schema, chunk.num_rows), faults)
            row += chunk.num_rows


def _mended_columns(table: pa.Table, first_row: int) -> tuple[pa.Table, dict[int, str]]:
    """Repairs text that is not UTF-8. Returns the table and the rows that had such text."""
    faults: dict[int, str] = {}
    for index, field in enumerate(table.schema):
        try:
            table.column(index).validate(full=True)
            continue
        except pa.ArrowInvalid:
            inner = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            if inner not in (pa.string(), pa.large_string(), pa.string_view()):
                raise
        texts = []
        for row, raw in enumerate(table.column(index).cast(inner).cast(pa.large_binary()).to_pylist()):
            text = None if raw is None else raw.decode(errors="surrogateescape")
            if text is not None and not is_text(text):
                faults.setdefault(first_row + row, f"is not valid UTF-8 in column '{field.name}'")
                text = mended(text)
            texts.append(text)
        table = table.set_column(index, field, pa.array(texts, inner).cast(field.type))
    return table, faults
