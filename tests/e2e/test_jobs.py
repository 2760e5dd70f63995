"""Runs given to a cluster: a real head with a dashboard and a token, and commands in shells of their own."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.clusters import Head, started_head
from wallaroo.actors.metrics import METRICS

ROWS = 60


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started_head(["--num-cpus=2"], {"RAY_metrics_report_interval_ms": "1000"}) as head:
        yield head


@pytest.fixture
def shell(head, tmp_path):
    """Starts a command as from a shell of a laptop: its own process, in a folder with a manifest."""
    rows = [{"id": f"r{i}", "prompt": f"a red circle {i}", "aspect_ratio": "1:1"} for i in range(ROWS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(*arguments, token=head.token, **options) -> subprocess.Popen:
        environment = {
            **head.environment,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "HOME": str(tmp_path),
        }
        environment.pop("RAY_AUTH_MODE")
        environment.pop("RAY_AUTH_TOKEN")
        if token:
            environment["RAY_AUTH_TOKEN"] = token
        environment["RAY_API_SERVER_ADDRESS"] = head.address
        return subprocess.Popen(
            [sys.executable, "-m", "wallaroo.jobs.cli", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment,
        )

    return start


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def replicas(head: Head) -> list[Any]:
    """The processes of a head's replicas."""
    import psutil

    found = []
    for one in psutil.process_iter(["cmdline"]):
        with suppress(psutil.NoSuchProcess):
            raylet = one.parent()
            is_replica = raylet is not None and "Replica" in " ".join(one.info["cmdline"] or ())
            if is_replica and str(head.folder) in " ".join(raylet.cmdline()):
                found.append(one)
    return found


@contextmanager
def held(processes: list[Any]) -> Iterator[None]:
    """Keeps processes from going on."""
    for one in processes:
        one.suspend()
    try:
        yield
    finally:
        for one in processes:
            one.resume()


