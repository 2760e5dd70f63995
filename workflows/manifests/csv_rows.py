"""Rows of CSV and TSV as Python, Excel, Spark and others write them, with byte offsets."""

import codecs
import csv
import functools
import re
from collections import deque
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from wallaroo.model.errors import InputError
from wallaroo.workflows.manifests.schema import is_text, mended
from wallaroo.workflows.manifests.streams import LINE_BYTES, first_line
from wallaroo.workflows.manifests.types import ManifestFile, check_width
from wallaroo.workflows.sources.references import MAX_INLINE_CHARACTERS

FIELD_CHARACTERS = 1 << 20
"""Most characters of a CSV field. It may be longer for tasks that read pictures, which may be in base64."""
RAW_CHARACTERS = 4_000
"""Most characters that are kept of a row that cannot be read."""


class Row(NamedTuple):
    """A row of a text file."""

    start: int
    """Its first byte in the stream."""
    stop: int
    """The byte after its last one."""
    values: Any
    """Its values: a list of fields, or a dict."""
    fault: str
    """What is wrong with it; empty if nothing is."""
    raw: str = ""
    """Its text if no value of it can be read, cut as `raw_text` does; else empty."""


def raw_text(line: bytes) -> str:
    """The text of a row, for people who repair it.

    Args:
        line: Its bytes.

    Returns:
        The text without its line end. After RAW_CHARACTERS it is cut, and says so.
    """
    # A character has at most 4 bytes.
    text = line[: 4 * RAW_CHARACTERS + 4].decode(errors="replace").strip("\ufeff\r\n")
    if len(text) <= RAW_CHARACTERS:
        return text
    return f"{text[:RAW_CHARACTERS]}... (cut after {RAW_CHARACTERS:,} characters)"


class _Lines:
    """The lines of a stream as text, with the position read so far. Bad UTF-8 survives as lone surrogates."""

    def __init__(self, file: IO[bytes], path: str, position: int):
        self.file, self.path, self.position = file, path, position
        self.held: list[bytes] = []
        self.pending: deque[bytes] = deque()

    def __iter__(self) -> "_Lines":
        return self

    def mark(self) -> None:
        """Begins a row; `held` then collects its lines."""
        self.held = []

    def back(self, kept: int) -> None:
        """Lets all lines of the row but the first `kept` be read again."""
        self.pending.extendleft(reversed(self.held[kept:]))
        self.position -= sum(map(len, self.held[kept:]))
        del self.held[kept:]

    def __next__(self) -> str:
        line = self.pending.popleft() if self.pending else read_line(self.file, self.path)
        if not line:
            raise StopIteration
        start, self.position = self.position, self.position + len(line)
        self.held.append(line)
        return (line if start else line.removeprefix(codecs.BOM_UTF8)).decode("utf-8", "surrogateescape")


def read_line(file: IO[bytes], path: str) -> bytes:
    """Reads one line of a text file.

    Args:
        file: The open stream.
        path: Path of the file, for the error.

    Returns:
        The line with its end; empty at the end of the file.

    Raises:
        InputError: The line has LINE_BYTES or more.
    """
    line = file.readline(LINE_BYTES)
    if len(line) == LINE_BYTES and not line.endswith(b"\n"):
        raise InputError(f"{path} has a line of more than {LINE_BYTES >> 20} MiB: check its format.")
    return line


class _Dialect(NamedTuple):
    """How a CSV or TSV file separates its fields, and the byte at which its header starts."""

    delimiter: str
    start: int


@functools.lru_cache(maxsize=64)
def _dialect(file: ManifestFile) -> _Dialect:
    """Finds the delimiter: by the suffix (.tsv, .psv), and in a CSV file by a header without commas.

    Excel writes semicolons in many countries, and a line `sep=;` before the header.
    """
    if file.format == "tsv":
        return _Dialect("\t", 0)
    line = first_line(file)
    if separator_line := re.fullmatch(rb"(?:\xef\xbb\xbf)?\"?sep=([,;\t|])\"?\r?\n?", line):
        return _Dialect(separator_line[1].decode(), len(line))
    text = line.decode(errors="replace")
    is_psv = re.search(r"\.psv(\.\w+)?$", file.path.lower())
    for delimiter in "|" if is_psv else (",", ";", "\t", "|"):
        try:
            if len(next(csv.reader([text], delimiter=delimiter), [])) > 1:
                return _Dialect(delimiter, 0)
        except csv.Error:
            break
    return _Dialect(",", 0)


