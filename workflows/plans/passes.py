"""Passes over a manifest by Ray Data: its files scanned, its rows read and chosen."""

import functools
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.listing import in_words
from wallaroo.workflows.manifests.read import read, scan
from wallaroo.workflows.manifests.schema import Columns
from wallaroo.workflows.manifests.streams import is_compressed
from wallaroo.workflows.manifests.types import Manifest, Piece, Scan
from wallaroo.workflows.manifests.where import Filter
from wallaroo.workflows.plans.columns import check_columns
from wallaroo.workflows.plans.increments import joined_schema
from wallaroo.workflows.plans.plan import Round
from wallaroo.workflows.plans.rows import row_ids
from wallaroo.workflows.plans.settings import PlanSettings

MAX_BLOCKS = 256
"""Most Ray tasks of one pass."""
Item = TypeVar("Item")
Answer = TypeVar("Answer")
QUICK_FILES = 16
"""Most files of a manifest that is scanned without Ray."""
QUICK_BYTES = 4 << 20
"""Most bytes of their text. Of Parquet files only the footers are read."""
_TABLES = frozenset(("parquet", "csv", "tsv", "jsonl", "json", "lines"))


def each(
    items: Mapping[int, Item], task: Callable[..., Answer], **constants: Any
) -> Iterator[tuple[int, Answer]]:
    """Runs `task(item, **constants)` for every item, in Ray tasks.

    Args:
        items: Index -> item.
        task: Function of an item.
        **constants: Further arguments, the same for all items.

    Yields:
        Index of an item and the answer of its task, in any order.

    Raises:
        InputError: A task raised it. It travels as a value, so that its sentence arrives unchanged.
    """
    import ray.data

    # As columns, all values would get one Arrow type, and each dict the keys of all others.
    rows = [{"index": index, "item": pickle.dumps(item)} for index, item in items.items()]
    answer = functools.partial(_answer, task=task, constants=constants)
    blocks = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS))
    for row in blocks.map(answer, num_cpus=1).iter_rows():
        storage.count_retries(row["retries"])
        if row["fault"]:
            raise InputError(row["fault"])
        yield row["index"], pickle.loads(row["answer"])


def _answer(row: dict[str, Any], task: Callable[..., Any], constants: dict[str, Any]) -> dict[str, Any]:
    storage.enable_retries()
    found, fault = None, ""
    try:
        found = task(pickle.loads(row["item"]), **constants)
    except InputError as error:
        fault = str(error)
    return {
        "index": row["index"],
        "answer": pickle.dumps(found),
        "fault": fault,
        "retries": storage.take_retries(),
    }


def pack_bits(bits: np.ndarray) -> bytes:
    """Packs bool [n] into bytes, 8 values a byte."""
    return np.packbits(bits).tobytes()


def unpack_bits(data: bytes, count: int) -> np.ndarray:
    """Reverses `pack_bits`.

    Args:
        data: The packed bits.
        count: Number of values.

    Returns:
        bool [count].
    """
    return np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(bool)


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
            self.warnings.append(in_words(manifest.passed_over))
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
