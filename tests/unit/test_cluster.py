"""Starting a local Ray that is slow. That one starts at all is for the tests that need it."""

import socket
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from wallaroo.jobs import cli
from wallaroo.jobs.config import resolve
from wallaroo.model.checkpoint import TINY
from wallaroo.model.errors import InputError
from wallaroo.workflows import cluster
from wallaroo.workflows.cluster import connected


@pytest.fixture
def attempts(monkeypatch):
    """Ray as on a machine that is too busy: each attempt takes half a minute of this clock and fails."""
    seen = []

    def init(**options):
        seen.append(options)
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    # Not of the module `time` itself, which threads of other libraries use too.
    monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: 30.0 * len(seen)))
    return seen


@pytest.mark.parametrize(("timeout", "count"), [("0s", 1), ("30s", 1), ("31s", 2), (None, 3), ("5m", 10)])
def test_a_slow_start_of_ray_is_retried_until_its_timeout(attempts, timeout, count):
    config = resolve("generate", "m", "o", {"ray_start_timeout": timeout}, environment={})
    words = rf"within {config.ray_start_timeout:g} s\. .* --ray-start-timeout"
    with pytest.raises(InputError, match=words), connected(start_timeout=config.ray_start_timeout):
        pass
    assert len(attempts) == count


def test_another_failure_is_not_retried(attempts, monkeypatch):
    def init(**options):
        attempts.append(options)
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RuntimeError, match="no space left"), connected():
        pass
    assert len(attempts) == 1


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize("origin", ["$RAY_ADDRESS", "--address or cluster.address"])
def test_a_cluster_that_is_gone_is_named_with_the_origin_of_its_address(monkeypatch, origin, scheme):
    assert cluster.CONNECT_SECONDS == 60
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with socket.socket() as silent:
        # It takes connections, as a machine does whose Ray hangs, and never says a word.
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"{scheme}127.0.0.1:{silent.getsockname()[1]}"
        environment = {"RAY_ADDRESS": address if origin == "$RAY_ADDRESS" else "127.0.0.1:1"}
        monkeypatch.setenv("RAY_ADDRESS", environment["RAY_ADDRESS"])
        given = {} if origin == "$RAY_ADDRESS" else {"address": address}
        config = resolve("generate", "m", "o", given, environment=environment)
        with pytest.raises(InputError) as caught, connected(config.address):
            pass
    assert str(caught.value) == (
        f"no Ray cluster answers at {address}, which is from {origin} (no answer in 0 s): correct it, or "
        f"leave it out to start a local Ray."
    )


@pytest.mark.parametrize(("timeout", "count"), [("0s", 1), ("5m", 10)])
def test_a_training_waits_for_ray_as_long_as_it_is_told(
    attempts, tmp_path, monkeypatch, capsys, timeout, count
):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    data = tmp_path / "rows.parquet"
    picture = [b""]
    pq.write_table(pa.table({"prompt": ["a red circle"], "picture": picture, "language": ["en"]}), data)
    recipes = tmp_path / "recipes.toml"
    recipes.write_text(
        f'part = "lm"\nbase = "{TINY}"\nfolder = "{tmp_path}/out"\nrate = 1e-3\nsteps = 1\n[stage]\n'
        f'data.generate = "{data}"\nrows.generate = 1\n',
        encoding="utf-8",
    )
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "stage", "--config", str(recipes), "--ray-start-timeout", timeout])
    assert left.value.code == 1
    assert "Ray failed to start within" in capsys.readouterr().err
    assert len(attempts) == count
