"""Pictures of an output with Content Credentials, each beside the source that it was edited from."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from wallaroo.model.errors import RowError
from wallaroo.workflows.datasets.content_credentials import CredentialSigner
from wallaroo.workflows.datasets.export_files import Row
from wallaroo.workflows.datasets.export_rows import Count, Options, picture_of
from wallaroo.workflows.datasets.export_sink import Sink
from wallaroo.workflows.datasets.look import fetch_all
from wallaroo.workflows.sources.embedded import Cell
from wallaroo.workflows.sources.references import SourceOptions

BATCH_ROWS = 8
"""Rows whose pictures and sources are in memory at a time."""

_FACTS = ("task", "mode", "seed", "model_digest", "config_digest", "environment_digest", "content_digest")


def signed_pictures(
    named: Iterable[tuple[Row, str]], signer: CredentialSigner, sink: Sink, count: Count, options: Options
) -> Iterator[tuple[Row, str, bytes]]:
    """The signed files of rows.

    A file that an earlier export signed alike comes back as it is, since no two signatures are equal.

    Args:
        named: Ok rows, each with the name of its file.
        signer: Signs them.
        sink: Where files of an earlier export may be.
        count: Counts the sources that cannot be had as they were.
        options: Of the export.

    Yields:
        Row, name and bytes of the file.
    """
    batch: list[tuple[Row, str]] = []
    for one in named:
        batch.append(one)
        if len(batch) == BATCH_ROWS:
            yield from _signed(batch, signer, sink, count, options)
            batch = []
    yield from _signed(batch, signer, sink, count, options)


def _signed(
    batch: list[tuple[Row, str]], signer: CredentialSigner, sink: Sink, count: Count, options: Options
) -> Iterator[tuple[Row, str, bytes]]:
    plain = [picture_of(row, options) for row, _ in batch]
    facts = [_facts(row, data) for (row, _), data in zip(batch, plain, strict=True)]
    existing = [sink.read(name) for _, name in batch]
    for place, (row, _) in enumerate(batch):
        data = existing[place]
        if data is not None and not signer.has_signed(data, row.values["mime_type"], facts[place]):
            existing[place] = None
    sources = _sources([row if existing[place] is None else None for place, (row, _) in enumerate(batch)])
    for place, (row, name) in enumerate(batch):
        data = existing[place]
        if data is None:
            source = sources.get(place)
            count.unread += source is not None and source[1] is None
            data = signer.sign(plain[place], row.values["mime_type"], name, facts[place], source)
        yield row, name, data


def _facts(row: Row, data: bytes) -> dict[str, Any]:
    """The facts that a row's credentials state. The seed is text, since JSON readers round such numbers."""
    facts = {name: str(row.values[name]) for name in _FACTS} | {"sha256": hashlib.sha256(data).hexdigest()}
    source = row.values["source"] if row.values["task"] != "generate" else None
    return facts | ({"source_sha256": source["sha256"]} if source else {})


def _sources(rows: list[Row | None]) -> dict[int, tuple[str, bytes | None]]:
    """Place in the list -> name and bytes of the source; no bytes if it has changed."""
    found: dict[int, tuple[str, bytes | None]] = {}
    references: list[str] = []
    places: list[int] = []
    for place, row in enumerate(rows):
        source = row.values["source"] if row is not None and row.values["task"] != "generate" else None
        if not source:
            continue
        uri, inside = source["uri"] or "", source["row_id"]
        name = str(Cell(uri, inside)) if inside is not None else uri
        found[place] = name.rpartition("/")[2] or "source", None
        # What a line of a manifest held is nowhere else.
        if uri and not uri.startswith("data:"):
            references.append(name)
            places.append(place)
    for positions, fetched in fetch_all(references, SourceOptions("/", https=True)):
        if isinstance(fetched, RowError):
            continue
        for position in positions:
            place = places[position]
            row = rows[place]
            assert row is not None
            if fetched.sha256 == row.values["source"]["sha256"]:
                found[place] = found[place][0], fetched.data
    return found
