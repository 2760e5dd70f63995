"""Peak anonymous memory of `wallaroo export` on 10,000 pictures of 512 x 512 pixels.

    python -m tests.benchmarks.export_memory [FORMAT ...]

The bound is 500 MB of RssAnon, for the whole process. Pictures are noise in PNG, the largest there are:
the output takes 8 GB of disk, and each export about as much again until the next one is begun.
"""

import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wallaroo.actors.rows import Outcome
from wallaroo.workflows import storage
from wallaroo.workflows.datasets.export import FORMATS
from wallaroo.workflows.outputs import run_file, shards
from wallaroo.workflows.outputs import values as outputs_values
from wallaroo.workflows.outputs.layout import PLAN_FOLDER, part_name
from wallaroo.workflows.outputs.rows import Producer, RunConstants, build_result_table
from wallaroo.workflows.outputs.schema import result_schema
from wallaroo.workflows.plans.columns import plan_schema
from wallaroo.workflows.plans.increments import PAIR, write_planned
from wallaroo.workflows.plans.plan import PlanPart, Round, read_plan
from wallaroo.workflows.reports.finish import finish

ROWS, SAMPLES, SIDE = 10_000, 4, 512
SHARD_ROWS = 80
"""So many pictures of this size are 64 MiB of pixels, the most that a shard holds."""
BOUND = 500_000_000

_PROGRAM = """
import sys, threading, time

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
from wallaroo.workflows.datasets.export import export
summary = export(*sys.argv[1:])
print(max(peak, anonymous()), summary.exported, summary.files)
"""


def write_output(
    output: str,
    rows: int = ROWS,
    shard_rows: int = SHARD_ROWS,
    side: int = SIDE,
    increment_rows: int | None = None,
) -> None:
    """A finished output (local or S3) of noise; pictures are those of the first shard in another order.

    increment_rows: rows that each of many incremental runs has added; None for a single run.
    """
    fields = {"task": "generate", "save_tokens": False}
    run_file.put_run(output, fields)
    run = RunConstants("generate", "m" * 64, outputs_values.digest(fields))
    carried = pa.schema([("tag", pa.string())])
    noise = np.random.default_rng(0).integers(0, 256, (shard_rows, side, side, 3), np.uint8)
    started = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    outcomes = [
        Outcome(row=i, pixels=one, tokens=np.arange(4, dtype=np.int32), started_at=started, seconds=1.0)
        for i, one in enumerate(noise)
    ]
    schema = plan_schema(carried)
    first = build_result_table(
        _planned(0, range(shard_rows), side, schema), outcomes, run, Producer(), result_schema(carried)
    )
    shard = 0
    for number, begin in enumerate(range(0, rows, increment_rows or rows)):
        end = min(rows, begin + (increment_rows or rows))
        name, first_shard = f"{part_name(number)}-{number:016x}.parquet", shard
        with (
            storage.write_stream(storage.join(output, PLAN_FOLDER, name)) as stream,
            pq.ParquetWriter(stream, schema) as writer,
        ):
            for start in range(begin, end, shard_rows):
                plan = _planned(shard, range(start, min(end, start + shard_rows)), side, schema)
                writer.write_table(plan)
                table = first.take((np.arange(len(plan)) + shard) % shard_rows)
                for column in ("row_id", "shard", "id", "sample", "prompt", "seed"):
                    place = table.schema.get_field_index(column)
                    table = table.set_column(place, table.schema.field(place), plan.column(column))
                shards.write_shard(output, shard, table)
                shard += 1
        count, known = end - begin, ""
        if increment_rows is not None:
            pairs = np.zeros(count, PAIR)
            pairs["id_low"] = np.arange(begin, end)
            known = write_planned(output, pairs, np.zeros(count, np.int32))
        part = PlanPart(
            number, name, number, begin, count, first_shard, shard - first_shard, shard_rows, 0, {}, {}, True
        )
        opening = Round(
            count, shard_rows, np.ones(-(-count // SAMPLES), bool), {}, "m" * 64, [], carried, [], known
        )
        values = vars(part) | {"format": 1, "opening": opening.to_values()}
        path = storage.join(output, PLAN_FOLDER, f"{part_name(number)}.json")
        storage.write_atomic(path, json.dumps(values).encode())
    finish(output, read_plan(output))


def _planned(shard: int, numbers: range, side: int, schema: pa.Schema) -> pa.Table:
    rows = [
        {
            "row_id": number,
            "shard": shard,
            "id": f"p/{number // SAMPLES}",
            "version": 0,
            "sample": number % SAMPLES,
            "status": "planned",
            "error_type": "",
            "error_message": "",
            "prompt": f"prompt {number // SAMPLES}",
            "width": side,
            "height": side,
            "language": "en",
            "seed": number,
            "cfg": 3.0,
            "temperature": 1.0,
            "top_k": 1000,
            "top_p": 1.0,
            "tag": "color",
        }
        for number in numbers
    ]
    return pa.Table.from_pylist(rows, schema=schema)


def anonymous_memory(output: Path, dest: Path, form: str) -> tuple[int, int, int]:
    """Peak RssAnon in bytes of a process that exports, pictures exported, and files written."""
    command = [sys.executable, "-c", _PROGRAM, str(output), str(dest), form]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, exported, files = map(int, done.stdout.split())
    return peak, exported, files


def main() -> None:
    wanted = sys.argv[1:] or [
        # WISE's evaluator wants numbers as ids.
        name
        for name, form in FORMATS.items()
        if "generate" in form.tasks and name != "wise"
    ]
    worst = 0
    with tempfile.TemporaryDirectory() as made:
        output = Path(made, "out")
        write_output(str(output))
        for form in wanted:
            with tempfile.TemporaryDirectory() as dest:
                peak, exported, files = anonymous_memory(output, Path(dest), form)
            worst = max(worst, peak)
            verdict = "ok" if peak < BOUND else "TOO MUCH"
            print(
                f"{form}: {exported:,} images in {files:,} files, peak RssAnon {peak / 1e6:.0f} MB, "
                f"bound {BOUND / 1e6:.0f} MB: {verdict}",
                flush=True,
            )
    sys.exit(worst >= BOUND)


if __name__ == "__main__":
    main()
