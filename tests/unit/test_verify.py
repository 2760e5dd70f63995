"""The verdict on outputs that are whole, half-made, or tampered with."""

import io
import json
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from wallaroo.jobs.cli import main
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs import layout, shards
from wallaroo.workflows.outputs.summary_files import read_lines, write_lines
from wallaroo.workflows.reports import summaries
from wallaroo.workflows.reports.finish import finish
from wallaroo.workflows.reports.tally import tally_of_table
from wallaroo.workflows.reports.verify import MAX_FAULTS, verify


@pytest.fixture
def whole(outputs, tmp_path):
    """A finished output of three shards with error rows of both kinds, and a NaN in a carried column."""
    tables = [
        outputs.plan_table(rows=40, first_row=0, shard=0, errors=(1,)),
        outputs.plan_table(rows=40, first_row=40, shard=1),
        outputs.plan_table(rows=5, first_row=80, shard=2),
    ]
    nan = {"weight": float("nan")}
    plan = outputs.make_output(tmp_path, tables, failed={1: (2, 3)}, edit=lambda row: row | nan)
    finish(str(tmp_path), plan)
    return tmp_path


def judged(output, **options):
    said = []
    return verify(str(output), said.append, **options), said


def rewrite(output, shard, change):
    """Replaces a file by one whose rows `change` has had its way with."""
    table = pq.read_table(layout.shard_path(str(output), shard))
    rows = table.to_pylist()
    change(rows)
    data = shards.shard_bytes(pa.Table.from_pylist(rows, schema=table.schema))
    Path(layout.shard_path(str(output), shard)).write_bytes(data)


def test_a_whole_output_is_complete(whole):
    verdict, said = judged(whole)
    assert verdict.state == "complete" and verdict.faults == 0
    assert (verdict.planned, verdict.rows, verdict.ok) == (85, 85, 82)
    assert verdict.errors == {"engine": 2, "size": 1}
    [sentence] = said
    assert sentence.startswith(f"{whole} is complete: 85 of 85 rows, 82 ok, 3 error rows (2 engine, 1 size)")


def test_missing_files_are_incomplete(whole):
    (whole / "_SUCCESS").unlink()
    (whole / "data" / "shard-00000001.parquet").unlink()
    verdict, said = judged(whole)
    assert (verdict.state, verdict.missing_shards, verdict.rows) == ("incomplete", 1, 45)
    assert "1 of 3 files are missing" in said[-1] and "Re-run its command to resume" in said[-1]


def test_all_rows_without_success_are_incomplete(whole):
    (whole / "_SUCCESS").unlink()
    verdict, said = judged(whole)
    assert verdict.state == "incomplete" and "all rows exist, but _SUCCESS is missing or outdated" in said[-1]


def test_a_plan_that_went_on_is_incomplete(whole, outputs):
    outputs.write_plan(whole, [outputs.plan_table(rows=4, first_row=85, shard=3)])
    verdict, said = judged(whole)
    assert (verdict.state, verdict.planned) == ("incomplete", 89)
    outputs.write_plan(whole, [outputs.plan_table(rows=4, first_row=89, shard=4)], complete=False)
    verdict, said = judged(whole)
    assert verdict.state == "incomplete" and "its plan is not finished" in said[-1]


def test_success_must_not_claim_what_is_gone(whole):
    (whole / "data" / "shard-00000001.parquet").unlink()
    verdict, said = judged(whole)
    assert verdict.state == "broken" and "the first is shard-00000001.parquet" in said[0]


def test_success_must_count_right(whole):
    text = (whole / "_SUCCESS").read_text()
    (whole / "_SUCCESS").write_text(text.replace('"ok": 82', '"ok": 83').replace('"rows": 85', '"rows": 84'))
    verdict, said = judged(whole)
    assert verdict.state == "broken" and verdict.faults == 2
    assert any("84 rows" in sentence for sentence in said) and any(
        "ok is 83" in sentence for sentence in said
    )


def picture_of(width, height):
    sink = io.BytesIO()
    Image.new("RGB", (width, height)).save(sink, "PNG")
    return sink.getvalue()


def put_picture(row, data):
    import hashlib

    row["image"]["bytes"] = data
    row["sha256"] = hashlib.sha256(data).hexdigest()


