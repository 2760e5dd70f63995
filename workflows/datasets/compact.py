"""Compaction: merges the many small shards that incremental runs leave behind.

1. The merged shards are written, under numbers that no plan has used.
2. The JSON of the last part is replaced, unless another process did so, by one that stands for all parts.
   From then on the merged shards are the plan.
3. The old files are removed.

An interruption leaves either the old output or the new one; the next `compact` removes files of the other.
Knows nothing of Ray.
"""

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.datasets.progress import Phase, Report, silent
from wallaroo.workflows.outputs.layout import (
    PLAN_FOLDER,
    is_plan_file,
    list_shards,
    part_rows_name,
    shard_name,
    shard_path,
)
from wallaroo.workflows.outputs.lock import OutputLock
from wallaroo.workflows.outputs.run_file import read_run
from wallaroo.workflows.outputs.schema import TEXT_TASKS
from wallaroo.workflows.outputs.shards import map_shards, open_shard, read_shard, write_shard
from wallaroo.workflows.outputs.success import read_success
from wallaroo.workflows.plans.columns import with_given
from wallaroo.workflows.plans.increments import read_planned, write_planned
from wallaroo.workflows.plans.layout import SHARD_ROWS, SHARD_TEXTS, write_planned_shards
from wallaroo.workflows.plans.plan import FORMAT, Plan, PlanPart, Round, read_plan
from wallaroo.workflows.reports.finish import finish
from wallaroo.workflows.reports.page import write_report
from wallaroo.workflows.reports.planned import planned_shards
from wallaroo.workflows.reports.tally import tally_of_table
from wallaroo.workflows.text import first_line

MAX_BYTES = 256 << 20
"""Most bytes of a merged shard, which is held in memory."""
READERS = 8
"""Shards that are read at once, all for one merged shard."""

NUMBERS = 1_000_000
"""Merged shards are numbered from a multiple of this, so that no increment reuses numbers of an interrupted
compaction."""


@dataclass(frozen=True)
class Compacted:
    """The result of `compact`."""

    before: int
    """Shards before the merge."""
    after: int
    """Shards after the merge; equal to `before` if nothing could be merged."""


