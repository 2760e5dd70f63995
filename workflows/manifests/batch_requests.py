"""Lines of OpenAI's batch format as rows of a manifest: one endpoint for each task."""

import json
import re
from typing import Any

from wallaroo.workflows.outputs.schema import MIME_TYPES

ENDPOINTS = {
    "generate": "/v1/images/generations",
    "edit": "/v1/images/edits",
    "understand": "/v1/chat/completions",
}
"""Task -> endpoint of its requests."""


def is_request(line: dict[str, Any]) -> bool:
    """Whether a JSON object is a line of OpenAI's batch format."""
    return "custom_id" in line and isinstance(line.get("body"), dict)


def row_of(line: dict[str, Any], task: str) -> tuple[dict[str, Any], str]:
    """Turns a request into a row: its body, with the names of our columns.

    Args:
        line: The JSON object of a line.
        task: Task of the run; empty for `generate`.

    Returns:
        The row, and why it cannot be served (empty if it can).
    """
    task = task or "generate"
    body, row = line["body"], {"id": line["custom_id"]}
    meant = {"generate": (), "edit": ("image", "images", "mask"), "understand": ("messages",)}[task]
    size = body.get("size")
    left_out = {"id", "n", *meant} | ({"size"} if task == "generate" else set())
    row |= {name: value for name, value in body.items() if name not in left_out}
    if body.get("n") is not None:
        row["samples"] = body["n"]
    if task == "generate" and size not in (None, "auto"):
        # The sizes of OpenAI's models differ from ours, so the nearest ratio is taken.
        row["aspect_ratio"] = re.sub(r"^(\d+)x(\d+)$", r"\1:\2", size) if isinstance(size, str) else size
    url = line.get("url")
    if url != ENDPOINTS[task]:
        other = next((name for name, path in ENDPOINTS.items() if path == url), "")
        hint = f", which `wallaroo {other}` serves" if other else ""
        return row, f"is a request to {json.dumps(url)}{hint}, but {task} serves only {ENDPOINTS[task]}"
    output_format = body.get("output_format")
    if task != "understand" and output_format is not None and output_format not in MIME_TYPES:
        forms = ", ".join(MIME_TYPES)
        return (
            row,
            f"asks for the output_format {json.dumps(output_format)[:60]}, but results are one of {forms}",
        )
    try:
        if task == "edit":
            row["image"] = _picture_to_edit(body)
        elif task == "understand":
            row |= _question(body.get("messages"))
    except ValueError as error:
        return row, str(error)
    return row, ""


def _picture_to_edit(body: dict[str, Any]) -> str:
    if body.get("mask") is not None:
        raise ValueError("is a request with a mask, but edit takes none")
    given = body.get("images") if body.get("image") is None else body["image"]
    several = given if isinstance(given, list) else [given]
    if len(several) != 1:
        raise ValueError(f"is a request with {len(several)} images, but edit takes one")
    return _address(several[0])


def _address(picture: Any) -> str:
    """Finds the path or address in one of the forms in which a request names a picture."""
    if isinstance(picture, dict):
        picture = picture.get("image_url", picture.get("url"))
        if isinstance(picture, dict):
            picture = picture.get("url")
    if not isinstance(picture, str) or not picture.strip():
        raise ValueError("is a request whose image has no address: give it as image_url or data URI")
    return picture


def _question(messages: Any) -> dict[str, Any]:
    """Prompt and image of a chat with one message."""
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise ValueError("is a request without a list of messages")
    roles = [str(one.get("role")) for one in messages]
    if roles != ["user"]:
        raise ValueError(
            f"is a request with messages of {', '.join(roles[:5]) or 'no one'}, but understand answers one "
            f"of the user"
        )
    content = messages[0].get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts, pictures = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image_url", "input_image"):
            pictures.append(_address(part))
        else:
            raise ValueError(f"is a request with content of the type {json.dumps(kind)}, which is not served")
    if len(pictures) != 1:
        raise ValueError(f"is a request with {len(pictures)} images, but understand takes one")
    return {"prompt": "\n".join(texts) or None, "image": pictures[0]}
