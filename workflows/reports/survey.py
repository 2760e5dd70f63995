"""What an output has to show: counts by stratum, and examples chosen at random."""

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
    """Where a picture is."""

    draw: int
    """Its number in the random draw; the lowest ones are shown."""
    shard: int
    """Number of its shard."""
    position: int
    """Place of its row in the file."""


@dataclass(frozen=True)
class Example:
    """An error row, its texts shortened."""

    name: str
    """Id of the row, and its sample number if that is not 0."""
    message: str
    """What went wrong."""
    prompt: str
    """The prompt."""


@dataclass
class Survey:
    """What the data set holds, from all columns but the pictures."""

    rows: int = 0
    """All rows."""
    ok: int = 0
    """Rows with a result."""
    errors: Counter[str] = field(default_factory=Counter)
    """Kind -> error rows."""
    examples: dict[str, list[Example]] = field(default_factory=dict)
    """Kind -> its first rows."""
    environments: Counter[str] = field(default_factory=Counter)
    """Digest of the environment -> ok rows."""
    pictures: Counter[Stratum] = field(default_factory=Counter)
    """Pictures of each stratum."""
    places: dict[Stratum, list[Place]] = field(default_factory=dict)
    """The pictures of each stratum that come first in the draw."""
    unreadable: list[str] = field(default_factory=list)
    """Paths of files in `data/` that cannot be read as shards."""

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
    """Surveys the finished shards of the planned parts, and saves new summaries.

    Args:
        output: The folder of the run, local or `s3://`.
        parts: The parts of its plan.

    Returns:
        What the data set holds.
    """
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
    """The id of a row, shortened, and its sample number if that is not 0."""
    name = shorten(row["id"], 100)
    return f"{name}/{row['sample']}" if row["sample"] else name


def shorten(text: str | None, length: int) -> str:
    """Cuts a text to a number of characters, the last one `…`.

    Args:
        text: The text; None counts as empty.
        length: Most characters.

    Returns:
        The text, or its beginning.
    """
    text = text or ""
    return text if len(text) <= length else text[: length - 1] + "…"
