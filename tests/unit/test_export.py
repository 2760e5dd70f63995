"""Exports: read back by readers that are not ours, equal to the Parquet rows, safe whatever the ids are."""

import base64
import dataclasses
import datetime
import hashlib
import io
import json
import os
import re
import tarfile
import xml.etree.ElementTree
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from wallaroo.jobs.cli import main
from wallaroo.model.errors import InputError
from wallaroo.workflows.datasets.export import FORMATS, export
from wallaroo.workflows.datasets.export_files import file_stem
from wallaroo.workflows.outputs import layout, run_file, shards
from wallaroo.workflows.outputs import schema as outputs_schema
from wallaroo.workflows.outputs import values as outputs_values
from wallaroo.workflows.outputs.rows import Producer, RunConstants, build_result_table, encode_image
from wallaroo.workflows.outputs.schema import result_schema
from wallaroo.workflows.outputs.xmp import DIGITAL_SOURCE_TYPE, embed, xmp_packet
from wallaroo.workflows.plans.plan import Round, read_plan
from wallaroo.workflows.reports.finish import finish
from wallaroo.workflows.settings import OptionError

HOSTILE = [
    "plain-id_1.a",
    "a/b",
    "a_b",
    "../../escape",
    "..",
    ".",
    ".hidden",
    "-rf",
    "/etc/passwd",
    "C:\\Windows\\x",
    "con",
    "NUL.txt",
    "中文",
    "中女",
    "x" * 300,
    "x" * 301,
    " ",
    "line\nbreak",
    "a@1",
    "prompts.jsonl:12",
]


def planned(outputs, ids, samples=1, errors=(), edit=lambda row: row, shard_rows=8, source=False):
    """Shards of a plan with so many samples of every id; errors: positions of rows that it refuses."""
    template = outputs.plan_table(rows=1)
    first = template.to_pylist()[0]
    schema = template.schema
    if source:
        schema = schema.insert(len(schema) - 4, pa.field("source", outputs_schema.SOURCE_TYPE))
    rows = []
    for position, (row_id, sample) in enumerate((one, n) for one in ids for n in range(samples)):
        wrong = position in errors
        row = first | {
            "row_id": position,
            "shard": position // shard_rows,
            "id": row_id,
            "sample": sample,
            "prompt": f"prompt of {row_id}",
            "width": 64,
            "height": 64,
            "seed": 1000 + position,
            "status": "error" if wrong else "planned",
            "error_type": "size" if wrong else "",
            "error_message": "width is 70" if wrong else "",
            "tag": f"t{position}",
        }
        if source:
            uri = f"s3://b/{position}.png"
            row["source"] = {"uri": uri, "sha256": "a" * 64, "width": 9, "height": 8, "row_id": 70 + position}
        rows.append(edit(row))
    for row in rows:
        for name in row.keys() - set(schema.names):
            schema = schema.append(pa.field(name, pa.string()))
    return [
        pa.Table.from_pylist(rows[start : start + shard_rows], schema=schema)
        for start in range(0, len(rows), shard_rows)
    ]


def make(outputs, output, tables, task="generate", image_format="png", quality=None, embedded=False):
    """A finished output of these shards; returns its rows. Pictures are noise made of the seed."""
    fields = outputs.FIELDS | {"task": task} | ({"embed_metadata": True} if embedded else {})
    run_file.put_run(str(output), fields)
    outputs.write_plan(output, tables)
    run = RunConstants(
        task,
        "m" * 64,
        outputs_values.digest(fields),
        image_format=image_format,
        image_quality=quality,
        embed_metadata=embedded,
    )
    for table in tables:
        carried = pa.schema(
            [field for field in table.schema if field.name not in outputs_schema.RESULT_NAMES],
            metadata=table.schema.metadata,
        )
        made = outputs.outcomes(table)
        decode = None
        if task == "understand":
            made = [dataclasses.replace(one, pixels=None, finish_reason="stop") for one in made]
            decode = "tokens {}".format
        built = build_result_table(
            table, made, run, Producer("r", "e" * 64, 1), result_schema(carried), decode=decode
        )
        shards.write_shard(str(output), table.column("shard")[0].as_py(), built)
    finish(str(output), read_plan(str(output)))
    return pq.read_table(output / "data").to_pylist()


def tree(folder):
    """Relative path -> bytes of every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if not path.is_dir()
    }


def ok(rows):
    return [row for row in rows if row["status"] == "ok"]


def lines_of(path):
    """Values of a JSON Lines file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


# Formats


