"""`runs/NNNN.json`: the record of each start of a driver."""

import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import platform
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import record_numbers, record_path
from wallaroo.workflows.stopping import RunStopped
from wallaroo.workflows.text import counted, rounded

WRITE_SECONDS = 10.0
"""Time between two writes of the record."""
WINDOW_SECONDS = 60.0
"""The current rate is the mean over this time."""
LOG_LINES = 10_000
"""Lines that the log of a start keeps, the last ones. With one in ten seconds that is more than a day."""
MAX_SAMPLES = 500
"""Most points of the throughput graph of a record. Above it every second point is dropped."""
S3_RETRIES = "requests to S3"
"""Name of retried requests in `RunRecord.retries`."""
STATES = ("running", "finished", "stopped", "failed")


@dataclass
class RunRecord:
    """One start of a driver, as `runs/NNNN.json` holds it. Times are ISO 8601 in UTC."""

    run: int
    """Number of the start, from 1."""
    started: str
    """Time of the start."""
    updated: str
    """Time of the last write."""
    format: int = 1
    """Version of the file."""
    state: str = "running"
    """One of STATES."""
    message: str = ""
    """Why the run ended, in words; empty if it runs or finished."""
    seconds: float = 0.0
    """Seconds since the start."""
    host: str = ""
    """Host name of the driver."""
    pid: int = 0
    """Process number of the driver."""
    versions: dict[str, str] = field(default_factory=dict)
    """Package -> version; empty for one that is not installed."""
    options: dict[str, Any] = field(default_factory=dict)
    """Resolved options of the command."""
    rows: int = 0
    """Planned rows; 0 while unknown."""
    before: int = 0
    """Rows that the output had at the start."""
    done: int = 0
    """Rows that the output has, those included."""
    images: int = 0
    """Pictures that this run made."""
    errors: dict[str, int] = field(default_factory=dict)
    """Kind of error -> rows."""
    retries: dict[str, int] = field(default_factory=dict)
    """Name of what was retried -> number of retries."""
    waits: dict[str, float] = field(default_factory=dict)
    """Name of what was waited for -> seconds."""
    rate: float = 0.0
    """Rows/s over the last WINDOW_SECONDS, without the time before the first replica was up."""
    overall_rate: float = 0.0
    """Rows/s over the whole run."""
    first_row_seconds: float | None = None
    """Seconds from the start to the first row of this run; None before it."""
    replica_seconds: float = 0.0
    """Seconds that replicas were up, added over all replicas."""
    samples: list[list[float]] = field(default_factory=list)
    """Points of the graph: [seconds since the start, rows done, error rows]."""

    @property
    def cost(self) -> float | None:
        """Price of the replicas so far; None if the run has no price per hour."""
        price = self.options.get("price_per_hour")
        return None if price is None else price * self.replica_seconds / 3600

    def to_json(self) -> bytes:
        """The record as a JSON file."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> "RunRecord":
        """Parses a record.

        Args:
            data: Contents of the file.

        Returns:
            The record.

        Raises:
            ValueError: It is no record of this version.
        """
        try:
            values = json.loads(data)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        names = {one.name for one in dataclasses.fields(cls)}
        if not isinstance(values, dict) or values.get("format") != 1 or set(values) != names:
            raise ValueError("not a run record of this version")
        record = cls(**values)
        fields = {one.name: getattr(record, one.name) for one in dataclasses.fields(cls)}
        blank = dataclasses.asdict(cls(run=0, started="", updated=""))
        for name, value in fields.items():
            if blank[name] is not None and not isinstance(value, _like(blank[name])):
                raise ValueError(f"{name} is {value!r:.60}")
        datetime.fromisoformat(record.updated)
        numbers = [record.first_row_seconds or 0.0, record.seconds, record.rate, record.overall_rate]
        numbers += [record.replica_seconds]
        numbers += [*record.errors.values(), *record.retries.values()]
        numbers += [*record.waits.values(), *(number for sample in record.samples for number in sample)]
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise ValueError("a number is none")
        if record.state not in STATES or any(len(sample) != 3 for sample in record.samples):
            raise ValueError("unknown state or samples")
        return record


def _like(value: Any) -> type | tuple[type, ...]:
    return (int, float) if isinstance(value, float) else type(value)


class _Lines(logging.Handler):
    """Collects logged records and other messages as lines with their time."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: deque[str] = deque(maxlen=LOG_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        self.add(record.created, f"{record.levelname} {record.getMessage()}")

    def add(self, seconds: float, text: str) -> None:
        self.lines.extend(f"{_iso(seconds)} {line}" for line in text.splitlines())


