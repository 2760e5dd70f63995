"""Reads an output back and says whether it is what was planned: complete, incomplete or broken.

It trusts the plan and `run.json`, and believes nothing else that is written anywhere: every file is
read, every picture decoded. Knows nothing of Ray.
"""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import DATA_FOLDER, SUCCESS_FILE, shard_name, shard_number, shard_path
from wallaroo.workflows.outputs.lock import at_work
from wallaroo.workflows.outputs.run_file import read_run
from wallaroo.workflows.outputs.schema import MIME_TYPES, RESULT_NAMES, TEXT_TASKS, result_schema
from wallaroo.workflows.outputs.shards import map_shards
from wallaroo.workflows.outputs.success import read_success
from wallaroo.workflows.plans.plan import Plan, read_plan, read_shard

MAX_FAULTS = 20
"""So many faults are told one by one, the others only counted."""

PLANNED = ("row_id", "shard", "id", "version", "sample", "prompt", "seed")
"""Columns in which a row must be as it was planned, whatever became of it."""

CHECKED = (
    *PLANNED,
    "task",
    "status",
    "error_type",
    "error_message",
    "image",
    "mime_type",
    "width",
    "height",
    "sha256",
    "text",
    "source",
    "config_digest",
)


@dataclass(frozen=True)
class Verdict:
    """What was found.

    state: `complete`, `incomplete` (nothing is wrong, but rows are missing or the run did not end) or
    `broken` (something is there that should not be so). planned, rows, ok: numbers of rows. errors: kind
    -> error rows. missing_shards: how many files are not there yet. faults: how many things are wrong.
    """

    state: str
    planned: int
    rows: int
    ok: int
    errors: dict[str, int]
    missing_shards: int
    faults: int


@dataclass
class _Contents:
    """What one file holds, and what is wrong with it. row_ids: the least and the greatest."""

    path: str = ""
    row_ids: tuple[int, ...] = ()
    rows: int = 0
    ok: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def verify(output: str, say: Callable[[str], None] = print) -> Verdict:
    """Reads all of an output, local or on S3, says in sentences what it finds, and returns it.

    A few files are in memory at a time. Raises InputError if `output` is no output of ours, or its plan
    or the storage cannot be read.
    """
    run = read_run(output)
    plan = read_plan(output)
    check = _Check(output, run, result_schema(plan.carried, bool(run["config"].get("save_tokens"))))
    faults = 0

    def fault(sentence: str) -> None:
        nonlocal faults
        faults += 1
        if faults <= MAX_FAULTS:
            say(sentence)

    present = set()
    for file in storage.list_files(storage.join(output, DATA_FOLDER)):
        shard = shard_number(file.relative)
        if shard is not None and shard in plan.shards:
            present.add(shard)
        elif file.relative.endswith(".parquet"):
            fault(
                f"{file.path} is no file of this plan, but readers of the folder take its rows: "
                f"move it elsewhere."
            )
        else:
            say(f"{file.path} is no file of a run; it does no harm.")

    total = _Contents()
    last = -1
    for found in map_shards(check, sorted(present), threads=min(4, os.cpu_count() or 1)):
        total.rows += found.rows
        total.ok += found.ok
        total.errors += found.errors
        if found.row_ids and found.row_ids[0] <= last:
            fault(f"{found.path} has row_id {found.row_ids[0]}, which an earlier file has passed already.")
        last = max([last, *found.row_ids])
        for sentence in found.faults:
            fault(sentence)

    missing = [shard for shard in plan.shards if shard not in present]
    success = read_success(output)
    for sentence in _success_faults(output, plan, success, None if faults else total, missing):
        fault(sentence)
    finished = success is not None and success["parts"] == [part.name for part in plan.parts]
    if not missing and total.rows != plan.rows:
        fault(f"{output} has {total.rows:,} rows in all, but {plan.rows:,} were planned.")
    if faults > MAX_FAULTS:
        say(f"{faults - MAX_FAULTS:,} more faults are not told.")
    if faults:
        state = "broken"
    elif missing or not finished or not plan.complete:
        state = "incomplete"
    else:
        state = "complete"
    verdict = Verdict(
        state, plan.rows, total.rows, total.ok, dict(total.errors.most_common()), len(missing), faults
    )
    say(_sentence(output, verdict, plan))
    return verdict


