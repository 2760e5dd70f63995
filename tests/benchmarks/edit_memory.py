"""Resident memory of a run on 2,000 rows that name 20 JPEG files of 24 megapixels.

    python -m tests.benchmarks.edit_memory [edit|understand]

Summed over all processes of the run, less that of an idle Ray; the bound is 5 GiB. Shared pages are counted
once for each process that maps them, so the true number is smaller.
"""

import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROWS, FILES, WIDTH, HEIGHT = 2000, 20, 6000, 4000
BOUND = 5 << 30


def resident() -> int:
    """Bytes of this process and all below it."""
    import psutil

    total = 0
    mine = psutil.Process()
    for one in [mine, *mine.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def main() -> None:
    task = sys.argv[1] if len(sys.argv) > 1 else "edit"
    with tempfile.TemporaryDirectory(prefix="memory-", dir="/tmp") as name:
        folder = Path(name)
        noise = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
        for number in range(FILES):
            image = Image.fromarray(np.roll(noise, number, axis=0)).resize((WIDTH, HEIGHT))
            image.save(folder / f"{number}.jpg", quality=90)
        rows = [{"prompt": f"make it {n}", "image": str(folder / f"{n % FILES}.jpg")} for n in range(ROWS)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        measure(folder, task)


def measure(folder: Path, task: str) -> None:
    """Runs the rows and prints the largest memory seen."""
    from wallaroo.workflows.cluster import connected
    from wallaroo.workflows.runs.driver import run
    from wallaroo.workflows.settings import RunConfig

    with connected(cpus=2):
        time.sleep(5)
        idle, peak, over = resident(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not over.wait(0.1):
                peak = max(peak, resident())

        watching = threading.Thread(target=watch)
        watching.start()
        more = {"max_new_tokens": 4} if task == "understand" else {}
        config = RunConfig(
            str(folder / "rows.jsonl"),
            str(folder / "out"),
            task=task,
            device="cpu",
            **more,  # type: ignore[arg-type]
        )
        summary = run(config)
        over.set()
        watching.join()
    print(f"{task}: {summary.ok} of {summary.rows} rows, {FILES} files of {WIDTH} x {HEIGHT} pixels")
    more_than_idle, bound = (peak - idle) / 2**30, BOUND / 2**30
    print(f"resident memory {more_than_idle:.2f} GiB more than an idle Ray (bound {bound:.0f} GiB)")


if __name__ == "__main__":
    main()
