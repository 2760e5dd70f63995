"""Published files to checkpoint folders: the numbers survive, what is not right is named."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.benchmarks.convert_memory import anonymous_memory, write_published
from tests.conformance.cases import tolerances
from tests.conformance.models import config_of, tiny
from tests.conformance.published import Family, Where, assert_close, cases, metadata
from tests.conformance.qwen import qwen_tokenizer_json, write_slow_tokenizer
from tests.conformance.released import (
    MIB,
    Released,
    byte_tokenizer_json,
    engine,
    fixture_request,
    flat_config,
    logits,
    small_config,
    split,
    stored,
    write_backbone,
    zeros,
)
from wallaroo.jobs.cli import main
from wallaroo.model.checkpoint import check, disk_tensors, load, load_config, load_tokenizer, verify_files
from wallaroo.model.config import SIZES_512, Size, VQConfig
from wallaroo.model.convert import convert, rename, rename_vq
from wallaroo.model.errors import InputError
from wallaroo.model.tokenizer import added_tokens


@pytest.fixture
def released(tmp_path: Path) -> Released:
    config = small_config()
    tensors = {name: torch.randn(x.shape) for name, x in zeros(config).items()}
    return Released(
        tmp_path, *split(tensors), flat_config(config.decoder, config.vision), byte_tokenizer_json()
    )


@pytest.mark.numerics
@pytest.mark.parametrize(("family", "task"), [("t2i", "generate"), ("i2i", "edit")])
def test_a_converted_checkpoint_gives_the_published_image_logits(
    fixture_files: Released, family: str, task: str
):
    running = engine(fixture_files.folder / "checkpoint", task)
    checked = 0
    for case in cases(family):
        if case.get("method", "line_break") == "line_break":
            request = fixture_request(family, case, Size(case["H"], case["W"]))
            where = Where(family, case["case"], "cond_logits")
            arrays = Family(family, case["case"])
            allowed, _ = tolerances(tiny(), task, arrays)
            found = logits(running, request)
            assert_close(found, where, arrays["cond_logits"], allowed, "converted checkpoint")
            checked += 1
    assert checked > 2


@pytest.mark.numerics
def test_a_converted_checkpoint_gives_the_published_text_logits(fixture_files: Released):
    running = engine(fixture_files.folder / "checkpoint", "understand")
    for case in cases("mmu"):
        where = Where("mmu", case["case"], "tf_logits")
        arrays = Family("mmu", case["case"])
        allowed, _ = tolerances(tiny(), "understand", arrays)
        found = logits(running, fixture_request("mmu", case, None))
        assert_close(found, where, arrays["tf_logits"], allowed, "converted checkpoint")


def test_every_number_is_copied_as_it_is(fixture_files: Released):
    folder = fixture_files.folder / "checkpoint"
    verify_files(folder)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 5
    found = {}
    for file in shards:
        assert file.stat().st_size < 33 * MIB
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    expected = {rename(name): tensor for name, tensor in fixture_files.wallaroo.items()}
    expected |= {rename_vq(name): tensor for name, tensor in fixture_files.vq.items() if rename_vq(name)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_configuration_comes_from_the_backbone(fixture_files: Released):
    config = load_config(fixture_files.folder / "checkpoint")
    like = config_of("tiny_model")
    assert config.decoder == like.decoder
    assert config.vision == like.vision
    assert config.vq == VQConfig(codebook_size=64)
    assert (config.layout, config.indicators, config.line_break) == ("eval", "added", True)
    assert config.sizes == SIZES_512 and config.tasks == ("generate", "edit", "understand")
    assert config.understand_pixels == (12544, 188160)


def test_a_real_vocabulary_gets_the_published_ids(released: Released, tmp_path: Path):
    config = small_config(decoder=dataclasses.replace(small_config().decoder, vocab_size=152064))
    released.wallaroo, released.vq = split(zeros(config))
    released.config = flat_config(config.decoder, config.vision)
    released.tokenizer = qwen_tokenizer_json()
    ids = load_tokenizer(released.convert()).token_ids
    assert ids == metadata("tokenizer_ids")["added_tokens"]
    assert load_config(tmp_path / "checkpoint").token_ids == ids


def test_the_older_form_of_a_tokenizer_gives_the_same(released: Released):
    from wallaroo.model.convert import _tokenizer_json

    older = released.folder / "older"
    older.mkdir()
    write_slow_tokenizer(older)
    newer = write_backbone(released.folder / "newer", released.config, qwen_tokenizer_json())
    tokens = added_tokens(SIZES_512)
    assert json.loads(_tokenizer_json(older, tokens)) == json.loads(_tokenizer_json(newer, tokens))


def test_stages_1_to_3_convert_and_then_refuse_to_edit(released: Released):
    parts = ("edit_", "pixel_adapter.")
    released.wallaroo = {name: x for name, x in released.wallaroo.items() if not name.startswith(parts)}
    folder = released.convert()
    assert load_config(folder).tasks == ("generate", "understand")
    assert load_config(folder).understand_pixels == (12544, 254016)
    for task in ("generate", "understand", None):
        load(folder, task)
    with pytest.raises(InputError, match=r"cannot edit \(those of training stages 1 to 3 have no parts"):
        load(folder, "edit")


def test_square_checkpoints_have_one_size_and_no_line_break(released: Released):
    config = load_config(released.convert(square=384, layout="train", indicators="text"))
    assert config.sizes == {"1.0": (384, 384)} and not config.line_break
    assert (config.layout, config.indicators) == ("train", "text")
    assert not any("indicator" in token for token in config.token_ids)


def test_numbers_are_kept_as_stored_unless_a_type_is_asked_for(released: Released):
    released.wallaroo = {name: x.bfloat16() for name, x in released.wallaroo.items()}
    folder = released.convert()
    kinds = {name: kind for name, (_, _, kind) in stored(folder).items()}
    assert {kinds[name] for name in kinds if name.startswith("vq.")} == {"F32"}
    assert {kinds[name] for name in kinds if not name.startswith("vq.")} == {"BF16"}
    found = disk_tensors(load(folder))
    assert torch.equal(found["lm_head.weight"], released.wallaroo["wallaroo.lm_head.weight"].float())
    shutil.rmtree(folder)
    assert {kind for *_, kind in stored(released.convert(dtype=torch.bfloat16)).values()} == {"BF16"}


def test_the_nested_configuration_of_newer_transformers(released: Released):
    from transformers import Qwen2_5_VLConfig

    plain = load_config(released.convert())
    shutil.rmtree(released.folder / "checkpoint")
    released.config = json.loads(Qwen2_5_VLConfig.from_dict(released.config).to_json_string(use_diff=False))
    assert "hidden_size" not in released.config and "rope_parameters" in released.config["text_config"]
    assert load_config(released.convert()) == plain


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config.update(model_type="qwen2_vl"), "'qwen2_vl'"),
        (lambda config: config.update(tie_word_embeddings=True), "tie_word_embeddings is True"),
        (lambda config: config.update(use_sliding_window=True), "use_sliding_window is True"),
        (lambda config: config.update(hidden_act="relu"), "hidden_act is 'relu'"),
        (lambda config: config.update(hidden_size="32"), "hidden_size"),
        (lambda config: config.update(num_hidden_layers=-2), "num_hidden_layers"),
        (lambda config: config["vision_config"].update(patch_size=16), "patch_size"),
        (lambda config: config.update(rope_scaling=None), "config.json"),
    ],
)
def test_a_backbone_that_is_not_wallaroos_is_refused(released: Released, change, words: str):
    change(released.config)
    with pytest.raises(InputError) as caught:
        released.convert()
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (released.folder / "checkpoint").exists()


def test_a_backbone_folder_without_its_files_is_refused(released: Released):
    files = [released.folder / "wallaroo.ckpt", released.folder / "vq.pt", released.folder / "backbone"]
    released.convert()
    shutil.rmtree(released.folder / "checkpoint")
    for name in ("tokenizer.json", "preprocessor_config.json", "config.json"):
        (files[2] / name).unlink()
        with pytest.raises(InputError, match=name):
            convert(*files, released.folder / "checkpoint")


def test_another_preparation_of_pictures_is_refused(released: Released):
    released.convert()
    file = released.folder / "backbone" / "preprocessor_config.json"
    right = json.loads(file.read_text())
    for change in ({"patch_size": 16}, {"image_mean": [0.5, 0.5, 0.5]}, {"image_std": "x"}):
        file.write_text(json.dumps({**right, **change}))
        with pytest.raises(InputError, match=next(iter(change))):
            convert(
                released.folder / "wallaroo.ckpt",
                released.folder / "vq.pt",
                file.parent,
                released.folder / "new",
            )


def test_missing_unexpected_and_wrong_shaped_tensors_are_all_named(released: Released):
    released.wallaroo["wallaroo.model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 32)
    released.wallaroo["gen_input_adapter.0.bias"] = released.wallaroo.pop("gen_input_adpater.0.bias")
    released.wallaroo["ema.decay"] = torch.zeros(1)
    del released.wallaroo["wallaroo.lm_head.weight"]
    released.vq["quant_conv.bias"] = torch.zeros(9)
    del released.vq["decoder.norm_out.weight"]
    with pytest.raises(InputError) as caught:
        released.convert()
    missing, unexpected, wrong = str(caught.value).split("; ")[1:]
    for part, names in (
        (missing, ["lm_head.weight", "gen_input_adapter.0.bias", "vq.decoder.norm_out.weight"]),
        (
            unexpected,
            ["model.language_model.layers.2.mlp.up_proj.weight", "'ema.decay'", "'gen_input_adapter.0.bias'"],
        ),
        (wrong, ["vq.quant_conv.bias [9] instead of [8]"]),
    ):
        listed = part.split(": ")[1].rstrip(".").split(", ")
        assert sorted(listed) == sorted(names)
    assert not (released.folder / "checkpoint").exists()


class Payload:
    """Runs a command when it is unpickled by a careless reader."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pickle_that_does_more_than_hold_tensors_is_refused_unrun(released: Released, tmp_path: Path):
    released.convert()
    trap = tmp_path / "trap"
    bad = tmp_path / "bad.ckpt"
    torch.save({"state_dict": released.wallaroo, "callbacks": Payload(trap)}, bad)
    with pytest.raises(InputError, match="holds more than tensors") as caught:
        convert(bad, tmp_path / "vq.pt", tmp_path / "backbone", tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {}}, "no state dict at its key 'state_dict'"),
        ([1], "no state dict"),
        ({"state_dict": [1]}, "no state dict"),
        ({"state_dict": {"epoch": 3}}, "'epoch' is not a tensor"),
        ({"state_dict": {3: torch.zeros(1)}}, "'3' is not a tensor"),
        ({"state_dict": {"a": torch.zeros(2, 2).to_sparse()}}, "no plain numbers for 'a'"),
        ({"state_dict": {"a": torch.zeros(2, device="meta")}}, "no plain numbers for 'a'"),
    ],
)
def test_a_file_that_is_no_plain_state_dict_is_refused(tmp_path: Path, content, words: str):
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(InputError) as caught:
        convert(tmp_path / "bad.ckpt", tmp_path / "vq.pt", tmp_path, tmp_path / "new")
    assert words in str(caught.value)


