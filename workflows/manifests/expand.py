"""Prompt sets: templates and lists of values become a manifest, one row for every combination.

A row's id depends on nothing but the row itself, so rows keep their ids when a list grows. Knows nothing of
models, and of manifests only how one is written.
"""

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from wallaroo.model.config import LANGUAGES
from wallaroo.model.errors import InputError, did_you_mean
from wallaroo.model.prompts import detect_language
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.types import KNOWN_COLUMNS
from wallaroo.workflows.outputs.schema import RESULT_NAMES
from wallaroo.workflows.outputs.values import canonical_json
from wallaroo.workflows.settings import OptionError

MAX_PROMPTS = 10_000_000
"""Most rows to write. `sample` may choose them from any number."""

BATCH_ROWS = 8192
"""Rows of a row group."""
ID_LETTERS = 20
"""Hexadecimal digits of an id."""

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(\w+)\}")
_PARAMETERS = frozenset(KNOWN_COLUMNS["generate"]) - {"prompt", "id", "language"}


@dataclass(frozen=True)
class _Template:
    """A template, and the lists it uses: names in order, and for each its values."""

    text: str
    language: str
    names: tuple[str, ...]
    lists: tuple[tuple[str, ...], ...]

    @property
    def rows(self) -> int:
        return math.prod(map(len, self.lists))

    def row(self, number: int) -> dict[str, str]:
        """One combination; the last list changes fastest."""
        chosen = {}
        for name, values in zip(reversed(self.names), reversed(self.lists), strict=True):
            number, place = divmod(number, len(values))
            chosen[name] = values[place]
        prompt = _PLACEHOLDER.sub(lambda match: chosen[match[1]] if match[1] else match[0][0], self.text)
        ordered = {name: chosen[name] for name in self.names}
        parameters = {name: value for name, value in ordered.items() if name in _PARAMETERS}
        what = {"prompt": prompt, "language": self.language, **parameters}
        row_id = hashlib.sha256(canonical_json(what)).hexdigest()[:ID_LETTERS]
        return {"id": row_id, "prompt": prompt, "language": self.language, **ordered}


def expand(
    templates: Sequence[str],
    lists: Mapping[str, Sequence[str]],
    output: str,
    sample: int | None = None,
    seed: int = 0,
) -> int:
    """Writes the manifest of all combinations of templates and values, or of a sample of them.

    The output has the columns `id`, `prompt`, `language` and one for each name. The id is a digest of prompt,
    language and parameters; combinations with one id are written once. Rows keep the order of templates and
    lists, sampled or not.

    Args:
        templates: Texts with `{name}` for a value; `{{` and `}}` are braces.
        lists: Name -> values. `name.zh` and `name.en` replace them in templates of that language, which is
            detected from the template. A name that no template has must be a parameter of `generate`, such as
            `cfg`. It becomes a column like the others, and a part of the id.
        output: Path of a .parquet or .jsonl file, local or on S3.
        sample: Number of combinations to draw; all if None.
        seed: Seed of the draw.

    Returns:
        Number of rows written.

    Raises:
        OptionError: A placeholder has no list, a list is not used, or there are too many rows.
    """
    if not output.endswith((".parquet", ".jsonl")):
        raise OptionError(f"The output {output} must end in .parquet or .jsonl: name it so.")
    parsed = _parse(templates, lists)
    total = sum(template.rows for template in parsed)
    if sample is not None and sample < 1:
        raise OptionError(f"sample is {sample}, but must be at least 1.")
    count = total if sample is None else min(sample, total)
    if count > MAX_PROMPTS:
        raise OptionError(
            f"The templates give {total:,} prompts, but at most {MAX_PROMPTS:,} are written: "
            f"shorten the lists, or draw fewer with --sample."
        )
    names = list(dict.fromkeys(name for template in parsed for name in template.names))
    schema = pa.schema([(name, pa.string()) for name in ("id", "prompt", "language", *names)])
    rows = _distinct(_rows(parsed, range(total) if count == total else draw(total, count, seed)))
    written = 0
    with tempfile.TemporaryFile() as file:
        if output.endswith(".jsonl"):
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                written += 1
        else:
            written = _write_parquet(file, rows, schema)
        file.seek(0)
        if not storage.is_s3(output):
            os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
        with storage.write_stream(output) as stream:
            shutil.copyfileobj(file, stream)
    return written


