"""Prompts on their way through prefill, which rows of equal prompts share."""

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from wallaroo.model.kv_cache import Prefix
from wallaroo.model.prompts import Prompt


@dataclass(eq=False)
class PendingPrefix:
    """A prompt that waits for prefill, or is done (`prefix` is set)."""

    key: Hashable
    """Equal prompts with equal sources have equal keys."""
    prompt: Prompt
    """The prompt."""
    semantic: np.ndarray | None
    """Source for the vision tower, as in `Request`."""
    pixels: np.ndarray | None
    """Source for the image tokenizer, as in `Request`."""
    waiting: int = 0
    """Rows that need it."""
    done: int = 0
    """Tokens that have been through."""
    scratch: int = -1
    """Its row in the scratch cache; -1 before the first piece."""
    features: list[tuple[np.ndarray, Tensor]] | None = None
    """See `Prefill._features`."""
    prefix: Prefix | None = None
    """Set when the prompt is through the decoder."""
