"""The files of a manifest, found and identified by their listing."""

import dataclasses
import hashlib
import json
import lzma
import os
import re
import zlib
from collections.abc import Sequence

import pyarrow as pa

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.lake import Partition, hive_partition, live_files, refuse_parts
from wallaroo.workflows.manifests.layouts import has_pictures
from wallaroo.workflows.manifests.listing import (
    Counter,
    Listing,
    captions,
    is_pattern,
    is_picture,
    is_small_text,
    list_manifest,
    suffix_kind,
    visible,
)
from wallaroo.workflows.manifests.parquet_files import open_parquet
from wallaroo.workflows.manifests.streams import has_header, is_object_of_objects
from wallaroo.workflows.manifests.text_files import first_columns
from wallaroo.workflows.manifests.types import (
    ALL_FORMATS,
    COMPRESSED,
    FORMATS,
    LAST_FORMATS,
    OTHER_FORMATS,
    Manifest,
    ManifestFile,
)
from wallaroo.workflows.outputs.layout import (
    DATA_FOLDER,
    ERRORS_FILE,
    RUN_FILE,
    SUCCESS_FILE,
    plan_parts,
    shard_number,
)
from wallaroo.workflows.storage.paths import hub_remedy
from wallaroo.workflows.tasks import PICTURE_TASKS

HASHED_BYTES = 64 << 20
"""Local files up to this size are identified by their contents, larger ones by size and time of change."""
_TEXT_FORMATS = frozenset(("json", "jsonl", "csv", "tsv", "lines"))
_SPARK_PART = re.compile(r"(.*/)?part-\d{5,}-[^/]+")
"""Files that Spark writes. A text of it has a row a line."""
PEEKED_FILES = 100
"""Most tables in a folder of pictures that are opened to see whether they name pictures."""


def discover(path: str, task: str = "generate", image_column: str | None = None) -> Manifest:
    """Finds the files of a manifest: a file, all of a folder at any depth, or those that match a pattern.

    Hidden files, markers and files of other formats are counted and not read. A task that reads pictures also
    takes pictures that no table names, and the output of a finished run.

    Args:
        path: Local or `s3://` path. An existing file or folder of this name precedes a pattern.
        task: One of `model.config.TASKS`.
        image_column: Column that names or holds pictures, if the run gives one.

    Returns:
        The files with their identity, and what is not read.

    Raises:
        InputError: There is no such manifest, it has no file to read, or it is an output that the task cannot
            read.
    """
    pictures = task in PICTURE_TASKS
    single = storage.info(path)
    if single is not None:
        if pictures and is_picture(path):
            return _picture_manifest(path, [single], [])
        refuse_parts(path, [single])
        return Manifest(path, (_manifest_file(single, _format(path), task, image_column),))
    listing = list_manifest(path)
    if not listing.files:
        raise InputError(
            f"The manifest {path} cannot be read, {_absent(path)}: give a file, a folder or a pattern."
        )
    if _has_pattern(path):
        refuse_parts(path, listing.files)
    elif _is_output(listing.files):
        return _results(path, listing.files, task)
    elif (live := live_files(path, listing.files)) is not None:
        return _table(path, listing, [(one.file, one.partition) for one in live], task, image_column)
    else:
        refuse_parts(path, listing.files)
    return _folder(path, listing, task, image_column)


def _absent(path: str) -> str:
    if _has_pattern(path):
        return "no file matches it"
    if not storage.is_s3(path):
        if os.path.isdir(path):
            return "the folder is empty"
        name = os.path.relpath(path)
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not os.path.exists(os.path.dirname(path)):
            remedy = hub_remedy(f"datasets/{name}").rstrip(".")
            return f"there is no such file or folder (if a data set of the hub is meant, {remedy})"
    return "there is no such file or folder"


def _has_pattern(path: str) -> bool:
    """Whether the path is a pattern and not the name of a folder."""
    if not is_pattern(path) or (not storage.is_s3(path) and os.path.isdir(path)):
        return False
    return not (storage.is_s3(path) and storage.list_files(path))


