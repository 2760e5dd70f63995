"""Choosing rows of a data set or manifest: by a function, the best of each id, no near-duplicates, splits.

    look (once over all rows, a shard at a time) -> decide (some 40 bytes a row) -> write the rows kept

What is kept is a copy, never a change, and every row that is not kept is told with its reason. Knows
nothing of how rows were made, or of Ray.
"""

import hashlib
import importlib
import itertools
import json
import math
import os
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import InputError, RowError, did_you_mean
from workflows import storage
from workflows.card import CARD_FILE, code, front_matter
from workflows.cells import Cell, parse_cell, read_cells
from workflows.finish import read_success
from workflows.manifest import Columns, discover, read, scan
from workflows.plan_rows import row_ids
from workflows.results import (
    RUN_FILE,
    TEXT_TASKS,
    list_done,
    open_shard,
    read_run,
    shard_bytes,
    shard_name,
)
from workflows.run_config import OptionError
from workflows.sources import Fetched, Reference, SourceOptions, decode, fetch, fetch_many

if TYPE_CHECKING:
    from PIL import Image

SELECTION_FILE = "_selection.json"
DROPPED_FILE = "_dropped.jsonl"
"""Names that begin so that nobody takes them for a part of a manifest."""

DEFAULT_FOLDER = "data"
HASH_BITS = 64
MOST_DISTANCE = 16
MOST_FAILURES = 10_000
MANIFEST_GROUP_ROWS = 1024

REASONS = (
    "",
    "error row",
    "filter",
    "not the best",
    "near-duplicate",
    "unreadable row",
    "filter failed",
    "score failed",
    "picture failed",
)
"""Why a row is not kept; the first is for one that is. A row's reason is its place in here."""

KEPT, ERROR, FILTER, WORSE, NEAR, UNREADABLE, FILTER_FAILED, SCORE_FAILED, PICTURE_FAILED = range(
    len(REASONS)
)
FAILURES = frozenset({UNREADABLE, FILTER_FAILED, SCORE_FAILED, PICTURE_FAILED})

Function = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Rules:
    """What is kept. The rules apply in this order, each to the rows that those before it left.

    Error rows of a data set are never kept.
    filter: `package.module:function`; rows for which it returns True stay.
    best_of: a column, or `package.module:function` that returns a number; of the rows of one group the
        one with the greatest number stays, of equal ones the first. Of a text the first number in it
        counts, so that `8/10` is 8. scores: a data set that was made from this one, whose column it is:
        its rows name rows of this one in `source`, and of several about one row the mean counts.
    near_duplicates: a row goes if the perceptual hash of its picture (see `dhash`) differs in at most so
        many of 64 bits from that of an earlier row that stays.
    split: name -> share. A group's side follows from sha256 of its name alone: a row never changes
        sides, whatever is added or left out.
    group: the column that says which rows belong together.
    """

    filter: str | None = None
    best_of: str | None = None
    scores: str | None = None
    near_duplicates: int | None = None
    split: Mapping[str, float] = field(default_factory=dict)
    group: str = "id"

    def check(self) -> None:
        """Raises OptionError if a rule breaks a rule."""
        if self.scores is not None and (self.best_of is None or ":" in self.best_of):
            raise OptionError("scores are given, but no column of them: name it with --best-of COLUMN.")
        distance = self.near_duplicates
        if distance is not None and not 0 <= distance <= MOST_DISTANCE:
            raise OptionError(f"near_duplicates is {distance}, but must be from 0 to {MOST_DISTANCE} bits.")
        for name, share in self.split.items():
            if not re.fullmatch(r"\w+", name):
                raise OptionError(f"The split '{name}' must be named with letters, digits and _ alone.")
            if not 0 < share <= 1:
                raise OptionError(f"The split {name} is {share:g}, but must be above 0 and at most 1.")
        if self.split and not math.isclose(sum(self.split.values()), 1, abs_tol=1e-9):
            raise OptionError(f"The splits make {sum(self.split.values()):g} together, but must make 1.")


@dataclass(frozen=True)
class Selection:
    """What became of the rows. dropped: reason -> rows. splits: name -> rows kept. failures: how many of
    the dropped rows a function or a picture failed on, rather than a rule decided."""

    rows: int
    kept: int
    dropped: dict[str, int]
    splits: dict[str, int]
    failures: int


