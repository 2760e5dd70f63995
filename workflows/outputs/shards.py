"""Shards of `data/`: one Parquet file each, written whole or not at all."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import shard_path
from wallaroo.workflows.outputs.schema import lacking

PICTURE_ROWS = 32
"""Rows of a row group with pictures: whoever wants one of them reads these, not the whole shard."""
T = TypeVar("T")


def shard_bytes(table: pa.Table) -> pa.Buffer:
    """A result table as a Parquet file; equal tables give equal bytes."""
    leaves = _leaf_columns(table.schema)
    # Pictures are compressed already; dictionaries and statistics of them would only cost.
    others = [leaf for leaf in leaves if leaf != "image.bytes"]
    pictures = table.column("image").null_count < len(table)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=PICTURE_ROWS if pictures else max(len(table), 1),
        compression={leaf: "none" if leaf == "image.bytes" else "zstd" for leaf in leaves},
        use_dictionary=others,
        write_statistics=others,
        write_page_checksum=True,
    )
    return sink.getvalue()


def _leaf_columns(schema: pa.Schema) -> list[str]:
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    stored = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [stored.column(index).path for index in range(len(stored))]


def write_shard(output: str, shard: int, table: pa.Table) -> int:
    """Writes the file of a shard, whole or not at all, and returns its size in bytes.

    table: from `build_result_table`. Written twice, it is the same file but for VOLATILE columns.
    """
    if pc.any(pc.not_equal(table.column("shard"), shard)).as_py():
        raise ValueError(f"the table of shard {shard} holds rows of another shard")
    data = shard_bytes(table)
    storage.write_atomic(shard_path(output, shard), memoryview(data))
    return data.size


@contextmanager
def open_shard(output: str, shard: int) -> Iterator[pq.ParquetFile]:
    """The file of a shard, for reading row group by row group.

    Raises FileNotFoundError, and ArrowInvalid if another file lies in its place.
    """
    path = shard_path(output, shard)
    filesystem, inner = storage.parquet_filesystem(path)
    with (
        storage.explained(path),
        filesystem.open_input_file(inner) as file,
        pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True) as parquet,
    ):
        if words := lacking(parquet.schema_arrow):
            raise pa.ArrowInvalid(words)
        yield parquet


def map_shards(function: Callable[[int], T], shards: Iterable[int], threads: int = 8) -> Iterator[T]:
    """`function(shard)` of every shard, in their order, a few at a time and never far ahead."""
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[T]] = deque()
        try:
            for shard in shards:
                ahead.append(pool.submit(function, shard))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
