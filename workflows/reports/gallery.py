"""Cards of the gallery: thumbnails of pictures and of their sources."""

import base64
import hashlib
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from wallaroo.model.errors import InputError, RowError
from wallaroo.workflows.outputs.shards import map_shards, open_finished
from wallaroo.workflows.reports.survey import Place, name_of, shorten
from wallaroo.workflows.reports.tally import Stratum, size_of
from wallaroo.workflows.sources.embedded import Cell, parse_cell, read_cells

if TYPE_CHECKING:
    from PIL import Image


THUMBNAIL = 240
"""Longest side of a thumbnail, in pixels; smaller pictures stay as they are."""
SOURCE_SECONDS = 60.0
"""Seconds for fetching sources and making thumbnails; the remaining ones are shown by name."""
ReadSource = Callable[[str], bytes | None]
"""Reference to a source, as in a manifest -> the bytes of its file, None if they cannot be had."""


@dataclass(frozen=True)
class Card:
    """A row of the gallery."""

    name: str
    """Id of the row, and its sample number if that is not 0."""
    prompt: str
    """The prompt, shortened."""
    language: str
    """Code of the prompt's language."""
    task: str
    """`generate`, `edit` or `understand`."""
    width: int
    """As in `Stratum`, in pixels."""
    height: int
    """As in `Stratum`, in pixels."""
    seed: int | None
    """Seed of the row."""
    cfg: float | None
    """Scale of classifier-free guidance."""
    thumbnail: str
    """Data URI of the result; empty if it is no picture, or cannot be decoded."""
    text: str = ""
    """The result, if it is a text."""
    source: str = ""
    """Where the source is, as a manifest would name it."""
    sha256: str = ""
    """Of the source file, in hexadecimal."""
    before: str = ""
    """Data URI of the source; empty if there is none, or it cannot be decoded."""


def read_cards(output: str, chosen: Mapping[Stratum, Sequence[Place]], budget: int) -> dict[Place, Card]:
    """Reads the chosen rows, without their sources.

    Args:
        output: The folder of the run, local or `s3://`.
        chosen: The places of the rows of each stratum.
        budget: Most bytes of a thumbnail.

    Returns:
        The card of each place.
    """
    by_shard: dict[int, list[Place]] = {}
    for place in sorted(_flat(chosen), key=_in_order):
        by_shard.setdefault(place.shard, []).append(place)
    found = map_shards(lambda shard: _shard_cards(output, by_shard[shard], budget), by_shard, threads=4)
    return {place: card for cards in found for place, card in cards.items()}


def _flat(chosen: Mapping[Stratum, Sequence[Place]]) -> list[Place]:
    return [place for places in chosen.values() for place in places]


def _in_order(place: Place) -> tuple[int, int]:
    return place.shard, place.position


_SHOWN = (
    "id",
    "sample",
    "prompt",
    "language",
    "task",
    "width",
    "height",
    "seed",
    "cfg",
    "image",
    "text",
    "source",
)


def _shard_cards(output: str, places: Sequence[Place], budget: int) -> dict[Place, Card]:
    cards = {}
    with open_finished(output, places[0].shard) as parquet:
        start = 0
        for group in range(parquet.num_row_groups):
            stop = start + parquet.metadata.row_group(group).num_rows
            wanted = [place for place in places if start <= place.position < stop]
            if wanted:
                table = parquet.read_row_group(group, columns=list(_SHOWN))
                rows = table.take([place.position - start for place in wanted]).to_pylist()
                for place, row in zip(wanted, rows, strict=True):
                    cards[place] = _card(row, budget)
            start = stop
    return cards


def _card(row: Mapping[str, Any], budget: int) -> Card:
    return Card(
        name=name_of(row),
        prompt=shorten(row["prompt"], 300),
        language=row["language"],
        task=row["task"],
        width=size_of(row)[0],
        height=size_of(row)[1],
        seed=row["seed"],
        cfg=row["cfg"],
        thumbnail=thumbnail((row["image"] or {}).get("bytes") or b"", budget),
        text=shorten(row["text"], 1000),
        source=_reference(row["source"] or {}),
        sha256=(row["source"] or {}).get("sha256") or "",
    )


def _reference(source: Mapping[str, Any]) -> str:
    """How a manifest would name a source; "" if it has no name."""
    uri, row = source.get("uri") or "", source.get("row_id")
    return str(Cell(uri, row)) if uri and row is not None else uri


def _with_sources(cards: dict[Place, Card], read_source: ReadSource, budget: int) -> dict[Place, Card]:
    """The cards with thumbnails of their sources, each source fetched and made small once."""
    named = list(dict.fromkeys((card.source, card.sha256) for card in cards.values() if card.source))
    end = time.monotonic() + SOURCE_SECONDS
    small: dict[tuple[str, str], str] = {}

    def read(number: int) -> bytes | None:
        return read_source(named[number][0]) if time.monotonic() < end else None

    for name, data in zip(named, map_shards(read, range(len(named)), threads=4), strict=True):
        # The file there now may differ from what the model was given.
        same = data is not None and hashlib.sha256(data).hexdigest() == name[1]
        # One after the other, since a decoded source may be a hundred times as large as its file.
        small[name] = source_thumbnail(data, budget) if data and same and time.monotonic() < end else ""
    return {
        place: replace(card, before=small.get((card.source, card.sha256), ""))
        for place, card in cards.items()
    }


def fetch_source(reference: str) -> bytes | None:
    """The file of a source, of at most 64 MiB.

    The source may be at an absolute path, on S3 or in a row of a Parquet file (`FILE#ROW`). It may be gone by
    now, and a report never waits long for it. Web addresses are not asked again: who opens a report has not
    agreed to that.

    Returns:
        Its bytes; None if it cannot be read.
    """
    from wallaroo.workflows.sources.fetch import fetch
    from wallaroo.workflows.sources.references import Reference, SourceOptions

    options = SourceOptions(folder="/", most_bytes=64 << 20, retry_seconds=2)
    found: Reference = reference
    try:
        cell = parse_cell(reference)
        for _, value in read_cells(cell.path, [cell.row]) if cell else ():
            found = value
        return None if isinstance(found, RowError) else fetch(found, options).data
    except (RowError, InputError):
        return None


def source_thumbnail(data: bytes, budget: int) -> str:
    """The thumbnail of a source as the model sees it: upright, on white, its first frame.

    Args:
        data: The picture file.
        budget: Most bytes of the thumbnail.

    Returns:
        A data URI; empty if the picture cannot be decoded.
    """
    from wallaroo.workflows.sources.decode import decode

    try:
        return _small(decode(data), budget)
    except RowError:
        return ""


def thumbnail(data: bytes, budget: int) -> str:
    """A picture file as a small WebP.

    Args:
        data: The picture file.
        budget: Most bytes of the thumbnail.

    Returns:
        A data URI; empty if the file is no picture.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    return _small(image, budget)


def _small(image: "Image.Image", budget: int) -> str:
    from PIL import Image

    side = THUMBNAIL
    while True:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in (80, 50, 25):
            sink = io.BytesIO()
            image.save(sink, "WEBP", quality=quality, method=4)
            if sink.tell() <= budget:
                return "data:image/webp;base64," + base64.b64encode(sink.getvalue()).decode()
        if max(image.size) <= 8:
            return ""
        side = max(image.size) // 2
