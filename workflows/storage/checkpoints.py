"""Folders of checkpoints, copied from S3 into a local cache and verified."""

import errno
import fcntl
import functools
import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from wallaroo.model import checkpoint
from wallaroo.model.checkpoint import CONFIG, FILE_LIST, TOKENIZER, digest, parse_file_list
from wallaroo.model.config import ModelConfig
from wallaroo.model.errors import InputError
from wallaroo.model.tokenizer import Tokenizer
from wallaroo.model.weight_files import FileEntry
from wallaroo.workflows.storage.clients import s3_client
from wallaroo.workflows.storage.errors import explained, raise_if_missing
from wallaroo.workflows.storage.files import info, read_bytes, write_atomic
from wallaroo.workflows.storage.paths import absolute_path, bucket_and_key, is_s3, join
from wallaroo.workflows.storage.retries import retried

_CHECKPOINTS = "a folder that `wallaroo convert` made of the published files (docs/models.md), or tiny"
RANGE_BYTES = 16 << 20
"""Bytes of one request."""
RANGES_AT_ONCE = 8
"""Requests at once."""


def fetch_folder(path: str, names: Sequence[str] | None = None, cache: Path | None = None) -> Path:
    """Returns a local folder with files of a checkpoint. One on S3 is copied to a cache.

    A file gets its name in the cache only after its digest was verified. So it is fetched and verified once
    for all processes of a machine.

    Args:
        path: Folder of the checkpoint, local or on S3.
        names: Files to fetch beside the list of files; all if None. Without the weights, nobody waits for
            them.
        cache: Folder of the cache; `~/.cache/wallaroo` if None.

    Returns:
        The folder; a local path is returned unchanged.

    Raises:
        InputError: `path` is no checkpoint, or a file differs from what its list says.
    """
    if not is_s3(path):
        return Path(path)
    where = join(path, FILE_LIST)
    try:
        data = read_bytes(where)
    except FileNotFoundError:
        raise InputError(
            f"{path} is not a checkpoint, since it has no {FILE_LIST}: give {_CHECKPOINTS}."
        ) from None
    files = parse_file_list(data, where)
    folder = (cache or Path.home() / ".cache" / "wallaroo") / digest(files)
    with explained(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / FILE_LIST).exists():
            write_atomic(str(folder / FILE_LIST), data)
        for name in files if names is None else names:
            if not (folder / name).exists():
                _fetch_file(join(path, name), folder / name, *files[name])
    return folder


def _fetch_file(path: str, target: Path, size: int, sha256: str) -> None:
    """Copies a file to this machine, unless it is there. Resumes the copy of a killed process."""
    with open(target.with_name(f".{target.name}.lock"), "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if target.exists():
            return  # another process fetched it while this one waited
        part = target.with_name(f".{target.name}.part")
        ranges = target.with_name(f".{target.name}.ranges")
        while True:
            resumed = ranges.exists()
            try:
                whole = _fetch_ranges(path, part, ranges, size) and _sha256(part) == sha256
            except FileNotFoundError:
                raise InputError(f"{path} is missing, but its checkpoint lists it: copy it there.") from None
            if whole:
                os.replace(part, target)
                ranges.unlink()
                return
            part.unlink()
            ranges.unlink()
            # The ranges on the disk may be damaged by a power cut; the next try starts again.
            if not resumed:
                raise InputError(
                    f"{path} is not the file that its checkpoint lists, since size or sha256 differ: "
                    f"copy the checkpoint again."
                )


def _fetch_ranges(path: str, part: Path, ranges: Path, size: int) -> bool:
    """Fetches the missing ranges of a file, several at once.

    Args:
        path: `s3://` path of the file.
        part: The local copy.
        ranges: File with the first byte of each range that is done, one a line.
        size: Size that the file should have, in bytes.

    Returns:
        False if it has another size.
    """
    done = set(ranges.read_text().split()) if ranges.exists() else set()
    starts = [start for start in range(0, size, RANGE_BYTES) if str(start) not in done]

    def fetch(start: int) -> bool:
        stop = min(start + RANGE_BYTES, size)
        with explained(path):
            data = _read_range(path, start, stop)
        if len(data) != stop - start:
            return False
        with explained(str(part), writing=True):
            os.pwrite(file.fileno(), data, start)
        # One short line, so that two threads cannot mix theirs.
        os.write(record.fileno(), f"{start}\n".encode())
        return True

    found = info(path)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    with ExitStack() as stack:
        with explained(str(part), writing=True):
            file = stack.enter_context(open(part, "r+b" if part.exists() else "w+b"))
            record = stack.enter_context(open(ranges, "ab", 0))
        with ThreadPoolExecutor(RANGES_AT_ONCE) as pool:
            return found.size == size and all(pool.map(fetch, starts))


@retried
def _read_range(path: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of an object on S3, fewer where it ends."""
    bucket, key = bucket_and_key(path)
    try:
        answer = s3_client().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
        return answer["Body"].read()
    except Exception as error:
        raise_if_missing(path, error)
        raise


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checkpoint(NamedTuple):
    """What is known of a checkpoint without its weights."""

    config: ModelConfig
    """Configuration of the model."""
    tokenizer: Tokenizer
    """Tokenizer of the model."""
    digest: str
    """Digest of its list of files, hexadecimal."""


@functools.lru_cache(maxsize=4)
def read_checkpoint(model: str) -> Checkpoint:
    """Reads what planning needs of a checkpoint, once a process. Weights are neither read nor fetched.

    Args:
        model: Folder of the checkpoint, local or on S3.

    Returns:
        Configuration, tokenizer and digest.

    Raises:
        InputError: It is no checkpoint, or a file is damaged.
    """
    folder, files = fetch_folder(model, (CONFIG, TOKENIZER)), read_files(model)
    return Checkpoint(ModelConfig.from_file(folder / CONFIG), Tokenizer.from_folder(folder), digest(files))


def read_files(model: str) -> dict[str, FileEntry]:
    """Reads the list of files of a checkpoint.

    Args:
        model: Folder of the checkpoint, local or on S3.

    Returns:
        Name -> size in bytes and sha256.

    Raises:
        InputError: It is no checkpoint.
    """
    where = fetch_folder(model, ()) / FILE_LIST
    try:
        return parse_file_list(where.read_bytes(), str(where))
    except OSError:
        raise InputError(
            f"The model {model} is not a checkpoint, {_fault(model)}: give {_CHECKPOINTS}."
        ) from None


def _fault(model: str) -> str:
    """Why a local path is no checkpoint."""
    if os.path.isdir(model):
        return f"since it has no {FILE_LIST}"
    named = re.fullmatch(r"[\w-]+/[\w.-]+", os.path.relpath(model))
    hub = ", and models named as on the Hugging Face Hub are not downloaded" if named else ""
    return f"since there is no such folder{hub}"


def model_path(model: str) -> str:
    """Path of a checkpoint, which may be given as `tiny`."""
    return str(checkpoint.TINY) if model == "tiny" else absolute_path(model)
