"""Stages from a file, without Ray, in one process and in two."""

import base64
import dataclasses
import json

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
