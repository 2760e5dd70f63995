"""Training rows of the language model: a prompt and its response as ids, targets and pictures.

Knows nothing of batches and losses.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from wallaroo.model.config import ModelConfig, Size
from wallaroo.model.engine import END_OF_LINE
from wallaroo.model.images import (
    FACTOR,
    FRAMES,
    MEAN,
    PATCH,
    STD,
    patchify,
    pixel_image,
    semantic_image,
    smart_resize,
)
from wallaroo.model.prompts import TEMPLATES, Prompt, edit_prompt, generate_prompt, understand_prompt
from wallaroo.model.tokenizer import Control, Tokenizer
from wallaroo.model.training.data import BadPicture, Row, open_picture, sides
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.vq import to_float
from wallaroo.model.wallaroo import Wallaroo

NO_LATENT = -1.0
"""Each number of a source latent that is masked in training."""


@dataclass(frozen=True)
class TrainingRow:
    """A row ready for a batch, `L` places long."""

    ids: np.ndarray
    """Text tokens, `(L,)`."""
    image: np.ndarray
    """Image tokens, -1 elsewhere, `(L,)`."""
    positions: np.ndarray
    """`(3, L)`."""
    target: np.ndarray
    """Places whose token is predicted, by the image head where `image` is set, else by the text head; bool
    `(L,)`.
    """
    semantic: tuple[int, int] | None = None
    """First place of the vision tower's embeddings, and the place after the last."""
    patches: np.ndarray | None = None
    """Of the source, `(n, 1176)`."""
    grid: tuple[int, int] | None = None
    """Patches of the source along height and width."""
    pixel: np.ndarray | None = None
    """Places of the source's latents, `(k,)`."""
    latents: np.ndarray | None = None
    """Of the source, float32 `(k, 8)`."""
    null: bool = False
    """Whether the prompt was dropped."""


def response_row(prompt: Prompt, first: int, ids: np.ndarray, image: np.ndarray) -> TrainingRow:
    """Joins a prompt and its response.

    Args:
        prompt: Of the row.
        first: First place whose token is predicted.
        ids: Text tokens of the response, `(n,)`.
        image: Image tokens of the response, -1 elsewhere, `(n,)`.

    Returns:
        The row, without patches and latents.
    """
    start, length = len(prompt.ids), len(prompt.ids) + len(ids)
    after = prompt.next_position + np.arange(len(ids))
    return TrainingRow(
        np.concatenate((prompt.ids, ids)),
        np.concatenate((np.full(start, -1), image)),
        np.concatenate((prompt.positions, np.tile(after, (3, 1))), axis=1),
        np.arange(length) >= first,
        prompt.semantic,
        pixel=prompt.pixel,
    )


