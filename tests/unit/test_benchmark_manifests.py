"""The own files of benchmarks as manifests: their columns, questions, pictures and quotes."""

import base64
import gzip
import io
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from wallaroo.model.checkpoint import TINY, load_config, load_tokenizer
from wallaroo.model.errors import InputError, RowError
from wallaroo.workflows.manifests import csv_rows, text_files
from wallaroo.workflows.manifests.discover import discover
from wallaroo.workflows.manifests.read import read, scan
from wallaroo.workflows.manifests.schema import Columns
from wallaroo.workflows.plans.columns import check_columns
from wallaroo.workflows.plans.rows import plan_rows
from wallaroo.workflows.plans.settings import PlanSettings
from wallaroo.workflows.plans.values import without_quotes
from wallaroo.workflows.settings import RunConfig
from wallaroo.workflows.sources.decode import decode
from wallaroo.workflows.sources.embedded import parse_cell, read_cells
from wallaroo.workflows.sources.fetch import fetch
from wallaroo.workflows.sources.references import SourceOptions

CONFIG, TOKENIZER = load_config(TINY), load_tokenizer(TINY)


def planned(path, task, **options):
    """The planned rows of a manifest, and the warnings about its columns."""
    settings = PlanSettings.of(RunConfig("", "", task=task, **options))
    files = discover(str(path), task, settings.image_column).files
    columns, pieces, rows = Columns(), [], []
    for number, file in enumerate(files):
        found = scan(file)
        columns.add(number, file.path, found)
        pieces += found.pieces
    schema = columns.schema()
    warnings = check_columns(schema, settings)
    for piece in pieces:
        for batch in read(piece, schema):
            numbers = range(batch.first_row, batch.first_row + batch.table.num_rows)
            rows += plan_rows(
                batch.table,
                settings,
                CONFIG,
                TOKENIZER,
                origin=piece.file.relative,
                numbers=numbers,
                faults=batch.faults,
                folder=str(path.parent if path.is_file() else path),
            ).to_pylist()
    return rows, warnings


def png(level, size=24):
    data = io.BytesIO()
    pixels = np.random.default_rng(level).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def text_of(data):
    return base64.b64encode(data).decode()


def fetched(row):
    """The bytes of a planned row's picture, as a run gets them."""
    source, options = row["source"], SourceOptions("/")
    if source["row_id"] is None:
        return fetch(source["uri"], options).data
    ((_, value),) = read_cells(source["uri"], [source["row_id"]])
    return fetch(value, options).data


# VLMEvalKit


@pytest.fixture
def questions(tmp_path):
    """VLMEvalKit's TSV as pandas writes it, with pictures that stand in an earlier and in a later row."""
    table = pd.DataFrame(
        {
            "index": [7, 8, 1000007, 12, 13],
            "question": ['What\tis\n"this"?', "Is it a cat?", "What is this?", "How many?", "Who?"],
            "hint": ["Look closely.", None, None, None, None],
            "A": ["cat", None, "dog", "1", None],
            "B": ["dog", None, "cat", "2", None],
            "C": [None, None, None, "NA", None],
            "answer": ["A", "Yes", "B", "C", "me"],
            "image": [text_of(png(1)), "12", "7", text_of(png(2)), None],
        }
    )
    path = tmp_path / "MMBench_DEV_EN.tsv"
    table.to_csv(path, sep="\t", index=False)
    return path


def test_questions_of_vlmevalkit_are_rows_of_understand(questions):
    rows, warnings = planned(questions, "understand")
    assert [row["id"] for row in rows] == ["7", "8", "1000007", "12", "13"] and not warnings
    assert rows[0]["prompt"] == (
        'Hint: Look closely.\nQuestion: What\tis\n"this"?\nOptions:\nA. cat\nB. dog\n'
        "Please select the correct answer from the options above."
    )
    assert rows[1]["prompt"] == "Is it a cat?"
    assert rows[3]["prompt"].split("\n")[2:5] == ["A. 1", "B. 2", "C. NA"]
    assert [fetched(row) for row in rows[:4]] == [png(1), png(2), png(1), png(2)]
    assert (rows[4]["status"], rows[4]["error_message"]) == (
        "error",
        "image is missing; give every row a path, an address or bytes.",
    )
    # What the evaluator reads stays with its row.
    assert [(row["index"], row["question"], row["answer"]) for row in rows[1:3]] == [
        ("8", "Is it a cat?", "Yes"),
        ("1000007", "What is this?", "B"),
    ]
    assert "image" not in rows[0]


