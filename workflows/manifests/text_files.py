"""Rows of CSV, TSV, JSON and plain lines, with byte offsets, so that a file can be read in pieces."""

import csv
import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

import pyarrow as pa

from wallaroo.model.errors import InputError
from wallaroo.workflows.manifests.batch_requests import is_request, row_of
from wallaroo.workflows.manifests.questions import (
    is_questions,
    question_columns,
    question_row,
    shared_pictures,
)
from wallaroo.workflows.manifests.schema import is_text, kind_of, mended, text_table
from wallaroo.workflows.manifests.streams import LINE_BYTES, is_compressed, open_text
from wallaroo.workflows.manifests.types import (
    BATCH_ROWS,
    PIECE_BYTES,
    PIECE_ROWS,
    Batch,
    ManifestFile,
    Piece,
    Scan,
    check_width,
)
from wallaroo.workflows.outputs.schema import json_columns
from wallaroo.workflows.sources.references import MAX_INLINE_CHARACTERS

FIELD_CHARACTERS = 1 << 20
"""Most characters of a CSV field; of tasks that start from pictures it may be one in base64."""
COMPRESSED_TIMES = 8
"""A piece of a compressed file is so many times as large as others."""
DEEPEST = 100
"""Lists and objects within each other, in a value of JSON; what goes beyond has no sense, and no end."""


class _Row(NamedTuple):
    """A row of a text file: its bytes, its values, and what is wrong with it (empty if nothing is)."""

    start: int
    stop: int
    values: Any
    fault: str


class _Lines:
    """The lines of a stream as text, and how far it was read. Bad UTF-8 survives as lone surrogates."""

    def __init__(self, file: IO[bytes], path: str, position: int):
        self.file, self.path, self.position = file, path, position
        self.first_stop, self.first = position, ""

    def __iter__(self) -> "_Lines":
        return self

    def mark(self) -> None:
        """A row begins here; `first` will be its first line, and `first_stop` where that ends."""
        self.first_stop = -1

    def __next__(self) -> str:
        line = _line(self.file, self.path)
        if not line:
            raise StopIteration
        if self.position == 0:
            self.position, line = self.position + len(line), line.removeprefix(b"\xef\xbb\xbf")
        else:
            self.position += len(line)
        text = line.decode("utf-8", "surrogateescape")
        if self.first_stop < 0:
            self.first_stop, self.first = self.position, text
        return text


def _line(file: IO[bytes], path: str) -> bytes:
    line = file.readline(LINE_BYTES)
    if len(line) == LINE_BYTES and not line.endswith(b"\n"):
        raise InputError(f"{path} has a line of more than {LINE_BYTES >> 20} MiB: check its format.")
    return line


def _csv_rows(stream: IO[bytes], file: ManifestFile, start: int) -> Iterator[_Row]:
    """Rows of a CSV or TSV stream that stands at byte `start`. Blank lines are none."""
    csv.field_size_limit(MAX_INLINE_CHARACTERS if file.task else FIELD_CHARACTERS)
    lines = _Lines(stream, file.path, start)
    delimiter = "\t" if file.format == "tsv" else ","
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    while True:
        begin = lines.position
        lines.mark()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            first = lines.first
            if lines.position > lines.first_stop:
                # A quote that is never closed: give up its line only, not all that follow it.
                stream.seek(lines.first_stop)
                lines = _Lines(stream, file.path, lines.first_stop)
                reader = csv.reader(lines, strict=True, delimiter=delimiter)
            if delimiter == "\t" and len(first) <= FIELD_CHARACTERS:
                # Most writers of TSV know no quotes: one that begins a field is a part of its text.
                yield _Row(begin, lines.position, first.rstrip("\r\n").split("\t"), "")
            else:
                yield _Row(begin, lines.position, None, f"is not valid {file.format.upper()} ({error})")
            continue
        if fields:
            yield _Row(begin, lines.position, fields, "")


def csv_header(file: ManifestFile, stream: IO[bytes]) -> _Row | None:
    """The first row of a CSV file, its names checked; None if the file is empty."""
    first = next(_csv_rows(stream, file, 0), None)
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


def scan_csv(file: ManifestFile) -> Scan:
    with open_text(file) as stream:
        header = csv_header(file, stream)
        if header is None:
            return Scan([])
        stream.seek(header.stop)
        rows = _csv_rows(stream, file, header.stop)
        pieces = list(_pieces(file, rows, header.stop, header.values))
    names = question_columns(header.values) if is_questions(header.values, file) else header.values
    return Scan(pieces, kinds={name: {"str"} for name in names})


