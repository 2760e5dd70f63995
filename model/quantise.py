"""Lossy weights: the matrices of the decoder's layers in 8 bits, by torchao.

Knows nothing of how the decoder is used. Nothing else needs torchao.
"""

from typing import TYPE_CHECKING

from wallaroo.model.errors import InputError

if TYPE_CHECKING:
    from wallaroo.model.wallaroo import Wallaroo

WEIGHTS = ("int8", "fp8")
"""int8: one scale a row, multiplied in the model's own type, so smaller but not faster. fp8: activations too,
one scale a token, which a GPU multiplies faster."""

FP8_CAPABILITY = (8, 9)
"""First compute capability of CUDA devices that multiply fp8."""


def quantise(model: "Wallaroo", weights: str) -> str:
    """Replaces the decoder's matrices, in place, by those that `weights` names; gives the name and version
    of what rounded them.

    A token's numbers still depend on no other token. Raises InputError if torchao is not installed or the
    device does not have fp8.
    """
    # Here, not above: a run's configuration names the kinds, in processes that need no torch.
    import torch

    device = model.device
    if weights == "fp8" and not (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    ):
        raise InputError(
            f"weights is fp8, but {device.type} is no GPU that multiplies fp8: choose int8, or leave it out."
        )
    try:
        import torchao
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8WeightOnlyConfig,
            PerRow,
            quantize_,
        )
    except ImportError:
        raise InputError(
            f"weights is {weights}, which needs torchao, but it is not installed where replicas run: "
            f"install the extra 'quant', or leave weights out."
        ) from None
    if weights == "int8":
        config = Int8WeightOnlyConfig()
    else:
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(model.language_model, config)
    if device.type == "cuda":
        # What the replaced weights held counts as free when slots are chosen.
        torch.cuda.empty_cache()
    return f"{weights}, torchao {torchao.__version__}"
