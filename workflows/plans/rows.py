"""Manifest rows -> planned rows: ids, samples, versions and seeds of a table of rows.

What the parameters of one row are is in `parameters`.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from wallaroo.model.config import ModelConfig
from wallaroo.model.errors import RowError
from wallaroo.model.tokenizer import Tokenizer
from wallaroo.workflows.outputs.schema import json_columns
from wallaroo.workflows.plans.columns import RAW, carried_names, carried_schema, plan_schema
from wallaroo.workflows.plans.parameters import RowResolver, samples_of
from wallaroo.workflows.plans.settings import PlanSettings, column_names
from wallaroo.workflows.plans.values import EXACT_FLOATS, ROUNDED, SEEDS, in_words, is_absent
from wallaroo.workflows.sources.embedded import COLUMN
from wallaroo.workflows.sources.references import SourceOptions


def _column(table: pa.Table, name: str) -> list[Any] | None:
    """Values of a column, with JSON text parsed; None if there is no such column."""
    if name not in table.column_names:
        return None
    values = table.column(name).to_pylist()
    if name in json_columns(table.schema):
        return [None if value is None else _from_json(value) for value in values]
    return values


def _from_json(text: str) -> Any:
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
        `shard` is 0; the caller, which joins tables, numbers them.
    """
    numbers = range(table.num_rows) if numbers is None else numbers
    faults, raw, versions = faults or {}, raw or {}, versions or {}
    names = column_names(table.schema, settings)
    ids, errors = row_ids(table, origin, numbers, names["id"])
    given = {name: _column(table, column) for name, column in names.items() if name != "id"}
    present = {name: values for name, values in given.items() if values is not None}
    allowed = SourceOptions(settings.image_root or folder, https=settings.allow_https)
    resolver = RowResolver(settings, config, tokenizer, allowed)
    kept = _kept_lines(table)
    rows = []
    for index, number in enumerate(numbers):
        values = {name: column[index] for name, column in present.items()}
        error = errors.get(number)
        if number in faults:
            error = _unreadable(number, origin, faults[number])
        elif number in duplicates and not error:
            error = _repeated(ids[index])
        if kept[index] and all(is_absent(values.get(name)) for name in ("prompt", COLUMN)):
            error = _uncorrected(number, origin)
        rows.append(resolver.resolve(values, error, raw.get(number)))
    counts = sample_counts(table, settings, numbers, faults, duplicates)
    version = np.array([versions.get(number, 0) for number in numbers], np.int64)
    return _planned(table, settings, rows, ids, counts, version)


def _planned(
    table: pa.Table,
    settings: PlanSettings,
    rows: Sequence[Mapping[str, Any]],
    ids: Sequence[str],
    counts: np.ndarray,
    versions: np.ndarray,
) -> pa.Table:
    """Builds the planned rows: each row of the manifest once for each of its samples.

    Args:
        table: The rows.
        settings: Settings of the run.
        rows: Resolved parameters of each row.
        ids: Id of each row.
        counts: int64 [rows]: planned rows of each row.
        versions: int64 [rows]: version of each row.

    Returns:
        As `plan_rows`.
    """
    taken = np.repeat(np.arange(table.num_rows), counts)
    samples = np.arange(len(taken)) - np.repeat(np.cumsum(counts) - counts, counts)
    numbers: dict[str, Any] = {
        "row_id": np.arange(len(taken)),
        "shard": np.zeros(len(taken), np.int64),
        "version": versions[taken],
        "sample": samples,
        "seed": [
            _seed(rows[index], settings.seed, ids[index], int(versions[index]), sample)
            for index, sample in zip(taken.tolist(), samples.tolist(), strict=True)
        ],
    }
    carried = carried_schema(table.schema, settings)
    schema = plan_schema(carried, settings.task)
    indices = pa.array(taken)
    arrays = []
    for one in list(schema)[: len(schema) - len(carried)]:
        if one.name in numbers:
            arrays.append(pa.array(numbers[one.name], one.type))
        else:
            values = ids if one.name == "id" else [row[one.name] for row in rows]
            arrays.append(pa.array(values, one.type).take(indices))
    arrays += [table.column(name).take(indices) for name in carried_names(table.schema, settings)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _unreadable(number: int, origin: str, fault: str) -> RowError:
    remedy = "save the file as UTF-8" if "UTF-8" in fault else "correct it"
    remedy = "rename the file" if fault.startswith("has a name") else remedy
    return RowError("manifest", f"Row {number} of {origin} {fault}; {remedy}.")


def _repeated(row_id: str) -> RowError:
    return RowError(
        "id", f"id {in_words(row_id)} repeats that of an earlier row; give every row an id of its own."
    )


def _uncorrected(number: int, origin: str) -> RowError:
    return RowError(
        "manifest",
        f"Row {number} of {origin} is a line that could not be read, as {RAW} has it; correct that "
        f"text, and put the row that it is in place of this one.",
    )


def _kept_lines(table: pa.Table) -> list[bool]:
    """Tells which rows of an `errors.jsonl` are lines of a manifest that could not be read."""
    lines, kinds = (_column(table, name) or [None] * table.num_rows for name in (RAW, "kind"))
    return [isinstance(line, str) and kind == "manifest" for line, kind in zip(lines, kinds, strict=True)]


def _seed(row: Mapping[str, Any], run_seed: int, row_id: str, version: int, sample: int) -> int:
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
