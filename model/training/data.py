"""Rows to train on: where they come from, in which order, and how their pictures are opened.

Knows nothing of tokens or losses.
"""

import base64
import contextlib
import functools
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from wallaroo.model.errors import InputError

Row = Mapping[str, Any]
"""prompt and language, and by task: picture (generate), image and picture (edit), image and answer
(understand); pictures are encoded files. With prompt_zh, as the names of classes have it, a coin decides."""


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a JSONL file, pictures in base64. Raises InputError if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} holds no rows to train on ({error}).") from None
    if not rows:
        raise InputError(f"{path} holds no rows to train on: it is empty.")
    for row in rows:
        for name in ("image", "picture"):
            if name in row:
                row[name] = base64.b64decode(row[name])
    return rows


class Source(Protocol):
    """Gives rows of a task from place `first` on, always the same; places have no end.

    further: how many rows after each of them to take instead, for those that cannot be used.
    """

    def __call__(self, task: str, first: int, size: int, further: int = 0) -> Sequence[Row]: ...


def from_memory(data: Mapping[str, Sequence[Row]], seed: int) -> Source:
    """Rows that can be had by their index, in an order of their own each epoch."""

    def rows(task: str, first: int, size: int, further: int = 0) -> Sequence[Row]:
        place, count = sorted(data).index(task), len(data[task])
        return [data[task][(index + further) % count] for index in shuffled(count, first, size, seed + place)]

    return rows


def shuffled(count: int, first: int, size: int, seed: int) -> np.ndarray:
    """Indices `(size,)` among `count` rows of the places from `first` on: each epoch takes every row once, in
    an order of its own."""
    places = range(first, first + size)
    return np.array([_order(count, seed, place // count)[place % count] for place in places])


@functools.lru_cache(maxsize=16)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def pictures_of(rows: Iterable[Row]) -> list[np.ndarray]:
    """The pictures of rows, uint8 `(H, W, 3)`, for the image tokenizer."""
    return [
        np.array(open_picture(row[name])) for row in rows for name in ("picture", "image") if row.get(name)
    ]


class BadPicture(InputError):
    """A picture that cannot be decoded."""


def open_picture(data: bytes) -> Image.Image:
    """An encoded picture in RGB. Raises BadPicture if it cannot be decoded."""
    with _decoding(data), Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def sides(data: bytes) -> tuple[int, int]:
    """Height and width of an encoded picture."""
    with _decoding(data), Image.open(io.BytesIO(data)) as image:
        return image.height, image.width


@contextlib.contextmanager
def _decoding(data: bytes) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadPicture(
            f"A picture of {len(data):,} bytes among the rows to train on cannot be decoded "
            f"({type(error).__name__}), its sha256 is {hashlib.sha256(data).hexdigest()}; leave its row out."
        ) from None
