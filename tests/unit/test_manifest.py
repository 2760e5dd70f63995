"""Manifests: which files they are, what columns they have, and rows with all their faults."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wallaroo.model.errors import InputError
from wallaroo.workflows.manifests import parquet_files, text_files
from wallaroo.workflows.manifests.discover import discover
from wallaroo.workflows.manifests.read import read, scan
from wallaroo.workflows.manifests.schema import Columns
from wallaroo.workflows.manifests.where import Filter
from wallaroo.workflows.outputs.schema import json_columns


def load(path, columns=None):
    """Schema, rows as dicts and faults (by file and number) of a manifest, through all that serialises."""
    found, pieces = Columns(), []
    files = discover(str(path)).files
    for number, file in enumerate(files):
        seen = scan(file)
        found.add(number, file.path, seen)
        pieces += seen.pieces
    schema = found.schema()
    rows, faults = [], {}
    for piece in pieces:
        for batch in read(piece, schema, columns):
            batch.table.validate(full=True)
            if columns is None:
                assert batch.table.schema.equals(schema, check_metadata=True)
            rows += batch.table.to_pylist()
            faults |= {(piece.file.relative, number): words for number, words in batch.faults.items()}
    return schema, rows, faults


def write(folder, **files):
    for name, data in files.items():
        stem, _, suffix = name.rpartition("_")
        path = folder / f"{stem}.{suffix}"
        if isinstance(data, pa.Table):
            pq.write_table(data, path)
        else:
            path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


# Finding


def test_a_folder_is_all_its_files_in_order(tmp_path):
    for name in ("b.csv", "a/c.jsonl", "a/d.PARQUET", ".hidden.csv", "_SUCCESS", "_tmp/e.csv", "README.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    found = discover(str(tmp_path))
    assert [(file.relative, file.format) for file in found.files] == [
        ("_tmp/e.csv", "csv"),
        ("a/c.jsonl", "jsonl"),
        ("a/d.PARQUET", "parquet"),
        ("b.csv", "csv"),
    ]
    assert found.passed_over == {
        ".md": (1, "README.md"),
        "hidden": (1, ".hidden.csv"),
        "marker": (1, "_SUCCESS"),
    }
    pattern = discover(f"{tmp_path}/**/*.csv")
    assert [file.relative for file in pattern.files] == ["_tmp/e.csv", "b.csv"]
    single = discover(str(tmp_path / "a" / "c.jsonl"))
    assert [file.relative for file in single.files] == ["c.jsonl"]


def test_a_fresh_copy_is_the_same_manifest(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, a_csv="prompt\nx\n")
    one, two = (discover(str(tmp_path / folder)) for folder in ("one", "two"))
    assert one.identity() == two.identity()
    write(tmp_path / "two", a_csv="prompt\ny\n")
    assert one.identity() != discover(str(tmp_path / "two")).identity()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("absent", "there is no such file or folder"),
        ("empty", "the folder is empty"),
        ("*.csv", "no file matches it"),
        ("other", r"no Parquet, CSV or JSON Lines file, only such as 'x\.bin'"),
        ("a.xlsx", r"suffix '\.xlsx'.*save the sheet as CSV"),
        ("out", r"is the output of a run.*errors\.jsonl"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path, path, words):
    for name in (
        "empty/",
        "other/x.bin",
        "a.xlsx",
        "out/run.json",
        "out/data/shard-00000000.parquet",
    ):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True, parents=True)
        if name.endswith("/"):
            file.mkdir()
        else:
            file.write_bytes(b"[]")
    with pytest.raises(InputError, match=words) as caught:
        discover(str(tmp_path / path))
    assert "\n" not in str(caught.value)


# CSV


def test_csv_values_stay_the_text_they_are(tmp_path):
    text = '\ufeffid,prompt,n\r\n007,"a ""cat"", yes",1.50\r\n8,"two\nlines",\r\n'
    schema, rows, faults = load(write(tmp_path, a_csv=text))
    assert schema == pa.schema([("id", pa.string()), ("prompt", pa.string()), ("n", pa.string())])
    assert rows == [
        {"id": "007", "prompt": 'a "cat", yes', "n": "1.50"},
        {"id": "8", "prompt": "two\nlines", "n": ""},
    ]
    assert not faults


def test_a_csv_row_with_a_fault_harms_no_other(tmp_path):
    data = (
        b"id,prompt\n"
        b"0,fine\n"
        b"1,b\xff\xfed\n"
        b"2\n"
        b"\n"
        b'"3,a quote that is never closed\n'
        b'4,"a quote"too many\n'
        b"5,a,b\n"
        b"6,\xe4\xbd\xa0\xe5\xa5\xbd\n"
        b'7,"the end'
    )
    _, rows, faults = load(write(tmp_path, a_csv=data))
    assert [row["id"] for row in rows] == ["0", "1", None, None, None, None, "6", None]
    assert rows[6]["prompt"] == "你好" and rows[1]["prompt"] == "b\ufffd\ufffdd"
    assert {number: words.split(" (")[0] for (_, number), words in faults.items()} == {
        1: "is not valid UTF-8 in column 'prompt'",
        2: "has 1 fields, but the header has 2",
        3: "is not valid CSV",
        4: "is not valid CSV",
        5: "has 3 fields, but the header has 2",
        7: "is not valid CSV",
    }


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("提示\nx\n".encode("gbk"), "not valid UTF-8"),
        ("prompt\nx\n".encode("utf-16-le"), "UTF-16 without a mark"),
        ("prompt\nx\n".encode("utf-32"), "is UTF-32"),
        (b"PK\x03\x04\x14\x00", "is not text, but Parquet, or a ZIP archive as Excel writes"),
        (b"prompt,a,a\n1,2,3\n", "two columns named 'a'"),
        (b'"prompt\nx\n', "header of .* is not valid CSV"),
        ((",".join(f"c{i}" for i in range(1001)) + "\n").encode(), "more than 1000 columns"),
    ],
)
def test_a_bad_csv_header_is_the_fault_of_the_file(tmp_path, data, words):
    with pytest.raises(InputError, match=words):
        load(write(tmp_path, a_csv=data))


@pytest.mark.parametrize("data", ['["a cat", "a dog"]\n', "[1, 2]", '[\n  "a cat"\n]\n'])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_an_array_of_values_is_named_for_what_it_is(tmp_path, data, suffix):
    with pytest.raises(InputError, match="is a JSON array of values without names: write each row as an obj"):
        load(write(tmp_path, **{f"a_{suffix}": data}))


def test_a_column_without_a_name_gets_one(tmp_path):
    schema, rows, _ = load(write(tmp_path, a_csv=",prompt\n0,x\n"))
    assert schema.names == ["column_0", "prompt"]
    assert rows == [{"column_0": "0", "prompt": "x"}]


def test_files_without_rows_are_none(tmp_path):
    schema, rows, _ = load(write(tmp_path, a_csv="", b_csv="prompt\n", c_jsonl="\n \n", d_csv="prompt\nx\n"))
    assert schema.names == ["prompt"] and rows == [{"prompt": "x"}]


# JSON Lines


@pytest.mark.parametrize(
    ("values", "arrow", "marked"),
    [
        (["a", None], pa.string(), False),
        ([1, None, 2], pa.int64(), False),
        ([1, 2.5], pa.float64(), False),
        ([2**60, 1], pa.int64(), False),
        ([2**60, 1.5], pa.string(), True),
        ([2**70], pa.string(), True),
        ([True, False], pa.bool_(), False),
        ([True, 1], pa.string(), True),
        (["a", 1], pa.string(), True),
        ([["a"], []], pa.list_(pa.string()), False),
        ([[1], [2.5]], pa.list_(pa.float64()), False),
        ([[1, "a"]], pa.string(), True),
        ([[]], pa.string(), True),
        ([{"a": 1}], pa.string(), True),
        ([[{"a": 1}]], pa.string(), True),
        ([None], pa.string(), False),
    ],
)
def test_a_json_column_has_one_type_or_is_json_text(tmp_path, values, arrow, marked):
    # Spread over two files, so that the type is settled across them.
    half = len(values) // 2
    for name, some in (("a", values[:half]), ("b", values[half:])):
        write(tmp_path, **{f"{name}_jsonl": "".join(json.dumps({"x": value}) + "\n" for value in some)})
    schema, rows, faults = load(tmp_path)
    assert schema.field("x").type == arrow
    assert json_columns(schema) == ({"x"} if marked else set())
    got = [row["x"] if not marked or row["x"] is None else json.loads(row["x"]) for row in rows]
    assert got == values and not faults


def test_a_broken_line_harms_no_other(tmp_path):
    lines = [
        b'{"prompt": "fine"}',
        b"{nope",
        b"[1]",
        b'{"prompt": "b\xffd"}',
        b'{"prompt": "half \\ud800"}',
        b'{"prompt": "\\ud83d\\ude00"}',
        b"[" * 100_000,
        b'{"n": ' + b"9" * 10_000 + b"}",
        b'{"other": 1}',
    ]
    _, rows, faults = load(write(tmp_path, a_jsonl=b"\n".join(lines)))
    prompts = [row["prompt"] for row in rows]
    assert prompts == ["fine", None, None, "b\ufffdd", "half \ufffd", "\U0001f600", None, None, None]
    assert rows[8]["other"] == 1
    assert {number: words.split(" (")[0] for (_, number), words in faults.items()} == {
        1: "is not valid JSON",
        2: "is a JSON array, not an object",
        3: "is not valid UTF-8",
        4: "holds half of a surrogate pair, which is not Unicode text",
        6: "is not valid JSON",
        7: "is not valid JSON",
    }


# Parquet


def test_parquet_keeps_its_types(tmp_path):
    table = pa.table(
        {
            "prompt": pa.array(["a", "b"], pa.large_string()),
            "when": pa.array([1, None], pa.timestamp("ms")),
            "nested": pa.array([{"x": [1]}, None], pa.struct([("x", pa.list_(pa.int8()))])),
            "kind": pa.array(["u", "v"]).dictionary_encode(),
            "nothing": pa.nulls(2),
        }
    )
    schema, rows, _ = load(write(tmp_path, a_parquet=table))
    assert [schema.field(name).type for name in table.column_names[:4]] == list(table.schema.types[:4])
    assert schema.field("nothing").type == pa.string()
    assert rows == table.to_pylist()


def test_parquet_is_cut_by_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_files, "PIECE_ROWS", 250)
    pq.write_table(pa.table({"n": range(1000)}), tmp_path / "a.parquet", row_group_size=100)
    pieces = scan(discover(str(tmp_path)).files[0]).pieces
    assert [(piece.first_row, piece.rows, piece.start, piece.stop) for piece in pieces] == [
        (0, 300, 0, 3),
        (300, 300, 3, 6),
        (600, 300, 6, 9),
        (900, 100, 9, 10),
    ]
    assert [row["n"] for row in load(tmp_path)[1]] == list(range(1000))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_text_is_cut_at_rows(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(text_files, "PIECE_ROWS", 7)
    monkeypatch.setattr(text_files, "BATCH_ROWS", 3)
    if kind == "csv":
        text = "n,prompt\n" + "".join(f'{n},"a\n{"b" * n}"\n' for n in range(50))
    else:
        text = "".join(json.dumps({"n": str(n), "prompt": f"a\n{'b' * n}"}) + "\n\n" for n in range(50))
    write(tmp_path, **{f"a_{kind}": text})
    pieces = scan(discover(str(tmp_path)).files[0]).pieces
    assert [piece.rows for piece in pieces] == [7] * 7 + [1]
    assert load(tmp_path)[1] == [{"n": str(n), "prompt": f"a\n{'b' * n}"} for n in range(50)]


def test_text_of_a_parquet_file_that_is_no_text_is_the_fault_of_its_row(tmp_path):
    raw = pa.array([b"fine", b"b\xff", None])
    for arrow in (pa.string(), pa.large_string()):
        text = raw.cast(pa.large_binary() if arrow == pa.large_string() else pa.binary()).view(arrow)
        _, rows, faults = load(write(tmp_path, a_parquet=pa.table({"prompt": text, "n": [1, 2, 3]})))
        assert [row["prompt"] for row in rows] == ["fine", "b\ufffd", None]
        assert [row["n"] for row in rows] == [1, 2, 3]
        assert faults == {("a.parquet", 1): "is not valid UTF-8 in column 'prompt'"}


def test_columns_may_be_chosen(tmp_path):
    write(
        tmp_path,
        a_parquet=pa.table({"id": [1, 2], "prompt": ["a", "b"]}),
        b_parquet=pa.table({"prompt": ["c"]}),
    )
    assert load(tmp_path, ["id"])[1] == [{"id": 1}, {"id": 2}, {"id": None}]
    assert load(tmp_path, [])[1] == [{}, {}, {}]


@pytest.mark.parametrize("damage", ["garbage", "empty", "cut", "page"])
def test_a_corrupt_parquet_file_is_named(tmp_path, damage):
    pq.write_table(pa.table({"prompt": [f"prompt {n}" for n in range(10_000)]}), tmp_path / "good.parquet")
    data = (tmp_path / "good.parquet").read_bytes()
    bad = {
        "garbage": b"garbage" * 1000,
        "empty": b"",
        "cut": data[:-100],
        "page": data[:2000] + bytes(500) + data[2500:],
    }
    (tmp_path / "bad.parquet").write_bytes(bad[damage])
    with pytest.raises(
        InputError, match=r"bad\.parquet is not a readable parquet file \(.*\): repair"
    ) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_extension_types_are_refused(tmp_path):
    table = pa.table(
        {
            "prompt": ["a"],
            "x": pa.ExtensionArray.from_storage(pa.opaque(pa.binary(), "x", "y"), pa.array([b"1"])),
        }
    )
    with pytest.raises(InputError, match=r"'x' .* extension type"):
        load(write(tmp_path, a_parquet=table))


# One schema


def test_types_of_files_are_put_together_or_refused(tmp_path):
    write(
        tmp_path,
        a_parquet=pa.table({"n": pa.array([1], pa.int32()), "m": pa.nulls(1)}),
        b_parquet=pa.table({"n": pa.array([2**40], pa.int64()), "m": ["x"], "o": [1.5]}),
    )
    schema, rows, _ = load(tmp_path)
    assert schema == pa.schema([("n", pa.int64()), ("m", pa.string()), ("o", pa.float64())])
    assert rows == [{"n": 1, "m": None, "o": None}, {"n": 2**40, "m": "x", "o": 1.5}]
    write(tmp_path, c_parquet=pa.table({"n": ["text"]}))
    with pytest.raises(InputError, match=r"'n' is int64 in .*b\.parquet but string in .*c\.parquet"):
        load(tmp_path)


def test_the_schema_does_not_depend_on_the_order_of_scans(tmp_path):
    write(tmp_path, a_jsonl='{"x": 1, "y": 1}', b_jsonl='{"z": 1, "x": 1.5}', c_csv="w,x2\n")
    files = list(enumerate(discover(str(tmp_path)).files))
    forward, backward = Columns(), Columns()
    for columns, order in ((forward, files), (backward, files[::-1])):
        for number, file in order:
            columns.add(number, file.path, scan(file))
    assert forward.schema().equals(backward.schema(), check_metadata=True)
    assert forward.schema().names == ["x", "y", "z", "w", "x2"]


def test_a_file_that_changed_since_is_noticed(tmp_path):
    write(tmp_path, a_jsonl='{"x": 1}\n{"x": 2}\n')
    found = scan(discover(str(tmp_path)).files[0])
    write(tmp_path, a_jsonl='{"x": 1, "y": "longer than both of the lines"}\n')
    with pytest.raises(InputError, match="it changed while it was read"):
        list(read(found.pieces[0], pa.schema([("x", pa.int64())])))


# Choosing rows


def test_an_expression_chooses_rows():
    table = pa.table({"row_0": [1, 2, 3, 4], "Prompt": ["a", "b", None, "d"], "kind": ["x", "y", "x", "y"]})
    for where, chosen in (
        ("row_0 > 2", [2, 3]),
        ("prompt IN ('a', 'd')", [0, 3]),
        ("prompt < 'c' -- a comment", [0, 1]),
        ("false", []),
        ("kind = 'x' OR (row_0 = 4 AND length(prompt) = 1)", [0, 2, 3]),
    ):
        assert np.flatnonzero(Filter(where, table.schema).matches(table)).tolist() == chosen


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("tga = 'x'", "Referenced column"),
        ("tag =", "syntax error"),
        ("count(*) > 1", "aggregates"),
        ("row_number() OVER () = 1", "window functions"),
        ("tag = (SELECT content FROM read_text('/etc/hostname'))", "file system operations are disabled"),
        ("1=1); COPY (SELECT 1) TO '/tmp/wallaroo-escape'; SELECT (1=1", "more than one expression"),
        ("getenv('HOME') = 'x'", "getenv"),
    ],
)
def test_a_wrong_expression_is_refused_in_duckdb_s_words(where, words):
    with pytest.raises(InputError, match=words) as caught:
        Filter(where, pa.schema([("tag", pa.string())]))
    assert "\n" not in str(caught.value).replace(where, "")


# Anything


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["csv", "jsonl", "parquet"]))
def test_any_bytes_are_rows_or_one_sentence(tmp_path_factory, data, kind):
    folder = tmp_path_factory.mktemp("any")
    write(folder, **{f"a_{kind}": b"prompt,id\n" + data if kind == "csv" else data})
    try:
        _, rows, faults = load(folder)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert all(0 <= number < len(rows) for _, number in faults)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
                lambda inner: (
                    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
                ),
                max_leaves=5,
            ),
            max_size=4,
        ),
        max_size=8,
    )
)
def test_any_json_comes_back_as_it_was(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("json")
    write(folder, a_jsonl="".join(json.dumps(value) + "\n" for value in values))
    schema, rows, faults = load(folder)
    marked = json_columns(schema)
    for number, (value, row) in enumerate(zip(values, rows, strict=True)):
        if ("a.jsonl", number) in faults:
            continue
        for name, given_value in value.items():
            got = row[name]
            assert (json.loads(got) if name in marked and got is not None else got) == given_value
