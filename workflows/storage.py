"""Every path of the product: a local one or `s3://bucket/key`, read and written alike.

Which library does what on S3: pyarrow's filesystem reads Parquet; s3fs lists, and opens sources; boto3
does single objects, conditional puts, and multipart uploads with their clean-up, through which pyarrow
writes (its own stream to S3 makes an object of whatever it has when a task breaks off). All three
use the endpoint and credentials that botocore finds in the standard AWS variables and profiles, so a
run never holds one of them itself. Knows nothing of what is in the files.

A file that is not there is a FileNotFoundError, for the caller to make sense of. All else that goes
wrong with a storage is an InputError: one sentence with the path and the remedy.
"""

import dataclasses
import errno
import fcntl
import functools
import glob
import hashlib
import io
import os
import random
import re
import secrets
import stat
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from model.errors import InputError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.fs

T = TypeVar("T")
P = ParamSpec("P")

TEMPORARY = ".wallaroo-tmp-"
"""How names of unfinished local files begin; they are never listed."""

CONNECT_SECONDS = 3
READ_SECONDS = 60
ATTEMPTS = 4
"""Bounds of one request to S3: an endpoint that nobody answers at is given up within half a minute."""

PATIENCE_SECONDS = 600.0
"""How long a run tries again what a storage that is out of order has not done; then it stops."""

SHORTEST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
"""Seconds between two tries, twice as long each time, less up to half of it by chance."""

COPY_BYTES = 1 << 20
RANGE_BYTES = 16 << 20
RANGES_AT_ONCE = 8


@dataclass(frozen=True)
class FileInfo:
    """A file as listed.

    relative: path below the listed folder. size: in bytes. etag: changes when the contents do; S3's
    own, for a local file made of its size and time of change.
    """

    path: str
    relative: str
    size: int
    etag: str


# Paths


def is_s3(path: str) -> bool:
    """Whether the path is on S3. Raises InputError for any other scheme."""
    scheme, mark, _ = path.partition("://")
    if not mark or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return False
    if scheme != "s3":
        raise InputError(f"{scheme}:// is not known: give a local path or s3://bucket/key.")
    return True


def join(path: str, *parts: str) -> str:
    """The path of something in a folder."""
    return "/".join([path.rstrip("/") if path.strip("/") else "", *parts])


def _split(path: str) -> tuple[str, str]:
    """Bucket and key of an `s3://` path."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    if "@" in bucket or ":" in bucket:
        raise InputError(
            "an s3:// path must be s3://bucket/key without user, password or port: "
            "credentials and endpoint come from the AWS variables or a profile."
        )
    if not bucket:
        raise InputError(f"{path} names no bucket: give s3://bucket/key.")
    return bucket, key


# Errors


@contextmanager
def explained(path: str, writing: bool = False) -> Iterator[None]:
    """Turns errors of storage inside the block into InputErrors about `path`.

    A FileNotFoundError stays one, but in writing, where it means that no file can be made there.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not writing:
            raise
        message = _explain(path, error)
        if message is None:
            raise
        raise InputError(message) from error


