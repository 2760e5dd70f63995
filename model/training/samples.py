"""Pictures that a stage draws while it trains, as files, in TensorBoard and on a page.

    FOLDER/sample-000200.png   a strip of pictures after a step
    FOLDER/samples.jsonl       a line per strip: step, file and prompts
    FOLDER/samples.html        all strips, the last one first

Knows nothing of losses.
"""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from wallaroo.model.engine import Engine, EngineOptions, Request
from wallaroo.model.prompts import detect_language, generate_prompt
from wallaroo.model.sampling import Sampling
from wallaroo.model.training.lm import LMLearner
from wallaroo.model.training.loop import Learner
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.vq import VQLearner
from wallaroo.model.vq import to_uint8
from wallaroo.model.wallaroo import Wallaroo

SAMPLES = "samples.jsonl"
PAGE = "samples.html"

COUNT = 8
"""Pictures of a strip without `sample_prompts`."""


def due(recipe: Recipe, step: int) -> bool:
    """Whether samples are drawn after a step.

    Args:
        recipe: The stage.
        step: Number of the step.

    Returns:
        True if they are.
    """
    wanted = bool(recipe.sample_every) and step % recipe.sample_every == 0
    return wanted and (recipe.part == "vq" or "generate" in recipe.rows)


def sample_prompts(learner: Learner, recipe: Recipe) -> list[tuple[str, str]]:
    """The prompts of a stage's samples, the same after each step.

    Args:
        learner: Of the stage.
        recipe: The stage.

    Returns:
        Prompt and language (`en` or `zh`) of each picture: `sample_prompts` of the recipe, else those of the
        first COUNT rows; none of the image tokenizer.
    """
    if not isinstance(learner, LMLearner):
        return []
    if recipe.sample_prompts:
        return [(prompt, detect_language(prompt)) for prompt in recipe.sample_prompts]
    return [(str(row["prompt"]), str(row["language"])) for row in learner.source("generate", 0, COUNT)]


def draw(
    learner: Learner, step: int, prompts: Sequence[tuple[str, str]], model: Wallaroo | None = None
) -> np.ndarray:
    """Draws a strip of pictures.

    Args:
        learner: Of the language model or the image tokenizer.
        step: After which they are drawn; decides which pictures the image tokenizer is given.
        prompts: Prompt and language of each picture. The image tokenizer has none.
        model: Draws, by default that of the learner.

    Returns:
        uint8 `(H, W, 3)`, pictures side by side; of the image tokenizer the given ones above its own.
    """
    with torch.no_grad():
        if isinstance(learner, VQLearner):
            vq = learner.module.vq
            pixels = learner.batch(step, 0)[0][0][:COUNT]
            strips = [to_uint8(pixels), to_uint8(vq.decode(vq.quantise(vq.encode(pixels))))]
            return np.concatenate([np.concatenate(list(strip.cpu().numpy()), 1) for strip in strips])
    assert isinstance(learner, LMLearner)
    model, task = model or learner.module.model, "generate"
    engine = Engine(model, task, EngineOptions(slots=COUNT, group_rows=COUNT))
    config, tokenizer = model.config, learner.rows.tokenizer
    size = config.bucket(1, 1)
    requests = []
    for key, (words, language) in enumerate(prompts):
        prompt, null = (generate_prompt(tokenizer, config, text, size, language) for text in (words, ""))
        requests.append(Request(key, prompt, null, size, key, Sampling()))
    results = sorted(engine.run(requests), key=lambda result: int(str(result.key)))
    model.train()
    return np.concatenate([result.pixels for result in results if result.pixels is not None], axis=1)


def write_sample(
    folder: str | Path, step: int, pixels: np.ndarray, prompts: Sequence[tuple[str, str]]
) -> None:
    """Adds a strip to a stage's folder and its page.

    Args:
        folder: Of the stage.
        step: After which it was drawn; a strip of the same step is replaced.
        pixels: uint8 `(H, W, 3)`.
        prompts: Prompt and language of each picture.
    """
    folder = Path(folder)
    file = f"sample-{step:06}.png"
    Image.fromarray(pixels).save(folder / file)
    line = {"step": step, "file": file, "prompts": [words for words, _ in prompts]}
    with open(folder / SAMPLES, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
    lines = [json.loads(one) for one in (folder / SAMPLES).read_text(encoding="utf-8").splitlines()]
    (folder / PAGE).write_text(page({one["step"]: one for one in lines}), encoding="utf-8")


def page(strips: Mapping[int, Mapping[str, Any]]) -> str:
    """An HTML page of strips, which reads their files from its own folder.

    Args:
        strips: Step -> line of SAMPLES.

    Returns:
        The page, without scripts and without anything from the network.
    """
    parts = [_HEAD]
    for step, strip in sorted(strips.items(), reverse=True):
        file = html.escape(strip["file"])
        words = "".join(f"<li>{html.escape(prompt)}</li>" for prompt in strip["prompts"])
        parts.append(f"<section><h2>Step {step:,}</h2>\n")
        parts.append(f'<img src="{file}" alt="samples of step {step}" loading="lazy">\n')
        if words:
            parts.append(f"<details><summary>Prompts, left to right</summary><ol>{words}</ol></details>\n")
        parts.append("</section>\n")
    return "".join([*parts, "</body></html>\n"])


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Samples</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
img { max-width: 100%; height: auto; }
</style></head><body>
<h1>Samples</h1>
"""
