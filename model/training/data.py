"""Rows to train on: their source, their order, and how their pictures are decoded.

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
"""`prompt` and `language`, and by task `picture` (generate), `image` and `picture` (edit), `image` and
`answer` (understand); pictures are encoded files. Of `prompt` and an optional `prompt_zh` one is drawn."""


def read_rows(path: str | Path) -> list[Row]:
    """Reads the rows of a JSON Lines file, whose pictures are in base64.

    Args:
        path: File.

    Returns:
        Its rows, pictures decoded from base64.

    Raises:
        InputError: The file cannot be read or is empty.
    """
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
    """Gives rows by their place, always the same for a place; places have no end."""

    def __call__(self, task: str, first: int, size: int, further: int = 0) -> Sequence[Row]:
        """Gives the rows of consecutive places.

        Args:
            task: Of the rows.
            first: First place, counted over all steps.
            size: Number of places.
            further: Rows to go on from each place, for those that cannot be used.

        Returns:
            `size` rows.
        """


def from_memory(data: Mapping[str, Sequence[Row]], seed: int) -> Source:
    """A source of rows that are read by their index, in another order each epoch.

    Args:
        data: Task -> rows.
        seed: Decides the orders.

    Returns:
        The source.
    """

    def rows(task: str, first: int, size: int, further: int = 0) -> Sequence[Row]:
        place, count = sorted(data).index(task), len(data[task])
        return [data[task][(index + further) % count] for index in shuffled(count, first, size, seed + place)]

    return rows


def shuffled(count: int, first: int, size: int, seed: int) -> np.ndarray:
    """Indices of rows by their place: each epoch takes every row once, in another order.

    Args:
        count: Rows.
        first: First place.
        size: Number of places.
        seed: Decides the orders.

    Returns:
        int64 `(size,)`, from 0 below `count`.
    """
    places = range(first, first + size)
    return np.array([_order(count, seed, place // count)[place % count] for place in places])


@functools.lru_cache(maxsize=16)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def pictures_of(rows: Iterable[Row]) -> list[np.ndarray]:
    """Decodes all pictures of rows, for the image tokenizer.

    Args:
        rows: With `picture`, `image` or both.

    Returns:
        uint8 `(H, W, 3)` each.

    Raises:
        BadPicture: One cannot be decoded.
    """
    return [
        np.array(open_picture(row[name])) for row in rows for name in ("picture", "image") if row.get(name)
    ]


class BadPicture(InputError):
    """A picture that cannot be decoded."""


def open_picture(data: bytes) -> Image.Image:
    """Decodes a picture.

    Args:
        data: Encoded picture.

    Returns:
        The picture in RGB.

    Raises:
        BadPicture: It cannot be decoded.
    """
    with _decoding(data), Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def sides(data: bytes) -> tuple[int, int]:
    """The size of an encoded picture.

    Args:
        data: Encoded picture.

    Returns:
        Height and width in pixels.

    Raises:
        BadPicture: Its header cannot be read.
    """
    with _decoding(data), Image.open(io.BytesIO(data)) as image:
        return image.height, image.width


@contextlib.contextmanager
def _decoding(data: bytes) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadPicture(
            f"An image of {len(data):,} bytes among the rows to train on cannot be decoded "
            f"({type(error).__name__}), its sha256 is {hashlib.sha256(data).hexdigest()}; leave its row out."
        ) from None
