"""References to source pictures: which a manifest may name, and where they lead. Fetches nothing."""

import base64
import binascii
import hashlib
import os
import posixpath
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wallaroo.model.errors import RowError
from wallaroo.workflows import storage
from wallaroo.workflows.sources.https import shown, without_query

Reference = str | bytes | Mapping[str, Any] | list[Any] | None
"""Value of `image` in a manifest.

A path or address, a data URI or base64, the bytes, `{bytes, path}`, or a list of one of these.
"""

MAX_INLINE_CHARACTERS = 16 << 20
"""Most characters of a data URI or base64.

A plan holds a shard of them in memory. Bytes in Parquet are only referenced, so they have no such limit.
"""

SHORTEST_BASE64 = 64
"""Fewest characters of base64.

A path may have the same letters, but none so long begins like a picture by chance.
"""


@dataclass(frozen=True)
class SourceOptions:
    """Where sources may come from, and their limits."""

    folder: str
    """Folder of the manifest, local or `s3://`. Relative paths start there."""
    https: bool = False
    """Whether https:// sources are allowed."""
    outside: bool = False
    """Whether relative paths may leave the folder, by `..` or by links."""
    most_bytes: int = 128 << 20
    """Most bytes of a file."""
    most_pixels: int = 1 << 26
    """Most pixels of a picture."""
    decode_seconds: float = 20
    """Most CPU seconds to decode a picture."""
    retry_seconds: float = 120
    """How long a disk or web host that does not serve is retried."""
    fetches: int = 8
    """Sources fetched at once, and so the most that wait in memory to be decoded."""


def single(reference: Reference) -> Reference:
    """Takes the one reference out of a list; any other reference is returned unchanged.

    Args:
        reference: Value of `image`.

    Returns:
        The reference; None for a list without one.

    Raises:
        RowError: ("image") The list has several.
    """
    if not isinstance(reference, list):
        return reference
    given = [one for one in reference if one is not None]
    if len(given) > 1:
        raise RowError(
            "image",
            f"image is a list of {len(given)} images, but the model takes one a row: join them to one "
            f"image, or leave the row out.",
        )
    return given[0] if given else None


def identity(reference: Reference) -> Any:
    """Returns a key that is equal for references to the same bytes. It never holds the bytes."""
    if isinstance(reference, list):
        return tuple(map(identity, reference))
    if isinstance(reference, Mapping):
        return identity(reference.get("bytes")), identity(reference.get("path"))
    if isinstance(reference, bytes):
        return hashlib.sha256(reference).digest()
    text = repr(reference)
    return text if len(text) < 4096 else hashlib.sha256(text.encode()).digest()


def parts_of(reference: Reference) -> tuple[bytes | None, str]:
    """Splits a reference into bytes and path.

    Args:
        reference: Value of `image`.

    Returns:
        Bytes and path. One of them may be None or empty, but not both.

    Raises:
        RowError: ("image") The value is missing or has another type.
    """
    reference = single(reference)
    data, path = reference, None
    if isinstance(reference, Mapping):
        data, path = reference.get("bytes"), reference.get("path")
    if isinstance(data, str) and path is None:
        data, path = None, data
    if data is not None and not isinstance(data, bytes):
        raise RowError(
            "image", f"image is of type {type(data).__name__}, but must be a path, bytes or {{bytes, path}}."
        )
    if path is not None and not isinstance(path, str):
        raise RowError("image", f"path of image is of type {type(path).__name__}, but must be text.")
    if data is None and not (path and path.strip()):
        raise RowError("image", "image is missing; give every row a path, an address or bytes.")
    return data, path or ""


