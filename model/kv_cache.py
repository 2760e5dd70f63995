"""Keys and values of the rows of a group, and of prompts that wait for a slot.

Knows nothing of which prompt is whose.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import KEY_BLOCK
from model.config import DecoderConfig


@dataclass(frozen=True)
class Prefix:
    """A prompt that has been through the decoder, ready to be copied into any slot.

    keys, values: `(layers, kv_heads, length, head_dim)`; hidden: `(H,)`, the last token's output after
    the final norm, from which the first generated token is drawn.
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor
    length: int
    next_position: int

    def copy_to(self, cache: "KVCache", row: int) -> None:
        """Writes keys and values to the start of a row, which must have room for them."""
        for layer in range(self.keys.shape[0]):
            cache.keys[layer][row, :, : self.length] = self.keys[layer]
            cache.values[layer][row, :, : self.length] = self.values[layer]


class KVCache:
    """Keys and values of `rows` sequences, a pair of tensors `(rows, kv_heads, capacity, head_dim)` a
    layer. The capacity is counted in tokens and grows in whole key blocks; growing keeps what is there.
    """

    def __init__(
        self, config: DecoderConfig, rows: int, capacity: int, device: torch.device, dtype: torch.dtype
    ):
        self.rows = rows
        self.capacity = 0
        shape = (rows, config.num_key_value_heads, 0, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.grow(capacity)

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` tokens a row; new room is zeros, since what is masked must be finite."""
        capacity = -(-capacity // KEY_BLOCK) * KEY_BLOCK
        if capacity <= self.capacity:
            return
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                if tensors is self.keys and old.device.type == "cpu":
                    new = old.new_zeros((*old.shape[:2], old.shape[3], capacity)).mT
                else:
                    new = old.new_zeros((*old.shape[:2], capacity, old.shape[3]))
                new[:, :, : self.capacity] = old
                tensors[layer] = new
        self.capacity = capacity

    def prefix(self, row: int, length: int, hidden: Tensor, next_position: int) -> Prefix:
        """A copy of the first `length` tokens of a row, with the last one's hidden state `(H,)`."""
        keys, values = (torch.stack([x[row, :, :length] for x in both]) for both in (self.keys, self.values))
        return Prefix(keys, values, hidden, length, next_position)
