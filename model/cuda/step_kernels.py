"""Triton kernels of `model/cuda/steps.py`, which alone imports them, since they import Triton."""

import triton
import triton.language as tl

from wallaroo.model.cuda.layer_kernels import store_norm


@triton.jit
def feed(
    token,
    table,
    line_end,
    taken,
    line,
    fed_as,
    advance,
    length,
    position,
    frequencies,
    weight,
    x,
    normed,
    cos,
    sin,
    seen,
    eps,
    LINES: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    HALF: tl.constexpr,
):
    """Program i makes all that the layers take for sequence i, then advances its length and position.

    Args:
        token: int64 `(rows,)`, the last token of each row.
        table: Decoder input of each token, `(vocabulary, SIZE)`.
        line_end: Decoder input of a line end, `(SIZE,)`; not read without LINES.
        taken: int64 `(rows,)`, tokens of each row so far.
        line: int64 `(rows,)`, tokens after which a line end is fed.
        fed_as: int64 `(n,)`, the row that a sequence is fed from.
        advance: int64 `(n,)`, 1 for a sequence that takes the step, else 0.
        length: int64 `(n,)`, keys of each sequence, written.
        position: int64 `(n,)`, position of the fed token, written.
        frequencies: float32 `(HALF,)`, see `rope_frequencies`.
        weight: Of the first layer's norm, `(SIZE,)`.
        x: Out: decoder inputs, `(n, SIZE)`.
        normed: Out: their RMSNorm, `(n, SIZE)`.
        cos: Out: of the rotary angles, `(n, HALF)`.
        sin: Out: as `cos`.
        seen: Out: int64 `(n,)`, keys of each sequence with its new token's.
        eps: Added to the mean square.
        LINES: Whether line ends are fed.
        SIZE: Numbers of a decoder input.
        PADDED: SIZE, padded to a power of two.
        HALF: Rotary pairs of a head.
    """
    sequence = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, PADDED)
    real = index < SIZE
    slot = tl.load(fed_as + sequence)
    source = table + tl.load(token + slot) * SIZE
    one = tl.load(source + index, mask=real, other=0.0)
    if LINES:
        ended = tl.load(taken + slot) % tl.load(line + slot) == 0
        end = tl.load(line_end + index, mask=real, other=0.0)
        one = tl.where(ended, end, one)
    row = sequence * SIZE
    tl.store(x + row + index, one, mask=real)
    store_norm(one.to(tl.float32), weight, normed + row, eps, index, real, SIZE)

    pair = tl.arange(0, HALF)
    place, ahead = tl.load(position + sequence), tl.load(advance + sequence)
    angle = place.to(tl.float32) * tl.load(frequencies + pair)
    tl.store(cos + sequence * HALF + pair, tl.cos(angle).to(cos.dtype.element_ty))
    tl.store(sin + sequence * HALF + pair, tl.sin(angle).to(sin.dtype.element_ty))
    there = tl.load(length + sequence)
    tl.store(seen + sequence, (there + 1) * ahead)
    tl.store(length + sequence, there + ahead)
    tl.store(position + sequence, place + ahead)


