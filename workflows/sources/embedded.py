"""Pictures within Parquet files, referenced by file and row, so that a plan need not copy them.

    /data/cats.parquet#17                              row 17 of the file, counted from 0
    s3://bucket/out/data/shard-00000003.parquet#817    in the output of a run: the row with row_id 817

The picture is in the column `image`: bytes, or a struct of bytes and path. Another column is named behind the
file, as in `/data/cats.parquet#jpg#17`. Knows nothing of what is done with the picture.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq

from wallaroo.model.errors import InputError, RowError
from wallaroo.workflows import storage
from wallaroo.workflows.text import first_line

COLUMN = "image"
"""Column of pictures."""

BATCH_ROWS = 8
"""Rows of a file whose pictures are in memory at once."""


class Cell(NamedTuple):
    """One picture in a Parquet file."""

    path: str
    """Path of the file, with the column behind it unless that is `image`."""
    row: int
    """Number of the row in the file from 0; its `row_id` in the output of a run."""

    def __str__(self) -> str:
        return f"{self.path}#{self.row}"


def parse_cell(text: str) -> Cell | None:
    """Parses a reference to a cell; None for any other reference."""
    match = re.fullmatch(r"(.+\.(?:parquet|pq)(?:#[^/#]+)?)#([0-9]{1,18})", text, re.IGNORECASE | re.DOTALL)
    return Cell(match[1], int(match[2])) if match else None


def with_column(path: str, column: str) -> str:
    """Names a file in references to its cells.

    Args:
        path: Path of the file.
        column: Column of the pictures.

    Returns:
        The path, with the column behind it unless that is `image`.
    """
    return path if column == COLUMN else f"{path}#{quote(column, safe='')}"


def split_column(path: str) -> tuple[str, str]:
    """Reverses `with_column`: path of the file, and column."""
    match = re.fullmatch(r"(.+\.(?:parquet|pq))#([^/#]+)", path, re.IGNORECASE | re.DOTALL)
    return (match[1], unquote(match[2])) if match else (path, COLUMN)


def is_result(schema: pa.Schema) -> bool:
    """Whether a file with this schema is a shard of a run's output."""
    return b"wallaroo.format" in (schema.metadata or {})


def read_cells(path: str, rows: Collection[int]) -> Iterator[tuple[int, Any]]:
    """Reads cells of a file, a few of them in memory at a time.

    Args:
        path: Path of the file, from `with_column`.
        rows: The rows to read, numbered as `Cell.row`.

    Yields:
        Each row once, with the value of its cell. A row that the file lacks comes with a RowError.

    Raises:
        InputError: The file is gone or corrupt.
    """
    missing = set(rows)
    path, column = split_column(path)
    try:
        with storage.explained(path):
            filesystem, inner = storage.parquet_filesystem(path)
            with (
                filesystem.open_input_file(inner) as file,
                pq.ParquetFile(file, page_checksum_verification=True) as parquet,
            ):
                if column in parquet.schema_arrow.names:
                    for row, value in _cells(parquet, missing, column):
                        missing.discard(row)
                        yield row, value
    except FileNotFoundError:
        raise InputError(f"{path}, which holds source images, is missing: restore it.") from None
    # Faults of the storage are explained by now. A page that does not match its checksum is an OSError.
    except (pa.ArrowException, OSError) as error:
        words = first_line(error, 200)
        raise InputError(f"{path}, which holds source images, is corrupt ({words}): restore it.") from error
    for row in sorted(missing):
        yield row, RowError("image", f"{path} has no image in row {row}: correct the reference.")


def _cells(parquet: pq.ParquetFile, wanted: Collection[int], column: str) -> Iterator[tuple[int, Any]]:
    if is_result(parquet.schema_arrow):
        numbers = parquet.read(columns=["row_id"]).column("row_id").to_pylist()
    else:
        numbers = range(parquet.metadata.num_rows)
    places = {place: row for place, row in enumerate(numbers) if row in wanted}
    start = 0
    for group in range(parquet.num_row_groups):
        stop = start + parquet.metadata.row_group(group).num_rows
        if any(start <= place < stop for place in places):
            place = start
            for batch in parquet.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False
            ):
                for value in batch.column(0):
                    if place in places:
                        yield places[place], value.as_py()
                    place += 1
        start = stop
