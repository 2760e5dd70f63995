"""One logical type in several encodings, as pandas, polars, DuckDB and pyarrow write it."""

import datetime
import decimal
import json
import uuid

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wallaroo.model.errors import InputError
from wallaroo.workflows.manifests.column_types import joined_type, plain_type
from wallaroo.workflows.manifests.discover import discover
from wallaroo.workflows.manifests.read import read, scan
from wallaroo.workflows.manifests.schema import Columns
from wallaroo.workflows.manifests.where import Filter
from wallaroo.workflows.outputs.schema import json_columns, result_schema
from wallaroo.workflows.plans.columns import carried_schema
from wallaroo.workflows.plans.settings import PlanSettings
from wallaroo.workflows.settings import RunConfig


def load(path, task="generate"):
    """Schema and rows of a manifest."""
    columns, pieces, rows = Columns(), [], []
    for number, file in enumerate(discover(str(path), task).files):
        seen = scan(file)
        columns.add(number, file.path, seen)
        pieces += seen.pieces
    schema = columns.schema()
    for piece in pieces:
        for batch in read(piece, schema):
            batch.table.validate(full=True)
            assert not batch.faults and batch.table.schema.equals(schema)
            rows += batch.table.to_pylist()
    # What a plan and a result can hold.
    result_schema(carried_schema(schema, PlanSettings.of(RunConfig("", "", task))))
    return schema, rows


def both(folder, one, other):
    """The column `x` of a manifest with these arrays in two files."""
    for name, array in (("a", one), ("b", other)):
        pq.write_table(pa.table({"x": array}), folder / f"{name}.parquet")
    schema, rows = load(folder)
    return schema.field("x").type, [row["x"] for row in rows]


# Writers


