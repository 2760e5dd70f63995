"""Results as the lines of OpenAI's batch API."""

import base64
import functools
import hashlib
import json
import urllib.parse
from typing import Any

from wallaroo.model.errors import InputError
from wallaroo.workflows.datasets.export_files import Results, Row, place
from wallaroo.workflows.datasets.export_rows import SUFFIXES, Count, Options, picture_of, stem_of
from wallaroo.workflows.datasets.export_sink import Sink
from wallaroo.workflows.outputs.schema import MIME_TYPES, TEXT_TASKS
from wallaroo.workflows.outputs.values import json_line


def openai_batch(results: Results, sink: Sink, count: Count, options: Options) -> None:
    """Writes `results.jsonl`: a line per request, its body that of the images API or of chat completions.

    Raises:
        InputError: A request asks for an unknown output format.
    """
    write = _completions if results.task in TEXT_TASKS else _images
    write(results, sink, count, options)


def _completions(results: Results, sink: Sink, count: Count, options: Options) -> None:
    """A line per question; its samples are the choices. One without an answer has an `error`."""
    with sink.stream("results.jsonl") as lines:
        rows: list[Row] = []
        for row in results.rows(pictures=False):
            rows.append(row)
            if not row.followed:
                lines.write(json_line(_request(rows[0]) | _completion(rows)))
                count.exported += sum(row.ok for row in rows)
                rows = []


def _completion(rows: list[Row]) -> dict[str, Any]:
    made = [row.values for row in rows if row.ok]
    failed = [row.values for row in rows if not row.ok]
    error = None
    if failed:
        message = failed[0]["error_message"]
        if len(rows) > 1:
            message = f"{len(failed)} of {len(rows)} answers failed: {message}"
        error = {"code": failed[0]["error_type"], "message": message}
    if not made:
        return {"response": None, "error": error}
    number = _request(rows[0])["id"].removeprefix("batch_req_")
    prompt, output = made[0]["prompt_tokens"] or 0, sum(one["output_tokens"] or 0 for one in made)
    body = {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": _created(made[0]),
        "model": made[0]["model_digest"],
        "choices": [
            {
                "index": one["sample"],
                "message": {"role": "assistant", "content": one["text"], "refusal": None},
                "logprobs": None,
                "finish_reason": one["finish_reason"],
            }
            for one in made
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output},
    }
    return {"response": {"status_code": 200, "request_id": f"req_{number}", "body": body}, "error": error}


def _created(values: dict[str, Any]) -> int:
    """When a row was made, in seconds since 1970."""
    return int(values["started_at"].timestamp()) if values["started_at"] else 0


def _images(results: Results, sink: Sink, count: Count, options: Options) -> None:
    """`results.jsonl`: a line a request in the shape of OpenAI's batch API, its body that of the images API.

    A request of which samples failed has an `error`, and a `response` only if others did not fail. Lines
    are written piece by piece: one may hold thousands of pictures.
    """
    with sink.stream("results.jsonl") as lines:
        made, failed = 0, 0
        error: dict[str, str] | None = None
        for row in results.rows():
            if row.ok:
                form = _format_of(results, row)
                lines.write(b", " if made else _line_to_data(row, form))
                lines.write(json.dumps(_datum(row, form, sink, count, options)).encode())
                made += 1
                count.exported += 1
            else:
                code, message = row.values["error_type"], row.values["error_message"]
                error = error or {"code": code, "message": message}
                failed += 1
            if row.followed:
                continue
            if error and made + failed > 1:
                error["message"] = f"{failed} of {made + failed} images failed: {error['message']}"
            if made:
                lines.write(b"]}}, " + json_line({"error": error})[1:])
            else:
                lines.write(json_line(_request(row) | {"response": None, "error": error}))
            made, failed, error = 0, 0, None


def _request(row: Row) -> dict[str, str]:
    """The beginning of a line."""
    row_id, version, _ = place(row.values)
    number = hashlib.sha256(f"{version} {row_id}".encode("utf-8", "surrogatepass")).hexdigest()[:24]
    return {"id": f"batch_req_{number}", "custom_id": row_id}


def _format_of(results: Results, row: Row) -> str:
    """The format of a row's pictures: the one that its request asks for, else the one of the run."""
    stored = row.values["mime_type"].removeprefix("image/")
    output_format = results.own_value(row, "output_format", stored)
    if output_format not in MIME_TYPES:
        raise InputError(
            f"output_format of the request '{row.values['id'][:60]}' is '{output_format}', but must be one "
            f"of {', '.join(MIME_TYPES)}: correct the manifest and run it again."
        )
    return output_format


def _line_to_data(row: Row, form: str) -> bytes:
    """A line with a response, up to its first picture."""
    values, request = row.values, _request(row)
    body = {
        "created": _created(values),
        "size": f"{values['width']}x{values['height']}",
        "output_format": form,
        "data": [],
    }
    response = {"status_code": 200, "request_id": request["id"].removeprefix("batch_"), "body": body}
    return json_line(request | {"response": response}).rstrip().removesuffix(b"]}}}")


def _datum(row: Row, form: str, sink: Sink, count: Count, options: Options) -> dict[str, str]:
    """A picture as the images API returns it."""
    data = picture_of(row, options, form)
    if options.image_urls is None:
        return {"b64_json": base64.b64encode(data).decode()}
    name = f"images/{stem_of(row, count)}.{SUFFIXES[MIME_TYPES[form]]}"
    sink.put(name, functools.partial(bytes, data), len(data))
    return {"url": f"{options.image_urls.rstrip('/')}/{urllib.parse.quote(name)}"}
