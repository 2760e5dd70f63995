"""The end of a run: what must be there, and a manifest of what went wrong."""

import json

import pyarrow as pa
import pytest

from wallaroo.model.errors import InputError
from wallaroo.workflows.datasets.export_files import Results
from wallaroo.workflows.datasets.rows import OutputRows
from wallaroo.workflows.outputs import schema, shards, success
from wallaroo.workflows.plans.columns import GIVEN
from wallaroo.workflows.plans.finished import finished
from wallaroo.workflows.plans.plan import read_plan
from wallaroo.workflows.reports import finish as reports_finish
from wallaroo.workflows.reports.error_lines import manifest_row
from wallaroo.workflows.reports.status import status
from wallaroo.workflows.reports.verify import verify
from wallaroo.workflows.sources.embedded import parse_cell


def lines(output):
    return [json.loads(line) for line in (output / "errors.jsonl").read_text().splitlines()]


def two_shards(outputs, **changes):
    return [
        outputs.plan_table(rows=6, first_row=6 * shard, shard=shard, **changes.get(f"shard{shard}", {}))
        for shard in range(2)
    ]


def test_a_run_without_errors_ends_with_success(outputs, tmp_path):
    plan = outputs.make_output(tmp_path, two_shards(outputs))
    counts = reports_finish.finish(str(tmp_path), plan)
    assert (counts.rows, counts.ok, counts.errors) == (12, 12, {})
    assert lines(tmp_path) == []
    assert success.read_success(str(tmp_path)) == {
        "format": 1,
        "rows": 12,
        "ok": 12,
        "errors": {},
        "shards": 2,
        "parts": ["part-00000"],
    }


def test_errors_become_a_manifest_for_a_second_try(outputs, tmp_path):
    tables = two_shards(outputs, shard0={"errors": (0, 1)})
    plan = outputs.make_output(tmp_path, tables, failed={0: (3,), 1: (0,)})
    counts = reports_finish.finish(str(tmp_path), plan)
    assert (counts.rows, counts.ok, counts.errors) == (12, 8, {"size": 2, "engine": 2})
    whole, second, first = lines(tmp_path)
    # Both samples of p0 were refused alike: one line asks for both again, with their seeds.
    assert (whole["id"], whole["samples"], whole["seed"]) == ("p0", 2, 1000)
    assert (whole["kind"], whole["message"], whole["prompt"]) == ("size", "width is 70", "a cat, number 0")
    assert (whole["width"], whole["height"], whole["cfg"], whole["top_k"]) == (80, 64, 3.0, 1000)
    assert (whole["tag"], whole["include"]) == ("t0", [{"class": "cat"}])
    assert whole["when"].startswith("2026-01-01")
    # Of p1 only the second sample failed: it needs a name of its own.
    assert (second["id"], second["samples"], second["seed"]) == ("p1/1", 1, 1003)
    assert (first["id"], first["samples"], first["seed"]) == ("p3", 1, 1006)
    assert not {"row_id", "status", "image", "sha256", "error_type"} & set(whole)


def test_a_refused_row_is_as_its_manifest_gave_it(outputs, tmp_path):
    absent = dict.fromkeys(("seed", "width", "height", "temperature", "top_k", "top_p", "aspect_ratio"))
    given = {"cfg": "much", "language": "fr", "samples": 2}
    table = outputs.plan_table(rows=6, errors=(0, 1, 2, 3))
    texts = [json.dumps(given | absent)] * 2 + [json.dumps({"prompt": None, "cfg": 2.0} | absent)] * 2
    table = table.append_column(GIVEN, pa.array([*texts, None, None]))
    plan = outputs.make_output(tmp_path, [table], failed={0: (4,)})
    reports_finish.finish(str(tmp_path), plan)
    first, second, third = lines(tmp_path)
    told = {"kind": "size", "message": "width is 70"}
    carried = {"tag": "t0", "weight": 0.0, "when": "2026-01-01T00:00:00", "include": [{"class": "cat"}]}
    assert first == {"id": "p0", "prompt": "a cat, number 0"} | told | given | carried
    assert not {"prompt", "seed", "samples", "width"} & set(second)
    assert (second["id"], second["cfg"]) == ("p1", 2.0)
    # This one the plan did not refuse: it has its resolved values.
    assert (third["id"], third["kind"], third["seed"], third["samples"]) == ("p2", "engine", 1004, 1)


def test_seeds_that_came_from_the_id_are_left_to_come_from_it_again(outputs, tmp_path):
    tables = [outputs.plan_table(rows=2, errors=(0, 1))]
    plan = outputs.make_output(tmp_path, tables, edit=lambda row: row | {"seed": row["seed"] * 77})
    reports_finish.finish(str(tmp_path), plan)
    [line] = lines(tmp_path)
    assert (line["id"], line["samples"]) == ("p0", 2) and "seed" not in line


def test_rows_of_an_equal_id_are_not_taken_for_samples(outputs, tmp_path):
    tables = [outputs.plan_table(rows=3, errors=(0, 1, 2))]
    plan = outputs.make_output(tmp_path, tables, edit=lambda row: row | {"id": "same", "sample": 0})
    reports_finish.finish(str(tmp_path), plan)
    assert [(line["id"], line["samples"]) for line in lines(tmp_path)] == [("same", 1)] * 3


def test_samples_that_fail_alike_across_shards_are_one_line(outputs, tmp_path):
    tables = [outputs.plan_table(rows=2, first_row=2 * n, shard=n, errors=(0, 1)) for n in range(2)]
    edit = {"id": "p", "error_message": "no"}
    plan = outputs.make_output(tmp_path, tables, edit=lambda row: row | edit | {"sample": row["row_id"]})
    reports_finish.finish(str(tmp_path), plan)
    [line] = lines(tmp_path)
    assert (line["id"], line["samples"], line["seed"]) == ("p", 4, 1000)


