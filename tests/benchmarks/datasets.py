"""CPU time and memory of `wallaroo select`, `export` and `compact` as a data set grows.

    python -m tests.benchmarks.datasets [--only PART[,PART...]] [ROWS ...]

The data set has pictures of 64x64 pixels (noise in PNG, 12 KB each, 256 of them): 100,000 rows take 1.3
GB of disk twice. Each command runs in a process of its own. `hashes` compares pictures once more, as random
hashes of which nearly all stay: the most work there is. `compact` merges what incremental runs of 96 rows
each have left in shards of 8, and its requests to a real S3 server are counted for 1,920 rows.
"""

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests import conftest
from tests.benchmarks.export_memory import write_output
from tests.s3_proxy import proxy
from wallaroo.workflows import storage
from wallaroo.workflows.datasets.compact import compact
from wallaroo.workflows.datasets.decide import decide
from wallaroo.workflows.datasets.look import Found
from wallaroo.workflows.datasets.rules import Rules

ROWS = (10_000, 100_000)
SHARD_ROWS, SIDE = 256, 64
SMALL_SHARD_ROWS, INCREMENT_ROWS, ROWS_ON_S3 = 8, 96, 1_920
"""What `compact` merges."""

_PROGRAM = """
import resource, sys, time
from wallaroo.jobs.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(time.process_time(), peak)
"""


def cost(*command: str) -> tuple[float, float]:
    """CPU seconds and peak memory in MiB of a command."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *command], check=True, capture_output=True, text=True
    )
    cpu, peak = map(float, done.stdout.splitlines()[-1].split())
    return cpu, peak


def show_cost(rows: int, name: str, *command: str) -> None:
    """Runs a command and prints what it cost."""
    cpu, peak = cost(*command)
    print(
        f"{rows:>9,} rows, {name}: {cpu:.1f} CPU s, {1000 * cpu / rows:.2f} ms a row, peak {peak:.0f} MiB",
        flush=True,
    )


def commands(rows: int, folder: Path) -> None:
    """`select` and `export` of one data set."""
    output = str(folder / "out")
    write_output(output, rows, SHARD_ROWS, SIDE)
    show_cost(rows, "select", "select", output, str(folder / "some"), "--drop-near-duplicates", "4")
    show_cost(rows, "export", "export", "webdataset", output, str(folder / "shards"))


def hashes(rows: int, folder: Path) -> None:
    """The comparison of `select` alone, at several distances."""
    found = np.random.default_rng(0).integers(0, 2**63, rows, dtype=np.uint64) * 2
    nothing = np.zeros(rows, np.uint8), np.zeros(rows, np.uint64), np.zeros(rows)
    for bits in (4, 10, 16):
        started = time.process_time()
        why = decide(Found(np.array([0, rows]), *nothing, found), Rules(near_duplicates=bits)).why
        print(
            f"{rows:>9,} random hashes, {bits} bits: {time.process_time() - started:.1f} CPU s, "
            f"{int((why == 0).sum()):,} stay",
            flush=True,
        )


def merges(rows: int, folder: Path) -> None:
    """`compact` of many increments, twice: the second finds nothing to merge."""
    output = str(folder / "grown")
    write_output(output, rows, SMALL_SHARD_ROWS, SIDE, INCREMENT_ROWS)
    for name in ("compact", "compact again"):
        show_cost(rows, name, "compact", output)


def requests(folder: Path) -> None:
    """S3 requests of `compact` by kind."""
    server = conftest._start(str(Path(sys.executable).with_name("weed")), folder / "weed")
    if server is None:
        sys.exit("SeaweedFS does not start.")
    output = "s3://ready/grown"
    try:
        os.environ |= server.variables()
        write_output(output, ROWS_ON_S3, SMALL_SHARD_ROWS, SIDE, INCREMENT_ROWS)
        with proxy(server.endpoint, share=0) as counting:
            os.environ |= dataclasses.replace(server, endpoint=counting.endpoint).variables()
            storage.forget_clients()
            made = compact(output)
            kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(counting.take().items()))
        print(
            f"{ROWS_ON_S3:>9,} rows in {ROWS_ON_S3 // INCREMENT_ROWS} increments, compact on S3: "
            f"{made.before} shards become {made.after} with {kinds}",
            flush=True,
        )
    finally:
        os.kill(server.pid, signal.SIGKILL)
        os.waitpid(server.pid, 0)


PARTS: dict[str, Callable[[int, Path], None]] = {"commands": commands, "hashes": hashes, "compact": merges}


def main() -> None:
    """Runs the parts that were asked for, at each number of rows."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.datasets", description=__doc__)
    parser.add_argument("--only", help="parts to run, by commas: " + ", ".join(PARTS))
    parser.add_argument("rows", nargs="*", type=int, default=ROWS)
    asked = parser.parse_args()
    names = asked.only.split(",") if asked.only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]}: choose from {', '.join(PARTS)}")
    for rows in asked.rows:
        for name in names:
            with tempfile.TemporaryDirectory(prefix="datasets-") as folder:
                PARTS[name](rows, Path(folder))
    if "compact" in names:
        with tempfile.TemporaryDirectory(prefix="datasets-") as folder:
            requests(Path(folder))


if __name__ == "__main__":
    main()
