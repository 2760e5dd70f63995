"""The files of `summaries/`: JSON values, a line each, covered by a checksum.

A summary is a cache. If one is absent, damaged or of another version, it is made again. Nothing here raises
because of the contents of a file. Knows nothing of what is counted.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable
from typing import Any

from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import summary_path

FORMAT = 1
"""Version of the files."""
MAX_BYTES = 64 << 20
"""Most bytes of a summary in memory. A longer one is neither written nor read."""


def write_lines(output: str, part: str, lines: Iterable[bytes]) -> None:
    """Writes a summary file, over an older one if there is one. Above MAX_BYTES it writes nothing.

    Args:
        output: Folder of the run, local or on S3.
        part: Name of the plan part, or `all`.
        lines: JSON values without newlines.
    """
    body = b"".join(line + b"\n" for line in lines)
    if len(body) > MAX_BYTES:
        return
    head = {"format": FORMAT, "part": part, "sha256": hashlib.sha256(body).hexdigest()}
    # Without a time, equal summaries are equal files.
    data = gzip.compress(json.dumps(head).encode() + b"\n" + body, compresslevel=1, mtime=0)
    storage.write_atomic(summary_path(output, part), data)


def read_lines(output: str, part: str) -> list[Any]:
    """Reads the values of a summary file.

    Args:
        output: Folder of the run, local or on S3.
        part: Name of the plan part, or `all`.

    Returns:
        The values; none if the file is absent, damaged, or of another part or version.
    """
    return [json.loads(line) for line in read_texts(output, part)]


def read_texts(output: str, part: str) -> list[bytes]:
    """Reads the lines of a summary file as JSON text.

    Args:
        output: Folder of the run, local or on S3.
        part: Name of the plan part, or `all`.

    Returns:
        The lines; none if the file is absent, damaged, or of another part or version.
    """
    try:
        data = storage.read_bytes(summary_path(output, part))
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            text = file.read(MAX_BYTES + 1)
        head, _, body = text.partition(b"\n")
        wanted = {"format": FORMAT, "part": part, "sha256": hashlib.sha256(body).hexdigest()}
        if len(text) > MAX_BYTES or json.loads(head) != wanted:
            return []
        lines = body.splitlines()
        for line in lines:
            json.loads(line)
        return lines
    except (FileNotFoundError, EOFError, gzip.BadGzipFile, ValueError, RecursionError, zlib.error):
        return []
