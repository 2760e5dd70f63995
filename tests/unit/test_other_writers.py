"""Files as pandas, polars, DuckDB, Spark, datasets, img2dataset and Excel write them."""

import bz2
import gzip
import io
import json
import lzma
import tarfile

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.unit.test_benchmark_manifests import planned
from wallaroo.model.errors import InputError
from wallaroo.workflows.manifests import parquet_files, streams, text_files
from wallaroo.workflows.manifests.discover import discover

PROMPTS = ["a cat, 猫", 'a "dog"\non two lines']
FRAME = pd.DataFrame({"prompt": PROMPTS, "seed": pd.array([1, None], dtype="Int64"), "tag": ["x", "y"]})


def prompts(path, task="generate", **options):
    rows, _ = planned(path, task, **options)
    assert not [row["error_message"] for row in rows if row["error_message"]]
    return [row["prompt"] for row in rows]


@pytest.mark.parametrize("suffix", [".csv.gz", ".csv.zst", ".csv.bz2", ".csv.xz"])
def test_text_that_pandas_compresses(tmp_path, suffix):
    FRAME.to_csv(tmp_path / f"m{suffix}", index=False)
    FRAME.to_json(tmp_path / f"m{suffix.replace('csv', 'jsonl')}", orient="records", lines=True)
    assert prompts(tmp_path / f"m{suffix}") == PROMPTS
    assert prompts(tmp_path) == PROMPTS * 2


@pytest.mark.parametrize(
    ("pack", "suffix"), [(bz2.compress, ".bz2"), (lzma.compress, ".xz"), (gzip.compress, ".gz")]
)
@pytest.mark.parametrize("kind", ["csv", "txt"])
def test_a_broken_archive_is_one_sentence(tmp_path, pack, suffix, kind):
    (tmp_path / f"m.{kind}{suffix}").write_bytes(pack(b"prompt\n" + b"x\n" * 9000)[:-20])
    with pytest.raises(
        InputError, match=r"is not a readable (csv|lines) file .*: repair it, or move it"
    ) as caught:
        prompts(tmp_path / f"m.{kind}{suffix}")
    assert "\n" not in str(caught.value)
    (tmp_path / f"m.{kind}{suffix}").rename(tmp_path / "n.csv")
    (tmp_path / "n.csv").write_bytes(pack(b"prompt\nx\n"))
    with pytest.raises(InputError, match=f"is compressed, but its name does not end in {suffix}"):
        prompts(tmp_path / "n.csv")


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("told", [False, True])
def test_separators_of_excel(tmp_path, monkeypatch, separator, encoding, told):
    monkeypatch.setattr(text_files, "PIECE_ROWS", 1)
    text = FRAME.to_csv(index=False, sep=separator, lineterminator="\r\n")
    text = f"sep={separator}\r\n{text}" if told else text
    (tmp_path / "m.csv").write_bytes(text.encode(encoding))
    rows, _ = planned(tmp_path / "m.csv", "generate")
    assert [row["prompt"].replace("\r", "") for row in rows] == PROMPTS
    assert rows[0]["seed"] == 1 and [row["tag"] for row in rows] == ["x", "y"]


def test_a_header_with_a_comma_is_separated_by_commas(tmp_path):
    (tmp_path / "m.csv").write_text('prompt,a;b\n"x, y",1;2\n')
    rows, _ = planned(tmp_path / "m.csv", "generate")
    assert [(row["prompt"], row["a;b"]) for row in rows] == [("x, y", "1;2")]
    # One column needs no separator, and its values may have any.
    (tmp_path / "m.csv").write_text("prompt\na;b\nc\td\n")
    assert prompts(tmp_path / "m.csv") == ["a;b", "c\td"]


def test_the_unicode_text_of_excel_is_a_table_and_other_text_is_prompts(tmp_path):
    (tmp_path / "m.txt").write_bytes("Prompt\ttag\r\na cat\tx\r\n".encode("utf-16"))
    rows, _ = planned(tmp_path / "m.txt", "generate")
    assert [(row["prompt"], row["tag"]) for row in rows] == [("a cat", "x")]
    (tmp_path / "n.txt").write_text("a\tprompt with tabs\nprompt\n")
    assert prompts(tmp_path / "n.txt") == ["a\tprompt with tabs", "prompt"]


