"""`report.html`: one file without network that shows what a run made, how fast, and what went wrong.

It reads the data set as anybody would: first all columns but the pictures, a few shards at a time, then
only the row groups of the rows it has chosen. The data set has the sources of edits and answers by name
alone, so those of the chosen rows are fetched once more; where one is gone, its name stands in its place.
Knows nothing of Ray or of the model.
"""

import base64
import hashlib
import heapq
import io
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from model.errors import InputError, RowError
from workflows import storage
from workflows.cells import Cell, parse_cell, read_cells
from workflows.estimate import compare
from workflows.plan import read_plan
from workflows.results import TEXT_TASKS, flat, list_done, map_shards, open_shard, read_run, shard_path
from workflows.runs import RunRecord, duration, read_records

if TYPE_CHECKING:
    from PIL import Image

REPORT_FILE = "report.html"
EVALUATION_FILE = "evaluation.json"
"""The table of `wallaroo evaluate`."""
MAX_BYTES = 8_000_000
MAX_PICTURES = 400
"""Thumbnails of the gallery; an edit has two."""

MAX_EXAMPLES = 20
"""Rows shown of each error kind."""

MAX_KINDS = 40
MAX_RUNS = 20
THUMBNAIL = 240
"""Longest side of a thumbnail, in pixels; smaller pictures stay as they are."""

PICTURE_BYTES = 6_000_000
"""Of MAX_BYTES, what all thumbnails together may take, as base64."""

SOURCE_SECONDS = 60.0
"""So long sources are fetched and made small; those that are left after it are shown by name."""

NOUNS = {"generate": ("picture", "pictures"), "edit": ("edit", "edits"), "understand": ("answer", "answers")}
"""Task -> what one row of it is called, and several."""

BINS = 120
"""Points of the throughput graph."""

_TEMPLATES = Path(__file__).parent / "templates"


ReadSource = Callable[[str], bytes | None]
"""Reference to a source, as in a manifest -> the bytes of its file, None if they cannot be had."""


class Stratum(NamedTuple):
    """Rows that look alike to the gallery, which shows some of each.

    width, height: pixels of the result; of the source (0 if unknown) where the result is a text.
    """

    task: str
    language: str
    width: int
    height: int


class Place(NamedTuple):
    """Where a picture lies, and its place in the draw: the lowest are drawn."""

    draw: int
    shard: int
    position: int


@dataclass(frozen=True)
class Example:
    """An error row, its words cut to a length."""

    name: str
    message: str
    prompt: str


@dataclass(frozen=True)
class Card:
    """A row of the gallery.

    thumbnail: data URI of the result, before: of the source; empty where there is no picture, or none
    that can be decoded. text: the result, if that is one. source, sha256: of the source, how a
    manifest would name it and its hash.
    width, height: as in Stratum.
    """

    name: str
    prompt: str
    language: str
    task: str
    width: int
    height: int
    seed: int | None
    cfg: float | None
    thumbnail: str
    text: str = ""
    source: str = ""
    sha256: str = ""
    before: str = ""


@dataclass
class Survey:
    """What the data set holds, from all of its columns but the pictures.

    rows, ok: counts. errors: kind -> rows. examples: kind -> the first rows of it. environments: digest
    -> ok rows. pictures: how many there are of a stratum; places: those of them that come first in the
    draw. unreadable: paths of files that are no Parquet files of ours.
    """

    rows: int = 0
    ok: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    environments: Counter[str] = field(default_factory=Counter)
    pictures: Counter[Stratum] = field(default_factory=Counter)
    places: dict[Stratum, list[Place]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)

    def add(self, other: "Survey") -> None:
        """Takes in what was found in another shard; call it in the order of the shards."""
        self.rows += other.rows
        self.ok += other.ok
        self.errors += other.errors
        self.environments += other.environments
        self.pictures += other.pictures
        self.unreadable += other.unreadable
        for kind, examples in other.examples.items():
            kept = self.examples.setdefault(kind, [])
            kept += examples[: MAX_EXAMPLES - len(kept)]
        for stratum, places in other.places.items():
            known = self.places.setdefault(stratum, [])
            known += places
            if len(known) > 4 * MAX_PICTURES:
                self.places[stratum] = heapq.nsmallest(MAX_PICTURES, known)

    def choose(self, pictures: int) -> dict[Stratum, list[Place]]:
        """So many places at most, as evenly over the strata as they go."""
        chosen = {}
        left = pictures
        # The smallest strata first: what they do not use is shared by the others.
        order = sorted(self.places, key=lambda stratum: (len(self.places[stratum]), stratum))
        for index, stratum in enumerate(order):
            share = left // (len(order) - index)
            chosen[stratum] = heapq.nsmallest(share, self.places[stratum])
            left -= len(chosen[stratum])
        return {stratum: places for stratum, places in chosen.items() if places}


