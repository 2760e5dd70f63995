"""Speed, memory and data wait of a training. Knows nothing of losses."""

import contextlib
import resource
import time
from collections.abc import Iterator

import torch

from wallaroo.model.training.process import Process

MEASURED = ("tokens_per_second", "data_wait", "memory_peak_gb", "flops_per_second", "mfu")
"""Names in the log of speed and memory, which differ between runs that learn the same."""

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "B200": 2250e12}
"""Part of a GPU's name -> dense bfloat16 operations a second, from the vendor's data sheets."""


class Meter:
    """Measures a training between two readings.

    Args:
        process: One of those that share the training.
        flops_per_token: Operations of a forward and backward pass per token, 0 if unknown.
    """

    def __init__(self, process: Process, flops_per_token: float = 0.0):
        self.process, self.flops_per_token = process, flops_per_token
        self.skipped = 0
        self._since, self._tokens, self._waited = time.monotonic(), 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in the block counts as a wait for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def count(self, tokens: float) -> None:
        """Adds the tokens of a step, those of all processes."""
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Reads and resets the meter.

        Returns:
            Numbers of MEASURED, and `skipped_steps` since the start.
        """
        seconds = time.monotonic() - self._since
        rate = self._tokens / seconds
        numbers = {
            "tokens_per_second": rate,
            "data_wait": self._waited / seconds,
            "memory_peak_gb": _peak_bytes(self.process.device) / 1e9,
            "skipped_steps": float(self.skipped),
        }
        if self.flops_per_token:
            numbers["flops_per_second"] = rate * self.flops_per_token
            peak = peak_flops(self.process.device)
            if peak:
                numbers["mfu"] = numbers["flops_per_second"] / (peak * self.process.world)
        self._since, self._tokens, self._waited = time.monotonic(), 0.0, 0.0
        return numbers


def peak_flops(device: str) -> float:
    """The peak rate of a device.

    Args:
        device: `cpu` or `cuda:N`.

    Returns:
        Dense bfloat16 operations a second, 0 if it is not in PEAK_FLOPS.
    """
    if not device.startswith("cuda"):
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), 0.0)


def _peak_bytes(device: str) -> int:
    """Most memory that this process has had: of a GPU, or of the machine."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
