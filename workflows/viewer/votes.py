"""Votes between outputs, in one Parquet file: which row of an id and sample was preferred.

By default the file lies beside the first output. It may hold votes between several sets of outputs. A new
vote replaces the earlier one on the same rows. Writes are conditional on what was read, so two viewers can
share a file. Knows nothing of pages.
"""

import datetime
import io
import math
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("version", pa.int32()),
        ("sample", pa.int32()),
        ("outputs", pa.list_(pa.string())),
        ("sha256", pa.list_(pa.string())),
        ("choice", pa.string()),
        ("voted_at", pa.timestamp("us", tz="UTC")),
    ],
    metadata={b"wallaroo.votes": b"1"},
)
"""Columns of the file, one row a vote. `outputs`: paths of what was compared; `sha256`: of the result in
each; `choice`: path of the preferred output, TIE or BAD."""

TIE, BAD = "tie", "bad"
TRIES = 8
Z95 = 1.959963984540054
"""Half-width of the central 95 % of a normal distribution, in standard deviations."""


class Key(NamedTuple):
    """The rows that a vote is about."""

    id: str
    """Their id."""
    version: int
    """Their version."""
    sample: int
    """Number of the sample."""


class Share(NamedTuple):
    """How often one output was preferred."""

    votes: int
    """For this output."""
    decided: int
    """Votes for any output."""
    share: float
    """votes / decided, 0 without votes."""
    low: float
    """Lower end of the 95 % interval of the share."""
    high: float
    """Its upper end."""


class Summary(NamedTuple):
    """Counts of the votes between outputs."""

    votes: int
    """All votes."""
    ties: int
    """Votes for no output, since all are equally good."""
    bad: int
    """Votes for no output, since all are bad."""
    shares: list[Share]
    """One per output."""


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of a binomial share, by Wilson's score.

    Args:
        hits: Draws that counted.
        count: All draws.

    Returns:
        Lower and upper end, (0, 1) without draws.
    """
    if count == 0:
        return 0.0, 1.0
    share, z2 = hits / count, Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def default_path(output: str) -> str:
    """Returns the default file of votes, `NAME.votes.parquet` beside the folder of an output.

    Raises:
        InputError: The output is a whole bucket.
    """
    folder = output.rstrip("/")
    if storage.is_s3(folder) and "/" not in folder.removeprefix("s3://"):
        raise InputError(f"{output} is a whole bucket, so votes have no place beside it: give --votes PATH.")
    return f"{folder}.votes.parquet"


class Votes:
    """The votes of a file between some outputs. Thread-safe."""

    def __init__(self, path: str, outputs: Sequence[str]) -> None:
        """Reads the file, if it exists.

        Args:
            path: Of the file, local or `s3://`.
            outputs: Paths of the compared outputs.

        Raises:
            InputError: If the file is not a file of votes.
        """
        self.path, self.outputs = path, tuple(outputs)
        self._guard = threading.Lock()
        self._rows: list[dict[str, Any]] = []
        self._etag: str | None = None
        self._read()

    def _read(self) -> None:
        try:
            data, self._etag = storage.read_with_etag(self.path)
        except FileNotFoundError:
            self._rows, self._etag = [], None
            return
        try:
            table = pq.read_table(io.BytesIO(data))
            if not table.schema.equals(SCHEMA) or b"wallaroo.votes" not in (table.schema.metadata or {}):
                raise pa.ArrowInvalid("its columns are others")
        except (pa.ArrowException, OSError):
            raise InputError(f"{self.path} is not a file of votes: give another --votes PATH.") from None
        self._rows = table.to_pylist()

    def _mine(self, row: dict[str, Any]) -> bool:
        return sorted(row["outputs"]) == sorted(self.outputs)

    def cast(self, key: Key, digests: Sequence[str], choice: str | None) -> None:
        """Writes a vote in place of an earlier one on the same rows.

        Args:
            key: The rows.
            digests: sha256 of the result in each output, in the order of the outputs.
            choice: Path of an output, TIE or BAD; None removes the vote.

        Raises:
            ValueError: For another choice.
            InputError: If the file cannot be written.
        """
        if choice not in (None, TIE, BAD, *self.outputs):
            raise ValueError(f"choice {choice!r}, expected an output, {TIE} or {BAD}")
        with self._guard:
            for _ in range(TRIES):
                rows = [
                    row
                    for row in self._rows
                    if not (self._mine(row) and Key(row["id"], row["version"], row["sample"]) == key)
                ]
                if choice is not None:
                    rows.append(
                        {
                            **key._asdict(),
                            "outputs": list(self.outputs),
                            "sha256": list(digests),
                            "choice": choice,
                            "voted_at": datetime.datetime.now(datetime.UTC),
                        }
                    )
                if self._write(rows):
                    self._rows = rows
                    return
                # Another viewer has written votes meanwhile; they stay.
                self._read()
        raise InputError(f"{self.path} is changed by others constantly: give another --votes PATH.")

    def _write(self, rows: list[dict[str, Any]]) -> bool:
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), sink)
        data = sink.getvalue()
        if self._etag is None:
            if not storage.put_if_absent(self.path, data):
                return False
            self._etag = storage.read_with_etag(self.path)[1]
            return True
        etag = storage.replace_if_match(self.path, data, self._etag)
        if etag is not None:
            self._etag = etag
        return etag is not None

    def choices(self) -> dict[Key, str]:
        """Returns the votes between these outputs: rows -> choice."""
        with self._guard:
            rows = [row for row in self._rows if self._mine(row)]
        return {Key(row["id"], row["version"], row["sample"]): row["choice"] for row in rows}

    def table(self) -> pa.Table:
        """Returns these votes as a table with columns id, version, sample and choice."""
        rows = [{**key._asdict(), "choice": choice} for key, choice in self.choices().items()]
        fields = [SCHEMA.field(name) for name in ("id", "version", "sample", "choice")]
        return pa.Table.from_pylist(rows, pa.schema(fields))

    def summary(self) -> Summary:
        """Counts the votes between these outputs."""
        counts = Counter(self.choices().values())
        decided = sum(counts[output] for output in self.outputs)
        shares = []
        for output in self.outputs:
            hits = counts[output]
            shares.append(Share(hits, decided, hits / decided if decided else 0.0, *wilson(hits, decided)))
        return Summary(counts.total(), counts[TIE], counts[BAD], shares)
