"""Manifest rows -> planned rows: every parameter resolved, checked and seeded, faults told in words.

A manifest row gives as many planned rows as it asks samples, in order. What cannot be served becomes an
error row, with what could be read of it. Knows nothing of files, shards or Ray.
"""

import decimal
import functools
import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from model.config import ModelConfig, Size
from model.errors import InputError, RowError, did_you_mean
from model.prompts import DEFAULT_QUESTION, LANGUAGES, detect_language
from model.sampling import Sampling
from model.tokenizer import Tokenizer
from workflows.cells import COLUMN, Cell, parse_cell
from workflows.https import without_query
from workflows.results import JSON_MARK, RESULT_NAMES, SOURCE_TYPE, json_columns
from workflows.run_config import OptionError
from workflows.sources import Reference, SourceOptions, locate, parts_of
from workflows.tasks import PICTURE_TASKS

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
)
"""Columns of a plan; the carried ones follow. `status` is "planned" or "error".

width, height: pixels. In an error row any of `prompt` to `top_p` is null if it could not be read.
"""

SOURCE_FIELD = pa.field("source", SOURCE_TYPE)
"""Where a picture to start from is, for tasks that do: an absolute path or address, and for one within a
Parquet file the number of its row there. The rest of it is learnt when it is loaded."""

_OF_PICTURES = (
    "prompt",
    "image",
    "id",
    "samples",
    "seed",
    "cfg",
    "temperature",
    "top_k",
    "top_p",
    "language",
)

KNOWN_COLUMNS = {
    "generate": (
        "prompt",
        "id",
        "samples",
        "seed",
        "cfg",
        "temperature",
        "top_k",
        "top_p",
        "language",
        "width",
        "height",
        "aspect_ratio",
    ),
    "edit": _OF_PICTURES,
    "understand": _OF_PICTURES,
}
"""Task -> columns of a manifest that mean something; all others are carried through."""

MOST_SAMPLES = 10_000
MOST_CHARACTERS = 10_000_000
SEEDS = 2**63
INT32 = range(-(2**31), 2**31)


@dataclass(frozen=True)
class PlanSettings:
    """What the run decides for rows that do not say, and which rows it looks at.

    seed: of the run. width, height: pixels; both, or neither for the size whose ratio is nearest to 1.
    language: None to detect it row by row. prompt: of rows that do not say; prompt_column: the column
    with the prompts, if not `prompt`. image_root: where relative paths of pictures start, if not in the
    folder of the file that names them; allow_https: whether they may be on the web.
    restore_size: whether edited pictures get the sizes of their sources. limit, where: plan at most so many
    manifest rows, and only those for which an SQL expression over the manifest's columns holds; the others
    may follow later. incremental: the manifest grows, and what is new in it is planned.
    """

    task: str = "generate"
    seed: int = 0
    samples: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    width: int | None = None
    height: int | None = None
    language: str | None = None
    max_prompt_tokens: int = 1024
    prompt: str | None = None
    prompt_column: str | None = None
    image_root: str | None = None
    allow_https: bool = False
    restore_size: bool = False
    limit: int | None = None
    where: str | None = None
    incremental: bool = False

    def check(self, config: ModelConfig) -> None:
        """Raises OptionError if a value breaks a rule, or the checkpoint has no such size."""
        if self.task not in KNOWN_COLUMNS:
            raise OptionError(
                f"task is '{self.task}', but only {', '.join(KNOWN_COLUMNS)} can be planned: choose that."
            )
        if not 1 <= self.samples <= MOST_SAMPLES:
            raise OptionError(f"samples is {self.samples}, but must be from 1 to {MOST_SAMPLES}.")
        if not 0 <= self.seed < SEEDS:
            raise OptionError(f"seed is {self.seed}, but must be from 0 to 2^63 - 1.")
        if self.limit is not None and self.limit < 1:
            raise OptionError(f"limit is {self.limit}, but must be at least 1.")
        if self.language not in (None, *LANGUAGES):
            raise OptionError(f"language is '{self.language}', but must be one of {', '.join(LANGUAGES)}.")
        try:
            self.sampling.validate()
            _size(self.width, self.height, None, config)
        except RowError as error:
            raise OptionError(str(error)) from None

    def meaning(self) -> dict[str, Any]:
        """The values that decide what a planned row is, so that all parts of a plan must share them."""
        values = asdict(self)
        return {
            name: value for name, value in values.items() if name not in ("limit", "where", "incremental")
        }


