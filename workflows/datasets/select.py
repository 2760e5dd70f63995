"""Selection: chooses rows of a data set or manifest and writes them as a new one."""

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import IO, Any

import numpy as np
import pyarrow as pa

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.datasets.decide import Decided, decide
from wallaroo.workflows.datasets.look import Found, Look
from wallaroo.workflows.datasets.progress import Phase, Report, silent
from wallaroo.workflows.datasets.rows import Chunk, ManifestRows, OutputRows
from wallaroo.workflows.datasets.rules import DEFAULT_FOLDER, FAILURES, KEPT, REASONS, Rules, Selection
from wallaroo.workflows.outputs.layout import DROPPED_FILE, RUN_FILE, SELECTION_FILE
from wallaroo.workflows.reports.card import code, front_matter, put_card

_WRITTEN = re.compile(r"[^/]+/(part-\d{5,}|shard-\d{8,})\.parquet")


def select(
    source: str, dest: str, rules: Rules, overwrite: bool = False, on_progress: Report = silent
) -> Selection:
    """Copies the rows that the rules keep to a new folder.

    `dest` gets Parquet files with the columns of the source, in `data/` or a folder for each split;
    `_dropped.jsonl`, every other row with its reason; and a card. The same call gives the same files. An
    interrupted call starts over. Memory: one shard, and about 40 bytes a row.

    Args:
        source: The finished output of a run, or a manifest, local or `s3://`.
        dest: The folder to write to, local or `s3://`.
        rules: Which rows to keep.
        overwrite: Replace another selection, and write beside other files.
        on_progress: Called about twice a second.

    Returns:
        How many rows are kept and dropped.

    Raises:
        InputError: The source cannot be read, a column does not exist, or, without `overwrite`, `dest` holds
            anything else.
        OptionError: A rule is wrong, or its function cannot be imported.
    """
    rules.check()
    rows = OutputRows(source) if storage.exists(storage.join(source, RUN_FILE)) else ManifestRows(source)
    look = Look(rows, rules)
    names = [f"{folder}/{file}" for folder in sorted(rules.split) or [DEFAULT_FOLDER] for file in rows.pieces]
    claim = _claim(source, dest, rules, overwrite, names)
    found = look.all(Phase(on_progress, "reading", rows.rows))
    decided = decide(found, rules, on_progress)
    writing = Phase(on_progress, "writing", rows.rows)
    return _write(rows, dest, rules, found, decided, look.messages, claim, writing)


def _claim(source: str, dest: str, rules: Rules, overwrite: bool, names: list[str]) -> dict[str, Any]:
    """Makes sure that dest is new, of this very selection, or of one that did not end.

    Args:
        source, dest, rules, overwrite: As of `select`.
        names: Of the files of rows that the selection may write.

    Returns:
        What `_selection.json` says from now on: `settings`, `shared` if files of others are beside it, and
        `files`, the names that this selection or an earlier one may have written.
    """
    if storage.is_s3(source) == storage.is_s3(dest):
        ends = [path if storage.is_s3(path) else os.path.realpath(path) for path in (source, dest)]
        outer, inner = (path.rstrip("/") + "/" for path in ends)
        if inner.startswith(outer):
            raise InputError(f"{dest} is inside {source}: choose another folder.")
    path = storage.join(dest, SELECTION_FILE)
    claim: dict[str, Any] = {"settings": {"source": source, "rules": asdict(rules)}}
    found = storage.find_files(dest, lambda name: True, 1)
    existing: dict[str, Any] = {}
    if found and storage.exists(path):
        try:
            existing = dict(json.loads(storage.read_bytes(path)))
        except (ValueError, TypeError, RecursionError):
            raise InputError(f"{path} is damaged: give a new folder.") from None
        # Of one that was cut short nothing is of use to anybody.
        if "result" in existing and existing.get("settings") != claim["settings"] and not overwrite:
            raise InputError(
                f"{dest} holds another selection ({json.dumps(existing.get('settings'))[:200]}): "
                f"give a new folder, the same rules, or --overwrite."
            )
    elif found and not overwrite:
        raise InputError(
            f"{dest} is not empty and not a selection; it holds {found[0]:.100}: "
            f"give a new folder, or --overwrite to write beside it."
        )
    shared = bool(found) and (not existing or bool(existing.get("shared")))
    if shared:
        claim["shared"] = True
    earlier = existing.get("files")
    if not isinstance(earlier, list):
        # Of an older version, which did not note them.
        listed = storage.list_files(dest) if existing and not shared else []
        earlier = [file.relative for file in listed if _WRITTEN.fullmatch(file.relative)]
    claim["files"] = sorted({*names, *(name for name in earlier if _WRITTEN.fullmatch(str(name)))})
    storage.write_atomic(path, json.dumps(claim, indent=2).encode() + b"\n")
    return claim


