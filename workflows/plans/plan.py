"""The plan of a run: its parts, rounds and totals, and how they are read back from an output."""

import base64
import dataclasses
import functools
import json
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wallaroo.model.config import Size
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.types import decode_schema, encode_schema
from wallaroo.workflows.outputs.layout import PLAN_FOLDER, part_json_name, part_name, part_number
from wallaroo.workflows.plans.columns import GIVEN

FORMAT = 1
"""Version of the layout of a part's JSON."""
MAX_SHARDS = 100_000_000
"""Most shards that a part may claim; more means a damaged file."""


@dataclass(frozen=True)
class PlanPart:
    """A valid part of a plan: up to 1,024 shards, whose rows and numbers follow those of the part before."""

    part: int
    """Number of the part, from 0."""
    file: str
    """Name of its Parquet file in `plan/`."""
    round: int
    """Number of the round it belongs to."""
    first_row_id: int
    """`row_id` of its first row."""
    rows: int
    """Number of its planned rows, refused ones included."""
    first_shard: int
    """Number of its first shard."""
    shards: int
    """Number of its shards."""
    shard_rows: int
    """Rows of every shard but the last one of the round."""
    error_rows: int
    """Number of its refused rows."""
    errors: dict[str, int]
    """Kind of error -> number of rows."""
    sizes: dict[str, int]
    """Size as `WIDTHxHEIGHT` in pixels -> rows to make. Rows whose size is not known yet are left out."""
    complete: bool
    """Whether it ends its round."""
    compacted: bool = False
    """Whether it replaces all parts before it; its shards may then begin at any number.

    See `workflows.datasets.compact`.
    """

    @property
    def name(self) -> str:
        """Its name without an ending, such as `part-00000`."""
        return part_name(self.part)

    @property
    def json_name(self) -> str:
        """Name of its JSON in `plan/`."""
        return part_json_name(self.part)

    @property
    def end(self) -> int:
        """Number of its last shard plus 1."""
        return self.first_shard + self.shards


@dataclass(frozen=True)
class Round:
    """What was decided for a round before its first part. The JSON of that part holds it.

    All rounds of a plan share `settings`, `model_digest` and `manifest`. Rounds of an incremental plan have a
    manifest of their own each.
    """

    rows: int
    """Planned rows of the round."""
    shard_rows: int
    """Rows of every shard but the last one."""
    selected: np.ndarray
    """bool [rows of the manifest]: the rows that the round plans."""
    settings: dict[str, Any]
    """`PlanSettings.meaning()` of the run."""
    model_digest: str
    """Digest of the checkpoint, hexadecimal."""
    manifest: list[list[Any]]
    """`Manifest.identity()`: the files of the manifest."""
    carried: pa.Schema
    """Schema of the carried columns."""
    warnings: list[str]
    """Sentences to show to the user."""
    known: str = ""
    """Name of the file of what an incremental round planned; otherwise empty.

    See `workflows.plans.increments`.
    """
    schema: str = ""
    """Schema of the manifest's rows in an incremental round, encoded; otherwise empty."""

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def to_values(self) -> dict[str, Any]:
        """Converts to values for JSON; `from_values` reverses it."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        bits = zlib.compress(np.packbits(self.selected).tobytes())
        return values | {
            "shards": self.shards,
            "selected": base64.b64encode(bits).decode(),
            "manifest_rows": len(self.selected),
            "carried": encode_schema(self.carried),
        }

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "Round":
        """Restores a round.

        Args:
            values: What `to_values` gave.

        Returns:
            The round.

        Raises:
            ValueError: `selected` does not have the rows of the manifest.
        """
        values = {key: value for key, value in values.items() if key != "shards"}
        rows = values.pop("manifest_rows")
        packed = zlib.decompressobj().decompress(base64.b64decode(values["selected"]), rows // 8 + 1)
        bits = np.frombuffer(packed, np.uint8)
        if len(bits) != -(-rows // 8):
            raise ValueError("it selects other rows than it has")
        selected = np.unpackbits(bits, count=rows).astype(bool)
        return cls(**values | {"selected": selected, "carried": decode_schema(values["carried"])})


@dataclass(frozen=True)
class Plan:
    """The valid parts of a plan, in order; none if nothing is planned yet."""

    parts: tuple[PlanPart, ...] = ()
    """Valid parts in order."""
    rounds: tuple[Round, ...] = field(default=(), repr=False)
    """Rounds of these parts in order."""

    @property
    def rows(self) -> int:
        """Number of planned rows, refused ones included."""
        return sum(part.rows for part in self.parts)

    @property
    def error_rows(self) -> int:
        """Number of refused rows."""
        return sum(part.error_rows for part in self.parts)

    @property
    def errors(self) -> dict[str, int]:
        """Kind of error -> number of refused rows."""
        return dict(sum((Counter(part.errors) for part in self.parts), Counter()))

    @property
    def sizes(self) -> dict[Size, int]:
        """Size -> number of pictures to make."""
        total = sum((Counter(part.sizes) for part in self.parts), Counter())
        return {Size(*reversed([int(side) for side in key.split("x")])): n for key, n in total.items()}

    @property
    def shards(self) -> range:
        """The numbers of all shards."""
        return range(self.parts[0].first_shard, self.parts[-1].end) if self.parts else range(0)

    @property
    def complete(self) -> bool:
        """Whether every row that was asked for is planned."""
        return bool(self.parts) and self.parts[-1].complete

    @property
    def incremental(self) -> bool:
        """Whether its rounds plan new rows of a growing manifest."""
        return bool(self.rounds and self.rounds[0].known)

    @property
    def carried(self) -> pa.Schema:
        """Schema of the carried columns; the same for all parts."""
        return self.rounds[0].carried if self.rounds else pa.schema([])

    @property
    def warnings(self) -> list[str]:
        """Sentences to show to the user; those of the last round."""
        return self.rounds[-1].warnings if self.rounds else []


def _check(part: PlanPart) -> None:
    """Raises ValueError for a part that no run has written. Its file must be inside `plan/`, and it must not
    have more shards than rows, since shards are counted one by one.
    """
    whole = (part.part, part.first_row_id, part.rows, part.first_shard, part.shards, part.shard_rows)
    if not all(type(number) is int and 0 <= number < 2**62 for number in whole):
        raise ValueError("a number of it is none")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", part.file) or part.shards > min(part.rows, MAX_SHARDS):
        raise ValueError("its file or its shards cannot be")
    for counts in (part.errors, part.sizes):
        if not all(type(number) is int for number in counts.values()):
            raise ValueError("a count of it is none")


def read_plan(output: str) -> Plan:
    """Reads the valid parts of the plan of an output.

    A part without its JSON is not valid, and is left out.

    Args:
        output: Folder of the run, local or on S3.

    Returns:
        The plan; without parts if there is none.

    Raises:
        InputError: A JSON cannot be read, or a part does not follow the one before.
    """
    names = [file.relative for file in storage.list_files(storage.join(output, PLAN_FOLDER))]
    numbers = sorted(number for name in names if (number := part_number(name)) is not None)
    parts: list[PlanPart] = []
    rounds: list[Round] = []
    for number in numbers:
        path = storage.join(output, PLAN_FOLDER, part_json_name(number))
        try:
            values = json.loads(storage.read_bytes(path))
            if not isinstance(values, dict):
                raise ValueError("it is no object")
            if values.pop("format") != FORMAT:
                raise InputError(f"{path} was written by another version: use the version that made it.")
            opening = values.pop("opening", None)
            part = PlanPart(**values)
            _check(part)
            rounds += [Round.from_values(opening)] if opening else []
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, zlib.error) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} cannot be read ({error}): restore it, or give a new output.") from None
        if part.compacted:
            parts, rounds = [], rounds[-1:]
        part = dataclasses.replace(part, round=len(rounds) - 1)
        rows, last = sum(one.rows for one in parts), parts[-1] if parts else None
        follows = (last.part + 1, last.end) if last else (0, 0)
        if part.first_row_id != rows or not (part.compacted or (part.part, part.first_shard) == follows):
            raise InputError(f"{path} does not follow the parts before it: restore those that are missing.")
        parts.append(part)
    _PARTS[output] = tuple(parts)
    return Plan(_PARTS[output], tuple(rounds))


class PlanRowGroup(NamedTuple):
    """Where the planned rows of a shard are."""

    file: str
    """Name of a Parquet file in `plan/`."""
    row_group: int
    """Number of the shard's row group in it."""


