"""Files of CSV, TSV, JSON and plain lines: cut into pieces between rows, and read piece by piece."""

import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

import pyarrow as pa

from wallaroo.model.errors import InputError
from wallaroo.workflows.manifests import questions
from wallaroo.workflows.manifests.batch_requests import is_request, row_of
from wallaroo.workflows.manifests.csv_rows import Row, csv_header, csv_rows, csv_values, raw_text, read_line
from wallaroo.workflows.manifests.schema import is_text, kind_of, mended, text_table
from wallaroo.workflows.manifests.streams import is_compressed, open_text
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
from wallaroo.workflows.sources.embedded import COLUMN

COMPRESSED_TIMES = 8
"""A piece of a compressed file is larger than others by this factor."""
PEEKED_ROWS = 100
"""Rows that are read to find what a file without columns holds."""
DEEPEST = 100
"""Deepest nesting of lists and objects in a JSON value. A row with a deeper one is refused."""


def scan_csv(file: ManifestFile) -> Scan:
    """Scans a CSV or TSV file. All of its columns are text.

    Args:
        file: The file.

    Returns:
        Its pieces, and its columns.

    Raises:
        InputError: The header is damaged.
    """
    with open_text(file) as stream:
        header = csv_header(file, stream)
        if header is None:
            return Scan([])
        stream.seek(header.stop)
        rows = csv_rows(stream, file, header.stop, len(header.values))
        pieces = list(_pieces(file, rows, header.stop, header.values))
    names = (
        questions.question_columns(header.values)
        if questions.is_questions(header.values, file)
        else header.values
    )
    return Scan(pieces, kinds={name: {"str"} for name in names})


def _line_rows(stream: IO[bytes], file: ManifestFile, start: int) -> Iterator[Row]:
    """Reads rows from a stream at byte `start`, one a line; `values` is a dict. Blank lines are left out."""
    while True:
        line = read_line(stream, file.path)
        if not line:
            return
        begin, start = start, start + len(line)
        if begin == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.isspace() and line:
            values = _text(line, file.task) if file.format == "lines" else _json_object(line, file.task)
            yield Row(begin, start, *values, "" if values[0] or not values[1] else raw_text(line))


def _text(line: bytes, task: str) -> tuple[dict[str, Any], str]:
    """Reads a line as a prompt, or as the path of a picture if the task reads one. Also returns its fault."""
    column = COLUMN if task else "prompt"
    try:
        return {column: line.decode().strip()}, ""
    except UnicodeDecodeError:
        return {column: line.decode(errors="replace").strip()}, "is not valid UTF-8"


def _json_object(line: bytes, task: str) -> tuple[dict[str, Any], str]:
    """Reads the object on a line as far as possible. Also returns what is wrong with it."""
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
        fault = fault or "holds half of a surrogate pair, which is not Unicode text"
    return value, fault


def is_deep(value: Any) -> bool:
    """Whether a JSON value is nested deeper than DEEPEST."""
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
    """Scans a file of JSON Lines, or of plain lines.

    Args:
        file: The file.

    Returns:
        Its pieces, and the kinds of values in each column.

    Raises:
        InputError: It has too many columns, or JSON other than an object a row.
    """
    kinds: dict[str, set[str]] = {}

    def noted(rows: Iterable[Row]) -> Iterator[Row]:
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
    """Whether an object is a table as pandas writes it by default, or holds the only list of rows."""
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
    file: ManifestFile, rows: Iterable[Row], start: int, header: tuple[str, ...] = ()
) -> Iterator[Piece]:
    first = count = 0
    stop = start
    # Reading from the middle of a compressed file decompresses all that precedes.
    times = COMPRESSED_TIMES if is_compressed(file) else 1
    for row in rows:
        count, stop = count + 1, row.stop
        if count >= PIECE_ROWS * times or stop - start >= PIECE_BYTES * times:
            yield Piece(file, first, count, start, stop, header)
            first, start, count = first + count, stop, 0
    if count:
        yield Piece(file, first, count, start, stop, header)


def read_text(piece: Piece, schema: pa.Schema) -> Iterator[Batch]:
    """Reads the rows of a piece of a CSV, TSV, JSON or text file.

    Args:
        piece: The piece.
        schema: Schema of the manifest.

    Yields:
        Batches of rows.

    Raises:
        Unfit: The type of a column cannot hold a value.
    """
    marked = json_columns(schema)
    row, values, faults, raw = piece.first_row, [], {}, {}
    with open_text(piece.file, piece.start) as stream:
        for number, (found, fault, text) in enumerate(_text_values(piece, stream), piece.first_row):
            values.append(found)
            if fault:
                faults[number] = fault
            if text:
                raw[number] = text
            if len(values) == BATCH_ROWS:
                yield Batch(row, text_table(values, schema, marked), faults, raw)
                row, values, faults, raw = number + 1, [], {}, {}
    if values:
        yield Batch(row, text_table(values, schema, marked), faults, raw)


def _text_values(piece: Piece, stream: IO[bytes]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """The values of the rows of a piece, what is wrong with each, and the text of one without values."""
    if piece.file.format in ("csv", "tsv"):
        asks = questions.is_questions(piece.header, piece.file)
        shared = functools.partial(_shared_pictures, piece.file)
        for row in csv_rows(stream, piece.file, piece.start, len(piece.header)):
            if row.start >= piece.stop:
                return
            values, fault = csv_values(row, piece.header)
            if asks and not fault:
                values, fault = questions.question_row(values, shared)
            yield values, fault, row.raw
    else:
        for row in _line_rows(stream, piece.file, piece.start):
            if row.start >= piece.stop:
                return
            yield row.values, row.fault, row.raw


@functools.lru_cache(maxsize=2)
def _shared_pictures(file: ManifestFile) -> dict[str, str]:
    return questions.shared_pictures(functools.partial(_every_row, file))


def _every_row(file: ManifestFile) -> Iterator[dict[str, str]]:
    """The rows without a fault of a CSV or TSV file, from its beginning."""
    with open_text(file) as stream:
        header = csv_header(file, stream)
        if header is None:
            return
        stream.seek(header.stop)
        for row in csv_rows(stream, file, header.stop, len(header.values)):
            values, fault = csv_values(row, header.values)
            if not fault:
                yield values


def first_columns(file: ManifestFile) -> list[str]:
    """Lists the columns of a file, as far as its first row shows them."""
    with open_text(file) as stream:
        if file.format in ("csv", "tsv"):
            header = csv_header(file, stream)
            return list(header.values) if header else []
        first = next(_line_rows(stream, file, 0), None)
        return list(first.values) if first else []