def test_views_as_polars_and_deltalake_write_them(tmp_path):
    table = pa.table(
        {
            "prompt": pa.array(["a", None], pa.string_view()),
            "raw": pa.array([b"x", None], pa.binary_view()),
            "list": pa.array([["u"], []], pa.list_(pa.string_view())),
            "nested": pa.array([{"v": "w"}, None], pa.struct([("v", pa.string_view())])),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    schema, rows = load(tmp_path)
    assert rows == table.to_pylist()
    assert schema.types == [pa.string(), pa.binary(), pa.list_(pa.string()), pa.struct([("v", pa.string())])]


@pytest.mark.parametrize("rows", [1, 3])
def test_views_of_lists(tmp_path, rows):
    lists = [["x", "y"], None, []][:rows]
    kinds = [pa.list_view(pa.string()), pa.large_list_view(pa.string_view())]
    table = pa.table([pa.array(lists, kind) for kind in kinds], ["small", "large"])
    table = table.append_column(
        "inner", pa.array([{"v": one} for one in lists], pa.struct([("v", kinds[0])]))
    )
    pq.write_table(table, tmp_path / "a.parquet")
    schema, found = load(tmp_path)
    assert found == table.to_pylist()
    plain = pa.list_(pa.string())
    assert schema.types == [plain, plain, pa.struct([("v", plain)])]


def test_files_of_polars(tmp_path):
    frame = pl.DataFrame(
        {
            "prompt": ["a cat", "猫"],
            "kind": pl.Series(["x", "y"], dtype=pl.Categorical),
            "level": pl.Series(["lo", "hi"], dtype=pl.Enum(["lo", "hi"])),
            "seed": pl.Series([2**62 + 1, None], dtype=pl.Int64),
            "day": [datetime.date(2024, 1, 2), None],
            "price": pl.Series([decimal.Decimal("1.50"), None], dtype=pl.Decimal(10, 2)),
            "raw": [b"\x00", b"\xff"],
        }
    )
    for name, options in (("a", {}), ("b", {"use_pyarrow": True})):
        frame.write_parquet(tmp_path / f"{name}.parquet", **options)
    _, rows = load(tmp_path)
    assert rows == frame.to_dicts() * 2
    texts = frame.drop("kind", "level")
    pq.write_table(pa.table(texts), tmp_path / "a.parquet")  # as views
    assert load(tmp_path / "a.parquet")[1] == texts.to_dicts()


def test_categories_of_pandas_beside_text(tmp_path):
    pd.DataFrame({"x": pd.Categorical(["a", None, "b"])}).to_parquet(tmp_path / "a.parquet", index=False)
    pd.DataFrame({"x": ["c", None]}).to_parquet(tmp_path / "b.parquet", index=False)
    pd.DataFrame({"x": pd.Categorical(["d"])}).to_parquet(tmp_path / "c.parquet", index=False)
    schema, rows = load(tmp_path)
    assert [row["x"] for row in rows] == ["a", None, "b", "c", None, "d"]
    assert not pa.types.is_dictionary(schema.field("x").type)


def test_uuid_and_json_of_duckdb(tmp_path):
    one, two = uuid.UUID(int=1), uuid.UUID(int=2**127)
    duckdb.sql(
        f"COPY (SELECT * FROM (VALUES ('{one}'::UUID, '{{\"a\": [1]}}'::JSON, 'a cat'), "
        f"('{two}'::UUID, NULL, 'a dog'), (NULL, '\"text\"'::JSON, 'x')) t(id, tag, prompt)) "
        f"TO '{tmp_path}/a.parquet'"
    )
    schema, rows = load(tmp_path)
    assert [row["id"] for row in rows] == [str(one), str(two), None]
    assert json_columns(schema) == {"tag"}
    assert [row["tag"] and json.loads(row["tag"]) for row in rows] == [{"a": [1]}, None, "text"]
    # Beside plain text no value of either may change.
    pq.write_table(pa.table({"tag": ["12"], "id": [str(one)]}), tmp_path / "b.parquet")
    schema, rows = load(tmp_path)
    assert json_columns(schema) == frozenset() and rows[-1]["tag"] == "12" and rows[-1]["id"] == str(one)


def test_intervals_of_duckdb_are_text(tmp_path):
    words = ["1 year 2 months", "3 days 04:00:00.5", "1 month 00:00:10", "0 days", "4 hours"]
    rows = ", ".join(f"('a cat', INTERVAL '{one}')" for one in words) + ", ('a cat', NULL)"
    duckdb.sql(f"COPY (FROM (VALUES {rows}) t(prompt, took)) TO '{tmp_path}/a.parquet'")
    schema, found = load(tmp_path)
    assert schema.types == [pa.string(), pa.string()]
    wanted = ["P14M", "P3DT14400.5S", "P1MT10S", "PT0S", "PT14400S", None]
    assert [row["took"] for row in found] == wanted
    # Beside text, and beside a column of 12 bytes that means nothing.
    (tmp_path / "b.csv").write_text("prompt,took\nx,5\n")
    assert [row["took"] for row in load(tmp_path)[1]] == [*wanted, "5"]
    pq.write_table(pa.table({"took": pa.array([bytes(12)], pa.binary(12))}), tmp_path / "c.parquet")
    assert load(tmp_path / "c.parquet")[1] == [{"took": bytes(12)}]


def test_uuid_and_json_inside_other_types(tmp_path):
    one = uuid.UUID(int=255)
    duckdb.sql(
        f"COPY (SELECT {{'a': [{{'id': '{one}'::UUID, 'tag': '{{\"k\": 1}}'::JSON, 'n': 7}}]}} AS x, "
        f"['{one}'::UUID, NULL] AS y, map {{'k': '{one}'::UUID}} AS z, 'a cat' AS prompt) "
        f"TO '{tmp_path}/a.parquet'"
    )
    texts = pa.array([["text"]])
    pq.write_table(pa.table({"y": texts}), tmp_path / "b.parquet")
    schema, rows = load(tmp_path)
    assert schema.field("y").type == pa.list_(pa.field("element", pa.string()))
    assert rows == [
        {
            "x": {"a": [{"id": str(one), "tag": '{"k": 1}', "n": 7}]},
            "y": [str(one), None],
            "z": [("k", str(one))],
            "prompt": "a cat",
        },
        {"x": None, "y": ["text"], "z": None, "prompt": None},
    ]


def test_bool8_is_a_truth_value(tmp_path):
    column = pa.ExtensionArray.from_storage(pa.bool8(), pa.array([0, 1, -1, None], pa.int8()))
    assert both(tmp_path, column, pa.array([True])) == (pa.bool_(), [False, True, True, None, True])


# Joins that change no value

UTC = datetime.UTC
NOON = datetime.datetime(2024, 5, 6, 12)


@pytest.mark.parametrize(
    ("one", "other", "kind", "values"),
    [
        (pa.array([1]), pa.array([0.5]), pa.float64(), [1.0, 0.5]),
        (pa.array([2**53]), pa.array([0.5]), pa.float64(), [float(2**53), 0.5]),
        (pa.array([1], pa.int8()), pa.array([2**60]), pa.int64(), [1, 2**60]),
        (pa.array([2**62], pa.uint64()), pa.array([-1]), pa.int64(), [2**62, -1]),
        (
            pa.array([decimal.Decimal("1.50")], pa.decimal128(5, 2)),
            pa.array([7]),
            pa.decimal128(22, 2),
            [decimal.Decimal("1.50"), decimal.Decimal(7)],
        ),
        (
            pa.array([NOON], pa.timestamp("ms")),
            pa.array([NOON], pa.timestamp("us")),
            pa.timestamp("us"),
            [NOON] * 2,
        ),
        (
            pa.array([NOON.date()], pa.date32()),
            pa.array([NOON], pa.timestamp("us")),
            pa.timestamp("us"),
            [datetime.datetime(2024, 5, 6), NOON],
        ),
        (
            pa.array([NOON.replace(tzinfo=UTC)], pa.timestamp("us", "UTC")),
            pa.array([NOON.replace(tzinfo=UTC)], pa.timestamp("us", "Asia/Tokyo")),
            pa.timestamp("us", "UTC"),
            [NOON.replace(tzinfo=UTC)] * 2,
        ),
        (
            pa.array(["a"], pa.large_string()),
            pa.array(["b"], pa.string_view()),
            pa.large_string(),
            ["a", "b"],
        ),
        (
            pa.array([{"u": 1}]),
            pa.array([{"u": 0.5, "v": "x"}]),
            pa.struct([("u", pa.float64()), ("v", pa.string())]),
            [{"u": 1.0, "v": None}, {"u": 0.5, "v": "x"}],
        ),
        (pa.array([["a"]]), pa.array([["b"]], pa.large_list(pa.large_string())), None, [["a"], ["b"]]),
        (pa.array([[1, 2]], pa.list_(pa.int8(), 2)), pa.array([[3]]), pa.list_(pa.int64()), [[1, 2], [3]]),
        (pa.nulls(1), pa.array(["a"]).dictionary_encode(), None, [None, "a"]),
    ],
)
def test_types_join_where_no_value_changes(tmp_path, one, other, kind, values):
    for pair in ((one, other), (other, one)):
        found, rows = both(tmp_path, *pair)
        assert rows == (values if pair[0] is one else values[::-1])
        assert kind is None or found == kind


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (pa.array([2**53 + 1]), pa.array([0.5]), ["int64", "double", "2^53|9007199254740993"]),
        (pa.array([2**63], pa.uint64()), pa.array([1]), ["uint64", "int64"]),
        (
            pa.array([NOON], pa.timestamp("us")),
            pa.array([NOON], pa.timestamp("us", "UTC")),
            ["a time zone, or none"],
        ),
        (pa.array([NOON.date()]), pa.array([NOON], pa.timestamp("us", "UTC")), ["date32", "timestamp"]),
        (pa.array([decimal.Decimal("0.1")]), pa.array([0.1]), ["decimal128", "double"]),
        (pa.array(["a"]), pa.array([b"a"]), ["string", "binary"]),
        (pa.array(["a"]), pa.array([1]), ["string", "int64"]),
        (pa.array([True]), pa.array([1]), ["bool", "int64"]),
        (pa.array([[1]]), pa.array([["a"]]), ["list<", "give it one type in all files"]),
        (pa.array([{"u": 1}]), pa.array([{"u": "x"}]), ["struct<"]),
        (pa.array(["a"]).dictionary_encode(), pa.array([1]), ["dictionary", "int64"]),
    ],
)
def test_other_types_are_refused_in_one_sentence(tmp_path, one, other, words):
    for pair in ((one, other), (other, one)):
        with pytest.raises(InputError) as caught:
            both(tmp_path, *pair)
        message = str(caught.value)
        assert "Column 'x'" in message and "\n" not in message and "readable" not in message
        assert "a.parquet" in message and "b.parquet" in message
        assert all(any(word in message for word in several.split("|")) for several in words), message


