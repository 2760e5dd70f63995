"""Decides which rows are kept: the best of each group, and no near-duplicates."""

from array import array
from typing import NamedTuple

import numpy as np

from wallaroo.workflows.datasets.look import Found
from wallaroo.workflows.datasets.progress import Phase, Report, silent
from wallaroo.workflows.datasets.rules import HASH_BITS, KEPT, NEAR, WORSE, Rules

MAX_BANDS = 9
SCANNED_AT_ONCE = 8192


class Decided(NamedTuple):
    """The decision for each of n rows."""

    why: np.ndarray
    """Code of the reason in REASONS, or KEPT; uint8 [n]."""
    near: np.ndarray
    """Number of the row that a near-duplicate resembles, or -1; [n]."""
    sides: np.ndarray
    """Place of its split among the sorted names; uint8 [n]."""


def decide(found: Found, rules: Rules, on_progress: Report = silent) -> Decided:
    """What becomes of every row.

    Args:
        found: All rows, after a look at them.
        rules: Of the selection.
        on_progress: Called about twice a second while pictures are compared.

    Returns:
        The decision for each row.
    """
    why = found.why.copy()
    if rules.best_of:
        alive = np.flatnonzero(why == KEPT)
        order = alive[np.lexsort((alive, -found.scores[alive], found.groups[alive]))]
        groups = found.groups[order]
        why[order[1:][groups[1:] == groups[:-1]]] = WORSE
    near = np.full(len(why), -1, np.int64)
    if rules.near_duplicates is not None:
        known = _Near(found.hashes, rules.near_duplicates)
        compared = np.flatnonzero(why == KEPT).tolist()
        phase = Phase(on_progress, "comparing", len(compared))
        for row in compared:
            phase.count(1)
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
    return Decided(why, near, sides)


class _Near:
    """Finds, among the hashes of rows that were added, the first that differs in at most `distance` bits.

    The bits are dealt out to `distance` + 1 bands in turn, since bits beside each other are alike in
    pictures. Of two near hashes one band is the same in both, so a hash is compared only with those
    that share a band. Of N random hashes these are (distance + 1) * N / 2 ** (64 / (distance + 1)): N / 1,400
    for 4 bits, N / 14 for 8. With more than MAX_BANDS bands it is faster to compare with all in turn, at
    about a nanosecond each. So the time grows with the square of the rows that stay: 100,000 of them take
    2 s at 4 bits and 5 s at 10, a million at most 100 times as long.
    """

    def __init__(self, hashes: np.ndarray, distance: int):
        self.hashes, self.distance = hashes, distance
        bands = distance + 1
        self.indexed = bands <= MAX_BANDS
        self.rows = _Grown(np.int64)
        self.kept = _Grown(np.uint64)
        self.buckets: list[dict[int, array[int]]] = [{} for _ in range(bands)] if self.indexed else []
        self.masks = [sum(1 << bit for bit in range(band, HASH_BITS, bands)) for band in range(bands)]

    def first(self, row: int) -> int:
        """The first row added whose hash is near to this row's; -1 if there is none."""
        wanted = self.hashes[row]
        if not self.indexed:
            for start in range(0, len(self.kept), SCANNED_AT_ONCE):
                part = self.kept.values[start : min(start + SCANNED_AT_ONCE, len(self.kept))]
                near = np.bitwise_count(part ^ wanted) <= self.distance
                place = int(near.argmax())
                if near[place]:
                    return int(self.rows.values[start + place])
            return -1
        best, value = len(self.kept), int(wanted)
        for mask, buckets in zip(self.masks, self.buckets, strict=True):
            bucket = buckets.get(value & mask)
            if bucket is not None and bucket[0] < best:
                places = np.array(bucket, np.int64)
                near = np.bitwise_count(self.kept.values[places] ^ wanted) <= self.distance
                place = int(near.argmax())
                if near[place]:
                    best = min(best, int(places[place]))
        return int(self.rows.values[best]) if best < len(self.kept) else -1

    def add(self, row: int) -> None:
        """Remembers a row; call it in the order of the rows."""
        value = int(self.hashes[row])
        for mask, buckets in zip(self.masks, self.buckets, strict=False):
            buckets.setdefault(value & mask, array("q")).append(len(self.kept))
        self.rows.append(row)
        self.kept.append(self.hashes[row])


class _Grown:
    """Numbers in an array that grows. values: those so far, and room for more."""

    def __init__(self, kind: type):
        self.values: np.ndarray = np.zeros(1024, kind)
        self._count = 0

    def append(self, value: int) -> None:
        if self._count == len(self.values):
            self.values = np.concatenate([self.values, np.zeros_like(self.values)])
        self.values[self._count] = value
        self._count += 1

    def __len__(self) -> int:
        return self._count
