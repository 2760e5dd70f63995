"""What takes more than one request to S3, or a condition: listings, conditional puts, uploads in parts."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from wallaroo.workflows.storage.clients import s3_client
from wallaroo.workflows.storage.errors import is_missing
from wallaroo.workflows.storage.paths import FileInfo, bucket_and_key
from wallaroo.workflows.storage.retries import with_retries


def s3_files(folder: str) -> Iterator[FileInfo]:
    """Lists the objects below a folder in the order of their keys; one request for each 1,000 of them."""
    bucket, key = bucket_and_key(folder)
    prefix = key.rstrip("/") + "/" if key else ""
    for page in s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):  # marker of a folder, which some tools write
                path, relative = f"s3://{bucket}/{item['Key']}", item["Key"].removeprefix(prefix)
                yield FileInfo(path, relative, item["Size"], item["ETag"].strip('"'))


class Ranges(io.RawIOBase):
    """An object of known size for reading in any order. Two windows of WINDOW_BYTES are in memory.

    One stays at the end of the object and is the whole of a small one; the other moves. An object that is
    read from front to back is requested once, even if its end was read first.
    """

    WINDOW_BYTES = 8 << 20

    def __init__(self, path: str, size: int):
        """Opens the object; the first read sends the first request.

        Args:
            path: `s3://` path.
            size: Size of the object in bytes.
        """
        self.path, self.size = path, size
        self._place = 0
        self._start, self._window = 0, b""
        self._end_start, self._end = size, b""

    def readable(self) -> bool:
        """True: it can be read."""
        return True

    def seekable(self) -> bool:
        """True: it can be read in any order."""
        return True

    def tell(self) -> int:
        """Place of the next byte."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a place.

        Args:
            offset: Bytes from the place that `whence` names.
            whence: `io.SEEK_SET`, `io.SEEK_CUR` or `io.SEEK_END`.

        Returns:
            The new place.
        """
        self._place = offset + (0, self._place, self.size)[whence]
        return self._place

    def read(self, count: int = -1) -> bytes:
        """Reads the next bytes, all if `count` is negative."""
        start = place = self._place
        stop = self.size if count < 0 else min(self.size, start + count)
        pieces = []
        while place < stop:
            piece = self._held(place, stop)
            if piece:
                pieces.append(piece)
                place += len(piece)
            else:
                self._request(place, stop)
        self._place = place
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _held(self, place: int, stop: int) -> bytes:
        """What a window has of the bytes from `place` to `stop`."""
        for start, window in ((self._end_start, self._end), (self._start, self._window)):
            if start <= place < start + len(window):
                return window[place - start : stop - start]
        return b""

    def _request(self, place: int, stop: int) -> None:
        """Fills a window with the bytes from `place` to `stop` that the other lacks, or with more."""
        last = min(max(stop, place + self.WINDOW_BYTES), self._end_start)
        if last < self.size or self._end:
            data = with_retries(self.path, lambda: self._fetch(place, last))
            self._start, self._window = place, data
            return
        begun = self._start + len(self._window)
        first = min(place, max(0, self.size - self.WINDOW_BYTES))
        if self._window and first < begun <= place:
            first = begun
        self._end = with_retries(self.path, lambda: self._fetch(first, last))
        self._end_start = first

    def _fetch(self, start: int, stop: int) -> bytes:
        bucket, key = bucket_and_key(self.path)
        answer = s3_client().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
        return answer["Body"].read()


@contextmanager
def uploading(path: str) -> "Iterator[_Upload]":
    """Opens a file that becomes the object `path` when the block ends without an error."""
    upload = _Upload(*bucket_and_key(path))
    try:
        yield upload
        upload.complete()
    except BaseException:
        upload.abort()
        raise


class _Upload(io.RawIOBase):
    """Writes an object in parts, one of them in memory; a small object is one PUT."""

    PART_BYTES = 8 << 20

    def __init__(self, bucket: str, key: str):
        self.where = {"Bucket": bucket, "Key": key}
        self.buffer = bytearray()
        self.upload: dict[str, str] = {}
        self.parts: list[dict[str, Any]] = []
        self.sent = 0

    def _with_retries(self, request: Callable[[], Any]) -> Any:
        return with_retries(f"s3://{self.where['Bucket']}/{self.where['Key']}", request)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.buffer += data
        # An object has 10,000 parts at most, so the later ones are larger.
        if len(self.buffer) >= self.PART_BYTES * (1 + len(self.parts) // 1000):
            self._send()
        return len(data)

    def _send(self) -> None:
        if not self.upload:
            made = self._with_retries(lambda: s3_client().create_multipart_upload(**self.where))
            self.upload = {"UploadId": made["UploadId"]}
        number, body = len(self.parts) + 1, bytes(self.buffer)
        answer = self._with_retries(
            lambda: s3_client().upload_part(**self.where, **self.upload, PartNumber=number, Body=body)
        )
        self.sent += len(body)
        self.parts.append({"ETag": answer["ETag"], "PartNumber": number})
        self.buffer = bytearray()

    def complete(self) -> None:
        if not self.upload:
            self._with_retries(lambda: s3_client().put_object(**self.where, Body=bytes(self.buffer)))
            return
        if self.buffer:
            self._send()
        self._with_retries(self._complete)

    def _complete(self) -> None:
        client = s3_client()
        try:
            client.complete_multipart_upload(
                **self.where, **self.upload, MultipartUpload={"Parts": self.parts}
            )
        except client.exceptions.NoSuchUpload:
            # The request may have succeeded and its response been lost.
            if client.head_object(**self.where)["ContentLength"] != self.sent:
                raise

    def abort(self) -> None:
        if self.upload:
            # The first error must be shown; `remove_leftovers` removes the rest.
            with suppress(Exception):
                s3_client().abort_multipart_upload(**self.where, **self.upload)


def put_conditional(path: str, data: bytes, **condition: str) -> str | None:
    """Writes an object on a condition.

    Args:
        path: `s3://` path.
        data: Contents of the object.
        **condition: `IfNoneMatch="*"` or `IfMatch=etag`.

    Returns:
        ETag of the written object; None if the condition does not hold.
    """
    import botocore.exceptions

    bucket, key = bucket_and_key(path)
    try:
        return s3_client().put_object(Bucket=bucket, Key=key, Body=data, **condition)["ETag"]
    except botocore.exceptions.ClientError as error:
        # 409 is a race with another conditional put; a missing key is If-Match on an object that is gone.
        code = str(error.response["Error"]["Code"])
        if code in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
            return None
        if "IfMatch" in condition and is_missing(error):
            return None
        raise
