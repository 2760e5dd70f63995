"""The load stage: planned rows of one shard become the requests of a replica.

Prompts are tokenised here. Source pictures are fetched, decoded and resized for the model, each one of a
shard once. Knows nothing of replicas, and of Ray only that it runs in tasks of its own.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from wallaroo.actors.rows import request_values, requests_table
from wallaroo.model.config import Size
from wallaroo.model.errors import RowError
from wallaroo.model.prompts import Prompt, edit_prompt, generate_prompt, understand_prompt
from wallaroo.workflows.outputs.rows import RunConstants
from wallaroo.workflows.outputs.schema import RESULT_NAMES, source_type
from wallaroo.workflows.plans.parts import folder_of
from wallaroo.workflows.sources.embedded import COLUMN, read_cells
from wallaroo.workflows.sources.prepare import Source, load_many
from wallaroo.workflows.sources.references import Reference, SourceOptions, kept_uri, single
from wallaroo.workflows.storage.checkpoints import read_checkpoint
from wallaroo.workflows.tasks import PICTURE_TASKS


def load_requests(
    plan: pa.Table, model: str, run: RunConstants, sources: SourceOptions
) -> tuple[pa.Table, pa.Table]:
    """Loads a shard: turns its planned rows into requests, and fetches and decodes their sources.

    Rows that the plan refuses give no request. A source that cannot be used makes its rows error rows of kind
    `image`.

    Args:
        plan: The planned rows.
        model: Folder of the checkpoint, local or on S3.
        run: Constants of all rows.
        sources: Where sources may come from, and their limits.

    Returns:
        The plan with digest, size and errors of the sources, and the requests in the schema
        `actors.rows.REQUESTS`.

    Raises:
        InputError: A storage is out of order.
    """
    if run.task not in PICTURE_TASKS:
        rows = enumerate(plan.to_pylist())
        made = [
            _generate(position, values, model, run)
            for position, values in rows
            if values["status"] != "error"
        ]
        return plan, requests_table(made)
    rows = plan.select([name for name in plan.column_names if name in RESULT_NAMES - {COLUMN}]).to_pylist()
    made = []
    for positions, source in _sources(plan, rows, run, model, sources):
        for position in positions:
            values = rows[position]
            try:
                if isinstance(source, RowError):
                    raise source
                made.append(_from_picture(position, values, source, model, run))
            except RowError as error:
                values |= {"status": "error", "error_type": error.kind, "error_message": str(error)}
    for values in rows:
        values["source"]["uri"] = kept_uri(values["source"]["uri"])
    return _loaded(plan, rows), requests_table(made)


def _generate(position: int, values: dict[str, Any], model: str, run: RunConstants) -> dict[str, Any]:
    config, tokenizer, _ = read_checkpoint(model)
    size = Size(values["height"], values["width"])
    language = values["language"]
    template = run.templates.get(language)
    return request_values(
        row=position,
        prompt=generate_prompt(tokenizer, config, values["prompt"], size, language, template),
        null=_null(model, size, None, language, template) if values["cfg"] > 1 else None,
        size=size,
        seed=values["seed"],
        sampling=values,
    )


def _from_picture(
    position: int, values: dict[str, Any], source: Source, model: str, run: RunConstants
) -> dict[str, Any]:
    """Builds the request of a row with a picture. Adds what is now known of the picture to `values`."""
    config, tokenizer, _ = read_checkpoint(model)
    picture, language = source.prepared, values["language"]
    template = run.templates.get(language)
    null = None
    if picture.size is None:
        prompt = understand_prompt(tokenizer, config, values["prompt"], picture.grid)
    else:
        key = (picture.size, picture.grid, language, template)
        prompt = edit_prompt(tokenizer, config, values["prompt"], *key)
        null = _null(model, *key) if values["cfg"] > 1 else None
        values |= {"height": picture.size.height, "width": picture.size.width}
    values["source"] |= {"sha256": source.sha256, "width": picture.width, "height": picture.height}
    values["source"]["note"] = source.note
    if values["source"]["row_id"] is None:
        values["source"]["uri"] = source.uri
    return request_values(
        row=position,
        prompt=prompt,
        null=null,
        size=picture.size,
        seed=values["seed"],
        sampling=values,
        semantic=picture.semantic,
        pixels=picture.pixels,
        max_new_tokens=run.max_new_tokens,
    )


@functools.lru_cache(maxsize=256)
def _null(
    model: str, size: Size, grid: tuple[int, int] | None, language: str, template: str | None
) -> Prompt:
    """Builds the prompt of the null branch. `grid` is that of the source picture, if there is one."""
    config, tokenizer, _ = read_checkpoint(model)
    if grid is None:
        return generate_prompt(tokenizer, config, "", size, language, template)
    return edit_prompt(tokenizer, config, "", size, grid, language, template)


def _loaded(plan: pa.Table, rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Adds digest, size and errors of the sources to the plan, and drops the pictures of a Dataset."""
    for name in ("status", "error_type", "error_message", "width", "height", "source"):
        index = plan.schema.get_field_index(name)
        field = plan.schema.field(index)
        if name == "source":
            field = field.with_type(source_type(plan.schema))
        plan = plan.set_column(index, field, pa.array([row[name] for row in rows], field.type))
    return plan.drop_columns(COLUMN) if COLUMN in plan.column_names else plan


def _sources(
    plan: pa.Table, rows: Sequence[dict[str, Any]], run: RunConstants, model: str, options: SourceOptions
) -> Iterator[tuple[list[int], Source | RowError]]:
    """Loads each distinct source of the planned rows. Yields its positions, and the source or its refusal."""
    config = read_checkpoint(model).config.with_pixels(run.min_pixels, run.max_pixels)
    planned = [position for position, row in enumerate(rows) if row["status"] != "error"]
    named: dict[int, Reference] = {}
    cells: dict[str, dict[int, list[int]]] = {}
    pictures = plan.column(COLUMN) if COLUMN in plan.column_names else None
    for position in planned:
        uri, row = rows[position]["source"]["uri"], rows[position]["source"]["row_id"]
        value = None if pictures is None else single(pictures[position].as_py())
        if row is not None:
            cells.setdefault(uri, {}).setdefault(row, []).append(position)
        elif value is None or isinstance(value, str) or (isinstance(value, dict) and not value.get("bytes")):
            named[position] = uri
        else:
            named[position] = value
    positions = list(named)
    for found, source in load_many(list(named.values()), run.task, config, options):
        yield [positions[index] for index in found], source
    for path, wanted in cells.items():
        beside = dataclasses.replace(options, folder=folder_of(path))
        contents = read_cells(path, wanted.keys())
        while few := list(itertools.islice(contents, options.fetches)):
            good = [(row, value) for row, value in few if not isinstance(value, RowError)]
            for row, value in few:
                if isinstance(value, RowError):
                    yield wanted[row], value
            for found, source in load_many([value for _, value in good], run.task, config, beside):
                yield [position for index in found for position in wanted[good[index][0]]], source
