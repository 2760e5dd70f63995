"""Operators of rotation, key cache and attention."""

import math

import torch
from torch import Tensor

from wallaroo.model.attention import KEY_BLOCK, BlockAttention, Visible
from wallaroo.model.cuda.operators import padded, register
from wallaroo.model.decoder import rotate

SPLIT = 256
"""Keys that one program takes in decode. Constant, so a row's sums are the same in any company. Fewer would
write more partial sums (at 256 they are a twentieth of the keys' bytes), more would leave a GPU idle that
decodes one picture."""
BLOCK = 64
"""Keys of one product in attention: 32 KiB of keys and values, so several programs share a multiprocessor."""
MIN_TILE = 16
"""Queries that a tensor core's product takes at least."""


def _layout(keys: Tensor) -> tuple[int, int]:
    """Strides of rows and heads of a cache layer, whose blocks must follow each other."""
    dim = keys.shape[-1]
    assert keys.stride()[2:] == (KEY_BLOCK * dim, dim, 1), "the keys of a row and head must be in one piece"
    return keys.stride(0), keys.stride(1)


def _scale(dim: int) -> float:
    """Of scores, in powers of two."""
    return math.log2(math.e) * dim**-0.5


def _stages(dtype: torch.dtype) -> int:
    """Blocks of keys in shared memory; float32 takes twice the room and is for tests."""
    return 1 if dtype == torch.float32 else 2


def attend(qkv: Tensor, cos: Tensor, sin: Tensor, seen: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """A layer's attention in decode, between the fused query, key and value product and the output matrix.

    Equals `rotate`, writing the new keys and values, and `BlockAttention`; two kernels.

    Args:
        qkv: `(n, (heads + 2 kv_heads) * head_dim)`, one new token of n sequences.
        cos: `(n, head_dim / 2)`, of the new tokens.
        sin: As `cos`.
        seen: int64 `(n,)`, keys of each sequence with its new token's. A sequence with 0 reads and writes
            nothing, and gives zeros.
        keys: A cache layer `(n, kv_heads, blocks, KEY_BLOCK, head_dim)`; the new ones are written.
        values: As `keys`.

    Returns:
        `(n, heads * head_dim)`.
    """
    kv_heads, dim = keys.shape[1], keys.shape[-1]
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * kv_heads * dim)
    torch.ops.wallaroo.attend(qkv, cos, sin, seen, keys, values, out)
    return out


