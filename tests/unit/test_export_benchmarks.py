"""Exports for benchmarks: files where evaluators look for them, or refused."""

import csv
import hashlib
import io
import json
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.unit.test_export import make, ok, pixels, planned, tree, with_columns
from wallaroo.model.errors import InputError
from wallaroo.workflows.datasets.export import export
from wallaroo.workflows.settings import OptionError
from wallaroo.workflows.sources.embedded import with_column


def exported(tmp_path, form, **options):
    return export(str(tmp_path / "out"), str(tmp_path / "dest"), form, **options)


# DPG-Bench


def looked_up(folder):
    """The item_ids that DPG-Bench's evaluator takes from the names of a folder's files."""
    return {os.path.basename(name).split(".")[0] for name in os.listdir(folder)}


@pytest.mark.parametrize(
    "ids",
    [
        ["COCOval2014000000234466", "partiprompts101", "0"],
        ["0.txt", "drawtext7.txt", "midjourney_3.txt"],
        ["prompts/0.txt", "prompts/vrd-12.txt", "a/b/con"],
        ["with a blank", "中文", "x" * 200],
    ],
)
def test_dpg_names_are_those_that_the_evaluator_looks_up(outputs, tmp_path, ids):
    rows = make(outputs, tmp_path / "out", planned(outputs, ids, 4))
    assert exported(tmp_path, "dpg").renamed == 0
    items = [re.sub(r"\.txt$", "", name.split("/")[-1]) for name in ids]
    assert looked_up(tmp_path / "dest") == set(items)

    summary = export(str(tmp_path / "out"), str(tmp_path / "single"), "dpg-single")
    assert (summary.exported, summary.files, summary.misses) == (12, 12, 0)
    for row in rows:
        name = f"{items[ids.index(row['id'])]}.png"
        data = (tmp_path / "single" / str(row["sample"]) / name).read_bytes()
        assert data == row["image"]["bytes"]
    assert looked_up(tmp_path / "single" / "3") == set(items)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["prompts.jsonl:0", "prompts.jsonl:1"], "not an item_id of DPG-Bench"),
        (["a.b"], "not an item_id of DPG-Bench"),
        (["good", "bad.png"], "not an item_id of DPG-Bench"),
        (["a/0.txt", "b/0.txt"], r"'a/0\.txt' and 'b/0\.txt' would both be"),
        (["back\\slash"], "cannot be the name of a file"),
        (["x" * 241], "cannot be the name of a file"),
    ],
)
@pytest.mark.parametrize("form", ["dpg", "dpg-single"])
def test_ids_that_dpg_would_not_find_are_refused_before_anything_is_written(
    outputs, tmp_path, ids, words, form
):
    make(outputs, tmp_path / "out", planned(outputs, ids, 4))
    with pytest.raises(InputError, match=words) as caught:
        exported(tmp_path, form)
    assert str(caught.value).isprintable() and not (tmp_path / "dest").exists()


def test_missing_files_are_named(outputs, tmp_path):
    ids = [f"p{number:02d}" for number in range(14)]
    make(outputs, tmp_path / "out", planned(outputs, ids, 4, errors=range(5, 56, 4)))
    summary = exported(tmp_path, "dpg")
    assert (summary.exported, summary.misses, summary.errors) == (4, 13, 13)
    assert summary.missed == tuple(f"p{number:02d}.png" for number in range(1, 11))
    assert "the evaluator will miss p01.png, p02.png, " in summary.text()
    assert summary.text().endswith("p10.png and 3 more files.")


def test_imgedit_names_what_its_evaluator_will_miss(outputs, tmp_path):
    tables = planned(outputs, ["1082", "7", "12"], 2, errors=(2, 5), source=True)
    make(outputs, tmp_path / "out", tables, task="edit")
    summary = exported(tmp_path, "imgedit")
    assert (summary.exported, summary.left_out, summary.errors, summary.missed) == (2, 2, 2, ("7.png",))
    assert sorted(tree(tmp_path / "dest")) == ["1082.png", "12.png"]


def test_geneval_names_missing_samples(outputs, tmp_path):
    make(outputs, tmp_path / "out", planned(outputs, ["a", "b"], 2, errors=(1, 2)))
    assert exported(tmp_path, "geneval").missed == ("00000/samples/0001.png", "00001/samples/0000.png")


