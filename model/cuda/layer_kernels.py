"""Triton kernels of `model/cuda/layers.py`, which alone imports them, since they import Triton.

They compute in float32 and round where the plain code rounds: sums of the residual before their norm, SiLU
and GELU before they are multiplied or mixed. A norm takes a whole row in one program, so a row's bits depend
on nothing but the row.
"""

import triton
import triton.language as tl


@triton.jit
def store_norm(x, weight, out, eps, index, real, SIZE: tl.constexpr):
    """Stores the RMSNorm of one row.

    Args:
        x: The row, float32 [PADDED], 0 where it is not `real`.
        weight: `(SIZE,)`.
        out: Where the row goes.
        eps: Added to the mean square.
        index: Places of the row, [PADDED].
        real: Whether a place is below SIZE, [PADDED].
        SIZE: Numbers of a row.
    """
    rms = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    w = tl.load(weight + index, mask=real, other=0.0).to(tl.float32)
    tl.store(out + index, (x * rms * w).to(out.dtype.element_ty), mask=real)


@triton.jit
def rms_norm(x, weight, out, eps, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """RMSNorm: program i takes row i.

    Args:
        x: `(n, SIZE)`.
        weight: `(SIZE,)`.
        out: As `x`, written.
        eps: Added to the mean square.
        SIZE: Numbers of a row.
        PADDED: SIZE, padded to a power of two.
    """
    row = tl.program_id(0).to(tl.int64) * SIZE
    index = tl.arange(0, PADDED)
    real = index < SIZE
    one = tl.load(x + row + index, mask=real, other=0.0).to(tl.float32)
    store_norm(one, weight, out + row, eps, index, real, SIZE)


@triton.jit
def add_rms_norm(residual, x, weight, out, eps, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Program i adds row i of x to the residual, and takes the RMSNorm of the sum.

    Args:
        residual: `(n, SIZE)`, changed.
        x: `(n, SIZE)`.
        weight: `(SIZE,)`.
        out: As `x`, written.
        eps: Added to the mean square.
        SIZE: Numbers of a row.
        PADDED: SIZE, padded to a power of two.
    """
    row = tl.program_id(0).to(tl.int64) * SIZE
    index = tl.arange(0, PADDED)
    real = index < SIZE
    before = tl.load(residual + row + index, mask=real, other=0.0).to(tl.float32)
    added = tl.load(x + row + index, mask=real, other=0.0).to(tl.float32)
    rounded = (before + added).to(residual.dtype.element_ty)
    tl.store(residual + row + index, rounded, mask=real)
    store_norm(rounded.to(tl.float32), weight, out + row, eps, index, real, SIZE)


@triton.jit
def swiglu(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """SwiGLU: program (row, block) takes BLOCK numbers of a row.

    Args:
        gate_up: Gate, then up; `(n, 2 SIZE)`.
        out: `(n, SIZE)`, written.
        SIZE: Numbers of a row of `out`.
        BLOCK: Numbers of a program.
    """
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = index < SIZE
    gate = tl.load(gate_up + row * (2 * SIZE) + index, mask=real, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * SIZE) + SIZE + index, mask=real, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * SIZE + index, (gate * up).to(dtype), mask=real)


@triton.jit
def _gelu(x, dtype: tl.constexpr):
    return (0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))).to(dtype).to(tl.float32)


@triton.jit
def guide(hidden, cfg, null_of, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Guidance after GELU: program (row, block) mixes BLOCK numbers of a row's two branches.

    Args:
        hidden: The head's first product, `(sequences, SIZE)`; the first `rows` are conditional.
        cfg: Scale, float32 `(rows, 1)`.
        null_of: int64 `(rows,)`, the sequence of each row's null branch.
        out: `(rows, SIZE)`, written.
        SIZE: Numbers of a row.
        BLOCK: Numbers of a program.
    """
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = index < SIZE
    dtype = out.dtype.element_ty
    scale = tl.load(cfg + row)
    branch = _gelu(tl.load(hidden + row * SIZE + index, mask=real, other=0.0).to(tl.float32), dtype)
    other = tl.load(null_of + row) * SIZE
    null = _gelu(tl.load(hidden + other + index, mask=real, other=0.0).to(tl.float32), dtype)
    tl.store(out + row * SIZE + index, (null + scale * (branch - null)).to(dtype), mask=real)