def test_files_that_are_none_of_torch_are_refused(tmp_path: Path):
    cases = {"empty": b"", "text": b"hello", "zip": b"PK\x03\x04" + bytes(100)}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=r"not a file of torch\.save") as caught:
            convert(tmp_path / name, tmp_path / "vq.pt", tmp_path, tmp_path / "new")
        assert "\n" not in str(caught.value)
    torch.save({"state_dict": {}}, tmp_path / "old", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="save it again"):
        convert(tmp_path / "old", tmp_path / "vq.pt", tmp_path, tmp_path / "new")
    with pytest.raises(InputError, match="cannot be read"):
        convert(tmp_path / "nothing", tmp_path / "vq.pt", tmp_path, tmp_path / "new")


def test_the_image_tokenizer_is_needed_for_pictures(released: Released):
    released.convert()
    with pytest.raises(InputError, match="give --vq"):
        convert(
            released.folder / "wallaroo.ckpt", None, released.folder / "backbone", released.folder / "new"
        )


def test_an_output_that_exists_is_left_alone(released: Released):
    folder = released.convert()
    before = (folder / "checkpoint.json").read_bytes()
    with pytest.raises(InputError, match="exists already"):
        released.convert()
    assert (folder / "checkpoint.json").read_bytes() == before
    check(folder)


