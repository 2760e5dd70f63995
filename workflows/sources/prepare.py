"""Source pictures as the model takes them: fetched, decoded and resized."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from wallaroo.model.config import ModelConfig, Size
from wallaroo.model.errors import RowError
from wallaroo.model.images import FACTOR, pixel_image, semantic_image
from wallaroo.workflows.sources.decode import NOTE, decode
from wallaroo.workflows.sources.fetch import Fetched, fetch_many
from wallaroo.workflows.sources.references import Reference, SourceOptions


@dataclass(frozen=True)
class Prepared:
    """A picture as a `model.engine.Request` takes it."""

    width: int
    """Width of the upright source in pixels."""
    height: int
    """Height of the upright source in pixels."""
    semantic: np.ndarray
    """uint8 [h, w, 3]: pixels for the vision tower."""
    grid: tuple[int, int]
    """Rows and columns of its merged tokens."""
    size: Size | None = None
    """Size of the picture that an edit makes; None for understanding."""
    pixels: np.ndarray | None = None
    """uint8 [H, W, 3]: the source at that size; None for understanding."""


@dataclass(frozen=True)
class Source:
    """A source ready for the model."""

    uri: str
    """`Fetched.uri`."""
    sha256: str
    """`Fetched.sha256`."""
    prepared: Prepared
    """The picture."""
    note: str = ""
    """What was ignored of the file, such as a broken colour profile; empty if nothing."""


def load_many(
    references: Sequence[Reference], task: str, config: ModelConfig, options: SourceOptions
) -> Iterator[tuple[list[int], Source | RowError]]:
    """Fetches, decodes and resizes every distinct source of a shard once.

    The next sources are fetched while one is decoded. Only one decoded picture is in memory at a time.

    Args:
        references: Value of `image`, row by row.
        task: `edit` or `understand`.
        config: Configuration of the model.
        options: Where sources may come from, and their limits.

    Yields:
        The positions of a source, and the source or the reason for refusal.

    Raises:
        InputError: A storage does not serve.
    """
    for positions, fetched in fetch_many(references, options):
        made = fetched if isinstance(fetched, RowError) else _load(fetched, task, config, options)
        del fetched
        yield positions, made


def _load(fetched: Fetched, task: str, config: ModelConfig, options: SourceOptions) -> Source | RowError:
    try:
        image = decode(fetched.data, fetched.name, options.most_pixels, options.decode_seconds)
        ready = prepare(image, task, config, fetched.name)
        return Source(fetched.uri, fetched.sha256, ready, image.info.get(NOTE, ""))
    except RowError as error:
        return error


def prepare(image: Image.Image, task: str, config: ModelConfig, name: str = "The source") -> Prepared:
    """Resizes a picture for a task.

    Args:
        image: Upright picture in mode RGB.
        task: `edit` or `understand`.
        config: Configuration of the model.
        name: Name of the picture; messages begin with it.

    Returns:
        The picture as the model takes it.

    Raises:
        RowError: ("image") One side is more than 200 times the other.
    """
    least, most = config.edit_pixels if task == "edit" else config.understand_pixels
    try:
        semantic = semantic_image(image, least, most)
    except RowError as error:
        raise RowError(error.kind, f"{name}: {error}") from None
    height, width, _ = semantic.shape
    size = config.bucket(image.height, image.width) if task == "edit" else None
    return Prepared(
        width=image.width,
        height=image.height,
        semantic=semantic,
        grid=(height // FACTOR, width // FACTOR),
        size=size,
        pixels=None if size is None else pixel_image(image, size),
    )
