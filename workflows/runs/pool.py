"""The replicas of a run as a pool of actors, and the stages around them as a Ray Data pipeline."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wallaroo.actors.replica import Replica
from wallaroo.model.config import SLOTS
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.schema import TEXT_TASKS
from wallaroo.workflows.runs.stages import StageContext, picture_encoder
from wallaroo.workflows.settings import RunConfig
from wallaroo.workflows.storage.checkpoints import fetch_folder

if TYPE_CHECKING:
    import ray.data


MIN_LOADS = 2
"""Fewest shards whose sources are loaded at once. Each loads several sources at once."""
WRITERS = 2
"""Fewest shards that are encoded and written at once for each replica."""


@dataclass(frozen=True)
class Pool:
    """The replicas of a pipeline, and how much its stages hold."""

    device: str
    """`cpu` or `cuda`."""
    size: int
    """Most replicas."""
    calls: int
    """Shards in flight in one replica."""
    shards: int
    """All shards of the pipeline."""
    threads: int = 1
    """CPU threads of one replica."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of `model.engine.EngineOptions` that differ from their defaults."""
    kind: type = Replica
    """Class of the replicas."""

    def tasks(self, most: int) -> "ray.data.TaskPoolStrategy":
        """Allows at most `most` tasks at once in a stage around the replicas.

        There are never more than shards, since Ray Data warns of that.
        """
        from ray.data import TaskPoolStrategy

        return TaskPoolStrategy(size=min(most, self.shards))

    @property
    def loads(self) -> int:
        """Shards whose sources are loaded at once."""
        return max(MIN_LOADS, 2 * self.size)

    @property
    def writers(self) -> int:
        """Shards that are encoded and written at once."""
        return max(WRITERS, self.calls) * self.size

    @property
    def unwritten(self) -> int:
        """Fewer shards than this may be begun and not yet written."""
        return 2 * self.size + self.writers

    @property
    def window(self) -> int:
        """Shards in the pipeline: twice what its stages hold, so that none waits for a number."""
        return 2 * (self.loads + self.calls * self.size + self.writers)

    @property
    def cpus(self) -> float:
        """CPUs of one task in the stages around the replicas.

        It is 0 if replicas themselves hold the CPUs, or the tasks would wait forever.
        """
        return 0 if self.device == "cpu" else 1


def make_pool(config: RunConfig, device: str, rows: int, shards: int, kind: type = Replica) -> Pool:
    """Sizes the pool of a pipeline.

    A replica holds as many shards as fill its slots and one more. A larger backlog would only keep work from
    replicas that come up later.

    Args:
        config: Options of the run.
        device: `cpu` or `cuda`.
        rows: Planned rows.
        shards: Number of shards of these rows.
        kind: Class of the replicas.

    Returns:
        The pool; nothing is started.
    """
    slots = config.slots or SLOTS[device]
    calls = 1 + math.ceil(slots * shards / rows)
    options: dict[str, Any] = {
        "cfg_interval": config.cfg_interval,
        "graphs": not config.no_cuda_graphs,
        "prompt_tokens": config.max_prompt_tokens,
        "max_new_tokens": config.max_new_tokens,
        "pixels": (config.min_pixels, config.max_pixels),
    }
    for name in ("slots", "group_rows"):
        if getattr(config, name) is not None:
            options[name] = getattr(config, name)
    size = min(config.replicas[1], shards)
    return Pool(device, size, calls, shards, config.threads, options, kind)


def load_stage(
    shards: "ray.data.Dataset", stage: Callable[..., dict[str, Any]], context: StageContext, pool: Pool
) -> "ray.data.Dataset":
    """Adds the load stage to a pipeline. Each of its tasks is a process.

    Args:
        shards: Rows that `stage` takes.
        stage: `load` or `prepare`.
        context: What the stages need to know.
        pool: The replicas.

    Returns:
        Rows of `prepare`.
    """
    return shards.map(stage, num_cpus=pool.cpus, compute=pool.tasks(pool.loads))


def _fetch(model: str) -> Path:
    """Returns the local folder of a checkpoint, in the process of a replica."""
    storage.enable_retries()
    return fetch_folder(model)


def make_results(
    shards: "ray.data.Dataset",
    stage: Callable[..., dict[str, Any]],
    context: StageContext,
    pool: Pool,
    watch: Any = None,
) -> "ray.data.Dataset":
    """Adds the replicas to a pipeline, and the stage after them.

    Args:
        shards: Rows of `prepare`.
        stage: `encode` or `encode_and_write`.
        context: What the stages need to know.
        pool: The replicas.
        watch: Handle of the run's `actors.watch.Watch`, or None.

    Returns:
        Rows of `stage`.
    """
    from ray.data import ActorPoolStrategy

    textual = context.run.task in TEXT_TASKS
    resources: dict[str, Any] = {"num_gpus": 1} if pool.device == "cuda" else {"num_cpus": pool.threads}
    made = shards.map(
        pool.kind,
        fn_constructor_kwargs={
            "checkpoint": functools.partial(_fetch, context.model),
            "task": context.run.task,
            "options": pool.options,
            "device": pool.device,
            "threads": pool.threads,
            "watch": watch,
            "encoder": None if textual else functools.partial(picture_encoder, run=context.run),
        },
        compute=ActorPoolStrategy(
            size=pool.size,
            max_concurrent_calls_per_actor=pool.calls,
            max_tasks_in_flight_per_actor=pool.calls,
        ),
        **resources,
    )
    return made.map(stage, num_cpus=pool.cpus, compute=pool.tasks(pool.writers))
