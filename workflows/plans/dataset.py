"""The plan of a Dataset instead of a manifest: the same rows, kept in Ray instead of an output.

All rows are planned before any is made. So `row_id` is dense, and repeated ids are found. Knows nothing of
replicas and results.
"""

import functools
import hashlib
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from wallaroo.actors.rows import to_ipc
from wallaroo.model.errors import InputError
from wallaroo.workflows.plans.columns import carried_schema, check_columns
from wallaroo.workflows.plans.rows import plan_rows, row_ids, sample_counts
from wallaroo.workflows.plans.settings import PlanSettings, column_names
from wallaroo.workflows.sources.embedded import COLUMN
from wallaroo.workflows.storage.checkpoints import read_checkpoint
from wallaroo.workflows.tasks import PICTURE_TASKS

if TYPE_CHECKING:
    import ray.data

NUMBER = "__wallaroo_number"
"""Column with the number of a row in the Dataset."""

ORIGIN = "row"
"""How the ids of rows begin that have none of their own."""


def plan_dataset(
    ds: "ray.data.Dataset", settings: PlanSettings, model: str
) -> tuple["ray.data.Dataset", int, pa.Schema]:
    """Plans the rows of a Dataset. This executes `ds` once.

    Args:
        ds: Has the columns of a manifest. Relative paths of pictures start in the working directory.
        settings: What the plan depends on.
        model: Folder of the checkpoint, local or on S3.

    Returns:
        A Dataset of blocks with one row each, the number of planned rows, and the schema of the carried
        columns. A row has `shard`, a number, and `plan`, an Arrow IPC buffer of planned rows of this shard.
        For tasks that read pictures they also have the column `image`.

    Raises:
        InputError: A column is missing, or has a type that only Ray can read.
        OptionError: The checkpoint lacks the size that the settings ask for.
    """
    import ray
    import ray.data

    config = read_checkpoint(model).config
    settings.check(config)
    blocks, lengths = blocks_in_order(ds)
    if not sum(lengths):
        return ray.data.from_arrow(pa.table({})), 0, pa.schema([])
    schema = _schema(ray.data.from_arrow_refs(blocks).schema().base_schema)
    check_columns(schema, settings)
    firsts = np.cumsum([0, *lengths]).tolist()
    numbered: list[Any] = [
        ray.remote(_number).remote(block, first) for block, first in zip(blocks, firsts, strict=False)
    ]
    rows = ray.data.from_arrow_refs(numbered)
    constants = {"schema": schema, "settings": settings}
    found = rows.map_batches(functools.partial(_count, **constants), batch_format="pyarrow").to_arrow_refs()
    counts = pa.concat_tables(ray.get(found)).sort_by("number")
    outputs = counts.column("outputs").to_numpy().copy()
    duplicates = _repeated(counts.column("id"))
    outputs[duplicates] = 1
    starts = np.cumsum([0, *outputs], dtype=np.int64)
    total = int(starts[-1])
    shard = settings.shard_rows(total, config)
    layout = ray.put((starts, frozenset(duplicates.tolist()), shard))
    plans = (
        rows.map_batches(
            functools.partial(_plan, **constants, model=model, layout=layout, folder=os.getcwd()),
            # About a shard each, which bounds the memory of a task.
            batch_size=max(1, shard // settings.samples),
            batch_format="pyarrow",
        )
        .repartition(target_num_rows_per_block=1)
        .materialize()
    )
    return plans, total, carried_schema(schema, settings)


def blocks_in_order(ds: "ray.data.Dataset") -> tuple[list[Any], list[int]]:
    """Executes a Dataset with its order kept.

    Args:
        ds: Any Dataset.

    Returns:
        References to its blocks, which are Arrow tables, and the number of rows of each.
    """
    import ray

    options = ds.context.execution_options
    before, options.preserve_order = options.preserve_order, True
    try:
        blocks = ds.to_arrow_refs()
    finally:
        options.preserve_order = before
    return blocks, ray.get([ray.remote(_length).remote(block) for block in blocks])


def _length(block: pa.Table) -> int:
    return block.num_rows


def _number(block: pa.Table, first: int) -> pa.Table:
    return block.append_column(NUMBER, pa.array(np.arange(first, first + block.num_rows)))


def _schema(schema: pa.Schema) -> pa.Schema:
    """One schema for all rows; a column without any value is text."""
    fields = []
    for one in schema:
        if isinstance(one.type, pa.BaseExtensionType):
            raise InputError(
                f"the column '{one.name}' is of the type {one.type}, which only Ray reads: "
                f"leave it out or give it a plain type."
            )
        fields.append(one.with_type(pa.string()) if pa.types.is_null(one.type) else one)
    return pa.schema(fields)


def _numbered(batch: pa.Table, schema: pa.Schema) -> tuple[pa.Table, list[int]]:
    return batch.select(schema.names).cast(schema), batch.column(NUMBER).to_pylist()


def _count(batch: pa.Table, schema: pa.Schema, settings: PlanSettings) -> pa.Table:
    """For each row: its number, the planned rows that it gives, and 16 bytes in place of its id."""
    table, numbers = _numbered(batch, schema)
    ids, _ = row_ids(table, ORIGIN, numbers, column_names(schema, settings)["id"])
    return pa.table(
        {
            "number": pa.array(numbers, pa.int64()),
            "outputs": pa.array(sample_counts(table, settings, numbers), pa.int64()),
            "id": pa.array([hashlib.sha256(one.encode()).digest()[:16] for one in ids], pa.binary(16)),
        }
    )


def _repeated(ids: pa.ChunkedArray) -> np.ndarray:
    """int64: positions of ids (16 bytes each) that an earlier row has."""
    halves = np.frombuffer(b"".join(ids.to_pylist()), [("high", np.uint64), ("low", np.uint64)])
    return np.setdiff1d(np.arange(len(halves)), np.unique(halves, return_index=True)[1])


def _plan(
    batch: pa.Table, schema: pa.Schema, settings: PlanSettings, model: str, layout: Any, folder: str
) -> dict[str, Any]:
    """Plans some rows, and cuts the planned rows at the borders of shards."""
    import ray

    starts, duplicates, size = ray.get(layout)
    table, numbers = _numbered(batch, schema)
    config, tokenizer, _ = read_checkpoint(model)
    mine = duplicates.intersection(numbers)
    planned = plan_rows(
        table,
        settings,
        config,
        tokenizer,
        origin=ORIGIN,
        numbers=numbers,
        duplicates=mine,
        folder=folder,
    )
    if settings.task in PICTURE_TASKS:
        # There is no file to refer to, so the plan has the pictures themselves.
        names = column_names(schema, settings)
        takes = np.repeat(np.arange(len(numbers)), [starts[one + 1] - starts[one] for one in numbers])
        planned = planned.append_column(COLUMN, table.column(names[COLUMN]).take(pa.array(takes)))
    ids = np.concatenate([np.arange(starts[number], starts[number + 1]) for number in numbers])
    shards = pa.array(ids // size)
    planned = planned.set_column(0, planned.schema.field(0), pa.array(ids))
    planned = planned.set_column(1, planned.schema.field(1), shards)
    made = []
    for number in shards.unique().to_pylist():
        first, last = np.searchsorted(ids // size, [number, number + 1])
        made.append((number, to_ipc(planned.slice(first, last - first))))
    return {"shard": np.array([number for number, _ in made]), "plan": [plan for _, plan in made]}
