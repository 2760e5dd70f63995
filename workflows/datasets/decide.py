"""Which rows stay: the best of each id, no near-duplicates."""

import itertools
from array import array
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from wallaroo.workflows.datasets.look import Found
from wallaroo.workflows.datasets.rules import HASH_BITS, KEPT, NEAR, WORSE, Rules


class Decided(NamedTuple):
    """Of every row why it goes, the number of the row it is near to (or -1), and its split."""

    why: np.ndarray
    near: np.ndarray
    sides: np.ndarray


def decide(found: Found, rules: Rules) -> Decided:
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
    return Decided(why, near, sides)


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
