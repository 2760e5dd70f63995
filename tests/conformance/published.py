"""Numbers of the published model: where they are, what must be there, and how ours are compared.

The folder is `goldens/` beside this file or what the environment variable GOLDENS names. Whatever is
missing there is a failure; nothing is skipped.
"""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(os.environ.get("GOLDENS") or Path(__file__).parent / "goldens").resolve()


class Missing(AssertionError):
    """The folder lacks something that its format has."""


@cache
def metadata(name: str) -> Any:
    """The contents of `name`.json."""
    file = FOLDER / f"{name}.json"
    if not file.is_file():
        raise Missing(f"{file} is missing")
    return json.loads(file.read_text(encoding="utf-8"))


class Family:
    """The arrays of one `.npz`; with `case`, of one case, under their names in it."""

    def __init__(self, name: str, case: str | None = None):
        self.name, self.case = name, case
        self._prefix = "" if case is None else f"{case}."
        self._arrays = _arrays(name)

    def __getitem__(self, array: str) -> np.ndarray:
        key = self._prefix + array
        if key not in self._arrays:
            raise Missing(f"family {self.name}: {FOLDER / self.name}.npz has no array '{key}'")
        return self._arrays[key]

    def where(self, array: str) -> "Where":
        """The address of an array, for `assert_close`."""
        return Where(self.name, self.case or "", array)


@cache
def _arrays(name: str) -> dict[str, np.ndarray]:
    file = FOLDER / f"{name}.npz"
    if not file.is_file():
        raise Missing(f"family {name}: {file} is missing")
    with np.load(file) as arrays:
        return {key: arrays[key] for key in arrays.files}


def cases(family: str) -> list[dict]:
    """What the metadata says of each case; the same cases must be among the arrays, at least one."""
    meta = metadata(f"{family}_meta")
    listed = meta["cases"] if isinstance(meta, dict) else meta
    names = [case["case"] for case in listed]
    stored = {key.split(".")[0] for key in _arrays(family)}
    if not names or set(names) != stored or len(names) != len(stored):
        raise Missing(
            f"family {family}: the metadata names the cases {sorted(names)}, "
            f"the arrays are of {sorted(stored)}"
        )
    return listed


def name_of(case: dict) -> str:
    """For parametrised tests."""
    return case["case"]


@dataclass(frozen=True)
class Where:
    """The address of an array."""

    family: str
    case: str
    array: str


@dataclass
class Seen:
    """What all comparisons of one kind came to: how many cases, largest difference, largest allowed."""

    cases: set[str]
    largest: float
    allowed: float


SEEN: dict[tuple[str, str, str], Seen] = {}
"""(family, array, what of ours was compared) -> outcome, for the table at the end of a run."""


def assert_close(
    ours: Any, where: Where, expected: np.ndarray, allowed: float, what: str = "", relative: float = 0.0
) -> None:
    """Every number of `ours` within `allowed` + `relative` times the expected one; of one shape.

    A failure names family, case, array, first step (index of the first axis) and largest difference.
    """
    ours = np.asarray(ours)
    place = f"family {where.family}, case {where.case or '-'}, {where.array}{f' ({what})' if what else ''}"
    assert ours.shape == expected.shape, f"{place}: shape {ours.shape} instead of {expected.shape}"
    difference = np.abs(ours.astype(np.float64) - expected.astype(np.float64))
    largest = float(difference.max(initial=0.0))
    seen = SEEN.setdefault((where.family, where.array, what), Seen(set(), 0.0, allowed))
    seen.cases.add(where.case)
    seen.largest = max(seen.largest, largest)
    # Written so that a NaN fails.
    wrong = ~(difference <= allowed + relative * np.abs(expected.astype(np.float64)))
    if wrong.any():
        first = int(np.argwhere(wrong)[0][0]) if wrong.ndim else 0
        raise AssertionError(
            f"{place}, first at step {first}: largest difference {largest:.3g}, allowed {allowed:.3g}; "
            f"{int(wrong.sum())} of {wrong.size} numbers are off"
        )


def assert_equal(ours: Any, where: Where, expected: np.ndarray, what: str = "") -> None:
    """`assert_close` without any tolerance."""
    assert_close(ours, where, expected, 0.0, what)


def assert_greedy(
    tokens: np.ndarray, logits: np.ndarray, where: Where, expected: np.ndarray, allowed: float, what: str = ""
) -> float:
    """Greedy tokens are as expected up to a step at which rounding may have made another logit the best.

    logits: `(steps, vocabulary)`, those that our tokens were taken from. allowed: how far one of them may
    be off, so that two may change places which are twice that apart. Returns the smallest gap between the
    best two along the sequence.
    """
    place = f"family {where.family}, case {where.case or '-'}, {where.array} ({what})"
    assert tokens.shape == expected.shape, f"{place}: {tokens.shape} tokens instead of {expected.shape}"
    best = np.sort(logits.astype(np.float64), axis=-1)
    gaps = best[:, -1] - best[:, -2]
    differ = np.flatnonzero(tokens != expected)
    seen = SEEN.setdefault((where.family, where.array, what), Seen(set(), 0.0, 0.0))
    seen.cases.add(where.case)
    if len(differ):
        seen.largest = max(seen.largest, 1.0)
        step = int(differ[0])
        assert gaps[step] <= 2 * allowed, (
            f"{place}: token {tokens[step]} instead of {expected[step]} at step {step}, "
            f"where the best two logits differ by {gaps[step]:.3g}"
        )
    return float(gaps.min())


def table() -> list[str]:
    """Rows of a Markdown table of all comparisons so far."""
    rows = ["| family | array | ours | cases | largest difference | allowed |", "|---|---|---|---|---|---|"]
    for (family, array, what), seen in sorted(SEEN.items()):
        rows.append(
            f"| {family} | {array} | {what} | {len(seen.cases)} | {seen.largest:.2g} | {seen.allowed:.2g} |"
        )
    return rows
