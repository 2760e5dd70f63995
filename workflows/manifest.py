"""Manifests: finding their files, and reading rows from Parquet, CSV and JSON Lines piece by piece.

For tasks that start from pictures a folder of pictures is a manifest too, and so are the output of a
run and the JSON of the ImgEdit benchmark.

`discover` lists files, `scan` looks into one of them and cuts it into pieces, `Columns` settles one
Arrow schema for all of them, and `read` gives the rows of a piece in that schema. What reads contents
is meant for a task of its own; what the caller keeps is a few numbers a piece. A row that cannot be
read is told with its reason, and its neighbours are not harmed. Knows nothing of Ray, of what the
columns mean, or of plans.
"""

import base64
import csv
import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.errors import InputError
from workflows import storage
from workflows.cells import COLUMN, Cell, is_result
from workflows.results import (
    DATA_FOLDER,
    JSON_MARK,
    RUN_FILE,
    TEXT_TASKS,
    json_columns,
    lacking,
    shard_name,
    shard_number,
)
from workflows.run_config import OptionError
from workflows.tasks import PICTURE_TASKS

FORMATS = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
"""Files of a folder that are taken for pictures."""

REQUESTS_URL = "/v1/images/generations"
"""Where lines of OpenAI's batch format must be for, to be taken as rows."""

PIECE_ROWS = 65_536
PIECE_BYTES = 64 << 20
"""A piece ends when it has so many rows or bytes; of a Parquet file it has at least one row group."""

BATCH_ROWS = 4096
REPEATED_BYTES = 256 << 20
REPEATED_TIMES = 100
"""A column of a batch of Parquet rows may take more bytes than the former, but not more than the latter times
those of its distinct values: a file of a few kilobytes can say a long text again and again."""

HASHED_BYTES = 64 << 20
LINE_BYTES = 64 << 20
FIELD_CHARACTERS = 1 << 20
MOST_COLUMNS = 1000
DEEPEST = 100
"""Lists and objects within each other, in a value of JSON; what goes beyond has no sense, and no end."""


@dataclass(frozen=True)
class ManifestFile:
    """One file of a manifest. relative: path below the manifest. size: bytes. etag: of its contents.

    format: one of FORMATS, or `results` (a shard of a run's output), `pictures` (a folder or pattern of
    them, path being its own) or `imgedit`. cells: whether pictures in its column `image` are given as
    references to their rows.
    """

    path: str
    relative: str
    format: str
    size: int
    etag: str
    cells: bool = False


@dataclass(frozen=True)
class Manifest:
    """The files of a manifest, sorted by relative path, and those in its folder that are none of it."""

    path: str
    files: tuple[ManifestFile, ...]
    ignored: tuple[str, ...] = ()

    def identity(self) -> list[list[Any]]:
        """Relative path, size and etag of every file: what must be the same for a plan to go on."""
        return [[file.relative, file.size, file.etag] for file in self.files]


@dataclass(frozen=True)
class Piece:
    """Some consecutive rows of a file, so few that one task reads them.

    first_row: number of the first one in the file, from 0. start, stop: of the bytes (CSV, JSON Lines)
    or of the row groups (Parquet). header: columns of a CSV file.
    """

    file: ManifestFile
    first_row: int
    rows: int
    start: int
    stop: int
    header: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Piece":
        values = json.loads(text)
        return cls(**values | {"file": ManifestFile(**values["file"]), "header": tuple(values["header"])})