def select(source: str, dest: str, rules: Rules) -> Selection:
    """Copies the rows of `source` that the rules keep to `dest`, a folder; both are local or on S3.

    source: the finished output of a run, or a manifest. dest gets Parquet files with the columns of the
    source, in `data/` or a folder for each split; `_dropped.jsonl`, every other row with its reason; and
    a card. The same call gives the same files, and a call that was cut short is repeated as a whole.
    Holds one shard, and some 40 bytes a row. Raises InputError if the source cannot be read, a column or
    function does not exist, or dest holds anything else.
    """
    rules.check()
    rows = _Output(source) if storage.exists(storage.join(source, RUN_FILE)) else _Manifest(source)
    look = _Look(rows, rules)
    _claim(source, dest, rules)
    found = look.all()
    decided = _decide(found, rules)
    return _write(rows, dest, rules, found, decided, look.messages)


def load_function(name: str) -> Function:
    """The function that `package.module:function` names. Raises OptionError if there is none."""
    module, mark, attribute = name.partition(":")
    if not (module and mark and attribute):
        raise OptionError(f"'{name}' names no function: write package.module:function.")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        words = str(error).strip().split("\n", 1)[0][:200]
        raise OptionError(
            f"{name} cannot be imported ({type(error).__name__}: {words}): "
            f"check the name, and that its module is in the present folder or installed."
        ) from error
    if not callable(found):
        raise OptionError(f"{name} is no function: name one that takes a row.")
    return found


def dhash(image: "Image.Image") -> int:
    """The 64-bit difference hash of a picture.

    The picture in grey is scaled to 9x8 pixels (Lanczos); a bit is set where a pixel is brighter than
    the one to its left, row by row, the first bit the highest. A picture of one colour has 0.
    """
    from PIL import Image

    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS))
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes())


# What is read


class Chunk(NamedTuple):
    """Some rows. first: number of the first in the source. faults: place in the chunk -> what is wrong."""

    table: pa.Table
    first: int
    faults: dict[int, str]


class _Output:
    """The rows of a finished run."""

    def __init__(self, path: str):
        if read_success(path) is None:
            raise InputError(f"{path} is not finished: start its run again, it goes on by itself.")
        self.path = path
        self.task = str(read_run(path)["config"].get("task", "generate"))
        self.shards = sorted(list_done(path))
        self.pieces = [shard_name(shard) for shard in self.shards]
        self.folder = "/"
        if not self.shards:
            raise InputError(f"{path} has no rows: give another data set.")
        with self._open(0) as parquet:
            self.schema = parquet.schema_arrow

    def chunks(self, piece: int, columns: Sequence[str] | None = None) -> Iterator[Chunk]:
        with self._open(piece) as parquet:
            first = 0
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, columns=columns)
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
                f"delete it and start its run again."
            ) from error

    def names(self, chunk: Chunk, piece: int, column: str) -> list[str]:
        return [str(value) for value in chunk.table.column(column).to_pylist()]

    def reference(self, row: Mapping[str, Any]) -> Reference:
        if row["task"] not in TEXT_TASKS:
            return row["image"]
        source = row["source"] or {}
        inside = source.get("row_id") is not None
        return str(Cell(source["uri"], source["row_id"])) if inside else source.get("uri")

    def write(self, path: str, table: pa.Table) -> None:
        storage.write_atomic(path, memoryview(shard_bytes(table)))


class _Manifest:
    """The rows of a manifest."""

    def __init__(self, path: str):
        self.path, self.task = path, ""
        manifest = discover(path)
        columns, self._pieces = Columns(), []
        for number, file in enumerate(manifest.files):
            found = scan(file)
            columns.add(number, file.path, found)
            self._pieces += found.pieces
        self.schema = columns.schema()
        self.pieces = [f"part-{number:05d}.parquet" for number in range(len(self._pieces))]
        fixed = re.split(r"[*?\[]", path, maxsplit=1)[0]
        single = storage.exists(path) or fixed != path
        self.folder = (fixed.rpartition("/")[0] or ".") if single else path

    def chunks(self, piece: int, columns: Sequence[str] | None = None) -> Iterator[Chunk]:
        start = self._pieces[piece].first_row
        for batch in read(self._pieces[piece], self.schema, columns):
            faults = {number - batch.first_row: fault for number, fault in batch.faults.items()}
            yield Chunk(batch.table, batch.first_row - start, faults)

    def names(self, chunk: Chunk, piece: int, column: str) -> list[str]:
        if column in chunk.table.column_names and column != "id":
            return [str(value) for value in chunk.table.column(column).to_pylist()]
        first = self._pieces[piece].first_row + chunk.first
        numbers = range(first, first + chunk.table.num_rows)
        return row_ids(chunk.table, self._pieces[piece].file.relative, numbers)[0]

    def reference(self, row: Mapping[str, Any]) -> Reference:
        return row["image"]

    def write(self, path: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=MANIFEST_GROUP_ROWS)
        storage.write_atomic(path, memoryview(sink.getvalue()))


