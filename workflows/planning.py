"""Planning: manifest -> plan, in three passes of Ray Data, before anything is spent on a row.

The first pass looks into the files: pieces, and one schema for all. The second counts what every piece
gives, and finds ids that occur twice; where a look is asked for, it also chooses the rows. The third
writes the parts, a task each. Contents are read in these tasks alone: the process that plans holds a few
numbers a piece, a few bits a row, and eight bytes an id. Knows nothing of replicas and results.
"""

import base64
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.checkpoint import CONFIG, FILE_LIST, TOKENIZER, FileEntry, digest, parse_file_list
from model.config import ModelConfig
from model.errors import InputError
from model.tokenizer import Tokenizer
from workflows import storage
from workflows.increments import (
    PAIR,
    Known,
    joined_schema,
    picture_pairs,
    read_known,
    row_pairs,
    unseen,
    write_known,
    write_pictures,
)
from workflows.manifest import (
    Columns,
    Filter,
    Manifest,
    ManifestFile,
    Piece,
    Scan,
    decode_schema,
    discover,
    encode_schema,
    list_pictures,
    read,
    scan,
)
from workflows.plan import FOLDER, FORMAT, Plan, PlanPart, Round, part_name, read_plan
from workflows.plan_rows import (
    PlanSettings,
    carried_schema,
    check_columns,
    plan_rows,
    row_ids,
    sample_counts,
)
from workflows.results import TEXT_TASKS
from workflows.run_config import OptionError

PART_SHARDS = 1024
SHARD_ROWS = (8, 256)
SHARD_TEXTS = 4096
RESTORED_PIXELS = 4 << 20
SHARDS_WANTED = 32
SHARD_PIXEL_BYTES = 64 << 20
MOST_BLOCKS = 256
PLANNED_ROWS = 16_384
"""Planned rows that a task holds at most, but for the samples of one row."""


def make_plan(manifest: str, settings: PlanSettings, model: str, output: str | None = None) -> Plan:
    """Plans the rows of a manifest that are not planned yet, and returns the whole plan.

    manifest, model, output: local or `s3://` paths, the model a checkpoint's folder. Without an output
    nothing is written, and the plan only counts. Ray must be connected. What is planned already is never
    planned again: with the same arguments a second call reads the parts and does no more.
    Raises InputError if the manifest cannot be read or has no rows, or the plan there is of another
    manifest, model or other settings. Rows that cannot be served raise nothing: they are error rows.
    """
    checkpoint = read_checkpoint(model)
    settings.check(checkpoint.config)
    _refuse_inside(manifest, output)
    found = discover(manifest, settings.task)
    if settings.incremental:
        return _make_increment(found, settings, model, output)
    source = _Source(found)
    while True:
        plan = read_plan(output) if output else Plan()
        _check_same(plan, source.manifest, settings, checkpoint.digest)
        if _covers(plan, settings):
            return plan
        try:
            return _Planner(source, settings, model, output).extended(plan)
        except _LostRace:
            continue  # somebody else made a part meanwhile; what they chose is taken


def existing_plan(manifest: str, settings: PlanSettings, model: str, output: str) -> Plan | None:
    """The plan of an output if it has all that `make_plan` would be asked for; needs no Ray.

    None where there is more to plan, or only reading the manifest could tell. Raises as `make_plan`.
    """
    _refuse_inside(manifest, output)
    plan = read_plan(output)
    found = discover(manifest, settings.task)
    _check_same(plan, found, settings, read_checkpoint(model).digest)
    if settings.incremental:
        return plan if plan.rounds and not unseen(found, plan.rounds, settings).files else None
    return plan if _covers(plan, settings) else None


class _LostRace(Exception):
    pass


def _make_increment(found: Manifest, settings: PlanSettings, model: str, output: str | None) -> Plan:
    """`make_plan` for a manifest that grows: rounds of one part each, until nothing is new.

    One JSON then decides for a whole round, and who loses the race for it looks again for what is new.
    """
    if output is None:
        raise OptionError("incremental is set, but there is no output to go on from: give OUTPUT.")
    while True:
        plan = read_plan(output)
        _check_same(plan, found, settings, read_checkpoint(model).digest)
        known, left = read_known(output, plan.rounds), unseen(found, plan.rounds, settings)
        identity, pairs = left.identity(), None
        if any(file.format == "pictures" for file in left.files):
            left, pairs = _new_pictures(left, known, output)
        added = None
        if left.files:
            try:
                source = _Source(left, plan.rounds, settings)
                added = _Increment(source, settings, model, output, known, identity).added(plan, pairs)
            except _LostRace:
                continue
        if added is None:
            if not plan.parts:
                raise InputError(
                    f"The manifest {found.path} gives nothing to do, it has no rows: correct it."
                )
            return plan


