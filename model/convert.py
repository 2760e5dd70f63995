"""From the published files to a checkpoint folder, or to a stock Qwen2.5-VL folder.

Weights are mapped, not read: they go to the new files tensor by tensor. Knows nothing of how the model
computes.
"""

import dataclasses
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from wallaroo.model.checkpoint import save
from wallaroo.model.config import SIZES_512, TASKS, DecoderConfig, ModelConfig, VisionConfig, VQConfig
from wallaroo.model.errors import InputError
from wallaroo.model.stock import (
    PREPROCESSOR_FILE,
    check_preprocessor,
    from_stock,
    read_json,
    stock_files,
    write_stock,
)
from wallaroo.model.tensor_shapes import compare_shapes, expected_shapes
from wallaroo.model.tokenizer import Tokenizer, add_control_tokens, added_tokens, build
from wallaroo.model.weight_files import SHARD_BYTES, open_shard

if TYPE_CHECKING:
    import torch

_RENAMED = {
    "wallaroo.visual.": "model.visual.",
    "wallaroo.model.": "model.language_model.",
    "wallaroo.lm_head.": "lm_head.",
    "gen_image_head.": "gen_image_head.",
    "edit_image_head.": "edit_image_head.",
    "gen_input_adpater.": "gen_input_adapter.",  # spelt so in the published files
    "edit_input_adpater.": "edit_input_adapter.",
    "pixel_adapter.": "pixel_adapter.",
}
"""Beginning of a published name -> of our name on disk."""

_EDIT_PARTS = ("edit_image_head.", "edit_input_adapter.", "pixel_adapter.")

_IMAGE_PARTS = ("gen_image_head.", "gen_input_adapter.", *_EDIT_PARTS)
"""Names that a stock Qwen2.5-VL lacks."""

_UNUSED = "quantize.codebook_used"
"""Statistics of the image tokenizer's training."""

_EARLY_PIXELS = (12544, 254016)
"""Limits of the vision tower's pictures in training stages 2 and 3; the default is stage 4's."""


def rename(name: str) -> str | None:
    """Name on disk of a tensor of the published Wallaroo file; None if it has no such tensor."""
    for old, new in _RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def rename_vq(name: str) -> str | None:
    """Name on disk of a tensor of the published image tokenizer; None for the one that is not needed."""
    return None if name == _UNUSED else "vq." + name


