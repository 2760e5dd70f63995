"""How processes share a model: each holds it whole (DDP), or a shard, gathered layer by layer (FSDP2).

Knows nothing of losses and steps.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wallaroo.model.checkpoint import disk_parts
from wallaroo.model.training import lora
from wallaroo.model.training.process import Process
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.wallaroo import Wallaroo


def layers_of(model: Wallaroo) -> list[nn.Module]:
    """The units that are gathered and recomputed: decoder layers and blocks of the vision tower."""
    layers = list(model.language_model.layers)
    return layers + (list(model.visual.blocks) if model.visual is not None else [])


def recompute(model: Wallaroo) -> None:
    """Makes each layer keep its input alone, and compute the rest again in the backward pass."""
    for layer in layers_of(model):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def shard(module: nn.Module, model: Wallaroo, process: Process, half: bool) -> None:
    """Shards the parameters of a model that learn, and allocates all.

    Parameters and optimizer are float32 shards; a layer is gathered in bfloat16 (if `half`) when it is
    computed. What does not learn is whole on each process, in bfloat16 except the image tokenizer.

    Args:
        module: Whose forward is called, with the model in it; `requires_grad` marks what learns.
        model: On the meta device.
        process: Of a process group.
        half: Whether layers compute in bfloat16.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kind = torch.bfloat16 if half else None
    frozen = {one for one in model.parameters() if not one.requires_grad}
    for name, parameter in model.named_parameters():
        if half and parameter in frozen and not name.startswith("vq."):
            parameter.data = parameter.data.to(torch.bfloat16)
    mesh = init_device_mesh(process.device.partition(":")[0], (process.world,))
    policy = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32)
    for layer in layers_of(model):
        if any(one.requires_grad for one in layer.parameters()):
            fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    module._apply(
        lambda one: torch.empty_like(one, device=process.device) if one.is_meta else one.to(process.device)
    )


@torch.no_grad()
def fill(model: Wallaroo, read: Callable[[str], Tensor], seed: int = 0) -> None:
    """Copies weights into a model, one parameter at a time; of a sharded one only this process's part.

    Args:
        model: Allocated, sharded or not.
        read: Name on disk -> tensor.
        seed: Of the updates of LoRA, which are drawn.
    """
    for name, parameter in model.named_parameters():
        if lora.is_update(name):
            given = lora.drawn(name, parameter.shape, seed)
        else:
            parts = [read(part) for part in disk_parts(name, model.config)]
            given = parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts])
        if hasattr(parameter, "to_local"):
            _fill_shard(parameter, given)
        else:
            parameter.copy_(given)


def _fill_shard(parameter: Any, given: Tensor) -> None:
    """Copies this process's rows of a tensor `(n, ...)` into its part of a parameter."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    if shape[0]:
        parameter.to_local().copy_(given[offset[0] : offset[0] + shape[0]])


def halves(recipe: Recipe, process: Process) -> bool:
    """Whether a stage computes products in bfloat16, by its precision.

    Args:
        recipe: The stage. `auto` means bfloat16 for the language model on GPUs.
        process: Any of its processes.

    Returns:
        True if it does.
    """
    if recipe.part == "vq" or recipe.precision == "float32":
        return False
    return recipe.precision == "bfloat16" or process.device.startswith("cuda")


def spread(module: nn.Module, process: Process, unused: bool) -> nn.Module:
    """Wraps a module so that its gradients become the mean over all processes.

    Args:
        module: Sharded already, or whole.
        process: One of those that share the training.
        unused: Whether a step may leave out parameters that learn.

    Returns:
        The module to call.
    """
    if process.shard == "full" or not process.grouped:
        return module
    return nn.parallel.DistributedDataParallel(
        module, find_unused_parameters=unused, gradient_as_bucket_view=True
    )


@contextlib.contextmanager
def synced(module: Any, last: bool) -> Iterator[None]:
    """Exchanges gradients with other processes after the last piece of a step only.

    Args:
        module: As `spread` gives it.
        last: Whether the block computes the last piece.

    Yields:
        Nothing.
    """
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(last)
        yield
    elif last or not hasattr(module, "no_sync"):
        yield
    else:
        with module.no_sync():
            yield
