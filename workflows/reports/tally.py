"""Counts of the rows of `data/`: of a shard, a plan part or an output, always in the same way.

The tally of a shard is in its file's footer, so its columns need not be read again. The tallies of a plan
part are in a summary (`workflows.reports.summaries`). Knows nothing of how either is found.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wallaroo.workflows.outputs.schema import TEXT_TASKS
from wallaroo.workflows.outputs.shards import TALLY_KEY
from wallaroo.workflows.reports.error_lines import error_row

MAX_PICTURES = 400
"""Rows of a stratum that a part keeps for the gallery, which shows no more of all."""
MAX_FOLDERS = 20
"""Folders of source pictures with a count of their own; rows of others are counted together."""
ELSEWHERE = ""
"""In place of a folder, where sources are in too many."""
MAX_ROWS = 1 << 23
"""No part has more rows of one stratum."""
MAX_BYTES = 16 << 10
"""Of a shard's tally as JSON: one with more says only how many rows there are, and its file is opened."""


class Stratum(NamedTuple):
    """Rows that look alike to the gallery, which shows some of each stratum."""

    task: str
    """`generate`, `edit` or `understand`."""
    language: str
    """Code of the prompt's language."""
    width: int
    """Of the result, in pixels; if that is a text, of the source (0 if unknown)."""
    height: int
    """Of the result, in pixels; if that is a text, of the source (0 if unknown)."""


class Run(NamedTuple):
    """Consecutive rows of a shard."""

    shard: int
    """Number of the shard."""
    position: int
    """Place of the first row in the file."""
    row_id: int
    """Number of the first row in the plan."""
    rows: int
    """How many rows they are."""


@dataclass
class Details:
    """Counts of ok rows that only the end of a run and its report need."""

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Width and height in pixels -> pictures."""
    languages: Counter[str] = field(default_factory=Counter)
    """Code of the prompt's language -> rows."""
    folders: Counter[str] = field(default_factory=Counter)
    """Folder of source pictures -> rows."""
    pictures: Counter[Stratum] = field(default_factory=Counter)
    """Rows of each stratum."""
    places: dict[Stratum, list[Run]] = field(default_factory=dict)
    """Where the rows of each stratum are: per part at most MAX_PICTURES, those first in the draw."""

    def add(self, other: "Details") -> None:
        """Adds other counts, and keeps `folders` and `places` bounded."""
        self.sizes += other.sizes
        self.languages += other.languages
        self.pictures += other.pictures
        for folder, count in other.folders.items():
            is_counted = folder in self.folders or len(self.folders.keys() - {ELSEWHERE}) < MAX_FOLDERS
            self.folders[folder if is_counted else ELSEWHERE] += count
        for stratum, runs in other.places.items():
            there = self.places.setdefault(stratum, [])
            there += runs
            if len(there) > 4 * MAX_PICTURES:
                self.places[stratum] = _few(there)


@dataclass
class Tally:
    """Counts of rows in `data/`."""

    rows: int = 0
    """All rows."""
    ok: int = 0
    """Rows with a result."""
    refused: int = 0
    """Error rows that no replica started: the plan refused them, or their source was bad."""
    errors: Counter[str] = field(default_factory=Counter)
    """Kind -> error rows."""
    environments: Counter[str] = field(default_factory=Counter)
    """Digest of the environment -> ok rows."""
    seconds: float = 0.0
    """Sum over rows of the time from start to result."""
    details: Details | None = field(default_factory=Details)
    """None if they were too long to keep."""

    def add(self, other: "Tally") -> None:
        """Counts other rows in; call it in the order of the shards."""
        self.rows += other.rows
        self.ok += other.ok
        self.refused += other.refused
        self.errors += other.errors
        self.environments += other.environments
        self.seconds = round(self.seconds + other.seconds, 3)
        if self.details is not None and other.details is not None:
            self.details.add(other.details)
        else:
            self.details = None

    def counts(self) -> tuple[int, int, int, Counter[str], Counter[str]]:
        """All but seconds and details."""
        return self.rows, self.ok, self.refused, self.errors, self.environments

    def to_values(self) -> dict[str, Any]:
        """The tally as values of JSON."""
        values = {"rows": self.rows, "ok": self.ok, "refused": self.refused, "seconds": self.seconds}
        found = self.details
        details = found and {
            "sizes": [[*size, count] for size, count in found.sizes.items()],
            "languages": found.languages,
            "folders": found.folders,
            "pictures": [
                [*stratum, count, [[*run] for run in _few(found.places.get(stratum, []))]]
                for stratum, count in found.pictures.items()
            ],
        }
        return {**values, "errors": self.errors, "environments": self.environments, "details": details}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "Tally":
        """The inverse of `to_values`.

        Raises:
            ValueError: The values are not of a tally.
            TypeError: The same.
            KeyError: The same.
        """
        tally = cls(
            rows=_whole(values["rows"]),
            ok=_whole(values["ok"]),
            refused=_whole(values["refused"]),
            errors=_counts(values["errors"]),
            environments=_counts(values["environments"]),
            seconds=_finite(values["seconds"]),
            details=None,
        )
        if tally.rows != tally.ok + tally.errors.total():
            raise ValueError("its rows do not add up")
        if (found := values["details"]) is not None:
            tally.details = details = Details(
                languages=_counts(found["languages"]), folders=_counts(found["folders"])
            )
            for width, height, count in found["sizes"]:
                details.sizes[_whole(width), _whole(height)] = _whole(count)
            for task, language, width, height, count, runs in found["pictures"]:
                stratum = Stratum(str(task), str(language), _whole(width), _whole(height))
                details.pictures[stratum] = _whole(count)
                details.places[stratum] = [Run(*map(_whole, run)) for run in runs]
                if sum(run.rows for run in details.places[stratum]) > min(_whole(count), MAX_ROWS):
                    raise ValueError("it has more places than images")
        return tally


