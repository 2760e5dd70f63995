"""What is left of a run: the shards that an output lacks, and those with error rows to retry."""

import functools
import logging
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import SUCCESS_FILE, shard_path, unreadable_path
from wallaroo.workflows.outputs.shards import map_shards
from wallaroo.workflows.plans.plan import Plan
from wallaroo.workflows.reports.summaries import Summaries
from wallaroo.workflows.reports.tally import Tally
from wallaroo.workflows.runs.stages import retriable_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Remaining:
    """The shards that a run has to make."""

    shards: list[int]
    """Numbers of the shards, ascending."""
    retried: frozenset[int]
    """Numbers of the finished ones among them, whose error rows are retried."""
    finished: Tally
    """Counts of the rows that stay."""
    summaries: Summaries
    """Summaries of the output, which take in what is written."""


def find_remaining(output: str, plan: Plan, retry_errors: bool = False) -> Remaining:
    """Compares the listing of `data/` with the plan. Opens only files that no summary covers.

    A file that cannot be read is moved aside, and its shard is made again.

    Args:
        output: Folder of the run, local or on S3.
        plan: The whole plan.
        retry_errors: Whether to retry error rows, except those that the plan refuses. If there are any,
            `_SUCCESS` is deleted, so that an interrupted run resumes and finishes again.

    Returns:
        What is left to make.
    """
    summaries = Summaries(output, plan.parts)
    finished, failed = Tally(details=None), []
    for part in plan.parts:
        tally = summaries.of_part(part, details=False)
        finished.add(tally)
        if retry_errors and tally.errors:
            shards = summaries.of_shards(part, whole=False)
            failed += [shard for shard, found in shards if found.tally.errors]
    for shard, words in sorted(summaries.unreadable.items()):
        _set_aside(output, shard, words)
    summaries.save()
    missing = list(summaries.missing())
    summaries.forget_listing()
    retried = []
    kinds_of_shards = map_shards(functools.partial(retriable_rows, output), failed)
    for shard, kinds in zip(failed, kinds_of_shards, strict=True):
        if kinds:
            retried.append(shard)
            finished.rows -= sum(kinds.values())
            finished.errors -= Counter(kinds)
    if retried:
        storage.delete(storage.join(output, SUCCESS_FILE))
    return Remaining(sorted(missing + retried), frozenset(retried), finished, summaries)


def _set_aside(output: str, shard: int, words: str) -> None:
    """Moves the damaged file of a shard out of `data/`, since other tools read all files of that folder."""
    path, target = shard_path(output, shard), unreadable_path(output, shard)
    # It may be deleted by now.
    with suppress(FileNotFoundError):
        storage.move(path, target)
        log.warning(
            f"{path} cannot be read ({words}): it was moved to {target}, and its shard is made again."
        )
