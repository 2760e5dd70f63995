"""What a viewer says of a real run: the command on the page of a row makes the same picture again."""

import json
import shlex
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from wallaroo.workflows.outputs import layout
from wallaroo.workflows.viewer import again
from wallaroo.workflows.viewer.index import Index
from wallaroo.workflows.viewer.output import Output


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def run(command, folder):
    """Does what a shell does with lines that begin with `wallaroo`."""
    wallaroo = shlex.join([sys.executable, "-m", "wallaroo.jobs.cli"])
    lines = command.replace("\nwallaroo ", f"\n{wallaroo} ")
    done = subprocess.run(["bash", "-c", lines], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_command_of_a_row_makes_its_picture_again(tmp_path):
    rows = [
        {
            "id": "red",
            "prompt": "a red circle\non a 'white' background",
            "width": 64,
            "height": 96,
            "cfg": 2.5,
        },
        {"id": "blue", "prompt": "a blue square", "samples": 2, "temperature": 0.9},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--image-format jpeg --image-quality 80 --seed 5 --top-k 50 --cfg-interval 0:0.75"
    template = "Draw: {prompt}"
    first = f"\nwallaroo generate rows.jsonl out/first {options} --template-en {shlex.quote(template)}"
    run(first, tmp_path)
    path = str(tmp_path / "out" / "first")
    index = Index([path])
    try:
        output = Output(0, path, index)
        row = output.row(0, 2)
        assert (row["id"], row["sample"]) == ("blue", 1)
        run(again.recipe(output, row).command, tmp_path)
        assert [(step.kind, step.where) for step in again.lineage(output, row)] == [
            ("manifest", str(tmp_path / "rows.jsonl"))
        ]
    finally:
        index.close()
    made = pq.read_table(layout.shard_path(str(tmp_path / "out" / "again"), 0)).to_pylist()
    assert len(made) == 1 and made[0]["seed"] == row["seed"]
    assert made[0]["content_digest"] == row["content_digest"]
    assert made[0]["environment_digest"] == row["environment_digest"]
    assert made[0]["sha256"] == row["sha256"]