class ShardTally(NamedTuple):
    """Counts of one shard."""

    tally: Tally
    """The counts."""
    failed: list[dict[str, Any]] | None
    """Its error rows, as `error_row` gives them; None if they were too long."""

    def to_json(self) -> bytes:
        """What stands in a footer or summary: JSON without newlines, of MAX_BYTES or little more."""
        tally = self.tally.to_values()
        text = json.dumps({"tally": tally, "failed": self.failed}, separators=(",", ":"))
        if len(text) > MAX_BYTES:
            tally["details"] = None
            text = json.dumps({"tally": tally, "failed": None}, separators=(",", ":"))
        return text.encode()

    @classmethod
    def from_values(cls, values: Any) -> "ShardTally":
        """The inverse of `to_json`, from parsed JSON.

        Raises:
            ValueError: The values are not of a shard's tally.
            TypeError: The same.
            KeyError: The same.
        """
        tally, failed = Tally.from_values(values["tally"]), values["failed"]
        if failed is not None:
            for row in failed:
                _whole(row["row_id"]), _whole(row["version"]), _whole(row["sample"])
                if not isinstance(row["line"], dict) or not {"id", "kind", "message"} <= row["line"].keys():
                    raise ValueError("an error row lacks its words")
            if len(failed) != tally.errors.total():
                raise ValueError("its error rows are not those counted")
        return cls(tally, failed)

    def says(self, values: Any) -> bool:
        """Whether parsed JSON is what `to_json` gives."""
        return bool(values == json.loads(self.to_json()))

    @property
    def whole(self) -> bool:
        """Whether nothing was left out."""
        return self.tally.details is not None and self.failed is not None


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not -1e18 < value < 1e18:
        raise ValueError(f"{value!r:.40} is no number of seconds")
    return float(value)


def _counts(values: Any) -> Counter[str]:
    return Counter({str(name): _whole(count) for name, count in values.items()})


COUNTED = (
    "row_id",
    "task",
    "status",
    "error_type",
    "width",
    "height",
    "source",
    "language",
    "environment_digest",
    "started_at",
    "seconds",
)
"""Columns that a tally is made of, but for what error rows say."""
_LARGE = ("image", "tokens", "text")


def tally_of_table(table: pa.Table, shard: int) -> ShardTally:
    """Counts the rows of a shard.

    Args:
        table: The shard with all of its columns.
        shard: Its number.

    Returns:
        The counts and the error rows.
    """
    failed = table.select([name for name in table.column_names if name not in _LARGE])
    failed = failed.filter(pc.not_equal(failed.column("status"), "ok"))
    rows = [error_row(row, table.schema) for row in failed.to_pylist()]
    return ShardTally(_count(table.select(COUNTED), shard), rows)


def tally_of_file(parquet: pq.ParquetFile, shard: int, trusted: bool = True) -> ShardTally:
    """The whole tally of a shard's file.

    Args:
        parquet: The file, as `open_shard` gives it.
        shard: Its number.
        trusted: Whether the footer's tally is taken where it is whole. Otherwise, and in files of version
            0.1.0, columns are read: small ones, and of row groups with error rows all but the pictures.

    Returns:
        The counts and the error rows.
    """
    if trusted and (found := footer_tally(parquet)) is not None and found.whole:
        return found
    names = [name for name in parquet.schema_arrow.names if name not in _LARGE]
    failed: list[dict[str, Any]] = []
    for group in range(parquet.num_row_groups):
        if not _all_ok(parquet.metadata.row_group(group)):
            table = parquet.read_row_group(group, columns=names, use_threads=False)
            table = table.filter(pc.not_equal(table.column("status"), "ok"))
            failed += [error_row(row, table.schema) for row in table.to_pylist()]
    return ShardTally(_count(parquet.read(columns=[*COUNTED], use_threads=False), shard), failed)


