"""The end of a run: every row is counted, then `errors.jsonl`, `README.md` and `_SUCCESS` are written."""

import functools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import ERRORS_FILE, SUCCESS_FILE, list_done, shard_name, shard_path
from wallaroo.workflows.outputs.schema import FORMAT, RESULT_NAMES, json_columns
from wallaroo.workflows.outputs.shards import map_shards, open_shard
from wallaroo.workflows.outputs.success import RowTotals, ShardTotals
from wallaroo.workflows.outputs.values import json_again, json_line, jsonable
from wallaroo.workflows.plans.columns import GIVEN
from wallaroo.workflows.plans.plan import read_given
from wallaroo.workflows.reports.card import write_card
from wallaroo.workflows.sources.embedded import Cell

if TYPE_CHECKING:
    from wallaroo.workflows.plans.plan import Plan


def finish(output: str, plan: "Plan") -> RowTotals:
    """Checks that every planned shard is there with all its rows; writes errors, card and `_SUCCESS`.

    Reads footers and a few small columns, and columns other than pictures of the row groups that have
    error rows, a few shards at a time. Raises InputError, and writes none of the files, if a shard is
    missing or its rows do not add up.
    """
    done = list_done(output)
    missing = [shard for shard in plan.shards if shard not in done]
    if missing:
        raise InputError(
            f"{output} lacks {len(missing)} of its shards, the first is {shard_name(missing[0])}: "
            f"start the run again, it makes what is missing."
        )
    total = RowTotals()
    with tempfile.TemporaryFile() as lines:
        writer = _ErrorLines(lines)
        for part in plan.parts:
            before = total.rows
            shards = range(part.first_shard, part.first_shard + part.shards)
            read = functools.partial(_read_patiently, output, refused=part.error_rows > 0)
            for found in map_shards(read, shards):
                total._add(found)
                for row in found.errors:
                    writer.add(row, found.schema)
            if total.rows - before != part.rows:
                raise InputError(
                    f"the data of {part.name} in {output} has {total.rows - before} rows, but {part.rows} "
                    f"were planned: `wallaroo verify {output}` names the files at fault; move them "
                    f"elsewhere and start the run again."
                )
        writer.flush()
        lines.seek(0)
        with storage.write_stream(storage.join(output, ERRORS_FILE)) as stream:
            shutil.copyfileobj(lines, stream)
    write_card(output, plan, total)
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


def _read_patiently(output: str, shard: int, refused: bool) -> ShardTotals:
    return storage.patiently(output, lambda: _read(output, shard, refused))


def _read(output: str, shard: int, refused: bool) -> ShardTotals:
    """refused: whether the plan may have refused rows of the shard."""
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
            if refused and errors:
                given = read_given(output, shard)
                errors = [row | {GIVEN: given.get(row["row_id"])} for row in errors]
            small = parquet.read(columns=["status", "language", "width", "height", "source.uri"])
            ok = small.filter(pc.equal(small.column("status"), "ok"))
            sizes, folders = Counter[tuple[int, int]](), Counter[str]()
            pairs = zip(ok.column("width").to_pylist(), ok.column("height").to_pylist(), strict=True)
            sizes.update((width, height) for width, height in pairs if width and height)
            uris = pc.struct_field(ok.column("source"), "uri").to_pylist()
            folders.update(uri.rpartition("/")[0] + "/" for uri in uris if uri)
            languages = Counter(ok.column("language").to_pylist())
            return ShardTotals(parquet.metadata.num_rows, errors, schema, sizes, languages, folders)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{shard_path(output, shard)} cannot be read ({str(error).splitlines()[0]}): "
            f"move it elsewhere and start the run again."
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
        if first.get(GIVEN):
            # All samples of a refused row are refused alike.
            lines = [as_given(manifest_row(first, self.schema), first[GIVEN])]
        elif first["sample"] == 0:
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
            self.file.write(json_line(line))


def manifest_row(row: Mapping[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """An error row as a line of a manifest: id, kind, message, then the columns it came from.

    row: a row of `data/`; schema: of its file. `image` is where the source picture is, `FILE#ROW` for one
    within a Parquet file, which is a reference of a manifest like any other. Carried columns have the
    names they had in the manifest, unless such a name is taken here; JSON text becomes JSON again, bytes
    become base64.
    """
    line: dict[str, Any] = {"id": row["id"], "kind": row["error_type"], "message": row["error_message"]}
    # A size follows from the source wherever there is one.
    unwanted = () if row["task"] == "generate" else ("width", "height")
    line |= {name: row[name] for name in _PARAMETERS if row[name] is not None and name not in unwanted}
    source = row["source"] or {}
    if source.get("uri"):
        inside = source.get("row_id") is not None
        line["image"] = str(Cell(source["uri"], source["row_id"])) if inside else source["uri"]
    marked = json_columns(schema)
    for name in schema.names:
        if name in RESULT_NAMES or name == GIVEN or row[name] is None:
            continue
        value = json_again(row[name]) if name in marked else jsonable(row[name])
        plain = name.removeprefix("in_")
        own = plain if plain in RESULT_NAMES and plain not in line else name
        line.setdefault(own, value)
    return line


def as_given(line: dict[str, Any], given: str | None) -> dict[str, Any]:
    """A line of `manifest_row` with the values of the manifest, right or wrong, in place of resolved ones.

    given: what the plan holds as GIVEN for a row that it refused; None for all others, which do not change.
    """
    values = json.loads(given) if given else {}
    kept = {name: value for name, value in line.items() if name not in values}
    return kept | {name: value for name, value in values.items() if value is not None}
