"""Files in the layouts that were released, with contents of our own: what `wallaroo convert` reads."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from wallaroo.model.checkpoint import expected_shapes
from wallaroo.model.config import DecoderConfig, ModelConfig, VisionConfig

PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
}


def flat_config(decoder: DecoderConfig, vision: VisionConfig) -> dict:
    """`config.json` in the manner of Qwen2.5-VL-7B-Instruct: text fields at the top."""
    text = dataclasses.asdict(decoder)
    sections = list(text.pop("mrope_section"))
    tower = dataclasses.asdict(vision)
    tower["in_chans"] = tower.pop("in_channels")
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **text,
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "vision_config": {**tower, "spatial_patch_size": 14},
    }


def write_backbone(folder: Path, config: dict, tokenizer_json: str) -> Path:
    """A backbone folder without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    return folder


def write_wallaroo(file: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """The `.ckpt`; tensors by their published names."""
    torch.save({"epoch": 1, "global_step": 1000, "state_dict": dict(tensors)}, file)
    return file


def write_vq(file: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """The image tokenizer's `.pt`; tensors by their published names."""
    torch.save({"model": dict(tensors)}, file)
    return file


def split(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A checkpoint's tensors as the two published files have them: Wallaroo's, the image tokenizer's."""
    wallaroo, vq = {}, {"quantize.codebook_used": torch.zeros(65536)}
    for name, tensor in tensors.items():
        (vq if name.startswith("vq.") else wallaroo)[_published_name(name)] = tensor
    return wallaroo, vq


def _published_name(name: str) -> str:
    for ours, theirs in (
        ("model.visual.", "wallaroo.visual."),
        ("model.language_model.", "wallaroo.model."),
        ("lm_head.", "wallaroo.lm_head."),
        ("gen_input_adapter.", "gen_input_adpater."),
        ("edit_input_adapter.", "edit_input_adpater."),
        ("vq.", ""),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def zeros(config: ModelConfig) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors. Fresh zeros take no memory until somebody writes to them."""
    return {name: torch.zeros(shape) for name, shape in expected_shapes(config).items()}
