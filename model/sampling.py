"""From logits to one token a row: temperature, top-k, top-p and a draw fixed by seed and position.

Knows nothing of where logits come from. Processes that only plan, load or write rows import this module too,
so torch, which takes seconds to import, is imported inside the functions that need it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wallaroo.model.errors import RowError

if TYPE_CHECKING:
    from torch import Tensor

MIN_TEMPERATURE = 1e-5
ALWAYS = (0.0, 1.0)
"""Shares of a picture's steps between which it is guided: here all steps."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of one row."""

    cfg: float = 3.0
    """Scale of classifier-free guidance; at most 1 means that no null branch is run."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 1000
    """Tokens kept before top-p; ties with the last one stay. 0 keeps all, 1 is greedy."""
    top_p: float = 1.0
    """Probability mass kept; 1 keeps all."""

    @property
    def guided(self) -> bool:
        """Whether a null branch runs beside the conditional one."""
        return self.cfg > 1

    def validate(self) -> "Sampling":
        """Checks the values.

        Returns:
            Itself.

        Raises:
            RowError: A value breaks its rule (kind `sampling`); the first one is named.
        """
        for name, value, holds, rule in (
            ("cfg", self.cfg, math.isfinite(self.cfg) and self.cfg >= 0, "a finite number of at least 0"),
            (
                "temperature",
                self.temperature,
                math.isfinite(self.temperature) and self.temperature >= 0,
                "a finite number of at least 0",
            ),
            (
                "top_k",
                self.top_k,
                self.top_k == int(self.top_k) and self.top_k >= 0 if math.isfinite(self.top_k) else False,
                "a whole number of at least 0 (0 keeps all tokens)",
            ),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (1 keeps all tokens)"),
        ):
            if not holds:
                raise RowError("sampling", f"{name} is {value}, but must be {rule}.")
        return self


def draws(seed: int, count: int) -> np.ndarray:
    """The uniform numbers of one row.

    Philox is counter-based (Salmon et al. 2011), so a row's numbers depend on its seed alone, and a longer
    row begins with the numbers of a shorter one.

    Args:
        seed: Of the row.
        count: How many.

    Returns:
        float64 `(count,)` in [0, 1); number i belongs to position i.
    """
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


@dataclass(frozen=True)
class Filters:
    """Bounds on the filters of a batch that the host knows, so that unused filters cost nothing.

    A row's token is the same under any Filters that hold for it: they choose how the kept tokens are found,
    never which.
    """

    most: int
    """Bound on the top_k of all rows that have one; 0 if none has."""
    nucleus: bool
    """Whether any row has a top_p below 1."""

    @classmethod
    def of(cls, rows: Iterable[Sampling], vocabulary: int) -> "Filters":
        """The narrowest filters that hold for some rows.

        Args:
            rows: How the tokens of each row are drawn.
            vocabulary: Number of tokens.

        Returns:
            The filters; `most` is a power of two or `vocabulary`, so that few shapes occur.
        """
        rows = list(rows)
        ks = [row.top_k for row in rows if 0 < row.top_k < vocabulary]
        most = min(1 << (max(ks) - 1).bit_length(), vocabulary) if ks else 0
        return cls(most, any(row.top_p < 1 for row in rows))


def kept_logits(
    logits: "Tensor", temperature: "Tensor", top_k: "Tensor", top_p: "Tensor", filters: Filters | None = None
) -> "Tensor":
    """Logits after temperature, with all but the kept ones at -inf.

    Args:
        logits: float32 `(rows, vocabulary)`.
        temperature: `(rows,)`.
        top_k: `(rows,)`. Every tie with the k-th largest is kept.
        top_p: `(rows,)`. The shortest prefix is kept, in descending order of what is left, whose
            probabilities sum to more than p.
        filters: What the host knows of the rows.

    Returns:
        float32 `(rows, vocabulary)`.
    """
    vocabulary = logits.shape[-1]
    filters = filters or Filters(vocabulary, True)
    logits = logits / temperature.clamp(min=MIN_TEMPERATURE).unsqueeze(-1)
    if filters.nucleus:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    elif filters.most:
        ordered = logits.topk(filters.most).values
    else:
        return logits
    limited = (top_k > 0) & (top_k < vocabulary)
    last = top_k.clamp(1, ordered.shape[-1]).unsqueeze(-1) - 1
    threshold = ordered.gather(-1, last).masked_fill(~limited.unsqueeze(-1), -math.inf)
    logits = logits.masked_fill(logits < threshold, -math.inf)
    if not filters.nucleus:
        return logits
    before = ordered.masked_fill(ordered < threshold, -math.inf).softmax(-1).cumsum(-1).roll(1, -1)
    before[:, 0] = 0
    # Rounding may carry the sum past 1, so 1 must switch the filter off and not only be compared.
    dropped = (before > top_p.unsqueeze(-1)) & (top_p < 1).unsqueeze(-1)
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)


def sample(
    logits: "Tensor",
    temperature: "Tensor",
    top_k: "Tensor",
    top_p: "Tensor",
    uniform: "Tensor",
    filters: Filters | None = None,
) -> "Tensor":
    """Draws one token a row, by inverting the distribution.

    Greedy rows (`top_k` 1) take the largest logit, the lowest index on a tie. Nothing is read back to the
    host, and a row's token does not depend on the other rows.

    Args:
        logits: float32 `(rows, vocabulary)`.
        temperature: `(rows,)`.
        top_k: `(rows,)`.
        top_p: `(rows,)`.
        uniform: float64 `(rows,)` in [0, 1).
        filters: What the host knows of the rows.

    Returns:
        int64 `(rows,)`.
    """
    import torch

    kept = kept_logits(logits, temperature, top_k, top_p, filters)
    weight = (kept - kept.amax(-1, keepdim=True)).to(torch.float64).exp()
    cumulative = weight.cumsum(-1)
    total = cumulative[:, -1]
    # A product that rounds up to the total would point past the last kept token.
    target = torch.minimum(uniform * total, torch.nextafter(total, -total))
    drawn = torch.searchsorted(cumulative, target.unsqueeze(-1), right=True).squeeze(-1)
    return torch.where(top_k == 1, logits.argmax(-1), drawn)
