"""An output of version 0.1.0 is read, resumed and verified."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from wallaroo.workflows.outputs.layout import (
    DATA_FOLDER,
    ERRORS_FILE,
    SUCCESS_FILE,
    shard_path,
    unreadable_path,
)
from wallaroo.workflows.outputs.schema import VOLATILE
from wallaroo.workflows.reports.status import status
from wallaroo.workflows.reports.verify import verify
from wallaroo.workflows.runs.driver import run
from wallaroo.workflows.settings import RunConfig

OLD = Path(__file__).parent / "output_0_1_0"


@pytest.fixture
def old(tmp_path):
    """The configuration of a run on a copy of a finished output."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    return RunConfig(str(tmp_path / "prompts.jsonl"), str(tmp_path / "output"), slots=8)


def rows(config):
    """The rows of `data/`, in order."""
    return pq.read_table(f"{config.output}/{DATA_FOLDER}").to_pylist()


def test_an_old_output_is_complete(old):
    found = verify(old.output)
    assert (found.state, found.rows, found.ok, found.errors) == ("complete", 19, 18, {"prompt": 1})
    assert status(old.output).state == "finished"


def test_an_old_output_that_was_cut_off_is_resumed(old, local_ray):
    before = rows(old)
    Path(shard_path(old.output, 1)).write_bytes(b"")
    for name in (SUCCESS_FILE, ERRORS_FILE):
        (Path(old.output) / name).unlink()
    summary = run(old)
    assert (summary.rows, summary.ok, summary.before) == (19, 18, 11)
    assert Path(unreadable_path(old.output, 1)).read_bytes() == b""
    assert verify(old.output).state == "complete"
    after = rows(old)
    # What depends on the CPU and on versions of libraries may differ in the shard that was made again.
    rounded = {*VOLATILE, "image", "sha256", "environment_digest", "content_digest"}
    assert [{name: row[name] for name in row if name not in rounded} for row in after] == [
        {name: row[name] for name in row if name not in rounded} for row in before
    ]
    errors = [json.loads(line) for line in (Path(old.output) / ERRORS_FILE).read_text().splitlines()]
    assert [(row["id"], row["topic"]) for row in errors] == [("bad", "refused")]
