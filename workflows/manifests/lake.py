"""Tables of Delta Lake, Iceberg and Hudi: which of the files in their folders are live.

The table's own library reads its log, if it is installed. The rows are read as from any Parquet file.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.text import first_line

HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
"""Name of a Hive folder for rows without a value."""
Partition = tuple[tuple[str, str | None, str], ...]
"""Columns whose values stand beside a file: name, value as text, Arrow type."""

_UUID = r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}"
_ICEBERG = rf"(?:v(?P<version>\d+)|(?P<number>\d+)-{_UUID})(?:\.gz)?\.metadata\.json"
"""Names of the files in the folder `metadata` of a table of Iceberg that say what it holds."""
_LOGS = {
    "Delta Lake": re.compile(r"(.*?)(?:^|/)_delta_log/.+"),
    "Iceberg": re.compile(rf"(.*?)(?:^|/)metadata/{_ICEBERG}"),
    "Hudi": re.compile(r"(.*?)(?:^|/)\.hoodie/.+"),
}
"""Kind of table -> paths of files that only such a table has; the group is the table's folder."""


class LiveFile(NamedTuple):
    """A file that the present version of a table has."""

    file: storage.FileInfo
    """The file as listed."""
    partition: Partition
    """Values of its partition."""


def live_files(path: str, found: Sequence[storage.FileInfo]) -> list[LiveFile] | None:
    """Finds the live files of a table of Delta Lake or Iceberg.

    Args:
        path: Folder of the manifest, local or on S3.
        found: All files of the folder.

    Returns:
        The live files by relative path; None if the folder is no such table.

    Raises:
        InputError: The table is in a subfolder, needs more than its files, is damaged, or its library is not
            installed.
    """
    for kind, log in _LOGS.items():
        match = next((match for file in found if (match := log.fullmatch(file.relative))), None)
        if match is None:
            continue
        if match[1]:
            raise InputError(
                f"{storage.join(path, match[1])} is a table of {kind} within the manifest {path}: "
                f"give the table itself as the manifest."
            )
        if kind == "Hudi":
            raise InputError(
                f"{path} is a table of Hudi, whose live rows only Hudi knows: write the rows that are wanted "
                f"to a folder of Parquet files, and give that."
            )
        files = {file.relative: file for file in found}
        live = (_delta if kind == "Delta Lake" else _iceberg)(path, files)
        return sorted(live, key=lambda one: one.file.relative)
    return None


def refuse_parts(path: str, found: Sequence[storage.FileInfo]) -> None:
    """Refuses a file, subfolder or pattern within the folder of a table, since its files may be stale.

    A part of Iceberg is known only below the folder `data` of its table. On S3 only the first file is
    checked, by two requests for each folder `data` above it, and by two if its place or name may be that of
    Delta Lake or Hudi. A request lists 1,000 objects at most. What may not be listed is taken for no table.

    Args:
        path: The manifest, local or on S3.
        found: Its files.

    Raises:
        InputError: The files are of a table of Delta Lake, Iceberg or Hudi.
    """
    parts = [file.path for file in found if file.path.lower().endswith((".parquet", ".pq"))]
    if not parts:
        return
    for kind, folder in _suspects_on_s3(path, parts[0]) if storage.is_s3(path) else _suspects(parts):
        if _has_log(kind, folder):
            raise InputError(
                f"The manifest {path} names files of a table of {kind}, some of which may be stale: "
                f"give the folder {folder} itself."
            )


