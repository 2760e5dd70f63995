"""Routes of the viewer, as a Starlette application behind `guard`.

Addresses name outputs, shards and rows by number, never by path. The only write is a vote. Knows nothing of
HTML.
"""

import contextlib
import functools
import hashlib
import io
import re
import urllib.parse
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from wallaroo.model.errors import InputError, RowError
from wallaroo.workflows.reports.gallery import fetch_source
from wallaroo.workflows.sources.decode import decode
from wallaroo.workflows.viewer import again, pages, votes
from wallaroo.workflows.viewer.guard import LOOPBACK, guard
from wallaroo.workflows.viewer.index import QueryError
from wallaroo.workflows.viewer.output import Output
from wallaroo.workflows.viewer.pages import HERE, STATIC
from wallaroo.workflows.viewer.state import Viewer

TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}
"""First bytes and MIME type of the files that are sent unchanged; all others are converted."""

THREADS = 8
"""Requests that are processed at once."""

SMALL_BYTES = 24 << 10
"""Pictures up to this size are sent unchanged in place of thumbnails."""


def make_app(viewer: Viewer, hosts: Sequence[str] | None = LOOPBACK, token: str | None = None) -> Any:
    """Returns the ASGI application.

    Args:
        viewer: What it shows.
        hosts: As for `guard`.
        token: As for `guard`.

    Returns:
        The guarded application.
    """

    def output_of(request: Request) -> Output:
        number = request.path_params["output"]
        if number >= len(viewer.outputs):
            raise HTTPException(404, "There is no such output.")
        return viewer.outputs[number]

    def home(request: Request) -> Response:
        return RedirectResponse("/0/" if viewer.comparison is None else "/compare", 303)

    def grid(request: Request) -> Response:
        return pages.grid(viewer, output_of(request), request)

    def live(request: Request) -> Response:
        output = output_of(request)
        viewer.keeper.seen()
        values = pages.common(viewer, request, output)
        html = pages.templates().get_template("live.html.j2").render(**values)
        progress = output.progress()
        state = {
            "html": html,
            "running": output.running,
            "shards": len(output.shards),
            "indexed": progress.indexed,
            "complete": progress.complete,
            "version": viewer.index.versions[output.number],
        }
        return JSONResponse(state, headers={"Cache-Control": "no-store"})

    def row(request: Request) -> Response:
        return pages.one_row(viewer, output_of(request), request)

    def picture(request: Request) -> Response:
        output = output_of(request)
        shard = output.shard(request.path_params["shard"])
        # The page says with `one` that it shows few pictures of this row group.
        one = request.query_params.get("v", "") if "one" in request.query_params else ""
        digest = one if re.fullmatch("[0-9a-f]{16}", one) else ""
        data = output.reader.picture(shard, request.path_params["position"], digest)
        if data is None:
            raise HTTPException(404, "This row has no image.")
        return _picture(data, request)

    def source(request: Request) -> Response:
        output = output_of(request)
        found = output.row(request.path_params["shard"], request.path_params["position"], small=True)
        reference = again.source_reference(found)
        digest = (found.get("source") or {}).get("sha256")
        with viewer.sources:
            data = fetch_source(reference) if reference else None
            # The file there now may differ from what the model was given, or be one that this output may not
            # name.
            if data is None or hashlib.sha256(data).hexdigest() != digest:
                raise HTTPException(404, "The source is missing, or has changed.")
            return _picture(data, request, always=True)

    def comparison(request: Request) -> Response:
        return pages.comparison(viewer, request)

    def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in STATIC:
            raise HTTPException(404, "There is no such file.")
        data = (HERE / "static" / name).read_bytes()
        return Response(data, media_type=STATIC[name], headers={"Cache-Control": "private, max-age=86400"})

    def touched(endpoint: Callable[[Request], Response]) -> Callable[[Request], Response]:
        @functools.wraps(endpoint)
        def noted(request: Request) -> Response:
            viewer.keeper.touched()
            return endpoint(request)

        return noted

    async def vote(request: Request) -> Response:
        return await _vote(viewer, request)

    place = "/{shard:int}/{position:int}"

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        # Every picture of a page is a request; more of them at once would only hold more memory.
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield

    app = Starlette(
        lifespan=lifespan,
        routes=[
            Route("/", touched(home)),
            Route("/compare", touched(comparison)),
            Route("/votes", vote, methods=["POST"]),
            Route("/static/{name}", static),
            Route("/{output:int}/", touched(grid)),
            # It is asked for again and again, so it does not count as a request that waits for pictures.
            Route("/{output:int}/live", live),
            Route("/{output:int}/rows" + place, touched(row)),
            Route("/{output:int}/pictures" + place, touched(picture)),
            Route("/{output:int}/sources" + place, touched(source)),
        ],
        exception_handlers={HTTPException: _refused, InputError: _failed, RowError: _failed},
    )
    return guard(app, hosts, token)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return pages.page_response("message.html.j2", error.status_code, message=str(error.detail))


