"""Exports of runs that are at work or were stopped: said to be partial, and made whole later."""

import json
import re

import pytest

from tests.unit.test_export import make, planned
from wallaroo.jobs.cli import main
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.datasets.export import FORMATS, export
from wallaroo.workflows.datasets.export_sink import Sink
from wallaroo.workflows.outputs import shards
from wallaroo.workflows.outputs.lock import OutputLock
from wallaroo.workflows.plans.plan import read_plan
from wallaroo.workflows.reports.finish import finish

MARK = "_partial.json"


def shards_of(outputs, shard_rows=2, count=3, **options):
    """Shards of a plan of two samples an id, so that with odd shards an id lies in two of them."""
    return [
        outputs.plan_table(shard_rows, shard_rows * shard, shard, **options.get(f"s{shard}", {}))
        for shard in range(count)
    ]


def stopped(outputs, folder, there, shard_rows=2, **options):
    """An output with some of its shards; returns what writes the others."""
    tables = shards_of(outputs, shard_rows, **options)
    skip = [shard for shard in range(len(tables)) if shard not in there]
    outputs.make_output(folder, tables, skip=skip)

    def complete():
        for shard in skip:
            shards.write_shard(str(folder), shard, outputs.result_table(tables[shard]))
        finish(str(folder), read_plan(str(folder)))

    if not skip:
        complete()
    return complete


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main(["export", *map(str, arguments)])
    return left.value.code, "".join(capsys.readouterr())


def contents(folder):
    return {file.relative: storage.read_bytes(file.path) for file in storage.list_files(str(folder))}


@pytest.mark.parametrize("shard_rows", [2, 3])
@pytest.mark.parametrize(
    "form", sorted(name for name in FORMATS if "generate" in FORMATS[name].tasks and name != "wise")
)
def test_what_is_finished_is_exported_and_later_made_whole(outputs, tmp_path, capsys, form, shard_rows):
    complete = stopped(outputs, tmp_path / "out", [1], shard_rows)
    output, dest = tmp_path / "out", tmp_path / "dest"
    code, said = run(capsys, form, output, dest)
    assert code == 1 and "2 of its 3 shards are missing" in said and "--partial" in said
    assert not dest.exists()
    code, said = run(capsys, form, output, dest, "--partial")
    rows = 3 * shard_rows
    words = f"Partial export: 1 of 3 shards and {shard_rows} of {rows} rows planned are finished."
    assert said.startswith(words)
    # Samples of an id whose others are missing make no grid.
    assert code == (3 if form == "dpg" else 0)
    mark = json.loads((dest / MARK).read_text())
    assert (mark["partial"], mark["finished_shards"], mark["shards"]) == (True, 1, 3)
    assert mark["missing_rows"] == rows - shard_rows and mark["output"] == str(output)
    if form != "dpg":
        assert mark["exported"] == shard_rows
    first = contents(dest)

    complete()
    code, said = run(capsys, form, output, dest)
    assert code == (3 if form == "dpg" else 0) and "Partial" not in said
    whole = contents(dest)
    export(str(output), str(tmp_path / "other"), form)
    assert whole == contents(tmp_path / "other") and MARK not in whole
    # Pictures of the first export had their names already.
    for name, data in first.items():
        if name.endswith(".png"):
            assert whole[name] == data


@pytest.mark.parametrize(
    ("form", "name"), [("files", "metadata.jsonl"), ("webdataset", "shard-00000000.tar")]
)
def test_a_list_that_somebody_changed_is_not_replaced(outputs, tmp_path, form, name):
    complete = stopped(outputs, tmp_path / "out", [1])
    export(str(tmp_path / "out"), str(tmp_path / "dest"), form, partial=True)
    # The same again changes nothing, and what it wrote stays known.
    again = export(str(tmp_path / "out"), str(tmp_path / "dest"), form, partial=True)
    assert again.unchanged == again.files
    ours = (tmp_path / "dest" / name).read_bytes()
    complete()
    (tmp_path / "dest" / name).write_bytes(ours + b"mine")
    for _ in range(2):
        with pytest.raises(InputError, match=rf"{re.escape(name)} exists with other content .* --overwrite"):
            export(str(tmp_path / "out"), str(tmp_path / "dest"), form)
        assert (tmp_path / "dest" / name).read_bytes() == ours + b"mine"
    (tmp_path / "dest" / name).write_bytes(ours)
    assert not export(str(tmp_path / "out"), str(tmp_path / "dest"), form).partial
    export(str(tmp_path / "out"), str(tmp_path / "other"), form)
    assert contents(tmp_path / "dest") == contents(tmp_path / "other")


