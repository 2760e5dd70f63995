"""Requests and memory of `wallaroo view` on 100,000 pictures on S3.

    python -m tests.benchmarks.view [PICTURES]

An output of pictures of 64 x 64 pixels (noise in PNG, 12 KB each, which repeat) is written to a SeaweedFS of
its own, 1.3 GB of disk. A viewer is started as a user starts it, with a proxy before the storage that counts
requests. A client asks for what a browser would ask for: a page and each of its pictures. The bounds: 20
requests until the first page is there with all pictures, and 500 MB of RssAnon for the process at any time.
"""

import html
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests import conftest
from tests.benchmarks.export_memory import write_output
from tests.s3_proxy import proxy
from wallaroo.workflows import storage

PICTURES, SHARD_ROWS, SIDE = 100_000, 256, 64
MOST_REQUESTS, MOST_BYTES = 20, 500_000_000


class Watch:
    """The most anonymous memory that a process was seen with since `peak` was last set to 0."""

    def __init__(self, pid: int):
        self.pid, self.peak = pid, 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                status = Path(f"/proc/{self.pid}/status").read_text()
            except OSError:
                return
            found = [
                int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")
            ]
            self.peak = max(self.peak, *found, 0)
            time.sleep(0.005)


@contextmanager
def storage_server() -> Iterator[conftest.S3Server]:
    """A SeaweedFS, to which the AWS variables of this process lead."""
    weed = str(Path(sys.executable).with_name("weed"))
    with tempfile.TemporaryDirectory(prefix="weed-") as folder:
        server = conftest._start(weed, Path(folder, "weed"))
        assert server is not None, "SeaweedFS does not start"
        try:
            os.environ.update(server.variables())
            yield server
        finally:
            os.kill(server.pid, signal.SIGKILL)
            os.waitpid(server.pid, 0)


def show(base: str, path: str) -> tuple[str, int]:
    """Asks for a page and its pictures, six at a time as browsers do; the page, and bytes of pictures."""

    def get(link: str) -> bytes:
        with urllib.request.urlopen(base + link, timeout=300) as answer:
            return answer.read()

    page = get(path).decode()
    links = [html.unescape(link) for link in re.findall(r'<img src="([^"]+)"', page)]
    with ThreadPoolExecutor(6) as pool:
        return page, sum(map(len, pool.map(get, links)))


def following(page: str) -> str:
    """Address of the page after this one."""
    return html.unescape(re.search(r'href="([^"]+)" id="next"', page)[1])


def main() -> None:
    pictures = int(sys.argv[1]) if len(sys.argv) > 1 else PICTURES
    failed = False
    with storage_server() as server, tempfile.TemporaryDirectory() as cache:
        started = time.monotonic()
        write_output("s3://ready/pictures", pictures, SHARD_ROWS, SIDE)
        size = sum(file.size for file in storage.list_files("s3://ready/pictures/data"))
        print(
            f"{pictures:,} images, {size / 1e9:.2f} GB, written in {time.monotonic() - started:.0f} s",
            flush=True,
        )
        with proxy(server.endpoint, share=0) as between:
            environment = {**os.environ, **server.variables(between.endpoint), "HOME": cache}
            command = [
                sys.executable,
                "-m",
                "wallaroo.jobs.cli",
                "view",
                "s3://ready/pictures",
                "--no-open",
                "--port",
                "0",
            ]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            try:
                watch = Watch(process.pid)
                begun = time.monotonic()
                base = process.stdout.readline().strip().rstrip("/")

                def step(name: str, path: str) -> str:
                    nonlocal failed
                    before, since = between.requests, time.monotonic()
                    watch.peak = 0
                    page, found = show(base, path)
                    took = time.monotonic() - since
                    failed |= watch.peak >= MOST_BYTES
                    print(
                        f"{name:28} {between.requests - before:5,} requests, {took:6.2f} s, "
                        f"{found / 1e6:5.2f} MB of images, peak RssAnon {watch.peak / 1e6:.0f} MB",
                        flush=True,
                    )
                    return page

                page = step("first page", "/0/")
                requests = between.requests
                failed |= requests > MOST_REQUESTS
                print(
                    f"from the start of the command to the first page with its images: {requests} requests "
                    f"(bound {MOST_REQUESTS}), {time.monotonic() - begun:.1f} s",
                    flush=True,
                )
                step("next page, no index yet", following(page))
                watch.peak, before, since = 0, between.requests, time.monotonic()
                while 'id="indexing"' in show(base, "/0/?q=nothing")[0]:
                    time.sleep(1)
                failed |= watch.peak >= MOST_BYTES
                print(
                    f"{'index of all shards':28} {between.requests - before:5,} requests, "
                    f"{time.monotonic() - since:6.2f} s, peak RssAnon {watch.peak / 1e6:.0f} MB",
                    flush=True,
                )
                step("first page with counts", "/0/")
                middle = f"/0/?after={pictures // SHARD_ROWS // 2}.100"
                step("a page in the middle", middle)
                step("last page but one", f"/0/?before={pictures // SHARD_ROWS}.0")
                step("search", "/0/?q=" + urllib.parse.quote('"prompt 777"'))
                page = step("filter", "/0/?where=" + urllib.parse.quote("seed % 1000 = 7 AND sample = 3"))
                page = step("sorted by prompt", "/0/?sort=prompt&dir=desc")
                step("its next page", following(page))
                page = step("random, seed 7", "/0/?sort=random&seed=7")
                step("its next page", following(page))
                step("small tiles, random", "/0/?sort=random&seed=8&tile=s")
                step("one row", "/0/rows/9/200")
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(60)
    print("within the bounds" if not failed else "TOO MUCH")
    sys.exit(failed)


if __name__ == "__main__":
    main()
