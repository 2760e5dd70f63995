"""`_SUCCESS`: marks an output as complete, with its number of rows of each kind."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import SUCCESS_FILE
from wallaroo.workflows.outputs.schema import FORMAT
from wallaroo.workflows.outputs.values import read_json


@dataclass
class RowTotals:
    """Counts of the rows in `data/`."""

    rows: int = 0
    """All rows."""
    ok: int = 0
    """Rows with a result."""
    errors: dict[str, int] = dataclasses.field(default_factory=dict)
    """Kind of error -> rows."""
    sizes: Counter[tuple[int, int]] = dataclasses.field(default_factory=Counter)
    """(width, height) in pixels -> ok rows with a picture of this size."""
    languages: Counter[str] = dataclasses.field(default_factory=Counter)
    """Language -> ok rows."""
    folders: Counter[str] = dataclasses.field(default_factory=Counter)
    """Folder of the source picture -> ok rows."""


def read_success(output: str) -> dict[str, Any] | None:
    """Reads `_SUCCESS`.

    Args:
        output: Folder of the run, local or on S3.

    Returns:
        `format`, `rows`, `ok`, `errors` by kind, `shards` and `parts`; None if there is no such file.

    Raises:
        InputError: The file is damaged or of another version.
    """
    path = storage.join(output, SUCCESS_FILE)
    try:
        document = read_json(path, "move it elsewhere and re-run its command")
    except FileNotFoundError:
        return None
    keys = {"format", "rows", "ok", "errors", "shards", "parts"}
    if not isinstance(document, dict) or set(document) != keys or document["format"] != FORMAT:
        raise InputError(f"{path} was written by another version: use the version that made it.")
    numbers = [document["rows"], document["ok"], document["shards"]]
    if isinstance(document["errors"], dict):
        numbers += document["errors"].values()
    names = document["parts"]
    whole = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not (whole and isinstance(document["errors"], dict) and all(type(one) is int for one in numbers)):
        raise InputError(f"{path} is damaged: move it elsewhere and re-run its command.")
    return document
