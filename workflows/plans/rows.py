"""Manifest rows -> planned rows: ids, samples, seeds, every parameter resolved and checked."""

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from wallaroo.model.config import ModelConfig
from wallaroo.model.errors import RowError, did_you_mean
from wallaroo.model.prompts import DEFAULT_QUESTION, LANGUAGES, detect_language
from wallaroo.model.tokenizer import Tokenizer
from wallaroo.workflows.manifests.types import KNOWN_COLUMNS
from wallaroo.workflows.outputs.schema import SOURCE_TYPE, json_columns
from wallaroo.workflows.outputs.values import jsonable
from wallaroo.workflows.plans.columns import (
    GIVEN,
    PLAN_FIELDS,
    RAW,
    carried_names,
    carried_schema,
    plan_schema,
)
from wallaroo.workflows.plans.settings import PlanSettings, column_names
from wallaroo.workflows.plans.values import (
    EXACT_FLOATS,
    INT32,
    ROUNDED,
    SEEDS,
    check_sampling,
    in_words,
    integer,
    is_absent,
    is_finite,
    real_number,
    size_of,
    without_quotes,
)
from wallaroo.workflows.settings import MAX_SAMPLES
from wallaroo.workflows.sources.embedded import COLUMN, Cell, parse_cell
from wallaroo.workflows.sources.references import Reference, SourceOptions, kept_uri, locate, parts_of, single
from wallaroo.workflows.tasks import PICTURE_TASKS

MAX_CHARACTERS = 10_000_000
"""Most characters of a prompt that are counted as tokens; a longer one is refused without counting."""


def _column(table: pa.Table, name: str) -> list[Any] | None:
    """Values of a column, with JSON text parsed; None if there is no such column."""
    if name not in table.column_names:
        return None
    values = table.column(name).to_pylist()
    if name in json_columns(table.schema):
        return [None if value is None else said(value) for value in values]
    return values