def _sentence(output: str, verdict: Verdict, plan: Plan) -> str:
    """The verdict in words."""
    rows = f"{verdict.rows:,} of {verdict.planned:,} rows, {verdict.ok:,} ok"
    if verdict.errors:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in verdict.errors.items())
        rows += f", {sum(verdict.errors.values()):,} error rows ({kinds})"
    if verdict.state == "complete":
        return f"{output} is complete: {rows}; every row is as planned, every picture or text is as stated."
    if verdict.state == "broken":
        return (
            f"{output} is broken: {verdict.faults:,} {'fault' if verdict.faults == 1 else 'faults'}; {rows}. "
            f"Move the files at fault elsewhere and start the run again: it makes what is missing."
        )
    running = at_work(output)
    if not plan.complete:
        why = "its plan is not finished"
    elif verdict.missing_shards:
        why = f"{verdict.missing_shards:,} of {len(plan.shards):,} files are missing"
    else:
        why = f"all rows are there, but {SUCCESS_FILE} does not say so"
    remedy = "Verify again when it has ended." if running else "Start the run again: it goes on by itself."
    return f"{output} is incomplete: {why}; {rows}. {running or 'No run is at work on it.'} {remedy}"


def _success_faults(
    output: str, plan: Plan, success: Mapping[str, Any] | None, found: _Contents | None, missing: list[int]
) -> Iterator[str]:
    """What `_SUCCESS` claims and is not so; its counts only where all files could be counted (`found`)."""
    if success is None:
        return
    path = storage.join(output, SUCCESS_FILE)
    named = plan.parts[: len(success["parts"])]
    if [part.name for part in named] != success["parts"]:
        yield f"{path} names {', '.join(success['parts'][:3])}, but the plan has other parts."
        return
    rows = sum(part.rows for part in named)
    if success["rows"] != rows:
        yield f"{path} says {success['rows']:,} rows, but its parts have {rows:,}."
    stop = max((part.first_shard + part.shards for part in named), default=0)
    lost = [shard for shard in missing if shard < stop]
    if lost:
        first = shard_name(lost[0])
        yield f"{path} says that all is there, but {len(lost):,} files are not, the first is {first}."
    elif found is not None and len(named) == len(plan.parts):
        for name, said, is_so in (
            ("ok", success["ok"], found.ok),
            ("errors", success["errors"], dict(found.errors)),
        ):
            if said != is_so:
                yield f"{path} says that {name} is {_short(said)}, but it is {_short(is_so)}."


