"""SIGKILL to replicas, nodes, drivers and all that they started: no row is lost, and none comes twice."""

import dataclasses
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.clusters import started_head
from tests.e2e.test_generate import read_data
from tests.faults.conftest import ROUNDS
from tests.faults.test_poison import SICK
from wallaroo.workflows.outputs.layout import list_done
from wallaroo.workflows.outputs.schema import VOLATILE
from wallaroo.workflows.outputs.success import read_success
from wallaroo.workflows.outputs.summary_files import read_lines
from wallaroo.workflows.reports.verify import verify
from wallaroo.workflows.storage import write_atomic

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 900
MOMENTS = 2, 14
"""Seconds after a start in which it is killed. The earlier half of them is while Ray and replicas start, so
that no machine has its rows done by then; the rest is while rows are made and written."""

SEEDS = {"local": range(1, 1 + ROUNDS), "on_s3": range(1001, 1001 + ROUNDS)}


class Rounds:
    """Starts of one run, each by a process of its own that follows the one before at once."""

    def __init__(self, config, folder, environment=os.environ):
        self.config, self.folder, self.environment = config, folder, environment
        self.kills = 0

    def start(self, state, **changes):
        config = self.folder / "config"
        config.write_bytes(pickle.dumps(dataclasses.replace(self.config, **changes)))
        command = [sys.executable, "-m", "tests.faults.victim", str(config), state, str(self.folder)]
        with open(self.folder / "log", "wb") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=self.environment | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log
            )

    def log(self):
        return (self.folder / "log").read_text(errors="replace")

    def dies(self, state, **changes):
        """A start that kills itself in this state."""
        code = self.start(state, **changes).wait(LIMIT_SECONDS)
        assert code == -signal.SIGKILL and (self.folder / state).exists(), self.log()
        self.kills += 1

    def ends(self, state, **changes):
        assert self.start(state, **changes).wait(LIMIT_SECONDS) == 0, self.log()

    def is_killed(self, seed):
        """A start that is killed from outside at a random moment; of an odd seed all that it started too."""
        process = self.start("random")
        try:
            process.wait(random.Random(seed).uniform(*MOMENTS))
            assert process.returncode == 0, self.log()
        except subprocess.TimeoutExpired:
            family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
            for one in family if seed % 2 else []:
                try:
                    one.kill()
                except psutil.NoSuchProcess:
                    continue
            self.kills += 1


@pytest.fixture
def local(base, tmp_path):
    """On disk, each start with a Ray of its own."""
    return Rounds(dataclasses.replace(base[0], output=str(tmp_path / "out")), tmp_path)


@pytest.fixture
def on_s3(base, s3, tmp_path):
    """On S3, each start with a Ray of its own."""
    manifest = f"{s3}/prompts.jsonl"
    write_atomic(manifest, Path(base[0].manifest).read_bytes())
    return Rounds(dataclasses.replace(base[0], manifest=manifest, output=f"{s3}/out"), tmp_path)


@pytest.fixture(scope="module")
def cluster(s3_server):
    """A Ray for all starts, whose one node for work is replaced."""
    with started_head(["--num-cpus=0"], {"PYTHONPATH": str(ROOT)}, cpu_nodes=1) as head:
        yield head


def from_cluster(cluster, rounds):
    config = dataclasses.replace(rounds.config, address=cluster.gcs)
    return Rounds(config, rounds.folder, cluster.environment)


@pytest.fixture
def shared_disk(cluster, local):
    """On a disk that all nodes of a cluster share."""
    return from_cluster(cluster, local)


@pytest.fixture
def shared_s3(cluster, on_s3):
    """On S3, from a cluster."""
    return from_cluster(cluster, on_s3)


def check(rounds, base):
    _, wanted = base
    output = rounds.config.output
    table = read_data(output)
    assert table.drop_columns(VOLATILE).equals(wanted.drop_columns(VOLATILE))
    said = []
    assert verify(output, said.append).state == "complete", said


@pytest.mark.parametrize("place", ["local", "on_s3"])
def test_kills_at_random_moments_lose_nothing(place, request, base):
    rounds = request.getfixturevalue(place)
    for seed in SEEDS[place]:
        rounds.is_killed(seed)
    assert rounds.kills > 0
    rounds.ends("random")
    check(rounds, base)


@pytest.mark.parametrize("place", ["shared_disk", "shared_s3"])
def test_kills_at_certain_states_lose_nothing(place, request, base):
    rounds = request.getfixturevalue(place)
    output = rounds.config.output
    rounds.dies("planning")
    rounds.dies("first")
    assert not list_done(output)
    rounds.dies("writing")
    there = list_done(output)
    assert there and read_success(output) is None
    rounds.dies("summary")
    # What was there at the start is in the summary, what was written since is not.
    assert {shard for shard, _, _ in read_lines(output, "part-00000")} == there < list_done(output)
    # A replica dies too, before the last file is there, or the node that it is on.
    rounds.dies("success")
    assert (rounds.folder / "replica").exists()
    assert there < list_done(output) and read_success(output) is None
    rounds.ends("whole")
    assert sum(read_success(output)["errors"].values()) == len(SICK) + 1
    rounds.dies("retrying", retry_errors=True)
    assert read_success(output) is None
    rounds.ends("whole", retry_errors=True)
    check(rounds, base)
