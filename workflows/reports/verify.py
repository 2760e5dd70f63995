"""Reads an output back and decides whether it matches its plan: complete, incomplete or broken.

It trusts the plan and `run.json` only: every file is read once, and every picture decoded. A fast check
trusts summaries and footers too, and says so. Knows nothing of Ray.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import (
    DATA_FOLDER,
    PLAN_FOLDER,
    SUCCESS_FILE,
    SUMMARIES_FOLDER,
    list_summaries,
    shard_name,
    shard_number,
    shard_path,
    summary_name,
    summary_path,
)
from wallaroo.workflows.outputs.lock import at_work
from wallaroo.workflows.outputs.run_file import read_run
from wallaroo.workflows.outputs.schema import result_schema
from wallaroo.workflows.outputs.shards import map_shards
from wallaroo.workflows.outputs.success import read_success
from wallaroo.workflows.outputs.summary_files import read_lines
from wallaroo.workflows.plans.finished import covers
from wallaroo.workflows.plans.plan import Plan, PlanPart, read_plan
from wallaroo.workflows.progress import Progress
from wallaroo.workflows.reports.planned import planned_shards
from wallaroo.workflows.reports.summaries import ALL, Summaries, stamps_digest
from wallaroo.workflows.reports.tally import Tally
from wallaroo.workflows.reports.verify_rows import Check, Contents, short
from wallaroo.workflows.text import counted

MAX_FAULTS = 20
"""Faults that are printed; further ones are only counted."""
MAX_READERS = 8


@dataclass(frozen=True)
class Verdict:
    """The result of `verify`."""

    state: str
    """`complete`, `incomplete` or `broken`.

    `incomplete`: nothing is wrong, but rows are missing or the run did not end. `broken`: at least one fault.
    """
    planned: int
    """Planned rows."""
    rows: int
    """Rows in `data/`."""
    ok: int
    """Rows with a result."""
    errors: dict[str, int]
    """Kind -> error rows."""
    missing_shards: int
    """Planned files that are not written yet."""
    faults: int
    """How many faults were found."""


@dataclass
class _Found:
    """What all files hold. faults: how many, of which the first MAX_FAULTS were passed to `say`."""

    say: Callable[[str], None]
    rows: int = 0
    ok: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    faults: int = 0

    def fault(self, sentence: str) -> None:
        self.faults += 1
        if self.faults <= MAX_FAULTS:
            self.say(sentence)


def verify(
    output: str,
    say: Callable[[str], None] = print,
    on_progress: Callable[[Progress], None] | None = None,
    fast: bool = False,
) -> Verdict:
    """Reads all of an output and reports what it finds in sentences.

    Each file of `data/` and each plan part is read once; a few files are in memory at a time.

    Args:
        output: Folder of a run, local or on S3.
        say: Called with each sentence, the last of which is the verdict.
        on_progress: Called after each file.
        fast: Whether only names, sizes, tags and counts are compared, by summaries and footers.

    Returns:
        What was found.

    Raises:
        InputError: `output` is no output of ours, or its plan or the storage cannot be read.
    """
    run = read_run(output)
    plan = read_plan(output)
    began = time.monotonic()

    def report(done: int, errors: int) -> None:
        if on_progress is not None:
            on_progress(Progress(plan.rows, done, errors=errors, seconds=time.monotonic() - began))

    found = _Found(say)
    success = read_success(output)  # a damaged one is told before all files are read
    stamps = _listed(output, plan, found)
    if fast:
        _look(output, plan, found, report)
    else:
        _read(output, plan, run, stamps, found, report)
    missing = [shard for shard in plan.shards if shard not in stamps]
    for sentence in _success_faults(output, plan, success, None if found.faults else found, missing):
        found.fault(sentence)
    if not missing and found.rows != plan.rows:
        found.fault(f"{output} has {found.rows:,} rows in all, but {plan.rows:,} were planned.")
    if found.faults > MAX_FAULTS:
        say(f"{found.faults - MAX_FAULTS:,} more faults are not shown.")
    if found.faults:
        state = "broken"
    elif missing or not covers(success, plan):
        state = "incomplete"
    else:
        state = "complete"
    errors = dict(found.errors.most_common())
    verdict = Verdict(state, plan.rows, found.rows, found.ok, errors, len(missing), found.faults)
    say(_sentence(output, verdict, plan, fast))
    return verdict


def _listed(output: str, plan: Plan, found: _Found) -> dict[int, str]:
    """The stamps of the plan's shards that exist. Reports all other files."""
    others: set[str] = set()

    def key(relative: str) -> int | None:
        shard = shard_number(relative)
        if shard is not None and shard in plan.shards:
            return shard
        others.add(relative)
        return None

    folder = storage.join(output, DATA_FOLDER)
    stamps = storage.list_stamps(folder, key)
    for path in (storage.join(folder, relative) for relative in sorted(others)):
        if path.endswith(".parquet"):
            found.fault(
                f"{path} is not in the plan, but readers of the folder would read it: move it elsewhere."
            )
        else:
            found.say(f"{path} is not a file of a run; it is ignored.")
    return stamps


