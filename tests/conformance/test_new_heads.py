"""Training stage 1 starts from a Qwen2.5-VL folder and an image tokenizer in their published layouts."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.conformance.released import flat_config, split, write_backbone, write_vq, zeros
from tests.conformance.test_convert import byte_tokenizer_json, small_config
from tests.unit.training.test_stage import write_rows
from wallaroo.jobs import cli
from wallaroo.model.checkpoint import check, load, load_config
from wallaroo.model.config import TASKS
from wallaroo.model.training.fresh import fresh_tensor
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.stage import train

NEW = ("gen_image_head.", "gen_input_adapter.", "edit_image_head.", "edit_input_adapter.", "pixel_adapter.")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The published files of a small architecture: backbone in bfloat16 and two parts, image tokenizer."""
    folder, config = tmp_path_factory.mktemp("published"), small_config()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape.shape, generator=generator) * 0.1 for name, shape in zeros(config).items()
    }
    wallaroo, vq = split(tensors)
    backbone = write_backbone(
        folder / "backbone", flat_config(config.decoder, config.vision), byte_tokenizer_json()
    )
    stock = {
        name.removeprefix("wallaroo."): tensor.bfloat16()
        for name, tensor in wallaroo.items()
        if name.startswith("wallaroo.")
    }
    names, places = sorted(stock), {}
    for number, some in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: stock[name] for name in some}, backbone / file, {"format": "pt"})
        places |= dict.fromkeys(some, file)
    (backbone / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return backbone, write_vq(folder / "vq.pt", vq), tensors


def command(*arguments):
    with pytest.raises(SystemExit) as left:
        cli.main(["convert", *map(str, arguments)])
    return left.value.code


@pytest.fixture(scope="module")
def start(published, tmp_path_factory):
    backbone, vq, _ = published
    output = tmp_path_factory.mktemp("start") / "start"
    assert command("--new-heads", "--vq", vq, "--backbone", backbone, "--seed", "3", output) == 0
    return output


def test_the_start_has_the_published_weights_and_new_heads(published, start):
    config = check(start)
    assert (config.layout, config.tasks) == ("train", TASKS)
    stored = {}
    for file in start.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            stored |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    for name, tensor in published[2].items():
        if name.startswith(NEW):
            assert torch.equal(stored[name], fresh_tensor(name, tensor.shape, 3)), name
        elif name.startswith("vq."):
            assert torch.equal(stored[name], tensor), name
        else:
            assert torch.equal(stored[name], tensor.bfloat16()), name
    head = stored["gen_image_head.0.weight"]
    assert head.std() > 0 and not torch.equal(head, stored["edit_image_head.0.weight"])


def test_stage_1_moves_the_new_head_and_adapter_alone(start, tmp_path):
    values = {
        "part": "lm", "folder": str(tmp_path / "out"), "base": str(start), "steps": 2, "rate": 1e-3,
        "tasks": ["generate", "understand"], "size": 64, "learn": ["gen_image_head.", "gen_input_adapter."],
        "data": {"generate": str(write_rows(tmp_path))}, "rows": {"generate": 2}, "largest_loss": 0,
    }  # fmt: skip
    made = train(Recipe.from_dict(values), lambda line: None)
    assert load_config(made).line_break is False
    before, after = load(start).state_dict(), load(made).state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in moved} == {"gen_image_head", "gen_input_adapter"}
    assert len(moved) == 7


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--wallaroo", "x.ckpt"], "--wallaroo does not go with --new-heads"),
        (["--square", "384"], "--square does not go with --new-heads"),
        (["--understanding-only"], "--understanding-only does not go with --new-heads"),
    ],
)
def test_options_of_the_published_model_do_not_go_with_new_heads(published, tmp_path, capsys, more, words):
    backbone, vq, _ = published
    assert command("--new-heads", "--vq", vq, "--backbone", backbone, *more, tmp_path / "o") == 2
    assert words in capsys.readouterr().err


def test_a_seed_without_new_heads_and_a_model_without_weights_are_refused(published, tmp_path, capsys):
    backbone, vq, _ = published
    assert command("--vq", vq, "--backbone", backbone, tmp_path / "o") == 2
    assert "--wallaroo is missing" in capsys.readouterr().err
    given = ("--wallaroo", vq, "--vq", vq, "--backbone", backbone, "--seed", "1")
    assert command(*given, tmp_path / "o") == 2
    assert "--seed is 1, but only --new-heads" in capsys.readouterr().err


def test_a_backbone_that_lacks_tensors_is_refused(published, tmp_path, capsys):
    backbone, vq, tensors = published
    broken = write_backbone(
        tmp_path / "backbone", json.loads((backbone / "config.json").read_text()), byte_tokenizer_json()
    )
    weights = {"lm_head.weight": tensors["lm_head.weight"], "visual.extra": torch.from_numpy(np.ones(2))}
    save_file({name: one.float() for name, one in weights.items()}, broken / "model.safetensors")
    assert command("--new-heads", "--vq", vq, "--backbone", broken, tmp_path / "o") != 0
    said = capsys.readouterr().err
    assert "missing: model.language_model" in said and "unexpected: model.visual.extra" in said
    assert not (tmp_path / "o").exists()
