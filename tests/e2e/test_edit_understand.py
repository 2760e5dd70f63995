"""Runs that start from pictures, on a real Ray: good and bad files, chains of tasks, formats."""

import dataclasses
import hashlib
import io
import json
import re
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.e2e.test_generate import read_data, write_jsonl
from tests.pictures import real_pictures, save, write_pictures
from wallaroo.jobs import cli
from wallaroo.model.checkpoint import TINY, load_config
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.api import edit, understand
from wallaroo.workflows.outputs.layout import list_done
from wallaroo.workflows.outputs.schema import VOLATILE
from wallaroo.workflows.reports.verify import verify
from wallaroo.workflows.runs.driver import run
from wallaroo.workflows.runs.setup import plan
from wallaroo.workflows.settings import RunConfig
from wallaroo.workflows.sources.decode import decode

CONFIG = load_config(TINY)


def rows_of(output):
    """Rows of a data set, in the order of the plan, after `verify` has found it complete."""
    said = []
    assert verify(output, said.append).state == "complete", said
    return read_data(output).to_pylist()


def command(*arguments):
    """Exit code of the command, in this process."""
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return left.value.code


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Name -> what a loader must make of the file; the folder holds real pictures too."""
    folder = tmp_path_factory.mktemp("pictures") / "all"
    made = {one.path.name: one for one in write_pictures(folder)}
    return folder, made


def test_a_folder_of_pictures_is_described_and_bad_ones_are_error_rows(pictures, tmp_path, local_ray):
    folder, made = pictures
    output = tmp_path / "out"
    code = command("understand", folder, output, "--max-new-tokens", 4, "--device", "cpu", "--language", "zh")
    assert code == 3
    rows = rows_of(str(output))
    # A file with the name of no picture is left out, with a warning.
    assert [row["id"] for row in rows] == sorted(made.keys() - {"drawing.eps"})
    for row in rows:
        one = made[row["id"]]
        if one.reason:
            assert (row["status"], row["error_type"]) == ("error", "image"), row["id"]
            assert re.search(one.reason, row["error_message"]), row["error_message"]
            assert row["source"]["uri"] == str(one.path)
            continue
        assert (row["status"], row["error_message"]) == ("ok", ""), row["id"]
        assert 0 < row["output_tokens"] <= 4 and row["finish_reason"] in ("length", "stop")
        assert row["image"] is None and row["prompt"] == "请详细描述这张图片。"
        height, width, _ = one.pixels.shape
        assert row["source"] == {
            "uri": str(one.path),
            "sha256": hashlib.sha256(one.path.read_bytes()).hexdigest(),
            "width": width,
            "height": height,
            "row_id": None,
            "note": "",
        }
    # Equal pixels, equal question: equal answers, whatever the format.
    same = {row["text"] for row in rows if row["id"] in ("plain.png", "plain.bmp", "lzw.tif", "exif-6.png")}
    assert len(same) == 1
    errors = [json.loads(line) for line in (output / "errors.jsonl").read_text().splitlines()]
    assert {line["id"] for line in errors} == {name for name, one in made.items() if one.reason} - {
        "drawing.eps"
    }
    # What it lists is a manifest for a second try.
    planned = plan(RunConfig(str(output / "errors.jsonl"), "", "understand", device="cpu"))
    assert (planned.rows, planned.error_rows) == (len(errors), 0)


@pytest.fixture(scope="module")
def edited(pictures, tmp_path_factory, local_ray):
    """A run over all pictures, and rows that are at fault in other ways: its configuration and summary."""
    folder, made = pictures
    lines = [
        {"id": one.name, "image": one.name, "prompt": f"改成红色 {n}", "tag": n}
        for n, one in enumerate(one.path for one in made.values())
    ]
    lines += [{"id": str(path), "image": str(path), "prompt": "make it red"} for path in real_pictures()]
    lines += [
        {"id": "twice", "image": "plain.png", "prompt": "make it blue", "seed": 3, "samples": 2},
        {"id": "no prompt", "image": "plain.png", "prompt": " "},
        {"id": "no image", "prompt": "make it blue"},
        {"id": "web", "image": "https://example.org/a.png?secret=1", "prompt": "make it blue"},
        {"id": "outside", "image": "../../a.png", "prompt": "make it blue"},
        {"id": "absent", "image": "absent.png", "prompt": "make it blue"},
    ]
    manifest = write_jsonl(folder / "edits.jsonl", lines)
    output = tmp_path_factory.mktemp("edited") / "out"
    config = RunConfig(manifest, str(output), "edit", device="cpu", slots=32)
    return config, run(config)


def test_pictures_are_edited_and_their_neighbours_do_not_suffer(pictures, edited):
    _, made = pictures
    config, summary = edited
    rows = rows_of(config.output)
    real = {str(path) for path in real_pictures()}
    by_id = {(row["id"], row["sample"]): row for row in rows}
    bad = [one for one in made.values() if one.reason]
    assert summary.rows == len(rows) == len(made) + len(real) + 7
    assert summary.errors == len(bad) + 5
    for name, one in made.items():
        row = by_id[name, 0]
        if one.reason:
            assert (row["error_type"], row["image"]) == ("image", None)
            assert re.search(one.reason, row["error_message"]), row["error_message"]
        else:
            height, width, _ = one.pixels.shape
            assert (row["height"], row["width"]) == CONFIG.bucket(height, width)
            assert decode(row["image"]["bytes"]).size == (row["width"], row["height"])
    reasons = {
        "no prompt": ("prompt", "is empty"),
        "no image": ("image", "image is missing"),
        "web": ("image", "does not allow https"),
        "outside": ("image", "leads out of"),
        "absent": ("image", "does not exist"),
    }
    for name, (kind, words) in reasons.items():
        row = by_id[name, 0]
        assert row["error_type"] == kind and words in row["error_message"]
        assert "secret" not in json.dumps({key: str(value) for key, value in row.items()})
    two = [by_id["twice", sample] for sample in range(2)]
    assert [row["seed"] for row in two] == [3, 4] and two[0]["sha256"] != two[1]["sha256"]
    assert all(by_id[path, 0]["status"] == "ok" for path in real)


def test_a_run_that_lost_a_shard_makes_the_same_one_again(edited, tmp_path):
    config, _ = edited
    before = read_data(config.output)
    again = dataclasses.replace(config, output=str(tmp_path / "out"), slots=16)
    shutil.copytree(config.output, again.output)
    shards = sorted(list_done(again.output))
    storage.delete(storage.join(again.output, "data", f"shard-{shards[1]:08d}.parquet"))
    storage.delete(storage.join(again.output, "_SUCCESS"))
    summary = run(again)
    assert len(before) - summary.before == 8
    assert read_data(again.output).drop_columns(VOLATILE).equals(before.drop_columns(VOLATILE))
    with pytest.raises(InputError, match="restore_size is false in the output and true in this run"):
        run(dataclasses.replace(again, restore_size=True))


def resolved(source):
    """The bytes that a row of a Parquet file has as its picture, by a reader of its own."""
    filesystem, inner = storage.parquet_filesystem(source["uri"])
    table = pq.read_table(inner, filesystem=filesystem, columns=["row_id", "image"])
    (place,) = np.flatnonzero(table.column("row_id").to_numpy() == source["row_id"])
    return table.column("image")[place].as_py()["bytes"]


def test_generate_understand_edit_on_s3_loses_no_row(s3, local_ray):
    prompts = [
        {"id": f"p{n}", "prompt": f"a cat, number {n}", "samples": 2 if n % 5 == 0 else 1, "tag": n}
        for n in range(50)
    ]
    manifest = write_jsonl(f"{s3}/prompts.jsonl", [*prompts, {"id": "bad", "prompt": " ", "tag": 0}])
    size = {"width": 128, "height": 64}
    made = RunConfig(manifest, f"{s3}/made", device="cpu", **size)
    run(made)
    with pytest.raises(InputError, match="is the output of a run"):
        run(RunConfig(made.output, f"{s3}/none", device="cpu"))
    told = RunConfig(made.output, f"{s3}/told", "understand", device="cpu", max_new_tokens=6)
    run(told)
    edited = RunConfig(told.output, f"{s3}/edited", "edit", device="cpu", prompt_column="text")
    with pytest.raises(InputError, match="give one instruction for all rows"):
        run(dataclasses.replace(edited, prompt_column=None))
    run(edited)

    pictures, texts, edits = (rows_of(one.output) for one in (made, told, edited))
    ok = [row for row in pictures if row["status"] == "ok"]
    assert (len(pictures), len(ok)) == (61, 60)
    names = [f"{row['id']}/{row['sample']}" if int(row["id"][1:]) % 5 == 0 else row["id"] for row in ok]
    assert [row["id"] for row in texts] == [row["id"] for row in edits] == names
    assert Counter(row["error_type"] for row in texts) == {"": 60}
    # An answer of blanks alone is no instruction.
    assert {row["error_type"] for row in edits} <= {"", "prompt"}
    for picture, text, edited_row in zip(ok, texts, edits, strict=True):
        for row in (text, edited_row):
            source = row["source"]
            assert source["row_id"] == picture["row_id"]
            assert re.fullmatch(rf"{made.output}/data/shard-\d{{8}}\.parquet", source["uri"])
            if row["status"] == "ok":
                assert source["sha256"] == picture["sha256"]
                assert (source["width"], source["height"]) == (picture["width"], picture["height"])
        assert text["in_prompt"] == picture["prompt"] and text["in_tag"] == picture["tag"]
        assert text["in_seed"] == picture["seed"]
        assert edited_row["prompt"] == text["text"] and edited_row["in_in_tag"] == picture["tag"]
    for row in edits[::20]:
        assert hashlib.sha256(resolved(row["source"])).hexdigest() == ok[row["row_id"]]["sha256"]


def test_pictures_within_parquet_files_are_referred_to_not_copied(pictures, tmp_path, local_ray):
    _, made = pictures
    data = made["plain.png"].path.read_bytes()
    huge = save(Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)), "PNG")
    cells = [
        {"bytes": data, "path": "a.png"},
        {"bytes": None, "path": str(made["plain.jpg"].path)},
        {"bytes": None, "path": None},
        None,
        {"bytes": b"no image", "path": None},
        {"bytes": huge, "path": None},
    ]
    table = pa.table({"image": cells, "label": [0, 1, 2, 3, 4, 5]})
    (tmp_path / "hf").mkdir()
    pq.write_table(table, tmp_path / "hf" / "train.parquet")
    config = RunConfig(
        str(tmp_path / "hf"), str(tmp_path / "out"), "understand", device="cpu", max_new_tokens=2
    )
    planned = plan(config)
    assert planned.rows == 6 and planned.sizes == {}
    run(config)
    rows = rows_of(config.output)
    assert [row["status"] for row in rows] == ["ok", "ok", "error", "error", "error", "ok"]
    assert [row["label"] for row in rows] == [0, 1, 2, 3, 4, 5]
    uri = str(tmp_path / "hf" / "train.parquet")
    assert [(row["source"]["uri"], row["source"]["row_id"]) for row in rows] == [(uri, n) for n in range(6)]
    assert rows[0]["source"]["sha256"] == hashlib.sha256(data).hexdigest()
    size = sum(file.size for file in storage.list_files(config.output))
    assert size < len(huge)
    lines = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == [f"{uri}#{n}" for n in (2, 3, 4)]
    # The same rows as a Dataset, whose pictures travel along.
    import ray.data

    ds = ray.data.from_arrow(table)
    found = sorted(understand(ds, device="cpu", max_new_tokens=2).take_all(), key=lambda row: row["row_id"])
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    assert [row["error_type"] for row in found] == [row["error_type"] for row in rows]
    options = {"device": "cpu", "max_new_tokens": 2, "min_pixels": 100352, "max_pixels": 200704}
    large = sorted(understand(ds, **options).take_all(), key=lambda row: row["row_id"])
    assert [row["error_type"] for row in large] == [row["error_type"] for row in rows]
    # 128 to 256 tokens of a picture, where the checkpoint has 4 to 16.
    assert large[0]["prompt_tokens"] - rows[0]["prompt_tokens"] > 100
    with pytest.raises(InputError, match="width is for generate, but this is edit"):
        edit(ds, prompt="make it red", width=64, height=64)


def test_formats_of_benchmarks_are_manifests(pictures, tmp_path, local_ray):
    folder, _ = pictures
    entries = {
        "k1": {"id": "plain.png", "prompt": "make it red", "edit_type": "color"},
        "k2": {"id": "plain.jpg", "prompt": "remove the cat", "edit_type": "remove"},
    }
    (tmp_path / "imgedit.json").write_text(json.dumps(entries))
    options = ["--image-root", folder, "--preset", "imgedit", "--device", "cpu", "--restore-size"]
    assert command("edit", tmp_path / "imgedit.json", tmp_path / "bench", *options) == 0
    rows = rows_of(str(tmp_path / "bench"))
    assert [(row["id"], row["prompt"], row["edit_type"]) for row in rows] == [
        (key, entry["prompt"], entry["edit_type"]) for key, entry in entries.items()
    ]
    assert {(row["cfg"], row["temperature"], row["top_k"], row["top_p"]) for row in rows} == {(3, 1, 1000, 1)}
    assert all(decode(row["image"]["bytes"]).size == (300, 200) for row in rows)
    assert json.loads((tmp_path / "bench" / "run.json").read_text())["options"]["preset"] == "imgedit"
    assert "imgedit" in (tmp_path / "bench" / "report.html").read_text()

    url = "/v1/images/generations"
    requests = [
        {"custom_id": "r1", "method": "POST", "url": url, "body": {"prompt": "a cat", "n": 2}},
        {"custom_id": "r2", "method": "POST", "url": url, "body": {"prompt": "a dog", "size": "1536x1024"}},
        {"custom_id": "r3", "method": "POST", "url": "/v1/responses", "body": {"input": "a dog"}},
    ]
    manifest = write_jsonl(tmp_path / "requests.jsonl", requests)
    assert command("generate", manifest, tmp_path / "batch", "--device", "cpu") == 3
    rows = rows_of(str(tmp_path / "batch"))
    assert [(row["id"], row["sample"], row["error_type"]) for row in rows] == [
        ("r1", 0, ""),
        ("r1", 1, ""),
        ("r2", 0, ""),
        ("r3", 0, "manifest"),
    ]
    assert (rows[2]["width"], rows[2]["height"]) == (96, 64)
    assert Image.open(io.BytesIO(rows[2]["image"]["bytes"])).size == (96, 64)
