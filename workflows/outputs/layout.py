"""The name of every file in an output."""

import re
from collections.abc import Iterable

from wallaroo.workflows import storage

RUN_FILE = "run.json"
"""Configuration of the run."""
PLAN_FOLDER = "plan"
"""Parts of the plan."""
DATA_FOLDER = "data"
"""Shards of results."""
RUNS_FOLDER = "runs"
"""Records and logs, one of each start of a driver."""
SUMMARIES_FOLDER = "summaries"
"""Summaries of the plan parts."""
UNREADABLE_FOLDER = "unreadable"
"""Where a resumed run moves damaged files of `data/`."""
ERRORS_FILE = "errors.jsonl"
SUCCESS_FILE = "_SUCCESS"
CARD_FILE = "README.md"
LOCK_FILE = "lock.json"
ESTIMATE_FILE = "estimate.json"
REPORT_FILE = "report.html"
EVALUATION_FILE = "evaluation.json"
"""The table of `wallaroo evaluate`."""
SELECTION_FILE = "_selection.json"
DROPPED_FILE = "_dropped.jsonl"
"""Names whose beginning keeps readers from taking them for a part of a manifest."""

_SHARD_NAME = re.compile(r"shard-(\d{8,})\.parquet")
_PART_JSON = re.compile(r"part-(\d{5,})\.json")
_PLAN_FILE = re.compile(r"part-\d{5,}(\.json|-[0-9a-f]{16}\.parquet)|(known|pictures)-[0-9a-f]{16,}\.\w+")
_RECORD_NAME = re.compile(r"(\d{4,})\.json")
_EARLY = re.compile(
    rf"{LOCK_FILE}|{PLAN_FOLDER}/({ESTIMATE_FILE}|(part|known|pictures)-[\w-]+\.(json|jsonl|parquet))"
)


def part_name(part: int) -> str:
    """How the files of a part begin, such as `part-00000`."""
    return f"part-{part:05d}"


def part_json_name(part: int) -> str:
    """File name in `plan/` of the JSON of a part, such as `part-00000.json`."""
    return f"{part_name(part)}.json"


def part_rows_name(part: int, digest: str) -> str:
    """File name in `plan/` of the rows of a part. digest: 16 hexadecimal digits of what they depend on."""
    return f"{part_name(part)}-{digest}.parquet"


def part_number(name: str) -> int | None:
    """Parses the file name in `plan/` of the JSON of a part; None for any other file."""
    match = _PART_JSON.fullmatch(name)
    return int(match.group(1)) if match else None


def plan_parts(files: Iterable[str]) -> list[str]:
    """Lists the names of the plan parts of an output, in order.

    Args:
        files: Paths of its files, relative to it.

    Returns:
        Names such as `part-00000`, of parts that have their JSON.
    """
    folder = f"{PLAN_FOLDER}/"
    numbers = (part_number(file.removeprefix(folder)) for file in files if file.startswith(folder))
    return [part_name(number) for number in sorted(number for number in numbers if number is not None)]


def known_name(digest: str) -> str:
    """File name in `plan/` of the rows that an incremental round has planned."""
    return f"known-{digest}.parquet"


def pictures_name(digest: str) -> str:
    """File name in `plan/` of the new pictures of a folder, as a manifest."""
    return f"pictures-{digest}.jsonl"


def is_plan_file(name: str) -> bool:
    """Tells whether planning writes files of this name into `plan/`."""
    return _PLAN_FILE.fullmatch(name) is not None


def shard_name(shard: int) -> str:
    """File name of a shard, such as `shard-00000123.parquet`."""
    return f"shard-{shard:08d}.parquet"


def shard_path(output: str, shard: int) -> str:
    """Returns the path of the file of a shard.

    Args:
        output: Folder of the run, local or on S3.
        shard: Number of the shard.

    Returns:
        Local or `s3://` path.
    """
    return storage.join(output, DATA_FOLDER, shard_name(shard))


def shard_number(name: str) -> int | None:
    """Parses the file name of a shard; None for any other file."""
    match = _SHARD_NAME.fullmatch(name)
    number = int(match.group(1)) if match else None
    return number if number is not None and shard_name(number) == name else None


def list_shards(output: str) -> dict[int, str]:
    """Lists the shards of an output: number -> stamp. One listing; no file is opened."""
    return storage.list_stamps(storage.join(output, DATA_FOLDER), shard_number)


def list_done(output: str) -> set[int]:
    """Lists the numbers of the shards of an output. One listing; no file is opened."""
    return set(list_shards(output))


def summary_name(part: str) -> str:
    """File name of the summary of a plan part, or of all parts if `part` is `all`."""
    return f"{part}.jsonl.gz"


def summary_path(output: str, part: str) -> str:
    """Returns the path of a summary.

    Args:
        output: Folder of the run, local or on S3.
        part: Name of the plan part, or `all`.

    Returns:
        Local or `s3://` path.
    """
    return storage.join(output, SUMMARIES_FOLDER, summary_name(part))


def list_summaries(output: str) -> set[str]:
    """Lists the file names in the folder of summaries."""
    return set(storage.list_stamps(storage.join(output, SUMMARIES_FOLDER), str))


def unreadable_path(output: str, shard: int) -> str:
    """Returns the path to which a resumed run moves the damaged file of a shard.

    Args:
        output: Folder of the run, local or on S3.
        shard: Number of the shard.

    Returns:
        Local or `s3://` path.
    """
    return storage.join(output, UNREADABLE_FOLDER, shard_name(shard))


def record_path(output: str, run: int) -> str:
    """Returns the path of the record of a run: `runs/0001.json` for the first.

    Args:
        output: Folder of the run, local or on S3.
        run: Number of the run, from 1.

    Returns:
        Local or `s3://` path.
    """
    return storage.join(output, RUNS_FOLDER, f"{run:04d}.json")


def record_numbers(output: str) -> list[int]:
    """Lists the numbers of the run records of an output, ascending."""
    names = (info.relative for info in storage.list_files(storage.join(output, RUNS_FOLDER)))
    return sorted(int(match.group(1)) for match in map(_RECORD_NAME.fullmatch, names) if match)


def is_early(relative: str) -> bool:
    """Tells whether an output may have a file before it has `run.json`.

    Args:
        relative: Path of the file relative to the output.

    Returns:
        True for files of planning and for the lock.
    """
    return _EARLY.fullmatch(relative) is not None
