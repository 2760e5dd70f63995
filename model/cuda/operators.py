"""How the engine's operators are registered: Triton kernels on CUDA, on a CPU the plain code that they equal.

An operator writes into tensors that it is given and returns nothing. So a CUDA graph can record it, and fake
tensors, which have only shapes, can pass through it. Triton is imported when the first kernel starts, never
on a CPU. Knows nothing of what operators compute.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Operator(NamedTuple):
    """An operator of the engine."""

    plain: Callable[..., None]
    """The torch code."""
    launch: Callable[..., None]
    """Starts the kernels; takes the same arguments."""
    launches: int
    """How many kernels it starts."""


OPERATORS: dict[str, Operator] = {}
"""By their names in torch, such as `wallaroo::swiglu`."""

_LIBRARY = torch.library.Library("wallaroo", "DEF")


STRIDED = "keys", "values"
"""Arguments whose strides kernels look at; all others must be contiguous."""


def _launched(launch: Callable[..., None], names: list[str], *args: Any) -> None:
    for name, arg in zip(names, args, strict=True):
        if isinstance(arg, torch.Tensor) and name not in STRIDED and not arg.is_contiguous():
            raise ValueError(f"{name} has strides {arg.stride()}, but must be contiguous; copy it first.")
    # Triton takes the current device, which need not be that of the tensors.
    with torch.cuda.device_of(args[0]):
        launch(*args)


def register(schema: str, plain: Callable[..., None], launch: Callable[..., None], launches: int = 1) -> None:
    """Registers `torch.ops.wallaroo.<name>`.

    Args:
        schema: Without a result, such as `swiglu(Tensor x, Tensor(a!) out)`.
        plain: The operator on a CPU.
        launch: The operator on CUDA.
        launches: Kernels that `launch` starts.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(f"{schema} -> ()")
    arguments = getattr(torch.ops.wallaroo, name).default._schema.arguments
    launched = functools.partial(_launched, launch, [argument.name for argument in arguments])
    _LIBRARY.impl(name, plain, "CPU")
    _LIBRARY.impl(name, launched, "CUDA")
    torch.library.register_fake(f"wallaroo::{name}", lambda *_: None, lib=_LIBRARY)
    OPERATORS[f"wallaroo::{name}"] = Operator(plain, launched, launches)


def padded(size: int) -> int:
    """The next power of two, as kernels want the sizes of their tiles."""
    return 1 << (size - 1).bit_length()
