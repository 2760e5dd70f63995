"""The loop of all stages: batches, gradients over pieces and processes, optimizers, state.

Knows nothing of what a learner learns.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wallaroo.model.muon import Muon, takes
from wallaroo.model.training.meter import Meter
from wallaroo.model.training.process import Process, whole
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.sharding import halves, spread, synced
from wallaroo.model.training.state import Files, States


class Learner(Protocol):
    """What the loop trains: a module, its batches and its state.

    Attributes:
        flops_per_token: Operations of a forward and backward pass per token, 0 if unknown.
    """

    flops_per_token: float

    @property
    def module(self) -> nn.Module:
        """Forward: a batch -> name -> mean loss, to be added."""

    def batch(self, step: int, piece: int) -> tuple[Any, ...]:
        """Makes a batch.

        Args:
            step: From 0.
            piece: Of the step, from 0.

        Returns:
            Arguments of the module's forward, always the same for a step and piece.
        """

    def counts(self, *batch: Any) -> dict[str, int]:
        """Counts a batch.

        Args:
            batch: Arguments of the module's forward.

        Returns:
            Name of each loss -> places that it is the mean of, and `tokens` of the batch.
        """

    def after_step(self, step: int) -> dict[str, float]:
        """Called after the optimizer's step.

        Args:
            step: Number of steps done.

        Returns:
            Numbers for the log.
        """

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors that a resume needs besides parameters and optimizer."""

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restores what `extra_state` gave."""


def optimise(
    learner: Learner,
    recipe: Recipe,
    report: Callable[[int, dict[str, float]], None],
    process: Process | None = None,
    after: Callable[[int], None] = lambda step: None,
    files: Files | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Trains from the last state of `recipe.folder`, if any, to `recipe.steps`.

    AdamW 0.9/0.95 without weight decay, or Muon for matrices; gradients are clipped at norm 1. A loss is the
    mean over its places in the whole step, however that is divided into pieces and processes.

    Args:
        learner: What is trained.
        recipe: The stage.
        report: Gets step and metrics every `log_every` steps.
        process: One of those that share the training, by default the only one.
        after: Called after each step, in each process.
        files: Of states, by default on the disk.
        stop: Called after each step in each process; if it is true in one, all save the state and end.

    Returns:
        Whether all steps are done.

    Raises:
        InputError: The processes find different states, or a state is of another recipe.
    """
    process = process or Process()
    # Of the image tokenizer, stages of the language model use the codebook alone.
    module = spread(learner.module, process, unused=recipe.learns("vq."))
    named = dict(learner.module.named_parameters())
    learning = {name: one for name, one in named.items() if one.requires_grad}
    # The image tokenizer's codebook is set again now and then, whether or not it learns.
    kept = named if recipe.part == "vq" else learning
    optimizers = make_optimizers(recipe, learning)
    states = States(recipe, process, files)
    step = states.load(kept, optimizers, learner)
    meter = Meter(process, learner.flops_per_token)
    # A GPU computes a step while the rows of the next are made, unless the image tokenizer learns, which
    # encodes them.
    overlapped = process.device.startswith("cuda") and recipe.part == "lm" and not recipe.learns("vq.")
    ahead = batches(learner, recipe, step, overlapped)
    bad_rows = 0
    try:
        while step < recipe.steps:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate_at(step)
                optimizer.zero_grad(set_to_none=True)
            # All pieces are made first: a loss is divided by its places in the whole step.
            with meter.waiting():
                pieces = list(itertools.islice(ahead, recipe.accumulate))
            sums, counts = _gradients(learner, module, pieces, recipe, process)
            meter.count(counts["tokens"])
            bad_rows += int(counts.get("bad_rows", 0))
            drawn = sum(value for name, value in sums.items() if name.startswith("generate_"))
            sound = all(map(math.isfinite, sums.values())) and drawn <= (recipe.largest_loss or math.inf)
            norm = float(whole(nn.utils.clip_grad_norm_(learning.values(), 1.0)))
            if sound and math.isfinite(norm):
                for optimizer in optimizers:
                    optimizer.step()
            else:
                meter.skipped += 1
            step += 1
            more = learner.after_step(step)
            if step % recipe.log_every == 0 or step == recipe.steps:
                numbers = {
                    "loss": sum(sums.values()),
                    "gradient_norm": norm,
                    "rate": recipe.rate_at(step - 1),
                }
                if bad_rows:
                    numbers["bad_rows"] = float(bad_rows)
                report(step, sums | numbers | meter.read() | more)
            stopped = process.total({"stop": float(stop())})["stop"] > 0
            if step % recipe.save_every == 0 or step == recipe.steps or stopped:
                states.save(step, kept, optimizers, learner)
            after(step)
            if stopped:
                break
    finally:
        # A state that is being written when training fails is the one to resume from.
        states.finish()
    return step == recipe.steps