# Columns


def prompt_column(schema: pa.Schema, settings: PlanSettings) -> str:
    """The column that prompts stand in. One of a run's output may be called as it is there."""
    name = settings.prompt_column or "prompt"
    inner = f"in_{name}"
    return inner if settings.prompt_column and name not in schema.names and inner in schema.names else name


def known_columns(schema: pa.Schema, settings: PlanSettings) -> tuple[str, ...]:
    """The columns of a manifest that mean something, all others being carried through."""
    return (prompt_column(schema, settings), *KNOWN_COLUMNS[settings.task][1:])


def check_columns(schema: pa.Schema, settings: PlanSettings) -> list[str]:
    """Warnings about columns that look like misspelt ones. Raises InputError if one is missing."""
    known = known_columns(schema, settings)
    needed = [COLUMN] if settings.task in PICTURE_TASKS else []
    if settings.prompt_column or (settings.task != "understand" and settings.prompt is None):
        needed.append(known[0])
    for column in needed:
        if column in schema.names:
            continue
        others = [name for name in schema.names if name not in known]
        # A column that an earlier run's output had is not a misspelt one.
        others = [name for name in others if not re.fullmatch(f"(in_)+{re.escape(column)}", name)]
        hint = did_you_mean(column, others)
        if not hint and any("\t" in name or ";" in name for name in schema.names):
            hint = "; a CSV file must be separated by commas."
        elif not hint:
            hint = f": it has {', '.join(schema.names[:10]) or 'none at all'}."
            if column == "prompt" and settings.task in PICTURE_TASKS:
                hint = "; give one instruction for all rows (--prompt), or its column (--prompt-column)."
        raise InputError(f"The manifest has no column '{column}'{hint}")
    warnings = []
    for name in schema.names:
        near = next((word for word in known if name not in known and _nearly(name, word)), None)
        if near:
            warnings.append(
                f"Column '{name}' is carried through without a meaning; rename it if '{near}' is meant."
            )
    return warnings


def _nearly(name: str, word: str) -> bool:
    """Whether two names differ in case, or in one letter changed, added, left out or swapped."""
    if name.lower() == word:
        return True
    if len(word) < 4 or abs(len(name) - len(word)) > 1:
        return False
    start = next((i for i, pair in enumerate(zip(name, word, strict=False)) if len(set(pair)) > 1), None)
    start = min(len(name), len(word)) if start is None else start
    swapped = name[start : start + 2] == word[start : start + 2][::-1]
    skips = [(1, 1), (1, 0), (0, 1)] + [(2, 2)] * swapped
    return any(name[start + one :] == word[start + other :] for one, other in skips)


def carried_schema(schema: pa.Schema, settings: PlanSettings) -> pa.Schema:
    """The columns of a manifest that are carried through, under the names they will have.

    One with the name of a result column is `in_<name>`. Metadata names those that hold JSON text.
    """
    names = _carried_names(schema, settings)
    fields = [schema.field(name).with_name(new).remove_metadata() for name, new in names.items()]
    metadata = {key: value for key, value in (schema.metadata or {}).items() if key == b"huggingface"}
    marked = sorted(names[name] for name in json_columns(schema) if name in names)
    if marked:
        metadata[JSON_MARK] = json.dumps(marked).encode()
    return pa.schema(fields, metadata=metadata)


def _carried_names(schema: pa.Schema, settings: PlanSettings) -> dict[str, str]:
    names: dict[str, str] = {}
    known = known_columns(schema, settings)
    kept = {name for name in schema.names if name not in known and name not in RESULT_NAMES}
    for name in schema.names:
        if name in known:
            continue
        new = name
        while new in RESULT_NAMES or (new != name and new in kept):
            new = f"in_{new}"
        names[name] = new
    return names


def plan_schema(carried: pa.Schema, task: str = "generate") -> pa.Schema:
    """The schema of a plan with these carried columns."""
    fields = [*PLAN_FIELDS, SOURCE_FIELD] if task in PICTURE_TASKS else PLAN_FIELDS
    return pa.schema([*fields, *carried], metadata=carried.metadata)


def _column(table: pa.Table, name: str) -> list[Any] | None:
    """Values of a column, None if there is none; JSON text as what it says."""
    if name not in table.column_names:
        return None
    values = table.column(name).to_pylist()
    if name in json_columns(table.schema):
        return [None if value is None else _said(value) for value in values]
    return values


