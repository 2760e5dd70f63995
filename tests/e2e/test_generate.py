"""Runs of the generate task on a real Ray: the same rows whatever replicas, order, kills and storage do."""

import dataclasses
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wallaroo.actors.replica import Replica
from wallaroo.model.checkpoint import TINY
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.api import generate
from wallaroo.workflows.outputs.layout import list_done, shard_path
from wallaroo.workflows.outputs.run_log import read_records
from wallaroo.workflows.outputs.schema import VOLATILE
from wallaroo.workflows.outputs.success import read_success
from wallaroo.workflows.plans.plan import read_plan
from wallaroo.workflows.reports.verify import verify
from wallaroo.workflows.runs.driver import run
from wallaroo.workflows.settings import RunConfig

ROOT = Path(__file__).parents[2]
SIZES = [(128, 64), (64, 128), (96, 64), (112, 128)]
ROWS = [
    {
        "id": f"p{number:02d}",
        "prompt": f"一只猫，编号{number}" if number % 5 == 0 else f"a cat, number {number}",
        "width": SIZES[number % 4][0],
        "height": SIZES[number % 4][1],
        "cfg": 1.0 if number % 7 == 3 else 3.0,
        # At 1 the model is so sure that two seeds may give one picture, and a mistaken row would not show.
        "temperature": 3.0,
        "tag": f"t{number % 3}",
        "include": [{"class": "cat", "count": number}],
    }
    for number in range(22)
]
REFUSED = [
    {**ROWS[3], "prompt": "the id is taken"},
    {**ROWS[0], "id": "blank", "prompt": " \n"},
    {**ROWS[0], "id": "wide", "width": 70},
]
SAMPLES = 2
PLANNED = SAMPLES * len(ROWS) + 1 + 2 * SAMPLES


def write_jsonl(path, rows):
    path = str(path)
    storage.write_atomic(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode())
    return path


def read_data(output):
    """All rows of a data set, in the order of their row_id."""
    names = [file.path for file in storage.list_files(storage.join(output, "data"))]
    tables = []
    for name in names:
        filesystem, inner = storage.parquet_filesystem(name)
        tables.append(pq.read_table(inner, filesystem=filesystem))
    return pa.concat_tables(tables).sort_by("row_id")


def hashes(table):
    """(id, sample) -> what the row is: status, kind of error, sha256."""
    columns = ("id", "sample", "status", "error_type", "sha256")
    rows = list(zip(*(table.column(name).to_pylist() for name in columns), strict=True))
    found = {(name, sample, kind): (status, sha) for name, sample, status, kind, sha in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="module")
def base(folder, local_ray):
    """A plain run with one replica: its configuration, summary and progress."""
    config = RunConfig(
        manifest=write_jsonl(folder / "prompts.jsonl", ROWS + REFUSED),
        output=str(folder / "base"),
        samples=SAMPLES,
        save_tokens=True,
        slots=16,
        device="cpu",
    )
    seen = []
    summary = run(config, seen.append)
    return config, summary, seen


