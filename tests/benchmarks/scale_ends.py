"""Outputs of many tiny shards, and what it costs to resume, finish, report and verify them; for `scale`.

Pictures are of one pixel and rows one a shard, so that what is counted is the cost of a shard and not of
its rows. Nothing here starts Ray.
"""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from wallaroo.actors.rows import Outcome
from wallaroo.workflows import storage
from wallaroo.workflows.outputs import layout, run_file
from wallaroo.workflows.outputs.rows import Producer, RunConstants, build_result_table
from wallaroo.workflows.outputs.schema import RESULT_FIELDS, result_schema
from wallaroo.workflows.outputs.shards import shard_bytes
from wallaroo.workflows.outputs.values import digest
from wallaroo.workflows.plans.layout import write_planned_shards
from wallaroo.workflows.plans.plan import PlanPart, Round, read_plan
from wallaroo.workflows.plans.rounds import PART_SHARDS
from wallaroo.workflows.reports.finish import finish
from wallaroo.workflows.reports.page import render_report
from wallaroo.workflows.reports.summaries import Summaries
from wallaroo.workflows.reports.tally import tally_of_table
from wallaroo.workflows.reports.verify import verify
from wallaroo.workflows.runs.resume import find_remaining

MISSING = 4
LINKS = 10_000
"""Names of one file; file systems allow few more."""
FIELDS = {"task": "generate", "seed": 0}
RUN = RunConstants("generate", "m" * 64, digest(FIELDS))
PLANNED = (
    *("row_id", "shard", "id", "version", "sample", "status", "error_type", "error_message", "prompt"),
    *("width", "height", "language", "seed", "cfg", "temperature", "top_k", "top_p"),
)


def planned(shard: int) -> pa.Table:
    """The one planned row of a shard."""
    values = (shard, shard, f"p{shard}", 0, 0, "planned", "", "", f"a red circle {shard}")
    row = dict(zip(PLANNED, (*values, 1, 1, "en", shard, 3.0, 1.0, 1000, 1.0), strict=True))
    schema = pa.schema([field for field in RESULT_FIELDS if field.name in PLANNED])
    return pa.Table.from_pylist([row], schema=schema)


def put_part(output: str, part: int, first: int, shards: int, total: int) -> None:
    """A part of the plan with its shards, as a run leaves them, but for the syncs."""
    file = f"{layout.part_name(part)}-made.parquet"
    write_planned_shards(
        storage.join(output, layout.PLAN_FOLDER, file), map(planned, range(first, first + shards))
    )
    values = PlanPart(
        part, file, 0, first, shards, first, shards, 1, 0, {}, {"1x1": shards}, first + shards == total
    )
    opening = Round(total, 1, np.ones(total, bool), {}, "m" * 64, [], pa.schema([]), [])
    document = dataclasses.asdict(values) | {"format": 1}
    document |= {} if part else {"opening": opening.to_values()}
    path = Path(output, layout.PLAN_FOLDER, f"{layout.part_name(part)}.json")
    path.write_text(json.dumps(document))


def made_shard(shard: int) -> tuple[pa.Buffer, bytes]:
    """The file of a shard, and its tally."""
    now = datetime(2026, 1, 2, tzinfo=UTC)
    outcome = Outcome(0, now, 0.5, pixels=np.zeros((1, 1, 3), np.uint8), tokens=np.zeros(1, np.int32))
    made = Producer("r", "e" * 64)
    table = build_result_table(planned(shard), [outcome], RUN, made, result_schema(pa.schema([])))
    tally = tally_of_table(table, shard).to_json()
    return shard_bytes(table, tally), tally


