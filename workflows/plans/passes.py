"""Passes over a manifest by Ray Data: its files scanned, its rows chosen, counted and identified."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.layouts import has_questions
from wallaroo.workflows.manifests.listing import in_words
from wallaroo.workflows.manifests.read import read, scan
from wallaroo.workflows.manifests.schema import Columns
from wallaroo.workflows.manifests.types import (
    Manifest,
    ManifestFile,
    Piece,
    Scan,
    decode_schema,
    encode_schema,
)
from wallaroo.workflows.manifests.where import Filter
from wallaroo.workflows.plans.increments import joined_schema
from wallaroo.workflows.plans.plan import Round
from wallaroo.workflows.plans.rows import row_ids, sample_counts
from wallaroo.workflows.plans.settings import PlanSettings, column_names

MAX_BLOCKS = 256
"""Most Ray tasks of one pass."""
Task = Callable[..., dict[str, Any]]
"""A function of an item: gives JSON values, and bytes under `data` if it has any."""


def each(
    items: list[dict[str, Any]], task: Task, **constants: Any
) -> Iterator[tuple[int, dict[str, Any], bytes]]:
    """Runs `task(item, **constants)` for every item, in Ray tasks.

    Args:
        items: Rows for Ray Data, each with its `index`.
        task: Function of an item; see `Task`.
        **constants: Further arguments, the same for all items.

    Yields:
        Index of an item, and the values and the data that its task gave, in any order.

    Raises:
        InputError: A task raised it. It travels as a value, so that its sentence arrives unchanged.
    """
    import ray.data

    answer = functools.partial(_answer, task=task, constants=constants)
    rows = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS))
    for row in rows.map(answer, num_cpus=1).iter_rows():
        storage.count_retries(row["retries"])
        if row["fault"]:
            raise InputError(row["fault"])
        yield row["index"], json.loads(row["values"]), row["data"]


def _answer(row: dict[str, Any], task: Task, constants: dict[str, Any]) -> dict[str, Any]:
    storage.enable_retries()
    values, fault = {}, ""
    try:
        values = task(row, **constants)
    except InputError as error:
        fault = str(error)
    data = values.pop("data", b"")
    return {
        "index": row["index"],
        "values": json.dumps(values),
        "data": data,
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
    """A manifest with its pieces in order and one schema. Its files are scanned once, at the first use."""

    def __init__(
        self, manifest: Manifest, rounds: Sequence[Round] = (), settings: PlanSettings | None = None
    ):
        """Keeps the manifest; reads nothing yet.

        Args:
            manifest: The manifest.
            rounds: Rounds of the plan so far. Their schema is kept.
            settings: Settings of the plan. Required with `rounds`.
        """
        self.manifest, self.rounds, self.settings = manifest, rounds, settings
        self.warnings: list[str] = []
        if manifest.passed_over:
            self.warnings.append(in_words(manifest.passed_over))
        self.warnings += manifest.notes

    @functools.cached_property
    def _scanned(self) -> tuple[list[Piece], pa.Schema]:
        files = self.manifest.files
        items = [{"index": i, "file": json.dumps(file.to_values())} for i, file in enumerate(files)]
        columns, pieces = Columns(), {}
        for index, answer, _ in each(items, _scan):
            found = Scan.from_json(answer["scan"], files[index])
            columns.add(index, files[index].path, found)
            pieces[index] = found.pieces
        return [piece for index in range(len(files)) for piece in pieces[index]], columns.schema()

    @property
    def pieces(self) -> list[Piece]:
        """The pieces of all files, in the order of the manifest."""
        return self._scanned[0]

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """The schema in which all rows are read."""
        found = self._scanned[1]
        return joined_schema(found, self.rounds, self.settings) if self.settings else found

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

    def items(self, bits: np.ndarray, selected: np.ndarray | None = None) -> list[dict[str, Any]]:
        """Makes a row for Ray Data of each piece that has a set bit.

        Args:
            bits: bool [rows of the manifest].
            selected: bool [rows of the manifest], packed into the row too; None leaves it out.

        Returns:
            Rows with `index` of the piece, the `piece` as JSON, its `bits`, and `selected` if given.
        """
        found = []
        for index in np.flatnonzero(self.sums(bits)).tolist():
            mine = pack_bits(bits[self.slice(index)])
            item = {"index": index, "piece": self.pieces[index].to_json(), "bits": mine}
            if selected is not None:
                item["selected"] = pack_bits(selected[self.slice(index)])
            found.append(item)
        return found


def _scan(row: dict[str, Any]) -> dict[str, Any]:
    return {"scan": scan(ManifestFile(**json.loads(row["file"]))).to_json()}


def selected_rows(source: ScannedManifest, settings: PlanSettings) -> np.ndarray:
    """Finds the rows that `where` and `limit` choose.

    Args:
        source: The manifest.
        settings: Settings of the run.

    Returns:
        bool [rows of the manifest].

    Raises:
        InputError: `where` does not fit the columns.
    """
    selected = np.ones(source.rows, bool)
    if settings.where is not None:
        Filter(settings.where, source.schema)  # refuses a wrong expression before any task starts
        schema = encode_schema(source.schema)
        for index, _, data in each(source.items(selected), _match, schema=schema, where=settings.where):
            selected[source.slice(index)] = unpack_bits(data, source.pieces[index].rows)
    if settings.limit is not None:
        selected[np.flatnonzero(selected)[settings.limit :]] = False
    return selected


def _match(row: dict[str, Any], schema: str, where: str) -> dict[str, Any]:
    columns = decode_schema(schema)
    chooser = Filter(where, columns)
    found = [chooser.matches(batch.table) for batch in read(Piece.from_json(row["piece"]), columns)]
    return {"data": pack_bits(np.concatenate(found))}


class RowCounts(NamedTuple):
    """How many planned rows a manifest gives."""

    outputs: np.ndarray
    """int64 [pieces]: planned rows of each piece."""
    duplicates: dict[int, list[int]]
    """Piece -> its rows that repeat an id. They become error rows."""
    joined: dict[int, list[int]]
    """Piece -> its rows that repeat an id and all else that is planned. They give no row."""


def counted(
    source: ScannedManifest, selected: np.ndarray, taken: np.ndarray, settings: PlanSettings
) -> RowCounts:
    """Counts planned rows, and finds rows that repeat the id of an earlier one.

    The first pass hashes each id to 8 bytes, which the driver can hold for all rows. The second pass reads
    only the rows whose hash occurs twice. It compares 16 bytes of the id, and the other values of the row.

    Args:
        source: The manifest.
        selected: bool [rows of the manifest], rows of this round.
        taken: bool [rows of the manifest], rows of earlier rounds. They precede all rows of this round.
        settings: Settings of the run.

    Returns:
        How many rows each piece gives, and which of its rows repeat one.
    """
    names = set(source.schema.names)
    id_name = column_names(source.schema, settings)["id"]
    if not names & {id_name, "samples"} and all(file.format == "parquet" for file in source.manifest.files):
        # The footers give all counts.
        return RowCounts(source.sums(selected) * settings.samples, {}, {})
    outputs = np.zeros(len(source.pieces), np.int64)
    considered = selected | taken if id_name in names else selected
    ends = np.cumsum([0, *source.sums(considered)])
    # Without a column of ids they are places in files, which are unique.
    hashes = np.empty(ends[-1] if id_name in names else 0, np.uint64)
    constants = {"schema": encode_schema(source.schema), "settings": settings}
    for index, answer, data in each(source.items(considered, selected), _count, **constants):
        outputs[index] = answer["outputs"]
        if len(hashes):
            hashes[ends[index] : ends[index + 1]] = np.frombuffer(data, np.uint64)
    suspects = _repeated(hashes)
    del hashes
    items = source.items(considered)
    bounds = np.searchsorted(suspects, ends)
    for item in items:
        index = item["index"]
        item["ranks"] = (suspects[bounds[index] : bounds[index + 1]] - ends[index]).astype(np.int64).tobytes()
    items = [item for item in items if item["ranks"]]
    if not items:
        return RowCounts(outputs, {}, {})
    found = []
    for index, _, data in each(items, _identify, **constants):
        rows = np.frombuffer(data, _IDENTITY)
        entry = np.zeros(len(rows), [*_IDENTITY.descr, ("piece", "i8"), ("position", "i8"), ("new", "?")])
        for name in _IDENTITY.names or ():
            entry[name] = rows[name]
        entry["piece"] = index
        entry["position"] = source.starts[index] + rows["row"]
        entry["new"] = ~taken[entry["position"]]
        found.append(entry)
    rows = np.concatenate(found)
    rows = rows[np.lexsort((rows["position"], rows["new"], rows["low"], rows["high"]))]
    same = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
    duplicates: dict[int, list[int]] = {}
    joined: dict[int, list[int]] = {}
    first = rows[0]
    for row, repeated in zip(rows[1:], same.tolist(), strict=True):
        if not repeated:
            first = row
        elif row["new"] and row["content"] and row["content"] == first["content"]:
            joined.setdefault(int(row["piece"]), []).append(int(row["row"]))
            outputs[row["piece"]] -= row["count"]
        elif row["new"]:
            duplicates.setdefault(int(row["piece"]), []).append(int(row["row"]))
            outputs[row["piece"]] -= row["count"] - 1
    return RowCounts(outputs, duplicates, joined)


_IDENTITY = np.dtype(
    [
        ("high", np.uint64),
        ("low", np.uint64),
        ("row", np.int64),
        ("count", np.int64),
        ("content", np.uint64),
    ]
)
"""What tells one id from another beyond doubt, the row in the piece, the planned rows it would give, and a
hash of all that is planned of it, or 0 for a row that is joined with no other."""


def joins_rows(schema: pa.Schema, settings: PlanSettings) -> bool:
    """Tells whether rows of one id and prompt are joined to one row.

    This is for tables with a row for each question about a picture. It applies to `generate`, if the run
    names the column of ids or the layout of the table is known.

    Args:
        schema: Schema of the manifest.
        settings: Settings of the run.

    Returns:
        True if they are joined.
    """
    questions = settings.id_column is not None or has_questions(schema.names)
    return settings.task == "generate" and questions


def _repeated(hashes: np.ndarray) -> np.ndarray:
    """int64: positions in `hashes` (uint64) of values that occur more than once, ascending."""
    found = [np.empty(0, np.int64)]
    # One sixteenth at a time, since sorting all at once would double the memory.
    nibbles = hashes.view(np.uint8)[::8] & 15 if len(hashes) else ()
    for nibble in range(16):
        mine = np.flatnonzero(nibbles == nibble) if len(hashes) else found[0]
        values, counts = np.unique(hashes[mine], return_counts=True)
        found.append(mine[np.isin(hashes[mine], values[counts > 1])])
    return np.sort(np.concatenate(found))


def considered_rows(row: dict[str, Any], schema: str, names: set[str]) -> Iterator["_Rows"]:
    """Reads the rows of a piece whose bit is set, a batch at a time.

    Args:
        row: The `piece` as JSON and its packed `bits`, as `ScannedManifest.items` gives them.
        schema: Schema of the manifest, encoded.
        names: Columns to read.

    Yields:
        The rows of a batch; batches without such a row are left out.
    """
    piece = Piece.from_json(row["piece"])
    bits = unpack_bits(row["bits"], piece.rows)
    for batch in read(piece, decode_schema(schema), names):
        start = batch.first_row - piece.first_row
        rows = start + np.flatnonzero(bits[start : start + batch.table.num_rows])
        if len(rows):
            table = batch.table if len(rows) == batch.table.num_rows else batch.table.take(rows - start)
            yield _Rows(piece, rows, table, batch.faults)


class _Rows(NamedTuple):
    """Some rows of a piece."""

    piece: Piece
    """The piece."""
    rows: np.ndarray
    """int64 [rows]: their numbers in the piece."""
    table: pa.Table
    """Their values."""
    faults: dict[int, str]
    """Number in the file -> what is wrong with the row."""

    @property
    def numbers(self) -> list[int]:
        """Their numbers in the file."""
        return (self.piece.first_row + self.rows).tolist()

    def slice(self, start: int, stop: int) -> "_Rows":
        return self._replace(rows=self.rows[start:stop], table=self.table.slice(start, stop - start))


def ids_of(rows: _Rows, column: str) -> list[str]:
    """Finds the ids of rows of a piece.

    Args:
        rows: The rows.
        column: Column of the ids. Without it the place in the file makes the id.

    Returns:
        The id of each row.
    """
    return row_ids(rows.table, rows.piece.file.relative, rows.numbers, column)[0]


def _count(row: dict[str, Any], schema: str, settings: PlanSettings) -> dict[str, Any]:
    """Counts the planned rows of the selected rows, and hashes the ids of all considered rows to 8 bytes."""
    selected = unpack_bits(row["selected"], Piece.from_json(row["piece"]).rows)
    outputs, hashes = 0, []
    column = column_names(decode_schema(schema), settings)["id"]
    for rows in considered_rows(row, schema, {column, "samples"}):
        counts = sample_counts(rows.table, settings, rows.numbers, rows.faults)
        outputs += int(counts[selected[rows.rows]].sum())
        hashes += [hashlib.blake2b(one.encode(), digest_size=8).digest() for one in ids_of(rows, column)]
    return {"outputs": outputs, "data": b"".join(hashes)}


def _identify(row: dict[str, Any], schema: str, settings: PlanSettings) -> dict[str, Any]:
    """Describes the rows with the given ranks among the considered ones, as _IDENTITY."""
    ranks = np.frombuffer(row["ranks"], np.int64)
    found, seen = [], 0
    columns = decode_schema(schema)
    names = column_names(columns, settings)
    column, planned = names.pop("id"), sorted(names.values())
    joins = joins_rows(columns, settings)
    for rows in considered_rows(row, schema, {column, "samples", *(planned if joins else ())}):
        counts, ids = sample_counts(rows.table, settings, rows.numbers, rows.faults), ids_of(rows, column)
        for rank in ranks[(ranks >= seen) & (ranks < seen + len(ids))] - seen:
            content = 0
            if joins and rows.numbers[rank] not in rows.faults:
                values = rows.table.slice(rank, 1).to_pylist()[0]
                content = _hash(repr([values.get(name) for name in planned]), 8)[0]
            found.append((*_hash(ids[rank], 16), rows.rows[rank], counts[rank], content))
        seen += len(ids)
    return {"data": np.array(found, _IDENTITY).tobytes()}


def _hash(text: str, size: int) -> np.ndarray:
    """Hashes text to uint64 [size / 8]."""
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=size).digest(), np.uint64)
