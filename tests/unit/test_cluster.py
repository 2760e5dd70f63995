"""Starting a local Ray that is slow. That one starts at all is for the tests that need it."""

import time

import pytest
import ray

from wallaroo.jobs.config import resolve
from wallaroo.model.errors import InputError
from wallaroo.workflows.cluster import connected


@pytest.fixture
def attempts(monkeypatch):
    """Ray as on a machine that is too busy: each attempt takes half a minute of this clock and fails."""
    seen = []

    def init(**options):
        seen.append(options)
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(time, "monotonic", lambda: 30.0 * len(seen))
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