def test_names_and_numbers_are_those_of_the_whole(outputs, tmp_path):
    stopped(outputs, tmp_path / "out", [1], shard_rows=3)
    export(str(tmp_path / "out"), str(tmp_path / "a"), "files", partial=True)
    # The shard holds the second sample of one prompt, and both of the next.
    assert set(contents(tmp_path / "a")) == {"p1@1.png", "p2@0.png", "p2@1.png", "metadata.jsonl", MARK}
    summary = export(str(tmp_path / "out"), str(tmp_path / "b"), "geneval", partial=True)
    assert {name for name in contents(tmp_path / "b") if name.endswith("png")} == {
        "00001/samples/0001.png",
        "00002/samples/0000.png",
        "00002/samples/0001.png",
    }
    assert (summary.exported, summary.misses, summary.missing_rows) == (3, 6, 6)
    assert summary.missed[0] == "00000/samples/0000.png"


def test_error_rows_count_apart_from_what_is_missing(outputs, tmp_path, capsys):
    stopped(outputs, tmp_path / "out", [0, 2], s0={"errors": (1,)}, s1={"errors": (0,)})
    code, said = run(capsys, "files", tmp_path / "out", tmp_path / "dest", "--partial")
    assert code == 3
    assert said == (
        "Partial export: 2 of 3 shards and 4 of 6 rows planned are finished. 3 images exported to "
        f"{tmp_path}/dest, 4 files; 1 error row with nothing to export. Export again "
        "when more is finished.\n"
    )


def test_a_plan_that_is_not_complete_is_said_to_be_so(outputs, tmp_path):
    outputs.make_output(tmp_path / "out", shards_of(outputs))
    path = tmp_path / "out" / "plan" / "part-00000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"complete": False}))
    with pytest.raises(InputError, match=r"its last round did not end: .* --partial"):
        export(str(tmp_path / "out"), str(tmp_path / "dest"), "files")
    summary = export(str(tmp_path / "out"), str(tmp_path / "dest"), "files", partial=True)
    assert summary.text().startswith(
        "Partial export: 3 of 3 shards and 6 of 6 rows planned so far are finished."
    )
    assert json.loads((tmp_path / "dest" / MARK).read_text())["plan_complete"] is False


def test_a_finished_output_gives_no_mark(outputs, tmp_path, capsys):
    stopped(outputs, tmp_path / "out", [0, 1, 2])
    code, said = run(capsys, "files", tmp_path / "out", tmp_path / "dest", "--partial")
    assert code == 0 and "Partial" not in said and not (tmp_path / "dest" / MARK).exists()


def test_without_a_finished_shard_there_is_nothing_to_export(outputs, tmp_path, capsys):
    stopped(outputs, tmp_path / "out", [])
    code, said = run(capsys, "files", tmp_path / "out", tmp_path / "dest", "--partial")
    words = f"{tmp_path}/out has no finished shard yet: no run is active; re-run its command to resume."
    assert code == 1 and words in said
    with OutputLock(str(tmp_path / "out"), "one"):
        code, said = run(capsys, "files", tmp_path / "out", tmp_path / "dest", "--partial")
    assert code == 1 and "has no finished shard yet: try again when its run has finished the first." in said
    assert not (tmp_path / "dest").exists()


def test_a_refused_export_leaves_no_mark(outputs, tmp_path):
    tables = [table.drop_columns("tag") for table in shards_of(outputs)]
    outputs.make_output(tmp_path / "out", tables, skip=[0])
    with pytest.raises(InputError, match="has no column 'tag'"):
        export(str(tmp_path / "out"), str(tmp_path / "dest"), "geneval", partial=True)
    assert not (tmp_path / "dest").exists()


