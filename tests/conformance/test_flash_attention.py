"""What we ask of flash-attn, checked on the CPU against a double with the library's documented semantics.

Where CUDA and the library are there, the same checks run against the library itself.
"""

import importlib.util
import sys
import types
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.numerics import rounding
from wallaroo.model.attention import (
    KEY_BLOCK,
    BlockAttention,
    FlashAttention,
    SdpaAttention,
    Visible,
    causal_attention,
)
from wallaroo.model.engine.backends import default_backend

pytestmark = pytest.mark.numerics

REAL = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


def plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """One sequence: q (queries, heads, d), k, v (keys, kv_heads, d); the mask ends with the last key."""
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
        parts = []
        for (a, b), (c, d) in zip(pairwise(q_ends), pairwise(k_ends), strict=True):
            assert b - a <= max_seqlen_q and d - c <= max_seqlen_k
            parts.append(plain_attention(q[a:b], k[c:d], v[c:d], causal))
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
def flash(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType | None:
    if REAL:
        return None
    double = FlashDouble()
    monkeypatch.setitem(sys.modules, "flash_attn", double)
    return double


ROWS, HEADS, KV_HEADS, DIM, CAPACITY = 5, 8, 2, 32, 384
# A score is a sum over the head, a result one over the keys; both are of normal numbers. The library has
# bfloat16, with 8 bits.
TOLERANCE = {"atol": 2e-2 if REAL else rounding(1.0, DIM + CAPACITY), "rtol": 0}


def cache_and_queries(runs: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(runs + tokens)
    shape = (ROWS, KV_HEADS, CAPACITY // KEY_BLOCK, KEY_BLOCK, DIM)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    queries = torch.randn(runs, tokens, HEADS, DIM, generator=generator)
    if REAL:
        return tuple(x.to("cuda", torch.bfloat16) for x in (queries, keys, values))
    return queries, keys, values


def attend(backend: type, visible: Visible, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return backend(visible, KV_HEADS, q.dtype)(q, keys, values)


@pytest.mark.parametrize("lengths", [[1, 2, 3, 4, 5], [128, 129, 300, 1, 384], [256] * 5], ids=str)
def test_decode_agrees_with_the_other_backends(flash: FlashDouble | None, lengths: list[int]) -> None:
    q, keys, values = cache_and_queries(ROWS, 1)
    visible = Visible.decode(torch.tensor(lengths, device=q.device), max(lengths))
    ours = attend(FlashAttention, visible, q, keys, values)
    assert ours.shape == (ROWS, 1, HEADS * DIM)
    for backend in (BlockAttention, SdpaAttention):
        torch.testing.assert_close(ours, attend(backend, visible, q, keys, values), **TOLERANCE)
    assert flash is None or flash.calls == ["kvcache"]


@pytest.mark.parametrize(
    ("rows", "starts", "tokens"),
    [([0], [0], 1), ([3], [0], 32), ([1, 1, 4], [32, 40, 0], 8), ([2, 0], [200, 96], 64)],
    ids=str,
)
def test_prefill_agrees_with_the_other_backends(
    flash: FlashDouble | None, rows: list[int], starts: list[int], tokens: int
) -> None:
    q, keys, values = cache_and_queries(len(rows), tokens)
    visible = Visible.prefill(rows, starts, tokens, q.device)
    ours = attend(FlashAttention, visible, q, keys, values)
    assert ours.shape == (len(rows), tokens, HEADS * DIM)
    for backend in (BlockAttention, SdpaAttention):
        torch.testing.assert_close(ours, attend(backend, visible, q, keys, values), **TOLERANCE)
    assert flash is None or flash.calls == ["varlen"]


def test_prefill_in_pieces_is_causal_attention_over_the_whole() -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(96, HEADS, DIM, generator=generator)
    k, v = (torch.randn(96, KV_HEADS, DIM, generator=generator) for _ in range(2))
    whole = causal_attention(q[None], k[None], v[None])
    keys, values = (
        F.pad(x.transpose(0, 1), (0, 0, 0, CAPACITY - 96))[None].unflatten(2, (-1, KEY_BLOCK)) for x in (k, v)
    )
    visible = Visible.prefill([0] * 12, list(range(0, 96, 8)), 8, q.device)
    pieces = attend(BlockAttention, visible, q.view(12, 8, HEADS, DIM), keys, values)
    torch.testing.assert_close(pieces.reshape(1, 96, -1), whole, atol=rounding(1.0, DIM + 96), rtol=0)


def test_a_row_does_not_depend_on_capacity_or_on_longer_rows() -> None:
    q, keys, values = (x.cpu().float() for x in cache_and_queries(ROWS, 1))
    short, mixed = torch.full((ROWS,), 50), torch.tensor([50, 384, 50, 129, 50])
    alone = attend(BlockAttention, Visible.decode(short, 50), q, keys[:, :, :1], values[:, :, :1])
    among = attend(BlockAttention, Visible.decode(mixed, 384), q, keys, values)
    assert torch.equal(alone[[0, 2, 4]], among[[0, 2, 4]])


def test_backend_by_device_and_library() -> None:
    assert default_backend(torch.device("cpu"), torch.float32) == "block"
    half = default_backend(torch.device("cuda"), torch.bfloat16)
    assert half == ("flash" if importlib.util.find_spec("flash_attn") else "sdpa")
    assert default_backend(torch.device("cuda"), torch.float32) == "sdpa"
