"""Low-rank updates of the decoder's matrices (LoRA, Hu et al. 2021): few numbers learn, the rest stays.

    FOLDER/lora/lora.json             the recipe, and what the updates are updates of
    FOLDER/lora/config.json           of the checkpoint that `merge` writes
    FOLDER/lora/updates.safetensors   the updates, and what else has learned

Knows nothing of losses and steps.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wallaroo.model.checkpoint import CONFIG, disk_parts, model_digest
from wallaroo.model.config import ModelConfig
from wallaroo.model.training.fresh import fresh_tensor
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.wallaroo import Wallaroo
from wallaroo.model.weight_files import new_folder, write_file, write_safetensors

LORA = "lora"
ABOUT = "lora.json"
UPDATES = "updates.safetensors"

DOWN, UP = "lora_down", "lora_up"


class LowRank(nn.Linear):
    """A linear layer with an update of low rank beside its weight.

    Args:
        linear: Whose weight and bias it takes over.
        rank: Of the update.
        scale: Its factor.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        place = linear.weight.device
        self.lora_down = nn.Parameter(torch.empty(rank, self.in_features, device=place))
        self.lora_up = nn.Parameter(torch.empty(self.out_features, rank, device=place))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs `(n, outputs)` for inputs `(n, inputs)`."""
        update = F.linear(F.linear(x, self.lora_down.to(x.dtype)), self.lora_up.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + self.scale * update


def add(model: Wallaroo, recipe: Recipe) -> None:
    """Gives the decoder's layers updates of the recipe's rank, not yet drawn."""
    for layer in model.language_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name in recipe.lora_targets:
                if hasattr(part, name):
                    setattr(part, name, LowRank(getattr(part, name), recipe.lora, recipe.lora_scale))


def is_update(name: str) -> bool:
    """Whether a parameter belongs to an update, by its name."""
    return name.endswith((DOWN, UP))


def update_of(
    name: str, config: ModelConfig, updates: Mapping[str, Tensor], scale: float
) -> Mapping[str, Tensor]:
    """What an update adds to the tensors of a parameter.

    Args:
        name: Of the parameter that is updated, such as `...qkv_proj.weight`.
        config: Of the model.
        updates: Parameters of updates by their names, `(rank, inputs)` and `(outputs, rank)`.
        scale: Factor of all updates.

    Returns:
        Name on disk -> float32 `(rows, inputs)`; nothing if the parameter has no update.
    """
    stem = name.removesuffix("weight")
    if stem == name or f"{stem}{DOWN}" not in updates:
        return {}
    whole = scale * (updates[f"{stem}{UP}"].float() @ updates[f"{stem}{DOWN}"].float())
    parts = disk_parts(name, config)
    sizes = [len(whole) if rows is None else rows for rows in parts.values()]
    return dict(zip(parts, whole.split(sizes), strict=True))


def write(folder: str | Path, recipe: Recipe, config: ModelConfig, learned: Mapping[str, Tensor]) -> None:
    """Writes what a stage with updates has learned, whole or not at all.

    Args:
        folder: To write, which must not exist yet or be empty.
        recipe: The stage.
        config: Of the model that it makes.
        learned: Parameters that learn, by their names.
    """
    start = recipe.start or recipe.base
    about = {"format": 1, "start_digest": model_digest(start), "recipe": dataclasses.asdict(recipe)}
    with new_folder(folder) as made:
        write_safetensors(made / UPDATES, learned, dict.fromkeys(learned))
        write_file(made / CONFIG, [json.dumps(config.to_dict(), indent=1).encode()])
        write_file(made / ABOUT, [json.dumps(about, indent=1).encode()])


def drawn(name: str, shape: Any, seed: int) -> Tensor:
    """An update's parameter before the first step, `(rows, columns)`: the second of the two is zero."""
    return torch.zeros(*shape) if name.endswith(UP) else fresh_tensor(name, shape, seed)
