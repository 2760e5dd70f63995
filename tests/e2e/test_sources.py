"""Source pictures on S3, against a real server: what is found, what is a row's fault and what is not."""

import contextlib
import http.client
import http.server
import threading
import urllib.parse

import numpy as np
import pytest

from tests.pictures import write_pictures
from wallaroo.model.checkpoint import TINY, load_config
from wallaroo.model.errors import InputError, RowError
from wallaroo.workflows import storage
from wallaroo.workflows.sources import fetch as sources_fetch
from wallaroo.workflows.sources.fetch import Fetched, fetch, fetch_many
from wallaroo.workflows.sources.prepare import load_many
from wallaroo.workflows.sources.references import SourceOptions
from wallaroo.workflows.storage import retries


@pytest.fixture(autouse=True)
def no_memories():
    """What one test's endpoints did, none is to pause for."""
    sources_fetch._endpoint.cache_clear()


def test_pictures_on_s3_are_those_of_the_same_files_on_disk(s3, tmp_path):
    made = write_pictures(tmp_path)
    names = [picture.path.name for picture in made]
    for picture in made:
        storage.write_atomic(f"{s3}/set/{picture.path.name}", picture.path.read_bytes())
    config = load_config(TINY)
    relative = load_many(names, "edit", config, SourceOptions(f"{s3}/set"))
    local = load_many(names, "edit", config, SourceOptions(str(tmp_path)))
    for ((position,), one), (_, other) in zip(relative, local, strict=True):
        name = names[position]
        if isinstance(other, RowError):
            assert isinstance(one, RowError)
            assert str(one) == str(other).replace(str(tmp_path), f"{s3}/set")
            continue
        assert one.uri == f"{s3}/set/{name}" and one.sha256 == other.sha256
        np.testing.assert_array_equal(one.prepared.semantic, other.prepared.semantic)
        np.testing.assert_array_equal(one.prepared.pixels, other.prepared.pixels)


def test_what_is_wrong_with_one_object_is_its_rows_fault(s3, tmp_path):
    storage.write_atomic(f"{s3}/set/good", b"good")
    storage.write_atomic(f"{s3}/set/bäckerei/画像 #1?.png", b"named")
    storage.write_atomic(f"{s3}/set/large", bytes(1001))
    cases = {
        "good": b"good",
        "bäckerei/画像 #1?.png": b"named",
        f"{s3}/set/good": b"good",
        "absent": "does not exist",
        f"{s3}-absent/x": "bucket does not exist",
        "s3://bad bucket/x": "cannot be used",
        "s3://user:hunter2@bucket/x": "without user",
        f"{s3}": "names no object",
        f"{s3}/set/\ud800": "not Unicode text",
        f"{s3}/{'x' * 2000}": "cannot be used|does not exist",
        "large": "more than the allowed 1,000 bytes",
        "../set/good": "leads out",
    }
    options = SourceOptions(f"{s3}/set", most_bytes=1000)
    for (position,), found in fetch_many(list(cases), options):
        reference, expected = list(cases.items())[position]
        if isinstance(expected, bytes):
            assert isinstance(found, Fetched) and found.data == expected
        else:
            assert isinstance(found, RowError) and found.kind == "image", reference
            assert any(words in str(found) for words in expected.split("|")), found
            assert "hunter2" not in str(found)


def test_an_object_that_may_not_be_read_is_its_rows_fault(s3, s3_server, monkeypatch):
    storage.write_atomic(f"{s3}/file", b"one")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.stranger)
    storage.forget_clients()
    with pytest.raises(RowError, match="access is denied"):
        fetch(f"{s3}/file", SourceOptions(s3))


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "no answer from its endpoint"),
        ("AWS_ACCESS_KEY_ID", "nobody", "access key is not known"),
        ("AWS_SECRET_ACCESS_KEY", "wrong", "secret key is wrong"),
    ],
)
def test_a_storage_out_of_order_is_no_rows_fault(s3, monkeypatch, variable, value, reason):
    storage.write_atomic(f"{s3}/file", b"one")
    monkeypatch.setenv(variable, value)
    storage.forget_clients()
    with pytest.raises(InputError, match=reason) as caught:
        list(fetch_many([f"{s3}/file", f"{s3}/other"], SourceOptions(s3)))
    assert not isinstance(caught.value, RowError)


def test_a_storage_that_fails_for_a_while_is_waited_for(s3, s3_server, monkeypatch):
    monkeypatch.setattr(retries, "MIN_BACKOFF", 0.1)
    for number in range(4):
        storage.write_atomic(f"{s3}/{number}", b"%d" % number * 1000)
    with failing_at_first(s3_server.endpoint, 14) as (endpoint, faults):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        storage.forget_clients()
        references = [f"{s3}/{number}" for number in range(4)]
        with storage.retries_enabled():
            found = list(fetch_many(references, SourceOptions(s3, fetches=2)))
    assert [one.data for _, one in found] == [b"%d" % number * 1000 for number in range(4)]
    assert len(faults) == 14


@contextlib.contextmanager
def failing_at_first(endpoint, count):
    """The URL of a proxy that fails the first requests in turn by 503, a reset and half a body."""
    upstream = urllib.parse.urlsplit(endpoint)
    faults, lock = [], threading.Lock()

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with lock:
                fault = len(faults) % 3 if len(faults) < count else None
                if fault is not None:
                    faults.append(fault)
            if fault == 0:
                self.send_error(503)
                return
            if fault == 1:
                return
            connection = http.client.HTTPConnection(upstream.hostname, upstream.port)
            # As the client signed it, the host included.
            connection.request("GET", self.path, headers=dict(self.headers))
            answer = connection.getresponse()
            body = answer.read()
            connection.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if fault == 2 else body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
