"""Errors of disks and S3, explained in one sentence. Knows no client and no retry."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from wallaroo.model.errors import InputError
from wallaroo.workflows.storage.paths import is_s3


@contextmanager
def explained(path: str, writing: bool = False) -> Iterator[None]:
    """Turns errors of storage inside the block into InputErrors about `path`.

    Args:
        path: Local or `s3://` path that the block uses.
        writing: Whether the block writes. A FileNotFoundError then means that no file can be made there, and
            becomes an InputError. In reading it stays a FileNotFoundError.

    Yields:
        Nothing.

    Raises:
        InputError: The block raised an error that `explain` knows.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not writing:
            raise
        message = explain(path, error)
        if message is None:
            raise
        raise InputError(message) from error


_CODES = {
    "NoSuchBucket": "its bucket does not exist: check the name, or make the bucket",
    "AccessDenied": "access is denied: check what the credentials may do there",
    "InvalidAccessKeyId": "the access key is not known there: check the AWS variables or the profile",
    "SignatureDoesNotMatch": "the secret key is wrong: check the AWS variables or the profile",
    "ExpiredToken": "the credentials have expired: renew them",
    "InvalidBucketName": "this is not a valid name of a bucket: check it",
    "SlowDown": "the storage throttles requests: try again later",
}
CODE_ALIASES = {
    "403": "AccessDenied",
    "Forbidden": "AccessDenied",
    "AllAccessDisabled": "AccessDenied",
    "AccountProblem": "AccessDenied",
    "ACCESS_DENIED": "AccessDenied",
    "NO_SUCH_BUCKET": "NoSuchBucket",
    "INVALID_ACCESS_KEY_ID": "InvalidAccessKeyId",
    "SIGNATURE_DOES_NOT_MATCH": "SignatureDoesNotMatch",
    "ExpiredTokenException": "ExpiredToken",
    "TokenRefreshRequired": "ExpiredToken",
    "RequestExpired": "ExpiredToken",
    "503": "SlowDown",
    "SLOW_DOWN": "SlowDown",
    "ServiceUnavailable": "SlowDown",
}
"""Code of an error of S3 -> the code that this module uses for it."""
NO_CREDENTIALS = "there are no AWS credentials: set the AWS variables or AWS_PROFILE"
_UNREACHABLE = "no answer from its endpoint: check AWS_ENDPOINT_URL and the network"
_LOCAL = {
    errno.EACCES: "permission is denied: check its owner and mode",
    errno.EPERM: "it is not permitted: check its owner, mode and file system",
    errno.EROFS: "its file system is read-only: choose another place",
    errno.ENOSPC: "its disk is full: make room and start again",
    errno.EDQUOT: "its quota is used up: make room and start again",
    errno.ENOENT: "no file can be made there: choose another place",
    errno.EEXIST: "a part of this path is a file, not a folder: choose another path",
    errno.ENOTDIR: "a part of this path is a file, not a folder: choose another path",
    errno.EISDIR: "it is a folder, not a file: choose another path",
    errno.ENAMETOOLONG: "the path is too long: choose a shorter one",
    errno.ELOOP: "it is a loop of links: choose another path",
}


