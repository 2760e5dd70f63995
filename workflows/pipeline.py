"""The pipeline of all tasks: a manifest becomes a data set, shard by shard, on Ray Data.

    missing shards -> load (plan, prompts, sources) -> replica (tokens, pixels) -> encode -> write

`generate` is the task from text to image as a function; `workflows.edit` and `workflows.understand` have
those of the others.

One Ray row carries one whole shard, since Ray Data splits and joins blocks but never a row. What is
missing is what a listing of the output does not show; nothing else remembers what is done. Knows nothing
of how rows are planned, how a token is drawn or what a progress bar looks like.
"""

import dataclasses
import functools
import gc
import json
import logging
import math
import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from actors import metrics
from actors.replica import Replica
from actors.rows import from_ipc, outcomes, to_ipc
from model import checkpoint
from model.config import SLOTS
from model.errors import InputError, did_you_mean
from workflows import storage
from workflows.cluster import connected, reason
from workflows.dataset_plan import plan_dataset
from workflows.finish import SUCCESS_FILE, finish, read_success
from workflows.load import load_requests
from workflows.lock import OutputLock
from workflows.manifest import discover
from workflows.plan import Plan, read_shard
from workflows.plan_rows import PlanSettings
from workflows.planning import existing_plan, make_plan, read_checkpoint
from workflows.report import REPORT_FILE, write_report
from workflows.results import (
    RUN_FILE,
    TEXT_TASKS,
    Made,
    RunConstants,
    build_result_table,
    digest,
    environment,
    list_done,
    map_shards,
    open_shard,
    put_run,
    result_schema,
    write_shard,
)
from workflows.run_config import Progress, RunConfig, RunSummary
from workflows.runs import RunLog, duration
from workflows.sources import SourceOptions
from workflows.stopping import Stop

if TYPE_CHECKING:
    import ray.data

TICK_SECONDS = 0.5
"""How often a driver looks at its replicas while no shard arrives."""

END_SECONDS = 10.0
"""What a pipeline that is given up has to end by itself."""

MOST_DEATHS = 6
"""Replicas that may die with a shard and teach nothing; with more the run stops, or it would never end."""

LEAST_LOADS = 2
"""Shards whose sources are loaded at once, at least; each loads several sources at once."""

WRITERS = 2
"""Shards that are written at once, for each replica, at least; more where one holds more."""

LEAST_ROWS = 20
"""An error rate is not judged on fewer rows."""

log = logging.getLogger(__name__)


# Stages: functions of one Ray row, which is one shard. They run in processes of their own.


@dataclass(frozen=True)
class Job:
    """What the stages must know, wherever they run.

    model: folder of a checkpoint, local or on S3. run, schema: of the result rows. sources: what source
    pictures may be. environments: digests that alone are allowed where the run is strict; empty for any.
    """

    model: str
    run: RunConstants
    schema: pa.Schema
    sources: SourceOptions
    environments: frozenset[str] = frozenset()


def load(row: dict[str, Any], job: Job, output: str, again: frozenset[int] = frozenset()) -> dict[str, Any]:
    """`item`, the number of a planned shard, becomes `shard`, `plan` and `requests` of its replica.

    again: shards that are there, of which the plan gets the rows that are to be made once more.
    """
    storage.be_patient()
    shard = row["item"]

    def wanted() -> pa.Table:
        plan = read_shard(output, shard)
        return plan.filter(_to_retry(output, shard, plan)) if shard in again else plan

    plan = storage.patiently(output, wanted)
    return prepare({"shard": shard, "plan": to_ipc(plan)}, job)


def _to_retry(output: str, shard: int, plan: pa.Table) -> pa.Array:
    """Which planned rows of a shard that is there are errors, though the plan did not refuse them."""
    with open_shard(output, shard) as parquet:
        data = parquet.read(columns=["row_id", "status"])
    failed = data.filter(pc.equal(data.column("status"), "error")).column("row_id")
    planned = pc.not_equal(plan.column("status"), "error")
    return pc.and_(planned, pc.is_in(plan.column("row_id"), failed.combine_chunks()))