def _new_pictures(found: Manifest, known: Known, output: str) -> tuple[Manifest, np.ndarray]:
    """In place of a folder of pictures a manifest of those that are new, and PAIR of each."""
    files = list_pictures(found.path)
    pairs = picture_pairs(files)
    new = np.flatnonzero(known.new(pairs)[0])
    one = [write_pictures(output, [files[index] for index in new])] if len(new) else []
    return Manifest(found.path, tuple(one), found.ignored), pairs[new]


def _covers(plan: Plan, settings: PlanSettings) -> bool:
    """Whether all that is asked for is planned, as far as the plan alone can tell."""
    if not plan.complete or settings.where is not None:
        return False
    taken = np.logical_or.reduce([one.selected for one in plan.rounds])
    return bool(taken[: settings.limit].all())


def _refuse_inside(manifest: str, output: str | None) -> None:
    """An output within the manifest would be read as a part of it the next time."""
    if output is None or storage.is_s3(manifest) != storage.is_s3(output):
        return
    ends = [path if storage.is_s3(path) else os.path.realpath(path) for path in (manifest, output)]
    folder, inner = (path.rstrip("/") + "/" for path in ends)
    if inner.startswith(folder):
        raise InputError(f"The output {output} lies in the manifest {manifest}: choose another place.")


def _check_same(plan: Plan, manifest: Manifest, settings: PlanSettings, model_digest: str) -> None:
    """Raises InputError, naming what differs, unless the plan there is of this manifest and settings."""
    if not plan.rounds:
        return
    first = plan.rounds[0]
    there = first.settings | first.settings["sampling"] | {"model_digest": first.model_digest}
    here = settings.meaning() | settings.meaning()["sampling"] | {"model_digest": model_digest}
    differing = [key for key in here if key != "sampling" and there.get(key) != here[key]]
    if plan.incremental != settings.incremental:
        there_words, here_words = ("with", "without") if plan.incremental else ("without", "with")
        raise InputError(
            f"The plan there was made {there_words} --incremental, but this run is {here_words}: "
            f"give it as before, or give a new output."
        )
    if differing:
        words = "; ".join(f"{key} is {there.get(key)!r} there and {here[key]!r} here" for key in differing)
        raise InputError(f"The plan belongs to another run: {words}; give another output, or these values.")
    if plan.incremental:
        return
    old = {name: tuple(rest) for name, *rest in first.manifest}
    new = {name: tuple(rest) for name, *rest in manifest.identity()}
    changes = [
        f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in (
            ("lacks", sorted(old.keys() - new.keys())),
            ("has the new", sorted(new.keys() - old.keys())),
            ("has the changed", sorted(name for name in old.keys() & new.keys() if old[name] != new[name])),
        )
        if names
    ]
    if changes:
        raise InputError(
            f"The manifest {manifest.path} is not the one that was planned, since it {', '.join(changes)}: "
            f"give another output, or the manifest as it was."
        )


class Checkpoint(NamedTuple):
    """What can be known of a checkpoint without its weights; digest: its own, in hexadecimal."""

    config: ModelConfig
    tokenizer: Tokenizer
    digest: str


@functools.lru_cache(maxsize=4)
def read_checkpoint(model: str) -> Checkpoint:
    """What planning needs of a checkpoint, once a process: its weights are neither read nor fetched."""
    folder, files = storage.fetch_folder(model, (CONFIG, TOKENIZER)), read_files(model)
    return Checkpoint(ModelConfig.from_file(folder / CONFIG), Tokenizer.from_folder(folder), digest(files))


def read_files(model: str) -> dict[str, FileEntry]:
    """Size and sha256 of every file of a checkpoint, by name."""
    where = storage.fetch_folder(model, ()) / FILE_LIST
    try:
        return parse_file_list(where.read_bytes(), str(where))
    except OSError:
        raise InputError(
            f"The model {model} is not a checkpoint, since it has no {FILE_LIST}: give the folder of one."
        ) from None


