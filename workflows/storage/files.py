"""Files by path, local or on S3: read, written atomically, replaced on a condition, deleted."""

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

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
    replacing,
    sync,
    sync_folder,
    temporary_path,
)
from wallaroo.workflows.storage.paths import FileInfo, bucket_and_key, is_s3
from wallaroo.workflows.storage.retries import retried
from wallaroo.workflows.storage.s3 import Ranges, put_conditional, uploading

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.fs


def read_bytes(path: str) -> bytes:
    """Reads a small file whole.

    Args:
        path: Local or `s3://` path.

    Returns:
        Its contents.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: The storage does not serve.
    """
    return read_with_etag(path)[0]


@retried
def read_with_etag(path: str) -> tuple[bytes, str]:
    """Reads a small file whole, with the tag for `replace_if_match`.

    Args:
        path: Local or `s3://` path.

    Returns:
        Contents and tag.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: The storage does not serve.
    """
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
    """Reads an object on S3 whole.

    Args:
        path: `s3://` path.
        most: Most bytes of the object.

    Returns:
        Its contents.

    Raises:
        FileNotFoundError: There is no such object.
        TooLarge: It has more bytes; raised before any of them is read.
        InputError: The storage does not serve.
    """
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
    """Returns what a listing would say of one file; None if there is no such file."""
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
    """Whether there is a file of this path; False for a folder."""
    return info(path) is not None


@contextmanager
def open_source(path: str, start: int = 0) -> Iterator[IO[bytes]]:
    """Opens a file for reading as a buffered stream.

    Args:
        path: Local or `s3://` path.
        start: First byte to read.

    Yields:
        The open file.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: The storage does not serve.
    """
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
    """Opens a file of known size for reading in any order; on S3 by `Ranges`.

    Args:
        path: Local or `s3://` path.
        size: Size of the file in bytes.

    Yields:
        The open file.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: The storage does not serve.
    """
    import pyarrow

    with explained(path):
        opened = pyarrow.PythonFile(Ranges(path, size), "r") if is_s3(path) else pyarrow.OSFile(path)
        with opened as file:
            yield file


@retried
def write_atomic(path: str, data: bytes | memoryview) -> str:
    """Writes a file atomically, over an older one if there is one. On S3 it is one PUT.

    Args:
        path: Local or `s3://` path. A local folder is made if it is absent.
        data: Contents of the file.

    Returns:
        The stamp (`FileInfo.stamp`) that a listing gives this content of the path.

    Raises:
        InputError: The storage does not take it.
    """
    with explained(path, writing=True):
        if is_s3(path):
            bucket, key = bucket_and_key(path)
            answer = s3_client().put_object(Bucket=bucket, Key=key, Body=bytes(data))
            return FileInfo(path, "", len(data), answer["ETag"].strip('"')).stamp
        with replacing(path) as file:
            file.write(data)
            file.flush()
            # By the open file: another writer may already have taken the name.
            return info_of(os.fstat(file.fileno()), path, "").stamp


@contextmanager
def write_stream(path: str) -> "Iterator[pyarrow.NativeFile]":
    """Opens a file for writing by pyarrow, for files too large for memory.

    The file appears when the block ends without an error. On S3 it is a multipart upload; `remove_leftovers`
    removes the rest of one whose process was killed.

    Args:
        path: Local or `s3://` path.

    Yields:
        The open stream.

    Raises:
        InputError: The storage does not take it.
    """
    import pyarrow

    with explained(path, writing=True):
        opened: AbstractContextManager[Any] = uploading(path) if is_s3(path) else replacing(path)
        with opened as file, pyarrow.PythonFile(file, "w") as stream:
            yield stream
            stream.flush()


@retried
def put_if_absent(path: str, data: bytes) -> bool:
    """Writes a file unless there is one. Of several writers at once exactly one wins.

    Args:
        path: Local or `s3://` path.
        data: Contents of the file.

    Returns:
        True if the file now holds `data`. So a PUT whose answer was lost and that was repeated still counts.

    Raises:
        InputError: The storage does not take it.
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
                os.link(temporary, path)  # unlike a rename it never replaces a file, and it is atomic
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
    """Replaces a file if it is still the one that `read_with_etag` read.

    Args:
        path: Local or `s3://` path.
        data: New contents.
        etag: Tag from `read_with_etag`.

    Returns:
        The new tag; None if the file has changed or is gone.

    Raises:
        InputError: The storage does not serve.
    """
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
    """Deletes a file, if there is one."""
    with explained(path):
        if is_s3(path):
            bucket, key = bucket_and_key(path)
            s3_client().delete_object(Bucket=bucket, Key=key)
        else:
            Path(path).unlink(missing_ok=True)


DELETED_AT_ONCE = 1000
"""Objects that one request to S3 deletes at most."""
DELETERS = 8
"""Objects that are deleted at the same time, where a request deletes only one."""
_NO_DELETE_OBJECTS = {
    "NotImplemented",
    "501",
    "MethodNotAllowed",
    "405",
    "MalformedXML",
    "MissingContentMD5",  # old stores ask for this header, which botocore no longer sends
    "InvalidRequest",
}
"""Codes by which S3-compatible stores refuse to delete several objects by one request."""


def delete_all(paths: Iterable[str]) -> None:
    """Deletes those of many files that are there; on S3 a request for each DELETED_AT_ONCE of them.

    Some S3-compatible stores have no such request; there each object takes one.

    Args:
        paths: Local or `s3://` paths.

    Raises:
        InputError: The storage does not serve.
    """
    buckets: dict[str, list[str]] = {}
    for path in paths:
        if is_s3(path):
            bucket, key = bucket_and_key(path)
            buckets.setdefault(bucket, []).append(key)
        else:
            delete(path)
    for bucket, keys in buckets.items():
        for start in range(0, len(keys), DELETED_AT_ONCE):
            some = keys[start : start + DELETED_AT_ONCE]
            if not _delete_objects(f"s3://{bucket}/{some[0]}", some):
                with ThreadPoolExecutor(DELETERS) as pool:
                    list(pool.map(delete, [f"s3://{bucket}/{key}" for key in some]))


@retried
def _delete_objects(path: str, keys: Sequence[str]) -> bool:
    """Deletes objects of the bucket of `path`, which is the first of them; False if the store cannot."""
    import botocore.exceptions

    bucket, _ = bucket_and_key(path)
    with explained(path):
        wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        try:
            answer = s3_client().delete_objects(Bucket=bucket, Delete=wanted)
        except botocore.exceptions.ClientError as error:
            if str(error.response["Error"]["Code"]) in _NO_DELETE_OBJECTS:
                return False
            raise
        # The request succeeds although an object stays.
        for one in answer.get("Errors", []):
            failed = botocore.exceptions.ClientError({"Error": one}, "DeleteObjects")
            if not is_missing(failed):
                with explained(f"s3://{bucket}/{one['Key']}" if one.get("Key") else path):
                    raise failed
    return True


@retried
def move(path: str, target: str) -> None:
    """Renames a file within one storage, over the target if it exists.

    Args:
        path: Local or `s3://` path of the file.
        target: Its new path. A local folder is made if it is absent.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: The storage does not serve.
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
    """Removes what killed writers left below a folder: temporary files, or unfinished uploads on S3.

    Call it only with the lock on the folder held, since it would cut off another writer.

    Args:
        folder: Local or on S3.

    Returns:
        Number of files or uploads removed.
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
