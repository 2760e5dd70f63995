"""A Ray head as somebody starts one on a machine: `ray start`, with ports and folders of its own."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import free_ports

START_SECONDS = 300


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
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    gpu_nodes: int = 0,
    cpu_nodes: int = 0,
) -> Iterator[Head]:
    """A head with dashboard and token, and all of its processes ended after it.

    gpu_nodes: how many nodes with a GPU, in name only, Ray's autoscaler may add on this machine.
    cpu_nodes: how many without one it always keeps there, each with CPUS, by which one that dies is replaced.
    """
    token = secrets.token_hex(32)
    with tempfile.TemporaryDirectory(prefix="head-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        gcs, dashboard, client, agent, grpc, metrics, runtime = free_ports(7)
        bin_folder = str(Path(sys.executable).parent)
        variables = {
            **os.environ,
            # The `python` of a job is that of the head's PATH.
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHONPATH": "",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        variables.pop("RAY_ADDRESS", None)
        if gpu_nodes or cpu_nodes:
            config = Path(folder) / "autoscaling.yaml"
            config.write_text(yaml.safe_dump(_autoscaling(gcs, gpu_nodes, cpu_nodes)))
            arguments = [*arguments, f"--autoscaling-config={config}"]
            variables |= _AUTOSCALER
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


def _alone() -> list[str]:
    """The beginning of a command whose mounts nobody else sees."""
    return ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]


def may_mount() -> bool:
    """Tells whether `started_node` works: containers may lack the right to mount."""
    try:
        command = [*_alone(), "mount", "-t", "tmpfs", "none", tempfile.gettempdir()]
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@contextmanager
def started_node(head: Head, hidden: Sequence[Path] = (), cpus: int = 1) -> Iterator[Callable[[], None]]:
    """A node of a head's cluster that shares no folder with others, like another machine; ended after it.

    Its home and temporary folder lie on a file system that its own processes alone see. Needs the right to
    mount, or user namespaces.

    Args:
        head: Which has an address on this machine, as all nodes have.
        hidden: Folders that are empty for the node, besides the head's.
        cpus: That the node counts.

    Yields:
        A function that ends it at once, as a machine that is lost.
    """
    agent, grpc, metrics, runtime = free_ports(4)
    with tempfile.TemporaryDirectory(prefix="node-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        # Short, since paths of sockets are, and known to `_end`.
        mounts = " && ".join(f'mount -t tmpfs none "{one}"' for one in (folder, head.folder.parent, *hidden))
        script = f'{mounts} && mkdir "$HOME" "$TMPDIR" && cd "$HOME" && exec "$@"'
        command = [
            *_alone(),
            "sh",
            "-c",
            script,
            "sh",
            sys.executable,
            "-c",
            _NODE,
            json.dumps(
                {
                    "gcs_address": head.gcs,
                    "node_ip_address": "127.0.0.1",
                    "num_cpus": cpus,
                    "object_store_memory": 100_000_000,
                    "min_worker_port": 0,
                    "max_worker_port": 0,
                    "dashboard_agent_listen_port": agent,
                    "metrics_agent_port": grpc,
                    "metrics_export_port": metrics,
                    "runtime_env_agent_port": runtime,
                    "temp_dir": f"{folder}/ray",
                }
            ),
        ]
        variables = {**head.environment, "HOME": f"{folder}/home", "TMPDIR": f"{folder}/tmp"}
        with open(Path(folder) / "log", "wb") as stream:
            process = subprocess.Popen(
                command, stdout=stream, stderr=stream, env=variables, start_new_session=True
            )

        def end() -> None:
            if process.returncode is None:
                _end(process, folder)

        try:
            yield end
        finally:
            end()


_NODE = """
import json, signal, sys
from ray._private.node import Node
from ray._private.parameter import RayParams
Node(RayParams(**json.loads(sys.argv[1])), head=False, shutdown_at_exit=False, spawn_reaper=False)
signal.pause()
"""
"""Starts a node; `ray start` refuses one whose address is of this machine alone."""

HEAD_NODE = "f" * 51 + "00000"
"""The id that Ray's provider of nodes on one machine gives its head."""

CPUS = 12
"""In name only, of a node without GPU."""

_AUTOSCALER = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_NODE,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    # A lost node refuses connections and is given up in a second or two. A busy one is only slow to answer.
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_timeout_ms": "30000",
}


def _autoscaling(gcs: int, gpu_nodes: int, cpu_nodes: int) -> dict[str, Any]:
    """The configuration of Ray's own autoscaler, whose machines are processes of this one."""
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        # Without defaults of its own an external provider is told all that is not.
        **{f"{name}_commands": [] for name in commands},
        "file_mounts": {},
        "cluster_synced_files": [],
        "auth": {},
        "cluster_name": "test",
        "max_workers": gpu_nodes + cpu_nodes,
        "idle_timeout_minutes": 0.1,
        "provider": {
            # The provider by its name needs a file that Ray's package lacks.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{gcs}",
            "head_node_id": HEAD_NODE,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            "gpu": {
                "resources": {"CPU": 1, "GPU": 1, "object_store_memory": 100_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": gpu_nodes,
            },
            "cpu": {
                "resources": {"CPU": CPUS, "object_store_memory": 100_000_000},
                "node_config": {},
                "min_workers": cpu_nodes,
                "max_workers": cpu_nodes,
            },
        },
        "head_node_type": "ray.head.default",
    }


def _wait(process: subprocess.Popen, url: str, token: str, log: Path) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=30):
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
    psutil.wait_procs(mine, timeout=60)
