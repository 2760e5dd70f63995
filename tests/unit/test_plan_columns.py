"""Columns by other names, values that are absent, rounded seeds and ids, and what stays as it was."""

import json
import pickle

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wallaroo.jobs.config import resolve
from wallaroo.model.checkpoint import TINY, load_config, load_tokenizer
from wallaroo.model.errors import InputError, RowError
from wallaroo.workflows.manifests.types import ManifestFile, Piece, encode_schema
from wallaroo.workflows.plans.columns import GIVEN, carried_schema, check_columns, plan_schema, with_given
from wallaroo.workflows.plans.increments import check_carried, joined_schema, row_pairs
from wallaroo.workflows.plans.parts import PartWork, PieceWork, write_part
from wallaroo.workflows.plans.plan import Round
from wallaroo.workflows.plans.rows import derived_seed, plan_rows
from wallaroo.workflows.plans.scanned import PieceRows, ids_of
from wallaroo.workflows.plans.settings import PlanSettings
from wallaroo.workflows.plans.values import is_absent
from wallaroo.workflows.settings import RunConfig
from wallaroo.workflows.sources.embedded import Cell, parse_cell, read_cells, with_column
from wallaroo.workflows.storage.checkpoints import read_checkpoint

CONFIG = load_config(TINY)
TOKENIZER = load_tokenizer(TINY)


def plan(table, task="generate", **options):
    settings = PlanSettings.of(RunConfig("", "", task=task, **options))
    table = pa.table(table) if isinstance(table, dict) else table
    check_columns(table.schema, settings)
    planned = plan_rows(table, settings, CONFIG, TOKENIZER, origin="m", folder="/data")
    assert planned.schema.equals(plan_schema(carried_schema(table.schema, settings), task))
    return planned.to_pylist()


# Columns by other names


def test_columns_that_the_run_names():
    table = {
        "item_id": ["a", "b"],
        "picture": ["x.png", "y.png"],
        "text": ["p", "q"],
        "id": [1, 2],
        "image": ["u", "v"],
    }
    rows = plan(table, "edit", prompt_column="text", image_column="picture", id_column="item_id")
    assert [(row["id"], row["prompt"], row["source"]["uri"]) for row in rows] == [
        ("a", "p", "/data/x.png"),
        ("b", "q", "/data/y.png"),
    ]
    # What has the name of a column of results is carried under another one.
    assert [(row["in_id"], row["in_image"]) for row in rows] == [(1, "u"), (2, "v")]
    assert not {"item_id", "picture", "text"} & set(rows[0])
    for option in ("image_column", "id_column"):
        with pytest.raises(InputError, match="no column 'pictur'; did you mean 'picture'"):
            plan(table, "edit", prompt="x", **{option: "pictur"})


def test_layouts_name_their_own_columns():
    parquet = {
        "key": ["0", "1"],
        "caption": ["a cat", "a dog"],
        "url": ["u"] * 2,
        "jpg": ["/m.parquet#jpg#0"] * 2,
    }
    (row, _) = plan(parquet, "edit")
    assert (row["id"], row["prompt"], row["source"]) == (
        "0",
        "a cat",
        {"uri": "/m.parquet#jpg", "row_id": 0} | {name: None for name in ("sha256", "width", "height")},
    )
    (row, _) = plan(parquet, "edit", prompt="make it red")
    assert (row["prompt"], row["caption"]) == ("make it red", "a cat")
    (row, _) = plan(parquet, "understand")
    assert row["caption"] == "a cat" and row["prompt"] != "a cat"
    (row,) = plan({"id": ["a.png"], "image": ["/a.png"], "caption": ["make it red"]}, "edit")
    assert row["prompt"] == "make it red"
    (row,) = plan({"file_name": ["a.png"], "prompt": ["x"]}, "edit")
    assert (row["id"], row["source"]["uri"]) == ("m:0", "/data/a.png")
    # What has more than one meaning needs to be named.
    for table in ({"caption": ["x"]}, {"id": ["a"], "caption": ["x"]}, {"key": ["a"], "text": ["x"]}):
        with pytest.raises(InputError, match="no column 'prompt'"):
            plan(table)


