"""Counts of `data/` from its listing and from summaries, so that finished shards need not be opened.

Each plan part has a summary: the tally and the stamp of each of its shards. `all` has one tally per part,
with a digest of the part's stamps. A summary is a cache: the listing decides. A shard whose stamp is in no
summary is opened; missing, damaged and outdated summaries are written again.
"""

import bisect
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import pyarrow as pa

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import list_shards, list_summaries, shard_path, summary_name
from wallaroo.workflows.outputs.shards import map_shards, open_shard
from wallaroo.workflows.outputs.summary_files import read_lines, read_texts, write_lines
from wallaroo.workflows.reports.tally import ShardTally, Tally, tally_of_file

ALL = "all"
WRITE_SHARDS = 64
"""New shards of a part after which an active run writes its summary."""
WRITE_PARTS = 16
"""Complete parts after which an active run writes `all`."""
MAX_BYTES = 64 << 10
"""Of a part's tally in `all`; a longer one is only in the part's own summary."""


class Part(Protocol):
    """What a summary needs to know of a plan part."""

    @property
    def name(self) -> str:
        """Its name, such as `part-00000`."""
        ...

    @property
    def rows(self) -> int:
        """How many rows it plans."""
        ...

    @property
    def first_shard(self) -> int:
        """Number of its first shard."""
        ...

    @property
    def end(self) -> int:
        """Number after its last shard."""
        ...


class Entry(NamedTuple):
    """One shard in a summary."""

    stamp: str
    """From the listing; a file with another stamp has changed."""
    text: str
    """Its ShardTally as JSON."""

    @property
    def found(self) -> ShardTally:
        """The ShardTally."""
        return ShardTally.from_values(json.loads(self.text))


@dataclass
class _Open:
    """A part of which shards are being written. new: how many since its summary was written."""

    entries: dict[int, Entry] = field(default_factory=dict)
    new: int = 0


