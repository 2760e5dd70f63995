"""The operator between convolutions of the image tokenizer, for pictures whose channels lie together."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wallaroo.model.cuda.operators import padded, register

TILE = 8192
"""Numbers that a program holds at once."""
TILES = 4
"""Tiles of a program that sums. Constant, so a picture's sums are the same in any batch."""


def group_norm(norm: nn.GroupNorm, x: Tensor, swish: bool) -> Tensor:
    """Group norm of pictures, by three kernels. Equals `nn.GroupNorm`, then `F.silu` if `swish`.

    Args:
        norm: Groups, weight, bias and epsilon.
        x: `(B, C, H, W)` in the layout `channels_last`.
        swish: Whether swish follows.

    Returns:
        As x.
    """
    out = torch.empty_like(x)
    assert norm.weight is not None and norm.bias is not None
    torch.ops.wallaroo.group_norm(
        _pixels(x), norm.weight, norm.bias, norm.num_groups, norm.eps, swish, _pixels(out)
    )
    return out


def _pixels(x: Tensor) -> Tensor:
    """`(B, H * W, C)`."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _group_norm_plain(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, swish: bool, out: Tensor
) -> None:
    normed = F.group_norm(x.mT, groups, weight, bias, eps)
    out.copy_((F.silu(normed) if swish else normed).mT)


def _group_norm_launch(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, swish: bool, out: Tensor
) -> None:
    from wallaroo.model.cuda import group_norm_kernels as kernels

    pictures, pixels, channels = x.shape
    width = padded(channels)
    rows = max(1, TILE // width)
    parts = -(-pixels // (rows * TILES))
    means, squares = (
        torch.empty(pictures, parts, channels, device=x.device, dtype=torch.float32) for _ in range(2)
    )
    scales, shifts = (torch.empty(pictures, channels, device=x.device, dtype=torch.float32) for _ in range(2))
    shape = {"CHANNELS": channels, "num_warps": 8}
    kernels.group_sums[parts, pictures](
        x, means, squares, pixels, WIDTH=width, ROWS=rows, TILES=TILES, **shape
    )  # fmt: skip
    group = channels // groups
    kernels.group_scales[groups, pictures](
        means, squares, weight, bias, scales, shifts, pixels, parts, eps,
        GROUP=group, WIDTH=padded(group), PARTS=padded(parts), PART=rows * TILES, **shape,
    )  # fmt: skip
    kernels.group_apply[-(-pixels // rows), pictures](
        x, scales, shifts, out, pixels, SWISH=swish, WIDTH=width, ROWS=rows, **shape
    )  # fmt: skip


register(
    "group_norm(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool swish, Tensor(a!) out)",
    _group_norm_plain,
    _group_norm_launch,
    launches=3,
)
