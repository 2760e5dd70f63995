"""What the embedded model makes of drawn scenes that it never saw, by the checker."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wallaroo.model.checkpoint import TINY, load_config
from wallaroo.workflows.runs.driver import run
from wallaroo.workflows.scenes.captions import examples
from wallaroo.workflows.scenes.evaluate import evaluate
from wallaroo.workflows.scenes.write import to_values
from wallaroo.workflows.settings import RunConfig

RIGHT = {"generate": 33, "edit": 30, "understand": 36}
"""How many of 40 rows must be right at least."""


@pytest.mark.parametrize("task", RIGHT)
def test_scenes_come_out_right(task, tmp_path, local_ray):
    kinds = list(examples(40, 11, load_config(TINY).size_list(), True, (task,)))
    rows = [to_values(example, f"{task}-{number}") for number, example in enumerate(kinds)]
    for row in rows:
        if "image" in row:
            row["image"] = {"bytes": row["image"], "path": None}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    summary = run(RunConfig(task=task, manifest=str(tmp_path / "rows.parquet"), output=str(tmp_path / "out")))
    assert (summary.ok, summary.errors) == (40, 0)
    table = [line for line in evaluate(str(tmp_path / "out")) if (line.language, line.size) == ("all", "all")]
    assert sum(line.rows for line in table) == 40
    assert sum(line.right["right"][0] for line in table) >= RIGHT[task], table
