"""Checks before a manifest is planned into an output: the output is another folder, its plan fits the run."""

import os

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.types import Manifest
from wallaroo.workflows.outputs.layout import ERRORS_FILE
from wallaroo.workflows.plans.plan import Plan, Round, read_plan
from wallaroo.workflows.plans.settings import PlanSettings


def refuse_inside(manifest: str, output: str | None) -> None:
    """Refuses an output that lies in the manifest: the next run would read it as a part of the manifest.

    Args:
        manifest: Local or `s3://` path of the manifest.
        output: Folder of the run, local or on S3; None if nothing is written.

    Raises:
        InputError: The output lies in the manifest.
    """
    if output is None or storage.is_s3(manifest) != storage.is_s3(output):
        return
    ends = [path if storage.is_s3(path) else os.path.realpath(path) for path in (manifest, output)]
    folder, inner = (path.rstrip("/") + "/" for path in ends)
    if inner.startswith(folder):
        raise InputError(f"The output {output} is inside the manifest {manifest}: choose another folder.")


def open_plan(found: Manifest, settings: PlanSettings, model_digest: str, output: str | None) -> Plan:
    """Reads the valid parts of the plan of an output. Needs no Ray.

    Args:
        found: The manifest.
        settings: What the plan depends on.
        model_digest: Digest of the checkpoint, hexadecimal.
        output: Folder of the run; None for a plan without parts.

    Returns:
        The plan; without parts if there is none.

    Raises:
        InputError: The plan is of another manifest, another model or other settings.
    """
    plan = read_plan(output) if output else Plan()
    check_same(plan, found, settings, model_digest, output)
    return plan


def check_same(
    plan: Plan, manifest: Manifest, settings: PlanSettings, model_digest: str, output: str | None
) -> None:
    """Checks that a plan belongs to this manifest, model and these settings.

    Args:
        plan: The plan found in the output. One without rounds passes.
        manifest: The manifest of this run.
        settings: The settings of this run.
        model_digest: Digest of the checkpoint, hexadecimal.
        output: Folder of the run, local or on S3; None if nothing is written.

    Raises:
        InputError: One of them differs from what was planned. The message names it.
    """
    if not plan.rounds:
        return
    first = plan.rounds[0]
    planned = first.settings | first.settings["sampling"] | {"model_digest": first.model_digest}
    here = settings.meaning() | settings.meaning()["sampling"] | {"model_digest": model_digest}
    differing = [
        key for key in {**here, **planned} if key != "sampling" and planned.get(key) != here.get(key)
    ]
    if plan.incremental != settings.incremental:
        there_words, here_words = ("with", "without") if plan.incremental else ("without", "with")
        raise InputError(
            f"The plan in the output was made {there_words} --incremental, but this run is {here_words}: "
            f"use the same setting, or give a new output."
        )
    if differing:
        words = "; ".join(
            f"{key} is {planned.get(key)!r} in the plan and {here.get(key)!r} in this run"
            for key in differing
        )
        raise InputError(
            f"The plan belongs to another run: {words}; give another output, or the values of the plan."
        )
    if not plan.incremental:
        _check_files(first, manifest, settings.task, output)


def _check_files(first: Round, manifest: Manifest, task: str, output: str | None) -> None:
    """Checks that the files of a manifest are those of the first round of its plan."""
    old = {name: tuple(rest) for name, *rest in first.manifest}
    new = {name: tuple(rest) for name, *rest in manifest.identity()}
    changes = [
        f"{what}: {names[0]}" + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")
        for what, names in (
            ("missing", sorted(old.keys() - new.keys())),
            ("new", sorted(new.keys() - old.keys())),
            ("changed", sorted(name for name in old.keys() & new.keys() if old[name] != new[name])),
        )
        if names
    ]
    if not changes:
        return
    remedy = "restore it or give another output"
    errors = storage.join(output, ERRORS_FILE) if output else ""
    if errors and storage.exists(errors):
        remedy = (
            f"restore it, give another output, or retry the failed rows with "
            f"`wallaroo {task} {errors} NEW_OUTPUT`"
        )
    raise InputError(
        f"The manifest {manifest.path} is not the one that was planned ({'; '.join(changes)}): {remedy}."
    )