def footer_tally(parquet: pq.ParquetFile) -> ShardTally | None:
    """The tally in the footer of a shard's file; None if there is no valid one."""
    text = (parquet.metadata.metadata or {}).get(TALLY_KEY)
    try:
        found = None if text is None else ShardTally.from_values(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return found if found and found.tally.rows == parquet.metadata.num_rows else None


def _count(table: pa.Table, shard: int) -> Tally:
    tally, details = Tally(), Details()
    tally.details = details
    tally.rows = len(table)
    tally.refused = table.column("started_at").null_count
    # Exact in any order, so that equal rows have equal tallies.
    tally.seconds = round(math.fsum(table.column("seconds").drop_null().to_pylist()), 3)
    shown: dict[Stratum, list[tuple[int, int]]] = {}
    names = [name for name in COUNTED if name not in ("started_at", "seconds")]
    for position, row in enumerate(table.select(names).to_pylist()):
        if row["status"] != "ok":
            tally.errors[row["error_type"] or ""] += 1
            continue
        tally.ok += 1
        if row["environment_digest"]:
            tally.environments[row["environment_digest"]] += 1
        if row["width"] and row["height"]:
            details.sizes[row["width"], row["height"]] += 1
        details.languages[row["language"] or ""] += 1
        uri = (row["source"] or {}).get("uri")
        if uri:
            details.folders[uri.rpartition("/")[0] + "/"] += 1
        stratum = Stratum(row["task"] or "", row["language"] or "", *size_of(row))
        details.pictures[stratum] += 1
        shown.setdefault(stratum, []).append((position, row["row_id"]))
    details.places = {stratum: _runs(shard, rows) for stratum, rows in shown.items()}
    return tally


def _runs(shard: int, rows: Sequence[tuple[int, int]]) -> list[Run]:
    """Rows of a shard, each its position and row_id, in as few runs as they go."""
    found: list[Run] = []
    for position, row_id in rows:
        last = found[-1] if found else None
        if last and (last.position + last.rows, last.row_id + last.rows) == (position, row_id):
            found[-1] = last._replace(rows=last.rows + 1)
        else:
            found.append(Run(shard, position, row_id, 1))
    return found


def _all_ok(group: pq.RowGroupMetaData) -> bool:
    """Whether the statistics of a row group prove that it has no error row."""
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema == "status":
            stats = column.statistics
            return bool(
                stats and stats.has_min_max and stats.min == stats.max == "ok" and not stats.null_count
            )
    return False


def size_of(row: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height of a row's picture, that of its source if the row is a text."""
    shown = (row["source"] or {}) if row["task"] in TEXT_TASKS else row
    return shown.get("width") or 0, shown.get("height") or 0


def draws(row_ids: np.ndarray) -> np.ndarray:
    """The place in the draw of rows: a uint64 hash of each number (the finalizer of splitmix64)."""
    z = row_ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def drawn(runs: Sequence[Run], most: int) -> list[tuple[int, Run]]:
    """The rows that come first in the draw, each with its place there.

    Args:
        runs: Of any shards.
        most: So many rows at most are given.

    Returns:
        Place in the draw, and the row as a run of its own, in the order of the draw.
    """
    table = np.array(runs, np.int64).reshape(-1, 4)
    counts = table[:, 3]
    source = np.repeat(np.arange(len(table)), counts)
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    row_ids = table[source, 2] + offsets
    places = draws(row_ids)
    order = np.argpartition(places, most)[:most] if most < len(places) else np.arange(len(places))
    order = order[np.argsort(places[order], kind="stable")]
    shards, positions = table[source[order], 0], table[source[order], 1] + offsets[order]
    found = zip(shards.tolist(), positions.tolist(), row_ids[order].tolist(), strict=True)
    return [(place, Run(*row, 1)) for place, row in zip(places[order].tolist(), found, strict=True)]


def _few(runs: list[Run]) -> list[Run]:
    """The runs if they are few, else those of their rows that a gallery could show."""
    return runs if len(runs) <= MAX_PICTURES else sorted(run for _, run in drawn(runs, MAX_PICTURES))
