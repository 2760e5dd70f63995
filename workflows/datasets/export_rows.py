"""What an export takes from a row of a finished output: facts as JSON values, file names, picture files.

Knows nothing of any format.
"""

import io
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from wallaroo.model.errors import InputError
from wallaroo.workflows.datasets.content_credentials import CredentialSigner
from wallaroo.workflows.datasets.export_files import MARK, Results, Row, file_stem, place
from wallaroo.workflows.datasets.export_sink import Sink
from wallaroo.workflows.outputs.rows import encode_image
from wallaroo.workflows.outputs.schema import MIME_TYPES
from wallaroo.workflows.outputs.values import jsonable
from wallaroo.workflows.outputs.xmp import embed, xmp_packet

SUFFIXES = {MIME_TYPES["png"]: "png", MIME_TYPES["webp"]: "webp", MIME_TYPES["jpeg"]: "jpg"}


NAMED_FILES = 10
"""Missing files that a summary names."""


class Options(NamedTuple):
    """Options of an export that its format reads."""

    embed: bool
    """Write metadata into pictures."""
    image_urls: str | None
    """URL below which pictures are served, or None; see `export`."""
    signer: CredentialSigner | None = None
    """Signs pictures, if given."""


@dataclass
class Count:
    """The counts of an export so far."""

    exported: int = 0
    """Ok rows that are exported."""
    left_out: int = 0
    """Ok rows that the format has no place for."""
    renamed: int = 0
    """Rows whose id is no safe file name."""
    misses: int = 0
    """Files that an evaluator looks for and that have no picture."""
    unread: int = 0
    """Sources of edits that have changed since."""
    missed: list[str] = field(default_factory=list)
    """The first NAMED_FILES names of `misses`."""

    def miss(self, name: str) -> None:
        """Counts a file that an evaluator looks for and that has no picture."""
        self.misses += 1
        if len(self.missed) < NAMED_FILES:
            self.missed.append(name)


class Exporter(Protocol):
    """Writes an output in one format."""

    def __call__(self, results: Results, sink: Sink, count: Count, options: Options, /) -> None:
        """Writes the files of the format.

        Args:
            results: The rows of the output.
            sink: Writes the files.
            count: Counts what is exported and left out.
            options: Options of the export. Formats of answers, which have no pictures, need none.

        Raises:
            InputError: The rows lack what the format needs.
        """


# Rows


_FACTS = (
    "id",
    "sample",
    "row_id",
    "task",
    "prompt",
    "width",
    "height",
    "sha256",
    "seed",
    "cfg",
    "temperature",
    "top_k",
    "top_p",
    "language",
    "mode",
    "model_digest",
)
_SOURCE_FACTS = ("source_uri", "source_sha256", "source_row_id")


def source_facts(row: Row) -> dict[str, Any]:
    """The origin of a row's source picture; empty for a task without one."""
    if row.values["task"] == "generate":
        return {}
    source = row.values["source"] or {}
    return {name: source.get(name.removeprefix("source_")) for name in _SOURCE_FACTS}


def picture_facts(row: Row) -> dict[str, Any]:
    """What is said of a picture: the columns of _FACTS and its source, as JSON values."""
    return {name: jsonable(row.values[name]) for name in _FACTS} | source_facts(row)


def stem_of(row: Row, count: Count, dots: bool = True, samples: bool = True) -> str:
    """The stem of a row's file names: its id, its version if there are several, and its sample number.

    Args:
        row: The row.
        count: Counts the row if its id is no safe file name.
        dots: Whether the name may have dots.
        samples: Add the sample number where the manifest row has several samples.

    Returns:
        The stem, without suffix.
    """
    row_id, version, sample = place(row.values)
    stem = file_stem(row_id, dots)
    count.renamed += stem != row_id
    if version:
        stem += f"{MARK}v{version}"
    if samples and (row.follows or row.followed):
        stem += f"{MARK}{sample}"
    return stem


# Pictures


def packet_of(*rows: Row) -> bytes:
    """The XMP packet of one picture made of these rows: the prompt of the first, and the seeds of all."""
    first = rows[0].values
    seeds = " ".join(str(row.values["seed"]) for row in rows)
    return xmp_packet(first["prompt"] or "", seeds, first["model_digest"])


def bytes_of(row: Row) -> bytes:
    """The picture file of an ok row.

    Raises:
        InputError: The row has no picture.
    """
    if row.picture is None:
        raise InputError(f"row_id {row.values['row_id']} is ok, but has no image: verify the output.")
    return row.picture


def picture_of(row: Row, options: Options, form: str | None = None) -> bytes:
    """The picture file of a row, unchanged unless its format changes or it gets metadata.

    Args:
        row: The row.
        options: Of the export.
        form: Format of the file (`png`, `webp`, `jpeg`); None for that of the run.

    Returns:
        The bytes of the file.

    Raises:
        InputError: The row has no picture.
    """
    data = bytes_of(row)
    if form is not None and row.values["mime_type"] != MIME_TYPES[form]:
        data = encode_image(pixels_of(row), form)[0]
    return embed(data, packet_of(row)) if options.embed else data


def pixels_of(row: Row) -> np.ndarray:
    """The pixels of a row's picture, uint8 [height, width, 3]."""
    from PIL import Image

    with Image.open(io.BytesIO(bytes_of(row))) as image:
        return np.asarray(image.convert("RGB"))


def memory_of(row: Row) -> int:
    """Memory to re-encode a row's picture, in bytes: two files, and the pixels."""
    return 2 * len(bytes_of(row)) + 3 * row.values["width"] * row.values["height"]
