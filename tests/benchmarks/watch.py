"""The watch of a run under many replicas: rows a second, and how long engines are held up by notes of them.

    python -m tests.benchmarks.watch [--replicas N] [--rate ROWS] [--seconds N] [--json]

Replicas are real but for their engine, which gives a row back whenever one is due and computes nothing. They
tell the watch of each row twice, that it is at work and that it is done, and of several rows in one note.
Several replicas share a process, so that the watch is loaded and not the machine.
"""

import argparse
import asyncio
import json
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from wallaroo.actors import watch
from wallaroo.actors.replica import Replica
from wallaroo.actors.rows import request_values, requests_table, to_ipc
from wallaroo.actors.watch import Limits
from wallaroo.model.engine.requests import Request, Result
from wallaroo.model.prompts import Prompt
from wallaroo.model.sampling import Sampling
from wallaroo.workflows.cluster import connected

REPLICAS, ROWS, SECONDS, WARM_UP_SECONDS = 128, 850.0, 20.0, 5.0
SLOTS, SHARD_ROWS, CALLS = 64, 256, 2
PROCESSES = 8
STEP_SECONDS = 0.006
"""A decode step of the 7B model on an H200; the bound on the median wait."""


class SimulatedEngine:
    """Gives its oldest row back every `1 / rate` seconds. gaps: seconds from each step to the next one."""

    def __init__(self, rate: float, phase: float):
        self.task, self.slots, self.counts = "generate", SLOTS, Counter[str]()
        self.gaps: list[tuple[float, float]] = []
        self._interval = 1 / rate
        self._due = time.monotonic() + phase * self._interval
        self._rows: deque[Hashable] = deque()
        self._ended: float | None = None

    @property
    def pending(self) -> int:
        return len(self._rows)

    def shapes(self) -> dict[str, int | str]:
        return {}

    def submit(self, request: Request) -> None:
        self._rows.append(request.key)

    def step(self) -> list[Result]:
        now = time.monotonic()
        if self._ended is not None:
            self.gaps.append((now, now - self._ended))
        # A late engine does not make up for lost time, as a real one would not.
        self._due = max(self._due + self._interval, now)
        time.sleep(self._due - now)
        self._ended = time.monotonic()
        return [Result(self._rows.popleft(), np.zeros(0, np.int32))]


class Simulated(Replica):
    """A replica with a simulated engine, of which several share a process."""

    def __init__(self, number: int, rate: float, handle: Any):
        self._engine = SimulatedEngine(rate, number % 16 / 16)
        self._number = number
        super().__init__(checkpoint=str, watch=handle)

    @property
    def name(self) -> str:
        return f"replica {self._number}"

    @name.setter
    def name(self, _: str) -> None:
        """Given by the process, which others share."""

    def _load(self, *_: Any) -> Any:
        self._constants, self._library = {}, {}
        self._note_environment(self._engine)  # type: ignore[arg-type]
        return self._engine


class Host:
    """A process with some replicas."""

    def __init__(self, handle: Any, numbers: range, rate: float):
        self._watch = handle
        self._replicas = [Simulated(number, rate, handle) for number in numbers]

    async def work(self, seconds: float) -> list[float]:
        """Keeps all replicas at work, and returns the gaps of their engines but for the warm-up."""
        started = time.monotonic()
        end = started + seconds
        prompt = Prompt(np.zeros(1, np.int32), np.zeros((3, 1), np.int32), 1)
        values = [request_values(row, prompt, None, None, 0, vars(Sampling())) for row in range(SHARD_ROWS)]
        requests = to_ipc(requests_table(values))

        async def feed(replica: Simulated, call: int) -> None:
            shard = (replica._number * CALLS + call) * 1_000_000
            while True:
                await replica({"shard": shard, "requests": requests})
                self._watch.note_written.remote(shard)
                shard += 1

        tasks = [asyncio.create_task(feed(one, call)) for one in self._replicas for call in range(CALLS)]
        await asyncio.sleep(end - time.monotonic())
        for task in tasks:
            task.cancel()
        return [
            gap
            for one in self._replicas
            for when, gap in one._engine.gaps
            if when > started + WARM_UP_SECONDS
        ]


def measure(replicas: int = REPLICAS, rate: float = ROWS, seconds: float = SECONDS) -> dict[str, float]:
    """Loads a watch and returns the counts that `main` prints.

    Args:
        replicas: How many engines tell the watch of their rows.
        rate: How many rows a second all of them make, if nothing holds them up.
        seconds: How long, the warm-up included.
    """
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])  # by which Ray's processes find this module
    with connected(cpus=1):
        handle = watch.start(Limits(10**9))
        host = ray.remote(Host).options(num_cpus=0, max_concurrency=2)
        share = -(-replicas // PROCESSES)
        each = rate / replicas
        hosts = [
            host.remote(handle, range(first, min(first + share, replicas)), each)
            for first in range(0, replicas, share)
        ]
        ray.get([one.__ray_ready__.remote() for one in hosts])
        process = _process_of("Watch")
        before = ray.get(handle.counts.remote())
        cpu, started = process.cpu_times(), time.monotonic()
        asked: list[tuple[float, float, int]] = []
        stop = threading.Event()

        def look() -> None:
            while not stop.wait(0.5):
                asked_at = time.monotonic()
                rows = ray.get(handle.counts.remote()).rows
                asked.append((asked_at, time.monotonic() - asked_at, rows))

        looking = threading.Thread(target=look)
        looking.start()
        gaps = np.concatenate(ray.get([one.work.remote(seconds) for one in hosts]))
        stop.set()
        looking.join()
        counts = ray.get(handle.counts.remote())
        spent = process.cpu_times()
        made = counts.rows - before.rows
    used = spent.user + spent.system - cpu.user - cpu.system
    # Between the first shards and the end of the first replica.
    warm = [(when, rows) for when, _, rows in asked if WARM_UP_SECONDS < when - started < seconds]
    (first, few), (last, many) = warm[0], warm[-1]
    return {
        "watch_replicas": replicas,
        "watch_rows_offered": rate,
        "watch_rows_per_second": (many - few) / (last - first),
        "watch_wait_median_ms": 1000 * float(np.median(gaps)),
        "watch_wait_p99_ms": 1000 * float(np.percentile(gaps, 99)),
        "watch_driver_wait_median_ms": 1000 * float(np.median([took for _, took, _ in asked])),
        "watch_cpu_us_per_row": 1e6 * used / made,
    }


def _process_of(actor: str) -> psutil.Process:
    children = psutil.Process().children(recursive=True)
    return next(one for one in children if one.cmdline()[:1] == [f"ray::{actor}"])


def main() -> None:
    parser = argparse.ArgumentParser(description="The watch of a run under many replicas.")
    parser.add_argument("--replicas", type=int, default=REPLICAS)
    parser.add_argument("--rate", type=float, default=ROWS, help="rows a second")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = measure(given.replicas, given.rate, given.seconds)
    if given.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name}: {value:.4g}")
    verdict = "ok" if found["watch_wait_median_ms"] <= 1000 * STEP_SECONDS else "TOO LONG"
    print(f"median wait against a decode step of {1000 * STEP_SECONDS:.0f} ms: {verdict}")


if __name__ == "__main__":
    from tests.benchmarks import watch as itself

    # Ray sends the class of the replicas by its name, which must not be that of this script.
    itself.main()
