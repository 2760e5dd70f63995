"""What a run costs as it grows: CPU seconds, memory and counts at 1,000 shards and more.

    python -m tests.benchmarks.scale [--only PART[,PART...]] [--shards N[,N...]] [--json FILE]

Each part measures one thing, in processes of its own, with a replica that answers at once. CPU seconds are
those of the process and, where a line says so, of all processes under it (Ray's among them); wall time
stands beside them and decides nothing. `--json` writes all numbers as one object.

A new part is a function under `@part`: it gets a folder and the numbers of shards, prints its lines and
returns its numbers by name.
"""

import argparse
import contextlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from wallaroo.actors.rows import Outcome, from_ipc, outcomes_table, to_ipc

ROOT = Path(__file__).parents[2]
SHARDS = (1_000, 40_000)
Part = Callable[[Path, Sequence[int]], dict[str, float]]
PARTS: dict[str, Part] = {}
PROBES: dict[str, Callable[..., dict[str, float]]] = {}


def part(function: Part) -> Part:
    """Registers a part under the name of its function."""
    PARTS[function.__name__] = function
    return function


def probe(function: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """Registers what `in_process` can run."""
    PROBES[function.__name__] = function
    return function


class Instant:
    """A replica without a model: every row is a black picture, given back at once."""

    def __init__(self, watch: Any = None, **_: Any):
        self.name = f"instant:{os.getpid()}"
        self._watch = watch
        watch.note_up.remote(self.name)

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import asyncio

        table = from_ipc(row["requests"]).select(["row", "height", "width"])
        rows = table.to_pylist()
        numbers = [one["row"] for one in rows]
        while (start := await self._watch.note_start.remote(self.name, row["shard"], numbers)).wait:
            await asyncio.sleep(0.1)
        passed = {name: value for name, value in row.items() if name != "requests"}
        done = []
        if not start.stopping:
            now = datetime.now(UTC)
            for one in rows:
                pixels = np.zeros((one["height"], one["width"], 3), np.uint8)
                done.append(Outcome(one["row"], now, 0.0, pixels=pixels, finish_reason="length"))
            self._watch.note_done.remote(self.name, [(row["shard"], number, True) for number in numbers])
        return {
            **passed,
            "outcomes": to_ipc(outcomes_table(done)) if done else b"",
            "replica": self.name,
            "attempts": start.attempt,
            "environment": json.dumps({"device": "none", "threads": 1, "shapes": {}}),
        }


KINDS = {
    "raylet": ("raylet/raylet", "gcs_server"),
    "agents": ("dashboard", "runtime_env", "monitor"),
    "workers": ("ray::",),
}
"""Ray's processes by what their command lines hold; a worker is one of tasks, replicas or the watch."""


class Usage:
    """CPU seconds since it was made, of this process and of Ray's under it."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._wall = time.monotonic()
        self._before = self._seconds()

    def _seconds(self) -> dict[str, float]:
        """CPU seconds of this process (`cpu`) and of its living descendants by kind."""
        times = self._process.cpu_times()
        found = {"cpu": times.user + times.system, **dict.fromkeys(KINDS, 0.0)}
        for process in self._process.children(recursive=True):
            try:
                times, words = process.cpu_times(), " ".join(process.cmdline())
            except psutil.Error:
                continue
            kind = next((kind for kind, marks in KINDS.items() if any(one in words for one in marks)), "")
            found[kind or "workers"] += times.user + times.system
        return found

    def numbers(self) -> dict[str, float]:
        """What was used since.

        Returns:
            `cpu` of this process, those of KINDS, `all_cpu` and `wall` in seconds; `peak_mib` and `rss_mib`
            of this process's memory.
        """
        seconds = {name: value - self._before[name] for name, value in self._seconds().items()}
        return seconds | {
            "all_cpu": sum(seconds.values()),
            "wall": time.monotonic() - self._wall,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "rss_mib": self._process.memory_info().rss / 2**20,
        }


def in_process(name: str, *arguments: str) -> dict[str, float]:
    """The numbers of a probe that runs in a Python of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.scale", "--probe", name, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # Ray's workers take no modules from the working directory.
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        sys.exit(f"{name} {' '.join(arguments)} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


@probe
def plan(output: str, shards: str, rows: str) -> dict[str, float]:
    """Plans an output of so many shards of so many rows each."""
    from wallaroo.model.checkpoint import TINY
    from wallaroo.workflows.cluster import connected
    from wallaroo.workflows.plans.planner import make_plan
    from wallaroo.workflows.plans.settings import PlanSettings

    # A manifest so small would make few shards.
    PlanSettings.shard_rows = lambda *_: int(rows)
    usage = Usage()
    with connected(cpus=2):
        made = make_plan(f"{output}.jsonl", PlanSettings.of(run_config(output)), str(TINY), output)
    assert len(made.shards) == int(shards), f"{len(made.shards)} shards are planned"
    return usage.numbers()


def run_config(output: str) -> Any:
    """The configuration of all runs here; the manifest lies beside the output."""
    from wallaroo.workflows.settings import RunConfig

    return RunConfig(f"{output}.jsonl", output, device="cpu", replicas=(1, 1), slots=8)


def planned_output(folder: Path, shards: int, rows: int = 1) -> str:
    """An output with a plan of so many shards and nothing else; planned once a folder."""
    output = folder / f"{shards}x{rows}"
    for path in output.glob("*") if output.exists() else ():
        if path.is_dir() and path.name != "plan":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    if not output.exists():
        manifest = folder / f"{output.name}.jsonl"
        with open(manifest, "w") as file:
            for number in range(shards * rows):
                file.write(json.dumps({"prompt": f"a red circle {number}", "aspect_ratio": "1:1"}) + "\n")
        in_process("plan", str(output), str(shards), str(rows))
    return str(output)


class _Enough(BaseException):
    """What was to be measured is over."""


@probe
def run_until(output: str, first: str, last: str) -> dict[str, float]:
    """A run until so many rows are made: what it costs before row `first`, and from there to row `last`."""
    from tests.benchmarks import scale  # by whose name Ray sends the replica
    from wallaroo.workflows.runs.driver import run

    usage = Usage()
    numbers: dict[str, float] = {}

    def look(progress: Any) -> None:
        made = progress.done - progress.before
        if made >= int(first) and not numbers:
            numbers.update(usage.numbers(), rows=made)
        if made >= int(last):
            numbers.update({f"last_{name}": value for name, value in usage.numbers().items()}, last_rows=made)
            raise _Enough

    with contextlib.suppress(_Enough):
        run(run_config(output), look, scale.Instant)
    return numbers


@part
def start(folder: Path, shards: Sequence[int]) -> dict[str, float]:
    """From the call of `run` to the first row, on an output that is planned: the lesser of two runs."""
    found = {}
    for count in shards:
        runs = [in_process("run_until", planned_output(folder, count), "1", "1") for _ in range(2)]
        found[count] = one = min(runs, key=lambda run: run["cpu"])
        print(
            f"start {count:>7,} shards: driver {one['cpu']:5.1f} CPU s, with Ray {one['all_cpu']:5.1f}, "
            f"peak {one['peak_mib']:6.1f} MiB ({one['wall']:.0f} s)",
            flush=True,
        )
    small, large = found[min(shards)], found[max(shards)]
    return {
        "start_cpu_ratio": large["cpu"] / small["cpu"],
        "start_all_cpu_ratio": large["all_cpu"] / small["all_cpu"],
        "start_memory_ratio": large["peak_mib"] / small["peak_mib"],
    }


@part
def shard(folder: Path, shards: Sequence[int]) -> dict[str, float]:
    """What a shard of one row costs, from the 20th to the 320th."""
    found = {}
    for count in shards:
        one = in_process("run_until", planned_output(folder, count), "20", "320")
        rows = one["last_rows"] - one["rows"]
        cost = {name: 1000 * (one[f"last_{name}"] - one[name]) / rows for name in ("cpu", *KINDS, "wall")}
        found |= {f"shard_{name}_ms_of_{count}": value for name, value in cost.items() if name != "wall"}
        words = ", ".join(f"{name} {value:.1f}" for name, value in cost.items())
        print(f"shard of {count:>7,}, CPU ms: {words.replace('cpu', 'driver')} (of time)", flush=True)
    return found


@probe
def end(name: str, output: str) -> dict[str, float]:
    """One of `scale_ends.ENDS` on an output."""
    from tests.benchmarks.scale_ends import measured

    return measured(name, output)


def measure_end(name: str, output: str, count: int, note: str = "") -> dict[str, float]:
    """Prints and returns what an end costs a shard."""
    one = in_process("end", name, output)
    print(
        f"{name:<13} {count:>7,} shards{note}: {one['cpu']:.2f} CPU s, {1000 * one['cpu'] / count:.3f} ms a "
        f"shard; {one['opened']:.0f} files opened, {one['data_opened']:.0f} of them shards; "
        f"{one['rss_mib']:.0f} MiB",
        flush=True,
    )
    return one


@part
def resume(folder: Path, shards: Sequence[int]) -> dict[str, float]:
    """Resume, finish and report, with and without summaries, and a resume with four shards missing."""
    from tests.benchmarks.scale_ends import MISSING, made_output, remove_shards, without_summaries

    found = {}
    for count in shards:
        output = made_output(folder, count, linked=True)
        for name in ("resume", "finish", "report"):
            one = measure_end(name, output, count)
            found[f"{name}_cpu_ms_of_{count}"] = 1000 * one["cpu"] / count
        remove_shards(output)
        one = measure_end("resume", output, count, f", {MISSING} missing")
        found[f"resume_files_opened_of_{count}"] = found["resume_files_opened"] = one["opened"]
    count = min(shards)
    output = made_output(folder / "whole", count)
    for name in ("resume", "finish", "report"):
        without_summaries(output)
        one = measure_end(name, output, count, " without summaries")
        found[f"{name}_cpu_ms_without_summaries"] = 1000 * one["cpu"] / count
    return found


@part
def verify(folder: Path, shards: Sequence[int]) -> dict[str, float]:
    """All files of an output read back; those of the largest number of shards up to 10,000."""
    from tests.benchmarks.scale_ends import made_output

    count = max((one for one in shards if one <= 10_000), default=min(shards))
    output = made_output(folder / "whole", count)
    one = measure_end("verify", output, count)
    fast = measure_end("verify --fast", output, count)
    return {
        "verify_opens_per_shard": one["data_opened"] / count,
        "verify_cpu_ms": 1000 * one["cpu"] / count,
        "verify_fast_cpu_ms": 1000 * fast["cpu"] / count,
    }


@part
def requests(folder: Path, shards: Sequence[int]) -> dict[str, float]:
    """S3 requests by kind, of an output with the plan parts of 40,000 shards but 25 shards in each."""
    import dataclasses

    from tests import conftest
    from tests.benchmarks.scale_ends import ENDS, MISSING, on_s3
    from tests.s3_proxy import proxy
    from wallaroo.workflows import storage
    from wallaroo.workflows.outputs import layout
    from wallaroo.workflows.plans.plan import read_plan
    from wallaroo.workflows.reports.finish import finish

    server = conftest._start(str(Path(sys.executable).with_name("weed")), folder / "weed")
    if server is None:
        sys.exit("SeaweedFS does not start.")
    found: dict[str, float] = {}
    try:
        os.environ |= server.variables()
        output = on_s3(folder, "s3://ready", 1_000, 25)
        paths = [layout.shard_path(output, shard) for shard in range(5, 1_000, 1_000 // MISSING)]
        kept = {path: storage.read_bytes(path) for path in paths}
        for path in kept:
            storage.delete(path)
        with proxy(server.endpoint, share=0) as counting:
            os.environ |= dataclasses.replace(server, endpoint=counting.endpoint).variables()
            plan = read_plan(output)
            # A run has read its plan when it finishes.
            for name, run in (ENDS | {"finish": lambda output: finish(output, plan)}).items():
                storage.forget_clients()
                counting.take()
                run(output)
                kinds = counting.take()
                total = sum(number for kind, number in kinds.items() if kind != "LIST")
                words = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
                print(f"{name:<13} of 1,000 shards in 40 parts on S3: {words}", flush=True)
                found[f"{name.replace(' --', '_')}_s3_requests"] = total
                for path, data in kept.items():
                    storage.write_atomic(path, data)
    finally:
        os.kill(server.pid, signal.SIGKILL)
        os.waitpid(server.pid, 0)
    return found


@probe
def watch_load() -> dict[str, float]:
    """The watch of a run under many replicas that compute nothing."""
    from tests.benchmarks.watch import measure

    return measure()


@part
def watch(folder: Path, shards: Sequence[int]) -> dict[str, float]:
    """Rows a second of one watch, and how long engines are held up between two steps."""
    found = in_process("watch_load")
    print(
        f"watch of {found['watch_replicas']:.0f} replicas: {found['watch_rows_per_second']:.0f} of "
        f"{found['watch_rows_offered']:.0f} rows/s, an engine waits {found['watch_wait_median_ms']:.2f} ms "
        f"(median), {found['watch_wait_p99_ms']:.2f} ms (p99)",
        flush=True,
    )
    return found


ROWS, RATE = 10**8, 832
"""Rows of a large data set, and rows/s of 64 GPUs at 13 each."""
SHARD_ROWS = 256


def print_needs(numbers: dict[str, float], shards: int) -> None:
    """Prints what ROWS rows at RATE rows/s would need, computed from the numbers of the parts that ran.

    Args:
        numbers: Of the parts.
        shards: The largest number of shards that was measured, whose CPU time a shard is taken.
    """
    from wallaroo.workflows.plans.rounds import PART_SHARDS

    count, per_second = math.ceil(ROWS / SHARD_ROWS), RATE / SHARD_ROWS
    parts = math.ceil(count / PART_SHARDS)
    needs = []
    if f"shard_cpu_ms_of_{shards}" in numbers:
        cost = numbers[f"shard_cpu_ms_of_{shards}"]
        needs.append(("driver while it runs", f"{cost * per_second / 1000:.2f} cores"))
    for name in ("resume", "finish", "report"):
        if f"{name}_cpu_ms_of_{shards}" in numbers:
            needs.append((name, f"{numbers[f'{name}_cpu_ms_of_{shards}'] * count / 1000:,.0f} CPU s"))
    if "resume_s3_requests" in numbers:
        # The requests of the benchmark's parts but for the shards that were missing, a part at a time.
        needs.append(("resume, S3 requests", f"{numbers['resume_s3_requests'] / 40 * parts:,.0f}"))
        needs.append(
            ("verify --fast, S3 requests", f"{numbers['verify_fast_s3_requests'] / 40 * parts:,.0f}")
        )
        needs.append(("verify, S3 requests", f"{numbers['verify_s3_requests'] / 1_000 * count:,.0f}"))
    if "watch_cpu_us_per_row" in numbers:
        needs.append(("watch while it runs", f"{numbers['watch_cpu_us_per_row'] * RATE / 1e6:.2f} cores"))
    if needs:
        print(f"\n{ROWS:,} rows in {count:,} shards at {RATE} rows/s, computed from the above, not measured:")
    for name, need in needs:
        print(f"{name:<27} {need}")


def main() -> None:
    """Runs the parts that were asked for, and prints or writes their numbers."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scale", description=__doc__)
    parser.add_argument("--only", help="parts to run, by commas: " + ", ".join(PARTS))
    parser.add_argument("--shards", help="numbers of shards, by commas", default=",".join(map(str, SHARDS)))
    parser.add_argument(
        "--json", nargs="?", const="-", help="print the numbers as JSON, or write them to a file"
    )
    parser.add_argument("--probe", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.probe:
        name, *arguments = asked.probe
        print(json.dumps(PROBES[name](*arguments)), flush=True)
        return
    names = asked.only.split(",") if asked.only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]}: choose from {', '.join(PARTS)}")
    numbers: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        for name in names:
            numbers |= PARTS[name](Path(folder), [int(one) for one in asked.shards.split(",")])
    for name, number in numbers.items():
        print(f"{name} {number:.3f}")
    print_needs(numbers, max(int(one) for one in asked.shards.split(",")))
    if asked.json == "-":
        print(json.dumps(numbers))
    elif asked.json:
        Path(asked.json).write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
