"""The one definition of a finished output."""

from collections.abc import Mapping
from typing import Any

from wallaroo.workflows.outputs.success import read_success
from wallaroo.workflows.plans.plan import Plan, read_plan


def covers(success: Mapping[str, Any] | None, plan: Plan) -> bool:
    """Tells whether `_SUCCESS` covers a complete plan.

    A plan can grow: with --incremental by rounds, and when a run resumes without --limit. From its first new
    part on, the output is unfinished again. It is also unfinished while planning is under way.

    Args:
        success: What `read_success` gives.
        plan: What `read_plan` gives.

    Returns:
        True if the plan is complete and `_SUCCESS` names exactly its parts.
    """
    names = [part.name for part in plan.parts]
    return success is not None and plan.complete and success["parts"] == names


def finished(output: str, plan: Plan | None = None) -> dict[str, Any] | None:
    """Reads `_SUCCESS` of a finished output: every row of its complete plan is in `data/`.

    Args:
        output: Folder of the run, local or on S3.
        plan: Its plan; read if None.

    Returns:
        What `read_success` gives; None if the output is not finished.

    Raises:
        InputError: `_SUCCESS` or the plan cannot be read.
    """
    success = read_success(output)
    if success is None:
        return None
    return success if covers(success, read_plan(output) if plan is None else plan) else None
