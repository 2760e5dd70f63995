"""The errors that a user can cause, and suggestions for misspelt names.

Knows nothing of where an error is shown: a command prints it and ends, a pipeline turns it into an
error row.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """An input breaks a rule; the message is one sentence: name, value, rule, remedy."""


class RowError(InputError):
    """One row cannot be served; other rows are unaffected.

    Args:
        kind: A short stable word such as `size` or `prompt`, by which reports count errors.
        message: What is wrong, in a sentence.

    Attributes:
        kind: A short stable word such as `size` or `prompt`, by which reports count errors.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self):
        return type(self), (self.kind, str(self))


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a sentence that names the nearest known name.

    Args:
        name: What was given.
        known: What exists.
        cutoff: Least share of letters that two names have in common, in the same order.

    Returns:
        `; did you mean 'seed'?`, or the empty string if none is near.
    """
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""
