"""What there is in an output to show: counts by stratum, and examples chosen at random."""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from wallaroo.model.errors import InputError
from wallaroo.workflows.outputs.layout import shard_path
from wallaroo.workflows.reports.summaries import Part, Summaries
from wallaroo.workflows.reports.tally import MAX_PICTURES, Details, Stratum, Tally, drawn

MAX_EXAMPLES = 20
"""Rows shown of each error kind."""


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


def survey_output(output: str, parts: Sequence[Part]) -> Survey:
    """What the data set holds in the planned parts, as far as they are done. Renews summaries."""
    summaries, survey = Summaries(output, parts), Survey()
    for part in parts:
        tally = summaries.of_part(part)
        survey.add(_survey_part(tally))
        # Error rows are only looked at where some of them are still to be shown.
        wanted = {kind for kind in tally.errors if len(survey.examples.get(_kind(kind), [])) < MAX_EXAMPLES}
        for _, shard in summaries.of_shards(part) if wanted else ():
            survey.add(_examples(shard.failed or ()))
    survey.unreadable = [shard_path(output, shard) for shard in sorted(summaries.unreadable)]
    with suppress(InputError, OSError):
        summaries.save()
    return survey


def _survey_part(tally: Tally) -> Survey:
    details = tally.details or Details()
    survey = Survey(tally.rows, tally.ok, environments=tally.environments, pictures=details.pictures)
    for kind, count in tally.errors.items():
        survey.errors[_kind(kind)] += count
    for stratum, runs in details.places.items():
        rows = drawn(runs, MAX_PICTURES)
        survey.places[stratum] = [Place(draw, row.shard, row.position) for draw, row in rows]
    return survey


def _examples(failed: Iterable[Mapping[str, Any]]) -> Survey:
    survey = Survey()
    for row in failed:
        line = row["line"]
        example = Example(
            name_of({"id": line["id"], "sample": row["sample"]}),
            shorten(line["message"], 300),
            shorten(line.get("prompt"), 200),
        )
        survey.examples.setdefault(_kind(line["kind"]), []).append(example)
    survey.examples.pop("", None)
    return survey


def _kind(kind: str | None) -> str:
    return shorten(kind, 60)


def name_of(row: Mapping[str, Any]) -> str:
    name = shorten(row["id"], 100)
    return f"{name}/{row['sample']}" if row["sample"] else name


def shorten(text: str | None, length: int) -> str:
    text = text or ""
    return text if len(text) <= length else text[: length - 1] + "…"
