"""Reads the shards of an output with few requests, also from far away.

The listing gives the size of a file, so no request asks for it. Footers are cached. Neighbouring column
chunks are read as one range. The pictures of a row group are read together and cached for a while,
since its neighbours stand on the same page. Knows nothing of pages or SQL.
"""

import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.types as pt

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import DATA_FOLDER, shard_number
from wallaroo.workflows.outputs.schema import RESULT_NAMES, lacking
from wallaroo.workflows.text import first_line

NOT_SMALL = frozenset({"image", "tokens"})
HOLE_BYTES = 512 << 10
"""Most unneeded bytes that are read to save one request."""

RANGE_BYTES = 64 << 20
FOOTERS = 32
PICTURE_BYTES = 48 << 20
"""Size of the picture cache."""

TABLE_BYTES = 16 << 20
"""Size of the cache of all other columns."""

WINDOW_BYTES = 4 << 20
"""For a single picture, larger row groups are not read as a whole."""

LARGE_BYTES = 12 << 20
"""Row groups with more bytes of pictures are read one at a time, to bound the memory."""


class Shard(NamedTuple):
    """One file of `data/` as listed."""

    number: int
    """Number of the shard."""
    path: str
    """Of the file, local or `s3://`."""
    size: int
    """In bytes."""
    etag: str
    """Changes when the contents do."""


class Unreadable(InputError):
    """The file of a shard is damaged, or is not a shard."""


def whole_path(output: str) -> str:
    """Returns the path of an output in its one spelling: absolute, without a slash at the end."""
    return output.rstrip("/") if storage.is_s3(output) else os.path.abspath(output)


def list_shards(output: str) -> list[Shard]:
    """Lists the shards of an output by number, without opening a file."""
    found = []
    for file in storage.list_files(storage.join(output, DATA_FOLDER)):
        number = shard_number(file.relative)
        if number is not None:
            found.append(Shard(number, file.path, file.size, file.etag))
    return sorted(found)


def is_indexed(field: pa.Field) -> bool:
    """Returns whether a column belongs into the index: a scalar one, or one of our own small ones."""
    kind = field.type
    if pt.is_dictionary(kind):
        kind = kind.value_type
    if field.name in RESULT_NAMES:
        return field.name not in NOT_SMALL
    return (
        pt.is_integer(kind)
        or pt.is_float32(kind)
        or pt.is_float64(kind)
        or pt.is_decimal128(kind)
        or pt.is_boolean(kind)
        or pt.is_string(kind)
        or pt.is_large_string(kind)
        or pt.is_string_view(kind)
        or pt.is_date(kind)
        or pt.is_time(kind)
        or pt.is_timestamp(kind)
    )


