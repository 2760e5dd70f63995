"""Stages from a file, without Ray, in one process and in two."""

import base64
import dataclasses
import json
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

from tests.unit.training.cases import rows
from wallaroo.model.checkpoint import TINY, load, load_config
from wallaroo.model.config import Size
from wallaroo.model.errors import InputError
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.stage import train
from wallaroo.model.training.start import start_model

RECIPES = """
base = "{base}"
rows.generate = 2
data.generate = "{data}"
rate = 1e-3
log_every = 1
largest_loss = 0

[first]
part = "lm"
folder = "{folder}/first"
tasks = ["generate", "understand"]
size = 64
steps = 2
sample_every = 2

[second]
part = "lm"
folder = "{folder}/second"
start = "{folder}/first/checkpoint"
steps = 2
"""


def write_rows(folder):
    """Rows to generate as JSON lines in a folder; gives the Parquet file beside which they would stand."""
    lines = folder / "generate.jsonl"
    with open(lines, "w", encoding="utf-8") as file:
        for row in rows()["generate"]:
            file.write(json.dumps({**row, "picture": base64.b64encode(row["picture"]).decode()}) + "\n")
    return lines.with_suffix(".parquet")


def recipes(folder):
    """A file of recipes in a folder, with the rows that they name."""
    text = RECIPES.format(base=TINY, data=write_rows(folder), folder=folder)
    (folder / "recipes.toml").write_text(text)
    return folder / "recipes.toml"