class RunLog:
    """Keeps the record of this start, and rewrites it at most every WRITE_SECONDS as numbers come in.

    `runs/NNNN.log` beside it holds progress, warnings and how the run ended, with the traceback of an
    unexpected error. It survives the cluster, unlike the log of a job.

    As a context manager it writes how the run ended when the block is left: `finished`, `stopped` on purpose,
    or `failed` with the reason.
    """

    def __init__(
        self, output: str, options: Mapping[str, Any], clock: Callable[[], float] = time.time
    ) -> None:
        """Takes the next free number and writes the first record.

        Args:
            output: Folder of the run, local or on S3.
            options: Resolved options of the command.
            clock: Gives the time in seconds since the epoch.
        """
        self._output = output
        self._clock = clock
        self._start = clock()
        self._written = self._start
        self._every = 1.0
        self._recent: deque[tuple[float, int]] = deque()
        self._said = _Lines()
        now = _iso(self._start)
        self.record = RunRecord(
            run=0,
            started=now,
            updated=now,
            host=socket.gethostname(),
            pid=os.getpid(),
            versions=_versions(),
            options=dict(options),
        )
        self.record.run = max(record_numbers(output), default=0)
        while True:
            self.record.run += 1
            # Another driver may take the number after the listing.
            if storage.put_if_absent(self._path, self.record.to_json()):
                break

    @property
    def _path(self) -> str:
        return record_path(self._output, self.record.run)

    def update(
        self,
        *,
        rows: int,
        done: int,
        before: int,
        errors: Mapping[str, int],
        images: int,
        replicas: int = 0,
        retries: Mapping[str, int] | None = None,
        waits: Mapping[str, float] | None = None,
    ) -> None:
        """Takes the current numbers. It is cheap, so it may be called whenever they change.

        Args:
            rows: Planned rows; 0 while unknown.
            done: Rows that the output has.
            before: Rows that the output had at the start.
            errors: Kind of error -> rows.
            images: Pictures that this run made.
            replicas: Replicas that are up.
            retries: Name -> number of retries.
            waits: Name -> seconds spent waiting.
        """
        record, now = self.record, self._clock()
        record.replica_seconds += replicas * max(0.0, now - self._start - record.seconds)
        record.seconds = now - self._start
        record.rows, record.done, record.before, record.images = rows, done, before, images
        record.errors = dict(errors)
        record.retries = dict(retries or {})
        record.waits = {name: round(seconds, 3) for name, seconds in (waits or {}).items()}
        if record.first_row_seconds is None and done > before:
            record.first_row_seconds = record.seconds
        if not replicas and done == before:
            # The rate excludes the time until a replica is up, as in the display.
            self._recent.clear()
        self._rates(now)
        if not record.samples or record.seconds - record.samples[-1][0] >= self._every:
            self._sample()
        if now - self._written >= WRITE_SECONDS:
            self._written = now
            record = self.record
            counts = (
                f"{record.done:,} of {record.rows:,} rows, {counted(sum(record.errors.values()), 'error')}"
            )
            self._said.add(now, f"{counts}, {rounded(record.rate)} rows/s")
            # A missed write loses nothing: the next one has newer counts. If the storage stays unavailable,
            # the run stops where it writes rows.
            with suppress(OSError, InputError):
                storage.write_atomic(self._path, self._stamped(now))
                self._write_log()

    def end(self, state: str, message: str = "") -> None:
        """Writes the last state of the run.

        Args:
            state: `finished`, `stopped` or `failed`.
            message: The reason in words.

        Raises:
            ValueError: There is no such state.
        """
        if state not in STATES:
            raise ValueError(f"state {state!r}, expected one of {STATES}")
        now = self._clock()
        self.record.state, self.record.message = state, message
        self._count_retries()
        self.record.seconds = now - self._start
        self._rates(now)
        self._sample()
        self._said.add(now, f"{state}: {message}" if message else state)
        storage.write_atomic(self._path, self._stamped(now))
        self._write_log()

    def _count_retries(self) -> None:
        """Adds the requests that this process has retried since the last `update`."""
        if more := storage.take_retries():
            self.record.retries[S3_RETRIES] = self.record.retries.get(S3_RETRIES, 0) + more

    def _write_log(self) -> None:
        path = self._path.removesuffix(".json") + ".log"
        storage.write_atomic(path, "".join(f"{line}\n" for line in self._said.lines).encode())

    def __enter__(self) -> "RunLog":
        self._said.add(self._start, f"run {self.record.run} on {self.record.host}")
        logging.getLogger().addHandler(self._said)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        logging.getLogger().removeHandler(self._said)
        if error is None:
            if self.record.state == "running":
                self.end("finished")
            return
        stopped = isinstance(error, KeyboardInterrupt | RunStopped)
        if not (stopped or isinstance(error, InputError)):
            self._said.add(self._clock(), "".join(traceback.format_exception(error)))
        state = "stopped" if stopped else "failed"
        words = str(error).strip().splitlines() or [type(error).__name__]
        message = (
            words[0] if isinstance(error, InputError | RunStopped) else f"{type(error).__name__}: {words[0]}"
        )
        # The error that ended the run must be shown, not that of writing the record.
        with suppress(OSError, InputError):
            self.end(state, message[:500])

    def _rates(self, now: float) -> None:
        record, recent = self.record, self._recent
        recent.append((now, record.done))
        while len(recent) > 2 and recent[1][0] <= now - WINDOW_SECONDS:
            recent.popleft()
        span = now - recent[0][0]
        record.rate = round((record.done - recent[0][1]) / span, 4) if span > 0 else 0.0
        made = record.done - record.before
        record.overall_rate = round(made / record.seconds, 4) if record.seconds > 0 else 0.0

    def _sample(self) -> None:
        samples = self.record.samples
        point = [round(self.record.seconds, 2), self.record.done, sum(self.record.errors.values())]
        if samples and samples[-1][0] >= point[0]:
            samples[-1] = point
        else:
            samples.append(point)
        if len(samples) > MAX_SAMPLES:
            # The first and the last stay; the distance of the rest doubles.
            self.record.samples = samples[:-1:2] + samples[-1:]
            self._every *= 2

    def _stamped(self, now: float) -> bytes:
        self.record.updated = _iso(now)
        return self.record.to_json()


def read_records(output: str) -> tuple[list[RunRecord], list[str]]:
    """Reads the records of all starts.

    Args:
        output: Folder of the run, local or on S3.

    Returns:
        The records in order, and the paths of those that cannot be read.
    """
    records, unreadable = [], []
    for number in record_numbers(output):
        path = record_path(output, number)
        data = storage.read_bytes(path)
        try:
            records.append(RunRecord.from_json(data))
        except (ValueError, TypeError):
            unreadable.append(path)
    return records, unreadable


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("wallaroo-batch", "ray", "torch", "pyarrow", "pillow"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    return versions