def convert(
    wallaroo: str | Path,
    vq: str | Path | None,
    backbone: str | Path,
    output: str | Path,
    *,
    understanding_only: bool = False,
    layout: str = "eval",
    indicators: str = "added",
    square: int | None = None,
    dtype: "torch.dtype | None" = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder, or a stock Qwen2.5-VL folder, from the published files.

    Args:
        wallaroo: The published `.ckpt`.
        vq: LlamaGen's `vq_ds16_t2i.pt`; not needed with `understanding_only`.
        backbone: A Qwen2.5-VL folder, for configuration, tokenizer and preprocessor.
        output: Folder to write, which must not exist yet or be empty, unless it may overwrite.
        understanding_only: Write a stock Qwen2.5-VL folder with the keys, shapes and types of `backbone`.
        layout: How the checkpoint wants its prompts, see `ModelConfig`.
        indicators: How prompts give sizes, see `ModelConfig`.
        square: Side in pixels of the one size of checkpoints of stages 1 to 3.1, which separate no rows.
        dtype: Of the new files, by default as stored.
        shard_bytes: Size of a weight file.
        overwrite: Whether `output` may hold files, see `wallaroo.model.new_folder`.

    Raises:
        InputError: A file is not what it should be. Missing, unexpected and wrong-shaped tensors are named.
    """
    _refuse_backbone(output, backbone)
    published = _state_dict(wallaroo, "state_dict", "Wallaroo checkpoint")
    tensors = _renamed(published, rename)
    edits = any(name.startswith(_EDIT_PARTS) for name in tensors)
    pixels = ModelConfig.understand_pixels if edits else _EARLY_PIXELS
    if understanding_only:
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(_IMAGE_PARTS)}
        write_stock(kept, Path(backbone), output, str(wallaroo), pixels, overwrite)
        return
    if vq is None:
        raise InputError("A checkpoint for images needs the image tokenizer; give --vq vq_ds16_t2i.pt.")
    tensors |= _renamed(_state_dict(vq, "model", "image tokenizer"), rename_vq)
    decoder, vision = _architecture(Path(backbone))
    sizes = dict(SIZES_512) if square is None else {"1.0": (square, square)}
    text = _tokenizer_json(Path(backbone), added_tokens(sizes, indicators))
    config = ModelConfig(
        decoder=decoder,
        vision=vision,
        vq=_vq_config(tensors),
        layout=layout,
        indicators=indicators,
        line_break=square is None,
        tasks=TASKS if edits else ("generate", "understand"),
        sizes=sizes,
        understand_pixels=pixels,
        token_ids=Tokenizer(text).token_ids,
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    compare_shapes(shapes, expected_shapes(config), f"{wallaroo} with {vq}")
    save(tensors, config, text, output, shard_bytes, dtype, overwrite=overwrite)


def convert_start(
    backbone: str | Path,
    vq: str | Path,
    output: str | Path,
    *,
    seed: int = 0,
    indicators: str = "added",
    dtype: "torch.dtype | None" = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes the checkpoint that training stage 1 starts from: backbone and image tokenizer, all else new.

    The published code does not say how it draws image heads and adapters; here they are drawn as all new
    parts of a stage are (`wallaroo.model.training.fresh.fresh_tensor`). One tensor is in memory at a time.

    Args:
        backbone: Folder of Qwen2.5-VL with its weights.
        vq: LlamaGen's `vq_ds16_t2i.pt`.
        output: Folder to write, which must not exist yet or be empty, unless it may overwrite.
        seed: Decides the numbers of the new parts.
        indicators: Whether size indicators are tokens, see `ModelConfig`.
        dtype: Type of the written weights, by default as stored, and float32 for new parts.
        shard_bytes: Size of a weight file.
        overwrite: Whether `output` may hold files, see `wallaroo.model.new_folder`.

    Raises:
        InputError: A file is not what it should be, or tensors are missing, unexpected or wrong-shaped.
    """
    import torch

    from wallaroo.model.training.fresh import fresh_tensor

    _refuse_backbone(output, backbone)
    decoder, vision = _architecture(Path(backbone))
    tensors = _renamed(_state_dict(vq, "model", "image tokenizer"), rename_vq)
    for file_name, stored in stock_files(Path(backbone)).items():
        with open_shard(Path(backbone) / file_name, "pt") as shard:
            tensors |= {from_stock(name): shard.get_tensor(name) for name in stored}
    text = _tokenizer_json(Path(backbone), added_tokens(SIZES_512, indicators))
    config = ModelConfig(
        decoder=decoder,
        vision=vision,
        vq=_vq_config(tensors),
        layout="train",
        indicators=indicators,
        token_ids=Tokenizer(text).token_ids,
    )
    expected = expected_shapes(config)
    new = {name: shape for name, shape in expected.items() if name.startswith(_IMAGE_PARTS)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    compare_shapes(shapes | new, expected, f"{backbone} with {vq}")
    empty = {name: torch.empty(shape, device="meta") for name, shape in new.items()}

    def make(name: str) -> torch.Tensor:
        return fresh_tensor(name, new[name], seed)

    save(tensors | empty, config, text, output, shard_bytes, dtype, make, overwrite)


def _refuse_backbone(output: str | Path, backbone: str | Path) -> None:
    if os.path.realpath(output) == os.path.realpath(backbone):
        raise InputError(f"{output} is the backbone, whose files are read; name another folder to write.")


def _state_dict(path: str | Path, key: str, what: str) -> "dict[str, torch.Tensor]":
    """The mapped tensors below `key` of a file of torch.save."""
    import torch

    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise InputError(f"The {what} {path} cannot be read ({error.strerror}).") from None
    except pickle.UnpicklingError:
        raise InputError(
            f"The {what} {path} holds more than tensors, and running what a file says is not safe; "
            "save its plain state dict."
        ) from None
    except Exception as error:  # torch raises RuntimeError, EOFError and more for what is no such file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"The {what} {path} is not a file of torch.save in its zip form ({reason:.200}); "
            "save it again with a newer torch."
        ) from None
    found = values.get(key) if isinstance(values, dict) else None
    if not isinstance(found, Mapping):
        raise InputError(f"The {what} {path} has no state dict at its key '{key}'; give the published file.")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"The {what} {path} is not a plain state dict: '{str(name)[:100]}' is not a tensor; "
                "save its tensors alone."
            )
        if tensor.is_meta or tensor.layout != torch.strided:
            raise InputError(
                f"The {what} {path} holds no plain numbers for '{name}'; save it as a dense tensor."
            )
    return dict(found)


