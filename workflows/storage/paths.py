"""Paths of both kinds: local ones, and `s3://bucket/key`."""

import os
import re
from dataclasses import dataclass

from wallaroo.model.errors import InputError


@dataclass(frozen=True)
class FileInfo:
    """A file as listed."""

    path: str
    """Local or `s3://` path."""
    relative: str
    """Path below the listed folder."""
    size: int
    """Size in bytes."""
    etag: str
    """Changes when the contents do: the ETag of S3, or size and time of change of a local file."""

    @property
    def stamp(self) -> str:
        """Size and tag in one text. Equal stamps of one path mean equal contents."""
        return f"{self.size}:{self.etag}"


def stamp_size(stamp: str) -> int:
    """Size in bytes, from a `FileInfo.stamp`."""
    return int(stamp.partition(":")[0])


def is_s3(path: str) -> bool:
    """Tells whether a path is on S3.

    Args:
        path: Local or `s3://` path.

    Returns:
        False for a local path.

    Raises:
        InputError: The path has any other scheme.
    """
    scheme, mark, _ = path.partition("://")
    if not mark or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return False
    if scheme != "s3":
        if found := re.match(r"(?:hf://|https?://(?:huggingface\.co|hf-mirror\.com)/)(.+)", path):
            raise InputError(
                f"{path} is on the hub, which is neither read nor written: {hub_remedy(found[1])}"
            )
        raise InputError(f"{scheme}:// is not known: give a local path or s3://bucket/key.")
    return True


def hub_remedy(name: str) -> str:
    """Tells how to download what the Hugging Face hub has under a name such as `datasets/ORG/NAME/...`."""
    first, _, rest = name.partition("/")
    if first == "buckets":
        return "download it, then give the folder."
    kind = f"--repo-type {first[:-1]} " if first in ("datasets", "spaces") else ""
    name = "/".join((rest if kind else name).split("@", 1)[0].split("/")[:2])
    return f"download it with `hf download {name} {kind}--local-dir FOLDER`, then give FOLDER."


def absolute_path(path: str) -> str:
    """Makes a path independent of the working directory.

    Args:
        path: Local or `s3://` path.

    Returns:
        An absolute path, or the `s3://` path unchanged.

    Raises:
        InputError: It is not UTF-8.
    """
    whole = path if is_s3(path) else os.path.abspath(path)
    try:
        whole.encode()
    except UnicodeEncodeError:
        shown = ascii(os.fsencode(whole))[2:-1]
        raise InputError(f"the path {shown} is not UTF-8: rename the file or folder.") from None
    return whole


def join(path: str, *parts: str) -> str:
    """Joins a folder and parts of a path.

    Args:
        path: Folder, local or on S3.
        *parts: Names, or relative paths.

    Returns:
        The joined path.
    """
    return "/".join([path.rstrip("/") if path.strip("/") else "", *parts])


def bucket_and_key(path: str) -> tuple[str, str]:
    """Splits an `s3://` path.

    Args:
        path: `s3://bucket/key`; the key may be empty.

    Returns:
        Bucket and key.

    Raises:
        InputError: The path has no bucket, or a user, password or port.
    """
    bucket, _, key = path.removeprefix("s3://").partition("/")
    if "@" in bucket or ":" in bucket:
        raise InputError(
            "an s3:// path must be s3://bucket/key without user, password or port: "
            "credentials and endpoint come from the AWS variables or a profile."
        )
    if not bucket:
        raise InputError(f"{path} names no bucket: give s3://bucket/key.")
    return bucket, key
