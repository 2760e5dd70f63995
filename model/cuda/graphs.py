"""CUDA graphs: work on tensors with fixed addresses, recorded once and replayed without the host's part.

Knows nothing of what the work is.
"""

import gc
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Recorder(Protocol):
    """Makes recordings of functions without arguments or result.

    Such a function works in place, on tensors that exist before and after it, and takes no decision on the
    host. What the recorder gives back does the same, again and again. `clear` says that what has been
    recorded is not called any more, before it is dropped.
    """

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]: ...

    def clear(self) -> None:
        """Says that nothing recorded so far will be called again."""
        ...


class GraphRecorder:
    """A Recorder that makes CUDA graphs, all with one pool of memory.

    `clear` also leaves the pool: torch may still count uses of a pool whose graphs are gone, and then refuses
    to record with it. Works on the stream that is current, which must not be the default one.

    Args:
        failures: Why recording failed, of this recorder and others that have the same list. After one failure
            none of them records.
    """

    def __init__(self, failures: list[str] | None = None) -> None:
        self.pool: Any = None
        self.failures = [] if failures is None else failures

    def __call__(self, function: Callable[[], None]) -> "Graph":
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        return Graph(function, self)

    def clear(self) -> None:
        """Waits for replays, and leaves the pool."""
        # Replays may be under way.
        torch.cuda.synchronize()
        self.pool = None


class Graph:
    """A recorded function.

    The first call runs it directly, since libraries set themselves up and kernels are compiled then. The
    second call records it. If recording fails, all calls run it directly.

    Args:
        function: Works in place, see `Recorder`.
        recorder: Gives the pool of memory, and notes failures.
    """

    def __init__(self, function: Callable[[], None], recorder: GraphRecorder):
        self.function, self.recorder, self.pool = function, recorder, recorder.pool
        self.warm = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.warm and self.graph is None and not self.recorder.failures:
            self._record()
        self.warm = True
        if self.graph is None:
            self.function()
        else:
            self.graph.replay()

    def _record(self) -> None:
        """Not `torch.cuda.graph`: it leaves the thread on its own stream where the end of a capture fails."""
        stream = torch.cuda.current_stream()
        # A graph that is destroyed meanwhile, or memory that is freed, would end the capture.
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        try:
            # What other threads do with the device is no part of the recording and must not end it.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                self.function()
            finally:
                graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(stream)
            reason = str(error.__context__ or error).partition("\n")[0]
            self.recorder.failures.append(reason)
            warnings.warn(
                f"decode steps run without CUDA graphs, which could not be recorded: {reason}",
                RuntimeWarning,
                stacklevel=3,
            )
        else:
            self.graph = graph
