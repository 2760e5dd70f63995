"""Rows are the recipe's: what stands in them, what is drawn for them, which are left out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.unit.training.cases import picture, recipe, rows
from wallaroo.model.errors import InputError
from wallaroo.model.training.data import from_memory
from wallaroo.model.training.lm import LMLearner
from wallaroo.model.training.process import Process
from wallaroo.model.training.rows import NO_LATENT, Rows, fits
from wallaroo.model.vq import to_float


def test_response_places_and_targets(model, tokenizer):
    """What each head is to predict, and nothing of the prompt."""
    ids = model.config.token_ids
    maker = Rows(model, tokenizer, recipe(drop=0.0))
    data = rows()
    row = maker.make("generate", data["generate"][0], np.random.default_rng(0))
    height, width = 64 // 16, 96 // 16
    assert (row.image >= 0).sum() == height * width
    text = row.ids[row.target & (row.image < 0)]
    # One token opens the picture, one stands between rows, three close it.
    assert len(text) == height + 3
    ends = [ids["<|generate_start|>"], *[ids["<|end_of_line>|"]] * (height - 1), ids["<|generate_end|>"]]
    assert list(text[:-1]) == [*ends, ids["<|im_end|>"]]
    assert tokenizer.decode(text[-1:]) == "\n"
    answer = maker.make("understand", data["understand"][2], np.random.default_rng(0))
    assert tokenizer.decode(answer.ids[answer.target]) == "redred\n"


def test_dropped_prompts_and_masked_latents(model, tokenizer):
    """A dropped edit has an empty prompt and a black source, and keeps its target."""
    data = rows()["edit"][0]
    kept = Rows(model, tokenizer, recipe(drop=0.0, masked=0.0)).make("edit", data, np.random.default_rng(0))
    dropped = Rows(model, tokenizer, recipe(drop=1.0, masked=0.0)).make(
        "edit", data, np.random.default_rng(0)
    )
    assert len(dropped.ids) < len(kept.ids)
    assert np.array_equal(dropped.image[dropped.image >= 0], kept.image[kept.image >= 0])
    black = Image.new("RGB", (96, 64))
    with torch.no_grad():
        latents = model.vq.encode(to_float(torch.from_numpy(np.array(black)))[None])[0].flatten(1).T
    assert np.array_equal(dropped.latents, latents.numpy())
    maker = Rows(model, tokenizer, recipe(drop=0.0, masked=0.4))
    shares = [
        (maker.make("edit", data, np.random.default_rng(n)).latents != NO_LATENT).any(1).mean()
        for n in range(60)
    ]
    assert min(shares) == 0 and 0.3 < max(shares) < 0.4


def test_a_step_has_the_same_rows_however_many_share_it(model, tokenizer):
    """What is dropped, masked and which template is drawn goes with the row, not with who makes it."""
    values = {"data": {"edit": ""}, "rows": {"edit": 8}, "drop": 0.5, "seed": 4}
    values["templates"] = {"edit_en": ["{prompt}", "please {prompt}"], "edit_zh": ["{prompt}", "请{prompt}"]}
    source = from_memory({"edit": rows()["edit"]}, 4)

    def step_of(world, accumulate):
        made = recipe(accumulate=accumulate, **values)
        parts = [
            LMLearner(model, tokenizer, source, made, Process(rank, world)).batch(3, piece)[0]["edit"]
            for piece in range(accumulate)
            for rank in range(world)
        ]
        ids = torch.cat([F.pad(part.ids, (0, 400 - part.ids.shape[1])) for part in parts])
        return ids, torch.cat([part.latents for part in parts]), torch.cat([part.patches for part in parts])

    whole = step_of(1, 1)
    for world, accumulate in ((2, 1), (1, 4), (2, 2)):
        assert all(map(torch.equal, step_of(world, accumulate), whole)), (world, accumulate)


def test_rows_that_are_too_long_or_too_small_are_left_out(model, tokenizer):
    """The bound is the length that a row would have in a batch, with the longest of its templates."""
    values = {"drop": 0.0, "masked": 0.0, "templates": {"generate_en": ["{prompt}", "draw it now: {prompt}"]}}
    for task, given in rows().items():
        for row in given:
            made = Rows(model, tokenizer, recipe(**values))
            longest = max(len(made.make(task, row, np.random.default_rng(n)).ids) for n in range(9))
            for bound, wanted in ((longest, True), (longest - 1, False)):
                stage = recipe(**values, lengths={task: bound})
                assert fits(row, task, tokenizer, model.config, stage) == wanted, (task, bound)
    small = {"prompt": "a cat", "language": "en", "picture": picture(0, 64, 96)}
    for least, height, wanted in ((96, 64, True), (97, 64, False), (96, 40, False)):
        row = small | {"picture": picture(0, height, 96)}
        assert fits(row, "generate", tokenizer, model.config, recipe(least_side=least)) == wanted


def test_a_coin_decides_in_which_language_a_class_is_named(model, tokenizer):
    row = rows()["generate"][0] | {"prompt": "goldfish", "prompt_zh": "金鱼"}
    maker = Rows(model, tokenizer, recipe(drop=0.0))
    texts = [tokenizer.decode(maker.make("generate", row, np.random.default_rng(n)).ids) for n in range(40)]
    chinese = sum("金鱼" in text for text in texts)
    assert 10 < chinese < 30 and chinese + sum("goldfish" in text for text in texts) == 40


def test_a_picture_that_cannot_be_decoded_is_one_sentence(model, tokenizer):
    row = rows()["generate"][0]
    for bad in (b"no image", row["picture"][:60]):
        with pytest.raises(InputError, match=r"cannot be decoded \(.*leave its row out"):
            Rows(model, tokenizer, recipe()).make(
                "generate", row | {"picture": bad}, np.random.default_rng(0)
            )