def test_questions_of_vlmevalkit_in_pieces_and_compressed(questions, monkeypatch):
    whole, _ = planned(questions, "understand")
    monkeypatch.setattr(text_files, "PIECE_ROWS", 1)
    alone, _ = planned(questions, "understand")
    assert [row | {"row_id": 0} for row in alone] == [row | {"row_id": 0} for row in whole]
    packed = questions.with_suffix(".tsv.gz")
    packed.write_bytes(gzip.compress(questions.read_bytes()))
    rows, _ = planned(packed, "understand")
    assert [(row["id"], row["source"]) for row in rows] == [(row["id"], row["source"]) for row in whole]


def test_the_run_may_name_other_columns_of_a_table_of_vlmevalkit(questions):
    rows, _ = planned(questions, "understand", prompt_column="question", id_column="answer")
    assert (rows[1]["id"], rows[0]["prompt"]) == ("Yes", 'What\tis\n"this"?')
    # Of another task it is a table like any other.
    with pytest.raises(InputError, match="no column 'prompt'"):
        planned(questions, "generate")


@pytest.mark.parametrize("column", ["image", "image_path"])
def test_questions_about_several_pictures_are_refused_and_lists_of_one_are_not(tmp_path, column):
    (tmp_path / "a.png").write_bytes(png(1))
    one, other = ("a.png", "b.png") if column == "image_path" else (text_of(png(1)), text_of(png(2)))
    table = pd.DataFrame(
        {
            "index": [0, 1, 2],
            "id": ["validation_Art_1", "validation_Art_2", "validation_Art_3"],
            "question": ["<image 1> or <image 2>?", "<image 1>?", "?"],
            column: [str([one, other]), str([one]), "404" if column == "image" else "none.png"],
        }
    )
    path = tmp_path / "MMMU_DEV_VAL.tsv"
    table.to_csv(path, sep="\t", index=False)
    rows, _ = planned(path, "understand")
    assert [row["id"] for row in rows] == list(table["id"])
    assert rows[0]["error_type"] == "manifest"
    assert rows[0]["error_message"] == (
        "Row 0 of MMMU_DEV_VAL.tsv has 2 images, but understand takes one; correct it."
    )
    assert rows[1]["status"] == "planned" and fetched(rows[1]) == png(1)
    if column == "image":
        assert "has the image of row 404, which has none" in rows[2]["error_message"]


def test_a_picture_in_text_may_be_as_long_as_a_data_uri(tmp_path):
    data = png(3, 1000)
    assert len(text_of(data)) > csv_rows.FIELD_CHARACTERS
    for suffix, separator in ((".tsv", "\t"), (".csv", ",")):
        path = tmp_path / f"a{suffix}"
        table = pd.DataFrame({"index": [1], "question": ["?"], "image": [text_of(data)]})
        table.to_csv(path, sep=separator, index=False)
        (row,), _ = planned(path, "understand")
        assert fetched(row) == data and row["prompt"] == "?"
    # Prompts are no pictures, and a quote that is never closed must not take all that follows it.
    pd.DataFrame({"prompt": ["x" * (csv_rows.FIELD_CHARACTERS + 1)]}).to_csv(tmp_path / "p.csv")
    (row,), _ = planned(tmp_path / "p.csv", "generate")
    assert "is not valid CSV" in row["error_message"]


# Lists of pictures


@pytest.mark.parametrize("kind", ["jsonl", "paths", "bytes", "structs", "image"])
def test_a_list_of_one_picture_is_that_picture_and_several_are_refused(tmp_path, kind):
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    values = {
        "bytes": [[png(0)], [png(0), png(1)], []],
        "structs": [
            [{"bytes": png(0), "path": "0.png"}],
            [{"bytes": png(0), "path": None}, {"bytes": png(1), "path": None}],
            None,
        ],
    }.get(kind, [["0.png"], ["0.png", "1.png"], []])
    name = "image" if kind == "image" else "images"
    path = tmp_path / ("m.jsonl" if kind == "jsonl" else "m.parquet")
    if kind == "jsonl":
        lines = [json.dumps({name: value, "question": "What?"}) + "\n" for value in values]
        path.write_text("".join(lines))
    else:
        pq.write_table(pa.table({name: values, "question": ["What?"] * 3}), path)
    rows, _ = planned(path, "understand")
    assert rows[0]["prompt"] == "What?" and fetched(rows[0]) == png(0)
    several = "image is a list of 2 images, but the model takes one a row"
    if parse_cell(f"{rows[0]['source']['uri']}#0"):  # the bytes are only looked at when they are loaded
        with pytest.raises(RowError, match=several):
            fetched(rows[1])
        with pytest.raises(RowError, match="image is missing"):
            fetched(rows[2])
    else:
        assert several in rows[1]["error_message"] and "image is missing" in rows[2]["error_message"]


# Prompts and edits


