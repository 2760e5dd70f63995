"""Bytes of source pictures from disk, S3 and https, many at once, with retries for each web host."""

import errno
import functools
import hashlib
import os
import random
import re
import stat
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from wallaroo.model.errors import InputError, RowError
from wallaroo.workflows import storage
from wallaroo.workflows.sources import https
from wallaroo.workflows.sources.https import shown, without_query
from wallaroo.workflows.sources.references import (
    Reference,
    SourceOptions,
    identity,
    inline_bytes,
    kept_uri,
    locate,
    parts_of,
)

FIRST_PAUSE_SECONDS = 0.5
"""Pause after the first failure of a host. Each further failure doubles it."""
MAX_BACKOFF_SECONDS = 20.0
"""Longest pause."""


@dataclass(frozen=True)
class Fetched:
    """The bytes of a source, and where they are from."""

    uri: str
    """Absolute path, or address without its query.

    For bytes in the manifest it is the path beside them, or `data:` with their type.
    """
    data: bytes
    """The bytes of the file."""

    @functools.cached_property
    def sha256(self) -> str:
        """sha256 of the bytes, hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def name(self) -> str:
        """Name of the source at the beginning of messages."""
        inline = not self.uri or self.uri.startswith("data:")
        return "The image in the manifest" if inline else shown(self.uri)


def fetch_many(
    references: Sequence[Reference], options: SourceOptions
) -> Iterator[tuple[list[int], Fetched | RowError]]:
    """Fetches every distinct reference once. At most `options.fetches` are in flight or waiting.

    Args:
        references: Value of `image`, row by row.
        options: Where sources may come from, and their limits.

    Yields:
        The positions of a reference, and its bytes or the reason for refusal, in the order of first
        positions.

    Raises:
        InputError: A storage does not serve.
    """
    groups: dict[Any, list[int]] = {}
    for position, reference in enumerate(references):
        groups.setdefault(identity(reference), []).append(position)
    waiting: deque[tuple[list[int], Future[Fetched | RowError]]] = deque()
    pool = ThreadPoolExecutor(options.fetches, thread_name_prefix="fetch")
    try:
        for positions in groups.values():
            if len(waiting) == options.fetches:
                yield _finished(waiting.popleft())
            waiting.append((positions, pool.submit(_fetched, references[positions[0]], options)))
        while waiting:
            yield _finished(waiting.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _finished(one: tuple[list[int], "Future[Fetched | RowError]"]) -> tuple[list[int], Fetched | RowError]:
    return one[0], one[1].result()


def _fetched(reference: Reference, options: SourceOptions) -> Fetched | RowError:
    try:
        return fetch(reference, options)
    except RowError as error:
        return error


def fetch(
    reference: Reference,
    options: SourceOptions,
    download: Callable[[str, int], bytes] = https.download,
) -> Fetched:
    """Fetches the bytes of a reference.

    Args:
        reference: Value of `image`.
        options: Where sources may come from, and their limits.
        download: Address and most bytes -> bytes; replaces `https.download`.

    Returns:
        The bytes, and where they are from.

    Raises:
        RowError: ("image") There is no such source, it may not be read or has too many bytes, or a web host
            does not serve.
        InputError: A storage does not serve.
    """
    data, path = parts_of(reference)
    place = path if data is not None else locate(path, options)
    if data is None and place.startswith("data:"):
        data, place = inline_bytes(place), kept_uri(place)
    if data is not None:
        fetched = Fetched(place, data)
        if len(data) > options.most_bytes:
            raise _too_many_bytes(fetched.name, options.most_bytes)
        return fetched
    most, retry_seconds = options.most_bytes, options.retry_seconds
    if place.startswith("https://"):
        uri = without_query(place)
        host = urllib.parse.urlsplit(uri).netloc
        return Fetched(uri, _with_retries(host, lambda: _download(place, most, download), retry_seconds))
    if place.startswith("s3://"):
        # Requests to S3 are retried by the storage itself.
        return Fetched(place, _read_object(place, most))
    return Fetched(place, _with_retries("", lambda: _read_file(place, most), retry_seconds))


class _Outage(Exception):
    """A source did not serve, but may do so later. `final` is the error to raise if it never does."""

    def __init__(self, final: InputError):
        super().__init__(str(final))
        self.final = final


_OF_A_FILE = {
    errno.ENOENT: "does not exist",
    errno.ENOTDIR: "does not exist",
    errno.EACCES: "cannot be read for lack of permission",
    errno.EPERM: "cannot be read for lack of permission",
    errno.ELOOP: "is a loop of links",
    errno.ENAMETOOLONG: "is not a valid path, since it is too long",
    errno.EILSEQ: "is not a valid path",
    errno.EINVAL: "is not a valid path",
    errno.ENXIO: "is not a regular file",
    errno.ENODEV: "is not a regular file",
}


def _remedy(path: str) -> str:
    """What to do about a path that leads nowhere."""
    if re.search(r"\\|(^|/)[A-Za-z]:/", path):
        return "write / in place of \\, and no drive"
    return "correct the path or the file"


def _read_file(path: str, most: int) -> bytes:
    try:
        # A plain open of a pipe without a writer would block forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            regular, data = stat.S_ISREG(os.fstat(descriptor).st_mode), b""
            if regular:
                with open(descriptor, "rb", closefd=False) as file:
                    data = file.read(most + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        words = _OF_A_FILE.get(error.errno or 0)
        if words:
            raise RowError("image", f"{shown(path)} {words}: {_remedy(path)}.") from None
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        message = f"{shown(path)} cannot be read, the system says '{reason}': check its file system."
        raise _Outage(InputError(message)) from error
    except ValueError:
        raise RowError("image", f"{shown(path)} is not a valid path: correct it.") from None
    if not regular:
        raise RowError("image", f"{shown(path)} is not a regular file: give one.")
    if len(data) > most:
        raise _too_many_bytes(shown(path), most)
    return data


def _read_object(path: str, most: int) -> bytes:
    try:
        return storage.read_object(path, most)
    except FileNotFoundError:
        raise RowError("image", f"{shown(path)} does not exist: {_remedy(path)}.") from None
    except storage.TooLarge:
        raise _too_many_bytes(shown(path), most) from None
    except InputError as error:
        if storage.refuses_path(error):
            raise RowError("image", str(error)) from None
        raise
    except ValueError:
        raise RowError("image", f"{shown(path)} is not a valid path: correct it.") from None


def _download(url: str, most: int, download: Callable[[str, int], bytes]) -> bytes:
    try:
        return download(url, most)
    except https.Unavailable as error:
        # Some of many hosts are always gone, so this must not stop a run.
        name = shown(without_query(url))
        raise _Outage(RowError("image", f"{name} cannot be read, {error}: try again or copy it.")) from error


def _too_many_bytes(name: str, most: int) -> RowError:
    return RowError("image", f"{name} has more than the allowed {most:,} bytes: make it smaller.")


class _Endpoint:
    """The recent state of one endpoint, shared by all threads that use it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.failures = 0
        self.since = 0.0
        self.until = 0.0

    def wait(self) -> None:
        """Waits until the present pause is over."""
        while (rest := self.until - time.monotonic()) > 0:
            time.sleep(rest)

    def served(self) -> None:
        with self.lock:
            self.failures = 0

    def failed(self, started: float, retry_seconds: float) -> bool:
        """Begins a pause, twice as long as the last one; False if it would outlast `retry_seconds`.

        The time counts from the endpoint's first failure in a row, so that the many sources of a dead
        one are not each waited for, and from `started`, in case only one source fails while others do not.
        """
        with self.lock:
            now = time.monotonic()
            # A request that began before the pause says nothing new.
            if now >= self.until:
                if not self.failures or now - self.until > retry_seconds:
                    self.failures, self.since = 0, now
                pause = min(MAX_BACKOFF_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(self.failures, 10))
                self.failures += 1
                self.until = now + pause * random.uniform(0.5, 1)
            return self.until - min(self.since, started) <= retry_seconds


@functools.lru_cache(maxsize=4096)
def _endpoint(name: str) -> _Endpoint:
    return _Endpoint()


def _with_retries(name: str, attempt: Callable[[], bytes], retry_seconds: float) -> bytes:
    """Calls `attempt`, and retries it for `retry_seconds` while its endpoint does not serve."""
    endpoint, started = _endpoint(name), time.monotonic()
    while True:
        endpoint.wait()
        try:
            data = attempt()
        except RowError:
            endpoint.served()
            raise
        except _Outage as outage:
            if not endpoint.failed(started, retry_seconds):
                raise outage.final from outage
        else:
            endpoint.served()
            return data
