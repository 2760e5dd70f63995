"""Triton kernels of `model/cuda/attention.py`, which alone imports them, since they import Triton.

A cache layer is `(rows, kv_heads, blocks, KEY_BLOCK, head_dim)`, all of a row and head in one piece, so a
kernel sees `(rows, kv_heads, capacity, head_dim)`. Scores are in powers of two. Products take the model's
type and add up in float32. Block sizes are constants and nothing is tuned at run time: a choice by timing
could differ between two runs, and with it the last bits of a row. For the same reason no kernel is compiled
again for special values of a size that varies (`do_not_specialize`).
"""

import triton
import triton.language as tl


@triton.jit
def _turned(at, cos, sin, DIM: tl.constexpr, real):
    """Heads whose numbers begin at `at`, turned by their angles, in float32. A number's partner is half a
    head away, as in `decoder.rotate`."""
    dims = tl.arange(0, DIM)
    HALF: tl.constexpr = DIM // 2
    c = tl.load(cos + dims % HALF).to(tl.float32)
    s = tl.load(sin + dims % HALF).to(tl.float32)
    s = tl.where(dims < HALF, -s, s)
    x = tl.load(at + dims, mask=real, other=0.0).to(tl.float32)
    partner = tl.load(at + (dims + HALF) % DIM, mask=real, other=0.0).to(tl.float32)
    return x * c + partner * s


