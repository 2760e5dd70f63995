"""Files by path, local or on S3, with the same functions and atomic writes.

Only these modules import boto3, botocore, s3fs or fsspec. They know no manifest, no plan and no output.
`storage.NAME` is what the rest of the code calls; the modules behind it are for this package alone.
"""

from wallaroo.workflows.storage.clients import (
    count_retries,
    forget_clients,
    parquet_filesystem,
    take_retries,
)
from wallaroo.workflows.storage.errors import TooLarge, explained, refuses_path
from wallaroo.workflows.storage.files import (
    delete,
    delete_all,
    exists,
    info,
    move,
    open_ranges,
    open_source,
    put_if_absent,
    read_bytes,
    read_object,
    read_with_etag,
    remove_leftovers,
    replace_if_match,
    write_atomic,
    write_stream,
)
from wallaroo.workflows.storage.listing import find_files, list_files, list_stamps, match_files, object_names
from wallaroo.workflows.storage.local import COPY_BYTES, TEMPORARY
from wallaroo.workflows.storage.paths import FileInfo, absolute_path, is_s3, join, stamp_size
from wallaroo.workflows.storage.retries import enable_retries, retries_enabled, with_retries

__all__ = [
    "COPY_BYTES",
    "TEMPORARY",
    "FileInfo",
    "TooLarge",
    "absolute_path",
    "count_retries",
    "delete",
    "delete_all",
    "enable_retries",
    "exists",
    "explained",
    "find_files",
    "forget_clients",
    "info",
    "is_s3",
    "join",
    "list_files",
    "list_stamps",
    "match_files",
    "move",
    "object_names",
    "open_ranges",
    "open_source",
    "parquet_filesystem",
    "put_if_absent",
    "read_bytes",
    "read_object",
    "read_with_etag",
    "refuses_path",
    "remove_leftovers",
    "replace_if_match",
    "retries_enabled",
    "stamp_size",
    "take_retries",
    "with_retries",
    "write_atomic",
    "write_stream",
]
