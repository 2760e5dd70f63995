"""Training: its forward is the engine's, its rows and losses are the recipe's, and it goes on exactly."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from model.checkpoint import TINY, load, load_tokenizer
from model.config import Size
from model.engine import Engine, EngineOptions, Request
from model.errors import InputError
from model.images import pixel_image, semantic_image
from model.prompts import edit_prompt, generate_prompt, understand_prompt
from model.sampling import Sampling
from model.train import NO_LATENT, Batch, LMJob, LMLosses, Recipe, Rows, VQJob, fresh_model, optimise, shuffled
from model.vq import to_float


@pytest.fixture(scope="module")
def model():
    return load(TINY)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


def recipe(**values):
    given = {"stage": "lm", "folder": "unused", "start": "", "data": {}, "rows": {}, "steps": 4, "rate": 1e-3}
    return Recipe.from_dict(given | values)


def picture(seed, height, width):
    """An encoded picture with two halves of random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 3))
    array = np.empty((height, width, 3), np.uint8)
    array[:, : width // 2], array[:, width // 2 :] = colours
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def rows(count=6):
    """Rows of all tasks as a data set has them."""
    made = {"generate": [], "edit": [], "understand": []}
    sizes = [(64, 96), (96, 64), (96, 96)]
    for number in range(count):
        language, prompt = [("en", f"a red circle {number}"), ("zh", f"红色圆形{number}")][number % 2]
        size = sizes[number % len(sizes)]
        row = {"language": language, "prompt": prompt, "picture": picture(number, *size)}
        made["generate"].append(row)
        made["edit"].append(row | {"image": picture(100 + number, *size)})
        made["understand"].append(row | {"image": picture(200 + number, *size), "answer": "red" * number})
    return made


def forced(engine, request):
    [result] = engine.run([request])
    return torch.from_numpy(result.logits)


@pytest.mark.parametrize("task", ["generate", "edit", "understand"])
def test_the_training_forward_is_the_cached_decode(model, tokenizer, task):
    """Teacher-forced logits of rows in one padded batch equal those of the engine, token by token."""
    config, data = model.config, rows()[task]
    maker = Rows(model, tokenizer, recipe(drop=0.0, masked=0.0))
    made = [maker.make(task, row, np.random.default_rng(0)) for row in data]
    losses = LMLosses(model)
    with torch.no_grad():
        hidden = losses.hidden(task, Batch.of(made))
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
        assert torch.allclose(logits.detach(), forced(engine, request)[: len(taken)], atol=2e-4, rtol=1e-4)