async def _failed(request: Request, error: Exception) -> Response:
    words = str(error)
    return pages.page_response(
        "message.html.j2", 400 if isinstance(error, QueryError) else 404, message=words
    )


def _picture(data: bytes, request: Request, always: bool = False) -> Response:
    """Answers with a picture file, as a thumbnail of `w` pixels if the address says so.

    always: Convert the file even at full size.
    """
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    mime_type = next((kind for start, kind in TYPES.items() if data.startswith(start)), None)
    width = request.query_params.get("w", "")
    most = int(width) if width.isascii() and width.isdigit() and len(width) < 5 else 0
    if mime_type and not always and (not most or len(data) <= SMALL_BYTES):
        return Response(data, media_type=mime_type, headers=headers)
    image = decode(data, "The image")
    if mime_type and most and not always and max(image.size) <= most:
        return Response(data, media_type=mime_type, headers=headers)
    if most:
        image.thumbnail((most, most))
    sink = io.BytesIO()
    # Lossless at full size: a source is compared with its result.
    image.save(sink, "WEBP", **({"quality": 88} if most else {"lossless": True, "quality": 0, "method": 0}))
    return Response(sink.getvalue(), media_type="image/webp", headers=headers)


async def _vote(viewer: Viewer, request: Request) -> Response:
    if viewer.votes is None:
        raise HTTPException(404, "A comparison needs two outputs: wallaroo view OUTPUT OUTPUT2.")
    body = await _body(request)
    form = dict(urllib.parse.parse_qsl(body.decode(errors="replace"), keep_blank_values=True))
    letters = {chr(ord("a") + number): output.path for number, output in enumerate(viewer.outputs)}
    choices: dict[str, str | None] = {**letters, votes.TIE: votes.TIE, votes.BAD: votes.BAD, "none": None}
    choice = form.get("choice", "")
    if choice not in choices:
        raise HTTPException(400, f"choice is '{choice[:20]}', but must be one of {', '.join(choices)}.")
    try:
        key = votes.Key(form["id"], int(form["version"]), int(form["sample"]))
        if not (0 <= key.version < 2**31 and 0 <= key.sample < 2**31):
            raise ValueError
    except (KeyError, ValueError):
        raise HTTPException(400, "A vote needs id, version and sample of a row.") from None
    digests = form.get("sha256", "").split(",")
    await run_in_threadpool(viewer.votes.cast, key, digests, choices[choice])
    if "application/json" in request.headers.get("accept", ""):
        html = (
            pages.templates()
            .get_template("summary.html.j2")
            .render(
                summary=viewer.votes.summary(),
                outputs=viewer.outputs,
                letters=list(letters),
                votes_path=viewer.votes.path,
            )
        )
        return JSONResponse({"html": html})
    back = form.get("back", "")
    parts = urllib.parse.urlsplit(back)
    safe = parts.path == "/compare" and not parts.netloc and not parts.scheme
    return RedirectResponse(f"{back}#{form.get('anchor', '')}" if safe else "/compare", 303)


async def _body(request: Request, most: int = 64 << 10) -> bytes:
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise HTTPException(413, "The vote is too long.")
    return data
