"""The forward of training is the engine's, and its losses are the recipe's."""

import dataclasses
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.numerics import logit_length, rounding, sums
from tests.unit.training.cases import recipe, rows
from wallaroo.model.checkpoint import TINY, load, load_config
from wallaroo.model.config import Size
from wallaroo.model.engine import Engine, EngineOptions, Request
from wallaroo.model.images import pixel_image, semantic_image
from wallaroo.model.prompts import edit_prompt, generate_prompt, understand_prompt
from wallaroo.model.sampling import Sampling
from wallaroo.model.training.data import from_memory
from wallaroo.model.training.lm import Batch, LMLearner, LMLosses
from wallaroo.model.training.loop import batches
from wallaroo.model.training.rows import Rows
from wallaroo.model.vision import embed_picture, take_many, tower_plan


def forced(engine, request):
    [result] = engine.run([request])
    return torch.from_numpy(result.logits)


@pytest.mark.numerics
@pytest.mark.parametrize("task", ["generate", "edit", "understand"])
def test_the_training_forward_is_the_cached_decode(model, tokenizer, task):
    """Teacher-forced logits of rows in one padded batch equal those of the engine, token by token."""
    config, data = model.config, rows()[task]
    maker = Rows(model, tokenizer, recipe(drop=0.0, masked=0.0))
    made = [maker.make(task, row, np.random.default_rng(0)) for row in data]
    losses = LMLosses(model)
    with torch.no_grad():
        hidden = losses.hidden(task, Batch.of(made, config.vision))
    engine = Engine(model, task, EngineOptions(slots=2, group_rows=2, trace=True))
    greedy = Sampling(cfg=1.0, temperature=1.0, top_k=1, top_p=1.0)
    for index, (row, values) in enumerate(zip(made, data, strict=True)):
        language = values["language"]
        target = Image.open(io.BytesIO(values["picture"]))
        size = Size(target.height, target.width)
        source = Image.open(io.BytesIO(values.get("image", values["picture"])))
        bounds = config.edit_pixels if task == "edit" else config.understand_pixels
        semantic = semantic_image(source, *bounds)
        grid = (semantic.shape[0] // 28, semantic.shape[1] // 28)
        common = {"key": 0, "null": None, "seed": 0, "sampling": greedy}
        if task == "generate":
            prompt = generate_prompt(tokenizer, config, values["prompt"], size, language)
            request = Request(prompt=prompt, size=size, **common)
        elif task == "edit":
            prompt = edit_prompt(tokenizer, config, values["prompt"], size, grid, language)
            pixels = pixel_image(source, size)
            request = Request(prompt=prompt, size=size, semantic=semantic, pixels=pixels, **common)
        else:
            prompt = understand_prompt(tokenizer, config, values["prompt"], grid)
            request = Request(prompt=prompt, size=None, semantic=semantic, **common)
        start = len(prompt.ids)
        assert np.array_equal(row.ids[:start], prompt.ids)
        if task == "understand":
            taken = row.ids[start:]
            # A stop token would end the row; up to it all is compared.
            taken = taken[: list(taken).index(config.token_ids["<|im_end|>"])]
            places = np.arange(start, start + len(taken))
            assert model.lm_head is not None
            logits = model.lm_head(hidden[index, places - 1])
        else:
            places = np.flatnonzero(row.image >= 0)
            taken = row.image[places]
            logits = model.image_parts(task)[1](hidden[index, places - 1])
        if len(taken) == 0:
            continue
        request = dataclasses.replace(request, forced=taken.astype(np.int32), max_new_tokens=len(taken))
        wanted = forced(engine, request)[: len(taken)]
        allowed = rounding(wanted, logit_length(model, task))
        torch.testing.assert_close(logits.detach(), wanted, rtol=0, atol=allowed)


@pytest.mark.numerics
def test_many_pictures_at_once_are_seen_as_each_alone(tokenizer):
    """The tower with all windows of a length in one call, and what it works out of the grids made ahead."""
    tower = load(TINY, "understand").visual
    assert tower is not None
    grids = torch.tensor([[1, 6, 6], [1, 10, 4], [1, 8, 10], [1, 6, 6]])
    patches = torch.randn(int(grids.prod(1).sum()), 1176, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = [
            embed_picture(tower, part, (int(grid[1]), int(grid[2])))
            for part, grid in zip(patches.split(grids.prod(1).tolist()), grids, strict=True)
        ]
        take_many(tower)
        plan = tower_plan(load_config(TINY).vision, grids)
        together = tower(patches, grid_thw=grids, **plan).pooler_output
    wanted = torch.cat(alone)
    torch.testing.assert_close(together, wanted, rtol=0, atol=rounding(wanted, sums(tower)))


def test_batches_made_ahead_by_other_processes_or_a_thread_are_the_same(model, tokenizer):
    made = recipe(data={"edit": ""}, rows={"edit": 4}, steps=3, accumulate=2, seed=2)
    data = {"edit": rows()["edit"]}
    learner = LMLearner(model, tokenizer, from_memory(data, made.seed), made)
    learner.rows.prepare(data)
    ahead = batches(learner, dataclasses.replace(made, workers=2), 1)
    overlapped = batches(learner, made, 1, overlapped=True)
    for (theirs,), (too,), (ours,) in zip(ahead, overlapped, batches(learner, made, 1), strict=True):
        for name, value in vars(ours["edit"]).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(theirs["edit"], name)), name
                assert torch.equal(value, getattr(too["edit"], name)), name


@pytest.mark.numerics
@pytest.mark.parametrize("task", ["generate", "edit"])
def test_labels_are_smoothed_more_after_dropped_prompts(model, tokenizer, task):
    kept, dropped = (Rows(model, tokenizer, recipe(drop=drop)) for drop in (0.0, 1.0))
    made = [
        maker.make(task, data, np.random.default_rng(0))
        for maker, data in zip((kept, dropped), rows()[task], strict=False)
    ]
    batch = Batch.of(made, model.config.vision)
    losses = LMLosses(model, 0.01, 0.3)
    with torch.no_grad():
        logits = model.image_parts(task)[1](losses.hidden(task, batch)[:, :-1])
        image = batch.image[:, 1:]
        wanted = sum(
            F.cross_entropy(
                part[tokens >= 0], tokens[tokens >= 0], reduction="sum", label_smoothing=smoothing
            )
            for part, tokens, smoothing in zip(logits, image, (0.01, 0.3), strict=True)
        )
        found = losses({task: batch})[f"{task}_image"]
    # A sum over the codebook for each token, and one over all tokens.
    allowed = rounding(float(wanted), logits.shape[-1] + image.numel())
    assert float(found * (image >= 0).sum()) == pytest.approx(float(wanted), rel=0, abs=allowed)