def test_the_table_of_partiprompts(tmp_path):
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text(
        "Prompt\tCategory\tChallenge\tNote\n"
        "bond\tAbstract\tBasic\tBiology-inspired concepts\n"
        '"G I G G L E" painted on a wall\tIllustrations\tWriting & Symbols\t\n'
        'a sign that says "Hello", twice\tWorld Knowledge\tWriting & Symbols\t"quoted"\n'
    )
    rows, warnings = planned(path, "generate")
    assert [row["prompt"] for row in rows] == [
        "bond",
        '"G I G G L E" painted on a wall',
        'a sign that says "Hello", twice',
    ]
    assert [row["status"] for row in rows] == ["planned"] * 3
    assert rows[2]["Note"] == "quoted" and rows[0]["Challenge"] == "Basic"
    assert warnings == ["Column 'Prompt' is used as the prompt of a row; --prompt-column selects another."]


def test_names_in_capitals_are_taken_where_only_one_is_meant(tmp_path):
    pq.write_table(pa.table({"Image": ["/a.png"], "PROMPT": ["x"]}), tmp_path / "a.parquet")
    (row,), _ = planned(tmp_path / "a.parquet", "edit")
    assert (row["prompt"], row["source"]["uri"]) == ("x", "/a.png")
    pq.write_table(pa.table({"Prompt": ["x"], "PROMPT": ["y"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="no column 'prompt'"):
        planned(tmp_path / "b.parquet", "generate")
    pq.write_table(pa.table({"Prompt": ["x"], "prompt": ["y"]}), tmp_path / "c.parquet")
    (row,), _ = planned(tmp_path / "c.parquet", "generate")
    assert (row["prompt"], row["Prompt"]) == ("y", "x")


def test_the_json_of_wise(tmp_path):
    path = tmp_path / "cultural_common_sense.json"
    table = [
        {"Prompt": "a dish of 中秋", "Explanation": "mooncakes", "Category": "Food", "prompt_id": 1},
        {"Prompt": "a Dutch bloom", "Explanation": "tulip", "Category": "Plant", "prompt_id": 2},
    ]
    path.write_text(json.dumps(table, ensure_ascii=False, indent=4))
    rows, _ = planned(path, "generate", id_column="prompt_id")
    assert [(row["id"], row["prompt"]) for row in rows] == [("1", "a dish of 中秋"), ("2", "a Dutch bloom")]
    rows, _ = planned(path, "generate")
    assert [row["prompt_id"] for row in rows] == [1, 2]


def test_the_parquet_of_gedit(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("key", "instruction", "instruction_language")}
        | {"input_image": datasets.Image(), "task_type": datasets.Value("string")}
        | {"Intersection_exist": datasets.Value("bool")}
    )
    rows = [
        {
            "key": f"{number:032x}",
            "instruction": instruction,
            "instruction_language": language,
            "input_image": {"bytes": png(number), "path": None},
            "task_type": "color_alter",
            "Intersection_exist": True,
        }
        for number, (instruction, language) in enumerate([("make it red", "en"), ("变成红色", "cn")])
    ]
    path = tmp_path / "train-00000-of-00001.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    found, warnings = planned(path, "edit")
    assert [(row["id"], row["prompt"], row["language"]) for row in found] == [
        (f"{0:032x}", "make it red", "en"),
        (f"{1:032x}", "变成红色", "zh"),
    ]
    assert [fetched(row) for row in found] == [png(0), png(1)] and len(warnings) == 3
    assert [(row["task_type"], row["instruction_language"]) for row in found] == [
        ("color_alter", "en"),
        ("color_alter", "cn"),
    ]
    assert decode(fetched(found[0])).size == (24, 24)


# Quotes


@pytest.mark.parametrize(
    "text, inner",
    [
        ('"A red cube."', "A red cube."),
        ("'A red cube.'", "A red cube."),
        ("“A red cube.” ", "A red cube."),
        ("「红色」", "红色"),
        ('"A" and "B"', '"A" and "B"'),
        ("'It's red'", "'It's red'"),
        ('"', '"'),
        ('A sign with "OPEN"', 'A sign with "OPEN"'),
        ("plain", "plain"),
        ("", ""),
    ],
)
def test_quotes_around_a_whole_prompt_are_removed(text, inner):
    assert without_quotes(text) == inner


def test_dpg_removes_quotes_of_its_folder_and_of_its_table(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "COCOval2014000000000074.txt").write_text('"A dog on a street."\n')
    (folder / "partiprompts5.txt").write_text("a sign with 'OPEN'")
    rows, _ = planned(folder, "generate", preset="dpg")
    assert [row["prompt"] for row in rows[::4]] == ["A dog on a street.", "a sign with 'OPEN'"]
    rows, _ = planned(folder, "generate")
    assert rows[0]["prompt"] == '"A dog on a street."'
    rows, _ = planned(folder, "generate", strip_quotes=True)
    assert rows[0]["prompt"] == "A dog on a street."
