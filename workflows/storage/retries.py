"""Retries of requests to S3: which errors may pass, how long to retry, and how often that was."""

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
RETRY_SECONDS = 600.0
"""How long a run retries requests to a storage that is out of order before it stops."""
MIN_BACKOFF, MAX_BACKOFF = 0.2, 5.0
"""Seconds between two tries: doubled each time, less a random part of up to a half."""
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
"""Codes of errors that may pass. Expired credentials are renewed by the owner of the profile."""
_BROKEN_OFF = "broken off"
"""Code of a response that was cut off after it had begun."""
_enabled = 0
_guard = threading.Lock()


def enable_retries() -> None:
    """Retries failed requests in this process for RETRY_SECONDS, from now on.

    For the processes of a run. Elsewhere a storage that does not answer is usually a wrong address, so the
    error comes at once.
    """
    global _enabled
    _enabled = max(_enabled, 1)


@contextmanager
def retries_enabled() -> Iterator[None]:
    """Does what `enable_retries` does, within the block."""
    global _enabled
    with _guard:
        _enabled += 1
    try:
        yield
    finally:
        with _guard:
            _enabled -= 1


def with_retries(path: str, action: Callable[[], T]) -> T:
    """Calls `action` until it succeeds or fails for good.

    Errors that may pass are retried where retries are enabled. A response that was cut off is always
    retried, since the address is right.

    Args:
        path: What the action is about; only `s3://` paths are retried.
        action: A request, which may be done twice.

    Returns:
        What `action` returns.

    Raises:
        InputError: Retries did not help within RETRY_SECONDS.
        Exception: Whatever `action` raises and is not retried.
    """
    started = time.monotonic()
    pause = MIN_BACKOFF
    while True:
        try:
            return action()
        except Exception as error:
            code = _passing(error) if is_s3(path) else None
            if code is None or not (_enabled or code == _BROKEN_OFF):
                raise
            seconds = time.monotonic() - started
            if seconds >= RETRY_SECONDS:
                words = str(error) if isinstance(error, InputError) else explain(path, error)
                words = (words or f"{path} cannot be used.").rstrip(".")
                raise InputError(
                    f"{words}; retries for {seconds:.0f} s did not help. Finished shards are kept; re-run "
                    f"the same command to resume."
                ) from error
            if code == "ExpiredToken":
                forget_clients()
        count_retries(1)
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, MAX_BACKOFF)


def retried(function: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
    """Makes a function of a path run by `with_retries`."""

    @functools.wraps(function)
    def retrying(path: str, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return with_retries(path, lambda: function(path, *args, **kwargs))

    return retrying


def _passing(error: BaseException) -> str | None:
    """The code of an error of S3 that may pass; None for other errors."""
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
