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
from wallaroo.model.training.lm import LMJob
from wallaroo.model.training.log import Log, progress
from wallaroo.model.training.loop import optimise
from wallaroo.model.training.process import Process, process_of_group
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.result import finish, for_samples, result, result_folder
from wallaroo.model.training.rows import fits
from wallaroo.model.training.samples import draw, due, sample_prompts
from wallaroo.model.training.sharding import fill, halves, recompute, shard
from wallaroo.model.training.sizing import Sizes, device_bytes
from wallaroo.model.training.start import check_start, empty_start, stage_config, start_model, start_weights
from wallaroo.model.training.state import Files
from wallaroo.model.training.validation import Validation
from wallaroo.model.training.vq import VQJob
from wallaroo.model.wallaroo import Wallaroo


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


def start_job(
    recipe: Recipe, source: Source, rows: Iterable[Row], process: Process
) -> "tuple[Wallaroo, VQJob | LMJob]":
    """Model and job of a stage with the weights it starts with; spread over processes if they hold shards."""
    if process.shard == "none":
        model = start_model(recipe).to(process.device)
        job = make_job(model, recipe, source, rows, process)
        if recipe.checkpointing and isinstance(job, LMJob):
            recompute(model)
        return model, job
    model = empty_start(recipe, "meta")
    job = make_job(model, recipe, source, rows, process)
    if recipe.checkpointing:
        recompute(model)
    shard(job.module, model, process, halves(recipe, process))
    fill(model, start_weights(recipe, model.config), recipe.seed)
    return model, job


def train(recipe: Recipe, say: Callable[[str], None] = print, workers: int = 1, shard: str = "auto") -> Path:
    """Runs one stage on this machine, resumes it where it was, and gives the folder of its checkpoint.

    SIGTERM makes it save its state and end.

    Args:
        recipe: The stage. Of each file of rows it names, the JSON lines beside it are read.
        say: Gets a line of progress at a time.
        workers: Processes that share each step, this one among them; on CPUs each has its part of the cores,
            which is a little quicker than threads for a small model.
        shard: `none` (each holds the whole model), `full` (each holds a shard), or `auto`.

    Returns:
        The checkpoint folder.

    Raises:
        InputError: The recipe cannot be followed.
        Stopped: SIGTERM came.
    """
    recipe.share(workers)
    if (done := result(recipe)) is not None:
        say(f"{done} is there already, so there is nothing to do")
        return done
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
                raise Stopped(f"SIGTERM came; the state is saved, run it again to resume {recipe.folder}.")
            return made
        finally:
            torch.set_num_threads(threads)
            for other in (one for one in others if one.pid is not None):
                # One that still works waits for a process that has failed.
                other.join(60 if result(recipe) else 0)
                other.kill()


class Stopped(Exception):
    """A stage was stopped on purpose and can be resumed."""


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM is only noted; gives a function that says whether it came."""
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
    """What processes but the first do with their progress."""


def _join(
    recipe: Recipe, say: Callable[[str], None], rank: int, world: int, meeting: str, shard: str
) -> Path | None:
    """Runs a stage as one of its processes on this machine, which meet in a folder."""
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
    # Nobody from outside is to join: the others are found by a file, and reached on this machine alone.
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
    """Whether each process holds the whole model (`none`) or a shard (`full`); says what memory it takes.

    Args:
        recipe: The stage.
        process: Any one of those that share it.
        shard: `none`, `full` or `auto`.
        say: Gets one line, in the first process.
        memory: Bytes of each device, by default of that of `process`; 0 if not known.

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
    """Runs one stage as one of its processes; that of rank 0 keeps the log and writes the checkpoint.

    Args:
        recipe: The stage.
        data: Rows by task, of any length and kind of sequence.
        process: Of those that share it.
        say: Gets a line of progress at a time, in the first process.
        ahead: Whether pictures of rows are encoded before the first step.
        files: Where states lie, by default on the disk.
        held_out: Rows by task whose losses are logged.
        source: Gives the rows in place of `data`.
        stop: Asked after each step; if a process says yes, all save the state and end.

    Returns:
        What the stage has made, None if it was stopped.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    every = itertools.chain.from_iterable(data.values())
    model, job = start_job(recipe, source or from_memory(data, recipe.seed), every, process)
    if ahead and isinstance(job, LMJob):
        job.rows.prepare(data)
    validation = Validation(job, held_out, recipe, process) if held_out and isinstance(job, LMJob) else None
    log = Log(recipe.folder) if process.rank == 0 else None

    def report(step: int, numbers: dict[str, float]) -> None:
        if numbers.get("bad_rows") and isinstance(job, LMJob):
            reasons = process.gathered(job.bad)
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
            drawing = for_samples(job, recipe, process)
            if log is not None:
                prompts = sample_prompts(job, recipe)
                log.picture(step, draw(job, step, prompts, drawing), prompts)

    done = optimise(job, recipe, report, process, after, files, stop)
    if log is not None:
        log.close()
    if not done:
        return None
    finish(model, recipe, process)
    return result_folder(recipe)