@dataclass(frozen=True)
class Chart:
    """Throughput over the time that drivers were at work, as coordinates of an SVG drawing.

    line, area: points. x_ticks, y_ticks: coordinate and label. starts: where a run begins, and its number.
    """

    width: int
    height: int
    line: str
    area: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    starts: list[tuple[float, int]]


def write_report(output: str, read_source: ReadSource | None = None) -> str:
    """Writes OUTPUT/report.html, at any time in the life of a run, and returns its path.

    read_source: how sources of edits and answers are fetched, by default `fetch_source`; it may be called
    from several threads. Memory is bounded by a few shards' columns, the row groups of the rows shown
    and a few sources. Raises InputError if `output` is no output of ours.
    """
    path = storage.join(output, REPORT_FILE)
    storage.write_atomic(path, render_report(output, read_source))
    return path


def render_report(output: str, read_source: ReadSource | None = None) -> bytes:
    """The page, as UTF-8 of at most MAX_BYTES; see `write_report`."""
    run = read_run(output)
    preset = run["options"].get("preset")
    config = ({"preset": preset} if preset else {}) | run["config"]
    plan = read_plan(output)
    survey = survey_output(output, plan.shards)
    records, _ = read_records(output)
    shown = records[-MAX_RUNS:]
    facts = {
        "output": output,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "config": {key: _cut(str(value), 300) for key, value in flat(config).items()},
        "planned": plan.rows,
        "planning": not plan.complete,
        "missing": plan.rows - survey.rows,
        "survey": survey,
        "kinds": survey.errors.most_common(MAX_KINDS),
        "more_kinds": max(0, len(survey.errors) - MAX_KINDS),
        "strata": sorted(survey.pictures.items(), key=lambda item: (-item[1], item[0])),
        "runs": shown,
        "earlier_runs": len(records) - len(shown),
        "chart": draw_chart(shown),
        "scores": _scores(output),
        "estimate": compare(output),
        "seconds": sum(record.seconds for record in records),
        "images": sum(record.images for record in records),
        "nouns": NOUNS.get(str(config.get("task")), NOUNS["generate"]),
    }
    thumbnails = 2 if config.get("task") == "edit" else 1
    rows = MAX_PICTURES // thumbnails
    chosen = survey.choose(rows)
    # A byte is four thirds of a base64 letter.
    budget = PICTURE_BYTES // max(thumbnails * len(_flat(chosen)), 1) * 3 // 4
    cards = _with_sources(read_cards(output, chosen, budget), read_source or fetch_source, budget)
    while True:
        page = _render(facts, chosen, [cards[place] for place in sorted(_flat(chosen), key=_in_order)])
        # Thumbnails have a budget, so only words of unusual length can make the page too large.
        if len(page) <= MAX_BYTES or not rows:
            return page
        # Of fewer rows each is among those of more.
        rows //= 2
        chosen = survey.choose(rows)


def _scores(output: str) -> list[dict[str, Any]]:
    """Lines of the table of `wallaroo evaluate`, if there is one: where they are of, and shares by name."""
    path = storage.join(output, EVALUATION_FILE)
    if not storage.exists(path):
        return []
    try:
        lines = json.loads(storage.read_bytes(path))["lines"]
        return [
            {name: line[name] for name in ("task", "kind", "language", "size", "rows")}
            | {"right": {name: hits / of for name, (hits, of) in line["right"].items()}}
            for line in lines
        ]
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RecursionError):
        raise InputError(f"{path} is no table of scores; `wallaroo evaluate` writes it anew.") from None