def test_a_second_conversion_gives_the_same_files(released: Released):
    first = (released.convert() / "checkpoint.json").read_bytes()
    shutil.rmtree(released.folder / "checkpoint")
    assert (released.convert() / "checkpoint.json").read_bytes() == first


def test_memory_stays_within_a_shard(tmp_path: Path):
    """As the benchmark of 6 GiB, at 1/32: weights of 290 MB in shards of 32 MiB."""
    config = small_config(vq=VQConfig(codebook_size=64))
    files = write_published(
        tmp_path, dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=1088))
    )
    before, peak = anonymous_memory(files, tmp_path / "checkpoint", 32 * MIB)
    shards = [file.stat().st_size for file in (tmp_path / "checkpoint").glob("*.safetensors")]
    assert len(shards) > 8
    assert peak - before < 1.2 * max(shards) + 32 * MIB


def test_an_output_is_replaced_if_so_told(released: Released):
    released.convert()
    output = released.folder / "mine"
    output.mkdir()
    (output / "config.json").write_text("mine")
    (output / "thesis.tex").write_text("mine")
    words = ["convert", "--wallaroo", str(released.folder / "wallaroo.ckpt")]
    words += ["--vq", str(released.folder / "vq.pt"), "--backbone", str(released.folder / "backbone")]

    def run(*more: str) -> int:
        with pytest.raises(SystemExit) as left:
            main([*words, *more])
        return left.value.code

    assert run(str(output)) == 1
    assert {file.name: file.read_text() for file in output.iterdir()} == {
        "config.json": "mine",
        "thesis.tex": "mine",
    }
    assert run(str(output), "--overwrite") == 0
    assert run(str(released.folder / "new")) == 0
    found = {file.name: file.read_bytes() for file in output.iterdir()}
    assert found.pop("thesis.tex") == b"mine"
    assert found == {file.name: file.read_bytes() for file in (released.folder / "new").iterdir()}
    # The backbone is no place to write, whatever is told.
    before = {file.name: file.read_bytes() for file in (released.folder / "backbone").iterdir()}
    assert run(str(released.folder / "backbone"), "--overwrite") == 1
    assert {file.name: file.read_bytes() for file in (released.folder / "backbone").iterdir()} == before
