"""Text files as UTF-8 with a row a line, however they are stored.

Compressed files are decompressed. UTF-16 and CR line ends are translated. A JSON array, or objects over
several lines, become one line each. The stream depends on the bytes of the file alone, so a place in it is a
place in the file.
"""

import bz2
import codecs
import functools
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

import pyarrow as pa

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.types import COMPRESSED, ManifestFile

LINE_BYTES = 64 << 20
"""Most bytes of a line or a JSON object."""
CHUNK_BYTES = 1 << 20
"""Bytes that are read and converted at once."""
_HEAD_BYTES = 64 << 10
_COMPRESSED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0"}
"""Suffix of a compressed file -> its first bytes."""
_BINARY = (b"PK\x03\x04", b"PAR1")
_HTML = (b"<!doctype html", b"<html")
GIT_LFS = b"version https://git-lfs"
"""How a pointer of Git LFS begins, which stands for a file that is not downloaded."""
_UTF16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|["\[\]{}]', re.DOTALL)
"""A text, a bracket, or the quote of a text whose end is not read yet."""


@contextmanager
def open_text(file: ManifestFile, start: int = 0) -> Iterator[IO[bytes]]:
    """Opens a text file as a stream of UTF-8 with a row a line, which can seek.

    Args:
        file: The file.
        start: First byte of the stream to read.

    Yields:
        The open stream.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: It is no text, or is encoded or compressed in a way that is not read.
    """
    with ExitStack() as stack:
        steps = _steps(file)[1]
        if not steps:
            yield stack.enter_context(storage.open_source(file.path, start))
            return

        def opened() -> IO[bytes]:
            stream = stack.enter_context(storage.open_source(file.path))
            for step in steps:
                stream = step(stream)
            return stream

        with io.BufferedReader(_Reopened(opened), CHUNK_BYTES) as stream:
            stream.seek(start)
            yield stream


def is_compressed(file: ManifestFile) -> bool:
    """Whether the suffix of a file is that of a compressed one."""
    return file.path.lower().endswith(COMPRESSED)


@functools.lru_cache(maxsize=64)
def _steps(file: ManifestFile) -> tuple[bytes, list[Callable[[IO[bytes]], IO[bytes]]]]:
    """Finds the conversions that a file needs, by its name and first bytes, and returns these too."""
    steps: list[Callable[[IO[bytes]], IO[bytes]]] = []
    name = file.path.lower()
    if name.endswith(".gz"):
        steps.append(_gunzip)
    elif name.endswith(".zst"):
        steps.append(lambda raw: io.BufferedReader(pa.CompressedInputStream(raw, "zstd")))
    elif name.endswith(".bz2"):
        steps.append(bz2.BZ2File)  # type: ignore[arg-type]
    elif name.endswith(".xz"):
        steps.append(lzma.LZMAFile)  # type: ignore[arg-type]
    with storage.open_source(file.path) as raw:
        for step in steps:
            raw = step(raw)
        head = raw.read(_HEAD_BYTES)
    for suffix, magic in _COMPRESSED.items():
        if head.startswith(magic):
            raise InputError(f"{file.path} is compressed, but its name does not end in {suffix}: rename it.")
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise InputError(f"{file.path} is UTF-32: save it as UTF-8.")
    encoding = _UTF16.get(head[:2])
    if encoding:
        steps.append(lambda raw: _stream(_decoded(raw, encoding)))
        head = head[2 : len(head) // 2 * 2].decode(encoding, "replace").encode()
    elif b"\0" in head[:4] or is_unmarked_utf16(head):
        raise InputError(
            f"{file.path} has NUL bytes, as UTF-16 without a mark at its start has: save it as UTF-8."
        )
    if line_end := _other_line_end(head, file.format):
        steps.append(lambda raw: _stream(_with_newlines(raw, line_end)))
        head = head.replace(line_end, b"\n")
    if head.startswith(GIT_LFS):
        raise pointer(file)
    if head.lstrip()[:15].lower().startswith(_HTML):
        raise InputError(f"{file.path} holds HTML, not {file.format}: check where it was copied from.")
    if head.startswith(_BINARY):
        raise InputError(
            f"{file.path} is not text, but Parquet, or a ZIP archive as Excel writes: save it as Parquet or "
            f"as CSV in UTF-8, with that suffix."
        )
    if file.format in ("jsonl", "json") and _is_bare_array(head.removeprefix(codecs.BOM_UTF8)):
        raise InputError(
            f"{file.path} is a JSON array of values without names: write each row as an object, such as "
            f'{{"prompt": "a cat"}}.'
        )
    if file.format in ("jsonl", "json") and _is_document(head, file.format):
        steps.append(lambda raw: _stream(_flat(raw, file.path)))
    return head, steps


def is_unmarked_utf16(head: bytes) -> bool:
    """Tells whether text is UTF-16 without a mark at its start.

    Args:
        head: The text, or its beginning.

    Returns:
        True if it has NUL bytes where UTF-16 has them. A text without any is never taken for UTF-16.
    """
    if b"\0" not in head:
        return False
    # Of an ASCII letter one byte is NUL, the same one of the two throughout a text.
    fewer, more = sorted((head[::2].count(0), head[1::2].count(0)))
    if len(head) % 2 == 0 and not fewer and more > len(head) / 4:
        return True
    if _decodes(head, "utf-8"):
        return False
    # Other text is letters too when read so, but with control characters or without a line end.
    texts = [_decodes(head, encoding) for encoding in ("utf-16-le", "utf-16-be")]
    return any(re.search("[\r\n]", text) and not re.search("[\0-\x08\x0e-\x1f]", text) for text in texts)


def _decodes(head: bytes, encoding: str) -> str:
    """Decodes the beginning of a text, perhaps cut inside a character; empty if it has another encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return ""


def pointer(file: ManifestFile) -> InputError:
    """Makes the error for a file that is a pointer of Git LFS."""
    return InputError(
        f"{file.path} is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`."
    )


def _other_line_end(head: bytes, form: str) -> bytes:
    """The line end of a text if it is CR, or what Windows makes of CRLF in CSV; empty for LF and CRLF."""
    if b"\r" in head and b"\n" not in head:
        return b"\r"
    if form in ("csv", "tsv") and (match := re.search(rb"\r\r\n|\r\n|\r|\n", head)):
        quoted = head.count(b'"', 0, match.start()) % 2
        return match[0] if match[0] in (b"\r", b"\r\r\n") and not quoted else b""
    return b""


def _is_bare_array(head: bytes) -> bool:
    """Whether JSON is an array of texts or numbers, and not a line among others."""
    text = head.lstrip()
    first = text[1:].lstrip()
    if not text.startswith(b"[") or first[:1] not in {bytes([one]) for one in b'"-0123456789'}:
        return False
    return b"\n" in text[: len(text) - len(first)] or b"\n" not in text.rstrip()


def _gunzip(raw: IO[bytes]) -> IO[bytes]:
    return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]


def first_line(file: ManifestFile) -> bytes:
    """First line of a text file in UTF-8, cut after 64 KiB."""
    return _steps(file)[0].splitlines(keepends=True)[:1][0] if _steps(file)[0] else b""


def has_header(file: ManifestFile) -> bool:
    """Whether a .txt file is a table with tabs, as Excel saves "Unicode text", and not a prompt a line."""
    names = [
        name.strip().strip('"').lower() for name in first_line(file).decode(errors="replace").split("\t")
    ]
    return len(names) > 1 and "prompt" in names


def is_object_of_objects(file: ManifestFile) -> bool:
    """Whether a JSON file is one object whose values are objects, as ImgEdit's is."""
    head = _steps(file)[0].removeprefix(codecs.BOM_UTF8)
    return bool(re.match(rb'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\{', head))


def _is_document(head: bytes, form: str) -> bool:
    """Whether JSON is an array of objects, or objects over several lines, and not an object a line."""
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    line = head.partition(b"\n")[0].strip()
    if line in (b"{", b"[") or re.match(rb"\[\s*\{", head):
        return True
    if form == "jsonl":
        return _is_followed(line)
    if not line.startswith(b"{"):
        return True
    try:
        json.loads(line)
    except ValueError:
        return True  # an object over several lines, or broken
    return False


def _is_followed(line: bytes) -> bool:
    """Whether a comma or another object follows the object on a line."""
    text = line.decode(errors="replace")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return line.startswith(b"{") and bool(re.match(r"\s*(,?\s*\{|,\s*$)", text[end:]))


def _decoded(raw: IO[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    raw.read(2)
    while data := raw.read(CHUNK_BYTES):
        yield decoder.decode(data).encode("utf-8", "replace")
    yield decoder.decode(b"", True).encode("utf-8", "replace")


def _with_newlines(raw: IO[bytes], line_end: bytes) -> Iterator[bytes]:
    rest = b""
    while data := raw.read(CHUNK_BYTES):
        data = rest + data
        # A line end of several bytes may go on in the next chunk.
        stop = len(data.rstrip(b"\r")) if len(line_end) > 1 else len(data)
        rest = data[stop:]
        yield data[:stop].replace(line_end, b"\n")
    yield rest.replace(line_end, b"\n")


def _flat(raw: IO[bytes], path: str) -> Iterator[bytes]:
    """Writes the outermost objects of JSON, or of its outermost array, one a line. Other content is kept."""
    data = raw.read(3).removeprefix(codecs.BOM_UTF8)
    place = depth = start = 0
    array = seen = False
    while True:
        more = raw.read(CHUNK_BYTES)
        data = data[start:] + more
        place, start = place - start, 0
        for match in _TOKEN.finditer(data, place):
            token = match[0]
            if token == b'"':
                place = match.start()
                break
            place = match.end()
            if token in (b"[", b"{"):
                if token == b"[" and not (depth or array or seen or data[start : match.start()].strip()):
                    array, start = True, place
                    continue
                seen = True
                depth += 1
            elif token in (b"]", b"}"):
                if depth == 0 and token == b"]" and array:
                    yield from _lines(data[start : match.start()])
                    array, start = False, place
                    continue
                depth -= 1
                if depth <= 0:
                    yield from _lines(data[start:place])
                    depth, start = 0, place
        if not more:
            # The rest is truncated, or was never JSON.
            yield from _lines(data[start:])
            return
        if len(data) - start > LINE_BYTES:
            raise InputError(
                f"{path} has a JSON object of more than {LINE_BYTES >> 20} MiB: check its format."
            )


def _lines(text: bytes) -> Iterator[bytes]:
    text = re.sub(rb"[\r\n]+", b" ", text).strip(b" \t,")
    if text:
        yield text + b"\n"


def _stream(pieces: Iterator[bytes]) -> IO[bytes]:
    return io.BufferedReader(_Pieces(pieces), CHUNK_BYTES)  # type: ignore[return-value]


class _Pieces(io.RawIOBase):
    """A stream of pieces of bytes that are made one after the other."""

    def __init__(self, pieces: Iterator[bytes]):
        self.pieces, self.rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            piece = next(self.pieces, None)
            if piece is None:
                return 0
            self.rest = memoryview(piece)
        data, self.rest = self.rest[: len(buffer)], self.rest[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


class _Reopened(io.RawIOBase):
    """A stream that seeks backwards by reading again from the beginning."""

    def __init__(self, opened: Callable[[], IO[bytes]]):
        self.opened, self.stream, self.place = opened, opened(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self.place
        elif whence != io.SEEK_SET:
            raise io.UnsupportedOperation("its end is not known")
        if offset < self.place:
            self.stream, self.place = self.opened(), 0
        while self.place < offset and (data := self.stream.read(min(CHUNK_BYTES, offset - self.place))):
            self.place += len(data)
        return self.place

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)