def said(text: str) -> Any:
    """Parses JSON text; returns the text itself if it is not JSON, as a foreign file may mark any text so."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def row_ids(
    table: pa.Table, origin: str, numbers: Sequence[int], column: str = "id"
) -> tuple[list[str], dict[int, RowError]]:
    """Finds the id of every row.

    Args:
        table: Some rows of a manifest.
        origin: The file that they are from, relative to the manifest.
        numbers: Their numbers in the file.
        column: Column of the ids. Without it, and in rows without an id, origin and number make the id.

    Returns:
        The ids, and number -> error for rows whose id cannot be used.
    """
    given = _column(table, column)
    if given is None:
        return [f"{origin}:{number}" for number in numbers], {}
    ids, errors = [], {}
    for number, value in zip(numbers, given, strict=True):
        rounded = isinstance(value, float) and abs(value) >= EXACT_FLOATS
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        bad = value is None or isinstance(value, (bool, bytes, list, dict)) or value != value
        text = "" if bad else str(value)
        if not text.strip():
            shown = "is missing" if value is None else f"is {in_words(value)}, but must be text or a number"
            errors[number] = RowError("id", f"id {shown}; give every row an id, or leave the column out.")
            text = f"{origin}:{number}"
        elif rounded:
            errors[number] = RowError("id", f"id {text} {ROUNDED}; give ids as text or integers.")
            text = f"{origin}:{number}"
        ids.append(text)
    return ids, errors


def sample_counts(
    table: pa.Table,
    settings: PlanSettings,
    numbers: Sequence[int],
    faults: Collection[int] = (),
    duplicates: Collection[int] = (),
) -> np.ndarray:
    """Counts the planned rows that each row gives: its samples, or one if it becomes an error row.

    Args:
        table: Some rows of a manifest.
        settings: Settings of the run.
        numbers: Numbers of the rows in the file.
        faults: Numbers of rows that cannot be read.
        duplicates: Numbers of rows that repeat an id.

    Returns:
        int64 [rows].
    """
    counts = np.full(len(numbers), settings.samples, np.int64)
    for index, value in enumerate(_column(table, "samples") or ()):
        try:
            counts[index] = samples_of(value, settings)
        except RowError:
            counts[index] = 1
    alone = [index for index, number in enumerate(numbers) if number in faults or number in duplicates]
    counts[alone] = 1
    return counts


def samples_of(value: Any, settings: PlanSettings) -> int:
    """Reads the number of samples of a row.

    Args:
        value: The cell of the column `samples`.
        settings: Settings of the run, for a cell without a value.

    Returns:
        A number from 1 to MAX_SAMPLES.

    Raises:
        RowError: ("samples") The cell holds anything else.
    """
    count = integer("samples", value, "samples", range(1, MAX_SAMPLES + 1))
    return settings.samples if count is None else count


def plan_rows(
    table: pa.Table,
    settings: PlanSettings,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    origin: str = "row",
    numbers: Sequence[int] | None = None,
    faults: Mapping[int, str] | None = None,
    raw: Mapping[int, str] | None = None,
    duplicates: Collection[int] = (),
    versions: Mapping[int, int] | None = None,
    folder: str = "",
) -> pa.Table:
    """Plans some rows of a manifest.

    Args:
        table: The rows.
        settings: Settings of the run.
        config: Configuration of the model, with its table of sizes.
        tokenizer: Tokenizer of the model.
        origin: The file that the rows are from, for ids and messages.
        numbers: Numbers of the rows in the file; 0, 1, ... if None.
        faults: Number -> why the row cannot be read.
        raw: Number -> text of a row of which no value can be read.
        duplicates: Numbers of rows whose id belongs to an earlier one.
        versions: Number -> version of the row; a row that it lacks has version 0.
        folder: Where relative paths of pictures start, unless the settings name a folder.

    Returns:
        The planned rows in the schema `plan_schema(carried_schema(table.schema))`. `row_id` counts from 0 and
        `shard` is 0; whoever joins tables numbers them.
    """
    numbers = range(table.num_rows) if numbers is None else numbers
    faults, raw = faults or {}, raw or {}
    names = column_names(table.schema, settings)
    ids, errors = row_ids(table, origin, numbers, names["id"])
    counts = sample_counts(table, settings, numbers, faults, duplicates)
    given = {name: _column(table, column) for name, column in names.items()}
    present = {name: values for name, values in given.items() if values is not None and name != "id"}
    allowed = SourceOptions(settings.image_root or folder, https=settings.allow_https)
    kept = _kept_lines(table)
    rows = []
    for index, number in enumerate(numbers):
        error = errors.get(number)
        if number in faults:
            remedy = "save the file as UTF-8" if "UTF-8" in faults[number] else "correct it"
            remedy = "rename the file" if faults[number].startswith("has a name") else remedy
            error = RowError("manifest", f"Row {number} of {origin} {faults[number]}; {remedy}.")
        elif number in duplicates and not error:
            error = RowError(
                "id",
                f"id {in_words(ids[index])} repeats that of an earlier row; give every row an id of its own.",
            )
        values = {name: column[index] for name, column in present.items()}
        if kept[index] and all(is_absent(values.get(name)) for name in ("prompt", COLUMN)):
            error = RowError(
                "manifest",
                f"Row {number} of {origin} is a line that could not be read, as {RAW} has it; correct that "
                f"text, and put the row that it is in place of this one.",
            )
        rows.append(_resolved(values, settings, config, tokenizer, allowed, error, raw.get(number)))
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
    take = np.repeat(np.arange(table.num_rows), counts)
    samples = np.arange(len(take)) - np.repeat(np.cumsum(counts) - counts, counts)
    columns["id"] = ids
    version = np.array([(versions or {}).get(number, 0) for number in numbers], np.int64)
    carried = carried_schema(table.schema, settings)
    arrays = []
    for one in PLAN_FIELDS:
        if one.name == "row_id":
            arrays.append(pa.array(np.arange(len(take)), one.type))
        elif one.name == "shard":
            arrays.append(pa.array(np.zeros(len(take), np.int64), one.type))
        elif one.name == "version":
            arrays.append(pa.array(version[take], one.type))
        elif one.name == "sample":
            arrays.append(pa.array(samples, one.type))
        elif one.name == "seed":
            seeds = [
                _seed(rows[index], settings.seed, ids[index], int(version[index]), sample)
                for index, sample in zip(take.tolist(), samples.tolist(), strict=True)
            ]
            arrays.append(pa.array(seeds, one.type))
        else:
            arrays.append(pa.array(columns.get(one.name, []), one.type).take(pa.array(take)))
    if settings.task in PICTURE_TASKS:
        arrays.append(pa.array(columns.get("source", []), SOURCE_TYPE).take(pa.array(take)))
    for name in carried_names(table.schema, settings):
        arrays.append(table.column(name).take(pa.array(take)))
    return pa.Table.from_arrays(arrays, schema=plan_schema(carried, settings.task))


def _kept_lines(table: pa.Table) -> list[bool]:
    """Tells which rows of an `errors.jsonl` are lines of a manifest that could not be read."""
    lines, kinds = (_column(table, name) or [None] * table.num_rows for name in (RAW, "kind"))
    return [isinstance(line, str) and kind == "manifest" for line, kind in zip(lines, kinds, strict=True)]


def _seed(row: dict[str, Any], run_seed: int, row_id: str, version: int, sample: int) -> int:
    if row["seed"] is not None:
        return (row["seed"] + sample) % SEEDS
    # Error rows too: with one null among integers, pandas makes floats of all.
    return derived_seed(run_seed, row_id, version, sample)


def derived_seed(run_seed: int, row_id: str, version: int, sample: int) -> int:
    """Derives the seed of a row that gives none. It depends on these four values alone.

    Args:
        run_seed: Seed of the run.
        row_id: Id of the row.
        version: Version of the row, from 0.
        sample: Number of the sample, from 0.

    Returns:
        A number from 0 to 2^63 - 1.
    """
    digest = hashlib.sha256(f"{run_seed} {version} {sample} {row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _resolved(
    values: dict[str, Any],
    settings: PlanSettings,
    config: ModelConfig,
    tokenizer: Tokenizer,
    allowed: SourceOptions,
    error: RowError | None,
    raw: str | None = None,
) -> dict[str, Any]:
    """Resolves the parameters of a row. All of its faults are reported; readable values are kept.

    The first fault gives the kind. Of a row that cannot be read it is the only one, as others follow from it.
    """
    faults = [error] if error else []

    def attempt(function: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except RowError as fault:
            faults.append(fault)
            return None

    attempt(samples_of, values.get("samples"), settings)
    prompt = values.get("prompt")
    if settings.task in PICTURE_TASKS and is_absent(prompt):
        prompt = settings.prompt or _question(values.get("language"), settings) or prompt
    if settings.strip_quotes and isinstance(prompt, str):
        prompt = without_quotes(prompt)
    attempt(check_prompt, prompt, settings, tokenizer)
    width = attempt(integer, "width", values.get("width"), "size", INT32)
    height = attempt(integer, "height", values.get("height"), "size", INT32)
    source = None
    if settings.task in PICTURE_TASKS:
        reference = attempt(single, values.get(COLUMN))
        source = _source(reference)
        if reference is not None or not faults:
            attempt(_locate, source, reference, allowed)
    else:
        ratio = values.get("aspect_ratio")
        if width is None and height is None and is_absent(ratio):
            width, height = settings.width, settings.height
        size = None
        if (width is None) == (height is None) or not any(fault.kind == "size" for fault in faults):
            # That one of two numbers is missing is no fault where it could not be read.
            size = attempt(size_of, width, height, ratio, config)
        if size is not None:
            height, width = size
    language = attempt(language_of, values.get("language"), prompt, settings)
    seed = attempt(integer, "seed", values.get("seed"), "seed", range(SEEDS))
    sampling = {
        name: attempt(real_number, name, values.get(name), getattr(settings.sampling, name))
        for name in ("cfg", "temperature", "top_k", "top_p")
    }
    top_k = sampling["top_k"]
    if top_k is not None and math.isfinite(top_k) and top_k == int(top_k):
        sampling["top_k"] = int(top_k)
    for name, value in sampling.items():
        if value is not None:
            # Each alone, so that every wrong one is reported.
            attempt(check_sampling, **{name: value})
    if settings.task == "understand" and (sampling["cfg"] or 0) > 1:
        words = f"cfg is {sampling['cfg']:g}, but answers have no guidance; give at most 1."
        faults.append(RowError("sampling", words))
    # `in` would compare a float with each of the 2^32 numbers of the range.
    if not (isinstance(sampling["top_k"], int) and sampling["top_k"] in INT32):
        sampling["top_k"] = None
    if error and error.kind == "manifest":
        faults = [error]
    resolved = {
        "status": "error" if faults else "planned",
        "error_type": faults[0].kind if faults else "",
        "error_message": "; also, ".join(str(fault).removesuffix(".") for fault in faults) + "."
        if faults
        else "",
        "prompt": prompt if isinstance(prompt, str) else None,
        "width": width,
        "height": height,
        "language": language,
        "seed": seed,
        "source": source,
        # JSON has no NaN, so a plan has none either.
        **{name: is_finite(value) for name, value in sampling.items()},
    }
    return resolved | {GIVEN: _given(values, resolved, settings.task, raw) if faults else None}


def _given(values: dict[str, Any], resolved: dict[str, Any], task: str, raw: str | None) -> str:
    """Encodes the values of a refused row as JSON text.

    Absent values are null. Values that the plan has unchanged are left out. `raw` is the text of a row that
    has no values.
    """
    # The readable part of a damaged row is not what was given.
    readable = values if resolved["error_type"] != "manifest" else {}
    given = {name: _spelt(readable.get(name)) for name in KNOWN_COLUMNS[task] if name != "id"}
    if given["prompt"] == resolved["prompt"]:
        del given["prompt"]
    if COLUMN in given and (isinstance(values[COLUMN], Mapping | bytes) or resolved["source"]["uri"]):
        del given[COLUMN]
    if raw is not None:
        given[RAW] = raw
    return json.dumps(given)


def _spelt(value: Any) -> Any:
    """Converts a value for JSON. Infinity, which JSON lacks, becomes text and is refused again later."""
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    try:
        return jsonable(value)
    except RecursionError:
        return None


def _question(language: Any, settings: PlanSettings) -> str | None:
    """The default question about a picture; None for tasks that ask none."""
    if settings.task != "understand":
        return None
    own = language if isinstance(language, str) and language in LANGUAGES else settings.language
    return DEFAULT_QUESTION[own or "en"]


def _source(reference: Reference) -> dict[str, Any]:
    """What is known of a row's picture before it is located."""
    path = reference.get("path") if isinstance(reference, Mapping) else reference
    return {"uri": kept_uri(path) if isinstance(path, str) else "", "row_id": None}


