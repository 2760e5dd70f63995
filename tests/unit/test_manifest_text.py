"""Text as it comes: compressed, as TSV, as JSON of any shape, as lines, in UTF-16, with CR line ends."""

import gzip
import io
import json

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wallaroo.model.errors import InputError
from wallaroo.workflows.manifests import streams, text_files
from wallaroo.workflows.manifests.discover import discover
from wallaroo.workflows.manifests.read import read, scan
from wallaroo.workflows.manifests.schema import Columns

ROWS = [{"id": str(n), "prompt": f'a "cat", {n}\n猫'} for n in range(5)]


def load(path, task="generate"):
    """Rows and faults (by number) of a manifest."""
    columns, pieces, rows, faults = Columns(), [], [], {}
    for number, file in enumerate(discover(str(path), task).files):
        seen = scan(file)
        columns.add(number, file.path, seen)
        pieces += seen.pieces
    schema = columns.schema()
    for piece in pieces:
        for batch in read(piece, schema):
            rows += batch.table.to_pylist()
            faults |= batch.faults
    return rows, faults


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]), ".zst": zstd}


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "ndjson", "json"])
def test_compressed_text_is_text(tmp_path, monkeypatch, kind, pack):
    frame = pd.DataFrame(ROWS)
    if kind in ("csv", "tsv"):
        text = frame.to_csv(index=False, sep="\t" if kind == "tsv" else ",")
    else:
        text = frame.to_json(orient="records", lines=kind != "json", force_ascii=False)
    path = tmp_path / f"m.{kind}{pack}"
    path.write_bytes(PACK[pack](text.encode()))
    assert load(path) == (ROWS, {})
    if kind != "json":
        assert load(tmp_path) == (ROWS, {})
    # In pieces, each of which finds its place again.
    monkeypatch.setattr(text_files, "PIECE_ROWS", 2)
    monkeypatch.setattr(text_files, "COMPRESSED_TIMES", 1)
    assert [piece.rows for piece in scan(discover(str(path)).files[0]).pieces] == [2, 2, 1]
    assert load(path) == (ROWS, {})


@pytest.mark.parametrize("pack", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_broken_archive_is_named(tmp_path, pack, damage):
    data = PACK[pack](b"prompt\n" + b"".join(b"%d\n" % n for n in range(9999)))
    (tmp_path / f"m.csv{pack}").write_bytes(data[: len(data) // 2] if damage == "cut" else b"garbage" * 99)
    with pytest.raises(InputError, match=rf"m\.csv\{pack} is not a readable csv file") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_files_of_other_writers(tmp_path):
    frame = pl.DataFrame(ROWS)
    frame.write_csv(tmp_path / "polars.tsv", separator="\t")
    frame.write_ndjson(tmp_path / "polars.ndjson")
    duckdb.sql(f"COPY (SELECT * FROM frame) TO '{tmp_path}/duck.csv.gz' (HEADER)")
    duckdb.sql(f"COPY (SELECT * FROM frame) TO '{tmp_path}/duck.jsonl.zst' (FORMAT json)")
    duckdb.sql(f"COPY (SELECT * FROM frame) TO '{tmp_path}/array.json' (FORMAT json, ARRAY true)")
    pd.DataFrame(ROWS).to_csv(tmp_path / "pandas.csv.gz", index=False)
    pd.DataFrame(ROWS).to_json(tmp_path / "indent.json", orient="records", indent=2)
    for path in sorted(tmp_path.iterdir()):
        assert load(path) == (ROWS, {}), path.name


# JSON


@pytest.mark.parametrize("name", ["m.json", "m.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\ufeff  " + json.dumps(ROWS, indent=1),
        "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
        "\n".join(json.dumps(row, indent=4) for row in ROWS),
        "".join(json.dumps(row, indent=4) for row in ROWS),
        "\r\n".join(map(json.dumps, ROWS)),
    ],
)
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_json_of_any_shape_is_its_objects(tmp_path, monkeypatch, name, text, chunk):
    monkeypatch.setattr(streams, "CHUNK_BYTES", chunk)
    path = tmp_path / name
    path.write_text(text)
    assert load(path) == (ROWS, {})


def test_one_object_is_one_row(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps(ROWS[0]))
    assert load(tmp_path / "m.json") == (ROWS[:1], {})
    (tmp_path / "m.json").write_text("[]")
    assert load(tmp_path / "m.json") == ([], {})


def test_a_broken_element_harms_no_earlier_one(tmp_path):
    (tmp_path / "m.json").write_text('[{"a": 1}, 7, {"a": [}, {"b": "{]"}')
    rows, faults = load(tmp_path / "m.json")
    assert rows[0]["a"] is not None and 0 not in faults and faults
    (tmp_path / "m.json").write_text('[{"a": "x"}, {"a": "y}')
    rows, faults = load(tmp_path / "m.json")
    assert rows[0] == {"a": "x"} and list(faults) == [1]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=3),
            st.recursive(st.text(max_size=4), lambda inner: st.lists(inner, max_size=2), max_leaves=3),
            min_size=1,
            max_size=2,
        ),
        max_size=4,
    ),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(1, 9),
)
def test_any_objects_are_found_again(objects, indent, array, chunk):
    whole = json.dumps(objects, indent=indent, ensure_ascii=False)
    text = whole if array else "\n".join(json.dumps(one, indent=indent) for one in objects)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "CHUNK_BYTES", chunk)
        lines = list(streams._flat(io.BytesIO(text.encode()), "m.json"))
    assert [json.loads(line) for line in lines] == objects


