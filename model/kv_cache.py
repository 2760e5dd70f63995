"""Keys and values of the rows of a group, and of prompts that wait for a slot.

Knows nothing of which prompt is whose.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from wallaroo.model.attention import KEY_BLOCK
from wallaroo.model.config import DecoderConfig


@dataclass(frozen=True)
class Prefix:
    """A prompt after prefill, ready to be copied into any slot."""

    keys: Tensor
    """Of whole blocks, `(layers, kv_heads, blocks, KEY_BLOCK, head_dim)`."""
    values: Tensor
    """Of whole blocks, of the same shape."""
    hidden: Tensor
    """`(H,)`: the last token's output after the final norm; the first generated token is drawn from it."""
    length: int
    """Tokens of the prompt."""
    next_position: int
    """Position of the first generated token."""

    def copy_to(self, cache: "KVCache", row: int) -> None:
        """Writes keys and values to the start of a row.

        Args:
            cache: The cache.
            row: Number of the row, which must have room for them.
        """
        blocks = self.keys.shape[2]
        if cache.whole is not None:
            cache.whole[0, :, row, :, :blocks] = self.keys
            cache.whole[1, :, row, :, :blocks] = self.values
            return
        for layer in range(self.keys.shape[0]):
            cache.keys[layer][row, :, :blocks] = self.keys[layer]
            cache.values[layer][row, :, :blocks] = self.values[layer]


class KVCache:
    """Keys and values of sequences, in blocks of tokens.

    Each layer is a pair of tensors `(rows, kv_heads, blocks, KEY_BLOCK, head_dim)`. On CPUs, where attention
    takes a block of all rows at a time, such a block is one piece of memory, and in it the numbers of one
    place of all keys of a head lie together. Elsewhere all layers are views of `whole`, `(2, layers, rows,
    kv_heads, blocks, KEY_BLOCK, head_dim)`, so that a prompt is copied by two operators. The capacity is
    counted in tokens and grows in whole blocks; growing keeps the contents.

    Args:
        config: Of the decoder.
        rows: Sequences.
        capacity: Tokens of a sequence, at first.
        device: Of the tensors.
        dtype: Of the tensors.
    """

    def __init__(
        self, config: DecoderConfig, rows: int, capacity: int, device: torch.device, dtype: torch.dtype
    ):
        self.rows = rows
        self.capacity = 0
        self._heads, self._dim = config.num_key_value_heads, config.head_dim
        self._device, self._dtype = device, dtype
        self._layers = config.num_hidden_layers
        self.whole: Tensor | None = None
        if device.type == "cpu":
            layers = range(config.num_hidden_layers)
            self.keys = [self._zeros(0, True) for _ in layers]
            self.values = [self._zeros(0, False) for _ in layers]
        else:
            self._grow_whole(0)
        self.grow(capacity)

    def _zeros(self, blocks: int, keys: bool) -> Tensor:
        block = (self._dim, KEY_BLOCK) if keys else (KEY_BLOCK, self._dim)
        made = torch.zeros(blocks, self.rows, self._heads, *block, device=self._device, dtype=self._dtype)
        made = made.permute(1, 2, 0, 3, 4)
        return made.mT if keys else made

    def _grow_whole(self, blocks: int) -> None:
        shape = (2, self._layers, self.rows, self._heads, blocks, KEY_BLOCK, self._dim)
        grown = torch.zeros(shape, device=self._device, dtype=self._dtype)
        if self.whole is not None:
            grown[:, :, :, :, : self.whole.shape[4]] = self.whole
        self.whole = grown
        self.keys, self.values = (list(half.unbind()) for half in grown)

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` tokens a row; new room is zeros, since what is masked must be finite."""
        blocks, old_blocks = -(-capacity // KEY_BLOCK), self.capacity // KEY_BLOCK
        if blocks <= old_blocks:
            return
        if self.whole is not None:
            self._grow_whole(blocks)
        else:
            for tensors in (self.keys, self.values):
                for layer, old in enumerate(tensors):
                    new = self._zeros(blocks, tensors is self.keys)
                    new[:, :, :old_blocks] = old
                    tensors[layer] = new
        self.capacity = blocks * KEY_BLOCK

    def prefix(self, row: int, length: int, hidden: Tensor, next_position: int) -> Prefix:
        """Copies the first tokens of a row.

        Args:
            row: Number of the row.
            length: How many tokens.
            hidden: Hidden state of the last of them, `(H,)`.
            next_position: Position of the token after them.

        Returns:
            The copy.
        """
        blocks = -(-length // KEY_BLOCK)
        if self.whole is not None:
            keys, values = self.whole[:, :, row, :, :blocks].clone()
            return Prefix(keys, values, hidden, length, next_position)
        keys, values = (torch.stack([x[row, :, :blocks] for x in both]) for both in (self.keys, self.values))
        return Prefix(keys, values, hidden, length, next_position)
