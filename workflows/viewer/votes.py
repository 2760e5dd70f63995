"""Votes between outputs: which row of one id and sample somebody preferred, in one Parquet file.

The file lies beside the first output, or where the user says, and holds votes between any outputs. A
vote replaces an earlier one on the same rows. Two viewers may write at once: each write is conditional
on what was read. Knows nothing of pages.
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
"""One row a vote. outputs: what was compared, sha256: of the result in each. choice: the path of the
preferred output, TIE or BAD."""

TIE, BAD = "tie", "bad"
TRIES = 8
Z95 = 1.959963984540054
"""Standard deviations on either side that hold 95 % of a normal distribution."""


class Key(NamedTuple):
    """What a vote is about, beside the outputs."""

    id: str
    version: int
    sample: int


class Share(NamedTuple):
    """How often an output was preferred among `decided` votes. low, high: 95 % interval of that share."""

    votes: int
    decided: int
    share: float
    low: float
    high: float


class Summary(NamedTuple):
    """Votes between some outputs. shares: one an output, in their order."""

    votes: int
    ties: int
    bad: int
    shares: list[Share]


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `hits` of `count` draws were seen, by Wilson's score; it is
    (0, 1) where nothing was drawn."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = hits / count, Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def default_path(output: str) -> str:
    """Where votes are kept if nobody says: `NAME.votes.parquet` beside the folder of an output."""
    folder = output.rstrip("/")
    if storage.is_s3(folder) and "/" not in folder.removeprefix("s3://"):
        raise InputError(f"{output} is a whole bucket, so votes have no place beside it: give --votes PATH.")
    return f"{folder}.votes.parquet"


class Votes:
    """The votes in a file. outputs: paths of those that are compared."""

    def __init__(self, path: str, outputs: Sequence[str]) -> None:
        """Reads what is there. Raises InputError if another file lies in its place."""
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
        except pa.ArrowException:
            raise InputError(f"{self.path} is no file of votes: give another --votes PATH.") from None
        self._rows = table.to_pylist()

    def _mine(self, row: dict[str, Any]) -> bool:
        return sorted(row["outputs"]) == sorted(self.outputs)

    def cast(self, key: Key, digests: Sequence[str], choice: str | None) -> None:
        """Notes a vote, in place of an earlier one on the same rows; None takes that back.

        digests: sha256 of the rows' results, in the order of the outputs. choice: the path of an output,
        TIE or BAD. Raises ValueError for another choice, InputError if the file cannot be written.
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
                # Somebody else voted meanwhile; theirs stay.
                self._read()
        raise InputError(f"{self.path} is changed by others all the time: give another --votes PATH.")

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
        """What was voted between these outputs."""
        with self._guard:
            rows = [row for row in self._rows if self._mine(row)]
        return {Key(row["id"], row["version"], row["sample"]): row["choice"] for row in rows}

    def table(self) -> pa.Table:
        """The same as columns id, version, sample, choice."""
        rows = [{**key._asdict(), "choice": choice} for key, choice in self.choices().items()]
        fields = [SCHEMA.field(name) for name in ("id", "version", "sample", "choice")]
        return pa.Table.from_pylist(rows, pa.schema(fields))

    def summary(self) -> Summary:
        """The votes between these outputs, summed up."""
        counts = Counter(self.choices().values())
        decided = sum(counts[output] for output in self.outputs)
        shares = []
        for output in self.outputs:
            hits = counts[output]
            shares.append(Share(hits, decided, hits / decided if decided else 0.0, *wilson(hits, decided)))
        return Summary(counts.total(), counts[TIE], counts[BAD], shares)