_CODES = {
    "NoSuchBucket": "its bucket does not exist: check the name, or make the bucket",
    "AccessDenied": "access is denied: check what the credentials may do there",
    "InvalidAccessKeyId": "the access key is not known there: check the AWS variables or the profile",
    "SignatureDoesNotMatch": "the secret key is wrong: check the AWS variables or the profile",
    "ExpiredToken": "the credentials have expired: renew them",
    "InvalidBucketName": "this is no valid name of a bucket: check it",
    "SlowDown": "the storage asks for fewer requests: try again later",
}
_CODE_ALIASES = {
    "403": "AccessDenied",
    "Forbidden": "AccessDenied",
    "AllAccessDisabled": "AccessDenied",
    "AccountProblem": "AccessDenied",
    "ACCESS_DENIED": "AccessDenied",
    "NO_SUCH_BUCKET": "NoSuchBucket",
    "INVALID_ACCESS_KEY_ID": "InvalidAccessKeyId",
    "SIGNATURE_DOES_NOT_MATCH": "SignatureDoesNotMatch",
    "ExpiredTokenException": "ExpiredToken",
    "TokenRefreshRequired": "ExpiredToken",
    "RequestExpired": "ExpiredToken",
    "503": "SlowDown",
    "SLOW_DOWN": "SlowDown",
    "ServiceUnavailable": "SlowDown",
}
_NO_CREDENTIALS = "there are no AWS credentials: set the AWS variables or AWS_PROFILE"
_UNREACHABLE = "no answer from its endpoint: check AWS_ENDPOINT_URL and the network"
_LOCAL = {
    errno.EACCES: "permission is denied: check its owner and mode",
    errno.EPERM: "it is not permitted: check its owner, mode and file system",
    errno.EROFS: "its file system is read-only: choose another place",
    errno.ENOSPC: "its disk is full: make room and start again",
    errno.EDQUOT: "its quota is used up: make room and start again",
    errno.ENOENT: "no file can be made there: choose another place",
    errno.EEXIST: "a part of this path is a file, not a folder: choose another path",
    errno.ENOTDIR: "a part of this path is a file, not a folder: choose another path",
    errno.EISDIR: "it is a folder, not a file: choose another path",
    errno.ENAMETOOLONG: "the path is too long: choose a shorter one",
    errno.ELOOP: "it is a loop of links: choose another path",
}


def _explain(path: str, error: Exception) -> str | None:
    """One sentence about an error of storage; None for an error that is none. Never holds a secret."""
    import botocore.exceptions

    if isinstance(error, ValueError) and ("null byte" in str(error) or isinstance(error, UnicodeEncodeError)):
        return f"{path!a:.200} cannot be used, it holds a NUL character or is no Unicode text: correct it."
    if not is_s3(path):
        if isinstance(error, OSError) and error.errno is not None:
            known = _LOCAL.get(error.errno, f"the system says '{os.strerror(error.errno)}'")
            return f"{path} cannot be used, {known}."
        return None
    # s3fs hides botocore's error behind an OSError.
    for cause in (error, error.__cause__):
        if isinstance(cause, botocore.exceptions.ClientError):
            return _explain_code(path, str(cause.response.get("Error", {}).get("Code", "")))
        if isinstance(cause, botocore.exceptions.NoCredentialsError):
            return f"{path} cannot be used, {_NO_CREDENTIALS}."
        if isinstance(cause, botocore.exceptions.ProfileNotFound):
            return f"{path} cannot be used, the profile named by AWS_PROFILE does not exist: check its name."
        if isinstance(
            cause,
            (
                botocore.exceptions.ConnectionError,
                botocore.exceptions.HTTPClientError,
                botocore.exceptions.IncompleteReadError,
            ),
        ):
            return f"{path} cannot be used, {_UNREACHABLE}."
        if isinstance(cause, botocore.exceptions.BotoCoreError):
            words = type(cause).__name__  # its message may quote what is secret
            return f"{path} cannot be used, botocore says '{words}': check the AWS configuration."
    if isinstance(error, ValueError) and "endpoint" in str(error).lower():
        return f"{path} cannot be used, AWS_ENDPOINT_URL is not a URL such as https://host:port: correct it."
    if isinstance(error, PermissionError):
        return _explain_code(path, "AccessDenied")
    if isinstance(error, OSError):
        # pyarrow has no classes for these, only its words.
        text = str(error)
        code = re.search(r"AWS Error (\w+)", text)
        status = re.search(r"HTTP status (\d+)", text)
        if code and code[1] in ("NETWORK_CONNECTION", "REQUEST_TIMEOUT"):
            return f"{path} cannot be used, {_UNREACHABLE}."
        if code and code[1] == "UNKNOWN" and status:
            return _explain_code(path, status[1])
        if code:
            return _explain_code(path, code[1])
        if isinstance(error, (ConnectionError, TimeoutError)):
            return f"{path} cannot be used, {_UNREACHABLE}."
        if error.errno is not None:
            return f"{path} cannot be used, the system says '{os.strerror(error.errno)}'."
    return None


def _explain_code(path: str, code: str) -> str:
    known = _CODES.get(_CODE_ALIASES.get(code, code))
    return f"{path} cannot be used, {known or f'S3 says {code!r}: check the bucket and its settings'}."


