"""Manifest files scanned and read piece by piece, whatever their format."""

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.other_formats import (
    read_imgedit,
    read_pictures,
    read_results,
    scan_imgedit,
    scan_pictures,
    scan_results,
)
from wallaroo.workflows.manifests.parquet_files import open_parquet, read_parquet, scan_parquet
from wallaroo.workflows.manifests.text_files import read_text, scan_csv, scan_jsonl
from wallaroo.workflows.manifests.types import Batch, ManifestFile, Piece, Scan
from wallaroo.workflows.sources.embedded import is_result


def scan(file: ManifestFile) -> Scan:
    """Columns of a file, and its pieces. Parquet costs a footer; the others are read through once.

    Raises InputError, naming the file, if it is corrupt or has columns that are not served.
    """
    scans = {
        "parquet": scan_parquet,
        "csv": scan_csv,
        "jsonl": scan_jsonl,
        "imgedit": scan_imgedit,
        "results": scan_results,
        "pictures": scan_pictures,
    }
    with _readable(file), storage.explained(file.path):
        return scans[_format_within(file)](file)


def _format_within(file: ManifestFile) -> str:
    """The format of a file; a shard of results is one wherever a copy of it lies, if pictures are wanted."""
    if file.cells and file.format == "parquet":
        with open_parquet(file) as parquet:
            return "results" if is_result(parquet.schema_arrow) else "parquet"
    return file.format


class _readable:
    """Says of errors inside the block that the file cannot be read, and of a vanished one that it is gone."""

    def __init__(self, file: ManifestFile):
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise InputError(f"{self.file.path} vanished while it was read: start again.") from error
        if isinstance(error, (pa.ArrowException, OSError, UnicodeDecodeError)):
            words = str(error).strip().split("\n", 1)[0][:200]
            raise InputError(
                f"{self.file.path} is not a readable {self.file.format} file ({words}): repair or remove it."
            ) from error


def read(piece: Piece, schema: pa.Schema, columns: Iterable[str] | None = None) -> Iterator[Batch]:
    """The rows of a piece, in order, in the manifest's schema or these columns of it.

    Of a row with a fault the values are there as far as they could be read. Raises InputError if the
    file is corrupt, or no longer what it was when it was scanned.
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
    }
    with _readable(piece.file), storage.explained(piece.file.path):
        batches = readers.get(_format_within(piece.file), read_text)
        for batch in batches(piece, schema):
            count += batch.table.num_rows
            yield batch
    if count != piece.rows:
        raise InputError(
            f"{piece.file.path} has {count} rows where it had {piece.rows}, so it changed while it was read: "
            f"start again when it is complete."
        )
