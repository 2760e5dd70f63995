"""From a row's text to the token ids and positions of a prompt, for the three tasks.

Knows nothing of tensors: `Prompt` is numpy, and indices say where embeddings of a picture go.
"""

import re
from dataclasses import dataclass

import numpy as np

from wallaroo.model.config import ModelConfig, Size
from wallaroo.model.errors import InputError, did_you_mean
from wallaroo.model.images import most_tokens
from wallaroo.model.tokenizer import Control, Tokenizer, indicator

SYSTEM = "You are a helpful assistant."


TEMPLATES = {
    ("generate", "en"): (
        'Generate an image with resolution {target_w}x{target_h} based on the prompt: "{prompt}"'
    ),
    ("generate", "zh"): "生成一幅图像，分辨率为{target_w}x{target_h}，基于文本提示：“{prompt}”",
    ("edit", "en"): (
        'Edit the input image based on the text prompt: "{prompt}", '
        "and generate a new image with a resolution of {target_w}x{target_h}."
    ),
    ("edit", "zh"): (
        "根据输入图片，并结合文本提示：“{prompt}”，对图片进行编辑，生成一幅{target_w}x{target_h}的图像"
    ),
}
"""(task, language) -> the text around a prompt; sizes are in pixels, width first."""

DEFAULT_QUESTION = {"en": "Describe this image in detail.", "zh": "请详细描述这张图片。"}
"""Language -> question about a picture that comes without one."""

TEMPLATE_TOKENS = 128
"""Tokens that a template and control tokens add to a prompt, at most for the built-in ones."""

_PLACEHOLDERS = ("prompt", "target_w", "target_h")
_PLACEHOLDER = re.compile(r"\{(" + "|".join(_PLACEHOLDERS) + r")\}")
_CHINESE = re.compile("[\u4e00-\u9fff]")
_LATIN = re.compile("[A-Za-z]")


@dataclass(frozen=True)
class Prompt:
    """The decoder's input before the first generated token."""

    ids: np.ndarray
    """int32 `(L,)`."""
    positions: np.ndarray
    """int32 `(3, L)`: the time, height and width axes of MRoPE."""
    next_position: int
    """Position of the first generated token, the same on all axes."""
    semantic: tuple[int, int] | None = None
    """`[start, stop)` of the vision tower's embeddings among ids, or None."""
    pixel: np.ndarray | None = None
    """int32 `(h * w,)`: indices of the pixel adapter's embeddings in raster order, or None."""


def detect_language(prompt: str) -> str:
    """`en` if the prompt has a letter A-Z and no character U+4E00 to U+9FFF, else `zh`."""
    return "en" if _LATIN.search(prompt) and not _CHINESE.search(prompt) else "zh"


def check_template(template: str) -> None:
    """Checks the placeholders of a template.

    Raises:
        InputError: `{prompt}` is missing, or a placeholder does not exist.
    """
    for name in re.findall(r"\{(\w+)\}", template):
        if name not in _PLACEHOLDERS:
            raise InputError(
                f"The template has an unknown placeholder '{{{name}}}', but only {{prompt}}, {{target_w}} "
                f"and {{target_h}} exist{did_you_mean(name, _PLACEHOLDERS) or '.'}"
            )
    if "{prompt}" not in template:
        raise InputError(
            f"The template '{template}' has no {{prompt}}, so every row would get the same image; add it."
        )


def generate_prompt(
    tokenizer: Tokenizer,
    config: ModelConfig,
    prompt: str,
    size: Size,
    language: str,
    template: str | None = None,
) -> Prompt:
    """The prompt of a text-to-image row; with an empty `prompt`, its null branch.

    Args:
        tokenizer: Of the checkpoint.
        config: Of the checkpoint.
        prompt: Text of the row.
        size: Of the picture, in pixels.
        language: `en` or `zh`: selects the template.
        template: Replaces the built-in template.

    Returns:
        The prompt.

    Raises:
        InputError: The vocabulary has no size indicator for a side.
        RowError: The text is not valid Unicode.
    """
    request = _fill(template or TEMPLATES["generate", language], prompt, size)
    pieces = [*_system(), Control("<|im_start|>"), "user\n", request]
    if config.layout == "train":
        pieces += [*_indicators(config, size), Control("<|im_end|>"), "\n"]
    else:
        pieces += [Control("<|im_end|>"), "\n", *_indicators(config, size)]
    # No text can join across this point: what follows begins with a control token.
    pieces += [Control("<|im_start|>"), "assistant\n", Control("<|generate_start|>")]
    return _prompt(tokenizer, pieces)