def _said(text: str) -> Any:
    """What JSON text says; the text itself where a foreign file only claims that it is some."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


# Ids and samples


def row_ids(table: pa.Table, origin: str, numbers: Sequence[int]) -> tuple[list[str], dict[int, RowError]]:
    """The id of every row, and errors by row number where the manifest gives none that can be used.

    Without an `id` column, or in such a row, it is the origin and the number of the row in it.
    """
    given = _column(table, "id")
    if given is None:
        return [f"{origin}:{number}" for number in numbers], {}
    ids, errors = [], {}
    for number, value in zip(numbers, given, strict=True):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        bad = value is None or isinstance(value, (bool, bytes, list, dict)) or value != value
        text = "" if bad else str(value)
        if not text.strip():
            shown = "is missing" if value is None else f"is {_shown(value)}, but must be text or a number"
            errors[number] = RowError("id", f"id {shown}; give every row an id, or leave the column out.")
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
    """int64 [rows]: how many planned rows each row gives.

    That is one where the row cannot be read, repeats an id, or asks for an impossible number.
    """
    counts = np.full(len(numbers), settings.samples, np.int64)
    for index, value in enumerate(_column(table, "samples") or ()):
        try:
            counts[index] = _samples(value, settings)
        except RowError:
            counts[index] = 1
    alone = [index for index, number in enumerate(numbers) if number in faults or number in duplicates]
    counts[alone] = 1
    return counts


def _samples(value: Any, settings: PlanSettings) -> int:
    count = _integer("samples", value, "samples", range(1, MOST_SAMPLES + 1))
    return settings.samples if count is None else count


# Rows


def plan_rows(
    table: pa.Table,
    settings: PlanSettings,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    origin: str = "row",
    numbers: Sequence[int] | None = None,
    faults: Mapping[int, str] | None = None,
    duplicates: Collection[int] = (),
    versions: Mapping[int, int] | None = None,
    folder: str = "",
) -> pa.Table:
    """The planned rows of some manifest rows, in the schema `plan_schema(carried_schema(table.schema))`.

    folder: where relative paths of pictures start, unless the settings say. origin, numbers: the file
    the rows are from and their numbers in it, for ids and messages (0, 1, ... if None). faults: number ->
    why the row cannot be read. duplicates: numbers of rows whose id belongs to an earlier one. versions:
    number -> how often the row of this id was another one before, 0 for rows that are not named. `row_id`
    counts from 0 and `shard` is 0: whoever puts tables together renumbers.
    """
    numbers = range(table.num_rows) if numbers is None else numbers
    faults = faults or {}
    ids, errors = row_ids(table, origin, numbers)
    counts = sample_counts(table, settings, numbers, faults, duplicates)
    known = dict(zip(KNOWN_COLUMNS[settings.task], known_columns(table.schema, settings), strict=True))
    given = {name: _column(table, column) for name, column in known.items()}
    present = {name: values for name, values in given.items() if values is not None and name != "id"}
    allowed = SourceOptions(settings.image_root or folder, https=settings.allow_https)
    rows = []
    for index, number in enumerate(numbers):
        error = errors.get(number)
        if number in faults:
            error = RowError("manifest", f"Row {number} of {origin} {faults[number]}; correct it.")
        elif number in duplicates and not error:
            error = RowError(
                "id", f"id {_shown(ids[index])} is that of an earlier row; give every row an id of its own."
            )
        values = {name: column[index] for name, column in present.items()}
        rows.append(_resolved(values, settings, config, tokenizer, allowed, error))
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
    for name in _carried_names(table.schema, settings):
        arrays.append(table.column(name).take(pa.array(take)))
    return pa.Table.from_arrays(arrays, schema=plan_schema(carried, settings.task))


def _seed(row: dict[str, Any], run_seed: int, row_id: str, version: int, sample: int) -> int | None:
    if row["seed"] is not None:
        return (row["seed"] + sample) % SEEDS
    if row["status"] == "error":
        return None
    return derived_seed(run_seed, row_id, version, sample)


def derived_seed(run_seed: int, row_id: str, version: int, sample: int) -> int:
    """The seed of a row that gives none, from 0 to 2^63 - 1; nothing else of the run has a part in it."""
    digest = hashlib.sha256(f"{run_seed} {version} {sample} {row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _resolved(
    values: dict[str, Any],
    settings: PlanSettings,
    config: ModelConfig,
    tokenizer: Tokenizer,
    allowed: SourceOptions,
    error: RowError | None,
) -> dict[str, Any]:
    """Parameters of a row; of several faults the first is told, and what could be read is kept."""
    faults = [error] if error else []

    def attempt(function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except RowError as fault:
            faults.append(fault)
            return None

    attempt(_samples, values.get("samples"), settings)
    prompt = values.get("prompt")
    if settings.task in PICTURE_TASKS and _absent(prompt):
        prompt = settings.prompt or _question(values.get("language"), settings) or prompt
    attempt(_check_prompt, prompt, settings, tokenizer)
    width = attempt(_integer, "width", values.get("width"), "size", INT32)
    height = attempt(_integer, "height", values.get("height"), "size", INT32)
    source = None
    if settings.task in PICTURE_TASKS:
        source = _source(values.get(COLUMN))
        attempt(_locate, source, values.get(COLUMN), allowed)
    else:
        ratio = values.get("aspect_ratio")
        if width is None and height is None and _absent(ratio):
            width, height = settings.width, settings.height
        size = attempt(_size, width, height, ratio, config)
        if size is not None:
            height, width = size
    language = attempt(_language, values.get("language"), prompt, settings)
    seed = attempt(_integer, "seed", values.get("seed"), "seed", range(SEEDS))
    sampling = {
        name: attempt(_number, name, values.get(name), getattr(settings.sampling, name))
        for name in ("cfg", "temperature", "top_k", "top_p")
    }
    top_k = sampling["top_k"]
    if top_k is not None and math.isfinite(top_k) and top_k == int(top_k):
        sampling["top_k"] = int(top_k)
    if None not in sampling.values():
        attempt(_check_sampling, *sampling.values())
    if settings.task == "understand" and (sampling["cfg"] or 0) > 1:
        words = f"cfg is {sampling['cfg']:g}, but answers have no guidance; give at most 1."
        faults.append(RowError("sampling", words))
    # A float is looked for in a range one number after the other.
    if not (isinstance(sampling["top_k"], int) and sampling["top_k"] in INT32):
        sampling["top_k"] = None
    return {
        "status": "error" if faults else "planned",
        "error_type": faults[0].kind if faults else "",
        "error_message": str(faults[0]) if faults else "",
        "prompt": prompt if isinstance(prompt, str) else None,
        "width": width,
        "height": height,
        "language": language,
        "seed": seed,
        "source": source,
        # JSON has no NaN, and no row of a plan has one.
        **{name: _finite(value) for name, value in sampling.items()},
    }


def _question(language: Any, settings: PlanSettings) -> str | None:
    """What is asked of a picture without a question; nothing if the task is another."""
    if settings.task != "understand":
        return None
    own = language if isinstance(language, str) and language in LANGUAGES else settings.language
    return DEFAULT_QUESTION[own or "en"]


def _source(reference: Reference) -> dict[str, Any]:
    """What can be told of a row's picture before it is looked for."""
    path = reference.get("path") if isinstance(reference, Mapping) else reference
    return {"uri": kept_uri(path) if isinstance(path, str) else "", "row_id": None}


