"""A Ray head as somebody starts one on a machine: `ray start`, with ports and folders of its own."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import _free_ports

START_SECONDS = 180


@dataclass(frozen=True)
class Head:
    """address: of its dashboard. gcs: for `ray.init`. metrics: where Prometheus would look. token: that it
    demands. folder: of its sessions. environment: for commands that talk to it."""

    address: str
    gcs: str
    metrics: str
    token: str
    folder: Path
    environment: dict[str, str]


@contextmanager
def started_head(
    arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Iterator[Head]:
    """A head with dashboard and token, and all of its processes ended after it."""
    token = secrets.token_hex(32)
    with tempfile.TemporaryDirectory(prefix="head-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        gcs, dashboard, client, agent, grpc, metrics, runtime = _free_ports(7)
        bin_folder = str(Path(sys.executable).parent)
        variables = {
            **os.environ,
            # The `python` of a job is that of the head's PATH.
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        for name in ("RAY_ADDRESS", "PYTHONPATH"):
            variables.pop(name, None)
        command = [
            f"{bin_folder}/ray",
            "start",
            "--head",
            "--block",
            "--node-ip-address=127.0.0.1",
            f"--port={gcs}",
            "--include-dashboard=true",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-agent-grpc-port={grpc}",
            f"--metrics-export-port={metrics}",
            f"--runtime-env-agent-port={runtime}",
            f"--temp-dir={folder}/ray",
            "--disable-usage-stats",
            *arguments,
        ]
        log = Path(folder) / "log"
        with open(log, "wb") as stream:
            process = subprocess.Popen(
                command, stdout=stream, stderr=stream, env=variables, cwd=folder, start_new_session=True
            )
        address = f"http://127.0.0.1:{dashboard}"
        try:
            _wait(process, f"{address}/api/version", token, log)
            yield Head(
                address,
                f"127.0.0.1:{gcs}",
                f"http://127.0.0.1:{metrics}/metrics",
                token,
                Path(folder) / "ray",
                variables,
            )
        finally:
            _end(process, folder)


def _wait(process: subprocess.Popen, url: str, token: str, log: Path) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the head does not start: {log.read_text(errors='replace')[-2000:]}")


def _end(process: subprocess.Popen, folder: str) -> None:
    """Ends a head and all that belongs to it, wherever in the tree of processes it went."""
    import psutil

    marks = [
        one
        for one in psutil.process_iter(["pid", "cmdline"])
        if folder in " ".join(one.info["cmdline"] or ())
    ]
    try:
        mine = [*psutil.Process(process.pid).children(recursive=True), *marks]
    except psutil.NoSuchProcess:
        mine = marks
    process.send_signal(signal.SIGKILL)
    process.wait()
    for one in mine:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(mine, timeout=10)