def test_answers_that_are_not_made_yet_are_left_out_or_named(outputs, tmp_path):
    tables = planned(outputs, ["a", "b", "c", "d"], shard_rows=2, source=True)
    make(outputs, tmp_path / "out", tables, "understand")
    (tmp_path / "out" / "data" / "shard-00000000.parquet").unlink()
    summary = export(str(tmp_path / "out"), str(tmp_path / "jsonl"), "jsonl", partial=True)
    assert (summary.exported, summary.errors, summary.missing_rows) == (2, 0, 2)
    lines = [json.loads(line) for line in (tmp_path / "jsonl" / "answers.jsonl").read_bytes().splitlines()]
    assert [line["id"] for line in lines] == ["c", "d"]
    export(str(tmp_path / "out"), str(tmp_path / "tsv"), "vlmevalkit", partial=True)
    table = (tmp_path / "tsv" / "predictions.tsv").read_text().splitlines()
    assert len(table) == 3 and "prediction" in table[0].split("\t")
    export(str(tmp_path / "out"), str(tmp_path / "batch"), "openai-batch", partial=True)
    lines = [json.loads(line) for line in (tmp_path / "batch" / "results.jsonl").read_bytes().splitlines()]
    assert [line["custom_id"] for line in lines] == ["a", "b", "c", "d"]
    assert lines[0]["response"] is None
    assert lines[0]["error"] == {"code": "missing", "message": "it is not written yet"}
    assert lines[2]["response"]["status_code"] == 200 and lines[2]["error"] is None


def test_edits_that_are_not_made_yet_are_missed(outputs, tmp_path):
    make(outputs, tmp_path / "out", planned(outputs, ["a", "b", "c"], shard_rows=1, source=True), "edit")
    (tmp_path / "out" / "data" / "shard-00000001.parquet").unlink()
    summary = export(str(tmp_path / "out"), str(tmp_path / "dest"), "imgedit", partial=True)
    assert set(contents(tmp_path / "dest")) == {"a.png", "c.png", MARK}
    assert (summary.missed, summary.errors) == (("b.png",), 0)


def test_wise_finds_what_is_finished(outputs, tmp_path):
    make(outputs, tmp_path / "out", planned(outputs, ["1", "2"], shard_rows=1))
    (tmp_path / "out" / "data" / "shard-00000000.parquet").unlink()
    summary = export(str(tmp_path / "out"), str(tmp_path / "dest"), "wise", partial=True)
    assert set(contents(tmp_path / "dest")) == {"2.png", MARK} and summary.missed == ("1.png",)


@pytest.mark.parametrize("text", ["mine", '{"partial": true}', "[]"])
def test_a_file_of_a_user_with_the_name_of_the_mark_stays(outputs, tmp_path, text):
    complete = stopped(outputs, tmp_path / "out", [1])
    (tmp_path / "dest").mkdir()
    (tmp_path / "dest" / MARK).write_text(text)
    for whole in (False, True):
        if whole:
            complete()
        with pytest.raises(InputError, match=rf"{re.escape(MARK)} exists, and no export wrote it"):
            export(str(tmp_path / "out"), str(tmp_path / "dest"), "files", partial=not whole)
        assert contents(tmp_path / "dest") == {MARK: text.encode()}
    # A whole export has no use for the name, so the file stays there too.
    export(str(tmp_path / "out"), str(tmp_path / "dest"), "files", overwrite=True)
    assert (tmp_path / "dest" / MARK).read_text() == text


def test_a_partial_export_is_an_imagefolder_all_the_same(outputs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    stopped(outputs, tmp_path / "out", [1])
    export(str(tmp_path / "out"), str(tmp_path / "dest"), "files", partial=True)
    dest = str(tmp_path / "dest")
    for place in ({"path": "imagefolder", "data_dir": dest}, {"path": dest}):
        found = datasets.load_dataset(**place, cache_dir=str(tmp_path / "cache"), split="train")
        assert len(found) == 2 and found[0]["image"].size in ((64, 64), (80, 64))


def test_what_interrupted_exports_wrote_is_known(tmp_path):
    dest, marked = tmp_path / "dest", {}

    def note(growing):
        marked.clear()
        marked.update(growing)

    def write(data, interrupt=False):
        with Sink(str(dest), mark=note, growing=dict(marked)) as sink:
            sink.put("0.tar", lambda: data, len(data), grows=True)
            with sink.stream("list") as lines:
                lines.write(data)
            if interrupt:
                raise KeyboardInterrupt

    for number in range(3):
        with pytest.raises(KeyboardInterrupt):
            write(b"%d" % number, interrupt=True)
        assert contents(dest) == dict.fromkeys(("0.tar", "list"), b"%d" % number)
    write(b"whole")
    assert contents(dest) == {"0.tar": b"whole", "list": b"whole"}
    (dest / "0.tar").write_bytes(b"mine")
    with pytest.raises(InputError, match="other content"):
        write(b"more")
    assert (dest / "0.tar").read_bytes() == b"mine"
