"""Checkpoint folders: what makes one, what is refused, what of it is loaded."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wallaroo.jobs import make_tiny
from wallaroo.model.checkpoint import (
    FILE_LIST,
    TINY,
    check,
    disk_tensors,
    load,
    load_config,
    load_tokenizer,
    model_digest,
    parse_file_list,
    save,
    verify_files,
)
from wallaroo.model.config import TASKS, ModelConfig
from wallaroo.model.errors import InputError
from wallaroo.model.new_folder import new_folder
from wallaroo.model.tensor_shapes import expected_shapes
from wallaroo.model.wallaroo import Wallaroo


@pytest.fixture(scope="module")
def tiny_tensors() -> dict[str, torch.Tensor]:
    return disk_tensors(load(TINY))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkpoint folder that a test may spoil."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    return folder


def relist(folder: Path) -> None:
    """Make the list of files fit what is in the folder now."""
    files = {
        file.name: {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in folder.iterdir()
        if file.name not in (FILE_LIST, "README.md")
    }
    (folder / FILE_LIST).write_text(json.dumps({"format": 1, "files": files}))


def spoil_config(folder: Path, change: Callable[[dict], None]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))
    relist(folder)


def tokenizer_json() -> str:
    return (TINY / "tokenizer.json").read_text(encoding="utf-8")


def test_the_embedded_checkpoint_is_whole_and_of_the_kind_that_its_script_trains(tmp_path: Path):
    verify_files(TINY)
    make_tiny.make_base(tmp_path / "base")
    assert load_config(tmp_path / "base") == load_config(TINY)
    assert (tmp_path / "base" / "tokenizer.json").read_text(encoding="utf-8") == tokenizer_json()
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 15e6
    assert (load_config(TINY).layout, load_config(TINY).indicators) == ("train", "added")


def test_the_embedded_size_table():
    sizes = load_config(TINY).sizes
    assert len(sizes) >= 7
    assert [float(key) for key in sizes] == sorted(float(key) for key in sizes)
    for key, (height, width) in sizes.items():
        assert float(key) == pytest.approx(height / width, abs=0.006)
        assert min(height, width) >= 64 and max(height, width) <= 128
    ratios = [height / width for height, width in sizes.values()]
    assert min(ratios) <= 0.5 and 1.0 in ratios and max(ratios) >= 2.0


@pytest.mark.parametrize("task", [None, *TASKS])
def test_expected_shapes_are_those_of_the_modules(task: str | None):
    for config in (load_config(TINY), ModelConfig()):
        with torch.device("meta"):
            model = Wallaroo(config, None if task is None else (task,))
        shapes = {name: tuple(tensor.shape) for name, tensor in disk_tensors(model).items()}
        assert shapes == expected_shapes(config, task)


def test_every_weight_arrives_in_its_place(tiny_tensors: dict[str, torch.Tensor]):
    expected = load_file(TINY / "model.safetensors")
    assert tiny_tensors.keys() == expected.keys()
    for name, tensor in tiny_tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].float()), name


def test_fused_projections_are_stacked_in_order(tiny_tensors: dict[str, torch.Tensor]):
    attention = load(TINY, "generate").language_model.layers[1].self_attn
    for kind, whole in (("weight", attention.qkv_proj.weight), ("bias", attention.qkv_proj.bias)):
        names = [f"model.language_model.layers.1.self_attn.{part}_proj.{kind}" for part in "qkv"]
        assert torch.equal(whole, torch.cat([tiny_tensors[name] for name in names]))


@pytest.mark.parametrize(
    ("task", "absent"),
    [
        ("generate", {"visual", "lm_head", "edit_image_head", "edit_input_adapter", "pixel_adapter"}),
        ("edit", {"lm_head", "gen_image_head", "gen_input_adapter"}),
        (
            "understand",
            {
                "vq",
                "gen_image_head",
                "gen_input_adapter",
                "edit_image_head",
                "edit_input_adapter",
                "pixel_adapter",
            },
        ),
    ],
)
def test_a_task_loads_only_its_parts(task: str, absent: set[str]):
    model = load(TINY, task)
    parts = {*absent, "language_model", "visual", "vq", "lm_head"}
    assert {name for name in parts if getattr(model, name) is None} == absent
    assert not model.training
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.device.type == "cpu" and tensor.isfinite().all(), name


def test_the_vision_towers_computed_buffers_are_those_of_a_fresh_one():
    loaded = load(TINY, "understand")
    fresh = Wallaroo(load_config(TINY), ("understand",))
    buffers = dict(loaded.named_buffers())
    assert buffers.keys() == dict(fresh.named_buffers()).keys() and buffers
    for name, buffer in fresh.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def test_bfloat16_leaves_the_image_tokenizer_in_float32():
    model = load(TINY, "edit", dtype=torch.bfloat16)
    assert model.vq is not None
    assert {parameter.dtype for parameter in model.vq.parameters()} == {torch.float32}
    for part in (model.language_model, model.visual, model.edit_image_head, model.pixel_adapter):
        assert part is not None
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}


def test_saved_shards_load_as_what_was_saved(tmp_path: Path, tiny_tensors: dict[str, torch.Tensor]):
    save(load(TINY), load_config(TINY), tokenizer_json(), tmp_path / "new", shard_bytes=1_000_000)
    shards = sorted(file for file in (tmp_path / "new").iterdir() if file.suffix == ".safetensors")
    assert len(shards) > 5
    assert all(file.stat().st_size < 1_100_000 for file in shards)
    verify_files(tmp_path / "new")
    again = disk_tensors(load(tmp_path / "new"))
    assert again.keys() == tiny_tensors.keys()
    assert all(torch.equal(again[name], tiny_tensors[name]) for name in again)


def test_a_shard_is_read_by_the_safetensors_library_itself(tmp_path: Path):
    tensors = disk_tensors(load(TINY))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        folder = tmp_path / str(dtype)
        save(tensors, load_config(TINY), tokenizer_json(), folder, dtype=dtype)
        read = load_file(folder / "model.safetensors")
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name].to(dtype)) for name in read)


def test_the_digest_is_of_the_files_and_not_of_their_list(copy: Path):
    assert model_digest(copy) == model_digest(TINY)
    listed = json.loads((copy / FILE_LIST).read_text())
    listed["files"] = dict(reversed(listed["files"].items()))
    (copy / FILE_LIST).write_text(json.dumps(listed))
    assert model_digest(copy) == model_digest(TINY)
    spoil_config(copy, lambda values: values.update(layout="eval"))
    assert model_digest(copy) != model_digest(TINY)


def test_checking_needs_no_torch():
    program = (
        "import sys; from wallaroo.model.checkpoint import TINY, check, model_digest; check(TINY, 'edit'); "
        "model_digest(TINY); assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_a_folder_that_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(InputError, match="is not a folder"):
        check(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no checkpoint\.json"):
        check(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_missing_or_short_file_is_named(copy: Path, name: str):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(InputError, match=rf"{name} has {len(data) - 1} bytes instead of {len(data)}"):
        load(copy, "generate")
    (copy / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        load(copy, "generate")


def test_a_damaged_file_of_the_right_size_is_found_by_its_digest(copy: Path):
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    check(copy)
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        verify_files(copy)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"format": 2, "files": {}}',
        b'{"format": 1, "files": {}}',
        b'{"format": 1, "files": []}',
        b'{"format": 1, "files": {"config.json": 3}}',
        b'{"format": 1, "files": {"config.json": {"size": "3", "sha256": ""}}}',
        b'{"format": 1, "files": {"config.json": {"size": -3, "sha256": ""}}}',
        b'{"format": 1, "files": {"../config.json": {"size": 3, "sha256": ""}}}',
        b'{"format": 1, "files": {"/etc/passwd": {"size": 3, "sha256": ""}}}',
        b'{"format": 1, "files": {"..": {"size": 3, "sha256": ""}}}',
    ],
)
def test_a_wrong_list_of_files_is_refused(data: bytes):
    with pytest.raises(InputError, match=r"s3://bucket/checkpoint\.json"):
        parse_file_list(data, "s3://bucket/checkpoint.json")


def test_missing_unexpected_and_wrong_shaped_tensors_are_all_named(copy: Path):
    tensors = load_file(copy / "model.safetensors")
    tensors["gen_head.0.bias"] = tensors.pop("gen_image_head.0.bias")
    tensors["vq.quant_conv.bias"] = tensors["vq.quant_conv.bias"][:-1].clone()
    del tensors["model.visual.merger.ln_q.weight"]
    save_file(tensors, copy / "model.safetensors")
    relist(copy)
    for action in (check, load):
        with pytest.raises(InputError) as caught:
            action(copy, "generate")
        message = str(caught.value)
        assert "missing: " in message and "gen_image_head.0.bias" in message
        assert "model.visual.merger.ln_q.weight" in message
        assert "unexpected: gen_head.0.bias" in message
        assert "wrong shape: vq.quant_conv.bias [7] instead of [8]" in message
        assert "\n" not in message


def test_a_tensor_in_two_shards_is_refused(copy: Path):
    shutil.copy(copy / "model.safetensors", copy / "model-2.safetensors")
    relist(copy)
    with pytest.raises(InputError, match="twice"):
        check(copy)


def test_integer_weights_are_refused(copy: Path):
    tensors = load_file(copy / "model.safetensors")
    tensors["vq.quant_conv.bias"] = tensors["vq.quant_conv.bias"].to(torch.int8)
    save_file(tensors, copy / "model.safetensors")
    relist(copy)
    with pytest.raises(InputError, match=r"'vq\.quant_conv\.bias' is of type I8"):
        check(copy)


def test_a_file_that_is_no_safetensors_is_refused(copy: Path):
    (copy / "model.safetensors").write_bytes(b"\xff" * 100)
    relist(copy)
    with pytest.raises(InputError, match="not a complete safetensors file"):
        check(copy)


def test_a_task_that_the_checkpoint_lacks_is_refused(tmp_path: Path):
    values = {**load_config(TINY).to_dict(), "tasks": ("generate", "understand")}
    config = ModelConfig.from_dict(json.loads(json.dumps(values)))
    names = expected_shapes(config)
    tensors = {name: tensor for name, tensor in disk_tensors(load(TINY)).items() if name in names}
    assert not any(name.startswith(("edit", "pixel")) for name in names)
    save(tensors, config, tokenizer_json(), tmp_path / "early")
    assert load(tmp_path / "early").tasks == ("generate", "understand")
    for action in (check, load):
        with pytest.raises(InputError, match=r"'tiny' cannot edit \(those of training stages 1 to 3"):
            action(tmp_path / "early", "edit")
    with pytest.raises(InputError, match="no task 'draw'"):
        check(TINY, "draw")


def test_the_tokenizer_must_be_the_models(copy: Path):
    text = tokenizer_json()
    (copy / "tokenizer.json").write_text(text.replace("<indicator:64>", "<indicator:48>"), encoding="utf-8")
    relist(copy)
    with pytest.raises(InputError, match="number the control token '<indicator:48>' differently"):
        load_tokenizer(copy)
    with pytest.raises(InputError, match="differently"):
        load(copy, "generate")


def test_the_vocabulary_must_fit_the_embeddings(copy: Path):
    def shrink(values: dict) -> None:
        values["decoder"]["vocab_size"] = 512
        values["token_ids"] = {}

    values = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    values["added_tokens"] = []
    (copy / "tokenizer.json").write_text(json.dumps(values))
    spoil_config(copy, shrink)
    with pytest.raises(InputError, match="has 1000 tokens, but the model's vocab_size is 512"):
        check(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layuot": "eval"}, "did you mean 'layout'"),
        ({"layout": "other"}, "must be one of eval, train"),
        ({"line_break": 1}, "must be true or false"),
        ({"name": None}, "must be a text"),
        ({"tasks": "generate"}, "must be a list"),
        ({"tasks": []}, "at least one"),
        ({"tasks": ["generate", "generate"]}, "each task once"),
        ({"tasks": ["draw"]}, "'draw'"),
        ({"sizes": {}}, "sizes is empty"),
        ({"sizes": {"wide": [64, 64]}}, "'wide'"),
        ({"sizes": {"1.0": [64]}}, "list of 2"),
        ({"sizes": {"1.0": [64, 65]}}, "multiples of 16"),
        ({"sizes": {"1.0": [10**30, 64]}}, "16777216"),
        ({"decoder": []}, "must be an object"),
        ({"decoder": {"hidden_size": "128"}}, "'128'"),
        ({"decoder": {"hidden_size": -128}}, "-128"),
        ({"decoder": {"hidden_size": 128.5}}, "128.5"),
        ({"decoder": {"num_key_value_heads": 0}}, "at least 1"),
        ({"decoder": {"num_hidden_layers": 10**7}}, "at most 1024"),
        ({"decoder": {"rope_theta": -1.0}}, "positive number"),
        ({"decoder": {"rope_theta": float("nan")}}, "positive number"),
        ({"decoder": {"mrope_section": [16, 24]}}, "list of 3"),
        ({"vision": {"patch_size": 16}}, "14 only"),
        ({"vision": {"fullatt_block_indexes": [40]}}, "block 40"),
        ({"vq": {"channel_multipliers": [1, 2]}}, "5 numbers"),
        ({"vq": {"norm_groups": 7}}, "norm_groups 7"),
        ({"edit_pixels": [500, 400]}, "increasing"),
        ({"token_ids": {"<|im_end|>": 10**6}}, "below vocab_size"),
    ],
)
def test_a_wrong_configuration_is_refused_in_one_sentence(change: dict, words: str):
    with pytest.raises(InputError) as caught:
        ModelConfig.from_dict(change)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"decoder": {"hidden_size": 1e400}}'])
def test_a_broken_configuration_file_is_refused(copy: Path, text: str):
    (copy / "config.json").write_text(text)
    relist(copy)
    with pytest.raises(InputError, match=r"config\.json"):
        check(copy)


def test_a_configuration_survives_its_file(tmp_path: Path):
    config = load_config(TINY)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert ModelConfig.from_file(tmp_path / "config.json") == config
    assert ModelConfig.from_dict({}) == ModelConfig()


def test_saving_never_writes_over_something(tmp_path: Path, tiny_tensors: dict[str, torch.Tensor]):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        save(tiny_tensors, load_config(TINY), tokenizer_json(), tmp_path / "there")
    assert [file.name for file in (tmp_path / "there").iterdir()] == ["thesis.tex"]


def test_a_failed_save_leaves_nothing(tmp_path: Path, tiny_tensors: dict[str, torch.Tensor]):
    fewer = {name: tensor for name, tensor in tiny_tensors.items() if name != "lm_head.weight"}
    with pytest.raises(InputError, match=r"missing: lm_head\.weight"):
        save(fewer, load_config(TINY), tokenizer_json(), tmp_path / "new")
    odd = {**tiny_tensors, "lm_head.weight": tiny_tensors["lm_head.weight"].double()}
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        save(odd, load_config(TINY), tokenizer_json(), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_somebody_else_calls_partial_stays(tmp_path: Path, kind: str):
    partial = tmp_path / "new.partial"
    if kind == "folder":
        partial.mkdir()
        (partial / "thesis.tex").write_text("mine")
    elif kind == "file":
        partial.write_text("mine")
    else:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "thesis.tex").write_text("mine")
        partial.symlink_to(tmp_path / "elsewhere")
    before = files_of(tmp_path)
    words = r"new\.partial, which would be written first, exists and is not ours"
    with pytest.raises(InputError, match=words), new_folder(tmp_path / "new"):
        pytest.fail("it began to write")
    assert files_of(tmp_path) == before and partial.is_symlink() == (kind == "link")


def test_what_a_killed_writer_left_is_written_anew(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "new") as made:
        kept = shutil.copytree(made, tmp_path / "kept")
        raise KeyboardInterrupt
    assert not (tmp_path / "new.partial").exists()
    kept.rename(tmp_path / "new.partial")
    (tmp_path / "new.partial" / "half").write_text("x")
    with new_folder(tmp_path / "new") as made:
        (made / "whole").write_text("x")
    assert files_of(tmp_path) == {"new/whole": b"x"}


def test_a_checkpoint_is_replaced_if_so_told_and_files_of_others_stay(
    tmp_path: Path, tiny_tensors: dict[str, torch.Tensor]
):
    folder, config, text = tmp_path / "there", load_config(TINY), tokenizer_json()
    save(tiny_tensors, config, text, folder, shard_bytes=1 << 20)
    many = set(files_of(folder))
    (folder / "thesis.tex").write_text("mine")
    before = files_of(folder)
    with pytest.raises(InputError, match=r"is not empty; it holds .*: name a new folder, or --overwrite"):
        save(tiny_tensors, config, text, folder)
    assert files_of(folder) == before
    # One that fails changes nothing.
    odd = {**tiny_tensors, "lm_head.weight": tiny_tensors["lm_head.weight"].double()}
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        save(odd, config, text, folder, overwrite=True)
    assert files_of(folder) == before
    save(tiny_tensors, config, text, folder, overwrite=True)
    save(tiny_tensors, config, text, tmp_path / "other")
    now = files_of(folder)
    assert now.pop("thesis.tex") == b"mine"
    assert now == files_of(tmp_path / "other") and len(now) < len(many)
    check(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "there"]


def test_a_file_is_no_folder_to_overwrite(tmp_path: Path, tiny_tensors: dict[str, torch.Tensor]):
    (tmp_path / "there").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="exists already and is not a folder; name a new one"):
            save(tiny_tensors, load_config(TINY), tokenizer_json(), tmp_path / "there", overwrite=overwrite)
    assert files_of(tmp_path) == {"there": b"mine"}


def test_a_folder_in_the_way_of_a_file_is_named(tmp_path: Path):
    (tmp_path / "there" / "whole").mkdir(parents=True)
    told = pytest.raises(InputError, match=r"there/whole cannot be replaced")
    with told, new_folder(tmp_path / "there", overwrite=True) as made:
        (made / "whole").write_text("x")
    assert (tmp_path / "there" / "whole").is_dir() and not (tmp_path / "there.partial").exists()
