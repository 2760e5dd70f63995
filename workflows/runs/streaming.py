"""Rows of a pipeline as they arrive, from a thread that a waiting driver can give up."""

import gc
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from wallaroo.workflows.cluster import reason

if TYPE_CHECKING:
    import ray.data

TICK_SECONDS = 0.5
"""How often a driver looks at its replicas while no shard arrives."""
END_SECONDS = 10.0
"""What a pipeline that is given up has to end by itself."""
_OF_THREAD = threading.local()


class _EndsWhenGivenUp:
    """Ray Data's way to look in at each step of a pipeline: raises when nobody waits for it any more.

    A pipeline that waits for a machine, or for a replica to load its model, would not end otherwise. Ray Data
    makes one where it starts the pipeline, and sends the class about, so that it can hold no event itself.
    """

    def __init__(self) -> None:
        self._given_up: threading.Event | None = getattr(_OF_THREAD, "given_up", None)

    def on_execution_step(self, _: Any) -> None:
        if self._given_up is not None and self._given_up.is_set():
            raise _GivenUp

    def before_execution_starts(self, _: Any) -> None:
        """Nothing to do, like the two below."""

    def after_execution_succeeds(self, _: Any) -> None: ...

    def after_execution_fails(self, *_: Any) -> None: ...


class _GivenUp(Exception):
    """Nobody waits for the pipeline any more."""


def arriving(pipeline: Callable[[], "ray.data.Dataset"]) -> Iterator[dict[str, Any] | None]:
    """The rows of a pipeline as they come, and None whenever none came for TICK_SECONDS.

    The pipeline goes on in a thread of its own, so that whoever looks on is never kept waiting.
    Raises what went wrong in it, out of Ray's wrappers.
    """
    arrived: queue.SimpleQueue[dict[str, Any] | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def consume() -> None:
        from ray.data import DataContext

        _OF_THREAD.given_up = stop
        callbacks: list[type] = DataContext.get_current().custom_execution_callback_classes
        if _EndsWhenGivenUp not in callbacks:
            callbacks.append(_EndsWhenGivenUp)
        try:
            # Fetching ahead holds a row back until the next one is there.
            blocks: Any = pipeline().iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
            for block in blocks:
                for row in block.to_pylist():
                    arrived.put(row)
                if stop.is_set():
                    break
            end = None
        except BaseException as error:
            # A traceback would keep the pipeline, and with it the replicas and what they hold.
            end = reason(error).with_traceback(None)
        gc.collect()
        arrived.put(end)

    thread = threading.Thread(target=consume, name="pipeline", daemon=True)
    thread.start()
    try:
        while True:
            try:
                found = arrived.get(timeout=TICK_SECONDS)
            except queue.Empty:
                yield None
                continue
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stop.set()
        # Ray must not end while it is still talked to: it would end this process too.
        thread.join(END_SECONDS)
