"""Rows a second of `wallaroo generate` beside those of its engine alone, and where the rest goes.

    python -m tests.benchmarks.efficiency [--rows N] [--slots N] [--threads N] [--rounds N] [--json]

In each round the same rows are made twice: by the command with one replica, and by the engine in one
process without Ray, with the same threads and options. Both are measured from their first finished row to
their last one. The ratio wants two quiet cores: one for the engine, one for all the rest.

CPU seconds are sampled by process, five times a second. Outside of the replica they are those of the driver,
of Ray's own processes and of the workers that load, encode and write.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
ROWS, SLOTS, THREADS = 2_000, 16, 1
BOUND = 0.93
SAMPLE_SECONDS = 0.2
LABELS = ("raylet", "gcs_server", "dashboard", "runtime_env", "log_monitor", "monitor.py")
"""Ray's own processes, by a part of their command line."""


class Samples:
    """CPU seconds of the processes under one, as they grow. seen: label -> time (s since the epoch)."""

    def __init__(self, process: psutil.Process):
        self._root = process
        self._labels: dict[int, str] = {}
        self._taken: list[tuple[float, dict[int, float]]] = []
        self.seen: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def between(self, start: float, end: float) -> dict[str, float]:
        """CPU seconds by label from one time to another."""
        used: dict[str, float] = defaultdict(float)
        for pid, label in self._labels.items():
            known = [(when, found[pid]) for when, found in self._taken if pid in found]
            # A process that was not seen before `start` began with nothing.
            before = max((cpu for when, cpu in known if when <= start), default=0.0)
            used[label] += max((cpu for when, cpu in known if when <= end), default=before) - before
        return dict(used)

    def _run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            found = {}
            try:
                processes = [self._root, *self._root.children(recursive=True)]
            except psutil.Error:
                return
            for one in processes:
                try:
                    times = one.cpu_times()
                    label = "driver" if one == self._root else _label(" ".join(one.cmdline()))
                except psutil.Error:
                    continue
                found[one.pid] = times.user + times.system
                # A worker is named after what it does now; the replica and the watch never change.
                self._labels[one.pid] = label if label != "worker" else self._labels.get(one.pid, label)
                self.seen.setdefault(label, time.time())
            self._taken.append((time.time(), found))


def _label(command: str) -> str:
    if command.startswith("ray::"):
        return "replica" if "Replica" in command else "watch" if "Watch" in command else "worker"
    # The command line of a worker that has no task yet names the raylet too.
    return (
        "worker" if "default_worker" in command else next((one for one in LABELS if one in command), "worker")
    )


