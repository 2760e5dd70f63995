"""One model replica: an engine on one device, in its own thread, behind Ray Data's calls.

Ray's calls only put rows into a queue and wait for their outcomes, so rows of several shards share the
engine's slots. Every row is given back exactly once, as ok or as error. A broken device is no row's fault:
the process then ends itself and Ray restarts it, because an exception from the call would fail the whole run
and restart nothing. Rows that `actors.watch` suspects of killing replicas run alone; lethal rows do not run.
Knows nothing of manifests, plans, output folders or image formats.
"""

import asyncio
import json
import math
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from wallaroo.actors import metrics
from wallaroo.actors.calls import Announced, Call, Encode, Encoders, RowQueue, Waiting
from wallaroo.actors.rows import Outcome, from_ipc, outcomes_table, requests, to_ipc
from wallaroo.actors.watch import Start
from wallaroo.model.errors import InputError

# A driver names this class without using it, so torch waits until there is an engine to run.
if TYPE_CHECKING:
    from wallaroo.model.engine.engine import Engine

GAUGE_SECONDS = 1.0
"""Interval at which a replica reports its load; metrics are read every few seconds at most."""

EXIT_DEVICE = 70
"""Exit status of a process that ended itself because its engine failed."""

LETHAL = "crash"
"""Kind of error of rows that kill their replica."""

ENCODERS = 2
"""Pictures that a replica encodes at once; 13 a second of 512x512 pixels keep a quarter of a CPU busy."""

AHEAD = 16
"""Rows beyond its slots that an engine prepares. Fewer rows mean fewer suspects after a death."""

NOTE_ROWS, NOTE_SECONDS = AHEAD // 2, 0.25
"""A note to the watch waits for so many rows, but no longer than so many seconds: of several hundred replicas
with a note for each row the watch would be the bottleneck. Nobody sees the difference, since the driver looks
twice a second."""


def joined(before: str, after: str) -> str:
    """The environment of rows some of which were made before it changed, and some after.

    Args:
        before: The earlier environment, as JSON.
        after: The later one.

    Returns:
        JSON; a shape that differs is written as `OLD, then NEW`.
    """
    if before == after:
        return after
    old, new = json.loads(before), json.loads(after)
    both = {
        name: value if value == old["shapes"][name] else f"{old['shapes'][name]}, then {value}"
        for name, value in new["shapes"].items()
    }
    return json.dumps(new | {"shapes": both}, sort_keys=True)


class _Meter:
    """Counts what an engine does, and sends the sums every GAUGE_SECONDS."""

    def __init__(self, engine: "Engine", replica: str):
        self._engine, self._replica, self._task = engine, replica, engine.task
        self._sums: Counter[tuple[str, str]] = Counter()
        self._prefilled = 0
        self._said = time.perf_counter()

    def round(self, seconds: float, queued: int) -> None:
        """Counts a round of the engine: its seconds, and the rows left in the replica's inbox."""
        prefilled = self._engine.counts["prefill_forwards"]
        phase = "prefill" if prefilled > self._prefilled else "decode"
        self._prefilled = prefilled
        self._sums["wallaroo_engine_seconds_total", phase] += seconds  # type: ignore[assignment]
        if time.perf_counter() - self._said >= GAUGE_SECONDS:
            self.say(queued)

    def finished(self, outcome: Outcome) -> None:
        """Counts a row that the engine returned."""
        self._sums["wallaroo_images_total", ""] += outcome.pixels is not None
        self._sums["wallaroo_prompt_tokens_total", ""] += outcome.prompt_tokens
        self._sums["wallaroo_output_tokens_total", ""] += len(
            () if outcome.tokens is None else outcome.tokens
        )

    def say(self, queued: int) -> None:
        """Sends the sums."""
        self._said = time.perf_counter()
        for (name, phase), amount in self._sums.items():
            metrics.count(name, amount, task=self._task, **({"phase": phase} if phase else {}))
        self._sums.clear()
        engine, labels = self._engine, {"task": self._task, "replica": self._replica}
        busy = min(engine.pending, engine.slots)
        metrics.gauge("wallaroo_slots", engine.slots, **labels)
        metrics.gauge("wallaroo_slots_busy", busy, **labels)
        metrics.gauge("wallaroo_queue_rows", queued + engine.pending - busy, **labels)


