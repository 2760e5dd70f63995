"""`_SUCCESS`: what says that an output is complete, and how many rows of each kind it has."""

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
    """Rows that are in `data/`: all, ok, and errors by kind.

    Of the ok rows also: sizes in pixels, width first, of their pictures; languages; and the folders that
    their source pictures are in.
    """

    rows: int = 0
    ok: int = 0
    errors: dict[str, int] = dataclasses.field(default_factory=dict)
    sizes: Counter[tuple[int, int]] = dataclasses.field(default_factory=Counter)
    languages: Counter[str] = dataclasses.field(default_factory=Counter)
    folders: Counter[str] = dataclasses.field(default_factory=Counter)


def read_success(output: str) -> dict[str, Any] | None:
    """What `_SUCCESS` says: `rows`, `ok`, `errors` by kind, `shards`, `parts`; None if there is none."""
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