def _read(
    output: str,
    plan: Plan,
    run: Mapping[str, Any],
    stamps: Mapping[int, str],
    found: _Found,
    report: Callable[[int, int], None],
) -> None:
    """Reads every file of a plan's shards, and compares the summaries with it."""
    check = Check(output, run, result_schema(plan.carried, bool(run["config"].get("save_tokens"))))
    plan_stamps = storage.list_stamps(storage.join(output, PLAN_FOLDER), str)
    summaries = list_summaries(output)
    totals = _totals(output) if summary_name(ALL) in summaries else {}

    def planned() -> Iterator[tuple[int, pa.Table]]:
        for part in plan.parts:
            wanted = [shard for shard in range(part.first_shard, part.end) if shard in stamps]
            yield from planned_shards(output, part, plan_stamps.get(part.file), wanted)

    parts = iter(plan.parts)
    part: PlanPart | None = None
    entries: dict[int, tuple[str, Any]] = {}
    total = Tally()
    last = -1
    for one in map_shards(check, planned(), threads=min(MAX_READERS, os.cpu_count() or 1)):
        while part is None or one.shard >= part.end:
            _check_total(output, part, totals, stamps, total, found)
            part, total = next(parts), Tally()
            entries = _entries(output, part) if summary_name(part.name) in summaries else {}
        _check_entry(output, part, one, entries, stamps, found)
        if one.tally is not None:
            total.add(one.tally.tally)
        found.rows += one.rows
        found.ok += one.ok
        found.errors += one.errors
        if one.row_ids and one.row_ids[0] <= last:
            found.fault(f"{one.path} has row_id {one.row_ids[0]}, which is not above those of earlier files.")
        last = max([last, *one.row_ids])
        for sentence in one.faults:
            found.fault(sentence)
        report(found.rows, found.errors.total())
    _check_total(output, part, totals, stamps, total, found)


def _entries(output: str, part: PlanPart) -> dict[int, tuple[str, Any]]:
    """What the summary of a part says: shard -> stamp and tally."""
    lines = (line for line in read_lines(output, part.name) if isinstance(line, list) and len(line) == 3)
    return {line[0]: (line[1], line[2]) for line in lines if type(line[0]) is int}


def _totals(output: str) -> dict[str, tuple[str, Any]]:
    """What the summary of all parts says: part -> digest of its stamps and tally."""
    lines = (line for line in read_lines(output, ALL) if isinstance(line, list) and len(line) == 3)
    return {line[0]: (line[1], line[2]) for line in lines if isinstance(line[0], str)}


def _check_entry(
    output: str,
    part: PlanPart,
    contents: Contents,
    entries: Mapping[int, tuple[str, Any]],
    stamps: Mapping[int, str],
    found: _Found,
) -> None:
    """Whether the summary of this very file matches its contents."""
    entry = entries.get(contents.shard)
    if contents.faults or contents.tally is None or entry is None or entry[0] != stamps[contents.shard]:
        return
    if not contents.tally.says(entry[1]):
        path = summary_path(output, part.name)
        found.fault(f"the counts of {contents.path} in {path} are wrong: {_REMEDY}.")