class Replica:
    """A class for `ray.data.Dataset.map`, one instance an actor, several calls at once.

    Args:
        checkpoint: Gives the local folder of the checkpoint, fetching it first where it must.
        task: One of the model's tasks.
        options: Fields of `model.engine.EngineOptions` that differ from their defaults.
        device: `cpu`, `cuda` or `auto`.
        threads: CPU threads of torch; they belong to what rounds a result and are given, never counted.
        watch: Handle of the run's `actors.watch.Watch`, or None for no watch.
        encoder: Ray row of a shard -> what makes files of its pictures; None if they stay pixels.
    """

    def __init__(
        self,
        checkpoint: Callable[[], str | Path],
        task: str = "generate",
        options: Mapping[str, Any] | None = None,
        device: str = "auto",
        threads: int = 1,
        watch: Any = None,
        encoder: Callable[[Mapping[str, Any]], Encode] | None = None,
    ):
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.environment = ""
        self._watch = watch
        self._encoder = encoder
        self._encoders = Encoders(ENCODERS)
        self._inbox: queue.SimpleQueue[tuple[Waiting, int | None]] = queue.SimpleQueue()
        self._loaded = threading.Event()
        self._refusal: InputError | None = None
        threading.Thread(
            target=self._serve,
            args=(checkpoint, task, options or {}, device, threads),
            name="engine",
            daemon=True,
        ).start()
        self._loaded.wait()
        if watch is not None and self._refusal is None:
            watch.note_up.remote(self.name)

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Turns a shard's requests into its outcomes.

        Args:
            row: `shard` is its number, `requests` the bytes of a table under `actors.rows.REQUESTS`.

        Returns:
            The other entries of the row, with `outcomes` (bytes of a table under OUTCOMES, in no certain
            order; empty where the run is about to stop and the shard was not begun), `replica` (host and
            process), `attempts` (for which time the shard is tried) and `environment` (JSON of what
            rounds a result).

        Raises:
            InputError: The checkpoint or the device cannot be used: no restart would help.
        """
        if self._refusal is not None:
            raise self._refusal
        before = self.environment
        table = from_ipc(row["requests"])
        rows = table.column("row").to_pylist()
        start = Start()
        encode = None if self._encoder is None else self._encoder(row)
        call = Call(int(row["shard"]), rows, asyncio.get_running_loop(), encode)
        if rows:
            if self._watch is not None:
                start = await self._may_begin(call)
            if not start.stopping:
                self._begin(call, table, start)
                await call.finished
        passed = {name: value for name, value in row.items() if name != "requests"}
        return {
            **passed,
            "outcomes": b"" if start.stopping else to_ipc(outcomes_table(call.outcomes)),
            "replica": self.name,
            "attempts": start.attempt,
            "environment": joined(before, self.environment),
        }

    async def _may_begin(self, call: Call) -> Start:
        """The watch's reply to a call, when it may start."""
        while True:
            start: Start = await self._watch.note_start.remote(self.name, call.shard, call.rows)
            if not start.wait:
                return start
            await asyncio.sleep(start.wait)

    def _begin(self, call: Call, table: pa.Table, start: Start) -> None:
        """Puts the rows of a call into the inbox, except lethal ones."""
        lethal = set(start.lethal)
        if lethal and self._watch is not None:
            self._watch.note_done.remote(self.name, [(call.shard, number, False) for number in lethal])
        for number in lethal:
            sentence = "it crashed its replica repeatedly, even when it ran alone."
            call.give_back(Outcome(number, datetime.now(UTC), 0.0, LETHAL, sentence))
        keys = [(call, number) for number in call.rows]
        for number, request in zip(call.rows, requests(table, keys), strict=True):
            if number not in lethal:
                self._inbox.put((Waiting(call, number, request), start.suspects.get(number)))

    def _serve(
        self,
        checkpoint: Callable[[], str | Path],
        task: str,
        options: Mapping[str, Any],
        device: str,
        threads: int,
    ) -> None:
        """The engine's thread. Only it uses torch, since torch sets its number of threads per thread."""
        try:
            engine = self._load(checkpoint, task, options, device, threads)
            self._loaded.set()
            self._turn(engine)
        except InputError as error:
            self._refusal = error
            self._loaded.set()
        except BaseException as error:
            traceback.print_exc()
            self._end(f"{type(error).__name__}: {error}")

    def _load(
        self,
        checkpoint: Callable[[], str | Path],
        task: str,
        options: Mapping[str, Any],
        device: str,
        threads: int,
    ) -> "Engine":
        import torch

        from wallaroo.model.checkpoint import load
        from wallaroo.model.engine.engine import Engine
        from wallaroo.model.engine.options import EngineOptions, even_threads, gpu_options

        torch.set_num_threads(threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError(
                f"device is cuda, but torch {torch.__version__} sees no GPU on {socket.gethostname()}: "
                f"install a torch that is built for its driver, or choose the device cpu."
            )
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        folder = checkpoint()
        started = time.perf_counter()
        model = load(folder, task, device, dtype)
        print(f"{self.name}: model loaded in {time.perf_counter() - started:.1f} s", file=sys.stderr)
        if device == "cpu":
            chosen = EngineOptions(**options)
            threads = even_threads(model.config.decoder, chosen, threads)
            torch.set_num_threads(threads)
        else:
            free, _ = torch.cuda.mem_get_info()
            chosen = gpu_options(model.config, free, dtype.itemsize, task, **options)
        engine = Engine(model, task, chosen)
        self._constants = {
            "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(device),
            "threads": threads,
        }
        self._note_environment(engine)
        return engine

    def _note_environment(self, engine: "Engine") -> None:
        values = self._constants | {"shapes": engine.shapes()}
        self.environment = json.dumps(values, sort_keys=True)

    def _turn(self, engine: "Engine") -> None:
        """Feeds the engine and gives its results back, until the process ends.

        The engine gets a row only when the watch has replied to its note, since the row may be the last
        thing this process does. Notes go out while the engine works on the rows it has, so that only an
        engine without any waits for a reply. The watch hears of all rows of a shard before the shard is given
        back.
        """
        in_flight: dict[Hashable, tuple[Waiting, datetime, float]] = {}
        waiting, announced = RowQueue(), Announced()
        left: Counter[Call] = Counter()
        done: list[tuple[Call, Outcome]] = []
        untold: list[tuple[int, int, bool]] = []
        told = -math.inf
        meter = _Meter(engine, self.name)
        halvings = 0

        def receive() -> None:
            one, deaths = self._inbox.get()
            left[one.call] += 1
            waiting.put(one, deaths)

        while True:
            while not self._inbox.empty():
                receive()
            held, ended = engine.pending + announced.rows, False
            for call, outcome in done:
                untold.append((call.shard, outcome.row, not outcome.error_type))
                left[call] -= 1
                if not left[call]:
                    del left[call]
                    ended = True
            room = engine.slots + AHEAD - held
            taken: list[Waiting] = []
            if (
                ended
                or not engine.pending
                or len(untold) >= NOTE_ROWS
                or (room >= NOTE_ROWS and len(waiting))
                or time.perf_counter() - told >= NOTE_SECONDS
            ):
                taken, alone = waiting.take(room, not held)
                reply = self._note(untold, taken, alone)
                if taken:
                    announced.add(taken, reply)
                untold, told = [], time.perf_counter()
            for call, outcome in done:
                self._encoders.give_back(call, outcome)
            done = []
            if not (taken or held):
                meter.say(0)  # it waits for rows now, and would report nothing until they arrive
                receive()
                continue
            for one in announced.take(block=not engine.pending):
                in_flight[one.request.key] = one, datetime.now(UTC), time.perf_counter()
                engine.submit(one.request)
            round_started = time.perf_counter()
            results = engine.step()
            if engine.counts["halvings"] != halvings:
                halvings = engine.counts["halvings"]
                self._note_environment(engine)
            queued = self._inbox.qsize() + len(waiting) + announced.rows
            meter.round(time.perf_counter() - round_started, queued)
            for result in results:
                one, started_at, started = in_flight.pop(result.key)
                seconds = time.perf_counter() - started
                outcome = Outcome.of_result(one.row, result, started_at, seconds)
                meter.finished(outcome)
                done.append((one.call, outcome))
                waiting.given_back = True

    def _note(
        self, done: list[tuple[int, int, bool]], taken: list[Waiting], alone: bool
    ) -> "Future[None] | None":
        """Tells the watch which rows are done and which the engine gets next, without waiting.

        Args:
            done: Rows that the engine gave back since the last note, each a (shard, row, whether ok).
            taken: Rows that the engine is to get.
            alone: Whether they are one suspect, which runs alone.

        Returns:
            The reply, if the engine is to get rows and there is a watch.
        """
        if self._watch is None or not (done or taken):
            return None
        keys = [(one.call.shard, one.row) for one in taken]
        note = self._watch.note_rows.remote(self.name, done, keys, alone)
        return note.future() if taken else None

    def _end(self, reason: str) -> None:
        """Tells the watch the reason, and ends this process."""
        if self._watch is not None:
            import ray

            try:
                ray.get(self._watch.note_death.remote(self.name, reason), timeout=5)
            except Exception:
                traceback.print_exc()
        sys.stderr.flush()
        os._exit(EXIT_DEVICE)
