"""JSON values: equal bytes for equal values, and digests of them."""

import base64
import datetime
import decimal
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage


def read_json(path: str, remedy: str) -> Any:
    """Reads a JSON file of an output.

    Args:
        path: Local or `s3://` path.
        remedy: What to do if it is not JSON, as the end of a sentence.

    Returns:
        The value in the file.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: It is not JSON, or cannot be read.
    """
    data = storage.read_bytes(path)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}): {remedy}.") from None


def canonical_json(value: Any) -> bytes:
    """Encodes a plain value as its one UTF-8 JSON text: keys sorted, no spaces, 3.0 as 3.

    Args:
        value: The value; tuples count as lists.

    Returns:
        The text.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    text = json.dumps(
        plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def plain(value: Any) -> Any:
    """Converts a value to plain JSON types: tuples to lists, keys to text, whole floats to integers."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def digest(value: Any) -> str:
    """sha256 of `canonical_json(value)`, hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings.

    Args:
        value: The mapping.
        prefix: Put before every key.

    Returns:
        One mapping with keys such as `sampling.cfg`.
    """
    found: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            found |= flat(item, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = item
    return found


def shown(values: Mapping[str, Any], key: str) -> str:
    """Formats a value for a message.

    Args:
        values: The values.
        key: Key of the value.

    Returns:
        JSON text of at most 80 characters, or `absent`.
    """
    if key not in values:
        return "absent"
    text = json.dumps(values[key], ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def json_line(values: Mapping[str, Any]) -> bytes:
    """Encodes values from `jsonable` as a line of a JSON Lines file."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        # UTF-8 has no lone surrogates, but JSON can escape them.
        return json.dumps(values, allow_nan=False).encode() + b"\n"


def json_again(text: str) -> Any:
    """Parses JSON text; returns the text itself if it is not JSON."""
    try:
        return jsonable(json.loads(text))
    except (ValueError, RecursionError):
        return text


def jsonable(value: Any) -> Any:
    """Converts a value from Arrow to one that JSON can hold. NaN and infinity become null, bytes base64."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return str(value)
    return str(value)
