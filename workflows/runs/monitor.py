"""The driver while its pipeline runs: it counts shards, reports progress, and ends a run that fails."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from wallaroo.actors import metrics
from wallaroo.actors.watch import WatchCounts
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.lock import OutputLock
from wallaroo.workflows.outputs.run_log import S3_RETRIES, RunLog
from wallaroo.workflows.progress import Progress
from wallaroo.workflows.reports.tally import Tally
from wallaroo.workflows.runs.pool import Pool
from wallaroo.workflows.runs.resume import Remaining
from wallaroo.workflows.runs.setup import Resolved
from wallaroo.workflows.runs.streaming import TICK_SECONDS
from wallaroo.workflows.settings import RunConfig
from wallaroo.workflows.stopping import SIGNALS, RunStopped, Stop
from wallaroo.workflows.text import counted, duration

log = logging.getLogger(__name__)

MAX_DEATHS = 6
"""Most deaths of replicas on one shard without progress.

Above it the run stops, since it would never end.
"""
MIN_ROWS = 20
"""Fewest rows on which an error rate is judged."""


class Monitor:
    """Follows the shards of a run as they arrive.

    Each arriving shard is counted, and lets another one into the pipeline. All else is done every
    TICK_SECONDS, however many shards came, so its cost does not grow with their rate.
    """

    def __init__(
        self,
        resolved: Resolved,
        remaining: Remaining,
        pool: Pool,
        lock: OutputLock,
        run_log: RunLog,
        report: Callable[[Progress], None],
        stop: Stop,
    ):
        """Starts the counts.

        Args:
            resolved: The run.
            remaining: Shards to make, and counts of the finished rows.
            pool: The replicas.
            lock: The lock on the output; losing it ends the run.
            run_log: Record of this start.
            report: Called with the progress.
            stop: Says whether the run is to stop.
        """
        self._config, self._plan = resolved.config, resolved.plan
        self._pool, self._lock, self._run_log, self._report, self._stop = pool, lock, run_log, report, stop
        self._before = remaining.finished.rows
        self._summaries = remaining.summaries
        self._total = Tally(details=None)
        self._total.add(remaining.finished)
        self._made = Tally(details=None)
        self._retries = 0
        self._written = 0
        self._arrived = 0
        self._started = time.monotonic()
        self._first_replica: float | None = None
        self._stopping = False

    def follow(self, arrivals: Iterator[list[dict[str, Any]]], watch: Any) -> int:
        """Follows a pipeline to its end.

        Args:
            arrivals: Rows of `write`, from `arriving`.
            watch: Handle of the run's `actors.watch.Watch`.

        Returns:
            Number of rows that this start made ok.

        Raises:
            InputError: Replicas die on a shard again and again, or too many rows are errors.
            LockLost: Another run took over the output.
            RunStopped: The run was stopped on purpose.
        """
        watch.admit.remote(self._pool.window)
        looked = 0.0
        for rows in arrivals:
            for row in rows:
                self._count(row)
            if rows and not self._stopping:
                watch.admit.remote(self._arrived + self._pool.window)
            if not rows or time.monotonic() - looked >= TICK_SECONDS:
                self._look(watch)
                looked = time.monotonic()
        self._look(watch)
        if self._total.rows < self._plan.rows and self._stopping:
            raise self._stopped()
        if len(self._total.environments) > 1:
            log.warning(
                "The rows were made in %d environments, which may round differently; the report counts them.",
                len(self._total.environments),
            )
        return self._made.ok

    def _count(self, row: dict[str, Any]) -> None:
        """Counts a shard that came through the pipeline."""
        self._arrived += 1
        self._retries += row["retries"]
        if row["tally"]:
            tally = Tally.from_values(json.loads(row["tally"]))
            self._made.add(tally)
            self._total.add(tally)
            self._written += tally.refused < tally.rows
            self._summaries.add(row["shard"], row["stamp"], row["summary"])

    def _look(self, watch: Any) -> None:
        """Checks lock, stop and replicas, reports, and raises if the run should end."""
        import ray

        self._lock.check()
        if self._stop.asked() and not self._stopping:
            self._stopping = True
            ray.get(watch.stop.remote())
        counts = ray.get(watch.counts.remote())
        if self._first_replica is None and counts.replicas:
            self._first_replica = time.monotonic() - self._started
        in_flight = counts.held + max(0, counts.finished - self._written)
        self._retries += storage.take_retries()
        self._show(counts, in_flight)
        self._record(counts)
        check_health(self._config, counts, self._made)
        unfinished = self._total.rows < self._plan.rows
        if self._stopping and unfinished and (self._stop.over() or not in_flight):
            raise self._stopped()

    def _stopped(self) -> RunStopped:
        return self._stop.stopped(f"{self._total.rows:,} of {counted(self._plan.rows, 'row')}")

    def _show(self, counts: WatchCounts, in_flight: int) -> None:
        """Reports the progress to the caller and to the metrics."""
        waiting = ""
        if self._stopping and not in_flight:
            waiting = "stopping, no shard is in flight"
        elif self._stopping:
            shards = counted(in_flight, "shard")
            waiting = f"finishing {shards} in flight, for at most {duration(self._stop.left())}"
            if self._stop.why in SIGNALS.values():
                waiting += f"; {self._stop.why} again stops now"
        elif not (counts.replicas or self._made.rows):
            waiting = waiting_for(self._config, self._pool, time.monotonic() - self._started)
        done = self._before + self._made.refused + counts.rows
        errors = sum(self._total.errors.values())
        self._report(
            Progress(
                rows=self._plan.rows,
                done=done,
                before=self._before,
                errors=errors - sum(self._made.errors.values()) + self._made.refused + counts.errors,
                waiting=waiting,
                stopping=self._stopping,
            )
        )
        for name, number in (
            ("rows", self._plan.rows),
            ("done_rows", done),
            ("error_rows", errors),
            ("replicas", counts.replicas),
            ("replica_deaths", counts.deaths),
        ):
            metrics.gauge(f"wallaroo_run_{name}", number, task=self._config.task, output=self._config.output)

    def _record(self, counts: WatchCounts) -> None:
        """Writes the progress to the record of the run."""
        retried = {"replicas that died": counts.deaths, S3_RETRIES: self._retries}
        waited = self._first_replica
        self._run_log.update(
            rows=self._plan.rows,
            done=self._total.rows,
            before=self._before,
            errors=self._total.errors,
            images=self._made.ok,
            replicas=counts.replicas,
            retries={name: number for name, number in retried.items() if number},
            waits={"first replica": time.monotonic() - self._started if waited is None else waited},
        )


def waiting_for(config: RunConfig, pool: Pool, seconds: float) -> str:
    """Describes what a run without a replica waits for.

    Args:
        config: Options of the run.
        pool: Its replicas.
        seconds: How long it has waited.

    Returns:
        Words for the progress display.
    """
    import ray

    least = min(config.replicas[0], pool.size)
    if pool.device == "cpu":
        return f"waiting for a replica: 0 of {pool.size} up, {duration(seconds)}"
    up = int(ray.cluster_resources().get("GPU", 0))
    if up < least:
        gpus = "1 GPU" if least == 1 else f"{least} GPUs"
        return f"waiting for {gpus}: {up} of {pool.size} up, {duration(seconds)}"
    return f"waiting for the model: {min(up, pool.size)} of {pool.size} GPUs up, {duration(seconds)}"


def check_health(config: RunConfig, counts: WatchCounts, made: Tally) -> None:
    """Ends a run that should not continue.

    Args:
        config: Options of the run.
        counts: Counts of its watch.
        made: Rows that this start has made.

    Raises:
        InputError: Replicas die on a shard again and again, or too many rows are errors.
    """
    if counts.fruitless > MAX_DEATHS:
        words = f"; the last one said '{counts.last_death}'" if counts.last_death else ""
        raise InputError(
            f"{counts.fruitless} replicas died on shard {counts.hardest_shard}, and none of its rows is "
            f"the cause{words}: try fewer --slots, and read the logs of Ray. Finished shards are kept."
        )
    errors = sum(made.errors.values())
    limit = config.max_error_rate
    if limit is not None and made.rows >= MIN_ROWS and errors > limit * made.rows:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(made.errors.items()))
        raise InputError(
            f"{errors} of {made.rows} rows are errors ({kinds}), more than the --max-error-rate of {limit:g} "
            f"allows: correct the manifest and give a new output, or raise the limit. Finished shards are "
            f"kept."
        )
