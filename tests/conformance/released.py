"""Files in the layouts that were released, with contents of our own: what `wallaroo convert` reads."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from tests.conformance.models import config_of
from tests.conformance.published import Family
from tests.conformance.qwen import vocabulary_and_merges
from wallaroo.model.checkpoint import load
from wallaroo.model.config import DecoderConfig, ModelConfig, Size, VisionConfig, VQConfig
from wallaroo.model.convert import convert
from wallaroo.model.engine.engine import Engine
from wallaroo.model.engine.options import EngineOptions
from wallaroo.model.engine.requests import Request
from wallaroo.model.prompts import Prompt
from wallaroo.model.sampling import Sampling
from wallaroo.model.tensor_shapes import expected_shapes
from wallaroo.model.tokenizer import QWEN_TOKENS, add_control_tokens, build

MIB = 2**20

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


def byte_tokenizer_json() -> str:
    """A Qwen2.5 tokenizer without merges, for vocabularies that are too small for more."""
    vocabulary, _ = vocabulary_and_merges()
    tokenizer = build({token: index for token, index in vocabulary.items() if index < 256}, [])
    add_control_tokens(tokenizer, QWEN_TOKENS)
    return tokenizer.to_str()


def small_config(**changes) -> ModelConfig:
    """An architecture in the published layout that is quickly written."""
    values = {
        "decoder": DecoderConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            mrope_section=(2, 3, 3),
        ),
        "vision": VisionConfig(
            depth=2,
            hidden_size=16,
            intermediate_size=24,
            num_heads=2,
            out_hidden_size=32,
            fullatt_block_indexes=(1,),
        ),
        "vq": VQConfig(channels=32, z_channels=8, codebook_size=24),
    }
    return ModelConfig(**{**values, **changes})


@dataclasses.dataclass
class Released:
    """Files to convert, which a test may spoil before they are written."""

    folder: Path
    wallaroo: dict[str, torch.Tensor]
    vq: dict[str, torch.Tensor]
    config: dict
    tokenizer: str

    def convert(self, **options) -> Path:
        output = self.folder / "checkpoint"
        convert(
            write_wallaroo(self.folder / "wallaroo.ckpt", self.wallaroo),
            write_vq(self.folder / "vq.pt", self.vq),
            write_backbone(self.folder / "backbone", self.config, self.tokenizer),
            output,
            **options,
        )
        return output


def engine(folder: Path, task: str) -> Engine:
    """An engine on a converted checkpoint, under the token ids that the published numbers were made with."""
    model = load(folder, task)
    like = config_of("tiny_model")
    model.config = dataclasses.replace(model.config, token_ids=like.token_ids, sizes=like.sizes)
    return Engine(model, task, EngineOptions(slots=1, group_rows=1, decode_vq=False, trace=True))


def logits(engine: Engine, request: Request) -> np.ndarray:
    (result,) = engine.run([request])
    assert not result.error and result.logits is not None
    return result.logits


def fixture_request(family: str, case: dict, size: Size | None) -> Request:
    """The prompt and forced tokens of a case, without guidance."""
    arrays = Family(family, case["case"])
    config = config_of("tiny_model")
    ids, forced = arrays["ids"], arrays["tf_tokens"]
    semantic = None
    if family != "t2i":
        start = int(np.flatnonzero(ids == config.token_ids["<|vision_start|>"])[0]) + 1
        semantic = (start, start + int(np.prod(arrays["grid"])) // 4)
    pixel = None
    if family == "i2i":
        assert semantic is not None
        pixel = np.flatnonzero(ids[: semantic[0]] == config.token_ids["<|image_pad|>"]).astype(np.int32)
    positions = arrays["pos"]
    prompt = Prompt(ids, positions[:, : len(ids)], int(positions[0, len(ids)]), semantic, pixel)
    return Request(
        case["case"],
        prompt,
        None,
        size,
        0,
        Sampling(cfg=1.0),
        semantic=arrays["seg_image"] if semantic else None,
        pixels=arrays["pixel_crop"] if family == "i2i" else None,
        max_new_tokens=len(forced),
        forced=forced,
    )


def stored(folder: Path) -> dict[str, tuple[str, list[int], str]]:
    """Tensor -> file, shape, type."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as shard:
            for name in shard.keys():  # noqa: SIM118
                piece = shard.get_slice(name)
                found[name] = (file.name, piece.get_shape(), piece.get_dtype())
    return found
