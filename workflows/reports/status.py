"""What `wallaroo status` shows of an output: its progress, its speed, and whether a run is active."""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from wallaroo.workflows.outputs.run_log import RunRecord, read_records
from wallaroo.workflows.text import counted, duration, rounded

if TYPE_CHECKING:
    from wallaroo.workflows.plans.plan import PlanPart

SILENT_SECONDS = 60.0
"""A record that says `running` and was not rewritten for so long is reported as silent."""


@dataclass(frozen=True)
class Status:
    """The state of an output, from `runs/`, the numbers of the plan and a listing of `data/`."""

    output: str
    """The folder of the run."""
    state: str
    """One of these.

    `empty`: nothing is planned. `running`. `silent`: a run holds the output, but its heartbeat stopped.
    `stopped`. `failed`. `finished`. `unfinished`: no run is active, and shards are missing.
    """
    planned: int | None
    """Rows; None while the plan is not finished."""
    shards: int
    """Planned files."""
    done_shards: int
    """Files that are written."""
    done: int | None
    """Rows in these files, or those that the last run counted if they are more.

    None if there are files and no record of a run.
    """
    errors: dict[str, int]
    """Kind -> error rows."""
    record: RunRecord | None
    """The last run, if any."""
    runs: int
    """How many runs there were."""
    unreadable: list[str]
    """Records of runs that cannot be read."""
    heard: float | None
    """Seconds since the last heartbeat of `record`."""
    cost: float | None = None
    """Of all runs with a price; None if none had one."""

    @property
    def rate(self) -> float | None:
        """Rows/s of the last run: of the last minute while it is active, else of all its time.

        None if there is no run, or it ended or began before a row was counted.
        """
        if self.record is None:
            return None
        if self.state != "running":
            return self.record.overall_rate or None
        return self.record.rate if self.record.seconds else None

    def line(self) -> str:
        """The status in one line: `42 of 60 rows, 2 errors, 3.1 rows/s, 6 s left: running`."""
        record = self.record
        done = "?" if self.done is None else f"{self.done:,}"
        parts = [f"{done} of {'?' if self.planned is None else f'{self.planned:,}'} rows"]
        parts.append(counted(sum(self.errors.values()), "error"))
        if record is not None:
            parts += [f"{rounded(self.rate)} rows/s"] if self.rate is not None else []
            if self.left is not None:
                parts.append(f"{duration(self.left)} left")
        if self.cost is not None:
            parts.append(f"cost {self.cost:.2f}")
        return f"{', '.join(parts)}: {self.state}"

    @property
    def left(self) -> float | None:
        """Seconds until an active run ends; None if unknown."""
        if self.record is None or self.state != "running" or not self.record.rate:
            return None
        rows = (self.planned or 0) - (self.done or 0)
        return rows / self.record.rate if rows > 0 else None

    def text(self) -> str:
        """The status as a few lines for people."""
        lines = [f"{self.output}: {_STATES[self.state]}"]
        record = self.record
        planned = "?" if self.planned is None else f"{self.planned:,}"
        count = sum(self.errors.values())
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(self.errors.items()))
        errors = counted(count, "error") + (f" ({kinds})" if kinds else "")
        done = "?" if self.done is None else f"{self.done:,}"
        lines.append(f"  rows    {done} of {planned}, {errors}")
        lines.append(f"  files   {self.done_shards:,} of {self.shards:,} shards in data/")
        if record is not None:
            speed = "not measured" if self.rate is None else f"{rounded(self.rate)} rows/s"
            if record.first_row_seconds is not None:
                speed += f", the first row after {duration(record.first_row_seconds)}"
            if self.left is not None:
                speed += f", {duration(self.left)} left"
            lines.append(f"  speed   {speed}")
            start = f"{record.started[:16].replace('T', ' ')} UTC on {record.host}"
            took = f"took {duration(record.seconds)}"
            if self.state == "running":
                took = f"active for {duration(record.seconds + (self.heard or 0.0))}"
            lines.append(f"  run     {record.run} of {self.runs}, started {start}, {took}")
            if self.cost is not None:
                lines.append(f"  cost    {self.cost:.2f}")
            if record.retries:
                words = ", ".join(f"{name} {times:,}" for name, times in record.retries.items())
                lines.append(f"  retries {words}")
            if record.waits:
                words = ", ".join(f"{name} {duration(span)}" for name, span in record.waits.items())
                lines.append(f"  waits   {words}")
            if self.heard is not None and self.state in ("running", "silent"):
                lines.append(f"  updated {duration(self.heard)} ago")
            if record.message:
                lines.append(f"  reason  {record.message}")
        lines += [f"  {path} cannot be read" for path in self.unreadable]
        return "\n".join(lines)


