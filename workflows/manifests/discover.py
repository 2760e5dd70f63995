"""The files of a manifest, found and identified by their listing."""

import hashlib
import json
import os
import re
from collections.abc import Sequence

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.types import FORMATS, Manifest, ManifestFile
from wallaroo.workflows.outputs.layout import DATA_FOLDER, RUN_FILE, shard_number
from wallaroo.workflows.tasks import PICTURE_TASKS

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
"""Files of a folder that are taken for pictures."""
HASHED_BYTES = 64 << 20


def discover(path: str, task: str = "generate") -> Manifest:
    """The files of a manifest: a file, all of a folder at any depth, or what matches a pattern.

    Hidden files and folders, and names that begin with `_`, are left out. A task that starts from
    pictures takes some, if nothing names them, and the output of a finished run. Raises InputError if
    there is no such manifest, it has no file of a known format, or it is the output of a run.
    """
    pictures = task in PICTURE_TASKS
    single = storage.info(path)
    if single is not None:
        if pictures and is_picture(path):
            return _picture_manifest(path, [single])
        imgedit = task == "edit" and path.lower().endswith(".json")
        form = "imgedit" if imgedit else _format(path)
        return Manifest(path, (_manifest_file(single, form, pictures),))
    if re.search(r"[*?\[]", path):
        found, what = storage.match_files(path), "no file matches it"
    else:
        folder = path if storage.is_s3(path) else os.path.realpath(path)
        found, what = storage.list_files(folder), "there is no such file or folder"
        if not storage.is_s3(path) and os.path.isdir(folder):
            what = "the folder is empty"
        if _is_output(found):
            return _results(path, found, task)
    visible = [file for file in found if not re.search(r"(^|/)[._]", file.relative)]
    files = [(file, FORMATS.get(os.path.splitext(file.relative)[1].lower())) for file in visible]
    known = tuple(_manifest_file(file, form, pictures) for file, form in files if form)
    others = [file for file, form in files if not form]
    shown = [file for file in others if pictures and is_picture(file.relative)]
    ignored = tuple(file.relative for file in others if file not in shown)
    if shown and not known:
        return _picture_manifest(path, shown, ignored)
    if not known:
        if ignored:
            what = f"it has no Parquet, CSV or JSON Lines file, only such as '{ignored[0]}'"
        raise InputError(f"The manifest {path} cannot be read, {what}: give a file, a folder or a pattern.")
    return Manifest(path, known, ignored)


def _format(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    if suffix in FORMATS:
        return FORMATS[suffix]
    if suffix == ".json":
        raise InputError(f"The manifest {path} is JSON: write one object a line and name the file .jsonl.")
    raise InputError(
        f"The manifest {path} has the suffix '{suffix}', but only {', '.join(FORMATS)} are read: convert it."
    )


def _is_output(files: Sequence[storage.FileInfo]) -> bool:
    names = {file.relative for file in files}
    return RUN_FILE in names or any(re.fullmatch(r"plan/part-\d+\.json", name) for name in names)


def _results(path: str, files: Sequence[storage.FileInfo], task: str) -> Manifest:
    """The shards of a run's output. Raises InputError unless it is finished and the task wants pictures."""
    if task not in PICTURE_TASKS:
        raise InputError(
            f"{path} is the output of a run, not a manifest: for a second try of its errors give "
            f"{storage.join(path, 'errors.jsonl')}, for its rows {storage.join(path, DATA_FOLDER)}."
        )
    parts = sorted(file.relative for file in files if re.fullmatch(r"plan/part-\d+\.json", file.relative))
    done = next((file for file in files if file.relative == "_SUCCESS"), None)
    try:
        finished = json.loads(storage.read_bytes(done.path))["parts"] if done else None
    except (ValueError, TypeError, KeyError, RecursionError):
        finished = None
    if finished != [os.path.basename(part).removesuffix(".json") for part in parts]:
        raise InputError(f"{path} is the output of a run that is not finished: let it finish first.")
    data = (file for file in files if os.path.dirname(file.relative) == DATA_FOLDER)
    shards = (file for file in data if shard_number(os.path.basename(file.relative)) is not None)
    return Manifest(path, tuple(_manifest_file(file, "results") for file in shards))


def is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURE_SUFFIXES)


def _picture_manifest(
    path: str, files: Sequence[storage.FileInfo], ignored: tuple[str, ...] = ()
) -> Manifest:
    """One file stands for all pictures, which are many and have one row each."""
    names = json.dumps([[file.relative, file.size, file.etag] for file in files])
    etag = hashlib.sha256(names.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    size = sum(file.size for file in files)
    return Manifest(path, (ManifestFile(path, "pictures", "pictures", size, etag),), ignored)


def list_pictures(path: str) -> list[storage.FileInfo]:
    """The pictures of such a manifest, looked for anew."""
    single = storage.info(path)
    if single is not None:
        return [single]
    if re.search(r"[*?\[]", path):
        found = storage.match_files(path)
    else:
        found = storage.list_files(path if storage.is_s3(path) else os.path.realpath(path))
    visible = (file for file in found if not re.search(r"(^|/)[._]", file.relative))
    return [file for file in visible if is_picture(file.relative)]


def _manifest_file(file: storage.FileInfo, form: str, pictures: bool = False) -> ManifestFile:
    etag = file.etag
    if not storage.is_s3(file.path) and file.size <= HASHED_BYTES:
        # A copy or a fresh checkout is the same manifest, though its files are newer.
        with storage.explained(file.path), open(file.path, "rb") as stream:
            etag = hashlib.file_digest(stream, "sha256").hexdigest()[:32]
    return ManifestFile(file.path, file.relative, form, file.size, etag, pictures and form == "parquet")
