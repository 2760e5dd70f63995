"""Every command that writes, told to write where files of others lie: it refuses, names one, changes none."""

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.test_export import make, planned
from tests.unit.test_user_files import contents, fill, run
from wallaroo.model.checkpoint import TINY, load_config
from wallaroo.model.errors import InputError
from wallaroo.workflows.datasets.export import FORMATS, export
from wallaroo.workflows.outputs import shards
from wallaroo.workflows.reports.finish import finish
from wallaroo.workflows.scenes.captions import examples
from wallaroo.workflows.scenes.write import to_values
from wallaroo.workflows.viewer.votes import Key, Votes

THEIRS = {
    "README.md": "my project",
    "report.html": "<p>mine",
    "errors.jsonl": '{"mine": 1}\n',
    "evaluation.json": '{"mine": 1}',
    "data/shard-00000000.parquet": "mine",
    "mine.jsonl": '{"prompt": "mine"}\n',
    "mine.parquet": "mine",
}


def finished(outputs, folder):
    """Makes an output of six rows."""
    finish(str(folder), outputs.make_output(folder, [outputs.plan_table()]))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generate {own} {theirs}", "is not empty and not the output of a run; it holds "),
        ("edit {own} {theirs} --prompt x", "is not empty and not the output of a run; it holds "),
        ("understand {own} {theirs}", "is not empty and not the output of a run; it holds "),
        ("generate {own} {theirs} --incremental", "is not empty and not the output of a run; it holds "),
        ("plan generate {own} {theirs}", "is not empty and not the output of a run; it holds "),
        ("plan generate {own} --errors {theirs}/mine.jsonl", "mine.jsonl exists already: name another file."),
        ("prompts expand cat {theirs}/mine.jsonl", "mine.jsonl exists already: name another file, or --over"),
        ("prompts expand cat {theirs}/mine.parquet", "mine.parquet exists already: name another file, or"),
        ("data shapes {theirs} --rows 1 --held-out 1", "is not empty; it holds "),
        ("select {out} {theirs}", "is not empty and not a selection; it holds "),
        ("select {own} {theirs} --split a=0.5,b=0.5", "is not empty and not a selection; it holds "),
        (
            "export files {out} {theirs}",
            ", which no export of the format 'files' writes: choose another DEST",
        ),
        (
            "export files {out} {theirs} --partial",
            ", which no export of the format 'files' writes: choose an",
        ),
        ("view {out} {out2} --votes {theirs}/mine.parquet", "is not a file of votes: give another --votes P"),
        ("compact {theirs}", "is not the output of a run, since it has no run.json"),
        ("report {theirs}", "is not the output of a run, since it has no run.json"),
        ("evaluate shapes {theirs}", "is not the output of a run, since it has no run.json"),
        ("verify {theirs}", "is not the output of a run, since it has no run.json"),
        ("status {theirs}", "is not the output of a run, since it has no run.json"),
    ],
)
def test_a_command_refuses_and_changes_nothing(outputs, place, tmp_path, capsys, command, words):
    for name in ("out", "out2"):
        if f"{{{name}}}" in command:
            finished(outputs, tmp_path / name)
    (tmp_path / "own.jsonl").write_text('{"prompt": ""}\n')
    fill(place, THEIRS)
    places = {name: tmp_path / name for name in ("out", "out2")}
    places |= {"own": tmp_path / "own.jsonl", "theirs": place}
    code = run(*(word.format(**places) for word in command.split()))
    err = capsys.readouterr().err.splitlines()
    assert code in (1, 2) and err[0].startswith("wallaroo: ") and words in err[0]
    assert len(err) == (2 if code == 2 else 1) and not re.search("delete|remove", err[0])
    if "holds" in words or "which no export" in words:
        assert any(name in err[0] for name in THEIRS)
    assert contents(place) == THEIRS


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_each_format_stays_out_of_a_folder_of_other_files(outputs, tmp_path, form):
    task = next(iter(FORMATS[form].tasks))
    ids = [f"{n}" for n in range(2)]
    make(outputs, tmp_path / "out", planned(outputs, ids, 4, source=task != "generate"), task=task)
    dest = tmp_path / "place"
    for name in ("notes.txt", "README.md", "album/holiday.png", "0001.jpeg"):
        fill(dest, {name: "mine"})
        with pytest.raises(
            InputError, match=f"holds {re.escape(name)}, which no export of the format '{form}'"
        ):
            export(str(tmp_path / "out"), str(dest), form)
        assert contents(dest) == {name: "mine"}
        (dest / name).unlink()


