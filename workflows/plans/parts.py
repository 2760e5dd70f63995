"""One part of a plan, made by a Ray task: its rows read, planned and written."""

import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.types import encode_schema
from wallaroo.workflows.outputs.layout import PLAN_FOLDER, part_rows_name
from wallaroo.workflows.plans.layout import split_into_shards, write_planned_shards
from wallaroo.workflows.plans.rows import plan_rows, sample_counts
from wallaroo.workflows.plans.scanned import PieceRows
from wallaroo.workflows.plans.settings import PlanSettings
from wallaroo.workflows.storage.checkpoints import Checkpoint, read_checkpoint

PLANNED_ROWS = 16_384
"""Planned rows that a task holds at most, but for the samples of one row."""


class PieceWork(NamedTuple):
    """What a part plans of a piece."""

    source: PieceRows
    """The rows of the piece that give planned rows."""
    duplicates: list[int]
    """Rows in the piece that repeat an id."""
    versions: dict[int, int]
    """Row in the piece -> version, for rows that are not the first of their id."""
    skip: int
    """Planned rows of the piece that belong to earlier parts."""
    take: int
    """Planned rows of the piece that belong to this part."""

    def identity(self) -> dict[str, Any]:
        """Returns JSON values that tell it from any other work. Names of files depend on them."""
        piece, bits = self.source.piece.to_json(), base64.b64encode(self.source.bits).decode()
        return {"piece": piece, "bits": bits} | {name: getattr(self, name) for name in self._fields[1:]}


class PartWork(NamedTuple):
    """A part to plan."""

    part: int
    """Number of the part."""
    first_row_id: int
    """Number of its first planned row."""
    first_shard: int
    """Number of its first shard."""
    rows: int
    """Number of its planned rows."""
    pieces: list[PieceWork]
    """What it plans of each piece, in order."""

    def file_name(self, schema: pa.Schema, settings: PlanSettings, model_digest: str, shard_rows: int) -> str:
        """Names the file of the part by all that its rows depend on. The arguments are those of its run."""
        work = json.dumps([one.identity() for one in self.pieces])
        place = [self.first_row_id, self.first_shard, shard_rows]
        text = json.dumps([work, *place, encode_schema(schema), settings.meaning(), model_digest])
        return part_rows_name(self.part, hashlib.sha256(text.encode()).hexdigest()[:16])


def write_part(
    part: PartWork, schema: pa.Schema, settings: PlanSettings, model: str, output: str | None, shard_rows: int
) -> dict[str, Any]:
    """Plans the rows of a part and writes its Parquet file, a row group a shard.

    Args:
        part: The part.
        schema: Schema of the manifest.
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

    checkpoint = read_checkpoint(model)
    file = part.file_name(schema, settings, checkpoint.digest, shard_rows)
    tables = counted(_planned(part.pieces, schema, settings, checkpoint))
    shards = split_into_shards(tables, part.first_row_id, part.first_shard, shard_rows)
    if output is None:
        rows = sum(table.num_rows for table in shards)
    else:
        rows = write_planned_shards(storage.join(output, PLAN_FOLDER, file), shards)
    if rows != part.rows:
        raise InputError("The manifest changed while it was read: start again when it is complete.")
    return {"file": file, "error_rows": errors.total(), "errors": dict(errors), "sizes": dict(sizes)}


def _planned(
    work: list[PieceWork], schema: pa.Schema, settings: PlanSettings, checkpoint: Checkpoint
) -> Iterator[pa.Table]:
    """Plans the rows of some pieces, in order. Each table numbers its rows from 0."""
    for source, repeating, later, skip, take in work:
        for rows in source.read(schema, set(schema.names)):
            duplicates = {rows.piece.first_row + row for row in repeating}
            versions = {rows.piece.first_row + row: version for row, version in later.items()}
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
                        raw=rows.raw,
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
