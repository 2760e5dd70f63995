"""The pages of the viewer: HTML from templates, which escape every value. Knows nothing of access rules."""

import functools
import hashlib
import urllib.parse
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from wallaroo.workflows.outputs.schema import TEXT_TASKS
from wallaroo.workflows.outputs.shards import PICTURE_ROWS
from wallaroo.workflows.tasks import PICTURE_TASKS
from wallaroo.workflows.text import duration, rounded
from wallaroo.workflows.viewer import again, compare, votes
from wallaroo.workflows.viewer.index import QueryError
from wallaroo.workflows.viewer.output import Output, Page, describe
from wallaroo.workflows.viewer.query import RANDOM, Place, Query
from wallaroo.workflows.viewer.state import Viewer

TILES = {"s": (96, 120), "m": (48, 200), "l": (24, 320)}
"""Size of tiles -> rows of a page, width of a tile in pixels."""

FEW = 6
"""A page that shows fewer pictures of a row group asks for each of them alone."""

PAIRS = 12
"""Pairs on a page of the comparison."""


STATIC = {
    "view.css": "text/css; charset=utf-8",
    "view.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
HERE = Path(__file__).parent


@functools.cache
def templates() -> jinja2.Environment:
    """Returns the environment of the templates."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda number: "?" if number is None else f"{number:,}"
    environment.filters["duration"] = duration
    environment.filters["rounded"] = rounded
    environment.filters["percent"] = lambda share: f"{100 * share:.0f} %"
    environment.globals["static"] = {name: _digest(name) for name in STATIC}
    return environment


@functools.cache
def _digest(name: str) -> str:
    return hashlib.sha256((HERE / "static" / name).read_bytes()).hexdigest()[:12]


def page_response(template: str, status: int = 200, **values: Any) -> Response:
    """Renders a template as an uncached HTML response.

    Args:
        template: Name of the template.
        status: HTTP status.
        **values: Values for the template.

    Returns:
        The response.
    """
    html = templates().get_template(template).render(**values)
    return Response(
        html, status, media_type="text/html; charset=utf-8", headers={"Cache-Control": "no-store"}
    )


def common(viewer: Viewer, request: Request, output: Output | None = None) -> dict[str, Any]:
    """Collects the values that every page needs.

    Args:
        viewer: State of the viewer.
        request: The HTTP request.
        output: The output that the page is about, if it is about one.

    Returns:
        Name -> value, for the template.
    """
    values: dict[str, Any] = {"outputs": viewer.outputs, "output": output, "comparing": viewer.comparison}
    values["trouble"] = viewer.keeper.trouble
    if output is not None:
        run, progress = describe(output.status), output.progress()
        if run["done"] is None and progress.complete:
            run["done"] = progress.rows  # no run has counted them yet
        values |= {"run": run, "progress": progress}
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


def grid(viewer: Viewer, output: Output, request: Request) -> Response:
    """Renders the grid: tiles of one page, search, filter and facets.

    Args:
        viewer: State of the viewer.
        output: The output to show.
        request: The HTTP request; its parameters hold query, page and tile size.

    Returns:
        The page.
    """
    tile = request.query_params.get("tile", "m")
    tile = tile if tile in TILES else "m"
    count, pixels = TILES[tile]
    kept = "" if tile == "m" else tile
    path = f"/{output.number}/"
    message, query, place = "", Query(), None
    page, total, before, facets = Page([], True, True), None, None, {}
    progress = output.progress()  # before the facets, so that a page without them never calls them final
    try:
        query = Query.from_parameters(request.query_params.multi_items())
        place = _place(request)
        if not query.plain:
            viewer.keeper.need_index()
        page = output.page(query, place, count)
        version = viewer.index.versions[output.number]
        if viewer.index.kinds[output.number]:
            key = (output.number, version, repr(query.to_parameters()))
            facets = viewer.remembered((*key, "facets"), lambda: output.rows.facets(query))
            if progress.complete or not query.plain:
                total = viewer.remembered((*key, "count"), lambda: output.rows.count(query))
            if page.rows and total is not None:
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
    groups = Counter(map(_group, page.rows))
    values = common(viewer, request, output) | {
        "progress": progress,
        "query": query,
        "rows": [_tile(output, query, row, kept, groups[_group(row)] < FEW) for row in page.rows],
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
        "newest": _address(path, Query(sort="started_at", descending=True), tile=kept),
        "cleared": _address(path, Query(), tile=kept),
        "on_first": place is None,
    }
    return page_response("grid.html.j2", 400 if message else 200, **values)


def _facet_links(facets: Mapping[str, Any], query: Query, at: Callable[..., str]) -> list[dict[str, Any]]:
    names = {"error_type": "Kind of error", "environment_digest": "Environment"}
    found = []
    for name, values in facets.items():
        most = max((count for _, count in values), default=0) or 1
        lines = [
            {
                "value": value,
                "shown": (value[:12] if name == "environment_digest" else value) or "none",
                "count": count,
                "share": 100 * count / most,
                "chosen": value in query.facets.get(name, ()),
                "link": at(query.toggled(name, value)),
            }
            for value, count in values
        ]
        found.append(
            {"name": name, "title": names.get(name, name.replace("_", " ").capitalize()), "values": lines}
        )
    return found


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['id']}/{row['sample']}" if row["sample"] else str(row["id"])


def _group(row: Mapping[str, Any]) -> tuple[int, int]:
    """Names the row group of a row, if its shard has pictures."""
    return row["shard"], row["position"] // PICTURE_ROWS


def _tile(output: Output, query: Query, row: Mapping[str, Any], kept: str, one: bool) -> dict[str, Any]:
    where = f"{row['shard']}/{row['position']}"
    return {
        "mark": _mark(row),
        "link": _address(f"/{output.number}/rows/{where}", query, tile=kept),
        "name": _name(row),
        "row": row,
        "picture": _picture_link(output.number, row, one),
    }


def _picture_link(number: int, row: Mapping[str, Any], one: bool = False) -> str:
    """Returns the address of a row's picture, or of the source of an answer; empty if there is none."""
    where = f"{row['shard']}/{row['position']}"
    if row["status"] != "ok":
        return ""
    # The digest makes the address new where the picture is, so that browsers may keep the old one for ever.
    folder = "sources" if row["task"] in TEXT_TASKS else "pictures"
    return f"/{number}/{folder}/{where}?v={(row['sha256'] or '')[:16]}{'&one=1' if one else ''}"


def one_row(viewer: Viewer, output: Output, request: Request) -> Response:
    """Renders one row at full size, with its columns, its command and its history.

    Args:
        viewer: State of the viewer.
        output: The output of the row.
        request: The HTTP request; its path holds shard and position.

    Returns:
        The page.

    Raises:
        InputError: There is no such row.
        QueryError: The query in the address is invalid.
    """
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
        output_of_step = next((one for one in viewer.outputs if one.path == step.where), None)
        link = (
            f"/{output_of_step.number}/rows/{step.shard}/{step.position}"
            if output_of_step and step.shard is not None
            else ""
        )
        steps.append((step, link))
    reference = again.source_reference(row)
    where = f"{shard}/{position}"
    columns = [(name, value) for name, value in row.items() if name not in ("position",)]
    values = common(viewer, request, output) | {
        "row": row,
        "name": _name(row),
        "picture": "" if row["task"] in TEXT_TASKS else _picture_link(output.number, row, one=True),
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


def comparison(viewer: Viewer, request: Request) -> Response:
    """Renders the comparison: pairs side by side, votes and their summary.

    Args:
        viewer: State of the viewer.
        request: The HTTP request; its parameters hold search and page.

    Returns:
        The page.

    Raises:
        HTTPException: The viewer shows one output only (404).
    """
    compared = viewer.comparison
    if compared is None or viewer.votes is None:
        raise HTTPException(404, "A comparison needs two outputs: wallaroo view OUTPUT OUTPUT2.")
    viewer.keeper.shown = True
    viewer.keeper.need_index()
    search = request.query_params.get("q", "").strip()[:4000]
    show = request.query_params.get("show", "all")
    show = show if show in compare.SHOWN else "all"
    page, counts, message = Page([], True, True), {"pairs": 0, "differing": 0}, ""
    links: list[compare.Link] = []
    choices = viewer.votes.choices()
    try:
        links = [link for link in compared.links() if link] if compared.ready else []
        page = compared.page(search, show, _place(request), PAIRS, viewer.votes.table())
        key = ("pairs", tuple(viewer.index.versions), search)
        counts = viewer.remembered(key, lambda: compared.counts(search))
    except QueryError as error:
        message = str(error)

    def at(**more: Any) -> str:
        asked = {"q": search, "show": "" if show == "all" else show} | more
        text = urllib.parse.urlencode([(name, value) for name, value in asked.items() if value])
        return f"/compare?{text}" if text else "/compare"

    turns = dict.fromkeys(("first", "previous", "next"), "")
    pairs: list[compare.Pair] = page.rows
    if pairs:
        if not page.first:
            turns |= {
                "first": at(),
                "previous": at(before=f"{pairs[0].place.shard}.{pairs[0].place.position}"),
            }
        if not page.last:
            turns |= {"next": at(after=f"{pairs[-1].place.shard}.{pairs[-1].place.position}")}
    keys = {output.path: chr(ord("a") + number) for number, output in enumerate(viewer.outputs)}
    values = common(viewer, request) | {
        "pairs": [(pair, choices.get(votes.Key(pair.id, pair.version, pair.sample), "")) for pair in pairs],
        "picture": lambda side, pair: _picture_link(
            side.output, {**side.row, "task": viewer.outputs[side.output].task}
        ),
        "letters": list(keys.values()),
        "counts": counts,
        "summary": viewer.votes.summary(),
        "votes_path": viewer.votes.path,
        "settings": compared.settings(),
        "complete": all(output.progress().complete for output in viewer.outputs),
        "search": search,
        "show": show,
        "shows": [(name, name == show, at(show="" if name == "all" else name)) for name in compare.SHOWN],
        "links": turns,
        "linked": [(link.child, link.parent) for link in links],
        "message": message,
        "here": request.url.path + (f"?{request.url.query}" if request.url.query else ""),
        "texts": [output.task in TEXT_TASKS for output in viewer.outputs],
        # The source of the first output, unless another output shows it.
        "sourced": viewer.outputs[0].task in PICTURE_TASKS and not any(link.child == 0 for link in links),
    }
    return page_response("compare.html.j2", 400 if message else 200, **values)
