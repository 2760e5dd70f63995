"""The progress of a command on a data set, reported twice a second.

A command that takes no time reports nothing.
"""

import time
from collections.abc import Callable

from wallaroo.workflows.progress import Progress

TOLD_SECONDS = 0.5

Report = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Reports nothing."""


class Phase:
    """One pass over rows.

    Args:
        report: Called with the progress.
        name: What is done to the rows, in a word or two.
        rows: How many there are; 0 if that is not known.
    """

    def __init__(self, report: Report, name: str, rows: int):
        self._report, self._name, self._rows = report, name, rows
        self._done = self._errors = 0
        self._began = self._told = time.monotonic()
        self._spoke = False

    def count(self, rows: int, errors: int = 0) -> None:
        """Adds to the counts, and reports them if the last report is TOLD_SECONDS old.

        Args:
            rows: Rows that are done, errors included.
            errors: Errors among them.
        """
        self._done += rows
        self._errors += errors
        now = time.monotonic()
        if now - self._told >= TOLD_SECONDS or (self._spoke and self._done == self._rows):
            self._told, self._spoke = now, True
            seconds = now - self._began
            self._report(
                Progress(self._rows, self._done, errors=self._errors, phase=self._name, seconds=seconds)
            )
