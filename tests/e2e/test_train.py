"""`wallaroo train` on a real Ray: two workers on gloo do what one process does, killed or not."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.clusters import may_mount, started_head, started_node
from wallaroo.jobs import cli
from wallaroo.model.checkpoint import TINY, load, load_config, load_tokenizer
from wallaroo.model.config import Size
from wallaroo.model.engine.engine import Engine
from wallaroo.model.engine.options import EngineOptions
from wallaroo.model.engine.requests import Request
from wallaroo.model.prompts import generate_prompt
from wallaroo.model.sampling import Sampling
from wallaroo.model.training.meter import MEASURED
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.stage import train as train_alone
from wallaroo.workflows import storage
from wallaroo.workflows.scenes import captions, write
from wallaroo.workflows.storage.checkpoints import fetch_folder
from wallaroo.workflows.training.driver import check
from wallaroo.workflows.training.rows import read

STEPS = 10
RECIPES = """
part = "lm"
base = "{base}"
folder = "{folder}"
tasks = ["generate", "understand"]
size = 64
frozen = ["vq."]
data.generate = "{data}/generate.parquet"
data.understand = "{data}/understand.parquet"
rows.generate = 4
rows.understand = 4
rate = 1e-3
accumulate = 2
log_every = 1
save_every = 2
largest_loss = 0
threads = 1