# What there is


def survey_output(output: str, shards: range) -> Survey:
    """What the data set holds in the planned `shards`, as far as they are done."""
    survey = Survey()
    done = sorted(shard for shard in list_done(output) if shard in shards)
    for found in map_shards(lambda shard: _survey_shard(output, shard), done):
        survey.add(found)
    return survey


_COUNTED = (
    "row_id",
    "task",
    "status",
    "error_type",
    "width",
    "height",
    "source.width",
    "source.height",
    "language",
    "environment_digest",
)
_EXAMPLE = ("id", "sample", "status", "error_type", "error_message", "prompt")


def _survey_shard(output: str, shard: int) -> Survey:
    survey = Survey()
    try:
        with open_shard(output, shard) as parquet:
            counted = parquet.read(columns=list(_COUNTED))
            failed = "error" in counted.column("status").unique().to_pylist()
            examples = parquet.read(columns=list(_EXAMPLE)) if failed else None
    except (pa.ArrowException, OSError):
        survey.unreadable.append(shard_path(output, shard))
        return survey
    survey.rows = len(counted)
    draws = _draw(counted.column("row_id").to_numpy())
    for position, row in enumerate(counted.to_pylist()):
        if row["status"] != "ok":
            survey.errors[_cut(row["error_type"], 60)] += 1
            continue
        survey.ok += 1
        survey.environments[row["environment_digest"]] += 1
        stratum = Stratum(row["task"], row["language"], *_size(row))
        survey.pictures[stratum] += 1
        survey.places.setdefault(stratum, []).append(Place(int(draws[position]), shard, position))
    for row in examples.to_pylist() if examples is not None else []:
        kept = survey.examples.setdefault(_cut(row["error_type"], 60), [])
        if row["status"] != "ok" and len(kept) < MAX_EXAMPLES:
            kept.append(Example(_name(row), _cut(row["error_message"], 300), _cut(row["prompt"], 200)))
    survey.examples.pop("", None)
    return survey


