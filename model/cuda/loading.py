"""Weights from mapped files to a GPU: several readers, each with a little pinned memory of its own.

No weight is twice on the host: what a reader takes from a file goes through its pinned memory in chunks.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

READERS = 4
"""Threads that read at once: one alone copies from the page cache slower than a GPU takes it."""
CHUNK_BYTES = 32 << 20
"""Pinned memory of a reader is two of these: one is filled while the other is on its way."""
TASK_BYTES = 512 << 20
"""Of tensors that a reader takes from a file before it takes the next ones."""

Opened = Callable[[Path], AbstractContextManager[Any]]
"""Opens a safetensors file, for `get_tensor`."""


def fill(
    places: Mapping[str, Tensor],
    files: Mapping[Path, Sequence[str]],
    opened: Opened,
    chunk_bytes: int = CHUNK_BYTES,
    task_bytes: int = TASK_BYTES,
) -> None:
    """Puts the tensors of files into their places, all of which are on one device.

    Args:
        places: Contiguous tensors by name.
        files: Names of tensors by file; those without a place are left out.
        opened: Opens a file.
        chunk_bytes: Bytes that are copied at once, a multiple of 8.
        task_bytes: Bytes of tensors that a reader takes at once.
    """
    tasks = [
        (file, some)
        for file, names in files.items()
        for some in _parted([name for name in names if name in places], places, task_bytes)
    ]

    device = next(iter(places.values())).device
    # Taking from a deque is atomic.
    waiting = deque(tasks)

    def read(_: int) -> None:
        reader = _Reader(device, chunk_bytes)
        while waiting:
            try:
                file, names = waiting.popleft()
            except IndexError:  # another reader was faster
                break
            with opened(file) as shard:
                for name in names:
                    reader.copy(shard.get_tensor(name), places[name])
        reader.finish()

    with ThreadPoolExecutor(READERS, "weights") as pool:
        # All are asked for, so that the first error is raised here.
        for _ in pool.map(read, range(READERS)):
            pass
    if device.type == "cuda":
        # What the readers' streams still hold counts as free when slots are chosen.
        torch.cuda.empty_cache()


def _parted(names: Sequence[str], places: Mapping[str, Tensor], most: int) -> Iterator[list[str]]:
    """Names in runs of up to `most` bytes, or of one tensor."""
    some: list[str] = []
    size = 0
    for name in names:
        if some and size + places[name].nbytes > most:
            yield some
            some, size = [], 0
        some.append(name)
        size += places[name].nbytes
    if some:
        yield some


class _Reader:
    """Copies tensors of the host to a device through two pinned chunks in turn."""

    def __init__(self, device: torch.device, chunk_bytes: int):
        on_cuda = device.type == "cuda"
        self.device, self.chunk_bytes = device, chunk_bytes
        self.chunks = [torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=on_cuda) for _ in range(2)]
        self.stream = torch.cuda.Stream(device) if on_cuda else None
        self.events: list[torch.cuda.Event | None] = [None, None]
        self.turn = 0

    @torch.no_grad()
    def copy(self, source: Tensor, place: Tensor) -> None:
        """Begins to put a tensor into its place, in the place's type."""
        flat, into = source.reshape(-1), place.view(-1)
        count = self.chunk_bytes // source.itemsize
        for start in range(0, len(flat), count):
            part = flat[start : start + count]
            event = self.events[self.turn]
            if event is not None:
                event.synchronize()
            staged = self.chunks[self.turn].view(source.dtype)[: len(part)]
            staged.copy_(part)
            with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
                if staged.dtype != into.dtype:
                    # Made on the device, where it is quicker.
                    staged = staged.to(self.device, non_blocking=True)
                into[start : start + count].copy_(staged, non_blocking=True)
                if self.stream is not None:
                    self.events[self.turn] = self.stream.record_event()
            self.turn = 1 - self.turn

    def finish(self) -> None:
        """Waits until all is in its place."""
        if self.stream is not None:
            self.stream.synchronize()
