"""One of the processes that share a training. Knows nothing of what they train."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Process:
    """One of the processes that share a training; by default the only one."""

    rank: int = 0
    """Number of the process, from 0."""
    world: int = 1
    """Number of processes."""
    device: str = "cpu"
    """On which it computes, `cpu` or `cuda:N`."""
    shard: str = "none"
    """`none` if each process holds the whole model, `full` if each holds a shard of it."""
    grouped: bool = False
    """Whether they have joined a process group of torch.distributed."""

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums numbers over all processes, which must call this together.

        Args:
            values: Name -> number; the same names in all processes.

        Returns:
            Name -> sum.
        """
        summed = torch.tensor(list(values.values()), dtype=torch.float64)
        if self.grouped:
            on_device = summed.to(self.device)
            torch.distributed.all_reduce(on_device)
            summed = on_device.cpu()
        return dict(zip(values, summed.tolist(), strict=True))

    def gathered(self, texts: list[str]) -> list[str]:
        """Gathers texts of all processes, which must call this together.

        Args:
            texts: Of this process.

        Returns:
            Those of all processes, by rank.
        """
        if not self.grouped:
            return texts
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, texts)
        return [text for some in found for text in some]


def process_of_group(device: str, shard: str = "none") -> Process:
    """Describes this process, which has joined a process group.

    Args:
        device: On which it computes; a GPU becomes the current one.
        shard: `none` or `full`.

    Returns:
        The process.
    """
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return Process(rank, world, device, shard, grouped=True)


def whole(tensor: Tensor) -> Tensor:
    """Gathers a tensor if it is sharded; then all processes must call this together.

    Args:
        tensor: `(n, ...)`, sharded or not.

    Returns:
        The whole tensor, `(n, ...)`.
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
