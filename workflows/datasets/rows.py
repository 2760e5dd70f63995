"""The rows that a selection chooses from: those of an output, or of a manifest."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.discover import discover
from wallaroo.workflows.manifests.read import read, scan
from wallaroo.workflows.manifests.schema import Columns
from wallaroo.workflows.outputs.layout import list_done, shard_name
from wallaroo.workflows.outputs.lock import at_work
from wallaroo.workflows.outputs.run_file import read_run
from wallaroo.workflows.outputs.schema import TEXT_TASKS
from wallaroo.workflows.outputs.shards import open_shard, shard_bytes, without_tally
from wallaroo.workflows.plans.finished import finished
from wallaroo.workflows.plans.parts import folder_of
from wallaroo.workflows.plans.rows import row_ids
from wallaroo.workflows.sources.embedded import Cell
from wallaroo.workflows.sources.references import Reference

MANIFEST_GROUP_ROWS = 1024


class Chunk(NamedTuple):
    """Consecutive rows of a piece."""

    table: pa.Table
    """The rows."""
    first: int
    """Number of the first row in its piece."""
    faults: dict[int, str]
    """Place in the chunk -> what is wrong with the row."""


class OutputRows:
    """The rows of a finished run; a piece is a shard.

    Args:
        path: The folder of the run, local or `s3://`.

    Attributes:
        rows: How many rows there are.
        pieces: File name of each piece.
        schema: Schema of the rows.

    Raises:
        InputError: The run is not finished, has no rows or cannot be read.
    """

    def __init__(self, path: str):
        success = finished(path)
        if success is None:
            remedy = "wait for its run" if at_work(path) else "re-run its command to resume"
            raise InputError(f"{path} is not finished: {remedy}.")
        self.path, self.rows = path, int(success["rows"])
        self.task = str(read_run(path)["config"].get("task", "generate"))
        self.shards = sorted(list_done(path))
        self.pieces = [shard_name(shard) for shard in self.shards]
        if not self.shards:
            raise InputError(f"{path} has no rows: give another data set.")
        with self._open(0) as parquet:
            self.schema = without_tally(parquet.schema_arrow)

    def chunks(self, piece: int, columns: Sequence[str] | None = None) -> Iterator[Chunk]:
        """Reads a piece, a row group at a time.

        Args:
            piece: Place of the piece in `pieces`.
            columns: Columns to read; None for all.

        Yields:
            The chunks, in order.
        """
        with self._open(piece) as parquet:
            first = 0
            for group in range(parquet.num_row_groups):
                # For some columns of a small group threads cost more than they spare.
                table = parquet.read_row_group(group, columns=columns, use_threads=columns is None)
                yield Chunk(table, first, {})
                first += table.num_rows

    @contextmanager
    def _open(self, piece: int) -> Iterator[pq.ParquetFile]:
        try:
            with open_shard(self.path, self.shards[piece]) as parquet:
                yield parquet
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{self.pieces[piece]} of {self.path} cannot be read ({str(error).splitlines()[0]}): "
                f"move it elsewhere and re-run its command."
            ) from error

    def names(self, chunk: Chunk, piece: int, column: str) -> list[str]:
        """The values of a column as text.

        Args:
            chunk: Rows of the piece.
            piece: Place of the piece in `pieces`.
            column: Name of the column.

        Returns:
            A text for each row of the chunk.
        """
        return [str(value) for value in chunk.table.column(column).to_pylist()]

    def folder(self, piece: int) -> str:
        """Where relative paths of pictures start; an output has none."""
        return "/"

    def reference(self, row: Mapping[str, Any]) -> Reference:
        """Where the picture of a row is: the result itself, or the source of a text."""
        if row["task"] not in TEXT_TASKS:
            return row["image"]
        source = row["source"] or {}
        inside = source.get("row_id") is not None
        return str(Cell(source["uri"], source["row_id"])) if inside else source.get("uri")

    def write(self, path: str, table: pa.Table) -> None:
        """Writes rows as a Parquet file with the layout of a shard.

        Args:
            path: The file.
            table: The rows.
        """
        storage.write_atomic(path, memoryview(shard_bytes(table)))


class ManifestRows:
    """The rows of a manifest; a piece is a file, or a part of a large one.

    Args:
        path: The manifest, local or `s3://`.

    Attributes:
        rows: How many rows there are.
        pieces: File name that the rows of each piece are written under.
        schema: Schema of the rows.

    Raises:
        InputError: The manifest cannot be read.
    """

    def __init__(self, path: str):
        self.path, self.task = path, ""
        manifest = discover(path)
        columns, self._pieces = Columns(), []
        for number, file in enumerate(manifest.files):
            found = scan(file)
            columns.add(number, file.path, found)
            self._pieces += found.pieces
        self.schema = columns.schema()
        self.rows = sum(piece.rows for piece in self._pieces)
        self.pieces = [f"part-{number:05d}.parquet" for number in range(len(self._pieces))]

    def chunks(self, piece: int, columns: Sequence[str] | None = None) -> Iterator[Chunk]:
        """Reads a piece, a batch at a time.

        Args:
            piece: Place of the piece in `pieces`.
            columns: Columns to read; None for all.

        Yields:
            The chunks, in order.
        """
        start = self._pieces[piece].first_row
        for batch in read(self._pieces[piece], self.schema, columns):
            faults = {number - batch.first_row: fault for number, fault in batch.faults.items()}
            yield Chunk(batch.table, batch.first_row - start, faults)

    def names(self, chunk: Chunk, piece: int, column: str) -> list[str]:
        """The values of a column as text; rows without an id get the one that a run would give them.

        Args:
            chunk: Rows of the piece.
            piece: Place of the piece in `pieces`.
            column: Name of the column.

        Returns:
            A text for each row of the chunk.
        """
        if column in chunk.table.column_names and column != "id":
            return [str(value) for value in chunk.table.column(column).to_pylist()]
        first = self._pieces[piece].first_row + chunk.first
        numbers = range(first, first + chunk.table.num_rows)
        return row_ids(chunk.table, self._pieces[piece].file.relative, numbers)[0]

    def folder(self, piece: int) -> str:
        """Where relative paths of pictures start, as in a run: beside the file that names them."""
        return folder_of(self._pieces[piece].file.path)

    def reference(self, row: Mapping[str, Any]) -> Reference:
        """Where the source picture of a row is, as the manifest names it."""
        return row["image"]

    def write(self, path: str, table: pa.Table) -> None:
        """Writes rows as a Parquet file.

        Args:
            path: The file.
            table: The rows.
        """
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=MANIFEST_GROUP_ROWS)
        storage.write_atomic(path, memoryview(sink.getvalue()))