# Encodings and line ends


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
def test_text_with_a_mark_is_read(tmp_path, kind, encoding):
    text = {
        "csv": 'id,prompt\r\n1,"一只\r\n猫"\r\n2,😀\r\n',
        "jsonl": '{"id": "1", "prompt": "一只\\r\\n猫"}\r\n{"id": "2", "prompt": "😀"}\r\n',
        "txt": "一只猫\r\n\r\n😀\r\n",
    }[kind]
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / f"m.{kind}").write_bytes((mark + text).encode(encoding))
    rows, faults = load(tmp_path / f"m.{kind}")
    assert [row["prompt"].replace("\r\n", "") for row in rows] == ["一只猫", "😀"] and not faults


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("txt", "红色的圆\n蓝色的方块\n" * 9999),  # beyond what is looked at
        ("txt", "😀\r\n"),
        ("csv", "提示,数\r\n猫,1\r\n"),
        ("csv", "prompt\r\na cat\r\n"),
        ("tsv", "프롬프트\t수\n고양이\t1\n"),
        ("jsonl", '{"prompt": "猫"}\n'),
    ],
)
def test_utf_16_without_a_mark_is_named(tmp_path, kind, text, encoding):
    (tmp_path / f"m.{kind}").write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match="as UTF-16 without a mark at its start has: save it as UTF-8"):
        load(tmp_path / f"m.{kind}")


def test_other_bytes_are_not_taken_for_utf_16(tmp_path):
    # The second is in GBK, the third has a NUL of its own; each harms its own row at most.
    (tmp_path / "m.txt").write_bytes("一只猫\n".encode() + "一只狗\n".encode("gbk") + b"a\0b, a cat\n" * 3)
    rows, faults = load(tmp_path / "m.txt")
    assert [row["prompt"] for row in rows][::2] == ["一只猫", "a\0b, a cat", "a\0b, a cat"]
    assert faults == {1: "is not valid UTF-8"}


def test_texts_of_a_folder_without_a_mark_are_error_rows(tmp_path):
    for name, text, encoding in (
        ("a", "a cat", "utf-16-le"),
        ("b", "a cat", "utf-16"),
        ("c", "红色的圆", "utf-16-be"),
        ("d", "a cat", "utf-8-sig"),
    ):
        (tmp_path / f"{name}.txt").write_bytes(text.encode(encoding))
    rows, faults = load(tmp_path)
    assert [rows[index]["prompt"] for index in (1, 3)] == ["a cat", "a cat"]
    assert faults == {
        0: "is UTF-16 without a mark at its start; save it as UTF-8",
        2: "is not valid UTF-8",
    }


@pytest.mark.parametrize("text", ["a cat\0", "cat\0", "a\0b", "a\0cat", "a cat\0\0", "一只\0猫"])
def test_a_text_of_a_folder_with_a_nul_of_its_own_is_a_prompt(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert load(tmp_path) == ([{"id": "a", "prompt": text}], {})


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["a cat", "café crème", "中 a cat", "红色的圆\n一只 cat\n"])
def test_a_text_of_a_folder_in_utf_16_is_named(tmp_path, text, encoding):
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "b.txt").write_text("a dog")
    assert load(tmp_path)[1] == {0: "is UTF-16 without a mark at its start; save it as UTF-8"}


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("kind", ["jsonlines", "ldjson", "jl", "tab", "psv"])
def test_other_suffixes_of_tables(tmp_path, kind, pack):
    frame = pd.DataFrame(ROWS).rename(columns={"prompt": "a, b"})
    if kind in ("tab", "psv"):
        text = frame.to_csv(index=False, sep="\t" if kind == "tab" else "|")
    else:
        text = frame.to_json(orient="records", lines=True, force_ascii=False)
    (tmp_path / f"m.{kind}{pack}").write_bytes(PACK[pack](text.encode()))
    rows = frame.to_dict("records")
    assert load(tmp_path) == load(tmp_path / f"m.{kind}{pack}") == (rows, {})


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "txt"])
def test_lines_that_end_as_they_did_on_a_mac(tmp_path, kind):
    text = {
        "csv": "id,prompt\r1,a cat\r2,a dog\r",
        "tsv": "id\tprompt\r1\ta cat\r2\ta dog",
        "jsonl": '{"prompt": "a cat"}\r{"prompt": "a dog"}\r',
        "txt": "a cat\ra dog",
    }[kind]
    (tmp_path / f"m.{kind}").write_text(text, newline="")
    rows, faults = load(tmp_path / f"m.{kind}")
    assert [row["prompt"] for row in rows] == ["a cat", "a dog"] and not faults


