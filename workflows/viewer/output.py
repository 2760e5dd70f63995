"""One output of the viewer: its shards, the status of its run, its pages.

What costs requests is asked at most every few seconds, however many pages ask. The index is filled by a
thread that begins after the first page, or when a page needs it; pages in the order of the plan never do.
Knows nothing of HTML.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from wallaroo.model.errors import InputError
from wallaroo.workflows.outputs.run_file import read_run
from wallaroo.workflows.reports.status import Status, status
from wallaroo.workflows.viewer.index import Index
from wallaroo.workflows.viewer.query import Place, Query, Rows
from wallaroo.workflows.viewer.shards import Reader, Shard, Unreadable, list_shards

RUNNING_SECONDS, RESTING_SECONDS = 3.0, 30.0
"""Time between two listings of an output, while its run is active and otherwise."""

READERS = 4
BATCH = 16
"""Shards that are indexed in one step."""

QUIET_SECONDS = 1.5
"""The index waits for such a pause in the requests, so that the first page is served first."""

IDLE_SECONDS = 120.0
"""Listing stops after so long without an open page."""


@dataclass(frozen=True)
class Page:
    """One page."""

    rows: list[Any]
    """What it shows, in order."""
    first: bool
    """Whether nothing comes before it."""
    last: bool
    """Whether nothing comes after it."""


@dataclass(frozen=True)
class Progress:
    """Progress of an index."""

    shards: int
    """Shards of the output."""
    indexed: int
    """Shards in the index."""
    rows: int
    """Rows in the index."""

    @property
    def complete(self) -> bool:
        """Whether all shards are in the index."""
        return self.indexed >= self.shards


class Output:
    """An output in the viewer.

    Args:
        number: Its place among the outputs of the viewer.
        path: Of the output, as `whole_path` returns it.
        index: Of all outputs.

    Attributes:
        name: Last part of the path.
        run: Contents of `run.json`.
        task: Of the run.
        reader: Reads its shards.
        rows: Queries on its index.
        shards: As last listed.
        unreadable: Number of each shard that cannot be indexed -> its etag.

    Raises:
        InputError: The path is not an output of a run.
    """

    def __init__(self, number: int, path: str, index: Index) -> None:
        self.number, self.path = number, path
        self.name = path.rsplit("/", 1)[-1] or path
        self.run = read_run(self.path)
        self.task: str = self.run["config"]["task"]
        self.reader = Reader()
        self.index = index
        self.rows = Rows(index, number)
        self.unreadable: dict[int, str] = {}
        self._guard = threading.Lock()
        self._indexed: dict[int, str] = index.known(number)
        self._status = status(self.path)
        self.shards: list[Shard] = list_shards(self.path)
        self._refreshed = time.monotonic()

    @property
    def status(self) -> Status:
        """The state of the output when it was last looked at."""
        return self._status

    @property
    def running(self) -> bool:
        """Whether a run was active then."""
        return self._status.state == "running"

    def refresh(self) -> None:
        """Reads status and listing again if they are some seconds old. For one thread only."""
        if time.monotonic() - self._refreshed < (RUNNING_SECONDS if self.running else RESTING_SECONDS):
            return
        found = status(self.path)
        shards = list_shards(self.path)
        with self._guard:
            self._status, self.shards = found, shards
            self._refreshed = time.monotonic()

    # The index

    def missing(self) -> list[Shard]:
        """Returns the shards whose present version is not indexed."""
        with self._guard:
            shards = self.shards
        return [
            shard
            for shard in shards
            if self._indexed.get(shard.number) != shard.etag
            and self.unreadable.get(shard.number) != shard.etag
        ]

    def progress(self) -> Progress:
        """Returns how much of the output is indexed."""
        missing = len(self.missing())
        return Progress(len(self.shards), len(self.shards) - missing, self.index.count(self.number))

    def fill(self, ended: threading.Event) -> Iterator[None]:
        """Updates the index, one batch of shards a step, until it is complete or `ended` is set."""
        etags = {shard.number: shard.etag for shard in self.shards}
        if self._indexed and not any(etags.get(one) == etag for one, etag in self._indexed.items()):
            # Another output lies here now, which may have other columns.
            self.index.forget(self.number)
            self._indexed.clear()
        gone = [number for number in self._indexed if number not in etags]
        if gone:
            self.index.remove(self.number, gone)
            for number in gone:
                self._indexed.pop(number, None)
        missing = self.missing()
        with ThreadPoolExecutor(READERS, thread_name_prefix="index") as pool:
            for start in range(0, len(missing), BATCH):
                if ended.is_set():
                    return
                batch = missing[start : start + BATCH]
                found = []
                for shard, table in zip(batch, pool.map(self._small, batch), strict=True):
                    if table is not None:
                        found.append((shard, table))
                self._add(found)
                yield

    def _add(self, found: list[Any]) -> None:
        try:
            self.index.add(self.number, found)
        except InputError:
            # One at a time, so that a shard that does not fit harms no other.
            for shard, table in found:
                try:
                    self.index.add(self.number, [(shard, table)])
                except InputError:
                    self.unreadable[shard.number] = shard.etag
        for shard, _ in found:
            if shard.number not in self.unreadable:
                self._indexed[shard.number] = shard.etag

    def _small(self, shard: Shard) -> Any:
        try:
            return self.reader.small(shard)
        except Unreadable:
            self.unreadable[shard.number] = shard.etag
            return None

    # Rows

    def shard(self, number: int) -> Shard:
        """Returns a shard by its number.

        Raises:
            InputError: There is no such shard.
        """
        for shard in self.shards:
            if shard.number == number:
                return shard
        raise InputError(f"{self.path} has no shard {number}: it may not be made yet.")

    def page(self, query: Query, place: Place | None, count: int) -> Page:
        """Returns one page.

        A plain query is read from the shards as long as the index is incomplete. All others show what is
        indexed so far.

        Args:
            query: Which rows, in which order.
            place: Where the page starts or ends; None for the first page.
            count: Most rows of the page.

        Returns:
            The page, with rows as dicts.

        Raises:
            QueryError: If the query is invalid or too expensive.
        """
        if query.plain and self.missing():
            rows = self._in_plan_order(place, count + 1)
        elif not self.index.kinds[self.number]:
            return Page([], True, True)
        else:
            rows = self.rows.page(query, place, count + 1)
        more = len(rows) > count
        if place is not None and place.backwards:
            return Page(rows[1:] if more else rows, not more, False)
        return Page(rows[:count], place is None, not more)

    def _in_plan_order(self, place: Place | None, count: int) -> list[dict[str, Any]]:
        """Reads a page in the order of the plan from the shards; skips unreadable ones."""
        shards = self.shards
        found: list[dict[str, Any]] = []
        if place is not None and place.backwards:
            for shard in reversed([one for one in shards if one.number <= place.shard]):
                stop = place.position if shard.number == place.shard else 1 << 40
                try:
                    stop = min(stop, sum(self.reader.group_rows(shard)))
                    start = max(0, stop - (count - len(found)))
                    found = self._read(shard, start, stop) + found
                except Unreadable:
                    continue
                if len(found) >= count:
                    break
            return found
        for shard in shards:
            if place is not None and shard.number < place.shard:
                continue
            start = place.position + 1 if place is not None and shard.number == place.shard else 0
            try:
                found += self._read(shard, start, start + count - len(found))
            except Unreadable:
                continue
            if len(found) >= count:
                break
        return found

    def _read(self, shard: Shard, start: int, stop: int) -> list[dict[str, Any]]:
        if start >= stop:
            return []
        rows = self.reader.rows(shard, start, stop, pictures=True, small=True)
        return [
            {**row, "shard": shard.number, "position": position} for position, row in enumerate(rows, start)
        ]

    def row(self, number: int, position: int, small: bool = False) -> dict[str, Any]:
        """Returns one row without its picture and tokens.

        Args:
            number: Of the shard.
            position: Of the row in the shard.
            small: Leave out columns that are not in the index.

        Returns:
            Column name -> value.

        Raises:
            InputError: If there is no such row.
        """
        shard = self.shard(number)
        rows = self.reader.rows(shard, position, position + 1, pictures=True, small=small)
        if not rows:
            raise InputError(f"shard {number} of {self.path} has no row {position}: it has fewer.")
        return {**rows[0], "shard": number, "position": position}

    def total(self) -> int | None:
        """Returns the number of finished rows that the run last reported, or None."""
        return self._status.done


class Keeper:
    """A background thread that refreshes outputs and fills the index while a page is open.

    Args:
        outputs: The outputs of the viewer.

    Attributes:
        shown: Set once a first page was served; the index starts then.
        trouble: Why the last round failed; empty if it did not.
    """

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._outputs = outputs
        self._ended = threading.Event()
        self._wake = threading.Event()
        self._asked = self._seen = 0.0
        self._needed = False
        self.shown = False
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self.trouble = ""

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its present batch of shards."""
        self._ended.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(30)

    def touched(self) -> None:
        """Notes a request for a page or a picture."""
        self._asked = self._seen = time.monotonic()

    def seen(self) -> None:
        """Notes that a page is open."""
        self._seen = time.monotonic()

    def need_index(self) -> None:
        """Starts the index now, without waiting for a pause."""
        self._needed = True
        self._wake.set()

    def _quiet(self) -> bool:
        return self._needed or (self.shown and time.monotonic() - self._asked > QUIET_SECONDS)

    def _refresh(self) -> None:
        if time.monotonic() - self._seen < IDLE_SECONDS:
            for output in self._outputs:
                output.refresh()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._refresh()
                if self._quiet():
                    for output in self._outputs:
                        for _ in output.fill(self._ended):
                            self._refresh()
                    self._needed = False
                self.trouble = ""
            except InputError as error:
                # A storage that does not answer now may do so later; pages say what it was.
                self.trouble = str(error)
            except Exception as error:
                # Without this thread pages would never be updated, so it continues, and pages show the error.
                self.trouble = f"The index cannot be made ({type(error).__name__}: {error})."
            self._wake.wait(0.5 if self.trouble == "" else 5)
            self._wake.clear()


def describe(found: Status) -> dict[str, Any]:
    """Returns the numbers that pages show of a run.

    Args:
        found: Status of the output.

    Returns:
        `state`, `done` and `planned` (rows, None if unknown), `errors` (kind -> rows), `rate` (rows/s),
        `left` and `heard` (seconds), `cost`, `message`.
    """
    record = found.record
    return {
        "state": found.state,
        "done": found.done,
        "planned": found.planned,
        "errors": dict(sorted(found.errors.items())),
        "rate": found.rate,
        "left": found.left,
        "heard": found.heard,
        "cost": found.cost,
        "message": record.message if record is not None else "",
    }
