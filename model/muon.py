"""Muon: gradient descent whose steps for a matrix have singular values of about one (Jordan et al. 2024).

torch's own version multiplies in bfloat16, which is hundreds of times slower on CPUs without such units.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
OUTSIDE = ("embed_tokens.weight", "lm_head.weight", "image_head.2.weight")
"""Name endings of matrices that are tables with a row per token: their rows do not act together."""


def takes(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon trains a parameter: a matrix that is no table of tokens.

    Args:
        name: Of the parameter.
        parameter: The parameter.

    Returns:
        True if Muon trains it.
    """
    return parameter.dim() == 2 and not name.endswith(OUTSIDE)


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix `(m, n)` with all its singular values brought near one, by Newton-Schulz iterations."""
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.mT if tall else matrix
    wide = wide / wide.norm().clamp_min(1e-7)
    first, third, fifth = COEFFICIENTS
    for _ in range(ROUNDS):
        square = wide @ wide.mT
        wide = first * wide + (third * square + fifth * square @ square) @ wide
    return wide.mT if tall else wide


class Muon(torch.optim.Optimizer):
    """Muon, for matrices.

    A step is as long as one of AdamW tends to be at the same rate: on average each number moves by a fifth of
    the rate (Liu et al. 2025, section 2.2).

    Args:
        parameters: The matrices.
        lr: Learning rate.
        momentum: Share of the mean gradient that stays in each step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves each matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["mean"] = torch.zeros_like(matrix)
                mean = state["mean"].lerp_(matrix.grad, 1 - group["momentum"])
                # As Nesterov has it: the mean as it will be once this gradient comes again.
                ahead = torch.lerp(matrix.grad, mean, group["momentum"])
                length = 0.2 * max(matrix.shape) ** 0.5
                matrix.add_(_orthogonal_shard(ahead), alpha=-group["lr"] * length)


def _orthogonal_shard(matrix: Tensor) -> Tensor:
    """`orthogonal`, of a matrix `(m, n)` that may be spread over processes, each of which makes the whole."""
    if not hasattr(matrix, "full_tensor"):
        return orthogonal(matrix)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(matrix, DTensor)
    made = orthogonal(matrix.full_tensor())
    return distribute_tensor(made, matrix.device_mesh, matrix.placements, src_data_rank=None)