class Summaries:
    """The shards of an output and what is in them.

    Attributes:
        output: Folder of the run.
        parts: Of its plan, in order.
        stamps: Of the shards that are there; from one listing, when it was made.
        opened: How many files of `data/` were opened.
        unreadable: Shards that cannot be read -> why, as far as it was looked.
    """

    def __init__(self, output: str, parts: Sequence[Part], renew: bool = True) -> None:
        """Lists `data/` and `summaries/`.

        Args:
            output: Folder of the run.
            parts: Of its plan.
            renew: Whether summaries are written. Several may do so at once: each is right or passed over.
        """
        self.output, self.parts, self._renew = output, parts, renew
        self.stamps = list_shards(output)
        self.opened = 0
        self.unreadable: dict[int, str] = {}
        self._names = list_summaries(output)
        self._totals = self._read_all()
        self._changed = False
        self._last: tuple[str, dict[int, Entry]] = ("", {})
        self._open: dict[str, _Open] = {}
        self._complete = 0

    def present(self, part: Part) -> list[int]:
        """The shards of a part that are there and not known to be unreadable."""
        numbers = range(part.first_shard, part.end)
        return [shard for shard in numbers if shard in self.stamps and shard not in self.unreadable]

    def missing(self) -> Iterator[int]:
        """The shards that are not there, or are known to be unreadable, ascending."""
        for part in self.parts:
            for shard in range(part.first_shard, part.end):
                if shard not in self.stamps or shard in self.unreadable:
                    yield shard

    def forget_listing(self) -> None:
        """Frees the memory of all that only `add` and `save` do without."""
        self.stamps = {}
        self._last = ("", {})

    def of_part(self, part: Part, details: bool = True) -> Tally:
        """The tally of the finished shards of a part.

        Args:
            part: Of the plan.
            details: Whether they are wanted too; without them shards with long tallies stay closed.

        Returns:
            The tally.
        """
        key = stamps_digest((shard, self.stamps[shard]) for shard in self.present(part))
        cached = self._total_of(part, key)
        if cached is not None and (cached.details or not details):
            return cached
        total = Tally()
        for _, found in self.of_shards(part, details):
            total.add(found.tally)
        if total.rows and (total.details is not None or not details):
            # Without what turned out to be unreadable.
            key = stamps_digest((shard, self.stamps[shard]) for shard in self.present(part))
            self._set_total(part, key, total)
        return total

    def _total_of(self, part: Part, key: str) -> Tally | None:
        """The tally in `all` of a part whose stamps have this digest; None if there is no valid one."""
        cached = self._totals.get(part.name)
        if cached is None or cached[0] != key:
            return None
        try:
            tally = Tally.from_values(json.loads(cached[1])[2])
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        runs = [run for places in tally.details.places.values() for run in places] if tally.details else []
        there = all(part.first_shard <= run.shard < part.end and run.shard in self.stamps for run in runs)
        return tally if there and tally.rows <= part.rows else None

    def _set_total(self, part: Part, key: str, total: Tally) -> None:
        # As text, which is a tenth of the tally in memory.
        line = json.dumps([part.name, key, total.to_values()], separators=(",", ":")).encode()
        self._totals[part.name] = (key, line)
        self._changed = True

    def of_shards(self, part: Part, whole: bool = True) -> Iterator[tuple[int, ShardTally]]:
        """Each finished, readable shard of a part, in order, with its tally.

        Args:
            part: Of the plan.
            whole: Whether tallies must have details and error rows.

        Yields:
            Number and tally of each shard.
        """
        cached = self._last[1] if self._last[0] == part.name else self._read_part(part)
        fitting: dict[int, Entry] = {}
        renewed = False
        closed: list[int] = []
        for shard in self.present(part):
            entry = cached.get(shard)
            if entry is not None and entry.stamp == self.stamps[shard]:
                fitting[shard] = entry
            else:
                closed.append(shard)
        opened = {}
        for shard, found in zip(closed, map_shards(self._read_shard, closed), strict=True):
            self.opened += 1
            if isinstance(found, str):
                self.unreadable[shard] = found
                continue
            opened[shard] = found
            fitting[shard] = Entry(self.stamps[shard], found.to_json().decode())
            renewed = True
        fitting = dict(sorted(fitting.items()))
        self._last = (part.name, fitting)
        if renewed or len(cached) != len(fitting):
            self._write_part(part, fitting)
        for shard, entry in fitting.items():
            tally = opened.pop(shard, None) or entry.found
            if whole and not tally.whole:
                self.opened += 1
                reread = self._read_shard(shard)
                if isinstance(reread, str):
                    self.unreadable[shard] = reread
                    continue
                tally = reread
            yield shard, tally

    def add(self, shard: int, stamp: str, text: str) -> None:
        """Takes in a shard that was written, and writes summaries now and then.

        Args:
            shard: Its number.
            stamp: Of its file, as `write_shard` gives it.
            text: Its ShardTally as JSON.
        """
        index = bisect.bisect([part.first_shard for part in self.parts], shard) - 1
        part = self.parts[index]
        now = self._open.get(part.name)
        if now is None:
            now = self._open[part.name] = _Open(self._read_part(part))
        now.entries[shard] = Entry(stamp, text)
        now.new += 1
        complete = len(now.entries) == part.end - part.first_shard
        if now.new < WRITE_SHARDS and not complete:
            return
        now.new = 0
        # A summary that could not be written is made again when it is needed.
        with suppress(InputError, OSError):
            self._write_part(part, dict(sorted(now.entries.items())))
        if complete:
            self._close(part)

    def _close(self, part: Part) -> None:
        entries = sorted(self._open.pop(part.name).entries.items())
        total = Tally()
        for _, entry in entries:
            total.add(entry.found.tally)
        self._set_total(part, stamps_digest((shard, entry.stamp) for shard, entry in entries), total)
        self._complete += 1
        if self._complete % WRITE_PARTS == 0:
            with suppress(InputError, OSError):
                self.save()

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Saves when the block ends, however it does, so that the next start opens few files."""
        try:
            yield
        finally:
            with suppress(InputError, OSError):
                self.save()

    def save(self) -> None:
        """Writes new and changed summaries."""
        for part in self.parts if self._open else ():
            now = self._open.get(part.name)
            if now is not None and now.new:
                self._write_part(part, dict(sorted(now.entries.items())))
                now.new = 0
        if self._changed and self._renew:
            lines = [line for _, line in self._totals.values() if len(line) <= MAX_BYTES]
            write_lines(self.output, ALL, lines)
            self._changed = False

    def _read_all(self) -> dict[str, tuple[str, bytes]]:
        """Digest and line of each part that `all` has."""
        found = {}
        names = {part.name for part in self.parts}
        for line in read_texts(self.output, ALL) if summary_name(ALL) in self._names else ():
            match json.loads(line):
                case [str(name), str(key), _] if name in names:
                    found[name] = (key, line)
        return found

    def _read_part(self, part: Part) -> dict[int, Entry]:
        """The valid entries in the summary of a part."""
        found: dict[int, Entry] = {}
        if summary_name(part.name) not in self._names:
            return found
        for line in read_lines(self.output, part.name):
            try:
                shard, stamp, values = line
                tally = ShardTally.from_values(values).tally
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
            runs = [run for one in tally.details.places.values() for run in one] if tally.details else []
            if any(run.shard != shard or run.position + run.rows > tally.rows for run in runs):
                continue
            if type(shard) is int and part.first_shard <= shard < part.end and tally.rows <= part.rows:
                found[shard] = Entry(str(stamp), json.dumps(values, separators=(",", ":")))
        return found

    def _write_part(self, part: Part, entries: Mapping[int, Entry]) -> None:
        if self._renew:
            lines = (f"[{shard},{json.dumps(entry.stamp)},{entry.text}]" for shard, entry in entries.items())
            write_lines(self.output, part.name, map(str.encode, lines))
            self._names.add(summary_name(part.name))

    def _read_shard(self, shard: int) -> ShardTally | str:
        """What is in the file of a shard; the reason in words if it is none."""

        def read(data: bytes | None = None) -> ShardTally:
            with open_shard(self.output, shard, data) as parquet:
                return tally_of_file(parquet, shard)

        path = shard_path(self.output, shard)
        try:
            try:
                return storage.with_retries(path, read)
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, FileNotFoundError):
                    raise
                # From memory, so that no fault of the network can be taken for one of the file.
                return read(storage.read_bytes(path))
        except FileNotFoundError:
            return "it vanished"
        except (pa.ArrowException, OSError) as error:
            return str(error).splitlines()[0][:200]


def stamps_digest(stamps: Iterable[tuple[int, str]]) -> str:
    """Of shards and their stamps: the same one means the same files."""
    text = hashlib.sha256()
    for shard, stamp in stamps:
        text.update(f"{shard} {stamp}\n".encode())
    return text.hexdigest()
