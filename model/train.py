"""Training: the losses of the image tokenizer and of the four stages, and one loop for all of them.

Rows, losses and what is frozen follow the published recipe (arXiv 2603.04980);
`python -m wallaroo.model.train RECIPES.toml STAGE [WORKERS]` runs one stage. The rows of a step, and what
is drawn for each, depend on the seed and the step alone, however many processes share them, so a run that
was killed goes on to the same losses. Knows nothing of Ray or Parquet: rows are dicts.
"""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import signal
import sys
import tempfile
import time
import tomllib
import typing
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from wallaroo.model.attention import causal_attention
from wallaroo.model.checkpoint import (
    TOKENIZER,
    disk_tensors,
    empty_model,
    expected_shapes,
    load,
    load_config,
    load_tokenizer,
    save,
)
from wallaroo.model.config import VQ_FACTOR, ModelConfig, Size, VisionConfig
from wallaroo.model.decoder import rope, rope_frequencies
from wallaroo.model.engine import END_OF_LINE, Engine, EngineOptions, Request
from wallaroo.model.errors import InputError, did_you_mean
from wallaroo.model.images import (
    FACTOR,
    FRAMES,
    MEAN,
    PATCH,
    STD,
    patchify,
    pixel_image,
    semantic_image,
    smart_resize,
)
from wallaroo.model.muon import Muon, takes
from wallaroo.model.prompts import TEMPLATES, Prompt, edit_prompt, generate_prompt, understand_prompt
from wallaroo.model.sampling import Sampling
from wallaroo.model.tokenizer import Control, Tokenizer
from wallaroo.model.vision import take_many, tower_plan
from wallaroo.model.vq import VQModel, to_float, to_uint8
from wallaroo.model.wallaroo import Wallaroo

NO_LATENT = -1.0
"""What stands in each number of a source latent that is masked in training."""

STATE = "state.pt"
METRICS = "metrics.jsonl"
RESULT = "checkpoint"


@dataclass(frozen=True)
class Recipe:
    """One stage of training, as a run file has it.

    part: what learns, `vq` or `lm`. folder: gets the state, metrics and the result, `checkpoint`. base:
    checkpoint folder whose configuration and tokenizer the result has; start: that of its first weights
    (default base); parts that it lacks are drawn anew. copied: part -> part whose weights it begins with
    instead. tasks: those of the result (default all of base).
    size: side in pixels of a square stage, 0 for the sizes of base. data: task -> file of its rows
    (part `vq`: of rows with pictures, under the name vq); rows: task -> rows a step; accumulate: pieces
    that a step's rows are taken in. learn: prefixes of the parameters that learn (part `vq`: within the
    image tokenizer), all by default; frozen: of those that do not, image tokenizer and vision tower by
    default. warmup: steps in which the rate rises from 0; decay: steps at the end in which it falls to a
    tenth. largest_loss: text-to-image loss, text and image added, above which a step is skipped, as one is
    whose losses are not finite; 0 for no such bound. drop: share of prompts that become empty.
    smoothing: label smoothing of the image tokens; null_smoothing: of those after such prompts. masked:
    bound on the share of source latents that are kept in an edit; 0 keeps all. muon: whether matrices learn
    by Muon, which takes fewer steps, instead of by AdamW, as all else does. templates: TASK_LANGUAGE ->
    texts around a prompt, drawn at random. lengths: task -> tokens of a row at most, longer ones are left
    out; least_side: of pictures to draw, those whose longer side is less, or more than twice the other,
    are left out; 0 keeps all. semantic_pixels: most pixels that the vision tower sees, 0 for those of
    base. threads: of torch, 0 for its own choice; workers: processes that make batches ahead, for a device
    that would wait for them.
    log_every, save_every, sample_every: in steps.
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
    threads: int = 0
    workers: int = 0
    log_every: int = 20
    save_every: int = 200
    sample_every: int = 0
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
        recipe = cls(**made)
        if recipe.part not in ("vq", "lm"):
            raise InputError(f"The recipe's part is '{recipe.part}', but must be vq or lm.")
        for name in ("drop", "masked", "smoothing", "null_smoothing"):
            if getattr(recipe, name) > 1:
                raise InputError(f"The recipe's {name} is {getattr(recipe, name)}, but a share is at most 1.")
        for name in ("steps", "accumulate", "log_every", "save_every"):
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


Row = Mapping[str, Any]
"""prompt and language, and by task: picture (generate), image and picture (edit), image and answer
(understand); pictures are encoded files. With prompt_zh, as the names of classes have it, a coin decides."""


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a JSONL file, pictures in base64. Raises InputError if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} holds no rows to train on ({error}).") from None
    if not rows:
        raise InputError(f"{path} holds no rows to train on: it is empty.")
    for row in rows:
        for name in ("image", "picture"):
            if name in row:
                row[name] = base64.b64decode(row[name])
    return rows


# -- the image tokenizer --------------------------------------------------------------------------------


class VQLosses(nn.Module):
    """Reconstruction and quantisation losses of pictures of several sizes, each `(B, 3, H, W)` from -1 to 1.

    Straight-through estimator and commitment of weight 0.25 (van den Oord et al. 2017) on normalised
    vectors; reconstruction is the sum of mean absolute and mean squared error. alike: weight of `unlike`.
    """

    def __init__(self, vq: VQModel, alike: float = 0.0):
        super().__init__()
        self.vq, self.alike = vq, alike
        self.last = torch.zeros(0, vq.quantize.embedding.embedding_dim)
        self.last_keys = torch.zeros(0, dtype=torch.int64)

    def forward(self, batch: Sequence[Tensor], quantised: bool = True) -> dict[str, Tensor]:
        """Losses to be added, of pictures of several sizes; `last` are then their latents `(n, 8)`, and
        `last_keys` the `patch_keys` of these."""
        device = self.vq.quant_conv.weight.device
        given = [pixels.to(device, non_blocking=True) for pixels in batch]
        latents = [self.vq.encode(pixels) for pixels in given]
        losses: dict[str, Tensor] = {}
        for pixels, points in zip(given, latents, strict=True):
            for name, loss in self._of_size(pixels, points, quantised).items():
                losses[name] = losses.get(name, 0.0) + loss / len(batch)
        flat = torch.cat([points.movedim(1, -1).flatten(0, 2) for points in latents])
        self.last, self.last_keys = flat.detach(), torch.cat([patch_keys(pixels) for pixels in given])
        if self.alike:
            means, kinds = kind_means(self.last, self.last_keys)
            losses["alike"] = self.alike * unlike(flat, means, kinds)
            if quantised:
                # A kind has the entry that is nearest to its mean.
                codebook = self.vq.codebook()
                told = unlike(flat, codebook, (means @ codebook.T).argmax(-1)[kinds])
                losses["alike"] = losses["alike"] + self.alike * told
        return losses

    def _of_size(self, pixels: Tensor, latents: Tensor, quantised: bool) -> dict[str, Tensor]:
        losses = {}
        fed = latents
        if quantised:
            with torch.no_grad():
                tokens = self.vq.quantise(latents)
            entries = F.embedding(tokens, self.vq.codebook()).movedim(-1, 1)
            losses["codebook"] = F.mse_loss(entries, latents.detach())
            losses["commitment"] = 0.25 * F.mse_loss(latents, entries.detach())
            fed = latents + (entries - latents).detach()
        made = self.vq.decoder(self.vq.post_quant_conv(fed.contiguous()))
        losses["absolute"], losses["squared"] = F.l1_loss(made, pixels), F.mse_loss(made, pixels)
        return losses


def patch_keys(pixels: Tensor) -> Tensor:
    """A number for each patch of pictures `(B, 3, H, W)`, int64 `(B * h * w,)`, the same for equal ones."""
    side = VQ_FACTOR
    levels = ((pixels + 1) * 127.5).round().long()
    patches = levels.unfold(2, side, side).unfold(3, side, side).movedim(1, 3).flatten(0, 2).flatten(1)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1 << 62, (patches.shape[1],), generator=generator).to(pixels.device)
    return (patches * factors).sum(1)  # whole numbers that wrap around: no two kinds of patches meet


def kind_means(latents: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Of latents `(n, 8)` with keys `(n,)` the mean of each kind of patch, unit vectors `(kinds, 8)`, and the
    kind of each, `(n,)`."""
    kinds, place = keys.unique(return_inverse=True)
    sums = latents.new_zeros(len(kinds), latents.shape[1]).index_add_(0, place, latents)
    return F.normalize(sums, dim=-1), place


