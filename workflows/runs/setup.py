"""What a run resolves once at its start: paths, model, meaning and plan. Also connects to Ray."""

import dataclasses
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from wallaroo.model import checkpoint
from wallaroo.workflows import storage
from wallaroo.workflows.cluster import connected, origin_of
from wallaroo.workflows.manifests.discover import discover
from wallaroo.workflows.outputs.layout import REPORT_FILE
from wallaroo.workflows.outputs.lock import OutputLock
from wallaroo.workflows.outputs.rows import RunConstants
from wallaroo.workflows.outputs.run_file import check_run, find_run, put_run
from wallaroo.workflows.outputs.schema import result_schema
from wallaroo.workflows.outputs.success import read_success
from wallaroo.workflows.outputs.values import digest
from wallaroo.workflows.plans.checks import refuse_inside
from wallaroo.workflows.plans.finished import finished
from wallaroo.workflows.plans.plan import Plan
from wallaroo.workflows.plans.planner import extend_plan, is_complete, make_plan, open_plan, scan_early
from wallaroo.workflows.plans.settings import PlanSettings
from wallaroo.workflows.progress import Progress, RunSummary
from wallaroo.workflows.runs.stages import StageContext
from wallaroo.workflows.settings import OPTIONS, RunConfig
from wallaroo.workflows.sources.references import SourceOptions
from wallaroo.workflows.stopping import Stop
from wallaroo.workflows.storage.checkpoints import Checkpoint, model_path, read_checkpoint
from wallaroo.workflows.storage.paths import absolute_path
from wallaroo.workflows.tasks import PRESETS

log = logging.getLogger(__name__)

MAX_LOOKED_AT = 1_000_000
"""Most rows of a plan that is repeated to show which of them are refused."""


@dataclass(frozen=True)
class Resolved:
    """Everything that a run has resolved at its start. Nothing is looked up twice."""

    config: RunConfig
    """The options, with absolute paths."""
    settings: PlanSettings
    """What the plan depends on."""
    checkpoint: Checkpoint
    """Configuration, tokenizer and digest of the model."""
    meaning: dict[str, Any]
    """What can change the meaning of a row, the model included: the fields of the config digest."""
    plan: Plan = field(default_factory=Plan)
    """All planned rows; without parts before `with_plan`, or if nothing is planned."""

    def context(self, carried: pa.Schema, environments: Iterable[str] = ()) -> StageContext:
        """Collects what the stages of the pipeline need to know.

        Args:
            carried: Schema of the carried columns.
            environments: The only environment digests that are allowed; empty for any.

        Returns:
            The context, which is sent to all tasks.
        """
        config = self.config
        options = {one.name for one in dataclasses.fields(RunConstants)} - {"model_digest", "config_digest"}
        return StageContext(
            config.model,
            RunConstants(
                **{name: getattr(config, name) for name in options},
                model_digest=self.checkpoint.digest,
                config_digest=digest(self.meaning),
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


def resolve(config: RunConfig, run: dict[str, Any] | None = None) -> Resolved:
    """Reads what a run needs of its model, and checks its options against it. Needs no Ray.

    A local checkpoint is checked as far as possible without reading its weights. One on S3 is checked by the
    replicas, since a driver need not hold the weights.

    Args:
        config: Options of the run. Relative paths start in the working directory.
        run: What `read_run` gives of the output; None if it has no `run.json` yet.

    Returns:
        The run, without its plan.

    Raises:
        InputError: The model is no checkpoint, or does not serve the task.
        OptionError: The checkpoint lacks the size that the options ask for.
    """
    config = with_absolute_paths(config)
    config = _as_new(config) if run is None else _as_begun(config, run["config"])
    found = read_checkpoint(config.model)
    found.config.require_task(config.task)
    if not storage.is_s3(config.model):
        checkpoint.check(config.model, config.task)
    settings = PlanSettings.of(config)
    settings.check(found.config)
    return Resolved(config, settings, found, config.config_digest_fields(found.digest))


def with_plan(
    resolved: Resolved,
    run: dict[str, Any] | None,
    stack: ExitStack,
    report: Callable[[Progress], None],
    stop: Stop | None = None,
) -> Resolved:
    """Adds the plan, and plans the rows that it lacks. Connects to Ray only for that.

    Args:
        resolved: From `resolve`.
        run: What `read_run` gives of the output; None if it has no `run.json` yet, which is then written.
        stack: Ends the connection to Ray when it is closed.
        report: Called when Ray starts and when planning does.
        stop: Listens to signals again after Ray has started, which takes them over.

    Returns:
        The run with its plan.

    Raises:
        InputError: The output is of another run, or the manifest cannot be planned.
    """
    config, settings = resolved.config, resolved.settings
    output, model_digest = config.output or None, resolved.checkpoint.digest
    if run is not None:
        check_run(config.output, run, resolved.meaning)
    refuse_inside(config.manifest, output)
    found = discover(config.manifest, config.task, config.image_column)
    plan = open_plan(found, settings, model_digest, output)
    if not is_complete(plan, found, settings):
        with storage.retries_enabled():
            source = scan_early(plan, found, settings)
        connect(config, stack, report, stop)
        report(Progress(waiting="planning"))
        plan = extend_plan(plan, found, settings, config.model, output, source)
        for warning in plan.warnings:
            log.warning(warning)
    if output and run is None:
        put_run(output, resolved.meaning, config.to_dict())
    return dataclasses.replace(resolved, plan=plan)


def plan(
    config: RunConfig,
    on_progress: Callable[[Progress], None] | None = None,
    look: Callable[[str, Plan], None] | None = None,
) -> Plan:
    """Plans a run and makes no rows. With an output, `run` continues with this plan.

    Args:
        config: Options of the run. If `output` is empty, nothing is written.
        on_progress: Called while Ray starts.
        look: Called with a folder of the plan and the plan, if any rows are refused. Without an output the
            rows are planned a second time for it, to a temporary folder of this machine. That is left out on
            a cluster, whose other machines lack the folder, and above MAX_LOOKED_AT rows.

    Returns:
        The whole plan.

    Raises:
        InputError: As `run` does.
        RunInProgress: Another run holds the output.
    """
    report = on_progress or (lambda progress: None)
    output = absolute_path(config.output) if config.output else ""
    run = find_run(output) if output else None
    with ExitStack() as stack:
        if output:
            stack.enter_context(OutputLock(output, "plan"))
        resolved = with_plan(resolve(config, run), run, stack, report)
        config, found = resolved.config, resolved.plan
        if look is not None and found.error_rows:
            if output:
                look(output, found)
            elif config.address is None and found.rows <= MAX_LOOKED_AT:
                report(Progress(waiting="listing the refused rows"))
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="wallaroo-plan-"))
                look(folder, make_plan(config.manifest, resolved.settings, config.model, folder))
        return found


