"""How planned rows are laid out: rows a shard, shards a part, a row group a shard."""

import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wallaroo.model.config import ModelConfig
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.schema import TEXT_TASKS

SHARD_ROWS = (8, 256)
"""Fewest rows of a shard in a small manifest, and most rows of a shard of pictures."""
SHARD_TEXTS = 4096
"""Most rows of a shard of texts."""
SOURCE_PIXELS = 4 << 20
"""Pixels assumed for a source whose size is not known yet."""
SHARDS_WANTED = 32
"""Shards that a round should have, so that each replica gets several."""
SHARD_PIXEL_BYTES = 64 << 20
"""Most bytes of source pixels in a shard. They cross the object store uncompressed."""
SHARD_FILE_BYTES = 128 << 20
"""Most bytes of result files in a shard. Replicas encode them."""
FILE_BYTES_PER_PIXEL = 2
"""Slightly more than PNG needs for a photograph."""


def shard_rows(rows: int, config: ModelConfig, task: str = "generate", restored: bool = False) -> int:
    """Chooses the rows of a shard: few enough that every replica gets several shards.

    A shard also stays under SHARD_PIXEL_BYTES of sources and SHARD_FILE_BYTES of results, in the largest
    sizes of the checkpoint. A source that keeps its own size counts as SOURCE_PIXELS. This applies to results
    that are restored to the size of their source. It also applies to understanding, within the limits of the
    vision tower.

    Args:
        rows: Planned rows of the round.
        config: Configuration of the model, with its sizes.
        task: The task.
        restored: Whether results get the size of their source.

    Returns:
        Rows of a shard, at least 1.
    """
    largest = max(size.height * size.width for size in config.size_list())
    sources, results = {
        "generate": (0, largest),
        "edit": (largest + config.edit_pixels[1], SOURCE_PIXELS if restored else largest),
        "understand": (min(config.understand_pixels[1], max(config.understand_pixels[0], SOURCE_PIXELS)), 0),
    }[task]
    least, most = SHARD_ROWS
    wanted = min(max(-(-rows // SHARDS_WANTED), least), SHARD_TEXTS if task in TEXT_TASKS else most)
    if sources:
        wanted = min(wanted, SHARD_PIXEL_BYTES // (3 * sources))
    if results:
        wanted = min(wanted, SHARD_FILE_BYTES // (FILE_BYTES_PER_PIXEL * results))
    return max(1, wanted)


def write_planned_shards(path: str, shards: Iterator[pa.Table]) -> int:
    """Writes the Parquet file of a part, a row group a shard.

    Args:
        path: Local or `s3://` path of the file.
        shards: Planned rows of each shard in order; at least one shard.

    Returns:
        Number of rows written.
    """
    rows = 0
    first = next(shards)
    with (
        storage.write_stream(path) as stream,
        pq.ParquetWriter(stream, first.schema, compression="zstd") as writer,
    ):
        for table in itertools.chain([first], shards):
            writer.write_table(table, row_group_size=table.num_rows)
            rows += table.num_rows
    return rows


def split_into_shards(tables: Iterator[pa.Table], row_id: int, shard: int, rows: int) -> Iterator[pa.Table]:
    """Cuts tables into shards and numbers their rows.

    Args:
        tables: Planned rows in order; their columns `row_id` and `shard` are replaced.
        row_id: Number of the first row.
        shard: Number of the first shard.
        rows: Rows of a shard.

    Yields:
        A table for each shard. The last one may have fewer rows.
    """
    waiting: list[pa.Table] = []
    for table in itertools.chain(tables, [None]):
        waiting += [table] if table is not None else []
        count = sum(one.num_rows for one in waiting)
        whole = count // rows * rows if table is not None else count
        if not whole:
            continue
        joined = pa.concat_tables(waiting)
        for start in range(0, whole, rows):
            part = joined.slice(start, min(rows, whole - start))
            numbers = np.arange(row_id, row_id + part.num_rows)
            part = part.set_column(0, part.schema.field(0), pa.array(numbers))
            yield part.set_column(1, part.schema.field(1), pa.array(np.full(part.num_rows, shard)))
            row_id, shard = row_id + part.num_rows, shard + 1
        waiting = [joined.slice(whole)]
