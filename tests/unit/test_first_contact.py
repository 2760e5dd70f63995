"""What somebody reads who does not know the commands yet."""

import logging
import math

import pytest
from safetensors import safe_open

from wallaroo.jobs import cli
from wallaroo.jobs.commands import run as commands
from wallaroo.model.checkpoint import TINY
from wallaroo.model.errors import InputError
from wallaroo.workflows.runs.setup import check_gpus
from wallaroo.workflows.settings import RunConfig, RunSummary
from wallaroo.workflows.storage.checkpoints import model_path, read_checkpoint


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        # rows, ok, errors, before, made
        ((4, 3, 1, 0, 3), "4 rows: 3 ok, 1 error; 3 pictures made in 5 s"),
        ((4, 4, 0, 3, 1), "4 rows: 4 ok, 0 errors; 1 picture made in 5 s, 3 rows finished before"),
        ((4, 3, 1, 3, 0), "4 rows: 3 ok, 1 error; 0 pictures made in 5 s, 3 rows finished before"),
        ((4, 3, 1, 4, 0), "4 rows: 3 ok, 1 error; all of them were finished before, so there was nothing"),
    ],
)
def test_the_last_lines_count_what_was_made_apart_from_what_is_ok(capsys, numbers, words):
    commands._print_summary(RunConfig("m", "out"), RunSummary("out", *numbers, 5.0))
    assert capsys.readouterr().out.startswith(words)


def test_answers_are_texts(capsys):
    commands._print_summary(RunConfig("m", "out", "understand"), RunSummary("out", 2, 2, 0, 0, 2, 5.0))
    assert capsys.readouterr().out.startswith("2 rows: 2 ok, 0 errors; 2 texts made in 5 s\n")


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


def test_gpus_that_are_not_there_are_told_with_what_to_do(caplog):
    local = RunConfig("m", "out", device="cuda", replicas=(2, 4))
    with pytest.raises(InputError, match="2 replicas need a GPU each, but this machine has 1: ask for fewer"):
        check_gpus(local, 1)
    check_gpus(local, 2)
    remote = RunConfig("m", "out", device="cuda", address="10.0.0.1:6379")
    check_gpus(remote, 1)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        check_gpus(remote, 0)
    assert "The cluster at 10.0.0.1:6379 has no GPU now" in caplog.text and "--device cpu" in caplog.text


def test_a_model_is_shown_from_its_folder(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["models", "show", "tiny"])
    lines = capsys.readouterr().out.splitlines()
    with safe_open(TINY / "model.safetensors", "np") as file:
        names = list(file.keys())
        numbers = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    assert left.value.code == 0
    assert lines[0] == "tiny: tiny, for generate, edit, understand"
    assert f"  parameters  {numbers:,} in {len(names)} tensors" in lines[3]
    assert (
        lines[6].startswith("  sizes       64x96, 64x128, 96x64, ") and "128x112 (width x height" in lines[6]
    )
    # 64 tokens of two branches, 4 layers of 2 heads of 32 numbers, keys and values.
    kilobytes = 64 * 2 * 4 * 2 * 32 * 2 * 4 // 1024
    words = (
        f"{numbers * 4 / 2**20:.3g} MiB of weights (float32); a guided picture takes up to {kilobytes} KiB"
    )
    assert lines[7].startswith(f"  on cpu      {words}")
    assert f"(bfloat16); a guided picture takes up to {kilobytes // 2} KiB" in lines[8]


def test_a_folder_that_is_no_model_is_shown_as_none(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["models", "show", str(tmp_path)])
    assert left.value.code == 1 and "is not a checkpoint" in capsys.readouterr().err
