"""rows, recipes and learners on the small model that several tests of training share."""

import io

import numpy as np
from PIL import Image

from wallaroo.model.checkpoint import TINY, load, load_tokenizer
from wallaroo.model.training.data import from_memory
from wallaroo.model.training.fresh import fresh_model
from wallaroo.model.training.lm import LMLearner
from wallaroo.model.training.meter import MEASURED
from wallaroo.model.training.recipe import Recipe


def recipe(**values):
    given = {"part": "lm", "folder": "unused", "base": "", "data": {}, "rows": {}, "steps": 4, "rate": 1e-3}
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


def learning(folder, **values):
    """A learner on the small model that learns three tasks for a few steps, and the losses it reports."""
    made = recipe(
        folder=str(folder),
        data=dict.fromkeys(("generate", "edit", "understand"), "unused"),
        rows={"generate": 4, "edit": 4, "understand": 4},
        **{"accumulate": 2, "warmup": 2, "log_every": 1, "save_every": 2, "frozen": ["vq."]} | values,
    )
    learner = LMLearner(
        fresh_model(load(TINY).config, 5), load_tokenizer(TINY), from_memory(rows(), made.seed), made
    )
    said: dict[int, dict[str, float]] = {}
    return learner, made, said, lambda step, numbers: said.__setitem__(step, numbers)


def losses_of(said):
    return {step: {k: v for k, v in line.items() if k not in MEASURED} for step, line in said.items()}
