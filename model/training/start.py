"""The model that a stage starts with: weights of a checkpoint, of another part, or drawn by seed."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from wallaroo.model.checkpoint import check, empty_model, load_config, mapped_tensors
from wallaroo.model.config import ModelConfig
from wallaroo.model.errors import InputError
from wallaroo.model.tensor_shapes import expected_shapes
from wallaroo.model.training import lora
from wallaroo.model.training.fresh import fresh_tensor
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.sharding import fill
from wallaroo.model.wallaroo import Wallaroo


def stage_config(base: ModelConfig, recipe: Recipe) -> ModelConfig:
    """The configuration of a stage's result.

    Args:
        base: Configuration of the recipe's base.
        recipe: The stage.

    Returns:
        Configuration of layout `train`; square stages have neither line ends nor indicators.
    """
    changes: dict[str, Any] = {"layout": "train", "trained_tokens": base.trained_tokens | recipe.lengths}
    if recipe.tasks:
        changes["tasks"] = recipe.tasks
    if recipe.semantic_pixels:
        for name in ("edit_pixels", "understand_pixels"):
            changes[name] = (getattr(base, name)[0], recipe.semantic_pixels)
    if recipe.size:
        changes |= {"sizes": {"1.0": (recipe.size, recipe.size)}, "line_break": False}
    return dataclasses.replace(base, **changes)


def start_model(recipe: Recipe) -> Wallaroo:
    """Makes the model that a stage starts with, see `start_weights`.

    Args:
        recipe: The stage.

    Returns:
        The model in float32 on the CPU.

    Raises:
        InputError: As `check_start`.
    """
    model = empty_start(recipe, "cpu")
    fill(model, start_weights(recipe, model.config), recipe.seed)
    return model


def empty_start(recipe: Recipe, device: str) -> Wallaroo:
    """Makes the model of a stage without its weights, with updates if the recipe has `lora`.

    Args:
        recipe: The stage.
        device: Of the model.

    Returns:
        The model in float32.

    Raises:
        InputError: As `check_start`.
    """
    model = empty_model(check_start(recipe), None, device, torch.float32)
    if recipe.lora:
        lora.add(model, recipe)
    return model


def start_weights(recipe: Recipe, config: ModelConfig) -> Callable[[str], Tensor]:
    """Finds the weights that a stage starts with.

    They are those of the recipe's start, and for `copied` parts those of another part. Tensors in neither are
    drawn by seed.

    Args:
        recipe: The stage.
        config: Of its model.

    Returns:
        Name on disk -> tensor, which is read only when asked for.
    """
    shapes, given = expected_shapes(config), mapped_tensors(recipe.start or recipe.base)

    def read(name: str) -> Tensor:
        part, _, rest = name.partition(".")
        if part in recipe.copied:
            name = f"{recipe.copied[part]}.{rest}"
        return given[name] if name in given else fresh_tensor(name, shapes[name], recipe.seed)

    return read


def _of_part(names: Iterable[str], part: str) -> list[str]:
    return [name for name in names if name.startswith(f"{part}.")]


def check_start(recipe: Recipe) -> ModelConfig:
    """Checks base and start of a recipe without reading weights.

    Args:
        recipe: The stage.

    Returns:
        The configuration of the stage's result.

    Raises:
        InputError: Base or start is no checkpoint, start lacks a tensor, they differ in a tensor's shape, or
            a part cannot be copied to another.
    """
    config, start = stage_config(load_config(recipe.base), recipe), recipe.start or recipe.base
    mine = expected_shapes(config)
    for name, shape in expected_shapes(check(start)).items():
        if mine.get(name, shape) != shape:
            raise InputError(
                f"Tensor '{name}' of {start} is {list(shape)}, but this stage needs {list(mine[name])}; "
                f"start from a checkpoint of the same architecture."
            )
    for part, other in recipe.copied.items():
        shapes, others = (
            {name.removeprefix(one): mine[name] for name in _of_part(mine, one)} for one in (part, other)
        )
        if not shapes or shapes != others:
            parts = sorted({name.split(".")[0] for name in mine})
            raise InputError(
                f"The recipe's copied has {part} = {other!r}, but both must be parts of the stage's model "
                f"with tensors of the same shapes; it has {', '.join(parts)}."
            )
    return config