def prepare(row: dict[str, Any], job: Job) -> dict[str, Any]:
    """Adds `requests` to a `shard` with its `plan`, which is then as it is after loading.

    Also `retries`: how often a storage had to be asked again, which the later stages add to.
    """
    storage.be_patient()
    started = time.perf_counter()
    plan, asked = load_requests(from_ipc(row["plan"]), job.model, job.run, job.sources)
    metrics.count("wallaroo_fetch_seconds_total", time.perf_counter() - started, task=job.run.task)
    return {
        **row,
        "plan": to_ipc(plan),
        "requests": to_ipc(asked),
        "retries": storage.take_retries(),
    }


def encode(row: dict[str, Any], job: Job) -> dict[str, Any]:
    """What a replica gave back becomes `result`, the shard's rows as they will stand in the data set.

    It is empty where the replica left the shard to a later run.
    Raises InputError if the run is strict and the rows were made in another environment.
    """
    passed = {name: row[name] for name in ("shard", "retries")}
    if not row["outcomes"]:
        return passed | {"result": b""}
    storage.be_patient()
    started = time.perf_counter()
    where = digest(environment(**json.loads(row["environment"])))
    if job.environments and where not in job.environments:
        raise InputError(
            f"the run is strict, but {row['replica']} would round otherwise than what made the rows that are "
            f"there ({row['environment']}): run it on the same kind of machine, or without --strict."
        )
    made = Made(row["replica"], where, row["attempts"])
    decode = read_checkpoint(job.model).tokenizer.decode if job.run.task in TEXT_TASKS else None
    table = build_result_table(
        from_ipc(row["plan"]), outcomes(from_ipc(row["outcomes"])), job.run, made, job.schema, decode
    )
    metrics.count("wallaroo_encode_seconds_total", time.perf_counter() - started, task=job.run.task)
    return passed | {"result": to_ipc(table), "retries": row["retries"] + storage.take_retries()}


def write(
    row: dict[str, Any], output: str, again: frozenset[int] = frozenset(), watch: Any = None
) -> dict[str, Any]:
    """Writes a shard's file; what is left of it are counts for the driver, under `tally`.

    again: shards that are there, whose rows of the same numbers are replaced. watch: handle of the run's
    `actors.watch.Watch`, or None.
    """
    if not row["result"]:
        return {"shard": row["shard"], "tally": ""}
    storage.be_patient()
    table, shard = from_ipc(row["result"]), row["shard"]
    started = time.perf_counter()
    whole = table
    if shard in again:
        whole = storage.patiently(output, lambda: _merged(output, shard, table))
    size = write_shard(output, shard, whole)
    if watch is not None:
        watch.note_written.remote(shard)
    tally, task = _tally(table), table.column("task")[0].as_py()
    metrics.count("wallaroo_write_seconds_total", time.perf_counter() - started, task=task)
    metrics.count("wallaroo_written_bytes_total", size, task=task)
    metrics.count("wallaroo_rows_total", tally.rows, task=task)
    for kind, number in tally.errors.items():
        metrics.count("wallaroo_errors_total", number, task=task, kind=kind)
    tally.retries = row["retries"] + storage.take_retries()
    return {"shard": row["shard"], "tally": json.dumps(dataclasses.asdict(tally))}


def _merged(output: str, shard: int, rows: pa.Table) -> pa.Table:
    """A shard that is there, with these rows in place of those of the same numbers."""
    with open_shard(output, shard) as parquet:
        there = parquet.read()
    others = there.filter(pc.invert(pc.is_in(there.column("row_id"), rows.column("row_id").combine_chunks())))
    return pa.concat_tables([others, rows.cast(there.schema)]).sort_by("row_id")


