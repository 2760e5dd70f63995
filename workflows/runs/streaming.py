"""Rows of a pipeline as they arrive, from a thread that a waiting driver can cancel."""

import gc
import queue
import threading
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from wallaroo.workflows.cluster import reason

if TYPE_CHECKING:
    import ray.data

TICK_SECONDS = 0.5
"""How often a driver checks its replicas."""
CANCEL_SECONDS = 10.0
"""Timeout for a cancelled pipeline to end by itself."""
_OF_THREAD = threading.local()


class _CancelCallback:
    """Cancels a pipeline: Ray Data calls it at each step, and it raises if the driver has cancelled.

    A pipeline that waits for a machine, or for a replica to load its model, would not end otherwise. Ray Data
    pickles the class and makes an object of it where the pipeline starts, so the class can hold no event.
    """

    def __init__(self) -> None:
        self._cancelled: threading.Event | None = getattr(_OF_THREAD, "cancelled", None)

    def on_execution_step(self, _: Any) -> None:
        if self._cancelled is not None and self._cancelled.is_set():
            raise _Cancelled

    def before_execution_starts(self, _: Any) -> None:
        """Nothing to do, like the two below."""

    def after_execution_succeeds(self, _: Any) -> None: ...

    def after_execution_fails(self, *_: Any) -> None: ...


class _Cancelled(Exception):
    """The driver has cancelled the pipeline."""


def arriving(pipeline: Callable[[], "ray.data.Dataset"]) -> Generator[list[dict[str, Any]], None, None]:
    """Yields the rows of a pipeline as they arrive, at least every TICK_SECONDS.

    The pipeline runs in a thread of its own, so its caller is never kept waiting.

    Args:
        pipeline: Makes the Dataset; called in that thread.

    Yields:
        Rows since the last time; none if TICK_SECONDS passed without one.

    Raises:
        BaseException: An error of the pipeline, without Ray's wrappers.
    """
    arrived: queue.SimpleQueue[dict[str, Any] | BaseException | None] = queue.SimpleQueue()
    cancelled = threading.Event()

    def consume() -> None:
        from ray.data import DataContext

        _OF_THREAD.cancelled = cancelled
        callbacks: list[type] = DataContext.get_current().custom_execution_callback_classes
        if _CancelCallback not in callbacks:
            callbacks.append(_CancelCallback)
        try:
            # Prefetching would hold a row back until the next one arrives.
            blocks: Any = pipeline().iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
            for block in blocks:
                for row in block.to_pylist():
                    arrived.put(row)
                if cancelled.is_set():
                    break
            end = None
        except BaseException as error:
            # A traceback would keep the pipeline alive, and with it the replicas and their memory.
            end = reason(error).with_traceback(None)
        gc.collect()
        arrived.put(end)

    thread = threading.Thread(target=consume, name="pipeline", daemon=True)
    thread.start()
    try:
        ended = False
        while not ended:
            rows = []
            try:
                found = arrived.get(timeout=TICK_SECONDS)
                while isinstance(found, dict):
                    rows.append(found)
                    found = arrived.get_nowait()
                ended = True
            except queue.Empty:
                found = None
            if rows or not ended:
                yield rows
            if isinstance(found, BaseException):
                raise found
    finally:
        cancelled.set()
        # Ray must not end while this thread uses it: that would end the process too.
        thread.join(CANCEL_SECONDS)