def compact(output: str, on_progress: Report = silent) -> Compacted:
    """Merges the shards of a finished incremental output. Rows, ids and row_ids stay as they are.

    Holds one merged shard in memory.

    Args:
        output: The folder of the run, local or `s3://`.
        on_progress: Called about twice a second.

    Returns:
        The number of shards before and after.

    Raises:
        InputError: The output is not incremental or not finished, or another process changed its plan.
        RunInProgress: An active run holds the output.
    """
    task = read_run(output)["config"]["task"]
    with OutputLock(output, "compact") as lock:
        plan = read_plan(output)
        if not plan.incremental:
            raise InputError(f"{output} was made without --incremental, so there is nothing to compact.")
        success = read_success(output)
        names = [part.name for part in plan.parts]
        if success is None or success["parts"][-1] != names[-1]:
            raise InputError(f"{output} is not finished: re-run its command to resume, then compact it.")
        _remove_others(output, plan)
        if success["parts"] != names:
            finish(output, plan)  # an earlier try was cut off after its plan had become the plan
        sizes = {shard: storage.stamp_size(stamp) for shard, stamp in list_shards(output).items()}
        groups = list(_groups(output, plan, sizes, SHARD_TEXTS if task in TEXT_TASKS else SHARD_ROWS[1]))
        if len(groups) == len(plan.shards):
            return Compacted(len(groups), len(groups))
        first = (plan.shards.stop // NUMBERS + 1) * NUMBERS
        phase = Phase(on_progress, "merging", plan.rows)
        for shard, group in enumerate(groups, first):
            lock.check()
            table = _merged(output, group, sizes, shard)
            write_shard(output, shard, table, tally_of_table(table, shard).to_json())
            phase.count(len(table))
        lock.check()
        _replace_plan(output, plan, groups, first)
        merged = read_plan(output)
        finish(output, merged)
        _remove_others(output, merged)
        write_report(output)
        return Compacted(len(plan.shards), len(groups))


def _groups(output: str, plan: Plan, sizes: dict[int, int], most_rows: int) -> Iterator[list[int]]:
    """Groups consecutive shards that become one, by rows and bytes. Opens no file of `data/`."""
    group: list[int] = []
    rows = size = 0
    counts = itertools.chain.from_iterable(_rows_of_shards(output, part) for part in plan.parts)
    for shard, more in zip(plan.shards, counts, strict=True):
        if shard not in sizes:
            raise InputError(
                f"{output} lacks {shard_name(shard)}: re-run its command to resume, then compact it."
            )
        bytes_more = sizes[shard]
        if group and (rows + more > most_rows or size + bytes_more > MAX_BYTES):
            yield group
            group, rows, size = [], 0, 0
        group.append(shard)
        rows, size = rows + more, size + bytes_more
    yield group


def _rows_of_shards(output: str, part: PlanPart) -> Iterator[int]:
    """Rows of each shard of a part. Those of merged shards vary, so that its file says them."""
    if not part.compacted:
        for shard in range(part.shards):
            yield min(part.shard_rows, part.rows - shard * part.shard_rows)
        return
    path = storage.join(output, PLAN_FOLDER, part.file)
    filesystem, inner = storage.parquet_filesystem(path)
    with storage.explained(path):
        metadata = pq.read_metadata(inner, filesystem=filesystem)
    for group in range(metadata.num_row_groups):
        yield metadata.row_group(group).num_rows


def _merged(output: str, group: list[int], sizes: dict[int, int], shard: int) -> pa.Table:
    """The rows of a group of shards under the number of the merged one; several shards are read at once."""

    def read(one: int) -> pa.Table:
        try:
            with open_shard(output, one, size=sizes[one]) as parquet:
                return _numbered(read_shard(parquet), shard)
        except (pa.ArrowException, OSError) as error:
            words = first_line(error, 200)
            raise InputError(
                f"{shard_path(output, one)} cannot be read ({words}): move it elsewhere, re-run the "
                f"command of the output, then compact it."
            ) from error

    return pa.concat_tables(map_shards(read, group, READERS))


def _numbered(table: pa.Table, shard: int) -> pa.Table:
    """The rows with another shard number."""
    index = table.schema.get_field_index("shard")
    return table.set_column(index, table.schema.field(index), pa.array(np.full(len(table), shard)))


def _replace_plan(output: str, plan: Plan, groups: list[list[int]], first: int) -> None:
    """Makes the merged shards the plan. From then on they are valid, and the old ones are not."""
    last = plan.parts[-1]
    path = storage.join(output, PLAN_FOLDER, last.json_name)
    etag = storage.read_with_etag(path)[1]
    name = hashlib.sha256(json.dumps([part.file for part in plan.parts]).encode()).hexdigest()[:16]
    file = part_rows_name(last.part, name)
    planned = _planned(output, plan)
    tables = (
        pa.concat_tables(
            _numbered(with_given(table), shard) for table in itertools.islice(planned, len(group))
        )
        for shard, group in enumerate(groups, first)
    )
    rows = write_planned_shards(storage.join(output, PLAN_FOLDER, file), tables)
    known = read_planned(output, plan.rounds)
    start = plan.rounds[0]
    identities = {tuple(one): one for round_ in plan.rounds for one in round_.manifest}
    opening = Round(
        rows=rows,
        shard_rows=max(map(len, groups)) * max(one.shard_rows for one in plan.rounds),
        selected=np.concatenate([one.selected for one in plan.rounds]),
        settings=start.settings,
        model_digest=start.model_digest,
        manifest=list(identities.values()),
        carried=start.carried,
        warnings=start.warnings,
        known=write_planned(output, known.pairs, known.versions),
        schema=start.schema,
    )
    part = PlanPart(
        part=last.part,
        file=file,
        round=0,
        first_row_id=0,
        rows=rows,
        first_shard=first,
        shards=len(groups),
        shard_rows=opening.shard_rows,
        error_rows=plan.error_rows,
        errors=plan.errors,
        sizes=dict(sum((Counter(one.sizes) for one in plan.parts), Counter())),
        complete=True,
        compacted=True,
    )
    document = {"format": FORMAT, **dataclasses.asdict(part), "opening": opening.to_values()}
    data = json.dumps(document, ensure_ascii=False).encode() + b"\n"
    if storage.replace_if_match(path, data, etag) is None:
        raise InputError(f"{path} changed during the compaction: compact {output} again.")


def _planned(output: str, plan: Plan) -> Iterator[pa.Table]:
    """The planned rows of each shard, from one pass over the file of each part."""
    stamps = storage.list_stamps(storage.join(output, PLAN_FOLDER), str)
    for part in plan.parts:
        numbers = range(part.first_shard, part.end)
        for _, table in planned_shards(output, part, stamps.get(part.file), numbers):
            yield table


def _remove_others(output: str, plan: Plan) -> None:
    """Removes files of plan and data that the plan does not name: old ones, or of an interrupted call."""
    kept = {part.file for part in plan.parts} | {one.known for one in plan.rounds}
    kept |= {part.json_name for part in plan.parts}
    storage.delete_all(
        file.path
        for file in storage.list_files(storage.join(output, PLAN_FOLDER))
        if file.relative not in kept and is_plan_file(file.relative)
    )
    storage.delete_all(shard_path(output, shard) for shard in list_shards(output) if shard not in plan.shards)
