"""Values as JSON holds them, the same bytes for the same values, and digests of them."""

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
    """The value in a JSON file of an output.

    Args:
        path: Of the file, local or on S3.
        remedy: What to do if it is not JSON, as the end of a sentence.

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
    """The one UTF-8 JSON text of a plain value: keys sorted, no spaces, 3.0 as 3. Refuses NaN."""
    text = json.dumps(
        plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def digest(value: Any) -> str:
    """sha256, in hex, of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with keys such as `sampling.cfg`."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            found |= flat(item, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = item
    return found


def shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "absent"
    text = json.dumps(values[key], ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def json_line(values: Mapping[str, Any]) -> bytes:
    """A line of a JSON Lines file, from values as `jsonable` gives them."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        # Half a surrogate pair is no UTF-8, but JSON can spell it.
        return json.dumps(values, allow_nan=False).encode() + b"\n"


def json_again(text: str) -> Any:
    """What JSON text says; the text itself where it is none."""
    try:
        return jsonable(json.loads(text))
    except (ValueError, RecursionError):
        return text


def jsonable(value: Any) -> Any:
    """A value that Arrow gave as one that JSON can hold."""
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
