"""Files by path, local or on S3: read, listed, written atomically, replaced on a condition, deleted."""

import dataclasses
import glob
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from wallaroo.workflows.storage.clients import s3_client, s3_filesystem
from wallaroo.workflows.storage.errors import (
    TooLarge,
    explained,
    is_missing,
    raise_if_missing,
    raise_unless_missing,
)
from wallaroo.workflows.storage.local import (
    COPY_BYTES,
    TEMPORARY,
    folder_locked,
    info_of,
    local_info,
    local_names,
    replacing,
    sync,
    sync_folder,
    temporary_path,
)
from wallaroo.workflows.storage.paths import FileInfo, bucket_and_key, is_s3
from wallaroo.workflows.storage.retries import retried
from wallaroo.workflows.storage.s3 import Ranges, put_conditional, s3_files, uploading

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.fs

K = TypeVar("K")


def read_bytes(path: str) -> bytes:
    """Contents of a small file. Raises FileNotFoundError."""
    return read_with_etag(path)[0]


@retried
def read_with_etag(path: str) -> tuple[bytes, str]:
    """Contents of a small file, and the tag that `replace_if_match` wants. Raises FileNotFoundError."""
    with explained(path):
        if not is_s3(path):
            data = Path(path).read_bytes()
            return data, hashlib.sha256(data).hexdigest()
        bucket, key = bucket_and_key(path)
        try:
            answer = s3_client().get_object(Bucket=bucket, Key=key)
        except Exception as error:
            raise_if_missing(path, error)
            raise
        return answer["Body"].read(), answer["ETag"]


@retried
def read_object(path: str, most: int) -> bytes:
    """Contents of an object on S3. Raises FileNotFoundError, and TooLarge before a byte is read."""
    bucket, key = bucket_and_key(path)
    with explained(path):
        try:
            answer = s3_client().get_object(Bucket=bucket, Key=key)
        except Exception as error:
            raise_if_missing(path, error)
            raise
        with closing(answer["Body"]) as body:
            if answer["ContentLength"] > most:
                raise TooLarge(path)
            return body.read()


@retried
def info(path: str) -> FileInfo | None:
    """What a listing would say of one file; None if there is no such file."""
    relative = path.rsplit("/", 1)[-1]
    with explained(path):
        if not is_s3(path):
            if not os.path.isfile(path):
                return None
            return local_info(path, relative)
        bucket, key = bucket_and_key(path)
        if not key:
            return None
        try:
            answer = s3_client().head_object(Bucket=bucket, Key=key)
        except Exception as error:
            if is_missing(error):
                return None
            raise
        return FileInfo(path, relative, answer["ContentLength"], answer["ETag"].strip('"'))


def exists(path: str) -> bool:
    """Whether there is a file of this path. A folder is none."""
    return info(path) is not None


@retried
def list_files(folder: str) -> list[FileInfo]:
    """All files below a folder, at any depth, sorted by relative path; none if there is no folder."""
    with explained(folder):
        if is_s3(folder):
            return sorted(s3_files(folder), key=lambda file: file.relative)
        return sorted(_local_files(folder), key=lambda file: file.relative)


