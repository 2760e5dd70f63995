"""What somebody reads who does not know the commands yet."""

import dataclasses
import io
import json
import math
import os
import re
import socket
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
from safetensors import safe_open

from tests.viewers import serving
from wallaroo.jobs import cli
from wallaroo.jobs.commands import run as commands
from wallaroo.jobs.progress import Display
from wallaroo.model.checkpoint import TINY, load_config, load_tokenizer
from wallaroo.model.errors import InputError
from wallaroo.model.training.recipe import Recipe
from wallaroo.workflows import storage
from wallaroo.workflows.outputs import shards
from wallaroo.workflows.outputs.lock import OutputLock, Owner, at_work
from wallaroo.workflows.outputs.run_log import RunLog
from wallaroo.workflows.plans.columns import check_columns
from wallaroo.workflows.plans.plan import read_plan
from wallaroo.workflows.plans.rows import plan_rows
from wallaroo.workflows.plans.settings import PlanSettings
from wallaroo.workflows.progress import Progress, RunSummary
from wallaroo.workflows.reports.finish import finish
from wallaroo.workflows.reports.status import status
from wallaroo.workflows.settings import RunConfig
from wallaroo.workflows.storage.checkpoints import model_path, read_checkpoint


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        # rows, ok, errors, before, made
        ((4, 3, 1, 0, 3), "4 rows: 3 ok, 1 error; 3 images made in 5 s"),
        ((4, 4, 0, 3, 1), "4 rows: 4 ok, 0 errors; 1 image made in 5 s, 3 rows finished before"),
        ((4, 3, 1, 3, 0), "4 rows: 3 ok, 1 error; 0 images made in 5 s, 3 rows finished before"),
        ((4, 3, 1, 4, 0), "4 rows: 3 ok, 1 error; all finished before, so there was nothing"),
    ],
)
def test_the_last_lines_count_what_was_made_apart_from_what_is_ok(capsys, numbers, words):
    commands._print_summary(RunConfig("m", "out"), RunSummary("out", *numbers, 5.0))
    assert capsys.readouterr().out.startswith(words)


def test_answers_are_texts(capsys):
    commands._print_summary(RunConfig("m", "out", "understand"), RunSummary("out", 2, 2, 0, 0, 2, 5.0))
    assert capsys.readouterr().out.startswith("2 rows: 2 ok, 0 errors; 2 texts made in 5 s\n")


def test_rates_and_times_left_agree_wherever_they_are_shown(outputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    output = str(tmp_path / "out")
    outputs.make_output(output, [outputs.plan_table(4, 4 * i, i) for i in range(3)], skip=(1, 2))
    now = [time.time() - 150]
    stream = io.StringIO()
    with RunLog(output, {}, lambda: now[0]) as log, Display(stream, lambda: now[0]) as display:
        # No replica for the first half minute, then a row every 30 s.
        for second in range(0, 151, 10):
            done = max(0, (second - 30) // 30)
            display(Progress(rows=12, done=done, waiting="" if second >= 30 else "waiting for a replica"))
            log.update(rows=12, done=done, before=0, errors={}, images=done, replicas=int(second >= 30))
            now[0] += 10
        log.end("running")
        shown = "4 of 12 rows (33 %), 0.0333 rows/s, 0 errors, 4 min left"
        assert stream.getvalue().splitlines()[-1] == shown
        assert (
            (tmp_path / "out" / "runs" / "0001.log")
            .read_text()
            .splitlines()[-2]
            .endswith("4 of 12 rows, 0 errors, 0.0333 rows/s")
        )
        found = status(output)
        assert found.line() == "4 of 12 rows, 0 errors, 0.0333 rows/s, 4 min left: running"
        assert "  speed   0.0333 rows/s, the first row after 1 min, 4 min left\n" in found.text()
        with serving(output) as served:
            live = re.sub("<[^>]*>", "", json.loads(served.get("/0/live").text)["html"])
            assert " ".join(live.split()).startswith("running 4 of 12 rows 0.0333 rows/s 4 min left")
        log.end("stopped", "by hand")
    # Of the whole time, once it is over: 4 rows in 160 s.
    assert status(output).line() == "4 of 12 rows, 0 errors, 0.025 rows/s: stopped"
    with pytest.raises(SystemExit):
        cli.main(["report", output])
    page = (tmp_path / "out" / "report.html").read_text()
    (heads,) = re.findall(r"<thead><tr><th>run</th>(.*?)</thead>", page)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page.split(heads)[1].split("</tr>")[0])
    assert dict(zip(re.findall("<th[^>]*>(.*?)</th>", heads), cells[1:], strict=True))["rows/s"] == "0.025"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "absent",
            r"absent is not a checkpoint, since there is no such folder: give a folder that `wallaroo",
        ),
        (
            "Org/Wallaroo-7B",
            r"no such folder, and models named as on the Hugging Face Hub are not downloaded",
        ),
        ("empty", r"empty is not a checkpoint, since it has no checkpoint\.json: .*docs/models\.md"),
    ],
)
def test_a_model_that_is_not_there_says_how_to_get_one(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=words):
        read_checkpoint(model_path(name))


