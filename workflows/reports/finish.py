"""The end of a run: every row is counted, then `errors.jsonl`, `README.md` and `_SUCCESS` are written."""

import itertools
import json
import shutil
import tempfile
from typing import TYPE_CHECKING

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import ERRORS_FILE, SUCCESS_FILE, shard_name, shard_path
from wallaroo.workflows.outputs.schema import FORMAT
from wallaroo.workflows.outputs.success import RowTotals
from wallaroo.workflows.reports.card import write_card
from wallaroo.workflows.reports.error_lines import ErrorLines
from wallaroo.workflows.reports.summaries import Summaries
from wallaroo.workflows.reports.tally import Details, Tally

if TYPE_CHECKING:
    from wallaroo.workflows.plans.plan import Plan


def finish(output: str, plan: "Plan") -> RowTotals:
    """Checks that every planned shard is there with all its rows; writes errors, card and `_SUCCESS`.

    Shards that a summary covers are not opened. Of the others the footer is read, and columns where the
    footer does not say what is in them.

    Args:
        output: Folder of the run.
        plan: The whole plan.

    Raises:
        InputError: A shard is missing or its rows do not add up; none of the files is written.
    """
    summaries = Summaries(output, plan.parts)
    missing = list(itertools.islice(summaries.missing(), 1))
    if missing:
        count = sum(1 for _ in summaries.missing())
        raise InputError(
            f"{output} lacks {count} of its shards, the first is {shard_name(missing[0])}: "
            f"start the run again, it makes what is missing."
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
                    f"elsewhere and start the run again."
                )
            total.add(found)
            for _, shard in summaries.of_shards(part) if found.errors else ():
                for row in shard.failed or ():
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


def _check_readable(summaries: Summaries) -> None:
    for shard, words in summaries.unreadable.items():
        raise InputError(
            f"{shard_path(summaries.output, shard)} cannot be read ({words}): "
            f"move it elsewhere and start the run again."
        )
