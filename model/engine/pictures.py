"""From the tokens of finished pictures to their pixels, in slices of a constant number of pictures.

On CUDA pictures are decoded beside the decode steps that follow: nothing waits for them until no other work
is left.
"""

from collections import Counter, deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wallaroo.model.config import Size
from wallaroo.model.cuda.transfer import Streams, to_host
from wallaroo.model.engine.options import EngineOptions
from wallaroo.model.engine.requests import Result, Row
from wallaroo.model.vq import precision, to_uint8
from wallaroo.model.wallaroo import Wallaroo


@dataclass(eq=False)
class _Picture:
    """A finished row.

    tokens: in the order of its steps, int64 on the device. logits: if traced. round: its last one.
    """

    row: Row
    tokens: Tensor
    logits: np.ndarray | None
    round: int


@dataclass(eq=False)
class _Slice:
    """Pictures that go through the image tokenizer together.

    tokens int32 `(vq_slice, h, w)` and pixels uint8 `(vq_slice, H, W, 3)` are on the host once `event` has
    come; without an event they are there already. The pictures keep the tokens that the device still reads.
    """

    pictures: list[_Picture]
    tokens: Tensor
    pixels: Tensor | None
    event: torch.cuda.Event | None

    def is_done(self, wait: bool) -> bool:
        if self.event is None:
            return True
        if wait:
            self.event.synchronize()
        return bool(self.event.query())


class Pictures:
    """Finished pictures by size, the slices on their way, and results.

    Args:
        model: Has the image tokenizer.
        options: Of the engine.
        backend: Of the engine's attention; `triton` also uses kernels of the image tokenizer.
        streams: Of the engine.
        counts: Of the engine, written.
    """

    PATIENCE = 1024
    """Rounds that a picture waits for others of its size, about as many as a large one is drawn in. Then its
    slice is filled up, so that a rare size does not hold up the rows that came with it."""

    def __init__(
        self,
        model: Wallaroo,
        options: EngineOptions,
        backend: str,
        streams: Streams,
        counts: Counter[str],
    ):
        self.model, self.options, self.streams, self.counts = model, options, streams, counts
        self.vq = None
        if options.decode_vq and model.vq is not None:
            on_cuda = model.device.type == "cuda"
            self.vq = model.vq.for_cuda(kernels=backend == "triton") if on_cuda else model.vq
        self.ready: dict[Size, list[_Picture]] = {}
        self.slices: deque[_Slice] = deque()
        self.rounds = 0

    def add(self, row: Row, tokens: Tensor, logits: np.ndarray | None) -> None:
        """Adds a picture to decode.

        Args:
            row: Its row.
            tokens: int64 `(steps or more,)`, one per step, on the device.
            logits: For the result, or None.
        """
        size = row.request.size
        assert size is not None
        self.ready.setdefault(size, []).append(_Picture(row, tokens, logits, self.rounds))

    def step(self, flush: bool) -> list[Result]:
        """Starts to decode full slices, or all pictures. A slice that is not full repeats its first picture.

        Args:
            flush: Whether to decode slices that are not full.

        Returns:
            The pictures that are done.
        """
        width = self.options.vq_slice
        self.rounds += 1
        for size, ready in self.ready.items():
            while ready and (len(ready) >= width or flush or self.rounds - ready[0].round > self.PATIENCE):
                self.slices.append(self._begin(size, ready[:width]))
                del ready[:width]
        results = []
        while self.slices and self.slices[0].is_done(wait=flush):
            results += self._end(self.slices.popleft())
        return results

    @torch.inference_mode()
    def _begin(self, size: Size, pictures: list[_Picture]) -> _Slice:
        height, width = size.grid
        line = width + self.model.config.line_break
        # The last line has no line end; whatever stands in its place is cut off with the others.
        grids = [picture.tokens[: height * line].view(height, line)[:, :width] for picture in pictures]
        grids += grids[:1] * (self.options.vq_slice - len(grids))
        with self.streams.phase("tokenizer"), self.streams.beside():
            tokens = torch.stack(grids)
            pixels = None
            if self.vq is not None:
                self.counts["vq_slices"] += 1
                with precision(self.options.vq_precision, tokens.device):
                    pixels = to_host(to_uint8(self.vq.decode(tokens)))
            return _Slice(pictures, to_host(tokens.to(torch.int32)), pixels, self.streams.side_event())

    def _end(self, made: _Slice) -> list[Result]:
        self.counts["pictures"] += len(made.pictures)
        return [
            Result(
                picture.row.request.key,
                made.tokens[index].flatten().numpy().copy(),
                None if made.pixels is None else made.pixels[index].numpy().copy(),
                "length",
                len(picture.row.request.prompt.ids),
                logits=picture.logits,
            )
            for index, picture in enumerate(made.pictures)
        ]