def edit_prompt(
    tokenizer: Tokenizer,
    config: ModelConfig,
    prompt: str,
    size: Size,
    grid: tuple[int, int],
    language: str,
    template: str | None = None,
) -> Prompt:
    """The prompt of an editing row; with an empty `prompt`, its null branch.

    Args:
        tokenizer: Of the checkpoint.
        config: Of the checkpoint.
        prompt: Instruction of the row.
        size: Of the picture that is made, in pixels.
        grid: Rows and columns of the vision tower's merged tokens of the source.
        language: `en` or `zh`: selects the template.
        template: Replaces the built-in template.

    Returns:
        The prompt.

    Raises:
        InputError: The vocabulary has no size indicator for a side.
        RowError: The text is not valid Unicode.
    """
    rows, columns = size.grid
    block = [Control("<|image_pad|>")] * columns
    pixel_block: list[str] = [Control("<|pixel_start|>")]
    for row in range(rows):
        if row and config.line_break:
            pixel_block.append(Control("<|end_of_line>|"))
        pixel_block += block
    pixel_block.append(Control("<|pixel_end|>"))
    pieces = [
        *_system(),
        Control("<|im_start|>"),
        "user\n",
        *pixel_block,
        *_semantic_block(grid),
        _fill(template or TEMPLATES["edit", language], prompt, size),
        *_indicators(config, size),
        Control("<|im_end|>"),
        "\n",
    ]
    if config.layout == "train":
        pieces += [Control("<|im_start|>"), "assistant\n"]
    pieces.append(Control("<|generate_start|>"))
    return _prompt(tokenizer, pieces, grid)


def understand_prompt(
    tokenizer: Tokenizer,
    config: ModelConfig,
    question: str,
    grid: tuple[int, int],
    assistant_header: bool = True,
) -> Prompt:
    """The prompt of a question about one picture.

    Args:
        tokenizer: Of the checkpoint.
        config: Not used, since every checkpoint asks alike.
        question: Text of the row.
        grid: Rows and columns of the vision tower's merged tokens.
        assistant_header: Whether the prompt ends with the opening of the answer, as in every real use.

    Returns:
        The prompt.

    Raises:
        RowError: The text is not valid Unicode.
    """
    pieces = [
        *_system(),
        Control("<|im_start|>"),
        "user\n",
        *_semantic_block(grid),
        question,
        Control("<|im_end|>"),
        "\n",
    ]
    if assistant_header:
        pieces += [Control("<|im_start|>"), "assistant\n"]
    return _prompt(tokenizer, pieces, grid)


def source_tokens(config: ModelConfig, task: str) -> int:
    """Tokens that a source picture adds to a prompt, at most.

    Args:
        config: Of the model.
        task: `generate`, `edit` or `understand`.

    Returns:
        A number of tokens; 0 for `generate`.
    """
    if task == "generate":
        return 0
    if task == "understand":
        return most_tokens(*config.understand_pixels)
    rows, columns = max(config.size_list(), key=lambda size: size.height * size.width).grid
    return most_tokens(*config.edit_pixels) + rows * columns + (rows - 1 if config.line_break else 0)


def _fill(template: str, prompt: str, size: Size) -> str:
    """The template with its placeholders replaced in one pass, so that a prompt's own braces stay."""
    values = {"prompt": prompt, "target_w": str(size.width), "target_h": str(size.height)}
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def _system() -> list[str]:
    return [Control("<|im_start|>"), f"system\n{SYSTEM}", Control("<|im_end|>"), "\n"]


def _indicators(config: ModelConfig, size: Size) -> list[str]:
    if not config.line_break:
        return []
    kind = Control if config.indicators == "added" else str
    return [" ", kind(indicator(size.height)), kind(indicator(size.width))]


def _semantic_block(grid: tuple[int, int]) -> list[str]:
    pads = [Control("<|image_pad|>")] * (grid[0] * grid[1])
    return [Control("<|vision_start|>"), *pads, Control("<|vision_end|>")]


def _prompt(tokenizer: Tokenizer, pieces: list[str], grid: tuple[int, int] | None = None) -> Prompt:
    """Encode the pieces and number them; `grid` tells that they hold one semantic block."""
    ids = np.array(tokenizer.encode(pieces), dtype=np.int32)
    length = len(ids)
    if grid is None:
        return Prompt(ids, np.tile(np.arange(length, dtype=np.int32), (3, 1)), length)
    pad = tokenizer.control_id("<|image_pad|>")
    start = int(np.flatnonzero(ids == tokenizer.control_id("<|vision_start|>"))[0]) + 1
    stop = start + grid[0] * grid[1]
    positions = np.empty((3, length), dtype=np.int32)
    positions[:, :start] = np.arange(start)
    # The picture stands on one time step, spread over height and width; text goes on past its longer side.
    positions[:, start:stop] = start
    positions[1:, start:stop] += np.indices(grid, dtype=np.int32).reshape(2, -1)
    after = start + max(grid)
    positions[:, stop:] = after + np.arange(length - stop)
    pixel = np.flatnonzero(ids[:start] == pad).astype(np.int32)
    return Prompt(ids, positions, after + length - stop, (start, stop), pixel if len(pixel) else None)
