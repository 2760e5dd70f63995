"""Our model with the synthetic weights of the published numbers."""

import copy
import dataclasses
from collections.abc import Iterator
from functools import cache

import torch

from tests.conformance import weights
from tests.conformance.published import metadata
from wallaroo.model.checkpoint import disk_tensors, empty_model
from wallaroo.model.config import DecoderConfig, ModelConfig, VisionConfig, VQConfig
from wallaroo.model.convert import rename
from wallaroo.model.vq import VQModel
from wallaroo.model.wallaroo import Wallaroo

CONTROL_TOKENS_OF_MID = {"<|end_of_line>|": "eol"}


def published_tensors(manifest: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Published name and values of every tensor of a manifest, one at a time."""
    content = metadata(manifest)
    for name, shape in content["tensors"]:
        yield name, torch.from_numpy(weights.tensor(content["salt"], name, shape))


# Models outlive the test that asks for them first, which may be in inference mode.
@cache
@torch.inference_mode(False)
def vq_model() -> VQModel:
    """The image tokenizer, full size but for its codebook."""
    with torch.device("meta"):
        vq = VQModel(VQConfig(codebook_size=metadata("vq_model")["codebook_size"]))
    vq.load_state_dict(
        {
            name: values
            for name, values in published_tensors("vq_model")
            if not name.endswith("codebook_used")
        },
        assign=True,
    )
    return vq.eval().requires_grad_(False)


@cache
def tiny(line_break: bool = True) -> Wallaroo:
    """Two layers and all three tasks; the image tokenizer is `vq_model`."""
    return _model("tiny_model") if line_break else _square(tiny())


@cache
def mid(line_break: bool = True) -> Wallaroo:
    """Eight layers, for text to image; of its image tokenizer the codebook alone means something."""
    return _model("mid_model") if line_break else _square(mid())


def _square(model: Wallaroo) -> Wallaroo:
    """The same weights without line ends."""
    square = copy.copy(model)
    square.config = dataclasses.replace(model.config, line_break=False)
    return square


def config_of(manifest: str) -> ModelConfig:
    """The configuration that a manifest describes."""
    content = metadata(manifest)
    theirs = content["config"]
    decoder = {
        field.name: theirs[field.name]
        for field in dataclasses.fields(DecoderConfig)
        if field.name != "mrope_section"
    }
    vision = {key: tuple(x) if isinstance(x, list) else x for key, x in theirs["vision_config"].items()}
    vq = content["vq"]
    ids = content["token_ids"]
    if manifest == "mid_model":
        ids = {ours: ids[name] for ours, name in CONTROL_TOKENS_OF_MID.items()}
        layers = {"channels": 8, "norm_groups": 4, "z_channels": 16}
    else:
        layers = {}
        # The published texts were continued past every stop token.
        ids = {name: number for name, number in ids.items() if name not in ("<|im_end|>", "<|endoftext|>")}
    return ModelConfig(
        decoder=DecoderConfig(**decoder, mrope_section=tuple(theirs["rope_scaling"]["mrope_section"])),
        vision=VisionConfig(**vision),
        vq=VQConfig(codebook_size=vq["codebook_size"], codebook_dim=vq["codebook_embed_dim"], **layers),
        name=manifest,
        sizes={key: tuple(size) for key, size in metadata("i2i_meta")["bucket_table"].items()},
        token_ids=ids,
    )


@torch.inference_mode(False)
def _model(manifest: str) -> Wallaroo:
    model = empty_model(config_of(manifest), None, "cpu", torch.float32).eval().requires_grad_(False)
    places = disk_tensors(model)
    tensors = {rename(name): values for name, values in published_tensors(manifest)}
    assert tensors.keys() == {name for name in places if not name.startswith("vq.")}
    for name, values in tensors.items():
        places[name].copy_(values)
    if manifest == "tiny_model":
        model.vq = vq_model()
    else:
        content = metadata(manifest)
        codebook, shape = content["vq"]["codebook_key"], content["vq"]["codebook_shape"]
        values = weights.tensor(content["salt"], codebook, shape)
        places[f"vq.{codebook}"].copy_(torch.from_numpy(values))
    return model