@dataclass(frozen=True)
class Scan:
    """What is in a file: its pieces, and its columns in order.

    schema: of a Parquet file. kinds: column -> the kinds of value seen in it, for the other formats.
    """

    pieces: list[Piece]
    schema: pa.Schema | None = None
    kinds: dict[str, set[str]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """For the way from a task to whoever puts scans together, who has the file already."""
        return json.dumps(
            {
                "pieces": [[piece.first_row, piece.rows, piece.start, piece.stop] for piece in self.pieces],
                "header": self.pieces[0].header if self.pieces else (),
                "schema": encode_schema(self.schema) if self.schema is not None else None,
                "kinds": [[name, sorted(kinds)] for name, kinds in self.kinds.items()],
            }
        )

    @classmethod
    def from_json(cls, text: str, file: ManifestFile) -> "Scan":
        values = json.loads(text)
        header = tuple(values["header"])
        return cls(
            [Piece(file, first, rows, start, stop, header) for first, rows, start, stop in values["pieces"]],
            decode_schema(values["schema"]) if values["schema"] else None,
            {name: set(kinds) for name, kinds in values["kinds"]},
        )


def encode_schema(schema: pa.Schema) -> str:
    """A schema as text, for JSON."""
    return base64.b64encode(schema.serialize()).decode()


def decode_schema(text: str) -> pa.Schema:
    """The schema of such a text."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


class Batch(NamedTuple):
    """Some rows of a piece. first_row: number in the file. faults: number in the file -> what is wrong."""

    first_row: int
    table: pa.Table
    faults: dict[int, str]


# Finding


def discover(path: str, task: str = "generate") -> Manifest:
    """The files of a manifest: a file, all of a folder at any depth, or what matches a pattern.

    Hidden files and folders, and names that begin with `_`, are left out. A task that starts from
    pictures takes some, if nothing names them, and the output of a finished run. Raises InputError if
    there is no such manifest, it has no file of a known format, or it is the output of a run.
    """
    pictures = task in PICTURE_TASKS
    single = storage.info(path)
    if single is not None:
        if pictures and _is_picture(path):
            return _picture_manifest(path, [single])
        imgedit = task == "edit" and path.lower().endswith(".json")
        form = "imgedit" if imgedit else _format(path)
        return Manifest(path, (_manifest_file(single, form, pictures),))
    if re.search(r"[*?\[]", path):
        found, what = storage.match_files(path), "no file matches it"
    else:
        folder = path if storage.is_s3(path) else os.path.realpath(path)
        found, what = storage.list_files(folder), "there is no such file or folder"
        if not storage.is_s3(path) and os.path.isdir(folder):
            what = "the folder is empty"
        if _is_output(found):
            return _results(path, found, task)
    visible = [file for file in found if not re.search(r"(^|/)[._]", file.relative)]
    files = [(file, FORMATS.get(os.path.splitext(file.relative)[1].lower())) for file in visible]
    known = tuple(_manifest_file(file, form, pictures) for file, form in files if form)
    others = [file for file, form in files if not form]
    shown = [file for file in others if pictures and _is_picture(file.relative)]
    ignored = tuple(file.relative for file in others if file not in shown)
    if shown and not known:
        return _picture_manifest(path, shown, ignored)
    if not known:
        if ignored:
            what = f"it has no Parquet, CSV or JSON Lines file, only such as '{ignored[0]}'"
        raise InputError(f"The manifest {path} cannot be read, {what}: give a file, a folder or a pattern.")
    return Manifest(path, known, ignored)


def _format(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    if suffix in FORMATS:
        return FORMATS[suffix]
    if suffix == ".json":
        raise InputError(f"The manifest {path} is JSON: write one object a line and name the file .jsonl.")
    raise InputError(
        f"The manifest {path} has the suffix '{suffix}', but only {', '.join(FORMATS)} are read: convert it."
    )


def _is_output(files: Sequence[storage.FileInfo]) -> bool:
    names = {file.relative for file in files}
    return RUN_FILE in names or any(re.fullmatch(r"plan/part-\d+\.json", name) for name in names)


def _results(path: str, files: Sequence[storage.FileInfo], task: str) -> Manifest:
    """The shards of a run's output. Raises InputError unless it is finished and the task wants pictures."""
    if task not in PICTURE_TASKS:
        raise InputError(
            f"{path} is the output of a run, not a manifest: for a second try of its errors give "
            f"{storage.join(path, 'errors.jsonl')}, for its rows {storage.join(path, DATA_FOLDER)}."
        )
    parts = sorted(file.relative for file in files if re.fullmatch(r"plan/part-\d+\.json", file.relative))
    done = next((file for file in files if file.relative == "_SUCCESS"), None)
    try:
        finished = json.loads(storage.read_bytes(done.path))["parts"] if done else None
    except (ValueError, TypeError, KeyError, RecursionError):
        finished = None
    if finished != [os.path.basename(part).removesuffix(".json") for part in parts]:
        raise InputError(f"{path} is the output of a run that is not finished: let it finish first.")
    data = (file for file in files if os.path.dirname(file.relative) == DATA_FOLDER)
    shards = (file for file in data if shard_number(os.path.basename(file.relative)) is not None)
    return Manifest(path, tuple(_manifest_file(file, "results") for file in shards))


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURE_SUFFIXES)