def connect(
    config: RunConfig, stack: ExitStack, report: Callable[[Progress], None], stop: Stop | None = None
) -> None:
    """Connects to Ray until `stack` is closed. Does nothing if this process is connected.

    Args:
        config: Options of the run.
        stack: Ends the connection when it is closed.
        report: Called when Ray starts.
        stop: Listens to signals again after Ray has started, which takes them over.

    Raises:
        InputError: Ray cannot be reached or started.
    """
    # Not imported here: Ray reads some of what `connected` sets only then.
    if not ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
        where = "starting Ray"
        if config.address:
            where = f"connecting to Ray at {config.address} (from {origin_of(config.address)})"
        report(Progress(waiting=where))
    cpus = config.replicas[1] * config.threads if config.device != "cuda" else 0
    stack.enter_context(connected(config.address, cpus, config.ray_start_timeout))
    if stop is not None:
        stop.listen()


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Makes the paths of the options independent of the working directory."""
    return dataclasses.replace(
        config,
        manifest=absolute_path(config.manifest),
        output=absolute_path(config.output) if config.output else "",
        model=model_path(config.model),
        image_root=None if config.image_root is None else absolute_path(config.image_root),
    )


def _as_new(config: RunConfig) -> RunConfig:
    """Chooses the options that a new output keeps from then on, by `at_start` of their declaration."""
    values = {
        one.name: one.at_start(config)
        for one in OPTIONS.values()
        if one.at_start is not None and one.serves(config.task) and getattr(config, one.name) is None
    }
    return dataclasses.replace(config, **values)


def _as_begun(config: RunConfig, stored: Mapping[str, Any]) -> RunConfig:
    """Gives options the values with which an output began.

    Args:
        config: Options of this run.
        stored: Options of the output. It lacks those that are newer than it.

    Returns:
        The options, with `at_start` ones from the output, and newer ones by `before` of their declaration.
    """
    by_preset = PRESETS[config.preset].others if config.preset else {}
    values = {}
    for one in OPTIONS.values():
        value = getattr(config, one.name)
        if not one.serves(config.task):
            continue
        if one.name in stored:
            if one.at_start is not None and value is None:
                values[one.name] = stored[one.name]
        elif one.before is not None:
            if one.name in by_preset:
                values[one.name] = one.before
            elif value == one.before:
                # The digest of the output has no such key, so the value is absent here too.
                values[one.name] = None
    return dataclasses.replace(config, **values)


def is_finished(output: str, plan: Plan) -> bool:
    """Tells whether an output is finished, with the files that are written after the last row.

    Args:
        output: Folder of the run, local or on S3.
        plan: Its plan.

    Returns:
        True if nothing is left to do.
    """
    return finished(output, plan) is not None and storage.exists(storage.join(output, REPORT_FILE))


def summary_of(config: RunConfig, started: float, before: int, made: int) -> RunSummary:
    """Summarises a finished run for its caller.

    Args:
        config: Options of the run.
        started: When it was called, by `time.monotonic`.
        before: Rows that were finished then.
        made: Rows that were made ok since.

    Returns:
        Counts from `_SUCCESS`, and the time that the run took.
    """
    success = read_success(config.output)
    assert success is not None
    rows, ok = success["rows"], success["ok"]
    return RunSummary(config.output, rows, ok, rows - ok, before, made, time.monotonic() - started)
