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
TALLY_KEY = b"wallaroo-tally"
"""Key of the footer's metadata. Metadata of a schema begins with `wallaroo.`, and is carried along."""
S = TypeVar("S")
T = TypeVar("T")


def shard_bytes(table: pa.Table, tally: bytes = b"") -> pa.Buffer:
    """A result table as a Parquet file; equal tables give equal bytes.

    Args:
        table: From `build_result_table`, or read back from such a file.
        tally: What is counted of its rows, for the footer; empty for none.
    """
    # The table may come from a file with a tally of its own.
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != TALLY_KEY}
    table = table.replace_schema_metadata(metadata | ({TALLY_KEY: tally} if tally else {}))
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


def write_shard(output: str, shard: int, table: pa.Table, tally: bytes = b"") -> str:
    """Writes the file of a shard, whole or not at all. Written twice, it differs in VOLATILE columns only.

    Args:
        output: Folder of the run.
        shard: Its number, which is that of all rows.
        table: From `build_result_table`.
        tally: What is counted of its rows, for the footer; empty for none.

    Returns:
        The stamp that a listing gives the file.
    """
    if pc.any(pc.not_equal(table.column("shard"), shard)).as_py():
        raise ValueError(f"the table of shard {shard} holds rows of another shard")
    return storage.write_atomic(shard_path(output, shard), memoryview(shard_bytes(table, tally)))


def without_tally(schema: pa.Schema) -> pa.Schema:
    """The schema of a shard's rows, without what the footer says of them."""
    metadata = {key: value for key, value in (schema.metadata or {}).items() if key != TALLY_KEY}
    return schema.with_metadata(metadata)


@contextmanager
def open_shard(output: str, shard: int, data: bytes | None = None) -> Iterator[pq.ParquetFile]:
    """The file of a shard, for reading row group by row group.

    Args:
        output: Folder of the run.
        shard: Its number.
        data: The whole file, where it was read already.

    Raises:
        FileNotFoundError: There is no such file.
        ArrowInvalid: Another file lies in its place.
    """
    path = shard_path(output, shard)
    filesystem, inner = storage.parquet_filesystem(path)
    with (
        storage.explained(path),
        filesystem.open_input_file(inner) if data is None else pa.BufferReader(data) as file,
        pq.ParquetFile(file, pre_buffer=data is None, page_checksum_verification=True) as parquet,
    ):
        if words := lacking(parquet.schema_arrow):
            raise pa.ArrowInvalid(words)
        yield parquet


def map_shards(function: Callable[[S], T], shards: Iterable[S], threads: int = 8) -> Iterator[T]:
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