def _size(row: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height of a row's picture, that of its source if the row is a text."""
    shown = (row["source"] or {}) if row["task"] in TEXT_TASKS else row
    return shown.get("width") or 0, shown.get("height") or 0


def _draw(row_ids: np.ndarray) -> np.ndarray:
    """A uint64 hash of each number (the finalizer of splitmix64)."""
    z = row_ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _name(row: Mapping[str, Any]) -> str:
    name = _cut(row["id"], 100)
    return f"{name}/{row['sample']}" if row["sample"] else name


def _cut(text: str | None, length: int) -> str:
    text = text or ""
    return text if len(text) <= length else text[: length - 1] + "…"


# The gallery


def read_cards(output: str, chosen: Mapping[Stratum, Sequence[Place]], budget: int) -> dict[Place, Card]:
    """The chosen rows, yet without their sources. budget: bytes of a thumbnail."""
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
    with open_shard(output, places[0].shard) as parquet:
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
        name=_name(row),
        prompt=_cut(row["prompt"], 300),
        language=row["language"],
        task=row["task"],
        width=_size(row)[0],
        height=_size(row)[1],
        seed=row["seed"],
        cfg=row["cfg"],
        thumbnail=thumbnail((row["image"] or {}).get("bytes") or b"", budget),
        text=_cut(row["text"], 1000),
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
        # What lies there now may not be what the model was shown.
        same = data is not None and hashlib.sha256(data).hexdigest() == name[1]
        # One after the other, since a decoded source may be a hundred times as large as its file.
        small[name] = source_thumbnail(data, budget) if data and same and time.monotonic() < end else ""
    return {
        place: replace(card, before=small.get((card.source, card.sha256), ""))
        for place, card in cards.items()
    }


def fetch_source(reference: str) -> bytes | None:
    """The file of a source at an absolute path, on S3 or in a row of a Parquet file (`FILE#ROW`), of at
    most 64 MiB; None if it cannot be had.

    Whatever a run has read may be gone by now, and a report never waits long for it. Web addresses are
    not asked again: who opens a report has not agreed to that.
    """
    from workflows.sources import Reference, SourceOptions, fetch

    options = SourceOptions(folder="/", most_bytes=64 << 20, patience_seconds=2)
    found: Reference = reference
    try:
        cell = parse_cell(reference)
        for _, value in read_cells(cell.path, [cell.row]) if cell else ():
            found = value
        return None if isinstance(found, RowError) else fetch(found, options).data
    except (RowError, InputError):
        return None


def source_thumbnail(data: bytes, budget: int) -> str:
    """As `thumbnail`, of a source as the model was shown it: upright, on white, its first frame."""
    from workflows.sources import decode

    try:
        return _small(decode(data), budget)
    except RowError:
        return ""


def thumbnail(data: bytes, budget: int) -> str:
    """A picture file as the data URI of a small WebP of at most `budget` bytes; "" if it is no picture."""
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


# The graph


def draw_chart(records: Sequence[RunRecord]) -> Chart | None:
    """Rows a second over time; the pauses between runs take no room. None if nothing was measured."""
    records = [record for record in records if record.seconds > 0 and len(record.samples) > 1]
    total = sum(record.seconds for record in records)
    if not records:
        return None
    width, height, left, top, bottom = 960, 240, 56, 12, 28
    rates: list[tuple[float, float]] = []
    starts = []
    offset = 0.0
    for record in records:
        times = np.array([0.0, *(sample[0] for sample in record.samples)])
        done = np.array([record.before, *(sample[1] for sample in record.samples)], float)
        end = max(float(times[-1]), 1e-3)
        bins = max(1, round(BINS * record.seconds / total))
        edges = np.linspace(0, end, bins + 1)
        per_second = np.diff(np.interp(edges, times, done)) / np.diff(edges)
        starts.append((offset, record.run))
        for index, rate in enumerate(per_second.clip(min=0)):
            rates += [(offset + edges[index], rate), (offset + edges[index + 1], rate)]
        offset += end
    y_step = _step(max(rate for _, rate in rates) or 1.0)
    y_top = y_step * max(1, math.ceil(max(rate for _, rate in rates) / y_step))
    x_step = _step(offset, (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200, 86400))

    def x(seconds: float) -> float:
        return round(left + seconds / offset * (width - left - 8), 1)

    def y(rate: float) -> float:
        return round(top + (1 - rate / y_top) * (height - top - bottom), 1)

    line = " ".join(f"{x(seconds)},{y(rate)}" for seconds, rate in rates)
    return Chart(
        width=width,
        height=height,
        line=line,
        area=f"{x(0)},{y(0)} {line} {x(offset)},{y(0)}",
        x_ticks=[(x(n * x_step), duration(n * x_step)) for n in range(int(offset / x_step) + 1)],
        y_ticks=[(y(n * y_step), f"{n * y_step:g}") for n in range(round(y_top / y_step) + 1)],
        starts=[(x(seconds), run) for seconds, run in starts],
    )


def _step(span: float, nice: Sequence[float] | None = None) -> float:
    """A round distance between about five ticks on `span`."""
    want = span / 5
    if nice is not None and want <= nice[-1]:
        return next(step for step in nice if step >= want)
    power = 10.0 ** math.floor(math.log10(want))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= want * 0.999)


# The page


def _render(facts: Mapping[str, Any], chosen: Mapping[Stratum, Sequence[Place]], cards: list[Card]) -> bytes:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["duration"] = duration
    style = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    # Only this very script may run: one that came in with a prompt could not, even if it were not escaped.
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        environment.get_template("report.html.j2")
        .render(
            **facts,
            cards=cards,
            sampled={stratum: len(places) for stratum, places in chosen.items()},
            style=Markup(style),
            script=Markup(script),
            script_hash=script_hash,
        )
        .encode()
    )
