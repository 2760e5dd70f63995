"""Results as the lines of OpenAI's batch API."""

import base64
import functools
import hashlib
import json
import urllib.parse

from wallaroo.workflows.datasets.export_files import Results, Row, Sink, place
from wallaroo.workflows.datasets.export_rows import SUFFIXES, Count, Options, picture_of, stem_of
from wallaroo.workflows.outputs.values import json_line


def openai_batch(results: Results, sink: Sink, count: Count, options: Options) -> None:
    """`results.jsonl`: a line a request in the shape of OpenAI's batch API, its body that of the images API.

    A request of which samples failed has an `error`, and a `response` only if others did not fail. Lines
    are written piece by piece: one may hold thousands of pictures.
    """
    with sink.stream("results.jsonl") as lines:
        made, failed = 0, 0
        error: dict[str, str] | None = None
        for row in results.rows():
            if row.ok:
                lines.write(b", " if made else _line_to_data(row))
                lines.write(json.dumps(_datum(row, sink, count, options)).encode())
                made += 1
                count.exported += 1
            else:
                code, message = row.values["error_type"], row.values["error_message"]
                error = error or {"code": code, "message": message}
                failed += 1
            if row.followed:
                continue
            if error and made + failed > 1:
                error["message"] = f"{failed} of {made + failed} pictures failed: {error['message']}"
            if made:
                lines.write(b"]}}, " + json_line({"error": error})[1:])
            else:
                lines.write(json_line(_request(row) | {"response": None, "error": error}))
            made, failed, error = 0, 0, None


def _request(row: Row) -> dict[str, str]:
    """How a line begins."""
    row_id, version, _ = place(row.values)
    number = hashlib.sha256(f"{version} {row_id}".encode("utf-8", "surrogatepass")).hexdigest()[:24]
    return {"id": f"batch_req_{number}", "custom_id": row_id}


def _line_to_data(row: Row) -> bytes:
    """A line with a response, up to where its first picture stands."""
    values, request = row.values, _request(row)
    body = {
        "created": int(values["started_at"].timestamp()) if values["started_at"] else 0,
        "size": f"{values['width']}x{values['height']}",
        "output_format": values["mime_type"].removeprefix("image/"),
        "data": [],
    }
    response = {"status_code": 200, "request_id": request["id"].removeprefix("batch_"), "body": body}
    return json_line(request | {"response": response}).rstrip().removesuffix(b"]}}}")


def _datum(row: Row, sink: Sink, count: Count, options: Options) -> dict[str, str]:
    """A picture in the words of the images API."""
    data = picture_of(row, options)
    if options.image_urls is None:
        return {"b64_json": base64.b64encode(data).decode()}
    name = f"images/{stem_of(row, count)}.{SUFFIXES[row.values['mime_type']]}"
    sink.put(name, functools.partial(bytes, data), len(data))
    return {"url": f"{options.image_urls.rstrip('/')}/{urllib.parse.quote(name)}"}