TAMPERINGS = {
    "sha256": (lambda rows: rows[4].update(sha256="0" * 64), "row_id 44: its image has another sha256"),
    "size": (
        lambda rows: put_picture(rows[4], picture_of(32, 32)),
        "row_id 44: its image is 32x32, but 64x64 is stated",
    ),
    "cut": (
        lambda rows: put_picture(rows[4], rows[4]["image"]["bytes"][:3000]),
        "row_id 44: its image does not decode",
    ),
    "html": (lambda rows: put_picture(rows[4], b"<html>"), "row_id 44: its image does not decode"),
    "empty": (lambda rows: rows[4].update(image=None), "row_id 44: it is ok, but has no image"),
    "mime": (lambda rows: rows[4].update(mime_type="image/webp"), "'image/webp' is stated"),
    "status": (lambda rows: rows[4].update(status="fine"), "its status is 'fine'"),
    "ok with an error": (lambda rows: rows[4].update(error_type="size"), "it is ok, but has an error"),
    "error with an image": (
        lambda rows: rows[2].update(image=rows[3]["image"] or rows[4]["image"]),
        "but has an im",
    ),
    "error without a kind": (lambda rows: rows[2].update(error_type=""), "error row without a kind"),
    "seed": (lambda rows: rows[4].update(seed=1), "seed is 1, but 1044 was planned"),
    "prompt": (lambda rows: rows[4].update(prompt="x" * 99), "but 'a cat, number 44' was planned"),
    "run": (lambda rows: rows[4].update(config_digest="0" * 64), "config_digest is not that of run.json"),
    "carried": (lambda rows: rows[4].update(tag="other"), "other values in the carried column 'tag'"),
    "double": (lambda rows: rows[4].update(row_id=43), "has row_id 43 where 44 was planned"),
    "order": (lambda rows: rows.reverse(), "has row_id 79 where 40 was planned"),
    "lost": (lambda rows: rows.pop(), "has 39 rows, but 40 were planned"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_whatever_is_tampered_with_is_found(whole, name):
    change, words = TAMPERINGS[name]
    rewrite(whole, 1, change)
    verdict, said = judged(whole)
    assert verdict.state == "broken"
    assert any(words in sentence for sentence in said), said


def test_a_planned_error_row_cannot_be_ok(whole):
    def change(rows):
        rows[1] = rows[0] | {"row_id": 1, "sample": 1, "seed": 1001, "prompt": "a cat, number 1", "tag": "t1"}

    rewrite(whole, 0, change)
    verdict, said = judged(whole)
    assert verdict.state == "broken" and "row_id 1: it is ok, but was planned as an error row" in said[0]


@pytest.mark.parametrize("keep", [0, 4, 5000])
def test_a_cut_file_is_broken(whole, keep):
    path = whole / "data" / "shard-00000000.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    verdict, said = judged(whole)
    assert verdict.state == "broken" and f"{path} cannot be read" in said[0]


def test_a_flipped_bit_is_found(whole):
    path = whole / "data" / "shard-00000000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert judged(whole)[0].state == "broken"


def test_another_schema_is_broken(whole):
    path = whole / "data" / "shard-00000000.parquet"
    table = pq.read_table(path)
    for other, words in (
        (table.drop_columns(["tag"]), "column 'tag' is missing"),
        (table.append_column("more", table.column("id")), "column 'more' is not known"),
        (table.select(table.column_names[::-1]), "another order"),
        (
            table.set_column(0, "row_id", table.column("row_id").cast(pa.int32())),
            "'row_id' is int32, not int64",
        ),
        (table.replace_schema_metadata({}), "metadata differs"),
    ):
        pq.write_table(other, path)
        verdict, said = judged(whole)
        assert verdict.state == "broken" and words in said[0]


def test_stray_files_are_named(whole):
    (whole / "data" / "notes.txt").write_text("mine")
    verdict, said = judged(whole)
    assert verdict.state == "complete" and re.search("notes.txt.*it is ignored", said[0])
    stray = whole / "data" / "shard-00000003.parquet"
    stray.write_bytes((whole / "data" / "shard-00000002.parquet").read_bytes())
    verdict, said = judged(whole)
    assert verdict.state == "broken" and any(f"{stray} is not in the plan" in words for words in said)


def test_of_many_faults_the_first_are_told(whole):
    def change(rows):
        for row in rows:
            row["config_digest"] = "0"

    rewrite(whole, 0, change)
    verdict, said = judged(whole)
    assert verdict.faults == 40 and len(said) == MAX_FAULTS + 2
    assert said[-2] == "20 more faults are not shown." and "40 faults" in said[-1]


def test_a_folder_that_is_no_output_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="there is no such folder, or it is empty"):
        verify(str(tmp_path))


def test_each_file_is_opened_once_and_progress_is_told(whole, monkeypatch):
    opens, told = Counter(), []
    for module, name in ((storage, "read_bytes"), (storage, "open_ranges")):
        plain = getattr(module, name)

        def counting(path, *rest, plain=plain):
            opens[path.removeprefix(f"{whole}/")] += 1
            return plain(path, *rest)

        monkeypatch.setattr(module, name, counting)
    verdict, _ = judged(whole, on_progress=told.append)
    assert verdict.state == "complete"
    wanted = [f"data/shard-{n:08d}.parquet" for n in range(3)] + ["plan/part-00000-test.parquet"]
    assert {path: opens[path] for path in wanted} == dict.fromkeys(wanted, 1)
    assert [(one.rows, one.done, one.errors) for one in told] == [(85, 40, 1), (85, 80, 3), (85, 85, 3)]
    spans = [one.seconds for one in told]
    assert spans[0] > 0 and spans == sorted(spans)
    told.clear()
    judged(whole, on_progress=told.append, fast=True)
    assert [(one.rows, one.done, one.errors) for one in told] == [(85, 85, 3)] and told[0].seconds > 0


def test_a_footer_that_counts_otherwise_is_a_fault(whole):
    path = layout.shard_path(str(whole), 1)
    table = pq.read_table(path)
    found = tally_of_table(table, 1)
    shards.write_shard(str(whole), 1, table, found.to_json())
    assert judged(whole)[0].state == "complete"
    found.tally.environments["f" * 64] = 1
    for tally in (found.to_json(), b"{}", b"[", b"\xff"):
        shards.write_shard(str(whole), 1, table, tally)
        verdict, said = judged(whole)
        assert (
            verdict.state == "broken"
            and f"the counts in the footer of {path} do not match its rows" in said[0]
        )


@pytest.mark.parametrize("name", ["part-00000", "all"])
def test_a_summary_that_counts_otherwise_is_a_fault(whole, name):
    lines = read_lines(str(whole), name)
    values = lines[0][2]["tally"] if name == "part-00000" else lines[0][2]
    values["ok"] -= 1
    values["errors"]["crash"] = 1
    write_lines(str(whole), name, [json.dumps(line).encode() for line in lines])
    verdict, said = judged(whole)
    assert verdict.state == "broken" and layout.summary_path(str(whole), name) in said[0]
    assert "move the folder summaries elsewhere" in said[0]


def test_a_fast_look_opens_no_file_that_a_summary_covers(whole, monkeypatch):
    opened = []
    plain = summaries.open_shard
    monkeypatch.setattr(summaries, "open_shard", lambda *rest: opened.append(rest[1]) or plain(*rest))
    full, _ = judged(whole)
    verdict, said = judged(whole, fast=True)
    assert verdict == full and not opened
    [sentence] = said
    assert "is complete by names, sizes and counts: 85 of 85 rows, 82 ok" in sentence
    assert "Not checked: images, texts" in sentence and "without --fast" in sentence
    # What is in a picture it does not see; a file of another size or time is opened, and counted anew.
    rewrite(whole, 1, lambda rows: rows[4].update(prompt="other"))
    verdict, said = judged(whole, fast=True)
    assert verdict.state == "complete" and opened == [1]
    assert said[0] == "No current summary covers 1 file; footers were read instead."
    rewrite(whole, 1, lambda rows: rows.pop())
    verdict, said = judged(whole, fast=True)
    assert verdict.state == "broken" and any("has 39 rows, but 40 were planned" in words for words in said)
    Path(layout.shard_path(str(whole), 1)).write_bytes(b"PAR1")
    verdict, said = judged(whole, fast=True)
    assert verdict.state == "broken" and "shard-00000001.parquet cannot be read" in said[0]
    Path(layout.shard_path(str(whole), 1)).unlink()
    verdict, said = judged(whole, fast=True)
    assert verdict.state == "broken" and verdict.missing_shards == 1
    (whole / "_SUCCESS").unlink()
    verdict, said = judged(whole, fast=True)
    assert verdict.state == "incomplete" and "1 of 3 files are missing" in said[-1]


def test_the_command_looks_fast_too(whole, capsys):
    def code(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["verify", str(whole), *arguments])
        return ended.value.code

    assert code("--fast") == 0
    assert "Not checked" in capsys.readouterr().out
    rewrite(whole, 1, lambda rows: rows[4].update(prompt="other"))
    assert code("--fast") == 0 and code() == 1


@pytest.mark.parametrize("change", ["absent", "corrupt", "few"])
def test_a_plan_that_cannot_be_read_is_one_sentence(whole, change):
    path = whole / "plan" / "part-00000-test.parquet"
    if change == "absent":
        path.unlink()
    elif change == "corrupt":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        pq.write_table(pq.read_table(path), path)
    with pytest.raises(
        InputError, match=r"part-00000-test\.parquet is (missing|corrupt), but part-00000\.json"
    ):
        judged(whole)


@pytest.mark.parametrize("task", ["edit", "understand"])
def test_tasks_with_sources_are_verified_too(outputs, tmp_path, task):
    output = tmp_path / "out"
    plan = outputs.make_task_output(output, task, bad=(1,), failed=(3,))
    finish(str(output), plan)
    verdict, said = judged(output)
    assert (verdict.state, verdict.ok, verdict.errors) == ("complete", 4, {"image": 1, "engine": 1}), said
    path = output / "data" / "shard-00000000.parquet"
    kept = path.read_bytes()
    tamperings = [
        (lambda row: row["source"].update(row_id=77), "source.row_id is 77, but None was planned"),
        (lambda row: row["source"].update(sha256=""), "its source lacks one of sha256"),
        (lambda row: row.update(task="generate"), "which is not that of run.json"),
    ]
    if task == "understand":
        tamperings += [
            (lambda row: row.update(text="other"), "its text has another sha256"),
            (lambda row: row.update(mime_type="image/png"), "its result is a text, but it has an image"),
        ]
    for change, words in tamperings:
        rewrite(output, 0, lambda rows, change=change: change(rows[0]))
        verdict, said = judged(output)
        assert verdict.state == "broken" and any(words in sentence for sentence in said), said
        path.write_bytes(kept)


def test_the_card_is_no_stray_file(whole):
    assert (whole / "README.md").exists()
    verdict, said = judged(whole)
    assert verdict.state == "complete" and len(said) == 1