@pytest.mark.parametrize("model", ["tiny", str(TINY)])
def test_a_model_is_shown_by_name_and_from_its_folder(capsys, model):
    with pytest.raises(SystemExit) as left:
        cli.main(["models", "show", model])
    lines = capsys.readouterr().out.splitlines()
    with safe_open(TINY / "model.safetensors", "np") as file:
        names = list(file.keys())
        numbers = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    assert left.value.code == 0
    assert lines[0] == f"{model}: tiny, for generate, edit, understand"
    assert lines[1:3] == [f"  folder      {TINY}", f"  digest      {read_checkpoint(str(TINY)).digest}"]
    config = load_config(TINY)
    assert lines[5].startswith(
        f"  prompts     layout {config.layout}, indicators {config.indicators}, rows of"
    )
    assert f"  parameters  {numbers:,} in {len(names)} tensors" in lines[3]
    assert (
        lines[6].startswith("  sizes       64x96, 64x128, 96x64, ") and "128x112 (width x height" in lines[6]
    )
    # 64 tokens of two branches, 4 layers of 2 heads of 32 numbers, keys and values.
    kilobytes = 64 * 2 * 4 * 2 * 32 * 2 * 4 // 1024
    words = f"{numbers * 4 / 2**20:.3g} MiB of weights (float32); a guided image takes up to {kilobytes} KiB"
    assert lines[7].startswith(f"  on cpu      {words}")
    assert f"(bfloat16); a guided image takes up to {kilobytes // 2} KiB" in lines[8]


def test_a_folder_that_is_no_model_is_shown_as_none(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["models", "show", str(tmp_path)])
    assert left.value.code == 1 and "is not a checkpoint" in capsys.readouterr().err


def lock_of(output, **values):
    """Writes the lock of a run on another machine."""
    owner = dataclasses.replace(Owner.myself("of another"), machine="elsewhere", host="far", **values)
    storage.write_atomic(f"{output}/lock.json", owner.to_json())


def test_a_run_at_work_is_known_by_its_process_or_its_heartbeat(tmp_path):
    output = str(tmp_path)
    assert at_work(output) == "" and at_work(f"{output}/absent.jsonl") == ""
    with OutputLock(output, "mine"):
        assert at_work(output, watch=0) == (
            f"A run is active in {output} (process {os.getpid()} on {socket.gethostname()})."
        )
    assert at_work(output, watch=0) == ""
    lock_of(output, pid=7)
    assert at_work(output, watch=0.1) == ""
    ended = threading.Event()

    def beat():
        count = 0
        while not ended.wait(0.05):
            count += 1
            lock_of(output, pid=7, heartbeat=count)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert at_work(output, watch=60) == f"A run is active in {output} (process 7 on far)."
    finally:
        ended.set()
        thread.join()


def test_commands_say_that_a_run_is_at_work(outputs, tmp_path, capsys):
    output = tmp_path / "out"
    outputs.make_output(output, [outputs.plan_table(6), outputs.plan_table(6, 6, 1)], skip={1})

    def said(*arguments):
        with pytest.raises(SystemExit):
            cli.main([str(one) for one in arguments])
        return capsys.readouterr()

    words = f"A run is active in {output} (process {os.getpid()} on {socket.gethostname()})."
    assert "not finished; re-run the command to resume" in said("status", output).out
    assert "incomplete: 1 of 2 files are missing; 6 of 12 rows, 6 ok. No run is active. Re-run" in (
        said("verify", output).out
    )
    for command in (("export", "files"), ("select",)):
        err = said(*command, output, tmp_path / "files").err
        assert "A run is active" not in err and ": re-run its command to resume" in err
    with OutputLock(str(output), "mine"):
        assert said("status", output).out.startswith(f"{output}: running\n")
        assert f"6 ok. {words} Verify again when it has ended." in said("verify", output).out
        for command in (("export", "files"), ("select",)):
            err = said(*command, output, tmp_path / "new").err.splitlines()
            assert (
                err[0] == words and f"{output} is not finished" in err[1] and ": wait for its run" in err[1]
            )
        complete = "The output is finished by now: the export is complete."
        some = said("export", "files", output, tmp_path / "some", "--partial")
        assert some.out.startswith("Partial export: 1 of 2 shards ") and complete not in some.err
        shards.write_shard(str(output), 1, outputs.result_table(outputs.plan_table(6, 6, 1)))
        finish(str(output), read_plan(str(output)))
        whole = said("export", "files", output, tmp_path / "some", "--partial")
        assert whole.out.startswith("12 images exported to ")
        assert whole.err.splitlines()[0] == words and whole.err.splitlines()[-1] == complete


