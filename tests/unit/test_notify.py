"""Who is told how a run ended: a real server on loopback, a real command."""

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from wallaroo.jobs import notify as notify_module
from wallaroo.jobs.notify import notify

NEWS = {"task": "generate", "output": "out/first", "state": "finished", "rows": 3, "message": ""}


@pytest.fixture
def server(monkeypatch):
    """Its address, and what it was sent."""
    monkeypatch.setattr(notify_module, "URL_TIMEOUT", 300.0)
    heard = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            heard.append((self.path, self.headers["Content-Type"], json.loads(body)))
            self.send_response(500 if self.path == "/broken" else 204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", heard
        running.shutdown()


def test_a_url_gets_the_news(server):
    address, heard = server
    notify(f"{address}/hook", NEWS)
    assert heard == [("/hook", "application/json", NEWS)]


def test_a_command_gets_the_news(tmp_path):
    notify(f'cat > {tmp_path}/news; echo "$WALLAROO_STATE $WALLAROO_ROWS" > {tmp_path}/words', NEWS)
    assert json.loads((tmp_path / "news").read_text()) == NEWS
    assert (tmp_path / "words").read_text() == "finished 3\n"


def test_what_cannot_be_told_is_a_warning(server, caplog):
    address, _ = server
    with caplog.at_level(logging.WARNING):
        for target in (f"{address}/broken", "http://user:secret@127.0.0.1:9/", "exit 7"):
            notify(target, NEWS)
    words = [record.getMessage() for record in caplog.records]
    assert len(words) == 3 and "7" in words[2]
    assert not any("secret" in one for one in words)
