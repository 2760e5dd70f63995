"""Peak memory of the process that plans: 100,000 prompts against 1,000,000, each in a process of its own.

    python -m tests.benchmarks.plan_memory [parquet|csv|jsonl ...]

The manifest has an `id` column, which costs most, since ids must be compared. The bound: the larger peak
is at most 1.2 x the smaller one, plus 8 bytes a row. Prints both peaks (resident, shared memory of Ray's
object store included), the bound, and the time; exits with 1 where the bound is broken.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FORMATS = ("parquet", "jsonl")
SMALL, LARGE = 100_000, 1_000_000

_PROGRAM = """
import sys, time

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

from wallaroo.model.checkpoint import TINY
from wallaroo.workflows.cluster import connected
from wallaroo.workflows.plans.settings import PlanSettings
from wallaroo.workflows.settings import RunConfig
from wallaroo.workflows.plans.planner import make_plan

manifest, output = sys.argv[1:]
with connected(cpus=2):
    start = time.monotonic()
    plan = make_plan(manifest, PlanSettings.of(RunConfig("", "")), str(TINY), output)
    print(plan.rows, peak(), time.monotonic() - start)
"""


def write_manifest(path: Path, rows: int) -> None:
    """So many prompts of some 60 characters, each with an id and a column to carry."""
    prompts = (
        (f"row-{n:08d}", f"a photo of {n} small things on a large wooden table", n % 7) for n in range(rows)
    )
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        ids, texts, tags = (pa.array(column) for column in zip(*prompts, strict=True))
        pq.write_table(pa.table({"id": ids, "prompt": texts, "tag": tags}), path, row_group_size=50_000)
        return
    with open(path, "w") as file:
        if path.suffix == ".csv":
            file.write("id,prompt,tag\n")
        for row_id, prompt, tag in prompts:
            if path.suffix == ".csv":
                file.write(f"{row_id},{prompt},{tag}\n")
            else:
                file.write(json.dumps({"id": row_id, "prompt": prompt, "tag": tag}) + "\n")


def measure(folder: Path, form: str, rows: int) -> int:
    """Peak of the planning process, in bytes."""
    manifest, output = folder / f"{rows}.{form}", folder / f"{rows}-{form}"
    # In a process of its own too, since a child's peak starts with its parent's size.
    code = f"from tests.benchmarks.plan_memory import *; write_manifest(Path({str(manifest)!r}), {rows})"
    subprocess.run([sys.executable, "-c", code], check=True)
    command = [sys.executable, "-c", _PROGRAM, str(manifest), str(output)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    planned, peak, seconds = done.stdout.split()
    assert int(planned) == rows
    print(
        f"{form:8s} {rows:>9,} prompts: peak {int(peak) / 2**20:6.1f} MiB, {float(seconds):5.1f} s",
        flush=True,
    )
    return int(peak)


def main() -> int:
    broken = False
    for form in sys.argv[1:] or FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            small, large = (measure(Path(folder), form, rows) for rows in (SMALL, LARGE))
        bound = 1.2 * small + 8 * LARGE
        holds = large <= bound
        verdict = "holds" if holds else "BROKEN"
        print(f"{form:8s} bound {bound / 2**20:.1f} MiB (1.2 x the smaller + 8 bytes a row): {verdict}")
        broken |= not holds
    return int(broken)


if __name__ == "__main__":
    start = time.monotonic()
    code = main()
    print(f"took {time.monotonic() - start:.0f} s")
    sys.exit(code)