def metric_names(head: Head) -> set[str]:
    """Names of our metrics as Prometheus would find them."""
    lines = []
    with suppress(OSError), urllib.request.urlopen(head.metrics, timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return {line.partition("{")[0] for line in lines if line.startswith("ray_wallaroo_")}


def test_a_run_from_its_submission_to_its_report(head, shell, tmp_path):
    output = tmp_path / "out"
    # A few rows at a time, so that there is something left to stop.
    run = ("generate", "prompts.jsonl", output, "--slots", 3)
    command = ("submit", "--name", "nightly", "--follow", "--", *run)

    # Whoever may not is told so in a sentence, and nothing is started.
    for token, words in (("", "requires a token, but none was found"), ("0" * 64, "rejects the token")):
        code, _, complaint = ended(shell(*command, token=token))
        assert (code, complaint.count("\n")) == (1, 1)
        assert words in complaint and "RAY_AUTH_TOKEN" in complaint
    assert ended(shell("jobs", "list"))[1] == "The cluster has no jobs.\n"

    first = shell(*command)
    started = first.stdout.readline()
    assert started, first.communicate()
    job = started.partition(":")[0]
    assert started == f"{job}: submitted\n" and job.startswith("generate-") and job.endswith("-1")

    # The same again, while it is at work, is no second run; faster or slower does not make it another.
    code, again, _ = ended(shell("submit", "--", *run, "--replicas", "1:2"))
    assert (code, again.splitlines()[0]) == (0, f"{job}: already active, submitted before")

    while not list((output / "data").glob("*.parquet")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    # On a slow machine the run would be over before it was asked how far it is, or to stop.
    with held(replicas(head)):
        code, status, _ = ended(shell("jobs", "status", "nightly"))
        assert code == 0
        assert status.startswith(f"{job}: RUNNING"), status
        assert f"of {ROWS}, 0 errors" in status, status
        assert job in ended(shell("jobs", "list"))[1]
        stop = shell("jobs", "stop", job)
        told = iter(first.stdout.readline, "")
        assert any("in flight" in line for line in told)

    code, stopped, _ = ended(stop)
    assert (code, stopped) == (0, f"{job}: stopped\n")
    assert ended(first)[0] == 5
    assert json.loads((output / "runs" / "0001.json").read_text())["state"] == "stopped"
    assert not (output / "lock.json").exists()

    # After it ended the same submission goes on where it was, and ends as the run does.
    going_on = shell(*command)
    exported: set[str] = set()
    while going_on.poll() is None:
        exported |= metric_names(head)
        time.sleep(1)
    code, said, complaint = ended(going_on)
    assert code == 0, said + complaint
    # No row of this run is an error; all else that is defined can be read from outside.
    assert exported == {f"ray_{name}" for name in METRICS} - {"ray_wallaroo_errors_total"}
    second = f"{job.removesuffix('-1')}-2"
    assert said.startswith(f"{second}: submitted\n") and said.endswith(f"{second}: succeeded\n")
    assert f"{ROWS} rows: {ROWS} ok, 0 errors" in said
    assert f"{ROWS} rows: {ROWS} ok" in ended(shell("jobs", "logs", second))[1]
    listed = ended(shell("jobs", "list"))[1]
    assert f"{ROWS} of {ROWS} rows, 0 errors" in listed
    assert listed.index(second) < listed.index(job)

    # What outlives the cluster.
    assert (output / "report.html").exists() and (output / "_SUCCESS").exists()
    assert " stopped" in (output / "runs" / "0001.log").read_text().splitlines()[-1]
    assert (output / "runs" / "0002.log").read_text().splitlines()[-1].endswith("finished")
    rows = pq.read_table(output / "data", columns=["id", "status"]).to_pydict()
    assert sorted(rows["id"]) == sorted(f"r{i}" for i in range(ROWS)) and set(rows["status"]) == {"ok"}


def test_what_a_cluster_cannot_read_is_not_submitted(shell, tmp_path):
    for arguments, words in (
        (("prompts.jsonl", "out"), "OUTPUT is out, a path of this machine"),
        (
            ("prompts.jsonl", tmp_path / "x", "--model", "weights"),
            "--model is weights, a path of this machine",
        ),
        (("absent.jsonl", tmp_path / "x"), "absent.jsonl cannot be read"),
        (("prompts.jsonl", tmp_path / "x", "--address", "auto"), "leave it out there"),
    ):
        code, _, complaint = ended(shell("submit", "--", "generate", *arguments))
        assert (code, words in complaint) == (1, True), complaint
    (tmp_path / "big.jsonl").write_bytes(b"\n" * (65 << 20))
    code, _, complaint = ended(shell("submit", "--", "generate", "big.jsonl", tmp_path / "x"))
    assert code == 1 and "65 MiB, but at most 64 MiB" in complaint


def test_what_is_sent_along(shell, head, tmp_path, monkeypatch):
    """Code and the files that were named; nothing else of the folder, and no weights."""
    from wallaroo.jobs.config import resolve
    from wallaroo.jobs.submit import _stage, carried

    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "run.toml").write_text("[run]\nmodel = 's3://bucket/model'\n")
    monkeypatch.chdir(tmp_path)
    command = ["generate", "prompts.jsonl", "s3://bucket/out", "--config", "run.toml"]
    config = resolve("generate", *command[1:3], {}, (), "run.toml", environment={})
    folder = tmp_path / "staged"
    folder.mkdir()
    _stage(folder, config, carried(config, command))
    staged = sorted(one.relative_to(folder) for one in folder.rglob("*") if one.is_file())
    assert {one.parts[0] for one in staged} == {
        "wallaroo", "prompts.jsonl", "run.toml"
    }  # fmt: skip
    assert not [one for one in staged if one.suffix in (".pyc", ".safetensors")]
    assert sum((folder / one).stat().st_size for one in staged) < 4 << 20
