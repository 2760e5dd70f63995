"""The shards of a run on their way into its pipeline: numbers that come as there is room for them.

A shard that waits is eight bytes. As a block of Ray Data it would cost the driver 1.6 ms and 6 KB before
the first shard is begun, so a task yields the numbers one by one, and lets only a window of shards into the
pipeline. There is one pipeline, and one pool of replicas, from the first shard to the last.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wallaroo.workflows.plans.plan import Plan

if TYPE_CHECKING:
    import ray.data

TASK_PARTS = 16
"""Parts of the plan whose shards one task yields; Ray repeats the whole task if its process is lost."""
POLL_SECONDS = 0.1
"""How often the task asks whether there is room; the window has shards for that long."""


def shard_stream(plan: Plan, shards: Sequence[int], watch: Any) -> "ray.data.Dataset":
    """A Dataset of shards, of which only a window is ever in the pipeline.

    Args:
        plan: The whole plan.
        shards: Numbers of the shards to make, ascending.
        watch: Handle of the run's `actors.watch.Watch`, whose `admit` says how many may have come.

    Returns:
        Rows for `stages.load`: `shard`, and where its planned rows are, `plan_file` and `row_group`. Each
        is a block, as Ray Data hands out blocks and not rows.
    """
    import ray
    import ray.data
    from ray.data import DataContext, TaskPoolStrategy

    numbers = np.asarray(shards, np.int64)
    spans = []
    for part in plan.parts:
        first, last = np.searchsorted(numbers, [part.first_shard, part.end]).tolist()
        if first < last:
            queued = numbers[first:last].tobytes()
            spans.append(
                {"position": first, "shards": queued, "file": part.file, "first_shard": part.first_shard}
            )
    context = DataContext.get_current().copy()
    # A block ends with the row that makes it larger than this. Small blocks would be joined otherwise, and
    # the shards of one block go to one task.
    context.target_max_block_size = 1
    with DataContext.current(context):
        # One task at a time, which takes no CPU from others. Beside the driver: lost with it, not before.
        return ray.data.from_items(spans, override_num_blocks=-(-len(spans) // TASK_PARTS)).flat_map(
            functools.partial(admitted, watch=watch),
            num_cpus=0,
            compute=TaskPoolStrategy(size=1),
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
        )


def admitted(span: dict[str, Any], watch: Any) -> Iterator[dict[str, Any]]:
    """Yields the shards of a part of the plan, each when the watch has admitted it.

    Args:
        span: `shards` are numbers as bytes of int64, `position` that of the first in the whole queue, `file`
            and `first_shard` those of the part.
        watch: As of `shard_stream`.
    """
    import ray

    room = 0
    for position, shard in enumerate(np.frombuffer(span["shards"], np.int64).tolist(), span["position"]):
        while position >= room:
            room = ray.get(watch.admitted.remote())
            if position >= room:
                time.sleep(POLL_SECONDS)
        yield {"shard": shard, "plan_file": span["file"], "row_group": shard - span["first_shard"]}
