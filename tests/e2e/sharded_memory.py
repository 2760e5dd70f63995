"""A worker of a sharded training, which measures its memory: `python -m tests.e2e.sharded_memory ...`."""

import dataclasses
import os
import sys
import threading
import time

import torch

from tests.unit.training.cases import rows
from wallaroo.model.training.data import from_memory
from wallaroo.model.training.loop import optimise
from wallaroo.model.training.process import process_of_group
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.stage import start_learner


def anonymous() -> int:
    """Memory in bytes that is this process's own, mapped files apart."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


class Measured(Exception):
    pass


def main(folder: str, base: str, store: str, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, world), rank=rank, world_size=world
    )
    values = {"part": "lm", "folder": folder, "base": base, "steps": 9, "rate": 1e-3, "largest_loss": 0}
    recipe = Recipe.from_dict(
        values | {"data": {"generate": ""}, "rows": {"generate": world}, "checkpointing": True}
    )
    recipe = dataclasses.replace(recipe, save_every=100)
    process = process_of_group("cpu", "full")
    # What libraries take at their first use is not of interest.
    torch.distributed.all_reduce(torch.ones(1))
    from torch.distributed import checkpoint, fsdp  # noqa: F401
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl  # noqa: F401

    before, peak = anonymous(), 0

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, anonymous())
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()
    data = {"generate": rows()["generate"]}
    _, learner = start_learner(recipe, from_memory(data, 0), data["generate"], process)

    def after(step: int) -> None:
        if step == 3:
            print(before, max(peak, anonymous()), flush=True)
            os._exit(0)

    optimise(learner, recipe, lambda step, numbers: None, process, after)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
