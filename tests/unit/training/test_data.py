"""Rows to train on: their order, and where they come from."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.documents import ROOT, blocks
from tests.unit.training.cases import picture, recipe
from wallaroo.model.checkpoint import TINY
from wallaroo.model.errors import InputError
from wallaroo.model.training.data import shuffled
from wallaroo.workflows.training.rows import _fitting, find, needed


def test_every_row_once_an_epoch():
    seen = np.concatenate([shuffled(10, first, 4, 3) for first in range(0, 20, 4)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])


OUTPUT = {
    "status": ["ok", "error", "ok"],
    "task": ["generate"] * 3,
    "prompt": ["a cat", "a dog", "红色圆形"],
    "image": [{"bytes": picture(0, 64, 64), "path": "a"}, None, {"bytes": picture(1, 64, 64), "path": "b"}],
}


def test_an_output_is_data_to_generate(tmp_path):
    """Its pictures are in another column, and rows with errors have none."""
    pq.write_table(pa.table(OUTPUT), tmp_path / "part.parquet")
    made = recipe(base=str(TINY))
    [path] = find({"generate": str(tmp_path)}, made)["generate"]
    rows = _fitting(pq.read_table(path), "generate", made).to_pylist()
    wanted = [(OUTPUT["prompt"][index], OUTPUT["image"][index]["bytes"]) for index in (0, 2)]
    assert [(row["prompt"], row["picture"]) for row in rows] == wanted
    assert [row["language"] for row in rows] == ["en", "zh"]


def test_rows_of_another_task_are_no_data_to_generate(tmp_path):
    """Neither those of an output of edit, nor questions about pictures, which have an image too."""
    table = pa.table(OUTPUT | {"task": ["edit"] * 3})
    assert _fitting(table, "generate", recipe(base=str(TINY))).num_rows == 0
    with pytest.raises(InputError, match="The column picture is empty in rows of generate"):
        needed(pa.table(OUTPUT), "generate")
    pq.write_table(table.drop_columns("status"), tmp_path / "part.parquet")
    with pytest.raises(InputError, match="has no column picture, which rows of generate need"):
        find({"generate": str(tmp_path)}, recipe())


def test_the_rows_of_a_folder_with_captions_are_data_to_generate(tmp_path, monkeypatch):
    """By the program in docs/training.md, whose file is the data of lora.toml."""
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for name, caption in (("a", "a red circle\n"), ("b", "红色圆形")):
        Path(f"pictures/{name}.jpg").write_bytes(picture(ord(name), 64, 96))
        Path(f"pictures/{name}.txt").write_text(caption, encoding="utf-8")
    [program] = [one for one in blocks(ROOT / "docs" / "training.md") if one.language == "python"]
    exec(compile(program.text, program.where, "exec"), {})
    [data] = re.findall(r'^data.generate = "(.*)"$', (ROOT / "jobs/train/lora.toml").read_text(), re.M)
    [path] = find({"generate": data}, recipe())["generate"]
    rows = _fitting(pq.read_table(path), "generate", recipe(base=str(TINY))).to_pylist()
    assert [(row["prompt"], row["language"]) for row in rows] == [("a red circle", "en"), ("红色圆形", "zh")]
    assert [row["picture"] for row in rows] == [picture(ord(name), 64, 96) for name in "ab"]