# Looking


class _Found(NamedTuple):
    """What deciding needs of every row. starts: number of the first row of each piece, and of all rows."""

    starts: np.ndarray
    why: np.ndarray
    groups: np.ndarray
    scores: np.ndarray
    hashes: np.ndarray


class _Look:
    """Goes over all rows once, and calls the functions. messages: row number -> what a function said."""

    def __init__(self, rows: _Output | _Manifest, rules: Rules):
        self.rows, self.rules = rows, rules
        self.messages: dict[int, str] = {}
        self.filter = load_function(rules.filter) if rules.filter else None
        self.score, self.column, self.scores = None, None, None
        if rules.best_of and ":" in rules.best_of:
            self.score = load_function(rules.best_of)
        elif rules.scores:
            if not isinstance(rows, _Output):
                raise InputError(f"{rows.path} is not the output of a run, so no scores are about its rows.")
            self.scores = _Scores(rules.scores, rules.best_of or "", rows.path)
        else:
            self.column = rules.best_of
        picture = ("image",) if rules.near_duplicates is not None else ()
        group = () if rules.group == "id" else (rules.group,)
        for name in (*group, *picture, *([self.column] if self.column else [])):
            if name not in rows.schema.names:
                hint = (
                    did_you_mean(name, rows.schema.names) or f": it has {', '.join(rows.schema.names[:10])}."
                )
                raise OptionError(f"{rows.path} has no column '{name}'{hint}")
        # A function may look at anything.
        self.columns: list[str] | None = None
        if self.filter is None and self.score is None:
            wanted = {"id", "status", "row_id", "sha256", rules.group, *picture, self.column}
            wanted |= {"task", "source"} if picture else set()
            self.columns = [name for name in rows.schema.names if name in wanted]

    def all(self) -> _Found:
        parts: list[list[np.ndarray]] = []
        starts = [0]
        for piece in range(len(self.rows.pieces)):
            count = 0
            for chunk in self.rows.chunks(piece, self.columns):
                parts.append(self._chunk(chunk, piece, starts[-1] + chunk.first))
                count += chunk.table.num_rows
            starts.append(starts[-1] + count)
        kinds = (np.uint8, np.uint64, np.float64, np.uint64)
        joined = [
            np.concatenate([part[index] for part in parts]) if parts else np.zeros(0, kind)
            for index, kind in enumerate(kinds)
        ]
        return _Found(np.array(starts), *joined)

    def _chunk(self, chunk: Chunk, piece: int, first: int) -> list[np.ndarray]:
        table = chunk.table
        why = np.zeros(table.num_rows, np.uint8)
        scores = np.zeros(table.num_rows)
        hashes = np.zeros(table.num_rows, np.uint64)
        groups = np.array(
            [group_hash(name) for name in self.rows.names(chunk, piece, self.rules.group)], np.uint64
        )
        for place, fault in chunk.faults.items():
            self._failed(why, place, first, UNREADABLE, fault)
        if isinstance(self.rows, _Output):
            why[[status != "ok" for status in table.column("status").to_pylist()]] = ERROR
        needs_rows = self.filter or self.score or self.rules.near_duplicates is not None
        rows = table.to_pylist() if needs_rows else []
        for place in np.flatnonzero(why == KEPT).tolist() if self.filter else ():
            assert self.filter is not None
            try:
                answer = self.filter(dict(rows[place]))
                if not isinstance(answer, (bool, np.bool_)):
                    raise TypeError(f"it returned {answer!r:.60}, but must return True or False")
                why[place] = KEPT if answer else FILTER
            except Exception as error:
                self._failed(why, place, first, FILTER_FAILED, _words(error))
        if self.rules.best_of:
            given = self._given(table)
            for place in np.flatnonzero(why == KEPT).tolist():
                try:
                    value = given[place] if given is not None else self.score(dict(rows[place]))  # type: ignore[misc]
                    scores[place] = number(value)
                except Exception as error:
                    self._failed(why, place, first, SCORE_FAILED, _words(error))
        if self.rules.near_duplicates is not None:
            places = np.flatnonzero(why == KEPT).tolist()
            references = [self.rows.reference(rows[place]) for place in places]
            for positions, fetched in _fetched(references, SourceOptions(folder=self.rows.folder)):
                try:
                    if isinstance(fetched, RowError):
                        raise fetched
                    hashes[[places[position] for position in positions]] = dhash(
                        decode(fetched.data, fetched.name)
                    )
                except RowError as error:
                    for position in positions:
                        self._failed(why, places[position], first, PICTURE_FAILED, str(error))
        return [why, groups, scores, hashes]

    def _given(self, table: pa.Table) -> list[Any] | None:
        """Scores that are there already; None where a function gives them."""
        if self.scores is not None:
            return self.scores.of(table)
        return table.column(self.column).to_pylist() if self.column else None

    def _failed(self, why: np.ndarray, place: int, first: int, reason: int, words: str) -> None:
        why[place] = reason
        self.messages[first + place] = words[:300]
        if len(self.messages) > MOST_FAILURES:
            raise InputError(
                f"More than {MOST_FAILURES:,} rows of {self.rows.path} failed ({REASONS[reason]}), the last "
                f"one with '{words[:200]}': correct what fails and start again."
            )


