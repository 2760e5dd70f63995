"""Manifest files scanned and read piece by piece, whatever their format."""

import dataclasses
import lzma
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.column_types import Unfit, refuse_unfit
from wallaroo.workflows.manifests.other_formats import (
    read_imgedit,
    read_pictures,
    read_prompts,
    read_results,
    scan_imgedit,
    scan_pictures,
    scan_prompts,
    scan_results,
)
from wallaroo.workflows.manifests.parquet_files import open_parquet, read_parquet, scan_parquet
from wallaroo.workflows.manifests.text_files import read_text, scan_csv, scan_lines
from wallaroo.workflows.manifests.types import Batch, ManifestFile, Piece, Scan
from wallaroo.workflows.sources.embedded import is_result
from wallaroo.workflows.text import first_line


def scan(file: ManifestFile) -> Scan:
    """Finds the columns of a file and cuts it into pieces.

    Of a Parquet file it reads the footer, of any other format the whole file.

    Args:
        file: A file from `discover`.

    Returns:
        Its pieces in order, and its Arrow schema, or the kinds of values in each column.

    Raises:
        InputError: The file is corrupt, or has columns that are not supported. The message names it.
    """
    scans = {
        "parquet": scan_parquet,
        "csv": scan_csv,
        "tsv": scan_csv,
        "jsonl": scan_lines,
        "json": scan_lines,
        "lines": scan_lines,
        "imgedit": scan_imgedit,
        "results": scan_results,
        "pictures": scan_pictures,
        "prompts": scan_prompts,
    }
    with _readable(file), storage.explained(file.path):
        return _with_partition(scans[_format_within(file)](file), file)


def _with_partition(found: Scan, file: ManifestFile) -> Scan:
    """Adds the columns that the names of folders give, unless the file has them itself."""
    for name, _, kind in file.partition:
        if found.schema is None:
            found.kinds.setdefault(name, {"str"})
        elif name not in found.schema.names:
            found = dataclasses.replace(
                found, schema=found.schema.append(pa.field(name, pa.type_for_alias(kind)))
            )
    return found


def _partitioned(batch: Batch, file: ManifestFile) -> Batch:
    table = batch.table
    for name, value, kind in file.partition:
        index = table.schema.get_field_index(name)
        if index >= 0 and value is not None:
            field = table.schema.field(index)
            constant = pa.scalar(value).cast(pa.type_for_alias(kind)).cast(field.type)
            table = table.set_column(index, field, pc.coalesce(table.column(index), constant))
    return batch._replace(table=table)


def _format_within(file: ManifestFile) -> str:
    """The format of a file. If pictures are wanted, a copied shard of results is recognised by its schema."""
    if file.cells and file.format == "parquet":
        with open_parquet(file) as parquet:
            return "results" if is_result(parquet.schema_arrow) else "parquet"
    return file.format


class _readable:
    """Turns errors inside the block into InputErrors that the file cannot be read, or has vanished."""

    def __init__(self, file: ManifestFile):
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise InputError(f"{self.file.path} vanished while it was read: start again.") from error
        if isinstance(
            error, (pa.ArrowException, OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError)
        ):
            words = first_line(error, 200)
            if isinstance(error, pa.ArrowNotImplementedError):
                raise InputError(
                    f"{self.file.path} has something that pyarrow does not read ({words}): convert it."
                ) from error
            if "too much memory for decoding" in words:
                raise InputError(
                    f"{self.file.path} is compressed with a longer window than is read (128 MiB): "
                    f"compress it again with a shorter one."
                ) from error
            raise InputError(
                f"{self.file.path} is not a readable {self.file.format} file ({words}): "
                f"repair it, or move it elsewhere."
            ) from error


def read(piece: Piece, schema: pa.Schema, columns: Iterable[str] | None = None) -> Iterator[Batch]:
    """Reads the rows of a piece in order. A row with a fault has the values that could be read.

    Args:
        piece: A piece from `scan`.
        schema: Schema of all files of the manifest.
        columns: Columns to read; all if None.

    Yields:
        Batches of at most BATCH_ROWS rows, with the faults of rows by their number in the file.

    Raises:
        InputError: The file is corrupt, or has changed since it was scanned.
    """
    if columns is not None:
        wanted = set(columns)
        schema = pa.schema([field for field in schema if field.name in wanted], metadata=schema.metadata)
    count = 0
    readers = {
        "parquet": read_parquet,
        "imgedit": read_imgedit,
        "results": read_results,
        "pictures": read_pictures,
        "prompts": read_prompts,
    }
    with _readable(piece.file), storage.explained(piece.file.path):
        batches = readers.get(_format_within(piece.file), read_text)
        try:
            for batch in batches(piece, schema):
                count += batch.table.num_rows
                yield _partitioned(batch, piece.file) if piece.file.partition else batch
        except Unfit as error:
            raise refuse_unfit(error, piece.file.path, schema) from error
    if count != piece.rows:
        raise InputError(
            f"{piece.file.path} has {count} rows where it had {piece.rows}, so it changed while it was read: "
            f"start again when it is complete."
        )