def _picture_manifest(
    path: str, files: Sequence[storage.FileInfo], ignored: tuple[str, ...] = ()
) -> Manifest:
    """One file stands for all pictures, which are many and have one row each."""
    names = json.dumps([[file.relative, file.size, file.etag] for file in files])
    etag = hashlib.sha256(names.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    size = sum(file.size for file in files)
    return Manifest(path, (ManifestFile(path, "pictures", "pictures", size, etag),), ignored)


def list_pictures(path: str) -> list[storage.FileInfo]:
    """The pictures of such a manifest, looked for anew."""
    single = storage.info(path)
    if single is not None:
        return [single]
    if re.search(r"[*?\[]", path):
        found = storage.match_files(path)
    else:
        found = storage.list_files(path if storage.is_s3(path) else os.path.realpath(path))
    visible = (file for file in found if not re.search(r"(^|/)[._]", file.relative))
    return [file for file in visible if _is_picture(file.relative)]


def _manifest_file(file: storage.FileInfo, form: str, pictures: bool = False) -> ManifestFile:
    etag = file.etag
    if not storage.is_s3(file.path) and file.size <= HASHED_BYTES:
        # A copy or a fresh checkout is the same manifest, though its files are newer.
        with storage.explained(file.path), open(file.path, "rb") as stream:
            etag = hashlib.file_digest(stream, "sha256").hexdigest()[:32]
    return ManifestFile(file.path, file.relative, form, file.size, etag, pictures and form == "parquet")


# Looking into a file


def scan(file: ManifestFile) -> Scan:
    """Columns of a file, and its pieces. Parquet costs a footer; the others are read through once.

    Raises InputError, naming the file, if it is corrupt or has columns that are not served.
    """
    scans = {
        "parquet": _scan_parquet,
        "csv": _scan_csv,
        "jsonl": _scan_jsonl,
        "imgedit": _scan_imgedit,
        "results": _scan_results,
        "pictures": _scan_pictures,
    }
    with _readable(file), storage.explained(file.path):
        return scans[_format_within(file)](file)


def _format_within(file: ManifestFile) -> str:
    """The format of a file; a shard of results is one wherever a copy of it lies, if pictures are wanted."""
    if file.cells and file.format == "parquet":
        with _open_parquet(file) as parquet:
            return "results" if is_result(parquet.schema_arrow) else "parquet"
    return file.format


class _readable:
    """Says of errors inside the block that the file cannot be read, and of a vanished one that it is gone."""

    def __init__(self, file: ManifestFile):
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise InputError(f"{self.file.path} vanished while it was read: start again.") from error
        if isinstance(error, (pa.ArrowException, OSError, UnicodeDecodeError)):
            words = str(error).strip().split("\n", 1)[0][:200]
            raise InputError(
                f"{self.file.path} is not a readable {self.file.format} file ({words}): repair or remove it."
            ) from error


def _open_parquet(file: ManifestFile, **options: Any) -> pq.ParquetFile:
    with storage.explained(file.path):
        filesystem, inner = storage.parquet_filesystem(file.path)
        source = filesystem.open_input_file(inner)
    return pq.ParquetFile(source, page_checksum_verification=True, **options)


def _parquet_batches(
    file: ManifestFile,
    parquet: pq.ParquetFile,
    names: list[str],
    first_row: int = 0,
    groups: Sequence[int] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Rows of a file, which is open, in batches, with the columns that are named.

    Raises InputError for a column of few long values before these are written out for each row.
    """
    schema = parquet.schema_arrow
    texts = [name for name in names if _is_long(schema.field(name).type)]
    with _open_parquet(file, metadata=parquet.metadata, read_dictionary=texts) as compact:
        for chunk in compact.iter_batches(BATCH_ROWS, row_groups=groups, columns=names, use_threads=False):
            for index, name in enumerate(chunk.schema.names):
                column, field = chunk.column(index), schema.field(name)
                if pa.types.is_dictionary(column.type):
                    _refuse_repetition(column, name, file.path, first_row)
                    chunk = chunk.set_column(index, field, column.cast(field.type))
            yield chunk
            first_row += chunk.num_rows


def _is_long(kind: pa.DataType) -> bool:
    """Whether a value of this type may have any length."""
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(known(kind) for known in kinds)


def _refuse_repetition(column: pa.DictionaryArray, name: str, path: str, first_row: int) -> None:
    values = column.dictionary
    if not _is_long(values.type) or values.nbytes * len(column) <= REPEATED_BYTES:
        return
    size = pc.sum(pc.binary_length(values).take(column.indices)).as_py() or 0
    if size > max(REPEATED_BYTES, REPEATED_TIMES * values.nbytes):
        raise InputError(
            f"Column '{name}' of {path} has {size >> 20:,} MiB in {len(column):,} rows from row {first_row} "
            f"on, which repeat {len(values):,} long values: shorten these."
        )


def _scan_parquet(file: ManifestFile) -> Scan:
    with _open_parquet(file) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
        for name in schema.names:
            if schema.names.count(name) > 1:
                raise InputError(f"{file.path} has two columns named '{name}': rename one.")
        for field in schema:
            _refuse_extension(field, field.name, file)
        if file.cells:
            schema = _with_references(schema, file)
        pieces, first, start, rows, size = [], 0, 0, 0, 0
        for group in range(metadata.num_row_groups):
            rows += metadata.row_group(group).num_rows
            size += metadata.row_group(group).total_byte_size
            if rows >= PIECE_ROWS or size >= PIECE_BYTES or group == metadata.num_row_groups - 1:
                if rows:
                    pieces.append(Piece(file, first, rows, start, group + 1))
                first, start, rows, size = first + rows, group + 1, 0, 0
    _check_width(file, schema.names)
    return Scan(pieces, schema)


def _with_references(schema: pa.Schema, file: ManifestFile) -> pa.Schema:
    """The schema of a file whose pictures are read as references to their rows, if it holds any."""
    index = schema.get_field_index(COLUMN)
    if index < 0 or _is_named(schema.field(index).type):
        return schema
    kind = schema.field(index).type
    if pa.types.is_struct(kind):
        kind = next((field.type for field in kind if field.name == "bytes"), kind)
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)):
        raise InputError(
            f"Column '{COLUMN}' of {file.path} is {schema.field(index).type}, but must hold paths, bytes or "
            f"structs of bytes and path: convert it."
        )
    return schema.set(index, pa.field(COLUMN, pa.string()))


def _is_named(kind: pa.DataType) -> bool:
    """Whether a column of this type says where pictures are and does not hold them."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def _refuse_extension(field: pa.Field, name: str, file: ManifestFile) -> None:
    if isinstance(field.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {}):
        raise InputError(
            f"Column '{name}' of {file.path} has an Arrow extension type, which is not read: "
            f"store it as a plain type, or leave it out."
        )
    for index in range(field.type.num_fields):
        _refuse_extension(field.type.field(index), name, file)


def _check_width(file: ManifestFile, names: Sequence[str]) -> None:
    if len(names) > MOST_COLUMNS:
        raise InputError(f"{file.path} has more than {MOST_COLUMNS} columns: leave some out.")


# CSV


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
        self.first_stop = position

    def __iter__(self) -> "_Lines":
        return self

    def mark(self) -> None:
        """A row begins here; `first_stop` will be where its first line ends."""
        self.first_stop = -1

    def __next__(self) -> str:
        line = _line(self.file, self.path)
        if not line:
            raise StopIteration
        if self.position == 0:
            self.position, line = self.position + len(line), line.removeprefix(b"\xef\xbb\xbf")
        else:
            self.position += len(line)
        if self.first_stop < 0:
            self.first_stop = self.position
        return line.decode("utf-8", "surrogateescape")


def _line(file: IO[bytes], path: str) -> bytes:
    line = file.readline(LINE_BYTES)
    if len(line) == LINE_BYTES and not line.endswith(b"\n"):
        raise InputError(f"{path} has a line of more than {LINE_BYTES >> 20} MiB: check its format.")
    return line


def _csv_rows(file: IO[bytes], path: str, start: int) -> Iterator[_Row]:
    """Rows of a CSV stream that stands at byte `start`. Blank lines are none."""
    csv.field_size_limit(FIELD_CHARACTERS)
    lines = _Lines(file, path, start)
    reader = csv.reader(lines, strict=True)
    while True:
        begin = lines.position
        lines.mark()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if lines.position > lines.first_stop:
                # A quote that is never closed: give up its line only, not all that follow it.
                file.seek(lines.first_stop)
                lines = _Lines(file, path, lines.first_stop)
                reader = csv.reader(lines, strict=True)
            yield _Row(begin, lines.position, None, f"is not valid CSV ({error})")
            continue
        if fields:
            yield _Row(begin, lines.position, fields, "")


def _csv_header(file: ManifestFile, stream: IO[bytes]) -> _Row | None:
    """The first row of a CSV file, its names checked; None if the file is empty."""
    first = next(_csv_rows(stream, file.path, 0), None)
    if first is None:
        return None
    if first.fault:
        raise InputError(f"The header of {file.path} {first.fault}: repair the file.")
    if not all(map(_is_text, first.values)):
        raise InputError(f"The header of {file.path} is not valid UTF-8: save the file as UTF-8.")
    names = [name.strip() or f"column_{index}" for index, name in enumerate(first.values)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{file.path} has two columns named '{name}': rename one.")
    _check_width(file, names)
    return first._replace(values=tuple(names))


def _scan_csv(file: ManifestFile) -> Scan:
    with storage.open_source(file.path) as stream:
        header = _csv_header(file, stream)
        if header is None:
            return Scan([])
        stream.seek(header.stop)
        rows = _csv_rows(stream, file.path, header.stop)
        pieces = list(_pieces(file, rows, header.stop, header.values))
    return Scan(pieces, kinds={name: {"str"} for name in header.values})


def _csv_values(row: _Row, header: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """Values of a CSV row by column, as far as it can be read, and what is wrong with it."""
    if row.fault:
        return {}, row.fault
    if len(row.values) != len(header):
        return {}, f"has {len(row.values)} fields, but the header has {len(header)}"
    values = dict(zip(header, row.values, strict=True))
    bad = [name for name, text in values.items() if not _is_text(text)]
    if bad:
        values = {name: _mended(text) for name, text in values.items()}
        return values, f"is not valid UTF-8 in column '{bad[0]}'"
    return values, ""


# JSON Lines


def _jsonl_rows(file: IO[bytes], path: str, start: int) -> Iterator[_Row]:
    """Rows of a JSON Lines stream that stands at byte `start`; values is a dict. Blank lines are none."""
    while True:
        line = _line(file, path)
        if not line:
            return
        begin, start = start, start + len(line)
        if begin == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.isspace() and line:
            yield _Row(begin, start, *_json_object(line))


def _json_object(line: bytes) -> tuple[dict[str, Any], str]:
    """The object on a line, as far as it can be read, and what is wrong with it."""
    fault = ""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        text, fault = line.decode(errors="replace"), "is not valid UTF-8"
    try:
        value = json.loads(text)
        if text.count("[") + text.count("{") > DEEPEST and _is_deep(value):
            raise RecursionError
    except (ValueError, RecursionError) as error:
        words = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return {}, fault or f"is not valid JSON ({words})"
    if not isinstance(value, dict):
        return {}, fault or f"is a JSON {_json_name(value)}, not an object"
    if "custom_id" in value and isinstance(value.get("body"), dict):
        value, wrong = _request(value)
        fault = fault or wrong
    if "\\u" in text and not _is_text(again := json.dumps(value, ensure_ascii=False)):
        value = json.loads(_mended(again))
        fault = fault or "holds half of a surrogate pair, which is no Unicode text"
    return value, fault


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        inner = [
            one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)
        ]
        level = list(itertools.chain.from_iterable(inner))
    return any(isinstance(one, dict | list) for one in level)


def _request(line: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A line of OpenAI's batch format as a row: its body, with the names of our columns."""
    body, row = line["body"], {"id": line["custom_id"]}
    row |= {name: value for name, value in body.items() if name not in ("id", "n", "size")}
    if body.get("n") is not None:
        row["samples"] = body["n"]
    size = body.get("size")
    if size not in (None, "auto"):
        # The sizes of their models are not those of ours, so the nearest ratio is taken.
        row["aspect_ratio"] = re.sub(r"^(\d+)x(\d+)$", r"\1:\2", size) if isinstance(size, str) else size
    if line.get("url") != REQUESTS_URL:
        return row, f"is a request to {json.dumps(line.get('url'))}, but only {REQUESTS_URL} is served"
    return row, ""


def _json_name(value: Any) -> str:
    names = {bool: "truth value", int: "number", float: "number", str: "string", list: "array"}
    return names.get(type(value), "null")


def _scan_jsonl(file: ManifestFile) -> Scan:
    kinds: dict[str, set[str]] = {}

    def noted(rows: Iterable[_Row]) -> Iterator[_Row]:
        for row in rows:
            for name, value in row.values.items():
                kinds.setdefault(name, set()).add(_kind(value))
            _check_width(file, kinds)  # type: ignore[arg-type]
            yield row

    with storage.open_source(file.path) as stream:
        pieces = list(_pieces(file, noted(_jsonl_rows(stream, file.path, 0)), 0))
    return Scan(pieces, kinds=kinds)


# Other kinds of manifest


def _imgedit_rows(file: ManifestFile) -> list[dict[str, Any]]:
    """Rows of ImgEdit's JSON, an object of keys: its `id` is the path of the source picture."""
    try:
        found = json.loads(storage.read_bytes(file.path))
        if _is_deep(found):
            raise RecursionError
        rows = [{**entry, "id": key, COLUMN: entry.get("id")} for key, entry in found.items()]
    except (ValueError, RecursionError, AttributeError, TypeError):
        raise InputError(
            f"{file.path} is not an object of keys, each with id, prompt and edit_type, which is the JSON "
            f"that edit reads: write one object a line and name the file .jsonl."
        ) from None
    _check_width(file, list({name: None for row in rows for name in row}))
    return [json.loads(_mended(json.dumps(row, ensure_ascii=False))) for row in rows]


def _scan_imgedit(file: ManifestFile) -> Scan:
    rows = _imgedit_rows(file)
    kinds: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.items():
            kinds.setdefault(name, set()).add(_kind(value))
    return Scan([Piece(file, 0, len(rows), 0, file.size)] if rows else [], kinds=kinds)


def _read_imgedit(piece: Piece, schema: pa.Schema) -> Iterator[Batch]:
    rows, marked = _imgedit_rows(piece.file), json_columns(schema)
    for start in range(0, len(rows), BATCH_ROWS):
        yield Batch(start, _text_table(rows[start : start + BATCH_ROWS], schema, marked), {})


def _scan_pictures(file: ManifestFile) -> Scan:
    count = len(list_pictures(file.path))
    starts = range(0, count, PIECE_ROWS)
    pieces = [Piece(file, start, min(PIECE_ROWS, count - start), start, start) for start in starts]
    return Scan(pieces, pa.schema([("id", pa.string()), (COLUMN, pa.string())]))


def _read_pictures(piece: Piece, schema: pa.Schema) -> Iterator[Batch]:
    files = list_pictures(piece.file.path)[piece.first_row : piece.first_row + piece.rows]
    for start in range(0, len(files), BATCH_ROWS):
        few = files[start : start + BATCH_ROWS]
        faults: dict[int, str] = {}
        for row, one in enumerate(few, piece.first_row + start):
            if not _is_text(one.path):
                faults[row] = "has a name that is not valid UTF-8"
        columns = {"id": [_mended(one.relative) for one in few], COLUMN: [_mended(one.path) for one in few]}
        arrays = [pa.array(columns[field.name], field.type) for field in schema]
        yield Batch(piece.first_row + start, _table(arrays, schema, len(few)), faults)


PREFIX = "in_"
"""How the columns of a run's output begin, where it is the manifest of another run."""


def _scan_results(file: ManifestFile) -> Scan:
    """Its ok rows: `id`, `image` (a reference), and all other columns under names of their own."""
    with _open_parquet(file) as parquet:
        theirs = parquet.schema_arrow
        if words := lacking(theirs):
            raise InputError(f"{file.path} says that it is a file of results, but {words}: leave it out.")
        ok = parquet.read(columns=["status"]).column("status").to_pylist().count("ok")
        groups = parquet.metadata.num_row_groups
    fields = [field.with_name(PREFIX + field.name) for field in theirs if field.name != COLUMN]
    marked = [PREFIX + name for name in json_columns(theirs)]
    metadata = {JSON_MARK: json.dumps(sorted(marked)).encode()} if marked else None
    schema = pa.schema([("id", pa.string()), (COLUMN, pa.string()), *fields], metadata=metadata)
    return Scan([Piece(file, 0, ok, 0, groups)] if ok else [], schema)


def _read_results(piece: Piece, schema: pa.Schema) -> Iterator[Batch]:
    path, first = piece.file.path, 0
    wanted = [name.removeprefix(PREFIX) for name in schema.names if name.startswith(PREFIX)]
    needed = {"row_id", "id", "sample", "status", "task", "source", *wanted}
    with _open_parquet(piece.file) as parquet:
        several = _with_samples(path, parquet)
        names = [name for name in parquet.schema_arrow.names if name in needed]
        for chunk in _parquet_batches(piece.file, parquet, names):
            table = pa.Table.from_batches([chunk])
            table = table.filter([status == "ok" for status in table.column("status").to_pylist()])
            rows = table.select(["row_id", "id", "sample", "task", "source"]).to_pylist()
            made = {
                "id": [f"{row['id']}/{row['sample']}" if row["id"] in several else row["id"] for row in rows],
                COLUMN: [_picture_of(path, row) for row in rows],
            }
            columns = [
                pa.array(made[field.name], field.type)
                if field.name in made
                else table.column(field.name.removeprefix(PREFIX)).cast(field.type)
                for field in schema
            ]
            yield Batch(first, _table(columns, schema, len(rows)), {})
            first += len(rows)


def _picture_of(path: str, row: dict[str, Any]) -> str | None:
    """Where the picture of a result is: in its own row, or where the one is that a text is about."""
    if row["task"] not in TEXT_TASKS:
        return str(Cell(path, row["row_id"]))
    source = row["source"] or {}
    if source.get("row_id") is None:
        return source.get("uri")
    return str(Cell(source["uri"], source["row_id"]))


def _with_samples(path: str, parquet: pq.ParquetFile) -> set[str]:
    """Ids of a shard that have several samples. They stand together, but may go on in the next shard."""
    table = parquet.read(columns=["id", "sample"])
    ids, samples = table.column("id").to_pylist(), table.column("sample").to_pylist()
    several = {one for one, sample in zip(ids, samples, strict=True) if sample}
    if ids and ids[-1] not in several:
        number = shard_number(os.path.basename(path))
        following = storage.join(path.rpartition("/")[0], shard_name((number or 0) + 1))
        if storage.exists(following):
            filesystem, inner = storage.parquet_filesystem(following)
            with filesystem.open_input_file(inner) as file, pq.ParquetFile(file) as after:
                first = next(after.iter_batches(1, columns=["id", "sample"])).to_pylist()[0]
                if first["sample"] and first["id"] == ids[-1]:
                    several.add(ids[-1])
    return several


def _kind(value: Any) -> str:
    """What a JSON value is: a scalar, `list:` of one kind of scalar, or `json` for anything else."""
    if value is None:
        return "null"
    if isinstance(value, list):
        inner = _merged({_kind(item) for item in value})
        return "json" if inner == "json" or inner.startswith("list:") else f"list:{inner}"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if abs(value) <= 2**53 else "long" if -(2**63) <= value < 2**63 else "json"
    return {float: "float", str: "str"}.get(type(value), "json")


def _merged(kinds: set[str]) -> str:
    """The one kind that all values of these kinds have without loss; `json` if there is none."""
    kinds = kinds - {"null"}
    if len(kinds) <= 1:
        return next(iter(kinds), "null")
    if kinds <= {"int", "float"}:
        return "float"
    if kinds <= {"int", "long"}:
        return "long"
    if all(kind.startswith("list:") for kind in kinds):
        inner = _merged({kind.removeprefix("list:") for kind in kinds})
        return "json" if inner == "json" else f"list:{inner}"
    return "json"


_ARROW = {
    "null": pa.string(),
    "bool": pa.bool_(),
    "int": pa.int64(),
    "long": pa.int64(),
    "float": pa.float64(),
    "str": pa.string(),
    "json": pa.string(),
}


def _pieces(
    file: ManifestFile, rows: Iterable[_Row], start: int, header: tuple[str, ...] = ()
) -> Iterator[Piece]:
    first = count = 0
    stop = start
    for row in rows:
        count, stop = count + 1, row.stop
        if count >= PIECE_ROWS or stop - start >= PIECE_BYTES:
            yield Piece(file, first, count, start, stop, header)
            first, start, count = first + count, stop, 0
    if count:
        yield Piece(file, first, count, start, stop, header)


# One schema


class Columns:
    """Settles one Arrow schema for all files of a manifest, whatever the order they are scanned in."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[int, str, Scan]] = {}

    def add(self, number: int, path: str, found: Scan) -> None:
        """number, path: of the file. Of files with equal columns only the first is kept."""
        columns = Scan([], found.schema, found.kinds)
        key = columns.to_json()
        if key not in self.files or number < self.files[key][0]:
            self.files[key] = (number, path, columns)

    def schema(self) -> pa.Schema:
        """Columns in the order they are first met; its metadata names those that hold JSON text.

        Raises InputError if two files have one column with types that do not go together.
        """
        ordered = sorted(self.files.values(), key=lambda entry: entry[0])
        kinds: dict[str, set[str]] = {}
        for _, _, found in ordered:
            for name, seen in found.kinds.items():
                kinds.setdefault(name, set()).update(seen)
        types: dict[str, tuple[pa.DataType, str]] = {}
        metadata: dict[bytes, bytes] = {}
        for _, path, found in ordered:
            for name, arrow in self._types(found, kinds).items():
                if name in types:
                    arrow = self._together(name, types[name], arrow, path)
                types[name] = (arrow, path)
            if found.schema is not None:
                features = (found.schema.metadata or {}).get(b"huggingface")
                metadata |= {b"huggingface": features} if features and not metadata else {}
        marked = [name for name, seen in kinds.items() if _merged(seen) in ("json", "list:null")]
        for _, _, found in ordered:
            marked += sorted(json_columns(found.schema) - {*marked}) if found.schema is not None else []
        if marked:
            metadata[JSON_MARK] = json.dumps(marked).encode()
        fields = [
            # No type at all is text, so that a file with values can follow.
            pa.field(name, pa.string() if pa.types.is_null(arrow) else arrow)
            for name, (arrow, _) in types.items()
        ]
        return pa.schema(fields, metadata=metadata)

    @staticmethod
    def _types(found: Scan, kinds: dict[str, set[str]]) -> dict[str, pa.DataType]:
        if found.schema is not None:
            return {field.name: field.type for field in found.schema}
        return {name: _arrow_type(_merged(kinds[name])) for name in found.kinds}

    @staticmethod
    def _together(name: str, before: tuple[pa.DataType, str], arrow: pa.DataType, path: str) -> pa.DataType:
        if before[0] == arrow:
            return arrow
        two = [pa.schema([(name, before[0])]), pa.schema([(name, arrow)])]
        try:
            return pa.unify_schemas(two, promote_options="permissive").field(0).type
        except pa.ArrowException:
            raise InputError(
                f"Column '{name}' is {before[0]} in {before[1]} but {arrow} in {path}: "
                f"give it one type in all files."
            ) from None


def _arrow_type(kind: str) -> pa.DataType:
    if kind.startswith("list:") and kind != "list:null":
        return pa.list_(_ARROW[kind.removeprefix("list:")])
    return _ARROW.get(kind, pa.string())


# Reading


def read(piece: Piece, schema: pa.Schema, columns: Iterable[str] | None = None) -> Iterator[Batch]:
    """The rows of a piece, in order, in the manifest's schema or these columns of it.

    Of a row with a fault the values are there as far as they could be read. Raises InputError if the
    file is corrupt, or no longer what it was when it was scanned.
    """
    if columns is not None:
        wanted = set(columns)
        schema = pa.schema([field for field in schema if field.name in wanted], metadata=schema.metadata)
    count = 0
    readers = {
        "parquet": _read_parquet,
        "imgedit": _read_imgedit,
        "results": _read_results,
        "pictures": _read_pictures,
    }
    with _readable(piece.file), storage.explained(piece.file.path):
        batches = readers.get(_format_within(piece.file), _read_text)
        for batch in batches(piece, schema):
            count += batch.table.num_rows
            yield batch
    if count != piece.rows:
        raise InputError(
            f"{piece.file.path} has {count} rows where it had {piece.rows}, so it changed while it was read: "
            f"start again when it is complete."
        )


def _read_parquet(piece: Piece, schema: pa.Schema) -> Iterator[Batch]:
    row = piece.first_row
    with _open_parquet(piece.file) as parquet:
        theirs = parquet.schema_arrow
        names = [name for name in schema.names if name in theirs.names]
        referred = piece.file.cells and COLUMN in names and not _is_named(theirs.field(COLUMN).type)
        names = [name for name in names if not (referred and name == COLUMN)]
        groups = range(piece.start, min(piece.stop, parquet.metadata.num_row_groups))
        for chunk in _parquet_batches(piece.file, parquet, names, row, groups):
            table, faults = _mended_columns(pa.Table.from_batches([chunk]), row)
            columns = [
                table.column(field.name).cast(field.type)
                if field.name in names
                else pa.nulls(chunk.num_rows, field.type)
                for field in schema
            ]
            if referred:
                cells = [str(Cell(piece.file.path, row + index)) for index in range(chunk.num_rows)]
                columns[schema.names.index(COLUMN)] = pa.array(cells)
            # A batch without columns still has rows.
            yield Batch(row, _table(columns, schema, chunk.num_rows), faults)
            row += chunk.num_rows


def _table(columns: list[Any], schema: pa.Schema, rows: int) -> pa.Table:
    if columns:
        return pa.Table.from_arrays(columns, schema=schema)
    return pa.table({"": pa.nulls(rows)}).select([])


def _mended_columns(table: pa.Table, first_row: int) -> tuple[pa.Table, dict[int, str]]:
    """The table with valid text in all columns, and the rows that had other."""
    faults: dict[int, str] = {}
    for index, field in enumerate(table.schema):
        try:
            table.column(index).validate(full=True)
            continue
        except pa.ArrowInvalid:
            inner = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            if inner not in (pa.string(), pa.large_string(), pa.string_view()):
                raise
        texts = []
        for row, raw in enumerate(table.column(index).cast(inner).cast(pa.large_binary()).to_pylist()):
            text = None if raw is None else raw.decode(errors="surrogateescape")
            if text is not None and not _is_text(text):
                faults.setdefault(first_row + row, f"is not valid UTF-8 in column '{field.name}'")
                text = _mended(text)
            texts.append(text)
        table = table.set_column(index, field, pa.array(texts, inner).cast(field.type))
    return table, faults


def _read_text(piece: Piece, schema: pa.Schema) -> Iterator[Batch]:
    marked = json_columns(schema)
    row, values, faults = piece.first_row, [], {}
    with storage.open_source(piece.file.path, piece.start) as stream:
        for number, (found, fault) in enumerate(_text_values(piece, stream), piece.first_row):
            values.append(found)
            if fault:
                faults[number] = fault
            if len(values) == BATCH_ROWS:
                yield Batch(row, _text_table(values, schema, marked), faults)
                row, values, faults = number + 1, [], {}
    if values:
        yield Batch(row, _text_table(values, schema, marked), faults)


def _text_values(piece: Piece, stream: IO[bytes]) -> Iterator[tuple[dict[str, Any], str]]:
    if piece.file.format == "csv":
        for row in _csv_rows(stream, piece.file.path, piece.start):
            if row.start >= piece.stop:
                return
            yield _csv_values(row, piece.header)
    else:
        for row in _jsonl_rows(stream, piece.file.path, piece.start):
            if row.start >= piece.stop:
                return
            yield row.values, row.fault


def _text_table(values: list[dict[str, Any]], schema: pa.Schema, marked: frozenset[str]) -> pa.Table:
    columns = []
    for field in schema:
        column = [row.get(field.name) for row in values]
        if field.name in marked:
            column = [None if value is None else json.dumps(value, ensure_ascii=False) for value in column]
        columns.append(pa.array(column, field.type))
    return _table(columns, schema, len(values))


def _is_text(text: str) -> bool:
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def _mended(text: str) -> str:
    """The text with U+FFFD for every byte or half that is none."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


# Choosing rows


class Filter:
    """Rows of a manifest for which an SQL expression over its columns holds, by DuckDB.

    The expression sees the rows alone: no file, network, environment or extension.
    """

    def __init__(self, expression: str, schema: pa.Schema):
        """Raises InputError, with DuckDB's own words, if the expression does not fit the columns."""
        import duckdb

        self.expression, self.error = expression, duckdb.Error
        # A name of our own for the row number; a manifest cannot be relied on not to use any one name.
        names = {name.lower() for name in schema.names}
        self.number = next(name for name in map("row_{}".format, itertools.count()) if name not in names)
        self.database = duckdb.connect(
            config={
                "enable_external_access": False,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "python_enable_replacements": False,
                "lock_configuration": True,
                "threads": 1,
            }
        )
        self.matches(schema.empty_table())

    def matches(self, table: pa.Table) -> np.ndarray:
        """bool [rows]: for which rows the expression is true. Raises InputError as above."""
        numbers = np.arange(table.num_rows)
        self.database.register("manifest", table.append_column(self.number, pa.array(numbers)))
        query = f"SELECT {self.number} FROM manifest WHERE (\n{self.expression}\n)"
        try:
            if len(self.database.extract_statements(query)) != 1:
                raise self.error("it is more than one expression")
            chosen = self.database.execute(query).fetchnumpy()[self.number]
        except self.error as error:
            words = str(error).strip().split("\n", 1)[0]
            raise OptionError(
                f"where is '{self.expression}', which DuckDB refuses ({words}): correct it."
            ) from None
        mask = np.zeros(table.num_rows, dtype=bool)
        mask[chosen] = True
        return mask
