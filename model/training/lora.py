"""Low-rank updates of the decoder's matrices (LoRA, Hu et al. 2021): few parameters learn, the others stay
fixed.

    FOLDER/lora/lora.json             the recipe, and the digest of the weights that the updates belong to
    FOLDER/lora/config.json           configuration of the checkpoint that `merge` writes
    FOLDER/lora/updates.safetensors   the updates, and other parameters that have learned

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
from wallaroo.model.new_folder import new_folder
from wallaroo.model.training.fresh import fresh_tensor
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.wallaroo import Wallaroo
from wallaroo.model.weight_files import write_file, write_safetensors

LORA = "lora"
ABOUT = "lora.json"
UPDATES = "updates.safetensors"

DOWN, UP = "lora_down", "lora_up"


class LowRank(nn.Linear):
    """A linear layer with an update of low rank added to its weight.

    Args:
        linear: Gives weight and bias.
        rank: Of the update.
        scale: Factor of the update.
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
    """Adds updates to the decoder's layers, not yet drawn.

    Args:
        model: Changed in place.
        recipe: Gives rank, scale and targets.
    """
    for layer in model.language_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name in recipe.lora_targets:
                if hasattr(part, name):
                    setattr(part, name, LowRank(getattr(part, name), recipe.lora, recipe.lora_scale))


def is_update(name: str) -> bool:
    """Whether a name is that of a parameter of an update."""
    return name.endswith((DOWN, UP))


def update_of(
    name: str, config: ModelConfig, updates: Mapping[str, Tensor], scale: float
) -> Mapping[str, Tensor]:
    """Computes what an update adds to the tensors of a parameter.

    Args:
        name: Of the updated parameter, such as `...qkv_proj.weight`.
        config: Of the model.
        updates: Name -> parameter of an update, `(rank, inputs)` or `(outputs, rank)`.
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
    """Writes what a stage with updates has learned, atomically.

    Args:
        folder: To write; it must be absent or empty.
        recipe: The stage.
        config: Of the stage's result.
        learned: Name -> parameter that learned.
    """
    start = recipe.start or recipe.base
    about = {"format": 1, "start_digest": model_digest(start), "recipe": dataclasses.asdict(recipe)}
    with new_folder(folder) as made:
        write_safetensors(made / UPDATES, learned, dict.fromkeys(learned))
        write_file(made / CONFIG, [json.dumps(config.to_dict(), indent=1).encode()])
        write_file(made / ABOUT, [json.dumps(about, indent=1).encode()])


def drawn(name: str, shape: Any, seed: int) -> Tensor:
    """Draws a parameter of an update before the first step.

    Args:
        name: Of the parameter; of the two that make an update, the second is zero.
        shape: `(rows, columns)`.
        seed: Of the stage.

    Returns:
        float32 `(rows, columns)`.
    """
    return torch.zeros(*shape) if name.endswith(UP) else fresh_tensor(name, shape, seed)
