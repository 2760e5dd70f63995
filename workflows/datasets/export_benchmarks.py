"""Results in the layouts that the evaluators of benchmarks read. Knows nothing of how they score.

The arguments of each format are described in `export_rows.Exporter`.
"""

import csv
import functools
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from wallaroo.model.errors import InputError, RowError
from wallaroo.workflows.datasets.export_files import Results, Row
from wallaroo.workflows.datasets.export_rows import (
    Count,
    Options,
    memory_of,
    packet_of,
    picture_of,
    pixels_of,
)
from wallaroo.workflows.datasets.export_sink import Sink
from wallaroo.workflows.outputs.rows import encode_image
from wallaroo.workflows.outputs.schema import own_name
from wallaroo.workflows.outputs.values import json_line
from wallaroo.workflows.outputs.xmp import embed
from wallaroo.workflows.plans.parts import folder_of
from wallaroo.workflows.plans.values import in_words
from wallaroo.workflows.sources.decode import decode
from wallaroo.workflows.sources.embedded import read_cells
from wallaroo.workflows.sources.fetch import fetch
from wallaroo.workflows.sources.references import SourceOptions

GRID = 4
"""Pictures of a grid: two rows of two."""


def geneval(results: Results, sink: Sink, count: Count, options: Options) -> None:
    """Writes a folder per prompt, numbered as in the manifest, with the prompt's metadata and its samples.

    Raises:
        InputError: The output has no column `tag`.
    """
    if "tag" not in results.schema.names:
        raise InputError(
            f"GenEval's evaluator reads the tag of every prompt, but {results.output} has no column 'tag': "
            f"generate from GenEval's evaluation_metadata.jsonl."
        )
    described = -1
    for row in results.rows():
        folder = f"{row.number:05d}"
        name = f"{folder}/samples/{row.values['sample']:04d}.png"
        if not row.ok:
            count.miss(name)
            continue
        if row.number != described:
            described = row.number
            metadata = _without_nulls(results.carried_values(row, ("prompt",), own_name))
            line = json_line(metadata | {"prompt": row.values["prompt"]})
            sink.put(f"{folder}/metadata.jsonl", functools.partial(bytes, line), len(line), grows=True)
        sink.put(name, functools.partial(picture_of, row, options, "png"), memory_of(row))
        count.exported += 1


def _without_nulls(value: Any) -> Any:
    """JSON without the null values of its objects, at any depth.

    A column that a line lacked is null, and polars, pandas and DuckDB write null for an absent key of an
    object. GenEval's evaluator takes each key that is there for a condition.
    """
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def dpg(results: Results, sink: Sink, count: Count, options: Options) -> None:
    """Writes a PNG per prompt, named by its item_id, with its first four samples in two rows of two.

    The evaluator takes the part of a name before the first dot for the item_id, and skips pictures that it
    cannot look up. So an id that is no item_id is refused.

    Raises:
        InputError: An id is no item_id, or two rows would have one name.
    """

    def name_of(row: Row) -> str:
        return f"{_item_id(row)}.png"

    unique_names(results, name_of)

    def finish(group: list[Row], ok: int, name: str) -> None:
        sizes = {(row.values["width"], row.values["height"]) for row in group}
        square = len(sizes) == 1 and all(width == height for width, height in sizes)
        used = GRID if square and [row.values["sample"] for row in group] == list(range(GRID)) else 0
        if used:
            sink.put(name, functools.partial(_grid, group, options), 2 * sum(map(memory_of, group)))
        elif name:
            count.miss(name)
        count.exported += used
        count.left_out += ok - used

    group: list[Row] = []
    ok, name = 0, ""
    for row in results.rows():
        if not row.follows:
            finish(group, ok, name)
            group, ok, name = [], 0, name_of(row)
        ok += row.ok
        if row.ok and row.values["sample"] < GRID:
            group.append(row)
    finish(group, ok, name)


def _item_id(row: Row) -> str:
    """The key of a row's questions in DPG-Bench's evaluator: its id, or the name of its prompt's file."""
    item = row.values["id"].rpartition("/")[2].removesuffix(".txt")
    if "." in item or ":" in item:
        raise InputError(
            f"id {in_words(row.values['id'])} is not an item_id of DPG-Bench, by which its evaluator looks "
            f"questions up: generate from a manifest whose id is the item_id."
        )
    return exact_name(row, "id", item)


