"""Which attention backend suits a device: each library is tried by a call before it is chosen."""

import functools
import importlib.util
import warnings

import torch

from wallaroo.model.attention import KEY_BLOCK, FlashAttention, Visible
from wallaroo.model.cuda import ops


def default_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The attention backend that suits a device.

    Args:
        device: Where the engine runs.
        dtype: Of the decoder.

    Returns:
        `block` on a CPU. On CUDA the first of `triton` and `flash` that works there in half precision, or
        `sdpa`.
    """
    if device.type == "cpu":
        return "block"
    return _fastest(device) if dtype in (torch.bfloat16, torch.float16) else "sdpa"


@functools.cache
def _fastest(device: torch.device) -> str:
    """Each library is tried by a call, since an installed one may not fit the driver or this torch."""
    if torch.cuda.is_available():
        refusal = ops.refusal(device)
        if not refusal:
            return "triton"
        warnings.warn(f"the engine's own kernels do not run: {refusal}", RuntimeWarning, stacklevel=3)
    if importlib.util.find_spec("flash_attn") is None:
        return "sdpa"
    try:
        importlib.import_module("flash_attn")
        q, cached = (torch.zeros(shape, device=device, dtype=torch.bfloat16) for shape in _FLASH_SHAPES)
        for visible in (
            Visible.decode(torch.ones(1, dtype=torch.int64, device=device), 1),
            Visible.prefill([0], [0], 1, device),
        ):
            FlashAttention(visible, 1, q.dtype)(q, cached, cached)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        warnings.warn(f"flash-attn is installed but does not run: {reason}", RuntimeWarning, stacklevel=3)
        return "sdpa"
    return "flash"


_FLASH_SHAPES = (1, 1, 1, 64), (1, 1, 1, KEY_BLOCK, 64)
"""Of queries and of a cache for a first call."""
