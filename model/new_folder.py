"""Folders that appear whole: a checkpoint, LoRA updates, a stock folder. Foreign files are never removed.

Knows nothing of what the files hold, except the file list of a checkpoint that is replaced.
"""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wallaroo.model.errors import InputError

FILE_LIST = "checkpoint.json"
"""The file that lists the others of a checkpoint, and is written last."""

_MARK = ".wallaroo-partial"
"""Marks a folder that is being written, so that it is not taken for a foreign one."""


@contextmanager
def new_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that gets its name when all is written, and vanishes on an error.

    Until then it is NAME.partial. One that a killed program left is removed, but not a foreign one.

    Args:
        folder: Its name in the end.
        overwrite: Whether it may hold files. Those of the same names are replaced, those of a checkpoint that
            it was are removed, all others stay.

    Yields:
        The folder, under a temporary name.

    Raises:
        InputError: `folder` or NAME.partial exists already, or cannot be written.
    """
    folder = Path(folder).absolute()
    held = _first_file(folder)
    if held is not None and not (overwrite and folder.is_dir()):
        if not folder.is_dir():
            raise InputError(f"{folder} exists already and is not a folder; name a new one.")
        raise InputError(
            f"{folder} exists already and is not empty; it holds {held:.100}: name a new folder, or "
            f"--overwrite to replace files of the same names."
        )
    partial = folder.with_name(folder.name + ".partial")
    _remove_partial(partial)
    try:
        partial.mkdir(parents=True)
        (partial / _MARK).touch()
        if folder.exists():
            # What was for some eyes only stays so.
            partial.chmod(stat.S_IMODE(folder.stat().st_mode))
    except OSError as error:
        raise InputError(f"{partial} cannot be made ({error.strerror}); name a folder that can.") from None
    try:
        yield partial
        if held is None:
            partial.rename(folder)
            (folder / _MARK).unlink()
        else:
            _replace_files(partial, folder)
    except BaseException:
        _remove_partial(partial)
        raise


def _first_file(folder: Path) -> str | None:
    """What keeps a path from being that of a new folder: the name of something in it, or its own."""
    if not os.path.lexists(folder):
        return None
    return min((one.name for one in folder.iterdir()), default=None) if folder.is_dir() else folder.name


def _remove_partial(partial: Path) -> None:
    """Removes what `new_folder` has begun. Raises InputError if the path is foreign."""
    if not os.path.lexists(partial):
        return
    plain = partial.is_dir() and not partial.is_symlink()
    if not plain or not ((partial / _MARK).is_file() or not any(partial.iterdir())):
        raise InputError(
            f"{partial}, which would be written first, exists and is not ours; name another folder, or move "
            f"it elsewhere."
        )
    shutil.rmtree(partial, ignore_errors=True)


def _replace_files(partial: Path, folder: Path) -> None:
    """Moves all files into a folder that holds others, which is no checkpoint until the last has moved."""
    new = sorted((file for file in partial.iterdir() if file.name != _MARK), key=_list_last)
    stale = _listed(folder) - {file.name for file in new}
    try:
        (folder / FILE_LIST).unlink(missing_ok=True)
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        for file in new:
            os.replace(file, folder / file.name)
    except OSError as error:
        raise InputError(
            f"{error.filename2 or error.filename} cannot be replaced ({error.strerror}); name a new folder."
        ) from None
    shutil.rmtree(partial, ignore_errors=True)


def _listed(folder: Path) -> set[str]:
    """Files that a checkpoint lists, which are plain names; none if the folder is no checkpoint."""
    try:
        names = set(json.loads((folder / FILE_LIST).read_bytes())["files"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return set()
    return {name for name in names if name == os.path.basename(name) and name not in ("", ".", "..")}


def _list_last(file: Path) -> tuple[bool, str]:
    return file.name == FILE_LIST, file.name
