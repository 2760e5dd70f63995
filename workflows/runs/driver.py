"""The driver of a run: makes what an output lacks, shard by shard, and finishes it."""

import dataclasses
import functools
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from wallaroo.actors import metrics
from wallaroo.actors.replica import Replica
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.cluster import choose_device
from wallaroo.workflows.outputs.layout import SUCCESS_FILE, list_done
from wallaroo.workflows.outputs.lock import OutputLock
from wallaroo.workflows.outputs.run_file import find_run
from wallaroo.workflows.outputs.run_log import RunLog
from wallaroo.workflows.outputs.shards import map_shards
from wallaroo.workflows.plans.plan import Plan
from wallaroo.workflows.reports.finish import finish
from wallaroo.workflows.reports.page import write_report
from wallaroo.workflows.runs.pool import Pool, load_stage, make_pool, make_results
from wallaroo.workflows.runs.setup import (
    check_gpus,
    connect,
    is_finished,
    log,
    make_job,
    meaning_of,
    planned_run,
    summary_of,
    with_absolute_paths,
)
from wallaroo.workflows.runs.stages import Tally, load, refuse, retriable_rows, tally_of, write
from wallaroo.workflows.runs.streaming import arriving
from wallaroo.workflows.settings import Progress, RunConfig, RunSummary
from wallaroo.workflows.stopping import Stop
from wallaroo.workflows.storage import retries
from wallaroo.workflows.text import duration

MAX_DEATHS = 6
"""Replicas that may die with a shard and teach nothing; with more the run stops, or it would never end."""
WRITERS = 2
"""Shards that are written at once, for each replica, at least; more where one holds more."""
MIN_ROWS = 20
"""An error rate is not judged on fewer rows."""


def run(
    config: RunConfig,
    on_progress: Callable[[Progress], None] | None = None,
    replica: type = Replica,
    stop: Stop | None = None,
) -> RunSummary:
    """Does a run, or what is left of it, and returns when all of its rows are in the output.

    on_progress: called about twice a second. replica: the class of the replicas. stop: by which
    somebody may stop it; without one only the deadline of the configuration does.
    Raises InputError for what the user can put right (the output keeps what is finished, and the same
    run goes on from there), RunStopped if it was stopped on purpose, RunInProgress if another run is at
    work on the output.
    """
    started = time.monotonic()
    config = with_absolute_paths(config)
    stop = stop or Stop(config.grace, config.deadline)
    report = on_progress or (lambda progress: None)
    there = find_run(config.output)
    with ExitStack() as stack:
        lock = stack.enter_context(OutputLock(config.output, f"of process {os.getpid()}"))
        planned = planned_run(config, there, stack, report, stop)
        if is_finished(config.output, planned) and not config.retry_errors:
            return summary_of(config, started, before=planned.rows, made=0)
        # The storage has answered, so that it is not its address that is wrong.
        stack.enter_context(storage.patience())
        connect(config, stack, report, stop)
        device = choose_device(config.device)
        if device == "cuda":
            import ray

            check_gpus(config, int(ray.cluster_resources().get("GPU", 0)))
        storage.remove_leftovers(config.output)
        run_log = stack.enter_context(RunLog(config.output, config.to_dict()))
        with stop.patience():
            before, made = _make_missing(config, planned, device, replica, lock, run_log, report, stop)
        lock.check()
        finish(config.output, planned)
        run_log.end("finished")
        write_report(config.output)
    return summary_of(config, started, before, made)


