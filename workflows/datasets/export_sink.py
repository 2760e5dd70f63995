"""Where exports write: several files at once, each atomically, if it is missing or may be replaced.

Knows nothing of any format.
"""

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage

WRITERS = 8
WAITING_BYTES = 32 << 20
"""Most memory of files that wait for a writer; a larger file is written before the next is made."""


class Sink:
    """Writes files below a folder, several at once. Files that have the right bytes are left alone.

    Args:
        dest: The folder, local or `s3://`.
        overwrite: Replace files that have other bytes.
        begin: Called before the first file.
        growing: Path below the folder -> sha256 of each file that an earlier, partial export wrote and that
            grows with the rows. Those with these bytes are replaced.

    Attributes:
        growing: The same of the files of this export.

    Raises:
        InputError: A file has other bytes, and `overwrite` is not set.
    """

    def __init__(
        self,
        dest: str,
        overwrite: bool = False,
        begin: Callable[[], None] | None = None,
        growing: Mapping[str, str] | None = None,
    ):
        self._begin = begin
        self._earlier, self.growing = dict(growing or {}), dict[str, str]()
        self.dest, self.overwrite, self.files, self.unchanged = dest, overwrite, 0, 0
        # The first look at a place must not be that of several threads, which would share a half-made client.
        storage.info(storage.join(dest, "metadata.jsonl"))
        self._pool = ThreadPoolExecutor(WRITERS)
        self._waiting: deque[tuple[int, Future[bool]]] = deque()

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            while self._waiting and kind is None:
                self._take()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def read(self, relative: str) -> bytes | None:
        """The bytes of a file below the folder; None if there is none."""
        path = storage.join(self.dest, relative)
        return storage.read_bytes(path) if storage.info(path) is not None else None

    def put(self, relative: str, make: Callable[[], bytes], size: int, grows: bool = False) -> None:
        """Writes a file in a thread.

        Args:
            relative: Path of the file below the folder.
            make: Returns the bytes; called in the thread.
            size: Memory that this takes until it is written, in bytes.
            grows: Whether it may have other bytes when more rows are finished.
        """
        self._start()
        path = storage.join(self.dest, relative)
        if grows:
            self.growing[relative] = hashlib.sha256(make()).hexdigest()
        replaced = "any" if self.overwrite else self._earlier.get(relative, "")
        self._waiting.append((size, self._pool.submit(_write, path, make, replaced)))
        while len(self._waiting) > 2 * WRITERS or sum(taken for taken, _ in self._waiting) > WAITING_BYTES:
            self._take()

    def _start(self) -> None:
        if self._begin is not None:
            self._begin()
            self._begin = None

    def _take(self) -> None:
        written = self._waiting.popleft()[1].result()
        self.files += 1
        self.unchanged += not written

    @contextlib.contextmanager
    def stream(self, relative: str) -> Iterator[Any]:
        """A file that is written in pieces, and appears after all others."""
        self._start()
        path = storage.join(self.dest, relative)
        digest = hashlib.sha256()
        if not self.overwrite and storage.exists(path) and not self._grew(relative):
            with storage.open_source(path) as existing:
                yield _Hashed(digest, _Same(path, existing))
                if existing.read(1):
                    raise _other_bytes(path)
                while self._waiting:
                    self._take()
            self.unchanged += 1
        else:
            there = storage.exists(path)
            with storage.write_stream(path) as stream:
                yield _Hashed(digest, stream)
                while self._waiting:
                    self._take()
            self.unchanged += there and digest.hexdigest() == self._earlier.get(relative)
        self.growing[relative] = digest.hexdigest()
        self.files += 1

    def _grew(self, relative: str) -> bool:
        """Whether a file is as an earlier, partial export wrote it."""
        if relative not in self._earlier:
            return False
        digest = hashlib.sha256()
        with storage.open_source(storage.join(self.dest, relative)) as file:
            while data := file.read(1 << 20):
                digest.update(data)
        return digest.hexdigest() == self._earlier[relative]


class _Hashed:
    """A file that is hashed as it is written."""

    def __init__(self, digest: Any, file: Any):
        self._digest, self._file = digest, file

    def write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)


class _Same:
    """A file that exists already: each piece is compared with its bytes."""

    def __init__(self, path: str, existing: IO[bytes]):
        self._path, self._existing = path, existing

    def write(self, data: bytes) -> None:
        if self._existing.read(len(data)) != data:
            raise _other_bytes(self._path)


def _write(path: str, make: Callable[[], bytes], replaced: str) -> bool:
    """Writes a file unless it has these bytes already. Returns whether it wrote.

    replaced: sha256 of the other bytes that it may replace, `any`, or empty.
    """
    data = make()
    found = storage.info(path)
    if found is not None:
        # The etag of an object that came in one piece spares its reading.
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        same = found.size == len(data) and (found.etag == md5 or storage.read_bytes(path) == data)
        if same:
            return False
        if replaced != "any" and hashlib.sha256(storage.read_bytes(path)).hexdigest() != replaced:
            raise _other_bytes(path)
    storage.write_atomic(path, data)
    return True


def _other_bytes(path: str) -> InputError:
    return InputError(
        f"{path} exists with other content than this export gives it: "
        f"choose another DEST, or --overwrite to replace it."
    )
