"""What one request to S3 does not do: listings, conditional puts, uploads in parts."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from wallaroo.model.errors import InputError
from wallaroo.workflows.storage.clients import s3_client, s3_filesystem
from wallaroo.workflows.storage.errors import explain_code, is_missing
from wallaroo.workflows.storage.paths import FileInfo, bucket_and_key
from wallaroo.workflows.storage.retries import patiently


def list_s3(folder: str) -> list[FileInfo]:
    bucket, key = bucket_and_key(folder)
    prefix = f"{bucket}/{key}".rstrip("/") + "/"
    try:
        found = s3_filesystem().find(prefix, detail=True)
    except FileNotFoundError:
        found = {}
    if not found:
        # s3fs finds nothing in a bucket that is not there; boto3 says so.
        try:
            s3_client().head_bucket(Bucket=bucket)
        except Exception as error:
            if is_missing(error):
                raise InputError(explain_code(folder, "NoSuchBucket")) from error
            raise
    return sorted(
        (
            FileInfo(f"s3://{name}", name.removeprefix(prefix), item["size"], item["ETag"].strip('"'))
            for name, item in found.items()
            # A key that ends with a slash is a folder that some tool has drawn.
            if name.startswith(prefix) and item["type"] == "file" and not name.endswith("/")
        ),
        key=lambda file: file.relative,
    )


def s3_names(folder: str) -> Iterator[str]:
    """Relative keys of the objects below a folder, a request for each 1,000 of them."""
    bucket, key = bucket_and_key(folder)
    prefix = key.rstrip("/") + "/" if key else ""
    for page in s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):  # a folder that some tool has drawn
                yield item["Key"].removeprefix(prefix)


@contextmanager
def uploading(path: str) -> "Iterator[_Upload]":
    """A file that becomes the object `path` when the block ends well, and else is forgotten."""
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

    def _patiently(self, request: Callable[[], Any]) -> Any:
        return patiently(f"s3://{self.where['Bucket']}/{self.where['Key']}", request)

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
            made = self._patiently(lambda: s3_client().create_multipart_upload(**self.where))
            self.upload = {"UploadId": made["UploadId"]}
        number, body = len(self.parts) + 1, bytes(self.buffer)
        answer = self._patiently(
            lambda: s3_client().upload_part(**self.where, **self.upload, PartNumber=number, Body=body)
        )
        self.sent += len(body)
        self.parts.append({"ETag": answer["ETag"], "PartNumber": number})
        self.buffer = bytearray()

    def complete(self) -> None:
        if not self.upload:
            self._patiently(lambda: s3_client().put_object(**self.where, Body=bytes(self.buffer)))
            return
        if self.buffer:
            self._send()
        self._patiently(self._complete)

    def _complete(self) -> None:
        client = s3_client()
        try:
            client.complete_multipart_upload(
                **self.where, **self.upload, MultipartUpload={"Parts": self.parts}
            )
        except client.exceptions.NoSuchUpload:
            # It may have been done and its answer lost.
            if client.head_object(**self.where)["ContentLength"] != self.sent:
                raise

    def abort(self) -> None:
        if self.upload:
            # What went wrong is what is to be told; `remove_leftovers` removes the rest.
            with suppress(Exception):
                s3_client().abort_multipart_upload(**self.where, **self.upload)


def put_conditional(path: str, data: bytes, **condition: str) -> str | None:
    """ETag of the object written, None if the condition does not hold."""
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