@retried
def list_stamps(folder: str, key: Callable[[str], K | None]) -> dict[K, str]:
    """The stamps of the files below a folder, for listings that would be large as a list of FileInfo.

    Args:
        folder: Local or on S3; it may be absent.
        key: What a file is called in the answer, from its relative path; None leaves it out.

    Returns:
        key -> `FileInfo.stamp`.
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
            if os.path.isfile(path):  # not removed since it was listed, no pipe, no link to nowhere
                with suppress(FileNotFoundError):
                    yield local_info(path, os.path.relpath(path, folder).replace(os.sep, "/"))


@retried
def find_files(folder: str, wanted: Callable[[str], bool], most: int) -> list[str]:
    """Looks for files below a folder, and reads no more of its listing than it takes.

    Args:
        folder: Local or on S3; it may be absent.
        wanted: Of a path relative to the folder, whether it is looked for.
        most: So many are enough, at least 1.

    Returns:
        Their relative paths, in the order in which they were met. Locally also what is neither file nor
        folder, and links to folders; not the temporary files of a write that was cut off.
    """
    found: list[str] = []
    with explained(folder):
        for relative in _names(folder):
            if wanted(relative):
                found.append(relative)
                if len(found) == most:
                    break
    return found


def _names(folder: str) -> Iterator[str]:
    return (file.relative for file in s3_files(folder)) if is_s3(folder) else local_names(folder)


@retried
def match_files(pattern: str) -> list[FileInfo]:
    """Files that match a pattern of `*`, `?`, `[...]` and `**`, sorted; relative to its fixed folders."""
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


@contextmanager
def open_source(path: str, start: int = 0) -> Iterator[IO[bytes]]:
    """A file for reading from byte `start` on, as a buffered stream. Raises FileNotFoundError."""
    with explained(path):
        if is_s3(path):
            raw = s3_filesystem().open(path, "rb", block_size=8 << 20, cache_type="readahead")
            with io.BufferedReader(raw, COPY_BYTES) as file:
                file.seek(start)
                yield file
        else:
            with open(path, "rb", buffering=COPY_BYTES) as file:
                file.seek(start)
                yield file


@contextmanager
def open_ranges(path: str, size: int) -> "Iterator[pyarrow.NativeFile]":
    """A file of known size for reading in any order; on S3 see `Ranges`. Raises FileNotFoundError."""
    import pyarrow

    with explained(path):
        opened = pyarrow.PythonFile(Ranges(path, size), "r") if is_s3(path) else pyarrow.OSFile(path)
        with opened as file:
            yield file


@retried
def write_atomic(path: str, data: bytes | memoryview) -> str:
    """Writes a file, whole or not at all, over the one there may be. On S3 it is one PUT.

    Returns:
        The stamp (`FileInfo.stamp`) that a listing gives this content of the path.
    """
    with explained(path, writing=True):
        if is_s3(path):
            bucket, key = bucket_and_key(path)
            answer = s3_client().put_object(Bucket=bucket, Key=key, Body=bytes(data))
            return FileInfo(path, "", len(data), answer["ETag"].strip('"')).stamp
        with replacing(path) as file:
            file.write(data)
            file.flush()
            # Of this very file: another writer may take the name before it could be asked for.
            return info_of(os.fstat(file.fileno()), path, "").stamp


@contextmanager
def write_stream(path: str) -> "Iterator[pyarrow.NativeFile]":
    """A file too large for memory, written by pyarrow; it is there when the block ends well.

    On S3 it is a multipart upload; what a killed process leaves of it, `remove_leftovers` removes.
    """
    import pyarrow

    with explained(path, writing=True):
        opened: AbstractContextManager[Any] = uploading(path) if is_s3(path) else replacing(path)
        with opened as file, pyarrow.PythonFile(file, "w") as stream:
            yield stream
            stream.flush()


@retried
def put_if_absent(path: str, data: bytes) -> bool:
    """Writes a file unless there is one; of several writers at once exactly one wins.

    True if the file now holds `data`: so a PUT that was answered too late and repeated still counts.
    """
    with explained(path, writing=True):
        if is_s3(path):
            if put_conditional(path, data, IfNoneMatch="*") is not None:
                return True
        else:
            temporary = temporary_path(path)
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    sync(file)
                os.link(temporary, path)  # unlike a rename it never replaces, and nobody sees half a file
                sync_folder(path)
                return True
            except FileExistsError:
                pass
            finally:
                Path(temporary).unlink(missing_ok=True)
    try:
        return read_bytes(path) == data
    except FileNotFoundError:
        return False


@retried
def replace_if_match(path: str, data: bytes, etag: str) -> str | None:
    """Replaces a file that is still as `read_with_etag` found it, and returns the new tag, else None."""
    with explained(path):
        if is_s3(path):
            return put_conditional(path, data, IfMatch=etag)
        with folder_locked(path):
            try:
                if read_with_etag(path)[1] != etag:
                    return None
            except FileNotFoundError:
                return None
            write_atomic(path, data)
        return hashlib.sha256(data).hexdigest()


@retried
def delete(path: str) -> None:
    """Deletes a file; nothing if there is none."""
    with explained(path):
        if is_s3(path):
            bucket, key = bucket_and_key(path)
            s3_client().delete_object(Bucket=bucket, Key=key)
        else:
            Path(path).unlink(missing_ok=True)


@retried
def move(path: str, target: str) -> None:
    """Gives a file another name in the same storage, over the file that may have it.

    Raises FileNotFoundError.
    """
    with explained(path):
        if is_s3(path):
            bucket, key = bucket_and_key(path)
            to, name = bucket_and_key(target)
            try:
                s3_client().copy_object(Bucket=to, Key=name, CopySource={"Bucket": bucket, "Key": key})
            except Exception as error:
                raise_if_missing(path, error)
                raise
            s3_client().delete_object(Bucket=bucket, Key=key)
        else:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)


@retried
def remove_leftovers(folder: str) -> int:
    """Removes what killed writers left below a folder, and returns how many files or uploads that were.

    Local: temporary files; S3: unfinished multipart uploads. Only for the one who holds the lock on
    the folder, since it would cut off another writer.
    """
    count = 0
    with explained(folder):
        if not is_s3(folder):
            for root, _, names in os.walk(folder, onerror=raise_unless_missing):
                for name in names:
                    if name.startswith(TEMPORARY):
                        Path(root, name).unlink(missing_ok=True)
                        count += 1
            return count
        bucket, key = bucket_and_key(folder)
        client = s3_client()
        prefix = key.rstrip("/") + "/" if key else ""
        for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            for upload in page.get("Uploads", []):
                if not upload["Key"].startswith(prefix):
                    continue
                which = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                try:
                    client.abort_multipart_upload(**which)
                except client.exceptions.NoSuchUpload:
                    continue
                count += 1
    return count
