"""One stage from its recipe to its checkpoint, in one process or in several on this machine."""

import contextlib
import itertools
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from wallaroo.model.checkpoint import load_config, load_tokenizer
from wallaroo.model.config import ModelConfig
from wallaroo.model.errors import InputError
from wallaroo.model.tokenizer import Tokenizer
from wallaroo.model.training.data import Row, Source, from_memory, pictures_of, read_rows
from wallaroo.model.training.folder import claim
from wallaroo.model.training.lm import LMLearner
from wallaroo.model.training.log import Log, progress
from wallaroo.model.training.loop import optimise
from wallaroo.model.training.process import Process, process_of_group
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.result import check_result, finish, for_samples, result, result_folder
from wallaroo.model.training.rows import fits
from wallaroo.model.training.samples import draw, due, sample_prompts
from wallaroo.model.training.sharding import fill, halves, recompute, shard
from wallaroo.model.training.sizing import Sizes, device_bytes
from wallaroo.model.training.start import check_start, empty_start, stage_config, start_model, start_weights
from wallaroo.model.training.state import Files
from wallaroo.model.training.validation import Validation
from wallaroo.model.training.vq import VQLearner
from wallaroo.model.wallaroo import Wallaroo


def make_learner(
    model: Wallaroo,
    recipe: Recipe,
    source: Source,
    rows: Iterable[Row],
    process: Process,
) -> "VQLearner | LMLearner":
    """Makes the learner of a stage.

    Args:
        model: Of the stage.
        recipe: The stage.
        source: Gives the rows of the language model.
        rows: All rows, whose pictures the image tokenizer keeps in memory.
        process: One of those that share the stage.

    Returns:
        The learner.
    """
    if recipe.part == "vq":
        assert model.vq is not None
        return VQLearner(model.vq, pictures_of(rows), recipe)
    return LMLearner(model, load_tokenizer(recipe.base), source, recipe, process)


def start_learner(
    recipe: Recipe, source: Source, rows: Iterable[Row], process: Process
) -> "tuple[Wallaroo, VQLearner | LMLearner]":
    """Makes model and learner of a stage, with the weights that it starts with.

    Args:
        recipe: The stage.
        source: Gives the rows of the language model.
        rows: All rows, for the image tokenizer.
        process: One of those that share the stage; with `full` the model is sharded.

    Returns:
        Model and learner.

    Raises:
        InputError: As `check_start`.
    """
    if process.shard == "none":
        model = start_model(recipe).to(process.device)
        learner = make_learner(model, recipe, source, rows, process)
        if recipe.checkpointing and isinstance(learner, LMLearner):
            recompute(model)
        return model, learner
    model = empty_start(recipe, "meta")
    learner = make_learner(model, recipe, source, rows, process)
    if recipe.checkpointing:
        recompute(model)
    shard(learner.module, model, process, halves(recipe, process))
    fill(model, start_weights(recipe, model.config), recipe.seed)
    return model, learner


