"""Stock folders of Qwen2.5-VL with Wallaroo's weights, and the answers of transformers from them."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conformance.cases import tolerances
from tests.conformance.models import config_of, tiny
from tests.conformance.published import Family, Where, assert_close, cases
from tests.conformance.released import (
    PREPROCESSOR,
    Released,
    byte_tokenizer_json,
    engine,
    fixture_request,
    flat_config,
    logits,
    small_config,
    split,
    stored,
    write_wallaroo,
    zeros,
)
from wallaroo.model.checkpoint import load, load_tokenizer
from wallaroo.model.convert import convert, rename
from wallaroo.model.engine.engine import Engine
from wallaroo.model.engine.options import EngineOptions
from wallaroo.model.engine.requests import Request
from wallaroo.model.errors import InputError
from wallaroo.model.prompts import understand_prompt
from wallaroo.model.sampling import Sampling
from wallaroo.model.stock import PIXELS
from wallaroo.workflows.sources.prepare import prepare


def stock_folder(folder: Path, config: dict, newer_names: bool = False) -> Path:
    """A Qwen2.5-VL folder as transformers writes it, or with the names that its modules have by now."""
    from safetensors.torch import load_file, save_file
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config))
    model.save_pretrained(folder, max_shard_size="150KB")
    if newer_names:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"] = {}
        for file in folder.glob("*.safetensors"):
            tensors = {rename(f"wallaroo.{name}"): tensor for name, tensor in load_file(file).items()}
            save_file(tensors, file, {"format": "pt"})
            index["weight_map"] |= dict.fromkeys(tensors, file.name)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "tokenizer.json").write_text(byte_tokenizer_json(), encoding="utf-8")
    (folder / "LICENSE").write_text("as it was")
    return folder


@pytest.mark.numerics
@pytest.mark.parametrize("newer_names", [False, True])
def test_an_understanding_only_folder_is_a_stock_one(
    fixture_files: Released, tmp_path: Path, newer_names: bool
):
    from transformers import Qwen2_5_VLForConditionalGeneration

    backbone = stock_folder(tmp_path / "stock", fixture_files.config, newer_names)
    assert ("model.language_model.norm.weight" if newer_names else "model.norm.weight") in stored(backbone)
    output = tmp_path / "understanding"
    convert(fixture_files.folder / "wallaroo.ckpt", None, backbone, output, understanding_only=True)

    assert stored(output) == stored(backbone) and len({file for file, *_ in stored(output).values()}) > 1
    ours_too = {"README.md", "preprocessor_config.json"}
    assert {file.name for file in output.iterdir()} == {file.name for file in backbone.iterdir()} | ours_too
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json", "LICENSE"):
        assert (output / name).read_bytes() == (backbone / name).read_bytes()

    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        output, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = engine(fixture_files.folder / "checkpoint", "understand")
    ids_of = config_of("tiny_model").token_ids
    for case in cases("mmu"):
        arrays = Family("mmu", case["case"])
        ids = torch.from_numpy(np.concatenate([arrays["ids"], arrays["tf_tokens"]])[None, :-1]).long()
        with torch.inference_mode():
            output_of = model(
                input_ids=ids,
                pixel_values=torch.from_numpy(arrays["pixel_values"]),
                image_grid_thw=torch.from_numpy(arrays["grid"])[None].long(),
                mm_token_type_ids=(ids == ids_of["<|image_pad|>"]).int(),
            )
        theirs = output_of.logits[0, len(arrays["ids"]) - 1 :].numpy()
        where = Where("mmu", case["case"], "tf_logits")
        allowed, _ = tolerances(tiny(), "understand", arrays)
        assert_close(theirs, where, arrays["tf_logits"], allowed, "understanding-only folder in transformers")
        found = logits(ours, fixture_request("mmu", case, None))
        assert_close(found, where, theirs, allowed, "ours against transformers")


def test_a_stock_folder_in_bfloat16_stays_so(fixture_files: Released, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    backbone = stock_folder(tmp_path / "stock", fixture_files.config)
    for file in backbone.glob("*.safetensors"):
        save_file({name: x.bfloat16() for name, x in load_file(file).items()}, file)
    output = tmp_path / "understanding"
    convert(fixture_files.folder / "wallaroo.ckpt", None, backbone, output, understanding_only=True)
    assert stored(output) == stored(backbone)
    assert {kind for *_, kind in stored(output).values()} == {"BF16"}


def test_an_incomplete_stock_folder_is_refused(fixture_files: Released, tmp_path: Path):
    backbone = stock_folder(tmp_path / "stock", fixture_files.config)
    min(backbone.glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match=r"index\.json does not name the tensors"):
        convert(
            fixture_files.folder / "wallaroo.ckpt", None, backbone, tmp_path / "o", understanding_only=True
        )
    for file in [*backbone.glob("*.safetensors"), backbone / "model.safetensors.index.json"]:
        file.unlink()
    with pytest.raises(InputError, match="no safetensors files"):
        convert(
            fixture_files.folder / "wallaroo.ckpt", None, backbone, tmp_path / "o", understanding_only=True
        )
    assert not (tmp_path / "o").exists()


CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)
QUESTIONS = ("what is it?", "how many?", "which colour has the left one?", "\u4f60\u597d", "A or B")
SIDES = ((40, 40), (300, 200), (90, 700), (512, 384), (1000, 150))
"""Heights and widths: under, within and over the limits, and long ones."""


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A toy checkpoint whose answers hang on the picture, and its stock folder, with token ids that fit."""
    folder = tmp_path_factory.mktemp("answering")
    config = small_config()
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: torch.randn(x.shape, generator=generator) * (0.3 if x.dim() > 1 else 1)
        for name, x in zeros(config).items()
    }
    text = byte_tokenizer_json()
    described = flat_config(config.decoder, config.vision) | {"torch_dtype": "float32"}
    tokens = {one["content"]: one["id"] for one in json.loads(text)["added_tokens"]}
    for key, token in (
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
        ("eos_token_id", "<|im_end|>"),
    ):
        described[key] = tokens[token]
    files = Released(folder, *split(tensors), described, text)
    checkpoint = files.convert()
    backbone = stock_folder(folder / "Qwen2.5-VL-toy", described)
    (backbone / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (backbone / "README.md").write_text("# Qwen2.5-VL-7B-Instruct\n")
    (backbone / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    stock = folder / "wallaroo-2.5-vl"
    convert(folder / "wallaroo.ckpt", None, backbone, stock, understanding_only=True)
    return checkpoint, stock


def pictures() -> list[Image.Image]:
    """Coloured noise, coarse enough to survive a change of size."""
    rng = np.random.default_rng(3)
    found = []
    for height, width in SIDES:
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
        found.append(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return found


def our_answers(checkpoint: Path, limits: tuple[int | None, int | None]) -> list[tuple[int, list[int]]]:
    """Prompt tokens and answers of `understand`."""
    model, tokenizer = load(checkpoint, "understand"), load_tokenizer(checkpoint)
    config = model.config.with_pixels(*limits)
    requests = []
    for key, (image, question) in enumerate(zip(pictures(), QUESTIONS, strict=True)):
        made = prepare(image, "understand", config)
        prompt = understand_prompt(tokenizer, config, question, made.grid)
        sampling = Sampling(cfg=1.0, top_k=1)
        requests.append(
            Request(key, prompt, None, None, 0, sampling, semantic=made.semantic, max_new_tokens=12)
        )
    options = EngineOptions(slots=4, group_rows=2, max_new_tokens=12, pixels=limits)
    results = sorted(Engine(model, "understand", options).run(requests), key=lambda result: result.key)
    assert not any(result.error for result in results)
    return [(result.prompt_tokens, result.tokens.tolist()) for result in results]


def their_answers(stock: Path, processed) -> list[tuple[int, list[int]]]:
    """Prompt tokens and answers of transformers; processed: gives its inputs for a picture and a text."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(stock, dtype=torch.float32)
    stop = model.config.text_config.eos_token_id or model.generation_config.eos_token_id
    found = []
    for image, question in zip(pictures(), QUESTIONS, strict=True):
        inputs = processed(image, CHAT.format(question=question))
        made = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
        length = inputs["input_ids"].shape[1]
        answer = made[length:].tolist()
        found.append((length, answer[: answer.index(stop)] if stop in answer else answer))
    return found


def without_torchvision(stock: Path, **limits: int):
    """Inputs by the parts of a processor that need no torchvision."""
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

    image_processor = Qwen2VLImageProcessorPil.from_pretrained(stock, **limits)
    tokenizer = AutoTokenizer.from_pretrained(stock)
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def processed(image: Image.Image, text: str) -> dict[str, torch.Tensor]:
        seen = image_processor(images=[image], return_tensors="pt")
        count = int(seen["image_grid_thw"].prod()) // 4
        ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt")
        return {**ids, **seen, "mm_token_type_ids": (ids["input_ids"] == pad).int()}

    return processed


LIMITS = {
    "of the folder": ({}, PIXELS),
    "of the training": ({"min_pixels": 12544, "max_pixels": 188160}, (None, None)),
    "small": ({"min_pixels": 784 * 20, "max_pixels": 784 * 30}, (784 * 20, 784 * 30)),
}


@pytest.mark.numerics
@pytest.mark.parametrize("name", LIMITS)
def test_transformers_and_understand_answer_alike_at_equal_limits(answering: tuple[Path, Path], name: str):
    checkpoint, stock = answering
    theirs, ours = LIMITS[name]
    found = our_answers(checkpoint, ours)
    assert found == their_answers(stock, without_torchvision(stock, **theirs))


@pytest.mark.numerics
def test_answers_hang_on_the_limits(answering: tuple[Path, Path]):
    """Without which the test above would compare nothing."""
    found = [our_answers(answering[0], ours) for _, ours in LIMITS.values()]
    assert len({tuple(length for length, _ in answers) for answers in found}) == 3
    assert len({str([answer for _, answer in answers]) for answers in found}) == 3
    assert all(len({str(answer) for _, answer in answers}) == len(QUESTIONS) for answers in found)


@pytest.mark.skipif(find_spec("torchvision") is None, reason="AutoProcessor needs torchvision")
def test_the_usual_call_loads_a_stock_folder(answering: tuple[Path, Path]):
    from transformers import AutoProcessor, Qwen2VLImageProcessorPil

    stock = answering[1]
    processor, other = AutoProcessor.from_pretrained(stock), without_torchvision(stock)
    for image in pictures():
        text = CHAT.format(question="what?")
        made, wanted = processor(text=[text], images=[image], return_tensors="pt"), other(image, text)
        for name in ("input_ids", "image_grid_thw"):
            assert torch.equal(made[name], wanted[name])
        # Two levels of 255, after division by the least standard deviation.
        assert (made["pixel_values"] - wanted["pixel_values"]).abs().max() < 2 / 255 / 0.26
    size = AutoProcessor.from_pretrained(stock, min_pixels=12544, max_pixels=188160).image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (12544, 188160)
    processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(stock)
    made = processor(text=[text], images=[image], return_tensors="pt")
    assert torch.equal(made["pixel_values"], wanted["pixel_values"])


def test_a_stock_folder_names_wallaroo_and_says_its_limits(answering: tuple[Path, Path]):
    stock = answering[1]
    text = (stock / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# Wallaroo") and "Qwen2.5-VL-7B-Instruct" not in text
    assert "from `wallaroo.ckpt`" in text and "from `Qwen2.5-VL-toy`" in text
    assert "to 3,136 pixels at least and 12,845,056 at most, as\n`preprocessor_config.json` says" in text
    assert "`min_pixels=12544, max_pixels=188160`" in text
    values = json.loads((stock / "preprocessor_config.json").read_text())
    assert values == PREPROCESSOR | {"min_pixels": 3136, "max_pixels": 12845056}


@pytest.mark.parametrize(
    ("file", "values", "limits"),
    [
        ("preprocessor_config.json", {}, PIXELS),
        ("preprocessor_config.json", {"size": {"shortest_edge": 784, "longest_edge": 7840}}, (784, 7840)),
        ("processor_config.json", {"image_processor": {"min_pixels": 1568}}, (1568, PIXELS[1])),
    ],
)
def test_limits_are_taken_from_where_transformers_takes_them(
    fixture_files: Released, tmp_path: Path, file: str, values: dict, limits: tuple[int, int]
):
    from transformers import Qwen2VLImageProcessorPil

    backbone = stock_folder(tmp_path / "stock", fixture_files.config)
    (backbone / file).write_text(json.dumps(values))
    output = tmp_path / "understanding"
    convert(fixture_files.folder / "wallaroo.ckpt", None, backbone, output, understanding_only=True)
    size = Qwen2VLImageProcessorPil.from_pretrained(output).size
    assert (size["shortest_edge"], size["longest_edge"]) == limits
    text = (output / "README.md").read_text(encoding="utf-8")
    assert f"to {limits[0]:,} pixels at least and {limits[1]:,} at most, as\n`{file}` says" in text


def test_limits_of_a_checkpoint_of_an_early_stage_are_its_own(fixture_files: Released, tmp_path: Path):
    late = ("edit_", "pixel_")
    tensors = {name: x for name, x in fixture_files.wallaroo.items() if not name.startswith(late)}
    published = write_wallaroo(tmp_path / "early.ckpt", tensors)
    backbone = stock_folder(tmp_path / "stock", fixture_files.config)
    convert(published, None, backbone, tmp_path / "understanding", understanding_only=True)
    assert "12,544 to\n254,016 by default" in (tmp_path / "understanding" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("values", [{"min_pixels": "many"}, {"min_pixels": 9, "max_pixels": 8}])
def test_limits_that_are_none_are_refused(fixture_files: Released, tmp_path: Path, values: dict):
    backbone = stock_folder(tmp_path / "stock", fixture_files.config)
    (backbone / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="must be two increasing whole numbers; download the folder again"):
        convert(
            fixture_files.folder / "wallaroo.ckpt", None, backbone, tmp_path / "o", understanding_only=True
        )
    assert not (tmp_path / "o").exists()