# Patience

_PASSING = {
    "SlowDown",
    "InternalError",
    "InternalFailure",
    "INTERNAL_FAILURE",
    "500",
    "502",
    "504",
    "RequestTimeout",
    "REQUEST_TIMEOUT",
    "NETWORK_CONNECTION",
    "IncompleteBody",
    "BadDigest",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "ExpiredToken",
}
"""Codes of what may be otherwise soon; credentials that expired are renewed by whoever keeps the profile."""

_BROKEN_OFF = "broken off"
"""What is said of an answer that had begun and did not come to its end."""

_patient = 0
_retries = 0
_guard = threading.Lock()


def be_patient() -> None:
    """From now on this process tries again what fails of a storage that is out of order, PATIENCE_SECONDS.

    For the processes of a run. Else a storage that does not answer is a mistake in its address, and said
    to be one soon.
    """
    global _patient
    _patient = max(_patient, 1)


@contextmanager
def patience() -> Iterator[None]:
    """What `be_patient` does, within the block."""
    global _patient
    with _guard:
        _patient += 1
    try:
        yield
    finally:
        with _guard:
            _patient -= 1


def take_retries() -> int:
    """How many requests were tried again since this was last asked, as far as it can be known: pyarrow and
    s3fs keep some of theirs to themselves."""
    global _retries
    with _guard:
        count, _retries = _retries, 0
    return count


def _count_retries(count: int) -> None:
    global _retries
    with _guard:
        _retries += count


def patiently(path: str, action: Callable[[], T]) -> T:
    """What `action` gives, which may be done twice; tried again where this process is patient, and where an
    answer broke off, since whoever answers has the right address.

    Raises what it raises; if it was tried again in vain, an InputError that says so.
    """
    started = time.monotonic()
    pause = SHORTEST_PAUSE
    while True:
        try:
            return action()
        except Exception as error:
            code = _passing(error) if is_s3(path) else None
            if code is None or not (_patient or code == _BROKEN_OFF):
                raise
            seconds = time.monotonic() - started
            if seconds >= PATIENCE_SECONDS:
                words = str(error) if isinstance(error, InputError) else _explain(path, error)
                raise InputError(
                    f"{(words or f'{path} cannot be used.').rstrip('.')}; it was tried again for "
                    f"{seconds:.0f} s, what is finished is kept, and the same command goes on from there."
                ) from error
            if code == "ExpiredToken":
                forget_clients()
        _count_retries(1)
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, LONGEST_PAUSE)