def dpg_single(results: Results, sink: Sink, count: Count, options: Options) -> None:
    """Writes a PNG per sample in the folder of its number, named as DPG-Bench's evaluator looks it up.

    Raises:
        InputError: An id is no item_id, or two rows would have one name.
    """

    def name_of(row: Row) -> str:
        return f"{row.values['sample']}/{_item_id(row)}.png"

    _singles(results, sink, count, options, name_of, samples=True)


def imgedit(results: Results, sink: Sink, count: Count, options: Options) -> None:
    """Writes a PNG per key, which is the row's id.

    Raises:
        InputError: An id cannot be a file name, or two rows would have one name.
    """
    _singles(results, sink, count, options, lambda row: f"{exact_name(row, 'id', row.values['id'])}.png")


def wise(results: Results, sink: Sink, count: Count, options: Options) -> None:
    """Writes a PNG per prompt_id of WISE.

    Raises:
        InputError: A row has no numeric prompt_id, or two rows have the same.
    """

    def name_of(row: Row) -> str:
        # A column with a null becomes one of floats in pandas.
        number = str(results.own_value(row, "prompt_id", row.values["id"])).removesuffix(".0")
        if not re.fullmatch("[0-9]{1,9}", number):
            raise InputError(
                f"WISE's evaluator looks images up by prompt_id, a number, but the row {in_words(number)} "
                f"has none: generate from WISE's JSON, or a manifest with its column prompt_id."
            )
        return f"{int(number)}.png"

    _singles(results, sink, count, options, name_of)


def t2i_compbench(results: Results, sink: Sink, count: Count, options: Options) -> None:
    """Writes `samples/PROMPT_NUMBER.png`: evaluators read the prompt from the name, and sort by the number.

    Raises:
        InputError: A prompt has an underscore or cannot be a file name.
    """
    samples = 1 + max((row.values["sample"] for row in results.rows(pictures=False)), default=0)
    results.forget()

    def name_of(row: Row) -> str:
        prompt = row.values["prompt"] or ""
        if "_" in prompt:
            raise InputError(
                f"prompt {in_words(prompt)} has an underscore, where T2I-CompBench's evaluators would cut "
                f"it: leave it out."
            )
        number = row.number * samples + row.values["sample"]
        return f"samples/{exact_name(row, 'prompt', f'{prompt}_{number:06d}')}.png"

    _singles(results, sink, count, options, name_of, samples=True)


LANGUAGE_FOLDERS = {"zh": "cn", "en": "en"}
"""Language of a row -> that of GEdit-Bench's folders."""


def gedit(results: Results, sink: Sink, count: Count, options: Options) -> None:
    """Writes `fullset/TASK/LANGUAGE/KEY.png`, and the source picture as `KEY_SRCIMG.png` beside it.

    Raises:
        InputError: A row has no task_type, a name is impossible or given twice, or a source has changed.
    """
    sources: dict[str, dict[int | None, list[tuple[str, str]]]] = {}

    def name_of(row: Row) -> str:
        task = results.own_value(row, "task_type")
        key = results.own_value(row, "key", row.values["id"])
        language = results.own_value(row, "instruction_language") or LANGUAGE_FOLDERS.get(
            row.values["language"], "en"
        )
        if not task:
            raise InputError(
                f"GEdit-Bench's evaluator looks images up by task_type, which the row "
                f"{in_words(row.values['id'])} lacks: edit GEdit-Bench's own Parquet files."
            )
        parts = [exact_name(row, "task_type", task), exact_name(row, "instruction_language", language)]
        return "/".join(["fullset", *parts, f"{exact_name(row, 'key', str(key))}.png"])

    def sourced(row: Row, name: str) -> None:
        source = row.values["source"]
        beside = f"{name.removesuffix('.png')}_SRCIMG.png"
        sources.setdefault(source["uri"], {}).setdefault(source["row_id"], []).append(
            (beside, source["sha256"])
        )

    _singles(results, sink, count, options, name_of, sourced)
    for uri, wanted in sources.items():
        for data, beside in _source_files(uri, wanted):
            for name, sha256 in beside:
                if hashlib.sha256(data).hexdigest() != sha256:
                    raise InputError(f"{uri} has changed since it was edited: restore it, or edit it again.")
                sink.put(name, functools.partial(_png, data), 8 * len(data))


