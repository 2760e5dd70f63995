"""The name of every file in an output."""

import re

from wallaroo.workflows import storage

RUN_FILE = "run.json"
PLAN_FOLDER = "plan"
DATA_FOLDER = "data"
RUNS_FOLDER = "runs"
SUMMARIES_FOLDER = "summaries"
UNREADABLE_FOLDER = "unreadable"
"""Where a resumed run puts files of `data/` that are damaged."""
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
"""Names that begin so that nobody takes them for a part of a manifest."""

_SHARD_NAME = re.compile(r"shard-(\d{8,})\.parquet")
_RECORD_NAME = re.compile(r"(\d{4,})\.json")
_EARLY = re.compile(
    rf"{LOCK_FILE}|{PLAN_FOLDER}/({ESTIMATE_FILE}|(part|known|pictures)-[\w-]+\.(json|jsonl|parquet))"
)


def part_name(part: int) -> str:
    """How the files of a part begin, such as `part-00000`."""
    return f"part-{part:05d}"


def shard_name(shard: int) -> str:
    """File name of a shard, such as `shard-00000123.parquet`."""
    return f"shard-{shard:08d}.parquet"


def shard_path(output: str, shard: int) -> str:
    """Where the rows of a shard lie."""
    return storage.join(output, DATA_FOLDER, shard_name(shard))


def shard_number(name: str) -> int | None:
    """The shard whose file has this name; None for any other file."""
    match = _SHARD_NAME.fullmatch(name)
    number = int(match.group(1)) if match else None
    return number if number is not None and shard_name(number) == name else None


def list_stamps(output: str) -> dict[int, str]:
    """Stamps of the shards that are there, by number. One listing; no file is opened."""
    return storage.list_stamps(storage.join(output, DATA_FOLDER), shard_number)


def list_done(output: str) -> set[int]:
    """Numbers of the shards that are there. One listing; no file is opened."""
    return set(list_stamps(output))


def summary_name(part: str) -> str:
    """File name of the summary of a plan part, or of all of them where `part` is `all`."""
    return f"{part}.jsonl.gz"


def summary_path(output: str, part: str) -> str:
    """Where the summary of a plan part lies; see `summary_name`."""
    return storage.join(output, SUMMARIES_FOLDER, summary_name(part))


def list_summaries(output: str) -> set[str]:
    """Names of the summary files that are there."""
    return set(storage.list_stamps(storage.join(output, SUMMARIES_FOLDER), str))


def unreadable_path(output: str, shard: int) -> str:
    """Where a resumed run puts the damaged file of a shard."""
    return storage.join(output, UNREADABLE_FOLDER, shard_name(shard))


def record_path(output: str, run: int) -> str:
    """Where the record of a run lies: `runs/0001.json` for the first."""
    return storage.join(output, RUNS_FOLDER, f"{run:04d}.json")


def record_numbers(output: str) -> list[int]:
    """Numbers of the records that are there, ascending."""
    names = (info.relative for info in storage.list_files(storage.join(output, RUNS_FOLDER)))
    return sorted(int(match.group(1)) for match in map(_RECORD_NAME.fullmatch, names) if match)


def is_early(relative: str) -> bool:
    """Whether a file of an output, named relative to it, may be there before `run.json` is."""
    return _EARLY.fullmatch(relative) is not None
