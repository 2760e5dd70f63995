"""The planned rows that a manifest gives are counted, and rows that repeat an earlier id are found."""

import hashlib
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from wallaroo.workflows.manifests.layouts import has_questions
from wallaroo.workflows.plans.passes import each, pack_bits, unpack_bits
from wallaroo.workflows.plans.rows import sample_counts
from wallaroo.workflows.plans.scanned import PieceRows, ScannedManifest, ids_of
from wallaroo.workflows.plans.settings import PlanSettings, column_names


class RowCounts(NamedTuple):
    """How many planned rows a manifest gives."""

    outputs: np.ndarray
    """int64 [pieces]: planned rows of each piece."""
    duplicates: dict[int, list[int]]
    """Piece -> its rows that repeat an id. They become error rows."""
    joined: dict[int, list[int]]
    """Piece -> its rows that repeat an id and all else that is planned. They give no row."""


def count_rows(
    source: ScannedManifest, selected: np.ndarray, taken: np.ndarray, settings: PlanSettings
) -> RowCounts:
    """Counts planned rows, and finds rows that repeat the id of an earlier one.

    The first pass hashes each id to 8 bytes, which the driver can hold for all rows: 0.8 GB of 10^8 ids. The
    second pass reads only the rows whose hash occurs twice, and none if all ids differ. It compares 16 bytes
    of the id. One pass would have to bring those 16 bytes, the samples and a hash of the prompt of every row,
    four times as much, because which rows repeat an id is known only at its end.

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
    items = source.items(considered)
    asked = {index: (one, pack_bits(selected[source.slice(index)])) for index, one in items.items()}
    for index, (count, few) in each(asked, _count, schema=source.schema, settings=settings):
        outputs[index] = count
        if len(hashes):
            hashes[ends[index] : ends[index + 1]] = few
    suspects = _repeated(hashes)
    del hashes
    bounds = np.searchsorted(suspects, ends)
    ranks = {index: suspects[bounds[index] : bounds[index + 1]] - ends[index] for index in items}
    doubtful = {index: (one, ranks[index]) for index, one in items.items() if len(ranks[index])}
    if not doubtful:
        return RowCounts(outputs, {}, {})
    rows = _identified(source, doubtful, taken, settings)
    return _without_repeated(outputs, rows)


_IDENTITY = np.dtype(
    [
        ("high", np.uint64),
        ("low", np.uint64),
        ("row", np.int64),
        ("count", np.int64),
        ("content", np.uint64),
    ]
)
"""128 bits of the id, the row in the piece, its number of planned rows, and a hash of all that is planned of
it, or 0 for a row that is joined with no other."""


def _identified(
    source: ScannedManifest,
    doubtful: dict[int, tuple[PieceRows, np.ndarray]],
    taken: np.ndarray,
    settings: PlanSettings,
) -> np.ndarray:
    """Reads rows whose hash occurs twice (the second pass).

    Args:
        source: The manifest.
        doubtful: Piece -> its considered rows, and the ranks of these rows among them.
        taken: bool [rows of the manifest], rows of earlier rounds.
        settings: Settings of the run.

    Returns:
        _IDENTITY of each row, with `piece`, `position` in the manifest, and `new`, whether it is of this
        round. Rows of one id stand together, first those of earlier rounds, each in the order of the
        manifest.
    """
    found = []
    for index, rows in each(doubtful, _identify, schema=source.schema, settings=settings):
        entry = np.zeros(len(rows), [*_IDENTITY.descr, ("piece", "i8"), ("position", "i8"), ("new", "?")])
        for name in _IDENTITY.names or ():
            entry[name] = rows[name]
        entry["piece"] = index
        entry["position"] = source.starts[index] + rows["row"]
        entry["new"] = ~taken[entry["position"]]
        found.append(entry)
    rows = np.concatenate(found)
    return rows[np.lexsort((rows["position"], rows["new"], rows["low"], rows["high"]))]


def _without_repeated(outputs: np.ndarray, rows: np.ndarray) -> RowCounts:
    """Takes repeated rows out of the counts.

    Args:
        outputs: int64 [pieces]: planned rows of each piece; changed in place.
        rows: From `_identified`.

    Returns:
        The counts, with the rows that repeat an id.
    """
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


def _count(
    item: tuple[PieceRows, bytes], schema: pa.Schema, settings: PlanSettings
) -> tuple[int, np.ndarray]:
    """Counts the planned rows of the selected rows, and hashes the ids of all considered rows to 8 bytes.

    Args:
        item: The considered rows, and the packed bits of the selected ones.
        schema: Schema of the manifest.
        settings: Settings of the run.

    Returns:
        Number of planned rows, and uint64 [considered rows].
    """
    considered, bits = item
    selected = unpack_bits(bits, considered.piece.rows)
    outputs, hashes = 0, []
    column = column_names(schema, settings)["id"]
    for rows in considered.read(schema, {column, "samples"}):
        counts = sample_counts(rows.table, settings, rows.numbers, rows.faults)
        outputs += int(counts[selected[rows.rows]].sum())
        hashes += [hashlib.blake2b(one.encode(), digest_size=8).digest() for one in ids_of(rows, column)]
    return outputs, np.frombuffer(b"".join(hashes), np.uint64)


def _identify(item: tuple[PieceRows, np.ndarray], schema: pa.Schema, settings: PlanSettings) -> np.ndarray:
    """Describes the rows with the given ranks among the considered ones, as _IDENTITY."""
    considered, ranks = item
    found, seen = [], 0
    names = column_names(schema, settings)
    column, planned = names.pop("id"), sorted(names.values())
    joins = joins_rows(schema, settings)
    for rows in considered.read(schema, {column, "samples", *(planned if joins else ())}):
        counts, ids = sample_counts(rows.table, settings, rows.numbers, rows.faults), ids_of(rows, column)
        for rank in ranks[(ranks >= seen) & (ranks < seen + len(ids))] - seen:
            content = 0
            if joins and rows.numbers[rank] not in rows.faults:
                values = rows.table.slice(rank, 1).to_pylist()[0]
                content = _hash(repr([values.get(name) for name in planned]), 8)[0]
            found.append((*_hash(ids[rank], 16), rows.rows[rank], counts[rank], content))
        seen += len(ids)
    return np.array(found, _IDENTITY)


def _hash(text: str, size: int) -> np.ndarray:
    """Hashes text to uint64 [size / 8]."""
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=size).digest(), np.uint64)
