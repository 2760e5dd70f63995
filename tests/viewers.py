"""A viewer on a real socket, a real browser before it, and the rows that it should show."""

import json
import os
import shutil
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.parquet as pq
import uvicorn

from wallaroo.workflows.outputs import layout
from wallaroo.workflows.viewer.app import make_app
from wallaroo.workflows.viewer.guard import LOOPBACK
from wallaroo.workflows.viewer.query import Place
from wallaroo.workflows.viewer.state import Viewer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


LONGEST = 300_000
"""Milliseconds after which a browser that does not start, or a page that does not change, is given up."""


class Answer:
    """What a server said. status: HTTP's. text: the body, as UTF-8."""

    def __init__(self, status, headers, data):
        self.status, self.headers, self.data = status, headers, data

    @property
    def text(self):
        return self.data.decode()


class Served:
    """A viewer that answers at `base`."""

    def __init__(self, viewer, base):
        self.viewer, self.base = viewer, base

    def get(self, path, headers=(), data=None):
        """The answer to a request, whatever its status; redirects are not followed."""
        request = urllib.request.Request(self.base + path, headers=dict(headers))
        if data is not None:
            request.data = urllib.parse.urlencode(data).encode()
        try:
            with urllib.request.build_opener(_Stay).open(request, timeout=300) as answer:
                return Answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.headers, error.read())

    def indexed(self):
        """Waits until every shard that is listed is in the index."""
        self.viewer.keeper.need_index()
        wait_for(lambda: all(output.progress().complete for output in self.viewer.outputs))
        return self


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


@contextmanager
def serving(*outputs, votes=None, hosts=LOOPBACK, token=None) -> Iterator[Served]:
    """A viewer over outputs for as long as the block lasts."""
    viewer = Viewer([str(output) for output in outputs], None if votes is None else str(votes))
    bound = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(make_app(viewer, hosts, token), log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],), name="viewer")
    viewer.keeper.start()
    thread.start()
    try:
        yield Served(viewer, f"http://127.0.0.1:{bound.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join()
        viewer.close()
        bound.close()


def wait_for(condition, seconds=300):
    """Returns when a condition holds; fails where it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@contextmanager
def browsing(folder, width=1280, height=900, scripts=True):
    """A page of a headless browser, and the addresses that it asked for. folder: of its profile."""
    from playwright.sync_api import sync_playwright

    asked = []
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            os.fspath(folder),
            executable_path=CHROMIUM,
            headless=True,
            args=list(FLAGS),
            viewport={"width": width, "height": height},
            java_script_enabled=scripts,
            timeout=LONGEST,
        )
        try:
            page = context.pages[0]
            page.set_default_timeout(LONGEST)
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: asked.append(f"error: {error}"))
            page.on("console", lambda line: line.type == "error" and asked.append(f"error: {line.text}"))
            yield page, asked
        finally:
            context.close()


def only_from(base, asked):
    """Whether all that a page asked for came from the viewer, and nothing went wrong in it."""
    strange = [url for url in asked if not url.startswith(base + "/")]
    assert strange == [], json.dumps(strange)
    return bool(asked)


def fill_index(output):
    """Indexes all shards of an output."""
    for _ in output.fill(threading.Event()):
        pass


def all_rows(path):
    """All rows of an output as dicts, with their position, without pictures."""
    rows = []
    for number in sorted(layout.list_done(str(path))):
        table = pq.read_table(layout.shard_path(str(path), number)).drop_columns(["image"])
        rows += [{**row, "position": place} for place, row in enumerate(table.to_pylist())]
    return rows


def mark(row):
    """Shard and position of a row."""
    return row["shard"], row["position"]


def walk(output, query, count, backwards=False):
    """All rows of a query, page by page."""
    found, place = [], Place(1 << 40, 0, True) if backwards else None
    if backwards:
        last = output.rows.page(query, None, 1000)[-1]
        place, found = Place(*mark(last), True), [last]
    while True:
        page = output.page(query, place, count)
        found = page.rows + found if backwards else found + page.rows
        if (page.first if backwards else page.last) or not page.rows:
            return found
        place = Place(*mark(page.rows[0]), True) if backwards else Place(*mark(page.rows[-1]))