@pytest.mark.numerics
def test_two_processes_without_ray_do_what_one_does(tmp_path):
    file = recipes(tmp_path)
    made = [
        train(
            dataclasses.replace(Recipe.from_file(file, "first"), folder=str(tmp_path / name), muon=True),
            workers=workers,
        )
        for name, workers in (("one", 1), ("two", 2))
    ]
    losses = [
        [json.loads(line)["loss"] for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
        for folder in made
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    one, two, before = (
        torch.cat([tensor.flatten() for tensor in model.state_dict().values()])
        for model in (*map(load, made), start_model(Recipe.from_file(file, "first")))
    )
    # A weight whose gradient is nothing but rounding moves by the whole rate in each step, either way. There
    # are few of those, so that on average the weights differ by far less than they were moved.
    apart = (one - two).abs()
    assert apart.max() <= 2 * 2 * 1e-3
    assert apart.mean() < 1e-3 * (one - before).abs().mean()


def test_processes_that_cannot_share_a_step_are_refused(tmp_path):
    with pytest.raises(InputError, match="a multiple of 5"):
        train(Recipe.from_file(recipes(tmp_path), "first"), workers=5)


def test_stages_follow_each_other_from_a_file_without_ray(tmp_path):
    """A square stage, then all sizes with the parts for editing drawn anew; each gives a checkpoint."""
    recipes(tmp_path)
    said: list[str] = []
    first = train(Recipe.from_file(tmp_path / "recipes.toml", "first"), said.append)
    assert said[-1].startswith("step 2 of 2: loss ") and said[-1].endswith("tokens/s")
    config = load_config(first)
    assert (config.size_list(), config.line_break) == ([Size(64, 64)], False)
    assert config.tasks == ("generate", "understand")
    assert Image.open(first.parent / "sample-000002.png").size == (8 * 64, 64)
    metrics = (first.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2]
    second = train(Recipe.from_file(tmp_path / "recipes.toml", "second"), said.append)
    assert load_config(second).size_list() == load_config(TINY).size_list()
    before, after = load(first).language_model.state_dict(), load(second).language_model.state_dict()
    assert not all(torch.equal(before[name], after[name]) for name in after)
    assert all(torch.allclose(before[name], after[name], atol=0.01) for name in after)
    assert train(Recipe.from_file(tmp_path / "recipes.toml", "second"), said.append) == second
    assert "nothing to do" in said[-1]
    with pytest.raises(InputError, match=r"no stage 'secnd'.*second"):
        Recipe.from_file(tmp_path / "recipes.toml", "secnd")


def test_losses_of_held_out_rows_are_logged_and_change_nothing(tmp_path):
    """The same with one worker and with two sharded ones."""
    file = recipes(tmp_path)
    plain = dataclasses.replace(Recipe.from_file(file, "first"), steps=4, folder=str(tmp_path / "plain"))
    held = dataclasses.replace(plain, held_out=plain.data, validate_every=2, validate_steps=3)
    made = {
        name: train(dataclasses.replace(one, folder=str(tmp_path / name)), lambda line: None, workers, shard)
        for name, one, workers, shard in (
            ("plain", plain, 1, "none"),
            ("held", held, 1, "none"),
            ("two", held, 2, "full"),
        )
    }
    lines = {
        name: [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
        for name, folder in made.items()
    }
    learned = {name: [line["loss"] for line in some if "loss" in line] for name, some in lines.items()}
    assert learned["plain"] == learned["held"]
    told = {
        name: [
            (line["step"], line["held_out_generate_image"])
            for line in some
            if "held_out_generate_image" in line
        ]
        for name, some in lines.items()
    }
    assert [step for step, _ in told["held"]] == [2, 4] and not told["plain"]
    assert told["held"][1][1] < told["held"][0][1]
    assert [value for _, value in told["two"]] == pytest.approx(
        [value for _, value in told["held"]], rel=1e-3
    )


def test_rows_with_bad_pictures_are_replaced_and_told_of(tmp_path):
    """By the same rows however many workers there are; what cannot be opened and what breaks off."""
    file = recipes(tmp_path)
    lines = (tmp_path / "generate.jsonl").read_text().splitlines()
    for index, cut in ((1, 9), (4, 70)):
        row = json.loads(lines[index])
        row["picture"] = base64.b64encode(base64.b64decode(row["picture"])[:cut]).decode()
        lines[index] = json.dumps(row)
    (tmp_path / "generate.jsonl").write_text("\n".join(lines) + "\n")
    made = dataclasses.replace(
        Recipe.from_file(file, "first"), steps=6, sample_every=0, lengths={"generate": 300}, threads=1
    )
    folders = [
        train(
            dataclasses.replace(made, folder=str(tmp_path / str(workers))), lambda line: None, workers
        ).parent
        for workers in (1, 2)
    ]
    logs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in folders
    ]
    # Twelve rows of six: two epochs, with two bad pictures each.
    assert [log[-1]["bad_rows"] for log in logs] == [4, 4]
    assert [line["loss"] for line in logs[0]] == pytest.approx([line["loss"] for line in logs[1]], rel=1e-3)
    for folder in folders:
        told = [json.loads(line) for line in (folder / "errors.jsonl").read_text().splitlines()]
        assert sorted(line["message"].split(" bytes")[0] for line in told) == [
            "An image of 70", "An image of 9",
        ]  # fmt: skip
        assert all(line["task"] == "generate" and "its sha256 is" in line["message"] for line in told)


def test_a_file_of_bad_pictures_alone_ends_the_training(tmp_path):
    file = recipes(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "generate.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**line, "picture": "aGVsbG8="}) + "\n" for line in lines)
    (tmp_path / "generate.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"consecutive rows cannot be used, the last: generate: An image"):
        train(Recipe.from_file(file, "first"), lambda line: None)


def test_sigterm_saves_the_state_and_a_rerun_has_the_same_losses(tmp_path):
    """The command without Ray, in two processes, stopped in the middle of its steps."""
    file = recipes(tmp_path)
    whole = dataclasses.replace(Recipe.from_file(file, "first"), folder=str(tmp_path / "whole"), steps=30)
    wanted = train(whole, lambda line: None, 2).parent / "metrics.jsonl"
    file.write_text(file.read_text().replace("steps = 2\nsample_every = 2", "steps = 30\nsave_every = 100"))
    command = [sys.executable, "-m", "model.training", str(file), "first", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 3 of"):
            process.send_signal(signal.SIGTERM)
            break
    _, said = process.communicate()
    assert process.returncode == 1 and "SIGTERM received; the state is saved" in said, said
    [state] = (tmp_path / "first" / "state").iterdir()
    assert 3 <= int(state.name.removeprefix("step-")) < 30
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == list(range(1, 31))
    losses = [json.loads(line)["loss"] for line in wanted.read_text().splitlines()]
    assert [line["loss"] for line in found] == pytest.approx(losses, rel=1e-4)


def test_no_room_for_a_state_is_one_sentence(tmp_path):
    """A limit on the size of files stands for a full disk; the state before it stays."""
    file = recipes(tmp_path)
    file.write_text(file.read_text().replace("steps = 2\nsample_every = 2", "steps = 4\nsave_every = 2"))
    program = (
        "import resource, runpy, sys\n"
        "from wallaroo.model.training import stage, state\n"
        "begin = state.States.save\n"
        "def save(self, step, *rest):\n"
        "    if step == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "    begin(self, step, *rest)\n"
        "state.States.save = save\n"
        f"sys.argv = ['training', {str(file)!r}, 'first']\n"
        "runpy.run_module('wallaroo.model.training', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("model.training: The state cannot be written to ") and "make room" in last, last
    assert "Traceback" not in done.stderr
    whole = [path.parent.name for path in (tmp_path / "first" / "state").glob("*/.metadata")]
    assert whole == ["step-00000002"]


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", ["notes.txt", "metrics.jsonl", "stop", "checkpoint/thesis.tex", "state/mine/thesis.tex"]
)
def test_a_stage_stays_out_of_a_folder_of_other_files(tmp_path, name):
    recipe = Recipe.from_file(recipes(tmp_path), "first")
    path = tmp_path / "first" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(InputError, match=rf"{name.partition('/')[0]}.*|no stage made it"):
        train(recipe, lambda line: None)
    assert files_of(tmp_path / "first") == {name: b"mine"}


def test_a_stage_writes_beside_other_files_if_so_told(tmp_path):
    recipe = dataclasses.replace(Recipe.from_file(recipes(tmp_path), "first"), save_every=1)
    theirs = {"notes.txt": b"mine", "state/mine/thesis.tex": b"mine", "state/12/.metadata": b"mine"}
    for name, data in theirs.items():
        (tmp_path / "first" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "first" / name).write_bytes(data)
    with pytest.raises(
        InputError, match=r"it holds notes\.txt, state/12/\.metadata, state/mine/thesis\.tex;"
    ):
        train(recipe, lambda line: None)
    made = train(recipe, lambda line: None, overwrite=True)
    found = files_of(tmp_path / "first")
    assert made == tmp_path / "first" / "checkpoint" and theirs.items() <= found.items()
    # It is a stage's now, and more files of others are no trouble.
    (tmp_path / "first" / "more.txt").write_text("mine")
    (made / "checkpoint.json").unlink()
    with pytest.raises(InputError, match="checkpoint exists, and no stage made it: move it elsewhere"):
        train(recipe, lambda line: None)
    made.rename(tmp_path / "elsewhere")
    assert train(recipe, lambda line: None) == made
    assert files_of(tmp_path / "first")["more.txt"] == b"mine"


def test_a_stage_of_an_older_version_goes_on_without_the_mark(tmp_path):
    recipe = dataclasses.replace(Recipe.from_file(recipes(tmp_path), "first"), save_every=1)
    made = train(recipe, lambda line: None)
    (tmp_path / "first" / "stage.json").unlink()
    made.rename(tmp_path / "elsewhere")
    assert train(recipe, lambda line: None) == made
    assert (tmp_path / "first" / "stage.json").is_file()


def test_the_command_without_ray_has_the_remedy_that_it_names(tmp_path):
    words = [sys.executable, "-m", "wallaroo.model.training", str(recipes(tmp_path)), "first"]
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "notes.txt").write_text("mine")
    told = subprocess.run(words, capture_output=True, text=True)
    assert told.returncode == 1 and "it holds notes.txt; name another folder in the recipe" in told.stderr
    done = subprocess.run([*words, "--overwrite"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == str(tmp_path / "first" / "checkpoint")
    assert (tmp_path / "first" / "notes.txt").read_text() == "mine"