def make_optimizers(recipe: Recipe, learning: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Makes the optimizers of a stage: with `muon` Muon for matrices, AdamW for all else.

    Args:
        recipe: The stage.
        learning: Name -> parameter that learns.

    Returns:
        One or two optimizers.
    """
    matrices = [one for name, one in learning.items() if recipe.muon and takes(name, one)]
    others = [one for name, one in learning.items() if not (recipe.muon and takes(name, one))]
    made: list[torch.optim.Optimizer] = []
    if others:
        made.append(
            torch.optim.AdamW(
                others, lr=recipe.rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
            )
        )
    if matrices:
        made.append(Muon(matrices, lr=recipe.rate))
    return made


def _gradients(
    learner: Learner, module: nn.Module, pieces: Sequence[tuple[Any, ...]], recipe: Recipe, process: Process
) -> tuple[dict[str, float], dict[str, float]]:
    """Computes the gradients of a step; gives its losses and its counts, summed over all processes."""
    counted = [learner.counts(*piece) for piece in pieces]
    every = process.total({name: sum(one[name] for one in counted) for name in counted[0]})
    sums = dict.fromkeys([name for name in every if name not in ("tokens", "bad_rows")], 0.0)
    # A whole model keeps its weights in float32 and multiplies in bfloat16; a sharded one is gathered in it.
    half = halves(recipe, process) and process.shard == "none"
    kind = process.device.partition(":")[0]
    for index, (piece, own) in enumerate(zip(pieces, counted, strict=True)):
        last = index == len(pieces) - 1
        with synced(module, last), torch.autocast(kind, torch.bfloat16, enabled=half):
            losses = module(*piece)
            shares = {name: losses[name] * (own[name] / every[name]) for name in sums}
            # The gradients' mean over the processes is to be that of the shares' sum.
            (torch.stack(list(shares.values())).sum() * process.world).backward()
        for name, share in shares.items():
            sums[name] += float(share.detach())
    # All processes see the same sums and gradients, and so agree on what follows.
    return process.total(sums), every


@dataclass(frozen=True)
class _Pieces(torch.utils.data.Dataset[tuple[Any, ...]]):
    """All batches of a stage, in order."""

    learner: Learner
    accumulate: int

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.learner.batch(*divmod(index, self.accumulate))


def batches(
    learner: Learner, recipe: Recipe, step: int, overlapped: bool = False
) -> Iterator[tuple[Any, ...]]:
    """Makes the batches of a stage.

    Args:
        learner: Makes each.
        recipe: The stage; `workers` processes make batches ahead.
        step: First step.
        overlapped: Whether, without such processes, a thread makes the batches of the next step.

    Yields:
        Arguments of the module's forward for each piece of each step.
    """
    places = range(step * recipe.accumulate, recipe.steps * recipe.accumulate)
    if overlapped and not recipe.workers:
        yield from _overlapped(_Pieces(learner, recipe.accumulate), places, recipe.accumulate)
        return
    yield from iter(
        torch.utils.data.DataLoader(
            _Pieces(learner, recipe.accumulate),
            batch_size=None,
            sampler=places,
            num_workers=recipe.workers,
            collate_fn=_as_it_is,
        )
    )


def _overlapped(pieces: _Pieces, places: Sequence[int], ahead: int) -> Iterator[tuple[Any, ...]]:
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        made = deque(pool.submit(pieces.__getitem__, place) for place in places[:ahead])
        for place in places[ahead:]:
            made.append(pool.submit(pieces.__getitem__, place))
            yield made.popleft().result()
        while made:
            yield made.popleft().result()


def _as_it_is(batch: Any) -> Any:
    return batch