def test_pictures_in_another_column_are_found_again(tmp_path):
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"no"], "jpg": [b"yes"], "a/b#1": [b"odd"]}), path)
    for column, value in (("image", b"no"), ("jpg", b"yes"), ("a/b#1", b"odd")):
        cell = parse_cell(str(Cell(with_column(path, column), 0)))
        assert dict(read_cells(cell.path, [cell.row])) == {0: value}
    (found,) = dict(read_cells(with_column(path, "none"), [0])).values()
    assert isinstance(found, RowError)


def test_ids_of_the_named_column_are_compared(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"item": ["x", "y"], "prompt": ["a", "b"]}), path)
    piece = Piece(ManifestFile(str(path), "a.parquet", "parquet", 1, ""), 0, 2, 0, 1)
    schema = pa.schema([("item", pa.string()), ("prompt", pa.string())])
    (rows,) = PieceRows(piece, b"\xff").read(schema, {"item"})
    assert ids_of(rows, "item") == ["x", "y"] and ids_of(rows, "id") == ["a.parquet:0", "a.parquet:1"]


def test_a_growing_manifest_looks_at_the_named_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(b"1")
    table = pa.table({"photo": ["a.png"], "prompt": ["x"]})
    settings = PlanSettings.of(RunConfig("", "", task="edit", image_column="photo"))

    def pairs(when):
        return row_pairs(table, ["i"], settings, str(tmp_path), [""], when).tolist()

    before = pairs("one")
    assert pairs("two") == before
    (tmp_path / "a.png").write_bytes(b"22")
    assert pairs("three") != before


# What is absent

NOTHING = [None, "", " ", float("nan"), "NaN", "nan", "<NA>", "None", "null", "N/A"]


@pytest.mark.parametrize(
    "name", ["samples", "seed", "cfg", "temperature", "top_k", "top_p", "width", "aspect_ratio"]
)
def test_an_optional_value_may_be_nothing(name):
    (plain,) = plan({"prompt": ["a cat"]})
    for value in NOTHING:
        (row,) = plan({"prompt": ["a cat"], name: pa.array([value])})
        assert row == plain, value


def test_nothing_is_said_of_language_and_question():
    for value in NOTHING:
        (row,) = plan(
            {"image": ["a"], "prompt": pa.array([value]), "language": pa.array([value])}, "understand"
        )
        assert row["status"] == "planned" and row["language"] == "en" and "<" not in row["prompt"]
    # A prompt of `generate` is needed, and such a word may be one.
    assert plan({"prompt": ["NaN"]})[0]["prompt"] == "NaN"
    assert [is_absent(value) for value in (0, False, "0", "none of it", b"")] == [False] * 5


def test_files_of_pandas_with_empty_cells(tmp_path):
    frame = pd.DataFrame(
        {"prompt": ["a", "b"], "samples": [2, None], "cfg": [None, 2.5], "language": ["zh", None]}
    )
    frame.to_parquet(tmp_path / "a.parquet")
    rows = plan(pq.read_table(tmp_path / "a.parquet").drop_columns([]))
    assert [(row["sample"], row["cfg"], row["language"]) for row in rows] == [
        (0, 3.0, "zh"),
        (1, 3.0, "zh"),
        (0, 2.5, "en"),
    ]


# Seeds and ids that pandas rounded


def test_seeds_survive_pandas():
    given = pd.DataFrame(
        {"prompt": ["a", "b"], "id": ["x", "y"], "seed": pd.array([2**62 + 1, None], "Int64")}
    )
    rows = plan(pa.Table.from_pandas(given, preserve_index=False))
    assert [row["seed"] for row in rows] == [2**62 + 1, derived_seed(0, "y", 0, 0)]
    rounded = pa.Table.from_pandas(given.assign(seed=[float(2**62 + 1), np.nan]), preserve_index=False)
    one, two = plan(rounded)
    assert (one["error_type"], two["status"]) == ("seed", "planned")
    assert "is a float of 2^53 or more" in one["error_message"] and "\n" not in one["error_message"]
    # As text too, however it is written; what is exact is taken.
    # The last two are what 2^53 + 1 becomes.
    texts = ("4.611686018427388e+18", "4611686018427387904.0", "1e17", "9007199254740992.0")
    for value in (*texts, float(2**53 + 1)):
        assert plan({"prompt": ["a"], "seed": [value]})[0]["error_type"] == "seed"
    for value in (float(2**53 - 1), "9007199254740991.0", str(2**62 + 1), 2**63 - 1, 2**53):
        (row,) = plan({"prompt": ["a"], "seed": [value]})
        assert row["seed"] == (int(value) if not isinstance(value, str) else int(value.split(".")[0]))


