"""How far apart two float32 calculations of one number may be: what tolerances of tests follow from."""

import math

import numpy as np
from torch import Tensor, nn

from wallaroo.model.wallaroo import Wallaroo

UNIT = 2.0**-24
"""The largest relative error of one float32 operation."""

NORMALISED = 3
"""The operations between a level of a picture and what the vision tower is given: scale, shift, divide."""


def sums(*modules: nn.Module) -> int:
    """The total length of the sums that a number passes on its way through modules.

    A row of a matrix, and a filter of a convolution, is one sum. Norms and softmax are left out: they are
    means, whose errors do not grow with their length.
    """
    matrices = (weight for module in modules for weight in module.parameters() if weight.dim() > 1)
    return sum(weight[0].numel() for weight in matrices)


def logit_length(model: Wallaroo, task: str) -> int:
    """The total length of the sums behind a logit of a task, those of the source picture included."""
    parts = [model.language_model]
    if task == "understand":
        parts += [model.lm_head, model.visual]
    else:
        parts += model.image_parts(task)
    if task == "edit":
        parts += [model.visual, model.vq.encoder, model.vq.quant_conv, model.pixel_adapter]
    return sums(*parts)


def spread(values: np.ndarray | Tensor | float, length: int) -> float:
    """How far apart two float32 calculations are typically (root mean square).

    CPU kernels add the terms of a sum in an order of their own, which changes with the instruction set, the
    shapes and the threads. Each addition rounds its partial sum, by 0.4 units in the root mean square. Terms
    of random signs make partial sums that grow with the root of their number, so a sum of n terms, each in
    its turn, is off by 0.4 * sqrt(n / 2) units of its own size, and two such sums differ by 0.4 * sqrt(n).
    The errors of sums that follow each other are independent: their squares add up, which makes
    0.4 * sqrt(length) over all of them. Vector kernels keep several partial sums, and err less.

    Args:
        values: What is compared, of any shape; or the root mean square of it.
        length: Total length of the sums behind each number, for instance `sums(...)`.

    Returns:
        The difference, in units of the values.
    """
    if not isinstance(values, float):
        values = math.sqrt(np.square(np.asarray(values, np.float64)).mean())
    return 0.4 * UNIT * values * math.sqrt(length)


def rounding(values: np.ndarray | Tensor | float, length: int) -> float:
    """The largest difference that rounding explains between two float32 calculations; see `spread`.

    Of a million numbers the one that is off most is off by 5 times what is typical. Norms, softmax and steep
    layers stretch errors, for which there is a factor of 8.

    The bound is relative to the size of the values as a whole, not of each: where large terms cancel, a
    number near zero is as far off as its neighbours.
    """
    return 5 * 8 * spread(values, length)


def nearest_tolerance(latent: float, numbers: int) -> float:
    """How far the squared distances of a latent to two entries of the codebook may move against each other.

    All are of unit length, so that the two differ by twice the product of the latent with the difference
    of the entries, which is at most 2 long. latent: tolerance of each of its `numbers`.
    """
    return 2 * 2 * math.sqrt(numbers) * latent
