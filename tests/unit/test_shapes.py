"""The data set of drawn scenes as files, and its commands."""

import io
import json
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from wallaroo.jobs.cli import cli
from wallaroo.model.training.data import read_rows
from wallaroo.workflows.scenes.world import HARD, KINDS, Scene, draw, held_out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("shapes")
    arguments = ["data", "shapes", str(output), "--rows", "40", "--held-out", "20", "--seed", "4", "--lines"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert len(result.output.splitlines()) == 9
    return output


@pytest.mark.parametrize("task", KINDS)
def test_files_are_manifests_with_scenes(folder, task):
    for part, count, held in (("train", 40, False), ("held-out", 20, True)):
        rows = pq.read_table(folder / part / f"{task}.parquet").to_pylist()
        assert len({row["id"] for row in rows}) == count == len(rows)
        assert {row["kind"] for row in rows} == set(KINDS[task])
        assert {row["language"] for row in rows} == {"en", "zh"}
        for row in rows:
            scene = Scene.from_json(row["scene"])
            assert held_out(scene) == held
            shown = row["image"]["bytes"] if task == "understand" else row["picture"]
            assert np.array_equal(np.array(Image.open(io.BytesIO(shown))), draw(scene))


def test_captions_of_two_begin_at_the_left_or_above(folder):
    rows = pq.read_table(folder / "train" / "understand.parquet").to_pylist()
    scenes = {row["answer"]: json.loads(row["scene"]) for row in rows if row["kind"] == "caption"}
    pairs = {answer: scene for answer, scene in scenes.items() if len(scene["things"]) == 2}
    assert {scene["relation"] for scene in pairs.values()} & {"right", "below"}
    for answer, scene in pairs.items():
        first, second = sorted(scene["things"], key=lambda thing: thing["row"] + thing["column"])
        names = [(one["colour"], one["shape"]) for one in (first, second)]
        if all(ord(letter) < 128 for letter in answer):
            assert [" ".join(name) in answer for name in names] == [True, True]
            assert answer.index(" ".join(names[0])) < answer.index(" ".join(names[1]))


@pytest.mark.parametrize("task", KINDS)
def test_lines_hold_the_same_rows(folder, task):
    rows = pq.read_table(folder / "train" / f"{task}.parquet").to_pylist()
    lines = read_rows(folder / "train" / f"{task}.jsonl")
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in rows]
    for name in ("picture", "image"):
        for line, row in zip(lines, rows, strict=True):
            value = row.get(name)
            assert line.get(name) == (value["bytes"] if isinstance(value, dict) else value)


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    arguments = ["data", "shapes", str(tmp_path), "--rows", "40", "--held-out", "20", "--seed", "4"]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    for path in tmp_path.rglob("*.parquet"):
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes()
    assert not list(tmp_path.rglob("*.jsonl"))


def test_hard_rows_to_train_on_are_mostly_of_the_hard_kinds(folder, tmp_path):
    arguments = ["data", "shapes", str(tmp_path), "--rows", "72", "--held-out", "20", "--seed", "4", "--hard"]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    kinds = {}
    for task in KINDS:
        held = f"held-out/{task}.parquet"
        assert (tmp_path / held).read_bytes() == (folder / held).read_bytes()
        kinds[task] = Counter(pq.read_table(tmp_path / "train" / f"{task}.parquet")["kind"].to_pylist())
        assert set(kinds[task]) == set(KINDS[task])
    for task, kind in (("edit", "move"), ("understand", "count")):
        assert {kinds[task][hard] for hard in HARD[task]} == {3 * kinds[task][kind]}
    rows = pq.read_table(tmp_path / "train" / "edit.parquet").to_pylist()
    things = Counter((row["kind"], len(json.loads(row["source_scene"])["things"])) for row in rows)
    # Of three times one is drawn like any other row.
    for kind in ("recolour", "reshape"):
        assert things[kind, 1] and things[kind, 1] + things[kind, 2] == 18 and things[kind, 2] >= 12
    assert things["remove", 2] == 18
    assert not any(held_out(Scene.from_json(row["scene"])) for row in rows)


def test_small_squares_have_room_for_two(tmp_path):
    arguments = ["data", "shapes", str(tmp_path), "--rows", "30", "--held-out", "1", "--square", "64"]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    scenes = [
        json.loads(t) for t in pq.read_table(tmp_path / "train" / "generate.parquet")["scene"].to_pylist()
    ]
    assert {(scene["height"], scene["width"]) for scene in scenes} == {(64, 64)}
    assert {len(scene["things"]) for scene in scenes} == {1, 2}


@pytest.mark.parametrize("wrong", [["--square", "70"], ["--square", "32"], ["--rows", "0"]])
def test_impossible_sizes_and_counts_are_refused(tmp_path, wrong):
    result = CliRunner().invoke(cli, ["data", "shapes", str(tmp_path / "out"), *wrong])
    assert result.exit_code != 0 and not (tmp_path / "out").exists()