def test_files_are_an_imagefolder(outputs, tmp_path):
    import datasets

    def edit(row):
        # Names that imagefolder would open, or that are taken.
        return row | {"source_file_name": "/no/such", "file_name": "x", "file_name_text": "y"}

    rows = make(outputs, tmp_path / "out", planned(outputs, ["b", "a", "c/d"], 3, errors=(1,), edit=edit))
    summary = export(str(tmp_path / "out"), str(tmp_path / "dest"), "files")
    assert (summary.exported, summary.errors, summary.files, summary.renamed) == (8, 1, 9, 3)
    dataset = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "dest"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert dataset["id"] == [row["id"] for row in ok(rows)]
    assert dataset["seed"] == [row["seed"] for row in ok(rows)]
    lines = lines_of(tmp_path / "dest" / "metadata.jsonl")
    for row, found, line in zip(ok(rows), dataset, lines, strict=True):
        assert (np.asarray(found["image"]) == pixels(row["image"]["bytes"])).all()
        assert (tmp_path / "dest" / line["file_name"]).read_bytes() == row["image"]["bytes"]
        assert line["sha256"] == row["sha256"] == sha256(row["image"]["bytes"])
        assert found["include"] == row["include"] and found["tag"] == row["tag"]
        assert found["source_file_name_text"] == "/no/such"
        assert {found["file_name_text"], found["in_file_name_text"]} == {"x", "y"}
    assert [line["file_name"] for line in lines[:5]] == [
        "b@0.png",
        "b@2.png",
        "a@0.png",
        "a@1.png",
        "a@2.png",
    ]


def test_one_picture_of_an_id_has_its_name_alone_across_shards(outputs, tmp_path):
    make(outputs, tmp_path / "out", planned(outputs, ["a", "b"], 3, shard_rows=4))
    export(str(tmp_path / "out"), str(tmp_path / "dest"), "files")
    assert "b@0.png" in tree(tmp_path / "dest") and "b.png" not in tree(tmp_path / "dest")
    make(outputs, tmp_path / "out1", planned(outputs, ["a", "b"], shard_rows=1))
    export(str(tmp_path / "out1"), str(tmp_path / "dest1"), "files")
    assert sorted(tree(tmp_path / "dest1")) == ["a.png", "b.png", "metadata.jsonl"]


def test_webdataset_holds_the_bytes_of_the_parquet_files(outputs, tmp_path):
    import webdataset

    ids = ["a.b", "a_b", "中文", "n/1", *(f"p{n}" for n in range(12))]
    # The middle shard has error rows only.
    tables = planned(outputs, ids, 2, errors=range(8, 16))
    rows = make(outputs, tmp_path / "out", tables, image_format="webp")
    for dest in ("one", "two"):
        export(str(tmp_path / "out"), str(tmp_path / dest), "webdataset")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert sorted(tree(tmp_path / "one")) == [f"shard-{n:08d}.tar" for n in range(3)]

    urls = str(tmp_path / "one" / "shard-{00000000..00000002}.tar")
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(found) == len(ok(rows)) == 24
    assert len({sample["__key__"] for sample in found}) == 24
    for row, sample in zip(ok(rows), found, strict=True):
        assert sample["webp"] == row["image"]["bytes"]
        assert sample["txt"].decode() == row["prompt"]
        facts = json.loads(sample["json"])
        assert (facts["id"], facts["seed"], facts["sha256"]) == (row["id"], row["seed"], row["sha256"])
        assert facts["include"] == row["include"] and facts["weight"] == row["weight"]
    with tarfile.open(tmp_path / "one" / "shard-00000000.tar") as tar:
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in tar} == {
            (0, 0, "", 0o644)
        }


INCLUDE = pa.list_(
    pa.struct(
        [
            ("class", pa.string()),
            ("color", pa.string()),
            ("position", pa.list_(pa.string())),
            ("box", pa.struct([("left", pa.int32()), ("top", pa.int32())])),
        ]
    )
)
LATE = [
    ("extra", pa.struct([("a", pa.int64()), ("b", pa.list_(pa.int32()))]), {"a": 1, "b": [None, 2]}),
    ("score", pa.float64(), 0.5),
    ("votes", pa.int64(), 3),
    ("huge", pa.uint64(), 2**64 - 1),
    ("good", pa.bool_(), True),
    ("note", pa.string(), "late"),
    ("sizes", pa.list_(pa.int32()), [1, 2]),
    ("day", pa.date32(), datetime.date(2026, 1, 2)),
    ("never", pa.string(), None),
]
"""Columns that have a value in the last rows alone, with their Arrow types and that value."""


def with_columns(tables, columns):
    """Tables with more columns: name, type and a value of every row."""
    made, start = [], 0
    for table in tables:
        for name, kind, values in columns:
            piece = pa.array(values[start : start + len(table)], kind)
            index = table.schema.get_field_index(name)
            table = table.drop_columns(name) if index >= 0 else table
            table = table.append_column(pa.field(name, kind), piece)
        start += len(table)
        made.append(table.replace_schema_metadata({}))
    return made