def train(
    recipe: Recipe,
    say: Callable[[str], None] = print,
    workers: int = 1,
    shard: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Runs one stage on this machine, from its last state if it has one. SIGTERM saves the state and ends it.

    Args:
        recipe: The stage. In place of each Parquet file the JSON Lines file of the same name is read.
        say: Gets each line of progress.
        workers: Processes that share each step, including this one; on CPUs they divide the cores.
        shard: `none` (each holds the whole model), `full` (each holds a shard), or `auto`.
        overwrite: Whether the stage's folder may hold files of others.

    Returns:
        The checkpoint folder, or with `lora` the folder of the updates.

    Raises:
        InputError: The recipe cannot be followed, or its folder holds files of others.
        Stopped: SIGTERM came.
    """
    recipe.share(workers)
    if (done := result(recipe)) is not None:
        say(f"{done} exists already, so there is nothing to do")
        return done
    check_result(recipe)
    claim(recipe.folder, overwrite)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as meeting:
        spawned = torch.multiprocessing.get_context("spawn")
        others = [
            spawned.Process(target=_join, args=(recipe, _silent, rank, workers, meeting, shard), daemon=True)
            for rank in range(1, workers)
        ]
        try:
            for other in others:
                other.start()
            made = _join(recipe, say, 0, workers, meeting, shard)
            if made is None:
                raise Stopped(f"SIGTERM received; the state is saved. Re-run to resume {recipe.folder}.")
            return made
        finally:
            torch.set_num_threads(threads)
            for other in (one for one in others if one.pid is not None):
                # One that still works waits for a process that has failed.
                other.join(60 if result(recipe) else 0)
                other.kill()


class Stopped(Exception):
    """A stage was stopped by SIGTERM and can be resumed."""


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Catches SIGTERM for the block; yields a function that says whether it came."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def _silent(line: str) -> None:
    """Drops the progress of processes other than the first."""


def _join(
    recipe: Recipe, say: Callable[[str], None], rank: int, world: int, meeting: str, shard: str
) -> Path | None:
    """Runs a stage as one of its processes on this machine, which find each other by a folder."""
    if rank:
        # Ctrl-C is for the first, which ends the others.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    cuda = torch.cuda.is_available()
    device = f"cuda:{rank}" if cuda else "cpu"
    config, tokenizer = stage_config(load_config(recipe.base), recipe), load_tokenizer(recipe.base)
    data, held_out = (
        {
            task: _fitting(read_rows(Path(path).with_suffix(".jsonl")), task, path, tokenizer, config, recipe)
            for task, path in files.items()
        }
        for files in (recipe.data, recipe.held_out)
    )
    spread = choose(recipe, Process(rank, world, device), shard, say)
    if world == 1 and spread == "none":
        with _sigterm() as stop:
            return run_stage(
                recipe, data, Process(device=device), say, ahead=True, held_out=held_out, stop=stop
            )
    if not cuda and world > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    # No other machine can join: processes find each other by a file, and talk over the loopback device.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.FileStore(f"{meeting}/store", world)
    torch.distributed.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    process = process_of_group(device, spread)
    try:
        with _sigterm() as stop:
            return run_stage(recipe, data, process, say, ahead=True, held_out=held_out, stop=stop)
    finally:
        torch.distributed.destroy_process_group()


def _fitting(
    rows: Sequence[Row], task: str, path: str, tokenizer: Tokenizer, config: ModelConfig, recipe: Recipe
) -> list[Row]:
    found = [row for row in rows if fits(row, task, tokenizer, config, recipe)]
    if not found:
        raise InputError(f"All rows of {path} are too long or too small for this stage; see its lengths.")
    return found


def choose(
    recipe: Recipe, process: Process, shard: str, say: Callable[[str], None], memory: int | None = None
) -> str:
    """Chooses whether each process holds the whole model or a shard, and prints the memory of a worker.

    Args:
        recipe: The stage.
        process: One of those that share it.
        shard: `none`, `full` or `auto`.
        say: Gets one line, in the first process.
        memory: Of each device in bytes, by default that of the device of `process`; 0 for no bound.

    Returns:
        `none` or `full`.

    Raises:
        InputError: It does not fit; the message has the number of workers that it takes.
    """
    if recipe.part == "vq":
        return "none"
    sizes = Sizes(check_start(recipe), recipe, halves(recipe, process))
    need = sizes.choose(process.world, shard, device_bytes(process.device) if memory is None else memory)
    if process.rank == 0:
        say(str(need))
    return need.shard


def run_stage(
    recipe: Recipe,
    data: Mapping[str, Sequence[Row]],
    process: Process,
    say: Callable[[str], None] = lambda line: None,
    ahead: bool = False,
    files: Files | None = None,
    held_out: Mapping[str, Sequence[Row]] | None = None,
    source: Source | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Runs one stage as one of its processes; the first one writes log and result.

    Args:
        recipe: The stage.
        data: Task -> rows.
        process: One of those that share the stage.
        say: Gets each line of progress, in the first process.
        ahead: Whether pictures of rows are encoded before the first step.
        files: Of states, by default on the disk.
        held_out: Task -> rows whose losses are logged.
        source: Gives the rows in place of `data`.
        stop: Called after each step; if it is true in one process, all save the state and end.

    Returns:
        The folder of the result; None if the stage was stopped.

    Raises:
        InputError: The recipe cannot be followed.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    every = itertools.chain.from_iterable(data.values())
    model, learner = start_learner(recipe, source or from_memory(data, recipe.seed), every, process)
    if ahead and isinstance(learner, LMLearner):
        learner.rows.prepare(data)
    validation = (
        Validation(learner, held_out, recipe, process)
        if held_out and isinstance(learner, LMLearner)
        else None
    )
    log = Log(recipe.folder) if process.rank == 0 else None

    def report(step: int, numbers: dict[str, float]) -> None:
        if numbers.get("bad_rows") and isinstance(learner, LMLearner):
            reasons = process.gathered(learner.bad)
            if log is not None:
                log.bad(reasons)
        if log is not None:
            log(step, numbers)
            say(progress(step, recipe.steps, numbers))

    def after(step: int) -> None:
        if validation is not None and step % recipe.validate_every == 0:
            losses = validation.losses()
            if log is not None:
                log(step, losses)
                say(progress(step, recipe.steps, losses))
        if due(recipe, step):
            drawing = for_samples(learner, recipe, process)
            if log is not None:
                prompts = sample_prompts(learner, recipe)
                log.picture(step, draw(learner, step, prompts, drawing), prompts)

    done = optimise(learner, recipe, report, process, after, files, stop)
    if log is not None:
        log.close()
    if not done:
        return None
    finish(model, recipe, process)
    return result_folder(recipe)