def _attend_plain(
    qkv: Tensor, cos: Tensor, sin: Tensor, seen: Tensor, keys: Tensor, values: Tensor, out: Tensor
) -> None:
    n, dim = qkv.shape[0], keys.shape[-1]
    active = torch.nonzero(seen).squeeze(1)
    q = qkv.new_zeros(n, out.shape[1] // dim, dim)
    turned = q[active]
    _rotate_and_store_plain(
        qkv[active], cos[active], sin[active], keys, values, active, seen[active] - 1, turned
    )
    q[active] = turned
    longest = keys.shape[2] * KEY_BLOCK
    limits = seen.unsqueeze(1)
    _cache_attention_plain(
        q.unsqueeze(1), keys, values, torch.arange(n, device=qkv.device), limits, longest, out.unsqueeze(1)
    )


def _attend_launch(
    qkv: Tensor, cos: Tensor, sin: Tensor, seen: Tensor, keys: Tensor, values: Tensor, out: Tensor
) -> None:
    from wallaroo.model.cuda import attention_kernels as kernels

    n, kv_heads, blocks, _, dim = keys.shape
    group = out.shape[1] // dim // kv_heads
    # A grid for the whole capacity; programs past a sequence's end return at once.
    splits = -(-blocks * KEY_BLOCK // SPLIT)
    parts = n, kv_heads, splits, group
    tops, masses = (torch.empty(parts, device=qkv.device, dtype=torch.float32) for _ in range(2))
    sums = torch.empty(*parts, dim, device=qkv.device, dtype=torch.float32)
    shape = {"KV_HEADS": kv_heads, "GROUP": group, "DIM": dim, "SPLIT": SPLIT}
    tile = max(MIN_TILE, padded(group))
    kernels.attend_split[n * kv_heads, splits](
        qkv, cos, sin, seen, keys, values, sums, tops, masses, qkv.shape[1], *_layout(keys), _scale(dim),
        **shape, TILE=tile, BLOCK=BLOCK, num_warps=4, num_stages=_stages(qkv.dtype),
    )  # fmt: skip
    kernels.attend_combine[n * kv_heads, group](seen, sums, tops, masses, out, splits, **shape, num_warps=1)


register(
    "attend(Tensor qkv, Tensor cos, Tensor sin, Tensor seen, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor(c!) out)",
    _attend_plain,
    _attend_launch,
    launches=2,
)


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, rows: Tensor, places: Tensor
) -> Tensor:
    """Turns queries and keys, and writes the keys and values to the cache.

    Equals `rotate`, and writing keys and values.

    Args:
        qkv: `(tokens, (heads + 2 kv_heads) * head_dim)`.
        cos: `(tokens, 1, head_dim / 2)`, see `rope`.
        sin: As `cos`.
        keys: A cache layer `(rows, kv_heads, blocks, KEY_BLOCK, head_dim)`, written.
        values: As `keys`.
        rows: int64 `(tokens,)`, cache row of each token.
        places: int64 `(tokens,)`, place of each token in its row. Where two tokens share a place, either may
            stay.

    Returns:
        Turned queries, `(tokens, heads, head_dim)`.
    """
    kv_heads, dim = keys.shape[1], keys.shape[-1]
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // dim - 2 * kv_heads, dim)
    torch.ops.wallaroo.rotate_and_store(qkv, cos, sin, keys, values, rows, places, out)
    return out


def _rotate_and_store_plain(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    places: Tensor,
    out: Tensor,
) -> None:
    heads, kv_heads, dim = out.shape[1], keys.shape[1], keys.shape[-1]
    parts = qkv.view(len(qkv), -1, dim)
    cos, sin = cos.view(len(qkv), 1, dim // 2), sin.view(len(qkv), 1, dim // 2)
    turned = rotate(parts[:, : heads + kv_heads], cos, sin)
    block, offset = places // KEY_BLOCK, places % KEY_BLOCK
    keys[rows, :, block, offset] = turned[:, heads:]
    values[rows, :, block, offset] = parts[:, heads + kv_heads :]
    out.copy_(turned[:, :heads])


def _rotate_and_store_launch(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    places: Tensor,
    out: Tensor,
) -> None:
    from wallaroo.model.cuda import attention_kernels as kernels

    (tokens, heads, dim), kv_heads = out.shape, keys.shape[1]
    kernels.rotate_and_store[(tokens,)](
        qkv, cos, sin, rows, places, keys, values, out, qkv.shape[1], *_layout(keys),
        HEADS=heads, KV_HEADS=kv_heads, TILE=padded(heads + kv_heads), DIM=dim, num_warps=8,
    )  # fmt: skip


register(
    "rotate_and_store(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor rows, "
    "Tensor places, Tensor(c!) out)",
    _rotate_and_store_plain,
    _rotate_and_store_launch,
)


def cache_attention(
    q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, limits: Tensor, longest: int
) -> Tensor:
    """Attention of runs of tokens whose keys and values are in the cache, as in prefill.

    Equals `BlockAttention`, and zeros for queries that see no key.

    Args:
        q: Turned queries, `(runs, t, heads, head_dim)`.
        keys: A cache layer `(rows, kv_heads, blocks, KEY_BLOCK, head_dim)`.
        values: As `keys`.
        rows: int64 `(runs,)`, cache row of each run.
        limits: int64 `(runs, t)`; a query sees the keys below its limit.
        longest: A bound on all limits.

    Returns:
        `(runs, t, heads * head_dim)`.
    """
    out = q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])
    torch.ops.wallaroo.cache_attention(q, keys, values, rows, limits, longest, out)
    return out


def _cache_attention_plain(
    q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, limits: Tensor, longest: int, out: Tensor
) -> None:
    visible = Visible(rows, limits.clamp(min=1), None, longest)
    made = BlockAttention(visible, keys.shape[1], q.dtype)(q, keys, values)
    out.copy_(made.masked_fill(limits.unsqueeze(-1) == 0, 0))


def _cache_attention_launch(
    q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, limits: Tensor, longest: int, out: Tensor
) -> None:
    from wallaroo.model.cuda import attention_kernels as kernels

    (runs, tokens, heads, dim), kv_heads = q.shape, keys.shape[1]
    group = heads // kv_heads
    # With 7 queries a key head products of 128 queries; float32 takes twice the room.
    taken = 4 if q.dtype == torch.float32 else 16
    kernels.attend_runs[runs * -(-tokens // taken), kv_heads](
        q, rows, limits, keys, values, out, tokens, *_layout(keys), _scale(dim),
        KV_HEADS=kv_heads, GROUP=group, PADDED=max(padded(group), MIN_TILE // taken), TOKENS=taken, DIM=dim,
        BLOCK=BLOCK, num_warps=8, num_stages=_stages(q.dtype),
    )  # fmt: skip


register(
    "cache_attention(Tensor q, Tensor keys, Tensor values, Tensor rows, Tensor limits, int longest, "
    "Tensor(a!) out)",
    _cache_attention_plain,
    _cache_attention_launch,
)