def kept_uri(path: str) -> str:
    """What a result says of a path or address; the query of a web address may hold a key and is left out."""
    if "://" not in path:
        return path
    return re.sub("//[^/]*@", "//", path, count=1) if path.startswith("s3://") else without_query(path)


def _locate(source: dict[str, Any], reference: Reference, allowed: SourceOptions) -> None:
    """Puts into `source` where the picture is. Raises RowError if there is none, or it may not be read."""
    data, path = parts_of(reference)
    if data is not None:
        return
    cell = parse_cell(path) or Cell(path, -1)
    source["uri"] = locate(cell.path, allowed)
    source["row_id"] = cell.row if cell.row >= 0 else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _check_prompt(prompt: Any, settings: PlanSettings, tokenizer: Tokenizer) -> None:
    if prompt is None:
        raise RowError("prompt", "prompt is missing; give every row a text.")
    if not isinstance(prompt, str):
        raise RowError("prompt", f"prompt is {_shown(prompt)}, which is not text; give every row a text.")
    if not prompt.strip():
        raise RowError("prompt", f"prompt is {_shown(prompt)}, which says nothing; give every row a text.")
    most = settings.max_prompt_tokens
    # No token is shorter than a byte, so most prompts need not be encoded to be known as short.
    if 4 * len(prompt) <= most or len(prompt.encode()) <= most:
        return
    tokens = len(tokenizer.encode([prompt])) if len(prompt) <= MOST_CHARACTERS else None
    if tokens is None or tokens > most:
        count = f"{len(prompt):,} characters" + (f" and {tokens:,} tokens" if tokens else "")
        raise RowError(
            "prompt", f"prompt has {count}, more than max_prompt_tokens {most:,}; shorten it or raise that."
        )


