"""Token ids of prompts, number for number, with the Qwen2.5 tokenizer rebuilt from its public ranks."""

import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from tests.conformance.qwen import qwen_tokenizer_json, vocabulary_and_merges, with_tokens
from wallaroo.model.config import SIZES_512, ModelConfig, Size
from wallaroo.model.prompts import Prompt, edit_prompt, generate_prompt, understand_prompt
from wallaroo.model.tokenizer import Tokenizer, added_tokens

LANGUAGE = {"EN": "en", "CN": "zh"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(with_tokens(qwen_tokenizer_json(), added_tokens(SIZES_512)))


@pytest.fixture(scope="module")
def text_tokenizer() -> Tokenizer:
    return Tokenizer(with_tokens(qwen_tokenizer_json(), added_tokens(SIZES_512, indicators="text")))


@pytest.fixture(scope="module")
def spell() -> tokenizers.Tokenizer:
    """Ids -> text with control tokens written out."""
    return tokenizers.Tokenizer.from_str(with_tokens(qwen_tokenizer_json(), added_tokens(SIZES_512)))


@pytest.fixture(scope="module")
def ids_file(goldens: Path) -> dict:
    return json.loads((goldens / "tokenizer_ids.json").read_text(encoding="utf-8"))


def templates(
    spell: tokenizers.Tokenizer, ids: np.ndarray, null_ids: np.ndarray, prompt: str, size: Size
) -> Iterator[str]:
    """Every template that could have given both prompts: the null prompt's, with the place of the prompt.

    The fixtures tell only the number of a template, so its text is read from the ids themselves.
    """
    filled, null = (
        user_text(spell.decode([int(i) for i in some], skip_special_tokens=False)) for some in (ids, null_ids)
    )
    null = null.replace(f"{size.width}x{size.height}", "{target_w}x{target_h}")
    filled = filled.replace(f"{size.width}x{size.height}", "{target_w}x{target_h}")
    prompt = unicodedata.normalize("NFC", prompt)
    for at in range(len(null) + 1):
        if null[:at] + prompt + null[at:] == filled:
            yield null[:at] + "{prompt}" + null[at:]


def user_text(text: str) -> str:
    """The text of the user block, without picture and size indicators."""
    text = re.split(r"<\|im_start\|>user\n|<\|vision_end\|>", text)[-1].split("<|im_end|>")[0]
    return re.sub(r" (<indicator:\d+>){2}$", "", text)


def test_the_ranks_have_a_unique_last_merge_each():
    vocabulary, merges = vocabulary_and_merges()
    assert (len(vocabulary), len(merges), len(set(merges))) == (151643, 151387, 151387)


def test_added_tokens_get_the_published_ids(tokenizer: Tokenizer, ids_file: dict):
    assert tokenizer.token_ids == ids_file["added_tokens"]
    assert len(tokenizer.token_ids) == 40


def test_plain_text(tokenizer: Tokenizer, ids_file: dict):
    for row in ids_file["plain"]:
        assert tokenizer.encode([row["text"]]) == row["input_ids"], row["text"]
        assert tokenizer.decode(row["input_ids"]) == unicodedata.normalize("NFC", row["text"])
    assert ids_file["plain"]


def test_indicators_as_text(text_tokenizer: Tokenizer, ids_file: dict):
    for text, ids in ids_file["indicator_as_text"].items():
        assert text_tokenizer.encode([text]) == ids, text
        assert text not in text_tokenizer.token_ids
    assert len(ids_file["indicator_as_text"]) == 12


def test_text_to_image_prompts(tokenizer: Tokenizer, spell: tokenizers.Tokenizer, ids_file: dict):
    with_our_templates = 0
    for row in ids_file["t2i"]:
        size = Size(row["height"], row["width"])
        config = ModelConfig(line_break=row["hw_indicator"])
        expected = [row["input_ids"], row["null_input_ids"]]

        def both(language: str, template: str | None, row=row, size=size, config=config) -> list[list[int]]:
            prompts = (row["prompt"], "")
            return [
                generate_prompt(tokenizer, config, p, size, language, template).ids.tolist() for p in prompts
            ]

        candidates = templates(spell, *map(np.array, expected), row["prompt"], size)
        assert expected in [both("en", template) for template in candidates], row["prompt"]
        if row["template"] == 0:
            assert both(LANGUAGE[row["template_lang"]], None) == expected, row["prompt"]
            with_our_templates += 1
    assert with_our_templates


def test_edit_prompts(goldens: Path, tokenizer: Tokenizer, spell: tokenizers.Tokenizer):
    cases = json.loads((goldens / "tokenizer_edit_meta.json").read_text(encoding="utf-8"))
    arrays = np.load(goldens / "tokenizer_edit.npz")
    config = ModelConfig()
    with_our_templates = 0
    for case in cases:
        size = Size(case["H"], case["W"])
        assert config.bucket(case["src_h"], case["src_w"]) == size
        grid = (case["grid_thw"][1] // 2, case["grid_thw"][2] // 2)
        expected = [arrays[f"{case['case']}.{name}"] for name in ("ids", "null_ids")]

        def both(language: str, template: str | None, case=case, size=size, grid=grid) -> list[list[int]]:
            prompts = (case["prompt"], "")
            made = [edit_prompt(tokenizer, config, p, size, grid, language, template) for p in prompts]
            for prompt in made:
                check_picture_places(prompt, tokenizer, size, grid)
            return [prompt.ids.tolist() for prompt in made]

        want = [ids.tolist() for ids in expected]
        assert want in [both("en", t) for t in templates(spell, *expected, case["prompt"], size)], case[
            "case"
        ]
        if case["template"] == 0:
            assert both(LANGUAGE[case["template_lang"]], None) == want, case["case"]
            with_our_templates += 1
    assert with_our_templates


def check_picture_places(prompt: Prompt, tokenizer: Tokenizer, size: Size, grid: tuple[int, int]) -> None:
    assert prompt.semantic is not None and prompt.pixel is not None
    start, stop = prompt.semantic
    pad = tokenizer.token_ids["<|image_pad|>"]
    assert stop - start == grid[0] * grid[1]
    assert len(prompt.pixel) == size.grid[0] * size.grid[1]
    pads = np.flatnonzero(prompt.ids == pad)
    assert sorted([*prompt.pixel.tolist(), *range(start, stop)]) == pads.tolist()


def test_prompts_of_the_image_fixtures(goldens: Path, text_tokenizer: Tokenizer, spell: tokenizers.Tokenizer):
    """Their sizes are in no table of the vocabulary, so that their indicators are spelt out."""
    config = ModelConfig(indicators="text")
    for family in ("t2i", "i2i"):
        meta = json.loads((goldens / f"{family}_meta.json").read_text(encoding="utf-8"))
        cases = meta["cases"] if isinstance(meta, dict) else meta
        arrays = np.load(goldens / f"{family}.npz")
        checked = 0
        for case in cases:
            name, size = case["case"], Size(case["H"], case["W"])
            if case["prompt"] is None:
                continue
            ids, null_ids = arrays[f"{name}.real_ids"], arrays[f"{name}.real_null_ids"]
            found = []
            for template in templates(spell, ids, null_ids, case["prompt"], size):
                if family == "t2i":
                    used = ModelConfig(indicators="text", line_break=case["hw_indicator"])
                    made = [
                        generate_prompt(text_tokenizer, used, p, size, "en", template)
                        for p in (case["prompt"], "")
                    ]
                else:
                    grid = tuple(int(side) // 2 for side in arrays[f"{name}.grid"][1:])
                    made = [
                        edit_prompt(text_tokenizer, config, p, size, grid, "en", template)
                        for p in (case["prompt"], "")
                    ]
                if [prompt.ids.tolist() for prompt in made] == [ids.tolist(), null_ids.tolist()]:
                    found.append(made)
            assert found, f"{family} {name}: no template gives the ids"
            for prompt, positions in zip(found[0], ("pos", "null_pos"), strict=True):
                check_positions(prompt, arrays[f"{name}.{positions}"], f"{family} {name} {positions}")
            checked += 1
        assert checked, family


def test_understanding_prompts(goldens: Path, tokenizer: Tokenizer):
    cases = json.loads((goldens / "mmu_meta.json").read_text(encoding="utf-8"))
    arrays = np.load(goldens / "mmu.npz")
    for case in cases:
        name = case["case"]
        grid = tuple(int(side) // 2 for side in arrays[f"{name}.grid"][1:])
        prompt = understand_prompt(tokenizer, ModelConfig(), case["question"], grid, case["assistant_header"])
        assert prompt.ids.tolist() == arrays[f"{name}.real_ids"].tolist(), name
        assert prompt.pixel is None
        check_positions(prompt, arrays[f"{name}.pos"], f"mmu {name}")
    assert cases


def check_positions(prompt: Prompt, expected: np.ndarray, where: str) -> None:
    """expected: (3, L + generated), as the reference numbers prompt and what follows."""
    length = len(prompt.ids)
    assert prompt.positions.tolist() == expected[:, :length].tolist(), where
    after = prompt.next_position + np.arange(expected.shape[1] - length)
    assert (expected[:, length:] == after).all(), where
