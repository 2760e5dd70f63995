"""A proxy before an S3 server that is out of order now and then: throttles, resets, cuts, stalls, repeats."""

import http.client
import random
import socket
import struct
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("throttle", "reset", "truncate", "stall", "repeat")
STALL_SECONDS = 5
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce.</Message></Error>"


class Proxy(ThreadingHTTPServer):
    """faults: how many requests had each. share: of those that have one, drawn by `seed`. delay: seconds
    more that every answer takes. kinds: see `take`. sent: bytes that GET returned. A deletion of several
    objects is answered by the error of code `refusal`, or by the body `deleted`, if that is not empty."""

    daemon_threads = True

    def __init__(self, target: str, share: float, seed: int, delay: float):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urllib.parse.urlsplit(target).netloc
        self.share = share
        self.delay = delay
        self.faults: Counter[str] = Counter()
        self.requests = self.sent = 0
        self.refusal, self.deleted = "", b""
        self.kinds: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._guard = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self) -> str:
        """What befalls the next request; empty for nothing."""
        with self._guard:
            self.requests += 1
            first = self.requests == 1 and self.share > 0
            if self._random.random() >= self.share and not first:
                return ""
            # The first one is of the driver, which counts it whatever the order of the others.
            kind = "throttle" if first else self._random.choice(FAULTS)
            self.faults[kind] += 1
            return kind

    def note(self, command: str, path: str) -> None:
        """Counts a request by its kind: LIST, or its verb."""
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(path).query, keep_blank_values=True)
        with self._guard:
            self.kinds["LIST" if "list-type" in query or "uploads" in query else command] += 1

    def take(self) -> dict[str, int]:
        """How many requests of each kind there were since this was last asked."""
        with self._guard:
            found, self.kinds = self.kinds, Counter()
        return dict(found)

    def handle_error(self, request, client_address) -> None:
        """A client that went away is nothing to tell."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.note(self.command, self.path)
        fault = self.server.fault()
        time.sleep(self.server.delay)
        deletion = self.command == "POST" and self.path.endswith("?delete")
        if deletion and self.server.refusal:
            refused = SLOW_DOWN.replace(b"SlowDown", self.server.refusal.encode())
            return self._answer(400, {"Content-Type": "application/xml"}, refused)
        if deletion and self.server.deleted:
            return self._answer(200, {"Content-Type": "application/xml"}, self.server.deleted)
        if fault == "throttle":
            return self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
        if fault == "reset":
            return self._reset()
        if fault == "stall":
            time.sleep(STALL_SECONDS)
        if fault == "repeat":
            self._forward(body)
        status, headers, data = self._forward(body)
        if self.command == "GET":
            with self.server._guard:
                self.server.sent += len(data)
        self._answer(status, headers, data, cut=fault == "truncate" and len(data) > 1)

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server.target, timeout=300)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], data: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            self.close_connection = True

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_) -> None:
        pass

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve


@contextmanager
def proxy(target: str, share: float = 0.2, seed: int = 0, delay: float = 0.0) -> Iterator[Proxy]:
    """A proxy on loopback for as long as the block lasts."""
    with Proxy(target, share, seed, delay) as server:
        threading.Thread(target=server.serve_forever, name="proxy", daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