_STATES = {
    "empty": "nothing is planned yet",
    "running": "running",
    "silent": "no heartbeat; re-run the command to resume",
    "stopped": "stopped; re-run the command to resume",
    "failed": "failed; remove the cause, then re-run the command to resume",
    "unfinished": "not finished; re-run the command to resume",
    "finished": "finished",
}


def status(output: str, clock: Callable[[], float] = time.time) -> Status:
    """Reads the state of an output. Opens no file of `data/`, and needs no Ray.

    Args:
        output: The folder of the run, local or `s3://`.
        clock: Gives seconds since the epoch.

    Returns:
        The state.

    Raises:
        InputError: `output` is no output of a run.
    """
    from wallaroo.workflows.outputs.layout import list_done
    from wallaroo.workflows.outputs.lock import at_work
    from wallaroo.workflows.outputs.run_file import read_run
    from wallaroo.workflows.plans.finished import finished
    from wallaroo.workflows.plans.plan import read_plan

    read_run(output)
    plan = read_plan(output)
    records, unreadable = read_records(output)
    done = list_done(output)
    done_shards = sum(shard in done for shard in plan.shards)
    last = records[-1] if records else None
    heard = None if last is None else max(0.0, clock() - datetime.fromisoformat(last.updated).timestamp())
    success = finished(output, plan)
    if success is not None:
        state = "finished"
    elif at_work(output, watch=0):
        # Also while it plans, and has no record yet.
        state = "running"
        last = last if last is not None and last.state == "running" else None
    elif last is None:
        state = "unfinished" if plan.parts else "empty"
    elif last.state == "running":
        gone = last.host == socket.gethostname() and not _alive(last.pid)
        state = "silent" if gone or (heard or 0) > SILENT_SECONDS else "running"
    elif last.state == "finished":
        state = "unfinished"
    else:
        state = last.state
    rows = last.done if last else None if done else 0
    if last is not None and not last.options.get("retry_errors"):
        # The listing is newer than the heartbeat. A run that retries rows writes over files that are there.
        rows = max(last.done, sum(_rows_in(part, done) for part in plan.parts))
    return Status(
        output=output,
        state=state,
        planned=plan.rows if plan.complete else None,
        shards=len(plan.shards),
        done_shards=done_shards,
        done=success["rows"] if success else rows,
        errors=success["errors"] if success else last.errors if last else {},
        record=last,
        runs=len(records),
        unreadable=unreadable,
        heard=heard,
        cost=sum(costs) if (costs := [one.cost for one in records if one.cost is not None]) else None,
    )


def _rows_in(part: "PlanPart", done: set[int]) -> int:
    """Rows of a part in the files of `done`; 0 if its shards were compacted, since their rows vary."""
    if part.compacted:
        return 0
    files = sum(shard in done for shard in range(part.first_shard, part.end))
    missing_of_last = part.shard_rows * part.shards - part.rows
    return files * part.shard_rows - (missing_of_last if part.end - 1 in done else 0)


def _alive(pid: int) -> bool:
    """Whether a process of this machine is alive. Also true for one that this user may not signal."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