# Ray Data


Task = Callable[..., dict[str, Any]]
"""A function of an item: gives JSON values, and bytes under `data` if it has any."""


def _each(
    items: list[dict[str, Any]], task: Task, **constants: Any
) -> Iterator[tuple[int, dict[str, Any], bytes]]:
    """`task(item, **constants)` of every item, in Ray tasks, as they come: item's index, values, data.

    A fault of the input is an answer like any other, so that it arrives as the sentence it is.
    """
    import ray.data

    answer = functools.partial(_answer, task=task, constants=constants)
    rows = ray.data.from_items(items, override_num_blocks=min(len(items), MOST_BLOCKS))
    for row in rows.map(answer, num_cpus=1).iter_rows():
        if row["fault"]:
            raise InputError(row["fault"])
        yield row["index"], json.loads(row["values"]), row["data"]


def _answer(row: dict[str, Any], task: Task, constants: dict[str, Any]) -> dict[str, Any]:
    storage.be_patient()
    try:
        values = task(row, **constants)
    except InputError as error:
        return {"index": row["index"], "values": "", "data": b"", "fault": str(error)}
    data = values.pop("data", b"")
    return {"index": row["index"], "values": json.dumps(values), "data": data, "fault": ""}


def _pack(bits: np.ndarray) -> bytes:
    return np.packbits(bits).tobytes()


