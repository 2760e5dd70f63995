"""A manifest that grows under a schedule: each version of each row is made exactly once."""

import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.benchmarks.export_memory import write_output
from tests.damage import flip_bit
from tests.s3_proxy import proxy
from wallaroo.jobs import cli
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.datasets.compact import Compacted, compact
from wallaroo.workflows.outputs.layout import list_done, shard_path
from wallaroo.workflows.outputs.shards import open_shard, read_shard
from wallaroo.workflows.plans.plan import read_plan
from wallaroo.workflows.reports.status import status
from wallaroo.workflows.reports.verify import verify
from wallaroo.workflows.runs.driver import run
from wallaroo.workflows.runs.setup import plan
from wallaroo.workflows.settings import RunConfig
from wallaroo.workflows.storage.s3 import Ranges

SAMPLES = 2


def planned(output) -> list[tuple]:
    """Id, version, sample, shard and status of every planned row, in the order of its parts."""
    rows: list[tuple] = []
    for part in read_plan(str(output)).parts:
        table = pq.read_table(Path(output) / "plan" / part.file)
        names = ("row_id", "id", "version", "sample", "shard", "status")
        found = list(zip(*(table.column(name).to_pylist() for name in names), strict=True))
        assert [row[0] for row in found] == list(range(len(rows), len(rows) + len(found)))
        rows += [row[1:] for row in found]
    return rows


def test_what_is_new_in_lines(local_ray, tmp_path):
    """Rows that are new or say something new are planned, under numbers that go on; the others are not."""
    source, output = tmp_path / "prompts", tmp_path / "out"
    source.mkdir()

    def write(name, *rows):
        (source / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def look() -> list[tuple]:
        before = planned(output)
        plan(RunConfig(str(source), str(output), incremental=True, samples=SAMPLES))
        now = planned(output)
        assert now[: len(before)] == before
        return now[len(before) :]

    a, b = {"id": "a", "prompt": "a boat"}, {"id": "b", "prompt": "a bird"}
    write("1.jsonl", a, b)
    assert look() == [
        ("a", 0, 0, 0, "planned"),
        ("a", 0, 1, 0, "planned"),
        ("b", 0, 0, 0, "planned"),
        ("b", 0, 1, 0, "planned"),
    ]
    assert look() == []
    write("2.jsonl", {"id": "c", "prompt": "a cup", "cfg": 2})
    assert look() == [("c", 0, 0, 1, "planned"), ("c", 0, 1, 1, "planned")]
    # Changed, unchanged, and two new ones of one id.
    write("1.jsonl", a | {"prompt": "two boats"}, b, {"id": "d", "prompt": "x"}, {"id": "d", "prompt": "y"})
    assert look() == [
        ("a", 1, 0, 2, "planned"),
        ("a", 1, 1, 2, "planned"),
        ("d", 0, 0, 2, "planned"),
        ("d", 0, 1, 2, "planned"),
        ("d", 0, 0, 2, "error"),
    ]
    # What it once was is no news.
    write("1.jsonl", a)
    assert look() == []
    write("3.jsonl", {"id": "e", "prompt": "x", "topic": "new"})
    with pytest.raises(InputError, match="has the new column 'topic', but all rows of an output"):
        look()
    with pytest.raises(InputError, match="was made with --incremental, but this run is without"):
        plan(RunConfig(str(source), str(output), samples=SAMPLES))


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, 255 - shade, 7 * shade % 256)).save(file, "png")
    return file.getvalue()


def replicas_below(process: subprocess.Popen) -> list[psutil.Process]:
    """The replicas of a run with a Ray of its own."""
    found = []
    for one in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "Replica" in " ".join(one.cmdline()):
                found.append(one)
    return found