class Rows:
    """Makes training rows from rows of data, with the image tokenizer of a model.

    Tokens and patches of pictures are cached, up to KEPT_BYTES in all. `prepare` fills the cache for many
    pictures at once, after which `make` needs neither model nor device.

    Args:
        model: Gives image tokenizer and configuration.
        tokenizer: Of texts.
        recipe: The stage.
    """

    KEPT_BYTES = 4 << 30

    SLICE = 64
    """Pictures in one forward of the image tokenizer."""

    def __init__(self, model: Wallaroo, tokenizer: Tokenizer, recipe: Recipe):
        assert model.vq is not None
        self.vq, self.config, self.tokenizer, self.recipe = model.vq, model.config, tokenizer, recipe
        self.codes: dict[tuple[bytes, Size], tuple[np.ndarray, np.ndarray]] = {}
        self.seen: dict[tuple[bytes, tuple[int, int]], np.ndarray] = {}
        self.prompts: dict[tuple[Any, ...], Prompt] = {}
        self.kept = 0
        ids = self.config.token_ids
        self.line_end = ids[END_OF_LINE]
        self.end = tokenizer.encode([Control("<|generate_end|>"), Control("<|im_end|>"), "\n"])

    def prepare(self, data: Mapping[str, Sequence[Row]]) -> None:
        """Encodes the pictures of rows into the cache; those that cannot be decoded are left to `make`.

        Args:
            data: Task -> rows.
        """
        wanted: dict[Size, dict[bytes, None]] = {}
        for task, rows in data.items():
            for row in rows if task != "understand" else ():
                for name in ("picture", "image") if task == "edit" else ("picture",):
                    with contextlib.suppress(BadPicture):
                        wanted.setdefault(self._size(row[name]), {})[row[name]] = None
        for size, files in wanted.items():
            # Sources of dropped prompts are black.
            waiting = [b"", *files] if "edit" in data else list(files)
            for first in range(0, len(waiting), self.SLICE):
                some = waiting[first : first + self.SLICE]
                try:
                    self._encode(some, size)
                except BadPicture:
                    for one in some:
                        with contextlib.suppress(BadPicture):
                            self._encode([one], size)

    def make(self, task: str, row: Row, generator: np.random.Generator) -> TrainingRow:
        """Makes a training row.

        Args:
            task: Of the row.
            row: Of data.
            generator: Decides what is dropped and masked, and the template.

        Returns:
            The training row.

        Raises:
            BadPicture: A picture cannot be decoded.
        """
        if task == "understand":
            return self._answer(row)
        prompt = "" if generator.random() < self.recipe.drop else str(row["prompt"])
        language = str(row["language"])
        if row.get("prompt_zh"):
            chinese = generator.random() < 0.5
            language = "zh" if chinese else "en"
            prompt = prompt and str(row["prompt_zh" if chinese else "prompt"])
        templates = _templates(self.recipe, task, language)
        template = templates[int(generator.integers(len(templates)))]
        if task == "generate":
            size = self._size(row["picture"])
            made = self._prompt(generate_prompt, prompt, size, language, template)
            return dataclasses.replace(self._picture_row(made, row["picture"], size), null=not prompt)
        size = self._size(row["image"])
        patches, grid = patchify(self._semantic(row["image"], self.config.edit_pixels))
        if not prompt:
            patches = np.broadcast_to(BLACK_PATCH, patches.shape)
        merged = (grid[0] // 2, grid[1] // 2)
        made = self._prompt(edit_prompt, prompt, size, merged, language, template)
        latents = self._codes(row["image"] if prompt else b"", size)[1].copy()
        if self.recipe.masked:
            kept = int(generator.integers(max(1, int(self.recipe.masked * len(latents)))))
            latents[generator.permutation(len(latents))[kept:]] = NO_LATENT
        row_ = self._picture_row(made, row["picture"], size)
        return dataclasses.replace(row_, patches=patches, grid=grid, latents=latents, null=not prompt)

    def _picture_row(self, prompt: Prompt, picture: bytes, size: Size) -> TrainingRow:
        tokens = self._codes(picture, size)[0]
        if self.config.line_break:
            ends = np.full((len(tokens), 1), -1, tokens.dtype)
            tokens = np.concatenate((tokens, ends), axis=1).reshape(-1)[:-1]
        image = np.concatenate((tokens.reshape(-1), np.full(len(self.end), -1)))
        ids = np.where(image < 0, self.line_end, 0)
        ids[-len(self.end) :] = self.end
        # The prompt ends with the token that opens the picture, which the text head learns too.
        return response_row(prompt, len(prompt.ids) - 1, ids, image)

    def _answer(self, row: Row) -> TrainingRow:
        patches, grid = patchify(self._semantic(row["image"], self.config.understand_pixels))
        prompt = self._prompt(understand_prompt, str(row["prompt"]), (grid[0] // 2, grid[1] // 2))
        ids = np.array(self.tokenizer.encode([str(row["answer"]), Control("<|im_end|>"), "\n"]))
        made = response_row(prompt, len(prompt.ids), ids, np.full(len(ids), -1))
        return dataclasses.replace(made, patches=patches, grid=grid)

    def _prompt(self, make: Callable[..., Prompt], *arguments: Any) -> Prompt:
        key = (make.__name__, *arguments)
        if key not in self.prompts:
            made = make(self.tokenizer, self.config, *arguments)
            return self._keep(self.prompts, key, made, made.ids.nbytes + made.positions.nbytes)
        return self.prompts[key]

    def _size(self, picture: bytes) -> Size:
        return self.config.bucket(*sides(picture))

    def _semantic(self, picture: bytes, bounds: tuple[int, int]) -> np.ndarray:
        key = (picture, bounds)
        if key not in self.seen:
            made = semantic_image(open_picture(picture), *bounds)
            return self._keep(self.seen, key, made, made.nbytes)
        return self.seen[key]

    def _codes(self, picture: bytes, size: Size) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 `(h, w)` and latents float32 `(h * w, 8)` of a picture (black if empty) at a size."""
        found = self.codes.get((picture, size))
        return found if found is not None else self._encode([picture], size)[0]

    @torch.no_grad()
    def _encode(self, pictures: Sequence[bytes], size: Size) -> list[tuple[np.ndarray, np.ndarray]]:
        black = np.zeros((*size, 3), np.uint8)
        pixels = np.stack([pixel_image(open_picture(one), size) if one else black for one in pictures])
        device = self.vq.quant_conv.weight.device
        latents = self.vq.encode(to_float(torch.from_numpy(pixels).to(device)))
        tokens, points = self.vq.quantise(latents).cpu().numpy(), latents.flatten(2).mT.cpu().numpy()
        made = [(tokens[index].copy(), points[index].copy()) for index in range(len(pictures))]
        for one, codes in zip(pictures, made, strict=True):
            self._keep(self.codes, (one, size), codes, codes[0].nbytes + codes[1].nbytes)
        return made

    def _keep(self, cache: dict[Any, Any], key: Hashable, made: Any, size: int) -> Any:
        if self.kept + size <= self.KEPT_BYTES:
            cache[key] = made
            self.kept += size
        return made


def _templates(recipe: Recipe, task: str, language: str) -> list[str]:
    return recipe.templates.get(f"{task}_{language}") or [TEMPLATES[task, language]]


def fits(row: Row, task: str, tokenizer: Tokenizer, config: ModelConfig, recipe: Recipe) -> bool:
    """Whether a stage trains on a row, by its length and the size of its picture.

    Args:
        row: Of data.
        task: Of the row.
        tokenizer: Of texts.
        config: Of the stage's result.
        recipe: The stage, with `lengths` and `least_side`.

    Returns:
        False if the row is too long with any template, or its picture to draw is too small or too long. A
        picture that cannot be decoded counts as fit; it is reported when the row is made.
    """
    if task not in recipe.lengths and not (task == "generate" and recipe.least_side):
        return True
    try:
        height, width = sides(row["picture" if task == "generate" else "image"])
    except BadPicture:
        return True
    longer, shorter = max(height, width), min(height, width)
    if task == "generate" and recipe.least_side and (longer < recipe.least_side or longer > 2 * shorter):
        return False
    if task not in recipe.lengths:
        return True
    bounds = config.understand_pixels if task == "understand" else config.edit_pixels
    rows, columns = (side // FACTOR for side in smart_resize(height, width, *bounds))
    if task == "understand":
        made = understand_prompt(tokenizer, config, str(row["prompt"]), (rows, columns))
        answer = tokenizer.encode([str(row["answer"]), Control("<|im_end|>"), "\n"])
        return len(made.ids) + len(answer) <= recipe.lengths[task]
    size = config.bucket(height, width)
    # Three tokens close a picture.
    drawn = size.grid[0] * (size.grid[1] + config.line_break) - config.line_break + 3
    prompts = [(str(row["prompt"]), str(row["language"]))]
    if row.get("prompt_zh"):
        prompts = [(str(row["prompt"]), "en"), (str(row["prompt_zh"]), "zh")]
    for prompt, language in prompts:
        for template in _templates(recipe, task, language):
            if task == "generate":
                made = generate_prompt(tokenizer, config, prompt, size, language, template)
            else:
                made = edit_prompt(tokenizer, config, prompt, size, (rows, columns), language, template)
            if len(made.ids) + drawn > recipe.lengths[task]:
                return False
    return True


BLACK_PATCH = (-MEAN / STD).repeat(FRAMES * PATCH * PATCH)
"""A patch of a black picture, `(1176,)`."""
