"""CUDA graphs: work whose tensors stay where they are, recorded once and replayed without the host's part.

Knows nothing of what the work is.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch


class Replayed:
    """A function without arguments or result, of which all calls but the first are replays of one recording.

    It works on tensors that exist before and after it, in place, and takes no decision on the host. The
    first call runs it as it is, since libraries set themselves up then; where it cannot be recorded, a
    warning says so and it always runs as it is. pool: memory that recordings share, from
    `torch.cuda.graph_pool_handle`.
    """

    def __init__(self, function: Callable[[], None], pool: Any):
        self.function, self.pool = function, pool
        self.warm = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.refused = False

    def __call__(self) -> None:
        if self.warm and self.graph is None and not self.refused:
            self._record()
        self.warm = True
        if self.graph is None:
            self.function()
        else:
            self.graph.replay()

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                self.function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.refused = True
            reason = str(error).partition("\n")[0]
            warnings.warn(f"decode steps run without a CUDA graph: {reason}", RuntimeWarning, stacklevel=3)
        else:
            self.graph = graph
