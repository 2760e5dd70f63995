"""A checkpoint with the low-rank updates of a stage added to its weights, one tensor at a time."""

import dataclasses
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from wallaroo.model.checkpoint import CONFIG, TOKENIZER, check, disk_parts, mapped_tensors, model_digest, save
from wallaroo.model.config import ModelConfig
from wallaroo.model.errors import InputError
from wallaroo.model.tensor_shapes import expected_shapes
from wallaroo.model.training.lora import ABOUT, DOWN, LORA, UPDATES, is_update, update_of
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.start import start_weights


def merge(
    folder: str | Path,
    output: str | Path,
    start: str | Path = "",
    dtype: "torch.dtype | None" = None,
    overwrite: bool = False,
) -> None:
    """Adds updates to the weights they belong to, and writes a checkpoint, one tensor in memory at a time.

    Args:
        folder: Of a stage with `lora`, or its folder of updates.
        output: Checkpoint folder to write; it must be absent or empty, unless it may overwrite.
        start: Checkpoint that the updates belong to, by default that of the recipe.
        dtype: Of the written weights, by default that of the start.
        overwrite: Whether `output` may hold files, see `wallaroo.model.new_folder`.

    Raises:
        InputError: The folder holds no updates, or they belong to another checkpoint.
    """
    folder = Path(folder)
    if (folder / LORA / ABOUT).is_file():
        folder = folder / LORA
    try:
        about = json.loads((folder / ABOUT).read_bytes())
        updates = load_file(folder / UPDATES)
        values = about["recipe"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{folder} holds no updates of LoRA ({error}); give the folder of a stage that has `lora`."
        ) from None
    recipe = Recipe.from_dict(values)
    where = str(start or recipe.start or recipe.base)
    recipe = dataclasses.replace(recipe, base=where, start=where)
    for origin in (where, str(folder)):
        if os.path.realpath(output) == os.path.realpath(origin):
            raise InputError(f"{output} is read, so it cannot be written; name another folder.")
    check(where)
    if model_digest(where) != about["start_digest"]:
        raise InputError(
            f"{where} is not the checkpoint that the updates of {folder} were learned on; give that with "
            f"--start."
        )
    config = ModelConfig.from_file(folder / CONFIG)
    read, stored, shapes = start_weights(recipe, config), mapped_tensors(where), expected_shapes(config)
    learned = {
        part: rows
        for name, tensor in updates.items()
        if not is_update(name)
        for part, rows in _parts(name, tensor, config).items()
    }
    targets = {
        part: name.removesuffix(DOWN) + "weight"
        for name in updates
        if name.endswith(DOWN)
        for part in disk_parts(name.removesuffix(DOWN) + "weight", config)
    }

    def make(name: str) -> Tensor:
        if name in learned:
            return learned[name]
        if name not in targets:
            return read(name)
        return read(name).float() + update_of(targets[name], config, updates, recipe.lora_scale)[name]

    empty = {
        name: torch.empty(shape, dtype=stored[name].dtype if name in stored else None, device="meta")
        for name, shape in shapes.items()
    }
    tokenizer = (Path(where) / TOKENIZER).read_text(encoding="utf-8")
    save(empty, config, tokenizer, output, dtype=dtype, make=make, overwrite=overwrite)


def _parts(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """Name on disk -> rows of a parameter."""
    parts = disk_parts(name, config)
    sizes = [len(tensor) if rows is None else rows for rows in parts.values()]
    return dict(zip(parts, tensor.split(sizes), strict=True))