@triton.jit
def _ordered(x):
    """Whole numbers that are in the order of the float32 numbers x."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["steps"])
def draw(
    logits,
    temperature,
    top_k,
    uniform,
    advance,
    taken,
    token,
    tokens,
    steps,
    least,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Program i draws row i's token.

    The k-th largest logit is found two bits at a time, by counting the logits at or above three bounds.

    Args:
        logits: `(rows, SIZE)`.
        temperature: float32 `(rows,)`.
        top_k: int64 `(rows,)`.
        uniform: float64 `(rows, steps)`, of which number `taken` is used.
        advance: int64 `(rows or more,)`, added to `taken` at the end.
        taken: int64 `(rows,)`, tokens of each row so far, written.
        token: int64 `(rows,)`, written.
        tokens: int64 `(rows, steps)`, written at `taken`.
        steps: Of a row of `uniform` and `tokens`.
        least: Least temperature; a smaller one counts as this.
        SIZE: Logits of a row.
        BLOCK: Logits of a block.
        CHUNKS: Blocks of a row, padded to a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * SIZE
    offsets = tl.arange(0, BLOCK)
    k = tl.load(top_k + row)
    step = tl.load(taken + row)

    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, SIZE, BLOCK):
        index = start + offsets
        x = tl.load(logits + index, mask=index < SIZE, other=float("-inf")).to(tl.float32)
        where = tl.where(x > best, index, where)
        best = tl.maximum(best, x)
    highest = tl.max(best, 0)
    chosen = tl.min(tl.where(best == highest, where, SIZE), 0).to(tl.int64)

    if k != 1:
        heat = tl.maximum(tl.load(temperature + row), least)
        threshold = float("-inf")
        if (k > 0) & (k < SIZE):
            # From the lowest whole number up; keys of logits stay below the highest one.
            found = tl.full((), -2147483648, tl.int64)
            for pair in range(0, 16):
                width = tl.full((), 1, tl.int64) << (30 - 2 * pair)
                counts = tl.zeros((BLOCK,), tl.int64)
                for start in range(0, SIZE, BLOCK):
                    index = start + offsets
                    there = index < SIZE
                    x = tl.load(logits + index, mask=there, other=float("-inf")).to(tl.float32)
                    key = _ordered(x).to(tl.int64)
                    # Three counts in one number, 21 bits each.
                    counts += tl.where(there & (key >= found + width), 1, 0).to(tl.int64)
                    counts += tl.where(there & (key >= found + 2 * width), 1 << 21, 0).to(tl.int64)
                    counts += tl.where(there & (key >= found + 3 * width), 1 << 42, 0).to(tl.int64)
                count = tl.sum(counts, 0)
                up = tl.where(count >> 42 >= k, 3, tl.where((count >> 21) & 0x1FFFFF >= k, 2, 0))
                up = tl.where((up == 0) & (count & 0x1FFFFF >= k), 1, up)
                found += up * width
            bits = found.to(tl.int32)
            bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            threshold = tl.math.div_rn(bits.to(tl.float32, bitcast=True), heat)
        top = tl.math.div_rn(highest, heat)

        # Weights of kept tokens, added up block by block.
        chunk = tl.arange(0, CHUNKS)
        masses = tl.zeros((CHUNKS,), tl.float64)
        for start in range(0, SIZE, BLOCK):
            index = start + offsets
            x = tl.load(logits + index, mask=index < SIZE, other=float("-inf")).to(tl.float32)
            x = tl.math.div_rn(x, heat)
            weight = tl.where((x >= threshold) & (index < SIZE), tl.exp((x - top).to(tl.float64)), 0.0)
            masses = tl.where(chunk == start // BLOCK, tl.sum(weight, 0), masses)
        ends = tl.cumsum(masses, 0)
        # Sums in other orders may differ by a rounding, so only what has weight counts as an end.
        whole = tl.max(tl.where(masses > 0, ends, 0.0), 0)
        below = (whole.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)
        target = tl.minimum(
            tl.load(uniform + row * steps + step, mask=step < steps, other=0.0) * whole, below
        )
        block = tl.min(tl.where((ends > target) & (masses > 0), chunk, CHUNKS), 0)
        before = tl.sum(tl.where(chunk == block - 1, ends, 0.0), 0)

        index = block * BLOCK + offsets
        x = tl.load(logits + index, mask=index < SIZE, other=float("-inf")).to(tl.float32)
        x = tl.math.div_rn(x, heat)
        weight = tl.where((x >= threshold) & (index < SIZE), tl.exp((x - top).to(tl.float64)), 0.0)
        past = (before + tl.cumsum(weight, 0) > target) & (weight > 0)
        drawn = tl.min(tl.where(past, index, SIZE), 0)
        last = tl.max(tl.where(weight > 0, index, 0), 0)
        chosen = tl.where(drawn < SIZE, drawn, last).to(tl.int64)

    tl.store(token + row, chosen)
    tl.store(tokens + row * steps + step, chosen, mask=step < steps)
    tl.store(taken + row, step + tl.load(advance + row))
