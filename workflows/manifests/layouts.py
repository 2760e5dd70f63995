"""Columns by the names that common layouts give them, where these have one meaning.

Hugging Face's imagefolder names a picture in `file_name`; img2dataset holds it in `jpg` (or png, webp),
with its `caption` and `key`; a folder of pictures has captions in texts of the same names. GEdit-Bench has
`input_image`, `instruction` and `key`, and DPG-Bench's table of questions `item_id` and `text`. Chats have
`images`, lists of one picture each.
"""

from collections.abc import Collection, Sequence

IMAGE = "image"
FILE_NAME = "file_name"
SEVERAL = "images"
CAPTION = "caption"
_HOLDING = ("jpg", "jpeg", "png", "webp")
_IMG2DATASET = {"key", CAPTION}
_GEDIT = {"key", "input_image", "instruction"}
_DPG = {"item_id", "text", "question_natural_language"}


def picture_column(names: Collection[str], given: str | None = None) -> str:
    """Finds the column that names or holds the picture of a row.

    Args:
        names: Columns of the manifest.
        given: Column that the run names, or None.

    Returns:
        Name of the column; `image` if the layout is unknown.
    """
    if given or IMAGE in names:
        return given or IMAGE
    if FILE_NAME in names:
        return FILE_NAME
    holding = [name for name in _HOLDING if name in names and "key" in names]
    holding += ["input_image"] if set(names) >= _GEDIT else []
    holding += [SEVERAL] if SEVERAL in names else []
    return holding[0] if holding else _other_case(names, IMAGE)


def _other_case(names: Collection[str], name: str) -> str:
    """The only column that equals a name but for upper and lower case; otherwise the name itself."""
    same = [one for one in names if one.lower() == name]
    return same[0] if len(same) == 1 else name


def id_column(names: Collection[str], given: str | None = None) -> str:
    """Finds the column of ids.

    Args:
        names: Columns of the manifest.
        given: Column that the run names, or None.

    Returns:
        Name of the column; `id` if the layout is unknown.
    """
    if given or "id" in names:
        return given or "id"
    if has_questions(names):
        return "item_id"
    return "key" if _is_img2dataset(names) or set(names) >= _GEDIT else "id"


def prompt_column(names: Collection[str], task: str, prompt: str | None) -> str:
    """Finds the column of prompts, if the run names none.

    A caption describes a picture. `generate` and `edit` take it as the prompt unless the run gives one.
    `understand` never takes it as a question.

    Args:
        names: Columns of the manifest.
        task: Task of the run.
        prompt: Prompt that the run gives for all rows, or None.

    Returns:
        Name of the column; `prompt` if the layout is unknown.
    """
    if "prompt" in names or prompt is not None:
        return "prompt"
    if task == "understand":
        return "question" if "question" in names else _other_case(names, "prompt")
    if has_questions(names):
        return "text"
    if task == "edit" and set(names) >= _GEDIT:
        return "instruction"
    captioned = _is_img2dataset(names) or set(names) == {"id", IMAGE, CAPTION}
    return CAPTION if captioned else _other_case(names, "prompt")


def has_questions(names: Collection[str]) -> bool:
    """Whether a table has several rows of one prompt, each with a question about its pictures."""
    return set(names) >= _DPG


def _is_img2dataset(names: Collection[str]) -> bool:
    return set(names) >= _IMG2DATASET and bool({"url", *_HOLDING} & set(names))


def has_pictures(names: Sequence[str] | None, given: str | None) -> bool:
    """Tells whether a table names or holds pictures.

    Args:
        names: Columns of the table; None if it cannot be read.
        given: Column of pictures that the run names, or None.

    Returns:
        True also for a table that cannot be read, so that its own error is reported later.
    """
    return names is None or picture_column(names, given) in names or "custom_id" in names
