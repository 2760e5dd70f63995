"""Everything a viewer holds while it runs."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from wallaroo.model.errors import InputError
from wallaroo.workflows.viewer import compare, votes
from wallaroo.workflows.viewer.index import Index
from wallaroo.workflows.viewer.output import Keeper, Output
from wallaroo.workflows.viewer.shards import whole_path


class Viewer:
    """Outputs, their index, their comparison and votes.

    Attributes:
        index: Of all outputs.
        outputs: In the order of the command line.
        comparison: None for a single output.
        votes: None for a single output.
        keeper: Refreshes outputs and index.
        sources: Held while a source picture is decoded, since one can take hundreds of megabytes.
    """

    def __init__(self, paths: Sequence[str], votes_path: str | None = None) -> None:
        """Opens outputs and votes.

        Args:
            paths: Of the outputs, local or `s3://`.
            votes_path: File of votes, by default beside the first output.

        Raises:
            InputError: If a path is given twice or is not an output, or the votes are in no file of votes.
        """
        paths = [whole_path(path) for path in paths]
        for place, path in enumerate(paths):
            if path in paths[:place]:
                raise InputError(f"{path} is given twice: give each output once.")
        self.index = Index(paths)
        try:
            self.outputs = [Output(number, path, self.index) for number, path in enumerate(paths)]
            self.comparison: compare.Comparison | None = None
            self.votes: votes.Votes | None = None
            if len(self.outputs) > 1:
                self.comparison = compare.Comparison(self.index, self.outputs)
                where = votes_path or votes.default_path(self.outputs[0].path)
                self.votes = votes.Votes(where, [output.path for output in self.outputs])
        except BaseException:
            self.index.close()
            raise
        self.keeper = Keeper(self.outputs)
        self._counts: dict[Any, Any] = {}
        self._guard = threading.Lock()
        self.sources = threading.Lock()

    def close(self) -> None:
        """Stops the background thread and closes the index."""
        self.keeper.stop()
        self.index.close()

    def remembered(self, key: Any, action: Callable[[], Any]) -> Any:
        """Returns the cached result of an action.

        Args:
            key: Names the action and its arguments; must hold the version of the index.
            action: Called if the cache has no result.

        Returns:
            The result.
        """
        with self._guard:
            if key in self._counts:
                return self._counts[key]
        value = action()
        with self._guard:
            if len(self._counts) >= 32:
                self._counts.pop(next(iter(self._counts)))
            self._counts[key] = value
        return value