def test_five_scheduled_runs_of_a_growing_source(s3, local_ray, tmp_path):
    """Two of them overlap and one is killed; sources that are done with are gone, and nobody misses them."""
    source, output = f"{s3}/photos", f"{s3}/winter"
    expected: set[tuple[str, int, int]] = set()

    def put(name: str, shade: int, version: int = 0) -> None:
        storage.write_atomic(f"{source}/{name}", picture(shade))
        expected.update((name, version, sample) for sample in range(SAMPLES))

    def start() -> subprocess.Popen:
        command = ["edit", source, output, "--prompt", "make it winter", "--samples", str(SAMPLES)]
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "wallaroo.jobs.cli",
                *command,
                "--slots",
                "1",
                "--incremental",
                "--scheduled",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            start_new_session=True,
        )

    def finish(process: subprocess.Popen) -> str:
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, said
        return said

    for index in range(3):
        put(f"2026/{index}.png", index)
    finish(start())
    # They are done, and need not be there for a later run.
    storage.delete(f"{source}/2026/0.png")

    # The second and the third overlap.
    put("2026/1.png", 101, version=1)
    for index in range(3, 9):
        put(f"2026/{index}.png", index)
    second = start()
    while not storage.exists(f"{output}/plan/part-00001.json"):
        assert second.poll() is None, second.communicate()
        time.sleep(0.2)
    # On a slow machine it would be over before the third looks.
    while not (replicas := replicas_below(second)):
        assert second.poll() is None, second.communicate()
        time.sleep(0.1)
    for replica in replicas:
        replica.suspend()
    third = start()
    assert "is locked by an active run" in finish(third)
    for replica in replicas:
        replica.resume()
    finish(second)

    # The fourth is killed at work, with its Ray.
    for index in range(9, 18):
        put(f"2026/{index}.png", index)
    before = len(list_done(output))
    fourth = start()
    while len(list_done(output)) == before:
        assert fourth.poll() is None, fourth.communicate()
        time.sleep(0.2)
    os.killpg(fourth.pid, signal.SIGKILL)
    fourth.communicate()
    assert len(read_plan(output).parts) == 3

    # The fifth makes what the fourth left, and what came since.
    put("2026/2.png", 102, version=1)
    finish(start())
    made: list[tuple[str, int, int]] = []
    for shard in sorted(list_done(output)):
        with open_shard(output, shard) as parquet:
            table = parquet.read(columns=["id", "version", "sample", "status"])
        assert set(table.column("status").to_pylist()) == {"ok"}
        made += zip(*(table.column(name).to_pylist() for name in ("id", "version", "sample")), strict=True)
    assert len(made) == len(set(made)) and set(made) == expected
    assert len(read_plan(output).parts) == 4
    assert verify(output, lambda line: None).state == "complete"

    # Nothing is new, so nothing is done.
    assert "nothing to do" in finish(start())


def test_what_a_scheduler_is_told(local_ray, tmp_path):
    """Error rows are no failure to it, and a command is given how the run ended, well or not."""
    manifest, output = tmp_path / "prompts.jsonl", tmp_path / "out"
    manifest.write_text('{"prompt": "a boat"}\n{"prompt": " "}\n')

    def command(*arguments) -> int:
        with pytest.raises(SystemExit) as left:
            cli.main([*map(str, arguments), "--on-finish", f"cat > {tmp_path}/news"])
        return left.value.code

    assert command("generate", manifest, output, "--scheduled") == 0
    news = json.loads((tmp_path / "news").read_text())
    assert (news["state"], news["rows"], news["ok"], news["errors"]) == ("finished", 2, 1, 1)
    assert command("generate", manifest, output) == 3

    assert command("generate", tmp_path / "absent.jsonl", tmp_path / "other", "--scheduled") == 1
    news = json.loads((tmp_path / "news").read_text())
    assert news["state"] == "failed" and "absent.jsonl cannot be read" in news["message"]


def grow(folder: Path, number: int):
    """One more file of the manifest, and one more run: three rows, one that changes, and one that is bad."""
    size = {"width": 96, "height": 64}
    rows = [{"id": f"{number}-{i}", "prompt": f"a boat {i}"} | size for i in range(3)]
    rows += [{"id": "a", "prompt": f"version {number}"} | size, {"id": f"bad {number}", "prompt": " "} | size]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "prompts" / f"{number}.jsonl").write_text(lines)
    return run(RunConfig(str(folder / "prompts"), str(folder / "out"), incremental=True))


@pytest.fixture(scope="module")
def four_increments(local_ray, tmp_path_factory):
    folder = tmp_path_factory.mktemp("increments")
    (folder / "prompts").mkdir()
    for number in range(4):
        grow(folder, number)
    return folder


@pytest.fixture
def increments(four_increments, tmp_path):
    """A copy of an output of four increments, and what makes one more."""
    shutil.copytree(four_increments, tmp_path, dirs_exist_ok=True)
    return str(tmp_path / "out"), functools.partial(grow, tmp_path)


def contents(output: str) -> list[dict]:
    """All rows but for the shard that they are in, in their order."""
    return contents_of(output, sorted(list_done(output)))


def contents_of(output: str, shards: Iterable[int]) -> list[dict]:
    """The same of some shards."""
    rows: list[dict] = []
    for shard in shards:
        with open_shard(output, shard) as parquet:
            rows += parquet.read().drop_columns(["shard"]).to_pylist()
    return rows


def is_complete(output: str) -> bool:
    return verify(output, lambda line: None).state == "complete" and status(output).state == "finished"