def _persistent(function: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
    """A function of a path, done `patiently`."""

    @functools.wraps(function)
    def again(path: str, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return patiently(path, lambda: function(path, *args, **kwargs))

    return again


def _passing(error: BaseException) -> str | None:
    """A code of an error of S3 that may be gone the next time; None for all others."""
    import botocore.exceptions

    halves = (botocore.exceptions.IncompleteReadError, botocore.exceptions.ResponseStreamingError)
    lost = (
        botocore.exceptions.ConnectionError,
        botocore.exceptions.HTTPClientError,
        botocore.exceptions.CredentialRetrievalError,
    )
    for cause in (error, error.__cause__, error.__cause__ and error.__cause__.__cause__):
        if isinstance(cause, botocore.exceptions.ClientError):
            code = str(cause.response.get("Error", {}).get("Code", ""))
            code = _CODE_ALIASES.get(code, code)
            return code if code in _PASSING else None
        if isinstance(cause, halves):
            return _BROKEN_OFF
        if isinstance(cause, lost):
            return "lost"
        if isinstance(cause, OSError) and (found := re.search(r"AWS Error (\w+)", str(cause))):
            status = re.search(r"HTTP status (\d+)", str(cause))
            code = status[1] if found[1] == "UNKNOWN" and status else found[1]
            code = _CODE_ALIASES.get(code, code)
            return code if code in _PASSING else None
        if isinstance(cause, (ConnectionError, TimeoutError)):
            return "lost"
    return None


_OF_ONE_PATH = {
    "NoSuchBucket",
    "InvalidBucketName",
    "AccessDenied",
    "InvalidObjectState",  # archived
    "KeyTooLongError",
    "InvalidArgument",
    "InvalidRequest",
    "InvalidURI",
    "MethodNotAllowed",
    "400",
    "405",
    "414",
}


def refuses_path(error: InputError) -> bool:
    """Whether an error of S3 is about the one path that was asked for: it would be the same the next
    time, and other paths may do. All others say that the storage or the access to it is out of order."""
    import botocore.exceptions

    cause = error.__cause__
    if isinstance(cause, botocore.exceptions.ClientError):
        code = str(cause.response.get("Error", {}).get("Code", ""))
        return _CODE_ALIASES.get(code, code) in _OF_ONE_PATH
    # A ValueError is about the name alone: botocore could not even put it into a request.
    return cause is None or isinstance(cause, (botocore.exceptions.ParamValidationError, ValueError))


# The three libraries


@functools.cache
def _session() -> Any:
    import boto3.session

    return boto3.session.Session()


@functools.cache
def _client() -> Any:
    """boto3's client; it may be used from many threads."""
    import botocore.config

    config = botocore.config.Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        max_pool_connections=32,
        user_agent_extra="wallaroo-batch",
    )
    client = _session().client("s3", config=config)
    client.meta.events.register("after-call.s3", _note_attempts)
    return client


def _note_attempts(parsed: dict[str, Any], **_: Any) -> None:
    """Counts what botocore tried again by itself."""
    _count_retries(parsed.get("ResponseMetadata", {}).get("RetryAttempts", 0))


@functools.cache
def _s3fs() -> Any:
    import s3fs

    return s3fs.S3FileSystem(
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
        },
    )


def forget_clients() -> None:
    """Looks at the AWS variables anew when S3 is next used."""
    for cached in (_session, _client, _s3fs, _region):
        cached.cache_clear()


def _custom_endpoint() -> urllib.parse.SplitResult | None:
    """The endpoint, unless it is Amazon's own."""
    url = urllib.parse.urlsplit(_client().meta.endpoint_url)
    return None if re.search(r"\.amazonaws\.com(\.cn)?$", url.hostname or "") else url


@functools.cache
def _region(bucket: str) -> str:
    client = _client()
    if _custom_endpoint() is None:
        # Amazon answers at the bucket's own region only, which boto3 follows and pyarrow must be told.
        return client.head_bucket(Bucket=bucket).get("BucketRegion") or client.meta.region_name
    region = client.meta.region_name
    return "us-east-1" if region in (None, "aws-global") else region


@functools.lru_cache(maxsize=8)
def _arrow_s3(access: str, secret: str, token: str | None, region: str, scheme: str, host: str | None) -> Any:
    import pyarrow.fs

    return pyarrow.fs.S3FileSystem(
        access_key=access,
        secret_key=secret,
        session_token=token,
        region=region,
        scheme=scheme,
        endpoint_override=host,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=READ_SECONDS,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        tls_ca_file_path=_session()._session.get_config_variable("ca_bundle"),
    )


def parquet_filesystem(path: str) -> "tuple[pyarrow.fs.FileSystem, str]":
    """pyarrow's filesystem for a path, and the path as that filesystem wants it.

    Ask anew for every file: credentials that expire are renewed here. Wrap the reading in `explained`.
    """
    import pyarrow.fs

    if not is_s3(path):
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(path)
    bucket, key = _split(path)
    with explained(path):
        credentials = _session().get_credentials()
        if credentials is None:
            raise InputError(f"{path} cannot be used, {_NO_CREDENTIALS}.")
        # pyarrow's own search knows fewer kinds of profile, so it is told what botocore found.
        found = credentials.get_frozen_credentials()
        url = _custom_endpoint()
        filesystem = _arrow_s3(
            found.access_key,
            found.secret_key,
            found.token,
            _region(bucket),
            url.scheme if url else "https",
            url.netloc if url else None,
        )
    return filesystem, f"{bucket}/{key}"


# Reading


def read_bytes(path: str) -> bytes:
    """Contents of a small file. Raises FileNotFoundError."""
    return read_with_etag(path)[0]


