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
    """The column that names or holds the picture of a row; `image` by default."""
    if given or IMAGE in names:
        return given or IMAGE
    if FILE_NAME in names:
        return FILE_NAME
    holding = [name for name in _HOLDING if name in names and "key" in names]
    holding += ["input_image"] if set(names) >= _GEDIT else []
    holding += [SEVERAL] if SEVERAL in names else []
    return holding[0] if holding else _other_case(names, IMAGE)


def _other_case(names: Collection[str], name: str) -> str:
    """The one column that differs from a name in upper and lower case alone; else the name."""
    same = [one for one in names if one.lower() == name]
    return same[0] if len(same) == 1 else name


def id_column(names: Collection[str], given: str | None = None) -> str:
    """The column of ids; `id` by default."""
    if given or "id" in names:
        return given or "id"
    if has_questions(names):
        return "item_id"
    return "key" if _is_img2dataset(names) or set(names) >= _GEDIT else "id"


def prompt_column(names: Collection[str], task: str, prompt: str | None) -> str:
    """The column of prompts, if the run names none. prompt: what the run gives for all rows.

    A caption says what is in a picture. It is what `generate` and `edit` are to follow, unless the run says
    what that is, and never a question for `understand`.
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
    """Whether a table with these columns names or holds pictures; None, if it cannot be read, does."""
    return names is None or picture_column(names, given) in names or "custom_id" in names
