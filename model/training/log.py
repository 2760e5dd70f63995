"""What a stage shows of itself: metrics as JSON lines and in TensorBoard, samples, a line for people."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from wallaroo.model.engine import Engine, EngineOptions, Request
from wallaroo.model.prompts import generate_prompt
from wallaroo.model.sampling import Sampling
from wallaroo.model.training.lm import LMJob
from wallaroo.model.training.loop import Job
from wallaroo.model.training.meter import MEASURED
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.vq import VQJob
from wallaroo.model.vq import to_uint8
from wallaroo.model.wallaroo import Wallaroo

METRICS = "metrics.jsonl"
ERRORS = "errors.jsonl"


class Log:
    """Metrics of a stage: a line of JSON each time in METRICS, and TensorBoard's files where that is
    installed. After a resume the lines of steps that are made again are there twice."""

    def __init__(self, folder: str | Path):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.file = Path(folder) / METRICS
        self.told: set[str] = set()
        self.board: Any = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder))

    def __call__(self, step: int, numbers: dict[str, float]) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        for name, number in numbers.items() if self.board else ():
            self.board.add_scalar(name, number, step)

    def bad(self, reasons: Sequence[str]) -> None:
        """Adds why rows could not be used to ERRORS, each reason once a start."""
        with open(self.file.with_name(ERRORS), "a", encoding="utf-8") as file:
            for reason in reasons:
                if reason not in self.told:
                    self.told.add(reason)
                    task, _, message = reason.partition(": ")
                    file.write(json.dumps({"task": task, "message": message}) + "\n")

    def picture(self, step: int, pixels: np.ndarray) -> None:
        """A sample, uint8 `(H, W, 3)`."""
        Image.fromarray(pixels).save(self.file.with_name(f"sample-{step:06}.png"))
        if self.board:
            self.board.add_image("sample", pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self.board:
            self.board.close()


def progress(step: int, steps: int, numbers: Mapping[str, float]) -> str:
    """One line for people."""
    losses = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items() if name not in _NO_LOSS)
    if "loss" not in numbers:
        return f"step {step:,} of {steps:,}: {losses}"
    measured = [f"{numbers['memory_peak_gb']:.1f} GB", f"{numbers['data_wait']:.0%} waiting for data"]
    if "mfu" in numbers:
        measured.append(f"MFU {numbers['mfu']:.1%}")
    if numbers.get("bad_rows"):
        measured.append(f"{numbers['bad_rows']:,.0f} bad rows replaced")
    measured.append(f"{numbers['tokens_per_second']:,.0f} tokens/s")
    return f"step {step:,} of {steps:,}: loss {numbers['loss']:.4f} ({losses}), {', '.join(measured)}"


_NO_LOSS = ("loss", "gradient_norm", "rate", "skipped_steps", "bad_rows", *MEASURED)


def due(recipe: Recipe, step: int) -> bool:
    """Whether samples are to be drawn after a step."""
    wanted = bool(recipe.sample_every) and step % recipe.sample_every == 0
    return wanted and (recipe.part == "vq" or "generate" in recipe.rows)


def samples(job: Job, step: int, model: Wallaroo | None = None) -> np.ndarray:
    """A strip of pictures, uint8 `(H, W, 3)`: of the image tokenizer what it is given over what it makes of
    it, of the language model pictures that `model`, by default the job's, draws for the first rows."""
    count = 8
    with torch.no_grad():
        if isinstance(job, VQJob):
            vq = job.module.vq
            pixels = job.batch(step, 0)[0][0][:count]
            strips = [to_uint8(pixels), to_uint8(vq.decode(vq.quantise(vq.encode(pixels))))]
            return np.concatenate([np.concatenate(list(strip.cpu().numpy()), 1) for strip in strips])
    assert isinstance(job, LMJob)
    model, task = model or job.module.model, "generate"
    engine = Engine(model, task, EngineOptions(slots=count, group_rows=count))
    config, tokenizer = model.config, job.rows.tokenizer
    size = config.bucket(1, 1)
    requests = []
    for key, row in enumerate(job.source(task, 0, count)):
        prompt, null = (
            generate_prompt(tokenizer, config, words, size, str(row["language"]))
            for words in (row["prompt"], "")
        )
        requests.append(Request(key, prompt, null, size, key, Sampling()))
    results = sorted(engine.run(requests), key=lambda result: int(str(result.key)))
    model.train()
    return np.concatenate([result.pixels for result in results if result.pixels is not None], axis=1)
