"""One run on a cluster that Ray's own autoscaler grows and shrinks, watched from outside.

The GPUs are in name only, and the nodes are processes of this machine; head, autoscaler, scheduler and run
are the real ones. `tests/faults/test_autoscaling.py` asserts what `tests/benchmarks/autoscaling.py` prints.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.clusters import HEAD_NODE, Head, started_head
from wallaroo.actors.replica import Replica

GPU_NODES = 4
ROWS = 120
LIMIT_SECONDS = 900
GATE = "GATE_OF_REPLICAS"
"""Variable of the cluster: the file whose presence lets replicas begin."""


class OnCpu(Replica):
    """A replica that holds a GPU of the cluster, computes on the CPU, and waits at the gate.

    Without a gate a quick run would be over before all nodes are up, or before a lost one is replaced.
    """

    def __init__(self, **options: Any):
        super().__init__(**options | {"device": "cpu"})

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        while not os.path.exists(os.environ[GATE]):
            await asyncio.sleep(0.2)
        return await super().__call__(row)


@dataclass
class TimeLine:
    """What happened on the cluster. events: seconds since the start of the run, and words.

    nodes: ids of all GPU nodes that were ever alive. most: how many were at once. killed: id of the one
    whose raylet was killed. after_kill: nodes that first came alive after that. left: how many were alive
    at the end. code, said: of the run. autoscaler_log: what Ray's autoscaler wrote.
    """

    events: list[tuple[float, str]] = field(default_factory=list)
    nodes: set[str] = field(default_factory=set)
    most: int = 0
    killed: str = ""
    after_kill: set[str] = field(default_factory=set)
    left: int = 0
    code: int = -1
    said: str = ""
    autoscaler_log: str = ""


def watched_run(folder: Path, output: str, say: Callable[[str], None] = lambda words: None) -> TimeLine:
    """A run with `--replicas 1:4` from no GPU node at all until the last one is gone again.

    folder: gets the manifest. When all nodes have a replica one of them is killed; the rows, which
    its replica already holds, begin when another node has taken its place. say: gets each event.
    """
    manifest = folder / "prompts.jsonl"
    rows = [{"id": f"r{i}", "prompt": f"a red circle {i}", "aspect_ratio": "1:1"} for i in range(ROWS)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = TimeLine()
    root = str(Path(__file__).parents[1])
    gate = folder / "gate"
    with started_head(["--num-cpus=2"], {"PYTHONPATH": root, GATE: str(gate)}, gpu_nodes=GPU_NODES) as head:
        started = time.monotonic()

        def event(words: str) -> None:
            line.events.append((time.monotonic() - started, words))
            say(f"{line.events[-1][0]:6.1f} s  {words}")

        run = subprocess.Popen(
            [sys.executable, "-m", "tests.autoscaling", str(manifest), output, head.gcs],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=root,
            env=head.environment | {"PYTHONPATH": root},
        )
        event(f"a run of {ROWS} rows starts, with --replicas 1:{GPU_NODES}")
        try:
            _watch(head, run, gate, line, event)
        finally:
            run.kill()
            line.said = run.communicate()[0]
            line.code = run.returncode
        logs = (head.folder / "session_latest" / "logs").glob("monitor.*")
        line.autoscaler_log = "".join(path.read_text(errors="replace") for path in sorted(logs))
    return line


def _watch(
    head: Head, run: subprocess.Popen, gate: Path, line: TimeLine, event: Callable[[str], None]
) -> None:
    alive: set[str] = set()
    ended = False
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        now = gpu_nodes(head)
        for node in sorted(now.keys() - alive):
            line.nodes.add(node)
            event(f"node {node[-5:]} is up, {len(now)} GPU nodes")
            if line.killed:
                line.after_kill.add(node)
        for node in sorted(alive - now.keys()):
            event(f"node {node[-5:]} is gone, {len(now)} GPU nodes")
        alive = set(now)
        line.most, line.left = max(line.most, len(alive)), len(alive)
        if not gate.exists() and replicas(head) == alive and len(alive) == GPU_NODES:
            if not line.killed:
                line.killed = max(alive)
                event(f"{GPU_NODES} nodes have a replica each; SIGKILL to node {line.killed[-5:]}")
                kill(head, now[line.killed])
            elif line.killed not in alive:
                event("another node has a replica in its place; the rows begin")
                gate.touch()
        if not ended and run.poll() is not None:
            ended = True
            event(f"the run ends with {run.returncode}")
        if ended and not alive:
            return
        time.sleep(0.5)


def gpu_nodes(head: Head) -> dict[str, int]:
    """Living nodes with a GPU, as the head knows them: id -> port of its raylet."""
    nodes = [one["raylet"] for one in _ask(head, "/nodes?view=summary")["data"]["summary"]]
    living = [one for one in nodes if one.get("state") == "ALIVE" and one["nodeId"] != HEAD_NODE]
    return {one["nodeId"]: one["nodeManagerPort"] for one in living}


def replicas(head: Head) -> set[str]:
    """Ids of the nodes on which a replica is up."""
    actors = _ask(head, "/api/v0/actors?limit=1000")["data"]["result"]["result"]
    mine = [one for one in actors if OnCpu.__name__ in one["class_name"] and one["state"] == "ALIVE"]
    return {one["node_id"] for one in mine}


def _ask(head: Head, path: str) -> Any:
    request = urllib.request.Request(
        f"{head.address}{path}", headers={"Authorization": f"Bearer {head.token}"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def kill(head: Head, port: int) -> None:
    """SIGKILL to the raylet that listens there: the end of a node."""
    import psutil

    for process in psutil.process_iter(["name"]):
        if process.info["name"] == "raylet" and any(
            one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in process.net_connections()
        ):
            process.kill()
            return
    raise LookupError(f"no raylet listens on {port}")


def main(manifest: str, output: str, address: str) -> None:
    """The run itself: what `wallaroo generate --replicas 1:4 --address ...` does, with OnCpu."""
    from wallaroo.jobs.progress import line
    from wallaroo.workflows.progress import Progress
    from wallaroo.workflows.runs.driver import run
    from wallaroo.workflows.settings import RunConfig

    said: list[str] = []

    def show(progress: Progress) -> None:
        words = progress.waiting.rpartition(",")[0] or line(progress, 0)
        if words not in said[-1:]:
            said.append(words)
            print(words, flush=True)

    config = RunConfig(manifest, output, replicas=(1, GPU_NODES), slots=1, device="cuda", address=address)
    summary = run(config, show, OnCpu)
    print(f"{summary.ok} ok of {summary.rows}", flush=True)


if __name__ == "__main__":
    from tests import autoscaling

    # Ray sends the class of the replicas by its name, which must not be that of this script.
    autoscaling.main(*sys.argv[1:])
    os._exit(0)