def _write(
    rows: OutputRows | ManifestRows,
    dest: str,
    rules: Rules,
    found: Found,
    decided: Decided,
    messages: Mapping[int, str],
    claim: Mapping[str, Any],
    phase: Phase,
) -> Selection:
    names = sorted(rules.split) or [DEFAULT_FOLDER]
    written = set()
    with tempfile.TemporaryFile() as lines:
        for piece, file in enumerate(rows.pieces):
            sides: dict[str, list[pa.Table]] = {name: [] for name in names}
            first = int(found.starts[piece])
            for chunk in rows.chunks(piece):
                numbers = np.arange(first + chunk.first, first + chunk.first + chunk.table.num_rows)
                if len(numbers) and numbers[-1] >= found.starts[piece + 1]:
                    raise InputError(f"{rows.path} changed while it was read: start again.")
                kept = decided.why[numbers] == KEPT
                for side, name in enumerate(names):
                    mask = kept & (decided.sides[numbers] == side)
                    if mask.any():
                        sides[name].append(chunk.table.filter(pa.array(mask)))
                _tell(lines, rows, piece, chunk, numbers, decided, messages)
                phase.count(len(numbers))
            for name, tables in sides.items():
                if tables:
                    path = storage.join(dest, name, file)
                    rows.write(path, pa.concat_tables(tables).combine_chunks())
                    written.add(f"{name}/{file}")
        lines.seek(0)
        with storage.write_stream(storage.join(dest, DROPPED_FILE)) as stream:
            while data := lines.read(storage.COPY_BYTES):
                stream.write(data)
    stale = set(claim["files"]) - written if "shared" not in claim else set()
    for left in storage.list_files(dest) if stale else ():
        if left.relative in stale:
            storage.delete(left.path)
    reasons = Counter(decided.why.tolist())
    kept_rows = decided.why == KEPT
    counts = np.bincount(decided.sides[kept_rows], minlength=len(names)).tolist()
    selection = Selection(
        rows=len(decided.why),
        kept=reasons.pop(KEPT, 0),
        dropped={REASONS[reason]: count for reason, count in reasons.most_common()},
        splits=dict(zip(names, counts, strict=True)),
        failures=sum(count for reason, count in reasons.items() if reason in FAILURES),
        examples={
            REASONS[reason]: messages[int(np.argmax(decided.why == reason))]
            for reason in reasons
            if reason in FAILURES
        },
    )
    put_card(dest, _card(rows, rules, selection))
    document = {**claim, "files": sorted(written), "result": asdict(selection)}
    storage.write_atomic(storage.join(dest, SELECTION_FILE), json.dumps(document, indent=2).encode() + b"\n")
    return selection


def _tell(
    lines: IO[bytes],
    rows: OutputRows | ManifestRows,
    piece: int,
    chunk: Chunk,
    numbers: np.ndarray,
    decided: Decided,
    messages: Mapping[int, str],
) -> None:
    """Writes a line for every row of a chunk that is not kept."""
    dropped = np.flatnonzero(decided.why[numbers] != KEPT).tolist()
    if not dropped:
        return
    ids = rows.names(chunk, piece, "id")
    for place in dropped:
        row = int(numbers[place])
        line: dict[str, Any] = {"id": ids[place], "row": row}
        if "sample" in chunk.table.column_names:
            line["sample"] = chunk.table.column("sample")[place].as_py()
        line["why"] = REASONS[decided.why[row]]
        if row in messages:
            line["message"] = messages[row]
        if decided.near[row] >= 0:
            line["near_row"] = int(decided.near[row])
        lines.write(json.dumps(line).encode() + b"\n")


def _card(rows: OutputRows | ManifestRows, rules: Rules, selection: Selection) -> str:
    patterns = {
        ("train" if name == DEFAULT_FOLDER else name): f"{name}/*.parquet"
        for name, count in selection.splits.items()
        if count
    }
    name = rows.path.rstrip("/").rpartition("/")[2]
    made = isinstance(rows, OutputRows)
    lines = [
        front_matter(name, rows.task, [], selection.kept, patterns),
        "# A selection of rows",
        "",
        f"{selection.kept:,} of {selection.rows:,} rows of {code(rows.path)}, chosen with Wallaroo Batch.",
        "",
        *(["Its images and texts were generated by a model; `model_digest` names it.", ""] if made else []),
        "```python",
        "from datasets import load_dataset",
        "",
        'rows = load_dataset("PATH OF THIS FOLDER")',
        "```",
        "",
        "## Rules",
        "",
        *(
            f"- {code(key)}: {code(json.dumps(value, ensure_ascii=False))}"
            for key, value in asdict(rules).items()
            if value not in (None, {})
        ),
        "",
        "## Rows",
        "",
        *(f"- kept in {code(split)}: {count:,}" for split, count in selection.splits.items()),
        *(f"- dropped ({reason}): {count:,}" for reason, count in selection.dropped.items()),
        "",
        f"Every dropped row is in `{DROPPED_FILE}` with its reason.",
    ]
    return "\n".join(lines) + "\n"