def _renamed(
    published: "Mapping[str, torch.Tensor]", new_name: Callable[[str], str | None]
) -> "dict[str, torch.Tensor]":
    """By our names; an unknown name stays, in quotes, so that it is none of ours."""
    return {new_name(name) or repr(name): tensor for name, tensor in published.items() if name != _UNUSED}


def _architecture(backbone: Path) -> tuple[DecoderConfig, VisionConfig]:
    """Decoder and vision tower of a backbone folder."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig

    file = backbone / "config.json"
    values = read_json(file)
    if values.get("model_type") != "qwen2_5_vl":
        raise InputError(
            f"{file} is of a model of type {values.get('model_type')!r:.100}, but the backbone is "
            "'qwen2_5_vl'; give the folder of Qwen2.5-VL-7B-Instruct."
        )
    try:
        theirs: Any = Qwen2_5_VLConfig.from_dict(values)
        text, vision = theirs.text_config, theirs.vision_config
        fixed = {
            "hidden_act": (text.hidden_act, "silu"),
            "use_sliding_window": (bool(text.use_sliding_window), False),
            "tie_word_embeddings": (theirs.tie_word_embeddings, False),
        }
        rope = text.rope_parameters
        # From plain values, so that the types are checked as those of any configuration.
        made = ModelConfig.from_dict(
            {
                "decoder": {
                    **_fields(DecoderConfig, text),
                    "rope_theta": rope["rope_theta"],
                    "mrope_section": list(rope["mrope_section"]),
                },
                "vision": _fields(VisionConfig, vision),
            }
        )
    except InputError as error:
        raise InputError(f"{file} does not describe a backbone of Wallaroo: {error}") from None
    except Exception as error:  # transformers' own validation raises many kinds
        reason = " ".join(str(error).split())
        raise InputError(f"{file} is not a configuration of Qwen2.5-VL ({reason:.200}).") from None
    for name, (value, only) in fixed.items():
        if value != only:
            raise InputError(f"{file}: {name} is {value!r}, but Wallaroo's backbone has {only!r}.")
    check_preprocessor(read_json(backbone / PREPROCESSOR_FILE), backbone)
    return made.decoder, made.vision


def _fields(cls: type, theirs: Any) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(cls) if hasattr(theirs, field.name)]
    values = {name: getattr(theirs, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _vq_config(tensors: "Mapping[str, torch.Tensor]") -> VQConfig:
    """The image tokenizer's numbers, as far as shapes tell them; the others are the published ones."""
    values: dict[str, Any] = {}
    for field, name, axis in (
        ("channels", "vq.encoder.conv_in.weight", 0),
        ("z_channels", "vq.quant_conv.weight", 1),
        ("codebook_size", "vq.quantize.embedding.weight", 0),
        ("codebook_dim", "vq.quantize.embedding.weight", 1),
    ):
        if name in tensors and tensors[name].dim() > axis:
            values[field] = tensors[name].shape[axis]
    return VQConfig(**values)


def _tokenizer_json(backbone: Path, tokens: list[str]) -> str:
    """Contents of our `tokenizer.json`: the backbone's tokenizer with the control tokens added."""
    file = backbone / "tokenizer.json"
    slow = (backbone / "vocab.json", backbone / "merges.txt")
    try:
        if file.exists():
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        elif all(part.exists() for part in slow):
            vocabulary, merges = tokenizers.models.BPE.read_file(*map(str, slow))
            tokenizer = build(vocabulary, merges)
        else:
            raise InputError(
                f"The backbone {backbone} has neither tokenizer.json nor vocab.json with merges.txt; "
                "give the whole folder of Qwen2.5-VL-7B-Instruct."
            )
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InputError(f"The tokenizer of {backbone} cannot be read ({error}).") from None
    add_control_tokens(tokenizer, tokens)
    return tokenizer.to_str()
