"""`wallaroo prompts expand` and `wallaroo select`: flags, exit codes, and what is said."""

import json

import pyarrow.parquet as pq
import pytest

from wallaroo.jobs import cli
from wallaroo.workflows.reports.finish import finish


@pytest.fixture
def wallaroo(capsys, monkeypatch, tmp_path):
    """Runs the command in this process, in a folder of its own: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.path", [*__import__("sys").path])
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return run


def test_prompts_are_expanded_and_split(wallaroo, tmp_path):
    (tmp_path / "animals.txt").write_text("cat, black\ndog\n")
    (tmp_path / "more.txt").write_text("the {animal}\n")
    code, out, _ = wallaroo(
        *("prompts", "expand", "a {colour} {animal}", "one {animal}", "new/cats.jsonl"),
        *("--set", "colour=red,blue", "--set-file", "animal=animals.txt", "--templates", "more.txt"),
    )
    assert (code, out) == (0, "new/cats.jsonl: 8 prompts\n")
    prompts = [
        json.loads(line)["prompt"] for line in (tmp_path / "new" / "cats.jsonl").read_text().splitlines()
    ]
    assert prompts[0] == "a red cat, black" and prompts[-1] == "the dog"
    assert wallaroo("select", "new/cats.jsonl", "both", "--split", "train=0.5,test=0.5")[0] == 0
    rows = [pq.read_table(path).num_rows for path in (tmp_path / "both").glob("t*/*.parquet")]
    assert sum(rows) == 8


def test_functions_of_the_present_folder_are_found(wallaroo, tmp_path, outputs):
    finish(str(tmp_path / "out"), outputs.make_output(tmp_path / "out", [outputs.plan_table(errors=(1,))]))
    (tmp_path / "my_own_checks.py").write_text("def even(row):\n    return 4 / row['row_id'] != 1\n")
    code, out, err = wallaroo(
        "select", "out", "kept", "--filter", "my_own_checks:even", "--drop-near-duplicates", "4"
    )
    assert code == 3
    assert out.splitlines() == [
        "6 rows: 3 kept, 1 dropped (filter failed), 1 dropped (error row), 1 dropped (filter)",
        "  kept/data  3",
    ]
    assert err == "  filter failed, the first row: ZeroDivisionError: division by zero\n"


def test_an_empty_split_and_the_reason_of_failures_are_told(wallaroo, tmp_path):
    texts = ["8/10", "very good", "", "no idea"]
    lines = [json.dumps({"id": f"r{n}", "prompt": "x", "text": text}) for n, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    code, out, err = wallaroo(
        *("select", "rows.jsonl", "kept", "--best-of", "text", "--split", "train=0.99,test=0.01")
    )
    assert code == 3
    assert out.splitlines() == [
        "4 rows: 1 kept, 3 dropped (score failed)",
        "  kept/test  0 (empty, not written)",
        "  kept/train  1",
    ]
    assert err == "  score failed, the first row: it has no score: the text holds no number\n"
    assert (tmp_path / "kept" / "train").is_dir() and not (tmp_path / "kept" / "test").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("prompts expand a.jsonl", "There is no template"),
        ("prompts expand {x} a.jsonl", "no list for it"),
        ("prompts expand {x} a.jsonl --set x", "'x' must be NAME=VALUE"),
        ("prompts expand cat a.txt", "must end in .parquet or .jsonl"),
        ("select a b --split train", "'train' must be NAME=VALUE"),
        ("select a b --split train=most", "the share of train is 'most'"),
        ("select a b --split train=0.5", "must sum to 1"),
        ("select a b --drop-near-duplicates 40", "from 0 to 16"),
        ("select a b --best-off x", "No such option '--best-off'"),
    ],
)
def test_mistakes_are_one_sentence(wallaroo, arguments, words):
    code, out, err = wallaroo(*arguments.split())
    assert code == 2 and not out
    assert err.startswith("wallaroo: ") and words in err.splitlines()[0] and "Traceback" not in err


def test_what_is_not_there_is_told(wallaroo):
    code, _, err = wallaroo("select", "nothing", "b")
    assert code == 1 and "nothing cannot be read" in err
