"""The vision tower: Qwen2.5-VL's own module from transformers, built from our configuration.

Knows nothing of prompts: the caller places the embeddings.
"""

import dataclasses
import itertools
from collections import defaultdict
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wallaroo.model.config import VisionConfig
from wallaroo.model.cuda.transfer import to_device

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


def embed_picture(
    tower: "Qwen2_5_VisionTransformerPretrainedModel", patches: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Embeds one picture with the vision tower.

    Args:
        tower: The vision tower.
        patches: Normalised, [n, 1176].
        grid: Rows and columns of patches, (h/14, w/14).

    Returns:
        Embeddings [n / 4, H].
    """
    # The tower reads the grid and the ends of its windows on the host, so there they stay.
    shape = torch.tensor([[1, *grid]])
    plan = tower_plan(cast(VisionConfig, tower.config), shape)
    for name in ("position_ids", "window_index"):
        plan[name] = to_device(plan[name].numpy(), patches.device)
    return tower(patches.to(tower.dtype), grid_thw=shape, **plan).pooler_output


BY_LENGTH = "flash_by_length"
"""Name of `attend_by_length` for transformers, which gives all windows at once where it reads `flash`."""


def take_many(tower: "Qwen2_5_VisionTransformerPretrainedModel") -> None:
    """Makes the tower fast for many pictures at once. Otherwise each window is one kernel call."""
    from transformers import AttentionInterface

    AttentionInterface.register(BY_LENGTH, attend_by_length)
    tower.config._attn_implementation = BY_LENGTH


def attend_by_length(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, cu_seq_lens_q: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention within windows, one call for all windows of a length.

    Args:
        module: Not used; transformers gives it.
        q: `(1, heads, n, head_dim)`.
        k: As `q`.
        v: As `q`.
        cu_seq_lens_q: Ends of the windows, `(windows + 1,)`, from 0.
        scaling: Of the scores.

    Returns:
        `(1, n, heads, head_dim)`, and None for the weights.
    """
    ends = cu_seq_lens_q.tolist()
    starts: dict[int, list[int]] = defaultdict(list)
    for start, end in itertools.pairwise(ends):
        starts[end - start].append(start)
    out = torch.empty_like(v[0].transpose(0, 1))
    for length, places in starts.items():
        index = torch.tensor(places, device=q.device).unsqueeze(1) + torch.arange(length, device=q.device)
        # (windows, heads, length, head_dim)
        query, key, value = (x[0][:, index].transpose(0, 1) for x in (q, k, v))
        made = F.scaled_dot_product_attention(query, key, value, scale=scaling)
        out = out.index_copy(0, index.flatten(), made.transpose(1, 2).flatten(0, 1).to(out.dtype))
    return out.unsqueeze(0), None


def tower_plan(config: VisionConfig, grids: Tensor) -> dict[str, Tensor]:
    """Computes what the tower derives from the grids of its pictures. On the host this takes longer than the
    tower on a GPU.

    Args:
        config: Of the tower.
        grids: int64 `(B, 3)`: frames, rows and columns of patches.

    Returns:
        Name of the tower's argument -> tensor.
    """
    from transformers import vision_utils as theirs

    merge, patch = config.spatial_merge_size, config.patch_size
    index, windows = theirs.get_vision_window_index(grids, merge, config.window_size, patch)
    return {
        "position_ids": theirs.get_vision_position_ids(grids, merge),
        "window_index": index,
        "cu_window_seqlens": windows,
    }