def test_a_list_of_pictures_that_find_writes(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "a b.png")
    (tmp_path / "list.txt").write_text("photos/a b.png\r\n\n/none.png\n")
    for task, options in (("understand", {}), ("edit", {"prompt": "x"})):
        rows, _ = planned(tmp_path / "list.txt", task, **options)
        assert [row["source"]["uri"] for row in rows] == [str(tmp_path / "photos" / "a b.png"), "/none.png"]
        assert [row["id"] for row in rows] == ["list.txt:0", "list.txt:1"]


def test_questions_in_other_columns_are_named(tmp_path):
    for column, told in (("text", True), ("conversations", True), ("note", False), ("question", False)):
        (tmp_path / "m.jsonl").write_text(json.dumps({"image": "a.png", column: "what is it?"}) + "\n")
        (row,), warnings = planned(tmp_path / "m.jsonl", "understand")
        assert (f"Column '{column}' may hold questions" in " ".join(warnings)) == told
        assert (row["prompt"] == "what is it?") == (column == "question")
        (row,), warnings = planned(tmp_path / "m.jsonl", "understand", prompt="who?")
        assert row["prompt"] == "who?" and not warnings


SPARK_CSV = (
    b'prompt,language,seed\na cat,zh,1\n"he said \\"hi\\"\nthere",en,2\n"x,y",en,""\n"\\"quoted\\"",en,\n'
    b'a \\n backslash,en,3\n"broken" quotes,en,4\nlast,en,5\n'
)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
def test_quotes_as_spark_writes_them(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(text_files, "PIECE_ROWS", 2)
    suffix = {bytes: "", gzip.compress: ".gz", bz2.compress: ".bz2"}[pack]
    (tmp_path / f"part-00000-5c.c000.csv{suffix}").write_bytes(pack(SPARK_CSV))
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "._SUCCESS.crc").touch()
    rows, _ = planned(tmp_path, "generate")
    assert [row["prompt"] for row in rows] == [
        "a cat",
        'he said "hi"\nthere',
        "x,y",
        '"quoted"',
        "a \\n backslash",
        None,
        "last",
    ]
    assert [row["seed"] for row in rows[::6]] == [1, 5] and rows[1]["seed"] == 2
    assert "is not valid CSV" in rows[5]["error_message"]


def test_the_text_of_spark_is_a_prompt_a_line(tmp_path):
    for part in range(2):
        (tmp_path / f"part-0000{part}-5c-c000.txt").write_text(f"{part} a\n{part} b\n")
    (tmp_path / "_SUCCESS").touch()
    assert prompts(tmp_path) == ["0 a", "0 b", "1 a", "1 b"]
    # Other texts of a folder are a prompt each.
    (tmp_path / "other.txt").write_text("c\n")
    assert prompts(tmp_path) == ["c", "0 a\n0 b", "1 a\n1 b"]


@pytest.mark.parametrize("orient", ["columns", "index", "split", "table", "values"])
@pytest.mark.parametrize("name", ["m.json", "m.jsonl"])
def test_a_table_in_one_json_object_is_named_with_a_remedy(tmp_path, orient, name):
    FRAME.to_json(tmp_path / name, orient=orient)
    remedy = r"write it so, in pandas by to_json\(PATH, orient='records', lines=True\)"
    with pytest.raises(InputError, match="write an object a row" if orient == "values" else remedy):
        prompts(tmp_path / name)


@pytest.mark.parametrize(
    "text", ['["a cat", "a dog"]', '"a cat"\n"a dog"\n', "[1, 2]", '{"data": [{"prompt": "x"}]}']
)
def test_json_without_rows_is_named_with_a_remedy(tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    words = r"m\.json (is one object that holds a table \(data\)|holds texts|is a JSON array of values)"
    with pytest.raises(InputError, match=words):
        prompts(tmp_path / "m.json")


def test_json_of_polars_duckdb_and_pandas(tmp_path):
    pl.from_pandas(FRAME).write_json(tmp_path / "polars.json")
    pl.from_pandas(FRAME).write_ndjson(tmp_path / "polars.ndjson")
    FRAME.to_json(tmp_path / "pandas.json", orient="records", indent=2)
    FRAME.head(1).to_json(tmp_path / "one.json", orient="records", lines=True)
    frame = FRAME  # noqa: F841 - DuckDB finds it by its name
    duckdb.sql(f"copy frame to '{tmp_path}/duck.json'")
    duckdb.sql(f"copy frame to '{tmp_path}/array.json' (array true)")
    for name in ("polars.json", "polars.ndjson", "pandas.json", "duck.json", "array.json"):
        assert prompts(tmp_path / name) == PROMPTS, name
    assert prompts(tmp_path / "one.json") == PROMPTS[:1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m.xlsx", "save the sheet as CSV in UTF-8"),
        ("m.feather", "write its rows as Parquet"),
        ("m.orc", "write its rows as Parquet"),
        ("m.csv.zip", "unpack it, and give the folder"),
        ("m.tar", "unpack it, and give the folder"),
        ("m.rtf", "convert it"),
    ],
)
def test_other_files_are_named_with_a_remedy(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=words):
        discover(str(tmp_path / name))
    if name != "m.rtf":
        with pytest.raises(InputError, match=words):
            discover(str(tmp_path))


