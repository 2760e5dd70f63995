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
    """A picture as a `model.engine.Request` wants it.

    width, height: of the upright source, in pixels. semantic: uint8 [h, w, 3]; grid: rows and columns
    of its merged tokens. size: of the picture that an edit makes, pixels: uint8 [H, W, 3] of that size;
    both None for understanding.
    """

    width: int
    height: int
    semantic: np.ndarray
    grid: tuple[int, int]
    size: Size | None = None
    pixels: np.ndarray | None = None


@dataclass(frozen=True)
class Source:
    """A source made ready. uri, sha256: as `Fetched` has them. note: what was ignored of it, or empty."""

    uri: str
    sha256: str
    prepared: Prepared
    note: str = ""


def load_many(
    references: Sequence[Reference], task: str, config: ModelConfig, options: SourceOptions
) -> Iterator[tuple[list[int], Source | RowError]]:
    """Every distinct source of a shard once, with the positions that name it, made ready or refused.

    While one is decoded the next ones are fetched; no more than one decoded picture is held at a time.
    Raises InputError as `fetch` does.
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
    """An upright RGB picture as the task `edit` or `understand` takes it.

    Raises RowError("image"), whose message begins with `name`, if one side is more than 200 times the
    other.
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