def refuse(row: dict[str, Any], job: Job) -> dict[str, Any]:
    """In place of replica and `encode`: the rows of a shard that the plan refuses whole."""
    table = build_result_table(from_ipc(row["plan"]), [], job.run, Made(), job.schema)
    return {"shard": row["shard"], "retries": row["retries"], "result": to_ipc(table)}


@dataclass
class Tally:
    """Rows of a shard that is written: all, ok, those the plan had refused, errors by kind.

    environments: digests of what made them. retries: requests to a storage that were tried again for them.
    """

    rows: int = 0
    ok: int = 0
    refused: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    environments: list[str] = field(default_factory=list)
    retries: int = 0

    def add(self, other: "Tally") -> None:
        """Counts the rows of another shard in."""
        self.rows += other.rows
        self.ok += other.ok
        self.refused += other.refused
        self.errors = dict(Counter(self.errors) + Counter(other.errors))
        self.environments = sorted({*self.environments, *other.environments})
        self.retries += other.retries


def _tally(table: pa.Table) -> Tally:
    kinds = table.column("error_type").to_pylist()
    errors = Counter(kind for kind in kinds if kind)
    return Tally(
        rows=table.num_rows,
        ok=table.num_rows - errors.total(),
        # A row that no replica began was refused before.
        refused=table.column("started_at").null_count,
        errors=dict(errors),
        environments=sorted({name for name in table.column("environment_digest").to_pylist() if name}),
    )


def _retriable(output: str, shard: int) -> dict[str, int]:
    """How many rows of a shard that is there may be made once more, by the kind of their error."""
    plan = read_shard(output, shard)
    wanted = plan.filter(_to_retry(output, shard, plan)).column("row_id").combine_chunks()
    with open_shard(output, shard) as parquet:
        data = parquet.read(columns=["row_id", "error_type"])
    return Counter(data.filter(pc.is_in(data.column("row_id"), wanted)).column("error_type").to_pylist())


def _tally_of(output: str, shard: int) -> Tally:
    def read() -> Tally:
        with open_shard(output, shard) as parquet:
            return _tally(parquet.read(columns=["error_type", "started_at", "environment_digest"]))

    return storage.patiently(output, read)


# The pipeline


def make_job(
    config: RunConfig, meaning: dict[str, Any], carried: pa.Schema, environments: Iterable[str] = ()
) -> Job:
    """The job of a run whose `config_digest_fields` are `meaning`, with these carried columns."""
    return Job(
        config.model,
        RunConstants(
            task=config.task,
            model_digest=meaning["model_digest"],
            config_digest=digest(meaning),
            mode=config.mode,
            image_format=config.image_format,
            image_quality=config.image_quality,
            templates=dict(config.templates),
            restore_size=config.restore_size,
            max_new_tokens=config.max_new_tokens,
        ),
        result_schema(carried, config.save_tokens),
        SourceOptions(
            # All paths of a plan are absolute.
            "/",
            https=config.allow_https,
            most_bytes=config.max_source_bytes,
            most_pixels=config.max_source_pixels,
        ),
        frozenset(environments),
    )


@dataclass(frozen=True)
class Pool:
    """The replicas of a pipeline.

    device: `cpu` or `cuda`. size: how many at most. calls: shards that one holds at once. shards: that there
    are to make. options: of their engines. kind: their class; `actors.replica.Replica` describes it, and
    weights and threads.
    """

    device: str
    size: int
    calls: int
    shards: int
    threads: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    kind: type = Replica

    def tasks(self, most: int) -> "ray.data.TaskPoolStrategy":
        """Of a stage around the replicas; Ray Data warns of more tasks at once than there are shards."""
        from ray.data import TaskPoolStrategy

        return TaskPoolStrategy(size=min(most, self.shards))

    @property
    def cpus(self) -> float:
        """CPUs of the stages around the replicas, a task each.

        Where replicas hold the CPUs themselves the stages ask for none, or they would wait for ever.
        """
        return 0 if self.device == "cpu" else 1


