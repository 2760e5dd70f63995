"""What a stage logs: metrics as JSON lines and in TensorBoard, bad rows, samples, and a progress line."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wallaroo.model.training.meter import MEASURED
from wallaroo.model.training.samples import write_sample

METRICS = "metrics.jsonl"
ERRORS = "errors.jsonl"


class Log:
    """Metrics, errors and samples of a stage, written by its first process.

    After a resume the steps that are repeated have a second line.

    Args:
        folder: Of the stage, made if it is absent.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._reasons: set[str] = set()
        self._board: Any = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder))

    def __call__(self, step: int, numbers: dict[str, float]) -> None:
        """Adds a line to METRICS and a point to each curve of TensorBoard."""
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        for name, number in numbers.items() if self._board else ():
            self._board.add_scalar(name, number, step)

    def bad(self, reasons: Sequence[str]) -> None:
        """Adds rows that could not be used to ERRORS, each reason once a start.

        Args:
            reasons: `TASK: MESSAGE` of each row.
        """
        with open(self.folder / ERRORS, "a", encoding="utf-8") as file:
            for reason in reasons:
                if reason not in self._reasons:
                    self._reasons.add(reason)
                    task, _, message = reason.partition(": ")
                    file.write(json.dumps({"task": task, "message": message}) + "\n")

    def picture(self, step: int, pixels: np.ndarray, prompts: Sequence[tuple[str, str]]) -> None:
        """Adds a strip of samples, see `write_sample`.

        Args:
            step: After which it was drawn.
            pixels: uint8 `(H, W, 3)`.
            prompts: Prompt and language of each picture.
        """
        write_sample(self.folder, step, pixels, prompts)
        if self._board:
            words = "\n".join(f"{number}. {prompt}" for number, (prompt, _) in enumerate(prompts, 1))
            self._board.add_image("sample", pixels, step, dataformats="HWC")
            if words:
                self._board.add_text("sample_prompts", words, step)

    def close(self) -> None:
        """Ends the file of TensorBoard."""
        if self._board:
            self._board.close()


def progress(step: int, steps: int, numbers: Mapping[str, float]) -> str:
    """The progress of a stage in a line.

    Args:
        step: Number of the step.
        steps: Steps of the stage.
        numbers: Metrics of the step.

    Returns:
        The line.
    """
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
