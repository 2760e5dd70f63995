"""Changes that the host makes in tensors of the device, gathered and sent in one copy."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wallaroo.model.cuda.transfer import to_device


class Updates:
    """Changes that wait for `send`; a later one replaces an earlier one at the same place.

    All numbers travel as float64, which holds whole ones up to 2^53. On a CPU there is nothing to copy, and
    each change is made alone: so operators have the same shapes however many rows come and go.

    Args:
        device: Of the tensors.
        together: Whether changes are sent in one copy; by default on all devices but CPUs.
    """

    def __init__(self, device: torch.device, together: bool | None = None):
        self._device = device
        self._together = device.type != "cpu" if together is None else together
        self._waiting: dict[int, tuple[Tensor, int, dict[int, np.ndarray]]] = {}

    def put(self, tensor: Tensor, dim: int, index: int, numbers: Sequence[float] | np.ndarray) -> None:
        """Notes that `tensor.select(dim, index)` becomes `numbers`.

        Args:
            tensor: Of two dimensions.
            dim: 0 or 1.
            index: Place along `dim`.
            numbers: One for each place of the other dimension.
        """
        _, _, waiting = self._waiting.setdefault(id(tensor), (tensor, dim, {}))
        waiting[index] = np.asarray(numbers, np.float64)

    def send(self) -> None:
        """Makes all changes, in the order of the device's stream."""
        if not self._waiting:
            return
        changes = list(self._waiting.values())
        self._waiting.clear()
        if not self._together:
            for tensor, dim, waiting in changes:
                for place, row in waiting.items():
                    tensor.select(dim, place).copy_(torch.from_numpy(row))
            return
        parts: list[np.ndarray] = []
        for _, dim, waiting in changes:
            # Rows for dim 0, columns for dim 1.
            stacked = np.stack(list(waiting.values()), axis=dim)
            parts += [np.fromiter(waiting, np.float64, len(waiting)), stacked.reshape(-1)]
        sent = to_device(np.concatenate(parts), self._device).split([len(part) for part in parts])
        for (tensor, dim, waiting), index, numbers in zip(changes, sent[::2], sent[1::2], strict=True):
            shape = list(tensor.shape)
            shape[dim] = len(waiting)
            tensor.index_copy_(dim, index.to(torch.int64), numbers.view(shape).to(tensor.dtype))