def test_recipes_begin_with_the_tiny_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def said(*arguments):
        with pytest.raises(SystemExit) as left:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return left.value.code, out + err

    assert said("data", "shapes", "shapes", "--rows", "4", "--held-out", "2")[0] == 0
    (tmp_path / "r.toml").write_text(
        '[style]\npart = "lm"\nbase = "tiny"\nfolder = "out"\nsteps = 3\nrate = 1e-4\nlora = 2\n'
        'data.generate = "shapes/train/generate.parquet"\nrows.generate = 2\nlengths.generate = 200\n'
    )
    assert Recipe.from_file("r.toml", "style").base == str(TINY)
    code, words = said("train", "style", "--config", "r.toml", "--plan")
    assert (code, words.splitlines()[0]) == (0, "generate: 4 rows in 1 files, 1.5 epochs of at most these")
    code, words = said("train", "style", "--config", "r.toml", "--grace", "10x")
    assert code == 2 and words.startswith(
        "wallaroo: --grace is '10x', but must be a time of at least 0 s, such"
    )
    code, words = said("train", "style", "--config", "absent.toml", "--grace", "1h30m")
    assert (code, words.splitlines()[0]) == (2, "wallaroo: There is no recipe file absent.toml.")


def test_help_names_recipes_that_are_there(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    words = re.sub(r"\s+", " ", capsys.readouterr().out)
    (folder,) = re.findall(r"Copy a file of (\S+) and", words)
    named = re.findall(r"(\w+\.toml) has|(\w+\.toml) a", words)
    assert {one or other for one, other in named} == {path.name for path in Path(folder).glob("*.toml")}


def test_a_missing_column_of_pictures_names_its_option():
    with pytest.raises(
        InputError, match=r"no column 'image': it has foto\. --image-column selects the column"
    ):
        check_columns(pa.schema([("foto", pa.string())]), PlanSettings.of(RunConfig("", "", "understand")))


def test_another_encoding_says_how_to_save_the_file():
    table = pa.table({"prompt": ["caf\ufffd", "{"]})
    planned = plan_rows(
        table,
        PlanSettings.of(RunConfig("", "")),
        load_config(TINY),
        load_tokenizer(TINY),
        origin="m.csv",
        faults={0: "is not valid UTF-8 in column 'prompt'", 1: "is not valid CSV (x)"},
    )
    assert planned.column("error_message").to_pylist() == [
        "Row 0 of m.csv is not valid UTF-8 in column 'prompt'; save the file as UTF-8.",
        "Row 1 of m.csv is not valid CSV (x); correct it.",
    ]


@pytest.mark.parametrize(
    ("text", "options", "code", "words"),
    [
        (None, [], 1, "there is no such file or folder"),
        ("", [], 1, "has no rows"),
        (
            '{"promt": "a cat"}\n',
            [],
            1,
            "no column 'prompt'; did you mean 'promt'? --prompt-column selects the column",
        ),
        ('{"prompt": "a cat"}\n', ["--where", "promt = 'x'"], 2, 'column "promt" not found'),
        ('{"prompt": "a cat"}\n', ["--where", "prompt ="], 2, "which DuckDB refuses (Parser Error"),
        ('{"prompt": "a cat"}\n', ["--width", "7", "--height", "7"], 2, "width is 7, but must be"),
        ('{"prompt": "a cat"}\n', ["theirs"], 1, "it holds notes.txt; give a new or an empty folder"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused_before_ray_starts(
    tmp_path, monkeypatch, capsys, text, options, code, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    if text is not None:
        (tmp_path / "m.jsonl").write_text(text)
    # No Ray is at this address, so a connection would end in another sentence.
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(SystemExit) as left:
        cli.main(["plan", "generate", "m.jsonl", *options])
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (code, "")
    assert words in err
    assert "onnecting to Ray" not in err


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("m.csv", "prompt,标签\nx,y\n".encode("gbk"), "m.csv is not valid UTF-8: save the file as UTF-8."),
        (
            "m.csv",
            "prompt\nx\n".encode("utf-16-le"),
            "m.csv has NUL bytes, as UTF-16 without a mark at its start has: save it as UTF-8.",
        ),
        (
            "m.csv",
            b"id;words\n1;a cat\n",
            "no column 'prompt': it has id, words. --prompt-column selects the column of the prompts.",
        ),
        (
            "m.json",
            b'["a cat", "a dog"]\n',
            "is a JSON array of values without names: write each row as an object, such as "
            '{"prompt": "a cat"}.',
        ),
        ("m.xlsx", b"PK\x03\x04", "save the sheet as CSV in UTF-8."),
    ],
)
def test_a_file_of_another_kind_is_named_for_what_it_is(tmp_path, monkeypatch, capsys, name, data, words):
    (tmp_path / name).write_bytes(data)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(SystemExit) as left:
        cli.main(["plan", "generate", str(tmp_path / name)])
    err = capsys.readouterr().err
    assert left.value.code == 1 and err.count("\n") == 1 and err.endswith(f"{words}\n")