def _fetched(
    references: Sequence[Reference], options: SourceOptions
) -> Iterator[tuple[list[int], Fetched | RowError]]:
    """Every distinct picture with the positions that name it, also those in rows of Parquet files."""
    others: list[int] = []
    files: dict[str, dict[int, list[int]]] = {}
    for position, reference in enumerate(references):
        cell = parse_cell(reference) if isinstance(reference, str) else None
        if cell is None:
            others.append(position)
        else:
            files.setdefault(cell.path, {}).setdefault(cell.row, []).append(position)
    for places, found in fetch_many([references[position] for position in others], options):
        yield [others[place] for place in places], found
    for path, rows in files.items():
        for row, value in read_cells(path, rows):
            try:
                yield rows[row], value if isinstance(value, RowError) else fetch(value, options)
            except RowError as error:
                yield rows[row], error


class _Scores:
    """A column of a data set that was made from another, by the rows of that other."""

    def __init__(self, path: str, column: str, judged: str):
        self.path, self.judged = path, judged
        rows = _Output(path)
        if column not in rows.schema.names:
            raise InputError(
                f"{path} has no column '{column}'{did_you_mean(column, rows.schema.names) or '.'}"
            )
        sums: dict[int, tuple[float, int, int]] = {}
        for piece in range(len(rows.pieces)):
            for chunk in rows.chunks(piece, ["status", "source", column]):
                for row in chunk.table.to_pylist():
                    origin = (row["source"] or {}).get("row_id")
                    if row["status"] != "ok":
                        continue
                    if origin is None:
                        raise InputError(f"{path} was not made from a data set: give one made from {judged}.")
                    try:
                        value = number(row[column])
                    except ValueError:
                        continue
                    total, count, _ = sums.get(origin, (0.0, 0, 0))
                    sums[origin] = total + value, count + 1, int((row["source"]["sha256"] or "0")[:15], 16)
        self.row_ids = np.array(sorted(sums), np.int64)
        self.means = np.array([sums[row][0] / sums[row][1] for row in self.row_ids.tolist()])
        self.marks = np.array([sums[row][2] for row in self.row_ids.tolist()], np.int64)

    def of(self, table: pa.Table) -> list[float | None]:
        wanted = table.column("row_id").to_numpy()
        places = np.searchsorted(self.row_ids, wanted).clip(max=max(len(self.row_ids) - 1, 0))
        found: list[float | None] = []
        for row_id, place, sha256 in zip(wanted, places, table.column("sha256").to_pylist(), strict=True):
            if not len(self.row_ids) or self.row_ids[place] != row_id:
                found.append(None)
                continue
            if sha256 and int(sha256[:15], 16) != self.marks[place]:
                raise InputError(
                    f"{self.path} is about another picture than row_id {row_id} of {self.judged}: "
                    f"give the data set that was made from this one."
                )
            found.append(float(self.means[place]))
        return found


def number(value: Any) -> float:
    """A score as a finite number: itself, or the first number in a text. Raises ValueError."""
    if isinstance(value, str):
        match = re.search(r"[-+]?\d+(\.\d+)?", value)
        value = float(match[0]) if match else None
    if value is None:
        raise ValueError("it has no score")
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"its score is {value}, which is no number to compare")
    return value