def locate(path: str, options: SourceOptions) -> str:
    """Finds where a path of a manifest leads.

    Args:
        path: Path, address, data URI or base64.
        options: Where sources may come from.

    Returns:
        An absolute local path, `s3://...`, `https://...` or `data:...`.

    Raises:
        RowError: ("image") The run does not allow it, or it is malformed.
    """
    if (inline := _data_uri(path)) is not None:
        if len(inline) > MAX_INLINE_CHARACTERS:
            raise RowError(
                "image",
                f"image is text of {len(inline):,} characters, more than the allowed "
                f"{MAX_INLINE_CHARACTERS:,}: write the image to a file, or its bytes into Parquet.",
            )
        _parts_of_uri(inline)
        return inline
    if local := re.fullmatch(r"file:(?://(?:localhost)?)?(/(?!/).*)", path, re.IGNORECASE | re.DOTALL):
        return urllib.parse.unquote(local[1])
    scheme, mark, rest = path.partition("://")
    if mark and scheme.isalnum():
        scheme = scheme.lower()
        if scheme == "s3":
            if re.search("[@:]", rest.partition("/")[0]):
                raise RowError(
                    "image",
                    "image must be s3://bucket/key without user, password or port: credentials and endpoint "
                    "come from the AWS variables or a profile.",
                )
            if not rest.partition("/")[2]:
                raise RowError("image", f"{shown(path)} names no object: give s3://bucket/key.")
            return f"s3://{rest}"
        if scheme == "file":
            raise RowError(
                "image", f"{shown(without_query(path))} names another host: give file:///path, or the path."
            )
        if scheme != "https":
            raise RowError(
                "image",
                f"{shown(without_query(path))} has the scheme {scheme}, but only paths, file://, s3://, "
                "https:// and data: are read: copy it there.",
            )
        if not options.https:
            raise RowError(
                "image",
                f"{shown(without_query(path))} is not read, since the run does not allow https:// "
                "sources: allow them by --allow-https, or copy it.",
            )
        return f"https://{rest}"
    if os.path.isabs(path):
        return path
    if storage.is_s3(options.folder):
        inner = posixpath.normpath(path)
        if inner.startswith("../") or inner == "..":
            if not options.outside:
                raise _leaves(path)
            bucket, _, key = options.folder.removeprefix("s3://").partition("/")
            return f"s3://{bucket}{posixpath.normpath(posixpath.join('/', key, inner))}"
        return storage.join(options.folder, inner)
    place = os.path.join(os.path.abspath(options.folder), path)
    if not options.outside:
        try:
            root = os.path.realpath(options.folder)
            inside = os.path.commonpath([root, os.path.realpath(place)]) == root
        except (ValueError, OSError):
            raise RowError("image", f"{shown(path)} is not a valid path: correct it.") from None
        if not inside:
            raise _leaves(path)
    return os.path.normpath(place) if ".." not in path else os.path.realpath(place)


def _leaves(path: str) -> RowError:
    return RowError(
        "image",
        f"{shown(path)} leads out of the manifest's folder, which the run does not allow: give its absolute "
        "path.",
    )


def _data_uri(text: str) -> str | None:
    """Returns a data URI, or the base64 of a picture as one; None for any other text."""
    if text[:5].lower() == "data:":
        return f"data:{text[5:]}"
    if len(text) < SHORTEST_BASE64 or not re.fullmatch(r"[A-Za-z0-9+/_\s-]+={0,2}\s*", text):
        return None
    try:
        start = _from_base64("".join(text[:256].split())[:40])
    except binascii.Error:
        return None
    return f"data:;base64,{text}" if _PICTURE.match(start) else None


_PICTURE = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|....ftyp",
    re.DOTALL,
)
"""How files of the formats begin that are read."""


def _from_base64(text: str) -> bytes:
    """Decodes base64 of either alphabet, with or without padding and white space."""
    text = "".join(text.split()).rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def inline_bytes(uri: str) -> bytes:
    """Decodes a data URI.

    Args:
        uri: The data URI.

    Returns:
        Its bytes.

    Raises:
        RowError: ("image") It is broken.
    """
    header, text = _parts_of_uri(uri)
    data = urllib.parse.unquote_to_bytes(text)
    if not header.lower().rstrip().endswith(";base64"):
        return data
    try:
        return _from_base64(data.decode("ascii"))
    except ValueError as error:
        raise RowError(
            "image", f"{shown(header)} has broken base64 ({error}): encode the image again."
        ) from None


def _parts_of_uri(uri: str) -> tuple[str, str]:
    header, mark, text = uri.partition(",")
    if not mark:
        raise RowError("image", f"{shown(header)} has no data after a comma: give data:image/png;base64,...")
    return header, text


def kept_uri(path: str) -> str:
    """Removes what a result must not keep from a path or address.

    Args:
        path: Path, address, data URI or base64.

    Returns:
        A web address without its query, which may hold a key. A data URI without its data.
    """
    if (inline := _data_uri(path)) is not None:
        return inline[:200].partition(",")[0].partition(";")[0]
    if "://" not in path:
        return path
    return re.sub("//[^/]*@", "//", path, count=1) if path.startswith("s3://") else without_query(path)
