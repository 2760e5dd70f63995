"""Stops a run on purpose: at Ctrl-C, SIGTERM (the notice that a spot machine gets) or a deadline.

The run then starts no shard, drains the shards in replicas within a timeout, and ends with RunStopped. A
second Ctrl-C or SIGTERM does not wait. Knows nothing of what a run does.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class RunStopped(BaseException):
    """The run was stopped on purpose; the message says how to resume.

    Like KeyboardInterrupt it may arise anywhere, and only the caller of the run should catch it.
    """


class Stop:
    """A request to stop the run, if there is one.

    Args:
        grace: Drain timeout for shards in flight, in seconds.
        deadline: Seconds from now after which the run stops by itself; None for never.
        kept: What remains of the work so far, for the message.
    """

    def __init__(self, grace: float, deadline: float | None = None, kept: str = "Finished shards are kept"):
        self._kept = kept
        self.why = ""
        self._grace = grace
        self._deadline = None if deadline is None else time.monotonic() + deadline
        self._listens = False
        self._asked = 0.0
        self._deferred = False

    def ask(self, why: str) -> None:
        """Asks the run to stop.

        Raises:
            RunStopped: Nothing is in flight, or this is the second request.
        """
        if self.why or not self._deferred:
            self.why = why
            raise self.stopped()
        self.why, self._asked = why, time.monotonic()

    def asked(self) -> bool:
        """Whether the run must stop; checks the deadline."""
        if not self.why and self._deadline is not None and time.monotonic() >= self._deadline:
            self.ask("the deadline")
        return bool(self.why)

    def over(self) -> bool:
        """Whether the drain timeout is over."""
        return bool(self.why) and time.monotonic() - self._asked >= self._grace

    def left(self) -> float:
        """Seconds of the drain timeout that are left after a request."""
        return max(0.0, self._grace - (time.monotonic() - self._asked))

    def stopped(self, counts: str = "") -> RunStopped:
        """What to raise.

        Args:
            counts: How much is kept, in words; empty if that is not known.

        Returns:
            The exception, with a message for people.
        """
        kept = f"{self._kept}, {counts}" if counts else self._kept
        return RunStopped(f"stopped by {self.why}. {kept}; re-run the same command to resume.")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a request is only noted, and the code that makes shards polls it."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within, Ctrl-C and SIGTERM are wishes. Without effect outside of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self._listens = True
        self.listen()
        try:
            yield
        finally:
            self._listens = False
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def listen(self) -> None:
        """Where `signals` is in effect: puts it in place again, since Ray takes SIGTERM when it starts."""
        if self._listens:
            for number in SIGNALS:
                signal.signal(number, self._heard)

    def _heard(self, number: int, _: FrameType | None) -> None:
        self.ask(SIGNALS[number])


SIGNALS = {int(signal.SIGINT): "Ctrl-C", int(signal.SIGTERM): "SIGTERM"}
"""Signals that ask a run to stop, and what people call them."""