def read_shard(
    output: str, shard: int, place: PlanRowGroup | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Reads the planned rows of one shard with their carried columns: one row group.

    Args:
        output: Folder of the run, local or on S3.
        shard: Number of the shard.
        place: Where its part has it. Without it the JSON of all parts is read,
            unless this process has read the plan.
        columns: Columns to read; all if None. Those that the plan lacks are left out.

    Returns:
        The rows, in the order of `row_id`.

    Raises:
        InputError: No valid part has the shard, or the file of its part is absent or corrupt.
    """
    file, row_group = place or _place_of(output, shard)
    path = storage.join(output, PLAN_FOLDER, file)
    try:
        with storage.explained(path):
            filesystem, inner = storage.parquet_filesystem(path)
            with filesystem.open_input_file(inner) as opened:
                parquet = pq.ParquetFile(opened, metadata=_footer(path), pre_buffer=True)
                return parquet.read_row_group(row_group, columns=columns)
    except (pa.ArrowException, OSError) as error:
        words = "is missing" if isinstance(error, FileNotFoundError) else "is corrupt"
        raise InputError(f"{path} {words}, but a JSON file beside it names it: restore it.") from error


def read_given(output: str, shard: int) -> dict[int, str]:
    """Reads what the manifest gave for the refused rows of a shard.

    Args:
        output: Folder of the run, local or on S3.
        shard: Number of the shard.

    Returns:
        `row_id` -> JSON text of the column GIVEN; empty for plans of version 0.1.0.

    Raises:
        InputError: As `read_shard`.
    """
    planned = read_shard(output, shard, columns=["row_id", GIVEN])
    if GIVEN not in planned.column_names:
        return {}
    pairs = zip(*(planned.column(name).to_pylist() for name in ("row_id", GIVEN)), strict=True)
    return {row_id: given for row_id, given in pairs if given is not None}


@functools.lru_cache(maxsize=4)
def _footer(path: str) -> pq.FileMetaData:
    filesystem, inner = storage.parquet_filesystem(path)
    return pq.read_metadata(inner, filesystem=filesystem)


_PARTS: dict[str, tuple[PlanPart, ...]] = {}
"""Parts that this process read last, by output. A valid part never changes."""


def _place_of(output: str, shard: int) -> PlanRowGroup:
    for fresh in (False, True):
        if fresh:
            read_plan(output)
        for part in _PARTS.get(output, ()):
            if part.first_shard <= shard < part.end:
                return PlanRowGroup(part.file, shard - part.first_shard)
    raise InputError(f"{output} has no plan for shard {shard}: plan it first.")
