"""What is left of a run: the shards that an output lacks, and those with error rows to retry."""

import functools
from collections import Counter
from dataclasses import dataclass

from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import SUCCESS_FILE, list_done
from wallaroo.workflows.outputs.shards import map_shards
from wallaroo.workflows.plans.plan import Plan
from wallaroo.workflows.runs.stages import Tally, retriable_rows, tally_of


@dataclass(frozen=True)
class Remaining:
    """The shards that a run has to make.

    Attributes:
        shards: Their numbers, ascending.
        retried: Those among them that are finished but for error rows to retry.
        finished: Counts of the rows that stay as they are.
    """

    shards: list[int]
    retried: frozenset[int]
    finished: Tally


def find_remaining(output: str, plan: Plan, retry_errors: bool = False) -> Remaining:
    """Compares the listing of `data/` with the plan.

    Args:
        output: Folder of the run.
        plan: The whole plan.
        retry_errors: Whether error rows that the plan did not refuse are to be made once more. `_SUCCESS`
            is deleted if there are any, so that an interrupted run resumes and finishes anew.

    Returns:
        What is left to make.
    """
    done = list_done(output)
    finished_shards = [shard for shard in plan.shards if shard in done]
    missing = [shard for shard in plan.shards if shard not in done]
    finished, failed = Tally(), []
    tallies = map_shards(functools.partial(tally_of, output), finished_shards)
    for shard, tally in zip(finished_shards, tallies, strict=True):
        finished.add(tally)
        if tally.errors and retry_errors:
            failed.append(shard)
    retried = []
    kinds_of_shards = map_shards(functools.partial(retriable_rows, output), failed)
    for shard, kinds in zip(failed, kinds_of_shards, strict=True):
        if kinds:
            retried.append(shard)
            finished.rows -= sum(kinds.values())
            finished.errors = dict(Counter(finished.errors) - Counter(kinds))
    if retried:
        storage.delete(storage.join(output, SUCCESS_FILE))
    return Remaining(sorted(missing + retried), frozenset(retried), finished)