def _unpack(data: bytes, count: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(bool)


# Pass 1: what is in the files


class _Source:
    """A manifest, and what is learnt of it: pieces in order, and one schema. Each is found out once."""

    def __init__(
        self, manifest: Manifest, rounds: Sequence[Round] = (), settings: PlanSettings | None = None
    ):
        """rounds: those before, whose schema this one must share; settings: of the plan, with rounds."""
        self.manifest, self.rounds, self.settings = manifest, rounds, settings
        self.warnings: list[str] = []
        if manifest.ignored:
            more = f" and {len(manifest.ignored) - 1} more" if len(manifest.ignored) > 1 else ""
            self.warnings.append(f"Not read as a manifest: {manifest.ignored[0]}{more}.")

    @functools.cached_property
    def _scanned(self) -> tuple[list[Piece], pa.Schema]:
        files = self.manifest.files
        items = [{"index": i, "file": json.dumps(dataclasses.asdict(file))} for i, file in enumerate(files)]
        columns, pieces = Columns(), {}
        for index, answer, _ in _each(items, _scan):
            found = Scan.from_json(answer["scan"], files[index])
            columns.add(index, files[index].path, found)
            pieces[index] = found.pieces
        return [piece for index in range(len(files)) for piece in pieces[index]], columns.schema()

    @property
    def pieces(self) -> list[Piece]:
        return self._scanned[0]

    @functools.cached_property
    def schema(self) -> pa.Schema:
        found = self._scanned[1]
        return joined_schema(found, self.rounds, self.settings) if self.settings else found

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """int64 [pieces + 1]: number in the manifest of the first row of each piece, and of all rows."""
        return np.cumsum([0, *(piece.rows for piece in self.pieces)], dtype=np.int64)

    @property
    def rows(self) -> int:
        return int(self.starts[-1])

    def slice(self, index: int) -> slice:
        """The rows of a piece among those of the manifest."""
        return slice(self.starts[index], self.starts[index + 1])

    def sums(self, bits: np.ndarray) -> np.ndarray:
        """int64 [pieces]: how many of bits (bool [rows]) are set in each piece."""
        return np.add.reduceat(bits, self.starts[:-1], dtype=np.int64) if len(bits) else np.zeros(0, np.int64)

    def items(self, bits: np.ndarray, selected: np.ndarray | None = None) -> list[dict[str, Any]]:
        """A Ray row for each piece that has a set bit (bool [rows]); the rows also selected, if given."""
        found = []
        for index in np.flatnonzero(self.sums(bits)).tolist():
            mine = _pack(bits[self.slice(index)])
            item = {"index": index, "piece": self.pieces[index].to_json(), "bits": mine}
            if selected is not None:
                item["selected"] = _pack(selected[self.slice(index)])
            found.append(item)
        return found


def _scan(row: dict[str, Any]) -> dict[str, Any]:
    return {"scan": scan(ManifestFile(**json.loads(row["file"]))).to_json()}


# Pass 2: which rows are chosen, and how many planned rows they give


def _selected(source: _Source, settings: PlanSettings) -> np.ndarray:
    """bool [rows of the manifest]: those that `where` and `limit` choose."""
    selected = np.ones(source.rows, bool)
    if settings.where is not None:
        Filter(settings.where, source.schema)  # says what is wrong with it before any task does
        schema = encode_schema(source.schema)
        for index, _, data in _each(source.items(selected), _match, schema=schema, where=settings.where):
            selected[source.slice(index)] = _unpack(data, source.pieces[index].rows)
    if settings.limit is not None:
        selected[np.flatnonzero(selected)[settings.limit :]] = False
    return selected


def _match(row: dict[str, Any], schema: str, where: str) -> dict[str, Any]:
    columns = decode_schema(schema)
    chooser = Filter(where, columns)
    found = [chooser.matches(batch.table) for batch in read(Piece.from_json(row["piece"]), columns)]
    return {"data": _pack(np.concatenate(found))}


class _Counts(NamedTuple):
    """outputs: int64 [pieces], planned rows of each. duplicates: piece -> its rows that repeat an id."""

    outputs: np.ndarray
    duplicates: dict[int, list[int]]


def _counted(source: _Source, selected: np.ndarray, taken: np.ndarray, settings: PlanSettings) -> _Counts:
    """How many planned rows each piece gives, and which of its rows repeat the id of an earlier one.

    selected, taken: bool [rows of the manifest], those of this round and of earlier ones. Rows of an
    earlier round come before all of this one.
    """
    names = set(source.schema.names)
    if not names & {"id", "samples"} and all(file.format == "parquet" for file in source.manifest.files):
        # The footers have told all there is to know.
        return _Counts(source.sums(selected) * settings.samples, {})
    outputs = np.zeros(len(source.pieces), np.int64)
    considered = selected | taken if "id" in names else selected
    ends = np.cumsum([0, *source.sums(considered)])
    # Without an `id` column ids are places in files, which no two rows share.
    hashes = np.empty(ends[-1] if "id" in names else 0, np.uint64)
    constants = {"schema": encode_schema(source.schema), "settings": settings}
    for index, answer, data in _each(source.items(considered, selected), _count, **constants):
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
        return _Counts(outputs, {})
    found = []
    for index, _, data in _each(items, _identify, **constants):
        rows = np.frombuffer(data, _IDENTITY)
        entry = np.zeros(len(rows), [*_IDENTITY.descr, ("piece", "i8"), ("position", "i8"), ("new", "?")])
        for name in ("high", "low", "row", "count"):
            entry[name] = rows[name]
        entry["piece"] = index
        entry["position"] = source.starts[index] + rows["row"]
        entry["new"] = ~taken[entry["position"]]
        found.append(entry)
    rows = np.concatenate(found)
    rows = rows[np.lexsort((rows["position"], rows["new"], rows["low"], rows["high"]))]
    same = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
    duplicates: dict[int, list[int]] = {}
    for row in rows[1:][same & rows["new"][1:]]:
        duplicates.setdefault(int(row["piece"]), []).append(int(row["row"]))
        outputs[row["piece"]] -= row["count"] - 1
    return _Counts(outputs, duplicates)


_IDENTITY = np.dtype([("high", np.uint64), ("low", np.uint64), ("row", np.int64), ("count", np.int64)])
"""What tells one id from another beyond doubt, the row in the piece, and the planned rows it would give."""


def _repeated(hashes: np.ndarray) -> np.ndarray:
    """int64: where in hashes (uint64) a value stands that occurs more than once, ascending."""
    found = [np.empty(0, np.int64)]
    # One sixteenth at a time, since sorting all of it would take its memory again.
    nibbles = hashes.view(np.uint8)[::8] & 15 if len(hashes) else ()
    for nibble in range(16):
        mine = np.flatnonzero(nibbles == nibble) if len(hashes) else found[0]
        values, counts = np.unique(hashes[mine], return_counts=True)
        found.append(mine[np.isin(hashes[mine], values[counts > 1])])
    return np.sort(np.concatenate(found))


def _considered(row: dict[str, Any], schema: str, names: set[str]) -> Iterator["_Rows"]:
    """The rows of a piece whose bit is set, with these columns, a batch at a time."""
    piece = Piece.from_json(row["piece"])
    bits = _unpack(row["bits"], piece.rows)
    for batch in read(piece, decode_schema(schema), names):
        start = batch.first_row - piece.first_row
        rows = start + np.flatnonzero(bits[start : start + batch.table.num_rows])
        if len(rows):
            table = batch.table if len(rows) == batch.table.num_rows else batch.table.take(rows - start)
            yield _Rows(piece, rows, table, batch.faults)


class _Rows(NamedTuple):
    """Some rows of a piece. rows: int64, their numbers in it. faults: number in the file -> fault."""

    piece: Piece
    rows: np.ndarray
    table: pa.Table
    faults: dict[int, str]

    @property
    def numbers(self) -> list[int]:
        """Their numbers in the file."""
        return (self.piece.first_row + self.rows).tolist()

    def slice(self, start: int, stop: int) -> "_Rows":
        return self._replace(rows=self.rows[start:stop], table=self.table.slice(start, stop - start))


def _ids(rows: _Rows) -> list[str]:
    return row_ids(rows.table, rows.piece.file.relative, rows.numbers)[0]


def _count(row: dict[str, Any], schema: str, settings: PlanSettings) -> dict[str, Any]:
    """Planned rows that the selected rows of a piece give, and 8 bytes of a hash of every id considered."""
    selected = _unpack(row["selected"], Piece.from_json(row["piece"]).rows)
    outputs, hashes = 0, []
    for rows in _considered(row, schema, {"id", "samples"}):
        counts = sample_counts(rows.table, settings, rows.numbers, rows.faults)
        outputs += int(counts[selected[rows.rows]].sum())
        hashes += [hashlib.blake2b(one.encode(), digest_size=8).digest() for one in _ids(rows)]
    return {"outputs": outputs, "data": b"".join(hashes)}


def _identify(row: dict[str, Any], schema: str, settings: PlanSettings) -> dict[str, Any]:
    """The rows whose ranks (among those considered) are asked for, as _IDENTITY."""
    ranks = np.frombuffer(row["ranks"], np.int64)
    found, seen = [], 0
    for rows in _considered(row, schema, {"id", "samples"}):
        counts, ids = sample_counts(rows.table, settings, rows.numbers, rows.faults), _ids(rows)
        for rank in ranks[(ranks >= seen) & (ranks < seen + len(ids))] - seen:
            both = np.frombuffer(hashlib.blake2b(ids[rank].encode(), digest_size=16).digest(), np.uint64)
            found.append((*both, rows.rows[rank], counts[rank]))
        seen += len(ids)
    return {"data": np.array(found, _IDENTITY).tobytes()}


# Pass 3: the parts


class _Planner:
    """Adds rounds to a plan."""

    def __init__(self, source: _Source, settings: PlanSettings, model: str, output: str | None):
        self.source, self.settings, self.model, self.output = source, settings, model, output
        self.versions: np.ndarray | None = None
        # A file without rows may show no columns either, and that is not what is wrong with it.
        self.warnings = source.warnings + (check_columns(source.schema, settings) if source.rows else [])

    def extended(self, plan: Plan) -> Plan:
        """The plan with all that is asked for. Raises _LostRace if somebody else planned meanwhile."""
        source = self.source
        if plan.rounds and len(plan.rounds[0].selected) != source.rows:
            raise _changed(source.manifest.path)
        if plan.parts and not plan.complete:
            plan = self._with_round(plan, plan.rounds[-1].selected, plan.rounds[-1])
        selected = _selected(source, self.settings)
        for earlier in plan.rounds:
            selected &= ~earlier.selected
        if selected.any():
            return self._with_round(plan, selected)
        if not plan.parts:
            why = "it has no rows"
            if source.rows:
                why = f"where '{self.settings.where}' chooses none of its rows"
            raise InputError(f"The manifest {source.manifest.path} gives nothing to do, {why}: correct it.")
        return plan

    def _with_round(self, plan: Plan, selected: np.ndarray, old: Round | None = None) -> Plan:
        """The plan with a round of the selected rows (bool [rows of the manifest]).

        old: the last round of the plan, if it is that one which lacks parts and is to be finished.
        """
        earlier = plan.rounds[:-1] if old else plan.rounds
        # Rounds of a manifest that grows have rows of their own each.
        same = [one.selected for one in earlier if not one.known]
        taken = np.logical_or.reduce(same or [np.zeros_like(selected)])
        counts = _counted(self.source, selected, taken, self.settings)
        ends = np.cumsum(counts.outputs)
        rows = int(ends[-1])
        if old and old.rows != rows:
            raise _changed(self.source.manifest.path)
        checkpoint = read_checkpoint(self.model)
        carried = carried_schema(self.source.schema, self.settings)
        now = old or Round(
            rows=rows,
            shard_rows=shard_rows(rows, checkpoint.config, self.settings.task, self.settings.restore_size),
            selected=selected,
            settings=self.settings.meaning(),
            model_digest=checkpoint.digest,
            carried=carried,
            warnings=self.warnings,
            **self._decided(),
        )
        number = len(earlier)
        before = [part for part in plan.parts if part.round < number]
        done = [part for part in plan.parts if part.round == number]
        constants = {
            "schema": encode_schema(self.source.schema),
            "settings": self.settings,
            "model": self.model,
            "output": self.output,
            "shard_rows": now.shard_rows,
        }
        first_row_id, first_shard = sum(part.rows for part in before), before[-1].end if before else 0
        first_part = before[-1].part + 1 if before else 0
        step = PART_SHARDS * now.shard_rows
        items: list[dict[str, Any]] = []
        for start in range(len(done) * step, rows, step):
            stop = min(start + step, rows)
            work = self._work(selected, counts, ends, start, stop)
            items.append(
                {
                    "index": first_part + start // step,
                    "first_row_id": first_row_id + start,
                    "first_shard": first_shard + start // now.shard_rows,
                    "rows": stop - start,
                    "work": json.dumps(work),
                }
            )
        waiting: dict[int, PlanPart] = {}
        parts = [*before, *done]
        for index, answer, _ in _each(items, _write_part, **constants):
            item = items[index - first_part - len(done)]
            waiting[index] = PlanPart(
                part=index,
                round=number,
                complete=item["first_row_id"] + item["rows"] == first_row_id + rows,
                **{name: item[name] for name in ("first_row_id", "first_shard", "rows")},
                shards=-(-item["rows"] // now.shard_rows),
                shard_rows=now.shard_rows,
                **answer,
            )
            # Parts become valid in order, so that what is valid is always a plan as far as it goes.
            while (ready := waiting.pop(first_part + len(parts) - len(before), None)) is not None:
                self._commit(ready, now if len(parts) == len(before) else None)
                parts.append(ready)
        return Plan(tuple(parts), (*earlier, now))

    def _work(
        self, selected: np.ndarray, counts: _Counts, ends: np.ndarray, start: int, stop: int
    ) -> list[dict[str, Any]]:
        """Which pieces give the planned rows [start, stop) of a round, and how many of each to skip."""
        first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop)
        work = []
        for index in range(first, last + 1):
            begin = int(ends[index] - counts.outputs[index])
            if counts.outputs[index]:
                work.append(
                    {
                        "piece": self.source.pieces[index].to_json(),
                        "bits": base64.b64encode(_pack(selected[self.source.slice(index)])).decode(),
                        "duplicates": sorted(counts.duplicates.get(index, ())),
                        "versions": self._versions(index),
                        "skip": max(0, start - begin),
                        "take": min(stop, int(ends[index])) - max(start, begin),
                    }
                )
        return work

    def _versions(self, index: int) -> dict[int, int]:
        """Row in the piece -> version, of those that are not the first of their id."""
        if self.versions is None:
            return {}
        mine = self.versions[self.source.slice(index)]
        return {int(row): int(mine[row]) for row in np.flatnonzero(mine)}

    def _commit(self, part: PlanPart, opening: Round | None) -> None:
        if self.output is None:
            return
        document = {"format": FORMAT, **dataclasses.asdict(part)}
        if opening is not None:
            document["opening"] = opening.to_values()
        path = storage.join(self.output, FOLDER, f"{part.name}.json")
        if not storage.put_if_absent(path, json.dumps(document, ensure_ascii=False).encode() + b"\n"):
            raise _LostRace

    def _decided(self) -> dict[str, Any]:
        """Fields of a Round that say what it was planned from."""
        return {"manifest": self.source.manifest.identity()}


class _Increment(_Planner):
    """Adds a round of what is new in a manifest that grows."""

    def __init__(
        self,
        source: _Source,
        settings: PlanSettings,
        model: str,
        output: str,
        known: Known,
        identity: list[list[Any]],
    ):
        """identity: of the files that are read, and need not be again once all that is new is planned."""
        super().__init__(source, settings, model, output)
        self.folder, self.known, self.identity, self.file = output, known, identity, ""

    def added(self, plan: Plan, pairs: np.ndarray | None) -> Plan | None:
        """The plan with a round of what is new; None if nothing is.

        pairs: PAIR of the source's rows, None if that is to be found out. Raises _LostRace.
        """
        source = self.source
        if not source.rows:
            return None
        pairs = self._pairs() if pairs is None else pairs
        selected, self.versions = self.known.new(pairs)
        whole = selected.sum()
        if not whole:
            return None
        config = read_checkpoint(self.model).config
        while True:
            counts = _counted(source, selected, np.zeros_like(selected), self.settings)
            rows = int(counts.outputs.sum())
            most = PART_SHARDS * shard_rows(rows, config, self.settings.task, self.settings.restore_size)
            if rows <= most:
                break
            # What is left over is new to the next round.
            chosen = np.flatnonzero(selected)
            selected = selected.copy()
            selected[chosen[max(1, len(chosen) * most // (rows + 1)) :]] = False
        if selected.sum() < whole:
            self.identity = []
        self.file = write_known(self.folder, pairs[selected], self.versions[selected])
        return self._with_round(plan, selected)

    def _decided(self) -> dict[str, Any]:
        schema = encode_schema(self.source.schema)
        return {"manifest": self.identity, "known": self.file, "schema": schema}

    def _pairs(self) -> np.ndarray:
        pairs = np.empty(self.source.rows, PAIR)
        every = np.ones(self.source.rows, bool)
        constants = {
            "schema": encode_schema(self.source.schema),
            "settings": self.settings,
            "when": secrets.token_hex(8),
        }
        for index, _, data in _each(self.source.items(every), _pair, **constants):
            pairs[self.source.slice(index)] = np.frombuffer(data, PAIR)
        return pairs


def _pair(row: dict[str, Any], schema: str, settings: PlanSettings, when: str) -> dict[str, Any]:
    """PAIR of all rows of a piece."""
    found = []
    for rows in _considered(row, schema, set(decode_schema(schema).names)):
        faults = [rows.faults.get(number, "") for number in rows.numbers]
        folder = folder_of(rows.piece.file.path)
        found.append(row_pairs(rows.table, _ids(rows), settings, folder, faults, when))
    return {"data": np.concatenate(found).tobytes()}


def _changed(path: str) -> InputError:
    return InputError(f"The manifest {path} changed while it was read: start again when it is complete.")


def shard_rows(rows: int, config: ModelConfig, task: str = "generate", restored: bool = False) -> int:
    """Rows of a shard in a round of so many rows: enough shards for every replica to get several.

    No more than are 64 MiB of pixels, in and out, in the largest sizes of the checkpoint. restored: whether
    pictures get the sizes of their sources, which nobody knows yet: RESTORED_PIXELS are reckoned.
    """
    largest = max(size.height * size.width for size in config.size_list())
    pixels = {
        "generate": largest,
        "edit": largest + config.edit_pixels[1] + (RESTORED_PIXELS if restored else largest),
        "understand": config.understand_pixels[1],
    }[task]
    least, most = SHARD_ROWS
    wanted = min(max(-(-rows // SHARDS_WANTED), least), SHARD_TEXTS if task in TEXT_TASKS else most)
    return max(1, min(wanted, SHARD_PIXEL_BYTES // (3 * pixels)))


def _write_part(
    row: dict[str, Any], schema: str, settings: PlanSettings, model: str, output: str | None, shard_rows: int
) -> dict[str, Any]:
    """Plans the rows of a part and writes its Parquet file, a row group a shard."""
    errors: Counter[str] = Counter()
    sizes: Counter[str] = Counter()

    def counted(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        for table in tables:
            errors.update(kind for kind in table.column("error_type").to_pylist() if kind)
            # Of pictures to be loaded the sizes are not known yet.
            known = pc.and_(pc.equal(table.column("status"), "planned"), table.column("width").is_valid())
            planned = table.filter(known)
            widths, heights = (planned.column(name).to_pylist() for name in ("width", "height"))
            sizes.update(f"{width}x{height}" for width, height in zip(widths, heights, strict=True))
            yield table

    inputs = [row["work"], row["first_row_id"], row["first_shard"], shard_rows, schema, settings.meaning()]
    name = hashlib.sha256(json.dumps([*inputs, read_checkpoint(model).digest]).encode()).hexdigest()[:16]
    file = f"{part_name(row['index'])}-{name}.parquet"
    tables = counted(_planned(json.loads(row["work"]), schema, settings, read_checkpoint(model)))
    shards = _shards(tables, row["first_row_id"], row["first_shard"], shard_rows)
    if output is None:
        rows = sum(table.num_rows for table in shards)
    else:
        rows = write_shards(storage.join(output, FOLDER, file), shards)
    if rows != row["rows"]:
        raise InputError("The manifest changed while it was read: start again when it is complete.")
    return {"file": file, "error_rows": errors.total(), "errors": dict(errors), "sizes": dict(sizes)}


def write_shards(path: str, shards: Iterator[pa.Table]) -> int:
    """Writes the Parquet file of a part, a row group a shard; how many rows it has."""
    rows = 0
    first = next(shards)
    with (
        storage.write_stream(path) as stream,
        pq.ParquetWriter(stream, first.schema, compression="zstd") as writer,
    ):
        for table in itertools.chain([first], shards):
            writer.write_table(table, row_group_size=table.num_rows)
            rows += table.num_rows
    return rows


def _planned(
    work: list[dict[str, Any]], schema: str, settings: PlanSettings, checkpoint: Checkpoint
) -> Iterator[pa.Table]:
    """The planned rows of some pieces, in order, numbered anew in every table."""
    names = set(decode_schema(schema).names)
    for one in work:
        skip, take = one["skip"], one["take"]
        bits = {"piece": one["piece"], "bits": base64.b64decode(one["bits"])}
        for rows in _considered(bits, schema, names):
            duplicates = {rows.piece.first_row + row for row in one["duplicates"]}
            # The keys of JSON are text.
            versions = {rows.piece.first_row + int(row): n for row, n in one["versions"].items()}
            counts = sample_counts(rows.table, settings, rows.numbers, rows.faults, duplicates)
            for start, stop in _few(counts):
                given = int(counts[start:stop].sum())
                if skip < given and take:
                    few = rows.slice(start, stop)
                    table = plan_rows(
                        few.table,
                        settings,
                        checkpoint.config,
                        checkpoint.tokenizer,
                        origin=rows.piece.file.relative,
                        folder=folder_of(rows.piece.file.path),
                        numbers=few.numbers,
                        faults=rows.faults,
                        duplicates=duplicates,
                        versions=versions,
                    ).slice(skip, take)
                    yield table
                    take -= table.num_rows
                skip = max(0, skip - given)
            if not take:
                break


def folder_of(path: str) -> str:
    """The folder of a file, local or on S3."""
    return path.rpartition("/")[0] if storage.is_s3(path) else os.path.dirname(path)


def _few(counts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Cuts rows, by the planned rows that each gives, into runs that give few: [start, stop)."""
    start = total = 0
    for index, count in enumerate(counts.tolist()):
        if total + count > PLANNED_ROWS and index > start:
            yield start, index
            start, total = index, 0
        total += count
    yield start, len(counts)


def _shards(tables: Iterator[pa.Table], row_id: int, shard: int, rows: int) -> Iterator[pa.Table]:
    """The rows of some tables, cut into shards and numbered from these numbers on."""
    waiting: list[pa.Table] = []
    for table in itertools.chain(tables, [None]):
        waiting += [table] if table is not None else []
        count = sum(one.num_rows for one in waiting)
        whole = count // rows * rows if table is not None else count
        if not whole:
            continue
        joined = pa.concat_tables(waiting)
        for start in range(0, whole, rows):
            part = joined.slice(start, min(rows, whole - start))
            numbers = np.arange(row_id, row_id + part.num_rows)
            part = part.set_column(0, part.schema.field(0), pa.array(numbers))
            yield part.set_column(1, part.schema.field(1), pa.array(np.full(part.num_rows, shard)))
            row_id, shard = row_id + part.num_rows, shard + 1
        waiting = [joined.slice(whole)]