def _language(value: Any, prompt: Any, settings: PlanSettings) -> str | None:
    if _absent(value):
        return settings.language or (detect_language(prompt) if isinstance(prompt, str) else None)
    if value not in LANGUAGES:
        hint = did_you_mean(str(value), LANGUAGES) or "."
        words = ", ".join(LANGUAGES)
        raise RowError("language", f"language is {_shown(value)}, but must be one of {words}{hint}")
    return value


def _size(width: int | None, height: int | None, ratio: Any, config: ModelConfig) -> Size:
    """The size of a row, from the checkpoint's table. Raises RowError (`size`)."""
    if not _absent(ratio):
        if width is not None or height is not None:
            raise RowError("size", f"aspect_ratio {_shown(ratio)} stands beside a width or height; give one.")
        # Only their quotient matters, so a ratio will do for pixels.
        return config.bucket(*_ratio(ratio))  # type: ignore[arg-type]
    if width is None and height is None:
        return config.bucket(1, 1)
    if width is None or height is None:
        given, absent = ("width", "height") if height is None else ("height", "width")
        value = width if height is None else height
        raise RowError("size", f"{given} is {value}, but {absent} is missing; give both or neither.")
    size = Size(height, width)
    if size in config.size_list():
        return size
    if width < 1 or height < 1:
        raise RowError("size", f"width {width} and height {height} are no size; give positive pixels.")
    nearest = config.bucket(height, width)
    raise RowError("size", f"size {size} is not one of the model's; the nearest is {nearest}.")


def _ratio(value: Any) -> tuple[float, float]:
    """Height and width, up to a common factor, of an aspect ratio: 16:9, 1.78 or a number."""
    try:
        text = value if isinstance(value, str) else repr(float(value))
        width, _, height = text.partition(":")
        pair = float(height) if height else 1.0, float(width)
    except (TypeError, ValueError):
        pair = 0.0, 0.0
    if not all(math.isfinite(side) and 1e-6 < side < 1e6 for side in pair):
        raise RowError(
            "size", f"aspect_ratio is {_shown(value)}, but must be width to height, such as 16:9 or 1.78."
        )
    return pair


@functools.lru_cache(maxsize=4096)
def _check_sampling(cfg: float, temperature: float, top_k: float, top_p: float) -> None:
    Sampling(cfg, temperature, top_k, top_p).validate()  # type: ignore[arg-type]
    if top_k >= INT32.stop:
        raise RowError("sampling", f"top_k is {top_k}, but must be less than 2^31 (0 keeps all tokens).")


# Values


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _integer(name: str, value: Any, kind: str, allowed: range) -> int | None:
    """A whole number of a manifest, which may be text; None if it is absent. Raises RowError (`kind`)."""
    if _absent(value):
        return None
    number = None
    if isinstance(value, str):
        if re.fullmatch(r"\s*[+-]?[0-9]{1,30}(\.0*)?\s*", value):
            number = int(value.strip().partition(".")[0])
    elif isinstance(value, (float, decimal.Decimal)):
        number = int(value) if math.isfinite(value) and value == int(value) else None
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    if number is None or number not in allowed:
        bounds = "2^63 - 1" if allowed.stop == SEEDS else f"{allowed.stop - 1}"
        raise RowError(
            kind, f"{name} is {_shown(value)}, but must be a whole number from {allowed.start} to {bounds}."
        )
    return number


def _number(name: str, value: Any, default: float) -> float:
    """A number of a manifest, which may be text; `default` if it is absent. Raises RowError (`sampling`)."""
    if _absent(value):
        return default
    try:
        if isinstance(value, (bool, bytes)) or (isinstance(value, str) and "_" in value):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise RowError("sampling", f"{name} is {_shown(value)}, but must be a number.") from None


def _shown(value: Any) -> str:
    text = f"'{value[:60]}'" if isinstance(value, str) else repr(value)
    # A message is one line, whatever is in a prompt.
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return text if len(text) <= 60 else f"{text[:59]}…"