def _locate(source: dict[str, Any], reference: Reference, allowed: SourceOptions) -> None:
    """Writes the place of the picture into `source`. Raises RowError if it is missing or not allowed."""
    data, path = parts_of(reference)
    if data is not None:
        return
    cell = parse_cell(path) or Cell(path, -1)
    source["uri"] = locate(cell.path, allowed)
    source["row_id"] = cell.row if cell.row >= 0 else None


def check_prompt(prompt: Any, settings: PlanSettings, tokenizer: Tokenizer) -> None:
    """Checks the prompt of a row.

    Args:
        prompt: The cell, or what stands in for it.
        settings: Settings of the run, with `max_prompt_tokens`.
        tokenizer: Tokenizer of the model.

    Raises:
        RowError: ("prompt") It is missing, empty, no text or too long.
    """
    if prompt is None:
        raise RowError("prompt", "prompt is missing; give every row a text.")
    if not isinstance(prompt, str):
        raise RowError("prompt", f"prompt is {in_words(prompt)}, which is not text; give every row a text.")
    if not prompt.strip():
        raise RowError("prompt", f"prompt {in_words(prompt)} is empty; give every row a text.")
    most = settings.max_prompt_tokens
    # A token has at least one byte, so most prompts are known to be short without encoding.
    if 4 * len(prompt) <= most or len(prompt.encode()) <= most:
        return
    tokens = len(tokenizer.encode([prompt])) if len(prompt) <= MAX_CHARACTERS else None
    if tokens is None or tokens > most:
        count = f"{len(prompt):,} characters" + (f" and {tokens:,} tokens" if tokens else "")
        raise RowError(
            "prompt",
            f"prompt has {count}, more than max_prompt_tokens {most:,}; shorten it or raise the limit.",
        )


def language_of(value: Any, prompt: Any, settings: PlanSettings) -> str | None:
    """Finds the language of a row.

    Args:
        value: The cell of the column `language`.
        prompt: The prompt of the row, to detect the language from.
        settings: Settings of the run, whose language precedes the detected one.

    Returns:
        A name of LANGUAGES; None if there is no text to detect it from.

    Raises:
        RowError: ("language") The cell names no known language.
    """
    if is_absent(value):
        return settings.language or (detect_language(prompt) if isinstance(prompt, str) else None)
    if value not in LANGUAGES:
        hint = did_you_mean(str(value), LANGUAGES) or "."
        words = ", ".join(LANGUAGES)
        raise RowError("language", f"language is {in_words(value)}, but must be one of {words}{hint}")
    return value