# WISE


@pytest.mark.parametrize("kind", [pa.int64(), pa.string(), pa.float64()])
def test_wise_finds_a_picture_by_prompt_id(outputs, tmp_path, kind):
    numbers = pa.array([1, 1, 700, 700, 25, 25]).cast(kind)
    columns = [("prompt_id", kind, numbers.to_pylist())]
    tables = planned(outputs, ["a", "b", "c"], 2, errors=(4,))
    rows = make(outputs, tmp_path / "out", with_columns(tables, columns), image_format="webp")
    summary = exported(tmp_path, "wise")
    assert (summary.exported, summary.left_out, summary.missed) == (2, 3, ("25.png",))
    assert sorted(tree(tmp_path / "dest")) == ["1.png", "700.png"]
    data = (tmp_path / "dest" / "700.png").read_bytes()
    assert data.startswith(b"\x89PNG") and (pixels(data) == pixels(rows[2]["image"]["bytes"])).all()


def test_wise_takes_ids_that_are_numbers_and_no_others(outputs, tmp_path):
    make(outputs, tmp_path / "out", planned(outputs, ["3", "001"]))
    exported(tmp_path, "wise")
    assert sorted(tree(tmp_path / "dest")) == ["1.png", "3.png"]
    for name, ids in {"words": ["a.json:0"], "negative": ["-1"], "twice": ["1", "01"]}.items():
        make(outputs, tmp_path / name, planned(outputs, ids))
        with pytest.raises(InputError, match=r"prompt_id, a number|would both be"):
            export(str(tmp_path / name), str(tmp_path / "other"), "wise")


# T2I-CompBench


def test_t2i_compbench_finds_prompts_in_names_and_their_order_in_numbers(outputs, tmp_path):
    prompts = {"p0": "a green bench and a blue bowl", "p1": "The cat's bowl, 3.5 inches.", "p2": "猫"}

    def edit(row):
        return row | {"prompt": prompts[row["id"]]}

    rows = make(outputs, tmp_path / "out", planned(outputs, prompts, 10, errors=(13,), edit=edit))
    summary = exported(tmp_path, "t2i-compbench")
    assert (summary.exported, summary.errors) == (29, 1)
    assert summary.missed == ("samples/The cat's bowl, 3.5 inches._000013.png",)
    names = os.listdir(tmp_path / "dest" / "samples")
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [name.split("_")[0] for name in names] == [row["prompt"] for row in ok(rows)]
    assert names[0] == "a green bench and a blue bowl_000000.png"
    assert names[-1] == "猫_000029.png"
    for name, row in zip(names, ok(rows), strict=True):
        assert (tmp_path / "dest" / "samples" / name).read_bytes() == row["image"]["bytes"]


@pytest.mark.parametrize("prompt", ["a_cat", "cat/dog", "x" * 240, ".hidden", "line\nbreak", ""])
def test_prompts_that_are_no_file_names_are_refused(outputs, tmp_path, prompt):
    make(outputs, tmp_path / "out", planned(outputs, ["a"], edit=lambda row: row | {"prompt": prompt}))
    if not prompt:
        exported(tmp_path, "t2i-compbench")
        assert list(tree(tmp_path / "dest")) == ["samples/_000000.png"]
        return
    with pytest.raises(InputError, match=r"underscore|cannot be the name") as caught:
        exported(tmp_path, "t2i-compbench")
    assert str(caught.value).isprintable() and not (tmp_path / "dest").exists()


# GEdit-Bench