def test_a_folder_of_save_to_disk_is_named_with_a_remedy(tmp_path):
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({"prompt": ["x"]})
    split.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=split).save_to_disk(tmp_path / "several")
    for name in ("one", "several"):
        with pytest.raises(InputError, match="load it by load_from_disk, and write each split by to_parquet"):
            discover(str(tmp_path / name))


def test_the_tars_of_img2dataset_are_named_with_a_remedy(tmp_path):
    """As img2dataset writes them: a tar, a table without pictures, and counts."""
    pixels = io.BytesIO()
    Image.new("RGB", (8, 8)).save(pixels, "JPEG")
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        member = tarfile.TarInfo("000000000.jpg")
        member.size = len(pixels.getvalue())
        tar.addfile(member, io.BytesIO(pixels.getvalue()))
    pd.DataFrame({"caption": ["a cat"], "url": ["u"], "key": ["000000000"]}).to_parquet(
        tmp_path / "00000.parquet"
    )
    (tmp_path / "00000_stats.json").write_text(json.dumps({"count": 1}))
    for task in ("edit", "understand"):
        with pytest.raises(InputError, match=r"images in tar files, such as '00000\.tar', .* unpack them"):
            discover(str(tmp_path), task)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    assert [row["id"] for row in planned(tmp_path / "unpacked", "understand")[0]] == ["000000000.jpg"]


@pytest.mark.parametrize("suffix", [".csv", ".txt", ".jsonl"])
def test_a_long_window_of_zstd_is_named(tmp_path, suffix):
    # A frame whose window is 2 GiB, as `zstd --long=31` writes it, with one block that is not compressed.
    text = b"prompt\nx\n"
    frame = (
        b"\x28\xb5\x2f\xfd\x00" + bytes([(31 - 10) << 3]) + (len(text) << 3 | 1).to_bytes(3, "little") + text
    )
    (tmp_path / f"m{suffix}.zst").write_bytes(frame)
    with pytest.raises(InputError, match=r"longer window than is read \(128 MiB\): compress it again"):
        prompts(tmp_path / f"m{suffix}.zst")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize("name", ["m.parquet", "m.csv", "m.tsv", "m.jsonl", "m.json", "m.txt"])
def test_a_table_that_is_not_downloaded_or_a_page_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(InputError, match=rf"{name} is a pointer of Git LFS, .* `git lfs pull`"):
        prompts(tmp_path / name)
    (tmp_path / name).write_bytes(b"\n<!DOCTYPE html>\n<html><body>Not found</body></html>\n")
    words = "is not a readable parquet file" if name == "m.parquet" else "holds HTML"
    with pytest.raises(InputError, match=words):
        prompts(tmp_path / name)


def test_a_prompt_or_caption_that_is_not_downloaded_is_an_error_row(tmp_path):
    (tmp_path / "a.txt").write_bytes(POINTER)
    (tmp_path / "b.txt").write_bytes(b"a cat")
    rows, _ = planned(tmp_path, "generate")
    assert [row["status"] for row in rows] == ["error", "planned"]
    assert "is a pointer of Git LFS" in rows[0]["error_message"]