def _source_files(
    uri: str, wanted: dict[int | None, list[tuple[str, str]]]
) -> Iterator[tuple[bytes, list[tuple[str, str]]]]:
    """The bytes of sources, and the files to make of each. Rows of one Parquet file are read together."""
    allowed = SourceOptions("/", https=True)
    if None in wanted:
        yield fetch(uri, allowed).data, wanted[None]
    rows = [row for row in wanted if row is not None]
    for row, value in read_cells(uri, rows) if rows else ():
        if isinstance(value, RowError):
            raise value
        yield fetch(value, replace(allowed, folder=folder_of(uri))).data, wanted[row]


def _png(data: bytes) -> bytes:
    return encode_image(np.asarray(decode(data)), "png")[0]


def vlmevalkit(results: Results, sink: Sink, count: Count, options: Options) -> None:
    """Writes `predictions.tsv`: the columns of each question, and its answer (sample 0) as `prediction`."""
    with sink.stream("predictions.tsv") as lines:
        names: list[str] = []
        for row in results.rows(pictures=False):
            if row.values["sample"]:
                count.left_out += row.ok
                continue
            facts = results.carried_values(row, ("prediction",), own_name, text=True)
            facts = facts | {
                "index": results.own_value(row, "index", row.values["id"]),
                "question": results.own_value(row, "question", row.values["prompt"]),
                "prediction": row.values["text"],
            }
            if not names:
                names = [*facts]
                lines.write(_tsv(names))
            if row.ok:
                lines.write(_tsv([facts[name] for name in names]))
                count.exported += 1


def _tsv(values: Iterable[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerow(values)
    return text.getvalue().encode("utf-8", "replace")


def _singles(
    results: Results,
    sink: Sink,
    count: Count,
    options: Options,
    name_of: Callable[[Row], str],
    then: Callable[[Row, str], None] = lambda row, name: None,
    samples: bool = False,
) -> None:
    """Writes a PNG per row, of sample 0 or of all samples, under the name that an evaluator looks for."""
    unique_names(results, lambda row: name_of(row) if samples or not row.values["sample"] else None)
    for row in results.rows():
        if row.values["sample"] and not samples:
            count.left_out += row.ok
        elif row.ok:
            name = name_of(row)
            sink.put(name, functools.partial(picture_of, row, options, "png"), memory_of(row))
            count.exported += 1
            then(row, name)
        else:
            count.miss(name_of(row))


def unique_names(results: Results, name_of: Callable[[Row], str | None]) -> None:
    """Refuses impossible and repeated names before a file is written.

    Args:
        results: The rows of the output; its counts start again afterwards.
        name_of: Gives the file name of a row, or None for a row without a file.

    Raises:
        InputError: Two manifest rows have the same name, or `name_of` refuses one.
    """
    seen: dict[str, tuple[str, int]] = {}
    for row in results.rows(pictures=False):
        name = name_of(row)
        if name is None:
            continue
        this = (row.values["id"], row.values["version"])
        if seen.setdefault(name, this) != this:
            raise InputError(
                f"{in_words(seen[name][0])} and {in_words(this[0])} would both be {name}: export an output "
                f"with one row for each."
            )
    results.forget()


def exact_name(row: Row, column: str, text: str) -> str:
    """Checks that a text can be the name of a file or folder, since an evaluator looks for no other name.

    Args:
        row: The row that the name belongs to.
        column: The column that the text is from, for the message.
        text: The name.

    Returns:
        The text, unchanged.

    Raises:
        InputError: No file can have this name.
    """
    if re.search(r"[/\\\x00-\x1f\x7f]|^\.|^$", text) or len(text.encode("utf-8", "replace")) > 240:
        raise InputError(
            f"{column} of the row {in_words(row.values['id'])} is {in_words(text)}, which cannot be the name "
            f"of a file: give it up to 240 bytes without slashes, and no dot in front."
        )
    return text


def _grid(rows: list[Row], options: Options) -> bytes:
    """Four pictures of one size as one PNG: the first two above the others."""
    pixels = [pixels_of(row) for row in rows]
    grid = np.concatenate([np.concatenate(pixels[:2], axis=1), np.concatenate(pixels[2:], axis=1)])
    data = encode_image(grid, "png")[0]
    return embed(data, packet_of(*rows)) if options.embed else data
