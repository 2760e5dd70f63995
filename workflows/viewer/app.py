"""Addresses and pages of the viewer, as a Starlette application.

Whoever asks is checked first (`guard`): by the Host header, which a page of another site that has its name
resolve to this machine cannot forge; by where the browser says that the request comes from; and by a token
where the viewer listens for other machines. The only write is a vote, and only from a page of our own.
An address names outputs, shards and rows by number, never a path.
"""

import contextlib
import functools
import hashlib
import io
import secrets
import threading
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio.to_thread
import jinja2
from starlette.applications import Starlette
from starlette.datastructures import URL
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from wallaroo.model.errors import InputError, RowError
from wallaroo.workflows.outputs.schema import TEXT_TASKS
from wallaroo.workflows.reports.gallery import fetch_source
from wallaroo.workflows.sources.decode import decode
from wallaroo.workflows.text import duration
from wallaroo.workflows.viewer import again, compare, votes
from wallaroo.workflows.viewer.index import Index, QueryError
from wallaroo.workflows.viewer.output import Keeper, Output, Page, describe
from wallaroo.workflows.viewer.query import RANDOM, Place, Query

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
COOKIE = "wallaroo-view"
TILES = {"s": (96, 120), "m": (48, 200), "l": (24, 320)}
"""Size of tiles -> rows of a page, pixels of a tile."""

PAIRS = 12
"""Pairs of a page of a comparison."""

TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}
"""How files begin that are sent as they are; no other is."""

THREADS = 8
"""Requests that are worked on at once."""

SMALL_BYTES = 24 << 10
"""Pictures of so few bytes are sent whole, not as thumbnails."""

STATIC = {"view.css": "text/css; charset=utf-8", "view.js": "text/javascript; charset=utf-8"}
HERE = Path(__file__).parent

POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer, with which browsers say `Origin: null` of our own forms.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Viewer:
    """What the pages show: outputs with their index, and votes."""

    def __init__(self, paths: Sequence[str], votes_path: str | None = None) -> None:
        """Raises InputError where a path is no output, or the file of votes is another one."""
        self.index = Index(paths)
        try:
            self.outputs = [Output(number, path, self.index) for number, path in enumerate(paths)]
            self.comparison: compare.Comparison | None = None
            self.votes: votes.Votes | None = None
            if len(self.outputs) > 1:
                self.comparison = compare.Comparison(self.index, self.outputs)
                where = votes_path or votes.default_path(self.outputs[0].path)
                self.votes = votes.Votes(where, [output.path for output in self.outputs])
        except BaseException:
            self.index.close()
            raise
        self.keeper = Keeper(self.outputs)
        self._counts: dict[Any, Any] = {}
        self._guard = threading.Lock()
        self._sources = threading.BoundedSemaphore(2)

    def close(self) -> None:
        """Ends the thread and closes the index."""
        self.keeper.stop()
        self.index.close()

    def remembered(self, key: Any, action: Callable[[], Any]) -> Any:
        """What `action` gave for the same key, which names the version of the index too."""
        with self._guard:
            if key in self._counts:
                return self._counts[key]
        value = action()
        with self._guard:
            if len(self._counts) >= 32:
                self._counts.pop(next(iter(self._counts)))
            self._counts[key] = value
        return value


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda number: "?" if number is None else f"{number:,}"
    environment.filters["duration"] = duration
    environment.filters["percent"] = lambda share: f"{100 * share:.0f} %"
    environment.globals["static"] = {name: _digest(name) for name in STATIC}
    return environment


@functools.cache
def _digest(name: str) -> str:
    return hashlib.sha256((HERE / "static" / name).read_bytes()).hexdigest()[:12]


def page_response(template: str, status: int = 200, **values: Any) -> Response:
    """A page from a template."""
    html = _templates().get_template(template).render(**values)
    return Response(
        html, status, media_type="text/html; charset=utf-8", headers={"Cache-Control": "no-store"}
    )


# The guard


def guard(app: Any, hosts: Sequence[str] | None, token: str | None) -> Any:
    """An ASGI application before `app` that lets through only requests which may see it.

    hosts: names that the Host header may have, None for any. token: what an address or the cookie must hold.
    """

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        request = Request(scope)
        answer = _refusal(request, hosts, token)

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                named = {name.lower() for name, _ in message["headers"]}
                for name, value in HEADERS.items():
                    if name.lower().encode() not in named:
                        message["headers"].append((name.lower().encode(), value.encode()))
            await send(message)

        await (answer or app)(scope, receive, with_headers)

    return guarded


