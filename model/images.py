"""Prepares source pictures for the vision tower and the VQ encoder.

The vision tower takes patches (semantic), the VQ encoder pixels. All functions work on RGB pictures that are
upright and opaque already, with numpy and Pillow. Knows nothing of torch, nor of where a picture came from.
"""

import math

import numpy as np
from PIL import Image

from wallaroo.model.config import Size
from wallaroo.model.errors import RowError

PATCH = 14
MERGE = 2
FRAMES = 2
"""The vision tower is a video model: a still picture enters as this many equal frames."""
FACTOR = PATCH * MERGE
MAX_SIDE_RATIO = 200

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def smart_resize(
    height: int, width: int, min_pixels: int, max_pixels: int, factor: int = FACTOR
) -> tuple[int, int]:
    """Height and width at which the vision tower sees a picture (the rule of Qwen2.5-VL, arXiv 2502.13923).

    Both are multiples of `factor` in about the picture's ratio. Their product lies between the two limits,
    except for long pictures at close or small limits (see `most_tokens`).

    Args:
        height: Of the picture, in pixels.
        width: Of the picture, in pixels.
        min_pixels: Least product.
        max_pixels: Most product.
        factor: Side of a token, in pixels.

    Returns:
        Height and width in pixels.

    Raises:
        RowError: Kind `image`: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_SIDE_RATIO * min(height, width):
        raise RowError(
            "image",
            f"The image is {width}x{height} pixels, but one side may be at most {MAX_SIDE_RATIO} times "
            "the other; crop it.",
        )
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        # The lower bound acts only for limits far below the published ones, where a side would vanish.
        rows, columns = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return rows, columns


def most_tokens(min_pixels: int, max_pixels: int, factor: int = FACTOR) -> int:
    """Upper bound on the tokens of any picture that `smart_resize` scales between two limits.

    A long picture may come to more than `max_pixels`: no side is under a token, and what is too small grows
    to whole tokens on both sides.

    Args:
        min_pixels: Least pixels.
        max_pixels: Most pixels.
        factor: Side of a token, in pixels.

    Returns:
        Tokens, squares of `factor` x `factor` pixels.
    """
    longest = math.isqrt(MAX_SIDE_RATIO * max_pixels) // factor
    shrunk = max(max_pixels // factor**2, longest)
    # Longer side of what grows: over `tokens - 1` and up to `tokens` of them. The other one follows from it.
    least = min_pixels / factor**2
    sides = range(math.ceil(math.sqrt(least)), math.ceil(math.sqrt(least * MAX_SIDE_RATIO)) + 1)
    grown = (tokens * math.ceil(least / max(tokens - 1, math.sqrt(least))) for tokens in sides)
    return max(shrunk, *grown)


def semantic_image(image: Image.Image, min_pixels: int, max_pixels: int) -> np.ndarray:
    """A picture as the vision tower sees it.

    Args:
        image: RGB, upright.
        min_pixels: Least pixels.
        max_pixels: Most pixels.

    Returns:
        uint8 `(h, w, 3)`; both sides are multiples of 28.

    Raises:
        RowError: As `smart_resize` does.
    """
    height, width = smart_resize(image.height, image.width, min_pixels, max_pixels)
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC))


def cover_size(height: int, width: int, size: Size) -> tuple[int, int]:
    """The size of a picture scaled so that it just covers another size.

    Args:
        height: Of the picture, in pixels.
        width: Of the picture, in pixels.
        size: To cover, in pixels.

    Returns:
        Height and width, in pixels.
    """
    if size.height / height > size.width / width:
        return size.height, int(width * size.height / height)
    return int(height * size.width / width), size.width


def pixel_image(image: Image.Image, size: Size) -> np.ndarray:
    """Scales a picture to cover a size, and crops it about its centre.

    Args:
        image: RGB.
        size: Of the result, in pixels.

    Returns:
        uint8 [H, W, 3].
    """
    height, width = cover_size(image.height, image.width, size)
    # Python's round: an odd excess of 1, 5, 9 ... pixels gives the smaller offset, 3, 7 ... the larger.
    top, left = round((height - size.height) / 2), round((width - size.width) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + size.width, top + size.height)))


def patchify(image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Cuts a picture into normalised patches for the vision tower.

    Args:
        image: uint8 `(h, w, 3)`; both sides are multiples of 28.

    Returns:
        Patches, float32 `(n, 1176)`, and their grid `(h / 14, w / 14)`. Four patches that become one token
        stand together. A patch holds its numbers as (channel, frame, row, column).
    """
    height, width, channels = image.shape
    rows, columns = height // PATCH, width // PATCH
    values = (image.astype(np.float32) / np.float32(255) - MEAN) / STD
    blocks = values.reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, channels)
    # -> block row, block column, row and column in the block, channel, row and column in the patch
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    frames = np.broadcast_to(blocks, (*blocks.shape[:5], FRAMES, PATCH, PATCH))
    return frames.reshape(rows * columns, channels * FRAMES * PATCH * PATCH), (rows, columns)
