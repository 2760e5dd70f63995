"""Models with random weights, and rows for them, for use without a checkpoint."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from wallaroo.model.config import DecoderConfig, ModelConfig, Size, VisionConfig, VQConfig
from wallaroo.model.engine.engine import END_OF_LINE
from wallaroo.model.engine.requests import Request
from wallaroo.model.prompts import Prompt
from wallaroo.model.sampling import Sampling
from wallaroo.model.wallaroo import Wallaroo

PROMPT_TOKENS, NULL_TOKENS = 40, 24
SAMPLING = Sampling(cfg=3.0, temperature=1.0, top_k=100, top_p=1.0)

MODELS = {
    "tiny": ModelConfig(
        decoder=DecoderConfig(1100, 128, 384, 4, 4, 2, 1e-6, 1e4, (4, 6, 6)),
        vision=VisionConfig(4, 64, "silu", 128, 2, out_hidden_size=128, fullatt_block_indexes=(3,)),
        vq=VQConfig(channels=16, norm_groups=8, z_channels=32, codebook_size=512),
        name="tiny",
        sizes={"1.0": (128, 128)},
        token_ids={END_OF_LINE: 1000},
    ),
    "mid": ModelConfig(
        decoder=DecoderConfig(4096, 512, 1536, 8, 8, 2, 1e-6, 1e6, (8, 12, 12)),
        vision=VisionConfig(1, 32, "silu", 48, 2, out_hidden_size=512, fullatt_block_indexes=(0,)),
        vq=VQConfig(codebook_size=1024),
        name="mid",
        sizes={"1.0": (128, 128), "1.01": (256, 256)},
        token_ids={END_OF_LINE: 4010},
    ),
    "7b": ModelConfig(name="7b", token_ids={END_OF_LINE: 151669}),
}
"""Shapes that are measured; weights are random."""


def random_model(
    config: ModelConfig, tasks: tuple[str, ...], device: torch.device, dtype: torch.dtype
) -> Wallaroo:
    """Makes a model whose weights are drawn with deviation 1/sqrt(fan-in); its image tokenizer is float32.

    Args:
        config: Of the model.
        tasks: That the model must do.
        device: Of the weights.
        dtype: Of the weights.

    Returns:
        The model.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Wallaroo(config, tasks)
    model = model.to(dtype)
    if model.vq is not None:
        model.vq.float()
    model = model.to_empty(device=device)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.data.fill_(1.0)
    if model.visual is not None:
        visual = model.visual
        visual.rotary_pos_emb = type(visual.rotary_pos_emb)(visual.config).to(device)
    return model.requires_grad_(False)


def text_prompt(rng: np.random.Generator, tokens: int, vocabulary: int) -> Prompt:
    """Makes a prompt of random ordinary tokens.

    Args:
        rng: Of random numbers.
        tokens: Length of the prompt.
        vocabulary: Token ids are below it.

    Returns:
        The prompt.
    """
    ids = rng.integers(0, min(vocabulary, 900), tokens).astype(np.int32)
    return Prompt(ids, np.tile(np.arange(tokens, dtype=np.int32), (3, 1)), tokens)


def text_requests(
    config: ModelConfig, count: int, sizes: Sequence[Size], sampling: Sampling = SAMPLING
) -> list[Request]:
    """Makes rows of `generate` with different prompts, and one null prompt per size.

    Args:
        config: Of the model.
        count: How many rows.
        sizes: Sizes of the pictures in pixels, taken in turn.
        sampling: Of the rows; guided by default.

    Returns:
        The rows, with keys from 0.
    """
    rng = np.random.default_rng(0)
    vocabulary = config.decoder.vocab_size
    nulls = {size: text_prompt(rng, NULL_TOKENS, vocabulary) for size in sizes}
    return [
        Request(
            key,
            text_prompt(rng, PROMPT_TOKENS, vocabulary),
            nulls[sizes[key % len(sizes)]],
            sizes[key % len(sizes)],
            key,
            sampling,
        )
        for key in range(count)
    ]


def edit_requests(
    config: ModelConfig, count: int, size: Size, text: int = 60, seen: int = 8
) -> list[Request]:
    """Rows with sources of their own.

    The null prompt, with a third of the text, is the same for all rows, since its picture is black.

    Args:
        config: Of the model.
        count: Rows.
        size: Of the pictures, in pixels.
        text: Tokens of text.
        seen: Side of the grid of semantic tokens.

    Returns:
        The rows, with keys from 0.
    """
    rng = np.random.default_rng(0)
    rows, columns = size.grid
    line = np.arange(columns + 1)
    pixel = np.concatenate([1 + row * (columns + 1) + line[:columns] for row in range(rows)]).astype(np.int32)
    block = rows * (columns + 1) + 1

    def prompt(words: int) -> Prompt:
        tokens = block + seen * seen + 2 + words
        base = text_prompt(rng, tokens, config.decoder.vocab_size)
        return replace(base, semantic=(block + 1, block + 1 + seen * seen), pixel=pixel)

    null = prompt(text // 3)
    requests = []
    for key in range(count):
        semantic = rng.integers(0, 256, (28 * seen, 28 * seen, 3), dtype=np.uint8)
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        requests.append(Request(key, prompt(text), null, size, key, SAMPLING, semantic, pixels))
    return requests