def make_pool(config: RunConfig, device: str, rows: int, shards: int, kind: type = Replica) -> Pool:
    """The pool for so many rows in so many shards.

    A replica holds as many shards as fill its slots and one more; a larger backlog would only keep work
    from replicas that come up later.
    """
    slots = config.slots or SLOTS[device]
    calls = 1 + math.ceil(slots * shards / rows)
    options: dict[str, Any] = {"cfg_interval": config.cfg_interval}
    if config.slots is not None:
        options["slots"] = config.slots
    size = min(config.replicas[1], shards)
    return Pool(device, size, calls, shards, config.threads, options, config.weights, kind)


def load_stage(
    shards: "ray.data.Dataset", stage: Callable[..., dict[str, Any]], job: Job, pool: Pool
) -> "ray.data.Dataset":
    """Rows of shards become rows of `prepare`, by `stage`, a few at once: each is a process."""
    return shards.map(stage, num_cpus=pool.cpus, compute=pool.tasks(max(LEAST_LOADS, 2 * pool.size)))


def _fetch(model: str) -> Path:
    """The local folder of a checkpoint, in the process of a replica."""
    storage.be_patient()
    return storage.fetch_folder(model)


def make_results(shards: "ray.data.Dataset", job: Job, pool: Pool, watch: Any = None) -> "ray.data.Dataset":
    """Rows of `prepare` become rows of `encode`."""
    from ray.data import ActorPoolStrategy

    resources: dict[str, Any] = {"num_gpus": 1} if pool.device == "cuda" else {"num_cpus": pool.threads}
    made = shards.map(
        pool.kind,
        fn_constructor_kwargs={
            "checkpoint": functools.partial(_fetch, job.model),
            "task": job.run.task,
            "options": pool.options,
            "device": pool.device,
            "threads": pool.threads,
            "watch": watch,
            "weights": pool.weights,
        },
        compute=ActorPoolStrategy(
            size=pool.size,
            max_concurrent_calls_per_actor=pool.calls,
            max_tasks_in_flight_per_actor=pool.calls,
        ),
        **resources,
    )
    return made.map(functools.partial(encode, job=job), num_cpus=pool.cpus, compute=pool.tasks(2 * pool.size))


def generate(
    ds: "ray.data.Dataset", *, model: str = "tiny", replicas: int = 1, **options: Any
) -> "ray.data.Dataset":
    """A Dataset of prompts becomes one of pictures, without an output folder.

    ds: has the columns of a manifest. model: `tiny`, or the folder of a checkpoint. options: fields of
    `workflows.run_config.RunConfig` that say what a row is or what makes it: samples, seed, sampling,
    preset, width, height, language, templates, prompt_column, image_format, image_quality, save_tokens,
    max_prompt_tokens, cfg_interval, weights, slots, device, threads.

    Every row is planned before this returns, which executes `ds` once; the pictures are made when the
    answer is consumed. It has a row for every sample, with the columns of `data/`, the carried ones
    included: same ids and options, same pictures as of a run. Rows come in no certain order, with
    `row_id` counted in the order of `ds`. Rows that cannot be served are error rows, and so is every
    later row of an id that occurs twice.
    Raises InputError for an option that does not exist or breaks a rule, and where `prompt` is missing.
    """
    return map_dataset("generate", ds, model, replicas, options)