def test_pages_of_duckdb_v2_and_of_spark_v2(tmp_path, monkeypatch):
    """Text as lengths or as differences, which Arrow does not read as a dictionary."""
    rows = [{"prompt": f"a cat, number {n}", "tags": [f"t{n}"], "seed": n} for n in range(200)]
    pl.DataFrame(rows).write_ndjson(tmp_path / "rows.jsonl")
    duckdb.sql(
        f"COPY (FROM '{tmp_path}/rows.jsonl') TO '{tmp_path}/a.parquet' (FORMAT parquet, PARQUET_VERSION v2)"
    )
    table = pa.Table.from_pylist(rows)
    assert set(pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(0).encodings) == {
        "DELTA_LENGTH_BYTE_ARRAY"
    }
    differences = {"column_encoding": {"prompt": "DELTA_BYTE_ARRAY"}, "data_page_version": "2.0"}
    # Spark begins with a dictionary and goes on with differences.
    for name, options in (("b", {}), ("c", {"row_group_size": 70})):
        pq.write_table(table, tmp_path / f"{name}.parquet", use_dictionary=["seed"], **options, **differences)
    for name in "abc":
        assert prompts(tmp_path / f"{name}.parquet") == [row["prompt"] for row in rows]
    (tmp_path / "rows.jsonl").unlink()
    assert prompts(tmp_path) == [row["prompt"] for row in rows] * 3
    monkeypatch.setattr(parquet_files, "BATCH_ROWS", 70)
    found, _ = planned(tmp_path / "b.parquet", "generate")
    assert [row["tags"] for row in found] == [row["tags"] for row in rows]


def test_differences_that_repeat_a_long_text_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_files, "REPEATED_BYTES", 1 << 20)
    text = "".join(map(chr, range(33, 127))) * 100
    pq.write_table(
        pa.table({"prompt": [text] * 4000}),
        tmp_path / "m.parquet",
        use_dictionary=False,
        column_encoding={"prompt": "DELTA_BYTE_ARRAY"},
    )
    with pytest.raises(
        InputError, match=r"Column 'prompt' of .*m\.parquet has \d+ MiB in \d+ rows from row 0"
    ):
        prompts(tmp_path)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_line_ends_that_windows_and_old_excel_write(tmp_path, monkeypatch, pack):
    """CRCRLF comes from Python's csv on Windows; Excel for Mac ends rows by CR, and lines in cells by LF."""
    monkeypatch.setattr(streams, "CHUNK_BYTES", 7)
    name = "m.csv" if pack is bytes else "m.csv.gz"
    (tmp_path / name).write_bytes(pack(b'prompt,x\r\r\n"a\r\nb",1\r\r\nc,2\r\r\n'))
    assert prompts(tmp_path) == ["a\r\nb", "c"]
    (tmp_path / name).write_bytes(pack(b'prompt,x\ra,1\r"q\nr",2\rb,3\r'))
    assert prompts(tmp_path) == ["a", "q\nr", "b"]
    (tmp_path / name).write_bytes(pack(b'prompt,"x\ry"\n"a\rb",1\n'))
    assert prompts(tmp_path) == ["a\rb"]


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "a, {b}"},\n{"prompt": "c"},\n',
        '{"prompt": "a, {b}"}{"prompt": "c"}',
        '{"prompt": "a, {b}"} {"prompt":\n "c"}',
    ],
)
def test_objects_with_commas_or_on_one_line(tmp_path, text):
    (tmp_path / "m.jsonl").write_text(text)
    assert prompts(tmp_path) == ["a, {b}", "c"]
    # Anything else behind an object is a fault of its row alone.
    (tmp_path / "m.jsonl").write_text('{"prompt": "a"} x\n{"prompt": "c"}\n')
    rows, _ = planned(tmp_path, "generate")
    assert [row["status"] for row in rows] == ["error", "planned"]


def test_texts_whose_names_differ_in_case_and_compressed_ones(tmp_path):
    for name in ("a.txt", "a.TXT", "b.Txt"):
        (tmp_path / name).write_text(f"prompt {name}")
    rows, _ = planned(tmp_path, "generate")
    assert {row["id"]: row["prompt"] for row in rows} == {
        "a.txt": "prompt a.txt",
        "a.TXT": "prompt a.TXT",
        "b": "prompt b.Txt",
    }
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"x"))
    assert discover(str(tmp_path)).passed_over == {".gz": (1, "c.txt.gz")}
    for name in ("a.txt", "a.TXT", "b.Txt"):
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match=r"only such as 'c\.txt\.gz': give that file itself"):
        discover(str(tmp_path))
