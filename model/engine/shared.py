"""What the groups of an engine use of it."""

from collections import Counter
from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from wallaroo.model.cuda.graphs import Recorder
from wallaroo.model.cuda.transfer import Streams
from wallaroo.model.decoder import Decoder
from wallaroo.model.engine.options import EngineOptions
from wallaroo.model.wallaroo import Wallaroo


class Shared(Protocol):
    """What an engine shares with its groups. `model.engine.engine.Engine` is one."""

    model: Wallaroo
    """The model."""
    task: str
    """Task of all rows."""
    options: EngineOptions
    """What shapes the work."""
    backend: str
    """Of attention, a key of BACKENDS."""
    counts: Counter[str]
    """What was done; groups add to it."""
    streams: Streams
    """Of the device."""
    new_recorder: Callable[[], Recorder] | None
    """Makes what records the steps of a group; None if steps are not recorded."""
    reserves: bool
    """Whether memory for the longest row is taken at once."""
    longest: tuple[int, int]
    """Keys and steps of the longest row."""
    decoder: Decoder
    """The decoder, laid out for the sequences of a group."""
    head: nn.Sequential
    """Layers of the image head before the last matrix, laid out in the same way; absent for `understand`."""
    frequencies: Tensor
    """Rotary frequencies, float32 `(head_dim / 2,)`."""
    table: Tensor
    """Decoder input of each token that can be drawn, `(vocabulary, H)`."""
    vocabulary: int
    """Tokens that can be drawn."""
    line_end: Tensor | None
    """Decoder input of a line end, `(H,)`; None for texts."""
    stops: list[int]
    """Ids of the tokens that end a text."""
    stop_ids: Tensor
    """The same on the device, int64 `(n,)`."""
