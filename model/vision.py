"""The vision tower: Qwen2.5-VL's own module from transformers, built from our configuration.

Knows nothing of prompts; where its embeddings go is the caller's matter.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.config import VisionConfig

if TYPE_CHECKING:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel


def vision_tower(config: VisionConfig) -> "Qwen2_5_VisionTransformerPretrainedModel":
    """The tower on the meta device: its weights are still to be loaded, with `load_state_dict(assign=True)`.

    The rotary table, which no checkpoint holds, is real and on the CPU.
    """
    # Here, not above: transformers takes seconds to import, and text to image does without.
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    theirs = Qwen2_5_VLVisionConfig(**dataclasses.asdict(config))
    with torch.device("meta"):
        tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(theirs, attn_implementation="sdpa")
    with torch.device("cpu"):
        tower.rotary_pos_emb = type(tower.rotary_pos_emb)(tower.config)
    return tower.eval()


def encode_image(
    tower: "Qwen2_5_VisionTransformerPretrainedModel", patches: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Normalised patches [n, 1176] of one picture and their grid (h/14, w/14) -> embeddings [n / 4, H]."""
    shape = torch.tensor([[1, *grid]], device=patches.device)
    return tower(patches.to(tower.dtype), grid_thw=shape).pooler_output
