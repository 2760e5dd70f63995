"""The rules of a selection, and the functions of a user that they call."""

import hashlib
import importlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from wallaroo.workflows.settings import OptionError
from wallaroo.workflows.text import first_line

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_FOLDER = "data"
HASH_BITS = 64
MAX_DISTANCE = 16
REASONS = (
    "",
    "error row",
    "filter",
    "not the best",
    "near-duplicate",
    "unreadable row",
    "filter failed",
    "score failed",
    "image failed",
)
"""Reasons why a row is dropped; the first is for kept rows. A row's code is a place in this list."""
KEPT, ERROR, FILTER, WORSE, NEAR, UNREADABLE, FILTER_FAILED, SCORE_FAILED, PICTURE_FAILED = range(
    len(REASONS)
)
FAILURES = frozenset({UNREADABLE, FILTER_FAILED, SCORE_FAILED, PICTURE_FAILED})
Function = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Rules:
    """The rules of a selection. They apply in the order of the fields, each to the rows still kept.

    Error rows of a data set are never kept.
    """

    filter: str | None = None
    """`package.module:function`; rows for which it returns True are kept."""
    best_of: str | None = None
    """A column, or `package.module:function` that returns a number.

    Of each group the row with the greatest number is kept, of equal ones the first. Of a text the first
    number counts: `8/10` is 8.
    """
    scores: str | None = None
    """A data set made from this one that has the column `best_of`.

    Its rows name rows of this one in `source`. If several are about one row, their mean counts.
    """
    near_duplicates: int | None = None
    """Drop a row whose picture is like that of an earlier kept row.

    At most this many of the 64 bits of their `dhash` differ.
    """
    split: Mapping[str, float] = field(default_factory=dict)
    """Name -> share, from 0 to 1.

    The side of a group depends on the sha256 of its name alone, so no row changes sides when others are
    added or left out.
    """
    group: str = "id"
    """The column that says which rows belong together."""

    def check(self) -> None:
        """Checks each rule.

        Raises:
            OptionError: A rule has a bad value, or needs another that is missing.
        """
        if self.scores is not None and (self.best_of is None or ":" in self.best_of):
            raise OptionError("--scores needs a column of them: name it with --best-of COLUMN.")
        distance = self.near_duplicates
        if distance is not None and not 0 <= distance <= MAX_DISTANCE:
            raise OptionError(f"near_duplicates is {distance}, but must be from 0 to {MAX_DISTANCE} bits.")
        for name, share in self.split.items():
            if not re.fullmatch(r"\w+", name):
                raise OptionError(f"The split '{name}' must be named with letters, digits and _ only.")
            if not 0 < share <= 1:
                raise OptionError(f"The split {name} is {share:g}, but must be above 0 and at most 1.")
        if self.split and not math.isclose(sum(self.split.values()), 1, abs_tol=1e-9):
            raise OptionError(
                f"The shares of --split sum to {sum(self.split.values()):g}, but must sum to 1."
            )


@dataclass(frozen=True)
class Selection:
    """The result of a selection."""

    rows: int
    """Rows of the source."""
    kept: int
    """Rows that are kept."""
    dropped: dict[str, int]
    """Reason -> rows."""
    splits: dict[str, int]
    """Name of the split -> rows kept."""
    failures: int
    """Dropped rows whose picture or function failed; no rule decided on them."""
    examples: dict[str, str]
    """Reason of such a failure -> what was said of the first row that has it."""


def load_function(name: str) -> Function:
    """Imports the function that `package.module:function` names.

    Raises:
        OptionError: There is none.
    """
    module, mark, attribute = name.partition(":")
    if not (module and mark and attribute):
        raise OptionError(f"'{name}' is not the name of a function: write package.module:function.")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        words = first_line(error, 200)
        raise OptionError(
            f"{name} cannot be imported ({type(error).__name__}: {words}): "
            f"check the name, and that its module is in the current folder or installed."
        ) from error
    if not callable(found):
        raise OptionError(f"{name} is not a function: name one that takes a row.")
    return found


def dhash(image: "Image.Image") -> int:
    """The 64-bit difference hash of a picture.

    The picture in grey is scaled to 9x8 pixels (Lanczos); a bit is set where a pixel is brighter than
    the one to its left, row by row, the first bit the highest. A picture of one colour has 0.
    """
    from PIL import Image

    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS))
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes())


class NoScore(ValueError):
    """A value that is no score; the message says why."""


def number(value: Any) -> float:
    """A score as a finite number: the value itself, or the first number in a text.

    Raises:
        NoScore: There is no finite number.
    """
    if isinstance(value, str):
        match = re.search(r"[-+]?\d+(\.\d+)?", value)
        if match is None:
            raise NoScore("it has no score: the text holds no number")
        value = match[0]
    if value is None:
        raise NoScore("it has no score")
    value = float(value)
    if not math.isfinite(value):
        raise NoScore(f"its score is {value}, which is not a number")
    return value


def group_hash(name: str) -> int:
    """The first 64 bits of sha256 of a group's name."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:8])