def test_a_run_makes_every_planned_row_once(base):
    config, summary, _ = base
    table = read_data(config.output)
    assert table.column("row_id").to_pylist() == list(range(PLANNED))
    assert (summary.rows, summary.ok, summary.errors, summary.before) == (PLANNED, 44, 5, 0)
    kinds = Counter(table.column("error_type").to_pylist())
    assert kinds == {"": 44, "id": 1, "prompt": 2, "size": 2}
    rows = table.to_pylist()
    assert all(row["tag"] == f"t{int(row['id'][1:]) % 3}" for row in rows if row["id"].startswith("p"))
    assert json.loads(rows[-7]["include"]) == ROWS[21]["include"]
    ok = [row for row in rows if row["status"] == "ok"]
    assert all((row["width"] // 16) * (row["height"] // 16) == len(row["tokens"]) for row in ok)
    assert len({row["sha256"] for row in ok}) == len(ok)
    assert len({row["environment_digest"] for row in ok}) == 1
    assert {row["attempts"] for row in ok} == {1}
    said = []
    assert verify(config.output, said.append).state == "complete", said


def test_progress_counts_up_to_all_rows(base):
    _, _, seen = base
    known = [progress for progress in seen if progress.rows]
    assert all(progress.rows == PLANNED and progress.before == 0 for progress in known)
    done = [progress.done for progress in known]
    assert done == sorted(done) and done[-1] == PLANNED
    assert known[-1].errors == 5
    # Rows are counted one by one, not by the file.
    output, whole_files = base[0].output, {0}
    for shard in list_done(output):
        whole_files |= {count + pq.read_metadata(shard_path(output, shard)).num_rows for count in whole_files}
    assert set(done) - whole_files
    assert seen[0].waiting and not known[-1].waiting


def test_a_run_leaves_a_record_a_report_and_a_list_of_errors(base):
    config, _, _ = base
    records, unreadable = read_records(config.output)
    assert not unreadable
    assert [(one.state, one.done, one.images, one.errors) for one in records] == [
        ("finished", PLANNED, 44, {"id": 1, "prompt": 2, "size": 2})
    ]
    assert storage.exists(storage.join(config.output, "report.html"))
    lines = storage.read_bytes(storage.join(config.output, "errors.jsonl")).decode().splitlines()
    assert {json.loads(line)["kind"] for line in lines} == {"id", "prompt", "size"}
    assert read_success(config.output)["rows"] == PLANNED
    names = {file.relative for file in storage.list_files(config.output)}
    assert not any("lock" in name or "tmp" in name for name in names)


def test_a_finished_run_does_no_work_again_and_starts_no_ray(base):
    config, _, _ = base
    before = storage.list_files(config.output)
    program = (
        "import pickle, sys; from wallaroo.workflows.runs.driver import run; "
        "summary = run(pickle.load(sys.stdin.buffer)); "
        "print(summary.rows, summary.before, summary.ok, summary.errors, 'ray' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps(config),
        cwd=ROOT,
        capture_output=True,
        timeout=600,
    )
    assert ended.stdout.decode().split() == ["49", "49", "44", "5", "False"], ended.stderr.decode()
    assert storage.list_files(config.output) == before


def test_an_output_of_another_run_is_refused_before_anything_is_written(base):
    config, _, _ = base
    before = storage.list_files(config.output)
    with pytest.raises(InputError, match="seed is 0 in the output and 5 in this run"):
        run(dataclasses.replace(config, seed=5))
    with pytest.raises(
        InputError, match=r'mode is absent in the output and "cfg-interval 0\.0:0\.5" in this run'
    ):
        run(dataclasses.replace(config, cfg_interval=(0, 0.5)))
    assert storage.list_files(config.output) == before


def test_the_same_rows_with_two_replicas_in_another_order_after_a_look(base, folder):
    config, _, _ = base
    shuffled = ROWS + REFUSED[1:]
    random.Random(0).shuffle(shuffled)
    # Of equal ids the first is kept, so this one stays behind.
    shuffled.append(REFUSED[0])
    for number in range(3):
        write_jsonl(folder / "shuffled" / f"{number}.jsonl", shuffled[9 * number : 9 * number + 9])
    other = dataclasses.replace(
        config,
        manifest=str(folder / "shuffled"),
        output=str(folder / "shuffled-out"),
        replicas=(1, 2),
        slots=None,
        limit=5,
    )
    look = run(other)
    assert look.rows == 5 * SAMPLES == read_success(other.output)["rows"]
    looked = read_data(other.output)
    files = storage.list_files(storage.join(other.output, "data"))
    whole = dataclasses.replace(other, limit=None)
    with pytest.raises(InputError, match="strict"):
        run(dataclasses.replace(whole, strict=True, threads=2))
    assert len(list_done(other.output)) == len(files)
    summary = run(dataclasses.replace(whole, strict=True))
    assert (summary.rows, summary.before, summary.errors) == (PLANNED, 5 * SAMPLES, 5)
    table = read_data(other.output)
    assert hashes(table) == hashes(read_data(config.output))
    assert set(files) <= set(storage.list_files(storage.join(other.output, "data")))
    assert table.slice(0, len(looked)).equals(looked)
    assert len({*table.column("replica").to_pylist()} - {""}) > 1


def test_a_replica_that_dies_is_started_again_and_loses_no_row(base, folder):
    config, _, _ = base
    mark = folder / "died"

    class DiesOnce(Replica):
        def _turn(self, engine):
            step = engine.step

            def dies():
                found = step()
                # With rows in its slots, and some given back.
                if engine.counts["steps"] == 60 and not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return found

            engine.step = dies
            super()._turn(engine)

    other = dataclasses.replace(config, output=str(folder / "died-out"))
    summary = run(other, replica=DiesOnce)
    assert mark.exists() and summary.ok == 44
    table, wanted = read_data(other.output), read_data(config.output)
    assert table.drop_columns(VOLATILE).equals(wanted.drop_columns(VOLATILE))
    assert max(table.column("attempts").to_pylist()) == 2
    records, _ = read_records(other.output)
    assert records[-1].retries == {"replicas that died": 1}


def test_a_killed_run_on_s3_keeps_its_finished_shards_and_goes_on(base, folder, s3):
    config, _, _ = base
    for file in TINY.iterdir():
        storage.write_atomic(f"{s3}/model/{file.name}", file.read_bytes())
    manifest = write_jsonl(f"{s3}/prompts.jsonl", ROWS + REFUSED)
    output = f"{s3}/out"
    command = [
        sys.executable,
        "-m",
        "wallaroo.jobs.cli",
        "generate",
        manifest,
        output,
        "--model",
        f"{s3}/model",
    ]
    command += ["--samples", str(SAMPLES), "--save-tokens", "--slots", "16", "--device", "cpu"]
    with open(folder / "killed.log", "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        while not (finished := list_done(output)):
            assert process.poll() is None, (folder / "killed.log").read_text()
            time.sleep(0.1)
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        agents = []
        for one in family:
            with suppress(psutil.NoSuchProcess):
                agents += [one] if "Agent" in one.name() else []
        process.kill()
        process.wait()
    shards = set(read_plan(output).shards)
    assert finished < shards
    # Ray's agents may take minutes to see that they are alone; nothing that writes rows may stay behind.
    _, alive = psutil.wait_procs([one for one in family if one not in agents], timeout=300)
    assert not alive
    for agent in agents:
        with suppress(psutil.NoSuchProcess):
            agent.kill()
    left = storage.list_files(f"{output}/data")
    assert set(finished) <= list_done(output) < shards
    assert read_success(output) is None

    there = dataclasses.replace(config, manifest=manifest, output=output, model=f"{s3}/model")
    summary = run(there)
    assert summary.before == sum(pq_rows(file.path) for file in left)
    assert (summary.rows, summary.ok, summary.errors) == (PLANNED, 44, 5)
    assert set(left) <= set(storage.list_files(f"{output}/data"))
    table, wanted = read_data(output), read_data(config.output)
    assert table.drop_columns(VOLATILE).equals(wanted.drop_columns(VOLATILE))
    said = []
    assert verify(output, said.append).state == "complete", said
    assert [one.state for one in read_records(output)[0]] == ["running", "finished"]


def pq_rows(path):
    filesystem, inner = storage.parquet_filesystem(path)
    return pq.read_metadata(inner, filesystem=filesystem).num_rows


def test_a_dataset_becomes_a_dataset_with_the_same_pictures(base):
    import ray.data

    config, _, _ = base
    rows = [{**row, "include": json.dumps(row["include"])} for row in ROWS + REFUSED]
    ds = ray.data.from_items(rows, override_num_blocks=4)
    pictures = generate(ds, samples=SAMPLES, save_tokens=True, device="cpu", replicas=2).materialize()
    table = pa.concat_tables(ray.get(pictures.to_arrow_refs())).sort_by("row_id")
    wanted = read_data(config.output)
    assert table.column("row_id").to_pylist() == list(range(PLANNED))
    assert hashes(table) == hashes(wanted)
    assert sorted(table.column_names) == sorted(wanted.column_names)
    assert table.column("image").type == wanted.column("image").type
    for name in ("tag", "tokens", "seed", "content_digest"):
        assert table.column(name).to_pylist() == wanted.column(name).to_pylist()
    assert {row["mode"] for row in table.to_pylist()} == {"exact"}
    (lossy,) = generate(ds.limit(1), device="cpu", cfg_interval=(0, 0.5)).take_all()
    (same,) = (row for row in wanted.to_pylist() if (row["id"], row["sample"]) == (lossy["id"], 0))
    assert (lossy["mode"], lossy["seed"]) == ("cfg-interval 0.0:0.5", same["seed"])
    assert lossy["sha256"] != same["sha256"] and lossy["content_digest"] != same["content_digest"]


def test_a_dataset_that_cannot_be_planned_is_refused_at_once(local_ray):
    import ray.data

    ds = ray.data.from_items([{"prompt": "a cat"}])
    with pytest.raises(InputError, match="no option 'sampels'; did you mean 'samples'"):
        generate(ds, sampels=2)
    with pytest.raises(InputError, match="did you mean 'promt'"):
        generate(ray.data.from_items([{"promt": "a cat"}]))
    with pytest.raises(InputError, match="seed"):
        generate(ds, seed=-1)
    assert generate(ds.limit(0)).count() == 0


def test_rows_that_the_plan_refuses_need_no_replica(folder, local_ray):
    class Never(Replica):
        def __init__(self, **options):
            raise AssertionError("nobody asked for a replica")

    config = RunConfig(
        manifest=write_jsonl(folder / "blank.jsonl", [{"prompt": " "}] * 30),
        output=str(folder / "blank"),
        max_error_rate=0.5,
    )
    with pytest.raises(InputError, match="more than the --max-error-rate"):
        run(config, replica=Never)
    assert read_success(config.output) is None
    summary = run(dataclasses.replace(config, max_error_rate=None), replica=Never)
    assert (summary.rows, summary.ok, summary.errors) == (30, 0, 30)


def test_a_fault_in_a_stage_arrives_as_its_sentence(base, folder):
    config, _, _ = base

    class Loses(Replica):
        async def __call__(self, row):
            raise InputError("the device is on strike: wait for it.")

    other = dataclasses.replace(config, output=str(folder / "fault"))
    with pytest.raises(InputError) as caught:
        run(other, replica=Loses)
    assert str(caught.value) == "the device is on strike: wait for it."
    assert read_records(other.output)[0][-1].message == str(caught.value)


def test_a_checkpoint_that_lacks_a_tensor_is_refused_before_a_replica_starts(folder, local_ray):
    model = folder / "model"
    shutil.copytree(TINY, model)
    (model / "model.safetensors").unlink()
    config = RunConfig(
        manifest=write_jsonl(folder / "one.jsonl", ROWS[:1]),
        output=str(folder / "no-model"),
        model=str(model),
    )
    with pytest.raises(InputError, match="is missing, so the checkpoint is incomplete"):
        run(config)
    assert not storage.list_files(config.output)


# A stranger asks the head itself: Ray's own start would try for minutes before it says that it is refused.
LOCAL_RAY = """
import json, os, subprocess, sys
import psutil
from wallaroo.workflows.cluster import connected

STRANGER = "import sys; from ray._raylet import GcsClient; "
STRANGER += "print(GcsClient(address=sys.argv[1]).internal_kv_keys(b'', b'session', timeout=300))"

with connected():
    import ray
    family = psutil.Process().children(recursive=True)
    # A dual-stack socket shows an IPv4 address as one of IPv6.
    addresses = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in [psutil.Process(), *family]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    command = [sys.executable, "-c", STRANGER, ray.get_runtime_context().gcs_address]
    environment = {name: value for name, value in os.environ.items() if "RAY_" not in name}
    found = []
    for token in (None, "0" * 64, os.environ["RAY_AUTH_TOKEN"]):
        given = {} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        ended = subprocess.run(command, env=environment | given, capture_output=True, text=True)
        found.append((ended.returncode, ended.stdout + ended.stderr))
_, alive = psutil.wait_procs(family, timeout=300)
print(json.dumps([sorted(addresses), found, len(family), len(alive)]))
"""


def test_a_local_ray_is_for_its_own_process_and_says_nothing(tmp_path):
    environment = {name: value for name, value in os.environ.items() if "RAY_" not in name}
    environment["HOME"] = str(tmp_path)
    ended = subprocess.run(
        [sys.executable, "-c", LOCAL_RAY],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.stderr == ""
    addresses, found, started, alive = json.loads(ended.stdout)
    assert addresses == ["127.0.0.1"]
    for code, words in found[:2]:
        assert code != 0 and "Authentication token is missing or incorrect" in words
    assert found[2] == [0, "[b'session_name']\n"]
    assert started > 2 and not alive
    assert not (tmp_path / ".ray").exists()