def _folder(path: str, listing: Listing, task: str, image_column: str | None) -> Manifest:
    """Builds the manifest of a folder or pattern that is neither an output nor a lake table."""
    pictures = task in PICTURE_TASKS
    files, passed = visible(listing)
    _refuse_saved(path, files)
    formats = FORMATS | LAST_FORMATS if _has_pattern(path) else FORMATS
    chosen = [file for file in files if format_of(file.relative, formats)]
    shown = [file for file in files if is_picture(file.relative)] if pictures else []
    notes: list[str] = []
    if shown and chosen:
        named = _that_name_pictures(chosen, task, image_column)
        for file in (strays := set(chosen) - set(named)):
            passed.add(f"{suffix_kind(file.relative)} that names no images", file.relative)
        files = [file for file in files if file not in strays]
        chosen = named
    if not chosen and not shown:
        chosen = [file for file in files if format_of(file.relative, OTHER_FORMATS) == "json"]
    texts = [file for file in files if format_of(file.relative, OTHER_FORMATS) == "lines"]
    taken = {*chosen, *shown}
    if not chosen and shown:
        stems = {os.path.splitext(file.relative)[0] for file in shown} if texts else set()
        captions_of = {file for name, file in captions(texts).items() if name in stems}
        taken |= captions_of
        _count(files, taken, passed)
        if captions_of:
            few = len(shown) - len(captions_of)
            more = f", {few:,} have none" if few else ""
            notes.append(
                f"Text files with the name of an image are used as its caption: {len(captions_of):,}{more}."
            )
        return _picture_manifest(
            path, shown, sorted(captions_of, key=lambda file: file.relative), passed, notes
        )
    if not chosen and texts and not pictures and not any(is_picture(file.relative) for file in files):
        if all(_SPARK_PART.fullmatch(file.relative) for file in texts):
            chosen, taken = texts, set(texts)
        elif small := [file for file in texts if is_small_text(file.relative)]:
            _count(files, set(small), passed)
            return _prompts_manifest(path, small, passed)
    if not chosen:
        chosen = [file for file in files if format_of(file.relative, LAST_FORMATS)]
        taken = set(chosen)
    if not chosen:
        _count(files, set(), passed)
        kind = min(passed.kinds.values(), key=lambda entry: entry[1], default=(0, ""))
        example = files[0].relative if files else kind[1]
        raise InputError(
            f"The manifest {path} cannot be read, it has no Parquet, CSV or JSON Lines file, only such as "
            f"'{example}': {_folder_remedy(example)}."
        )
    _count(files, taken, passed)
    tables = [
        _manifest_file(
            file,
            format_of(file.relative, ALL_FORMATS),
            task,
            image_column,
            hive_partition(file.relative),
        )
        for file in chosen
    ]
    if pictures:
        _refuse_tars(path, files, tables)
    if shown:
        notes.append(
            f"Of the {len(shown):,} images beside the table, only those that its rows name are read."
        )
    return Manifest(path, tuple(tables), passed.kinds, tuple(notes))


def _folder_remedy(example: str) -> str:
    words = _remedy(example)
    if format_of(example, OTHER_FORMATS) == "lines":
        return "give that file itself if each line of it is a prompt, or decompress it"
    return words if words != "convert it" else "give a file, a folder or a pattern"


def _refuse_saved(path: str, files: Sequence[storage.FileInfo]) -> None:
    """Raises InputError for a folder of `datasets.save_to_disk`, which holds Arrow files."""
    names = {file.relative.rpartition("/")[2] for file in files}
    if {"state.json", "dataset_info.json"} <= names and any(name.endswith(".arrow") for name in names):
        raise InputError(
            f"{path} was written by save_to_disk of Hugging Face datasets, and its Arrow files are not read: "
            f"load it by load_from_disk, and write each split by to_parquet."
        )


