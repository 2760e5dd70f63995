"""Copies between host and device that neither side waits for, and the streams that they run on.

On a CPU all of this is plain: no copy is made and nothing is waited for.
"""

import contextlib
from collections import deque
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

AHEAD = 4
"""Rounds that the host may be ahead of the device: enough to hide its own work, few enough to end soon."""


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Sends numbers to a device.

    On a CPU the tensor is the array's own memory where that can be written. On CUDA it is one asynchronous
    copy from pinned memory, which torch keeps until the copy is done.

    Args:
        array: Of any shape, such as `(n, m)`.
        device: Where to.

    Returns:
        A tensor of the same shape.
    """
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if device.type == "cpu":
        return tensor
    if torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """The same numbers, of any shape such as `(n, m)`, on the host, once the stream has come so far."""
    return tensor.to("cpu", non_blocking=True)


class Streams:
    """The streams of one engine, and the names that its phases have in a profile.

    `main` is for the decoder; `side`, of lower priority, for pictures. On a CPU both are None, and contexts
    and waits do nothing.

    Args:
        device: Of the engine.
    """

    def __init__(self, device: torch.device):
        self.main: torch.cuda.Stream | None = None
        self.side: torch.cuda.Stream | None = None
        self._rounds: deque[torch.cuda.Event] = deque()
        if device.type == "cuda":
            # A lower number is a higher priority; 0 is the lowest.
            self.main, self.side = (torch.cuda.Stream(device, priority=priority) for priority in (-1, 0))

    def begin(self) -> None:
        """Both streams wait for what the current one has been given: the model, and what was made of it."""
        for stream in (self.main, self.side):
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream(stream.device))

    def phase(self, name: str) -> AbstractContextManager:
        """What runs in this context stands under a name in a profile."""
        return contextlib.nullcontext() if self.main is None else torch.profiler.record_function(name)

    def on_main(self) -> AbstractContextManager:
        """What runs in this context runs on `main`."""
        return contextlib.nullcontext() if self.main is None else torch.cuda.stream(self.main)

    def beside(self) -> AbstractContextManager:
        """What runs in this context runs on `side`, after all that `main` has been given so far."""
        if self.side is None or self.main is None:
            return contextlib.nullcontext()
        self.side.wait_stream(self.main)
        return torch.cuda.stream(self.side)

    def main_event(self) -> "torch.cuda.Event | None":
        """Comes when `main` has done all it has been given; None on a CPU, where that is now."""
        return None if self.main is None else self.main.record_event()

    def side_event(self) -> "torch.cuda.Event | None":
        """The same of `side`."""
        return None if self.side is None else self.side.record_event()

    def end_round(self) -> None:
        """Waits while the device is AHEAD rounds behind."""
        if self.main is None:
            return
        self._rounds.append(self.main.record_event())
        if len(self._rounds) > AHEAD:
            earlier = self._rounds.popleft()
            if not earlier.query():
                earlier.synchronize()
