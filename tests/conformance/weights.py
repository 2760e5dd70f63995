"""The synthetic weights behind the published numbers, from the description of their recipe.

A tensor is fixed by a salt, its name and its shape: the salt and name seed a Philox generator, whose
normal numbers are scaled so that activations neither die nor explode.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

NORM_SPREAD = 0.1
BIAS_SPREAD = 0.1

GAINS = {
    "gen_image_head.2.weight": 4.0,
    "edit_image_head.2.weight": 4.0,
    "lm_head.weight": 2.0,
    **{
        f"{adapter}.{layer}.weight": 2.0
        for adapter in ("gen_input_adpater", "edit_input_adpater", "pixel_adapter")
        for layer in (0, 2)
    },
    "q_proj.weight": 1.5,
    "k_proj.weight": 1.5,
    "decoder.conv_out.weight": 0.6,
}
"""End of a matrix's name -> gain; all other matrices have 1."""

UNIT_NORMAL = ("embed_tokens.weight", "quantize.embedding.weight")
ZERO = "codebook_used"


def mean_and_spread(name: str, shape: Sequence[int]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor."""
    if name.endswith(ZERO):
        return 0.0, 0.0
    if len(shape) == 1:
        return (0.0, BIAS_SPREAD) if name.endswith(".bias") else (1.0, NORM_SPREAD)
    if name.endswith(UNIT_NORMAL):
        return 0.0, 1.0
    gain = next((gain for end, gain in GAINS.items() if name.endswith(end)), 1.0)
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


def tensor(salt: str, name: str, shape: Sequence[int]) -> np.ndarray:
    """One tensor, float32; the arithmetic before the last rounding is in float64."""
    mean, spread = mean_and_spread(name, shape)
    if spread == 0:
        return np.full(shape, mean, np.float32)
    key = int.from_bytes(hashlib.sha256(f"{salt}:{name}".encode()).digest()[:8], "big")
    numbers = np.random.Generator(np.random.Philox(key=key)).standard_normal(math.prod(shape))
    return (mean + spread * numbers).astype(np.float32).reshape(shape)


def digest(values: np.ndarray) -> str:
    """sha256 of the values as little-endian float32, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(values, "<f4").tobytes()).hexdigest()
