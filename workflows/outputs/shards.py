"""Shards of `data/`: one Parquet file each, written atomically."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import shard_path
from wallaroo.workflows.outputs.schema import lacking
from wallaroo.workflows.text import first_line

PICTURE_ROWS = 32
"""Rows of a row group with pictures. Reading one picture reads its row group, not the whole shard."""
TALLY_KEY = b"wallaroo-tally"
"""Key in the metadata of the footer. It lacks the prefix `wallaroo.` of the keys that are carried along."""
S = TypeVar("S")
T = TypeVar("T")


def shard_bytes(table: pa.Table, tally: bytes = b"") -> pa.Buffer:
    """Encodes a result table as a Parquet file. Equal tables give equal bytes.

    Args:
        table: From `build_result_table`, or read back from such a file.
        tally: Counts of its rows, for the footer; empty for none.

    Returns:
        The file.
    """
    # The table may come from a file with a tally of its own.
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != TALLY_KEY}
    table = table.replace_schema_metadata(metadata | ({TALLY_KEY: tally} if tally else {}))
    leaves = _leaf_columns(table.schema)
    # Pictures are compressed already; dictionaries and statistics would only cost time.
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
    """Writes the file of a shard atomically. Written twice, it differs in VOLATILE columns only.

    Args:
        output: Folder of the run, local or on S3.
        shard: Number of the shard, which all rows have.
        table: From `build_result_table`.
        tally: Counts of its rows, for the footer; empty for none.

    Returns:
        The stamp that a listing gives the file.

    Raises:
        ValueError: A row is of another shard.
    """
    if pc.any(pc.not_equal(table.column("shard"), shard)).as_py():
        raise ValueError(f"the table of shard {shard} holds rows of another shard")
    return storage.write_atomic(shard_path(output, shard), memoryview(shard_bytes(table, tally)))


def without_tally(schema: pa.Schema) -> pa.Schema:
    """Returns the schema of a shard without the counts of its footer."""
    metadata = {key: value for key, value in (schema.metadata or {}).items() if key != TALLY_KEY}
    return schema.with_metadata(metadata)


@contextmanager
def open_shard(
    output: str, shard: int, data: bytes | None = None, size: int | None = None
) -> Iterator[pq.ParquetFile]:
    """Opens the file of a shard for reading row group by row group.

    Args:
        output: Folder of the run, local or on S3.
        shard: Number of the shard.
        data: The whole file, if it is already read.
        size: Its size in bytes, if it is known and the file is read whole by `read_shard`: on S3 that takes
            one request for each 8 MiB.

    Yields:
        The open file.

    Raises:
        FileNotFoundError: There is no such file.
        ArrowInvalid: It is not a file of results.
        OSError: A page that is read does not match its checksum.
    """
    path = shard_path(output, shard)
    opened: AbstractContextManager[pa.NativeFile]
    if data is not None:
        opened = pa.BufferReader(data)
    elif size is not None:
        opened = storage.open_ranges(path, size)
    else:
        filesystem, inner = storage.parquet_filesystem(path)
        opened = filesystem.open_input_file(inner)
    whole = data is not None or size is not None
    with (
        storage.explained(path),
        opened as file,
        pq.ParquetFile(file, pre_buffer=not whole, page_checksum_verification=True) as parquet,
    ):
        if words := lacking(parquet.schema_arrow):
            raise pa.ArrowInvalid(words)
        yield parquet


@contextmanager
def open_finished(output: str, shard: int) -> Iterator[pq.ParquetFile]:
    """Opens the file of a shard that a run has finished; what is wrong with it becomes one sentence.

    Args:
        output: Folder of the run, local or on S3.
        shard: Number of the shard.

    Yields:
        The open file. Only read from it in the block.

    Raises:
        InputError: The file is missing or damaged.
    """
    try:
        with open_shard(output, shard) as parquet:
            yield parquet
    # A page that does not match its checksum is an OSError.
    except (pa.ArrowException, OSError) as error:
        words = first_line(error, 200)
        raise InputError(
            f"{shard_path(output, shard)} cannot be read ({words}): move it elsewhere and re-run its command."
        ) from error


def read_shard(parquet: pq.ParquetFile) -> pa.Table:
    """Reads all rows of a shard, from the front of its file to the end.

    `ParquetFile.read` takes column after column instead, each through all row groups. A file that requests
    what it lacks would request most of its bytes again for each column.

    Args:
        parquet: The file, as `open_shard` gives it.

    Returns:
        The rows, read without threads.
    """
    groups = range(parquet.num_row_groups)
    tables = [parquet.read_row_group(group, use_threads=False) for group in groups]
    return pa.concat_tables([parquet.schema_arrow.empty_table(), *tables])


def map_shards(function: Callable[[S], T], shards: Iterable[S], threads: int = 8) -> Iterator[T]:
    """Calls a function for every shard in threads.

    Args:
        function: Called as `function(shard)`.
        shards: Its arguments.
        threads: Calls at once.

    Yields:
        The results in the order of `shards`. At most about twice `threads` of them wait in memory.
    """
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
