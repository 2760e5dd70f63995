"""The start of a run: what it reads, and what it makes before the first shard, counted."""

from collections import Counter

import pytest
import ray

from tests.e2e.test_generate import read_data, write_jsonl
from wallaroo.actors import watch
from wallaroo.model import checkpoint
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import list_done, part_name
from wallaroo.workflows.plans import checks, planner
from wallaroo.workflows.plans.plan import Plan, PlanPart, read_plan
from wallaroo.workflows.plans.settings import PlanSettings
from wallaroo.workflows.runs import driver, setup
from wallaroo.workflows.runs.feed import TASK_PARTS, shard_stream
from wallaroo.workflows.runs.streaming import arriving
from wallaroo.workflows.settings import RunConfig

pytestmark = pytest.mark.usefixtures("local_ray")

ROWS = [{"id": "s0", "prompt": "a red circle", "aspect_ratio": "1:1"}]
WINDOW = 7


def counting(monkeypatch, counts, module, name, key=None):
    """Counts the calls of `module.name`, under its name and what `key` makes of the first argument."""
    plain = getattr(module, name)

    def counted(*args, **kwargs):
        counts[name if key is None else f"{name} {key(args[0])}"] += 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)


def test_a_first_start_looks_up_nothing_twice(tmp_path, monkeypatch):
    config = RunConfig(
        write_jsonl(tmp_path / "prompts.jsonl", ROWS), str(tmp_path / "out"), slots=4, device="cpu"
    )
    counts, before_shards = Counter(), {}
    for module, name in (
        (setup, "discover"),
        (planner, "discover"),
        (setup, "read_checkpoint"),
        (checkpoint, "check"),
        (checks, "read_plan"),
        (PlanSettings, "check"),
        (driver, "find_run"),
        (setup, "put_run"),
        (setup, "check_run"),
    ):
        counting(monkeypatch, counts, module, name)
    counting(monkeypatch, counts, storage, "read_bytes", lambda path: path.rpartition("/")[2])
    counting(monkeypatch, counts, storage, "list_files", lambda path: path.rpartition("/")[2])
    plain = driver.find_remaining

    def looked(*args):
        before_shards.update(counts)
        return plain(*args)

    monkeypatch.setattr(driver, "find_remaining", looked)
    assert driver.run(config).ok == 1
    # `check` is that of the settings and that of the checkpoint.
    assert before_shards.pop("check") == 2
    assert before_shards.pop("put_run") == 1 and "check_run" not in before_shards
    for name in ("discover", "read_checkpoint", "read_plan", "find_run"):
        assert before_shards.pop(name) == 1, name
    assert before_shards.pop("list_files plan") == 1
    assert set(before_shards.values()) <= {1}, before_shards


def plan_of(shards, part_shards=1024):
    """A plan of so many shards of one row, as long plans are cut into parts."""
    constants = {"shard_rows": 1, "error_rows": 0, "errors": {}, "sizes": {}, "complete": False}
    return Plan(
        tuple(
            PlanPart(
                part=number,
                file=f"{part_name(number)}.parquet",
                round=0,
                first_row_id=first,
                first_shard=first,
                rows=min(part_shards, shards - first),
                shards=min(part_shards, shards - first),
                **constants,
            )
            for number, first in enumerate(range(0, shards, part_shards))
        )
    )


def puts_until(shards, window, monkeypatch):
    """Objects that the driver has put into Ray before a pipeline of so many shards gave `window` of them."""
    counts = Counter()
    with monkeypatch.context() as patch:
        counting(patch, counts, ray, "put")
        handle = watch.start()
        ray.get(handle.admit.remote(window))
        arrivals = arriving(lambda: shard_stream(plan_of(shards), range(shards), handle))
        found = []
        while len(found) < window:
            found += [row["shard"] for row in next(arrivals)]
        assert found == list(range(window))
        # Nothing comes beyond the window.
        assert next(arrivals) == []
        ray.kill(handle)
        arrivals.close()
    return counts["put"]


def test_what_is_made_before_the_first_shard_does_not_grow_with_the_queue(monkeypatch):
    few = puts_until(1_000, WINDOW, monkeypatch)
    many = puts_until(40_000, WINDOW, monkeypatch)
    # 40 parts instead of one, 16 of them an object; no shard is one.
    assert few < 20 and many - few == -(-40 // TASK_PARTS) - 1


def test_every_shard_comes_once_and_in_order_with_its_place_in_the_plan():
    handle = watch.start()
    queue = [3 * number for number in range(50)]
    found, most = [], 0
    ray.get(handle.admit.remote(WINDOW))
    for rows in arriving(lambda: shard_stream(plan_of(150, part_shards=8), queue, handle)):
        found += [(row["shard"], row["plan_file"], row["row_group"]) for row in rows]
        most = max(most, len(rows))
        ray.get(handle.admit.remote(len(found) + WINDOW))
    ray.kill(handle)
    assert found == [(shard, f"part-{shard // 8:05d}.parquet", shard % 8) for shard in queue]
    assert 1 <= most <= WINDOW


def test_a_run_of_more_shards_than_its_window_writes_them_all(tmp_path, monkeypatch):
    # Refused at planning, so that no replica takes its time.
    rows = [{"id": f"w{number:03d}", "prompt": " "} for number in range(400)]
    config = RunConfig(
        write_jsonl(tmp_path / "prompts.jsonl", rows), str(tmp_path / "out"), slots=4, device="cpu"
    )
    pools = []
    plain = driver.make_pool
    monkeypatch.setattr(driver, "make_pool", lambda *args: pools.append(plain(*args)) or pools[-1])
    assert driver.run(config).errors == len(rows)
    shards = read_plan(config.output).shards
    assert pools[0].window < len(shards) and list_done(config.output) == set(shards)
    assert read_data(config.output)["id"].to_pylist() == [row["id"] for row in rows]