def _refusal(request: Request, hosts: Sequence[str] | None, token: str | None) -> Response | None:
    host = request.headers.get("host", "")
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if hosts is not None and name.lower() not in hosts:
        return _plain(421, f"The viewer answers as {' or '.join(hosts)} only.")
    site = request.headers.get("sec-fetch-site", "none")
    navigation = request.headers.get("sec-fetch-mode") == "navigate" and request.method == "GET"
    if site not in ("none", "same-origin") and not navigation:
        return _plain(403, "Pages of other sites may not read the viewer.")
    if request.method not in ("GET", "HEAD"):
        origin = urllib.parse.urlsplit(request.headers.get("origin", ""))
        if origin.scheme not in ("http", "https") or origin.netloc != host:
            return _plain(403, "Votes come from pages of the viewer itself only.")
    if token is None:
        return None
    given = request.query_params.get("token")
    if given is not None and secrets.compare_digest(given.encode(), token.encode()):
        rest = URL(scope=request.scope).remove_query_params("token")
        path = "/" + rest.path.lstrip("/")
        answer = RedirectResponse(f"{path}?{rest.query}" if rest.query else path, 303)
        answer.set_cookie(COOKIE, token, httponly=True, samesite="strict")
        return answer
    if secrets.compare_digest(request.cookies.get(COOKIE, "").encode(), token.encode()):
        return None
    return _plain(403, "The address lacks its token: open the whole address that the command printed.")


def _plain(status: int, words: str) -> Response:
    return Response(words + "\n", status, media_type="text/plain; charset=utf-8")


# Pages


def make_app(viewer: Viewer, hosts: Sequence[str] | None = LOOPBACK, token: str | None = None) -> Any:
    """The ASGI application. hosts, token: as `guard` has them."""

    def output_of(request: Request) -> Output:
        number = request.path_params["output"]
        if number >= len(viewer.outputs):
            raise HTTPException(404, "There is no such output.")
        return viewer.outputs[number]

    def home(request: Request) -> Response:
        return RedirectResponse("/0/" if viewer.comparison is None else "/compare", 303)

    def grid(request: Request) -> Response:
        return _grid(viewer, output_of(request), request)

    def live(request: Request) -> Response:
        output = output_of(request)
        output.refresh()
        values = _common(viewer, request, output)
        html = _templates().get_template("live.html.j2").render(**values)
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
        return _row(viewer, output_of(request), request)

    def picture(request: Request) -> Response:
        output = output_of(request)
        shard = output.shard(request.path_params["shard"])
        data = output.reader.picture(shard, request.path_params["position"])
        if data is None:
            raise HTTPException(404, "This row has no picture.")
        return _picture(data, request)

    def source(request: Request) -> Response:
        output = output_of(request)
        found = output.row(request.path_params["shard"], request.path_params["position"])
        reference = again.source_reference(found)
        digest = (found.get("source") or {}).get("sha256")
        with viewer._sources:
            data = fetch_source(reference) if reference else None
            # What lies there now may not be what the model was shown, or what this output may name.
            if data is None or hashlib.sha256(data).hexdigest() != digest:
                raise HTTPException(404, "The source is gone, or is not the same any more.")
            return _picture(data, request, always=True)

    def comparison(request: Request) -> Response:
        return _compare(viewer, request)

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
            # It is asked for again and again, so it does not count as somebody who waits for pictures.
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
    return page_response("message.html.j2", error.status_code, message=str(error.detail))


async def _failed(request: Request, error: Exception) -> Response:
    words = str(error)
    return page_response("message.html.j2", 400 if isinstance(error, QueryError) else 404, message=words)


def _common(viewer: Viewer, request: Request, output: Output | None = None) -> dict[str, Any]:
    """What every page needs."""
    values: dict[str, Any] = {"outputs": viewer.outputs, "output": output, "comparing": viewer.comparison}
    values["trouble"] = viewer.keeper.trouble
    if output is not None:
        values |= {"run": describe(output.status), "progress": output.progress()}
    return values


def _address(path: str, query: Query, **more: Any) -> str:
    pairs = query.to_parameters() + [(name, str(value)) for name, value in more.items() if value]
    return f"{path}?{urllib.parse.urlencode(pairs)}" if pairs else path


def _place(request: Request) -> Place | None:
    if "after" in request.query_params:
        return Place.parse(request.query_params["after"])
    if "before" in request.query_params:
        return Place.parse(request.query_params["before"], backwards=True)
    return None


def _mark(row: Mapping[str, Any]) -> str:
    return f"{row['shard']}.{row['position']}"


