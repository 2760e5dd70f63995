"""Damage to files, as a disk or a network does it."""

from pathlib import Path

import pyarrow.parquet as pq


def flip_bit(path: str | Path, column: str) -> None:
    """Flips a bit within the last page of a column of the first row group of a Parquet file.

    column: its path in the file, such as `image.bytes`.
    """
    group = pq.read_metadata(path).row_group(0)
    chunks = [group.column(index) for index in range(group.num_columns)]
    chunk = next(one for one in chunks if one.path_in_schema == column)
    first = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(Path(path).read_bytes())
    data[first + chunk.total_compressed_size - 1] ^= 1
    Path(path).write_bytes(data)
