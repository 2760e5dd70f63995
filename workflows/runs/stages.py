"""The stages of the pipeline: functions of one Ray row, which is one shard."""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wallaroo.actors import metrics
from wallaroo.actors.calls import Encode
from wallaroo.actors.rows import PictureFile, from_ipc, outcomes, to_ipc
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.rows import (
    Producer,
    RunConstants,
    build_result_table,
    environment,
    picture_file,
)
from wallaroo.workflows.outputs.schema import TEXT_TASKS
from wallaroo.workflows.outputs.shards import open_finished, write_shard
from wallaroo.workflows.outputs.values import digest
from wallaroo.workflows.plans.plan import PlanRowGroup, read_shard
from wallaroo.workflows.reports.tally import tally_of_table
from wallaroo.workflows.runs.requests import load_requests
from wallaroo.workflows.sources.references import SourceOptions
from wallaroo.workflows.storage.checkpoints import read_checkpoint


@dataclass(frozen=True)
class StageContext:
    """What the stages need to know, wherever they run."""

    model: str
    """Folder of the checkpoint, local or on S3."""
    run: RunConstants
    """Constants of all result rows."""
    schema: pa.Schema
    """Schema of the result rows."""
    sources: SourceOptions
    """Where sources may come from, and their limits."""
    environments: frozenset[str] = frozenset()
    """The only environment digests that a strict run allows; empty for any."""


def load(
    row: dict[str, Any], context: StageContext, output: str, retried: frozenset[int] = frozenset()
) -> dict[str, Any]:
    """Adds `plan` and `requests` to a `shard`.

    Args:
        row: From `feed.shard_stream`.
        context: What the stages need to know.
        output: Folder of the run, local or on S3.
        retried: Finished shards, of which only the rows to retry are taken.

    Returns:
        A row of `prepare`.
    """
    storage.enable_retries()
    shard = row["shard"]

    def read() -> pa.Table:
        plan = read_shard(output, shard, PlanRowGroup(row["plan_file"], row["row_group"]))
        return plan.filter(rows_to_retry(output, shard, plan)) if shard in retried else plan

    plan = storage.with_retries(output, read)
    return prepare({"shard": shard, "plan": to_ipc(plan)}, context)


def rows_to_retry(output: str, shard: int, plan: pa.Table) -> pa.Array:
    """Finds the error rows of a finished shard that the plan did not refuse.

    Args:
        output: Folder of the run, local or on S3.
        shard: Number of the shard.
        plan: Its planned rows.

    Returns:
        bool [planned rows].
    """
    return pc.is_in(plan.column("row_id"), _retriable(output, shard, plan).column("row_id").combine_chunks())


def _retriable(output: str, shard: int, plan: pa.Table) -> pa.Table:
    """The error rows of a finished shard that the plan did not refuse, without most columns."""
    with open_finished(output, shard) as parquet:
        data = parquet.read(columns=["row_id", "status", "error_type"])
    planned = plan.filter(pc.not_equal(plan.column("status"), "error")).column("row_id")
    failed = pc.equal(data.column("status"), "error")
    return data.filter(pc.and_(failed, pc.is_in(data.column("row_id"), planned.combine_chunks())))


def prepare(row: dict[str, Any], context: StageContext) -> dict[str, Any]:
    """Adds `requests` to a `shard` with its `plan`.

    Args:
        row: `plan` is an IPC buffer of planned rows.
        context: What the stages need to know.

    Returns:
        The row with `plan` as it is after loading, `requests` for the replica, and `retries`. The latter
        counts retried requests to a storage; later stages add to it.
    """
    storage.enable_retries()
    started = time.perf_counter()
    plan, asked = load_requests(from_ipc(row["plan"]), context.model, context.run, context.sources)
    metrics.count("wallaroo_fetch_seconds_total", time.perf_counter() - started, task=context.run.task)
    return {
        **row,
        "plan": to_ipc(plan),
        "requests": to_ipc(asked),
        "retries": storage.take_retries(),
    }


def picture_encoder(row: Mapping[str, Any], run: RunConstants) -> Encode:
    """Makes the function by which a replica encodes the pictures of a shard.

    Args:
        row: The shard, from `prepare`.
        run: Says format, quality and size.

    Returns:
        Position of the row and its pixels (uint8 [H, W, 3]) -> file.
    """
    sources = from_ipc(row["plan"]).column("source").to_pylist() if run.restore_size else None

    def encode_picture(position: int, pixels: np.ndarray) -> PictureFile:
        started = time.perf_counter()
        file = PictureFile(*picture_file(pixels, run, None if sources is None else sources[position]))
        metrics.count("wallaroo_encode_seconds_total", time.perf_counter() - started, task=run.task)
        return file

    return encode_picture