def test_long_integers_of_json_beside_floats_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"x": 2**60 + 1}) + "\n")
    pq.write_table(pa.table({"x": [0.5]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"Column 'x' of .*a\.jsonl.*b\.parquet"):
        load(tmp_path)


def test_joining_does_not_depend_on_the_order():
    kinds = [
        *(pa.int8(), pa.uint64(), pa.int64(), pa.float32(), pa.float64(), pa.bool_(), pa.null()),
        *(pa.string(), pa.large_string(), pa.binary(), pa.date32(), pa.timestamp("s"), pa.timestamp("ns")),
        *(pa.timestamp("ms", "UTC"), pa.decimal128(9, 1), pa.list_(pa.int8()), pa.struct([("a", pa.int8())])),
        pa.dictionary(pa.int8(), pa.string()),
    ]
    for one in kinds:
        assert joined_type(one, one) == one == plain_type(one)
        for other in kinds:
            assert joined_type(one, other) == joined_type(other, one)


def test_nan_beside_text_and_integers_is_nothing(tmp_path):
    rows = [{"s": "a", "n": 2**60, "f": 1, "only": float("nan")}, dict.fromkeys("snf", float("nan"))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    schema, found = load(tmp_path)
    assert schema.types == [pa.string(), pa.int64(), pa.float64(), pa.float64()]
    assert (found[1]["s"], found[1]["n"]) == (None, None) and np.isnan(found[1]["f"])
    assert not json_columns(schema)


# Columns that differ in case


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        ("prompt = 'a'", [0]),
        ("Prompt = 'a'", [2]),
        ("\"Prompt\" IN ('x', 'y') AND prompt < 'b'", [0]),
        ("猫 > 1 AND Prompt = 'a' -- Prompt", [2]),
        ("manifest.Prompt = 'x'", [0]),
        ("s.Prompt = 2 AND upper(prompt) = 'B'", [1]),
        ("prompt = 'PROMPT' OR Prompt = 'prompt'", []),
    ],
)
def test_names_that_differ_in_case_are_told_apart(where, chosen):
    table = pa.table({"prompt": ["a", "b", "c"], "Prompt": ["x", "y", "a"], "猫": [1, 2, 3]})
    table = table.append_column("s", pa.array([{"Prompt": n} for n in (1, 2, 3)]))
    assert np.flatnonzero(Filter(where, table.schema).matches(table)).tolist() == chosen


@pytest.mark.parametrize("where", ["PROMPT = 'a'", '"pRompt" = 1', "manifest.PROMPT IS NULL"])
def test_a_name_that_is_neither_of_two_is_refused(where):
    with pytest.raises(InputError, match="may be prompt or Prompt, which differ in case"):
        Filter(where, pa.schema([("prompt", pa.string()), ("Prompt", pa.string())]))


def test_views_hold_pictures_too(tmp_path):
    pq.write_table(pa.table({"image": pa.array([b"p"], pa.binary_view())}), tmp_path / "a.parquet")
    assert load(tmp_path, "edit")[1] == [{"image": f"{tmp_path}/a.parquet#0"}]
