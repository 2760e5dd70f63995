"""Rows that a plan refuses: the first of each kind, and all of them as a manifest."""

import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import PLAN_FOLDER
from wallaroo.workflows.outputs.values import json_line
from wallaroo.workflows.plans.columns import GIVEN
from wallaroo.workflows.plans.plan import Plan
from wallaroo.workflows.reports.error_lines import as_given, manifest_row
from wallaroo.workflows.reports.planned import planned_shards

EXAMPLES = 3
"""Of each kind of error."""


class Refused(NamedTuple):
    """A manifest row that a plan refuses."""

    id: str
    """Its id."""
    number: int
    """Its place in the manifest, from 0, with files in the order of their names."""
    kind: str
    """Kind of the error."""
    message: str
    """What is wrong, in a sentence."""
    samples: int
    """How many error rows it gives."""
    line: dict[str, Any]
    """The row as a line of a manifest, with `kind` and `message`."""

    def text(self) -> str:
        """The row as a line for people."""
        return f"row {self.number:,}, id {self.id:.80}: {self.message}"


def refused_rows(output: str, plan: Plan, task: str) -> Iterator[Refused]:
    """Reads the rows that a plan refuses, in order; one shard of the plan is in memory at a time.

    Args:
        output: Where the plan is written, local or on S3.
        plan: What `read_plan(output)` gives.
        task: That of the plan.

    Yields:
        The rows.

    Raises:
        InputError: A file of the plan is absent or corrupt.
    """
    stamps = storage.list_stamps(storage.join(output, PLAN_FOLDER), str)
    places: dict[int, int] = {}
    last: Refused | None = None
    for part in plan.parts:
        numbers = np.flatnonzero(plan.rounds[part.round].selected)
        shards = range(part.first_shard, part.end)
        for _, table in planned_shards(output, part, stamps.get(part.file), shards):
            samples = table.column("sample").to_numpy()
            # The rows of a manifest row begin with its sample 0.
            place = places.get(part.round, -1) + np.cumsum(samples == 0)
            places[part.round] = int(place[-1])
            for index in np.flatnonzero(table.column("status").to_numpy(zero_copy_only=False) == "error"):
                [row] = table.slice(index, 1).to_pylist()
                number = int(numbers[place[index]])
                if last is not None and (last.id, last.number) == (row["id"], number):
                    last = last._replace(samples=last.samples + 1)
                    if not row.get(GIVEN):
                        last.line["samples"] = last.samples
                    continue
                if last is not None:
                    yield last
                line = manifest_row({"task": task, "source": None, **row}, table.schema)
                line = as_given(line, row.get(GIVEN))
                if not row.get(GIVEN):
                    line["samples"] = 1
                last = Refused(row["id"], number, row["error_type"], row["error_message"], 1, line)
    if last is not None:
        yield last


def first_of_each_kind(rows: Iterator[Refused], path: str | None = None) -> dict[str, list[Refused]]:
    """The first EXAMPLES rows of each kind; with a path all rows are also written there.

    Args:
        rows: What `refused_rows` gives.
        path: A file for JSON lines, local or on S3. Each line is the row as it is in `errors.jsonl`, and
            `row`, its place in the manifest.

    Returns:
        Kind -> rows.
    """
    found: dict[str, list[Refused]] = {}
    with tempfile.TemporaryFile() as file:
        for row in rows:
            examples = found.setdefault(row.kind, [])
            if len(examples) < EXAMPLES:
                examples.append(row)
            if path is not None:
                file.write(json_line({**row.line, "row": row.line.get("row", row.number)}))
        if path is not None:
            file.seek(0)
            with storage.write_stream(path) as stream:
                shutil.copyfileobj(file, stream)
    return found