ALIKE_TEMPERATURE = 0.05


def unlike(latents: Tensor, centres: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of telling to which of the centres `(m, 8)` each of the latents `(n, 8)` belongs,
    `wanted` `(n,)`, from how near they are (prototypes, Snell et al. 2017).

    With one centre for each kind of patch equal patches are drawn together, and others apart.
    """
    return F.cross_entropy(latents @ centres.T / ALIKE_TEMPERATURE, wanted)


def spread_codebook(latents: Tensor, entries: int, generator: torch.Generator, rounds: int = 10) -> Tensor:
    """Unit vectors `(entries, 8)` that cover unit vectors `(n, 8)`: k-means on the sphere.

    It starts from vectors far from each other (Arthur and Vassilvitskii 2007); entries that lose their
    members keep their place.
    """
    first = int(torch.randint(len(latents), (1,), generator=generator))
    chosen = [latents[first]]
    distance = (latents - chosen[0]).square().sum(-1)
    for _ in range(entries - 1):
        draw = torch.multinomial(distance.clamp_min(1e-9), 1, generator=generator)
        chosen.append(latents[int(draw)])
        distance = torch.minimum(distance, (latents - chosen[-1]).square().sum(-1))
    centres = torch.stack(chosen)
    for _ in range(rounds):
        nearest = (latents @ centres.T).argmax(-1)
        total = torch.zeros_like(centres).index_add_(0, nearest, latents)
        used = torch.bincount(nearest, minlength=entries) > 0
        centres[used] = F.normalize(total[used], dim=-1)
    return centres


# -- the loop ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """One of the processes that share a training; by default the only one.

    rank: which of `world`. device: where it computes. wrap: makes of a module one whose gradients are the
    mean over all processes; total: the sum over all of a tensor `(n,)`.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    total: Callable[[Tensor], Tensor] = lambda values: values


def process_of_group(recipe: Recipe, device: str) -> Process:
    """This process as one of the process group of torch.distributed that it has joined."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    # A part that no task of the stage uses has no gradient to wait for.
    unused = set(recipe.tasks or load_config(recipe.base).tasks) != set(recipe.rows)

    def wrap(module: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=unused)

    def total(values: Tensor) -> Tensor:
        summed = values.to(device)
        torch.distributed.all_reduce(summed)
        return summed.cpu()

    return Process(torch.distributed.get_rank(), torch.distributed.get_world_size(), device, wrap, total)


class Job(Protocol):
    """What a stage gives the loop."""

    @property
    def module(self) -> nn.Module:
        """Its forward takes a batch and returns losses by name, each a mean, to be added."""

    def batch(self, step: int, piece: int) -> tuple[Any, ...]:
        """Arguments of the module's forward, the same for the same step and piece."""

    def counts(self, *batch: Any) -> dict[str, int]:
        """Of how many places each loss of a batch is the mean, and how many `tokens` the batch has."""

    def after_step(self, step: int) -> dict[str, float]:
        """Called when the parameters have moved; numbers for the log."""

    def extra_state(self) -> dict[str, Any]:
        """What a resumed run needs beside parameters and optimizer."""

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes back what `extra_state` gave."""


def optimise(
    job: Job,
    recipe: Recipe,
    report: Callable[[int, dict[str, float]], None],
    process: Process | None = None,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains from the last saved step of `recipe.folder`, if any, to `recipe.steps`.

    AdamW 0.9/0.95 without weight decay, or Muon for matrices; gradient norm 1.0. Each loss is a mean over
    all that it is taken of in a step, in whatever pieces and processes. report: gets step and metrics every
    `log_every` steps; after: called after each step. The process of rank 0 saves the state.
    Raises InputError if the processes find different states.
    """
    process = process or Process()
    module = process.wrap(job.module)
    named = [(name, one) for name, one in job.module.named_parameters() if one.requires_grad]
    learning = [parameter for _, parameter in named]
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named:
        parts[recipe.muon and takes(name, parameter)].append(parameter)
    matrices, others = parts[True], parts[False]
    optimizers: list[torch.optim.Optimizer] = []
    if others:
        optimizers.append(
            torch.optim.AdamW(others, lr=recipe.rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        )
    if matrices:
        optimizers.append(Muon(matrices, lr=recipe.rate))
    half = recipe.part == "lm" and learning[0].is_cuda
    file = Path(recipe.folder) / STATE
    step = 0
    if file.is_file():
        state = torch.load(file, map_location="cpu", weights_only=True)
        job.module.load_state_dict(state["module"])
        for optimizer, its in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its)
        job.load_extra_state(state["extra"])
        step = state["step"]
    if process.total(torch.tensor([step])).tolist() != [process.world * step]:
        raise InputError(
            f"The processes do not find the same {file}: give a folder on a disk that all of them share."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    since, tokens, skipped = time.monotonic(), 0.0, 0
    ahead = batches(job, recipe, step)
    while step < recipe.steps:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate_at(step)
            optimizer.zero_grad(set_to_none=True)
        # All pieces are made first: what a loss is divided by is known when all have been counted.
        pieces = list(itertools.islice(ahead, recipe.accumulate))
        counted = [job.counts(*piece) for piece in pieces]
        whole = _total(process, {name: sum(one[name] for one in counted) for name in counted[0]})
        sums = dict.fromkeys([name for name in whole if name != "tokens"], 0.0)
        for index, (piece, own) in enumerate(zip(pieces, counted, strict=True)):
            last = index == recipe.accumulate - 1
            wait = contextlib.nullcontext if last else getattr(module, "no_sync", contextlib.nullcontext)
            # Weights stay in float32; where the device has bfloat16, products are made in it.
            with wait(), torch.autocast("cuda", torch.bfloat16, enabled=half):
                losses = module(*piece)
                shares = {name: losses[name] * (own[name] / whole[name]) for name in sums}
                # The gradients' mean over the processes is to be that of the shares' sum.
                (torch.stack(list(shares.values())).sum() * process.world).backward()
            for name, share in shares.items():
                sums[name] += float(share.detach())
        # All processes see the same sums and gradients, and so agree on what follows.
        sums = _total(process, sums)
        tokens += whole["tokens"]
        drawn = sum(value for name, value in sums.items() if name.startswith("generate_"))
        sound = all(map(math.isfinite, sums.values())) and drawn <= (recipe.largest_loss or math.inf)
        norm = float(nn.utils.clip_grad_norm_(learning, 1.0))
        if sound and math.isfinite(norm):
            for optimizer in optimizers:
                optimizer.step()
        else:
            skipped += 1
        step += 1
        more = job.after_step(step)
        if step % recipe.log_every == 0 or step == recipe.steps:
            seconds = time.monotonic() - since
            numbers = {
                **sums,
                "loss": sum(sums.values()),
                "gradient_norm": norm,
                "rate": recipe.rate_at(step - 1),
            }
            numbers |= {"tokens_per_second": tokens / seconds, "skipped_steps": float(skipped), **more}
            report(step, numbers)
            since, tokens = time.monotonic(), 0.0
        if process.rank == 0 and (step % recipe.save_every == 0 or step == recipe.steps):
            state = {"module": job.module.state_dict(), "step": step, "extra": job.extra_state()}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            partial = file.with_suffix(".partial")
            torch.save(state, partial)
            partial.rename(file)
        after(step)


def _total(process: Process, values: Mapping[str, float]) -> dict[str, float]:
    """Each number's sum over all processes, which have the same names."""
    whole = process.total(torch.tensor(list(values.values()), dtype=torch.float64))
    return dict(zip(values, whole.tolist(), strict=True))


@dataclass(frozen=True)
class _Pieces(torch.utils.data.Dataset[tuple[Any, ...]]):
    """All batches of a stage, in order."""

    job: Job
    accumulate: int

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.job.batch(*divmod(index, self.accumulate))


def batches(job: Job, recipe: Recipe, step: int) -> Iterator[tuple[Any, ...]]:
    """The batches from a step on, made ahead by `recipe.workers` processes or, without any, when asked."""
    places = range(step * recipe.accumulate, recipe.steps * recipe.accumulate)
    return iter(
        torch.utils.data.DataLoader(
            _Pieces(job, recipe.accumulate),
            batch_size=None,
            sampler=places,
            num_workers=recipe.workers,
            collate_fn=_as_it_is,
        )
    )


def _as_it_is(batch: Any) -> Any:
    return batch


Source = Callable[[str, int, int], Sequence[Row]]
"""(task, first, size) -> rows of a task from place `first` on, always the same; places have no end."""


def from_memory(data: Mapping[str, Sequence[Row]], seed: int) -> Source:
    """Rows that can be had by their index, in an order of their own each epoch."""

    def rows(task: str, first: int, size: int) -> Sequence[Row]:
        place = sorted(data).index(task)
        return [data[task][index] for index in shuffled(len(data[task]), first, size, seed + place)]

    return rows


def shuffled(count: int, first: int, size: int, seed: int) -> np.ndarray:
    """Indices `(size,)` among `count` rows of the places from `first` on: each epoch takes every row once, in
    an order of its own."""
    places = range(first, first + size)
    return np.array([_order(count, seed, place // count)[place % count] for place in places])


@functools.lru_cache(maxsize=16)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


class VQJob:
    """Trains the image tokenizer of a model on pictures, two sizes a batch.

    The first `plain` steps train encoder and decoder alone; then the codebook is spread over the latents
    of the last steps. Every `revive` steps the entries that none of the last latents took are put where
    patches that differ share an entry. Equal patches count once in both, or a plain background would take
    most of the entries. pictures: uint8 `(H, W, 3)`.
    """

    KEPT = 40000
    """Latents that are remembered."""

    def __init__(self, vq: VQModel, pictures: Sequence[np.ndarray], recipe: Recipe):
        # Convolutions of few channels are quicker so, on CPUs too.
        vq.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module = VQLosses(vq, recipe.alike)
        for name, parameter in vq.named_parameters():
            parameter.requires_grad_(name.startswith(recipe.learn) if recipe.learn else True)
        self.recipe = recipe
        self.by_size: dict[tuple[int, ...], list[np.ndarray]] = {}
        for picture in pictures:
            self.by_size.setdefault(picture.shape[:2], []).append(picture)
        self.latents, self.keys = self.module.last, self.module.last_keys

    def batch(self, step: int, piece: int) -> tuple[Any, ...]:
        sizes = sorted(self.by_size)
        # Two sizes a step, and in the end all pairs, so that equal patches meet across sizes too.
        share, times = self.recipe.share(1)["vq"], step // len(sizes)
        pair = (step % len(sizes), (step + 1 + times) % len(sizes))
        made = []
        for number, count in enumerate((share - share // 2, share // 2)):
            pictures = self.by_size[sizes[pair[number]]]
            first = (times * self.recipe.accumulate + piece) * count
            chosen = shuffled(len(pictures), first, count, self.recipe.seed + number)
            if count:
                made.append(to_float(torch.from_numpy(np.stack([pictures[index] for index in chosen]))))
        return made, step >= self.recipe.plain

    def counts(self, batch: Sequence[Tensor], quantised: bool) -> dict[str, int]:
        names = ["absolute", "squared"]
        if quantised:
            names += ["codebook", "commitment"]
        if self.recipe.alike:
            names.append("alike")
        tokens = sum(pixels[:, 0].numel() for pixels in batch) // VQ_FACTOR**2
        return dict.fromkeys((*names, "tokens"), tokens)

    def after_step(self, step: int) -> dict[str, float]:
        vq, recipe = self.module.vq, self.recipe
        self.latents = torch.cat((self.latents, self.module.last.cpu()))[-self.KEPT :]
        self.keys = torch.cat((self.keys, self.module.last_keys.cpu()))[-self.KEPT :]
        revive = bool(recipe.revive) and step % recipe.revive == 0
        if step % recipe.log_every and step != recipe.plain and not revive:
            return {}
        generator = torch.Generator().manual_seed(recipe.seed * 1000003 + step)
        with torch.no_grad():
            codebook = vq.quantize.embedding.weight
            means, place = kind_means(self.latents, self.keys)
            if step == recipe.plain:
                codebook.copy_(spread_codebook(means, len(codebook), generator))
            entries = vq.codebook().cpu()
            nearest, own = (means @ entries.T).max(-1)
            tokens = (self.latents @ entries.T).argmax(-1)
            used = torch.bincount(tokens, minlength=len(entries)) > 0
            if revive and recipe.plain < step < 0.8 * recipe.steps:
                closest = torch.full((len(entries),), -1.0).scatter_reduce(0, own, nearest, "amax")
                away = (1 - nearest).clamp_min(1e-6) * (nearest < closest[own])
                count = min(int((~used).sum()), int((away > 0).sum()))
                if count:
                    free = (~used).nonzero().flatten()[:count].to(codebook.device)
                    taken = torch.multinomial(away, count, generator=generator)
                    codebook[free] = means[taken].to(codebook.device)
        return {
            "codebook_used": float(used.float().mean()),
            "same_token": float((tokens == own[place]).float().mean()),
        }

    def extra_state(self) -> dict[str, Any]:
        return {"latents": self.latents, "keys": self.keys}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.latents, self.keys = state["latents"], state["keys"]


# -- rows of the language model -------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingRow:
    """A row ready for a batch, `L` places long.

    ids: text tokens; image: image tokens, -1 where there is none; positions: `(3, L)`; target: places
    whose token is to be predicted, by the image head where `image` is set, else by the text head.
    semantic: first and last place, exclusive, of the vision tower's embeddings; pixel: places of the
    source's latents, `(n,)`, and latents those, `(n, 8)`; patches and grid: of the source. null: whether the
    prompt was dropped.
    """

    ids: np.ndarray
    image: np.ndarray
    positions: np.ndarray
    target: np.ndarray
    semantic: tuple[int, int] | None = None
    patches: np.ndarray | None = None
    grid: tuple[int, int] | None = None
    pixel: np.ndarray | None = None
    latents: np.ndarray | None = None
    null: bool = False


def response_row(prompt: Prompt, first: int, ids: np.ndarray, image: np.ndarray) -> TrainingRow:
    """A prompt and its response; what is to be predicted begins at place `first`.

    ids, image: of the response, `(n,)`, as in TrainingRow.
    """
    start, length = len(prompt.ids), len(prompt.ids) + len(ids)
    after = prompt.next_position + np.arange(len(ids))
    return TrainingRow(
        np.concatenate((prompt.ids, ids)),
        np.concatenate((np.full(start, -1), image)),
        np.concatenate((prompt.positions, np.tile(after, (3, 1))), axis=1),
        np.arange(length) >= first,
        prompt.semantic,
        pixel=prompt.pixel,
    )


class Rows:
    """Makes training rows from rows of data, with the image tokenizer of a model.

    What a picture becomes is kept for the next time, up to KEPT_BYTES in all; `prepare` makes it for many
    pictures at once, after which `make` needs neither model nor device.
    """

    KEPT_BYTES = 4 << 30

    SLICE = 64
    """Pictures that go through the image tokenizer together."""

    def __init__(self, model: Wallaroo, tokenizer: Tokenizer, recipe: Recipe):
        assert model.vq is not None
        self.vq, self.config, self.tokenizer, self.recipe = model.vq, model.config, tokenizer, recipe
        self.codes: dict[tuple[bytes, Size], tuple[np.ndarray, np.ndarray]] = {}
        self.seen: dict[tuple[bytes, tuple[int, int]], np.ndarray] = {}
        self.prompts: dict[tuple[Any, ...], Prompt] = {}
        self.kept = 0
        ids = self.config.token_ids
        self.line_end = ids[END_OF_LINE]
        self.end = tokenizer.encode([Control("<|generate_end|>"), Control("<|im_end|>"), "\n"])

    def prepare(self, data: Mapping[str, Sequence[Row]]) -> None:
        """Encodes all pictures of rows by task, SLICE of a size at a time, as far as there is room."""
        wanted: dict[Size, dict[bytes, None]] = {}
        for task, rows in data.items():
            for row in rows if task != "understand" else ():
                for name in ("picture", "image") if task == "edit" else ("picture",):
                    wanted.setdefault(self._size(row[name]), {})[row[name]] = None
        for size, files in wanted.items():
            # Sources of dropped prompts are black.
            waiting = [b"", *files] if "edit" in data else list(files)
            for first in range(0, len(waiting), self.SLICE):
                self._encode(waiting[first : first + self.SLICE], size)

    def make(self, task: str, row: Row, generator: np.random.Generator) -> TrainingRow:
        """A training row; `generator` decides what is dropped and masked, and the template."""
        if task == "understand":
            return self._answer(row)
        prompt = "" if generator.random() < self.recipe.drop else str(row["prompt"])
        language = str(row["language"])
        if row.get("prompt_zh"):
            chinese = generator.random() < 0.5
            language = "zh" if chinese else "en"
            prompt = prompt and str(row["prompt_zh" if chinese else "prompt"])
        templates = _templates(self.recipe, task, language)
        template = templates[int(generator.integers(len(templates)))]
        if task == "generate":
            size = self._size(row["picture"])
            made = self._prompt(generate_prompt, prompt, size, language, template)
            return dataclasses.replace(self._picture_row(made, row["picture"], size), null=not prompt)
        size = self._size(row["image"])
        patches, grid = patchify(self._semantic(row["image"], self.config.edit_pixels))
        if not prompt:
            patches = np.broadcast_to(BLACK_PATCH, patches.shape)
        merged = (grid[0] // 2, grid[1] // 2)
        made = self._prompt(edit_prompt, prompt, size, merged, language, template)
        latents = self._codes(row["image"] if prompt else b"", size)[1].copy()
        if self.recipe.masked:
            kept = int(generator.integers(max(1, int(self.recipe.masked * len(latents)))))
            latents[generator.permutation(len(latents))[kept:]] = NO_LATENT
        row_ = self._picture_row(made, row["picture"], size)
        return dataclasses.replace(row_, patches=patches, grid=grid, latents=latents, null=not prompt)

    def _picture_row(self, prompt: Prompt, picture: bytes, size: Size) -> TrainingRow:
        tokens = self._codes(picture, size)[0]
        if self.config.line_break:
            ends = np.full((len(tokens), 1), -1, tokens.dtype)
            tokens = np.concatenate((tokens, ends), axis=1).reshape(-1)[:-1]
        image = np.concatenate((tokens.reshape(-1), np.full(len(self.end), -1)))
        ids = np.where(image < 0, self.line_end, 0)
        ids[-len(self.end) :] = self.end
        # The prompt ends with the token that opens the picture, which the text head learns too.
        return response_row(prompt, len(prompt.ids) - 1, ids, image)

    def _answer(self, row: Row) -> TrainingRow:
        patches, grid = patchify(self._semantic(row["image"], self.config.understand_pixels))
        prompt = self._prompt(understand_prompt, str(row["prompt"]), (grid[0] // 2, grid[1] // 2))
        ids = np.array(self.tokenizer.encode([str(row["answer"]), Control("<|im_end|>"), "\n"]))
        made = response_row(prompt, len(prompt.ids), ids, np.full(len(ids), -1))
        return dataclasses.replace(made, patches=patches, grid=grid)

    def _prompt(self, make: Callable[..., Prompt], *arguments: Any) -> Prompt:
        key = (make.__name__, *arguments)
        if key not in self.prompts:
            made = make(self.tokenizer, self.config, *arguments)
            return self._keep(self.prompts, key, made, made.ids.nbytes + made.positions.nbytes)
        return self.prompts[key]

    def _size(self, picture: bytes) -> Size:
        return self.config.bucket(*_sides(picture))

    def _semantic(self, picture: bytes, bounds: tuple[int, int]) -> np.ndarray:
        key = (picture, bounds)
        if key not in self.seen:
            made = semantic_image(_open(picture), *bounds)
            return self._keep(self.seen, key, made, made.nbytes)
        return self.seen[key]

    def _codes(self, picture: bytes, size: Size) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 `(h, w)` and latents float32 `(h * w, 8)` of a picture (black if empty) at a size."""
        found = self.codes.get((picture, size))
        return found if found is not None else self._encode([picture], size)[0]

    @torch.no_grad()
    def _encode(self, pictures: Sequence[bytes], size: Size) -> list[tuple[np.ndarray, np.ndarray]]:
        black = np.zeros((*size, 3), np.uint8)
        pixels = np.stack([pixel_image(_open(one), size) if one else black for one in pictures])
        device = self.vq.quant_conv.weight.device
        latents = self.vq.encode(to_float(torch.from_numpy(pixels).to(device)))
        tokens, points = self.vq.quantise(latents).cpu().numpy(), latents.flatten(2).mT.cpu().numpy()
        made = [(tokens[index].copy(), points[index].copy()) for index in range(len(pictures))]
        for one, codes in zip(pictures, made, strict=True):
            self._keep(self.codes, (one, size), codes, codes[0].nbytes + codes[1].nbytes)
        return made

    def _keep(self, cache: dict[Any, Any], key: Hashable, made: Any, size: int) -> Any:
        if self.kept + size <= self.KEPT_BYTES:
            cache[key] = made
            self.kept += size
        return made


def _templates(recipe: Recipe, task: str, language: str) -> list[str]:
    return recipe.templates.get(f"{task}_{language}") or [TEMPLATES[task, language]]


def fits(row: Row, task: str, tokenizer: Tokenizer, config: ModelConfig, recipe: Recipe) -> bool:
    """Whether a stage trains on a row: neither too long, whatever is drawn for it, nor of a picture to draw
    that is too small or too long."""
    if task not in recipe.lengths and not (task == "generate" and recipe.least_side):
        return True
    height, width = _sides(row["picture" if task == "generate" else "image"])
    longer, shorter = max(height, width), min(height, width)
    if task == "generate" and recipe.least_side and (longer < recipe.least_side or longer > 2 * shorter):
        return False
    if task not in recipe.lengths:
        return True
    bounds = config.understand_pixels if task == "understand" else config.edit_pixels
    rows, columns = (side // FACTOR for side in smart_resize(height, width, *bounds))
    if task == "understand":
        made = understand_prompt(tokenizer, config, str(row["prompt"]), (rows, columns))
        answer = tokenizer.encode([str(row["answer"]), Control("<|im_end|>"), "\n"])
        return len(made.ids) + len(answer) <= recipe.lengths[task]
    size = config.bucket(height, width)
    # Three tokens close a picture.
    drawn = size.grid[0] * (size.grid[1] + config.line_break) - config.line_break + 3
    prompts = [(str(row["prompt"]), str(row["language"]))]
    if row.get("prompt_zh"):
        prompts = [(str(row["prompt"]), "en"), (str(row["prompt_zh"]), "zh")]
    for prompt, language in prompts:
        for template in _templates(recipe, task, language):
            if task == "generate":
                made = generate_prompt(tokenizer, config, prompt, size, language, template)
            else:
                made = edit_prompt(tokenizer, config, prompt, size, (rows, columns), language, template)
            if len(made.ids) + drawn > recipe.lengths[task]:
                return False
    return True


BLACK_PATCH = (-MEAN / STD).repeat(FRAMES * PATCH * PATCH)
"""A patch of a black picture, `(1176,)`."""


def _open(data: bytes) -> Image.Image:
    with _decoding(data), Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def _sides(data: bytes) -> tuple[int, int]:
    """Height and width of an encoded picture."""
    with _decoding(data), Image.open(io.BytesIO(data)) as image:
        return image.height, image.width


@contextlib.contextmanager
def _decoding(data: bytes) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"A picture of {len(data):,} bytes among the rows to train on cannot be decoded "
            f"({type(error).__name__}), its sha256 is {hashlib.sha256(data).hexdigest()}; leave its row out."
        ) from None


@dataclass(frozen=True)
class Batch:
    """Rows of one task, padded right to `T` places.

    ids, image: int64 `(B, T)`; positions: int64 `(3, B, T)`; target: bool `(B, T)`; patches of all
    sources and their grids int64 `(B, 3)`; semantic, pixel: places of their embeddings in the flattened
    `B * T`, and filled those of all that are no pads, `(tokens,)`; latents: `(n, 8)`; null: bool `(B,)`;
    tower: what the vision tower works out from the grids.
    """

    ids: Tensor
    image: Tensor
    positions: Tensor
    target: Tensor
    null: Tensor
    filled: Tensor
    patches: Tensor | None = None
    grids: Tensor | None = None
    semantic: Tensor | None = None
    pixel: Tensor | None = None
    latents: Tensor | None = None
    tower: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[TrainingRow], config: VisionConfig) -> "Batch":
        longest = max(len(row.ids) for row in rows)
        shape = (len(rows), longest)
        ids, image, target = np.zeros(shape, np.int64), np.full(shape, -1, np.int64), np.zeros(shape, bool)
        positions = np.zeros((3, *shape), np.int64)
        semantic, pixel, filled = [], [], []
        for index, row in enumerate(rows):
            length = len(row.ids)
            filled.append(index * longest + np.arange(length))
            ids[index, :length], image[index, :length] = row.ids, row.image
            target[index, :length], positions[:, index, :length] = row.target, row.positions
            if row.semantic is not None:
                semantic.append(index * longest + np.arange(*row.semantic))
            if row.pixel is not None:
                pixel.append(index * longest + row.pixel.astype(np.int64))

        def put(arrays: Sequence[np.ndarray | None]) -> Tensor | None:
            found = [array for array in arrays if array is not None]
            return torch.from_numpy(np.concatenate(found)) if found else None

        grids = put([np.array([[1, *row.grid]]) for row in rows if row.grid is not None])
        return cls(
            ids=torch.from_numpy(ids),
            image=torch.from_numpy(image),
            positions=torch.from_numpy(positions),
            target=torch.from_numpy(target),
            null=torch.tensor([row.null for row in rows]),
            filled=torch.from_numpy(np.concatenate(filled)),
            patches=put([row.patches for row in rows]),
            grids=grids,
            semantic=put(semantic),
            pixel=put(pixel),
            latents=put([row.latents for row in rows]),
            tower=tower_plan(config, grids) if grids is not None else {},
        )

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        moved["tower"] = {name: value.to(device, non_blocking=True) for name, value in self.tower.items()}
        return dataclasses.replace(self, **moved)


class LMLosses(nn.Module):
    """Next-token losses of all tasks of a step; everything is computed by the parts of one Wallaroo.

    smoothing, null_smoothing: label smoothing (Szegedy et al. 2016, section 7) of image tokens after a
    prompt and after a dropped one. Guidance of scale s (Ho and Salimans 2022) draws by s log p(token |
    prompt) - (s - 1) log p(token). Where neither wants a token, both are large negative numbers whose size
    nothing has taught, and if the second happens to be the larger by half, at s = 3, that token wins over
    the right one; smoothing bounds it. What a prompt's own smoothing lets through, guidance takes away: of
    e and n, the shares spread evenly over all tokens, e^s / n^(s - 1) is left.
    """

    frequencies: Tensor

    def __init__(self, model: Wallaroo, smoothing: float = 0.0, null_smoothing: float = 0.0):
        super().__init__()
        self.model, self.smoothing, self.null_smoothing = model, smoothing, null_smoothing
        if model.visual is not None:
            take_many(model.visual)
        self.register_buffer(
            "frequencies", rope_frequencies(model.config.decoder, model.device), persistent=False
        )

    def forward(self, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        """Losses by task and head, each a mean."""
        losses: dict[str, Tensor] = {}
        for task, given in batches.items():
            batch = given.to(self.model.device)
            hidden = self.hidden(task, batch)[:, :-1]
            image, wanted = batch.image[:, 1:], batch.target[:, 1:]
            text = wanted & (image < 0)
            assert self.model.lm_head is not None
            logits = self.model.lm_head(hidden[text]).float()
            losses[f"{task}_text"] = F.cross_entropy(logits, batch.ids[:, 1:][text])
            if task != "understand":
                drawn = image >= 0
                _, head = self.model.image_parts(task)
                entropy = functools.partial(
                    F.cross_entropy, head(hidden[drawn]).float(), image[drawn], reduction="none"
                )
                each = entropy(label_smoothing=self.smoothing)
                if self.null_smoothing != self.smoothing:
                    null = batch.null.unsqueeze(1).expand_as(drawn)[drawn]
                    each = torch.where(null, entropy(label_smoothing=self.null_smoothing), each)
                losses[f"{task}_image"] = each.mean()
        return losses

    def hidden(self, task: str, batch: Batch) -> Tensor:
        """The decoder's output `(B, T, H)` after the final norm."""
        model = self.model
        decoder = model.language_model
        x = decoder.embed_tokens(batch.ids)
        rows, places = batch.ids.shape
        if task != "understand":
            drawn = batch.image >= 0
            adapter, _ = model.image_parts(task)
            assert model.vq is not None
            codebook = model.vq.codebook().to(x.dtype)
            x = x.masked_scatter(drawn.unsqueeze(-1), adapter(codebook[batch.image[drawn]]).to(x.dtype))
        flat = x.flatten(0, 1)
        if batch.semantic is not None:
            assert model.visual is not None and batch.patches is not None
            tower = model.visual
            seen = tower(batch.patches.to(x.dtype), grid_thw=batch.grids, **batch.tower).pooler_output
            seen = seen.to(x.dtype)
            flat = flat.index_copy(0, batch.semantic, seen)
        if batch.pixel is not None:
            assert model.pixel_adapter is not None and batch.latents is not None
            flat = flat.index_copy(0, batch.pixel, model.pixel_adapter(batch.latents.to(x.dtype)).to(x.dtype))
        positions = batch.positions.flatten(1)[:, batch.filled]
        cos, sin = rope(positions, self.frequencies, model.config.decoder.mrope_section, x.dtype)

        def padded(part: Tensor) -> Tensor:
            whole = part.new_zeros((rows * places, *part.shape[1:])).index_copy(0, batch.filled, part)
            return whole.unflatten(0, (rows, places))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # Pads stand at the right, where no token that counts can see them; nothing else computes any.
            return causal_attention(padded(q), padded(k), padded(v)).flatten(0, 1)[batch.filled]

        return padded(decoder(flat[batch.filled], cos, sin, attend))


class LMJob:
    """Trains decoder, heads and adapters (and what else the recipe does not freeze) on rows of data."""

    def __init__(
        self,
        model: Wallaroo,
        tokenizer: Tokenizer,
        source: Source,
        recipe: Recipe,
        process: Process | None = None,
    ):
        self.module = LMLosses(model, recipe.smoothing, recipe.null_smoothing)
        self.source, self.recipe, self.process = source, recipe, process or Process()
        self.share = recipe.share(self.process.world)
        self.rows = Rows(model, tokenizer, recipe)
        for name, parameter in model.named_parameters():
            learns = name.startswith(recipe.learn) if recipe.learn else True
            parameter.requires_grad_(learns and not name.startswith(recipe.frozen))

    def batch(self, step: int, piece: int) -> tuple[Any, ...]:
        part = piece * self.process.world + self.process.rank
        batches: dict[str, Batch] = {}
        for index, (task, size) in enumerate(sorted(self.share.items())):
            first = step * self.recipe.rows[task] + part * size
            made = [
                # What is drawn for a row depends on its place in the whole step, whoever has it.
                self.rows.make(task, row, np.random.default_rng((self.recipe.seed, index, place)))
                for place, row in enumerate(self.source(task, first, size), first)
            ]
            batches[task] = Batch.of(made, self.rows.config.vision)
        return (batches,)

    def counts(self, batches: Mapping[str, Batch]) -> dict[str, int]:
        found = {"tokens": sum(len(batch.filled) for batch in batches.values())}
        for task, batch in batches.items():
            drawn = batch.image[:, 1:] >= 0
            found[f"{task}_text"] = int((batch.target[:, 1:] & ~drawn).sum())
            if task != "understand":
                found[f"{task}_image"] = int(drawn.sum())
        return found

    def after_step(self, step: int) -> dict[str, float]:
        return {}

    def extra_state(self) -> dict[str, Any]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        return None


# -- where weights come from ----------------------------------------------------------------------------


def fresh_model(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> Wallaroo:
    """A model to train from nothing; each tensor's numbers depend on `seed` and its name alone."""
    model = empty_model(config, None, "cpu", dtype)
    with torch.no_grad():
        for name, tensor in disk_tensors(model).items():
            key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
            generator = torch.Generator().manual_seed(key)
            if name.endswith(".bias"):
                tensor.zero_()
            elif tensor.dim() == 1:
                tensor.fill_(1.0)
            else:
                scale = _gain(name) / math.sqrt(math.prod(tensor.shape[1:]))
                if name.endswith(("embed_tokens.weight", "quantize.embedding.weight")):
                    scale = 0.3
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return model


def _gain(name: str) -> float:
    """Size of a matrix's products in the units of what it is given, at the start of training."""
    if not name.startswith("vq."):
        return 0.5
    # Blocks begin close to the identity: with torch's own start the tokenizer stays at flat pictures.
    return 0.4 if name.endswith(("conv2.weight", "proj_out.weight")) else math.sqrt(2)


def stage_config(base: ModelConfig, recipe: Recipe) -> ModelConfig:
    """The configuration of what a stage makes: of layout `train`; square stages have neither line ends nor
    indicators."""
    changes: dict[str, Any] = {"layout": "train", "trained_tokens": base.trained_tokens | recipe.lengths}
    if recipe.tasks:
        changes["tasks"] = recipe.tasks
    if recipe.semantic_pixels:
        for name in ("edit_pixels", "understand_pixels"):
            changes[name] = (getattr(base, name)[0], recipe.semantic_pixels)
    if recipe.size:
        changes |= {"sizes": {"1.0": (recipe.size, recipe.size)}, "line_break": False}
    return dataclasses.replace(base, **changes)


def start_model(recipe: Recipe) -> Wallaroo:
    """The model with which a stage begins; parts that its start lacks are drawn by seed.

    Raises InputError as `check_start` does.
    """
    config = check_start(recipe)
    model = fresh_model(config, recipe.seed)
    mine, theirs = disk_tensors(model), disk_tensors(load(recipe.start or recipe.base))
    with torch.no_grad():
        for name, tensor in theirs.items():
            if name in mine:
                mine[name].copy_(tensor)
        for part, other in recipe.copied.items():
            for name in _of_part(mine, part):
                mine[name].copy_(mine[other + name.removeprefix(part)])
    return model


def _of_part(names: Iterable[str], part: str) -> list[str]:
    return [name for name in names if name.startswith(f"{part}.")]


def check_start(recipe: Recipe) -> ModelConfig:
    """The configuration of what a stage makes, once base and start have been looked at, weights apart.

    Raises InputError if base or start is no checkpoint, they differ in a tensor's shape, or a part cannot be
    copied to another.
    """
    config, start = stage_config(load_config(recipe.base), recipe), recipe.start or recipe.base
    mine = expected_shapes(config)
    for name, shape in expected_shapes(load_config(start)).items():
        if mine.get(name, shape) != shape:
            raise InputError(
                f"Tensor '{name}' of {start} is {list(shape)}, but this stage needs {list(mine[name])}; "
                f"start from a checkpoint of the same architecture."
            )
    for part, other in recipe.copied.items():
        shapes, others = (
            {name.removeprefix(one): mine[name] for name in _of_part(mine, one)} for one in (part, other)
        )
        if not shapes or shapes != others:
            parts = sorted({name.split(".")[0] for name in mine})
            raise InputError(
                f"The recipe's copied has {part} = {other!r}, but both must be parts of the stage's model "
                f"with tensors of the same shapes; it has {', '.join(parts)}."
            )
    return config


def pictures_of(rows: Iterable[Row]) -> list[np.ndarray]:
    """The pictures of rows, uint8 `(H, W, 3)`, for the image tokenizer."""
    return [np.array(_open(row[name])) for row in rows for name in ("picture", "image") if row.get(name)]


def make_job(
    model: Wallaroo,
    recipe: Recipe,
    source: Source,
    rows: Iterable[Row],
    process: Process,
) -> "VQJob | LMJob":
    """The job of a stage; rows: all of them, whose pictures the image tokenizer keeps in memory."""
    if recipe.part == "vq":
        assert model.vq is not None
        return VQJob(model.vq, pictures_of(rows), recipe)
    return LMJob(model, load_tokenizer(recipe.base), source, recipe, process)


def finish(model: Wallaroo, recipe: Recipe) -> None:
    """Writes the stage's result, a checkpoint folder, unless it is there."""
    if result(recipe) is None:
        tokenizer = (Path(recipe.base) / TOKENIZER).read_text(encoding="utf-8")
        save(model.cpu(), model.config, tokenizer, Path(recipe.folder) / RESULT)


class Log:
    """Metrics of a stage: a line of JSON each time in METRICS, and TensorBoard's files where that is
    installed. After a resume the lines of steps that are made again are there twice."""

    def __init__(self, folder: str | Path):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.file = Path(folder) / METRICS
        self.board: Any = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder))

    def __call__(self, step: int, numbers: dict[str, float]) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        for name, number in numbers.items() if self.board else ():
            self.board.add_scalar(name, number, step)

    def picture(self, step: int, pixels: np.ndarray) -> None:
        """A sample, uint8 `(H, W, 3)`."""
        Image.fromarray(pixels).save(self.file.with_name(f"sample-{step:06}.png"))
        if self.board:
            self.board.add_image("sample", pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self.board:
            self.board.close()


def due(recipe: Recipe, step: int) -> bool:
    """Whether samples are to be drawn after a step."""
    wanted = bool(recipe.sample_every) and step % recipe.sample_every == 0
    return wanted and (recipe.part == "vq" or "generate" in recipe.rows)


def samples(job: Job, step: int) -> np.ndarray:
    """A strip of pictures, uint8 `(H, W, 3)`: of the image tokenizer what it is given over what it makes of
    it, of the language model pictures drawn for prompts of the latest batch."""
    count = 8
    with torch.no_grad():
        if isinstance(job, VQJob):
            vq = job.module.vq
            pixels = job.batch(step, 0)[0][0][:count]
            strips = [to_uint8(pixels), to_uint8(vq.decode(vq.quantise(vq.encode(pixels))))]
            return np.concatenate([np.concatenate(list(strip.cpu().numpy()), 1) for strip in strips])
    assert isinstance(job, LMJob)
    model, task = job.module.model, "generate"
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


def train(recipe: Recipe, say: Callable[[str], None] = print, workers: int = 1) -> Path:
    """Runs one stage on this machine, on from where it was, and gives the folder of its checkpoint.

    workers: processes that share each step, this one among them; on CPUs each has its part of the cores,
    which is a little quicker than threads for a small model. Of each file of rows it reads the JSON lines
    beside it.
    Raises InputError for a recipe that cannot be followed.
    """
    recipe.share(workers)
    if (done := result(recipe)) is not None:
        say(f"{done} is there already, so there is nothing to do")
        return done
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as meeting:
        spawned = torch.multiprocessing.get_context("spawn")
        others = [
            spawned.Process(target=_join, args=(recipe, say, rank, workers, meeting), daemon=True)
            for rank in range(1, workers)
        ]
        try:
            for other in others:
                other.start()
            return _join(recipe, say, 0, workers, meeting)
        finally:
            torch.set_num_threads(threads)
            for other in others:
                # One that still works waits for a process that has failed.
                other.join(60 if result(recipe) else 0)
                other.kill()


def _join(recipe: Recipe, say: Callable[[str], None], rank: int, world: int, meeting: str) -> Path:
    """Runs a stage as one of its processes on this machine, which meet in a folder."""
    if rank:
        # Ctrl-C is for the first, which ends the others.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    cuda = torch.cuda.is_available()
    device = f"cuda:{rank}" if cuda else "cpu"
    config, tokenizer = stage_config(load_config(recipe.base), recipe), load_tokenizer(recipe.base)
    data = {}
    for task, path in recipe.data.items():
        rows = read_rows(Path(path).with_suffix(".jsonl"))
        data[task] = [row for row in rows if fits(row, task, tokenizer, config, recipe)]
        if not data[task]:
            raise InputError(f"All rows of {path} are too long or too small for this stage; see its lengths.")
    if world == 1:
        return run_stage(recipe, data, Process(device=device), say, ahead=True)
    if not cuda:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    # Nobody from outside is to join: the others are found by a file, and reached on this machine alone.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.FileStore(f"{meeting}/store", world)
    torch.distributed.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    try:
        return run_stage(recipe, data, process_of_group(recipe, device), say, ahead=True)
    finally:
        torch.distributed.destroy_process_group()


def run_stage(
    recipe: Recipe,
    data: Mapping[str, Sequence[Row]],
    process: Process,
    say: Callable[[str], None] = lambda line: None,
    ahead: bool = False,
) -> Path:
    """Runs one stage as one of its processes; that of rank 0 keeps the log and writes the checkpoint.

    data: rows by task, of any length and kind of sequence. ahead: whether their pictures are encoded before
    the first step.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    model = start_model(recipe).to(process.device)
    every = itertools.chain.from_iterable(data.values())
    job = make_job(model, recipe, from_memory(data, recipe.seed), every, process)
    if ahead and isinstance(job, LMJob):
        job.rows.prepare(data)
    log = Log(recipe.folder) if process.rank == 0 else None

    def report(step: int, numbers: dict[str, float]) -> None:
        if log is not None:
            log(step, numbers)
            say(progress(step, recipe.steps, numbers))

    def after(step: int) -> None:
        if log is not None and due(recipe, step):
            log.picture(step, samples(job, step))

    optimise(job, recipe, report, process, after)
    if log is not None:
        log.close()
        finish(model, recipe)
    return Path(recipe.folder) / RESULT


def result(recipe: Recipe) -> Path | None:
    """The stage's checkpoint, if it is there."""
    folder = Path(recipe.folder) / RESULT
    return folder if folder.exists() else None


def progress(step: int, steps: int, numbers: Mapping[str, float]) -> str:
    """One line for people."""
    losses = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items() if name not in _NO_LOSS)
    speed = numbers["tokens_per_second"]
    return f"step {step:,} of {steps:,}: loss {numbers['loss']:.4f} ({losses}), {speed:,.0f} tokens/s"


_NO_LOSS = ("loss", "gradient_norm", "rate", "tokens_per_second", "skipped_steps")


def main() -> None:
    """`python -m wallaroo.model.train RECIPES.toml STAGE [WORKERS]`: one stage without Ray.

    Of each file of rows it reads the JSON lines beside it.
    """
    if len(sys.argv) not in (3, 4) or not "".join(sys.argv[3:] or "1").isdecimal():
        sys.exit("usage: python -m wallaroo.model.train RECIPES.toml STAGE [WORKERS]")
    try:
        print(train(Recipe.from_file(*sys.argv[1:3]), workers=int("".join(sys.argv[3:] or "1"))))
    except InputError as error:
        sys.exit(f"model.train: {error}")


if __name__ == "__main__":
    main()
