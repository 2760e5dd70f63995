"""The files of a folder or pattern, links followed, and which of them are skipped.

Knows names and links, not what is in a file.
"""

import fnmatch
import functools
import glob
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import DROPPED_FILE, SELECTION_FILE
from wallaroo.workflows.storage.local import TEMPORARY, local_info
from wallaroo.workflows.text import counted

_BITMAPS = (".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PICTURE_SUFFIXES = (*_BITMAPS, ".avif", ".heic", ".heif")
"""Suffixes of files of a folder that count as pictures."""

_MARKERS = re.compile(
    r"_SUCCESS|_metadata|_common_metadata|_delta_log|_change_data|_spark_metadata|_temporary|_started_\w+"
    rf"|_committed_\w+|__MACOSX|Thumbs\.db|desktop\.ini|{SELECTION_FILE}|{DROPPED_FILE}",
    re.IGNORECASE,
)
"""Names that Spark, Delta, Databricks, Windows, macOS and we give to what is no data."""

MOST_KINDS = 30
"""Most kinds of skipped files that a message names."""

PassedOver = Mapping[str, tuple[int, str]]
"""Kind of skipped file -> how many, and the name of one."""


class Listing(NamedTuple):
    """The files that were found."""

    files: list[storage.FileInfo]
    """Files to read, by relative path."""
    passed_over: PassedOver
    """Links and special files, which are not read."""


class Counter:
    """Counts skipped files by kind, and keeps the first name of each kind in order.

    Args:
        earlier: Counts to go on from.
        asked: Which names count; all if None.
    """

    def __init__(self, earlier: PassedOver | None = None, asked: Callable[[str], bool] | None = None):
        self.kinds = dict(earlier or {})
        self.asked = asked

    def add(self, kind: str, name: str) -> None:
        """Counts one file.

        Args:
            kind: Kind of the file, in words.
            name: Name of the file.
        """
        if self.asked is not None and not self.asked(name):
            return
        count, first = self.kinds.get(kind, (0, name))
        self.kinds[kind] = (count + 1, min(first, name))


def is_picture(name: str) -> bool:
    """Whether the suffix of a name is that of a picture."""
    return name.lower().endswith(PICTURE_SUFFIXES)


def is_pattern(path: str) -> bool:
    """Whether a path has a character of a pattern."""
    return bool(re.search(r"[*?\[]", path))


def list_manifest(path: str) -> Listing:
    """Lists all files of a folder, or those that match a pattern. Follows links, each folder once.

    Args:
        path: Local or `s3://` path. An existing folder of this name precedes a pattern.

    Returns:
        The files in order of their relative paths, and the links that lead nowhere.
    """
    if storage.is_s3(path):
        files = storage.list_files(path)
        return Listing(files or _matched_s3(path), {})
    if os.path.isdir(path):
        return _walk(os.path.realpath(path))
    return _matched(path) if is_pattern(path) else Listing([], {})


def _matched_s3(pattern: str) -> list[storage.FileInfo]:
    if not is_pattern(pattern):
        return []
    found = storage.match_files(pattern)
    parts = pattern.split("/")
    for count in range(len(parts) - 1, 2, -1):
        # A folder may have such a name literally, with the pattern behind it.
        prefix = "/".join(parts[:count])
        if not found and is_pattern(prefix):
            literal = "s3://" + glob.escape(prefix.removeprefix("s3://"))
            found = storage.match_files("/".join([literal, *parts[count:]]))
    return found


def _matched(pattern: str) -> Listing:
    folder, rest = os.path.dirname(pattern), [os.path.basename(pattern)]
    while folder and not os.path.isdir(folder) and folder != os.path.dirname(folder):
        rest.insert(0, os.path.basename(folder))
        folder = os.path.dirname(folder)
    if "**" not in rest:
        return _matched_once(os.path.join(glob.escape(folder), *rest), folder)

    def asked(name: str) -> bool:
        return _fits(tuple(name.split("/")), tuple(rest))

    # Python's glob follows links in circles, at worst forever.
    listing = _walk(folder or ".", asked)
    return listing._replace(files=[file for file in listing.files if asked(file.relative)])


def _matched_once(pattern: str, folder: str) -> Listing:
    """The files that match a local pattern without `**`, and what else matches it."""
    files = storage.match_files(pattern)
    passed = Counter()
    for path in set(glob.glob(pattern)) - {file.path for file in files}:
        name = os.path.relpath(path, folder or ".")
        if os.path.isdir(path):
            passed.add("folder", name)
        elif os.path.lexists(path):
            passed.add("link to nowhere" if os.path.islink(path) else "pipe, socket or device", name)
    return Listing(files, passed.kinds)


@functools.lru_cache(maxsize=1024)
def _fits(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Tells whether a path matches a pattern part by part, as in a shell with `**`."""
    if not patterns:
        return not parts
    first, hidden = patterns[0], bool(parts) and parts[0].startswith(".")
    if first == "**":
        deeper = bool(parts) and not hidden and _fits(parts[1:], patterns)
        return deeper or _fits(parts, patterns[1:]) or (len(patterns) == 1 and len(parts) == 1 and not hidden)
    if not parts or (hidden and not first.startswith(".")):
        return False
    return fnmatch.fnmatchcase(parts[0], first) and _fits(parts[1:], patterns[1:])


def _walk(root: str, asked: Callable[[str], bool] | None = None) -> Listing:
    """All files below a local folder. Linked folders come last, so that a folder keeps its own name.

    Args:
        root: The folder.
        asked: Which links and special files to count; all if None.

    Returns:
        All files, whatever is asked, and the counts.
    """
    found: list[storage.FileInfo] = []
    passed = Counter(asked=asked)
    seen: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    above = {_identity(root)} | {_identity(folder) for folder in _parents(root)}
    while folders or links:
        linked = not folders
        relative = folders.pop() if folders else links.pop(links.index(min(links)))
        folder = os.path.join(root, relative)
        try:
            with storage.explained(folder):
                own = _identity(folder)
                if linked and own in above:
                    passed.add("link that leads back", relative)
                    continue
                if own in seen:
                    passed.add("link to a folder that is read already", relative)
                    continue
                seen.add(own)
                with os.scandir(folder) as entries:
                    for entry in entries:
                        _sort(entry, relative, found, folders, links, passed)
        except FileNotFoundError:
            continue  # gone since it was listed
    found.sort(key=lambda file: file.relative)
    return Listing(found, passed.kinds)


def _sort(
    entry: "os.DirEntry[str]",
    folder: str,
    found: list[storage.FileInfo],
    folders: list[str],
    links: list[str],
    passed: Counter,
) -> None:
    """Puts an entry of a folder into the list it belongs to."""
    if entry.name.startswith(TEMPORARY):
        return
    relative = f"{folder}/{entry.name}" if folder else entry.name
    try:
        if entry.is_dir():
            if not entry.is_symlink():
                folders.append(relative)
            elif kind := unread(relative):
                passed.add(kind, relative)
            else:
                links.append(relative)
        elif entry.is_file():
            found.append(local_info(entry.path, relative))
        elif entry.is_symlink():
            passed.add("link to nowhere", relative)
        elif os.path.lexists(entry.path):
            passed.add("pipe, socket or device", relative)
    except FileNotFoundError:
        return
    except OSError as error:
        if not entry.is_symlink():
            raise
        passed.add("link to nowhere", f"{relative} ({error.strerror})")


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _parents(folder: str) -> list[str]:
    folder, parents = os.path.realpath(folder), []
    while folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
        parents.append(folder)
    return parents


def unread(relative: str) -> str:
    """Kind of a file that is never read, such as a hidden one; empty for any other."""
    parts = relative.split("/")
    if any(_MARKERS.fullmatch(part) for part in parts):
        return "marker"
    return "hidden" if any(part.startswith(".") for part in parts) else ""


def visible(listing: Listing) -> tuple[list[storage.FileInfo], Counter]:
    """Separates the files that may be read from all others.

    Args:
        listing: All files.

    Returns:
        The files that may be read, and counts of the others.
    """
    passed, files = Counter(listing.passed_over), []
    for file in listing.files:
        if kind := unread(file.relative):
            passed.add(kind, file.relative)
        else:
            files.append(file)
    return files, passed


def suffix_kind(name: str) -> str:
    """Kind under which a file with an unknown suffix is counted."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if re.fullmatch(r"\.\w{1,12}", suffix) else "without a suffix"


def skipped_in_words(passed_over: PassedOver) -> str:
    """Describes the skipped files in one sentence; empty if there are none."""
    if not passed_over:
        return ""
    # Suffixes come last, since what is not among the first is not named.
    ordered = sorted(
        passed_over.items(), key=lambda entry: (entry[0].startswith("."), -entry[1][0], entry[0])
    )
    words = [
        f"{count:,} {kind} ({_shown(name)})" if count == 1 else f"{count:,} {kind} (such as {_shown(name)})"
        for kind, (count, name) in ordered[:MOST_KINDS]
    ]
    rest = [count for _, (count, _) in ordered[MOST_KINDS:]]
    words += [f"{sum(rest):,} of {len(rest)} other kinds"] if rest else []
    total = sum(count for count, _ in passed_over.values())
    return f"{counted(total, 'file')} not read as a manifest: {', '.join(words)}."


def _shown(name: str) -> str:
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in name)
    return text if len(text) <= 80 else f"…{text[-79:]}"


def list_pictures(path: str) -> list[storage.FileInfo]:
    """Lists the pictures of a manifest, which is a picture, a folder of pictures or a pattern."""
    single = storage.info(path)
    if single is not None:
        return [single]
    return [file for file in visible(list_manifest(path))[0] if is_picture(file.relative)]


def is_small_text(name: str) -> bool:
    """Whether the suffix of a name is that of a caption or a prompt."""
    return name.lower().endswith(".txt")


def captions(files: Sequence[storage.FileInfo]) -> dict[str, storage.FileInfo]:
    """Maps what precedes `.txt` in the relative path of text files to the files."""
    return {file.relative[:-4]: file for file in files if is_small_text(file.relative)}
