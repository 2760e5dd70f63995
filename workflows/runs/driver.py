"""The driver of a run: makes the missing shards of an output, and finishes it."""

import dataclasses
import functools
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any

from wallaroo.actors.replica import Replica
from wallaroo.workflows import storage
from wallaroo.workflows.cluster import check_gpus, choose_device
from wallaroo.workflows.outputs.lock import OutputLock
from wallaroo.workflows.outputs.run_file import find_run
from wallaroo.workflows.outputs.run_log import RunLog
from wallaroo.workflows.progress import Progress, RunSummary
from wallaroo.workflows.reports.finish import finish
from wallaroo.workflows.reports.page import write_report
from wallaroo.workflows.runs.feed import shard_stream
from wallaroo.workflows.runs.monitor import MIN_ROWS, Monitor
from wallaroo.workflows.runs.pool import Pool, load_stage, make_pool, make_results
from wallaroo.workflows.runs.resume import Remaining, find_remaining
from wallaroo.workflows.runs.setup import (
    Resolved,
    connect,
    is_finished,
    resolve,
    summary_of,
    with_plan,
)
from wallaroo.workflows.runs.stages import encode_and_write, load, refuse_and_write, write
from wallaroo.workflows.runs.streaming import arriving
from wallaroo.workflows.settings import RunConfig
from wallaroo.workflows.stopping import Stop
from wallaroo.workflows.storage import retries
from wallaroo.workflows.storage.paths import absolute_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    import ray.data


def run(
    config: RunConfig,
    on_progress: Callable[[Progress], None] | None = None,
    replica: type = Replica,
    stop: Stop | None = None,
) -> RunSummary:
    """Does a run, or resumes it, and returns when all of its rows are in the output.

    Args:
        config: Options of the run.
        on_progress: Called about twice a second.
        replica: Class of the replicas.
        stop: Lets the caller stop the run. Without it only the deadline of the options does.

    Returns:
        Counts of the finished run.

    Raises:
        InputError: The user can fix the cause. The output keeps what is finished, and the same run resumes.
        RunStopped: The run was stopped on purpose.
        RunInProgress: Another run holds the output.
    """
    started = time.monotonic()
    storage.take_retries()  # those of an earlier run in this process
    output = absolute_path(config.output)
    stop = stop or Stop(config.grace, config.deadline)
    report = on_progress or (lambda progress: None)
    earlier = find_run(output)
    with ExitStack() as stack:
        lock = stack.enter_context(OutputLock(output, config.task))
        resolved = with_plan(resolve(config, earlier), earlier, stack, report, stop)
        config, plan = resolved.config, resolved.plan
        if is_finished(output, plan) and not config.retry_errors:
            return summary_of(config, started, before=plan.rows, made=0)
        # The storage has answered, so its address is right.
        stack.enter_context(storage.retries_enabled())
        connect(config, stack, report, stop)
        device = choose_device(config.device)
        if device == "cuda":
            import ray

            gpus = int(ray.cluster_resources().get("GPU", 0))
            check_gpus(config.address, config.replicas[0], gpus)
        storage.remove_leftovers(output)
        run_log = stack.enter_context(RunLog(output, config.to_dict()))
        made = 0
        with stop.deferred():
            remaining = find_remaining(output, plan, config.retry_errors)
            if remaining.shards:
                pool = _pool_of(resolved, remaining, device, replica)
                monitor = Monitor(resolved, remaining, pool, lock, run_log, report, stop)
                with remaining.summaries.saved():
                    made = _make_shards(resolved, remaining, pool, monitor)
        lock.check()
        finish(output, plan)
        run_log.end("finished")
        # Summary and record report the same time, without the start of Ray.
        started = time.monotonic() - run_log.record.seconds
        write_report(output, plan=plan)
    return summary_of(config, started, remaining.finished.rows, made)


def _pool_of(resolved: Resolved, remaining: Remaining, device: str, replica: type) -> Pool:
    """Sizes the pool for the remaining shards.

    All replicas are requested at once, since nodes that are requested one after the other start one after the
    other.
    """
    plan = resolved.plan
    pool = make_pool(resolved.config, device, plan.rows, len(plan.shards), replica)
    shards = len(remaining.shards)
    return dataclasses.replace(pool, size=min(pool.size, shards), shards=shards)


def _make_shards(resolved: Resolved, remaining: Remaining, pool: Pool, monitor: Monitor) -> int:
    """Makes the remaining shards. Returns how many of their rows are ok."""
    with _watch(resolved.config, pool) as watch:
        pipeline = functools.partial(_pipeline, resolved, remaining, pool, watch)
        with closing(arriving(pipeline)) as arrivals:
            return monitor.follow(arrivals, watch)


@contextmanager
def _watch(config: RunConfig, pool: Pool) -> "Iterator[Any]":
    """Starts the watch of a run. It ends with the block, and ends tasks that still ask it for shards."""
    import ray

    from wallaroo.actors import watch
    from wallaroo.actors.watch import Limits

    budget = 1.0 if config.max_error_rate is None else config.max_error_rate
    handle = watch.start(Limits(pool.unwritten, budget, MIN_ROWS, retries.RETRY_SECONDS))
    try:
        yield handle
    finally:
        ray.kill(handle)


def _pipeline(resolved: Resolved, remaining: Remaining, pool: Pool, watch: Any) -> "ray.data.Dataset":
    """Builds the pipeline from numbers of shards to written shards, a row of `write` each."""
    plan, output = resolved.plan, resolved.config.output
    context = resolved.context(
        plan.carried, remaining.finished.environments if resolved.config.strict else ()
    )
    shards = shard_stream(plan, remaining.shards, watch)
    stage = functools.partial(load, context=context, output=output, retried=remaining.retried)
    loaded = load_stage(shards, stage, context, pool)
    last = functools.partial(write, output=output, retried=remaining.retried, watch=watch)
    if plan.error_rows == plan.rows:
        stage = functools.partial(refuse_and_write, context=context, write=last)
        return loaded.map(stage, num_cpus=pool.cpus, compute=pool.tasks(pool.writers))
    stage = functools.partial(encode_and_write, context=context, write=last)
    return make_results(loaded, stage, context, pool, watch)