def csv_rows(stream: IO[bytes], file: ManifestFile, start: int, width: int = 0) -> Iterator[Row]:
    """Reads the rows of a CSV or TSV stream. Blank lines are left out.

    Args:
        stream: The open file, at byte `start`.
        file: The file, whose header tells how fields are separated.
        start: Byte at which a row begins.
        width: Number of fields of a row; 0 for the header.

    Yields:
        The rows with their fields. A row that is not valid CSV ends with its first line.
    """
    csv.field_size_limit(MAX_INLINE_CHARACTERS if file.task else FIELD_CHARACTERS)
    lines, delimiter = _Lines(stream, file.path, start), _dialect(file).delimiter
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    while True:
        begin = lines.position
        lines.mark()
        fields: list[str] | None
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            other = _other_quotes(lines, delimiter, width)
            fault = "" if other else f"is not valid {file.format.upper()} ({error})"
            reader = csv.reader(lines, strict=True, delimiter=delimiter)
            fields = other
        else:
            fault = ""
        if fields or fault:
            whole = not fault and (not width or len(fields or ()) == width)
            raw = "" if whole else raw_text(b"".join(lines.held))
            yield Row(begin, lines.position, fields, fault, raw)


def _other_quotes(lines: _Lines, delimiter: str, width: int) -> list[str] | None:
    """Reads a row that is not valid CSV by the rules of other writers.

    Spark puts a backslash before a quote. Most writers of TSV know no quotes; there a quote that begins a
    field is a part of its text.
    """
    if width and any(b'\\"' in line for line in lines.held):
        lines.back(0)
        doubled = (line.replace('\\"', '""') for line in lines)
        try:
            fields = next(csv.reader(doubled, strict=True, delimiter=delimiter))
            if len(fields) == width:
                return fields
        except (csv.Error, StopIteration):
            pass
    lines.back(1)
    first = lines.held[0]
    if delimiter != "\t" or len(first) > FIELD_CHARACTERS:
        return None
    return first.decode("utf-8", "surrogateescape").rstrip("\r\n").split("\t")


def csv_header(file: ManifestFile, stream: IO[bytes]) -> Row | None:
    """Reads the header of a CSV file and checks its names.

    Args:
        file: The file.
        stream: The file, open; it is read from its beginning.

    Returns:
        The first row, with the names as its values; None if the file is empty.

    Raises:
        InputError: The header is not valid CSV or UTF-8, or names a column twice.
    """
    start = _dialect(file).start
    stream.seek(start)
    first = next(csv_rows(stream, file, start), None)
    if first is None:
        return None
    if first.fault:
        raise InputError(f"The header of {file.path} {first.fault}: repair the file.")
    if not all(map(is_text, first.values)):
        raise InputError(f"The header of {file.path} is not valid UTF-8: save the file as UTF-8.")
    names = [name.strip() or f"column_{index}" for index, name in enumerate(first.values)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{file.path} has two columns named '{name}': rename one.")
    check_width(file, names)
    return first._replace(values=tuple(names))


def csv_values(row: Row, header: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """Assigns the fields of a CSV row to columns.

    Args:
        row: The row.
        header: Names of the columns.

    Returns:
        Column -> text, as far as the row can be read, and what is wrong with it (empty if nothing is).
    """
    if row.fault:
        return {}, row.fault
    if len(row.values) != len(header):
        return {}, f"has {len(row.values)} fields, but the header has {len(header)}"
    values = dict(zip(header, row.values, strict=True))
    bad = [name for name, text in values.items() if not is_text(text)]
    if bad:
        values = {name: mended(text) for name, text in values.items()}
        return values, f"is not valid UTF-8 in column '{bad[0]}'"
    return values, ""