def made_output(folder: Path, shards: int, part_shards: int = PART_SHARDS, linked: bool = False) -> str:
    """A finished output of so many shards, made once a folder.

    linked: whether all shards are links to a few files, which is quicker. Summaries say of each what would
    be in it; so it can be resumed, finished and reported, where no file is opened, and not verified.
    """
    output = folder / f"made-{shards}-{part_shards}"
    if output.exists():
        return str(output)
    run_file.put_run(str(output), FIELDS)
    for name in (layout.PLAN_FOLDER, layout.DATA_FOLDER):
        (output / name).mkdir()
    for part, first in enumerate(range(0, shards, part_shards)):
        put_part(str(output), part, first, min(part_shards, shards - first), shards)
    plan = read_plan(str(output))
    summaries = Summaries(str(output), plan.parts)
    tally: dict[str, Any] = {}
    for shard in plan.shards:
        path = layout.shard_path(str(output), shard)
        if linked and shard % LINKS:
            os.link(layout.shard_path(str(output), shard // LINKS * LINKS), path)
        else:
            data, text = made_shard(shard)
            tally = json.loads(text)
            Path(path).write_bytes(memoryview(data))
        stratum = tally["tally"]["details"]["pictures"][0]
        stratum[-1] = [[shard, 0, shard, 1]]
        found = storage.info(path)
        assert found is not None
        summaries.add(shard, found.stamp, json.dumps(tally, separators=(",", ":")))
    summaries.save()
    finish(str(output), plan)
    return str(output)


def resume(output: str) -> None:
    """What a start does before the first new shard, but for lock, record and Ray."""
    run_file.read_run(output)
    find_remaining(output, read_plan(output))


ENDS: dict[str, Callable[[str], object]] = {
    "resume": resume,
    "finish": lambda output: finish(output, read_plan(output)),
    "report": render_report,
    "verify": lambda output: verify(output, lambda line: None),
    "verify --fast": lambda output: verify(output, lambda line: None, fast=True),
}


def measured(name: str, output: str) -> dict[str, float]:
    """CPU seconds of one of ENDS, peak memory, and which files it opened: of `data/`, and all others."""
    opened: list[str] = []
    data = storage.join(output, layout.DATA_FOLDER)

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(output):
            # Threads open files too; to append is one step.
            opened.append(arguments[0])

    sys.addaudithook(note)
    summaries: list[Summaries] = []
    plain = Summaries.__init__

    def made(self: Summaries, *rest: object, **options: object) -> None:
        plain(self, *rest, **options)  # type: ignore[arg-type]
        summaries.append(self)

    Summaries.__init__ = made  # type: ignore[method-assign]
    process = psutil.Process()
    before = process.cpu_times()
    ENDS[name](output)
    after = process.cpu_times()
    files = [path for path in opened if os.path.isfile(path)]
    # Arrow opens what no hook sees; of it the summaries keep count.
    unseen = sum(one.opened for one in summaries)
    return {
        "cpu": after.user + after.system - before.user - before.system,
        "data_opened": float(sum(path.startswith(data) for path in files) + unseen),
        "opened": float(len(files) + unseen),
        "rss_mib": process.memory_info().rss / 2**20,
    }


def remove_shards(output: str, count: int = MISSING) -> None:
    """Removes shards, far from each other, as if a run had been killed."""
    plan = read_plan(output)
    for index in range(count):
        Path(
            layout.shard_path(output, plan.shards[(2 * index + 1) * len(plan.shards) // (2 * count)])
        ).unlink()


def on_s3(folder: Path, bucket: str, shards: int, part_shards: int) -> str:
    """A made output, copied to S3."""
    source, output = made_output(folder, shards, part_shards), f"{bucket}/made"
    with ProcessPoolExecutor(2) as pool:
        names = [file.relative for file in storage.list_files(source)]
        list(pool.map(partial(_copy, source, output), names, chunksize=64))
    finish(output, read_plan(output))
    return output


def _copy(source: str, output: str, relative: str) -> None:
    storage.write_atomic(storage.join(output, relative), storage.read_bytes(storage.join(source, relative)))


def without_summaries(output: str) -> None:
    """Removes what spares opening files."""
    shutil.rmtree(Path(output, layout.SUMMARIES_FOLDER))
