"""What it means that an output is finished; whoever asks, asks here."""

from collections.abc import Mapping
from typing import Any

from wallaroo.workflows.outputs.success import read_success
from wallaroo.workflows.plans.plan import Plan, read_plan


def covers(success: Mapping[str, Any] | None, plan: Plan) -> bool:
    """Whether a `_SUCCESS` is of the whole of a plan, which must be complete.

    A plan grows: with --incremental by rounds, and when a run goes on without --limit. From its first new
    part on the output is unfinished again, and in the middle of planning it is not finished either.

    Args:
        success: What `read_success` gives.
        plan: What `read_plan` gives.
    """
    names = [part.name for part in plan.parts]
    return success is not None and plan.complete and success["parts"] == names


def finished(output: str, plan: Plan | None = None) -> dict[str, Any] | None:
    """What `_SUCCESS` says of an output that is finished: every row of its complete plan is in `data/`.

    Args:
        output: Its folder, local or on S3.
        plan: Its plan, which is read if it is not given.

    Returns:
        As `read_success` does; None if the output is not finished.

    Raises:
        InputError: `_SUCCESS` or the plan cannot be read.
    """
    success = read_success(output)
    if success is None:
        return None
    return success if covers(success, read_plan(output) if plan is None else plan) else None