def _check_total(
    output: str,
    part: PlanPart | None,
    totals: Mapping[str, tuple[str, Any]],
    stamps: Mapping[int, str],
    total: Tally,
    found: _Found,
) -> None:
    if part is None or part.name not in totals or found.faults:
        return
    numbers = range(part.first_shard, part.end)
    key, values = totals[part.name]
    if key == stamps_digest((shard, stamps[shard]) for shard in numbers if shard in stamps):
        try:
            same = Tally.from_values(values).counts() == total.counts()
        except (ValueError, TypeError, KeyError, AttributeError):
            same = True  # a tally that cannot be parsed is ignored by its readers
        if not same:
            found.fault(f"the counts of {part.name} in {summary_path(output, ALL)} are wrong: {_REMEDY}.")


_REMEDY = f"move the folder {SUMMARIES_FOLDER} elsewhere and re-run the command, which writes it again"


def _look(output: str, plan: Plan, found: _Found, report: Callable[[int, int], None]) -> None:
    """Counts the rows of every shard by summaries, and by footers where none covers a file."""
    summaries = Summaries(output, plan.parts, renew=False)
    for part in plan.parts:
        for shard, one in summaries.of_shards(part, whole=False):
            found.rows += one.tally.rows
            found.ok += one.tally.ok
            found.errors += one.tally.errors
            wanted = part.shard_rows
            if shard == part.end - 1:
                wanted = part.rows - part.shard_rows * (part.shards - 1)
            if not part.compacted and one.tally.rows != wanted:
                path = shard_path(output, shard)
                found.fault(f"{path} has {one.tally.rows:,} rows, but {wanted:,} were planned.")
        report(found.rows, found.errors.total())
    for shard, words in summaries.unreadable.items():
        found.fault(f"{shard_path(output, shard)} cannot be read: {words}.")
    if summaries.opened:
        found.say(
            f"No current summary covers {counted(summaries.opened, 'file')}; footers were read instead."
        )


def _sentence(output: str, verdict: Verdict, plan: Plan, fast: bool) -> str:
    """The verdict in words."""
    rows = f"{verdict.rows:,} of {verdict.planned:,} rows, {verdict.ok:,} ok"
    if verdict.errors:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in verdict.errors.items())
        rows += f", {counted(sum(verdict.errors.values()), 'error row')} ({kinds})"
    if verdict.state == "complete" and fast:
        return (
            f"{output} is complete by names, sizes and counts: {rows}. Not checked: images, texts and "
            f"other values of rows, which `wallaroo verify {output}` without --fast reads."
        )
    if verdict.state == "complete":
        return f"{output} is complete: {rows}; every row is as planned, every image or text is as stated."
    if verdict.state == "broken":
        return (
            f"{output} is broken: {verdict.faults:,} {'fault' if verdict.faults == 1 else 'faults'}; {rows}. "
            f"Move the faulty files elsewhere and re-run the command to make their rows again."
        )
    running = at_work(output)
    if not plan.complete:
        why = "its plan is not finished"
    elif verdict.missing_shards:
        why = f"{verdict.missing_shards:,} of {len(plan.shards):,} files are missing"
    else:
        why = f"all rows exist, but {SUCCESS_FILE} is missing or outdated"
    remedy = "Verify again when it has ended." if running else "Re-run its command to resume."
    return f"{output} is incomplete: {why}; {rows}. {running or 'No run is active.'} {remedy}"


def _success_faults(
    output: str, plan: Plan, success: Mapping[str, Any] | None, found: _Found | None, missing: list[int]
) -> Iterator[str]:
    """Wrong statements of `_SUCCESS`. Its counts are compared only if all files could be counted
    (`found`)."""
    if success is None:
        return
    path = storage.join(output, SUCCESS_FILE)
    named = plan.parts[: len(success["parts"])]
    if [part.name for part in named] != success["parts"]:
        yield f"{path} names {', '.join(success['parts'][:3])}, but the plan has other parts."
        return
    rows = sum(part.rows for part in named)
    if success["rows"] != rows:
        yield f"{path} says {success['rows']:,} rows, but its parts have {rows:,}."
    stop = max((part.first_shard + part.shards for part in named), default=0)
    lost = [shard for shard in missing if shard < stop]
    if lost:
        first = shard_name(lost[0])
        yield f"{path} says that all files exist, but {len(lost):,} are missing, the first is {first}."
    elif found is not None and len(named) == len(plan.parts):
        for name, said, is_so in (
            ("ok", success["ok"], found.ok),
            ("errors", success["errors"], dict(found.errors)),
        ):
            if said != is_so:
                yield f"{path} says that {name} is {short(said)}, but it is {short(is_so)}."
