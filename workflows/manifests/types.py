"""What is known of a manifest: its files, their pieces, and batches of their rows."""

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
"""Suffix -> format of the files that are a manifest wherever they lie."""
OTHER_FORMATS = {".json": "json", ".txt": "lines"}
"""The same for files that are one where they are named, or nothing else is there."""
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
"""Suffixes that may stand behind those of text."""
PIECE_ROWS = 65_536
PIECE_BYTES = 64 << 20
"""A piece ends when it has so many rows or bytes; of a Parquet file it has at least one row group."""
BATCH_ROWS = 4096
MAX_COLUMNS = 1000


@dataclass(frozen=True)
class ManifestFile:
    """One file of a manifest. relative: path below the manifest. size: bytes. etag: of its contents.

    format: one of FORMATS or OTHER_FORMATS, or `results` (a shard of a run's output), `pictures` (a folder
    or pattern of them, path being its own), `prompts` (a folder of texts) or `imgedit`. cells: whether
    pictures in its column of pictures are given as references to their rows. column: name of that column,
    if the run gives one. task: of the run, where rows are read by it. partition: columns whose values
    stand in the names of folders: name, value as text, and Arrow type.
    """

    path: str
    relative: str
    format: str
    size: int
    etag: str
    cells: bool = False
    column: str = ""
    task: str = ""
    partition: tuple[tuple[str, str | None, str], ...] = ()

    def __post_init__(self) -> None:
        # JSON has no tuples.
        object.__setattr__(self, "partition", tuple(map(tuple, self.partition)))

    def to_values(self) -> dict[str, Any]:
        """Plain JSON values. Fields that say nothing are left out, as those were that did not exist yet."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if value or key not in _LATER_FIELDS}


_LATER_FIELDS = ("column", "task", "partition")


@dataclass(frozen=True)
class Manifest:
    """The files of a manifest, sorted by relative path.

    passed_over: kind of the other files beside them -> how many, and the name of one. notes: what
    somebody should be told of how the files are read.
    """

    path: str
    files: tuple[ManifestFile, ...]
    passed_over: Mapping[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

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
        return json.dumps(dataclasses.asdict(self) | {"file": self.file.to_values()})

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


def check_width(file: ManifestFile, names: Sequence[str]) -> None:
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
"""Task -> columns of a manifest that mean something; all others are carried through."""
