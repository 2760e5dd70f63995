"""The published 7B by shape: every tensor of its files has one place here, and every place one tensor."""

import torch

from tests.conformance.published import metadata
from wallaroo.model.checkpoint import disk_tensors
from wallaroo.model.config import ModelConfig
from wallaroo.model.convert import rename, rename_vq
from wallaroo.model.tensor_shapes import expected_shapes
from wallaroo.model.wallaroo import Wallaroo

HIDDEN, CODEBOOK, CODEBOOK_DIM = 3584, 16384, 8


def backbone() -> dict[str, tuple[int, ...]]:
    """Name -> shape of the 729 tensors of Qwen2.5-VL-7B-Instruct, by Hugging Face's own classes."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": HIDDEN,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        },
        vision_config={
            "hidden_size": 1280,
            "depth": 32,
            "intermediate_size": 3420,
            "out_hidden_size": HIDDEN,
        },
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return {name: tuple(values.shape) for name, values in model.state_dict().items()}


def published_wallaroo() -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of the 7B's `.ckpt`."""
    prefixes = {
        "model.visual.": "wallaroo.visual.",
        "model.language_model.": "wallaroo.model.",
        "lm_head.": "wallaroo.lm_head.",
    }
    shapes = {}
    for name, shape in backbone().items():
        old = next(prefix for prefix in prefixes if name.startswith(prefix))
        shapes[prefixes[old] + name.removeprefix(old)] = shape
    for head in ("gen_image_head", "edit_image_head"):
        shapes[f"{head}.0.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{head}.0.bias"] = (HIDDEN,)
        shapes[f"{head}.2.weight"] = (CODEBOOK, HIDDEN)
    for adapter in ("gen_input_adpater", "edit_input_adpater", "pixel_adapter"):
        shapes[f"{adapter}.0.weight"] = (HIDDEN, CODEBOOK_DIM)
        shapes[f"{adapter}.0.bias"] = (HIDDEN,)
        shapes[f"{adapter}.2.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{adapter}.2.bias"] = (HIDDEN,)
    return shapes


def published_vq() -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of `vq_ds16_t2i.pt`: the fixtures' but for the size of the codebook."""
    shapes = {name: tuple(shape) for name, shape in metadata("vq_model")["tensors"]}
    shapes["quantize.embedding.weight"] = (CODEBOOK, CODEBOOK_DIM)
    return shapes


def test_the_7b_maps_one_to_one():
    published = [(rename(name), shape) for name, shape in published_wallaroo().items()]
    published += [(rename_vq(name), shape) for name, shape in published_vq().items()]
    unused = [name for name, _ in published if name is None]
    assert len(unused) == 1  # `quantize.codebook_used`
    theirs = {name: shape for name, shape in published if name is not None}
    assert len(theirs) == len(published) - 1, "two published tensors have one place"
    assert len(theirs) == 729 + 2 * 3 + 3 * 4 + 343  # backbone, heads, adapters, image tokenizer

    config = ModelConfig()
    with torch.device("meta"):
        model = Wallaroo(config)
    ours = {name: tuple(values.shape) for name, values in disk_tensors(model).items()}
    assert ours == theirs
    assert expected_shapes(config) == theirs
    # Nothing of the model stands outside its named tensors.
    assert sum(x.numel() for x in model.parameters()) == sum(torch.Size(s).numel() for s in theirs.values())


def test_the_fixtures_have_the_same_layout():
    """So that what is shown on the small model holds for the names of the large one."""
    tiny = [name for name, _ in metadata("tiny_model")["tensors"]]
    for part, count in (("wallaroo.model.layers", 28), ("wallaroo.visual.blocks", 32)):
        first = [name for name in tiny if name.startswith(f"{part}.0.")]
        tiny = [name for name in tiny if not name.startswith(f"{part}.")]
        tiny += [name.replace(f"{part}.0.", f"{part}.{number}.") for name in first for number in range(count)]
    assert sorted(tiny) == sorted(published_wallaroo())