@triton.jit
def attend_split(
    qkv,
    cos,
    sin,
    seen,
    keys,
    values,
    sums,
    tops,
    masses,
    qkv_stride,
    row_stride,
    head_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Part of one step's attention: program (sequence and key head, split) takes SPLIT keys.

    The program whose split has the new token's place turns the key, writes key and value to the cache, and
    uses its own copies of both; no program reads that place.

    Args:
        qkv: Of the new tokens, `(sequences, (heads + 2 KV_HEADS) * DIM)`.
        cos: Of the new tokens, `(sequences, DIM / 2)`.
        sin: As `cos`.
        seen: int64 `(sequences,)`, keys of each sequence with its new token's.
        keys: The cache layer; the new keys are written.
        values: The cache layer; the new values are written.
        sums: Out: weighted values, float32 `(sequences, KV_HEADS, splits, GROUP, DIM)`.
        tops: Out: largest score, float32 `(sequences, KV_HEADS, splits, GROUP)`.
        masses: Out: sum of the weights, as `tops`.
        qkv_stride: Numbers from one token of `qkv` to the next.
        row_stride: Numbers from one row of the cache layer to the next.
        head_stride: Numbers from one head of a row to the next.
        scale: Of scores, in powers of two.
        KV_HEADS: Key heads.
        GROUP: Queries of a key head.
        TILE: GROUP, padded to what a product takes.
        DIM: Numbers of a head.
        SPLIT: Keys of a program.
        BLOCK: Keys of a product.
    """
    sequence = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    count = tl.load(seen + sequence).to(tl.int32)
    first = split * SPLIT
    if first >= count:
        return
    dtype = keys.dtype.element_ty
    dims = tl.arange(0, DIM)
    query = tl.arange(0, TILE)
    real = query < GROUP
    qkv += sequence * qkv_stride
    cos += sequence * (DIM // 2)
    sin += sequence * (DIM // 2)
    cached = sequence * row_stride + head * head_stride
    q = _turned(qkv + (head * GROUP + query[:, None]) * DIM, cos, sin, DIM, real[:, None]).to(dtype)

    last = count - 1
    top = tl.full((TILE,), float("-inf"), tl.float32)
    mass = tl.zeros((TILE,), tl.float32)
    total = tl.zeros((TILE, DIM), tl.float32)
    if last < first + SPLIT:
        heads: tl.constexpr = KV_HEADS * GROUP
        k = _turned(qkv + (heads + head) * DIM, cos, sin, DIM, dims >= 0).to(dtype)
        v = tl.load(qkv + (heads + KV_HEADS + head) * DIM + dims)
        tl.store(keys + cached + last * DIM + dims, k)
        tl.store(values + cached + last * DIM + dims, v)
        top = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
        mass += 1.0
        total += v.to(tl.float32)[None, :]

    stop = tl.minimum(first + SPLIT, last)
    for start in range(first, stop, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < stop
        at = cached + place[:, None] * DIM + dims[None, :]
        k = tl.load(keys + at, mask=inside[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        v = tl.load(values + at, mask=inside[:, None], other=0.0)
        mass = mass * shrink + tl.sum(weight, 1)
        total = total * shrink[:, None] + tl.dot(weight.to(dtype), v, input_precision="ieee")
        top = higher

    part = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + split) * GROUP + query
    tl.store(tops + part, top, mask=real)
    tl.store(masses + part, mass, mask=real)
    tl.store(sums + part[:, None] * DIM + dims[None, :], total, mask=real[:, None])


@triton.jit(do_not_specialize=["most_splits"])
def attend_combine(
    seen,
    sums,
    tops,
    masses,
    out,
    most_splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Adds up the splits of `attend_split`, first to last: program (sequence and key head, query of it).

    A sequence without keys gets zeros.

    Args:
        seen: int64 `(sequences,)`, keys of each sequence.
        sums: As `attend_split` wrote them.
        tops: As `attend_split` wrote them.
        masses: As `attend_split` wrote them.
        out: `(sequences, KV_HEADS * GROUP * DIM)`, written.
        most_splits: Splits of a sequence that fills the cache.
        KV_HEADS: Key heads.
        GROUP: Queries of a key head.
        DIM: Numbers of a head.
        SPLIT: Keys of a split.
    """
    group, query = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.load(seen + group // KV_HEADS).to(tl.int32)
    dims = tl.arange(0, DIM)
    top = tl.full((1,), float("-inf"), tl.float32)
    mass = tl.zeros((1,), tl.float32)
    total = tl.zeros((DIM,), tl.float32)
    for split in tl.range(0, tl.cdiv(count, SPLIT), loop_unroll_factor=4):
        part = (group * most_splits + split) * GROUP + query
        one = part + tl.arange(0, 1)
        other = tl.load(tops + one)
        higher = tl.maximum(top, other)
        shrink, weight = tl.exp2(top - higher), tl.exp2(other - higher)
        mass = mass * shrink + tl.load(masses + one) * weight
        total = total * shrink + tl.load(sums + part * DIM + dims) * weight
        top = higher
    result = total / tl.where(mass == 0, 1.0, mass)
    tl.store(out + (group * GROUP + query) * DIM + dims, result.to(out.dtype.element_ty))


@triton.jit
def rotate_and_store(
    qkv,
    cos,
    sin,
    rows,
    places,
    keys,
    values,
    out,
    qkv_stride,
    row_stride,
    head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
):
    """Program i turns the queries and keys of token i, and writes its keys and values to their place.

    Args:
        qkv: `(tokens, (HEADS + 2 KV_HEADS) * DIM)`.
        cos: `(tokens, DIM / 2)`.
        sin: As `cos`.
        rows: int64 `(tokens,)`, cache row of each token.
        places: int64 `(tokens,)`, place of each token in its row.
        keys: The cache layer, written.
        values: The cache layer, written.
        out: Turned queries, `(tokens, HEADS, DIM)`, written.
        qkv_stride: Numbers from one token of `qkv` to the next.
        row_stride: Numbers from one row of the cache layer to the next.
        head_stride: Numbers from one head of a row to the next.
        HEADS: Queries of a token.
        KV_HEADS: Key heads.
        TILE: HEADS + KV_HEADS, padded to a power of two.
        DIM: Numbers of a head.
    """
    token = tl.program_id(0).to(tl.int64)
    dims, head = tl.arange(0, DIM), tl.arange(0, TILE)
    qkv += token * qkv_stride
    cos += token * (DIM // 2)
    sin += token * (DIM // 2)
    real = (head < HEADS + KV_HEADS)[:, None]
    turned = _turned(qkv + head[:, None] * DIM, cos, sin, DIM, real)
    queries = out + (token * HEADS + head[:, None]) * DIM + dims[None, :]
    tl.store(queries, turned.to(out.dtype.element_ty), mask=(head < HEADS)[:, None])

    cached = tl.load(rows + token) * row_stride + tl.load(places + token) * DIM
    at = cached + (head[:, None] - HEADS).to(tl.int64) * head_stride + dims[None, :]
    tl.store(keys + at, turned.to(keys.dtype.element_ty), mask=real & (head >= HEADS)[:, None])
    own = (head < KV_HEADS)[:, None]
    v = tl.load(qkv + (HEADS + KV_HEADS + head[:, None]) * DIM + dims[None, :], mask=own, other=0.0)
    at = cached + head[:, None].to(tl.int64) * head_stride + dims[None, :]
    tl.store(values + at, v, mask=own)


@triton.jit(do_not_specialize=["tokens"])
def attend_runs(
    q,
    rows,
    limits,
    keys,
    values,
    out,
    tokens,
    row_stride,
    head_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attention of runs of consecutive tokens: program (run and piece of it, key head) takes TOKENS tokens.

    Each token has GROUP queries of the head. They go over the keys of one cache row in order.

    Args:
        q: Turned queries, `(runs, tokens, KV_HEADS * GROUP, DIM)`.
        rows: int64 `(runs,)`, cache row of each run.
        limits: int64 `(runs, tokens)`; a query sees the keys below its limit.
        keys: The cache layer.
        values: The cache layer.
        out: As `q`, written.
        tokens: Of a run.
        row_stride: Numbers from one row of the cache layer to the next.
        head_stride: Numbers from one head of a row to the next.
        scale: Of scores, in powers of two.
        KV_HEADS: Key heads.
        GROUP: Queries of a key head.
        PADDED: GROUP, padded to a power of two that makes products large enough.
        TOKENS: Of a program.
        DIM: Numbers of a head.
        BLOCK: Keys of a product.
    """
    pieces = tl.cdiv(tokens, TOKENS)
    run = (tl.program_id(0) // pieces).to(tl.int64)
    piece = tl.program_id(0) % pieces
    head = tl.program_id(1)
    dtype = keys.dtype.element_ty
    dims = tl.arange(0, DIM)
    slot = tl.arange(0, TOKENS * PADDED)
    query = slot % PADDED
    token = piece * TOKENS + slot // PADDED
    real = (query < GROUP) & (token < tokens)
    limit = tl.load(limits + run * tokens + token, mask=real, other=0).to(tl.int32)
    at = ((run * tokens + token) * (KV_HEADS * GROUP) + head * GROUP + query)[:, None] * DIM + dims[None, :]
    x = tl.load(q + at, mask=real[:, None], other=0.0)
    cached = tl.load(rows + run) * row_stride + head * head_stride

    # Finite, so that a query without keys in a block, or at all, meets no infinity less itself.
    top = tl.full((TOKENS * PADDED,), -1e30, tl.float32)
    mass = tl.zeros((TOKENS * PADDED,), tl.float32)
    total = tl.zeros((TOKENS * PADDED, DIM), tl.float32)
    stop = tl.max(limit, 0)
    for start in range(0, stop, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < stop
        cell = cached + place[:, None] * DIM + dims[None, :]
        k = tl.load(keys + cell, mask=inside[:, None], other=0.0)
        score = tl.dot(x, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(place[None, :] < limit[:, None], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        v = tl.load(values + cell, mask=inside[:, None], other=0.0)
        mass = mass * shrink + tl.sum(weight, 1)
        total = total * shrink[:, None] + tl.dot(weight.to(dtype), v, input_precision="ieee")
        top = higher
    result = total / tl.where(mass == 0, 1.0, mass)[:, None]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=real[:, None])