def _write_parquet(file: IO[bytes], rows: Iterator[dict[str, str]], schema: pa.Schema) -> int:
    written = 0
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while batch := list(itertools.islice(rows, BATCH_ROWS)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            written += len(batch)
    return written


def draw(total: int, count: int, seed: int) -> list[int]:
    """Draws distinct numbers. Equal arguments give the same numbers on any machine.

    Args:
        total: The numbers are less than this.
        count: How many to draw.
        seed: Seed of the draw.

    Returns:
        The numbers, ascending.
    """
    if count > total // 2:
        left_out = set(draw(total, total - count, seed))
        return [number for number in range(total) if number not in left_out]
    drawn: set[int] = set()
    for turn in itertools.count():
        if len(drawn) == count:
            break
        drawn.add(int.from_bytes(hashlib.sha256(f"{seed} {turn}".encode()).digest()) % total)
    return sorted(drawn)


def _rows(templates: Sequence[_Template], numbers: Sequence[int]) -> Iterator[dict[str, str]]:
    ends = list(itertools.accumulate(template.rows for template in templates))
    index = 0
    for number in numbers:
        while number >= ends[index]:
            index += 1
        yield templates[index].row(number - ends[index] + templates[index].rows)


def _distinct(rows: Iterator[dict[str, str]]) -> Iterator[dict[str, str]]:
    seen = set()
    for row in rows:
        key = bytes.fromhex(row["id"])
        if key not in seen:
            seen.add(key)
            yield row


def _parse(templates: Sequence[str], lists: Mapping[str, Sequence[str]]) -> list[_Template]:
    if not templates:
        raise OptionError("There is no template: give at least one.")
    checked = _checked(lists)
    used: set[str] = set()
    parsed = []
    for text in templates:
        plain = _PLACEHOLDER.sub("", text)
        stray = re.search(r"[{}]", plain)
        if stray:
            raise OptionError(
                f"The template '{text}' has a lone '{stray[0]}': write {{name}} for a value, "
                f"and {stray[0] * 2} for the brace itself."
            )
        language = detect_language(plain) if re.search(r"\w", plain) else "en"
        inner = [match[1] for match in _PLACEHOLDER.finditer(text) if match[1]]
        names = tuple(dict.fromkeys([*inner, *(name for name in checked if name in _PARAMETERS)]))
        chosen = []
        for name in names:
            values = checked.get(name, {}).get(language) or checked.get(name, {}).get("")
            if values is None:
                hint = did_you_mean(name, checked) or f": give one with --set {name}=..."
                raise OptionError(
                    f"The template '{text}' ({language}) has {{{name}}}, but there is no list for it{hint}"
                )
            chosen.append(values)
        used.update(names)
        parsed.append(_Template(text, language, names, tuple(chosen)))
    for name in checked:
        if name not in used:
            hint = did_you_mean(name, {*used, *_PARAMETERS}) or ": put it into one, or leave the list out."
            raise OptionError(f"The list '{name}' is used by no template{hint}")
    return parsed


def _checked(lists: Mapping[str, Sequence[str]]) -> dict[str, dict[str, tuple[str, ...]]]:
    """Name -> language ("" for any) -> distinct values."""
    checked: dict[str, dict[str, tuple[str, ...]]] = {}
    for full, values in lists.items():
        name, mark, language = full.partition(".")
        if mark and language not in LANGUAGES:
            raise OptionError(
                f"The list '{full}' is for the language '{language}', but only {', '.join(LANGUAGES)} exist."
            )
        if not re.fullmatch(r"\w+", name) or name in ("id", "prompt", "language"):
            raise OptionError(
                f"A list cannot be named '{name}': take letters, digits and _, and another word."
            )
        if name in RESULT_NAMES and name not in _PARAMETERS:
            raise OptionError(f"A list cannot be named '{name}', which is a column of results: take another.")
        distinct = tuple(dict.fromkeys(value.strip() for value in values if value.strip()))
        if not distinct:
            raise OptionError(f"The list '{full}' has no values: give at least one.")
        checked.setdefault(name, {})[language] = distinct
    return checked


def read_list(path: str) -> list[str]:
    """Reads the values of a text file, one a line. Blank lines are left out.

    Args:
        path: Local or `s3://` path.

    Returns:
        The values, without white space around them.

    Raises:
        InputError: There is no such file, or it is not UTF-8.
    """
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"There is no file {path}: give a text file with a value a line.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not valid UTF-8: save it as UTF-8.") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
