"""The files of `summaries/`: JSON values, a line each, that a checksum covers.

A summary is a cache. One that is absent, damaged or of another version is as good as none, and whoever
needs it makes it anew; so nothing here raises because of what a file says. Knows nothing of what is counted.
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
MAX_BYTES = 64 << 20
"""Of a summary in memory. A longer one is none: nobody has written it, or it is better made anew."""


def write_lines(output: str, part: str, lines: Iterable[bytes]) -> None:
    """Writes a summary file over the one there may be.

    Args:
        output: Folder of the run.
        part: Name of the plan part, or `all`.
        lines: JSON values without newlines.
    """
    body = b"".join(line + b"\n" for line in lines)
    if len(body) > MAX_BYTES:
        return
    head = {"format": FORMAT, "part": part, "sha256": hashlib.sha256(body).hexdigest()}
    # Without a time in it, equal summaries are equal files.
    data = gzip.compress(json.dumps(head).encode() + b"\n" + body, compresslevel=1, mtime=0)
    storage.write_atomic(summary_path(output, part), data)


def read_lines(output: str, part: str) -> list[Any]:
    """The values in a summary file; none where it is absent, damaged, or of another part or version."""
    return [json.loads(line) for line in read_texts(output, part)]


def read_texts(output: str, part: str) -> list[bytes]:
    """The lines of a summary file as they stand there; see `read_lines`."""
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
