"""The lock on an output: one run at a time, and a killed run never blocks the next one.

`lock.json` in the output names its owner and counts the owner's heartbeats. Another run that finds it there
watches it. If the heartbeat moves, a run is active. An owner whose process on this machine is gone is
replaced at once. Any other silent owner is replaced after a lease by the watcher's own clock, so no two
clocks are ever compared. All changes are conditional on what was read: of several watchers one wins, and an
owner notices the loss of its lock. Knows nothing of what the run does.
"""

import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import LOCK_FILE

FORMAT = 1
"""Version of `lock.json`."""
LEASE_SECONDS = 20.0
"""A lock without a heartbeat for so long is taken over."""
BEATS_PER_LEASE = 5
"""Heartbeats that the owner writes during one lease."""
POLLS_PER_LEASE = 20
"""How often a watcher reads the lock during one lease."""


class RunInProgress(RuntimeError):
    """An active run holds the lock on the output; the message names it."""


class LockLost(RuntimeError):
    """Another run took over the lock and the unfinished work."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, as `lock.json` says."""

    token: str
    """Random text of this one holding."""
    run: str
    """What holds it, for people: a command such as `generate`."""
    host: str
    """Host name."""
    machine: str
    """The running system and its set of process numbers, the scope of `pid`; empty if unknown."""
    pid: int
    """Process number."""
    started: int
    """Start of the process in clock ticks since boot. A later process of the same number has another."""
    heartbeat: int = 0
    """Number of heartbeats; grows while the owner is alive."""
    format: int = FORMAT
    """Version of the file."""

    @classmethod
    def myself(cls, run: str) -> "Owner":
        """Describes this process as the owner. run: what it runs, such as `generate`."""
        pid = os.getpid()
        return cls(secrets.token_hex(8), run, socket.gethostname(), _machine(), pid, _process_start(pid) or 0)

    def to_json(self) -> bytes:
        """The contents of `lock.json`."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Owner | None":
        """Parses `lock.json`; None if it is no lock of this version, such as a truncated file."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError, RecursionError):
            return None

    def is_gone(self) -> bool:
        """Whether its process ran on this machine and has ended. False if that cannot be known."""
        return bool(self.machine) and self.machine == _machine() and _process_start(self.pid) != self.started


def _machine() -> str:
    """Identifies the running system and its set of process numbers; empty if that is impossible."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(pid: int) -> int | None:
    """Start of a living process in clock ticks since boot; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The name of the process before the last bracket may hold anything.
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie has ended; its parent has only not collected it yet.
    return None if fields[0] in "ZX" else int(fields[19])