def _grid(viewer: Viewer, output: Output, request: Request) -> Response:
    output.refresh()
    tile = request.query_params.get("tile", "m")
    tile = tile if tile in TILES else "m"
    count, pixels = TILES[tile]
    kept = "" if tile == "m" else tile
    path = f"/{output.number}/"
    message, query, place = "", Query(), None
    page, total, before, facets = Page([], True, True), None, None, {}
    try:
        query = Query.from_parameters(request.query_params.multi_items())
        place = _place(request)
        if not query.plain:
            viewer.keeper.need_index()
        page = output.page(query, place, count)
        version = viewer.index.versions[output.number]
        if viewer.index.kinds[output.number] and (output.progress().complete or not query.plain):
            total = viewer.remembered(
                (output.number, version, query.to_parameters().__repr__(), "n"),
                lambda: output.rows.count(query),
            )
            facets = viewer.remembered(
                (output.number, version, repr(query.to_parameters()), "f"), lambda: output.rows.facets(query)
            )
            if page.rows:
                first = Place(page.rows[0]["shard"], page.rows[0]["position"])
                before = 0 if page.first else output.rows.count(query, first)
    except QueryError as error:
        message = str(error)
    viewer.keeper.shown = True

    def at(one: Query = query, **more: Any) -> str:
        return _address(path, one, tile=kept, **more)

    links = dict.fromkeys(("first", "previous", "next"), "")
    if page.rows:
        if not page.first:
            links |= {"first": at(), "previous": at(before=_mark(page.rows[0]))}
        if not page.last:
            links |= {"next": at(after=_mark(page.rows[-1]))}
    values = _common(viewer, request, output) | {
        "query": query,
        "rows": [_tile(output, query, row, kept) for row in page.rows],
        "links": links,
        "message": message,
        "total": total if total is not None else output.total() if query.plain else None,
        "before": before,
        "facets": _facet_links(facets, query, at),
        "tiles": [
            (name, name == tile, _address(path, query, tile="" if name == "m" else name)) for name in TILES
        ],
        "tile": tile,
        "kept": kept,
        "pixels": pixels,
        "sorts": [
            ("", "plan order"),
            (RANDOM, "random"),
            *((name, name) for name in sorted(output.rows.columns) if name not in ("shard", "position")),
        ],
        "random": RANDOM,
        "cleared": _address(path, Query(), tile=kept),
        "on_first": place is None,
    }
    return page_response("grid.html.j2", 400 if message else 200, **values)


def _facet_links(facets: Mapping[str, Any], query: Query, at: Callable[..., str]) -> list[dict[str, Any]]:
    names = {"error_type": "kind of error", "environment_digest": "environment"}
    found = []
    for name, values in facets.items():
        most = max((count for _, count in values), default=0) or 1
        lines = [
            {
                "value": value,
                "shown": (value[:12] if name == "environment_digest" else value) or "–",
                "count": count,
                "share": 100 * count / most,
                "chosen": value in query.facets.get(name, ()),
                "link": at(query.toggled(name, value)),
            }
            for value, count in values
        ]
        found.append({"name": name, "title": names.get(name, name.replace("_", " ")), "values": lines})
    return found


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['id']}/{row['sample']}" if row["sample"] else str(row["id"])


def _tile(output: Output, query: Query, row: Mapping[str, Any], kept: str) -> dict[str, Any]:
    where = f"{row['shard']}/{row['position']}"
    return {
        "mark": _mark(row),
        "link": _address(f"/{output.number}/rows/{where}", query, tile=kept),
        "name": _name(row),
        "row": row,
        "picture": _picture_link(output.number, row),
    }


def _picture_link(number: int, row: Mapping[str, Any]) -> str:
    """Address of what a row shows: its picture, of an answer its source; empty where there is none."""
    where = f"{row['shard']}/{row['position']}"
    if row["status"] != "ok":
        return ""
    # The digest makes the address new where the picture is, so that browsers may keep the old one for ever.
    folder = "sources" if row["task"] in TEXT_TASKS else "pictures"
    return f"/{number}/{folder}/{where}?v={(row['sha256'] or '')[:16]}"


def _row(viewer: Viewer, output: Output, request: Request) -> Response:
    query = Query.from_parameters(request.query_params.multi_items())
    kept = request.query_params.get("tile", "")
    kept = kept if kept in TILES else ""
    shard, position = request.path_params["shard"], request.path_params["position"]
    row = output.row(shard, position)
    near = {"previous": "", "next": ""}
    for name, backwards in (("previous", True), ("next", False)):
        try:
            rows = output.page(query, Place(shard, position, backwards), 1).rows
        except QueryError:
            rows = []
        if rows:
            near[name] = _address(
                f"/{output.number}/rows/{rows[0]['shard']}/{rows[0]['position']}", query, tile=kept
            )
    steps = []
    for step in again.lineage(output, row):
        known = next((one for one in viewer.outputs if one.path == step.where), None)
        link = (
            f"/{known.number}/rows/{step.shard}/{step.position}" if known and step.shard is not None else ""
        )
        steps.append((step, link))
    reference = again.source_reference(row)
    where = f"{shard}/{position}"
    columns = [(name, value) for name, value in row.items() if name not in ("position",)]
    values = _common(viewer, request, output) | {
        "row": row,
        "name": _name(row),
        "picture": "" if row["task"] in TEXT_TASKS else _picture_link(output.number, row),
        "source": f"/{output.number}/sources/{where}?v={((row.get('source') or {}).get('sha256') or '')[:16]}"
        if reference
        else "",
        "reference": reference,
        "recipe": again.recipe(output, row),
        "steps": steps,
        "columns": [(name, _text(value)) for name, value in columns],
        "back": _address(f"/{output.number}/", query, tile=kept),
        "near": near,
    }
    return page_response("row.html.j2", **values)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    text = str(value)
    return text if len(text) <= 5000 else f"{text[:5000]}…"


