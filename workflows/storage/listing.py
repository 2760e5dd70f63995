"""The files of a folder or a pattern, local or on S3."""

import dataclasses
import glob
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeVar

from wallaroo.workflows.storage.clients import s3_client, s3_filesystem
from wallaroo.workflows.storage.errors import explained, raise_unless_missing
from wallaroo.workflows.storage.files import info
from wallaroo.workflows.storage.local import TEMPORARY, local_info, local_names
from wallaroo.workflows.storage.paths import FileInfo, bucket_and_key, is_s3
from wallaroo.workflows.storage.retries import retried
from wallaroo.workflows.storage.s3 import s3_files

K = TypeVar("K")


@retried
def list_files(folder: str) -> list[FileInfo]:
    """Lists all files below a folder, at any depth.

    Args:
        folder: Local or on S3; it may be absent.

    Returns:
        The files, sorted by relative path.
    """
    with explained(folder):
        if is_s3(folder):
            return sorted(s3_files(folder), key=lambda file: file.relative)
        return sorted(_local_files(folder), key=lambda file: file.relative)


@retried
def list_stamps(folder: str, key: Callable[[str], K | None]) -> dict[K, str]:
    """Lists the stamps of the files below a folder. It needs less memory than a list of FileInfo.

    Args:
        folder: Local or on S3; it may be absent.
        key: Relative path -> the key of the file in the result; None leaves the file out.

    Returns:
        Key -> `FileInfo.stamp`.
    """
    with explained(folder):
        found = s3_files(folder) if is_s3(folder) else _local_files(folder)
        named = ((key(file.relative), file) for file in found)
        return {name: file.stamp for name, file in named if name is not None}


def _local_files(folder: str) -> Iterator[FileInfo]:
    for root, _, names in os.walk(folder, onerror=raise_unless_missing):
        for name in names:
            if name.startswith(TEMPORARY):
                continue
            path = os.path.join(root, name)
            if os.path.isfile(path):  # it may be removed by now, or be a pipe or a broken link
                with suppress(FileNotFoundError):
                    yield local_info(path, os.path.relpath(path, folder).replace(os.sep, "/"))


@retried
def find_files(folder: str, wanted: Callable[[str], bool], most: int) -> list[str]:
    """Finds files below a folder, and reads no more of its listing than needed.

    Args:
        folder: Local or on S3; it may be absent.
        wanted: Whether to take a file, by its path relative to the folder.
        most: Stops after so many files; at least 1.

    Returns:
        Relative paths, in the order of the listing. On a local disk they include links to folders and what is
        neither file nor folder, but not the temporary files of interrupted writes.
    """
    found: list[str] = []
    with explained(folder):
        for relative in _names(folder):
            if wanted(relative):
                found.append(relative)
                if len(found) == most:
                    break
    return found


@retried
def object_names(folder: str, start: str = "") -> list[str]:
    """Lists the names of objects directly in a folder on S3, by one request.

    Args:
        folder: `s3://` path; it may be absent.
        start: Beginning of the names.

    Returns:
        The names in order, the first 1,000 at most.
    """
    bucket, key = bucket_and_key(f"{folder.rstrip('/')}/")
    with explained(folder):
        page = s3_client().list_objects_v2(Bucket=bucket, Prefix=key + start, Delimiter="/")
        return [item["Key"].removeprefix(key) for item in page.get("Contents", [])]


def _names(folder: str) -> Iterator[str]:
    return (file.relative for file in s3_files(folder)) if is_s3(folder) else local_names(folder)


@retried
def match_files(pattern: str) -> list[FileInfo]:
    """Finds the files that match a pattern of `*`, `?`, `[...]` and `**`.

    Args:
        pattern: Local or `s3://` path with such characters.

    Returns:
        The files, sorted by their path relative to the last folder before the first of these characters.
    """
    fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    fixed = fixed[: fixed.rfind("/") + 1]
    with explained(pattern):
        if is_s3(pattern):
            bucket_and_key(fixed)
            paths = [f"s3://{name}" for name in s3_filesystem().glob(pattern)]
        else:
            paths = glob.glob(pattern, recursive=True)
    found = (info(path) for path in paths)
    return sorted(
        (dataclasses.replace(file, relative=file.path.removeprefix(fixed)) for file in found if file),
        key=lambda file: file.relative,
    )
