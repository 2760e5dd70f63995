"""Operators between two steps: a token per row is drawn, and becomes the layers' input."""

from typing import NamedTuple

import torch
from torch import Tensor

from wallaroo.model.cuda.layers import rms_norm_plain
from wallaroo.model.cuda.operators import padded, register
from wallaroo.model.decoder import RMSNorm, rope
from wallaroo.model.sampling import MIN_TEMPERATURE, sample

DRAW_BLOCK = 4096
"""Logits that the sampler holds at once: 16 a thread, which leaves registers for float64."""


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    uniform: Tensor,
    advance: Tensor,
    taken: Tensor,
    token: Tensor,
    tokens: Tensor,
) -> None:
    """Draws a token per row and notes it. Equals `sample` with a top_p of 1.

    It adds up float64 weights in another order, so a draw within a rounding of the border between two tokens
    may give the other one.

    Args:
        logits: `(rows, vocabulary)`.
        temperature: float32 `(rows,)`.
        top_k: int64 `(rows,)`.
        uniform: float64 `(rows, steps)`, of which number `taken` is used.
        advance: int64 `(rows or more,)`, added to `taken` at the end.
        taken: int64 `(rows,)`, tokens of each row so far, written.
        token: int64 `(rows,)`, written.
        tokens: int64 `(rows, steps)`, written at `taken`.
    """
    torch.ops.wallaroo.draw(logits, temperature, top_k, uniform, advance, taken, token, tokens)


def _draw_plain(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    uniform: Tensor,
    advance: Tensor,
    taken: Tensor,
    token: Tensor,
    tokens: Tensor,
) -> None:
    step = taken.unsqueeze(1)
    drawn = uniform.gather(1, step).squeeze(1)
    token.copy_(sample(logits.float(), temperature, top_k, torch.ones_like(temperature), drawn))
    tokens.scatter_(1, step, token.unsqueeze(1))
    taken += advance[: len(taken)]


def _draw_launch(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    uniform: Tensor,
    advance: Tensor,
    taken: Tensor,
    token: Tensor,
    tokens: Tensor,
) -> None:
    from wallaroo.model.cuda import step_kernels as kernels

    rows, size = logits.shape
    assert uniform.shape == tokens.shape
    assert size < 1 << 21, "the sampler counts with 21 bits"
    block = min(DRAW_BLOCK, padded(size))
    kernels.draw[(rows,)](
        logits, temperature, top_k, uniform, advance, taken, token, tokens, tokens.shape[1],
        MIN_TEMPERATURE, SIZE=size, BLOCK=block, CHUNKS=padded(-(-size // block)), num_warps=8,
    )  # fmt: skip


register(
    "draw(Tensor logits, Tensor temperature, Tensor top_k, Tensor uniform, Tensor advance, Tensor(a!) taken, "
    "Tensor(b!) token, Tensor(c!) tokens)",
    _draw_plain,
    _draw_launch,
)


class Fed(NamedTuple):
    """What the layers take in a step."""

    x: Tensor
    """`(n, H)`."""
    normed: Tensor
    """Its norm, `(n, H)`."""
    cos: Tensor
    """`(n, head_dim / 2)`."""
    sin: Tensor
    """As `cos`."""
    seen: Tensor
    """int64 `(n,)`: the keys of each sequence, the new token's included (see `attend`)."""


def feed(
    token: Tensor,
    table: Tensor,
    line_end: Tensor | None,
    taken: Tensor,
    line: Tensor,
    fed_as: Tensor,
    advance: Tensor,
    length: Tensor,
    position: Tensor,
    frequencies: Tensor,
    norm: RMSNorm,
) -> Fed:
    """Makes the inputs of all sequences for a step, and advances their lengths and positions.

    Equals the lookup in the table, the forced line end, `rope` of one position for all axes, and `RMSNorm`.

    Args:
        token: int64 `(rows,)`, the last token of each row.
        table: Decoder input of each token, `(vocabulary, H)`.
        line_end: Decoder input of a line end, `(H,)`; None if there is none.
        taken: int64 `(rows,)`, tokens of each row so far.
        line: int64 `(rows,)`, tokens after which a line end is fed.
        fed_as: int64 `(n,)`, the row that a sequence is fed from.
        advance: int64 `(n,)`, added to `length` and `position`.
        length: int64 `(n,)`, keys of each sequence, written.
        position: int64 `(n,)`, position of the fed token, written.
        frequencies: float32 `(head_dim / 2,)`.
        norm: Of the first layer's input.

    Returns:
        The inputs.
    """
    n, half = len(fed_as), len(frequencies)
    x = table.new_empty(n, table.shape[1])
    fed = Fed(x, torch.empty_like(x), x.new_empty(n, half), x.new_empty(n, half), torch.empty_like(length))
    torch.ops.wallaroo.feed(
        token, table, line_end, taken, line, fed_as, advance, length, position, frequencies,
        norm.weight, norm.eps, *fed,
    )  # fmt: skip
    return fed


def _feed_plain(
    token: Tensor,
    table: Tensor,
    line_end: Tensor | None,
    taken: Tensor,
    line: Tensor,
    fed_as: Tensor,
    advance: Tensor,
    length: Tensor,
    position: Tensor,
    frequencies: Tensor,
    weight: Tensor,
    eps: float,
    x: Tensor,
    normed: Tensor,
    cos: Tensor,
    sin: Tensor,
    seen: Tensor,
) -> None:
    rows = table[token]
    if line_end is not None:
        rows = torch.where((taken % line == 0).unsqueeze(-1), line_end, rows)
    x.copy_(rows[fed_as])
    rms_norm_plain(x, weight, eps, normed)
    # One axis has all pairs, since the three have one position.
    turns = rope(position.expand(3, -1), frequencies, (len(frequencies), 0, 0), x.dtype)
    for out, made in zip((cos, sin), turns, strict=True):
        out.copy_(made.squeeze(1))
    seen.copy_((length + 1) * advance)
    length += advance
    position += advance


def _feed_launch(
    token: Tensor,
    table: Tensor,
    line_end: Tensor | None,
    taken: Tensor,
    line: Tensor,
    fed_as: Tensor,
    advance: Tensor,
    length: Tensor,
    position: Tensor,
    frequencies: Tensor,
    weight: Tensor,
    eps: float,
    *out: Tensor,
) -> None:
    from wallaroo.model.cuda import step_kernels as kernels

    n, size = out[0].shape
    ends = table if line_end is None else line_end  # not read if there is none
    kernels.feed[(n,)](
        token, table, ends, taken, line, fed_as, advance, length, position, frequencies, weight, *out, eps,
        LINES=line_end is not None, SIZE=size, PADDED=padded(size), HALF=len(frequencies), num_warps=8,
    )  # fmt: skip


register(
    "feed(Tensor token, Tensor table, Tensor? line_end, Tensor taken, Tensor line, Tensor fed_as, "
    "Tensor advance, Tensor(a!) length, Tensor(b!) position, Tensor frequencies, Tensor weight, float eps, "
    "Tensor(c!) x, Tensor(d!) normed, Tensor(e!) cos, Tensor(f!) sin, Tensor(g!) seen)",
    _feed_plain,
    _feed_launch,
)
