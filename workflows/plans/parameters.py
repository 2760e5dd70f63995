"""The parameters of one row: resolved from its cells and the settings of the run, and checked.

All faults of a row are found, and the values that can be read are kept. Knows one row, and no table.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from wallaroo.model.config import LANGUAGES, ModelConfig
from wallaroo.model.errors import RowError, did_you_mean
from wallaroo.model.prompts import DEFAULT_QUESTION, detect_language
from wallaroo.model.tokenizer import Tokenizer
from wallaroo.workflows.manifests.types import KNOWN_COLUMNS
from wallaroo.workflows.outputs.values import jsonable
from wallaroo.workflows.plans.columns import GIVEN, RAW
from wallaroo.workflows.plans.settings import PlanSettings
from wallaroo.workflows.plans.values import (
    INT32,
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

_SAMPLING = ("cfg", "temperature", "top_k", "top_p")

Value = TypeVar("Value")


@dataclass(slots=True)
class _Faults:
    """The faults of a row, in the order in which they are found."""

    found: list[RowError] = field(default_factory=list)
    """The first one gives the kind of the error row."""

    def attempt(self, function: Callable[..., Value], *arguments: Any, **named: Any) -> Value | None:
        """Calls a function. Returns None, and keeps the fault, if it raises a RowError."""
        try:
            return function(*arguments, **named)
        except RowError as fault:
            self.found.append(fault)
            return None

    def sentence(self) -> str:
        """All faults in one sentence; empty without any."""
        if not self.found:
            return ""
        return "; also, ".join(str(fault).removesuffix(".") for fault in self.found) + "."


@dataclass(frozen=True)
class RowResolver:
    """Resolves the parameters of rows, one at a time."""

    settings: PlanSettings
    """Settings of the run, for what a row does not give."""
    config: ModelConfig
    """Configuration of the model, with its table of sizes."""
    tokenizer: Tokenizer
    """Tokenizer of the model."""
    allowed: SourceOptions
    """Where pictures may come from."""

    def resolve(
        self, values: Mapping[str, Any], error: RowError | None = None, raw: str | None = None
    ) -> dict[str, Any]:
        """Resolves the parameters of a row.

        Args:
            values: Parameter -> cell, of the columns that the manifest has.
            error: What is known to be wrong with the row. If the row cannot be read, no other fault is
                reported, as others follow from it.
            raw: Text of a row of which no value can be read.

        Returns:
            `status` to `top_p` and GIVEN of PLAN_FIELDS, and `source`.
        """
        faults = _Faults([error] if error else [])
        faults.attempt(samples_of, values.get("samples"), self.settings)
        prompt = self._prompt(values, faults)
        width, height, source = self._picture(values, faults)
        language = faults.attempt(language_of, values.get("language"), prompt, self.settings)
        seed = faults.attempt(integer, "seed", values.get("seed"), "seed", range(SEEDS))
        sampling = self._sampling(values, faults)
        if error and error.kind == "manifest":
            faults = _Faults([error])
        resolved = {
            "status": "error" if faults.found else "planned",
            "error_type": faults.found[0].kind if faults.found else "",
            "error_message": faults.sentence(),
            "prompt": prompt if isinstance(prompt, str) else None,
            "width": width,
            "height": height,
            "language": language,
            "seed": seed,
            "source": source,
            **sampling,
        }
        return resolved | {GIVEN: _given(values, resolved, self.settings.task, raw) if faults.found else None}

    def _prompt(self, values: Mapping[str, Any], faults: _Faults) -> Any:
        """The prompt of a row: a text, or what stands in its place."""
        settings, prompt = self.settings, values.get("prompt")
        if settings.task in PICTURE_TASKS and is_absent(prompt):
            prompt = settings.prompt or _question(values.get("language"), settings) or prompt
        if settings.strip_quotes and isinstance(prompt, str):
            prompt = without_quotes(prompt)
        faults.attempt(check_prompt, prompt, settings, self.tokenizer)
        return prompt

    def _picture(
        self, values: Mapping[str, Any], faults: _Faults
    ) -> tuple[int | None, int | None, dict[str, Any] | None]:
        """Width and height of a row in pixels, and its source if the task reads one."""
        width = faults.attempt(integer, "width", values.get("width"), "size", INT32)
        height = faults.attempt(integer, "height", values.get("height"), "size", INT32)
        if self.settings.task in PICTURE_TASKS:
            reference = faults.attempt(single, values.get(COLUMN))
            source = _source(reference)
            if reference is not None or not faults.found:
                faults.attempt(_locate, source, reference, self.allowed)
            return width, height, source
        ratio = values.get("aspect_ratio")
        if width is None and height is None and is_absent(ratio):
            width, height = self.settings.width, self.settings.height
        size = None
        if (width is None) == (height is None) or not any(fault.kind == "size" for fault in faults.found):
            # That one of two numbers is missing is no fault where it could not be read.
            size = faults.attempt(size_of, width, height, ratio, self.config)
        return (width, height, None) if size is None else (size.width, size.height, None)

    def _sampling(self, values: Mapping[str, Any], faults: _Faults) -> dict[str, float | int | None]:
        """`cfg`, `temperature`, `top_k` and `top_p` of a row; None for a value that a plan cannot hold."""
        if values.keys().isdisjoint(_SAMPLING):
            sampling, found = self._default_sampling
            faults.found += found
            return sampling
        return self._checked_sampling(values, faults)

    @functools.cached_property
    def _default_sampling(self) -> tuple[dict[str, float | int | None], list[RowError]]:
        """Sampling, and its faults, of every row of a manifest without columns of these names."""
        faults = _Faults()
        return self._checked_sampling({}, faults), faults.found

    def _checked_sampling(self, values: Mapping[str, Any], faults: _Faults) -> dict[str, float | int | None]:
        defaults = self.settings.sampling
        sampling: dict[str, float | int | None] = {
            name: faults.attempt(real_number, name, values.get(name), getattr(defaults, name))
            for name in _SAMPLING
        }
        top_k, cfg = sampling["top_k"], sampling["cfg"]
        if top_k is not None and math.isfinite(top_k) and top_k == int(top_k):
            sampling["top_k"] = int(top_k)
        for name, value in sampling.items():
            if value is not None:
                # Each alone, so that every wrong one is reported.
                faults.attempt(check_sampling, **{name: value})
        if self.settings.task == "understand" and (cfg or 0) > 1:
            words = f"cfg is {cfg:g}, but answers have no guidance; give at most 1."
            faults.found.append(RowError("sampling", words))
        # `in` would compare a float with each of the 2^32 numbers of the range.
        if not (isinstance(sampling["top_k"], int) and sampling["top_k"] in INT32):
            sampling["top_k"] = None
        # JSON has no NaN, so a plan has none either.
        return {name: is_finite(value) for name, value in sampling.items()}


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


def _given(values: Mapping[str, Any], resolved: dict[str, Any], task: str, raw: str | None) -> str:
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
