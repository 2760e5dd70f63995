"""Names and shapes of the tensors of a checkpoint, as its configuration has them. Needs no torch."""

from collections.abc import Iterator, Mapping

from wallaroo.model.config import ModelConfig
from wallaroo.model.errors import InputError

Shape = tuple[int, ...]

_PARTS = {
    "generate": ("model.language_model.", "gen_image_head.", "gen_input_adapter.", "vq."),
    "edit": (
        "model.language_model.",
        "model.visual.",
        "edit_image_head.",
        "edit_input_adapter.",
        "pixel_adapter.",
        "vq.",
    ),
    "understand": ("model.language_model.", "model.visual.", "lm_head."),
}
"""Task -> beginnings of the names of the tensors that it needs."""

_NAMED_AT_MOST = 100
"""Names of tensors in one message; a foreign checkpoint may differ in every one."""


def expected_shapes(config: ModelConfig, task: str | None = None) -> dict[str, Shape]:
    """Names and shapes of the tensors of a checkpoint.

    Args:
        config: Of the checkpoint.
        task: Only the tensors that this task needs; None for all.

    Returns:
        Name on disk -> shape.
    """
    tasks = config.tasks if task is None else (task,)
    prefixes = tuple(prefix for task in tasks for prefix in _PARTS[task])
    return {name: shape for name, shape in _shapes(config) if name.startswith(prefixes)}


def compare_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], what: str) -> None:
    """Checks that all tensors are found, and no others.

    Args:
        found: Name -> shape.
        expected: Name -> shape.
        what: What has the tensors, for the message.

    Raises:
        InputError: Tensors are missing, unexpected or of a wrong shape; the message names them all.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    wrong = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    problems = [
        f"{kind}: {_enumerate(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if names
    ]
    if problems:
        raise InputError(f"{what} does not have the tensors of its configuration; {'; '.join(problems)}.")


def _enumerate(names: list[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Name on disk and shape of every tensor that a checkpoint for all tasks has."""
    hidden, dim = config.decoder.hidden_size, config.vq.codebook_dim
    yield from _decoder_shapes(config)
    yield "lm_head.weight", (config.decoder.vocab_size, hidden)
    yield from _vision_shapes(config)
    for head in ("gen_image_head", "edit_image_head"):
        yield from _affine(f"{head}.0", hidden, hidden)
        yield f"{head}.2.weight", (config.vq.codebook_size, hidden)
    for adapter in ("gen_input_adapter", "edit_input_adapter", "pixel_adapter"):
        yield from _affine(f"{adapter}.0", hidden, dim)
        yield from _affine(f"{adapter}.2", hidden, hidden)
    yield from _vq_shapes(config)


def _affine(name: str, outputs: int, *inputs: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, *inputs)
    yield f"{name}.bias", (outputs,)


def _decoder_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    decoder, prefix = config.decoder, "model.language_model"
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    kv = decoder.num_key_value_heads * decoder.head_dim
    yield f"{prefix}.embed_tokens.weight", (decoder.vocab_size, hidden)
    yield f"{prefix}.norm.weight", (hidden,)
    for index in range(decoder.num_hidden_layers):
        layer = f"{prefix}.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        for part, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
            yield from _affine(f"{layer}.self_attn.{part}", rows, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)


def _vision_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    vision, prefix = config.vision, "model.visual"
    width, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    merged = width * vision.spatial_merge_size**2
    yield (
        f"{prefix}.patch_embed.proj.weight",
        (width, vision.in_channels, vision.temporal_patch_size, patch, patch),
    )
    for index in range(vision.depth):
        block = f"{prefix}.blocks.{index}"
        yield f"{block}.norm1.weight", (width,)
        yield f"{block}.norm2.weight", (width,)
        yield from _affine(f"{block}.attn.qkv", 3 * width, width)
        yield from _affine(f"{block}.attn.proj", width, width)
        yield from _affine(f"{block}.mlp.gate_proj", inner, width)
        yield from _affine(f"{block}.mlp.up_proj", inner, width)
        yield from _affine(f"{block}.mlp.down_proj", width, inner)
    yield f"{prefix}.merger.ln_q.weight", (width,)
    yield from _affine(f"{prefix}.merger.mlp.0", merged, merged)
    yield from _affine(f"{prefix}.merger.mlp.2", vision.out_hidden_size, merged)


def _vq_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    vq = config.vq
    widths = [vq.channels * multiplier for multiplier in vq.channel_multipliers]
    yield "vq.quantize.embedding.weight", (vq.codebook_size, vq.codebook_dim)
    yield from _affine("vq.quant_conv", vq.codebook_dim, vq.z_channels, 1, 1)
    yield from _affine("vq.post_quant_conv", vq.z_channels, vq.codebook_dim, 1, 1)
    for coder, levels, blocks, ends, resample in (
        ("vq.encoder", widths, vq.residual_blocks, (3, vq.z_channels), "downsample"),
        ("vq.decoder", widths[::-1], vq.residual_blocks + 1, (vq.z_channels, 3), "upsample"),
    ):
        lowest = 0 if coder == "vq.decoder" else len(levels) - 1
        middle = widths[-1]
        width = middle if coder == "vq.decoder" else vq.channels
        yield from _affine(f"{coder}.conv_in", width, ends[0], 3, 3)
        for index, outputs in enumerate(levels):
            level = f"{coder}.conv_blocks.{index}"
            for block in range(blocks):
                yield from _residual_shapes(f"{level}.res.{block}", width, outputs)
                width = outputs
                if index == lowest:
                    yield from _attention_shapes(f"{level}.attn.{block}", outputs)
            if index < len(levels) - 1:
                yield from _affine(f"{level}.{resample}.conv", outputs, outputs, 3, 3)
        yield from _residual_shapes(f"{coder}.mid.0", middle, middle)
        yield from _attention_shapes(f"{coder}.mid.1", middle)
        yield from _residual_shapes(f"{coder}.mid.2", middle, middle)
        yield from _affine(f"{coder}.norm_out", width)
        yield from _affine(f"{coder}.conv_out", ends[1], width, 3, 3)


def _residual_shapes(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, Shape]]:
    yield from _affine(f"{name}.norm1", inputs)
    yield from _affine(f"{name}.conv1", outputs, inputs, 3, 3)
    yield from _affine(f"{name}.norm2", outputs)
    yield from _affine(f"{name}.conv2", outputs, outputs, 3, 3)
    if inputs != outputs:
        yield from _affine(f"{name}.nin_shortcut", outputs, inputs, 1, 1)


def _attention_shapes(name: str, channels: int) -> Iterator[tuple[str, Shape]]:
    yield from _affine(f"{name}.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        yield from _affine(f"{name}.{part}", channels, channels, 1, 1)
