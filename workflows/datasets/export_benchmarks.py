"""Results as the evaluators of benchmarks look for them. Knows nothing of how they score."""

import functools
from typing import Any

import numpy as np

from wallaroo.model.errors import InputError
from wallaroo.workflows.datasets.export_files import Results, Row, Sink
from wallaroo.workflows.datasets.export_rows import (
    Count,
    Options,
    memory_of,
    packet_of,
    picture_of,
    pixels_of,
    stem_of,
)
from wallaroo.workflows.datasets.xmp import embed
from wallaroo.workflows.outputs.rows import encode_image
from wallaroo.workflows.outputs.schema import RESULT_NAMES
from wallaroo.workflows.outputs.values import json_line

GRID = 4
"""Pictures of a grid: two rows of two."""


def geneval(results: Results, sink: Sink, count: Count, options: Options) -> None:
    """A folder a prompt, numbered as in the manifest, with the prompt's metadata and its samples."""
    if "tag" not in results.schema.names:
        raise InputError(
            f"GenEval's evaluator reads the tag of every prompt, but {results.output} has no column 'tag': "
            f"generate from GenEval's evaluation_metadata.jsonl."
        )
    described = -1
    for row in filter(lambda row: row.ok, results.rows()):
        folder = f"{row.number:05d}"
        if row.number != described:
            described = row.number
            # A column that a line lacked is null here, and the evaluator would trip over a null.
            metadata = results.carried_values(row, ("prompt",), _own_name)
            metadata = {name: value for name, value in metadata.items() if value is not None}
            line = json_line(metadata | {"prompt": row.values["prompt"]})
            sink.put(f"{folder}/metadata.jsonl", functools.partial(bytes, line), len(line))
        name = f"{folder}/samples/{row.values['sample']:04d}.png"
        sink.put(name, functools.partial(picture_of, row, options, png=True), memory_of(row))
        count.exported += 1


def _own_name(name: str) -> str:
    """The name that a carried column had in the manifest."""
    own = name.removeprefix("in_")
    return own if own in RESULT_NAMES else name


def dpg(results: Results, sink: Sink, count: Count, options: Options) -> None:
    """A PNG a prompt, named by its id, with its first four samples in two rows of two."""

    def finish(group: list[Row], ok: int) -> None:
        sizes = {(row.values["width"], row.values["height"]) for row in group}
        square = len(sizes) == 1 and all(width == height for width, height in sizes)
        used = GRID if square and [row.values["sample"] for row in group] == list(range(GRID)) else 0
        if used:
            # The evaluator takes what precedes the first dot for the id.
            name = f"{stem_of(group[0], count, dots=False, samples=False)}.png"
            sink.put(name, functools.partial(_grid, group, options), 2 * sum(map(memory_of, group)))
        count.exported += used
        count.left_out += ok - used

    group: list[Row] = []
    ok = 0
    for row in results.rows():
        if not row.follows:
            finish(group, ok)
            group, ok = [], 0
        ok += row.ok
        if row.ok and row.values["sample"] < GRID:
            group.append(row)
    finish(group, ok)


def imgedit(results: Results, sink: Sink, count: Count, options: Options) -> None:
    """A PNG a key, which is the row's id."""
    for row in filter(lambda row: row.ok, results.rows()):
        if row.values["sample"]:
            count.left_out += 1
            continue
        name = f"{stem_of(row, count, samples=False)}.png"
        sink.put(name, functools.partial(picture_of, row, options, png=True), memory_of(row))
        count.exported += 1


def _grid(rows: list[Row], options: Options) -> bytes:
    """Four pictures of one size as one PNG: the first two above the others."""
    pixels = [pixels_of(row) for row in rows]
    grid = np.concatenate([np.concatenate(pixels[:2], axis=1), np.concatenate(pixels[2:], axis=1)])
    data = encode_image(grid, "png")[0]
    return embed(data, packet_of(*rows)) if options.embed else data
