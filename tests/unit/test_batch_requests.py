"""Lines of OpenAI's batch format: which task serves which endpoint, and what of a request is a row."""

import json

import pytest

from wallaroo.workflows.manifests.batch_requests import ENDPOINTS
from wallaroo.workflows.manifests.discover import discover
from wallaroo.workflows.manifests.read import read, scan
from wallaroo.workflows.manifests.schema import Columns


def rows_of(path, task, *lines):
    """Rows and faults of a manifest of these lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (file,) = discover(str(path), task).files
    columns, found = Columns(), scan(file)
    columns.add(0, file.path, found)
    rows, faults = [], {}
    for piece in found.pieces:
        for batch in read(piece, columns.schema()):
            rows += batch.table.to_pylist()
            faults |= batch.faults
    return rows, faults


def request(task, body, name="r"):
    return {"custom_id": name, "method": "POST", "url": ENDPOINTS[task], "body": body}


def chat(*content, **body):
    return request("understand", {"messages": [{"role": "user", "content": list(content)}], **body})


def picture(url):
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


TEXT = {"type": "text", "text": "what is it?"}


@pytest.mark.parametrize(
    "given",
    [
        {"image": "a.png"},
        {"image": ["a.png"]},
        {"images": [{"image_url": "a.png"}]},
        {"images": [{"image_url": {"url": "a.png"}}]},
        {"image": {"url": "a.png"}},
    ],
)
def test_edits(tmp_path, given):
    body = {"prompt": "make it red", "n": 2, "size": "1024x1024", "model": "m", **given}
    (row,), faults = rows_of(tmp_path / "m.jsonl", "edit", request("edit", body))
    assert not faults
    assert row == {
        "id": "r",
        "prompt": "make it red",
        "image": "a.png",
        "samples": 2,
        "size": "1024x1024",
        "model": "m",
    }


def test_chats_with_a_picture(tmp_path):
    lines = [
        chat(TEXT, picture("https://x.org/a.png"), max_tokens=50, temperature=0.5),
        chat(picture("data:image/png;base64,AA=="), TEXT, {"type": "text", "text": "in short"}),
        chat(picture("a.png")),
        chat({"type": "input_text", "text": "why?"}, {"type": "input_image", "image_url": "b.png"}),
    ]
    rows, faults = rows_of(tmp_path / "m.jsonl", "understand", *lines)
    assert not faults and "messages" not in rows[0]
    assert [(row["prompt"], row["image"]) for row in rows] == [
        ("what is it?", "https://x.org/a.png"),
        ("what is it?\nin short", "data:image/png;base64,AA=="),
        (None, "a.png"),
        ("why?", "b.png"),
    ]
    assert (rows[0]["max_tokens"], rows[0]["temperature"]) == (50, 0.5)


@pytest.mark.parametrize(
    ("task", "line", "words"),
    [
        (
            "generate",
            request("edit", {"prompt": "x"}),
            "which `wallaroo edit` serves, but generate serves only",
        ),
        (
            "edit",
            request("generate", {"prompt": "x"}),
            "which `wallaroo generate` serves, but edit serves only",
        ),
        (
            "understand",
            {**chat(TEXT), "url": "/v1/embeddings"},
            'is a request to "/v1/embeddings", but understand',
        ),
        ("understand", {**chat(TEXT), "url": "/v1/responses"}, 'is a request to "/v1/responses", but'),
        (
            "edit",
            {"custom_id": "r", "body": {}},
            "is a request to null, but edit serves only /v1/images/edits",
        ),
        (
            "generate",
            request("generate", {"prompt": "x", "output_format": "gif"}),
            'asks for the output_format "gif", but results are one of png, webp, jpeg',
        ),
        (
            "generate",
            request("generate", {"prompt": "x", "output_format": 1}),
            "asks for the output_format 1,",
        ),
        ("edit", request("edit", {"image": "a", "output_format": "PNG"}), 'the output_format "PNG", but'),
        ("edit", request("edit", {"prompt": "x"}), "whose image has no address"),
        ("edit", request("edit", {"image": ["a", "b"]}), "2 images, but edit takes one"),
        ("edit", request("edit", {"image": []}), "0 images, but edit takes one"),
        ("edit", request("edit", {"image": "a", "mask": "b"}), "with a mask, but edit takes none"),
        ("edit", request("edit", {"images": [{"file_id": "f"}]}), "whose image has no address"),
        ("understand", chat(TEXT), "0 images, but understand takes one"),
        ("understand", chat(picture("a"), picture("b")), "2 images, but understand takes one"),
        ("understand", chat({"type": "input_audio"}), 'content of the type "input_audio"'),
        ("understand", request("understand", {"messages": "x"}), "without a list of messages"),
        ("understand", request("understand", {"messages": []}), "messages of no one"),
        (
            "understand",
            request("understand", {"messages": [{"role": "system", "content": "x"}, {"role": "user"}]}),
            "messages of system, user",
        ),
    ],
)
def test_other_requests_are_faults_of_their_rows(tmp_path, task, line, words):
    fine = {"generate": request("generate", {"prompt": "x"}), "edit": request("edit", {"image": "a"})}
    fine["understand"] = chat(picture("a"))
    rows, faults = rows_of(tmp_path / "m.jsonl", task, line, fine[task])
    assert list(faults) == [0] and words in faults[0] and "\n" not in faults[0]
    assert rows[0]["id"] == rows[1]["id"] == "r"


def test_formats_that_results_may_have_are_asked_for(tmp_path):
    formats = ["png", "webp", "jpeg", None]
    lines = [request("generate", {"prompt": "x", "output_format": form}) for form in formats]
    # An answer is no picture, whatever its request says.
    rows, faults = rows_of(tmp_path / "m.jsonl", "generate", *lines)
    assert not faults and [row["output_format"] for row in rows] == formats
    assert not rows_of(tmp_path / "c.jsonl", "understand", chat(picture("a"), output_format="gif"))[1]
