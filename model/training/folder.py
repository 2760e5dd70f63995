"""Ownership of a stage's folder: no stage writes beside foreign files without `overwrite`.

From the first start of a stage, its folder holds STAGE_FILE. Knows nothing of what a stage writes.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from wallaroo.model.errors import InputError
from wallaroo.model.training.state import STATES

STAGE_FILE = "stage.json"
MARK = {"format": 1, "written_by": "wallaroo train"}
"""What STAGE_FILE holds."""

MAX_NAMED = 3
"""Foreign files that a message names."""

_STATE = re.compile(rf"{STATES}/step-\d{{8,}}/.+")
"""Files of a stage that began before there was a STAGE_FILE."""

_LOCK = "lock.json"


def is_mark(data: bytes | None) -> bool:
    """Whether these bytes are those of a STAGE_FILE."""
    try:
        found = json.loads(data or b"")
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("written_by") == MARK["written_by"]


def mark() -> bytes:
    """The contents of a STAGE_FILE."""
    return json.dumps(MARK).encode() + b"\n"


def check_names(folder: str, names: Iterable[str]) -> None:
    """Refuses the folder of a stage that has no STAGE_FILE, if it holds foreign files.

    Args:
        folder: Of the stage.
        names: Relative paths of what is below it.

    Raises:
        InputError: It holds files, and no state of a stage.
    """
    others = []
    for name in names:
        if _STATE.fullmatch(name):
            return
        if name != _LOCK:
            others.append(name)
    if others:
        more = " and more" if len(others) > MAX_NAMED else ""
        named = ", ".join(name[:100] for name in sorted(others)[:MAX_NAMED])
        raise InputError(
            f"{folder} is not empty and not the folder of a stage; it holds {named}{more}; name another "
            f"folder in the recipe, or --overwrite to write beside."
        )


def claim(folder: str, overwrite: bool = False) -> None:
    """Makes a folder on this machine that of a stage, if it is not yet.

    Args:
        folder: It may be absent.
        overwrite: Whether it may hold files of others; those of a stage's names are then replaced.

    Raises:
        InputError: It holds foreign files, or cannot be written.
    """
    path = Path(folder) / STAGE_FILE
    try:
        if path.is_file() and is_mark(path.read_bytes()):
            return
        if not overwrite:
            check_names(folder, _names(folder))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(mark())
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); name a folder that can.") from None


def _names(folder: str) -> Iterable[str]:
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in [*files, *links]:
            yield os.path.relpath(os.path.join(root, name), folder).replace(os.sep, "/")