def _refuse_tars(path: str, files: Sequence[storage.FileInfo], tables: Sequence[ManifestFile]) -> None:
    """Raises InputError for WebDataset: pictures in tar files, beside tables that name none."""
    tar = next((file.relative for file in files if file.relative.lower().endswith(".tar")), "")
    if tar and not any(has_pictures(_columns(table), table.column) for table in tables[:PEEKED_FILES]):
        raise InputError(
            f"{path} has its images in tar files, such as '{tar}', which are not read: unpack them, and "
            f"give the folder."
        )


def _count(files: Sequence[storage.FileInfo], taken: set[storage.FileInfo], passed: Counter) -> None:
    """Counts the files that are not taken, by their suffix."""
    for file in files:
        if file not in taken:
            passed.add(suffix_kind(file.relative), file.relative)


def _that_name_pictures(
    tables: Sequence[storage.FileInfo], task: str, image_column: str | None
) -> list[storage.FileInfo]:
    """Selects the tables in a folder of pictures that name them: those of Hugging Face alone, if any."""
    if len(tables) > PEEKED_FILES:
        return list(tables)
    made = {file: _manifest_file(file, format_of(file.relative, ALL_FORMATS), task) for file in tables}
    named = [file for file in tables if has_pictures(_columns(made[file]), image_column)]
    metadata = [file for file in named if re.match(r"(.*/)?metadata\.\w+$", file.relative)]
    return metadata or named


def _columns(file: ManifestFile) -> list[str] | None:
    """Columns of a table; None if it cannot be read, which is reported when it is scanned."""
    try:
        if file.format == "parquet":
            with open_parquet(file) as parquet:
                return parquet.schema_arrow.names
        return first_columns(file)
    except Exception:
        return None


def format_of(name: str, formats: dict[str, str]) -> str:
    """Finds the format of a file by its suffix.

    Args:
        name: Name of the file, perhaps with a suffix of COMPRESSED behind.
        formats: Suffix -> format.

    Returns:
        The format; empty if there is none.
    """
    stem, suffix = os.path.splitext(name.lower())
    if suffix in COMPRESSED:
        inner = formats.get(os.path.splitext(stem)[1], "")
        return "" if inner == "parquet" else inner
    return formats.get(suffix, "")


def _format(path: str) -> str:
    if form := format_of(path, ALL_FORMATS):
        return form
    suffix = os.path.splitext(path)[1].lower()
    suffixes = ", ".join(ALL_FORMATS)
    raise InputError(
        f"The manifest {path} has the suffix '{suffix}', but only {suffixes} are read (text also with "
        f"{', '.join(COMPRESSED)} behind): {_remedy(path)}."
    )


_REMEDIES = {
    (".xlsx", ".xls", ".xlsm", ".ods", ".numbers"): "save the sheet as CSV in UTF-8",
    (".arrow", ".feather", ".ipc", ".orc", ".avro", ".pkl", ".pickle", ".h5"): "write its rows as Parquet",
    (".zip", ".tar", ".tgz", ".7z", ".rar"): "unpack it, and give the folder",
    (".yaml", ".yml", ".xml", ".md"): "write its rows as JSON Lines",
}
"""Suffixes of files that are no manifest -> what to do."""


