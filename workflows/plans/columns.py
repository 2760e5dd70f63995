"""The columns of a plan: those of the manifest, checked against the settings, and the resolved ones."""

import json
import re
from collections.abc import Collection, Sequence

import pyarrow as pa

from wallaroo.model.errors import InputError, did_you_mean
from wallaroo.workflows.outputs.schema import (
    CARRIED_PREFIX,
    JSON_MARK,
    NOTE_MARK,
    RESULT_NAMES,
    SOURCE_TYPE,
    first_name,
    json_columns,
    own_name,
)
from wallaroo.workflows.plans.settings import PlanSettings, column_names
from wallaroo.workflows.sources.embedded import COLUMN
from wallaroo.workflows.tasks import PICTURE_TASKS

GIVEN = "__wallaroo_given"
"""Column with the manifest values of a refused row, as JSON text; null in all other rows.

No column of a manifest has this name. Outputs of version 0.1.0 lack it.
"""
RAW = "raw_line"
"""Name in `errors.jsonl` of the text of a row of which no value can be read."""
PLAN_FIELDS = (
    pa.field("row_id", pa.int64()),
    pa.field("shard", pa.int64()),
    pa.field("id", pa.string()),
    pa.field("version", pa.int32()),
    pa.field("sample", pa.int32()),
    pa.field("status", pa.string()),
    pa.field("error_type", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("prompt", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("language", pa.string()),
    pa.field("seed", pa.int64()),
    pa.field("cfg", pa.float64()),
    pa.field("temperature", pa.float64()),
    pa.field("top_k", pa.int32()),
    pa.field("top_p", pa.float64()),
    pa.field(GIVEN, pa.string()),
)
"""Columns of a plan; the carried ones follow. `status` is "planned" or "error".

width, height: pixels. In an error row any of `prompt` to `top_p` is null if it could not be read.
"""
SOURCE_FIELD = pa.field("source", SOURCE_TYPE)
"""Where the source picture of a row is, for tasks that read one.

uri: an absolute path or address. row_id: number of the row, for a picture within a Parquet file. The load
stage fills the other fields.
"""

MIN_COMMON = 0.75
"""Share of letters from which a column is taken for a misspelt one (`sede` and `seed` have three of four)."""

QUESTIONS = frozenset(("text", "query", "instruction", "questions", "conversations", "messages"))
"""Columns of other tools that hold questions, among other things."""

MAX_SHORT = 3
"""Letters of names, such as `id` and `cfg`, for which only another case is a misspelling."""


def parameter_columns(schema: pa.Schema, settings: PlanSettings) -> tuple[str, ...]:
    """Lists the columns of a manifest that the task reads. All others are carried through.

    Args:
        schema: Schema of the manifest.
        settings: Settings of the run.

    Returns:
        Names as they stand in the manifest, also of columns that it lacks.
    """
    return tuple(column_names(schema, settings).values())


def check_columns(schema: pa.Schema, settings: PlanSettings) -> list[str]:
    """Checks the columns of a manifest.

    Args:
        schema: Schema of all files of the manifest.
        settings: Settings of the run.

    Returns:
        Warnings about columns that are used under another name, or look like misspelt ones.

    Raises:
        InputError: A column is missing that the task needs or the run names.
    """
    names = column_names(schema, settings)
    needed = [names[COLUMN]] if settings.task in PICTURE_TASKS else []
    needed += [names["id"]] if settings.id_column else []
    if settings.prompt_column or (settings.task != "understand" and settings.prompt is None):
        needed.append(names["prompt"])
    for column in needed:
        if column not in schema.names:
            raise _missing(column, schema, settings)
    warnings = [
        f"Column '{actual}' is used as the {name} of a row; --{name}-column selects another."
        for name, actual in names.items()
        if name in ("prompt", COLUMN, "id")
        and actual not in (name, CARRIED_PREFIX + name)
        and actual in schema.names
        and getattr(settings, f"{name}_column") is None
    ]
    if settings.task == "understand" and settings.prompt is None and names["prompt"] not in schema.names:
        questions = [name for name in schema.names if name.lower() in QUESTIONS]
        warnings += [
            f"Column '{name}' may hold questions, but is not used, so each image is described; "
            f"--prompt-column selects it."
            for name in questions[:1]
        ]
    return warnings + _misspelt(schema.names, tuple(names.values()))


def _missing(column: str, schema: pa.Schema, settings: PlanSettings) -> InputError:
    """The error for a column that a manifest needs and lacks, with the nearest remedy."""
    # A column that an earlier run's output had is not a misspelt one.
    others = [
        name
        for name in schema.names
        if name not in parameter_columns(schema, settings)
        and (not name.endswith(column) or first_name(name.removesuffix(column)))
    ]
    if joined := next((name for name in others if column in re.split("[;|\t]", name)), ""):
        return InputError(
            f"The manifest has no column '{column}', but '{joined}': separate the columns of a CSV file "
            f"by commas, semicolons or tabs, the same in all rows."
        )
    hint = did_you_mean(column, others)
    if not hint and any("\t" in name or ";" in name for name in schema.names):
        hint = "; a CSV file must be separated by commas."
    elif not hint:
        hint = f": it has {', '.join(schema.names[:10]) or 'none at all'}."
        if column == "prompt" and COLUMN in schema.names and set(schema.names) <= {"id", COLUMN}:
            return InputError(
                "The manifest has images, but no instructions: give one for all rows (--prompt)."
            )
        if column == "prompt" and settings.task in PICTURE_TASKS:
            hint = "; give one instruction for all rows (--prompt), or its column (--prompt-column)."
    if column == "prompt" and "--prompt-column" not in hint:
        hint += " --prompt-column selects the column of the prompts."
    elif column == COLUMN:
        hint += " --image-column selects the column of the images."
    return InputError(f"The manifest has no column '{column}'{hint}")


def _misspelt(names: Sequence[str], meant: Collection[str]) -> list[str]:
    """Warnings about columns whose names are near to one that the task reads (`meant`)."""
    warnings = []
    for name in names:
        # Too many words are similar to a short name.
        near = [column for column in meant if name.lower() == column or len(column) > MAX_SHORT]
        carried = own_name(name) != name or any(name.lower().startswith(f"{one}_") for one in meant)
        hint = "" if name in meant or carried else did_you_mean(name.lower(), near, MIN_COMMON)
        if hint:
            warnings.append(f"Column '{name}' is not a parameter and is carried through{hint}")
    return warnings


def carried_schema(schema: pa.Schema, settings: PlanSettings) -> pa.Schema:
    """Builds the schema of the columns that are carried through, under their names in the result.

    Args:
        schema: Schema of the manifest.
        settings: Settings of the run.

    Returns:
        The carried columns. One with the name of a result column is called `in_<name>`. The metadata names
        the columns that hold JSON text.
    """
    names = carried_names(schema, settings)
    fields = [schema.field(name).with_name(new).remove_metadata() for name, new in names.items()]
    metadata = {key: value for key, value in (schema.metadata or {}).items() if key == b"huggingface"}
    if settings.task in PICTURE_TASKS:
        metadata[NOTE_MARK] = b"1"
    marked = sorted(names[name] for name in json_columns(schema) if name in names)
    if marked:
        metadata[JSON_MARK] = json.dumps(marked).encode()
    return pa.schema(fields, metadata=metadata)


def carried_names(schema: pa.Schema, settings: PlanSettings) -> dict[str, str]:
    """Maps each carried column of a manifest to its name in the result.

    Args:
        schema: Schema of the manifest.
        settings: Settings of the run.

    Returns:
        Name in the manifest -> name in the result, in the order of the manifest.
    """
    names: dict[str, str] = {}
    meant = parameter_columns(schema, settings)
    kept = {name for name in schema.names if name not in meant and name not in RESULT_NAMES}
    for name in schema.names:
        if name in meant or name == GIVEN:
            continue
        new = name
        while new in RESULT_NAMES or (new != name and new in kept):
            new = CARRIED_PREFIX + new
        names[name] = new
    return names


def with_given(planned: pa.Table) -> pa.Table:
    """Adds the column GIVEN, all null, to planned rows of a version that did not write it."""
    if GIVEN in planned.column_names:
        return planned
    index = len(PLAN_FIELDS) - 1
    return planned.add_column(index, PLAN_FIELDS[index], pa.nulls(planned.num_rows, pa.string()))


def plan_schema(carried: pa.Schema, task: str = "generate") -> pa.Schema:
    """Builds the schema of a plan.

    Args:
        carried: The carried columns, as `carried_schema` gives them.
        task: The task; one that reads pictures adds the column `source`.

    Returns:
        PLAN_FIELDS, `source` if there is one, then the carried columns.
    """
    fields = [*PLAN_FIELDS, SOURCE_FIELD] if task in PICTURE_TASKS else PLAN_FIELDS
    return pa.schema([*fields, *carried], metadata=carried.metadata)