def map_dataset(
    task: str,
    ds: "ray.data.Dataset",
    model: str,
    replicas: int,
    options: dict[str, Any],
    replica: type = Replica,
) -> "ray.data.Dataset":
    """What `generate` does, for any task. replica: the class of the replicas."""
    import ray.data

    from actors import watch

    fields = {one.name for one in dataclasses.fields(RunConfig)}
    for name in options:
        if name not in fields - _OF_A_RUN:
            raise InputError(f"there is no option '{name}'{did_you_mean(name, fields - _OF_A_RUN) or '.'}")
    config = RunConfig(manifest="", output="", task=task, replicas=(replicas, replicas), **options)
    config = _absolute(dataclasses.replace(config, model=model))
    meaning = _meaning(config)
    plans, rows, carried = plan_dataset(ds, _plan_settings(config), config.model)
    job = make_job(config, meaning, carried)
    if not rows:
        return ray.data.from_arrow(job.schema.empty_table())
    pool = make_pool(config, choose_device(config.device), rows, plans.count(), replica)
    loaded = load_stage(plans, functools.partial(prepare, job=job), job, pool)
    return make_results(loaded, job, pool, watch.start()).map_batches(
        _unpack, batch_size=1, batch_format="pyarrow", num_cpus=pool.cpus
    )


_OF_A_RUN = {
    "manifest",
    "output",
    "task",
    "model",
    "replicas",
    "limit",
    "where",
    "incremental",
    "max_error_rate",
    "retry_errors",
    "grace",
    "deadline",
    "strict",
    "address",
    "price_per_hour",
}


def _unpack(batch: pa.Table) -> pa.Table:
    """The rows of the shards in a batch."""
    return pa.concat_tables(from_ipc(result.as_py()) for result in batch.column("result"))


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
    config = _absolute(config)
    stop = stop or Stop(config.grace, config.deadline)
    report = on_progress or (lambda progress: None)
    with ExitStack() as stack:
        lock = stack.enter_context(OutputLock(config.output, f"of process {os.getpid()}"))
        planned = _planned(config, stack, report, stop)
        if _finished(config.output, planned) and not config.retry_errors:
            return _summary(config, started, before=planned.rows)
        # The storage has answered, so that it is not its address that is wrong.
        stack.enter_context(storage.patience())
        _connect(config, stack, report, stop)
        device = choose_device(config.device)
        _check_gpus(config, device)
        storage.remove_leftovers(config.output)
        run_log = stack.enter_context(RunLog(config.output, config.to_dict()))
        with stop.patience():
            before = _make_missing(config, planned, device, replica, lock, run_log, report, stop)
        lock.check()
        finish(config.output, planned)
        run_log.end("finished")
        write_report(config.output)
    return _summary(config, started, before)


def plan(config: RunConfig, on_progress: Callable[[Progress], None] | None = None) -> Plan:
    """Plans a run and makes nothing. With an output, `run` goes on with this plan; where `output` is
    empty nothing is written.

    Raises as `run` does.
    """
    config = _absolute(config)
    with ExitStack() as stack:
        if config.output:
            stack.enter_context(OutputLock(config.output, f"of process {os.getpid()}"))
        return _planned(config, stack, on_progress or (lambda progress: None))


def _planned(
    config: RunConfig, stack: ExitStack, report: Callable[[Progress], None], stop: Stop | None = None
) -> Plan:
    """The plan of a run, made if need be; Ray is only connected for that."""
    meaning = _meaning(config)
    settings = _plan_settings(config)
    settings.check(read_checkpoint(config.model).config)
    if config.output and storage.exists(storage.join(config.output, RUN_FILE)):
        put_run(config.output, meaning, config.to_dict())
    found = None
    if config.output:
        found = existing_plan(config.manifest, settings, config.model, config.output)
    else:
        discover(config.manifest, config.task)  # tells in a moment that there is none
    if found is None:
        _connect(config, stack, report, stop)
        report(Progress(waiting="planning"))
        found = make_plan(config.manifest, settings, config.model, config.output or None)
        for warning in found.warnings:
            log.warning(warning)
    if config.output:
        put_run(config.output, meaning, config.to_dict())
    return found


def _connect(
    config: RunConfig, stack: ExitStack, report: Callable[[Progress], None], stop: Stop | None = None
) -> None:
    # Not imported here: Ray reads some of what `connected` sets only then.
    if not ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
        report(Progress(waiting="starting Ray"))
    cpus = config.replicas[1] * config.threads if config.device != "cuda" else 0
    stack.enter_context(connected(config.address, cpus))
    if stop is not None:
        stop.listen()


