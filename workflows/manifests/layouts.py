"""Columns by the names that common layouts give them, where these have one meaning.

Hugging Face's imagefolder names a picture in `file_name`; img2dataset holds it in `jpg` (or png, webp),
with its `caption` and `key`; a folder of pictures has captions in texts of the same names.
"""

from collections.abc import Collection, Sequence

IMAGE = "image"
FILE_NAME = "file_name"
CAPTION = "caption"
_HOLDING = ("jpg", "jpeg", "png", "webp")
_IMG2DATASET = {"key", CAPTION}


def picture_column(names: Collection[str], given: str | None = None) -> str:
    """The column that names or holds the picture of a row; `image` where nothing else is known."""
    if given or IMAGE in names:
        return given or IMAGE
    if FILE_NAME in names:
        return FILE_NAME
    holding = [name for name in _HOLDING if name in names and "key" in names]
    return holding[0] if holding else IMAGE


def id_column(names: Collection[str], given: str | None = None) -> str:
    """The column of ids; `id` where nothing else is known."""
    if given or "id" in names:
        return given or "id"
    return "key" if _is_img2dataset(names) else "id"


def prompt_column(names: Collection[str], task: str, prompt: str | None) -> str:
    """The column of prompts, if the run names none. prompt: what the run gives for all rows.

    A caption says what is in a picture. It is what `generate` and `edit` are to follow, unless the run says
    what that is, and never a question for `understand`.
    """
    captioned = _is_img2dataset(names) or set(names) == {"id", IMAGE, CAPTION}
    if "prompt" not in names and captioned and prompt is None and task != "understand":
        return CAPTION
    return "prompt"


def _is_img2dataset(names: Collection[str]) -> bool:
    return set(names) >= _IMG2DATASET and bool({"url", *_HOLDING} & set(names))


def has_pictures(names: Sequence[str] | None, given: str | None) -> bool:
    """Whether a table with these columns names or holds pictures; None, if it cannot be read, does."""
    return names is None or picture_column(names, given) in names or "custom_id" in names