def test_files_beside_drawn_scenes_stay(tmp_path, capsys):
    fill(tmp_path / "place", {"notes.txt": "mine", "train/generate.parquet": "mine"})
    words = ("data", "shapes", tmp_path / "place", "--rows", 1, "--held-out", 1)
    assert run(*words) == 1 and run(*words, "--overwrite") == 0
    assert (tmp_path / "place" / "notes.txt").read_text() == "mine"
    assert pq.read_metadata(tmp_path / "place" / "train" / "generate.parquet").num_rows == 1


def test_votes_of_one_output_are_refused(tmp_path, capsys):
    assert run("view", tmp_path / "out", "--no-open", "--votes", tmp_path / "v.parquet") == 2
    assert "v.parquet, but votes need two outputs" in capsys.readouterr().err


def test_votes_do_not_replace_a_file_that_came_meanwhile(tmp_path):
    votes = Votes(str(tmp_path / "v.parquet"), ["a", "b"])
    (tmp_path / "v.parquet").write_text("mine")
    with pytest.raises(InputError, match="is not a file of votes: give another --votes PATH"):
        votes.cast(Key("p0", 0, 0), ["x", "y"], "a")
    assert (tmp_path / "v.parquet").read_text() == "mine"


# Scores


@pytest.fixture
def scenes(outputs, tmp_path):
    """An output of six drawn scenes: one is not what was asked for, and one is an error row."""
    drawn = [
        to_values(one, "x") for one in examples(6, 3, load_config(TINY).size_list(), True, ("generate",))
    ]
    table = outputs.plan_table()
    for name in ("kind", "named", "scene"):
        table = table.append_column(name, pa.array([row[name] for row in drawn]))
    output = tmp_path / "scenes"
    plan = outputs.make_output(output, [table], failed={0: (5,)})
    rows = pq.read_table(output / "data")
    pictures = [{"bytes": row["picture"], "path": None} for row in drawn]
    noise = rows.column("image").to_pylist()
    pictures[4:] = noise[4:]
    place = rows.schema.get_field_index("image")
    rows = rows.set_column(
        place, rows.schema.field("image"), pa.array(pictures, rows.schema.field(place).type)
    )
    shards.write_shard(str(output), 0, rows)
    finish(str(output), plan)
    return output


def test_evaluate_prints_one_line_for_all_rows_before_the_table(scenes, capsys):
    assert run("evaluate", "shapes", scenes) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "in all: 4 of 6 rows are right, 66.7 %"
    assert lines[1].split() == ["task", "kind", "language", "size", "rows", "right"]
    cells = [line for line in lines[2:] if re.search(r" all +all +\d", line)]
    assert cells and sum(int(re.search(r" all +all +(\d+) ", line)[1]) for line in cells) == 6
    assert "<h2>Scores</h2>" in (scenes / "report.html").read_text()
    # The table is ours, so that it is replaced.
    assert run("evaluate", "shapes", scenes) == 0


@pytest.mark.parametrize(
    "text", ["my scores", "[]", '{"format": 1, "lines": [], "mine": 1}', '{"lines": [5]}']
)
def test_a_table_of_scores_of_a_person_is_kept(scenes, capsys, text):
    (scenes / "evaluation.json").write_text(text)
    assert run("evaluate", "shapes", scenes) == 1
    assert (
        "evaluation.json exists, and `wallaroo evaluate` did not write it: move it" in capsys.readouterr().err
    )
    assert (scenes / "evaluation.json").read_text() == text


def test_a_selection_is_not_scored(scenes, tmp_path, capsys):
    assert run("select", scenes, tmp_path / "few") == 0
    before = names_in(tmp_path / "few")
    assert run("evaluate", "shapes", tmp_path / "few") == 1
    assert "few is not the output of a run" in capsys.readouterr().err
    assert names_in(tmp_path / "few") == before


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
