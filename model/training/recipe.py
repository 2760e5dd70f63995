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

_PARTS = {
    "generate": ("gen_",),
    "edit": ("edit_", "pixel_adapter.", "visual."),
    "understand": ("visual.",),
}
"""Task -> beginnings of the names of parameters that not all tasks use."""

LORA_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The matrices of a decoder layer."""

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """One stage of training, as a run file has it.

    part: what learns, `vq` or `lm`. folder: gets the state, metrics and the result, `checkpoint`. base:
    checkpoint folder, or `tiny`, whose configuration and tokenizer the result has; start: that of its first
    weights (default base); parts that it lacks are drawn anew. copied: part -> part whose weights it begins
    with instead. tasks: those of the result (default all of base).
    size: side in pixels of a square stage, 0 for the sizes of base. data: task -> file of its rows
    (part `vq`: of rows with pictures, under the name vq); rows: task -> rows a step; accumulate: pieces
    that a step's rows are taken in. learn: prefixes of the parameters that learn (part `vq`: within the
    image tokenizer), all by default; frozen: of those that do not, image tokenizer and vision tower by
    default. warmup: steps in which the rate rises from 0; decay: steps at the end in which it falls to a
    tenth. stream: whether Ray's workers read rows from Parquet as they need them, in an order that mixes
    row groups, instead of having all in Ray's object store. largest_loss: text-to-image loss, text and image
    added, above which a step is skipped, as one is whose losses are not finite; 0 for no such bound. drop:
    share of prompts that become empty.
    smoothing: label smoothing of the image tokens; null_smoothing: of those after such prompts. masked:
    bound on the share of source latents that are kept in an edit; 0 keeps all. muon: whether matrices learn
    by Muon, which takes fewer steps, instead of by AdamW, as all else does. templates: TASK_LANGUAGE ->
    texts around a prompt, drawn at random. lengths: task -> tokens of a row at most, longer ones are left
    out; least_side: of pictures to draw, those whose longer side is less, or more than twice the other,
    are left out; 0 keeps all. semantic_pixels: most pixels that the vision tower sees, 0 for those of
    base. lora: rank of updates that learn in place of the decoder's matrices `lora_targets`, 0 for none; then
    nothing else learns but what `learn` names; lora_scale: factor of an update. checkpointing: whether
    layers keep their inputs alone for the backward pass and compute the rest again, which takes a third more
    time and much less memory. precision: `float32`, `bfloat16` for products, or `auto`, which is bfloat16 on
    GPUs. threads: of torch, 0 for its own choice; workers: processes that make batches ahead, for a device
    that would wait for them.
    log_every, save_every, sample_every, validate_every: in steps, 0 for never. held_out: task -> file of rows
    that are not learned; every `validate_every` steps the losses of `validate_steps` steps of them are logged
    as held_out_TASK_HEAD, where no prompt is dropped.
    Part `vq` alone: alike: weight of `unlike`, without which tokens tell of what is around a patch too, and
    one plain background has many of them; plain: steps without quantisation, before the codebook is set;
    revive: steps after which entries that nobody used get a new place.
    """

    part: str
    folder: str
    base: str
    data: dict[str, str]
    steps: int
    rows: dict[str, int]
    rate: float
    start: str = ""
    copied: dict[str, str] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    seed: int = 0
    size: int = 0
    warmup: int = 0
    decay: int = 0
    largest_loss: float = 15.0
    accumulate: int = 1
    drop: float = 0.1
    smoothing: float = 0.0
    null_smoothing: float = 0.0
    masked: float = 0.4
    muon: bool = False
    learn: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ("vq.", "visual.")
    lora: int = 0
    lora_scale: float = 2.0
    lora_targets: tuple[str, ...] = LORA_TARGETS
    checkpointing: bool = False
    precision: str = "auto"
    stream: bool = False
    threads: int = 0
    workers: int = 0
    log_every: int = 20
    save_every: int = 200
    sample_every: int = 0
    held_out: dict[str, str] = field(default_factory=dict)
    validate_every: int = 0
    validate_steps: int = 4
    alike: float = 0.0
    plain: int = 0
    revive: int = 0
    templates: dict[str, list[str]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    least_side: int = 0
    semantic_pixels: int = 0

    @classmethod
    def from_file(cls, path: str | Path, stage: str) -> "Recipe":
        """The recipe of one stage, which is a table of a TOML file; what stands above all tables is of each.

        Raises InputError for a file that cannot be read, lacks the stage or holds an unknown key.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"There is no file of recipes {path}.") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"{path} is no file of recipes ({error}).") from None
        tables = {name: value for name, value in values.items() if isinstance(value, dict)}
        stages = {name: table for name, table in tables.items() if name not in cls.__dataclass_fields__}
        if stage not in stages:
            near = did_you_mean(stage, stages) or f"; it has {', '.join(stages) or 'none'}."
            raise InputError(f"{path} has no stage '{stage}'{near}")
        common = {name: value for name, value in values.items() if name not in stages}
        return cls.from_dict(common | stages[stage])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Raises InputError for an unknown, missing or impossible value."""
        known = {entry.name: entry for entry in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise InputError(f"The recipe has an unknown key '{name}'{did_you_mean(name, known) or '.'}")
        for name, entry in known.items():
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
        if recipe.part not in ("vq", "lm"):
            raise InputError(f"The recipe's part is '{recipe.part}', but must be vq or lm.")
        for target in recipe.lora_targets:
            if target not in LORA_TARGETS:
                near = did_you_mean(target, LORA_TARGETS) or f"; they are {', '.join(LORA_TARGETS)}."
                raise InputError(f"The recipe's lora_targets has '{target}', which no layer has{near}")
        if recipe.lora and recipe.part == "vq":
            raise InputError("The recipe has lora, but the image tokenizer has no such layers; leave it out.")
        if recipe.size % VQ_FACTOR:
            raise InputError(
                f"The recipe's size is {recipe.size}, but must be a multiple of {VQ_FACTOR}, the side of an "
                f"image token in pixels."
            )
        if recipe.stream and recipe.part == "vq":
            raise InputError("The recipe streams rows, but the image tokenizer needs them all; leave it out.")
        if recipe.precision not in PRECISIONS:
            raise InputError(
                f"The recipe's precision is '{recipe.precision}', but must be one of {', '.join(PRECISIONS)}."
            )
        for name in ("drop", "masked", "smoothing", "null_smoothing"):
            if getattr(recipe, name) > 1:
                raise InputError(f"The recipe's {name} is {getattr(recipe, name)}, but a share is at most 1.")
        if bool(recipe.held_out) != bool(recipe.validate_every):
            raise InputError(
                f"The recipe has held_out = {recipe.held_out} and validate_every = {recipe.validate_every}; "
                f"losses of held-out rows need both, so give both or neither."
            )
        for task in recipe.held_out:
            if task not in recipe.rows or recipe.part == "vq":
                raise InputError(
                    f"The recipe's held_out names '{task}', but must name tasks that the stage trains: "
                    f"{', '.join(recipe.rows) if recipe.part == 'lm' else 'none of part vq'}."
                )
        for name in ("steps", "accumulate", "log_every", "save_every", "validate_steps"):
            if getattr(recipe, name) < 1:
                raise InputError(f"The recipe's {name} is {getattr(recipe, name)}, but must be at least 1.")
        if set(recipe.rows) != set(recipe.data):
            raise InputError(
                f"The recipe has rows for {', '.join(recipe.rows) or 'nothing'} and data for "
                f"{', '.join(recipe.data) or 'nothing'}; both must name the same tasks."
            )
        recipe.share(1)
        return recipe

    def share(self, world: int) -> dict[str, int]:
        """Task -> rows of a step that each of `world` processes has in each piece.

        Raises InputError if the rows of a step cannot be divided so, or the part learns in one process only.
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
        """Whether a parameter of the language model learns, by its name: one that no task of the stage uses,
        whatever the recipe says, does not."""
        used = [prefix for task in self.rows for prefix in _PARTS.get(task, ())]
        if not name.startswith(("language_model.", "lm_head.", "vq.", *used)):
            return False
        if self.lora:
            return ".lora_" in name or (bool(self.learn) and name.startswith(self.learn))
        return (name.startswith(self.learn) if self.learn else True) and not name.startswith(self.frozen)

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
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
        return f"a {'list' if listed else 'table'}, each of it {_in_words(inner[0 if listed else 1])}"
    kinds = {int: "a whole number from 0", float: "a number from 0", str: "a text", bool: "true or false"}
    return kinds[kind]
