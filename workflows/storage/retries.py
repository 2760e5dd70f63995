"""Retries of requests to S3: which errors pass, how long to go on, and how many there were."""

import functools
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, TypeVar

from wallaroo.model.errors import InputError
from wallaroo.workflows.storage.clients import count_retries, forget_clients
from wallaroo.workflows.storage.errors import CODE_ALIASES, explain
from wallaroo.workflows.storage.paths import is_s3

T = TypeVar("T")
P = ParamSpec("P")
PATIENCE_SECONDS = 600.0
"""How long a run tries again what a storage that is out of order has not done; then it stops."""
SHORTEST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
"""Seconds between two tries, twice as long each time, less up to half of it by chance."""
_PASSING = {
    "SlowDown",
    "InternalError",
    "InternalFailure",
    "INTERNAL_FAILURE",
    "500",
    "502",
    "504",
    "RequestTimeout",
    "REQUEST_TIMEOUT",
    "NETWORK_CONNECTION",
    "IncompleteBody",
    "BadDigest",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "ExpiredToken",
}
"""Codes of what may be otherwise soon; credentials that expired are renewed by whoever keeps the profile."""
_BROKEN_OFF = "broken off"
"""What is said of an answer that had begun and did not come to its end."""
_patient = 0
_guard = threading.Lock()


def be_patient() -> None:
    """From now on this process tries again what fails of a storage that is out of order, PATIENCE_SECONDS.

    For the processes of a run. Else a storage that does not answer is a mistake in its address, and said
    to be one soon.
    """
    global _patient
    _patient = max(_patient, 1)


@contextmanager
def patience() -> Iterator[None]:
    """What `be_patient` does, within the block."""
    global _patient
    with _guard:
        _patient += 1
    try:
        yield
    finally:
        with _guard:
            _patient -= 1


def patiently(path: str, action: Callable[[], T]) -> T:
    """What `action` gives, which may be done twice; tried again where this process is patient, and where an
    answer broke off, since whoever answers has the right address.

    Raises what it raises; if it was tried again in vain, an InputError that says so.
    """
    started = time.monotonic()
    pause = SHORTEST_PAUSE
    while True:
        try:
            return action()
        except Exception as error:
            code = _passing(error) if is_s3(path) else None
            if code is None or not (_patient or code == _BROKEN_OFF):
                raise
            seconds = time.monotonic() - started
            if seconds >= PATIENCE_SECONDS:
                words = str(error) if isinstance(error, InputError) else explain(path, error)
                raise InputError(
                    f"{(words or f'{path} cannot be used.').rstrip('.')}; it was tried again for "
                    f"{seconds:.0f} s, what is finished is kept, and the same command goes on from there."
                ) from error
            if code == "ExpiredToken":
                forget_clients()
        count_retries(1)
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, LONGEST_PAUSE)


def persistent(function: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
    """A function of a path, done `patiently`."""

    @functools.wraps(function)
    def again(path: str, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return patiently(path, lambda: function(path, *args, **kwargs))

    return again


def _passing(error: BaseException) -> str | None:
    """A code of an error of S3 that may be gone the next time; None for all others."""
    import botocore.exceptions

    halves = (botocore.exceptions.IncompleteReadError, botocore.exceptions.ResponseStreamingError)
    lost = (
        botocore.exceptions.ConnectionError,
        botocore.exceptions.HTTPClientError,
        botocore.exceptions.CredentialRetrievalError,
    )
    for cause in (error, error.__cause__, error.__cause__ and error.__cause__.__cause__):
        if isinstance(cause, botocore.exceptions.ClientError):
            code = str(cause.response.get("Error", {}).get("Code", ""))
            code = CODE_ALIASES.get(code, code)
            return code if code in _PASSING else None
        if isinstance(cause, halves):
            return _BROKEN_OFF
        if isinstance(cause, lost):
            return "lost"
        if isinstance(cause, OSError) and (found := re.search(r"AWS Error (\w+)", str(cause))):
            status = re.search(r"HTTP status (\d+)", str(cause))
            code = status[1] if found[1] == "UNKNOWN" and status else found[1]
            code = CODE_ALIASES.get(code, code)
            return code if code in _PASSING else None
        if isinstance(cause, (ConnectionError, TimeoutError)):
            return "lost"
    return None
