"""The loop of all stages: batches, gradients over pieces and processes, optimizers, state.

Knows nothing of what a job learns.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wallaroo.model.checkpoint import load_config
from wallaroo.model.errors import InputError
from wallaroo.model.muon import Muon, takes
from wallaroo.model.training.recipe import Recipe

STATE = "state.pt"


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