[stage]
steps = {steps}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of two tasks, as Parquet and as JSON lines."""
    folder = tmp_path_factory.mktemp("data")
    for task in ("generate", "understand"):
        found = captions.examples(20, 5, [Size(64, 64)], False, (task,))
        rows = [write.to_values(example, str(number)) for number, example in enumerate(found)]
        lines = "".join(write.to_line(row) + "\n" for row in rows)
        (folder / f"{task}.jsonl").write_text(lines, encoding="utf-8")
        for row in rows if task == "understand" else ():
            row["image"] = {"bytes": row["image"], "path": None}
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{task}.parquet")
    return folder


def recipes(folder, data, text=RECIPES):
    """A file of recipes with one stage, whose folder is `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".toml")
    path.write_text(text.format(base=TINY, data=data, folder=folder, steps=STEPS), encoding="utf-8")
    return path


def command(path, *arguments):
    """Exit code of `wallaroo train stage`, in this process."""
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "stage", "--config", str(path), *arguments])
    return left.value.code


def losses(folder):
    """Step -> its losses; the last line of a step that was made twice."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line.pop("step"): {k: v for k, v in line.items() if k not in MEASURED} for line in lines}


def workers(but=()):
    """The processes of Ray Train's workers, but for some."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()) and process not in but:
                found.append(process)
    return found


def last_step(folder):
    """The last step of the log so far, of which a line may be half written; 0 before the first."""
    with suppress(FileNotFoundError):
        whole = (folder / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
        return max((json.loads(line)["step"] for line in whole), default=0)
    return 0


def events(folder):
    return sorted(folder.glob("events.out.tfevents.*"))


def test_rows_are_read_in_the_order_of_their_files(local_ray, s3, data):
    """From S3 too, whatever task reads a file first, and over the ends of blocks."""
    [line, *_] = pq.read_table(data / "generate.parquet").to_pylist()
    numbers = list(range(3 * 30))
    for part in range(3):
        rows = [
            {**line, "prompt": f"第 {number}" if number % 2 else f"cat {number}", "language": None}
            for number in numbers[part::3]
        ]
        text = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), text, row_group_size=20)
        storage.write_atomic(f"{s3}/part-{part}.parquet", text.getvalue().to_pybytes())
    values = {"part": "lm", "base": str(TINY), "folder": "unused", "steps": 1, "rate": 1e-3}
    recipe = Recipe.from_dict(values | {"data": {"generate": f"{s3}/*.parquet"}, "rows": {"generate": 1}})
    rows = read("generate", check(recipe, 1)["generate"], recipe)
    assert len(rows.blocks) > 1 and len(rows) == len(numbers)
    found = list(rows)
    wanted = [number for part in range(3) for number in numbers[part::3]]
    assert [int(row["prompt"].split()[1]) for row in found] == wanted
    assert all(row["language"] == ("zh" if "第" in row["prompt"] else "en") for row in found)
    assert set(rows[len(rows) - 1]) == {"prompt", "picture", "language"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data, local_ray):
    """The folder of a stage that two workers have trained."""
    folder = tmp_path_factory.mktemp("train") / "undisturbed"
    assert command(recipes(folder, data), "--workers", "2", "--device", "cpu") == 0
    return folder


def test_two_workers_do_what_one_process_does(tmp_path, data, undisturbed):
    alone = tmp_path / "alone"
    train_alone(Recipe.from_file(recipes(alone, data), "stage"), lambda line: None)
    ours, theirs = losses(alone), losses(undisturbed)
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    for step, line in ours.items():
        assert theirs[step] == pytest.approx(line, rel=1e-3, abs=1e-6), step
    assert ours[STEPS]["loss"] < ours[1]["loss"]


def test_a_killed_worker_is_replaced_and_the_losses_are_the_same(tmp_path, data, undisturbed):
    folder, killed, earlier = tmp_path / "killed", [], workers()

    def kill():
        # Found while they start, since steps are short.
        while not (found := workers(but=earlier)):
            time.sleep(0.1)
        # In the middle: after a step that was saved, and one that was not.
        while last_step(folder) < 3:
            time.sleep(0.02)
        found[0].kill()
        killed.append(found[0].pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert command(recipes(folder, data), "--workers", "2", "--device", "cpu") == 0
    killer.join(300)
    # Each start of the workers writes a file of its own.
    assert killed and (len(events(folder)), len(events(undisturbed))) == (2, 1)
    assert losses(folder) == losses(undisturbed)


def test_the_checkpoint_draws(undisturbed, capsys):
    folder = undisturbed / "checkpoint"
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    assert (config.size_list(), config.tasks) == ([Size(64, 64)], ("generate", "understand"))
    prompt, null = (
        generate_prompt(tokenizer, config, text, Size(64, 64), "en") for text in ("a red circle", "")
    )
    request = Request(0, prompt, null, Size(64, 64), 1, Sampling())
    engine = Engine(load(folder, "generate"), "generate", EngineOptions(slots=2, group_rows=2))
    [drawn] = engine.run([request])
    assert drawn.pixels.shape == (64, 64, 3)
    # Given again, the command finds it.
    assert command(undisturbed.with_suffix(".toml"), "--workers", "2") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_metrics_are_in_tensorboard_files(undisturbed):
    [file] = events(undisturbed)
    read = EventAccumulator(str(file)).Reload()
    for name in ("loss", "generate_image", "understand_text", "rate", "gradient_norm"):
        told = {event.step: event.value for event in read.Scalars(name)}
        assert told == pytest.approx({step: line[name] for step, line in losses(undisturbed).items()})
    assert {event.step for event in read.Scalars("tokens_per_second")} == set(range(1, STEPS + 1))


def test_streamed_rows_give_the_same_losses_with_any_number_of_workers(tmp_path, data, capsys):
    """With one worker that is stopped by SIGTERM and goes on, and with two that are not."""
    text = RECIPES.replace("threads = 1", "threads = 1\nstream = true")
    two = tmp_path / "two"
    assert command(recipes(two, data, text), "--workers", "2", "--device", "cpu") == 0
    one, stopped, earlier = tmp_path / "one", [], workers()

    def stop():
        while not (found := workers(but=earlier)):
            time.sleep(0.1)
        while last_step(one) < 3:
            time.sleep(0.02)
        # Held until it can be told, or it would be through on a machine that is slow to tell it.
        found[0].suspend()
        os.kill(os.getpid(), signal.SIGTERM)
        while not (one / "stop").exists():
            time.sleep(0.02)
        found[0].resume()
        stopped.append(True)

    stopper = threading.Thread(target=stop, daemon=True)
    stopper.start()
    path = recipes(one, data, text.replace("save_every = 2", "save_every = 100"))
    assert command(path, "--workers", "1", "--device", "cpu", "--grace", "300") == 5
    stopper.join(300)
    assert stopped and "saved state is kept; re-run the same command to resume" in capsys.readouterr().err
    [state] = [folder.name for folder in (one / "state").iterdir()]
    assert 3 <= int(state.removeprefix("step-")) < STEPS
    assert not (one / "stop").exists()
    assert command(path, "--workers", "1", "--device", "cpu") == 0
    ours, theirs = losses(one), losses(two)
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    for step, line in ours.items():
        assert theirs[step] == pytest.approx(line, rel=1e-3, abs=1e-6), step


def put(folder, where):
    """Copies a folder to S3."""
    for file in folder.iterdir():
        storage.write_atomic(f"{where}/{file.name}", file.read_bytes())


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount: root, or user namespaces")
def test_a_stage_on_two_nodes_that_share_no_disk_loses_one_and_goes_on(tmp_path, data, undisturbed, s3):
    """All that it reads and writes is on S3 alone, and losses are those of a run on one disk."""
    put(TINY, f"{s3}/base")
    put(data, f"{s3}/data")
    path, out = tmp_path / "s3.toml", f"{s3}/out"
    text = RECIPES.replace("{base}", f"{s3}/base").replace("{data}", f"{s3}/data").replace("{folder}", out)
    path.write_text(text.replace("{steps}", str(STEPS)), encoding="utf-8")

    def states():
        return [file.relative for file in storage.list_files(f"{out}/state")]

    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    program = [str(Path(sys.executable).with_name("wallaroo")), "train", "stage", "--config", str(path)]
    options = ["--workers", "2", "--device", "cpu", "--shard", "full"]
    with started_head(["--num-cpus=0"]) as head, ExitStack() as nodes:
        end, _ = (nodes.enter_context(started_node(head, [tmp_path])) for _ in range(2))
        variables = {**head.environment, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
        with subprocess.Popen(
            [*program, *options, "--address", head.gcs],
            env=variables,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            watchdog = threading.Timer(900, process.kill)
            watchdog.start()
            try:
                while process.poll() is None and not any(name.endswith("/.metadata") for name in states()):
                    time.sleep(0.1)
                if process.poll() is None:
                    end()
                    nodes.enter_context(started_node(head, [tmp_path]))
                said, _ = process.communicate()
            finally:
                watchdog.cancel()
                process.kill()
    assert process.returncode == 0, said
    lines = [json.loads(line) for line in storage.read_bytes(f"{out}/metrics.jsonl").splitlines()]
    found = {line["step"]: line["loss"] for line in lines}
    wanted = {step: line["loss"] for step, line in losses(undisturbed).items()}
    assert found == pytest.approx(wanted, rel=1e-3)
    assert {name.partition("/")[0] for name in states()} == {"step-00000008", "step-00000010"}
    # Each start of the workers writes a file of its own.
    assert sum("tfevents" in file.relative for file in storage.list_files(out)) == 2
    ours = load(fetch_folder(f"{out}/checkpoint", cache=tmp_path / "fetched")).state_dict()
    theirs = load(undisturbed / "checkpoint").state_dict()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in theirs)


def test_a_plan_counts_rows_and_memory_and_starts_nothing(tmp_path, data, capsys):
    folder = tmp_path / "planned"
    assert command(recipes(folder, data), "--plan", "--workers", "4", "--gpu-memory", "0.1") == 2
    assert "4 workers" in capsys.readouterr().err
    assert command(recipes(folder, data), "--plan", "--workers", "2") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "generate: 20 rows in 1 files, 2.0 epochs of at most these"
    assert any(line.startswith("2 workers, whole model: ") and line.endswith(": fits") for line in said)
    assert any(line.startswith("8 workers: The recipe has 4 rows of generate") for line in said)
    assert not (folder / "state").exists()


def test_a_gpu_that_is_not_there_says_what_to_do(local_ray, tmp_path, data, capsys):
    assert command(recipes(tmp_path / "gpu", data), "--device", "cuda", "--workers", "2") == 1
    assert capsys.readouterr().err == (
        "wallaroo: 2 workers need a GPU each, but this machine has 0: give --device cpu, or the --address of "
        "a cluster with GPUs.\n"
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("rate = ", "rates = ", "unknown key 'rates'; did you mean 'rate'?"),
        ("rate = 1e-3", 'rate = "fast"', "rate is 'fast', but must be a number"),
        ("rows.generate = 4", "rows.generate = 6", "6 rows of generate a step, but needs a multiple of 4"),
        ("{data}/generate.parquet", "{data}/none.parquet", "none.parquet is not a Parquet file"),
        ("{data}/generate.parquet", "{data}/generate.jsonl", "generate.jsonl is not a Parquet file"),
        ("{data}/generate.parquet", "{data}/understand.parquet", "has no column picture"),
        ("{base}", "{folder}", "is not a checkpoint|cannot be read"),
        ('part = "lm"', 'part = "vq"', "the image tokenizer learns in one process"),
        ("[stage]", "[stages]", "no stage 'stage'; did you mean 'stages'?"),
        ("threads = 1", 'precision = "half"', "precision is 'half', but must be one of auto"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(tmp_path, data, capsys, old, new, words):
    assert old in RECIPES
    path = recipes(tmp_path / "wrong", data, RECIPES.replace(old, new))
    assert command(path, "--workers", "2") == 2
    said = capsys.readouterr().err.splitlines()
    assert any(word in said[0] for word in words.split("|")), said
    assert said[0].startswith("wallaroo: ") and said[1:] in ([], ["Help: wallaroo train --help"])
