"""The watch of a run: a small Ray actor that knows which rows each replica has, and counts rows.

It outlives every replica. So it knows which rows a dead replica had, and gives a driver the progress of all
replicas, row by row. Knows nothing of what a row holds or where results go: it sees shards and rows as
numbers.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

SUSPECT_DEATHS = 2
"""Deaths of replicas with this row among others, after which the row runs alone."""

PROVEN_DEATHS = 2
"""Deaths with the row alone after which it is lethal, if those replicas had given back another row."""

UNPROVEN_DEATHS = 3
"""The same for replicas that had given back nothing, if no other row can be tried first."""


ASK_SECONDS = 0.1
"""Least wait of a replica before it asks again for a shard that may not start yet."""

ASKS_PER_SECOND = 200
"""Most repeated questions per second of all replicas, if each waits with one shard. With many replicas each
waits longer, or the questions would delay the notes."""


@dataclass(frozen=True)
class WatchCounts:
    """What a driver shows."""

    rows: int = 0
    """Rows that replicas have given back, error rows included; a shard that is restarted counts from zero."""
    errors: int = 0
    """Error rows among `rows`."""
    replicas: int = 0
    """Replicas that are up, as far as the watch knows."""
    deaths: int = 0
    """Replicas that died with rows, or because they could not continue."""
    last_death: str = ""
    """The reason that the latest of them gave, or empty."""
    hardest_shard: int = -1
    """The shard whose replica died most often since a row was last found lethal."""
    fruitless: int = 0
    """How often the replica of `hardest_shard` died."""
    held: int = 0
    """Shards in flight in replicas."""
    finished: int = 0
    """Shards that replicas have given back."""


@dataclass(frozen=True)
class Limits:
    """How far replicas may run ahead of the writing of shards."""

    shards: float = math.inf
    """Bound on shards that are started or finished and not yet written."""
    error_rate: float = 1.0
    """No shard is started while a larger share of the rows failed."""
    least_rows: int = 0
    """Rows from which on the share is judged."""
    seconds: float = math.inf
    """Time after which a shard is started although none was written.

    The awaited shard may be lost, and needs a replica to be made again.
    """


class Start(NamedTuple):
    """The watch's reply to a replica that takes a shard."""

    attempt: int = 1
    """Number of this attempt at the shard, from 1."""
    suspects: Mapping[int, int] = {}
    """Rows that must run alone -> how often a replica died while it ran only that row."""
    lethal: Sequence[int] = ()
    """Rows that must not run, since they kill their replica."""
    stopping: bool = False
    """Whether the run is about to stop, so that the shard must not start."""
    wait: float = 0.0
    """Seconds until the replica may ask again; 0 if the shard may start now."""


@dataclass
class _Shard:
    """A shard in a replica: the rows that it has not given back, and counts of those it has."""

    replica: str
    waiting: set[int]
    rows: int = 0
    errors: int = 0


Row = tuple[int, int]
"""Shard, and position in it."""


