"""Rows that a plan refuses, as `wallaroo plan` shows and writes them."""

import json

import pytest

from wallaroo.jobs.commands import run
from wallaroo.model.errors import InputError
from wallaroo.workflows.plans.plan import read_plan
from wallaroo.workflows.reports.refused import first_of_each_kind, refused_rows


def planned(outputs, folder, kinds):
    """A plan of six rows a shard, two samples an id, of which those in `kinds` (id -> kind) are refused."""
    for shard in range(2):
        table = outputs.plan_table(rows=6, first_row=6 * shard, shard=shard)
        rows = table.to_pylist()
        for row in rows:
            if row["id"] in kinds:
                kind = kinds[row["id"]]
                row |= {"status": "error", "error_type": kind, "error_message": f"{kind} is wrong."}
        outputs.write_plan(folder, [type(table).from_pylist(rows, schema=table.schema)])
    return read_plan(str(folder))


def test_each_refused_row_is_told_once_with_its_place(outputs, tmp_path):
    plan = planned(outputs, tmp_path, {"p1": "size", "p4": "seed", "p5": "size"})
    found = list(refused_rows(str(tmp_path), plan, "generate"))
    assert [(row.id, row.kind, row.message, row.samples) for row in found] == [
        ("p1", "size", "size is wrong.", 2),
        ("p4", "seed", "seed is wrong.", 2),
        ("p5", "size", "size is wrong.", 2),
    ]
    # Each of the two rounds has a manifest row for every planned row; it takes them in order.
    assert [row.number for row in found] == [1, 1, 2]
    assert found[0].text() == "row 1, id p1: size is wrong."
    line = found[0].line
    assert (line["id"], line["kind"], line["message"]) == ("p1", "size", "size is wrong.")
    assert (line["prompt"], line["tag"]) == ("a cat, number 2", "t2")


def test_few_are_shown_and_all_are_written(outputs, tmp_path):
    kinds = {f"p{n}": "size" for n in range(5)} | {"p5": "seed"}
    plan = planned(outputs, tmp_path / "out", kinds)
    rows = refused_rows(str(tmp_path / "out"), plan, "generate")
    shown = first_of_each_kind(rows, str(tmp_path / "bad.jsonl"))
    assert {kind: [row.id for row in few] for kind, few in shown.items()} == {
        "size": ["p0", "p1", "p2"],
        "seed": ["p5"],
    }
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(line["id"], line["row"], line["samples"]) for line in lines] == [
        ("p0", 0, 2),
        ("p1", 1, 2),
        ("p2", 2, 2),
        ("p3", 0, 2),
        ("p4", 1, 2),
        ("p5", 2, 2),
    ]
    words = run._plan_text(plan, {kind: [row.text() for row in few] for kind, few in shown.items()})
    assert words.splitlines()[-4:] == [
        "  error rows of kind size: 12",
        "    row 0, id p0: size is wrong.",
        "    row 1, id p1: size is wrong.",
        "    row 2, id p2: size is wrong.",
    ]


def test_a_plan_whose_file_is_gone_is_one_sentence(outputs, tmp_path):
    plan = planned(outputs, tmp_path, {"p0": "size"})
    (tmp_path / "plan" / plan.parts[0].file).unlink()
    with pytest.raises(InputError, match=r"part-00000-test\.parquet is missing, but part-00000\.json"):
        list(refused_rows(str(tmp_path), plan, "generate"))