def group_hash(name: str) -> int:
    """The first 64 bits of sha256 of a group's name."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:8])


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# Deciding


class _Decided(NamedTuple):
    """Of every row why it goes, the number of the row it is near to (or -1), and its split."""

    why: np.ndarray
    near: np.ndarray
    sides: np.ndarray


def _decide(found: _Found, rules: Rules) -> _Decided:
    why = found.why.copy()
    if rules.best_of:
        alive = np.flatnonzero(why == KEPT)
        order = alive[np.lexsort((alive, -found.scores[alive], found.groups[alive]))]
        groups = found.groups[order]
        why[order[1:][groups[1:] == groups[:-1]]] = WORSE
    near = np.full(len(why), -1, np.int64)
    if rules.near_duplicates is not None:
        known = _Near(found.hashes, rules.near_duplicates)
        for row in np.flatnonzero(why == KEPT).tolist():
            near[row] = known.first(row)
            if near[row] >= 0:
                why[row] = NEAR
            else:
                known.add(row)
    sides = np.zeros(len(why), np.uint8)
    if rules.split:
        # In the order of the names, so that `train=..,test=..` and `test=..,train=..` are one split.
        ends = np.cumsum([share for _, share in sorted(rules.split.items())])[:-1]
        sides = np.searchsorted(ends, found.groups / 2.0**64, side="right").astype(np.uint8)
    return _Decided(why, near, sides)


class _Near:
    """Finds hashes that differ in few bits: of `distance` + 1 parts of two such hashes one is the same."""

    def __init__(self, hashes: np.ndarray, distance: int):
        self.hashes, self.distance = hashes, distance
        edges = np.linspace(0, HASH_BITS, distance + 2).round().astype(int).tolist()
        self.parts = [(low, (1 << (high - low)) - 1) for low, high in itertools.pairwise(edges)]
        self.rows: dict[tuple[int, int], array[int]] = {}

    def _keys(self, row: int) -> Iterator[tuple[int, int]]:
        value = int(self.hashes[row])
        for low, mask in self.parts:
            yield low, (value >> low) & mask

    def first(self, row: int) -> int:
        """The first row added whose hash is near to this row's; -1 if there is none."""
        best = -1
        for key in self._keys(row):
            if key in self.rows:
                rows = np.array(self.rows[key], np.int64)
                near = rows[np.bitwise_count(self.hashes[rows] ^ self.hashes[row]) <= self.distance]
                if len(near) and (best < 0 or near[0] < best):
                    best = int(near[0])
        return best

    def add(self, row: int) -> None:
        """Remembers a row; call it in the order of the rows."""
        for key in self._keys(row):
            self.rows.setdefault(key, array("q")).append(row)


# Writing


def _claim(source: str, dest: str, rules: Rules) -> None:
    """Makes sure that dest is new, of this very selection, or of one that did not end."""
    if storage.is_s3(source) == storage.is_s3(dest):
        ends = [path if storage.is_s3(path) else os.path.realpath(path) for path in (source, dest)]
        outer, inner = (path.rstrip("/") + "/" for path in ends)
        if inner.startswith(outer):
            raise InputError(f"{dest} lies in {source}, and would be taken for a part of it: choose another.")
    path = storage.join(dest, SELECTION_FILE)
    files = storage.list_files(dest)
    settings = {"source": source, "rules": asdict(rules)}
    if files and not storage.exists(path):
        raise InputError(f"{dest} is not empty, but holds such as {files[0].relative}: give a new folder.")
    if files:
        try:
            there = dict(json.loads(storage.read_bytes(path)))
        except (ValueError, TypeError, RecursionError):
            raise InputError(f"{path} is damaged: give a new folder.") from None
        # Of one that was cut short nothing is of use to anybody.
        if "result" in there and there.get("settings") != settings:
            raise InputError(
                f"{dest} holds another selection ({json.dumps(there.get('settings'))[:200]}): "
                f"give a new folder, or the same rules."
            )
    storage.write_atomic(path, json.dumps({"settings": settings}, indent=2).encode() + b"\n")


