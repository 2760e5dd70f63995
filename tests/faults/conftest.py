"""What the tests of this folder break: rows, and the undisturbed run that each of them is compared with."""

import os

import pytest

from tests.e2e.test_generate import read_data, write_jsonl
from wallaroo.workflows.runs.driver import run
from wallaroo.workflows.settings import RunConfig

ROUNDS = int(os.environ.get("KILL_ROUNDS", "3"))
"""Kills at random moments; `make soak` has more."""

# More rounds want more rows, or most of them find nothing left to do.
COPIES = max(1, ROUNDS // 5)

REFUSED = {"id": "blank", "prompt": " "}
ROWS = [
    {"id": f"p{number:02d}-{copy}", "prompt": f"a cat, {number}", "seed": number + 100 * copy}
    | {"temperature": 3.0, "width": 64, "height": 128}
    for copy in range(COPIES)
    for number in range(24)
]


@pytest.fixture(scope="session")
def base(tmp_path_factory, local_ray):
    """The configuration of an undisturbed run, in which one row is refused, and its rows."""
    folder = tmp_path_factory.mktemp("base")
    config = RunConfig(
        manifest=write_jsonl(folder / "prompts.jsonl", [*ROWS, REFUSED]),
        output=str(folder / "out"),
        slots=8,
        device="cpu",
    )
    summary = run(config)
    assert (summary.ok, summary.errors) == (len(ROWS), 1)
    return config, read_data(config.output)