@_persistent
def read_with_etag(path: str) -> tuple[bytes, str]:
    """Contents of a small file, and the tag that `replace_if_match` wants. Raises FileNotFoundError."""
    with explained(path):
        if not is_s3(path):
            data = Path(path).read_bytes()
            return data, hashlib.sha256(data).hexdigest()
        bucket, key = _split(path)
        try:
            answer = _client().get_object(Bucket=bucket, Key=key)
        except Exception as error:
            _raise_if_missing(path, error)
            raise
        return answer["Body"].read(), answer["ETag"]


class TooLarge(Exception):
    """An object has more bytes than were asked for at most."""


@_persistent
def read_object(path: str, most: int) -> bytes:
    """Contents of an object on S3. Raises FileNotFoundError, and TooLarge before a byte is read."""
    bucket, key = _split(path)
    with explained(path):
        try:
            answer = _client().get_object(Bucket=bucket, Key=key)
        except Exception as error:
            _raise_if_missing(path, error)
            raise
        with closing(answer["Body"]) as body:
            if answer["ContentLength"] > most:
                raise TooLarge(path)
            return body.read()


@_persistent
def info(path: str) -> FileInfo | None:
    """What a listing would say of one file; None if there is no such file."""
    relative = path.rsplit("/", 1)[-1]
    with explained(path):
        if not is_s3(path):
            if not os.path.isfile(path):
                return None
            return _local_info(path, relative)
        bucket, key = _split(path)
        if not key:
            return None
        try:
            answer = _client().head_object(Bucket=bucket, Key=key)
        except Exception as error:
            if _is_missing(error):
                return None
            raise
        return FileInfo(path, relative, answer["ContentLength"], answer["ETag"].strip('"'))


def exists(path: str) -> bool:
    """Whether there is a file of this path. A folder is none."""
    return info(path) is not None


@_persistent
def list_files(folder: str) -> list[FileInfo]:
    """All files below a folder, at any depth, sorted by relative path; none if there is no folder."""
    with explained(folder):
        if is_s3(folder):
            return _list_s3(folder)
        found = []
        for root, _, names in os.walk(folder, onerror=_raise_unless_missing):
            for name in names:
                if name.startswith(TEMPORARY):
                    continue
                path = os.path.join(root, name)
                if os.path.isfile(path):  # not removed since it was listed, no pipe, no link to nowhere
                    with suppress(FileNotFoundError):
                        relative = os.path.relpath(path, folder).replace(os.sep, "/")
                        found.append(_local_info(path, relative))
    return sorted(found, key=lambda file: file.relative)


def _list_s3(folder: str) -> list[FileInfo]:
    bucket, key = _split(folder)
    prefix = f"{bucket}/{key}".rstrip("/") + "/"
    try:
        found = _s3fs().find(prefix, detail=True)
    except FileNotFoundError:
        found = {}
    if not found:
        # s3fs finds nothing in a bucket that is not there; boto3 says so.
        try:
            _client().head_bucket(Bucket=bucket)
        except Exception as error:
            if _is_missing(error):
                raise InputError(_explain_code(folder, "NoSuchBucket")) from error
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


def _local_info(path: str, relative: str) -> FileInfo:
    found = os.stat(path)
    return FileInfo(path, relative, found.st_size, f"{found.st_mtime_ns:x}-{found.st_size:x}")


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


@_persistent
def match_files(pattern: str) -> list[FileInfo]:
    """Files that match a pattern of `*`, `?`, `[...]` and `**`, sorted; relative to its fixed folders."""
    fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    fixed = fixed[: fixed.rfind("/") + 1]
    with explained(pattern):
        if is_s3(pattern):
            _split(fixed)
            paths = [f"s3://{name}" for name in _s3fs().glob(pattern)]
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
            raw = _s3fs().open(path, "rb", block_size=8 << 20, cache_type="readahead")
            with io.BufferedReader(raw, COPY_BYTES) as file:
                file.seek(start)
                yield file
        else:
            with open(path, "rb", buffering=COPY_BYTES) as file:
                file.seek(start)
                yield file


# Writing


