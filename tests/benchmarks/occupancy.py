"""Slots in use while rows come through Ray Data: pictures of all sizes, and edits from a slow S3.

    python -m tests.benchmarks.occupancy [generate|edit]

Counted by the engine itself, step by step, from the first step with all slots in use to the last; the bound
is 0.9 for both. `generate`: 512 rows in shards of 16. `edit`: 500 rows, each with a PNG file of its own as
source, from an S3 endpoint that takes 30 ms longer for every answer.
"""

import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import boto3
import numpy as np
from PIL import Image

from tests import conftest
from tests.s3_proxy import proxy
from wallaroo.actors.replica import Replica
from wallaroo.model.checkpoint import TINY, load_config
from wallaroo.workflows.plans.plan import read_plan
from wallaroo.workflows.runs.driver import run
from wallaroo.workflows.settings import RunConfig

SLOTS, DELAY_SECONDS, BOUND = 16, 0.03, 0.9
STEPS = "STEPS_OF_THE_ENGINE"
"""Variable that names the file to which the replica adds a line a step."""


class Counting(Replica):
    """A replica that writes down how many of its slots each step had in use."""

    def _turn(self, engine: Any) -> None:
        step = engine.step
        file = open(os.environ[STEPS], "a", buffering=1)  # noqa: SIM115

        def counted() -> Any:
            before = engine.counts["row_steps"], engine.counts["slot_steps"]
            results = step()
            used, of = engine.counts["row_steps"] - before[0], engine.counts["slot_steps"] - before[1]
            if of:
                file.write(f"{used} {of}\n")
            return results

        engine.step = counted
        super()._turn(engine)


def picture(number: int) -> bytes:
    """Two colours, as a PNG file."""
    colours = np.random.default_rng(number).integers(0, 256, (2, 3), np.uint8)
    array = np.empty((96, 96, 3), np.uint8)
    array[:48], array[48:] = colours
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def main(tasks: Sequence[str]) -> None:
    """Measure these tasks."""
    folder = Path(tempfile.mkdtemp(prefix="occupancy-", dir="/tmp"))
    os.environ[STEPS] = str(folder / "steps")
    try:
        if "generate" in tasks:
            generate(folder)
        if "edit" in tasks:
            edit(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def generate(folder: Path) -> None:
    """Pictures of all sizes of the table, one after the other."""
    ratios = list(load_config(TINY).sizes)
    rows = [
        {"id": f"g{number}", "prompt": f"a red circle {number}", "aspect_ratio": ratios[number % len(ratios)]}
        for number in range(512)
    ]
    measure(folder, rows, str(folder / "out"), "generate")


def edit(folder: Path) -> None:
    """Edits of pictures on S3."""
    weed = str(Path(sys.executable).with_name("weed"))
    server = conftest._start(weed, folder / "weed")
    if server is None:
        sys.exit("SeaweedFS does not start.")
    try:
        with proxy(server.endpoint, share=0.0, delay=DELAY_SECONDS) as slow:
            os.environ.update(server.variables(slow.endpoint))
            client = boto3.session.Session().client("s3")
            client.create_bucket(Bucket="edits")
            rows = []
            for number in range(500):
                image = f"photos/{number}.png"
                client.put_object(Bucket="edits", Key=image, Body=picture(number))
                rows.append({"id": f"e{number}", "prompt": "make it blue", "image": f"s3://edits/{image}"})
            measure(folder, rows, "s3://edits/out", "edit")
    finally:
        os.kill(server.pid, 9)


def measure(folder: Path, rows: list[dict[str, Any]], output: str, task: str) -> None:
    """Runs a manifest of these rows and prints the occupancy."""
    manifest = folder / f"{task}.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path(os.environ[STEPS]).write_text("")
    config = RunConfig(str(manifest), output, task=task, slots=SLOTS, device="cpu")
    summary = run(config, replica=Counting)
    shard_rows = read_plan(output).parts[0].shard_rows
    steps = [tuple(map(int, line.split())) for line in (folder / "steps").read_text().splitlines()]
    full = [place for place, (used, of) in enumerate(steps) if used == of]
    between = steps[full[0] : full[-1] + 1]
    share = sum(used for used, _ in between) / sum(of for _, of in between)
    print(f"{task}: {summary.ok} of {summary.rows} rows ok, in shards of {shard_rows}, {SLOTS} slots")
    print(f"mean slot occupancy {share:.3f} in {len(between)} of {len(steps)} steps (bound {BOUND})")


if __name__ == "__main__":
    from tests.benchmarks import occupancy

    # Ray sends the class of the replicas by its name, which must not be that of this script.
    occupancy.main(sys.argv[1:] or ["generate", "edit"])
