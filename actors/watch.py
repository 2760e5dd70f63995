"""The watch of a run: a small Ray actor that knows which rows are in replicas, and counts.

It outlives every replica, so it can say what a dead one was at, and a driver can ask it how far all
of them are, row by row. Knows nothing of what a row holds or where results go: shards and rows are
numbers to it.
"""

from dataclasses import dataclass
from typing import Any

import ray


@dataclass(frozen=True)
class Counts:
    """What a driver shows.

    rows, errors: rows that replicas have given back, error rows included; a shard that is worked on
        again counts from nothing again.
    replicas: replicas that have been seen up and are not known to be gone.
    deaths: replicas that ended while they had rows, or because they could not go on.
    last_death: what the latest of them said before it ended, or empty.
    hardest_shard, attempts: the shard that was begun most often, and how often.
    """

    rows: int = 0
    errors: int = 0
    replicas: int = 0
    deaths: int = 0
    last_death: str = ""
    hardest_shard: int = -1
    attempts: int = 0


@dataclass
class _Shard:
    """A shard in a replica: the rows that it has not given back, and counts of those it has."""

    replica: str
    waiting: set[int]
    rows: int = 0
    errors: int = 0


class Watch:
    """The state behind the actor; made with `start`, and called through the handle that this gives."""

    def __init__(self) -> None:
        self._shards: dict[int, _Shard] = {}
        self._done: dict[int, tuple[int, int]] = {}
        self._starts: dict[int, int] = {}
        self._replicas: set[str] = set()
        self._deaths = 0
        self._last_death = ""
        self._hardest_shard = -1

    def note_up(self, replica: str) -> None:
        """A replica holds its model and waits for rows."""
        self._replicas.add(replica)

    def note_start(self, replica: str, shard: int, rows: list[int]) -> int:
        """A replica takes these rows of a shard; the answer says for which time the shard is tried.

        A shard that another replica still has tells of that one's death: Ray gives it to a second
        one only then.
        """
        earlier = self._shards.get(shard)
        if earlier is not None and earlier.replica != replica:
            self._bury(earlier.replica)
        self._done.pop(shard, None)
        self._shards[shard] = _Shard(replica, set(rows))
        starts = self._starts[shard] = self._starts.get(shard, 0) + 1
        if starts > self._starts.get(self._hardest_shard, 0):
            self._hardest_shard = shard
        return starts

    def note_done(self, replica: str, rows: list[tuple[int, int, bool]]) -> None:
        """A replica has given back rows, each a (shard, row, whether ok)."""
        for shard, row, ok in rows:
            held = self._shards.get(shard)
            if held is None or held.replica != replica or row not in held.waiting:
                continue
            held.waiting.remove(row)
            held.rows += 1
            held.errors += not ok
            if not held.waiting:
                self._done[shard] = (held.rows, held.errors)
                del self._shards[shard]

    def note_death(self, replica: str, reason: str) -> None:
        """A replica is about to end itself, for a reason that it can tell, with rows or before it is up."""
        self._last_death = reason
        self._replicas.add(replica)
        self._bury(replica)

    def counts(self) -> Counts:
        """How far the run is."""
        held = [(shard.rows, shard.errors) for shard in self._shards.values()]
        pairs = [*self._done.values(), *held]
        return Counts(
            rows=sum(rows for rows, _ in pairs),
            errors=sum(errors for _, errors in pairs),
            replicas=len(self._replicas),
            deaths=self._deaths,
            last_death=self._last_death,
            hardest_shard=self._hardest_shard,
            attempts=self._starts.get(self._hardest_shard, 0),
        )

    def _bury(self, replica: str) -> None:
        if replica in self._replicas:
            self._replicas.remove(replica)
            self._deaths += 1


def start() -> Any:
    """A watch on this machine, which lives as long as the handle (and so the driver) does."""
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    return ray.remote(Watch).options(num_cpus=0, scheduling_strategy=here).remote()
