"""A recipe: one stage of training as a table of a TOML file, checked before anything is loaded."""

import dataclasses
import math
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wallaroo.model.checkpoint import TINY
from wallaroo.model.config import VQ_FACTOR
from wallaroo.model.errors import InputError, did_you_mean
from wallaroo.model.prompts import TEMPLATES

_PARTS = {
    "generate": ("gen_",),
    "edit": ("edit_", "pixel_adapter.", "visual."),
    "understand": ("visual.",),
}
"""Task -> beginnings of the names of parameters that not all tasks use."""

_TEMPLATES = tuple(f"{task}_{language}" for task, language in TEMPLATES)
"""Keys of `templates`."""

LORA_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The matrices of a decoder layer."""

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """One stage of training: a table of a recipe file."""

    part: str
    """What learns: `vq` (image tokenizer) or `lm` (everything else)."""
    folder: str
    """Folder of states, metrics, samples and the result."""
    base: str
    """Checkpoint folder, or `tiny`, that gives the result its configuration and tokenizer."""
    data: dict[str, str]
    """Task -> Parquet files of its rows; for part `vq`, rows with pictures under the name `vq`."""
    steps: int
    """Steps of the stage."""
    rows: dict[str, int]
    """Task -> rows of a step."""
    rate: float
    """Highest learning rate."""
    start: str = ""
    """Checkpoint folder of the first weights, by default `base`. Parts that it lacks are drawn by `seed`."""
    copied: dict[str, str] = field(default_factory=dict)
    """Part -> part whose weights it starts with instead."""
    tasks: tuple[str, ...] = ()
    """Tasks of the result, by default those of `base`."""
    seed: int = 0
    """Decides new weights, the order of rows, and what is drawn for each."""
    size: int = 0
    """Side of square pictures in pixels; 0 for the sizes of `base`."""
    warmup: int = 0
    """Steps in which the rate rises from 0."""
    decay: int = 0
    """Steps at the end in which the rate falls to a tenth."""
    largest_loss: float = 15.0
    """A step whose loss of generate, text and image added, is higher is skipped; 0 for no bound. Steps whose
    losses are not finite are always skipped."""
    accumulate: int = 1
    """Pieces in which the rows of a step are processed."""
    drop: float = 0.1
    """Share of prompts that become empty, for guidance."""
    smoothing: float = 0.0
    """Label smoothing of image tokens."""
    null_smoothing: float = 0.0
    """Label smoothing of image tokens after an empty prompt."""
    masked: float = 0.4
    """Bound on the share of the source's latents that an edit row keeps; 0 keeps all."""
    muon: bool = False
    """Whether matrices learn by Muon instead of AdamW."""
    learn: tuple[str, ...] = ()
    """Prefixes of the parameters that learn, by default all; for part `vq` within the image tokenizer."""
    frozen: tuple[str, ...] = ("vq.", "visual.")
    """Prefixes of the parameters that do not learn."""
    lora: int = 0
    """Rank of the updates that learn in place of the decoder's matrices; 0 for none. Besides them only what
    `learn` names learns."""
    lora_scale: float = 2.0
    """Factor of an update."""
    lora_targets: tuple[str, ...] = LORA_TARGETS
    """Matrices of a decoder layer that get updates."""
    checkpointing: bool = False
    """Whether a layer keeps only its input and is computed again in the backward pass."""
    precision: str = "auto"
    """`float32`, `bfloat16` (for products), or `auto`: bfloat16 on GPUs."""
    stream: bool = False
    """Whether Ray's workers read rows from Parquet when needed, instead of from Ray's object store."""
    threads: int = 0
    """Threads of torch; 0 for its own choice."""
    workers: int = 0
    """Processes that make batches ahead, without Ray."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    save_every: int = 200
    """Steps between two states."""
    sample_every: int = 0
    """Steps between two samples; 0 for none."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of the samples, by default those of the first rows."""
    held_out: dict[str, str] = field(default_factory=dict)
    """Task -> Parquet files of rows whose losses are logged and not learned."""
    validate_every: int = 0
    """Steps between two losses of held-out rows."""
    validate_steps: int = 4
    """Steps of held-out rows whose mean is logged. No prompt of theirs is dropped."""
    alike: float = 0.0
    """Part `vq`: weight of the loss that gives equal patches one token; without it a token also depends on
    what surrounds its patch."""
    plain: int = 0
    """Part `vq`: steps without quantisation, after which the codebook is set."""
    revive: int = 0
    """Part `vq`: steps after which unused codebook entries move; 0 for never."""
    templates: dict[str, list[str]] = field(default_factory=dict)
    """`TASK_LANGUAGE` -> texts around a prompt, of which one is drawn for each row."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Task -> most tokens of a row; longer rows are left out."""
    least_side: int = 0
    """Pictures to draw whose longer side has fewer pixels, or is over twice the other, are left out; 0 keeps
    all."""
    semantic_pixels: int = 0
    """Most pixels that the vision tower sees; 0 for those of `base`."""

    @classmethod
    def from_file(cls, path: str | Path, stage: str) -> "Recipe":
        """Reads a stage from a recipe file, whose keys above all tables apply to every stage.

        Args:
            path: TOML file.
            stage: Name of its table.

        Returns:
            The stage's recipe.

        Raises:
            InputError: The file cannot be read, lacks the stage or has an impossible value.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"There is no recipe file {path}.") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"{path} is not a recipe file ({error}).") from None
        tables = {name: value for name, value in values.items() if isinstance(value, dict)}
        stages = {name: table for name, table in tables.items() if name not in cls.__dataclass_fields__}
        if stage not in stages:
            near = did_you_mean(stage, stages) or f"; it has {', '.join(stages) or 'none'}."
            raise InputError(f"{path} has no stage '{stage}'{near}")
        common = {name: value for name, value in values.items() if name not in stages}
        return cls.from_dict(common | stages[stage])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Makes a recipe from the values of a table.

        Args:
            values: Field -> value; lists become tuples.

        Returns:
            The recipe.

        Raises:
            InputError: A key is unknown or missing, or a value is impossible.
        """
        entries = {entry.name: entry for entry in dataclasses.fields(cls)}
        for name in values:
            if name not in entries:
                raise InputError(
                    f"The recipe has an unknown key '{name}'{did_you_mean(name, entries) or '.'}"
                )
        for name, entry in entries.items():
            needed = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
            if needed and name not in values:
                raise InputError(f"The recipe lacks '{name}', which every stage needs.")
            if name in values and not _is(values[name], entry.type):
                raise InputError(
                    f"The recipe's {name} is {values[name]!r:.100}, but must be {_in_words(entry.type)}."
                )
        made: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        for name in ("base", "start"):
            if made.get(name) == "tiny":
                made[name] = str(TINY)
        recipe = cls(**made)
        recipe._check_names()
        recipe._check_options()
        recipe._check_rows()
        recipe.share(1)
        return recipe

    def _check_names(self) -> None:
        """Checks the part, and keys that are names of tasks, prompts and matrices."""
        if self.part not in ("vq", "lm"):
            raise InputError(f"The recipe's part is '{self.part}', but must be vq or lm.")
        for task in self.lengths:
            if task not in _PARTS:
                near = did_you_mean(task, _PARTS) or f"; tasks are {', '.join(_PARTS)}."
                raise InputError(f"The recipe's lengths has '{task}', which is not a task{near}")
        for name in self.templates:
            if name not in _TEMPLATES:
                near = did_you_mean(name, _TEMPLATES) or f"; they are {', '.join(_TEMPLATES)}."
                raise InputError(f"The recipe's templates has '{name}', which no prompt has{near}")
        for target in self.lora_targets:
            if target not in LORA_TARGETS:
                near = did_you_mean(target, LORA_TARGETS) or f"; they are {', '.join(LORA_TARGETS)}."
                raise InputError(f"The recipe's lora_targets has '{target}', which no layer has{near}")

    def _check_options(self) -> None:
        """Checks options against the part, and their bounds."""
        if self.sample_prompts and (self.part == "vq" or "generate" not in self.rows):
            raise InputError(
                "The recipe has sample_prompts, but draws from prompts only if it trains generate; "
                "leave them out."
            )
        if self.lora and self.part == "vq":
            raise InputError("The recipe has lora, but the image tokenizer has no such layers; leave it out.")
        if self.size % VQ_FACTOR:
            raise InputError(
                f"The recipe's size is {self.size}, but must be a multiple of {VQ_FACTOR}, the side of an "
                f"image token in pixels."
            )
        if self.stream and self.part == "vq":
            raise InputError("The recipe streams rows, but the image tokenizer needs them all; leave it out.")
        if self.precision not in PRECISIONS:
            raise InputError(
                f"The recipe's precision is '{self.precision}', but must be one of {', '.join(PRECISIONS)}."
            )
        for name in ("drop", "masked", "smoothing", "null_smoothing"):
            if getattr(self, name) > 1:
                raise InputError(f"The recipe's {name} is {getattr(self, name)}, but a share is at most 1.")

    def _check_rows(self) -> None:
        """Checks rows, their data and the steps."""
        if bool(self.held_out) != bool(self.validate_every):
            raise InputError(
                f"The recipe has held_out = {self.held_out} and validate_every = {self.validate_every}; "
                f"losses of held-out rows need both, so give both or neither."
            )
        for task in self.held_out:
            if task not in self.rows or self.part == "vq":
                raise InputError(
                    f"The recipe's held_out names '{task}', but must name tasks that the stage trains: "
                    f"{', '.join(self.rows) if self.part == 'lm' else 'none of part vq'}."
                )
        for name in ("steps", "accumulate", "log_every", "save_every", "validate_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"The recipe's {name} is {getattr(self, name)}, but must be at least 1.")
        if set(self.rows) != set(self.data):
            raise InputError(
                f"The recipe has rows for {', '.join(self.rows) or 'nothing'} and data for "
                f"{', '.join(self.data) or 'nothing'}; both must name the same tasks."
            )

    def share(self, world: int) -> dict[str, int]:
        """Divides the rows of a step.

        Args:
            world: Processes that share the training.

        Returns:
            Task -> rows of each process in each of the `accumulate` pieces.

        Raises:
            InputError: The rows cannot be divided evenly, or the part learns in one process only.
        """
        if self.part == "vq" and world > 1:
            raise InputError(
                f"There are {world} workers, but the image tokenizer learns in one process, since its "
                f"codebook is set by all that it has seen; take one."
            )
        parts = self.accumulate * world
        for task, count in self.rows.items():
            if count < 1 or count % parts:
                pieces = "1 piece" if self.accumulate == 1 else f"{self.accumulate} pieces"
                raise InputError(
                    f"The recipe has {count} rows of {task} a step, but needs a multiple of {parts}, so that "
                    f"{'1 worker' if world == 1 else f'{world} workers'} can take equally many in {pieces}."
                )
        return {task: count // parts for task, count in self.rows.items()}

    def learns(self, name: str) -> bool:
        """Whether a parameter of the language model learns.

        Args:
            name: Of the parameter. One that no task of the stage uses never learns.

        Returns:
            True if it does.
        """
        used = [prefix for task in self.rows for prefix in _PARTS.get(task, ())]
        if not name.startswith(("language_model.", "lm_head.", "vq.", *used)):
            return False
        if self.lora:
            return ".lora_" in name or (bool(self.learn) and name.startswith(self.learn))
        return (name.startswith(self.learn) if self.learn else True) and not name.startswith(self.frozen)

    def rate_at(self, step: int) -> float:
        """The learning rate of a step.

        Args:
            step: Counted from 0.

        Returns:
            The rate.
        """
        rate = self.rate * min(1.0, (step + 1) / self.warmup) if self.warmup else self.rate
        left = self.steps - step
        if left <= self.decay:
            rate *= 0.1 + 0.9 * left / (self.decay + 1)
        return rate


def _is(value: Any, kind: Any) -> bool:
    """Whether a value of a TOML file is of the type of a field."""
    inner = typing.get_args(kind)
    if inner and isinstance(value, dict):
        return typing.get_origin(kind) is dict and all(_is(item, inner[1]) for item in value.values())
    if inner:
        listed = typing.get_origin(kind) in (tuple, list) and isinstance(value, list | tuple)
        return listed and all(_is(item, inner[0]) for item in value)
    if kind in (int, float):
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return number and 0 <= value < math.inf
    return isinstance(value, kind)


def _in_words(kind: Any) -> str:
    inner = typing.get_args(kind)
    if inner:
        listed = typing.get_origin(kind) is not dict
        return f"a {'list' if listed else 'table'}, each item {_in_words(inner[0 if listed else 1])}"
    kinds = {int: "a whole number from 0", float: "a number from 0", str: "a text", bool: "true or false"}
    return kinds[kind]
