"""Options that shape an engine's work, and their choice for a device."""

from dataclasses import dataclass
from typing import Any

import torch

from wallaroo.model.attention import KEY_BLOCK
from wallaroo.model.config import MAX_NEW_TOKENS, SLOTS, DecoderConfig, ModelConfig, Size
from wallaroo.model.engine.backends import default_backend
from wallaroo.model.engine.requests import steps_of
from wallaroo.model.prompts import TEMPLATE_TOKENS, source_tokens
from wallaroo.model.sampling import ALWAYS

GPU_GROUP_ROWS = (128, 64, 16)
"""Rows of a group on a GPU: the first that fits. Each group reads all weights, so large ones cost less."""
LEAST_GROUP_ROWS = 4
"""Rows of a group where memory is short, as where a picture to be understood takes thousands of tokens."""
GPU_PREFILL = {"prefill_piece": 16, "prefill_pieces": 32}
"""512 tokens a forward on a GPU: fewer leave its arithmetic unused while it reads the weights."""
GPU_VQ_SLICE = 4
"""Pictures that go through the image tokenizer at once on a GPU."""
MIN_SHARED = 1 << 15
"""Elements that torch gives a CPU thread at least."""
VECTOR = 32
"""Elements that torch's float32 operators take at once where vectors are widest."""
VQ_BYTES = 3500
"""Activations of a VQ decode in float32, bytes a pixel."""
WAITING_ROWS = 32
"""Rows whose prompts are taken to wait, decoded and without a slot, when memory is counted."""
WORKING_SHARE = 0.1
"""Of the free memory: what the steps compute on, recordings included."""


@dataclass(frozen=True)
class EngineOptions:
    """What shapes an engine's work. `shapes` names the options that may change a row by rounding."""

    slots: int = SLOTS["cpu"]
    """Rows that decode at once, rounded up to whole groups."""
    group_rows: int = 16
    """Guided rows of a group, which are twice as many sequences."""
    smaller: tuple[int, ...] = ()
    """Values that replace `group_rows`, in turn, when memory runs out with a single group."""
    prefill_piece: int = 8
    """Tokens of one prompt that stay together."""
    prefill_pieces: int = 8
    """Pieces, of one or several prompts, of one forward."""
    vq_slice: int = 1
    """Pictures of one VQ decode."""
    vq_precision: str = "tf32"
    """`tf32` or `float32`, of the VQ's convolutions on CUDA."""
    prefix_sharing: bool = True
    """Whether rows with equal prompts share a prefill."""
    prefix_tokens: int = 16384
    """Prompt tokens kept for sharing after the last row that waits for them."""
    prompt_tokens: int = 1024
    """Most tokens of a row's own prompt.

    With `max_new_tokens`, `pixels` and the largest size it bounds the keys of a row. On CUDA memory for so
    many is taken once; a longer row takes more and makes the recordings again.
    """
    max_new_tokens: int = MAX_NEW_TOKENS
    """Most tokens of a text."""
    pixels: tuple[int | None, int | None] = (None, None)
    """Least and most pixels of a picture to be understood, as the vision tower sees it; None for the limits
    of the checkpoint.
    """
    attention: str | None = None
    """`block`, `sdpa`, `flash` or `triton`; None chooses by device. `triton` runs the whole decoder by the
    kernels of `model.cuda`.
    """
    graphs: bool = True
    """Whether decode steps on CUDA are recorded once and replayed (see model/cuda/graphs.py)."""
    decode_vq: bool = True
    """Whether results have pixels, not only tokens."""
    cfg_interval: tuple[float, float] = ALWAYS
    """First and last share of a picture's steps between which it is guided; lossy unless (0, 1). Later steps
    have no null branch, so more rows decode at once.
    """
    trace: bool = False
    """Whether to keep each row's logits and to take forced tokens."""

    def shapes(self, device: torch.device, dtype: torch.dtype) -> dict[str, int | str]:
        """The options that may change a row by rounding, as they apply on a device.

        Args:
            device: Of the engine.
            dtype: Of the weights.

        Returns:
            Name -> value.
        """
        return {
            "group_rows": self.group_rows,
            "prefill_piece": self.prefill_piece,
            "prefill_pieces": self.prefill_pieces,
            "vq_slice": self.vq_slice,
            "vq_precision": "float32" if device.type == "cpu" else self.vq_precision,
            "attention": self.attention or default_backend(device, dtype),
        }


