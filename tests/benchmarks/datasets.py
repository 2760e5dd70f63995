"""CPU time and memory of `wallaroo select` and `wallaroo export` as a data set grows.

    python -m tests.benchmarks.datasets [ROWS ...]

The data set has pictures of 64x64 pixels (noise in PNG, 12 KB each, 256 of them): 100,000 rows take 1.3
GB of disk twice. Each command runs in a process of its own. Pictures are compared once more as random hashes,
of which nearly all stay: the most work there is.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.benchmarks.export_memory import write_output
from wallaroo.workflows.datasets.decide import decide
from wallaroo.workflows.datasets.look import Found
from wallaroo.workflows.datasets.rules import Rules

ROWS = (10_000, 100_000)
SHARD_ROWS, SIDE = 256, 64

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


def main() -> None:
    for rows in map(int, sys.argv[1:]) if sys.argv[1:] else ROWS:
        with tempfile.TemporaryDirectory(prefix="datasets-") as folder:
            output = str(Path(folder, "out"))
            write_output(output, rows, SHARD_ROWS, SIDE)
            for words in (
                ("select", output, "--drop-near-duplicates", "4"),
                ("export", "webdataset", output),
            ):
                with tempfile.TemporaryDirectory(prefix="datasets-") as dest:
                    place = 2 if words[0] == "select" else 3
                    cpu, peak = cost(*words[:place], dest, *words[place:])
                print(
                    f"{rows:>9,} rows, {words[0]}: {cpu:.1f} CPU s, {1000 * cpu / rows:.2f} ms a row, "
                    f"peak {peak:.0f} MiB",
                    flush=True,
                )
        hashes = np.random.default_rng(0).integers(0, 2**63, rows, dtype=np.uint64) * 2
        nothing = np.zeros(rows, np.uint8), np.zeros(rows, np.uint64), np.zeros(rows)
        for bits in (4, 10, 16):
            started = time.process_time()
            why = decide(Found(np.array([0, rows]), *nothing, hashes), Rules(near_duplicates=bits)).why
            print(
                f"{rows:>9,} random hashes, {bits} bits: {time.process_time() - started:.1f} CPU s, "
                f"{int((why == 0).sum()):,} stay",
                flush=True,
            )


if __name__ == "__main__":
    main()
