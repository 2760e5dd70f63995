"""One stage from its recipe to its checkpoint, in one process or in several on this machine."""

import itertools
import os
import signal
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from wallaroo.model.checkpoint import TOKENIZER, load_config, load_tokenizer, save
from wallaroo.model.errors import InputError
from wallaroo.model.training.data import Row, Source, from_memory, pictures_of, read_rows
from wallaroo.model.training.lm import LMJob
from wallaroo.model.training.log import Log, due, progress, samples
from wallaroo.model.training.loop import Process, optimise, process_of_group
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.rows import fits
from wallaroo.model.training.start import stage_config, start_model
from wallaroo.model.training.vq import VQJob
from wallaroo.model.wallaroo import Wallaroo

RESULT = "checkpoint"


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
