"""Rows of CSV, TSV, JSON and plain lines, with byte offsets, so that a file can be read in pieces."""

import codecs
import csv
import functools
import itertools
import json
import re
from collections import deque
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
from wallaroo.workflows.manifests.streams import LINE_BYTES, first_line, is_compressed, open_text
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
PEEKED_ROWS = 100
"""Rows that tell what a file without columns holds."""
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
        self.held: list[bytes] = []
        self.pending: deque[bytes] = deque()

    def __iter__(self) -> "_Lines":
        return self

    def mark(self) -> None:
        """A row begins here; `held` will be the lines that are read of it."""
        self.held = []

    def back(self, kept: int) -> None:
        """Lets the lines of the row be read once more, but for the first ones that are kept."""
        self.pending.extendleft(reversed(self.held[kept:]))
        self.position -= sum(map(len, self.held[kept:]))
        del self.held[kept:]

    def __next__(self) -> str:
        line = self.pending.popleft() if self.pending else _line(self.file, self.path)
        if not line:
            raise StopIteration
        start, self.position = self.position, self.position + len(line)
        self.held.append(line)
        return (line if start else line.removeprefix(codecs.BOM_UTF8)).decode("utf-8", "surrogateescape")


def _line(file: IO[bytes], path: str) -> bytes:
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
    """Commas or tabs, as the suffix says; in a CSV file also semicolons or tabs if the header has no comma.

    Excel writes semicolons in many countries, and a line `sep=;` before the header.
    """
    if file.format == "tsv":
        return _Dialect("\t", 0)
    line = first_line(file)
    if told := re.fullmatch(rb"(?:\xef\xbb\xbf)?\"?sep=([,;\t])\"?\r?\n?", line):
        return _Dialect(told[1].decode(), len(line))
    text = line.decode(errors="replace")
    for delimiter in (",", ";", "\t"):
        try:
            if len(next(csv.reader([text], delimiter=delimiter), [])) > 1:
                return _Dialect(delimiter, 0)
        except csv.Error:
            break
    return _Dialect(",", 0)


def _csv_rows(stream: IO[bytes], file: ManifestFile, start: int, width: int = 0) -> Iterator[_Row]:
    """Rows of a CSV or TSV stream that stands at byte `start`. Blank lines are none.

    width: fields of a row, 0 for the header. A row that is no valid CSV is given up with its first line.
    """
    csv.field_size_limit(MAX_INLINE_CHARACTERS if file.task else FIELD_CHARACTERS)
    lines, delimiter = _Lines(stream, file.path, start), _dialect(file).delimiter
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    while True:
        begin = lines.position
        lines.mark()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            other = _other_quotes(lines, delimiter, width)
            fault = "" if other else f"is not valid {file.format.upper()} ({error})"
            reader = csv.reader(lines, strict=True, delimiter=delimiter)
            yield _Row(begin, lines.position, other, fault)
            continue
        if fields:
            yield _Row(begin, lines.position, fields, "")


def _other_quotes(lines: _Lines, delimiter: str, width: int) -> list[str] | None:
    """The fields of a row that is no valid CSV, if other writers would have written it so.

    Spark puts a backslash before a quote. Most writers of TSV know no quotes: one that begins a field is a
    part of its text.
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


def csv_header(file: ManifestFile, stream: IO[bytes]) -> _Row | None:
    """The first row of a CSV file, its names checked; None if the file is empty."""
    start = _dialect(file).start
    stream.seek(start)
    first = next(_csv_rows(stream, file, start), None)
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
        rows = _csv_rows(stream, file, header.stop, len(header.values))
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
    if "\\u" in text and not is_text(encoded := json.dumps(value, ensure_ascii=False)):
        value = json.loads(mended(encoded))
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
    if file.format != "lines":
        _refuse_other_json(file, pieces, kinds)
    return Scan(pieces, kinds=kinds)


def _refuse_other_json(file: ManifestFile, pieces: list[Piece], kinds: dict[str, set[str]]) -> None:
    """Raises InputError for JSON that holds a table in another shape than rows, or texts alone."""
    if not pieces or (kinds and sum(piece.rows for piece in pieces) > 1):
        return
    with open_text(file) as stream:
        rows = list(itertools.islice(_line_rows(stream, file, 0), PEEKED_ROWS))
    if kinds and _is_table(rows[0].values):
        raise InputError(
            f"{file.path} is one object that holds a table ({', '.join(kinds)[:100]}), not an object a row: "
            f"write it so, in pandas by to_json(PATH, orient='records', lines=True)."
        )
    if all(row.fault.startswith(("is a JSON ", "is not valid JSON (Extra data")) for row in rows):
        raise InputError(
            f"{file.path} holds texts, numbers or lists, and no objects: write an object a row, such as "
            f'{{"prompt": "a cat"}}, or a prompt a line into a .txt file.'
        )


def _is_table(value: dict[str, Any]) -> bool:
    """Whether an object is a table as pandas writes one by default, or the one list of rows in a document."""
    if {*value} in ({"columns", "index", "data"}, {"schema", "data"}):
        return True
    if len(value) == 1 and isinstance(rows := value.get("data"), list):
        return bool(rows) and all(isinstance(row, dict) for row in rows)
    columns = [column for column in value.values() if isinstance(column, dict)]
    if not value or len(columns) < len(value):
        return False
    numbered = [str(number) for number in range(max(len(value), len(columns[0])))]
    return [*value] == numbered[: len(value)] or all(
        [*column] == numbered[: len(columns[0])] != [] for column in columns
    )


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
        for row in _csv_rows(stream, piece.file, piece.start, len(piece.header)):
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
        for row in _csv_rows(stream, file, header.stop, len(header.values)):
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
