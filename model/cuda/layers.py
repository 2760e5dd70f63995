"""Operators between the matrix products of a layer, and between those of the image head."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wallaroo.model.cuda.operators import padded, register
from wallaroo.model.decoder import RMSNorm

WIDE = 1024
"""Numbers of a row that one program takes in element-wise kernels."""


def rms_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    """RMSNorm in one kernel. Equals `RMSNorm`.

    Args:
        x: `(n, H)`.
        norm: Weight and epsilon.

    Returns:
        `(n, H)`.
    """
    out = torch.empty_like(x)
    torch.ops.wallaroo.rms_norm(x, norm.weight, norm.eps, out)
    return out


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """RMSNorm by torch.

    Args:
        x: `(n, H)`.
        weight: `(H,)`.
        eps: Added to the mean square.
        out: `(n, H)`, written.
    """
    out.copy_(F.rms_norm(x, x.shape[-1:], weight, eps))


def _rms_norm_launch(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    from wallaroo.model.cuda import layer_kernels as kernels

    n, size = x.shape
    kernels.rms_norm[(n,)](x, weight, out, eps, SIZE=size, PADDED=padded(size), num_warps=8)


register("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out)", rms_norm_plain, _rms_norm_launch)


def add_rms_norm(residual: Tensor, x: Tensor, norm: RMSNorm, out: Tensor | None = None) -> Tensor:
    """Adds x to the residual in place. Equals `residual += x`, then `RMSNorm`.

    Args:
        residual: `(n, H)`, changed.
        x: `(n, H)`.
        norm: Weight and epsilon.
        out: Where the result goes; a new tensor by default.

    Returns:
        The norm of the sum, `(n, H)`.
    """
    out = torch.empty_like(residual) if out is None else out
    torch.ops.wallaroo.add_rms_norm(residual, x, norm.weight, norm.eps, out)
    return out


def _add_rms_norm_plain(residual: Tensor, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    residual += x
    rms_norm_plain(residual, weight, eps, out)


def _add_rms_norm_launch(residual: Tensor, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    from wallaroo.model.cuda import layer_kernels as kernels

    n, size = residual.shape
    kernels.add_rms_norm[(n,)](residual, x, weight, out, eps, SIZE=size, PADDED=padded(size), num_warps=8)


register(
    "add_rms_norm(Tensor(a!) residual, Tensor x, Tensor weight, float eps, Tensor(b!) out)",
    _add_rms_norm_plain,
    _add_rms_norm_launch,
)


def swiglu(gate_up: Tensor) -> Tensor:
    """SwiGLU in one kernel. Equals `F.silu(gate) * up`, as in `MLP`.

    Args:
        gate_up: Product with both matrices, gate first; `(n, 2 I)`.

    Returns:
        `(n, I)`.
    """
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    torch.ops.wallaroo.swiglu(gate_up, out)
    return out


def _swiglu_plain(gate_up: Tensor, out: Tensor) -> None:
    gate, up = gate_up.chunk(2, dim=-1)
    torch.mul(F.silu(gate), up, out=out)


def _swiglu_launch(gate_up: Tensor, out: Tensor) -> None:
    from wallaroo.model.cuda import layer_kernels as kernels

    n, size = out.shape
    kernels.swiglu[n, -(-size // WIDE)](gate_up, out, SIZE=size, BLOCK=WIDE, num_warps=4)


register("swiglu(Tensor gate_up, Tensor(a!) out)", _swiglu_plain, _swiglu_launch)


def guide(hidden: Tensor, cfg: Tensor, null_of: Tensor) -> Tensor:
    """GELU of the image head's first product, then guidance.

    Equals `F.gelu` and `null + cfg * (branch - null)` in float32, of the first `rows` sequences.

    Args:
        hidden: The head's first product, `(n, H)`.
        cfg: Scale, float32 `(rows, 1)`.
        null_of: int64 `(rows,)`, the sequence of each row's null branch; the row's own where it has none.

    Returns:
        What the head's last matrix takes, `(rows, H)`.
    """
    out = hidden.new_empty(len(null_of), hidden.shape[1])
    torch.ops.wallaroo.guide(hidden, cfg, null_of, out)
    return out


def _guide_plain(hidden: Tensor, cfg: Tensor, null_of: Tensor, out: Tensor) -> None:
    branches = F.gelu(hidden).float()
    null = branches[null_of]
    out.copy_(null + cfg * (branches[: len(null)] - null))


def _guide_launch(hidden: Tensor, cfg: Tensor, null_of: Tensor, out: Tensor) -> None:
    from wallaroo.model.cuda import layer_kernels as kernels

    rows, size = out.shape
    kernels.guide[rows, -(-size // WIDE)](hidden, cfg, null_of, out, SIZE=size, BLOCK=WIDE, num_warps=4)


register("guide(Tensor hidden, Tensor cfg, Tensor null_of, Tensor(a!) out)", _guide_plain, _guide_launch)
