"""Causal attention within rows that are packed one behind the other, without padding.

Knows nothing of layers and losses.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wallaroo.model.attention import causal_attention

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""(q, k, v, ends, longest) -> output: q `(tokens, heads, head_dim)`, k and v `(tokens, kv_heads, head_dim)`,
ends of rows int32 `(rows + 1,)`, tokens of the longest row; output `(tokens, heads, head_dim)`."""


def row_ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where packed rows end.

    Args:
        lengths: Tokens of each row.
        device: Of the result.

    Returns:
        int32 `(rows + 1,)`, 0 first.
    """
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


@functools.cache
def find_kernel(device: torch.device, heads: int, kv_heads: int, head_dim: int) -> Kernel | None:
    """The kernel for half precision on a GPU: flash-attn's where that is installed, else torch's.

    Each is compared with attention by row before it is chosen, since a library may not fit the GPU.

    Args:
        device: On which a model learns.
        heads: Of queries.
        kv_heads: Of keys and values.
        head_dim: Of a head.

    Returns:
        The first kernel that is right, None on a CPU and where none is.
    """
    if device.type != "cuda":
        return None
    kernels = {"torch": _of_torch}
    if importlib.util.find_spec("flash_attn") is not None:
        kernels = {"flash-attn": _of_flash_attn, **kernels}
    for library, kernel in kernels.items():
        try:
            if agrees(kernel, device, heads, kv_heads, head_dim):
                return kernel
            reason = "its results differ from those of attention by row"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        warnings.warn(f"packed rows are not attended by {library}: {reason}", RuntimeWarning, stacklevel=2)
    return None


def _of_flash_attn(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)
    return out


def _of_torch(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=True)
    assert isinstance(out, Tensor)
    return out


TOLERANCE = 0.05
"""Most that numbers of a kernel may differ from those by row: bfloat16 has 8 bits, and they are about 1."""


def agrees(kernel: Kernel, device: torch.device, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether a kernel gives the outputs and gradients of attention by row, on two short rows in bfloat16.

    Args:
        kernel: To try.
        device: Where.
        heads: Of queries.
        kv_heads: Of keys and values.
        head_dim: Of a head.

    Returns:
        True if all are close.
    """
    lengths = [37, 91]
    generator = torch.Generator().manual_seed(0)
    given = [
        torch.randn(sum(lengths), count, head_dim, generator=generator).to(device, torch.bfloat16)
        for count in (heads, kv_heads, kv_heads)
    ]
    pull = torch.randn(sum(lengths), heads * head_dim, generator=generator).to(device, torch.bfloat16)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernel(q, k, v, row_ends(lengths, device), max(lengths)).flatten(1)

    def by_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(part.split(lengths) for part in (q, k, v)), strict=True)
        return torch.cat([causal_attention(*(one.unsqueeze(0) for one in row))[0] for row in parts])

    found = []
    with torch.enable_grad():
        for attend in (packed, by_row):
            inputs = [one.clone().requires_grad_() for one in given]
            out = attend(*inputs)
            out.backward(pull)
            found.append([out.detach(), *(one.grad for one in inputs)])
    return all(
        bool(torch.allclose(ours.float(), theirs.float(), atol=TOLERANCE, rtol=TOLERANCE))
        for ours, theirs in zip(*found, strict=True)
    )