def generate(folder: Path, manifest: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Runs the command. rate: rows/s between first and last row; outside_ms: CPU of a row by process; line:
    seconds since the start at which each phase was over."""
    started = time.time()
    command = [sys.executable, "-m", "wallaroo", "generate", str(manifest), str(folder)]
    command += ["--model", given.model, "--device", "cpu", "--replicas", "1"]
    command += ["--threads", str(given.threads), "--slots", str(given.slots)]
    with open(f"{folder}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=_environment())
        samples = Samples(psutil.Process(process.pid))
        status = process.wait()
    ended = time.time()
    samples.end()
    if status:
        sys.exit(f"wallaroo generate ended with {status}: {Path(f'{folder}.log').read_text()}")
    finished = []
    for path in (folder / "data").glob("*.parquet"):
        for row in pq.read_table(path, columns=["started_at", "seconds"]).to_pylist():
            finished.append(row["started_at"].timestamp() + row["seconds"])
    finished.sort()
    first, last = finished[0], finished[-1]
    used = samples.between(first, last)
    replica = used.pop("replica")
    plan = min(path.stat().st_mtime for path in (folder / "plan").glob("part-*.json"))
    record = json.loads(next((folder / "runs").glob("0001*.json")).read_text())
    return {
        "rate": (len(finished) - 1) / (last - first),
        "seconds": last - first,
        "replica_ms": 1000 * replica / len(finished),
        "outside_ms": {name: 1000 * one / len(finished) for name, one in sorted(used.items())},
        "line": {
            "import": samples.seen["gcs_server"] - started,
            "Ray and plan": plan - started,
            "first row": first - started,
            "last row": last - started,
            "end": ended - started,
        },
        "waits": record.get("waits", {}),
    }


def engine(output: str, given: argparse.Namespace) -> dict[str, float]:
    """Makes the rows of an output once more, by an engine in this process."""
    import torch

    from wallaroo.actors.rows import requests
    from wallaroo.model.checkpoint import load
    from wallaroo.model.engine.engine import Engine
    from wallaroo.model.engine.options import EngineOptions, even_threads
    from wallaroo.workflows.plans.plan import read_plan, read_shard
    from wallaroo.workflows.runs.pool import make_pool
    from wallaroo.workflows.runs.requests import load_requests
    from wallaroo.workflows.runs.setup import resolve
    from wallaroo.workflows.settings import RunConfig

    config = RunConfig(
        f"{output}.jsonl", output, model=given.model, device="cpu", replicas=(1, 1),
        threads=given.threads, slots=given.slots,
    )  # fmt: skip
    resolved, plan = resolve(config), read_plan(output)
    context = resolved.context(plan.carried)
    asked = []
    for shard in plan.shards:
        _, table = load_requests(read_shard(output, shard), context.model, context.run, context.sources)
        asked += requests(table, [(shard, row) for row in table.column("row").to_pylist()])
    torch.set_num_threads(given.threads)
    model = load(resolved.config.model, "generate", "cpu", torch.float32)
    options = EngineOptions(**make_pool(config, "cpu", plan.rows, len(plan.shards)).options)
    torch.set_num_threads(even_threads(model.config.decoder, options, given.threads))
    finished = []
    cpu = 0.0
    for _ in Engine(model, "generate", options).run(asked):
        cpu = cpu or time.process_time()
        finished.append(time.perf_counter())
    seconds = finished[-1] - finished[0]
    rows = len(finished) - 1
    return {
        "rate": rows / seconds,
        "seconds": seconds,
        "cpu_ms": 1000 * (time.process_time() - cpu) / rows,
    }


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Runs all rounds and returns their numbers; rates and milliseconds are medians of the rounds."""
    runs, alone = [], []
    with tempfile.TemporaryDirectory(prefix="efficiency-") as name:
        manifest = Path(name, "rows.jsonl")
        with open(manifest, "w") as file:
            for number in range(given.rows):
                file.write(json.dumps({"prompt": f"a red circle {number}", "aspect_ratio": "1:1"}) + "\n")
        for number in range(given.rounds):
            output = Path(name, f"out{number}")
            runs.append(generate(output, manifest, given))
            arguments = [sys.executable, "-m", "tests.benchmarks.efficiency", "--engine", str(output)]
            arguments += [
                "--threads",
                str(given.threads),
                "--slots",
                str(given.slots),
                "--model",
                given.model,
            ]
            done = subprocess.run(
                arguments, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=_environment()
            )
            alone.append(json.loads(done.stdout.splitlines()[-1]))
    outside = {label for one in runs for label in one["outside_ms"]}
    by_process = {
        label: statistics.median(one["outside_ms"].get(label, 0.0) for one in runs) for label in outside
    }
    return {
        "end_to_end_ratio": statistics.median(
            one["rate"] / other["rate"] for one, other in zip(runs, alone, strict=True)
        ),
        "run_rows_per_second": statistics.median(one["rate"] for one in runs),
        "engine_rows_per_second": statistics.median(one["rate"] for one in alone),
        "replica_cpu_ms_per_row": statistics.median(one["replica_ms"] for one in runs),
        "engine_cpu_ms_per_row": statistics.median(one["cpu_ms"] for one in alone),
        "outside_cpu_ms_per_row": sum(by_process.values()),
        "outside_cpu_ms_per_row_by_process": dict(sorted(by_process.items(), key=lambda one: -one[1])),
        "seconds_since_start": runs[-1]["line"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.efficiency")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--slots", type=int, default=SLOTS)
    parser.add_argument("--threads", type=int, default=THREADS, help="of the engine, in both")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine:
        print(json.dumps(engine(given.engine, given)))
        return
    found = compare(given)
    if given.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        words = (
            ", ".join(f"{key} {one:.3g}" for key, one in value.items())
            if isinstance(value, dict)
            else f"{value:.4g}"
        )
        print(f"{name}: {words}")
    print(f"bound of the ratio {BOUND}: {'ok' if found['end_to_end_ratio'] >= BOUND else 'TOO LITTLE'}")


if __name__ == "__main__":
    main()
