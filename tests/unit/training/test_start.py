"""What a stage begins with, and what it refuses to begin with."""

import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.training.cases import recipe
from wallaroo.model.checkpoint import TINY, load, load_config, save
from wallaroo.model.errors import InputError
from wallaroo.model.training.fresh import fresh_model
from wallaroo.model.training.stage import train
from wallaroo.model.training.start import check_start, stage_config, start_model


def test_a_stage_has_its_own_bounds_of_pixels_and_lengths():
    base = load_config(TINY)
    made = stage_config(base, recipe(semantic_pixels=6272, lengths={"edit": 99}, size=64))
    assert made.edit_pixels == made.understand_pixels == (base.edit_pixels[0], 6272)
    assert made.trained_tokens == base.trained_tokens | {"edit": 99}
    assert stage_config(dataclasses.replace(base, layout="eval"), recipe()).layout == "train"


def test_a_start_of_another_architecture_is_refused(tmp_path):
    config = load_config(TINY)
    other = dataclasses.replace(config, vq=dataclasses.replace(config.vq, codebook_size=256))
    tokenizer_json = (TINY / "tokenizer.json").read_text(encoding="utf-8")
    save(fresh_model(other, 0), other, tokenizer_json, tmp_path / "other")
    made = recipe(folder=str(tmp_path / "out"), base=str(TINY), start=str(tmp_path / "other"))
    with pytest.raises(InputError, match="same architecture"):
        train(made)


def test_a_part_begins_as_a_copy_of_another():
    copied = {"edit_image_head": "gen_image_head", "pixel_adapter": "gen_input_adapter"}
    made = start_model(recipe(base=str(TINY), copied=copied)).state_dict()
    given = load(TINY).state_dict()
    for name, tensor in made.items():
        part, _, rest = name.partition(".")
        assert torch.equal(tensor, given[f"{copied.get(part, part)}.{rest}"])
    assert not torch.equal(made["pixel_adapter.0.weight"], given["pixel_adapter.0.weight"])


@pytest.mark.parametrize(
    "copied", [{"edit_head": "gen_image_head"}, {"edit_image_head": "gen_input_adapter"}]
)
def test_a_part_that_cannot_be_copied_is_refused(copied):
    [(part, other)] = copied.items()
    with pytest.raises(InputError, match=f"copied has {part} = '{other}', but .* it has .*edit_image_head"):
        start_model(recipe(base=str(TINY), copied=copied))


def test_a_start_that_lacks_a_tensor_is_refused_before_any_weight_is_read(tmp_path):
    start = tmp_path / "start"
    shutil.copytree(TINY, start)
    [file] = start.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["gen_image_head.0.bias"]
    save_file(tensors, file, {"format": "pt"})
    listed = json.loads((start / "checkpoint.json").read_text())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    listed["files"][file.name] = {"size": file.stat().st_size, "sha256": digest}
    (start / "checkpoint.json").write_text(json.dumps(listed))
    with pytest.raises(InputError, match=r"does not have the tensors .*missing: gen_image_head.0.bias"):
        check_start(recipe(base=str(TINY), start=str(start)))