class Reader:
    """Reads shards through caches. Thread-safe."""

    def __init__(self) -> None:
        self._fragments: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._pictures: OrderedDict[tuple[str, str, int], pa.ChunkedArray] = OrderedDict()
        self._tables: OrderedDict[tuple[str, str, int, bool], pa.Table] = OrderedDict()
        self._guard = threading.Lock()
        self._loading: dict[tuple[str, str, int], threading.Lock] = {}
        self._one_large = threading.Lock()

    def schema(self, shard: Shard) -> pa.Schema:
        """Returns the schema of a shard.

        Raises:
            Unreadable: The file cannot be read.
        """
        return self._fragment(shard).physical_schema

    def group_rows(self, shard: Shard) -> list[int]:
        """Returns the number of rows of each row group.

        Raises:
            Unreadable: The file cannot be read.
        """
        metadata = self._fragment(shard).metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def small(self, shard: Shard) -> pa.Table:
        """Returns all rows of a shard with the columns that `is_indexed`.

        Raises:
            Unreadable: The file cannot be read.
        """
        fragment = self._fragment(shard)
        names = [field.name for field in fragment.physical_schema if is_indexed(field)]
        return self._table(shard, fragment, names)

    def rows(
        self, shard: Shard, start: int, stop: int, pictures: bool = False, small: bool = False
    ) -> list[dict[str, Any]]:
        """Returns rows of a shard without their pictures and tokens.

        Args:
            shard: The shard.
            start: Position of the first row.
            stop: Position after the last row; may lie past the end of the shard.
            pictures: Also read the pictures of these row groups into the cache, in the same request.
            small: Leave out columns that are not in the index.

        Returns:
            One dict a row, column name -> value.

        Raises:
            Unreadable: If the file is damaged, or is not a shard.
        """
        fragment = self._fragment(shard)
        fields = [field for field in fragment.physical_schema if is_indexed(field) or not small]
        names = [field.name for field in fields if field.name not in NOT_SMALL]
        first = begin = 0
        wanted: list[int] = []
        for group, count in enumerate(self.group_rows(shard)):
            if first < stop and start < first + count:
                begin = begin if wanted else first
                wanted.append(group)
            first += count
        if not wanted:
            return []
        with self._guard:
            tables = {group: self._tables.get((shard.path, shard.etag, group, small)) for group in wanted}
        missing = [group for group, table in tables.items() if table is None]
        if missing:
            tables |= self._read_groups(shard, fragment, missing, names, pictures)
            with self._guard:
                for group in missing:
                    self._tables[shard.path, shard.etag, group, small] = tables[group]
                _shorten(self._tables, TABLE_BYTES)
        return pa.concat_tables(tables.values()).slice(start - begin, stop - start).to_pylist()

    def _read_groups(
        self, shard: Shard, fragment: Any, groups: list[int], names: list[str], pictures: bool
    ) -> dict[int, pa.Table]:
        """Reads columns of row groups, in one request where possible; caches the pictures if few bytes."""
        columns: dict[str, Any] = {name: ds.field(name) for name in names}
        chunks = [_picture_chunk(fragment, group) for group in groups]
        if pictures and sum(chunk.total_compressed_size for chunk in chunks if chunk) <= LARGE_BYTES:
            columns["image"] = ds.field("image", "bytes")
        table = self._table(shard, fragment.subset(row_group_ids=groups), columns)
        found, place = {}, 0
        for group in groups:
            count = fragment.metadata.row_group(group).num_rows
            part = table.slice(place, count)
            place += count
            if "image" in columns:
                self._keep((shard.path, shard.etag, group), part.column("image"))
                part = part.drop_columns(["image"])
            found[group] = part
        return found

    def picture(self, shard: Shard, position: int, digest: str = "") -> bytes | None:
        """Returns the picture file of a row.

        Args:
            shard: The shard.
            position: Of the row in the shard.
            digest: The first hex digits of the sha256 of the picture, if no other picture of the row group is
                wanted. With it, only a part of a large row group is read.

        Returns:
            The file, or None if the row has no picture.

        Raises:
            Unreadable: If the shard is damaged, or is not a shard.
        """
        first = 0
        for group, count in enumerate(self.group_rows(shard)):
            if position < first + count:
                with self._guard:
                    cached = (shard.path, shard.etag, group) in self._pictures
                if digest and not cached:
                    found = self._picture_near(shard, group, (position - first) / count, count, digest)
                    if found is not None:
                        return found
                return self._group_pictures(shard, group)[position - first].as_py()
            first += count
        return None

    def _picture_near(self, shard: Shard, group: int, share: float, count: int, digest: str) -> bytes | None:
        """Reads the part of a row group where a picture lies if all of them have about the same size.

        Parquet says only where the pictures of a row group begin. The digest proves the find.
        """
        chunk = _picture_chunk(self._fragment(shard), group)
        if chunk is None or chunk.compression != "UNCOMPRESSED" or chunk.total_compressed_size < WINDOW_BYTES:
            return None
        begin, size = chunk.data_page_offset, chunk.total_compressed_size
        start = max(0, int(size * share - 2 * size / count))
        stop = min(size, int(size * share + 3.5 * size / count))
        with storage.explained(shard.path):
            filesystem, inner = storage.parquet_filesystem(shard.path)
            with filesystem.open_input_file(inner) as file:
                return find_picture(file.read_at(stop - start, begin + start), digest)

    def _group_pictures(self, shard: Shard, group: int) -> pa.ChunkedArray:
        key = (shard.path, shard.etag, group)
        with self._guard:
            if key in self._pictures:
                self._pictures.move_to_end(key)
                return self._pictures[key]
            turn = self._loading.setdefault(key, threading.Lock())
        # The tiles of a row group are requested at the same time; one of the requests reads it.
        with turn:
            try:
                with self._guard:
                    if key in self._pictures:
                        return self._pictures[key]
                fragment = self._fragment(shard)
                chunk = _picture_chunk(fragment, group)
                large = chunk is not None and chunk.total_compressed_size > LARGE_BYTES
                part = fragment.subset(row_group_ids=[group])
                with self._one_large if large else nullcontext():
                    pictures = self._table(shard, part, {"image": ds.field("image", "bytes")}).column("image")
                self._keep(key, pictures)
                return pictures
            finally:
                with self._guard:
                    self._loading.pop(key, None)

    def _keep(self, key: tuple[str, str, int], pictures: pa.ChunkedArray) -> None:
        with self._guard:
            self._pictures[key] = pictures
            _shorten(self._pictures, PICTURE_BYTES)

    def _fragment(self, shard: Shard) -> Any:
        """Opens a shard, or returns it from the cache with its footer."""
        key = (shard.path, shard.etag)
        with self._guard:
            if key in self._fragments:
                self._fragments.move_to_end(key)
                return self._fragments[key]
        options = ds.ParquetFragmentScanOptions(
            pre_buffer=True,
            page_checksum_verification=True,
            cache_options=pa.CacheOptions(
                hole_size_limit=HOLE_BYTES, range_size_limit=RANGE_BYTES, lazy=False
            ),
        )
        try:
            with storage.explained(shard.path):
                filesystem, inner = storage.parquet_filesystem(shard.path)
                kind = ds.ParquetFileFormat(default_fragment_scan_options=options)
                fragment = kind.make_fragment(inner, filesystem=filesystem, file_size=shard.size)
                fragment.ensure_complete_metadata()
                words = lacking(fragment.physical_schema)
        except (pa.ArrowException, OSError) as error:
            words = first_line(error, 200)
        if words:
            raise Unreadable(f"{shard.path} cannot be shown ({words}): `wallaroo verify` checks the output.")
        with self._guard:
            self._fragments[key] = fragment
            if len(self._fragments) > FOOTERS:
                self._fragments.popitem(last=False)
        return fragment

    def _table(self, shard: Shard, fragment: Any, columns: Sequence[str] | dict[str, Any]) -> pa.Table:
        try:
            with storage.explained(shard.path):
                return fragment.to_table(columns=columns, use_threads=False)
        except (pa.ArrowException, OSError, InputError) as error:
            # Perhaps its credentials have expired; the next request opens the file with new ones.
            with self._guard:
                self._fragments.pop((shard.path, shard.etag), None)
            if isinstance(error, InputError):
                raise
            words = first_line(error, 200)
            raise Unreadable(
                f"{shard.path} cannot be shown ({words}): `wallaroo verify` checks the output."
            ) from None


def _picture_chunk(fragment: Any, group: int) -> Any:
    """Returns the metadata of the pictures of a row group; None if there are none."""
    found = fragment.metadata.row_group(group)
    for index in range(found.num_columns):
        if found.column(index).path_in_schema == "image.bytes":
            return found.column(index)
    return None


def find_picture(data: bytes, digest: str) -> bytes | None:
    """Finds a picture file among others in a piece of an uncompressed Parquet column.

    Args:
        data: A piece of the column: each file follows its length (4 bytes, little-endian).
        digest: The first hex digits of the file's sha256.

    Returns:
        The file, or None if it is not in the piece as a whole.
    """
    for match in re.finditer(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP", data, re.DOTALL):
        start = match.start()
        length = int.from_bytes(data[max(0, start - 4) : start], "little")
        file = data[start : start + length]
        if len(file) == length and hashlib.sha256(file).hexdigest().startswith(digest):
            return file
    return None


def _shorten(kept: OrderedDict[Any, Any], most: int) -> None:
    """Drops the oldest entries of a cache until it holds at most `most` bytes; keeps the newest one."""
    total = sum(one.nbytes for one in kept.values())
    while total > most and len(kept) > 1:
        total -= kept.popitem(last=False)[1].nbytes
