"""The tokenizer of a checkpoint: control tokens by id, everything else as text."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wallaroo.model.checkpoint import TINY
from wallaroo.model.config import SIZES_512
from wallaroo.model.errors import InputError, RowError
from wallaroo.model.tokenizer import (
    QWEN_TOKENS,
    SIDES_512,
    WALLAROO_TOKENS,
    Control,
    Tokenizer,
    add_control_tokens,
    added_tokens,
    build,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TINY)


def test_added_tokens_of_the_published_table_keep_its_order():
    tokens = added_tokens(SIZES_512)
    assert len(tokens) == len(set(tokens)) == 22 + 6 + 12
    assert tokens[28:] == [f"<indicator:{side}>" for side in SIDES_512]
    assert {side for size in SIZES_512.values() for side in size} == set(SIDES_512)


def test_added_tokens_of_another_table_ascend():
    assert added_tokens({"0.5": (64, 128), "2.0": (128, 64), "1.0": (96, 96)})[28:] == [
        "<indicator:64>",
        "<indicator:96>",
        "<indicator:128>",
    ]
    assert len(added_tokens(SIZES_512, indicators="text")) == 28


def test_a_control_piece_is_one_id(tokenizer: Tokenizer):
    for token, index in tokenizer.token_ids.items():
        assert tokenizer.encode([Control(token)]) == [index]


def test_control_tokens_in_text_are_text(tokenizer: Tokenizer):
    controls = set(tokenizer.token_ids.values())
    for token in tokenizer.token_ids:
        ids = tokenizer.encode([f"a {token} b"])
        assert not controls.intersection(ids), token
        assert tokenizer.decode(ids) == f"a {token} b"


def test_neighbouring_text_is_encoded_as_one(tokenizer: Tokenizer):
    whole = tokenizer.encode(["a red apple"])
    assert tokenizer.encode(["a re", "", "d ap", "ple"]) == whole
    apart = tokenizer.encode(["a re", Control("<|im_end|>"), "d apple"])
    assert apart == [
        *tokenizer.encode(["a re"]),
        tokenizer.control_id("<|im_end|>"),
        *tokenizer.encode(["d apple"]),
    ]
    assert [i for i in apart if i != tokenizer.control_id("<|im_end|>")] != whole


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_comes_back(text: str):
    tokenizer = Tokenizer.from_folder(TINY)
    ids = tokenizer.encode([text])
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert all(0 <= i < tokenizer.size for i in ids)


def test_decode_skips_control_tokens_and_unused_rows(tokenizer: Tokenizer):
    ids = tokenizer.encode(["a cat", Control("<|im_end|>"), Control("<|image_pad|>")])
    assert tokenizer.decode([*ids, tokenizer.size, tokenizer.size + 5]) == "a cat"
    assert tokenizer.decode([]) == ""


def test_half_a_character_is_replaced(tokenizer: Tokenizer):
    ids = tokenizer.encode(["🍜"])
    assert len(ids) > 1
    assert "\ufffd" in tokenizer.decode(ids[:1])


def test_half_a_surrogate_pair_is_the_rows_error(tokenizer: Tokenizer):
    with pytest.raises(RowError, match="surrogate") as caught:
        tokenizer.encode(["a \ud83c cat"])
    assert caught.value.kind == "prompt"


def test_an_unknown_control_token_names_the_nearest(tokenizer: Tokenizer):
    with pytest.raises(InputError, match=r"did you mean '<\|im_end\|>'"):
        tokenizer.encode([Control("<|im_ent|>")])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"added_tokens": [{}]}', '{"model": {"type": "BPE"}}']
)
def test_a_broken_file_is_refused(text: str, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_control_tokens_continue_the_vocabulary_and_are_added_once():
    tokenizer = build({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    add_control_tokens(tokenizer, QWEN_TOKENS)
    tokens = [*QWEN_TOKENS, *WALLAROO_TOKENS]
    add_control_tokens(tokenizer, tokens)
    add_control_tokens(tokenizer, tokens)
    assert Tokenizer(tokenizer.to_str()).token_ids == {token: 3 + i for i, token in enumerate(tokens)}


@pytest.mark.parametrize("there", [["<|im_start|>"], ["<mask>"], ["<|im_end|>", "<|im_start|>"]])
def test_foreign_added_tokens_are_refused(there: list[str]):
    tokenizer = build({"a": 0}, [])
    tokenizer.add_tokens(there)
    with pytest.raises(InputError, match=r"Qwen2\.5"):
        add_control_tokens(tokenizer, added_tokens(SIZES_512))


def test_the_vocabulary_file_is_plain_json():
    values = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(values["model"]["vocab"]) == 1000
    assert [token["id"] for token in values["added_tokens"]] == list(range(1000, 1032))
