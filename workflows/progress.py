"""What a run reports to its caller: its progress, and a summary at the end.

Knows nothing of options, files or terminals.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The progress of a run."""

    rows: int = 0
    """Output rows of the whole run; 0 while unknown."""
    done: int = 0
    """Rows finished so far, error rows and rows of earlier runs included."""
    before: int = 0
    """Rows among `done` that earlier runs finished."""
    errors: int = 0
    """Error rows among `done`."""
    waiting: str = ""
    """What the run waits for (`waiting for 1 GPU: 0 of 4 up, 3 min`), or empty."""
    phase: str = ""
    """The present pass of a command that passes over the rows several times (`comparing`), or empty."""
    stopping: bool = False
    """Whether the run drains its shards in flight. A display shows this at once."""
    seconds: float = 0.0
    """Seconds since the command or its phase began; 0 if the display is to measure them."""


@dataclass(frozen=True)
class RunSummary:
    """The result of a run."""

    output: str
    """The folder of the results."""
    rows: int
    """Planned output rows."""
    ok: int
    """Rows in the output that have a result."""
    errors: int
    """Error rows in the output."""
    before: int
    """Rows that earlier runs finished."""
    made: int
    """Pictures or texts that this run made."""
    seconds: float
    """Wall time of this run, as its record has it."""
