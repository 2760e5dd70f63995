"""How to repeat a row, and where it came from.

Knows nothing of HTML.
"""

import json
import os
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import DATA_FOLDER, shard_number
from wallaroo.workflows.outputs.run_file import read_run
from wallaroo.workflows.plans.plan import read_given
from wallaroo.workflows.reports.error_lines import as_given, manifest_row
from wallaroo.workflows.settings import OPTIONS
from wallaroo.workflows.sources.embedded import Cell
from wallaroo.workflows.viewer.output import Output
from wallaroo.workflows.viewer.shards import Reader, Shard

MAX_STEPS = 12
"""Longest chain of sources that is followed."""

_PARAMETERS = ("id", "prompt", "seed", "cfg", "temperature", "top_k", "top_p", "language")
_OF_ROW = (*_PARAMETERS, "samples", "width", "height", "prompt_column")
"""Options whose value a row has itself."""

_OTHERS = ("model", "cfg_interval", "threads")
"""Options that may change a result though they are not declared with `meaning`."""


@dataclass(frozen=True)
class Recipe:
    """How to repeat a row."""

    manifest: str
    """The row of the manifest, one line of JSON."""
    command: str
    """Shell lines that write this manifest and run it."""


@dataclass(frozen=True)
class Step:
    """One step back in the history of a row."""

    kind: str
    """Task of the row, or `image` or `manifest` at the end."""
    where: str
    """Path of the output, the picture or the manifest."""
    name: str = ""
    """Of the row."""
    prompt: str = ""
    """Of the row."""
    shard: int | None = None
    """Of the row, None if this is not a row."""
    position: int | None = None
    """Of the row in the shard."""


def source_reference(row: Mapping[str, Any]) -> str:
    """Returns the source of a row as a manifest names it; empty if there is none."""
    source = row.get("source") or {}
    uri, number = source.get("uri") or "", source.get("row_id")
    return str(Cell(uri, number)) if uri and number is not None else uri


def recipe(output: Output, row: Mapping[str, Any]) -> Recipe | None:
    """Returns how to repeat a row.

    Args:
        output: The output.
        row: From `Output.row`.

    Returns:
        For an ok row, the manifest has its resolved parameters and its seed; for an error row, the values of
        its manifest row. None if the source has no name, or if the output was made with 8-bit weights, which
        only version 0.1.0 had.
    """
    task = output.task
    if output.run["options"].get("weights") is not None:
        return None
    if row["status"] != "ok":
        schema = output.reader.schema(output.shard(row["shard"]))
        shown = manifest_row(row, schema)
        # A copy of `data/` has no plan.
        with suppress(InputError):
            shown = as_given(shown, read_given(output.path, row["shard"]).get(row["row_id"]))
        values = {k: v for k, v in shown.items() if k not in ("kind", "message")}
    else:
        values = {name: row[name] for name in _PARAMETERS if row[name] is not None}
        if task == "generate":
            values |= {"width": row["width"], "height": row["height"]}
    if task != "generate":
        reference = source_reference(row)
        if not reference:
            return None
        values["image"] = reference
    line = json.dumps(values, ensure_ascii=False)
    words = ["wallaroo", task, "again.jsonl", "out/again", *_options(output.run["options"])]
    command = f"cat > again.jsonl <<'END'\n{line}\nEND\n{shlex.join(words)}"
    return Recipe(line, command)


def _options(options: Mapping[str, Any]) -> list[str]:
    """Returns the flags of the options of a `run.json` that may change a row and are not the default."""
    words = []
    for one in OPTIONS.values():
        if one.name in _OF_ROW or not (one.meaning or one.name in _OTHERS):
            continue
        if "task" in options and not one.serves(options["task"]):
            continue  # filled for every task, but no flag of this one
        outer, _, inner = one.stored.partition(".")
        value = (options.get(outer) or {}).get(inner) if inner else options.get(outer)
        if value is None or value is False or (value := one.read(value)) == one.default:
            continue
        words += [one.flag] if value is True else [one.flag, one.kind.write(value)]
    return words


def lineage(output: Output, row: Mapping[str, Any]) -> list[Step]:
    """Follows the sources of a row back to the first manifest.

    Args:
        output: The output.
        row: From `Output.row`.

    Returns:
        One step for each row of an earlier output, nearest first, then the first picture and the manifest.
    """
    steps: list[Step] = []
    run: Mapping[str, Any] = output.run
    here = output.path
    reader = output.reader
    seen: set[tuple[str, int]] = set()
    for _ in range(MAX_STEPS):
        source = row.get("source") or {}
        uri, number = source.get("uri") or "", source.get("row_id")
        parent = _output_of(uri) if number is not None else None
        if number is None or parent is None or (uri, number) in seen:
            break
        seen.add((uri, number))
        found = _find(reader, uri, number)
        if found is None:
            break
        row, run, here = found, _run_of(parent), parent
        name = f"{row['id']}/{row['sample']}" if row["sample"] else row["id"]
        steps.append(Step(row["task"], parent, name, row["prompt"] or "", row["shard"], row["position"]))
    reference = source_reference(row)
    if reference:
        steps.append(Step("image", reference))
    manifest = run.get("options", {}).get("manifest") or ""
    if manifest:
        steps.append(Step("manifest", manifest, name=f"of {here}"))
    return steps


def _output_of(path: str) -> str | None:
    """Returns the output of a shard by its path; None if this is not the path of a shard."""
    match = re.fullmatch(rf"(.+)/{DATA_FOLDER}/([^/]+)", path, re.DOTALL)
    return match[1] if match and shard_number(match[2]) is not None else None


def _run_of(output: str) -> Mapping[str, Any]:
    try:
        return read_run(output)
    except InputError:
        return {}


def _find(reader: Reader, path: str, row_id: int) -> dict[str, Any] | None:
    """Returns the row of a shard with this row_id; None if shard or row are gone."""
    try:
        file = storage.info(path)
        number = shard_number(os.path.basename(path))
        if file is None or number is None:
            return None
        shard = Shard(number, path, file.size, file.etag)
        ids = reader.small(shard).column("row_id").to_pylist()
        if row_id not in ids:
            return None
        position = ids.index(row_id)
        row = reader.rows(shard, position, position + 1, pictures=False)[0]
        return {**row, "shard": number, "position": position}
    except InputError:
        return None
