"""The rows of a replica's calls on their way through its engine: queued, announced to the watch, encoded.

Knows nothing of Ray. Of picture formats it knows only that a call brings a function to encode its pictures.
"""

import asyncio
import dataclasses
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from wallaroo.actors.rows import Outcome, PictureFile

if TYPE_CHECKING:
    from wallaroo.model.engine.requests import Request


ENCODING_BYTES = 256 << 20
"""Pixels that wait for an encoding thread at most, of one replica."""

Encode = Callable[[int, np.ndarray], PictureFile]
"""Position of a row in its shard, and its pixels (uint8 [H, W, 3]) -> the picture as a file."""


class Call:
    """The rows of one shard on their way through the engine.

    Args:
        shard: Its number.
        rows: Positions of its rows in the shard.
        loop: The event loop in which `finished` is awaited.
        encode: Makes files of its pictures; None if they stay pixels.

    Attributes:
        finished: Set when every row has an outcome.
        outcomes: Those so far.
    """

    def __init__(
        self, shard: int, rows: list[int], loop: asyncio.AbstractEventLoop, encode: Encode | None = None
    ):
        self.shard = shard
        self.rows = rows
        self.encode = encode
        self.finished = loop.create_future()
        self.outcomes: list[Outcome] = []
        self._loop = loop

    def give_back(self, outcome: Outcome) -> None:
        """Adds the outcome of a row. Called once for each row, from any thread."""
        self._loop.call_soon_threadsafe(self._receive, outcome)

    def _receive(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        # Nobody awaits a cancelled call.
        if len(self.outcomes) == len(self.rows) and not self.finished.done():
            self.finished.set_result(None)


class Waiting(NamedTuple):
    """A row of a call that the engine is to get."""

    call: Call
    """The call."""
    row: int
    """Position of the row in the shard."""
    request: "Request"
    """What the engine gets."""


@dataclass
class RowQueue:
    """Rows that are not announced to the watch yet."""

    ordinary: deque[Waiting] = field(default_factory=deque)
    """Rows that are no suspects, first come, first served."""
    suspects: list[tuple[int, Waiting]] = field(default_factory=list)
    """How often each has killed a replica alone, and the row; the least suspicious last."""
    given_back: bool = False
    """Whether the engine has returned a row."""
    alone: bool = False
    """Whether the engine has a suspect, and must get no other row."""

    def put(self, one: Waiting, deaths: int | None) -> None:
        """Adds a row.

        Args:
            one: The row.
            deaths: How often it has ended a replica alone if it is a suspect, None if it is none.
        """
        if deaths is None:
            self.ordinary.append(one)
        else:
            self.suspects.append((deaths, one))
            self.suspects.sort(key=lambda suspect: -suspect[0])

    def take(self, room: int, idle: bool) -> tuple[list[Waiting], bool]:
        """The next rows for an engine.

        A suspect needs an idle engine. Other rows go on before it until one has been given back: a replica
        that can make none has a broken device, which is no row's fault.

        Args:
            room: Rows that the engine has room for.
            idle: Whether it has none, nor is about to get any.

        Returns:
            The rows, and whether they are one suspect alone.
        """
        self.alone &= not idle
        if self.alone:
            return [], False
        if self.suspects and (self.given_back or not self.ordinary):
            self.alone = idle
            return ([self.suspects.pop()[1]], True) if idle else ([], False)
        return [self.ordinary.popleft() for _ in range(min(room, len(self.ordinary)))], False

    def __len__(self) -> int:
        return len(self.ordinary) + len(self.suspects)


@dataclass
class Announced:
    """Rows that are being announced to the watch; the engine gets them after its reply."""

    notes: deque[tuple[list[Waiting], "Future[None] | None"]] = field(default_factory=deque)
    """Rows of each note with its reply, None if there is no watch."""
    rows: int = 0
    """How many rows they are."""

    def add(self, rows: list[Waiting], reply: "Future[None] | None") -> None:
        """Adds the rows of a note.

        Args:
            rows: The rows.
            reply: Ends when the watch has received the note; None if there is no watch.
        """
        self.notes.append((rows, reply))
        self.rows += len(rows)

    def take(self, block: bool) -> list[Waiting]:
        """Takes the rows whose notes have their replies, in order.

        Args:
            block: Whether to wait for the first reply, as an engine without rows must.

        Returns:
            The rows.

        Raises:
            Exception: The watch could not be reached.
        """
        taken: list[Waiting] = []
        while self.notes:
            rows, reply = self.notes[0]
            if reply is not None:
                if not reply.done() and (taken or not block):
                    break
                reply.result()
            self.notes.popleft()
            self.rows -= len(rows)
            taken += rows
        return taken


class Encoders:
    """Threads that encode finished pictures in the process of their replica, beside its engine.

    Pixels would cross the object store, and the network wherever the encoding task runs on another node.
    Pillow works outside of Python's lock, so that a thread hardly holds up the engine, and no task has to be
    placed. Where pictures come faster than the threads encode them, the pixels are passed on, for a
    task that may run on any node.

    Args:
        threads: Pictures that are encoded at once.
        most_bytes: Pixels that wait or are encoded at most.
    """

    def __init__(self, threads: int, most_bytes: int = ENCODING_BYTES):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self._lock = threading.Lock()
        self._room = most_bytes

    def give_back(self, call: Call, outcome: Outcome) -> None:
        """Returns an outcome to its call, with its picture encoded if there is room.

        Args:
            call: The call that the row belongs to.
            outcome: The outcome, with pixels.
        """
        pixels = outcome.pixels
        if call.encode is None or pixels is None:
            call.give_back(outcome)
            return
        with self._lock:
            full = pixels.nbytes > self._room
            self._room -= 0 if full else pixels.nbytes
        if full:
            call.give_back(outcome)
        else:
            self._pool.submit(self._encode, call, call.encode, outcome, pixels)

    def _encode(self, call: Call, encode: Encode, outcome: Outcome, pixels: np.ndarray) -> None:
        try:
            outcome = dataclasses.replace(outcome, pixels=None, file=encode(outcome.row, pixels))
        except Exception:
            # The pixels are passed on, and the task that encodes them reports the error.
            traceback.print_exc()
        finally:
            with self._lock:
                self._room += pixels.nbytes
            call.give_back(outcome)
