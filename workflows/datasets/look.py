"""One look at every row of a selection: filters, scores and picture hashes."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from wallaroo.model.errors import InputError, RowError, did_you_mean
from wallaroo.workflows.datasets.progress import Phase
from wallaroo.workflows.datasets.rows import Chunk, ManifestRows, OutputRows
from wallaroo.workflows.datasets.rules import (
    ERROR,
    FILTER,
    FILTER_FAILED,
    KEPT,
    PICTURE_FAILED,
    REASONS,
    SCORE_FAILED,
    UNREADABLE,
    NoScore,
    Rules,
    dhash,
    group_hash,
    load_function,
    number,
)
from wallaroo.workflows.settings import OptionError
from wallaroo.workflows.sources.decode import decode
from wallaroo.workflows.sources.embedded import parse_cell, read_cells
from wallaroo.workflows.sources.fetch import Fetched, fetch, fetch_many
from wallaroo.workflows.sources.references import Reference, SourceOptions, parts_of

MAX_FAILURES = 10_000
HASHERS = min(os.cpu_count() or 1, 8)
"""Pictures that are decoded at once."""


class Found(NamedTuple):
    """What `decide` needs of each of n rows."""

    starts: np.ndarray
    """Number of the first row of each piece, and then n; [pieces + 1]."""
    why: np.ndarray
    """Code of the reason why a row is dropped, or KEPT; uint8 [n]."""
    groups: np.ndarray
    """`group_hash` of its group; uint64 [n]."""
    scores: np.ndarray
    """Its score; float64 [n]."""
    hashes: np.ndarray
    """`dhash` of its picture; uint64 [n]."""


class Look:
    """Goes over all rows once, and calls the functions.

    Args:
        rows: The rows.
        rules: Say what to look at.

    Attributes:
        messages: Row number -> what a function said.
    """

    def __init__(self, rows: OutputRows | ManifestRows, rules: Rules):
        self.rows, self.rules = rows, rules
        self.messages: dict[int, str] = {}
        self.filter = load_function(rules.filter) if rules.filter else None
        self.score, self.column, self.scores = None, None, None
        if rules.best_of and ":" in rules.best_of:
            self.score = load_function(rules.best_of)
        elif rules.scores:
            if not isinstance(rows, OutputRows):
                raise InputError(f"{rows.path} is not the output of a run, so --scores cannot name its rows.")
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

    def all(self, phase: Phase) -> Found:
        """Looks at all rows.

        Args:
            phase: Counts them.

        Returns:
            What `decide` needs of each row.
        """
        parts: list[list[np.ndarray]] = []
        starts = [0]
        for piece in range(len(self.rows.pieces)):
            count = 0
            for chunk in self.rows.chunks(piece, self.columns):
                failures = len(self.messages)
                parts.append(self._chunk(chunk, piece, starts[-1] + chunk.first))
                count += chunk.table.num_rows
                phase.count(chunk.table.num_rows, len(self.messages) - failures)
            starts.append(starts[-1] + count)
        kinds = (np.uint8, np.uint64, np.float64, np.uint64)
        joined = [
            np.concatenate([part[index] for part in parts]) if parts else np.zeros(0, kind)
            for index, kind in enumerate(kinds)
        ]
        return Found(np.array(starts), *joined)

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
        if isinstance(self.rows, OutputRows):
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
                self._failed(why, place, first, FILTER_FAILED, error_words(error))
        if self.rules.best_of:
            given = self._given(table)
            for place in np.flatnonzero(why == KEPT).tolist():
                try:
                    value = given[place] if given is not None else self.score(dict(rows[place]))  # type: ignore[misc]
                    if value is None and self.scores is not None:
                        raise NoScore(f"it has no score: {self.scores.path} has no number for it")
                    scores[place] = number(value)
                except NoScore as error:
                    self._failed(why, place, first, SCORE_FAILED, str(error))
                except Exception as error:
                    self._failed(why, place, first, SCORE_FAILED, error_words(error))
        if self.rules.near_duplicates is not None:
            places = np.flatnonzero(why == KEPT).tolist()
            references = [self.rows.reference(rows[place]) for place in places]
            for positions, hashed in _hashed(references, SourceOptions(folder=self.rows.folder(piece))):
                if not isinstance(hashed, RowError):
                    hashes[[places[position] for position in positions]] = hashed
                    continue
                for position in positions:
                    self._failed(why, places[position], first, PICTURE_FAILED, str(hashed))
        return [why, groups, scores, hashes]

    def _given(self, table: pa.Table) -> list[Any] | None:
        """Scores that a column has; None if a function computes them."""
        if self.scores is not None:
            return self.scores.of(table)
        return table.column(self.column).to_pylist() if self.column else None

    def _failed(self, why: np.ndarray, place: int, first: int, reason: int, words: str) -> None:
        why[place] = reason
        self.messages[first + place] = words[:300]
        if len(self.messages) > MAX_FAILURES:
            raise InputError(
                f"More than {MAX_FAILURES:,} rows of {self.rows.path} failed ({REASONS[reason]}), the last "
                f"one with '{words[:200]}': correct the cause and start again."
            )


def _hashed(
    references: Sequence[Reference], options: SourceOptions
) -> Iterator[tuple[list[int], int | RowError]]:
    """The hash of every distinct picture, with the positions that name it; HASHERS are decoded at once."""
    ahead: deque[tuple[list[int], Future[int | RowError]]] = deque()
    with ThreadPoolExecutor(HASHERS) as pool:
        for positions, fetched in fetch_all(references, options):
            ahead.append((positions, pool.submit(_hash, fetched)))
            if len(ahead) > 2 * HASHERS:
                done, future = ahead.popleft()
                yield done, future.result()
        for done, future in ahead:
            yield done, future.result()


def _hash(fetched: Fetched | RowError) -> int | RowError:
    if isinstance(fetched, RowError):
        return fetched
    try:
        return dhash(decode(fetched.data, fetched.name))
    except RowError as error:
        return error


def fetch_all(
    references: Sequence[Reference], options: SourceOptions
) -> Iterator[tuple[list[int], Fetched | RowError]]:
    """Fetches every distinct picture once, also pictures in rows of Parquet files.

    Args:
        references: The reference of each position.
        options: What may be fetched.

    Yields:
        The positions that name a picture, and the picture or the error of fetching it.
    """
    others: list[int] = []
    files: dict[str, dict[int, list[int]]] = {}
    for position, reference in enumerate(references):
        cell = parse_cell(reference) if isinstance(reference, str) else None
        if cell is None and parts_of(reference)[0] is not None:
            # Nothing to wait for, so no thread is needed.
            try:
                yield [position], fetch(reference, options)
            except RowError as error:
                yield [position], error
        elif cell is None:
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
    """A column of a data set made from another one, ordered by the rows of that one."""

    def __init__(self, path: str, column: str, judged: str):
        self.path, self.judged = path, judged
        rows = OutputRows(path)
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
                    f"{self.path} was made from another image than that of row_id {row_id} in "
                    f"{self.judged}: give a data set that was made from {self.judged}."
                )
            found.append(float(self.means[place]))
        return found


def error_words(error: Exception) -> str:
    """The class of an error, and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
