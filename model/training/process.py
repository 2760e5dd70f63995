"""One of the processes that share a training. Knows nothing of what they train."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Process:
    """One of the processes that share a training; by default the only one.

    Attributes:
        rank: Its number, from 0.
        world: How many there are.
        device: Where it computes.
        shard: `none` if each process holds the whole model, `full` if each holds a shard of it.
        grouped: Whether they have joined a process group of torch.distributed.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    shard: str = "none"
    grouped: bool = False

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each number's sum over all processes, which have the same names."""
        summed = torch.tensor(list(values.values()), dtype=torch.float64)
        if self.grouped:
            there = summed.to(self.device)
            torch.distributed.all_reduce(there)
            summed = there.cpu()
        return dict(zip(values, summed.tolist(), strict=True))

    def gathered(self, texts: list[str]) -> list[str]:
        """The texts of all processes, which ask together."""
        if not self.grouped:
            return texts
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, texts)
        return [text for some in found for text in some]


def process_of_group(device: str, shard: str = "none") -> Process:
    """This process as one of the process group that it has joined, with the device that it computes on."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return Process(rank, world, device, shard, grouped=True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of any shape `(n, ...)` in one piece; of a sharded one all processes must ask together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