class _Check:
    """Reads the file of one shard and compares it with the plan."""

    def __init__(self, output: str, run: Mapping[str, Any], schema: pa.Schema):
        self.output = output
        self.run = run
        self.schema = schema

    def __call__(self, shard: int) -> _Contents:
        contents = _Contents(path=shard_path(self.output, shard))
        try:
            # The whole file, which is bounded: so no fault of it can be taken for one of the network.
            data = storage.read_bytes(contents.path)
        except FileNotFoundError:
            contents.faults.append(f"{contents.path} vanished while it was read.")
            return contents
        try:
            # Arrow's own threads stay out of it: one that lets go of Python's bytes as the process ends
            # aborts it, and files are read side by side anyway.
            with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as parquet:
                self._check(shard, parquet, contents)
        except (pa.ArrowException, OSError) as error:
            contents.faults.append(f"{contents.path} cannot be read: {_first_line(error)}.")
        return contents

    def _check(self, shard: int, parquet: pq.ParquetFile, contents: _Contents) -> None:
        path, fault = contents.path, contents.faults.append
        schema = parquet.schema_arrow
        if not schema.equals(self.schema, check_metadata=True):
            fault(f"{path} has another schema: {_difference(self.schema, schema)}.")
            return
        rows = contents.rows = parquet.metadata.num_rows
        planned = read_shard(self.output, shard)
        if rows != len(planned):
            fault(f"{path} has {rows:,} rows, but {len(planned):,} were planned.")
        ids = parquet.read(columns=["row_id"], use_threads=False).column("row_id").to_pylist()
        if ids:
            contents.row_ids = (min(ids), max(ids))
        wanted = planned.column("row_id").to_pylist()
        if ids != wanted:
            position = next((n for n, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), None)
            if position is not None:
                fault(f"{path} has row_id {ids[position]} where {wanted[position]} was planned.")
            return
        carried = [name for name in schema.names if name not in RESULT_NAMES]
        for name, column in zip(carried, parquet.read(columns=carried, use_threads=False), strict=True):
            # As text, in which even NaN equals itself.
            if repr(column.to_pylist()) != repr(planned.column(name).to_pylist()):
                fault(f"{path} has other values in the carried column {_short(name)} than were planned.")
        start = 0
        for group in range(parquet.num_row_groups):
            # Row group by row group, so that only the encoded file is held as a whole.
            for row, plan in zip(
                parquet.read_row_group(group, columns=list(CHECKED), use_threads=False).to_pylist(),
                planned.slice(start, parquet.metadata.row_group(group).num_rows).to_pylist(),
                strict=True,
            ):
                if row["status"] == "ok":
                    contents.ok += 1
                else:
                    contents.errors[row["error_type"]] += 1
                for words in self._row_faults(row, plan):
                    fault(f"{path}, row_id {row['row_id']}: {words}.")
            start += parquet.metadata.row_group(group).num_rows

    def _row_faults(self, row: Mapping[str, Any], plan: Mapping[str, Any]) -> Iterator[str]:
        for name in PLANNED:
            if row[name] != plan[name]:
                yield f"{name} is {_short(row[name])}, but {_short(plan[name])} was planned"
        if plan.get("source"):
            # The rest of a source is only known when it is loaded.
            origin, wanted = (row["source"] or {}).get("row_id"), plan["source"]["row_id"]
            if origin != wanted:
                yield f"source.row_id is {_short(origin)}, but {_short(wanted)} was planned"
        if row["task"] != self.run["config"].get("task", row["task"]):
            yield f"task is {_short(row['task'])}, which is not that of run.json"
        if row["config_digest"] != self.run["config_digest"]:
            yield "config_digest is not that of run.json"
        if row["status"] == "ok":
            if plan["status"] != "planned":
                yield "it is ok, but was planned as an error row"
            if row["error_type"] or row["error_message"]:
                yield "it is ok, but has an error"
            yield from _text_faults(row) if row["task"] in TEXT_TASKS else _picture_faults(row)
            if row["task"] != "generate" and not all((row["source"] or {}).get(name) for name in _SOURCE):
                yield f"its source lacks one of {', '.join(_SOURCE)}"
        elif row["status"] == "error":
            if not row["error_type"]:
                yield "it is an error row without a kind"
            if row["image"] is not None:
                yield "it is an error row, but has a picture"
        else:
            yield f"its status is {_short(row['status'])}"


_SOURCE = ("sha256", "width", "height")
"""What an ok row tells of the picture it started from; bytes without a name have no uri."""


def _text_faults(row: Mapping[str, Any]) -> Iterator[str]:
    if row["image"] is not None or row["mime_type"]:
        yield "its result is a text, but it has a picture"
    if hashlib.sha256((row["text"] or "").encode()).hexdigest() != row["sha256"]:
        yield "its text has another sha256"


def _picture_faults(row: Mapping[str, Any]) -> Iterator[str]:
    from PIL import Image

    data = (row["image"] or {}).get("bytes")
    if not data:
        yield "it is ok, but has no picture"
        return
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        yield "its picture has another sha256"
    try:
        with Image.open(io.BytesIO(data)) as image:
            size, mime_type = image.size, MIME_TYPES.get((image.format or "").lower(), "")
            if size == (row["width"], row["height"]):
                # A file of another size is at fault already, and might be a bomb.
                image.load()
    except Exception as error:  # a decoder may raise anything
        yield f"its picture does not decode ({_first_line(error)})"
        return
    if size != (row["width"], row["height"]):
        yield f"its picture is {size[0]}x{size[1]}, but {row['width']}x{row['height']} is stated"
    if mime_type != row["mime_type"]:
        stated = _short(row["mime_type"])
        yield f"its picture is {mime_type or 'of an unknown format'}, but {stated} is stated"


def _difference(wanted: pa.Schema, found: pa.Schema) -> str:
    """The first thing in which two schemas differ."""
    for name in wanted.names:
        if name not in found.names:
            return f"column {_short(name)} is missing"
    for name in found.names:
        if name not in wanted.names:
            return f"column {_short(name)} is not known"
    if wanted.names != found.names:
        return "its columns are in another order"
    for name in wanted.names:
        if not wanted.field(name).equals(found.field(name)):
            return f"column {_short(name)} is {found.field(name).type}, not {wanted.field(name).type}"
    return "its metadata differs"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