def _remedy(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    return next((words for suffixes, words in _REMEDIES.items() if suffix in suffixes), "convert it")


def _is_output(files: Sequence[storage.FileInfo]) -> bool:
    names = {file.relative for file in files}
    return RUN_FILE in names or bool(plan_parts(names))


def _results(path: str, files: Sequence[storage.FileInfo], task: str) -> Manifest:
    """The shards of a run's output. Raises InputError unless it is finished and the task wants pictures."""
    if task not in PICTURE_TASKS:
        raise InputError(
            f"{path} is the output of a run, not a manifest: for a second try of its errors give "
            f"{storage.join(path, ERRORS_FILE)}, for its rows {storage.join(path, DATA_FOLDER)}."
        )
    done = next((file for file in files if file.relative == SUCCESS_FILE), None)
    try:
        finished = json.loads(storage.read_bytes(done.path))["parts"] if done else None
    except (ValueError, TypeError, KeyError, RecursionError):
        finished = None
    if finished != plan_parts(file.relative for file in files):
        raise InputError(f"{path} is the output of a run that is not finished: finish that run first.")
    data = (file for file in files if os.path.dirname(file.relative) == DATA_FOLDER)
    shards = (file for file in data if shard_number(os.path.basename(file.relative)) is not None)
    return Manifest(path, tuple(_manifest_file(file, "results") for file in shards))


def _table(
    path: str,
    listing: Listing,
    live: Sequence[tuple[storage.FileInfo, Partition]],
    task: str,
    image_column: str | None,
) -> Manifest:
    """The manifest of a lake table: its live files alone."""
    files, passed = visible(listing)
    taken = {file for file, _ in live}
    for file in files:
        if file not in taken:
            stale = bool(format_of(file.relative, FORMATS))
            passed.add("that the table no longer has" if stale else suffix_kind(file.relative), file.relative)
    parts = [_manifest_file(file, "parquet", task, image_column, partition) for file, partition in live]
    return Manifest(path, tuple(parts), passed.kinds)


def _picture_manifest(
    path: str,
    files: Sequence[storage.FileInfo],
    captions_of: Sequence[storage.FileInfo],
    passed: Counter | None = None,
    notes: Sequence[str] = (),
) -> Manifest:
    """Makes one manifest file for all pictures and captions, which are many and have one row each."""
    one = _standing_for(path, "pictures", [*files, *captions_of])
    return Manifest(path, (one,), passed.kinds if passed else {}, tuple(notes))


def _prompts_manifest(path: str, files: Sequence[storage.FileInfo], passed: Counter) -> Manifest:
    """Makes one manifest file for all texts of a folder, each of which is a prompt."""
    if len(files) == 1:
        text = storage.read_bytes(files[0].path)
        if len(text.strip().splitlines()) > 1:
            raise InputError(
                f"The manifest {path} has one text of several lines, {files[0].relative}: give "
                f"{files[0].path} itself if each line is a prompt."
            )
    return Manifest(path, (_standing_for(path, "prompts", files),), passed.kinds)


def _standing_for(path: str, form: str, files: Sequence[storage.FileInfo]) -> ManifestFile:
    names = json.dumps([[file.relative, file.size, file.etag] for file in files])
    etag = hashlib.sha256(names.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return ManifestFile(path, form, form, sum(file.size for file in files), etag)


def _manifest_file(
    file: storage.FileInfo,
    form: str,
    task: str = "generate",
    image_column: str | None = None,
    partition: Partition = (),
) -> ManifestFile:
    storage.absolute_path(file.path)  # is refused unless it is UTF-8, as ids and the plan hold it
    etag = file.etag
    if not storage.is_s3(file.path) and file.size <= HASHED_BYTES:
        # A copy or a fresh checkout is the same manifest, though its files are newer.
        with storage.explained(file.path), open(file.path, "rb") as stream:
            etag = hashlib.file_digest(stream, "sha256").hexdigest()[:32]
    cells = task in PICTURE_TASKS and form == "parquet"
    made = ManifestFile(
        path=file.path,
        relative=file.relative,
        format=form,
        size=file.size,
        etag=etag,
        cells=cells,
        column=(image_column or "") if cells else "",
        task=task if task in PICTURE_TASKS and form in _TEXT_FORMATS else "",
        partition=partition,
    )
    if form == "lines" and _is_table(made):
        return dataclasses.replace(made, format="tsv", task=task if task in PICTURE_TASKS else "")
    if task == "edit" and file.path.lower().endswith(".json") and is_object_of_objects(made):
        return ManifestFile(file.path, file.relative, "imgedit", file.size, etag)
    return made


def _is_table(file: ManifestFile) -> bool:
    """Whether a .txt file has a header. False if it cannot be read, which is reported when it is scanned."""
    try:
        return has_header(file)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException):
        return False