class OutputLock:
    """The lock on an output, as a context manager.

    Entering takes the lock, or raises RunInProgress. Within the block a thread writes heartbeats. When the
    lock is lost, that thread sets `lost` and calls `on_lost` once. Leaving the block releases the lock.
    """

    def __init__(
        self,
        output: str,
        run: str,
        lease: float = LEASE_SECONDS,
        on_lost: Callable[[], None] | None = None,
    ):
        """Describes the lock; takes nothing yet.

        Args:
            output: Folder of the run, local or on S3.
            run: Name of the run for people.
            lease: Seconds without a heartbeat after which the lock is taken over.
            on_lost: Called once if the lock is lost, from the thread of the heartbeats.
        """
        self.path = storage.join(output, LOCK_FILE)
        self.lost = threading.Event()
        self._owner = Owner.myself(run)
        self._lease = lease
        self._on_lost = on_lost
        self._etag = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._made: list[Path] = []

    def __enter__(self) -> "OutputLock":
        if not storage.is_s3(self.path):
            folder = Path(self.path).parent
            self._made = [one for one in (folder, *folder.parents) if not one.exists()]
        self._take()
        self._thread = threading.Thread(target=self._beat, name="output-lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if error is None:
            # A finished run must not fail because the storage fails at its end.
            with storage.retries_enabled():
                self._give_back()
            return
        # The block's own error matters more; the next run takes over from a dead owner.
        with suppress(InputError):
            self._give_back()

    def check(self) -> None:
        """Checks that the lock is still held.

        Raises:
            LockLost: Another run took it over.
        """
        if self.lost.is_set():
            raise LockLost(f"Another run took over {self.path}, so this one stops. Finished shards are kept.")

    def _take(self) -> None:
        """Takes the lock, or raises RunInProgress."""
        data = self._owner.to_json()
        watched: tuple[bytes, float] | None = None
        while True:
            if watched is None and storage.put_if_absent(self.path, data):
                self._etag = storage.read_with_etag(self.path)[1]
                return
            try:
                found, etag = storage.read_with_etag(self.path)
            except FileNotFoundError:
                watched = None
                continue
            now = time.monotonic()
            if watched is None:
                watched = (found, now)
            owner = Owner.from_json(found)
            if found != watched[0]:
                raise RunInProgress(self._words(owner, now - watched[1]))
            if (owner and owner.is_gone()) or now - watched[1] >= self._lease:
                taken = self._replace(data, etag)
                if taken is not None:
                    self._etag = taken
                    return
                watched = None  # another watcher was first, and is now watched as the owner
                continue
            time.sleep(self._lease / POLLS_PER_LEASE)

    def _words(self, owner: Owner | None, seconds: float) -> str:
        who = f"an active run ({owner.run}, process {owner.pid} on {owner.host})" if owner else "another run"
        return (
            f"{self.path.removesuffix('/' + LOCK_FILE)} is locked by {who}, "
            f"heartbeat less than {seconds + 1:.0f} s ago: wait for it, or stop it."
        )

    def _replace(self, data: bytes, etag: str) -> str | None:
        """Writes `data` if the lock still has this tag. Returns the new tag, or None."""
        taken = storage.replace_if_match(self.path, data, etag)
        if taken is None:
            # If the response to a PUT was lost, its repetition is refused.
            try:
                found, now = storage.read_with_etag(self.path)
            except FileNotFoundError:
                return None
            return now if found == data else None
        return taken

    def _beat(self) -> None:
        """Counts up until stopped. If the storage does not answer, the next beat tries again."""
        while not self._stop.wait(self._lease / BEATS_PER_LEASE):
            owner = dataclasses.replace(self._owner, heartbeat=self._owner.heartbeat + 1)
            try:
                etag = self._replace(owner.to_json(), self._etag)
            except FileNotFoundError:
                etag = None  # the output itself is gone
            except Exception:
                continue
            if etag is None:
                self.lost.set()
                if self._on_lost is not None:
                    self._on_lost()
                return
            self._owner, self._etag = owner, etag

    def _give_back(self) -> None:
        if not self.lost.is_set() and self._is_mine():
            storage.delete(self.path)
            # A refused run leaves no folder behind that it made; one with files in it stays.
            with suppress(OSError):
                for folder in self._made:
                    folder.rmdir()

    def _is_mine(self) -> bool:
        try:
            owner = Owner.from_json(storage.read_bytes(self.path))
        except FileNotFoundError:
            return False
        return owner is not None and owner.token == self._owner.token


def at_work(output: str, watch: float = 2 * LEASE_SECONDS / BEATS_PER_LEASE) -> str:
    """Tells whether a run is active on an output.

    Args:
        output: Folder of the run, local or on S3.
        watch: Seconds to wait for a heartbeat of an owner on another machine. For an owner on this machine
            its process is checked, without waiting.

    Returns:
        One sentence about the active run; empty if there is none.
    """
    path = storage.join(output, LOCK_FILE)
    end = time.monotonic() + watch
    first = None
    while True:
        try:
            found = storage.read_bytes(path)
        except (OSError, InputError):
            return ""
        owner = Owner.from_json(found)
        if owner is None or owner.is_gone():
            return ""
        near = bool(owner.machine) and owner.machine == _machine()
        if near or found != (first := first or found):
            return f"A run is active in {output} (process {owner.pid} on {owner.host})."
        if time.monotonic() >= end:
            return ""
        time.sleep(min(watch, LEASE_SECONDS) / POLLS_PER_LEASE)