def encode(row: dict[str, Any], context: StageContext) -> dict[str, Any]:
    """Turns the outcomes of a replica into the shard's rows of the data set.

    Args:
        row: From the replica.
        context: What the stages need to know.

    Returns:
        `shard`, `retries`, and `result` as an IPC buffer. `result` is empty if the replica left the shard to
        a later run.

    Raises:
        InputError: The run is strict, and the rows were made in another environment.
    """
    passed = {name: row[name] for name in ("shard", "retries")}
    if not row["outcomes"]:
        return passed | {"result": b""}
    storage.enable_retries()
    started = time.perf_counter()
    environment_digest = digest(environment(**json.loads(row["environment"])))
    if context.environments and environment_digest not in context.environments:
        raise InputError(
            f"--strict is given, but {row['replica']} may round differently from the rows in the output "
            f"({row['environment']}): use the same kind of machine, or leave --strict out."
        )
    made = Producer(row["replica"], environment_digest, row["attempts"])
    decode = read_checkpoint(context.model).tokenizer.decode if context.run.task in TEXT_TASKS else None
    table = build_result_table(
        from_ipc(row["plan"]), outcomes(from_ipc(row["outcomes"])), context.run, made, context.schema, decode
    )
    metrics.count("wallaroo_encode_seconds_total", time.perf_counter() - started, task=context.run.task)
    return passed | {"result": to_ipc(table), "retries": row["retries"] + storage.take_retries()}


def encode_and_write(
    row: dict[str, Any], context: StageContext, write: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Calls `write(encode(row, context))`. It is one task, since every task of a shard costs the driver time.

    Args:
        row: From the replica.
        context: What the stages need to know.
        write: `write` with its other arguments bound.

    Returns:
        A row of `write`.
    """
    return write(encode(row, context))


def write(
    row: dict[str, Any], output: str, retried: frozenset[int] = frozenset(), watch: Any = None
) -> dict[str, Any]:
    """Writes the file of a shard.

    Args:
        row: From `encode` or `refuse_and_write`.
        output: Folder of the run, local or on S3.
        retried: Finished shards. In them, rows of the same numbers are replaced.
        watch: Handle of the run's `actors.watch.Watch`, or None.

    Returns:
        `shard`; `retries`, how often requests to a storage were retried for it; `tally`, the Tally of
        `result` without details as JSON, for the driver; `stamp` of the file and `summary`, its ShardTally
        as JSON, for the summaries. The last three are empty if the shard was left to a later run.
    """
    if not row["result"]:
        return {"shard": row["shard"], "retries": row["retries"], "tally": "", "stamp": "", "summary": ""}
    storage.enable_retries()
    table, shard = from_ipc(row["result"]), row["shard"]
    started = time.perf_counter()
    whole = storage.with_retries(output, lambda: _merged(output, shard, table)) if shard in retried else table
    found = tally_of_table(whole, shard)
    summary = found.to_json()
    stamp = write_shard(output, shard, whole, summary)
    if watch is not None:
        watch.note_written.remote(shard)
    tally = (found if whole is table else tally_of_table(table, shard)).tally
    task = table.column("task")[0].as_py()
    metrics.count("wallaroo_write_seconds_total", time.perf_counter() - started, task=task)
    metrics.count("wallaroo_written_bytes_total", storage.stamp_size(stamp), task=task)
    metrics.count("wallaroo_rows_total", tally.rows, task=task)
    for kind, number in tally.errors.items():
        metrics.count("wallaroo_errors_total", number, task=task, kind=kind)
    return {
        "shard": shard,
        "retries": row["retries"] + storage.take_retries(),
        "tally": json.dumps(dataclasses.replace(tally, details=None).to_values()),
        "stamp": stamp,
        "summary": summary.decode(),
    }


def _merged(output: str, shard: int, rows: pa.Table) -> pa.Table:
    """A finished shard with some of its rows replaced by those of the same numbers."""
    with open_finished(output, shard) as parquet:
        finished = parquet.read()
    same = pc.is_in(finished.column("row_id"), rows.column("row_id").combine_chunks())
    others = finished.filter(pc.invert(same))
    return pa.concat_tables([others, rows.cast(finished.schema)]).sort_by("row_id")


def refuse_and_write(
    row: dict[str, Any], context: StageContext, write: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Makes and writes the error rows of a shard that the plan refuses whole, without the replicas.

    Args:
        row: From `load`.
        context: What the stages need to know.
        write: `write` with its other arguments bound.

    Returns:
        A row of `write`.
    """
    table = build_result_table(from_ipc(row["plan"]), [], context.run, Producer(), context.schema)
    return write({"shard": row["shard"], "retries": row["retries"], "result": to_ipc(table)})


def retriable_rows(output: str, shard: int) -> dict[str, int]:
    """Counts the rows of a finished shard to retry.

    Args:
        output: Folder of the run, local or on S3.
        shard: Number of the shard.

    Returns:
        Kind of error -> rows.
    """
    plan = read_shard(output, shard, columns=["row_id", "status"])
    return Counter(_retriable(output, shard, plan).column("error_type").to_pylist())
