"""One part of a plan, made by a Ray task: its rows read, planned and written."""

import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.types import (
    decode_schema,
)
from wallaroo.workflows.outputs.layout import PLAN_FOLDER, part_name
from wallaroo.workflows.plans.layout import split_into_shards, write_shards
from wallaroo.workflows.plans.passes import considered_rows
from wallaroo.workflows.plans.rows import plan_rows, sample_counts
from wallaroo.workflows.plans.settings import PlanSettings
from wallaroo.workflows.storage.checkpoints import Checkpoint, read_checkpoint

PLANNED_ROWS = 16_384
"""Planned rows that a task holds at most, but for the samples of one row."""


def write_part(
    row: dict[str, Any], schema: str, settings: PlanSettings, model: str, output: str | None, shard_rows: int
) -> dict[str, Any]:
    """Plans the rows of a part and writes its Parquet file, a row group a shard.

    Args:
        row: `index`, `first_row_id`, `first_shard` and `rows` of the part, and its `work` as JSON text: the
            pieces to read, with the rows to take of each.
        schema: Schema of the manifest, encoded.
        settings: Settings of the run.
        model: Folder of the checkpoint, local or on S3.
        output: Folder of the run; None to count only.
        shard_rows: Rows of a shard.

    Returns:
        `file`, `error_rows`, `errors` and `sizes`, as the fields of `PlanPart`.

    Raises:
        InputError: The manifest changed since its rows were counted.
    """
    errors: Counter[str] = Counter()
    sizes: Counter[str] = Counter()

    def counted(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        for table in tables:
            errors.update(kind for kind in table.column("error_type").to_pylist() if kind)
            # Sizes of pictures to load are not known yet.
            known = pc.and_(pc.equal(table.column("status"), "planned"), table.column("width").is_valid())
            planned = table.filter(known)
            widths, heights = (planned.column(name).to_pylist() for name in ("width", "height"))
            sizes.update(f"{width}x{height}" for width, height in zip(widths, heights, strict=True))
            yield table

    inputs = [row["work"], row["first_row_id"], row["first_shard"], shard_rows, schema, settings.meaning()]
    name = hashlib.sha256(json.dumps([*inputs, read_checkpoint(model).digest]).encode()).hexdigest()[:16]
    file = f"{part_name(row['index'])}-{name}.parquet"
    tables = counted(_planned(json.loads(row["work"]), schema, settings, read_checkpoint(model)))
    shards = split_into_shards(tables, row["first_row_id"], row["first_shard"], shard_rows)
    if output is None:
        rows = sum(table.num_rows for table in shards)
    else:
        rows = write_shards(storage.join(output, PLAN_FOLDER, file), shards)
    if rows != row["rows"]:
        raise InputError("The manifest changed while it was read: start again when it is complete.")
    return {"file": file, "error_rows": errors.total(), "errors": dict(errors), "sizes": dict(sizes)}


def _planned(
    work: list[dict[str, Any]], schema: str, settings: PlanSettings, checkpoint: Checkpoint
) -> Iterator[pa.Table]:
    """Plans the rows of some pieces, in order. Each table numbers its rows from 0."""
    names = set(decode_schema(schema).names)
    for one in work:
        skip, take = one["skip"], one["take"]
        bits = {"piece": one["piece"], "bits": base64.b64decode(one["bits"])}
        for rows in considered_rows(bits, schema, names):
            duplicates = {rows.piece.first_row + row for row in one["duplicates"]}
            # JSON made text of the numbers.
            versions = {rows.piece.first_row + int(row): n for row, n in one["versions"].items()}
            counts = sample_counts(rows.table, settings, rows.numbers, rows.faults, duplicates)
            for start, stop in _few(counts):
                given = int(counts[start:stop].sum())
                if skip < given and take:
                    few = rows.slice(start, stop)
                    table = plan_rows(
                        few.table,
                        settings,
                        checkpoint.config,
                        checkpoint.tokenizer,
                        origin=rows.piece.file.relative,
                        folder=folder_of(rows.piece.file.path),
                        numbers=few.numbers,
                        faults=rows.faults,
                        duplicates=duplicates,
                        versions=versions,
                    ).slice(skip, take)
                    yield table
                    take -= table.num_rows
                skip = max(0, skip - given)
            if not take:
                break


def folder_of(path: str) -> str:
    """The folder of a file, local or on S3."""
    return path.rpartition("/")[0] if storage.is_s3(path) else os.path.dirname(path)


def _few(counts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Cuts rows into ranges [start, stop) of few planned rows; `counts` has those of each row."""
    start = total = 0
    for index, count in enumerate(counts.tolist()):
        if total + count > PLANNED_ROWS and index > start:
            yield start, index
            start, total = index, 0
        total += count
    yield start, len(counts)