def longest_prompt(config: ModelConfig, task: str, options: EngineOptions) -> int:
    """Length of the longest prompt of a task.

    Args:
        config: Of the model.
        task: `generate`, `edit` or `understand`.
        options: Of the engine; they bound the prompt's text and pictures.

    Returns:
        A number of tokens.
    """
    pictures = source_tokens(config.with_pixels(*options.pixels), task)
    return options.prompt_tokens + TEMPLATE_TOKENS + pictures


def most_steps(config: ModelConfig, task: str, max_new_tokens: int) -> int:
    """Steps of the longest row of a task.

    Args:
        config: Of the model.
        task: `generate`, `edit` or `understand`.
        max_new_tokens: Most tokens of a text.

    Returns:
        A number of forwards.
    """
    return max_new_tokens if task == "understand" else steps_of(_largest(config), config.line_break)


def _largest(config: ModelConfig) -> Size:
    return max(config.size_list(), key=lambda size: size.height * size.width)


def gpu_options(
    config: ModelConfig, free: int, element: int, task: str = "generate", **given: Any
) -> EngineOptions:
    """Options for a GPU.

    The group is the largest that fits, whatever slots were asked for and however many rows a run has, since
    its shape may change a row by rounding. Slots are as many whole groups as fit.

    Args:
        config: Of the model.
        free: Bytes of memory beside the model.
        element: Bytes of an element of keys and values.
        task: What the engine will serve.
        given: Fields of EngineOptions, which stay.

    Returns:
        The options.
    """
    given = GPU_PREFILL | {"vq_slice": GPU_VQ_SLICE} | given
    base = EngineOptions(**given)
    decoder, largest = config.decoder, _largest(config)
    token = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim * element
    prompt = longest_prompt(config, task, base)
    row = 2 * token * (prompt + most_steps(config, task, base.max_new_tokens))
    pictures = 0 if task == "understand" else base.vq_slice * largest.height * largest.width * VQ_BYTES

    # Prompts on their way, those that wait for a slot, and those that are kept for rows to come.
    prompts = token * (prompt * (base.prefill_pieces + 1 + 2 * WAITING_ROWS) + base.prefix_tokens)
    room = (1 - WORKING_SHARE) * free - pictures
    fitting = int(max(0, room - prompts) // row)
    group = next((rows for rows in GPU_GROUP_ROWS if rows <= fitting), GPU_GROUP_ROWS[-1])
    # Most prompts are shorter than reckoned, so the least group is for rows that do not fit even alone.
    group = given.get("group_rows", group if group * row <= room else LEAST_GROUP_ROWS)
    slots = max(1, min(fitting, SLOTS["cuda"]) // group) * group
    smaller = tuple(rows for rows in (*GPU_GROUP_ROWS, LEAST_GROUP_ROWS) if rows < group)
    return EngineOptions(**({"group_rows": group, "slots": slots, "smaller": smaller} | given))


def even_threads(config: DecoderConfig, options: EngineOptions, threads: int) -> int:
    """The most CPU threads with which a row's bits do not depend on its place in the group.

    Threads share an operator's elements evenly. Where a share ends within a vector, its last elements go
    through other code, which rounds SiLU and powers of two otherwise. Only wide models are shared at all.

    Args:
        config: The decoder.
        options: Of the engine.
        threads: The upper bound.

    Returns:
        A number of threads from 1 to `threads`.
    """
    forwards = 2 * options.group_rows, options.prefill_piece * options.prefill_pieces
    widths = config.intermediate_size, config.num_attention_heads * KEY_BLOCK

    def even(count: int, tokens: int, width: int) -> bool:
        elements = tokens * width
        share = -(-elements // min(count, -(-elements // MIN_SHARED)))
        return share % width == 0 or (share % VECTOR == 0 and width % VECTOR == 0)

    return next(
        count
        for count in range(threads, 0, -1)
        if all(even(count, tokens, width) for tokens in forwards for width in widths)
    )