class Watch:
    """The state behind the actor; made with `start`, and called through the handle that `start` returns.

    How the watch finds a row that kills its replica: each death counts against every row in the engine at
    that time. One death makes no suspect, since machines are lost every day. A row with SUSPECT_DEATHS runs
    alone from then on, and a row that kills its replica alone PROVEN_DEATHS times is lethal. Such a death
    proves nothing if that replica had given back no row before, since its device may be at fault; then more
    deaths are needed.

    Args:
        limits: How far replicas may run ahead of the writing of shards; by default without limit.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._shards: dict[int, _Shard] = {}
        self._done: dict[int, tuple[int, int]] = {}
        # Sums of _done, which is long in a large run, and every shard that waits asks for them.
        self._done_rows = self._done_errors = 0
        self._written: set[int] = set()
        self._full_since: float | None = None
        self._starts: dict[int, int] = {}
        self._fruitless: Counter[int] = Counter()
        self._replicas: set[str] = set()
        self._in_flight: dict[str, set[Row]] = {}
        self._alone: dict[str, Row] = {}
        self._able: set[str] = set()
        self._seen: Counter[Row] = Counter()
        self._proven: Counter[Row] = Counter()
        self._unproven: Counter[Row] = Counter()
        self._deaths = 0
        self._last_death = ""
        self._stopping = False
        self._admitted = 0

    def admit(self, shards: int) -> None:
        """Sets how many shards of the run's queue may enter its pipeline."""
        self._admitted = shards

    def admitted(self) -> int:
        """The last number given to `admit`."""
        return self._admitted

    def note_up(self, replica: str) -> None:
        """Records that a replica holds its model and waits for rows."""
        self._replicas.add(replica)

    def note_start(self, replica: str, shard: int, rows: list[int]) -> Start:
        """Records that a replica takes rows of a shard.

        A shard that another replica still has tells of that one's death: Ray gives it to a second
        one only then.

        Args:
            replica: Its name.
            shard: Number of the shard.
            rows: Positions of its rows in the shard.

        Returns:
            Whether the shard may begin, and how.
        """
        earlier = self._shards.get(shard)
        if earlier is not None and earlier.replica != replica:
            self._record_death(earlier.replica)
        if self._stopping:
            self._shards.pop(shard, None)
            return Start(stopping=True)
        if self._must_wait(shard):
            return Start(wait=max(ASK_SECONDS, len(self._replicas) / ASKS_PER_SECOND))
        rows_before, errors_before = self._done.pop(shard, (0, 0))
        self._done_rows -= rows_before
        self._done_errors -= errors_before
        self._written.discard(shard)
        self._shards[shard] = _Shard(replica, set(rows))
        starts = self._starts[shard] = self._starts.get(shard, 0) + 1
        keys = [(shard, row) for row in rows]
        lethal = {key for key in keys if self._is_lethal(key)}
        suspects = {
            key[1]: self._proven[key] + self._unproven[key]
            for key in keys
            if self._seen[key] >= SUSPECT_DEATHS and key not in lethal
        }
        return Start(starts, suspects, [row for _, row in lethal])

    def note_rows(
        self, replica: str, done: list[tuple[int, int, bool]], in_flight: list[Row], alone: bool = False
    ) -> None:
        """Records a round of an engine: `note_done`, then `note_in_flight`.

        Args:
            replica: Its name.
            done: Rows given back, each a (shard, row, whether ok).
            in_flight: Rows that the engine is to get when it has the reply.
            alone: Whether it has no others then.
        """
        if done:
            self.note_done(replica, done)
        if in_flight:
            self.note_in_flight(replica, in_flight, alone)

    def note_in_flight(self, replica: str, rows: list[Row], alone: bool = False) -> None:
        """Records rows that the engine of a replica gets after this reply.

        Args:
            replica: Its name.
            rows: The rows.
            alone: Whether it has no others then.
        """
        self._in_flight.setdefault(replica, set()).update(rows)
        self._alone.pop(replica, None)
        if alone:
            (self._alone[replica],) = rows

    def note_done(self, replica: str, rows: list[tuple[int, int, bool]]) -> None:
        """Records rows that a replica has given back.

        Args:
            replica: Its name.
            rows: Each a (shard, row, whether ok).
        """
        in_flight = self._in_flight.get(replica, set())
        for shard, row, ok in rows:
            if (shard, row) in in_flight and ok:
                self._able.add(replica)
            in_flight.discard((shard, row))
            if self._alone.get(replica) == (shard, row):
                del self._alone[replica]
            held = self._shards.get(shard)
            if held is None or held.replica != replica or row not in held.waiting:
                continue
            held.waiting.remove(row)
            held.rows += 1
            held.errors += not ok
            if not held.waiting:
                self._done[shard] = (held.rows, held.errors)
                self._done_rows += held.rows
                self._done_errors += held.errors
                self._fruitless.pop(shard, None)
                del self._shards[shard]

    def note_written(self, shard: int) -> None:
        """Records that the file of a shard is written."""
        if shard in self._done or shard in self._shards:
            self._written.add(shard)
        self._full_since = None

    def note_death(self, replica: str, reason: str) -> None:
        """Records that a replica is about to end itself, with rows or before it is up.

        Args:
            replica: Name of the replica.
            reason: Why, in a sentence.
        """
        self._last_death = reason
        self._replicas.add(replica)
        self._record_death(replica)

    def stop(self) -> None:
        """Lets no replica start a shard from now on."""
        self._stopping = True

    def counts(self) -> WatchCounts:
        """The counts that a driver shows."""
        rows, errors = self._totals()
        hardest, deaths = max(self._fruitless.items(), key=lambda one: one[1], default=(-1, 0))
        return WatchCounts(
            rows=rows,
            errors=errors,
            replicas=len(self._replicas),
            deaths=self._deaths,
            last_death=self._last_death,
            hardest_shard=hardest,
            fruitless=deaths,
            held=len(self._shards),
            finished=len(self._done),
        )

    def _totals(self) -> tuple[int, int]:
        """Numbers of rows given back, and of error rows among them."""
        held = self._shards.values()
        return (
            self._done_rows + sum(shard.rows for shard in held),
            self._done_errors + sum(shard.errors for shard in held),
        )

    def _must_wait(self, shard: int) -> bool:
        """Whether a shard may not start yet. A shard that was started before may, since it counts already."""
        if shard in self._shards or shard in self._done:
            return False
        (rows, errors), limits = self._totals(), self._limits
        if rows >= limits.least_rows and errors > limits.error_rate * rows:
            return True
        unwritten = len(self._shards) + len(self._done) - len(self._written)
        if unwritten + 1 < limits.shards:
            return False
        if self._full_since is None:
            self._full_since = time.monotonic()
        return time.monotonic() - self._full_since <= limits.seconds

    def _record_death(self, replica: str) -> None:
        if replica not in self._replicas:
            return
        self._replicas.remove(replica)
        self._deaths += 1
        alone, rows = self._alone.pop(replica, None), self._in_flight.pop(replica, set())
        if alone is not None:
            able = replica in self._able
            (self._proven if able else self._unproven)[alone] += 1
            if self._is_lethal(alone):
                # A culprit is found, so whatever happened so far has led to something.
                self._fruitless.clear()
                return
        else:
            self._seen.update(rows)
        for shard, held in self._shards.items():
            if held.replica == replica:
                self._fruitless[shard] += 1

    def _is_lethal(self, row: Row) -> bool:
        return self._proven[row] >= PROVEN_DEATHS or self._unproven[row] >= UNPROVEN_DEATHS


def start(limits: Limits | None = None) -> Any:
    """Starts a watch on this machine, which lives as long as the handle (and so the driver) does.

    Args:
        limits: How far replicas may go ahead; without limits by default.

    Returns:
        Handle of the actor.
    """
    import ray

    this_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    return ray.remote(Watch).options(num_cpus=0, scheduling_strategy=this_node).remote(limits)