def _absolute(config: RunConfig) -> RunConfig:
    """With paths that hold good in a process with another working folder."""
    return dataclasses.replace(
        config,
        manifest=absolute_path(config.manifest),
        output=absolute_path(config.output) if config.output else "",
        model=model_path(config.model),
        image_root=None if config.image_root is None else absolute_path(config.image_root),
    )


def absolute_path(path: str) -> str:
    """A path that holds good in a process with another working folder."""
    return path if storage.is_s3(path) else os.path.abspath(path)


def model_path(model: str) -> str:
    """Where a checkpoint lies that may be named `tiny`."""
    return str(checkpoint.TINY) if model == "tiny" else absolute_path(model)


def _plan_settings(config: RunConfig) -> PlanSettings:
    names = {one.name for one in dataclasses.fields(PlanSettings)}
    return PlanSettings(**{name: getattr(config, name) for name in names})


def _meaning(config: RunConfig) -> dict[str, Any]:
    """What may change a row by meaning, the model among it.

    A local checkpoint is looked at as closely as can be without reading its weights; of one on S3 the
    replicas do so, since a driver need not hold the weights.
    """
    known = read_checkpoint(config.model)
    known.config.require_task(config.task)
    if not storage.is_s3(config.model):
        checkpoint.check(config.model, config.task)
    return config.config_digest_fields(known.digest)


def choose_device(device: str) -> str:
    """`cpu` or `cuda`: what was asked for, and for `auto` what the Ray cluster has now."""
    import ray

    if device != "auto":
        return device
    return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"


def _check_gpus(config: RunConfig, device: str) -> None:
    """Raises InputError if a local Ray lacks the GPUs of the fewest replicas; a cluster may yet get some."""
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    if device == "cuda" and config.address is None and gpus < config.replicas[0]:
        raise InputError(
            f"{config.replicas[0]} replicas need a GPU each, but this machine has {gpus}: ask for fewer, "
            f"choose the device cpu, or give the address of a cluster."
        )


def _finished(output: str, plan: Plan) -> bool:
    """Whether every row of a plan is known to be there, and the files that come after the last row too."""
    success = read_success(output)
    return (
        success is not None
        and success["parts"] == [part.name for part in plan.parts]
        and storage.exists(storage.join(output, REPORT_FILE))
    )


def _summary(config: RunConfig, started: float, before: int) -> RunSummary:
    success = read_success(config.output)
    assert success is not None
    rows, ok = success["rows"], success["ok"]
    return RunSummary(config.output, rows, ok, rows - ok, before, time.monotonic() - started)


