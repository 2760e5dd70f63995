"""Paths of both kinds: local ones and `s3://bucket/key`."""

import os
import re
from dataclasses import dataclass

from wallaroo.model.errors import InputError


@dataclass(frozen=True)
class FileInfo:
    """A file as listed.

    relative: path below the listed folder. size: in bytes. etag: changes when the contents do; S3's
    own, for a local file made of its size and time of change.
    """

    path: str
    relative: str
    size: int
    etag: str

    @property
    def stamp(self) -> str:
        """Size and tag in one text: equal stamps of one path mean equal contents."""
        return f"{self.size}:{self.etag}"


def stamp_size(stamp: str) -> int:
    """The size in bytes that a `FileInfo.stamp` begins with."""
    return int(stamp.partition(":")[0])


def is_s3(path: str) -> bool:
    """Whether the path is on S3. Raises InputError for any other scheme."""
    scheme, mark, _ = path.partition("://")
    if not mark or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return False
    if scheme != "s3":
        if found := re.match(r"(?:hf://|https?://(?:huggingface\.co|hf-mirror\.com)/)(.+)", path):
            raise InputError(f"{path} is not read from the hub: {hub_remedy(found[1])}")
        raise InputError(f"{scheme}:// is not known: give a local path or s3://bucket/key.")
    return True


def hub_remedy(name: str) -> str:
    """How to come by what is on the Hugging Face hub under a name such as `datasets/ORG/NAME/...`."""
    kind = "--repo-type dataset " if name.startswith("datasets/") else ""
    name = "/".join(name.removeprefix("datasets/").split("@", 1)[0].split("/")[:2])
    return f"download it with `hf download {name} {kind}--local-dir FOLDER`, then give FOLDER."


def absolute_path(path: str) -> str:
    """The path as it is called from any working directory. Raises InputError if it is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        shown = ascii(os.fsencode(path))[2:-1]
        raise InputError(f"the path {shown} is not UTF-8: rename the file or folder.") from None
    return path if is_s3(path) else os.path.abspath(path)


def join(path: str, *parts: str) -> str:
    """The path of something in a folder."""
    return "/".join([path.rstrip("/") if path.strip("/") else "", *parts])


def bucket_and_key(path: str) -> tuple[str, str]:
    """Bucket and key of an `s3://` path."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    if "@" in bucket or ":" in bucket:
        raise InputError(
            "an s3:// path must be s3://bucket/key without user, password or port: "
            "credentials and endpoint come from the AWS variables or a profile."
        )
    if not bucket:
        raise InputError(f"{path} names no bucket: give s3://bucket/key.")
    return bucket, key
