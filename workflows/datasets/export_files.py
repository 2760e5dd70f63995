"""What every export format needs of an output: its rows, and safe names for them.

Rows are read in order, a row group at a time. Knows nothing of any format.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from wallaroo.model.errors import InputError
from wallaroo.workflows.datasets.progress import Phase, Report, silent
from wallaroo.workflows.outputs.layout import list_done
from wallaroo.workflows.outputs.lock import at_work
from wallaroo.workflows.outputs.run_file import read_run
from wallaroo.workflows.outputs.schema import (
    CARRIED_PREFIX,
    RESULT_NAMES,
    json_columns,
    own_name,
    result_schema,
)
from wallaroo.workflows.outputs.shards import open_finished
from wallaroo.workflows.outputs.values import json_again, jsonable
from wallaroo.workflows.plans.finished import finished
from wallaroo.workflows.plans.plan import read_plan, read_shard

if TYPE_CHECKING:
    import pyarrow.parquet as pq

MISSING = "missing"
"""Status of a planned row whose shard is not written yet."""


# Reading


class Row(NamedTuple):
    """A row of `data/`."""

    values: dict[str, Any]
    """Its columns, without the picture."""
    picture: bytes | None
    """The bytes of the picture file; None for a text, an error row, or if pictures are not read."""
    number: int
    """Number of its row in the manifest, from 0."""
    follows: bool
    """Whether the row before is another sample of the same manifest row."""
    followed: bool
    """Whether the row after is another sample of the same manifest row."""

    @property
    def ok(self) -> bool:
        """Whether the row has a result."""
        return self.values["status"] == "ok"


class Results:
    """The rows of an output.

    Attributes:
        ok: Ok rows read so far.
        errors: Error rows read so far.
        missing: Planned rows of unfinished shards read so far.
        embedded: Whether its pictures hold metadata.
        partial: Whether the output is not finished.
        finished_shards: Shards that were finished at the start; no other is read.
    """

    def __init__(self, output: str, partial: bool = False, on_progress: Report = silent):
        """Reads the plan, and lists the finished shards.

        Args:
            output: Its folder, local or on S3.
            partial: Whether an output may do that is not finished.
            on_progress: Called about twice a second while rows are read.

        Raises:
            InputError: The folder is no output, or is not finished; with `partial`, no shard is.
        """
        run = read_run(output)
        self._on_progress = on_progress
        self.output, self.ok, self.errors, self.missing = output, 0, 0, 0
        self.plan = read_plan(output)
        self.task = str(run["config"].get("task", "generate"))
        self.embedded = bool(run["config"].get("embed_metadata"))
        self._done = list_done(output).intersection(self.plan.shards)
        self.finished_shards = len(self._done)
        missing = len(self.plan.shards) - self.finished_shards
        self.partial = bool(missing) or finished(output, self.plan) is None
        if self.partial and not partial:
            what = "its last round did not end"
            if missing:
                what = f"{missing:,} of its {len(self.plan.shards):,} shards are missing"
            remedy = "wait for its run" if at_work(output) else "re-run its command to resume"
            raise InputError(
                f"{output} is not finished, {what}: {remedy}, or export what is finished with --partial."
            )
        if self.partial and not self._done:
            remedy = "try again when its run has finished the first"
            if not at_work(output):
                remedy = "no run is active; re-run its command to resume"
            raise InputError(f"{output} has no finished shard yet: {remedy}.")
        self.schema = result_schema(self.plan.carried, bool(run["config"].get("save_tokens")))
        self.carried = [field for field in self.schema if field.name not in RESULT_NAMES]
        self.marked = json_columns(self.schema)

    def rows(self, pictures: bool = True) -> Iterator[Row]:
        """Every row in order, error rows too; a row group at a time is in memory.

        A planned row that is not there yet comes without a picture, as a row that is not ok.
        """
        before: dict[str, Any] | None = None
        waiting: Row | None = None
        phase = Phase(self._on_progress, "exporting" if pictures else "reading", self.plan.rows)
        for values, picture, number in self._stored(pictures):
            phase.count(1)
            self.ok += values["status"] == "ok"
            self.missing += values["status"] == MISSING
            self.errors += values["status"] not in ("ok", MISSING)
            follows = before is not None and place(values) == (*place(before)[:2], before["sample"] + 1)
            if waiting is not None:
                yield waiting._replace(followed=follows)
            before, waiting = values, Row(values, picture, number, follows, False)
        if waiting is not None:
            yield waiting

    def forget(self) -> None:
        """Resets the counts, for a format that reads the rows twice."""
        self.ok = self.errors = self.missing = 0

    def _stored(self, pictures: bool) -> Iterator[tuple[dict[str, Any], bytes | None, int]]:
        position: dict[int, int] = {}
        for part in self.plan.parts:
            numbers = np.flatnonzero(self.plan.rounds[part.round].selected)
            for shard in range(part.first_shard, part.first_shard + part.shards):
                for values, picture in self._shard(shard, pictures):
                    # The rows of a manifest row begin with its sample 0, even if it is an error.
                    position[part.round] = position.get(part.round, -1) + (values["sample"] == 0)
                    if not 0 <= position[part.round] < len(numbers):
                        raise InputError(
                            f"{self.output} has more rows than its plan selects: restore its plan."
                        )
                    yield values, picture, int(numbers[position[part.round]])

    def _shard(self, shard: int, pictures: bool) -> Iterator[tuple[dict[str, Any], bytes | None]]:
        if shard not in self._done:
            yield from self._planned(shard)
            return
        with open_finished(self.output, shard) as parquet:
            for group in range(parquet.num_row_groups):
                yield from self._group(parquet, group, pictures)

    def _planned(self, shard: int) -> Iterator[tuple[dict[str, Any], bytes | None]]:
        """The planned rows of a shard that is not written yet.

        Names and numbers of the others follow from them, and are those of a complete export.
        """
        absent = {
            "task": self.task,
            "status": MISSING,
            "error_type": MISSING,
            "error_message": "it is not written yet",
        }
        plan = read_shard(self.output, shard)
        names = [name for name in plan.column_names if name in self.schema.names]
        for values in plan.select(names).to_pylist():
            yield dict.fromkeys(self.schema.names) | values | absent, None

    def _group(
        self, parquet: "pq.ParquetFile", group: int, pictures: bool
    ) -> Iterator[tuple[dict[str, Any], bytes | None]]:
        names = [name for name in self.schema.names if name not in ("image", "tokens")]
        table = parquet.read_row_group(group, columns=[*names, "image"] if pictures else names)
        images = table.column("image") if pictures else None
        for index, values in enumerate(table.select(names).to_pylist()):
            # One picture at a time becomes an object of Python's.
            yield values, (images[index].as_py() or {}).get("bytes") if images is not None else None

    def own_value(self, row: Row, name: str, default: Any = None) -> Any:
        """The value of a manifest column.

        Args:
            row: The row.
            name: Name of the column in the manifest.
            default: Returned if the column is absent or its value is null.

        Returns:
            The value, as Python's type.
        """
        found = [field.name for field in self.carried if own_name(field.name) == name]
        value = row.values[found[0]] if found else None
        return default if value is None else value

    def carried_values(
        self,
        row: Row,
        taken: Collection[str] = (),
        rename: Callable[[str], str] = str,
        text: bool = False,
    ) -> dict[str, Any]:
        """The carried columns of a row as JSON values. A name that is taken gets the prefix `in_`.

        Arrow gives every struct all fields of its type, so a null field of a struct counts as absent. In JSON
        text null stays, since the manifest had it.

        Args:
            row: The row.
            taken: Names that no carried column may have.
            rename: Gives the new name of a column.
            text: Keep JSON text as text, and turn nested values into text.

        Returns:
            New name -> value.
        """
        found: dict[str, Any] = {}
        for field in self.carried:
            value = _without_absent(row.values[field.name], field.type)
            marked = field.name in self.marked and value is not None
            value = json_again(value) if marked and not text else jsonable(value)
            if text and value is not None and _nested(field.type):
                value = json.dumps(value, ensure_ascii=False)
            name = rename(field.name)
            while name in taken or name in found or (name != field.name and name in self.plan.carried.names):
                name = CARRIED_PREFIX + name
            found[name] = value
        return found


def _without_absent(value: Any, kind: pa.DataType) -> Any:
    """A value of an Arrow type, without the null fields of its structs."""
    if value is None or not pa.types.is_nested(kind):
        return value
    if pa.types.is_struct(kind):
        return {
            field.name: _without_absent(value[field.name], field.type)
            for field in kind
            if value[field.name] is not None
        }
    if pa.types.is_map(kind):
        return [(key, _without_absent(item, kind.item_type)) for key, item in value]
    if hasattr(kind, "value_type"):
        return [_without_absent(item, kind.value_type) for item in value]
    return value


def place(values: Mapping[str, Any]) -> tuple[str, int, int]:
    """Id, version and sample number of a row, which no two rows share unless one is an error."""
    return values["id"], values["version"], values["sample"]


def _nested(kind: pa.DataType) -> bool:
    """Whether values are nested deeper than a list of plain values."""
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return pa.types.is_nested(kind)


# Names


MARK = "@"
"""Separates suffixes from ids in file names. No plain id contains it, so no two names are alike."""

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_PLAIN_WITH_DOTS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
"""Names that Windows reserves, with any suffix."""


def file_stem(row_id: str, dots: bool = True) -> str:
    """A file name without suffix for an id, safe on every file system and in every URL.

    A plain id is its own name: up to 64 ASCII letters, digits, `_`, `-` and, with `dots`, `.`, the first
    one a letter or digit. Any other id is cleaned, and gets a hash of the original. Two ids never give one
    name, unless the file system treats `A` and `a` alike.

    Args:
        row_id: The id.
        dots: Whether the name may have dots.

    Returns:
        The name.
    """
    plain = _PLAIN_WITH_DOTS if dots else _PLAIN
    if plain.fullmatch(row_id) and not _DEVICES.fullmatch(row_id):
        return row_id
    cleaned = re.sub(r"[^A-Za-z0-9_-]", "_", row_id)[:40].lstrip("_-") or "id"
    hashed = hashlib.sha256(row_id.encode("utf-8", "surrogatepass")).digest()[:10]
    return f"{cleaned}{MARK}{base64.b32encode(hashed).decode().lower()}"