@_persistent
def write_atomic(path: str, data: bytes | memoryview) -> None:
    """Writes a file, whole or not at all, over the one there may be. On S3 it is one PUT."""
    with explained(path, writing=True):
        if is_s3(path):
            bucket, key = _split(path)
            _client().put_object(Bucket=bucket, Key=key, Body=bytes(data))
            return
        with _replacing(path) as file:
            file.write(data)


@contextmanager
def write_stream(path: str) -> "Iterator[pyarrow.NativeFile]":
    """A file too large for memory, written by pyarrow; it is there when the block ends well.

    On S3 it is a multipart upload; what a killed process leaves of it, `remove_leftovers` removes.
    """
    import pyarrow

    with explained(path, writing=True):
        opened: AbstractContextManager[Any] = _uploading(path) if is_s3(path) else _replacing(path)
        with opened as file, pyarrow.PythonFile(file, "w") as stream:
            yield stream
            stream.flush()


@contextmanager
def _uploading(path: str) -> "Iterator[_Upload]":
    """A file that becomes the object `path` when the block ends well, and else is forgotten."""
    upload = _Upload(*_split(path))
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
            made = self._patiently(lambda: _client().create_multipart_upload(**self.where))
            self.upload = {"UploadId": made["UploadId"]}
        number, body = len(self.parts) + 1, bytes(self.buffer)
        answer = self._patiently(
            lambda: _client().upload_part(**self.where, **self.upload, PartNumber=number, Body=body)
        )
        self.sent += len(body)
        self.parts.append({"ETag": answer["ETag"], "PartNumber": number})
        self.buffer = bytearray()

    def complete(self) -> None:
        if not self.upload:
            self._patiently(lambda: _client().put_object(**self.where, Body=bytes(self.buffer)))
            return
        if self.buffer:
            self._send()
        self._patiently(self._complete)

    def _complete(self) -> None:
        client = _client()
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
                _client().abort_multipart_upload(**self.where, **self.upload)


@contextmanager
def _replacing(path: str) -> Iterator[IO[bytes]]:
    """A temporary file in the same folder that takes the name `path` when the block ends well."""
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            with suppress(FileNotFoundError):
                # What was for some eyes only stays so.
                os.fchmod(file.fileno(), stat.S_IMODE(os.stat(path).st_mode))
            yield file
            if not file.closed:
                _sync(file)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path)


def _temporary(path: str) -> str:
    """Path of a temporary file beside `path`, in a folder that now exists."""
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}")


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: str) -> None:
    """Makes the new name in a folder last through a power cut."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@_persistent
def put_if_absent(path: str, data: bytes) -> bool:
    """Writes a file unless there is one; of several writers at once exactly one wins.

    True if the file now holds `data`: so a PUT that was answered too late and repeated still counts.
    """
    with explained(path, writing=True):
        if is_s3(path):
            if _put_conditional(path, data, IfNoneMatch="*") is not None:
                return True
        else:
            temporary = _temporary(path)
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    _sync(file)
                os.link(temporary, path)  # unlike a rename it never replaces, and nobody sees half a file
                _sync_folder(path)
                return True
            except FileExistsError:
                pass
            finally:
                Path(temporary).unlink(missing_ok=True)
    try:
        return read_bytes(path) == data
    except FileNotFoundError:
        return False


@_persistent
def replace_if_match(path: str, data: bytes, etag: str) -> str | None:
    """Replaces a file that is still as `read_with_etag` found it, and returns the new tag, else None."""
    with explained(path):
        if is_s3(path):
            return _put_conditional(path, data, IfMatch=etag)
        with _folder_locked(path):
            try:
                if read_with_etag(path)[1] != etag:
                    return None
            except FileNotFoundError:
                return None
            write_atomic(path, data)
        return hashlib.sha256(data).hexdigest()


def _put_conditional(path: str, data: bytes, **condition: str) -> str | None:
    """ETag of the object written, None if the condition does not hold."""
    import botocore.exceptions

    bucket, key = _split(path)
    try:
        return _client().put_object(Bucket=bucket, Key=key, Body=data, **condition)["ETag"]
    except botocore.exceptions.ClientError as error:
        # 409 is a race with another conditional put; a missing key is If-Match on an object that is gone.
        code = str(error.response["Error"]["Code"])
        if code in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
            return None
        if "IfMatch" in condition and _is_missing(error):
            return None
        raise


@contextmanager
def _folder_locked(path: str) -> Iterator[None]:
    """Makes read-then-replace one step among the processes of a machine."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        # Network file systems may refuse this; then of two at once the last one wins, and the first one
        # finds out when it replaces the file the next time.
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