def test_no_format_has_a_null_that_only_arrow_put_into_a_nested_value(outputs, tmp_path):
    wanted = [
        [{"class": "cat"}],
        [{"class": "cat", "color": "red"}, {"class": "dog", "position": ["left of", None]}],
        [{"class": "dog", "box": {"top": 7}}],
        [None, {"class": "cat", "box": {"left": 1, "top": 2}}],
    ]
    tables = with_columns(
        planned(outputs, ["a", "b", "c", "d"], shard_rows=2), [("include", INCLUDE, wanted)]
    )
    make(outputs, tmp_path / "out", tables)
    for form in ("files", "webdataset", "img2dataset", "geneval"):
        export(str(tmp_path / "out"), str(tmp_path / form), form)
    lines = lines_of(tmp_path / "files" / "metadata.jsonl")
    assert [json.loads(line["include"]) for line in lines] == wanted
    found = read_geneval(tmp_path / "geneval")
    assert [found[number][0]["include"] for number in range(4)] == wanted
    for form, names in (
        ("webdataset", ["shard-00000000", "shard-00000001"]),
        ("img2dataset", ["00000", "00001"]),
    ):
        facts = [one for name in names for one in json_members(tmp_path / form / f"{name}.tar")]
        assert [json.loads(one["include"]) for one in facts] == wanted

    tables = with_columns(
        planned(outputs, ["a", "b", "c", "d"], shard_rows=2, source=True), [("include", INCLUDE, wanted)]
    )
    make(outputs, tmp_path / "answers", tables, task="understand")
    export(str(tmp_path / "answers"), str(tmp_path / "jsonl"), "jsonl")
    assert [line["include"] for line in lines_of(tmp_path / "jsonl" / "answers.jsonl")] == wanted


def test_nulls_of_json_text_and_of_maps_are_the_manifest_s_own(outputs, tmp_path):
    tables = [
        table.append_column("pairs", pa.array([[("k", None)]], pa.map_(pa.string(), pa.string())))
        for table in planned(outputs, ["a"], edit=lambda row: row | {"include": '[{"color": null}]'})
    ]
    make(outputs, tmp_path / "out", tables)
    export(str(tmp_path / "out"), str(tmp_path / "dest"), "files")
    (metadata,) = lines_of(tmp_path / "dest" / "metadata.jsonl")
    assert json.loads(metadata["include"]) == [{"color": None}]
    assert json.loads(metadata["pairs"]) == [["k", None]]


def pandas_lines(rows, path):
    pd.DataFrame(rows).to_json(path, orient="records", lines=True)


def polars_lines(rows, path):
    pl.DataFrame(rows, strict=False).write_ndjson(path)


def duckdb_lines(rows, path):
    duckdb.from_arrow(pl.DataFrame(rows).to_arrow()).query("made", f"COPY made TO '{path}' (FORMAT json)")


