"""The time line of a run on a cluster that Ray's autoscaler takes from no GPU node to four and back.

python -m tests.benchmarks.autoscaling
"""

import tempfile
from pathlib import Path

from tests.autoscaling import watched_run


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        line = watched_run(Path(folder), f"{folder}/out", lambda words: print(words, flush=True))
    print(
        f"at most {line.most} GPU nodes at once, {len(line.nodes)} in all, {len(line.after_kill)} after the "
        f"loss of one, {line.left} at the end"
    )


if __name__ == "__main__":
    main()