def _suspects(parts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Tables that local files may be of: kind and folder, the outermost first."""
    folders = {os.path.realpath(folder) for folder in {os.path.dirname(part) for part in parts}}
    for folder in list(folders):
        while folder != os.path.dirname(folder):
            folder = os.path.dirname(folder)
            folders.add(folder)
    for folder in sorted(folders):
        yield from (("Delta Lake", folder), ("Hudi", folder))
        if os.path.basename(folder) == "data":
            yield "Iceberg", os.path.dirname(folder)


def _suspects_on_s3(path: str, part: str) -> Iterator[tuple[str, str]]:
    """Tables on S3 that a file of the manifest may be of: kind and folder."""
    # A folder that was listed has no log.
    listed = f"{path.rstrip('/')}/"
    folder, _, name = part.rpartition("/")
    bucket, *names = folder.removeprefix("s3://").split("/")
    for count, one in enumerate(names):
        above = "s3://" + "/".join([bucket, *names[:count]])
        if one == "data" and not f"{above}/".startswith(listed):
            yield "Iceberg", above
    while "=" in folder.rpartition("/")[2]:
        folder = folder.rpartition("/")[0]
    # Spark names files that are in no table alike.
    if not f"{folder}/".startswith(listed) and (
        part != path or re.search(_UUID, name) or part.count("/") > folder.count("/") + 1
    ):
        yield from (("Delta Lake", folder), ("Hudi", folder))


def _has_log(kind: str, folder: str) -> bool:
    """Whether a folder has the log of a table. False if it may not be listed."""
    log = storage.join(folder, {"Delta Lake": "_delta_log", "Iceberg": "metadata", "Hudi": ".hoodie"}[kind])
    if not storage.is_s3(folder):
        if kind != "Iceberg":
            return os.path.isdir(log)
        try:
            with os.scandir(log) as entries:
                return any(_LOGS[kind].fullmatch(f"metadata/{entry.name}") for entry in entries)
        except OSError:
            return False
    try:
        if kind != "Iceberg":
            return bool(storage.find_files(log, lambda name: True, 1))
        # Numbers precede all other names of `metadata/`. Those with a v may come after thousands.
        return any(
            _LOGS[kind].fullmatch(f"metadata/{name}")
            for start in ("", "v")
            for name in storage.object_names(log, start)
        )
    except InputError as error:
        if storage.refuses_path(error):
            return False
        raise


def _needs(kind: str, path: str, library: str) -> InputError:
    return InputError(
        f"{path} is a table of {kind}, which is read by {library}: install it with "
        f"`pip install 'wallaroo-batch[lake]'`, or write the rows to a folder of Parquet files."
    )


def _failed(kind: str, path: str, error: Exception) -> InputError:
    words = first_line(error, 200)
    return InputError(
        f"{path} is a table of {kind} that cannot be read ({words}): repair it, or give a copy."
    )


def _delta(path: str, files: Mapping[str, storage.FileInfo]) -> list[LiveFile]:
    try:
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError
    except ImportError:
        raise _needs("Delta Lake", path, "deltalake") from None
    try:
        # deltalake reads the AWS variables itself; a private endpoint may be http://.
        table = DeltaTable(path, storage_options={"allow_http": "true"} if storage.is_s3(path) else None)
        mode = table.metadata().configuration.get("delta.columnMapping.mode", "none")
        deleted = _rows(table.deletion_vectors())
        actions = _rows(table.get_add_actions(flatten=True))
        columns = pa.schema(table.schema().to_arrow())
    except (DeltaError, OSError, ValueError) as error:
        raise _failed("Delta Lake", path, error) from error
    if deleted or mode != "none":
        why = "marks rows of its files as deleted" if deleted else "names columns differently from its files"
        raise InputError(
            f"{path} is a table of Delta Lake that {why}: write its rows to a new table, or to a folder of "
            f"Parquet files."
        )
    live = []
    for action in actions:
        name = action["path"] if action["path"] in files else unquote(action["path"])
        if name not in files:
            raise InputError(f"{path} lacks {name}, which its Delta log names: restore it.")
        partition = tuple(
            _value(key.removeprefix("partition."), value, columns)
            for key, value in action.items()
            if key.startswith("partition.")
        )
        live.append(LiveFile(files[name], partition))
    return live


def _rows(found: Any) -> list[dict[str, Any]]:
    return pa.table(found).to_pylist()


def _value(name: str, value: Any, columns: pa.Schema) -> tuple[str, str | None, str]:
    """One value of a partition. It stays text if its type has no short name."""
    kind = str(columns.field(name).type)
    if value is None:
        return name, None, kind if kind in _PLAIN else "string"
    text = str(value).lower() if kind == "bool" else str(value)
    return name, text, kind if kind in _PLAIN else "string"


_PLAIN = {"string", "bool", "int8", "int16", "int32", "int64", "float", "double", "date32[day]"}


def _iceberg(path: str, files: Mapping[str, storage.FileInfo]) -> list[LiveFile]:
    try:
        from pyiceberg.exceptions import NoSuchTableError, ValidationError
        from pyiceberg.table import StaticTable
    except ImportError:
        raise _needs("Iceberg", path, "pyiceberg") from None
    try:
        table = StaticTable.from_metadata(storage.join(path, _newest(files)))
        schemas = table.metadata.schemas
        tasks = list(table.scan().plan_files())
    except (NoSuchTableError, ValidationError, OSError, ValueError) as error:
        raise _failed("Iceberg", path, error) from error
    names = {field.field_id: field.name for field in table.schema().fields}
    moved = any(names.get(field.field_id) != field.name for one in schemas for field in one.fields)
    why = "has other columns or column names than some of its files" if moved else ""
    if any(task.delete_files for task in tasks):
        why = "marks rows of its files as deleted"
    elif any(task.file.file_format.name != "PARQUET" for task in tasks):
        why = "has files other than Parquet"
    if why:
        raise InputError(
            f"{path} is a table of Iceberg that {why}: write its rows to a new table, or to a folder of "
            f"Parquet files."
        )
    live = []
    for task in tasks:
        name = task.file.file_path.removeprefix(table.metadata.location).lstrip("/")
        if name not in files:
            raise InputError(
                f"{path} lacks {task.file.file_path}, which its Iceberg metadata names: restore it, or give "
                f"the table where it was written."
            )
        live.append(LiveFile(files[name], ()))
    return live


def _newest(files: Mapping[str, storage.FileInfo]) -> str:
    """The metadata of the present version: `v3.metadata.json` or `00003-UUID.metadata.json`."""
    found = (_LOGS["Iceberg"].fullmatch(name) for name in files)
    return max((int(one["version"] or one["number"]), one[0]) for one in found if one and not one[1])[1]


def hive_partition(relative: str) -> Partition:
    """Reads the columns in a path with folders named as by Hive: `language=zh/part-0.parquet`."""
    found: dict[str, str | None] = {}
    for part in relative.split("/")[:-1]:
        name, mark, value = part.partition("=")
        if mark and name and not name.startswith("."):
            value = unquote(value)
            found[unquote(name)] = None if value == HIVE_NULL else value
    return tuple((name, value, "string") for name, value in found.items())
