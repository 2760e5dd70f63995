"""What there is in an output to show: counts by stratum, and examples chosen at random."""

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from wallaroo.workflows.outputs.layout import list_done, shard_path
from wallaroo.workflows.outputs.schema import TEXT_TASKS
from wallaroo.workflows.outputs.shards import map_shards, open_shard

MAX_PICTURES = 400
"""Thumbnails of the gallery; an edit has two."""
MAX_EXAMPLES = 20
"""Rows shown of each error kind."""


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
            survey.errors[shorten(row["error_type"], 60)] += 1
            continue
        survey.ok += 1
        survey.environments[row["environment_digest"]] += 1
        stratum = Stratum(row["task"], row["language"], *size_of(row))
        survey.pictures[stratum] += 1
        survey.places.setdefault(stratum, []).append(Place(int(draws[position]), shard, position))
    for row in examples.to_pylist() if examples is not None else []:
        kept = survey.examples.setdefault(shorten(row["error_type"], 60), [])
        if row["status"] != "ok" and len(kept) < MAX_EXAMPLES:
            kept.append(
                Example(name_of(row), shorten(row["error_message"], 300), shorten(row["prompt"], 200))
            )
    survey.examples.pop("", None)
    return survey


def size_of(row: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height of a row's picture, that of its source if the row is a text."""
    shown = (row["source"] or {}) if row["task"] in TEXT_TASKS else row
    return shown.get("width") or 0, shown.get("height") or 0


def _draw(row_ids: np.ndarray) -> np.ndarray:
    """A uint64 hash of each number (the finalizer of splitmix64)."""
    z = row_ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def name_of(row: Mapping[str, Any]) -> str:
    name = shorten(row["id"], 100)
    return f"{name}/{row['sample']}" if row["sample"] else name


def shorten(text: str | None, length: int) -> str:
    text = text or ""
    return text if len(text) <= length else text[: length - 1] + "…"
