"""Rows of VLMEvalKit's TSV files: a question with its options becomes a prompt, its picture an `image`.

The picture is base64, the index of another row that has the same one, or a list as Python writes it.
"""

import re
import string
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from wallaroo.workflows.manifests.types import ManifestFile
from wallaroo.workflows.sources.embedded import COLUMN

_PATH = "image_path"
MAX_REFERENCE_CHARACTERS = 64
"""Most characters of the index of a row; a longer value is a picture."""


def is_questions(names: Collection[str], file: ManifestFile) -> bool:
    """Tells whether a file is a table of VLMEvalKit that `understand` reads.

    Args:
        names: Columns of the file.
        file: The file.

    Returns:
        True if it is.
    """
    named = {"index", "question"} <= set(names) and bool({COLUMN, _PATH} & set(names))
    return named and file.format == "tsv" and file.task == "understand" and "prompt" not in names


def question_columns(names: Collection[str]) -> list[str]:
    """Columns of the rows that `question_row` makes of a table with these columns."""
    return list(dict.fromkeys([*names, "id", "prompt", COLUMN]))


def question_row(
    values: Mapping[str, str], shared: Callable[[], Mapping[str, str]]
) -> tuple[dict[str, Any], str]:
    """Turns a row of VLMEvalKit into one for `understand`.

    Args:
        values: The row, column -> text.
        shared: Returns what `shared_pictures` finds in the file.

    Returns:
        The row with `id`, `prompt` and `image`, and what is wrong with it (empty if nothing is).
    """
    row: dict[str, Any] = {"id": values["index"], **values, "prompt": _prompt(values)}
    pictures = _listed(values.get(COLUMN, "")) or _listed(values.get(_PATH, ""))
    if len(pictures) > 1:
        return row | {COLUMN: None}, f"has {len(pictures)} images, but understand takes one"
    picture = pictures[0] if pictures else ""
    if picture and len(picture) <= MAX_REFERENCE_CHARACTERS:
        found = shared().get(picture)
        if found is None and picture.isdigit():
            return row | {COLUMN: None}, f"has the image of row {picture}, which has none"
        picture = found or picture
    return row | {COLUMN: picture or None}, ""


def _prompt(values: Mapping[str, str]) -> str | None:
    """Builds the prompt as VLMEvalKit does: hint, question and options, or the question alone."""
    question, hint = values["question"], values.get("hint", "")
    options = [f"{name}. {values[name]}" for name in string.ascii_uppercase if values.get(name)]
    lines = [f"Hint: {hint}"] if hint else []
    if options:
        lines += [f"Question: {question}", "Options:", *options]
        lines.append("Please select the correct answer from the options above.")
    else:
        lines.append(question)
    return "\n".join(lines).strip() or None


def _listed(text: str) -> list[str]:
    """The pictures of a cell, which may be a list in Python's syntax."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return [one or other for one, other in re.findall(r"'([^']*)'|\"([^\"]*)\"", text)]
    return [text] if text else []


def shared_pictures(rows: Callable[[], Iterator[dict[str, str]]]) -> dict[str, str]:
    """Finds the pictures that other rows refer to.

    Args:
        rows: Begins to read the rows of a file; called twice.

    Returns:
        Index of the row that has the picture -> the picture in base64.
    """
    cells = (row.get(COLUMN, "") for row in rows())
    named = {cell.strip() for cell in cells if len(cell) <= MAX_REFERENCE_CHARACTERS}
    return {
        row["index"]: row[COLUMN]
        for row in rows()
        if row["index"] in named and len(row.get(COLUMN, "")) > MAX_REFERENCE_CHARACTERS
    }
