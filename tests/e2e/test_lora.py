"""Updates of low rank learn, alone, and merged into a checkpoint they draw what they have learned."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.unit.training.cases import rows
from tests.unit.training.test_stage import write_rows
from wallaroo.jobs import cli
from wallaroo.model.checkpoint import TINY, disk_tensors, load, load_tokenizer, verify_files
from wallaroo.model.errors import InputError
from wallaroo.model.training.data import from_memory
from wallaroo.model.training.lm import LMLearner
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.sharding import fill
from wallaroo.model.training.stage import train
from wallaroo.model.training.start import empty_start, start_weights


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    values = {
        "part": "lm", "folder": str(folder / "out"), "base": str(TINY), "steps": 6, "rate": 5e-3, "lora": 4,
        "data": {"generate": str(write_rows(folder))}, "rows": {"generate": 4}, "largest_loss": 0,
        "log_every": 1, "save_every": 2, "learn": ["gen_image_head."], "drop": 0.0,
    }  # fmt: skip
    return Recipe.from_dict(values)


@pytest.fixture(scope="module")
def learned(recipe):
    return train(recipe, lambda line: None)


def command(*arguments):
    with pytest.raises(SystemExit) as left:
        cli.main([*map(str, arguments)])
    return left.value.code


def losses(folder):
    lines = (folder.parent / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_updates_begin_as_nothing_and_the_loss_falls(recipe, learned):
    found = losses(learned)
    plain = dataclasses.replace(recipe, folder=f"{recipe.folder}-plain", lora=0, steps=1)
    assert found[0] == pytest.approx(losses(train(plain, lambda line: None))[0], rel=1e-6)
    assert found[-1] < 0.9 * found[0]


def test_updates_and_what_is_named_learn_alone(recipe, learned):
    stored = load_file(learned / "updates.safetensors")
    head = {name for name in stored if name.startswith("gen_image_head.")}
    layers = len(load(TINY).language_model.layers)
    assert len(head) == 3 and len(stored) == 3 + layers * 4 * 2
    assert all(tensor.abs().max() > 0 for tensor in stored.values())
    shapes = {tuple(stored[name].shape) for name in stored if "o_proj.lora" in name}
    assert shapes == {(4, 128), (128, 4)}


@pytest.fixture(scope="module")
def merged(recipe, learned, tmp_path_factory):
    output = tmp_path_factory.mktemp("merged") / "merged"
    assert command("merge", recipe.folder, output, "--dtype", "float32") == 0
    return output


def test_the_merged_checkpoint_computes_what_the_updated_model_does(recipe, learned, merged):
    verify_files(merged)
    model = empty_start(recipe, "cpu")
    fill(model, start_weights(recipe, model.config), recipe.seed)
    updates = load_file(learned / "updates.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in updates:
                parameter.copy_(updates[name])
    tokenizer, data = load_tokenizer(TINY), {"generate": rows()["generate"]}
    made, plain = (
        LMLearner(one, tokenizer, from_memory(data, 0), recipe) for one in (model.eval(), load(merged))
    )
    batch = made.batch(0, 0)
    with torch.no_grad():
        ours, theirs = (learner.module(*batch) for learner in (made, plain))
    for name in ours:
        assert ours[name] == pytest.approx(float(theirs[name]), rel=1e-5)


def test_what_has_no_update_is_that_of_the_start(merged):
    before, after = disk_tensors(load(TINY)), disk_tensors(load(merged))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert all("_proj.weight" in name or name.startswith("gen_image_head.") for name in changed)
    assert sum("language_model" in name for name in changed) == 4 * 7


def test_a_checkpoint_is_merged_over_only_if_told(recipe, merged, tmp_path, capsys):
    output = tmp_path / "there"
    output.mkdir()
    (output / "thesis.tex").write_text("mine")
    assert command("merge", recipe.folder, output, "--dtype", "float32") == 1
    assert "it holds thesis.tex: name a new folder, or --overwrite" in capsys.readouterr().err
    assert [file.name for file in output.iterdir()] == ["thesis.tex"]
    assert command("merge", recipe.folder, output, "--dtype", "float32", "--overwrite") == 0
    assert (output / "thesis.tex").read_text() == "mine"
    verify_files(output)
    assert (output / "checkpoint.json").read_bytes() == (merged / "checkpoint.json").read_bytes()
    assert command("merge", recipe.folder, TINY, "--dtype", "float32", "--overwrite") == 1
    assert "is read, so it cannot be written" in capsys.readouterr().err


def test_the_merged_checkpoint_draws(merged, tmp_path):
    manifest = tmp_path / "prompts.jsonl"
    manifest.write_text(json.dumps({"prompt": "a red circle"}) + "\n")
    assert command("generate", manifest, tmp_path / "drawn", "--model", merged, "--device", "cpu") == 0
    [file] = (tmp_path / "drawn" / "data").glob("*.parquet")
    import pyarrow.parquet as pq
    from PIL import Image

    [row] = pq.read_table(file).to_pylist()
    assert np.array(Image.open(io.BytesIO(row["image"]["bytes"]))).std() > 0


def test_updates_are_sharded_and_resumed_too(recipe, learned, tmp_path):
    made = dataclasses.replace(recipe, folder=str(tmp_path / "out"), checkpointing=True)

    def kill(line):
        if line.startswith("step 4 of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(made, kill, 2, "full")
    assert losses(train(made, lambda line: None, 1, "full"))[-1] == pytest.approx(
        losses(learned)[-1], rel=1e-3
    )


def test_updates_of_another_start_are_refused(recipe, learned, merged, tmp_path, capsys):
    assert command("merge", recipe.folder, tmp_path / "o", "--start", merged) == 1
    assert "is not the checkpoint that the updates of" in capsys.readouterr().err
    assert command("merge", merged, tmp_path / "o") == 1
    assert "holds no updates of LoRA" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_targets": ["q_proj"]}, "lora_targets has 'q_proj', which no layer has"),
        ({"part": "vq", "data": {"vq": "x"}, "rows": {"vq": 2}}, "the image tokenizer has no such layers"),
    ],
)
def test_updates_that_cannot_be_are_refused(recipe, changes, words):
    with pytest.raises(InputError, match=words):
        Recipe.from_dict(dataclasses.asdict(recipe) | changes)