def test_increments_are_compacted(increments):
    output, one_more = increments
    before = contents(output)
    assert len(list_done(output)) == 4 and len(before) == 20
    assert compact(output) == Compacted(4, 1)
    assert is_complete(output)
    assert contents(output) == before
    assert len(list((Path(output) / "data").iterdir())) == 1
    assert sorted(path.suffix for path in (Path(output) / "plan").iterdir()) == [
        ".json",
        ".parquet",
        ".parquet",
    ]
    assert compact(output) == Compacted(1, 1)

    # The next increment goes on, and knows what the merged ones had.
    summary = one_more(4)
    assert (summary.rows, summary.before) == (25, 20)
    rows = contents(output)
    assert rows[:20] == before
    assert [(row["id"], row["version"]) for row in rows if row["id"] == "a"] == [("a", i) for i in range(5)]
    assert is_complete(output)
    assert compact(output) == Compacted(2, 1)
    assert is_complete(output) and contents(output) == rows


def test_a_compaction_on_s3_reads_each_shard_once(s3, s3_server, monkeypatch):
    output = f"{s3}/grown"
    write_output(output, rows=120, shard_rows=2, side=16, increment_rows=12)
    before = contents(output)
    assert (len(list_done(output)), len(read_plan(output).parts)) == (60, 10)
    with proxy(s3_server.endpoint, share=0) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
        storage.forget_clients()
        assert compact(output) == Compacted(60, 1)
        asked = between.take()
    # One for a shard, and some for a part: its JSON (twice), its rows and what it planned.
    assert asked["GET"] <= 60 + 5 * 10 + 30, asked
    # Of the old files none is asked for or deleted by itself.
    assert asked["HEAD"] <= 30 and asked["POST"] + asked.get("DELETE", 0) <= 5, asked
    assert contents(output) == before
    assert verify(output, lambda line: None).state == "complete"


def test_a_shard_larger_than_two_windows_is_requested_once(s3, s3_server, monkeypatch):
    output = f"{s3}/one"
    write_output(output, rows=96, shard_rows=96, side=32)
    path = shard_path(output, 0)
    size = storage.info(path).size
    monkeypatch.setattr(Ranges, "WINDOW_BYTES", size // 3)
    with proxy(s3_server.endpoint, share=0) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
        storage.forget_clients()
        with open_shard(output, 0, size=size) as parquet:
            assert len(read_shard(parquet)) == 96
        assert size - len(b"PAR1") <= between.sent <= size and between.take()["GET"] <= 4


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(b"PAR1 nothing PAR1"),
        lambda path: flip_bit(path, "image.bytes"),
    ],
)
def test_a_compaction_names_a_shard_that_cannot_be_read(tmp_path, damage):
    output = str(tmp_path / "grown")
    write_output(output, rows=24, shard_rows=2, side=16, increment_rows=12)
    left = contents(output)[:8]
    damage(tmp_path / "grown" / "data" / "shard-00000004.parquet")
    with pytest.raises(
        InputError, match=r"shard-00000004\.parquet.*: (move it elsewhere, )?re-run"
    ) as caught:
        compact(output)
    assert "\n" not in str(caught.value)
    assert len(list_done(output)) >= 11 and contents_of(output, range(4)) == left


@pytest.mark.parametrize("moment", ["_replace_plan", "finish", "_remove_others"])
def test_a_compaction_that_is_cut_off(increments, monkeypatch, moment):
    """Whenever it ends, nothing is lost, an increment goes on, and the next try brings it to its end."""
    from wallaroo.workflows.datasets import compact as module

    output, one_more = increments
    before = contents(output)
    done = getattr(module, moment)
    calls = []

    def cut_off(*arguments):
        calls.append(moment)
        # Files are removed twice: of an earlier try, and at the end.
        if moment == "_remove_others" and len(calls) == 1:
            return done(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, moment, cut_off)
        with pytest.raises(KeyboardInterrupt):
            compact(output)
    assert one_more(4).rows == 25
    compact(output)
    assert is_complete(output)
    assert contents(output)[:20] == before and len(contents(output)) == 25
    assert len(list_done(output)) <= 2


def test_what_cannot_be_compacted(local_ray, tmp_path):
    manifest, output = tmp_path / "prompts.jsonl", str(tmp_path / "out")
    manifest.write_text('{"prompt": "a boat", "width": 96, "height": 64}\n')
    plan(RunConfig(str(manifest), output, incremental=True))
    with pytest.raises(InputError, match="is not finished"):
        compact(output)
    run(RunConfig(str(manifest), str(tmp_path / "other")))
    with pytest.raises(InputError, match="was made without --incremental"):
        compact(str(tmp_path / "other"))
