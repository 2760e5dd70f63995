"""The end of a run: counts every row, then writes `errors.jsonl`, `README.md` and `_SUCCESS`."""

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import ERRORS_FILE, PLAN_FOLDER, SUCCESS_FILE, shard_name, shard_path
from wallaroo.workflows.outputs.schema import FORMAT
from wallaroo.workflows.outputs.success import RowTotals
from wallaroo.workflows.plans.columns import GIVEN
from wallaroo.workflows.reports.card import write_card
from wallaroo.workflows.reports.error_lines import ErrorLines
from wallaroo.workflows.reports.planned import planned_shards
from wallaroo.workflows.reports.summaries import Summaries
from wallaroo.workflows.reports.tally import Details, Tally

if TYPE_CHECKING:
    from wallaroo.workflows.plans.plan import Plan, PlanPart


def finish(output: str, plan: "Plan") -> RowTotals:
    """Checks that every planned shard exists with all its rows; writes errors, card and `_SUCCESS`.

    Shards that a summary covers are not opened. Of the others the footer is read, and columns where the
    footer does not say what is in them.

    Args:
        output: Folder of the run.
        plan: The whole plan.

    Returns:
        What the rows add up to.

    Raises:
        InputError: A shard is missing or its rows do not add up; none of the files is written.
    """
    summaries = Summaries(output, plan.parts)
    missing = list(itertools.islice(summaries.missing(), 1))
    if missing:
        count = sum(1 for _ in summaries.missing())
        raise InputError(
            f"{output} lacks {count} of its shards, the first is {shard_name(missing[0])}: "
            f"re-run its command to resume."
        )
    total = Tally()
    with tempfile.TemporaryFile() as lines:
        writer = ErrorLines(lines)
        for part in plan.parts:
            found = summaries.of_part(part)
            _check_readable(summaries)
            if found.rows != part.rows:
                raise InputError(
                    f"the data of {part.name} in {output} has {found.rows} rows, but {part.rows} "
                    f"were planned: `wallaroo verify {output}` names the files at fault; move them "
                    f"elsewhere and re-run its command."
                )
            total.add(found)
            for row in _error_rows(summaries, part) if found.errors else ():
                writer.add(row)
            _check_readable(summaries)
        writer.flush()
        lines.seek(0)
        with storage.write_stream(storage.join(output, ERRORS_FILE)) as stream:
            shutil.copyfileobj(lines, stream)
    summaries.save()
    details = total.details or Details()
    counts = RowTotals(
        total.rows, total.ok, dict(total.errors), details.sizes, details.languages, details.folders
    )
    write_card(output, plan, counts)
    document = {
        "format": FORMAT,
        "rows": counts.rows,
        "ok": counts.ok,
        "errors": dict(sorted(counts.errors.items())),
        "shards": len(plan.shards),
        "parts": [part.name for part in plan.parts],
    }
    storage.write_atomic(storage.join(output, SUCCESS_FILE), json.dumps(document, indent=2).encode() + b"\n")
    return counts


def _error_rows(summaries: Summaries, part: "PlanPart") -> Iterator[dict[str, Any]]:
    """The error rows of a part for `ErrorLines`, with what the plan kept of those that it refused."""
    failed = {}
    refused = []
    for shard, found in summaries.of_shards(part):
        if found.failed:
            failed[shard] = found.failed
        if found.tally.refused and part.error_rows:
            refused.append(shard)
    given: dict[int, str] = {}
    if refused:
        file = storage.info(storage.join(summaries.output, PLAN_FOLDER, part.file))
        stamp, names = file.stamp if file else None, ["row_id", GIVEN]
        for _, table in planned_shards(summaries.output, part, stamp, refused, names):
            if GIVEN in table.column_names:
                pairs = zip(*(table.column(name).to_pylist() for name in names), strict=True)
                given |= {row_id: text for row_id, text in pairs if text is not None}
    for rows in failed.values():
        for row in rows:
            yield row | {GIVEN: given.get(row["row_id"])}


def _check_readable(summaries: Summaries) -> None:
    for shard, words in summaries.unreadable.items():
        raise InputError(
            f"{shard_path(summaries.output, shard)} cannot be read ({words}): "
            f"move it elsewhere and re-run its command."
        )
