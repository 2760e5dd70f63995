"""Triton kernels of `model/cuda/group_norm.py`, which alone imports them, since they import Triton.

A picture is PIXELS rows of CHANNELS numbers. Sums of squares are taken around means of small parts, so large
pictures lose no digits.
"""

import triton
import triton.language as tl


@triton.jit
def group_sums(
    x,
    means,
    squares,
    pixels,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Program (part, picture) sums up TILES tiles of ROWS pixels, channel by channel.

    Args:
        x: `(pictures, pixels, CHANNELS)`.
        means: Out: mean of each part, float32 `(pictures, parts, CHANNELS)`.
        squares: Out: sum of the squared distances from that mean, as `means`.
        pixels: Of a picture.
        CHANNELS: Of a pixel.
        WIDTH: CHANNELS, padded to a power of two.
        ROWS: Pixels of a tile.
        TILES: Of a part.
    """
    part, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    real = channel < CHANNELS
    x += picture * pixels * CHANNELS
    mean = tl.zeros((WIDTH,), tl.float32)
    square = tl.zeros((WIDTH,), tl.float32)
    count = 0.0
    for tile in range(0, TILES):
        row = (part * TILES + tile) * ROWS + tl.arange(0, ROWS)
        valid = (row < pixels)[:, None] & real[None, :]
        at = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        one = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
        more = tl.minimum(tl.maximum(pixels - (part * TILES + tile) * ROWS, 0), ROWS).to(tl.float32)
        own = tl.sum(one, 0) / tl.maximum(more, 1.0)
        away = tl.where(valid, one - own[None, :], 0.0)
        together = tl.maximum(count + more, 1.0)
        apart = own - mean
        square += tl.sum(away * away, 0) + apart * apart * (count * more / together)
        mean += apart * (more / together)
        count += more
    at = (picture * tl.num_programs(0) + part) * CHANNELS + channel
    tl.store(means + at, mean, mask=real)
    tl.store(squares + at, square, mask=real)


@triton.jit
def group_scales(
    means,
    squares,
    weight,
    bias,
    scales,
    shifts,
    pixels,
    parts,
    eps,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """Program (group, picture) computes what its GROUP channels are multiplied by, and what is then added.

    Args:
        means: As `group_sums` wrote them.
        squares: As `group_sums` wrote them.
        weight: `(CHANNELS,)`.
        bias: `(CHANNELS,)`.
        scales: Out: factors, float32 `(pictures, CHANNELS)`.
        shifts: Out: what is added, as `scales`.
        pixels: Of a picture.
        parts: Of a picture.
        eps: Added to the variance.
        CHANNELS: Of a pixel.
        GROUP: Channels of a group.
        WIDTH: GROUP, padded to a power of two.
        PARTS: `parts`, padded to a power of two.
        PART: Pixels of a part.
    """
    group, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    inside = tl.arange(0, WIDTH)
    channel = group * GROUP + inside
    part = tl.arange(0, PARTS)
    valid = (part < parts)[:, None] & (inside < GROUP)[None, :]
    at = (picture * parts + part[:, None]) * CHANNELS + channel[None, :]
    mean = tl.load(means + at, mask=valid, other=0.0)
    square = tl.load(squares + at, mask=valid, other=0.0)
    count = tl.minimum(tl.maximum(pixels - part * PART, 0), PART).to(tl.float32)[:, None]
    numbers = pixels.to(tl.float32) * GROUP
    whole = tl.sum(tl.sum(tl.where(valid, mean * count, 0.0), 1), 0) / numbers
    away = tl.where(valid, mean - whole, 0.0)
    variance = tl.sum(tl.sum(square + away * away * count, 1), 0) / numbers
    real = inside < GROUP
    scale = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32) * tl.rsqrt(variance + eps)
    shift = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32) - whole * scale
    tl.store(scales + picture * CHANNELS + channel, scale, mask=real)
    tl.store(shifts + picture * CHANNELS + channel, shift, mask=real)


@triton.jit
def group_apply(
    x,
    scales,
    shifts,
    out,
    pixels,
    SWISH: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (tile, picture) normalises ROWS pixels.

    Args:
        x: `(pictures, pixels, CHANNELS)`.
        scales: As `group_scales` wrote them.
        shifts: As `group_scales` wrote them.
        out: As `x`, written.
        pixels: Of a picture.
        SWISH: Whether swish follows.
        CHANNELS: Of a pixel.
        WIDTH: CHANNELS, padded to a power of two.
        ROWS: Pixels of a tile.
    """
    picture = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    real = channel < CHANNELS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = (row < pixels)[:, None] & real[None, :]
    at = (picture * pixels + row[:, None]) * CHANNELS + channel[None, :]
    scale = tl.load(scales + picture * CHANNELS + channel, mask=real, other=0.0)
    shift = tl.load(shifts + picture * CHANNELS + channel, mask=real, other=0.0)
    one = tl.load(x + at, mask=valid, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if SWISH:
        one = one / (1.0 + tl.exp(-one))
    tl.store(out + at, one.to(out.dtype.element_ty), mask=valid)
