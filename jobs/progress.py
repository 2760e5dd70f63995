"""Shows a run's progress: a bar on a terminal, else a line every ten seconds.

Knows nothing of where the numbers come from.
"""

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from wallaroo.workflows.text import counted, duration, rounded

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from wallaroo.workflows.progress import Progress

LINE_SECONDS = 10.0
RATE_SECONDS = 60.0
"""Rows/s is the mean over so many seconds: short enough to show a change, long enough to span shards."""


class Rate:
    """Rows/s over the last RATE_SECONDS, from the counts it is called with."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def __call__(self, now: float, done: int) -> float:
        """The rate at `now` (seconds of any steady clock), 0 before the second call."""
        seen = self._seen
        seen.append((now, done))
        # One entry older than the span stays, so that the span is covered to its full length.
        while len(seen) > 2 and seen[1][0] <= now - RATE_SECONDS:
            seen.popleft()
        elapsed = now - seen[0][0]
        return (done - seen[0][1]) / elapsed if elapsed > 0 else 0.0


def line(progress: "Progress", rate: float) -> str:
    """The progress in a line.

    Args:
        progress: Counts of the run.
        rate: Rows/s, for the time left.

    Returns:
        `120 of 2,212 rows (5 %), 3.4 rows/s, 2 errors, 10 min 15 s left`, or what the run waits for.
    """
    parts = []
    if progress.rows:
        share = 100 * progress.done // progress.rows
        phase = f"{progress.phase}: " if progress.phase else ""
        parts.append(f"{phase}{progress.done:,} of {progress.rows:,} rows ({share} %)")
    if progress.waiting:
        return ", ".join([*parts, progress.waiting])
    parts.append(f"{rounded(rate)} rows/s")
    if progress.errors or not progress.phase:
        parts.append(counted(progress.errors, "error"))
    if rate > 0 and progress.done < progress.rows:
        parts.append(f"{duration((progress.rows - progress.done) / rate)} left")
    return ", ".join(parts)


class Display:
    """Shows each Progress that it is called with; a context manager, which ends the bar.

    Args:
        stream: Where it shows; a bar if that is a terminal.
        clock: Gives the seconds of a steady clock.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._rate = Rate()
        self._last_line = -LINE_SECONDS
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._phase = ""
        self._stopping = False

    def __enter__(self) -> "Display":
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(
                BarColumn(bar_width=30),
                TextColumn("{task.description}"),
                console=Console(file=self._stream),
                refresh_per_second=4,
                # Ray's workers write to this terminal too; rich moves their lines above the bar.
                redirect_stdout=False,
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: "Progress") -> None:
        now = self._clock()
        if progress.waiting or progress.phase != self._phase:
            # The time until a replica is up is not part of the rate, nor is that of another phase.
            self._rate = Rate()
        self._phase = progress.phase
        # A command that is done within seconds shows one line, before this clock has measured anything.
        rate = progress.done / progress.seconds if progress.seconds else self._rate(now, progress.done)
        text = line(progress, rate)
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("", total=None)
            self._bar.update(
                self._task, total=progress.rows or None, completed=progress.done, description=text
            )
        elif now - self._last_line >= LINE_SECONDS or (progress.stopping and not self._stopping):
            self._last_line = now
            self._stopping = progress.stopping
            print(text, file=self._stream, flush=True)
