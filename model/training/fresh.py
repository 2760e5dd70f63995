"""Weights to train from nothing: each tensor's numbers depend on the seed and its name alone."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wallaroo.model.checkpoint import disk_tensors, empty_model
from wallaroo.model.config import ModelConfig
from wallaroo.model.wallaroo import Wallaroo


def fresh_model(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> Wallaroo:
    """Makes a model to train from nothing; each tensor depends on `seed` and its name alone.

    Args:
        config: Of the model.
        seed: Of all weights.
        dtype: Of all weights.

    Returns:
        The model, on the CPU.
    """
    model = empty_model(config, None, "cpu", dtype)
    with torch.no_grad():
        for name, tensor in disk_tensors(model).items():
            tensor.copy_(fresh_tensor(name, tensor.shape, seed))
    return model


def fresh_tensor(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Draws a tensor: biases 0, norms 1, matrices normal with the variance of their inputs.

    Args:
        name: Its name on disk, which decides its numbers together with `seed`.
        shape: Its shape, such as `(rows, columns)`.
        seed: Of the whole model.

    Returns:
        float32 of that shape.
    """
    if name.endswith(".bias"):
        return torch.zeros(*shape)
    if len(shape) == 1:
        return torch.ones(*shape)
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
    scale = _gain(name) / math.sqrt(math.prod(shape[1:]))
    if name.endswith(("embed_tokens.weight", "quantize.embedding.weight")):
        scale = 0.3
    return torch.randn(*shape, generator=torch.Generator().manual_seed(key)) * scale


def _gain(name: str) -> float:
    """Size of a matrix's products in the units of what it is given, at the start of training."""
    if not name.startswith("vq."):
        return 0.5
    # Blocks begin close to the identity: with torch's own start the tokenizer stays at flat pictures.
    return 0.4 if name.endswith(("conv2.weight", "proj_out.weight")) else math.sqrt(2)