def own_lines(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("write", [own_lines, pandas_lines, polars_lines, duckdb_lines])
def test_geneval_knows_no_null_whoever_wrote_the_lines(outputs, tmp_path, write):
    """Columns, keys of objects, and keys of objects within these."""
    rows = [
        {"include": [{"class": "cat"}]},
        {"include": [{"class": "cat", "color": "red"}], "exclude": [{"class": "dog"}]},
        {"include": [{"class": "cat", "box": {"left": 1}}, {"class": "dog", "box": {"left": 1, "top": 2}}]},
    ]
    write(rows, tmp_path / "m.jsonl")
    lines = lines_of(tmp_path / "m.jsonl")
    assert write is own_lines or "null" in (tmp_path / "m.jsonl").read_text()
    columns = [
        (name, pa.string(), [json.dumps(line[name]) if line.get(name) else None for line in lines])
        for name in ("include", "exclude")
    ]
    tables = with_columns(planned(outputs, ["a", "b", "c"]), columns)
    mark = {outputs_schema.JSON_MARK: b'["include", "exclude"]'}
    make(outputs, tmp_path / "out", [table.replace_schema_metadata(mark) for table in tables])
    export(str(tmp_path / "out"), str(tmp_path / "dest"), "geneval")
    found = read_geneval(tmp_path / "dest")
    wanted = {"tag", "prompt", "weight", "when"}
    assert [{k: v for k, v in found[n][0].items() if k not in wanted} for n in range(3)] == rows


def json_members(path):
    """What the `json` files of a tar say, in order."""
    with tarfile.open(path) as tar:
        return [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]


@pytest.mark.parametrize("form", ["webdataset", "img2dataset"])
@pytest.mark.parametrize("task", ["generate", "edit"])
def test_hugging_face_loads_tars_whose_columns_begin_late(outputs, tmp_path, form, task):
    import datasets

    # The first shard has error rows alone, and columns have their first value in the last of 12 rows.
    ids = [f"p{n}" for n in range(12)]
    late = [(name, kind, [None] * 11 + [value]) for name, kind, value in LATE]
    late.append(("tags", pa.list_(pa.string()), [[]] * 11 + [["x"]]))
    tables = planned(outputs, ids, errors=range(3), shard_rows=3, source=task == "edit")
    rows = make(outputs, tmp_path / "out", with_columns(tables, late), task=task)
    summary = export(str(tmp_path / "out"), str(tmp_path / "dest"), form)
    assert (summary.exported, summary.errors, summary.files) == (9, 3, 3)
    names = sorted(tree(tmp_path / "dest"))
    members = [one for name in names for one in json_members(tmp_path / "dest" / name)]
    kinds = {tuple((key, type(value)) for key, value in one.items()) for one in members}
    assert len(kinds) == 1

    dataset = datasets.load_dataset(
        "webdataset",
        data_files=[str(tmp_path / "dest" / name) for name in names],
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert len(dataset) == 9
    for row, found in zip(ok(rows), dataset, strict=True):
        assert found["txt"] == row["prompt"] and found["json"]["seed"] == row["seed"]
        assert (np.asarray(found["png"]) == pixels(row["image"]["bytes"])).all()
        assert found["json"]["weight"] == row["weight"]
    empty = {name: dataset[0]["json"][name] for name, _, _ in LATE}
    assert empty == dict.fromkeys(empty, "") and dataset[0]["json"]["tags"] == "[]"
    last = dataset[8]["json"]
    assert {name: last[name] for name, _, _ in LATE} == {
        "extra": '{"a": 1, "b": [null, 2]}',
        "score": "0.5",
        "votes": "3",
        "huge": "18446744073709551615",
        "good": "true",
        "note": "late",
        "sizes": "[1, 2]",
        "day": "2026-01-02",
        "never": "",
    }
    assert last["tags"] == '["x"]'


def test_img2dataset_s_names_keys_and_captions(outputs, tmp_path):
    edit = {"key": "mine", "caption": "mine too"}
    rows = make(
        outputs,
        tmp_path / "out",
        planned(outputs, ["a", "b/c", "d"], edit=lambda row: row | edit, shard_rows=2),
    )
    summary = export(str(tmp_path / "out"), str(tmp_path / "dest"), "img2dataset")
    assert summary.renamed == 0 and sorted(tree(tmp_path / "dest")) == ["00000.tar", "00001.tar"]
    with tarfile.open(tmp_path / "dest" / "00000.tar") as tar:
        assert tar.getnames() == [f"00000000{n}.{end}" for n in range(2) for end in ("png", "txt", "json")]
    with tarfile.open(tmp_path / "dest" / "00001.tar") as tar:
        assert tar.getnames() == [f"000010000.{end}" for end in ("png", "txt", "json")]
        facts = json.load(tar.extractfile("000010000.json"))
    assert (facts["key"], facts["caption"]) == ("000010000", rows[2]["prompt"])
    assert (facts["in_key"], facts["in_caption"], facts["id"]) == ("mine", "mine too", "d")


def read_geneval(folder):
    """What GenEval's evaluator takes from a folder: metadata and pictures of every numbered folder."""
    found = {}
    for name in os.listdir(folder):
        inner = os.path.join(folder, name)
        if not os.path.isdir(inner) or not name.isdigit():
            continue
        with open(os.path.join(inner, "metadata.jsonl")) as file:
            metadata = json.load(file)
        samples = os.path.join(inner, "samples")
        pictures = {
            one: Path(samples, one).read_bytes()
            for one in os.listdir(samples)
            if os.path.isfile(os.path.join(samples, one)) and re.match(r"\d+\.png", one)
        }
        found[int(name)] = (metadata, pictures)
    return found


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_geneval_reads_the_prompts_metadata_and_samples(outputs, tmp_path, image_format):
    lines = [
        {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"},
        {
            "tag": "position",
            "include": [{"class": "cat", "count": 1}, {"class": "dog", "position": ["right of", 0]}],
            "exclude": [{"class": "cat", "count": 3}],
            "prompt": "a dog right of a cat, 猫",
        },
        {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"},
    ]

    def edit(row):
        line = lines[int(row["id"][1:])]
        texts = {"include": json.dumps(line["include"])}
        texts["exclude"] = json.dumps(line["exclude"]) if "exclude" in line else None
        return row | texts | {"tag": line["tag"], "prompt": line["prompt"], "weight": None, "when": None}

    # All of the second prompt and one sample of the third are error rows.
    tables = planned(outputs, ["p0", "p1", "p2"], 4, errors=(4, 5, 6, 7, 9), edit=edit)
    mark = {outputs_schema.JSON_MARK: b'["include", "exclude"]'}
    tables = [table.replace_schema_metadata(mark) for table in tables]
    rows = make(outputs, tmp_path / "out", tables, image_format=image_format)
    export(str(tmp_path / "out"), str(tmp_path / "dest"), "geneval")
    found = read_geneval(tmp_path / "dest")
    assert {number: metadata for number, (metadata, _) in found.items()} == {0: lines[0], 2: lines[2]}
    assert sorted(found[2][1]) == ["0000.png", "0002.png", "0003.png"]
    assert os.path.isdir(tmp_path / "dest" / "00002")
    for row in ok(rows):
        data = found[int(row["id"][1:])][1][f"{row['sample']:04d}.png"]
        assert data.startswith(b"\x89PNG")
        assert (pixels(data) == pixels(row["image"]["bytes"])).all()
        assert image_format != "png" or sha256(data) == row["sha256"]


def test_geneval_numbers_follow_the_manifest_though_a_look_came_first(outputs, tmp_path):
    output = tmp_path / "out"
    run_file.put_run(str(output), outputs.FIELDS)
    # A look at rows 1 and 3 of the manifest, then the others.
    rounds = [[1, 3], [0, 2]]
    tables = planned(outputs, [f"p{number}" for one in rounds for number in one], 2, shard_rows=2)
    for part, chosen in enumerate(rounds):
        outputs.write_plan(output, tables[2 * part : 2 * part + 2])
        path = output / "plan" / f"part-{part:05d}.json"
        values = json.loads(path.read_text())
        opening = Round.from_values(values["opening"])
        selected = np.isin(np.arange(4), chosen)
        values["opening"] = dataclasses.replace(opening, selected=selected).to_values()
        path.write_text(json.dumps(values))
    for shard, table in enumerate(tables):
        shards.write_shard(str(output), shard, outputs.result_table(table))
    finish(str(output), read_plan(str(output)))
    export(str(output), str(tmp_path / "dest"), "geneval")
    found = read_geneval(tmp_path / "dest")
    assert {number: metadata["prompt"] for number, (metadata, _) in found.items()} == {
        number: f"prompt of p{number}" for number in range(4)
    }


def test_dpg_grids_hold_the_four_samples_where_the_evaluator_crops(outputs, tmp_path):
    def edit(row):
        return row | ({"width": 80} if row["id"] == "wide" else {})

    ids = ["COCOval2014000000234466", "partiprompts101", "broken", "wide"]
    tables = planned(outputs, ids, 4, errors=(9,), edit=edit)
    rows = make(outputs, tmp_path / "out", tables, image_format="webp")
    summary = export(str(tmp_path / "out"), str(tmp_path / "dest"), "dpg")
    assert (summary.exported, summary.left_out, summary.errors) == (8, 7, 1)
    assert "7 ok rows left out, since a grid" in summary.text()
    found = {name.split(".")[0]: data for name, data in tree(tmp_path / "dest").items()}
    assert sorted(found) == sorted(ids[:2])
    side = 64
    for row_id, data in found.items():
        with Image.open(io.BytesIO(data)) as grid:
            crops = [np.asarray(grid.crop((x, y, x + side, y + side))) for y in (0, side) for x in (0, side)]
        expected = [pixels(row["image"]["bytes"]) for row in rows if row["id"] == row_id]
        assert all((a == b).all() for a, b in zip(crops, expected, strict=True))


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_imgedit_finds_every_key(outputs, tmp_path, image_format):
    keys = {f"{number}": {"id": f"animal/{number}.jpg", "edit_type": "style"} for number in (1082, 7, 12)}
    tables = planned(outputs, keys, 2, errors=(2,), source=True)
    rows = make(outputs, tmp_path / "out", tables, task="edit", image_format=image_format)
    summary = export(str(tmp_path / "out"), str(tmp_path / "dest"), "imgedit")
    assert (summary.exported, summary.left_out, summary.errors) == (2, 3, 1)
    first = {row["id"]: row for row in ok(rows) if row["sample"] == 0}
    for key in keys:
        path = os.path.join(tmp_path / "dest", f"{key}.png")
        assert os.path.exists(path) == (key in first)
        if key in first:
            data = Path(path).read_bytes()
            assert data.startswith(b"\x89PNG")
            assert (pixels(data) == pixels(first[key]["image"]["bytes"])).all()
            assert image_format != "png" or sha256(data) == first[key]["sha256"]


def test_jsonl_holds_question_and_answer(outputs, tmp_path):
    tables = planned(
        outputs, ["a", "b", "c"], errors=(1,), edit=lambda row: row | {"answer": "truth"}, source=True
    )
    rows = make(outputs, tmp_path / "out", tables, task="understand")
    summary = export(str(tmp_path / "out"), str(tmp_path / "dest"), "jsonl")
    assert (summary.exported, summary.errors, summary.what) == (2, 1, "answer")
    lines = lines_of(tmp_path / "dest" / "answers.jsonl")
    for row, line in zip(ok(rows), lines, strict=True):
        assert (line["id"], line["question"], line["answer"]) == (row["id"], row["prompt"], row["text"])
        assert line["answer"].startswith("tokens [0, 1, ")
        assert line["source_uri"] == row["source"]["uri"] and line["source_row_id"] == row["source"]["row_id"]
        assert line["in_answer"] == "truth" and line["finish_reason"] == "stop"
        assert line["include"] == [{"class": "cat"}]


def test_openai_batch_answers_every_request(outputs, tmp_path):
    ids = ["good", "half", "bad", 'quote" and 中文']
    rows = make(outputs, tmp_path / "out", planned(outputs, ids, 2, errors=(3, 4, 5)))
    summary = export(str(tmp_path / "out"), str(tmp_path / "dest"), "openai-batch")
    assert (summary.exported, summary.errors, summary.files) == (5, 3, 1)
    lines = lines_of(tmp_path / "dest" / "results.jsonl")
    assert [line["custom_id"] for line in lines] == ids
    assert len({line["id"] for line in lines}) == 4
    for line in lines:
        assert set(line) == {"id", "custom_id", "response", "error"}
        made = [row for row in ok(rows) if row["id"] == line["custom_id"]]
        if not made:
            assert line["response"] is None
            continue
        assert line["response"]["status_code"] == 200 and line["response"]["request_id"]
        body = line["response"]["body"]
        assert body["created"] == int(outputs.STARTED.timestamp())
        assert (body["size"], body["output_format"]) == ("64x64", "png")
        data = [base64.b64decode(one["b64_json"]) for one in body["data"]]
        assert [sha256(one) for one in data] == [row["sha256"] for row in made]
    assert [line["error"] for line in lines] == [
        None,
        {"code": "size", "message": "1 of 2 images failed: width is 70"},
        {"code": "size", "message": "2 of 2 images failed: width is 70"},
        None,
    ]

    export(str(tmp_path / "out"), str(tmp_path / "urls"), "openai-batch", image_urls="https://cdn.test/x/")
    lines = lines_of(tmp_path / "urls" / "results.jsonl")
    urls = [one["url"] for line in lines if line["response"] for one in line["response"]["body"]["data"]]
    assert urls[0] == "https://cdn.test/x/images/good%400.png"
    for url, row in zip(urls, ok(rows), strict=True):
        name = url.removeprefix("https://cdn.test/x/").replace("%40", "@")
        assert (tmp_path / "urls" / name).read_bytes() == row["image"]["bytes"]


# Names


@pytest.mark.parametrize("form", ["files", "webdataset", "img2dataset", "openai-batch"])
def test_no_id_leaves_dest_or_takes_another_s_place(outputs, tmp_path, form):
    rows = make(outputs, tmp_path / "out", planned(outputs, HOSTILE, 4))
    dest = tmp_path / "some" / "dest"
    urls = "u" if form == "openai-batch" else None
    summary = export(str(tmp_path / "out"), str(dest), form, image_urls=urls)
    assert summary.exported == len(rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "some"]
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["dest"]
    if form in ("webdataset", "img2dataset"):
        names = []
        for path in dest.iterdir():
            with tarfile.open(path) as tar:
                names += [member.name for member in tar if member.name.endswith(".png")]
    else:
        names = [path.name for path in dest.rglob("*.png")]
    assert len(set(names)) == len(names) == len(rows)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9@._-]{0,99}", name) for name in names)


@given(st.text(), st.text(), st.booleans())
@example("a/b", "a_b", True)
@example("a.b", "a_b", False)
@example("", "id", True)
@example("aux.c", "AUX", True)
@example("a" * 64, "a" * 65, True)
def test_stems_are_safe_and_tell_ids_apart(one, other, dots):
    stems = [file_stem(row_id, dots) for row_id in (one, other)]
    for row_id, stem in zip((one, other), stems, strict=True):
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9@._-]{0,63}", stem)
        assert dots or "." not in stem
        assert not re.fullmatch(r"(?i)con|prn|aux|nul|(com|lpt)\d", stem.split(".")[0])
        assert stem == row_id or "@" in stem
    assert (stems[0] == stems[1]) == (one == other)


# Metadata


def chunks_of(data, mime_type):
    """The parts of a picture file that hold the coded picture, as one."""
    if mime_type == "image/png":
        return b"".join(re.findall(rb"IDAT.*?(?=.{4}(?:IDAT|IEND))", data, re.DOTALL))
    if mime_type == "image/jpeg":
        return data[data.index(b"\xff\xdb") :]
    start = data.index(b"VP8L") if b"VP8L" in data[:64] else data.index(b"VP8 ")
    return data[start : start + 8 + int.from_bytes(data[start + 4 : start + 8], "little")]


@pytest.mark.parametrize(
    ("image_format", "quality"), [("png", None), ("webp", None), ("webp", 80), ("jpeg", 90)]
)
@pytest.mark.parametrize("size", [(64, 64), (33, 17)])
@pytest.mark.parametrize(
    "prompt", ["", "a <b> & ]]> \"c\" 'd' 中文 🦘", "\x00\x1b\ufffe x", "a\r\nb\tc", "<&中" * 30_000]
)
def test_metadata_goes_into_files_whose_pixels_stay(outputs, image_format, quality, size, prompt):
    data, mime_type = encode_image(outputs.picture(5, *size), image_format, quality)
    made = embed(data, xmp_packet(prompt, "12", "m" * 64))
    assert chunks_of(made, mime_type) == chunks_of(data, mime_type)
    with Image.open(io.BytesIO(made)) as image, Image.open(io.BytesIO(data)) as plain:
        assert (np.asarray(image) == np.asarray(plain)).all()
        assert (image.size, image.mode) == (plain.size, plain.mode)
        packet = image.info["xmp"]
    packet = packet.encode() if isinstance(packet, str) else packet
    properties = {}
    for element in xml.etree.ElementTree.fromstring(packet).iter():
        properties[element.tag.split("}")[-1]] = element.text or ""
    assert properties["DigitalSourceType"] == DIGITAL_SOURCE_TYPE
    assert properties["Seed"] == "12" and properties["AISystemVersionUsed"] == "m" * 64
    expected = prompt.translate({0: "\ufffd", 0x1B: "\ufffd", 0xFFFE: "\ufffd"})
    found = properties["AIPromptInformation"]
    if len(prompt) < 1000:
        assert found == expected
    else:
        assert found.endswith("…") and expected.startswith(found[:-1]) and len(found) > 10_000


def test_metadata_that_is_there_is_not_written_twice(outputs):
    made = embed(encode_image(outputs.picture(5), "png")[0], xmp_packet("a", "12", "m" * 64))
    assert embed(made, xmp_packet("a", "12", "m" * 64)) == made


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_a_run_embeds_what_an_export_of_its_pictures_would(outputs, tmp_path, image_format):
    tables = planned(outputs, ["a", "b"], errors=(1,))
    plain = make(outputs, tmp_path / "plain", tables, image_format=image_format)
    marked = make(outputs, tmp_path / "marked", tables, image_format=image_format, embedded=True)
    data, made = plain[0]["image"]["bytes"], marked[0]["image"]["bytes"]
    assert made == embed(data, xmp_packet("prompt of a", "1000", "m" * 64))
    assert (pixels(made) == pixels(data)).all()
    assert marked[0]["sha256"] == sha256(made)
    assert marked[0]["content_digest"] != plain[0]["content_digest"]
    export(str(tmp_path / "plain"), str(tmp_path / "a"), "files", embed_metadata=True)
    export(str(tmp_path / "marked"), str(tmp_path / "b"), "files")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    # Also where the format needs other files than the run's.
    export(str(tmp_path / "plain"), str(tmp_path / "c"), "dpg-single", embed_metadata=True)
    export(str(tmp_path / "marked"), str(tmp_path / "d"), "dpg-single")
    assert tree(tmp_path / "c") == tree(tmp_path / "d")


def test_metadata_of_what_is_no_picture_is_refused():
    with pytest.raises(ValueError, match="neither PNG"):
        embed(b"GIF89a", b"")


@pytest.mark.parametrize("form", ["files", "webdataset", "geneval", "dpg", "openai-batch"])
def test_every_picture_format_embeds(outputs, tmp_path, form):
    rows = make(outputs, tmp_path / "out", planned(outputs, ["a"], 4), image_format="webp")
    export(str(tmp_path / "out"), str(tmp_path / "dest"), form, embed_metadata=True)
    files = tree(tmp_path / "dest")
    if form == "webdataset":
        with tarfile.open(tmp_path / "dest" / "shard-00000000.tar") as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
    elif form == "openai-batch":
        body = json.loads(files["results.jsonl"])["response"]["body"]
        files = {f"{n}.webp": base64.b64decode(one["b64_json"]) for n, one in enumerate(body["data"])}
    pictures = {name: data for name, data in files.items() if name.endswith((".png", ".webp"))}
    assert len(pictures) == (1 if form == "dpg" else 4)
    seeds = set()
    for data in pictures.values():
        with Image.open(io.BytesIO(data)) as image:
            packet = image.info["xmp"]
        text = packet if isinstance(packet, str) else packet.decode()
        assert DIGITAL_SOURCE_TYPE in text and "prompt of a" in text
        seeds |= set(re.search("Seed>([0-9 ]+)<", text)[1].split())
    assert seeds == {str(row["seed"]) for row in rows}
    if form == "files":
        for line in map(json.loads, files["metadata.jsonl"].splitlines()):
            assert line["sha256"] == sha256(files[line["file_name"]])


# Repeating


# GEdit-Bench needs sources that exist; test_export_benchmarks.py repeats its export.
@pytest.mark.parametrize("form", sorted(FORMATS.keys() - {"gedit"}))
def test_an_export_that_was_cut_off_is_repeated(outputs, tmp_path, form):
    task = next(iter(FORMATS[form].tasks))
    tables = planned(outputs, [f"{n}" for n in range(8)], 4, shard_rows=4, source=task != "generate")
    make(outputs, tmp_path / "out", tables, task=task)
    export(str(tmp_path / "out"), str(tmp_path / "whole"), form)
    whole = tree(tmp_path / "whole")

    last = tmp_path / "out" / "data" / layout.shard_name(7)
    data = last.read_bytes()
    last.write_bytes(data[:-100])
    with pytest.raises(InputError, match=r"shard-00000007\.parquet cannot be read"):
        export(str(tmp_path / "out"), str(tmp_path / "dest"), form)
    # What is there is whole; what says that all is there, is not.
    begun = tree(tmp_path / "dest") if (tmp_path / "dest").exists() else {}
    assert begun.items() <= whole.items() and len(begun) < len(whole)
    streamed = {"metadata.jsonl", "answers.jsonl", "results.jsonl", "predictions.tsv"}
    assert not streamed & begun.keys()

    last.write_bytes(data)
    export(str(tmp_path / "out"), str(tmp_path / "dest"), form)
    assert tree(tmp_path / "dest") == whole

    streams = streamed & whole.keys()
    names = sorted(whole.keys() - streams)
    before = {name: (tmp_path / "dest" / name).stat().st_mtime_ns for name in names}
    if names:
        (tmp_path / "dest" / names[0]).write_bytes(whole[names[0]][:-1] + b"?")
        with pytest.raises(InputError, match=r"exists with other content .* --overwrite"):
            export(str(tmp_path / "out"), str(tmp_path / "dest"), form)
        assert tree(tmp_path / "dest")[names[0]].endswith(b"?")
    summary = export(str(tmp_path / "out"), str(tmp_path / "dest"), form, overwrite=True)
    assert tree(tmp_path / "dest") == whole
    assert summary.unchanged == max(0, len(names) - 1)
    assert export(str(tmp_path / "out"), str(tmp_path / "dest"), form).unchanged == len(whole)
    assert all((tmp_path / "dest" / name).stat().st_mtime_ns == before[name] for name in names[1:])


# Refusals


@pytest.mark.parametrize(
    ("form", "options", "words"),
    [
        ("fils", {}, "did you mean 'files'"),
        ("files", {"image_urls": "u"}, "image_urls is for openai-batch"),
        ("jsonl", {"embed_metadata": True}, "has none"),
    ],
)
def test_options_that_do_not_exist_are_refused(form, options, words):
    with pytest.raises(OptionError, match=words):
        export("out", "dest", form, **options)


def test_outputs_that_do_not_fit_are_refused(outputs, tmp_path):
    tables = planned(outputs, [f"p{n}" for n in range(3)], 4)
    make(outputs, tmp_path / "out", [table.drop_columns("tag") for table in tables])
    output, dest = str(tmp_path / "out"), str(tmp_path / "dest")
    with pytest.raises(InputError, match="has no column 'tag'"):
        export(output, dest, "geneval")
    with pytest.raises(
        InputError, match=r"is of generate: choose one of files, webdataset, img2dataset, geneval"
    ):
        export(output, dest, "jsonl")
    for inner in (output, f"{output}/", f"{output}/data", f"{dest}/../out/x"):
        with pytest.raises(InputError, match="is inside"):
            export(output, inner, "files")
    with pytest.raises(InputError, match="is not the output of a run"):
        export(dest, str(tmp_path / "other"), "files")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="a part of this path is a file"):
        export(output, str(tmp_path / "file"), "files")
    (tmp_path / "out" / "data" / layout.shard_name(1)).unlink()
    with pytest.raises(InputError, match="1 of its 2 shards are missing"):
        export(output, dest, "files")
    assert not (tmp_path / "dest").exists()


def test_the_command_tells_what_it_did(outputs, tmp_path, capsys):
    make(outputs, tmp_path / "out", planned(outputs, ["a", "b"], errors=(1,)))
    make(outputs, tmp_path / "all", planned(outputs, ["a", "b"]))

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main(["export", *map(str, arguments)])
        return caught.value.code, "".join(capsys.readouterr())

    code, said = run("files", tmp_path / "out", tmp_path / "dest")
    assert code == 3
    assert said == (f"1 image exported to {tmp_path}/dest, 2 files; 1 error row with nothing to export.\n")
    code, said = run("files", tmp_path / "all", tmp_path / "dest", "--embed-metadata", "--overwrite")
    assert code == 0 and DIGITAL_SOURCE_TYPE.encode() in (tmp_path / "dest" / "a.png").read_bytes()
    assert run("file", tmp_path / "all", tmp_path / "dest")[0] == 2
    assert run("files", tmp_path / "absent", tmp_path / "dest")[0] == 1
    code, said = run("openai-batch", tmp_path / "out", tmp_path / "oai")
    assert code == 3
    assert said == (
        f"1 image exported to {tmp_path}/oai, 1 file; 1 error row written to results.jsonl as `error`.\n"
    )
    lines = run("openai-batch", tmp_path / "all", tmp_path / "b", "--image-urls", "https://x")
    assert lines[0] == 0 and (tmp_path / "b" / "images" / "a.png").exists()