def _csv_values(row: _Row, header: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """Values of a CSV row by column, as far as it can be read, and what is wrong with it."""
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


def _line_rows(stream: IO[bytes], file: ManifestFile, start: int) -> Iterator[_Row]:
    """Rows of a stream that stands at byte `start`, one a line; values is a dict. Blank lines are none."""
    while True:
        line = _line(stream, file.path)
        if not line:
            return
        begin, start = start, start + len(line)
        if begin == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.isspace() and line:
            values = _prompt(line) if file.format == "lines" else _json_object(line, file.task)
            yield _Row(begin, start, *values)


def _prompt(line: bytes) -> tuple[dict[str, Any], str]:
    """A line that is a prompt, and what is wrong with it."""
    try:
        return {"prompt": line.decode().strip()}, ""
    except UnicodeDecodeError:
        return {"prompt": line.decode(errors="replace").strip()}, "is not valid UTF-8"


def _json_object(line: bytes, task: str) -> tuple[dict[str, Any], str]:
    """The object on a line, as far as it can be read, and what is wrong with it."""
    fault = ""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        text, fault = line.decode(errors="replace"), "is not valid UTF-8"
    try:
        value = json.loads(text)
        if text.count("[") + text.count("{") > DEEPEST and is_deep(value):
            raise RecursionError
    except (ValueError, RecursionError) as error:
        words = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return {}, fault or f"is not valid JSON ({words})"
    if not isinstance(value, dict):
        return {}, fault or f"is a JSON {_json_name(value)}, not an object"
    if is_request(value):
        value, wrong = row_of(value, task)
        fault = fault or wrong
    if "\\u" in text and not is_text(again := json.dumps(value, ensure_ascii=False)):
        value = json.loads(mended(again))
        fault = fault or "holds half of a surrogate pair, which is no Unicode text"
    return value, fault


def is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        inner = [
            one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)
        ]
        level = list(itertools.chain.from_iterable(inner))
    return any(isinstance(one, dict | list) for one in level)


def _json_name(value: Any) -> str:
    names = {bool: "truth value", int: "number", float: "number", str: "string", list: "array"}
    return names.get(type(value), "null")


def scan_lines(file: ManifestFile) -> Scan:
    kinds: dict[str, set[str]] = {}

    def noted(rows: Iterable[_Row]) -> Iterator[_Row]:
        for row in rows:
            for name, value in row.values.items():
                kinds.setdefault(name, set()).add(kind_of(value))
            check_width(file, kinds)  # type: ignore[arg-type]
            yield row

    with open_text(file) as stream:
        pieces = list(_pieces(file, noted(_line_rows(stream, file, 0)), 0))
    return Scan(pieces, kinds=kinds)


def _pieces(
    file: ManifestFile, rows: Iterable[_Row], start: int, header: tuple[str, ...] = ()
) -> Iterator[Piece]:
    first = count = 0
    stop = start
    # To read from the middle of a compressed file all before it is decompressed too.
    times = COMPRESSED_TIMES if is_compressed(file) else 1
    for row in rows:
        count, stop = count + 1, row.stop
        if count >= PIECE_ROWS * times or stop - start >= PIECE_BYTES * times:
            yield Piece(file, first, count, start, stop, header)
            first, start, count = first + count, stop, 0
    if count:
        yield Piece(file, first, count, start, stop, header)


def read_text(piece: Piece, schema: pa.Schema) -> Iterator[Batch]:
    marked = json_columns(schema)
    row, values, faults = piece.first_row, [], {}
    with open_text(piece.file, piece.start) as stream:
        for number, (found, fault) in enumerate(_text_values(piece, stream), piece.first_row):
            values.append(found)
            if fault:
                faults[number] = fault
            if len(values) == BATCH_ROWS:
                yield Batch(row, text_table(values, schema, marked), faults)
                row, values, faults = number + 1, [], {}
    if values:
        yield Batch(row, text_table(values, schema, marked), faults)


def _text_values(piece: Piece, stream: IO[bytes]) -> Iterator[tuple[dict[str, Any], str]]:
    if piece.file.format in ("csv", "tsv"):
        questions = is_questions(piece.header, piece.file)
        shared = functools.partial(_shared_pictures, piece.file)
        for row in _csv_rows(stream, piece.file, piece.start):
            if row.start >= piece.stop:
                return
            values, fault = _csv_values(row, piece.header)
            if questions and not fault:
                values, fault = question_row(values, shared)
            yield values, fault
    else:
        for row in _line_rows(stream, piece.file, piece.start):
            if row.start >= piece.stop:
                return
            yield row.values, row.fault


@functools.lru_cache(maxsize=2)
def _shared_pictures(file: ManifestFile) -> dict[str, str]:
    return shared_pictures(functools.partial(_every_row, file))


def _every_row(file: ManifestFile) -> Iterator[dict[str, str]]:
    """The sound rows of a CSV or TSV file, from its beginning."""
    with open_text(file) as stream:
        header = csv_header(file, stream)
        if header is None:
            return
        stream.seek(header.stop)
        for row in _csv_rows(stream, file, header.stop):
            values, fault = _csv_values(row, header.values)
            if not fault:
                yield values


def first_columns(file: ManifestFile) -> list[str]:
    """Names of the columns of a file, as far as its first row tells."""
    with open_text(file) as stream:
        if file.format in ("csv", "tsv"):
            header = csv_header(file, stream)
            return list(header.values) if header else []
        first = next(_line_rows(stream, file, 0), None)
        return list(first.values) if first else []
