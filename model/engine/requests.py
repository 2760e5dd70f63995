"""Requests, results, and the rows of an engine."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wallaroo.model.config import VQ_FACTOR, Size
from wallaroo.model.prompts import Prompt
from wallaroo.model.sampling import Sampling

if TYPE_CHECKING:
    from wallaroo.model.engine.prefixes import PendingPrefix


@dataclass(frozen=True)
class Request:
    """One row to serve."""

    key: Hashable
    """Given back with the result."""
    prompt: Prompt
    """The conditional branch."""
    null: Prompt | None
    """The null branch; needed if `sampling.guided`."""
    size: Size | None
    """Of the picture in pixels; None for text."""
    seed: int
    """Fixes the row's draws."""
    sampling: Sampling
    """Guidance, temperature and filters."""
    semantic: np.ndarray | None = None
    """Source as the vision tower takes it, uint8 `(h, w, 3)` (see model/images.py)."""
    pixels: np.ndarray | None = None
    """Source as the VQ encoder takes it, uint8 `(H, W, 3)`."""
    max_new_tokens: int = 256
    """Most tokens of a text."""
    forced: np.ndarray | None = None
    """Tokens to take instead of the drawn ones, int32 `(n,)`, -1 where drawn; for scoring a given picture or
    text.
    """


@dataclass(frozen=True)
class Result:
    """What became of a row."""

    key: Hashable
    """Of the request."""
    tokens: np.ndarray
    """int32 `(n,)`: codebook indices in raster order, or text token ids without the stop token."""
    pixels: np.ndarray | None = None
    """uint8 `(H, W, 3)`; None for text."""
    finish_reason: str = ""
    """`length` or `stop`."""
    prompt_tokens: int = 0
    """Tokens of the conditional branch."""
    error: str = ""
    """Why the row could not be served; empty if it was."""
    logits: np.ndarray | None = None
    """float32 `(n, vocabulary)` before temperature; only from an engine that traces."""


@dataclass(eq=False)
class Row:
    """A request in the engine."""

    request: Request
    """What was asked."""
    prefixes: list["PendingPrefix"]
    """Its prompts, the conditional one first, until it has a slot."""
    steps: int
    """Forwards from its first draw to its last token."""
    guided: range
    """Steps whose draw is guided, counted from 0."""
    length: int
    """Most keys of one of its sequences."""
    line: int
    """Steps of a line of the picture, line end included; more than `steps` if there are no lines."""
    sequences: tuple[int, ...] = ()
    """Places of its branches in a group; the first is its slot."""
    step: int = 0
    """Steps done."""

    @property
    def slot(self) -> int:
        """Place of its first branch."""
        return self.sequences[0]

    def token_steps(self) -> np.ndarray:
        """The steps so far, `(n,)`, at which a token that counts was drawn: line ends are left out."""
        steps = np.arange(self.step or self.steps)
        return steps[steps % self.line != self.line - 1]


def steps_of(size: Size, line_break: bool) -> int:
    """Forwards that a picture takes from its first draw to its last token.

    Args:
        size: Of the picture, in pixels.
        line_break: Whether a token ends each row of the image but the last.

    Returns:
        A number of forwards.
    """
    height, width = size.grid
    return height * width + (height - 1 if line_break else 0)


def line_of(request: Request, steps: int, line_break: bool) -> int:
    """`Row.line` of a request.

    Args:
        request: The request.
        steps: Of its row.
        line_break: Whether a token ends each row of the image.

    Returns:
        Steps of a line, its end included; more than `steps` if there are no lines.
    """
    if request.size is None or not line_break:
        return steps + 1
    return request.size.width // VQ_FACTOR + 1