def explain(path: str, error: Exception) -> str | None:
    """Describes an error of storage in one sentence, which never holds a secret.

    Args:
        path: Local or `s3://` path that was used.
        error: The error.

    Returns:
        The sentence; None for an error that is not one of storage.
    """
    import botocore.exceptions

    if isinstance(error, ValueError) and ("null byte" in str(error) or isinstance(error, UnicodeEncodeError)):
        return f"{path!a:.200} cannot be used, it holds a NUL character or is not Unicode text: correct it."
    if not is_s3(path):
        if isinstance(error, OSError) and error.errno is not None:
            reason = _LOCAL.get(error.errno, f"the system says '{os.strerror(error.errno)}'")
            return f"{path} cannot be used, {reason}."
        return None
    # s3fs hides botocore's error behind an OSError.
    for cause in (error, error.__cause__):
        if isinstance(cause, botocore.exceptions.ClientError):
            return explain_code(path, str(cause.response.get("Error", {}).get("Code", "")))
        if isinstance(cause, botocore.exceptions.NoCredentialsError):
            return f"{path} cannot be used, {NO_CREDENTIALS}."
        if isinstance(cause, botocore.exceptions.ProfileNotFound):
            return f"{path} cannot be used, the profile named by AWS_PROFILE does not exist: check its name."
        if isinstance(
            cause,
            (
                botocore.exceptions.ConnectionError,
                botocore.exceptions.HTTPClientError,
                botocore.exceptions.IncompleteReadError,
            ),
        ):
            return f"{path} cannot be used, {_UNREACHABLE}."
        if isinstance(cause, botocore.exceptions.BotoCoreError):
            words = type(cause).__name__  # its message may quote a secret
            return f"{path} cannot be used, botocore says '{words}': check the AWS configuration."
    if isinstance(error, ValueError) and "endpoint" in str(error).lower():
        return f"{path} cannot be used, AWS_ENDPOINT_URL is not a URL such as https://host:port: correct it."
    if isinstance(error, PermissionError):
        return explain_code(path, "AccessDenied")
    if isinstance(error, OSError):
        # pyarrow has no classes for these errors, only messages.
        text = str(error)
        code = re.search(r"AWS Error (\w+)", text)
        status = re.search(r"HTTP status (\d+)", text)
        if code and code[1] in ("NETWORK_CONNECTION", "REQUEST_TIMEOUT"):
            return f"{path} cannot be used, {_UNREACHABLE}."
        if code and code[1] == "UNKNOWN" and status:
            return explain_code(path, status[1])
        if code:
            return explain_code(path, code[1])
        if isinstance(error, (ConnectionError, TimeoutError)):
            return f"{path} cannot be used, {_UNREACHABLE}."
        if error.errno is not None:
            return f"{path} cannot be used, the system says '{os.strerror(error.errno)}'."
    return None


def explain_code(path: str, code: str) -> str:
    """Describes an error code of S3 in one sentence.

    Args:
        path: Path that was used.
        code: The code, or an HTTP status as text.

    Returns:
        The sentence.
    """
    reason = _CODES.get(CODE_ALIASES.get(code, code))
    return f"{path} cannot be used, {reason or f'S3 says {code!r}: check the bucket and its settings'}."


_OF_ONE_PATH = {
    "NoSuchBucket",
    "InvalidBucketName",
    "AccessDenied",
    "InvalidObjectState",  # archived
    "KeyTooLongError",
    "InvalidArgument",
    "InvalidRequest",
    "InvalidURI",
    "MethodNotAllowed",
    "400",
    "405",
    "414",
}


def refuses_path(error: InputError) -> bool:
    """Tells whether an error of S3 concerns only the one path that was asked for.

    A second try would give the same error, but other paths may work. All other errors mean that the storage
    or the access to it is out of order.

    Args:
        error: What `explained` raised.

    Returns:
        True if it concerns the path alone.
    """
    import botocore.exceptions

    cause = error.__cause__
    if isinstance(cause, botocore.exceptions.ClientError):
        code = str(cause.response.get("Error", {}).get("Code", ""))
        return CODE_ALIASES.get(code, code) in _OF_ONE_PATH
    # A ValueError is about the name alone: botocore could not make a request of it.
    return cause is None or isinstance(cause, (botocore.exceptions.ParamValidationError, ValueError))


class TooLarge(Exception):
    """An object has more bytes than allowed."""


def raise_unless_missing(error: OSError) -> None:
    """Passes over a FileNotFoundError, and raises any other error again.

    Args:
        error: Error of a local file.

    Raises:
        OSError: `error`, unless it is a FileNotFoundError.
    """
    if not isinstance(error, FileNotFoundError):
        raise error


def is_missing(error: BaseException) -> bool:
    """Whether an error of botocore says that the object does not exist."""
    import botocore.exceptions

    if not isinstance(error, botocore.exceptions.ClientError):
        return False
    return str(error.response.get("Error", {}).get("Code", "")) in ("404", "NoSuchKey", "NotFound")


def raise_if_missing(path: str, error: BaseException) -> None:
    """Turns an error of botocore into a FileNotFoundError if the object does not exist.

    Args:
        path: Path of the object.
        error: The error.

    Raises:
        FileNotFoundError: The object does not exist. Otherwise nothing is raised.
    """
    if is_missing(error):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
