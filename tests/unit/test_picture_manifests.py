"""Manifests of tasks that start from pictures: where these are, and what is planned of them."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from wallaroo.actors.rows import requests
from wallaroo.model.checkpoint import TINY, load_config, load_tokenizer
from wallaroo.model.config import ModelConfig
from wallaroo.model.errors import InputError, RowError
from wallaroo.model.prompts import DEFAULT_QUESTION, edit_prompt
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.discover import discover
from wallaroo.workflows.manifests.read import read, scan
from wallaroo.workflows.manifests.schema import Columns
from wallaroo.workflows.outputs.rows import RunConstants
from wallaroo.workflows.outputs.schema import NOTED_SOURCE_TYPE, RESULT_FIELDS, lacking, result_schema
from wallaroo.workflows.plans.columns import carried_schema, check_columns, plan_schema
from wallaroo.workflows.plans.layout import shard_rows
from wallaroo.workflows.plans.rows import plan_rows
from wallaroo.workflows.plans.settings import PlanSettings
from wallaroo.workflows.runs.requests import load_requests
from wallaroo.workflows.settings import RunConfig
from wallaroo.workflows.sources.embedded import Cell, parse_cell, read_cells
from wallaroo.workflows.sources.references import SourceOptions
from wallaroo.workflows.storage.checkpoints import fetch_folder, read_checkpoint

CONFIG = load_config(TINY)
TOKENIZER = load_tokenizer(TINY)


def load(path, task="edit", columns=None):
    """Schema and rows of a manifest."""
    files = discover(str(path), task).files
    found, rows = Columns(), []
    scans = [scan(file) for file in files]
    for number, (file, seen) in enumerate(zip(files, scans, strict=True)):
        found.add(number, file.path, seen)
    schema = found.schema()
    for seen in scans:
        for piece in seen.pieces:
            for batch in read(piece, schema, columns):
                assert columns or batch.table.schema.equals(schema, check_metadata=True)
                assert not batch.faults
                rows += batch.table.to_pylist()
    return schema, rows


def plan(table, task="edit", folder="/data", **options):
    settings = PlanSettings.of(RunConfig("", "", task, **options))
    table = pa.table(table) if isinstance(table, dict) else table
    check_columns(table.schema, settings)
    planned = plan_rows(table, settings, CONFIG, TOKENIZER, origin="m", folder=folder)
    planned.validate(full=True)
    carried = carried_schema(table.schema, settings)
    assert planned.schema.equals(plan_schema(carried, task), check_metadata=True)
    return planned.to_pylist()


# Cells


def test_a_cell_is_a_file_and_a_row():
    assert parse_cell("/a/b.parquet#17") == Cell("/a/b.parquet", 17)
    assert parse_cell("s3://b/c#d.PQ#0") == Cell("s3://b/c#d.PQ", 0)
    assert str(Cell("/a/b.parquet", 17)) == "/a/b.parquet#17"
    for other in ("/a/b.parquet", "/a/b.png#3", "/a/b.parquet#-1", "/a/b.parquet#x", "#3", ""):
        assert parse_cell(other) is None


def test_cells_are_read_by_number_whatever_the_row_groups(tmp_path):
    path = str(tmp_path / "a.parquet")
    images = [b"%d" % row if row % 5 else None for row in range(40)]
    pq.write_table(pa.table({"image": images, "x": range(40)}), path, row_group_size=12)
    assert dict(read_cells(path, [3, 0, 39, 12])) == {3: b"3", 0: None, 39: b"39", 12: b"12"}
    found = dict(read_cells(path, [1, 40]))
    assert found[1] == b"1" and isinstance(found[40], RowError)
    pq.write_table(pa.table({"x": [1]}), path)
    assert isinstance(dict(read_cells(path, [0]))[0], RowError)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="is corrupt"):
        list(read_cells(path, [0]))
    with pytest.raises(InputError, match="is missing: restore it"):
        list(read_cells(str(tmp_path / "b.parquet"), [0]))


# Manifests


def test_a_folder_of_pictures_is_a_manifest(tmp_path):
    for name in ("b.png", "a/c.JPG", ".hidden.png", "_x/d.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    found = discover(str(tmp_path), "understand")
    assert found.passed_over == {".txt": (1, "notes.txt"), "hidden": (1, ".hidden.png")}
    wanted = [{"id": name, "image": str(tmp_path / name)} for name in ("_x/d.png", "a/c.JPG", "b.png")]
    assert load(tmp_path)[1] == wanted
    assert load(f"{tmp_path}/*.png")[1] == [{"id": "b.png", "image": str(tmp_path / "b.png")}]
    assert load(tmp_path / "b.png")[1] == [{"id": "b.png", "image": str(tmp_path / "b.png")}]
    (tmp_path / "b.png").write_bytes(b"xy")
    assert discover(str(tmp_path), "understand").identity() != found.identity()
    with pytest.raises(InputError, match="no Parquet, CSV or JSON Lines file"):
        discover(str(tmp_path), "generate")
    # What names pictures comes before the pictures that it names.
    (tmp_path / "rows.jsonl").write_text('{"image": "b.png"}\n')
    found = discover(str(tmp_path), "edit")
    assert [file.relative for file in found.files] == ["rows.jsonl"]
    assert found.passed_over == {".txt": (1, "notes.txt"), "hidden": (1, ".hidden.png")}


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        pa.struct([("bytes", pa.null()), ("path", pa.string())]),
        pa.struct([("path", pa.large_string())]),
        pa.list_(pa.field("element", pa.struct([("bytes", pa.binary())]))),
    ],
)
def test_bytes_in_parquet_are_given_as_references(tmp_path, kind):
    path = tmp_path / "a.parquet"
    table = pa.table({"prompt": ["x", "y"], "image": pa.nulls(2, kind)})
    pq.write_table(table, path, row_group_size=1)
    schema, rows = load(path)
    assert schema.field("image").type == pa.string()
    assert rows == [{"prompt": x, "image": f"{path}#{n}"} for n, x in enumerate("xy")]
    assert load(path, columns={"prompt"})[1] == [{"prompt": "x"}, {"prompt": "y"}]
    assert load(path, columns={"image"})[1] == [{"image": f"{path}#0"}, {"image": f"{path}#1"}]
    # Where they have no meaning they are carried as they are.
    assert load(path, "generate")[0].field("image").type == kind


def test_paths_in_parquet_stay_paths_and_other_types_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": pa.array(["a.png"]).dictionary_encode()}), path)
    assert load(path)[1] == [{"image": "a.png"}]
    for value, kind in ((1, "int64"), ({"file": "a.png"}, "struct<file: string>"), ({"path": 1}, "struct")):
        pq.write_table(pa.table({"image": [value]}), path)
        with pytest.raises(InputError, match=f"Column 'image' of .* is {kind}.*, but must hold paths, bytes"):
            load(path)


def test_the_json_of_imgedit_is_a_manifest_of_edit_alone(tmp_path):
    path = tmp_path / "a.json"
    entry = {"id": "a/1.jpg", "prompt": "make it red", "edit_type": "color"}
    path.write_text(json.dumps({"1082": entry}))
    assert load(path)[1] == [{**entry, "id": "1082", "image": "a/1.jpg"}]
    with pytest.raises(InputError, match="no column 'prompt': it has 1082"):
        check_columns(load(path, "generate")[0], PlanSettings.of(RunConfig("", "")))
    for text in ('{"a": {"id": 1}, "b": 1}', '{"a": {'):
        path.write_text(text)
        with pytest.raises(InputError, match="is not an object of keys"):
            load(path)


def test_requests_of_a_batch_are_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    body = {"prompt": "a cat", "n": 2, "size": "1024x1792", "model": "m"}
    line = {"custom_id": "r1", "method": "POST", "url": "/v1/images/generations", "body": body}
    auto = {**line, "custom_id": "r2", "body": {"prompt": "a dog", "size": "auto"}}
    path.write_text(f"{json.dumps(line)}\n{json.dumps(auto)}\n")
    none = {"samples": None, "aspect_ratio": None, "model": None}
    assert load(path, "generate")[1] == [
        {"id": "r1", "prompt": "a cat", "model": "m", "samples": 2, "aspect_ratio": "1024:1792"},
        {"id": "r2", "prompt": "a dog", **none},
    ]


def write_output(folder, shards, carried=None):
    """The files that a reader of a finished output looks at; shards: rows of each."""
    carried = carried or pa.schema([("tag", pa.string())], {b"wallaroo.json": b'["tag"]'})
    schema = result_schema(carried)
    (folder / "data").mkdir(parents=True)
    (folder / "plan").mkdir()
    (folder / "run.json").write_text("{}")
    (folder / "plan" / "part-00000.json").write_text("{}")
    empty = dict.fromkeys(field.name for field in RESULT_FIELDS)
    row_id = 0
    for number, rows in enumerate(shards):
        values = []
        for row in rows:
            values.append({**empty, "tag": '{"a": 1}', "task": "generate", "status": "ok", **row})
            values[-1]["row_id"] = row_id
            row_id += 1
        table = pa.Table.from_pylist(values, schema)
        pq.write_table(table, folder / "data" / f"shard-{number:08d}.parquet")
    (folder / "_SUCCESS").write_text(json.dumps({"parts": ["part-00000"]}))
    return folder


def test_the_ok_rows_of_an_output_are_a_manifest(tmp_path):
    out = write_output(
        tmp_path / "out",
        [
            [
                {"id": "a", "sample": 0, "prompt": "a cat", "cfg": 3.0},
                {"id": "b", "sample": 0, "status": "error"},
                {"id": "c", "sample": 0},
            ],
            [{"id": "c", "sample": 1, "status": "error"}, {"id": "d", "sample": 0}],
        ],
    )
    schema, rows = load(out, "understand")
    first, second = (str(out / "data" / f"shard-{n:08d}.parquet") for n in range(2))
    assert [(row["id"], row["image"]) for row in rows] == [
        ("a", f"{first}#0"),
        ("c/0", f"{first}#2"),
        ("d", f"{second}#4"),
    ]
    assert set(schema.names) == {"id", "image", "in_tag"} | {
        f"in_{field.name}" for field in RESULT_FIELDS if field.name != "image"
    }
    assert schema.metadata == {b"wallaroo.json": b'["in_tag"]'}
    # None of its columns is a parameter.
    (row,) = plan(pa.Table.from_pylist(rows[:1], schema), prompt="make it red", folder="")
    assert (row["prompt"], row["in_prompt"], row["cfg"], row["in_cfg"]) == ("make it red", "a cat", 3.0, 3.0)
    assert row["source"]["uri"] == first and row["source"]["row_id"] == 0
    (row,) = plan(pa.Table.from_pylist(rows[:1], schema), prompt_column="prompt", folder="")
    assert row["prompt"] == "a cat" and "in_prompt" not in row
    with pytest.raises(InputError, match="is the output of a run, not a manifest"):
        discover(str(out), "generate")
    (out / "_SUCCESS").write_text(json.dumps({"parts": []}))
    with pytest.raises(InputError, match="is not finished"):
        discover(str(out), "edit")
    (out / "_SUCCESS").unlink()
    with pytest.raises(InputError, match="is not finished"):
        discover(str(out), "edit")


@pytest.mark.parametrize("place", ["disk", "s3"])
@pytest.mark.parametrize("name", ["out [1]", "what?", "a*b", "**", "out #2"])
def test_an_output_may_have_the_name_of_a_pattern(tmp_path, request, name, place):
    write_output(tmp_path / name, [[{"id": "a", "sample": 0}], [{"id": "b", "sample": 0}]])
    root = str(tmp_path)
    if place == "s3":
        root = request.getfixturevalue("s3")
        for file in (path for path in (tmp_path / name).rglob("*") if path.is_file()):
            storage.write_atomic(f"{root}/{file.relative_to(tmp_path)}", file.read_bytes())
    _, rows = load(f"{root}/{name}", "understand")
    assert [row["id"] for row in rows] == ["a", "b"]
    cell = parse_cell(rows[1]["image"])
    assert cell.path == f"{root}/{name}/data/shard-00000001.parquet"
    ((_, value),) = read_cells(cell.path, [cell.row])
    assert not isinstance(value, RowError)


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_checkpoint_may_have_the_name_of_a_pattern(tmp_path, request, place):
    model = str(tmp_path / "m [1]*?")
    if place == "s3":
        model = f"{request.getfixturevalue('s3')}/m [1]*?"
        for file in (path for path in TINY.rglob("*") if path.is_file()):
            storage.write_atomic(f"{model}/{file.relative_to(TINY)}", file.read_bytes())
    else:
        shutil.copytree(TINY, model)
    assert read_checkpoint(model).digest == read_checkpoint(str(TINY)).digest
    assert load_config(fetch_folder(model, cache=tmp_path / "cache")) == CONFIG


def test_the_picture_of_a_text_is_the_one_that_it_is_about(tmp_path):
    source = {"uri": "/x/shard-00000001.parquet", "sha256": "", "width": 1, "height": 1, "row_id": 7}
    rows = [
        {"id": "a", "sample": 0, "task": "understand", "source": source},
        {"id": "b", "sample": 0, "task": "understand", "source": {**source, "uri": "/y.png", "row_id": None}},
    ]
    out = write_output(tmp_path / "out", [rows])
    assert [row["image"] for row in load(out)[1]] == ["/x/shard-00000001.parquet#7", "/y.png"]


# Rows


def test_pictures_are_located_beside_the_manifest_or_below_the_root(tmp_path):
    images = ["a.png", "/b.png", "s3://c/d.png", "e.parquet#3", "s3://f/g.parquet#4"]
    table = {"image": images, "prompt": ["x"] * 5}
    rows = plan(table)
    assert all(row["status"] == "planned" for row in rows)
    assert [(row["source"]["uri"], row["source"]["row_id"]) for row in rows] == [
        ("/data/a.png", None),
        ("/b.png", None),
        ("s3://c/d.png", None),
        ("/data/e.parquet", 3),
        ("s3://f/g.parquet", 4),
    ]
    assert [row["width"] for row in rows] == [None] * 5
    assert plan(table, folder="s3://x/y")[0]["source"]["uri"] == "s3://x/y/a.png"
    assert plan(table, image_root="/root")[0]["source"]["uri"] == "/root/a.png"


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (None, "image is missing"),
        ("", "image is missing"),
        ("../a.png", "leads out of the manifest's folder"),
        ("https://x.org/a.png?key=1", "does not allow https://"),
        ("ftp://x.org/a.png", "has the scheme ftp"),
        ("s3://bucket", "names no object"),
    ],
)
def test_a_picture_that_cannot_be_located_is_an_error_row(image, words):
    (row,) = plan({"image": pa.array([image], pa.string()), "prompt": ["x"]})
    assert (row["status"], row["error_type"]) == ("error", "image")
    assert words in row["error_message"]
    assert "key=1" not in str(row)


def test_only_the_fetch_gets_the_query_of_a_web_address():
    table = {"image": ["https://x.org/a.png?key=1", "/a?b#c.png", "a.png"], "prompt": ["x", "x", " "]}
    settings = PlanSettings.of(RunConfig("", "", "edit", allow_https=True))
    planned = plan_rows(pa.table(table), settings, CONFIG, TOKENIZER, folder="/none")
    uris = pc.struct_field(planned.column("source"), "uri").to_pylist()
    assert uris == ["https://x.org/a.png?key=1", "/a?b#c.png", "/none/a.png"]
    # Now the web is not allowed, and the file is not there.
    loaded, asked = load_requests(planned, str(TINY), RunConstants("edit", "", ""), SourceOptions("/"))
    assert loaded.column("error_type").to_pylist() == ["image", "image", "prompt"] and not len(asked)
    uris = pc.struct_field(loaded.column("source"), "uri").to_pylist()
    assert uris == ["https://x.org/a.png", "/a?b#c.png", "/none/a.png"]


def test_rows_of_one_source_become_requests_and_a_bad_one_an_error_row(tmp_path):
    for name, size in (("a.png", (300, 200)), ("b.png", (200, 300))):
        Image.new("RGB", size, "red").save(tmp_path / name)
    pq.write_table(pa.table({"image": [(tmp_path / "b.png").read_bytes(), b"x"]}), tmp_path / "c.parquet")
    images = ["a.png", "b.png", "none.png", "c.parquet#0", "c.parquet#1", "c.parquet#0", "a.png"]
    table = pa.table({"image": images, "prompt": list("abcdefg"), "cfg": [3.0] * 6 + [1.0]})
    settings = PlanSettings.of(RunConfig("", "", "edit"))
    planned = plan_rows(table, settings, CONFIG, TOKENIZER, folder=str(tmp_path))
    loaded, asked = load_requests(planned, str(TINY), RunConstants("edit", "", ""), SourceOptions("/"))
    # All but the sources, which have got a note, are as planned.
    place = planned.schema.get_field_index("source")
    noted = planned.schema.set(place, pa.field("source", NOTED_SOURCE_TYPE))
    assert loaded.schema.equals(noted, check_metadata=True)
    rows = loaded.to_pylist()
    assert [row["error_type"] for row in rows] == ["", "", "image", "", "image", "", ""]
    wide, high = CONFIG.bucket(200, 300), CONFIG.bucket(300, 200)
    sizes = {0: wide, 1: high, 3: high, 5: high, 6: wide}
    assert {n: (row["height"], row["width"]) for n, row in enumerate(rows) if row["height"]} == sizes
    assert rows[1]["source"]["sha256"] == rows[3]["source"]["sha256"]
    made = {one.key: one for one in requests(asked, asked.column("row").to_pylist())}
    assert {key: one.size for key, one in made.items()} == sizes
    np.testing.assert_array_equal(made[1].pixels, made[5].pixels)
    assert made[6].null is None and len(made[0].null.ids) < len(made[0].prompt.ids)
    wanted = edit_prompt(
        TOKENIZER, CONFIG, "a", wide, tuple(s // 28 for s in made[0].semantic.shape[:2]), "en"
    )
    assert made[0].prompt.ids.tolist() == wanted.ids.tolist()


@pytest.mark.parametrize("version", ["0.1.0", "now"])
def test_a_broken_colour_profile_is_noted_in_the_source_of_its_row(tmp_path, version):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "a.tif", icc_profile=b"broken")
    Image.new("RGB", (300, 200), "red").save(tmp_path / "b.tif")
    table = pa.table({"image": ["a.tif", "b.tif", "c.tif"]})
    settings = PlanSettings.of(RunConfig("", "", "understand"))
    planned = plan_rows(table, settings, CONFIG, TOKENIZER, folder=str(tmp_path))
    carried = carried_schema(table.schema, settings)
    if version == "0.1.0":
        carried = carried.remove_metadata()
        planned = planned.replace_schema_metadata(None)
    loaded, _ = load_requests(planned, str(TINY), RunConstants("understand", "", ""), SourceOptions("/"))
    # The results of a plan have one type, whichever version began it, and both are read.
    schema = result_schema(carried)
    assert schema.field("source").type == loaded.schema.field("source").type and not lacking(schema)
    notes = [row["source"].get("note", "-") for row in loaded.to_pylist()]
    words = "its colour profile is broken and was ignored"
    assert notes == (["-"] * 3 if version == "0.1.0" else [words, "", None])


def test_a_picture_without_a_question_is_described_in_its_language():
    table = {"image": ["a"] * 5, "prompt": ["why?", None, " ", None, "为什么"]}
    table["language"] = [None, None, "zh", "en", None]
    rows = plan(table, "understand")
    en, zh = DEFAULT_QUESTION["en"], DEFAULT_QUESTION["zh"]
    assert [row["prompt"] for row in rows] == ["why?", en, zh, en, "为什么"]
    assert [row["language"] for row in rows] == ["en", "en", "zh", "en", "zh"]
    assert [row["prompt"] for row in plan({"image": ["a"]}, "understand", language="zh")] == [zh]
    assert [row["prompt"] for row in plan({"image": ["a"]}, "understand", prompt="how?")] == ["how?"]
    rows = plan(
        {"image": ["a"] * 2, "q": ["what?", "who?"], "prompt": ["x", "y"]}, "understand", prompt_column="q"
    )
    assert [(row["prompt"], row["in_prompt"]) for row in rows] == [("what?", "x"), ("who?", "y")]
    assert {row["cfg"] for row in rows} == {1.0}
    rows = plan({"image": ["a"], "cfg": [3]}, "understand")
    assert rows[0]["error_type"] == "sampling" and "answers have no guidance" in rows[0]["error_message"]


def test_an_instruction_is_needed():
    with pytest.raises(InputError, match=r"has images, but no instructions: give one for all .*--prompt"):
        plan({"image": ["a"]})
    with pytest.raises(InputError, match="give one instruction for all rows"):
        plan({"image": ["a"], "words": ["x"]})
    with pytest.raises(InputError, match="no column 'image'; did you mean 'imgae'"):
        plan({"imgae": ["a"], "prompt": ["x"]})
    with pytest.raises(InputError, match="no column 'q'"):
        plan({"image": ["a"], "prompt": ["x"]}, prompt_column="q")
    rows = plan({"image": ["a"] * 2, "prompt": ["x", None]}, prompt="make it red")
    assert [row["prompt"] for row in rows] == ["x", "make it red"]
    (row,) = plan({"image": ["a"], "prompt": [None]})
    assert row["error_type"] == "prompt" and row["source"]["uri"] == "/data/a"
    # A size follows from the picture, so such a column means nothing.
    (row,) = plan({"image": ["a"], "prompt": ["x"], "width": [70]})
    assert (row["status"], row["width"], row["in_width"]) == ("planned", None, 70)


def test_a_shard_s_sources_stay_under_64_mib_and_its_results_under_128():
    config = ModelConfig()
    most = max(size.height * size.width for size in config.size_list())
    for task, pixels in (("edit", most + 188160), ("understand", 188160)):
        rows = shard_rows(10**7, config, task)
        assert 3 * pixels * rows <= 64 << 20 < 3 * pixels * (rows + 1)
    assert shard_rows(10**7, config, "edit", restored=True) == (128 << 20) // (2 * 4 << 20)
    # Few pictures are as large as the largest that would be seen whole.
    assert shard_rows(10**7, config.with_pixels(1003520, 12845056), "understand") == 5
    assert shard_rows(10**7, config.with_pixels(12845056, 12845056), "understand") == 1