def test_a_missing_file_or_row_ends_without_success(outputs, tmp_path):
    plan = outputs.make_output(tmp_path, two_shards(outputs), skip={1})
    with pytest.raises(InputError, match=r"lacks 1 of its shards, the first is shard-00000001\.parquet"):
        reports_finish.finish(str(tmp_path), plan)
    short = outputs.plan_table(rows=5, first_row=6, shard=1)
    shards.write_shard(str(tmp_path), 1, outputs.result_table(short))
    with pytest.raises(InputError, match="has 11 rows, but 12 were planned"):
        reports_finish.finish(str(tmp_path), plan)
    (tmp_path / "data" / "shard-00000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"shard-00000001\.parquet cannot be read"):
        reports_finish.finish(str(tmp_path), plan)
    assert success.read_success(str(tmp_path)) is None
    assert not (tmp_path / "errors.jsonl").exists()


def test_carried_columns_get_their_names_back(outputs):
    row = dict.fromkeys(schema.RESULT_NAMES) | {"id": "a", "error_type": "size", "error_message": "m"}
    row |= {
        "prompt": "now",
        "in_prompt": "then",
        "in_text": "caption",
        "in_house": 1,
        "kind": "mine",
        "raw": b"\x00",
    }
    row |= {"marked": '{"a": "\\ud800"}', "nan": float("nan"), "source": {"uri": "s3://b/k.png"}}
    carried = ["in_prompt", "in_text", "in_house", "kind", "raw", "marked", "nan"]
    fields = [(name, pa.string()) for name in [*schema.RESULT_NAMES, *carried]]
    line = manifest_row(row, pa.schema(fields, metadata={schema.JSON_MARK: b'["marked"]'}))
    assert line == {
        "id": "a",
        "kind": "size",
        "message": "m",
        "prompt": "now",
        "image": "s3://b/k.png",
        "in_prompt": "then",
        "text": "caption",
        "in_house": 1,
        "raw": "AA==",
        "marked": {"a": "\ud800"},
        "nan": None,
    }


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b'{"format": 2, "rows": 1}'])
def test_a_success_of_another_kind_is_one_sentence(tmp_path, content):
    (tmp_path / "_SUCCESS").write_bytes(content)
    with pytest.raises(InputError, match="_SUCCESS"):
        success.read_success(str(tmp_path))


@pytest.mark.parametrize("task", ["edit", "understand"])
def test_errors_of_a_task_with_pictures_name_the_picture_again(outputs, tmp_path, task):
    plan = outputs.make_task_output(tmp_path / "out", task, bad=(2, 3), failed=(5,))
    counts = reports_finish.finish(str(tmp_path / "out"), plan)
    assert (counts.ok, counts.errors) == (3, {"image": 2, "engine": 1})
    first, last = lines(tmp_path / "out")
    assert (first["id"], first["samples"], first["kind"]) == ("p1", 2, "image")
    assert first["image"] == f"{tmp_path}/sources/s1.png" and "does not exist" in first["message"]
    assert (last["id"], last["kind"], last["image"]) == ("p2/1", "engine", f"{tmp_path}/sources/s2.png")
    # Sizes follow from the picture; a manifest of these tasks has none.
    assert not {"width", "height", "source", "text"} & (set(first) | set(last))
    assert counts.folders == {str(tmp_path / "sources") + "/": 3}
    assert counts.sizes == ({(64, 48): 3} if task == "edit" else {})


def test_a_picture_within_a_file_is_named_by_its_row(outputs, tmp_path):
    within = lambda n: {"source": {"uri": "s3://b/data/shard-00000003.parquet", "row_id": 800 + n}}  # noqa: E731
    plan = outputs.make_task_output(tmp_path / "out", "edit", failed=(1,), more=within)
    reports_finish.finish(str(tmp_path / "out"), plan)
    [line] = lines(tmp_path / "out")
    assert line["image"] == "s3://b/data/shard-00000003.parquet#801"
    assert parse_cell(line["image"]) == ("s3://b/data/shard-00000003.parquet", 801)


def test_finished_means_the_same_for_all_who_ask(outputs, tmp_path):
    """From the first part of a new round on, an output is unfinished until that round has ended."""
    output = str(tmp_path / "out")
    later = [outputs.plan_table(rows=4, first_row=12, shard=2)]

    def answers():
        try:
            OutputRows(output)
            selects = True
        except InputError as error:
            assert "is not finished" in str(error)
            selects = False
        try:
            Results(output)
            exports = True
        except InputError as error:
            assert "is not finished" in str(error)
            exports = False
        verdict = verify(output, lambda line: None).state
        found = {finished(output) is not None, status(output).state == "finished", verdict == "complete"}
        [answer] = found | {selects, exports, finished(output, read_plan(output)) is not None}
        return answer

    plan = outputs.make_output(output, two_shards(outputs))
    assert not answers()
    reports_finish.finish(output, plan)
    assert answers()
    # A round is planned, in part, in whole, made, and ended.
    outputs.write_plan(output, later, complete=False)
    assert not answers()
    part = tmp_path / "out" / "plan" / "part-00001.json"
    part.write_text(part.read_text().replace('"complete": false', '"complete": true'))
    assert not answers()
    shards.write_shard(output, 2, outputs.result_table(later[0]))
    assert not answers()
    reports_finish.finish(output, read_plan(output))
    assert answers()
