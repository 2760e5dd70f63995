"""The queue of shards before the pipeline: numbers of shards enter as there is room.

A waiting shard is eight bytes. As a block of Ray Data it would cost the driver 1.6 ms and 6 KB before the
first shard starts. So a task yields the numbers one by one, and lets only a window of shards into the
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
"""Parts of the plan whose shards one task yields. If its process is lost, Ray repeats the whole task."""
POLL_SECONDS = 0.1
"""How often the task asks for room. The window holds enough shards for that time."""


def shard_stream(plan: Plan, shards: Sequence[int], watch: Any) -> "ray.data.Dataset":
    """Makes a Dataset of shards, of which only a window is ever in the pipeline.

    Args:
        plan: The whole plan.
        shards: Numbers of the shards to make, ascending.
        watch: Handle of the run's `actors.watch.Watch`, whose `admit` sets how many may enter.

    Returns:
        Rows for `stages.load`: `shard`, and the place of its planned rows as `plan_file` and `row_group`.
        Each is a block of its own, since Ray Data hands out blocks and not rows.
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
        span: `shards` are numbers as bytes of int64, `position` is the place of the first one in the whole
            queue. `file` and `first_shard` are those of the part.
        watch: Handle of the run's `actors.watch.Watch`.

    Yields:
        Rows as `shard_stream` describes.
    """
    import ray

    room = 0
    for position, shard in enumerate(np.frombuffer(span["shards"], np.int64).tolist(), span["position"]):
        while position >= room:
            room = ray.get(watch.admitted.remote())
            if position >= room:
                time.sleep(POLL_SECONDS)
        yield {"shard": shard, "plan_file": span["file"], "row_group": shard - span["first_shard"]}
