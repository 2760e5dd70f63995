"""Rows to train on, read from Parquet when they are needed, one row group at a time.

A step has R rows of a task. Each of its R places is a lane with an even share of the rows of an epoch. So a
worker reads only the row groups of its own places, and a step has the same rows for any number of workers.
Knows nothing of Ray.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wallaroo.model.errors import InputError
from wallaroo.model.training.data import Row
from wallaroo.workflows import storage

READERS = 4
"""Threads that read row groups ahead."""

MAX_UNFIT = 1000
"""Consecutive rows that may be too long or too small before a training fails."""


@dataclass(frozen=True)
class Groups:
    """The row groups of a task's files."""

    places: Sequence[tuple[str, int]]
    """Path and number of each row group."""
    sizes: Sequence[int]
    """Number of rows of each."""

    @classmethod
    def of(cls, paths: Sequence[str]) -> "Groups":
        """Reads the footers of files.

        Args:
            paths: Parquet files, in order.

        Returns:
            Their row groups.

        Raises:
            InputError: A file is no Parquet file.
        """
        with ThreadPoolExecutor(READERS) as pool:
            footers = list(pool.map(_group_sizes, paths))
        places = [
            (path, number) for path, sizes in zip(paths, footers, strict=True) for number in range(len(sizes))
        ]
        return cls(places, [size for sizes in footers for size in sizes])

    @property
    def rows(self) -> int:
        """Number of all rows."""
        return sum(self.sizes)


def _group_sizes(path: str) -> list[int]:
    filesystem, inner = storage.parquet_filesystem(path)
    try:
        with storage.explained(path):
            footer = pq.read_metadata(inner, filesystem=filesystem)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a Parquet file ({error}).") from None
    return [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]


class Streamed:
    """The rows of a stage in an order that depends on its seed alone, see `model.training.data.Source`.

    Each epoch has an order of row groups, and of rows within them. It deals them to the lanes in equal runs;
    the remainder, fewer rows than a step has, is left out of that epoch.

    Args:
        groups: Task -> its row groups.
        rows: Task -> rows of a step.
        seed: Decides the order.
        needed: `(table, task)` -> the columns that the task needs.
        fits: `(row, task)` -> whether a stage trains on the row; else the next row is taken.
        kept: Row groups in memory, at least those of this worker's lanes.

    Raises:
        InputError: A task has fewer rows than a step.
    """

    def __init__(
        self,
        groups: Mapping[str, Groups],
        rows: Mapping[str, int],
        seed: int,
        needed: Callable[[pa.Table, str], pa.Table],
        fits: Callable[[Row, str], bool] = lambda row, task: True,
        kept: int = 8,
    ):
        for task, count in rows.items():
            if groups[task].rows < count:
                raise InputError(
                    f"The data of {task} has {groups[task].rows} rows, but a step takes {count}; take fewer "
                    f"rows a step, or more data."
                )
        self.groups, self.rows, self.seed = groups, rows, seed
        self.needed, self.fits, self.kept = needed, fits, kept
        self._tables: OrderedDict[tuple[str, int], Future[pa.Table]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="rows")
        self._order = functools.lru_cache(maxsize=2 * len(rows))(self._ordered)

    def __call__(self, task: str, first: int, size: int, further: int = 0) -> Sequence[Row]:
        """Reads rows of consecutive places.

        Args:
            task: Of the rows.
            first: First place, counted over all steps.
            size: Number of places.
            further: Rows to go on from each place, for those that cannot be used.

        Returns:
            `size` rows.

        Raises:
            InputError: MAX_UNFIT consecutive rows do not fit the stage.
        """
        return [self._fitting(task, place, further) for place in range(first, first + size)]

    def _fitting(self, task: str, place: int, further: int) -> Row:
        for more in range(MAX_UNFIT):
            row = self._row(task, place, further + more)
            if self.fits(row, task):
                return row
        raise InputError(
            f"{MAX_UNFIT} consecutive rows of {task} are too long or too small for this stage; see its "
            f"lengths."
        )

    def _row(self, task: str, place: int, further: int) -> Row:
        step, lane = divmod(place, self.rows[task])
        groups = self.groups[task]
        run = groups.rows // self.rows[task]
        epoch, offset = divmod(step, run)
        order, ends = self._order(task, epoch)
        # Counted over the row groups in the order of the epoch.
        index = (lane * run + offset + further) % groups.rows
        turn = int(np.searchsorted(ends, index, side="right"))
        start = int(ends[turn - 1]) if turn else 0
        group = int(order[turn])
        within = np.random.default_rng((self.seed, epoch, group)).permutation(groups.sizes[group])
        table = self._table(task, group)
        last = lane * run + run - 1
        if turn + 1 < len(order) and int(ends[turn]) <= last:
            # The lane needs it next.
            self._load(task, int(order[turn + 1]))
        return table.slice(int(within[index - start]), 1).to_pylist()[0]

    def _ordered(self, task: str, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The row groups of an epoch and the number of rows up to the end of each, `(groups,)`."""
        place = sorted(self.rows).index(task)
        order = np.random.default_rng((self.seed, place, epoch)).permutation(len(self.groups[task].sizes))
        return order, np.cumsum(np.array(self.groups[task].sizes)[order])

    def _table(self, task: str, group: int) -> pa.Table:
        return self._load(task, group).result()

    def _load(self, task: str, group: int) -> "Future[pa.Table]":
        key = (task, group)
        # Batches may be made in a thread of their own, samples not.
        with self._lock:
            if key not in self._tables:
                self._tables[key] = self._pool.submit(self._read, task, group)
            self._tables.move_to_end(key)
            while len(self._tables) > self.kept:
                self._tables.popitem(last=False)
            return self._tables[key]

    def _read(self, task: str, group: int) -> pa.Table:
        path, number = self.groups[task].places[group]
        filesystem, inner = storage.parquet_filesystem(path)
        with storage.explained(path), pq.ParquetFile(inner, filesystem=filesystem) as file:
            return self.needed(file.read_row_group(number), task)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("rows that are streamed stay in their process")