def _write(
    rows: _Output | _Manifest,
    dest: str,
    rules: Rules,
    found: _Found,
    decided: _Decided,
    messages: Mapping[int, str],
) -> Selection:
    names = sorted(rules.split) or [DEFAULT_FOLDER]
    written = set()
    with tempfile.TemporaryFile() as lines:
        for piece, file in enumerate(rows.pieces):
            sides: dict[str, list[pa.Table]] = {name: [] for name in names}
            first = int(found.starts[piece])
            for chunk in rows.chunks(piece):
                numbers = np.arange(first + chunk.first, first + chunk.first + chunk.table.num_rows)
                if len(numbers) and numbers[-1] >= found.starts[piece + 1]:
                    raise InputError(f"{rows.path} changed while it was read: start again.")
                kept = decided.why[numbers] == KEPT
                for side, name in enumerate(names):
                    mask = kept & (decided.sides[numbers] == side)
                    if mask.any():
                        sides[name].append(chunk.table.filter(pa.array(mask)))
                _tell(lines, rows, piece, chunk, numbers, decided, messages)
            for name, tables in sides.items():
                if tables:
                    path = storage.join(dest, name, file)
                    rows.write(path, pa.concat_tables(tables).combine_chunks())
                    written.add(f"{name}/{file}")
        lines.seek(0)
        with storage.write_stream(storage.join(dest, DROPPED_FILE)) as stream:
            while data := lines.read(storage.COPY_BYTES):
                stream.write(data)
    for stale in storage.list_files(dest):
        if stale.relative.endswith(".parquet") and stale.relative not in written:
            storage.delete(stale.path)
    reasons = Counter(decided.why.tolist())
    kept_rows = decided.why == KEPT
    counts = np.bincount(decided.sides[kept_rows], minlength=len(names)).tolist()
    selection = Selection(
        rows=len(decided.why),
        kept=reasons.pop(KEPT, 0),
        dropped={REASONS[reason]: count for reason, count in reasons.most_common()},
        splits=dict(zip(names, counts, strict=True)),
        failures=sum(count for reason, count in reasons.items() if reason in FAILURES),
    )
    storage.write_atomic(storage.join(dest, CARD_FILE), _card(rows, rules, selection).encode())
    document = {"settings": {"source": rows.path, "rules": asdict(rules)}, "result": asdict(selection)}
    storage.write_atomic(storage.join(dest, SELECTION_FILE), json.dumps(document, indent=2).encode() + b"\n")
    return selection


def _tell(
    lines: IO[bytes],
    rows: _Output | _Manifest,
    piece: int,
    chunk: Chunk,
    numbers: np.ndarray,
    decided: _Decided,
    messages: Mapping[int, str],
) -> None:
    """Writes a line for every row of a chunk that is not kept."""
    dropped = np.flatnonzero(decided.why[numbers] != KEPT).tolist()
    if not dropped:
        return
    ids = rows.names(chunk, piece, "id")
    for place in dropped:
        row = int(numbers[place])
        line: dict[str, Any] = {"id": ids[place], "row": row}
        if "sample" in chunk.table.column_names:
            line["sample"] = chunk.table.column("sample")[place].as_py()
        line["why"] = REASONS[decided.why[row]]
        if row in messages:
            line["message"] = messages[row]
        if decided.near[row] >= 0:
            line["near_row"] = int(decided.near[row])
        lines.write(json.dumps(line).encode() + b"\n")


def _card(rows: _Output | _Manifest, rules: Rules, selection: Selection) -> str:
    patterns = {
        ("train" if name == DEFAULT_FOLDER else name): f"{name}/*.parquet"
        for name, count in selection.splits.items()
        if count
    }
    name = rows.path.rstrip("/").rpartition("/")[2]
    lines = [
        front_matter(name, rows.task, [], selection.kept, patterns),
        "# A selection of rows",
        "",
        f"{selection.kept:,} of {selection.rows:,} rows of {code(rows.path)}, chosen with Wallaroo Batch.",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        'rows = load_dataset("PATH OF THIS FOLDER")',
        "```",
        "",
        "## Rules",
        "",
        *(
            f"- {code(key)}: {code(json.dumps(value, ensure_ascii=False))}"
            for key, value in asdict(rules).items()
            if value not in (None, {})
        ),
        "",
        "## Rows",
        "",
        *(f"- kept in {code(split)}: {count:,}" for split, count in selection.splits.items()),
        *(f"- dropped ({reason}): {count:,}" for reason, count in selection.dropped.items()),
        "",
        f"Every dropped row is in `{DROPPED_FILE}` with its reason.",
    ]
    return "\n".join(lines) + "\n"
