"""Slots in use while 500 edits come from an S3 endpoint that takes 30 ms longer for every answer.

    python -m tests.benchmarks.edit_occupancy

Counted by the engine itself, step by step, from the first step with all slots in use to the last; the bound
is 0.9. Sources are PNG files of their own, one a row.
"""

import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from actors.replica import Replica
from tests import conftest
from tests.s3_proxy import proxy

ROWS, SLOTS, DELAY_SECONDS, BOUND = 500, 16, 0.03, 0.9
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


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="occupancy-", dir="/tmp"))
    weed = str(Path(sys.executable).with_name("weed"))
    server = conftest._start(weed, folder / "weed")
    if server is None:
        sys.exit("SeaweedFS does not start.")
    try:
        with proxy(server.endpoint, share=0.0, delay=DELAY_SECONDS) as slow:
            os.environ.update(server.variables(slow.endpoint))
            os.environ[STEPS] = str(folder / "steps")
            measure(folder)
    finally:
        os.kill(server.pid, 9)
        shutil.rmtree(folder, ignore_errors=True)


def measure(folder: Path) -> None:
    """Runs the edits and prints the occupancy."""
    import boto3

    from workflows.pipeline import run
    from workflows.run_config import RunConfig

    client = boto3.session.Session().client("s3")
    client.create_bucket(Bucket="edits")
    rows = []
    for number in range(ROWS):
        client.put_object(Bucket="edits", Key=f"photos/{number}.png", Body=picture(number))
        rows.append(
            {"id": f"e{number}", "prompt": "make it blue", "image": f"s3://edits/photos/{number}.png"}
        )
    (folder / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig(str(folder / "edits.jsonl"), "s3://edits/out", task="edit", slots=SLOTS, device="cpu")
    summary = run(config, replica=Counting)
    steps = [tuple(map(int, line.split())) for line in (folder / "steps").read_text().splitlines()]
    full = [place for place, (used, of) in enumerate(steps) if used == of]
    between = steps[full[0] : full[-1] + 1]
    share = sum(used for used, _ in between) / sum(of for _, of in between)
    print(
        f"{summary.ok} of {summary.rows} edits, {SLOTS} slots, {DELAY_SECONDS * 1000:.0f} ms more an answer"
    )
    print(f"mean slot occupancy {share:.3f} in {len(between)} of {len(steps)} steps (bound {BOUND})")


if __name__ == "__main__":
    from tests.benchmarks import edit_occupancy

    # Ray sends the class of the replicas by its name, which must not be that of this script.
    edit_occupancy.main()