def _picture(data: bytes, request: Request, always: bool = False) -> Response:
    """A picture file as an answer: as it is, or no wider than `w` pixels, or, with `always`, decoded first."""
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    known = next((kind for start, kind in TYPES.items() if data.startswith(start)), None)
    width = request.query_params.get("w", "")
    most = int(width) if width.isascii() and width.isdigit() and len(width) < 5 else 0
    if known and not always and (not most or len(data) <= SMALL_BYTES):
        return Response(data, media_type=known, headers=headers)
    image = decode(data, "The picture")
    if most:
        image.thumbnail((most, most))
    sink = io.BytesIO()
    # Lossless at full size: a source is looked at beside what was made of it.
    image.save(sink, "WEBP", **({"quality": 88} if most else {"lossless": True, "quality": 0, "method": 0}))
    return Response(sink.getvalue(), media_type="image/webp", headers=headers)


# Comparison


def _compare(viewer: Viewer, request: Request) -> Response:
    comparison = viewer.comparison
    if comparison is None or viewer.votes is None:
        raise HTTPException(404, "A comparison needs two outputs: wallaroo view OUTPUT OUTPUT2.")
    viewer.keeper.shown = True
    viewer.keeper.need_index()
    for output in viewer.outputs:
        output.refresh()
    search = request.query_params.get("q", "").strip()[:4000]
    show = request.query_params.get("show", "all")
    show = show if show in compare.SHOWN else "all"
    page, counts, message = Page([], True, True), {"pairs": 0, "differing": 0}, ""
    choices = viewer.votes.choices()
    try:
        page = comparison.page(search, show, _place(request), PAIRS, viewer.votes.table())
        key = ("pairs", tuple(viewer.index.versions), search)
        counts = viewer.remembered(key, lambda: comparison.counts(search))
    except QueryError as error:
        message = str(error)

    def at(**more: Any) -> str:
        pairs = {"q": search, "show": "" if show == "all" else show} | more
        text = urllib.parse.urlencode([(name, value) for name, value in pairs.items() if value])
        return f"/compare?{text}" if text else "/compare"

    links = dict.fromkeys(("first", "previous", "next"), "")
    pairs = [row["pair"] for row in page.rows]
    if pairs:
        if not page.first:
            links |= {
                "first": at(),
                "previous": at(before=f"{pairs[0].place.shard}.{pairs[0].place.position}"),
            }
        if not page.last:
            links |= {"next": at(after=f"{pairs[-1].place.shard}.{pairs[-1].place.position}")}
    keys = {output.path: chr(ord("a") + number) for number, output in enumerate(viewer.outputs)}
    values = _common(viewer, request) | {
        "pairs": [(pair, choices.get(votes.Key(pair.id, pair.version, pair.sample), "")) for pair in pairs],
        "picture": lambda side, pair: _picture_link(
            side.output, {**side.row, "task": viewer.outputs[side.output].task}
        ),
        "letters": list(keys.values()),
        "counts": counts,
        "summary": viewer.votes.summary(),
        "votes_path": viewer.votes.path,
        "settings": comparison.settings(),
        "complete": all(output.progress().complete for output in viewer.outputs),
        "search": search,
        "show": show,
        "shows": [(name, name == show, at(show="" if name == "all" else name)) for name in compare.SHOWN],
        "links": links,
        "message": message,
        "here": request.url.path + (f"?{request.url.query}" if request.url.query else ""),
        "texts": viewer.outputs[0].task in TEXT_TASKS,
    }
    return page_response("compare.html.j2", 400 if message else 200, **values)


async def _vote(viewer: Viewer, request: Request) -> Response:
    from starlette.concurrency import run_in_threadpool

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
    except (KeyError, ValueError):
        raise HTTPException(400, "A vote needs id, version and sample of a row.") from None
    digests = form.get("sha256", "").split(",")
    await run_in_threadpool(viewer.votes.cast, key, digests, choices[choice])
    if "application/json" in request.headers.get("accept", ""):
        html = (
            _templates()
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
            raise HTTPException(413, "A vote is never so long.")
    return data