@_persistent
def delete(path: str) -> None:
    """Deletes a file; nothing if there is none."""
    with explained(path):
        if is_s3(path):
            bucket, key = _split(path)
            _client().delete_object(Bucket=bucket, Key=key)
        else:
            Path(path).unlink(missing_ok=True)


@_persistent
def remove_leftovers(folder: str) -> int:
    """Removes what killed writers left below a folder, and returns how many files or uploads that were.

    Local: temporary files; S3: unfinished multipart uploads. Only for the one who holds the lock on
    the folder, since it would cut off another writer.
    """
    count = 0
    with explained(folder):
        if not is_s3(folder):
            for root, _, names in os.walk(folder, onerror=_raise_unless_missing):
                for name in names:
                    if name.startswith(TEMPORARY):
                        Path(root, name).unlink(missing_ok=True)
                        count += 1
            return count
        bucket, key = _split(folder)
        client = _client()
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


def _is_missing(error: BaseException) -> bool:
    import botocore.exceptions

    if not isinstance(error, botocore.exceptions.ClientError):
        return False
    return str(error.response.get("Error", {}).get("Code", "")) in ("404", "NoSuchKey", "NotFound")


def _raise_if_missing(path: str, error: BaseException) -> None:
    if _is_missing(error):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error


# Checkpoints


def fetch_folder(path: str, names: Sequence[str] | None = None, cache: Path | None = None) -> Path:
    """A local folder with files of a checkpoint: a local one as it is, one on S3 from a cache.

    `names` are the files wanted beside the list of files (all if None), so that who needs only the
    tokenizer does not wait for the weights. A file has its name in the cache only after its digest was
    verified, so it is fetched and verified once for all processes of a machine.
    cache: default `~/.cache/wallaroo`. Raises InputError if `path` is no checkpoint, or a file is not
    what its list says.
    """
    from model.checkpoint import FILE_LIST, digest, parse_file_list

    if not is_s3(path):
        return Path(path)
    where = join(path, FILE_LIST)
    try:
        data = read_bytes(where)
    except FileNotFoundError:
        raise InputError(f"{path} is no checkpoint, since it has no {FILE_LIST}: give its folder.") from None
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
    """Brings a file to this machine, unless it is there. What a killed process had of it is gone on with."""
    with open(target.with_name(f".{target.name}.lock"), "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if target.exists():
            return  # somebody else fetched it while we waited
        part = target.with_name(f".{target.name}.part")
        ranges = target.with_name(f".{target.name}.ranges")
        while True:
            resumed = ranges.exists()
            try:
                whole = _fetch_ranges(path, part, ranges, size) and _sha256(part) == sha256
            except FileNotFoundError:
                raise InputError(f"{path} is absent, but its checkpoint lists it: copy it there.") from None
            if whole:
                os.replace(part, target)
                ranges.unlink()
                return
            part.unlink()
            ranges.unlink()
            # What lay on the disk may be at fault, where a machine lost its power; the next try is all new.
            if not resumed:
                raise InputError(
                    f"{path} is not the file that its checkpoint lists, since size or sha256 differ: "
                    f"copy the checkpoint anew."
                )


def _fetch_ranges(path: str, part: Path, ranges: Path, size: int) -> bool:
    """Fetches what is not there of a file, several ranges at once; False if it has not the size it should.

    ranges: a file of the numbers of the ranges that are there, a line each.
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


@_persistent
def _read_range(path: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of an object on S3, fewer where it ends."""
    bucket, key = _split(path)
    try:
        answer = _client().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
        return answer["Body"].read()
    except Exception as error:
        _raise_if_missing(path, error)
        raise


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
