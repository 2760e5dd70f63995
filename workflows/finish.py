"""The end of a run: checks that all of it is there, then writes `errors.jsonl` and `_SUCCESS`.

Knows nothing of how rows are made; it reads `data/` as anybody would.
"""

import base64
import dataclasses
import datetime
import decimal
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.errors import InputError
from workflows import storage
from workflows.results import (
    FORMAT,
    JSON_MARK,
    RESULT_NAMES,
    list_done,
    map_shards,
    open_shard,
    shard_name,
    shard_path,
)

if TYPE_CHECKING:
    from workflows.plan import Plan

ERRORS_FILE = "errors.jsonl"
SUCCESS_FILE = "_SUCCESS"


@dataclass
class Counts:
    """Rows that are in `data/`: all, ok, and errors by kind."""

    rows: int = 0
    ok: int = 0
    errors: dict[str, int] = dataclasses.field(default_factory=dict)


def finish(output: str, plan: "Plan") -> Counts:
    """Checks that every planned shard is there with all its rows, writes `errors.jsonl` and `_SUCCESS`.

    Reads footers, and columns other than pictures of the shards that have error rows, a few shards at a
    time. Raises InputError, and writes neither file, if a shard is missing or its rows do not add up.
    """
    done = list_done(output)
    missing = [shard for shard in plan.shards if shard not in done]
    if missing:
        raise InputError(
            f"{output} lacks {len(missing)} of its shards, the first is {shard_name(missing[0])}: "
            f"start the run again, it makes what is missing."
        )
    total = Counts()
    with tempfile.TemporaryFile() as lines:
        writer = _ErrorLines(lines)
        for part in plan.parts:
            before = total.rows
            shards = range(part.first_shard, part.first_shard + part.shards)
            for rows, errors, schema in map_shards(lambda shard: _errors_of(output, shard), shards):
                total.rows += rows
                total.ok += rows - len(errors)
                for row in errors:
                    total.errors[row["error_type"]] = total.errors.get(row["error_type"], 0) + 1
                    writer.add(row, schema)
            if total.rows - before != part.rows:
                raise InputError(
                    f"the data of {part.name} in {output} has {total.rows - before} rows, but {part.rows} "
                    f"were planned: `wallaroo verify {output}` names the files at fault; delete them and "
                    f"start the run again."
                )
        writer.flush()
        lines.seek(0)
        with storage.write_stream(storage.join(output, ERRORS_FILE)) as stream:
            shutil.copyfileobj(lines, stream)
    document = {
        "format": FORMAT,
        "rows": total.rows,
        "ok": total.ok,
        "errors": dict(sorted(total.errors.items())),
        "shards": len(plan.shards),
        "parts": [part.name for part in plan.parts],
    }
    storage.write_atomic(storage.join(output, SUCCESS_FILE), json.dumps(document, indent=2).encode() + b"\n")
    return total


def read_success(output: str) -> dict[str, Any] | None:
    """What `_SUCCESS` says: `rows`, `ok`, `errors` by kind, `shards`, `parts`; None if there is none."""
    path = storage.join(output, SUCCESS_FILE)
    try:
        document = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): delete it and start the run again.") from None
    keys = {"format", "rows", "ok", "errors", "shards", "parts"}
    if not isinstance(document, dict) or set(document) != keys or document["format"] != FORMAT:
        raise InputError(f"{path} was written by another version: use the version that made it.")
    return document


def _errors_of(output: str, shard: int) -> tuple[int, list[dict[str, Any]], pa.Schema]:
    """Rows of a shard, its error rows without pictures, and its schema."""
    try:
        with open_shard(output, shard) as parquet:
            schema = parquet.schema_arrow
            names = [name for name in schema.names if name not in ("image", "tokens", "text")]
            errors = []
            for group in range(parquet.num_row_groups):
                if _all_ok(parquet.metadata.row_group(group)):
                    continue
                table = parquet.read_row_group(group, columns=names)
                errors += table.filter(pc.equal(table.column("status"), "error")).to_pylist()
            return parquet.metadata.num_rows, errors, schema
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{shard_path(output, shard)} cannot be read ({str(error).splitlines()[0]}): "
            f"delete it and start the run again."
        ) from error


def _all_ok(group: pq.RowGroupMetaData) -> bool:
    """Whether the statistics of a row group prove that it has no error row."""
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema == "status":
            stats = column.statistics
            return bool(
                stats and stats.has_min_max and stats.min == stats.max == "ok" and not stats.null_count
            )
    return False


_PARAMETERS = ("prompt", "language", "width", "height", "seed", "cfg", "temperature", "top_k", "top_p")


class _ErrorLines:
    """Writes error rows as manifest rows: one line for all samples of an id where they failed alike."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.group: list[dict[str, Any]] = []
        self.schema: pa.Schema | None = None

    def add(self, row: dict[str, Any], schema: pa.Schema) -> None:
        last = self.group[-1] if self.group else None
        follows = last is not None and (row["id"], row["version"], row["row_id"], row["sample"]) == (
            last["id"],
            last["version"],
            last["row_id"] + 1,
            last["sample"] + 1,
        )
        alike = last is not None and (row["error_type"], row["error_message"]) == (
            last["error_type"],
            last["error_message"],
        )
        if not (follows and alike):
            self.flush()
        self.group.append(row)
        self.schema = schema

    def flush(self) -> None:
        if not self.group:
            return
        group, self.group = self.group, []
        assert self.schema is not None
        first = group[0]
        if first["sample"] == 0:
            lines = [manifest_row(first, self.schema) | {"samples": len(group)}]
            steps = [
                (row["seed"] - first["seed"]) % 2**63 if row["seed"] is not None else None for row in group
            ]
            if steps != list(range(len(group))):
                # The seeds came from id and sample number, and will again.
                lines[0].pop("seed", None)
        else:
            # Samples without the first of their id need names and seeds of their own.
            lines = [
                manifest_row(row, self.schema) | {"id": f"{row['id']}/{row['sample']}", "samples": 1}
                for row in group
            ]
        for line in lines:
            self.file.write(_json_line(line))


def _json_line(values: Mapping[str, Any]) -> bytes:
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        # Half a surrogate pair is no UTF-8, but JSON can spell it.
        return json.dumps(values, allow_nan=False).encode() + b"\n"


def manifest_row(row: Mapping[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """An error row as a line of a manifest: id, kind, message, then the columns it came from.

    row: a row of `data/`; schema: of its file. Carried columns have the names they had in the manifest,
    unless such a name is taken here; JSON text becomes JSON again, bytes become base64.
    """
    line: dict[str, Any] = {"id": row["id"], "kind": row["error_type"], "message": row["error_message"]}
    line |= {name: row[name] for name in _PARAMETERS if row[name] is not None}
    if (row["source"] or {}).get("uri"):
        line["image"] = row["source"]["uri"]
    marked = json.loads((schema.metadata or {}).get(JSON_MARK, b"[]"))
    for name in schema.names:
        if name in RESULT_NAMES or row[name] is None:
            continue
        value = _json_again(row[name]) if name in marked else _jsonable(row[name])
        plain = name.removeprefix("in_")
        own = plain if plain in RESULT_NAMES and plain not in line else name
        line.setdefault(own, value)
    return line


def _json_again(text: str) -> Any:
    try:
        return _jsonable(json.loads(text))
    except (ValueError, RecursionError):
        return text


def _jsonable(value: Any) -> Any:
    """A value that Arrow gave as one that JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return str(value)
    return str(value)