def test_no_planned_row_lacks_a_seed(tmp_path):
    table = {
        "prompt": ["a", "", "c", "d", "e"],
        "id": ["1", "2", "3", None, "5"],
        "seed": pa.array(["7", "8", "wrong", None, "-1"]),
    }
    rows = plan(table, samples=2)
    assert {row["status"] for row in rows} == {"planned", "error"}
    assert all(isinstance(row["seed"], int) for row in rows)
    assert [row["seed"] for row in rows[:4]] == [7, 8, 8, 9]
    # pandas keeps such a column whole.
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert pd.read_parquet(tmp_path / "p.parquet")["seed"].dtype == np.int64


def test_the_file_of_a_part_is_named_by_its_rows(tmp_path):
    manifest = tmp_path / "m.jsonl"
    lines = [{"id": f"a{number // 2}", "prompt": f"one red circle {number}"} for number in range(6)]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields = [("id", pa.string()), ("prompt", pa.string())]
    schema = pa.schema(fields, metadata={b"huggingface": b"{}", b"wallaroo.json": b'["x"]'})
    settings = PlanSettings.of(RunConfig("m", "o", seed=3))

    def part(path):
        file = ManifestFile(path, "m.jsonl", "jsonl", 258, "e1")
        bits = np.packbits([True, True, True, False, True, True]).tobytes()
        rows = PieceRows(Piece(file, 0, 6, 0, 258), bits)
        return PartWork(7, 100, 20, 3, [PieceWork(rows, [1], {4: 2}, skip=1, take=3)])

    # The name that earlier versions gave it.
    name = part("/data/m.jsonl").file_name(schema, settings, "digest", 2)
    assert name == "part-00007-66ce9a2e7df61c9b.parquet"
    # A task gets the same bytes and schema, and so finds the same name.
    sent, columns = pickle.loads(pickle.dumps((part(str(manifest)), schema)))
    answer = write_part(sent, columns, settings, str(TINY), None, 2)
    digest = read_checkpoint(str(TINY)).digest
    assert answer.pop("file") == part(str(manifest)).file_name(schema, settings, digest, 2)
    assert answer == {"error_rows": 1, "errors": {"id": 1}, "sizes": {"96x96": 2}}


def test_ids_that_were_rounded_are_refused():
    rows = plan({"prompt": ["a", "b", "c", "d"], "id": [float(2**60), 5.0, 2.5, float(2**53 + 1)]})
    assert [row["error_type"] for row in rows] == ["id", "", "", "id"]
    assert [row["id"] for row in rows] == ["m:0", "5", "2.5", "m:3"]
    assert "is a float of 2^53 or more" in rows[0]["error_message"]
    assert plan({"prompt": ["a"], "id": [2**60 + 1]})[0]["id"] == str(2**60 + 1)


# What stays as it was


def test_older_plans_and_outputs_keep_their_digests():
    file = ManifestFile("/a.csv", "a.csv", "csv", 3, "e")
    assert json.loads(Piece(file, 0, 1, 2, 3, ("prompt",)).to_json()) == {
        "file": {
            "path": "/a.csv",
            "relative": "a.csv",
            "format": "csv",
            "size": 3,
            "etag": "e",
            "cells": False,
        },
        "first_row": 0,
        "rows": 1,
        "start": 2,
        "stop": 3,
        "header": ["prompt"],
    }
    later = ManifestFile("/a", "a", "parquet", 3, "e", True, "jpg", "edit", (("x", None, "string"),))
    assert later.to_values()["partition"] == (("x", None, "string"),)
    assert not {"image_column", "id_column"} & set(PlanSettings.of(RunConfig("", "")).meaning())
    assert PlanSettings.of(RunConfig("", "", id_column="x")).meaning()["id_column"] == "x"


