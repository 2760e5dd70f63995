"""What a run resolves before it starts: paths, device, meaning, plan."""

import dataclasses
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import pyarrow as pa

from wallaroo.model import checkpoint
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.cluster import connected
from wallaroo.workflows.manifests.discover import discover
from wallaroo.workflows.outputs.layout import REPORT_FILE
from wallaroo.workflows.outputs.lock import OutputLock
from wallaroo.workflows.outputs.rows import RunConstants
from wallaroo.workflows.outputs.run_file import check_run, find_run, put_run
from wallaroo.workflows.outputs.schema import result_schema
from wallaroo.workflows.outputs.success import read_success
from wallaroo.workflows.outputs.values import digest
from wallaroo.workflows.plans.plan import Plan
from wallaroo.workflows.plans.planner import existing_plan, make_plan
from wallaroo.workflows.plans.settings import PlanSettings
from wallaroo.workflows.runs.stages import Job
from wallaroo.workflows.settings import Progress, RunConfig, RunSummary
from wallaroo.workflows.sources.references import SourceOptions
from wallaroo.workflows.stopping import Stop
from wallaroo.workflows.storage.checkpoints import model_path, read_checkpoint
from wallaroo.workflows.storage.paths import absolute_path

log = logging.getLogger(__name__)

MAX_LOOKED_AT = 1_000_000
"""Rows of a plan that is made once more to show which of them are refused."""


def make_job(
    config: RunConfig, meaning: dict[str, Any], carried: pa.Schema, environments: Iterable[str] = ()
) -> Job:
    """The job of a run whose `config_digest_fields` are `meaning`, with these carried columns."""
    options = {one.name for one in dataclasses.fields(RunConstants)} - {"model_digest", "config_digest"}
    return Job(
        config.model,
        RunConstants(
            **{name: getattr(config, name) for name in options},
            model_digest=meaning["model_digest"],
            config_digest=digest(meaning),
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


def plan(
    config: RunConfig,
    on_progress: Callable[[Progress], None] | None = None,
    look: Callable[[str, Plan], None] | None = None,
) -> Plan:
    """Plans a run and makes nothing. With an output, `run` goes on with this plan; where `output` is
    empty nothing is written.

    Args:
        config: Of the run.
        on_progress: Called while Ray starts.
        look: Called with a folder that has the plan's rows, if any of them are refused. Without an output
            they are planned once more for it, into a folder of this machine that vanishes; not on a cluster,
            whose other machines lack that folder, and not above MAX_LOOKED_AT rows.

    Raises as `run` does.
    """
    config = with_absolute_paths(config)
    report = on_progress or (lambda progress: None)
    run = find_run(config.output) if config.output else None
    with ExitStack() as stack:
        if config.output:
            stack.enter_context(OutputLock(config.output, f"of process {os.getpid()}"))
        found = planned_run(config, run, stack, report)
        if look is not None and found.error_rows:
            if config.output:
                look(config.output, found)
            elif config.address is None and found.rows <= MAX_LOOKED_AT:
                report(Progress(waiting="looking at the rows that are refused"))
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="wallaroo-plan-"))
                look(folder, make_plan(config.manifest, PlanSettings.of(config), config.model, folder))
        return found


def planned_run(
    config: RunConfig,
    run: dict[str, Any] | None,
    stack: ExitStack,
    report: Callable[[Progress], None],
    stop: Stop | None = None,
) -> Plan:
    """The plan of a run, made if need be; Ray is only connected for that.

    run: what the output's `run.json` says, None if it has none yet.
    """
    meaning = meaning_of(config)
    settings = PlanSettings.of(config)
    settings.check(read_checkpoint(config.model).config)
    if run is not None:
        check_run(config.output, run, meaning)
    found = None
    if config.output:
        found = existing_plan(config.manifest, settings, config.model, config.output)
    else:
        discover(config.manifest, config.task, config.image_column)  # tells in a moment that there is none
    if found is None:
        connect(config, stack, report, stop)
        report(Progress(waiting="planning"))
        found = make_plan(config.manifest, settings, config.model, config.output or None)
        for warning in found.warnings:
            log.warning(warning)
    if config.output and run is None:
        put_run(config.output, meaning, config.to_dict())
    return found


def connect(
    config: RunConfig, stack: ExitStack, report: Callable[[Progress], None], stop: Stop | None = None
) -> None:
    # Not imported here: Ray reads some of what `connected` sets only then.
    if not ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
        where = f"connecting to Ray at {config.address}" if config.address else "starting Ray"
        report(Progress(waiting=where))
    cpus = config.replicas[1] * config.threads if config.device != "cuda" else 0
    stack.enter_context(connected(config.address, cpus, config.ray_start_timeout))
    if stop is not None:
        stop.listen()


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """With paths that hold good in a process with another working folder."""
    return dataclasses.replace(
        config,
        manifest=absolute_path(config.manifest),
        output=absolute_path(config.output) if config.output else "",
        model=model_path(config.model),
        image_root=None if config.image_root is None else absolute_path(config.image_root),
    )


def meaning_of(config: RunConfig) -> dict[str, Any]:
    """What may change a row by meaning, the model among it.

    A local checkpoint is looked at as closely as can be without reading its weights; of one on S3 the
    replicas do so, since a driver need not hold the weights.
    """
    known = read_checkpoint(config.model)
    known.config.require_task(config.task)
    if not storage.is_s3(config.model):
        checkpoint.check(config.model, config.task)
    return config.config_digest_fields(known.digest)


def check_gpus(config: RunConfig, gpus: int) -> None:
    """Tells what to do about GPUs that are not there.

    Args:
        config: Of a run on GPUs.
        gpus: How many Ray has now.

    Raises:
        InputError: A local Ray lacks the GPUs of the fewest replicas. A cluster may yet get some, so that
            there is only a warning.
    """
    if config.address is None and gpus < config.replicas[0]:
        raise InputError(
            f"{config.replicas[0]} replicas need a GPU each, but this machine has {gpus}: ask for fewer, "
            f"choose the device cpu, or give the address of a cluster."
        )
    if gpus == 0:
        log.warning(
            f"The cluster at {config.address} has no GPU now, so the run waits for one. If no autoscaler "
            f"adds a node with GPUs, start one, or stop this run and give --device cpu."
        )


def is_finished(output: str, plan: Plan) -> bool:
    """Whether every row of a plan is known to be there, and the files that come after the last row too."""
    success = read_success(output)
    return (
        success is not None
        and success["parts"] == [part.name for part in plan.parts]
        and storage.exists(storage.join(output, REPORT_FILE))
    )


def summary_of(config: RunConfig, started: float, before: int, made: int) -> RunSummary:
    success = read_success(config.output)
    assert success is not None
    rows, ok = success["rows"], success["ok"]
    return RunSummary(config.output, rows, ok, rows - ok, before, made, time.monotonic() - started)