def gedit_output(outputs, tmp_path, place="image", samples=1, errors=(), language="instruction_language"):
    """A run over GEdit-Bench's columns, its sources as files or in a column of a Parquet file."""
    sources = [outputs.picture(70 + number, 24, 40) for number in range(4)]
    files = []
    for number, source in enumerate(sources):
        data = io.BytesIO()
        Image.fromarray(source).save(data, "PNG")
        files.append(data.getvalue())
        (tmp_path / f"{number}.png").write_bytes(files[-1])
    cells = tmp_path / "gedit.parquet"
    pq.write_table(pa.table({place or "image": [{"bytes": data, "path": "x"} for data in files]}), cells)

    def edit(row):
        number = int(row["id"][1:])
        where = {"uri": with_column(str(cells), place), "row_id": number}
        if not place:
            where = {"uri": str(tmp_path / f"{number}.png"), "row_id": None}
        sha256 = hashlib.sha256(files[number]).hexdigest()
        facts = {"task_type": ["subject-add", "tone_transfer"][number % 2], "key": f"{number:032x}"}
        facts |= {language: ["en", "cn"][number // 2]} if language else {}
        return (
            row
            | facts
            | {
                "language": ["en", "zh"][number // 2],
                "source": {"sha256": sha256, "width": 40, "height": 24} | where,
            }
        )

    tables = planned(outputs, ["k0", "k1", "k2", "k3"], samples, errors, edit=edit, source=True, shard_rows=3)
    return sources, make(outputs, tmp_path / "out", tables, task="edit", image_format="webp")


@pytest.mark.parametrize("place", ["image", "input_image", "a/b #1", ""])
@pytest.mark.parametrize("language", ["instruction_language", ""])
def test_gedit_finds_results_and_their_sources(outputs, tmp_path, place, language):
    sources, rows = gedit_output(outputs, tmp_path, place, language=language)
    summary = exported(tmp_path, "gedit")
    assert (summary.exported, summary.files, summary.misses) == (4, 8, 0)
    for number, row in enumerate(rows):
        group, folder = ["subject-add", "tone_transfer"][number % 2], ["en", "cn"][number // 2]
        stem = tmp_path / "dest" / "fullset" / group / folder / f"{number:032x}"
        assert (pixels(stem.with_suffix(".png").read_bytes()) == pixels(row["image"]["bytes"])).all()
        source = stem.with_name(f"{stem.name}_SRCIMG.png").read_bytes()
        assert source.startswith(b"\x89PNG") and (pixels(source) == sources[number]).all()
    before = tree(tmp_path / "dest")
    assert exported(tmp_path, "gedit").unchanged == 8 and tree(tmp_path / "dest") == before


def test_gedit_takes_sample_0_and_names_what_is_missing(outputs, tmp_path):
    gedit_output(outputs, tmp_path, samples=2, errors=(2, 5))
    summary = exported(tmp_path, "gedit")
    assert (summary.exported, summary.left_out, summary.errors, summary.files) == (3, 3, 2, 6)
    assert summary.missed == (f"fullset/tone_transfer/en/{1:032x}.png",)


def test_gedit_refuses_other_sources_and_other_manifests(outputs, tmp_path):
    gedit_output(outputs, tmp_path, place="")
    Image.fromarray(np.zeros((24, 40, 3), np.uint8)).save(tmp_path / "2.png")
    with pytest.raises(InputError, match=r"2\.png has changed since it was edited"):
        exported(tmp_path, "gedit")
    (tmp_path / "2.png").unlink()
    with pytest.raises(InputError, match=r"2\.png does not exist"):
        exported(tmp_path, "gedit")
    make(outputs, tmp_path / "plain", planned(outputs, ["a"], source=True), task="edit")
    with pytest.raises(InputError, match="task_type, which the row 'a' lacks"):
        export(str(tmp_path / "plain"), str(tmp_path / "other"), "gedit")
    assert not (tmp_path / "other").exists()


# VLMEvalKit


def test_vlmevalkit_reads_its_columns_and_the_predictions(outputs, tmp_path):
    import pandas

    columns = [
        ("index", pa.int64(), [3, 4, 5]),
        ("question", pa.string(), ["What\tis\n'this'?", 'a "quote"', "中文"]),
        ("A", pa.string(), ["cat", None, "x"]),
        ("answer", pa.string(), ["A", "B", "C"]),
    ]
    tables = with_columns(planned(outputs, ["a", "b", "c"], errors=(1,), source=True), columns)
    rows = make(outputs, tmp_path / "out", tables, task="understand")
    summary = exported(tmp_path, "vlmevalkit")
    assert (summary.exported, summary.errors, summary.what) == (2, 1, "answer")
    found = pandas.read_csv(tmp_path / "dest" / "predictions.tsv", sep="\t")
    assert found["index"].tolist() == [3, 5]
    assert found["question"].tolist() == ["What\tis\n'this'?", "中文"]
    assert found["A"].tolist() == ["cat", "x"] and found["answer"].tolist() == ["A", "C"]
    assert found["prediction"].tolist() == [row["text"] for row in ok(rows)]

    plain = planned(outputs, ["a", "b"], 2, source=True)
    make(outputs, tmp_path / "plain", plain, task="understand")
    summary = export(str(tmp_path / "plain"), str(tmp_path / "other"), "vlmevalkit")
    with open(tmp_path / "other" / "predictions.tsv", newline="") as file:
        lines = list(csv.DictReader(file, delimiter="\t"))
    assert [line["index"] for line in lines] == ["a", "b"] and summary.left_out == 2
    assert [line["question"] for line in lines] == ["prompt of a", "prompt of b"]


# OpenAI


def lines_of(tmp_path, **options):
    exported(tmp_path, "openai-batch", **options)
    return [json.loads(line) for line in (tmp_path / "dest" / "results.jsonl").read_bytes().splitlines()]


def test_answers_are_chat_completions(outputs, tmp_path):
    tables = planned(outputs, ["good", "half", "bad"], 2, errors=(3, 4, 5), source=True)
    rows = make(outputs, tmp_path / "out", tables, task="understand")
    summary = exported(tmp_path, "openai-batch")
    assert summary.text() == (
        f"3 answers exported to {tmp_path}/dest, 1 file; 3 error rows written to results.jsonl as `error`."
    )
    lines = lines_of(tmp_path)
    assert [line["custom_id"] for line in lines] == ["good", "half", "bad"]
    assert all(set(line) == {"id", "custom_id", "response", "error"} for line in lines)
    body = lines[0]["response"]["body"]
    assert lines[0]["response"]["status_code"] == 200 and lines[0]["error"] is None
    assert (body["object"], body["created"]) == ("chat.completion", int(outputs.STARTED.timestamp()))
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert [choice["message"]["content"] for choice in body["choices"]] == [row["text"] for row in rows[:2]]
    assert {choice["finish_reason"] for choice in body["choices"]} == {"stop"}
    usage = body["usage"]
    assert usage["prompt_tokens"] == 30 and usage["completion_tokens"] == 40 and usage["total_tokens"] == 70
    assert [choice["index"] for choice in lines[1]["response"]["body"]["choices"]] == [0]
    assert lines[1]["error"] == {"code": "size", "message": "1 of 2 answers failed: width is 70"}
    assert lines[2]["response"] is None and lines[2]["error"]["code"] == "size"
    for options in ({"embed_metadata": True}, {"image_urls": "https://x"}):
        with pytest.raises(OptionError, match="are for images, but the results are texts"):
            exported(tmp_path, "openai-batch", **options)


def test_the_format_that_a_request_asks_for_is_honoured(outputs, tmp_path):
    asked = [None, "png", "webp", "jpeg"]
    tables = with_columns(planned(outputs, list("abcd")), [("output_format", pa.string(), asked)])
    rows = make(outputs, tmp_path / "out", tables, image_format="webp")
    lines = lines_of(tmp_path, image_urls="https://x")
    expected = ["webp", "png", "webp", "jpeg"]
    assert [line["response"]["body"]["output_format"] for line in lines] == expected
    for line, row, form in zip(lines, rows, expected, strict=True):
        (one,) = line["response"]["body"]["data"]
        suffix = "jpg" if form == "jpeg" else form
        assert one["url"] == f"https://x/images/{row['id']}.{suffix}"
        data = (tmp_path / "dest" / "images" / f"{row['id']}.{suffix}").read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            assert image.format.lower() == form
        if form == "webp":
            assert data == row["image"]["bytes"]
        elif form == "png":
            assert (pixels(data) == pixels(row["image"]["bytes"])).all()

    make(
        outputs,
        tmp_path / "gif",
        with_columns(planned(outputs, ["a"]), [("output_format", pa.string(), ["gif"])]),
    )
    with pytest.raises(
        InputError, match=r"output_format of the request 'a' is 'gif', but must be one of png"
    ):
        export(str(tmp_path / "gif"), str(tmp_path / "other"), "openai-batch")