def test_lines_are_prompts(tmp_path):
    (tmp_path / "m.txt").write_bytes(b'a cat, "red"\n\n  a dog\t\nb\xffd\n')
    rows, faults = load(tmp_path / "m.txt")
    assert [row["prompt"] for row in rows] == ['a cat, "red"', "a dog", "b\ufffdd"]
    assert faults == {2: "is not valid UTF-8"}


def test_quotes_of_tsv_are_those_of_csv_or_text(tmp_path):
    (tmp_path / "m.tsv").write_text('id\tprompt\n1\t"a\ttab"\n2\t"never closed\n3\tx\ty\n4\tz\n')
    rows, faults = load(tmp_path)
    assert [row["prompt"] for row in rows] == ["a\ttab", '"never closed', None, "z"]
    assert faults == {2: "has 3 fields, but the header has 2"}


def test_a_compressed_file_takes_little_memory(tmp_path):
    path = tmp_path / "m.csv.gz"
    path.write_bytes(gzip.compress(b"prompt\n" + b"a cat\n" * 4_000_000))
    (piece, *_) = pieces = scan(discover(str(path)).files[0]).pieces
    assert sum(one.rows for one in pieces) == 4_000_000 and piece.rows == 65_536 * 8
    (batch, *_) = read(pieces[-1], pa.schema([("prompt", pa.string())]))
    assert batch.table.num_rows == 4096 and batch.first_row == pieces[-1].first_row


# Folders that Hive names


def test_folders_of_hive_are_columns(tmp_path):
    for language, part in (("zh", 0), ("en", 1), ("__HIVE_DEFAULT_PARTITION__", 2)):
        folder = tmp_path / f"language={language}" / "kind%3Da=b%20c"
        folder.mkdir(parents=True)
        pl.DataFrame({"prompt": [str(part)]}).write_parquet(folder / "part-0.parquet")
    (tmp_path / "language=fr").mkdir()
    (tmp_path / "language=fr" / "m.jsonl").write_text('{"prompt": "3"}\n{"prompt": "4", "language": "de"}\n')
    (tmp_path / "language=fr" / "m.csv").write_text("prompt\n5\n")
    rows, faults = load(tmp_path)
    assert {row["prompt"]: (row["language"], row["kind=a"]) for row in rows} == {
        "0": ("zh", "b c"),
        "1": ("en", "b c"),
        "2": (None, "b c"),
        "3": ("fr", None),
        "4": ("de", None),
        "5": ("fr", None),
    }
    assert not faults


def test_partitions_of_duckdb_and_polars(tmp_path):
    frame = pl.DataFrame(
        {"prompt": ["a", "b", "c"], "year": [2023, 2024, 2024], "language": ["zh", "en", "zh"]}
    )
    duckdb.sql(
        f"COPY (SELECT * FROM frame) TO '{tmp_path}/duck' (FORMAT parquet, PARTITION_BY (year, language))"
    )
    rows, _ = load(tmp_path / "duck")
    wanted = {("a", "2023", "zh"), ("b", "2024", "en"), ("c", "2024", "zh")}
    assert {(row["prompt"], row["year"], row["language"]) for row in rows} == wanted
    # A column that the files have as well is theirs, with its type.
    (tmp_path / "own" / "year=2023").mkdir(parents=True)
    frame[:1].write_parquet(tmp_path / "own" / "year=2023" / "a.parquet")
    assert load(tmp_path / "own")[0] == frame[:1].to_dicts()


@pytest.mark.parametrize(
    ("name", "text", "kept"),
    [
        (
            "m.jsonl",
            b'\xef\xbb\xbf{"prompt": a cat}\r\n{"prompt": "b"}\n[1]\n',
            {0: '{"prompt": a cat}', 2: "[1]"},
        ),
        ("m.jsonl", b'{"prompt": "b"}\n{"prompt": "\xff"}\n{"prompt": \xff}\n', {2: '{"prompt": \ufffd}'}),
        ("m.csv", b'id,prompt\r\n1,a,b\r\n2,"c\nd"\r\n3\r\n', {0: "1,a,b", 2: "3"}),
        ("m.csv", b'id,prompt\n1,"a"b\n2,c\n', {0: '1,"a"b'}),
        ("m.jsonl", b"{" + b"\xc3\xa9" * 5000 + b'\n{"prompt": "b"}\n', None),
    ],
)
def test_a_row_that_cannot_be_read_keeps_its_text(tmp_path, name, text, kept):
    (tmp_path / name).write_bytes(text)
    (file,) = discover(str(tmp_path / name)).files
    columns = Columns()
    found = scan(file)
    columns.add(0, file.path, found)
    raw = {}
    for piece in found.pieces:
        for batch in read(piece, columns.schema()):
            assert batch.raw.keys() <= batch.faults.keys()
            raw |= batch.raw
    assert raw == (kept or {0: "{" + "\u00e9" * 3999 + "... (cut after 4,000 characters)"})
