"""How queries meet the keys of a cache, behind one small interface with a backend for each library.

Knows nothing of slots, prompts or layers.
"""

import importlib.util
import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

KEY_BLOCK = 128
"""Keys that `BlockAttention` takes at a time."""


class AttentionBackend(Protocol):
    """Attention of new tokens over the keys and values that a cache holds, theirs included.

    keys, values: `(rows, kv_heads, capacity, head_dim)`. A row's result must not depend on the other
    rows, on `capacity` or on `longest`.
    """

    def decode(self, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """One new token a row: q `(rows, heads, head_dim)` -> `(rows, heads * head_dim)`.

        lengths: int64 `(rows,)`, keys of each row; longest: a bound on them that the host knows.
        """

    def prefill(self, q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        """A chunk of one row's tokens, the first at `start`: q `(tokens, heads, head_dim)` ->
        `(tokens, heads * head_dim)`; keys, values `(kv_heads, capacity, head_dim)`; causal."""


class BlockAttention:
    """Softmax over fixed blocks of keys with running maxima (Milakov and Gimelshein 2018).

    Every operator has one shape, whatever the lengths: a longer row in the batch only adds blocks, and
    a block past a row's end adds exact zeros to it. On CPUs this is faster than the fused kernel,
    because the queries of a key head share one matrix product.
    """

    def decode(self, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, longest: int) -> Tensor:
        rows, heads, dim = q.shape
        kv_heads = keys.shape[1]
        limit = lengths.repeat_interleave(kv_heads).view(-1, 1, 1)
        out = self._attend(
            q.reshape(rows * kv_heads, heads // kv_heads, dim),
            keys.flatten(0, 1),
            values.flatten(0, 1),
            limit,
            longest,
        )
        return out.view(rows, heads * dim)

    def prefill(self, q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        tokens, heads, dim = q.shape
        kv_heads = keys.shape[0]
        grouped = q.view(tokens, kv_heads, heads // kv_heads, dim).transpose(0, 1).reshape(kv_heads, -1, dim)
        limit = torch.arange(start + 1, start + tokens + 1, device=q.device)
        limit = limit.repeat_interleave(heads // kv_heads).view(1, -1, 1)
        out = self._attend(grouped, keys, values, limit, start + tokens)
        return out.view(kv_heads, tokens, -1, dim).transpose(0, 1).reshape(tokens, heads * dim)

    @staticmethod
    def _attend(q: Tensor, keys: Tensor, values: Tensor, limit: Tensor, longest: int) -> Tensor:
        """q `(n, m, d)` over keys and values `(n, capacity, d)`; key j counts where j < limit."""
        scale = q.shape[-1] ** -0.5
        scores = []
        for first in range(0, longest, KEY_BLOCK):
            score = torch.bmm(q, keys[:, first : first + KEY_BLOCK].transpose(1, 2)).mul_(scale)
            index = torch.arange(first, first + KEY_BLOCK, device=q.device)
            scores.append(score.float().masked_fill_(index >= limit, -math.inf))
        top = scores[0].amax(-1, keepdim=True)
        for score in scores[1:]:
            top = torch.maximum(top, score.amax(-1, keepdim=True))
        total, out = None, None
        for number, score in enumerate(scores):
            weight = score.sub_(top).exp_()
            mass = weight.sum(-1, keepdim=True)
            block = values[:, number * KEY_BLOCK : (number + 1) * KEY_BLOCK]
            part = torch.bmm(weight.to(block.dtype), block)
            total = mass if total is None else total.add_(mass)
            out = part if out is None else out.add_(part)
        assert out is not None and total is not None, "attention needs at least one key"
        return out / total.to(out.dtype)


class SdpaAttention:
    """torch's scaled_dot_product_attention over the whole capacity, the queries of a key head as one."""

    def decode(self, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, longest: int) -> Tensor:
        rows, heads, dim = q.shape
        kv_heads = keys.shape[1]
        seen = torch.arange(keys.shape[2], device=q.device) < lengths.view(-1, 1, 1, 1)
        out = F.scaled_dot_product_attention(
            q.view(rows, kv_heads, heads // kv_heads, dim), keys, values, attn_mask=seen
        )
        return out.reshape(rows, heads * dim)

    def prefill(self, q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        tokens, heads, dim = q.shape
        limit = torch.arange(start + 1, start + tokens + 1, device=q.device).unsqueeze(-1)
        seen = torch.arange(keys.shape[1], device=q.device) < limit
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0), keys[None], values[None], attn_mask=seen, enable_gqa=True
        )
        return out.squeeze(0).transpose(0, 1).reshape(tokens, heads * dim)


class FlashAttention:
    """flash-attn's kernels (Dao 2023), for half precision on CUDA; raises ImportError without the library."""

    def __init__(self) -> None:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

        self._varlen, self._with_kvcache = flash_attn_varlen_func, flash_attn_with_kvcache

    def decode(self, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, longest: int) -> Tensor:
        # One split of the keys, since the library's own choice depends on how many rows there are.
        out = self._with_kvcache(
            q.unsqueeze(1),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            cache_seqlens=lengths.to(torch.int32),
            causal=True,
            num_splits=1,
        )
        return out.flatten(1)

    def prefill(self, q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        tokens = q.shape[0]
        stop = start + tokens
        # Causal masks there are aligned to the last key, which is what a chunk needs.
        out = self._varlen(
            q.contiguous(),
            keys[:, :stop].transpose(0, 1).contiguous(),
            values[:, :stop].transpose(0, 1).contiguous(),
            torch.tensor([0, tokens], dtype=torch.int32, device=q.device),
            torch.tensor([0, stop], dtype=torch.int32, device=q.device),
            tokens,
            stop,
            causal=True,
        )
        return out.flatten(1)


BACKENDS: dict[str, type[AttentionBackend]] = {
    "block": BlockAttention,
    "sdpa": SdpaAttention,
    "flash": FlashAttention,
}


def default_backend(device: torch.device, dtype: torch.dtype) -> str:
    """`block` on a CPU; elsewhere `flash` where the library is installed and takes the type, or `sdpa`."""
    if device.type == "cpu":
        return "block"
    half = dtype in (torch.bfloat16, torch.float16)
    return "flash" if half and importlib.util.find_spec("flash_attn") else "sdpa"


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention within whole sequences, without a cache: q `(batch, tokens, heads, head_dim)`, k and v
    with kv_heads -> `(batch, tokens, heads * head_dim)`."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(2)
