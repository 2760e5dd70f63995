"""Values of manifest cells, checked one by one: numbers, sizes, ratios, prompts, languages."""

import decimal
import functools
import math
import re
from typing import Any

from wallaroo.model.config import ModelConfig, Size
from wallaroo.model.errors import RowError
from wallaroo.model.sampling import Sampling

SEEDS = 2**63
"""Number of seeds; a seed is less than it."""
INT32 = range(-(2**31), 2**31)
"""Numbers that an int32 column can hold."""
EXACT_FLOATS = 2**53
"""Floats less than it stand for one integer; it may be a rounded 2^53 + 1, and larger ones are alike."""
MOST_OFF = 1.6
"""Largest factor between an aspect ratio and that of its size: 21:9 gets 16:9, 7:1 is refused."""
ROUNDED = "is a float of 2^53 or more, so it may be rounded (as pandas does to integers beside an empty cell)"
"""Ending of messages about such a float."""
_NOTHING = frozenset({"nan", "<na>", "none", "null", "na", "n/a", "nat"})
"""Words that pandas and other tools write for a missing value; case does not matter."""


def is_finite(value: float | None) -> float | None:
    """Returns the number; None if it is NaN or infinite."""
    return value if value is not None and math.isfinite(value) else None


def size_of(width: int | None, height: int | None, ratio: Any, config: ModelConfig) -> Size:
    """Chooses the size of a row from the checkpoint's table.

    Args:
        width: In pixels; None if absent.
        height: In pixels; None if absent.
        ratio: Cell of the column `aspect_ratio`: 16:9, 1.78, or nothing.
        config: Configuration of the checkpoint.

    Returns:
        The given size, or the one nearest to the ratio; without both the one nearest to a square.

    Raises:
        RowError: ("size") The model has no such size, or the values contradict each other.
    """
    if not is_absent(ratio):
        if width is not None or height is not None:
            raise RowError(
                "size", f"aspect_ratio {in_words(ratio)} is given with a width or height; give one of them."
            )
        # Only the quotient matters, so a ratio can stand for pixels.
        tall, wide = _ratio(ratio)
        size = config.bucket(tall, wide)  # type: ignore[arg-type]
        off = (wide / tall) / (size.width / size.height)
        if max(off, 1 / off) > MOST_OFF:
            raise RowError(
                "size",
                f"aspect_ratio is {in_words(ratio)}, far from all sizes of the model; the nearest is {size}.",
            )
        return size
    if width is None and height is None:
        return config.bucket(1, 1)
    if width is None or height is None:
        given, absent = ("width", "height") if height is None else ("height", "width")
        value = width if height is None else height
        raise RowError("size", f"{given} is {value}, but {absent} is missing; give both or neither.")
    size = Size(height, width)
    if size in config.size_list():
        return size
    if width < 1 or height < 1:
        raise RowError("size", f"width {width} and height {height} must be positive numbers of pixels.")
    nearest = config.bucket(height, width)
    raise RowError("size", f"size {size} is not one of the model's; the nearest is {nearest}.")


def _ratio(value: Any) -> tuple[float, float]:
    """Parses an aspect ratio (16:9, 1.78 or a number) to height and width, up to a common factor."""
    try:
        text = value if isinstance(value, str) else repr(float(value))
        width, _, height = text.partition(":")
        pair = float(height) if height else 1.0, float(width)
    except (TypeError, ValueError):
        pair = 0.0, 0.0
    if not all(math.isfinite(side) and 1e-6 < side < 1e6 for side in pair):
        raise RowError(
            "size", f"aspect_ratio is {in_words(value)}, but must be width to height, such as 16:9 or 1.78."
        )
    return pair


@functools.lru_cache(maxsize=4096)
def check_sampling(cfg: float = 1, temperature: float = 1, top_k: float = 0, top_p: float = 1) -> None:
    """Checks sampling parameters of a row; those that are not given have values that are valid.

    Args:
        cfg: Scale of classifier-free guidance.
        temperature: Divides the logits; 0 is greedy.
        top_k: Tokens to keep; 0 keeps all.
        top_p: Probability mass to keep.

    Raises:
        RowError: ("sampling") One of them breaks a rule.
    """
    Sampling(cfg, temperature, top_k, top_p).validate()  # type: ignore[arg-type]
    if top_k >= INT32.stop:
        raise RowError("sampling", f"top_k is {top_k}, but must be less than 2^31 (0 keeps all tokens).")


def is_absent(value: Any) -> bool:
    """Whether an optional value is absent: null, NaN, empty text, or a word such as `none`."""
    if isinstance(value, str):
        return not value.strip() or value.strip().lower() in _NOTHING
    return value is None or (isinstance(value, (float, decimal.Decimal)) and value != value)


def integer(name: str, value: Any, kind: str, allowed: range) -> int | None:
    """Reads a whole number from a cell, which may hold text.

    Args:
        name: Name of the parameter, for messages.
        value: The cell.
        kind: Kind of the error.
        allowed: Allowed numbers.

    Returns:
        The number; None if the cell is empty.

    Raises:
        RowError: (`kind`) The cell holds anything else, or a float that may be rounded.
    """
    if is_absent(value):
        return None
    number = None
    text = str(value).strip() if isinstance(value, (str, float)) else ""
    is_float = re.fullmatch(r"[+-]?[0-9]{1,30}(\.[0-9]*|(\.[0-9]*)?e[+-]?[0-9]{1,3})", text, re.IGNORECASE)
    if is_float and EXACT_FLOATS <= abs(float(text)) < 2 * SEEDS:
        raise RowError(kind, f"{name} {text} {ROUNDED}; give it as an integer or as text.")
    if isinstance(value, str):
        if re.fullmatch(r"\s*[+-]?[0-9]{1,30}(\.0*)?\s*", value):
            number = int(value.strip().partition(".")[0])
    elif isinstance(value, (float, decimal.Decimal)):
        number = int(value) if math.isfinite(value) and value == int(value) else None
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    if number is None or number not in allowed:
        bounds = "2^63 - 1" if allowed.stop == SEEDS else f"{allowed.stop - 1}"
        raise RowError(
            kind, f"{name} is {in_words(value)}, but must be a whole number from {allowed.start} to {bounds}."
        )
    return number


def real_number(name: str, value: Any, default: float) -> float:
    """Reads a number from a cell, which may hold text.

    Args:
        name: Name of the parameter, for messages.
        value: The cell.
        default: The number for an empty cell.

    Returns:
        The number; it may be infinite.

    Raises:
        RowError: ("sampling") The cell holds anything else.
    """
    if is_absent(value):
        return default
    try:
        if isinstance(value, (bool, bytes)) or (isinstance(value, str) and "_" in value):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise RowError("sampling", f"{name} is {in_words(value)}, but must be a number.") from None


_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "\u300c": "\u300d"}
"""Quote that opens -> quote that closes."""


def without_quotes(text: str) -> str:
    """Removes the quotes around all of a text. Quotes around a part of it stay.

    Args:
        text: A prompt.

    Returns:
        The text between a pair of quotes if neither of them occurs in between; otherwise the text itself.
    """
    inner = text.strip()
    opening, closing = inner[:1], inner[-1:]
    if len(inner) < 2 or _QUOTES.get(opening) != closing or {opening, closing} & set(inner[1:-1]):
        return text
    return inner[1:-1].strip()


def in_words(value: Any) -> str:
    """Formats a value for a message: one line of at most 60 characters."""
    text = f"'{value[:60]}'" if isinstance(value, str) else repr(value)
    # A message stays one line, whatever the prompt holds.
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return text if len(text) <= 60 else f"{text[:59]}…"
