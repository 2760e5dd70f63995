"""Records of runs: what they count, how they stay small, and what the status makes of them."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest

from wallaroo.actors.watch import WatchCounts
from wallaroo.model.errors import InputError
from wallaroo.workflows.outputs import layout, run_file, run_log, shards
from wallaroo.workflows.outputs.run_log import MAX_SAMPLES, RunLog, RunRecord
from wallaroo.workflows.reports.finish import finish
from wallaroo.workflows.reports.status import status
from wallaroo.workflows.reports.tally import Tally
from wallaroo.workflows.runs.monitor import MAX_DEATHS, check_health
from wallaroo.workflows.runs.pool import make_pool
from wallaroo.workflows.settings import RunConfig
from wallaroo.workflows.text import duration


class Clock:
    """Seconds since the epoch that go on when told."""

    def __init__(self):
        self.now = 1_800_000_000.0

    def __call__(self):
        return self.now


def counted(done, before=0, rows=100, **more):
    return {"rows": rows, "done": done, "before": before, "errors": {}, "images": done - before} | more


def test_a_record_counts_and_is_rewritten_every_ten_seconds(tmp_path):
    clock = Clock()
    output = str(tmp_path)
    log = RunLog(output, {"replicas": [1, 2]}, clock)
    path = tmp_path / "runs" / "0001.json"
    first = path.read_bytes()
    assert RunRecord.from_json(first).state == "running"
    clock.now += 4
    log.update(**counted(20, before=20))
    clock.now += 4
    log.update(**counted(30, before=20, errors={"size": 2}))
    assert path.read_bytes() == first
    clock.now += 4
    log.update(**counted(40, before=20, errors={"size": 2}, retries={"storage": 1}, waits={"replica": 3.5}))
    record = RunRecord.from_json(path.read_bytes())
    assert (record.rows, record.done, record.before, record.images) == (100, 40, 20, 20)
    assert (record.errors, record.retries, record.waits) == ({"size": 2}, {"storage": 1}, {"replica": 3.5})
    assert (record.seconds, record.first_row_seconds) == (12, 8)
    assert record.overall_rate == pytest.approx(20 / 12, rel=1e-3) and record.rate == 20 / 8
    assert record.samples == [[4, 20, 0], [8, 30, 2], [12, 40, 2]]
    assert (record.host, record.pid) == (socket.gethostname(), os.getpid())
    assert record.options == {"replicas": [1, 2]} and record.versions["pyarrow"]
    clock.now += 1
    log.end("finished")
    assert RunRecord.from_json(path.read_bytes()).state == "finished"


def test_the_rate_is_that_of_the_last_minute(tmp_path):
    clock = Clock()
    log = RunLog(str(tmp_path), {}, clock)
    for second in range(300):
        clock.now += 1
        log.update(**counted(min(second, 200), rows=1000))
    # For the last 99 seconds nothing was done.
    assert log.record.rate == 0 and log.record.overall_rate == pytest.approx(200 / 300, rel=1e-3)


def test_the_time_until_a_replica_is_up_is_no_part_of_the_rate(tmp_path):
    clock = Clock()
    log = RunLog(str(tmp_path), {}, clock)
    for second in range(40):
        clock.now += 1
        log.update(**counted(max(0, 2 * (second - 29)), rows=1000), replicas=int(second >= 30))
    # Two rows a second for ten seconds, after half a minute of loading.
    assert log.record.rate == 2 and log.record.overall_rate == 0.5


def test_each_start_takes_the_next_number(tmp_path):
    output = str(tmp_path)
    numbers = [RunLog(output, {}).record.run for _ in range(3)]
    assert numbers == [1, 2, 3] == layout.record_numbers(output)
    (tmp_path / "runs" / "0002.json").unlink()
    assert RunLog(output, {}).record.run == 4
    assert [record.run for record in run_log.read_records(output)[0]] == [1, 3, 4]


def test_a_long_run_has_a_short_record(tmp_path):
    clock = Clock()
    log = RunLog(str(tmp_path), {}, clock)
    most = 0
    for step in range(4_000):
        clock.now += 1
        log.update(**counted(step, rows=4_000))
        most = max(most, len(log.record.samples))
    log.end("finished")
    samples = log.record.samples
    assert MAX_SAMPLES / 2 < len(samples) <= most <= MAX_SAMPLES
    times = [sample[0] for sample in samples]
    assert times == sorted(times) and times[0] == 1 and times[-1] == 4_000
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert max(gaps) <= 32
    assert os.path.getsize(layout.record_path(str(tmp_path), 1)) < 50_000


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (InputError("s3://b cannot be used."), "failed", "s3://b cannot be used."),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt: KeyboardInterrupt"),
        (ValueError("x\ny"), "failed", "ValueError: x"),
    ],
)
def test_a_record_says_how_the_run_ended(tmp_path, error, state, message):
    with pytest.raises(type(error)), RunLog(str(tmp_path), {}):
        raise error
    [record], _ = run_log.read_records(str(tmp_path))
    assert (record.state, record.message) == (state, message)
    with RunLog(str(tmp_path), {}):
        pass
    assert run_log.read_records(str(tmp_path))[0][1].state == "finished"


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"state": "asleep"},
        {"done": "40"},
        {"samples": [[1, 2]]},
        {"samples": [[1, 2, "<script>"]]},
        {"errors": {"size": None}},
        {"seconds": float("nan")},
        {"rate": float("inf")},
        {"updated": "yesterday"},
        {"extra": 1},
    ],
)
def test_a_record_that_is_none_is_told_and_passed_over(tmp_path, changes):
    log = RunLog(str(tmp_path), {})
    path = tmp_path / "runs" / "0001.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))
    assert run_log.read_records(str(tmp_path)) == ([], [layout.record_path(str(tmp_path), 1)])
    path.write_bytes(b"{")
    assert run_log.read_records(str(tmp_path))[1]
    assert RunLog(str(tmp_path), {}).record.run == log.record.run + 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (48, "48 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_durations_are_told_as_people_do(seconds, words):
    assert duration(seconds) == words


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_status_of_an_output_from_plan_to_end(outputs, tmp_path):
    output, clock = str(tmp_path), Clock()
    with pytest.raises(InputError, match="there is no such folder, or it is empty"):
        status(output)
    run_file.put_run(output, outputs.FIELDS)
    assert status(output).state == "empty"
    assert "  rows    0 of ?, 0 errors\n" in status(output).text()
    tables = [outputs.plan_table(rows=6, first_row=6 * n, shard=n) for n in range(2)]
    plan = outputs.make_output(tmp_path, tables, failed={0: (1,)}, skip={1})
    assert status(output).state == "unfinished"

    log = RunLog(output, {}, clock)
    clock.now += 4
    found = status(output, clock)
    assert "  speed   not measured\n" in found.text() and "active for 4 s" in found.text()
    assert "rows/s" not in found.line()
    clock.now += 16
    log.update(**counted(0, rows=12))
    clock.now += 20
    log.update(**counted(6, rows=12, errors={"engine": 1}, retries={"storage": 2}, waits={"replica": 5}))
    clock.now += 5
    found = status(output, clock)
    assert (found.state, found.planned, found.shards, found.done_shards) == ("running", 12, 2, 1)
    text = found.text()
    assert text.startswith(f"{output}: running")
    for words in (
        "active for 45 s",
        "6 of 12, 1 error (1 engine)",
        "1 of 2 shards",
        "20 s left",
        "storage 2",
        "replica 5 s",
        "5 s ago",
    ):
        assert words in text
    clock.now += 600
    assert status(output, clock).state == "silent"

    clock.now -= 600
    log.record.pid = dead_pid()
    clock.now += 10
    log.update(**counted(6, rows=12))
    assert status(output, clock).state == "silent"

    log.end("failed", "s3://b cannot be used.")
    found = status(output, clock)
    assert found.state == "failed" and "s3://b cannot be used." in found.text()

    shards.write_shard(output, 1, outputs.result_table(outputs.plan_table(rows=6, first_row=6, shard=1)))
    finish(output, plan)
    found = status(output, clock)
    assert (found.state, found.done_shards) == ("finished", 2)
    (tmp_path / "runs" / "0001.json").write_text("{")
    found = status(output, clock)
    assert found.record is None and "0001.json cannot be read" in found.text()
    assert "12 of 12, 1 error (1 engine)" in found.text()


def test_status_counts_the_rows_of_files_that_are_newer_than_the_heartbeat(outputs, tmp_path):
    output, clock = str(tmp_path), Clock()
    sizes = (6, 6, 4)
    tables = [outputs.plan_table(rows=rows, first_row=6 * n, shard=n) for n, rows in enumerate(sizes)]
    outputs.make_output(tmp_path, tables, skip={1})
    log = RunLog(output, {}, clock)
    clock.now += 10
    log.update(**counted(3, rows=16))
    clock.now += 7
    found = status(output, clock)
    # The first file has six rows, the last one four.
    assert (found.done_shards, found.done, found.planned) == (2, 10, 16)
    assert "rows    10 of 16" in found.text() and "10 of 16 rows" in found.line()
    # Rows are counted before the file of their shard is whole.
    clock.now += 4
    log.update(**counted(12, rows=16))
    assert status(output, clock).done == 12
    # Rows that are retried lie in files already.
    log = RunLog(output, {"retry_errors": True}, clock)
    clock.now += 10
    log.update(**counted(3, rows=16))
    assert status(output, clock).done == 3


@pytest.mark.parametrize(
    ("rows", "errors", "limit", "stops"),
    [
        (20, 3, 0.1, True),
        (20, 2, 0.1, False),  # the rate itself is allowed
        (19, 19, 0.1, False),  # too few rows to judge
        (20, 20, None, False),
        (20, 1, 0.0, True),
    ],
)
def test_a_run_ends_at_its_error_rate(rows, errors, limit, stops):
    config = RunConfig("", "", max_error_rate=limit)
    made = Tally(rows=rows, ok=rows - errors, errors=Counter(engine=errors))
    if not stops:
        return check_health(config, WatchCounts(), made)
    words = rf"{errors} of {rows} rows are errors \({errors} engine\), more than the --max-error-rate of"
    with pytest.raises(InputError, match=f"{words} {limit:g} allows"):
        check_health(config, WatchCounts(), made)


def test_a_run_ends_with_a_shard_whose_replicas_die_and_teach_nothing():
    deaths = MAX_DEATHS + 1
    counts = WatchCounts(fruitless=deaths, hardest_shard=12, last_death="CUDA error")
    with pytest.raises(InputError, match=f"{deaths} replicas died on shard 12.* 'CUDA error': try fewer"):
        check_health(RunConfig("", ""), counts, Tally())
    check_health(RunConfig("", ""), WatchCounts(fruitless=MAX_DEATHS), Tally())


@pytest.mark.parametrize(("replicas", "slots", "window"), [(1, 16, 12), (8, 16, 96), (64, 128, 2560)])
def test_the_window_is_twice_what_the_stages_of_a_run_hold(replicas, slots, window):
    # 1,600 rows in 100 shards: a replica holds one or eight of them and one more.
    config = RunConfig("", "", replicas=(1, replicas), slots=slots)
    pool = make_pool(config, "cuda", 1_600, 100)
    assert pool.calls == 1 + slots // 16 and pool.window == window
    # The queue makes no difference.
    longer = make_pool(config, "cuda", 1_600_000, 100_000)
    assert longer.window == window
