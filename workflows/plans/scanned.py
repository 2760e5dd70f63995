"""A manifest as planning sees it: its files scanned, its columns checked, its rows read and selected."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from wallaroo.workflows.manifests.listing import skipped_in_words
from wallaroo.workflows.manifests.read import read, scan
from wallaroo.workflows.manifests.schema import Columns
from wallaroo.workflows.manifests.streams import is_compressed
from wallaroo.workflows.manifests.types import Manifest, Piece, Scan
from wallaroo.workflows.manifests.where import Filter
from wallaroo.workflows.plans.columns import check_columns
from wallaroo.workflows.plans.increments import joined_schema
from wallaroo.workflows.plans.passes import each, pack_bits, unpack_bits
from wallaroo.workflows.plans.plan import Round
from wallaroo.workflows.plans.rows import row_ids
from wallaroo.workflows.plans.settings import PlanSettings

QUICK_FILES = 16
"""Most files of a manifest that is scanned without Ray."""
QUICK_BYTES = 4 << 20
"""Most bytes of their text. Of Parquet files only the footers are read."""
_TABLES = frozenset(("parquet", "csv", "tsv", "jsonl", "json", "lines"))


class ScannedManifest:
    """A manifest with its pieces in order and one schema, for the settings of a plan.

    Files are scanned, and columns and `where` checked, at the first use. Nothing is done twice.
    """

    def __init__(self, manifest: Manifest, settings: PlanSettings, rounds: Sequence[Round] = ()):
        """Keeps the manifest; reads nothing yet.

        Args:
            manifest: The manifest.
            settings: Settings of the plan.
            rounds: Rounds of the plan so far, of an incremental plan. Their schema is kept.
        """
        self.manifest, self.settings, self.rounds = manifest, settings, rounds
        self.warnings: list[str] = []
        if manifest.passed_over:
            self.warnings.append(skipped_in_words(manifest.passed_over))
        self.warnings += manifest.notes

    @functools.cached_property
    def _scanned(self) -> tuple[list[Piece], pa.Schema]:
        files = self.manifest.files
        columns, pieces = Columns(), {}
        for index, found in self._scans():
            columns.add(index, files[index].path, found)
            pieces[index] = found.pieces
        return [piece for index in range(len(files)) for piece in pieces[index]], columns.schema()

    def _scans(self) -> Iterator[tuple[int, Scan]]:
        """Number of a file, and what was found in it; in any order."""
        files = self.manifest.files
        if self.quick:
            yield from enumerate(map(scan, files))
        else:
            yield from each(dict(enumerate(files)), scan)

    @property
    def quick(self) -> bool:
        """Whether the files are so few and small that this process scans them sooner than Ray starts."""
        files = self.manifest.files
        text = sum(file.size for file in files if file.format != "parquet")
        return (
            len(files) <= QUICK_FILES
            and text <= QUICK_BYTES
            and all(file.format in _TABLES and not is_compressed(file) for file in files)
        )

    @property
    def pieces(self) -> list[Piece]:
        """The pieces of all files, in the order of the manifest."""
        return self._scanned[0]

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """The schema in which all rows are read."""
        return joined_schema(self._scanned[1], self.rounds, self.settings)

    @functools.cached_property
    def column_warnings(self) -> list[str]:
        """Warnings of `check_columns`. Without rows nothing is checked, as files may lack columns then."""
        return check_columns(self.schema, self.settings) if self.rows else []

    @functools.cached_property
    def condition(self) -> Filter | None:
        """The condition of `where`; None if all rows are taken."""
        return None if self.settings.where is None else Filter(self.settings.where, self.schema)

    def check(self) -> None:
        """Checks the columns and `where`, before any row is read.

        Raises:
            InputError: A file cannot be read, or a column that the task needs is missing.
            OptionError: `where` does not fit the columns.
        """
        _ = self.column_warnings, self.condition

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """int64 [pieces + 1]: number in the manifest of the first row of each piece, and of all rows."""
        return np.cumsum([0, *(piece.rows for piece in self.pieces)], dtype=np.int64)

    @property
    def rows(self) -> int:
        """Number of rows of the manifest."""
        return int(self.starts[-1])

    def slice(self, index: int) -> slice:
        """The rows of a piece among those of the manifest."""
        return slice(self.starts[index], self.starts[index + 1])

    def sums(self, bits: np.ndarray) -> np.ndarray:
        """Counts the set bits of each piece.

        Args:
            bits: bool [rows of the manifest].

        Returns:
            int64 [pieces].
        """
        return np.add.reduceat(bits, self.starts[:-1], dtype=np.int64) if len(bits) else np.zeros(0, np.int64)

    def items(self, bits: np.ndarray) -> dict[int, "PieceRows"]:
        """Finds the pieces that have a set bit.

        Args:
            bits: bool [rows of the manifest].

        Returns:
            Index of the piece -> its rows with a set bit.
        """
        indices = np.flatnonzero(self.sums(bits)).tolist()
        return {index: PieceRows(self.pieces[index], pack_bits(bits[self.slice(index)])) for index in indices}


class PieceRows(NamedTuple):
    """Some rows of a piece, not read yet."""

    piece: Piece
    """The piece."""
    bits: bytes
    """bool [rows of the piece], packed: the rows."""

    @property
    def chosen(self) -> np.ndarray:
        """bool [rows of the piece]: the rows."""
        return unpack_bits(self.bits, self.piece.rows)

    def read(self, schema: pa.Schema, names: set[str]) -> Iterator["Rows"]:
        """Reads the rows, a batch at a time.

        Args:
            schema: Schema of the manifest.
            names: Columns to read.

        Yields:
            The rows of a batch; batches without such a row are left out.
        """
        bits = self.chosen
        for batch in read(self.piece, schema, names):
            start = batch.first_row - self.piece.first_row
            rows = start + np.flatnonzero(bits[start : start + batch.table.num_rows])
            if len(rows):
                table = batch.table if len(rows) == batch.table.num_rows else batch.table.take(rows - start)
                yield Rows(self.piece, rows, table, batch.faults, batch.raw)


class Rows(NamedTuple):
    """Some rows of a piece."""

    piece: Piece
    """The piece."""
    rows: np.ndarray
    """int64 [rows]: their numbers in the piece."""
    table: pa.Table
    """Their values."""
    faults: dict[int, str]
    """Number in the file -> what is wrong with the row."""
    raw: Mapping[int, str]
    """Number in the file -> text of the row, if no value of it can be read."""

    @property
    def numbers(self) -> list[int]:
        """Their numbers in the file."""
        return (self.piece.first_row + self.rows).tolist()

    def slice(self, start: int, stop: int) -> "Rows":
        return self._replace(rows=self.rows[start:stop], table=self.table.slice(start, stop - start))


def ids_of(rows: Rows, column: str) -> list[str]:
    """Finds the ids of rows of a piece.

    Args:
        rows: The rows.
        column: Column of the ids. Without it the place in the file makes the id.

    Returns:
        The id of each row.
    """
    return row_ids(rows.table, rows.piece.file.relative, rows.numbers, column)[0]


def selected_rows(source: ScannedManifest) -> np.ndarray:
    """Finds the rows that `where` and `limit` choose.

    Args:
        source: The manifest.

    Returns:
        bool [rows of the manifest].

    Raises:
        OptionError: `where` does not fit the columns.
    """
    settings, selected = source.settings, np.ones(source.rows, bool)
    if source.condition is not None:
        pieces = {index: source.pieces[index] for index in source.items(selected)}
        for index, bits in each(pieces, _match, schema=source.schema, where=source.condition.expression):
            selected[source.slice(index)] = unpack_bits(bits, source.pieces[index].rows)
    if settings.limit is not None:
        selected[np.flatnonzero(selected)[settings.limit :]] = False
    return selected


def _match(piece: Piece, schema: pa.Schema, where: str) -> bytes:
    chooser = Filter(where, schema)
    return pack_bits(np.concatenate([chooser.matches(batch.table) for batch in read(piece, schema)]))
