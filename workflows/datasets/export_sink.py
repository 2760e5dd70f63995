"""Where exports write: several files at once, each atomically, if it is missing or may be replaced.

Knows nothing of any format.
"""

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage

Growing = Mapping[str, Collection[str]]
"""Path of a file that grows with the rows -> sha256 of each content that exports may have given it."""

WRITERS = 8
WAITING_BYTES = 32 << 20
"""Most memory of files that wait for a writer; a larger file is written before the next is made."""


class Sink:
    """Writes files below a folder, several at once. Files that have the right bytes are left alone.

    Args:
        dest: The folder, local or `s3://`.
        overwrite: Replace files that have other bytes.
        mark: Writes the mark of a partial export with what `growing` holds. It is called before the first
            file, and before a file that grows with the rows gets other bytes, so that a later export knows
            all bytes that may be there.
        growing: Path below the folder -> sha256 of what earlier exports may have written there, of each file
            that grows with the rows. Files with one of these are replaced.

    Attributes:
        growing: Path below the folder -> sha256 of each file of this export that grows with the rows.

    Raises:
        InputError: A file has other bytes, and `overwrite` is not set.
    """

    def __init__(
        self,
        dest: str,
        overwrite: bool = False,
        mark: Callable[[Growing], None] | None = None,
        growing: Growing | None = None,
    ):
        self._mark, self._marked = mark, False
        self._earlier, self.growing = dict(growing or {}), dict[str, str]()
        self._held: list[tuple[str, Callable[[], bytes], int]] = []
        self.dest, self.overwrite, self.files, self.unchanged = dest, overwrite, 0, 0
        # The first look at a place must not be that of several threads, which would share a half-made client.
        storage.info(storage.join(dest, "metadata.jsonl"))
        self._pool = ThreadPoolExecutor(WRITERS)
        self._waiting: deque[tuple[int, Future[bool]]] = deque()

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._take_all()
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
        if not grows:
            self._start()
            self._submit(relative, make, size)
            return
        self.growing[relative] = hashlib.sha256(make()).hexdigest()
        self._held.append((relative, make, size))
        # The mark is written anew for all that are held, so their number grows with its length.
        many = len(self._held) > max(100, len(self.growing) // 4)
        if many or sum(one for *_, one in self._held) > WAITING_BYTES:
            self._release()

    def _release(self) -> None:
        """Gives the writers the files that grow, after the mark has their digests."""
        held, self._held = self._held, []
        if held:
            self._note()
        for relative, make, size in held:
            self._submit(relative, make, size)

    def _submit(self, relative: str, make: Callable[[], bytes], size: int) -> None:
        path = storage.join(self.dest, relative)
        replaced = None if self.overwrite else self._earlier.get(relative, ())
        self._waiting.append((size, self._pool.submit(_write, path, make, replaced)))
        while len(self._waiting) > 2 * WRITERS or sum(taken for taken, _ in self._waiting) > WAITING_BYTES:
            self._take()

    def _start(self) -> None:
        if not self._marked:
            self._note()

    def _note(self) -> None:
        """Writes the mark with the digests of earlier exports and of this one."""
        self._marked = True
        if self._mark is not None:
            both = dict(self._earlier)
            for relative, digest in self.growing.items():
                both[relative] = tuple(dict.fromkeys((*both.get(relative, ()), digest)))
            self._mark(both)

    def _take_all(self) -> None:
        self._release()
        while self._waiting:
            self._take()

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
                self._take_all()
            self.growing[relative] = digest.hexdigest()
            self.unchanged += 1
        else:
            there = storage.exists(path)
            with storage.write_stream(path) as stream:
                yield _Hashed(digest, stream)
                self._take_all()
                self.growing[relative] = digest.hexdigest()
                self._note()
            self.unchanged += there and self._earlier.get(relative) == (digest.hexdigest(),)
        self.files += 1

    def _grew(self, relative: str) -> bool:
        """Whether a file is as an earlier export wrote it."""
        if relative not in self._earlier:
            return False
        digest = hashlib.sha256()
        with storage.open_source(storage.join(self.dest, relative)) as file:
            while data := file.read(1 << 20):
                digest.update(data)
        return digest.hexdigest() in self._earlier[relative]


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


def _write(path: str, make: Callable[[], bytes], replaced: Collection[str] | None) -> bool:
    """Writes a file unless it has these bytes already. Returns whether it wrote.

    replaced: sha256 of the other bytes that it may replace; None for any.
    """
    data = make()
    found = storage.info(path)
    if found is not None:
        # The etag of an object that came in one piece spares its reading.
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        same = found.size == len(data) and (found.etag == md5 or storage.read_bytes(path) == data)
        if same:
            return False
        if replaced is not None and hashlib.sha256(storage.read_bytes(path)).hexdigest() not in replaced:
            raise _other_bytes(path)
    storage.write_atomic(path, data)
    return True


def _other_bytes(path: str) -> InputError:
    return InputError(
        f"{path} exists with other content than this export gives it: "
        f"choose another DEST, or --overwrite to replace it."
    )