def _make_missing(
    config: RunConfig,
    plan: Plan,
    device: str,
    replica: type,
    lock: OutputLock,
    run_log: RunLog,
    report: Callable[[Progress], None],
    stop: Stop,
) -> tuple[int, int]:
    """Makes the rows that are not there, or are to be made again.

    Returns:
        How many there were before, and how many were made ok.
    """
    import ray
    import ray.data

    from wallaroo.actors import watch
    from wallaroo.actors.watch import Limits

    done = list_done(config.output)
    there = [shard for shard in plan.shards if shard in done]
    missing = [shard for shard in plan.shards if shard not in done]
    known = Tally()
    failed, again = [], []
    tallies = map_shards(functools.partial(tally_of, config.output), there)
    for shard, tally in zip(there, tallies, strict=True):
        known.add(tally)
        if tally.errors and config.retry_errors:
            failed.append(shard)
    retriable = map_shards(functools.partial(retriable_rows, config.output), failed)
    for shard, kinds in zip(failed, retriable, strict=True):
        if kinds:
            again.append(shard)
            known.rows -= sum(kinds.values())
            known.errors = dict(Counter(known.errors) - Counter(kinds))
    before = known.rows
    if not (missing or again):
        return before, 0
    if again:
        # From now on it is not what was finished: a run that is cut off goes on, and finishes it anew.
        storage.delete(storage.join(config.output, SUCCESS_FILE))
    work, rewritten = sorted(missing + again), frozenset(again)
    meaning = meaning_of(config)
    job = make_job(config, meaning, plan.carried, known.environments if config.strict else ())
    pool = make_pool(config, device, plan.rows, len(plan.shards), replica)
    # All at once: a node asked for after the other would come up after the other. None that gets no rows.
    pool = dataclasses.replace(pool, size=min(pool.size, len(work)), shards=len(work))
    writers = max(WRITERS, pool.calls) * pool.size
    budget = 1.0 if config.max_error_rate is None else config.max_error_rate
    eyes = watch.start(Limits(2 * pool.size + writers, budget, MIN_ROWS, retries.PATIENCE_SECONDS))

    def pipeline() -> ray.data.Dataset:
        # Blocks that are there need no task to make them, which would wait for a CPU that replicas hold.
        shards = ray.data.from_items(work, override_num_blocks=len(work))
        stage = functools.partial(load, job=job, output=config.output, again=rewritten)
        loaded = load_stage(shards, stage, job, pool)
        if plan.error_rows == plan.rows:
            results = loaded.map(functools.partial(refuse, job=job), num_cpus=pool.cpus)
        else:
            results = make_results(loaded, job, pool, eyes)
        # A CPU of their own they would wait for, while finished shards pile up.
        stage = functools.partial(write, output=config.output, again=rewritten, watch=eyes)
        return results.map(stage, num_cpus=0, compute=pool.tasks(writers))

    made = Tally()
    written = 0
    started = time.monotonic()
    waited: float | None = None
    stopping = False
    for row in arriving(pipeline):
        lock.check()
        if stop.asked() and not stopping:
            stopping = True
            ray.get(eyes.stop.remote())
        counts = ray.get(eyes.counts.remote())
        if row is not None and row["tally"]:
            tally = Tally(**json.loads(row["tally"]))
            made.add(tally)
            known.add(tally)
            written += tally.refused < tally.rows
        if waited is None and counts.replicas:
            waited = time.monotonic() - started
        idle = not (counts.replicas or made.rows)
        up = _waiting(config, pool, time.monotonic() - started) if idle else ""
        in_flight = counts.held + max(0, counts.finished - written)
        if stopping:
            shards = "1 shard is" if in_flight == 1 else f"{in_flight} shards are"
            up = f"stopping: {shards} being finished, for {duration(stop.left())} at most"
        report(
            Progress(
                rows=plan.rows,
                done=before + made.refused + counts.rows,
                before=before,
                errors=sum(known.errors.values()) - sum(made.errors.values()) + made.refused + counts.errors,
                waiting=up,
            )
        )
        for name, number in (
            ("rows", plan.rows),
            ("done_rows", before + made.refused + counts.rows),
            ("error_rows", sum(known.errors.values())),
            ("replicas", counts.replicas),
            ("replica_deaths", counts.deaths),
        ):
            metrics.gauge(f"wallaroo_run_{name}", number, task=config.task, output=config.output)
        made.retries += storage.take_retries()
        tried = {"replicas that died": counts.deaths, "requests to S3": made.retries}
        run_log.update(
            rows=plan.rows,
            done=known.rows,
            before=before,
            errors=known.errors,
            images=made.ok,
            replicas=counts.replicas,
            retries={name: number for name, number in tried.items() if number},
            waits={"first replica": waited or time.monotonic() - started},
        )
        _check_health(config, counts, made)
        if stopping and known.rows < plan.rows and (stop.over() or not in_flight):
            raise stop.stopped()
    if known.rows < plan.rows and stopping:
        raise stop.stopped()
    if len(known.environments) > 1:
        log.warning(
            "The rows were made in %d environments, which may round differently; the report counts them.",
            len(known.environments),
        )
    return before, made.ok


def _waiting(config: RunConfig, pool: Pool, seconds: float) -> str:
    """What a run without a replica waits for, in words."""
    import ray

    least = min(config.replicas[0], pool.size)
    if pool.device == "cpu":
        return f"waiting for a replica: 0 of {pool.size} up, {duration(seconds)}"
    up = int(ray.cluster_resources().get("GPU", 0))
    if up < least:
        gpus = "1 GPU" if least == 1 else f"{least} GPUs"
        return f"waiting for {gpus}: {up} of {pool.size} up, {duration(seconds)}"
    return f"waiting for the model: {min(up, pool.size)} of {pool.size} GPUs up, {duration(seconds)}"


def _check_health(config: RunConfig, counts: Any, made: Tally) -> None:
    """Raises InputError if a shard is begun over and over, or too many rows are errors."""
    if counts.fruitless > MAX_DEATHS:
        words = f"; the last one said '{counts.last_death}'" if counts.last_death else ""
        raise InputError(
            f"{counts.fruitless} replicas died with shard {counts.hardest_shard}, and no row of it can be "
            f"blamed{words}: try fewer --slots, and look into the logs of Ray; what is finished is kept."
        )
    errors = sum(made.errors.values())
    limit = config.max_error_rate
    if limit is not None and made.rows >= MIN_ROWS and errors > limit * made.rows:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(made.errors.items()))
        raise InputError(
            f"{errors} of {made.rows} rows are errors ({kinds}), more than the --max-error-rate of {limit:g} "
            f"allows: correct the manifest and give a new output, or allow more; what is finished is kept."
        )