def test_the_options_of_a_run_name_columns():
    flags = {"image_column": "photo", "id_column": "item"}
    config = resolve("edit", "m", "o", flags, environment={})
    assert (config.image_column, config.id_column) == ("photo", "item")
    plain = resolve("edit", "m", "o", {}, environment={})
    assert not {"image_column", "id_column"} & set(plain.config_digest_fields("x"))
    assert config.config_digest_fields("x")["image_column"] == "photo"
    with pytest.raises(InputError, match="image_column is for edit and understand"):
        resolve("generate", "m", "o", {"image_column": "photo"}, environment={})


def test_planned_rows_of_older_versions_get_the_column_that_they_lack():
    planned = plan_rows(
        pa.table({"prompt": ["a cat"], "tag": [1]}), PlanSettings.of(RunConfig("", "")), CONFIG, TOKENIZER
    )
    older = planned.drop_columns([GIVEN])
    assert with_given(older).equals(planned) and with_given(planned) is planned


def test_a_column_with_our_own_name_is_not_carried():
    assert (
        carried_schema(
            pa.schema([("prompt", pa.string()), (GIVEN, pa.int8())]), PlanSettings.of(RunConfig("", ""))
        ).names
        == []
    )


@pytest.mark.parametrize("grows", [False, True])
def test_an_output_whose_columns_were_read_otherwise_is_not_gone_on_with(grows):
    """Version 0.1.0 carried a column of questions through, and asked every picture to be described."""
    schema = pa.schema([("image", pa.string()), ("question", pa.string()), ("n", pa.int64())])
    settings = PlanSettings.of(RunConfig("", "", "understand"))

    def round_of(*carried):
        fields = pa.schema([schema.field(name) for name in carried])
        return Round(1, 8, np.ones(1, bool), {}, "", [], fields, [], "", encode_schema(schema))

    check = joined_schema if grows else check_carried
    for rounds in ([], [round_of("n")]):
        check(schema, rounds, settings)
    with pytest.raises(InputError, match="Column 'question' of the manifest is read by this version"):
        check(schema, [round_of("question", "n")], settings)
    with pytest.raises(InputError, match="Column 'n' of the manifest is carried by this version"):
        check(schema, [round_of()], settings)


def test_columns_of_an_earlier_output_are_no_misspelt_ones():
    names = ["id", "image", "in_sample", "in_prompt", "in_top_k", "sede"]
    schema = pa.schema([(name, pa.string()) for name in names])
    (warning,) = check_columns(schema, PlanSettings.of(RunConfig("", "", "understand")))
    assert "'sede'" in warning


def test_a_longer_name_is_no_misspelt_one():
    settings = PlanSettings.of(RunConfig("", "", "edit"))
    gedit = ["key", "input_image", "input_image_raw", "instruction", "instruction_language", "seed_old"]
    warnings = check_columns(pa.schema([(name, pa.string()) for name in gedit]), settings)
    assert [line.split("'")[1] for line in warnings] == ["instruction", "input_image", "key"]
    warnings = check_columns(pa.schema([(name, pa.string()) for name in [*gedit, "sede"]]), settings)
    assert "'sede' is not a parameter and is carried through; did you mean 'seed'?" in warnings[-1]


def test_a_misspelt_column_is_warned_of_beside_the_right_one():
    names = ["id", "prompt", "seed", "sede", "promt"]
    schema = pa.schema([(name, pa.string()) for name in names])
    warnings = check_columns(schema, PlanSettings.of(RunConfig("", "", "generate")))
    assert warnings == [
        "Column 'sede' is not a parameter and is carried through; did you mean 'seed'?",
        "Column 'promt' is not a parameter and is carried through; did you mean 'prompt'?",
    ]
