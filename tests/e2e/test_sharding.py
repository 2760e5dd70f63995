"""However a model is spread over processes, it learns the same, and a state fits any number of them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.training.cases import recipe as recipe_of
from tests.unit.training.test_stage import write_rows
from wallaroo.model.checkpoint import TINY, load, load_config, save
from wallaroo.model.errors import InputError
from wallaroo.model.training.fresh import fresh_model
from wallaroo.model.training.meter import MEASURED
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.sizing import Sizes
from wallaroo.model.training.stage import train

STEPS = 20


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A stage of twenty steps, with the optimizers of the small model's own recipes."""
    folder = tmp_path_factory.mktemp("sharding")
    values = {
        "part": "lm", "folder": str(folder / "alone"), "base": str(TINY), "steps": STEPS, "rate": 5e-4,
        "tasks": ["generate", "understand"], "size": 64, "frozen": ["vq."], "muon": True, "log_every": 1,
        "save_every": 7, "data": {"generate": str(write_rows(folder))}, "rows": {"generate": 8},
        "largest_loss": 0, "threads": 1,
    }  # fmt: skip
    return Recipe.from_dict(values)


def losses(folder):
    """Step -> its numbers that depend on the weights; the last line of a step that was made twice."""
    lines = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
    return {line.pop("step"): {k: v for k, v in line.items() if k not in MEASURED} for line in lines}


@pytest.fixture(scope="module")
def alone(recipe):
    """The checkpoint of one process that holds the whole model."""
    return train(recipe, lambda line: None)


def close(found, wanted):
    """Sums in another order differ by rounding, which twenty steps amplify, most of all in gradients."""
    assert list(found) == list(wanted)
    for step, line in wanted.items():
        for name, value in line.items():
            near = 1e-2 if name == "gradient_norm" else 1e-3
            assert found[step][name] == pytest.approx(value, rel=near), (step, name)


@pytest.mark.parametrize(
    ("workers", "shard", "more"),
    [
        (2, "none", {"accumulate": 2}),
        (4, "none", {"checkpointing": True}),
        (1, "full", {"accumulate": 2, "checkpointing": True}),
        (2, "full", {"checkpointing": True, "sample_every": 20}),
        (4, "full", {"accumulate": 2}),
    ],
)
def test_losses_do_not_depend_on_how_the_model_is_spread(recipe, alone, tmp_path, workers, shard, more):
    made = dataclasses.replace(recipe, folder=str(tmp_path / "out"), **more)
    said: list[str] = []
    folder = train(made, said.append, workers, shard)
    assert ("sharded" if shard == "full" else "whole model") in said[0]
    close(losses(folder), losses(alone))
    ours, theirs = load(alone).state_dict(), load(folder).state_dict()
    assert all(torch.allclose(ours[name], theirs[name], atol=5e-3) for name in ours)


def test_a_state_of_shards_goes_on_with_another_number_of_workers(recipe, alone, tmp_path):
    """A killed run of two sharded workers goes on with four, then in one process that holds all."""
    made = dataclasses.replace(recipe, folder=str(tmp_path / "out"))

    def kill_at(step):
        def say(line):
            if line.startswith(f"step {step} of"):
                raise KeyboardInterrupt

        return say

    for step, workers, shard in ((9, 2, "full"), (16, 4, "full")):
        with pytest.raises(KeyboardInterrupt):
            train(made, kill_at(step), workers, shard)
    folder = train(made, lambda line: None, 1, "none")
    close(losses(folder), losses(alone))
    # The states of steps 14 and 20 are left.
    assert sorted(path.name for path in (tmp_path / "out" / "state").iterdir()) == [
        "step-00000014", "step-00000020",
    ]  # fmt: skip


def test_bfloat16_is_for_products_and_the_learned_weights_stay_float32(recipe, alone, tmp_path):
    """Steps of a rate that bfloat16 would round away are not lost."""
    made = dataclasses.replace(
        recipe, folder=str(tmp_path / "out"), precision="bfloat16", rate=1e-6, muon=False
    )
    folder = train(made, lambda line: None, 2, "full")
    after, before = load(folder).state_dict(), load(TINY).state_dict()
    name = "language_model.layers.0.mlp.down_proj.weight"
    moved = (after[name] - before[name]).abs()
    assert 0 < moved.max() < 1e-4
    assert not torch.equal(after[name], after[name].bfloat16().float())
    first = losses(folder)[1]["loss"]
    assert first == pytest.approx(losses(alone)[1]["loss"], rel=2e-2)


def test_a_state_of_another_recipe_is_refused(recipe, alone):
    other = dataclasses.replace(recipe, folder=str(alone.parent), drop=0.5)
    alone.rename(alone.with_name("moved"))
    try:
        with pytest.raises(InputError, match=r"is of a recipe with drop = 0.1, not 0.5; give the old value"):
            train(other, lambda line: None)
    finally:
        alone.with_name("moved").rename(alone)


def test_a_worker_holds_its_share_and_a_layer(tmp_path):
    """At most 1.3 quarters of weights, gradients and optimizer with four workers, and what a gathered layer
    takes: two of them in float32, the gradient of one, and that once more to be summed."""
    config = load_config(TINY)
    decoder = dataclasses.replace(
        config.decoder, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, mrope_section=(8, 12, 12),
    )  # fmt: skip
    vision = dataclasses.replace(config.vision, out_hidden_size=512)
    config = dataclasses.replace(
        config, decoder=decoder, vision=vision, tasks=("generate", "understand"), layout="train"
    )
    tokenizer_json = (TINY / "tokenizer.json").read_text(encoding="utf-8")
    save(fresh_model(config, 0), config, tokenizer_json, tmp_path / "base")
    workers = 4
    command = [sys.executable, "-m", "tests.e2e.sharded_memory"]
    command += [str(tmp_path / "out"), str(tmp_path / "base"), str(tmp_path / "store")]
    # What is freed goes back to the machine at once, so that only what is held is measured.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(workers)],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(workers)
    ]
    sizes = Sizes(config, recipe_of(data={"generate": ""}, rows={"generate": workers}), half=False)
    bound = 1.3 * 16 * sizes.learning / workers + 16 * sizes.layer
    for process in processes:
        before, peak = map(int, process.communicate()[0].split())
        print(f"{(peak - before) / 1e6:.0f} MB of at most {bound / 1e6:.0f}")
        assert 12 * sizes.learning / workers < peak - before < bound
