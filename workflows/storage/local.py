"""Atomic writes on a local disk: a temporary name, a sync, a rename. Knows no S3."""

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from wallaroo.workflows.storage.errors import raise_unless_missing
from wallaroo.workflows.storage.paths import FileInfo

TEMPORARY = ".wallaroo-tmp-"
"""Prefix of unfinished local files. No listing includes them."""
COPY_BYTES = 1 << 20
"""Size of the buffer for reading and copying."""


def local_info(path: str, relative: str) -> FileInfo:
    """Describes a local file as a listing does.

    Args:
        path: Path of the file.
        relative: Path below the listed folder.

    Returns:
        Its entry.
    """
    return info_of(os.stat(path), path, relative)


def info_of(found: os.stat_result, path: str, relative: str) -> FileInfo:
    """Makes the entry of a local file from its status.

    Args:
        found: Result of `os.stat`.
        path: Path of the file.
        relative: Path below the listed folder.

    Returns:
        The entry.
    """
    return FileInfo(path, relative, found.st_size, f"{found.st_mtime_ns:x}-{found.st_size:x}")


def local_names(folder: str) -> Iterator[str]:
    """Relative paths of all that is below a folder except folders; none if there is no folder."""
    for root, folders, names in os.walk(folder, onerror=raise_unless_missing):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in [*names, *links]:
            if not name.startswith(TEMPORARY):
                yield os.path.relpath(os.path.join(root, name), folder).replace(os.sep, "/")


@contextmanager
def replacing(path: str) -> Iterator[IO[bytes]]:
    """Opens a temporary file that takes the name `path` when the block ends without an error."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            with suppress(FileNotFoundError):
                # A private file stays private.
                os.fchmod(file.fileno(), stat.S_IMODE(os.stat(path).st_mode))
            yield file
            if not file.closed:
                sync(file)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path)


def temporary_path(path: str) -> str:
    """Path of a temporary file beside `path`. Makes the folder if it is absent."""
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}")


def sync(file: IO[bytes]) -> None:
    """Flushes a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: str) -> None:
    """Flushes the folder of `path`, so that a new name in it outlasts a power cut."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def folder_locked(path: str) -> Iterator[None]:
    """Locks the folder of `path`, so that read-then-replace is one step among the processes of a machine."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        # Network file systems may refuse this; then of two at once the last one wins, and the first one
        # finds out when it replaces the file the next time.
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
