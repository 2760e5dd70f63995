"""Checks the file of one shard against its planned rows: every value, every picture, its footer."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import RUN_FILE, shard_path
from wallaroo.workflows.outputs.schema import MIME_TYPES, RESULT_NAMES, TEXT_TASKS
from wallaroo.workflows.outputs.shards import TALLY_KEY, without_tally
from wallaroo.workflows.reports.tally import ShardTally, footer_tally, tally_of_file

PLANNED = ("row_id", "shard", "id", "version", "sample", "prompt", "seed")
"""Columns in which an ok or error row must equal its plan."""

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


@dataclass
class Contents:
    """What one file holds, and what is wrong with it."""

    shard: int = -1
    """Its number."""

    path: str = ""
    """Path of the file."""
    row_ids: tuple[int, ...] = ()
    """The least and the greatest row_id; empty if they were not read."""
    rows: int = 0
    """How many rows it has."""
    ok: int = 0
    """Rows with a result."""
    errors: Counter[str] = field(default_factory=Counter)
    """Kind -> error rows."""
    faults: list[str] = field(default_factory=list)
    """A sentence for each fault."""
    tally: ShardTally | None = None
    """What its columns say, which a summary must say too; None if they could not be read."""


class Check:
    """Reads the file of one shard and compares it with the plan.

    Args:
        output: The folder of the run, local or `s3://`.
        run: Contents of its `run.json`.
        schema: Of its shards.
    """

    def __init__(self, output: str, run: Mapping[str, Any], schema: pa.Schema):
        self.output = output
        self.run = run
        self.schema = schema

    def __call__(self, item: tuple[int, pa.Table]) -> Contents:
        """What is in a shard's file, which is read once.

        Args:
            item: Number of the shard, and its planned rows.
        """
        shard, planned = item
        contents = Contents(shard, shard_path(self.output, shard))
        try:
            # The whole file, which is bounded: so no fault of it can be taken for one of the network.
            data = storage.read_bytes(contents.path)
        except FileNotFoundError:
            contents.faults.append(f"{contents.path} vanished while it was read.")
            return contents
        try:
            # Without Arrow's threads: one that releases Python's bytes while the process ends would abort the
            # process. Files are read in parallel anyway.
            with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as parquet:
                self._check(planned, parquet, contents)
        except (pa.ArrowException, OSError) as error:
            contents.faults.append(f"{contents.path} cannot be read: {first_line(error)}.")
        return contents

    def _check(self, planned: pa.Table, parquet: pq.ParquetFile, contents: Contents) -> None:
        path, fault = contents.path, contents.faults.append
        schema = without_tally(parquet.schema_arrow)
        if not schema.equals(self.schema, check_metadata=True):
            fault(f"{path} has another schema: {_difference(self.schema, schema)}.")
            return
        rows = contents.rows = parquet.metadata.num_rows
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
                fault(f"{path} has other values in the carried column {short(name)} than were planned.")
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
        contents.tally = tally_of_file(parquet, contents.shard, trusted=False)
        has_tally = TALLY_KEY in (parquet.metadata.metadata or {})
        if has_tally and footer_tally(parquet) != ShardTally.from_values(
            json.loads(contents.tally.to_json())
        ):
            fault(f"the counts in the footer of {path} do not match its rows.")

    def _row_faults(self, row: Mapping[str, Any], plan: Mapping[str, Any]) -> Iterator[str]:
        for name in PLANNED:
            if row[name] != plan[name]:
                yield f"{name} is {short(row[name])}, but {short(plan[name])} was planned"
        if plan.get("source"):
            # The rest of a source is only known when it is loaded.
            origin, wanted = (row["source"] or {}).get("row_id"), plan["source"]["row_id"]
            if origin != wanted:
                yield f"source.row_id is {short(origin)}, but {short(wanted)} was planned"
        if row["task"] != self.run["config"].get("task", row["task"]):
            yield f"task is {short(row['task'])}, which is not that of {RUN_FILE}"
        if row["config_digest"] != self.run["config_digest"]:
            yield f"config_digest is not that of {RUN_FILE}"
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
                yield "it is an error row, but has an image"
        else:
            yield f"its status is {short(row['status'])}"


_SOURCE = ("sha256", "width", "height")
"""What an ok row tells of the picture it started from; bytes without a name have no uri."""


def _text_faults(row: Mapping[str, Any]) -> Iterator[str]:
    if row["image"] is not None or row["mime_type"]:
        yield "its result is a text, but it has an image"
    if hashlib.sha256((row["text"] or "").encode()).hexdigest() != row["sha256"]:
        yield "its text has another sha256"


def _picture_faults(row: Mapping[str, Any]) -> Iterator[str]:
    from PIL import Image

    data = (row["image"] or {}).get("bytes")
    if not data:
        yield "it is ok, but has no image"
        return
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        yield "its image has another sha256"
    try:
        with Image.open(io.BytesIO(data)) as image:
            size, mime_type = image.size, MIME_TYPES.get((image.format or "").lower(), "")
            if size == (row["width"], row["height"]):
                # A file of another size is at fault already, and might be a bomb.
                image.load()
    except Exception as error:  # a decoder may raise anything
        yield f"its image does not decode ({first_line(error)})"
        return
    if size != (row["width"], row["height"]):
        yield f"its image is {size[0]}x{size[1]}, but {row['width']}x{row['height']} is stated"
    if mime_type != row["mime_type"]:
        stated = short(row["mime_type"])
        yield f"its image is {mime_type or 'of an unknown format'}, but {stated} is stated"


def _difference(wanted: pa.Schema, found: pa.Schema) -> str:
    """The first thing in which two schemas differ."""
    for name in wanted.names:
        if name not in found.names:
            return f"column {short(name)} is missing"
    for name in found.names:
        if name not in wanted.names:
            return f"column {short(name)} is not known"
    if wanted.names != found.names:
        return "its columns are in another order"
    for name in wanted.names:
        if not wanted.field(name).equals(found.field(name)):
            return f"column {short(name)} is {found.field(name).type}, not {wanted.field(name).type}"
    return "its metadata differs"


def short(value: Any) -> str:
    """The `repr` of a value, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters; its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
