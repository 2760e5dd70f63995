"""Describes a checkpoint from its configuration and file list. Reads no weights."""

import math

from wallaroo.model.tensor_shapes import expected_shapes
from wallaroo.workflows.reports.estimate import size_in_words
from wallaroo.workflows.storage.checkpoints import model_path, read_checkpoint, read_files

BYTES = {"cpu": ("float32", 4), "cuda": ("bfloat16", 2)}
"""Device -> type of its weights, and bytes of a number."""


def describe(model: str) -> list[str]:
    """Lines about a checkpoint.

    Args:
        model: Its folder, local or on S3, or `tiny`.

    Returns:
        The lines.

    Raises:
        InputError: It is no checkpoint.
    """
    folder = model_path(model)
    known, files = read_checkpoint(folder), read_files(folder)
    config, decoder = known.config, known.config.decoder
    shapes = expected_shapes(config)
    numbers = sum(map(math.prod, shapes.values()))
    stored = sum(entry.size for name, entry in files.items() if name.endswith(".safetensors"))
    sizes = sorted((size.width, size.height) for size in config.size_list())
    tokens = max(size.grid[0] * (size.grid[1] + config.line_break) for size in config.size_list())
    lines = [
        f"{model}: {config.name}, for {', '.join(config.tasks)}",
        f"  folder      {folder}",
        f"  digest      {known.digest}",
        f"  parameters  {numbers:,} in {len(shapes):,} tensors, {size_in_words(stored)} as stored",
        f"  decoder     {decoder.num_hidden_layers} layers, hidden size {decoder.hidden_size:,}, "
        f"{decoder.num_attention_heads} heads, {decoder.num_key_value_heads} of keys and values",
        f"  prompts     layout {config.layout}, indicators {config.indicators}, "
        f"rows of an image {'are' if config.line_break else 'are not'} separated",
        f"  sizes       {', '.join(f'{width}x{height}' for width, height in sizes)} (width x height, pixels)",
    ]
    for device, (kind, size) in BYTES.items():
        row = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim * size
        lines.append(
            f"  on {device:<9}{size_in_words(numbers * size)} of weights ({kind}); "
            f"a guided image takes up to {size_in_words(2 * tokens * row)} more, and its prompt"
        )
    return lines
