"""What somebody reads who has no cluster yet, or whose cluster lacks something."""

import json
import logging
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from wallaroo.jobs import cli, submit
from wallaroo.model.errors import InputError
from wallaroo.workflows import cluster
from wallaroo.workflows.cluster import check_gpus
from wallaroo.workflows.reports.finish import finish


@contextmanager
def answering(handler):
    """A server on a free port of this machine; yields the port."""
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


class Dashboard(BaseHTTPRequestHandler):
    """Says that it is Ray's, and lists `jobs`."""

    jobs: tuple[dict, ...] = ()

    def do_GET(self):
        version = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x"}
        found = {"/api/version": version, "/api/jobs/": list(self.jobs)}.get(self.path)
        self.send_response(404 if found is None else 200)
        self.end_headers()
        if found is not None:
            self.wfile.write(json.dumps(found).encode())

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("address", "environment"),
    [
        (None, {}),
        (None, {"RAY_ADDRESS": "auto"}),
        (None, {"RAY_ADDRESS": "127.0.0.1:6379"}),
        ("ray://127.0.0.1:10001", {"RAY_API_SERVER_ADDRESS": "http://192.0.2.1:8265"}),
    ],
)
def test_the_dashboard_of_a_cluster_here_is_found(monkeypatch, tmp_path, address, environment):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(submit, "DASHBOARD_TIMEOUT", 300.0)
    with answering(Dashboard) as port:
        monkeypatch.setattr(submit, "DASHBOARD_PORT", port)
        assert submit.connect(address, environment).get_address() == f"http://127.0.0.1:{port}"


def test_jobs_of_a_cluster_here_are_listed_without_an_address(monkeypatch, tmp_path, outputs, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    finish(str(tmp_path / "out"), outputs.make_output(tmp_path / "out", [outputs.plan_table(errors=(1,))]))
    common = {"type": "SUBMISSION", "entrypoint": "python -m wallaroo.jobs.cli generate", "message": ""}
    runs = [("generate-1", "SUCCEEDED", "night", "out", 1000), ("generate-2", "PENDING", "", "absent", 2000)]
    jobs = [
        common
        | {
            "submission_id": job,
            "status": state,
            "start_time": started,
            "metadata": {"wallaroo.name": name, "wallaroo.output": str(tmp_path / output)},
        }
        for job, state, name, output, started in runs
    ]
    # A job of somebody else's is none of ours.
    jobs.append(common | {"submission_id": "other", "status": "RUNNING", "metadata": {}})

    monkeypatch.setattr(submit, "DASHBOARD_TIMEOUT", 300.0)

    def listed():
        with answering(Dashboard) as port:
            monkeypatch.setattr(submit, "DASHBOARD_PORT", port)
            with pytest.raises(SystemExit) as left:
                cli.main(["jobs", "list"])
        return left.value.code, capsys.readouterr().out.splitlines()

    assert listed() == (0, ["The cluster has no jobs."])
    monkeypatch.setattr(Dashboard, "jobs", tuple(jobs))
    assert listed() == (
        0,
        [
            f"generate-2  PENDING    {tmp_path}/absent",
            "    its output does not exist yet or cannot be read from here",
            f"generate-1  SUCCEEDED  {tmp_path}/out  (night)",
            "    6 of 6 rows, 1 error: finished",
        ],
    )


@pytest.mark.parametrize(
    ("command", "variable"),
    [(["list"], None), (["status", "x"], None), (["list"], "RAY_ADDRESS"), (["stop", "x"], "RAY_ADDRESS")],
)
def test_jobs_without_a_cluster_say_which_variable_to_set(monkeypatch, tmp_path, capsys, command, variable):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "127.0.0.1:6379")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        monkeypatch.setattr(submit, "DASHBOARD_PORT", port)
        with pytest.raises(SystemExit) as left:
            cli.main(["jobs", *command])
    out, err = capsys.readouterr()
    assert (left.value.code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"wallaroo: no Ray dashboard answers at http://127.0.0.1:{port} (")
    assert err.endswith(
        "): give that of the dashboard as --address or $RAY_API_SERVER_ADDRESS; `ray start` prints it, such "
        "as http://127.0.0.1:8265.\n"
    )


def test_without_a_dashboard_the_variable_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with socket.socket() as silent:
        # Taken, so that nobody else answers there, and not listened on.
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        monkeypatch.setattr(submit, "DASHBOARD_PORT", port)
        with pytest.raises(
            InputError, match=rf"answers at http://127\.0\.0\.1:{port} .*\$RAY_API_SERVER_ADDRESS"
        ):
            submit.connect(None, {})
        with pytest.raises(InputError, match="check address and port, or the port-forward"):
            submit.connect(f"http://127.0.0.1:{port}", {})


def test_gpus_that_are_not_there_are_told_with_what_to_do(caplog):
    with pytest.raises(InputError, match="2 replicas need a GPU each, but this machine has 1: use fewer"):
        check_gpus(None, 2, 1)
    with pytest.raises(
        InputError, match="1 worker needs a GPU, but this machine has 0: give --device cpu, or the --a"
    ):
        check_gpus(None, 1, 0, "worker")
    check_gpus(None, 2, 2)
    check_gpus("10.0.0.1:6379", 2, 1)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        check_gpus("10.0.0.1:6379", 2, 0)
    assert "The cluster at 10.0.0.1:6379 has no GPU now" in caplog.text and "--device cpu" in caplog.text


@pytest.mark.parametrize("origin", ["--address or cluster.address", "$RAY_ADDRESS"])
def test_a_command_says_where_it_connects(tmp_path, monkeypatch, capsys, origin):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.2)
    (tmp_path / "m.jsonl").write_text('{"prompt": "a cat"}\n')
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address if origin == "$RAY_ADDRESS" else "127.0.0.1:1")
        more = [] if origin == "$RAY_ADDRESS" else ["--address", address]
        with pytest.raises(SystemExit) as left:
            cli.main(["plan", "generate", "m.jsonl", *more])
    first, last = capsys.readouterr().err.splitlines()
    assert left.value.code == 1 and first == f"connecting to Ray at {address} (from {origin})"
    assert last.startswith(f"wallaroo: no Ray cluster answers at {address}, which is from {origin} (")
