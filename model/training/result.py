"""The result of a stage: a checkpoint folder or updates of LoRA, written from a model that may be sharded.

Knows nothing of steps.
"""

import itertools
import os
from pathlib import Path

import torch
from torch import Tensor

from wallaroo.model.checkpoint import TOKENIZER, disk_parts, disk_tensors, empty_model, save
from wallaroo.model.errors import InputError
from wallaroo.model.new_folder import FILE_LIST
from wallaroo.model.training import lora
from wallaroo.model.training.lm import LMLearner
from wallaroo.model.training.process import Process, whole
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.vq import VQLearner
from wallaroo.model.wallaroo import Wallaroo
from wallaroo.model.weight_files import SHARD_BYTES, shard_names

RESULT = "checkpoint"


def result_folder(recipe: Recipe) -> Path:
    """The folder of a stage's result: a checkpoint, or with `lora` its updates."""
    return Path(recipe.folder) / (lora.LORA if recipe.lora else RESULT)


def result(recipe: Recipe) -> Path | None:
    """The folder of a stage's result; None before it is finished."""
    folder = result_folder(recipe)
    return folder if (folder / (lora.ABOUT if recipe.lora else FILE_LIST)).is_file() else None


def check_result(recipe: Recipe) -> None:
    """Checks that the result of a stage has a free place, before the stage trains.

    Raises:
        InputError: The folder exists, and no stage made it.
    """
    folder = result_folder(recipe)
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(
            f"{folder} exists, and no stage made it: move it elsewhere, or name another folder in the recipe."
        )


def finish(model: Wallaroo, recipe: Recipe, process: Process) -> None:
    """Writes a stage's result unless it exists; all processes must call this together.

    A sharded model is gathered one parameter at a time. The first process writes.

    Args:
        model: Trained, sharded or whole.
        recipe: The stage.
        process: One of those that share it.
    """
    if result(recipe) is not None:
        return
    folder = result_folder(recipe)
    if recipe.lora:
        learned = {name: whole(one.detach()) for name, one in model.named_parameters() if one.requires_grad}
        if process.rank == 0:
            lora.write(folder, recipe, model.config, learned)
        return
    gathered = Gathered(model)
    if process.rank == 0:
        tokenizer = (Path(recipe.base) / TOKENIZER).read_text(encoding="utf-8")
        save(gathered.empty, model.config, tokenizer, folder, make=gathered)
    elif process.shard == "full":
        for name in itertools.chain.from_iterable(shard_names(gathered.empty, SHARD_BYTES)):
            gathered(name)


class Gathered:
    """Tensors of a model by their names on disk, gathered when they are read, with updates of LoRA added.

    Args:
        model: Sharded or whole.
        scale: Factor of its updates.

    Attributes:
        empty: Name on disk -> tensor of that shape and type, without memory.
    """

    def __init__(self, model: Wallaroo, scale: float = 0.0):
        self.config, self.scale = model.config, scale
        self.parameters = dict(model.named_parameters())
        self.places = {
            part: (name, list(parts.values()), index)
            for name in self.parameters
            if not lora.is_update(name)
            for parts in [disk_parts(name, model.config)]
            for index, part in enumerate(parts)
        }
        like = disk_tensors(empty_model(model.config, None, "meta", torch.float32))
        self.empty = {
            part: torch.empty(one.shape, dtype=self.parameters[self.places[part][0]].dtype, device="meta")
            for part, one in like.items()
        }

    def __call__(self, name: str) -> Tensor:
        parameter, rows, index = self.places[name]
        full = whole(self.parameters[parameter].detach())
        given = full if rows[index] is None else full.split(rows)[index]
        stem = parameter.removesuffix("weight")
        updates = {
            stem + part: whole(self.parameters[stem + part].detach())
            for part in (lora.DOWN, lora.UP)
            if stem + part in self.parameters
        }
        added = lora.update_of(parameter, self.config, updates, self.scale)
        return given.float() + added[name] if name in added else given


def for_samples(learner: "VQLearner | LMLearner", recipe: Recipe, process: Process) -> Wallaroo | None:
    """Gathers a model to draw samples; all processes must call this together.

    Args:
        learner: Of the stage.
        recipe: The stage.
        process: One of those that share it.

    Returns:
        The model in the first process; None in others, and for the image tokenizer.
    """
    if isinstance(learner, VQLearner):
        return None
    model = learner.module.model
    if process.shard == "none" and not recipe.lora:
        return model if process.rank == 0 else None
    gathered, task = Gathered(model, recipe.lora_scale), "generate"
    made = empty_model(model.config, task, process.device if process.rank == 0 else "meta", torch.float32)
    with torch.no_grad():
        for name, tensor in disk_tensors(made).items():
            full = gathered(name)
            if process.rank == 0:
                tensor.copy_(full)
    return made.eval() if process.rank == 0 else None
