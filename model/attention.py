"""Attention of queries to a key-value cache: one small interface, a backend for each library.

Knows nothing of slots, prompts or layers.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

KEY_BLOCK = 64
"""Keys of one block of a cache, and of one step of `BlockAttention`."""


@dataclass(frozen=True)
class Visible:
    """Which keys each query of a forward may see; made once and used by every layer.

    A forward takes n runs of t consecutive tokens: all rows of a group with t = 1 in decode, pieces of
    prompts in prefill.
    """

    rows: Tensor | None
    """int64 `(n,)`: the cache row of each run; None where run i is row i."""
    limits: Tensor
    """int64 `(n, t)`: a query sees the keys below its limit."""
    stops: list[int] | None
    """The last limit of each run where the host knows it (prefill), else None."""
    longest: int
    """Upper bound on all limits, known to the host."""

    @classmethod
    def decode(cls, lengths: Tensor, longest: int) -> "Visible":
        """The keys that one new token per row sees.

        Args:
            lengths: Keys of each row, the new token's included; int64 `(rows,)`.
            longest: A bound on all lengths.

        Returns:
            Runs of one token, run i in row i.
        """
        return cls(None, lengths.unsqueeze(1), None, longest)

    @classmethod
    def prefill(cls, rows: list[int], starts: list[int], tokens: int, device: torch.device) -> "Visible":
        """The keys that runs of consecutive tokens see: earlier tokens and their own, causally.

        Args:
            rows: The cache row of each run.
            starts: Position of the first token of each run.
            tokens: Length of every run.
            device: Of the cache.

        Returns:
            The runs, in this order.
        """
        limits = torch.tensor(starts, device=device).unsqueeze(1) + torch.arange(1, tokens + 1, device=device)
        stops = [start + tokens for start in starts]
        return cls(torch.tensor(rows, device=device), limits, stops, max(stops))


@functools.cache
def _index(count: int, device: torch.device) -> Tensor:
    """The numbers below `count`, int64 `(count,)`; cached, since steps allocate no tensors."""
    return torch.arange(count, device=device)


class Attention(Protocol):
    """Attention of one forward.

    Takes q `(n, t, heads, head_dim)`, and keys and values of a cache layer `(rows, kv_heads, blocks,
    KEY_BLOCK, head_dim)`, which hold those of the queries' own tokens too. Gives
    `(n, t, heads * head_dim)`. A run's result depends neither on the other runs nor on the capacity.
    """

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor: ...


class BlockAttention:
    """Softmax over fixed blocks of keys with one maximum (Milakov and Gimelshein 2018).

    Every operator has one shape, whatever the lengths: a longer row in the batch only adds blocks, and
    a block past a row's end adds exact zeros to it. On CPUs this is faster than the fused kernel,
    because the queries of a key head share one matrix product.

    Args:
        visible: Which keys each query sees.
        kv_heads: Key heads.
        dtype: Of queries, keys and values.
    """

    def __init__(self, visible: Visible, kv_heads: int, dtype: torch.dtype):
        self.rows = visible.rows
        limits = visible.limits
        keys = -(-visible.longest // KEY_BLOCK) * KEY_BLOCK
        hidden = _index(keys, limits.device) >= limits.unsqueeze(-1)
        mask = hidden.to(dtype).masked_fill_(hidden, -math.inf).unsqueeze(1)
        self.masks = mask.expand(-1, kv_heads, -1, -1).flatten(0, 1).split(KEY_BLOCK, dim=-1)

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        runs, tokens, heads, dim = q.shape
        kv_heads = keys.shape[1]
        per_key = heads // kv_heads
        # Queries of one key head stand together: (runs * kv_heads, queries a key head * tokens, dim).
        q = q.view(runs, tokens, kv_heads, per_key, dim).permute(0, 2, 3, 1, 4)
        q = q.reshape(runs * kv_heads, per_key * tokens, dim)
        shape = (runs * kv_heads, per_key, tokens, KEY_BLOCK)
        # Scores in powers of two: torch's exp is many times slower where there are infinities, exp2 is not.
        scale = math.log2(math.e) * dim**-0.5
        scores = []
        for number, mask in enumerate(self.masks):
            if tokens > 1:
                mask = mask.unsqueeze(1).expand(shape).flatten(1, 2)
            block = self._block(keys, number).transpose(1, 2)
            scores.append(torch.baddbmm(mask, q, block, alpha=scale).float())
        top = scores[0].amax(-1, keepdim=True)
        for score in scores[1:]:
            top = torch.maximum(top, score.amax(-1, keepdim=True))
        total, out = None, None
        for number, score in enumerate(scores):
            weight = score.sub_(top).exp2_()
            mass = weight.sum(-1, keepdim=True)
            part = torch.bmm(weight.to(values.dtype), self._block(values, number))
            total = mass if total is None else total.add_(mass)
            out = part if out is None else out.add_(part)
        assert out is not None and total is not None, "attention needs at least one key"
        out = (out / total.to(out.dtype)).view(runs, kv_heads, per_key, tokens, dim)
        return out.permute(0, 3, 1, 2, 4).reshape(runs, tokens, heads * dim)

    def _block(self, cached: Tensor, number: int) -> Tensor:
        """Keys or values of one block for every run, `(runs * kv_heads, KEY_BLOCK, head_dim)`."""
        block = cached[:, :, number]
        if self.rows is not None:
            block = block.index_select(0, self.rows)
        return block.flatten(0, 1)


class SdpaAttention:
    """torch's scaled_dot_product_attention over the whole capacity.

    The queries of a key head stand together as one sequence: keys are not repeated, and no key head idles. On
    CUDA one kernel is named, which takes masks, goes over keys in one order and keeps no scores in memory,
    since torch's own choice depends on the shapes.

    Args:
        visible: Which keys each query sees.
        kv_heads: Key heads.
        dtype: Of queries, keys and values.
    """

    def __init__(self, visible: Visible, kv_heads: int, dtype: torch.dtype):
        self.rows, self.limits = visible.rows, visible.limits
        self.seen: Tensor | None = None

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = keys.flatten(2, 3), values.flatten(2, 3)
        if self.rows is not None:
            keys, values = keys[self.rows], values[self.rows]
        runs, tokens, heads, dim = q.shape
        kv_heads = keys.shape[1]
        per_key = heads // kv_heads
        if self.seen is None:
            # One mask serves all layers: (runs, 1, 1 or queries a key head * tokens, keys).
            seen = (_index(keys.shape[2], q.device) < self.limits.unsqueeze(-1)).unsqueeze(1)
            if tokens > 1:
                seen = seen.expand(-1, per_key, -1, -1).flatten(1, 2).unsqueeze(1)
            self.seen = seen
        grouped = q.view(runs, tokens, kv_heads, per_key, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
        on_cuda = q.device.type == "cuda"
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if on_cuda else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.seen)
        out = out.view(runs, kv_heads, per_key, tokens, dim).permute(0, 3, 1, 2, 4)
        return out.reshape(runs, tokens, heads * dim)


class FlashAttention:
    """flash-attn's kernels (Dao 2023), for half precision on CUDA.

    Args:
        visible: Which keys each query sees.
        kv_heads: Key heads.
        dtype: Of queries, keys and values.

    Raises:
        ImportError: Flash-attn is not installed.
    """

    def __init__(self, visible: Visible, kv_heads: int, dtype: torch.dtype):
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

        self._varlen, self._with_kvcache = flash_attn_varlen_func, flash_attn_with_kvcache
        self.stops = visible.stops
        device, (runs, tokens) = visible.limits.device, visible.limits.shape
        if self.stops is None:
            self.lengths = visible.limits[:, 0].to(torch.int32)
            return
        assert visible.rows is not None
        # Made on the device, with sizes that the host knows: nothing is read back.
        lengths = visible.limits[:, -1]
        ends = F.pad(lengths.cumsum(0), (1, 0))
        total = sum(self.stops)
        run = _index(runs, device).repeat_interleave(lengths, output_size=total)
        self.key_rows, self.key_places = visible.rows[run], _index(total, device) - ends[run]
        self.key_ends = ends.to(torch.int32)
        self.query_ends = torch.arange(0, runs * tokens + 1, tokens, dtype=torch.int32, device=device)

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        runs, tokens = q.shape[:2]
        keys, values = keys.flatten(2, 3), values.flatten(2, 3)
        if self.stops is None:
            # One split of the keys, since the library's own choice depends on how many rows there are.
            out = self._with_kvcache(
                q,
                keys.transpose(1, 2),
                values.transpose(1, 2),
                cache_seqlens=self.lengths,
                causal=True,
                num_splits=1,
            )
            return out.flatten(2)
        # Causal masks there are aligned to the last key, which is what a piece of a prompt needs.
        out = self._varlen(
            q.flatten(0, 1),
            *(cached[self.key_rows, :, self.key_places] for cached in (keys, values)),
            self.query_ends,
            self.key_ends,
            tokens,
            max(self.stops),
            causal=True,
        )
        return out.view(runs, tokens, -1)


BACKENDS: dict[str, Callable[[Visible, int, torch.dtype], Attention]] = {
    "block": BlockAttention,
    "sdpa": SdpaAttention,
    "flash": FlashAttention,
}
"""By the name of the option `attention`; `triton` is more than attention (model/cuda/ops.py)."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention within whole sequences, without a cache.

    Args:
        q: `(batch, tokens, heads, head_dim)`.
        k: `(batch, tokens, kv_heads, head_dim)`.
        v: As `k`.

    Returns:
        `(batch, tokens, heads * head_dim)`.
    """
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(2)