def _make_missing(
    config: RunConfig,
    plan: Plan,
    device: str,
    replica: type,
    lock: OutputLock,
    run_log: RunLog,
    report: Callable[[Progress], None],
    stop: Stop,
) -> int:
    """Makes the rows that are not there, or are to be made again, and returns how many there were before."""
    import ray
    import ray.data

    from actors import watch
    from actors.watch import Limits

    done = list_done(config.output)
    there = [shard for shard in plan.shards if shard in done]
    missing = [shard for shard in plan.shards if shard not in done]
    known = Tally()
    failed, again = [], []
    tallies = map_shards(functools.partial(_tally_of, config.output), there)
    for shard, tally in zip(there, tallies, strict=True):
        known.add(tally)
        if tally.errors and config.retry_errors:
            failed.append(shard)
    retriable = map_shards(functools.partial(_retriable, config.output), failed)
    for shard, kinds in zip(failed, retriable, strict=True):
        if kinds:
            again.append(shard)
            known.rows -= sum(kinds.values())
            known.errors = dict(Counter(known.errors) - Counter(kinds))
    before = known.rows
    if not (missing or again):
        return before
    if again:
        # From now on it is not what was finished: a run that is cut off goes on, and finishes it anew.
        storage.delete(storage.join(config.output, SUCCESS_FILE))
    work, rewritten = sorted(missing + again), frozenset(again)
    meaning = _meaning(config)
    job = make_job(config, meaning, plan.carried, known.environments if config.strict else ())
    pool = make_pool(config, device, plan.rows, len(plan.shards), replica)
    # All at once: a node asked for after the other would come up after the other. None that gets no rows.
    pool = dataclasses.replace(pool, size=min(pool.size, len(work)), shards=len(work))
    writers = max(WRITERS, pool.calls) * pool.size
    budget = 1.0 if config.max_error_rate is None else config.max_error_rate
    eyes = watch.start(Limits(2 * pool.size + writers, budget, LEAST_ROWS, storage.PATIENCE_SECONDS))

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
    for row in _arriving(pipeline):
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
    return before


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
    if counts.fruitless > MOST_DEATHS:
        words = f"; the last one said '{counts.last_death}'" if counts.last_death else ""
        raise InputError(
            f"{counts.fruitless} replicas died with shard {counts.hardest_shard}, and no row of it can be "
            f"blamed{words}: try fewer --slots, and look into the logs of Ray; what is finished is kept."
        )
    errors = sum(made.errors.values())
    limit = config.max_error_rate
    if limit is not None and made.rows >= LEAST_ROWS and errors > limit * made.rows:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(made.errors.items()))
        raise InputError(
            f"{errors} of {made.rows} rows are errors ({kinds}), more than the --max-error-rate of {limit:g} "
            f"allows: correct the manifest and give a new output, or allow more; what is finished is kept."
        )


_OF_THREAD = threading.local()


class _EndsWhenGivenUp:
    """Ray Data's way to look in at each step of a pipeline: raises when nobody waits for it any more.

    A pipeline that waits for a machine, or for a replica to load its model, would not end otherwise. Ray Data
    makes one where it starts the pipeline, and sends the class about, so that it can hold no event itself.
    """

    def __init__(self) -> None:
        self._given_up: threading.Event | None = getattr(_OF_THREAD, "given_up", None)

    def on_execution_step(self, _: Any) -> None:
        if self._given_up is not None and self._given_up.is_set():
            raise _GivenUp

    def before_execution_starts(self, _: Any) -> None:
        """Nothing to do, like the two below."""

    def after_execution_succeeds(self, _: Any) -> None: ...

    def after_execution_fails(self, *_: Any) -> None: ...


class _GivenUp(Exception):
    """Nobody waits for the pipeline any more."""


def _arriving(pipeline: Callable[[], "ray.data.Dataset"]) -> Iterator[dict[str, Any] | None]:
    """The rows of a pipeline as they come, and None whenever none came for TICK_SECONDS.

    The pipeline goes on in a thread of its own, so that whoever looks on is never kept waiting.
    Raises what went wrong in it, out of Ray's wrappers.
    """
    arrived: queue.SimpleQueue[dict[str, Any] | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def consume() -> None:
        from ray.data import DataContext

        _OF_THREAD.given_up = stop
        callbacks: list[type] = DataContext.get_current().custom_execution_callback_classes
        if _EndsWhenGivenUp not in callbacks:
            callbacks.append(_EndsWhenGivenUp)
        try:
            # Fetching ahead holds a row back until the next one is there.
            blocks: Any = pipeline().iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
            for block in blocks:
                for row in block.to_pylist():
                    arrived.put(row)
                if stop.is_set():
                    break
            end = None
        except BaseException as error:
            # A traceback would keep the pipeline, and with it the replicas and what they hold.
            end = reason(error).with_traceback(None)
        gc.collect()
        arrived.put(end)

    thread = threading.Thread(target=consume, name="pipeline", daemon=True)
    thread.start()
    try:
        while True:
            try:
                found = arrived.get(timeout=TICK_SECONDS)
            except queue.Empty:
                yield None
                continue
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stop.set()
        # Ray must not end while it is still talked to: it would end this process too.
        thread.join(END_SECONDS)
