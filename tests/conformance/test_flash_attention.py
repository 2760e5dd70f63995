"""What we ask of flash-attn, checked on the CPU against a double with the library's documented semantics.

Where CUDA and the library are there, the same checks run against the library itself.
"""

import importlib.util
import sys
import types

import pytest
import torch
from torch import Tensor

from model.attention import BlockAttention, FlashAttention, SdpaAttention, causal_attention, default_backend

REAL = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


def plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """One sequence, q (queries, heads, d), k and v (keys, kv_heads, d); the mask is aligned to the last key."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * q.shape[-1] ** -0.5
    if causal:
        last = torch.arange(q.shape[0]).unsqueeze(1) + k.shape[0] - q.shape[0]
        scores = scores.masked_fill(torch.arange(k.shape[0]) > last, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double()).to(q.dtype)


class FlashDouble(types.ModuleType):
    """The two functions we call, with no argument that the documentation does not name."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.calls: list[str] = []

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal=False
    ) -> Tensor:
        self.calls.append("varlen")
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert isinstance(max_seqlen_q, int) and isinstance(max_seqlen_k, int)
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert q_ends[-1] == len(q) and k_ends[-1] == len(k) == len(v)
        parts = [
            plain_attention(q[a:b], k[c:d], v[c:d], causal)
            for a, b, c, d in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False)
        ]
        assert max(b - a for a, b in zip(q_ends, q_ends[1:], strict=False)) <= max_seqlen_q
        assert max(b - a for a, b in zip(k_ends, k_ends[1:], strict=False)) <= max_seqlen_k
        return torch.cat(parts)

    def flash_attn_with_kvcache(
        self, q, k_cache, v_cache, *, cache_seqlens=None, causal=False, num_splits=0
    ) -> Tensor:
        self.calls.append("kvcache")
        assert cache_seqlens.dtype == torch.int32
        assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1
        rows = zip(q, k_cache, v_cache, cache_seqlens.tolist(), strict=True)
        return torch.stack([plain_attention(a, b[:n], c[:n], causal) for a, b, c, n in rows])


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FlashAttention:
    if not REAL:
        monkeypatch.setitem(sys.modules, "flash_attn", FlashDouble())
    return FlashAttention()


ROWS, HEADS, KV_HEADS, DIM, CAPACITY = 5, 8, 2, 32, 384


def cache_and_queries(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    keys, values = (torch.randn(ROWS, KV_HEADS, CAPACITY, DIM, generator=generator) for _ in range(2))
    queries = torch.randn(tokens, HEADS, DIM, generator=generator)
    if REAL:
        return tuple(x.to("cuda", torch.bfloat16) for x in (queries, keys, values))
    return queries, keys, values


TOLERANCE = {"atol": 2e-2 if REAL else 2e-6, "rtol": 0}


@pytest.mark.parametrize("lengths", [[1, 2, 3, 4, 5], [128, 129, 300, 1, 384], [256] * 5])
def test_decode_agrees_with_the_other_backends(flash: FlashAttention, lengths: list[int]) -> None:
    q, keys, values = cache_and_queries(ROWS)
    length = torch.tensor(lengths, device=q.device)
    results = [b.decode(q, keys, values, length, max(lengths)) for b in (flash, BlockAttention(), SdpaAttention())]
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, **TOLERANCE)


@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 32), (32, 32), (96, 64), (200, 7)])
def test_prefill_agrees_with_the_other_backends(flash: FlashAttention, start: int, tokens: int) -> None:
    q, keys, values = cache_and_queries(tokens)
    results = [b.prefill(q, keys[0], values[0], start) for b in (flash, BlockAttention(), SdpaAttention())]
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, **TOLERANCE)


def test_prefill_in_chunks_is_causal_attention_over_the_whole() -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(96, HEADS, DIM, generator=generator)
    k, v = (torch.randn(96, KV_HEADS, DIM, generator=generator) for _ in range(2))
    whole = causal_attention(q[None], k[None], v[None])[0]
    keys, values = (torch.nn.functional.pad(x.transpose(0, 1), (0, 0, 0, CAPACITY - 96)) for x in (k, v))
    chunks = [BlockAttention().prefill(q[i : i + 32], keys, values, i) for i in range(0, 96, 32)]
    torch.testing.assert_close(torch.cat(chunks), whole, atol=2e-6, rtol=0)


def test_a_row_does_not_depend_on_capacity_or_on_longer_rows() -> None:
    q, keys, values = (x.cpu().float() for x in cache_and_queries(ROWS))
    alone = BlockAttention().decode(q, keys[:, :, :128], values[:, :, :128], torch.full((ROWS,), 50), 50)
    mixed = BlockAttention().decode(q, keys, values, torch.tensor([50, 384, 50, 129, 50]), 384)
    assert torch.equal(alone[[0, 2, 4]], mixed[[0, 2, 4]])


def test_backend_by_device_and_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_backend(torch.device("cpu"), torch.float32) == "block"
    half = default_backend(torch.device("cuda"), torch.bfloat16)
    assert half == ("flash" if importlib.util.find_spec("flash_attn") else "sdpa")
    assert default_backend(torch.device("cuda"), torch.float32) == "sdpa"
