"""Planning: manifest -> plan, in three passes, before any GPU time is spent."""

import numpy as np

from wallaroo.workflows.manifests.discover import discover
from wallaroo.workflows.manifests.types import Manifest
from wallaroo.workflows.plans.checks import open_plan, refuse_inside
from wallaroo.workflows.plans.growing import plan_new_rows
from wallaroo.workflows.plans.increments import unseen
from wallaroo.workflows.plans.plan import Plan
from wallaroo.workflows.plans.rounds import LostRace, RoundPlanner, nothing_to_plan
from wallaroo.workflows.plans.scanned import ScannedManifest
from wallaroo.workflows.plans.settings import PlanSettings
from wallaroo.workflows.storage.checkpoints import read_checkpoint


def make_plan(manifest: str, settings: PlanSettings, model: str, output: str | None = None) -> Plan:
    """Plans the rows of a manifest that are not planned yet. Ray must be connected.

    Planned rows are never planned again: a second call with the same arguments only reads the parts. A row
    that cannot be served is planned as an error row.

    Args:
        manifest: Local or `s3://` path.
        settings: What the plan depends on.
        model: Folder of the checkpoint, local or on S3.
        output: Folder of the run; None to count only and write nothing.

    Returns:
        The whole plan.

    Raises:
        InputError: The manifest cannot be read or has no rows, or the output has the plan of another
            manifest, another model or other settings.
        OptionError: The checkpoint lacks the size that the settings ask for.
    """
    checkpoint = read_checkpoint(model)
    settings.check(checkpoint.config)
    refuse_inside(manifest, output)
    found = discover(manifest, settings.task, settings.image_column)
    return extend_plan(open_plan(found, settings, checkpoint.digest, output), found, settings, model, output)


def is_complete(plan: Plan, found: Manifest, settings: PlanSettings) -> bool:
    """Tells whether a plan has all rows that are asked for, from the plan and the listing alone.

    Args:
        plan: The plan so far.
        found: The manifest.
        settings: What the plan depends on.

    Returns:
        False also where the rows must be read to know.
    """
    if settings.incremental:
        return bool(plan.rounds) and not unseen(found, plan.rounds, settings).files
    if not plan.complete or settings.where is not None:
        return False
    taken = np.logical_or.reduce([one.selected for one in plan.rounds])
    return bool(taken[: settings.limit].all())


def scan_early(plan: Plan, found: Manifest, settings: PlanSettings) -> ScannedManifest:
    """Scans a small manifest before Ray starts, so that a wrong column or condition is refused at once.

    Args:
        plan: The plan so far.
        found: The manifest.
        settings: What the plan depends on.

    Returns:
        The manifest for `extend_plan`, which scans a large one in Ray tasks.

    Raises:
        InputError: A file cannot be read, a column that the task needs is missing, or there is no row.
        OptionError: `where` does not fit the columns.
    """
    source = ScannedManifest(found, settings)
    if source.quick and not settings.incremental:
        source.check()
        if not source.rows and not plan.parts:
            raise nothing_to_plan(found.path, "has no rows")
    return source


def extend_plan(
    plan: Plan,
    found: Manifest,
    settings: PlanSettings,
    model: str,
    output: str | None = None,
    source: ScannedManifest | None = None,
) -> Plan:
    """Plans the rows that a plan from `open_plan` lacks. Ray must be connected.

    Args:
        plan: The plan so far.
        found: The manifest.
        settings: What the plan depends on.
        model: Folder of the checkpoint, local or on S3.
        output: Folder of the run; None to count only and write nothing.
        source: The manifest from `scan_early`; None to scan it here.

    Returns:
        The whole plan.

    Raises:
        InputError: As `make_plan`.
        OptionError: The settings are incremental, but there is no output.
    """
    if settings.incremental:
        return plan_new_rows(plan, found, settings, model, output)
    source = source or ScannedManifest(found, settings)
    while not is_complete(plan, found, settings):
        try:
            return RoundPlanner(source, model, output).extended(plan)
        except LostRace:
            # Another process made a part meanwhile, and its choice holds.
            plan = open_plan(found, settings, read_checkpoint(model).digest, output)
    return plan
