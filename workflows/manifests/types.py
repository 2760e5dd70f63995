"""The parts of a manifest: its files, their pieces, and batches of their rows."""

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa

from wallaroo.model.errors import InputError

FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
"""Suffix -> format of the files that are always read as a manifest."""
OTHER_FORMATS = {".json": "json", ".txt": "lines"}
"""Suffix -> format of the files that are read if they are given by name, or if a folder has no others."""
LAST_FORMATS = {".psv": "csv", ".tab": "tsv", ".jsonlines": "jsonl", ".ldjson": "jsonl", ".jl": "jsonl"}
"""Suffix -> format of the files that are read by name or pattern, or if a folder has nothing else to read.

Older versions skip them in folders, and their outputs must resume. A .jl file may also be source of Julia.
"""
ALL_FORMATS = FORMATS | OTHER_FORMATS | LAST_FORMATS
"""Suffix -> format of all files that are read."""
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
"""Suffixes that may follow those of text files."""
PIECE_ROWS = 65_536
"""A piece ends when it has so many rows."""
PIECE_BYTES = 64 << 20
"""A piece ends when it has so many bytes. A piece of a Parquet file has at least one row group."""
BATCH_ROWS = 4096
"""Most rows of a batch."""
MAX_COLUMNS = 1000
"""Most columns of a manifest file."""


@dataclass(frozen=True)
class ManifestFile:
    """One file of a manifest."""

    path: str
    """Local or `s3://` path. For `pictures` and `prompts` it is the folder or pattern."""
    relative: str
    """Path below the manifest."""
    format: str
    """One of ALL_FORMATS, or one of four more.

    `results` is a shard of a run's output, `pictures` a folder or pattern of pictures, `prompts` a folder of
    texts, `imgedit` the JSON of ImgEdit.
    """
    size: int
    """Size in bytes."""
    etag: str
    """Changes when the contents do."""
    cells: bool = False
    """Whether pictures in it are read as references to their rows."""
    column: str = ""
    """Column of pictures, if the run names one."""
    task: str = ""
    """Task of the run, if it changes how rows are read."""
    partition: tuple[tuple[str, str | None, str], ...] = ()
    """Columns whose values stand in the names of folders: name, value as text, Arrow type."""

    def to_values(self) -> dict[str, Any]:
        """Converts to plain JSON values.

        Empty fields that older versions lacked are left out, so that older plans keep their digests.
        """
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if value or key not in _LATER_FIELDS}


_LATER_FIELDS = ("column", "task", "partition")


@dataclass(frozen=True)
class Manifest:
    """The files of a manifest."""

    path: str
    """Local or `s3://` path of a file or folder, or a pattern."""
    files: tuple[ManifestFile, ...]
    """The files, sorted by relative path."""
    passed_over: Mapping[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    """Kind of skipped file -> how many, and the name of one."""
    notes: tuple[str, ...] = ()
    """Sentences for the user about how the files are read."""

    def identity(self) -> list[list[Any]]:
        """Relative path, size and etag of every file. They must be the same for a plan to continue."""
        return [[file.relative, file.size, file.etag] for file in self.files]


@dataclass(frozen=True)
class Piece:
    """Some consecutive rows of a file, few enough for one task."""

    file: ManifestFile
    """The file."""
    first_row: int
    """Number of the first row in the file, from 0."""
    rows: int
    """Number of rows."""
    start: int
    """Where it begins: a byte of text, a row group of Parquet, or a row of a folder."""
    stop: int
    """The byte or row group after its last one."""
    header: tuple[str, ...] = ()
    """Columns of a CSV file; empty for other formats."""

    def to_json(self) -> str:
        """Encodes the piece as JSON text."""
        return json.dumps(dataclasses.asdict(self) | {"file": self.file.to_values()})


@dataclass(frozen=True)
class Scan:
    """What is in a file."""

    pieces: list[Piece]
    """Its pieces in order."""
    schema: pa.Schema | None = None
    """Schema of a file whose columns have types; None for text files."""
    kinds: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    """Column -> kinds of values in it, for text files."""


def encode_schema(schema: pa.Schema) -> str:
    """Encodes a schema as text for JSON."""
    return base64.b64encode(schema.serialize()).decode()


def decode_schema(text: str) -> pa.Schema:
    """Decodes what `encode_schema` gave."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


class Batch(NamedTuple):
    """Some rows of a piece."""

    first_row: int
    """Number of the first row in the file."""
    table: pa.Table
    """The rows."""
    faults: dict[int, str]
    """Number of a row in the file -> what is wrong with it."""
    raw: Mapping[int, str] = MappingProxyType({})
    """Number of a row in the file -> its text, if no value of it can be read."""


def check_width(file: ManifestFile, names: Sequence[str]) -> None:
    """Checks the number of columns of a file.

    Args:
        file: The file.
        names: Its columns.

    Raises:
        InputError: There are more than MAX_COLUMNS.
    """
    if len(names) > MAX_COLUMNS:
        raise InputError(f"{file.path} has more than {MAX_COLUMNS} columns: leave some out.")


PICTURE_COLUMNS = (
    "prompt",
    "image",
    "id",
    "samples",
    "seed",
    "cfg",
    "temperature",
    "top_k",
    "top_p",
    "language",
)
"""Columns that the tasks with a source picture read."""
KNOWN_COLUMNS = {
    "generate": (
        "prompt",
        "id",
        "samples",
        "seed",
        "cfg",
        "temperature",
        "top_k",
        "top_p",
        "language",
        "width",
        "height",
        "aspect_ratio",
    ),
    "edit": PICTURE_COLUMNS,
    "understand": PICTURE_COLUMNS,
}
"""Task -> columns of a manifest that it reads. All others are carried through."""
