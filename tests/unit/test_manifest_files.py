"""Which files are a manifest: names, links, patterns, layouts, and all that is passed over."""

import json
import os
import re
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wallaroo.model.checkpoint import TINY, load_config, load_tokenizer
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.discover import discover
from wallaroo.workflows.manifests.listing import list_pictures, skipped_in_words
from wallaroo.workflows.manifests.read import read, scan
from wallaroo.workflows.manifests.schema import Columns
from wallaroo.workflows.manifests.types import Manifest
from wallaroo.workflows.plans.columns import check_columns
from wallaroo.workflows.plans.rows import plan_rows
from wallaroo.workflows.plans.scanned import ScannedManifest
from wallaroo.workflows.plans.settings import PlanSettings, column_names
from wallaroo.workflows.settings import RunConfig


def files_of(folder, *names, data=b"x"):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def found(path, task="edit", **options):
    return [file.relative for file in discover(str(path), task, **options).files]


def pictures(path):
    """Ids of the rows of a folder of pictures."""
    return [row["id"] for row in rows_of(path, "edit")]


def rows_of(path, task="generate", **options):
    manifest = discover(str(path), task, **options)
    columns, pieces, rows = Columns(), [], []
    for number, file in enumerate(manifest.files):
        seen = scan(file)
        columns.add(number, file.path, seen)
        pieces += seen.pieces
    schema = columns.schema()
    for piece in pieces:
        for batch in read(piece, schema):
            assert not batch.faults
            rows += batch.table.to_pylist()
    return rows


# Names


def test_pictures_of_cameras_are_rows(tmp_path):
    names = ["_DSC0001.JPG", "_MG_0002.JPG", "a/_x.png", "_a/b.jfif", "c.jpe", "d.HEIC"]
    files_of(tmp_path, *names)
    assert pictures(tmp_path) == sorted(names)
    assert discover(str(tmp_path), "edit").passed_over == {}


@pytest.mark.parametrize("name", [b"b\xe9.jsonl", b"d\xe9/a.csv", b"n=\xe9/a.txt.tsv"])
def test_names_of_tables_that_are_not_utf_8_are_named(tmp_path, name):
    files_of(tmp_path, "a.csv", os.fsdecode(name), data=b"prompt\nx\n")
    with pytest.raises(InputError, match=r"^the path .*\\xe9.* is not UTF-8: rename the file or folder\.$"):
        discover(str(tmp_path))
    # Other files may have such names.
    assert found(f"{tmp_path}/a.csv", "generate") == ["a.csv"]
    words = skipped_in_words({".x": (1, os.fsdecode(name))})
    assert words.encode().decode() == words


def test_names_of_texts_and_pictures_that_are_not_utf_8_harm_no_other(tmp_path):
    files_of(tmp_path / "t", "a.txt", os.fsdecode(b"b\xe9.txt"), data=b"a cat")
    assert rows_of(tmp_path / "t") == [{"id": "a", "prompt": "a cat"}, {"id": "b\ufffd", "prompt": "a cat"}]
    files_of(tmp_path / "p", "猫.png", os.fsdecode(b"b\xe9.png"))
    (file,) = discover(str(tmp_path / "p"), "understand").files
    (piece,) = scan(file).pieces
    (batch,) = read(piece, scan(file).schema)
    settings = PlanSettings.of(RunConfig("", "", "understand"))
    tiny = load_config(TINY), load_tokenizer(TINY)
    plan = plan_rows(batch.table, settings, *tiny, origin=file.relative, faults=batch.faults)
    bad, good = plan.to_pylist()
    assert (bad["id"], good["id"], good["status"]) == ("b\ufffd.png", "猫.png", "planned")
    assert bad["error_message"] == "Row 0 of pictures has a name that is not valid UTF-8; rename the file."


def test_only_known_markers_are_hidden(tmp_path):
    parts = ["_part-0.csv", "_a/part-1.csv", "_metadata.csv"]
    files_of(tmp_path, *parts, data=b"prompt\nx\n")
    files_of(
        tmp_path, "_SUCCESS", "_metadata", "_common_metadata", "_temporary/0/p.csv", "_started_12", "a.csv/x"
    )
    files_of(tmp_path, "Thumbs.db", "desktop.ini", "__MACOSX/._a.csv", ".git/config", "sub/.part.csv")
    manifest = discover(str(tmp_path))
    assert [file.relative for file in manifest.files] == sorted(parts)
    assert manifest.passed_over == {
        "marker": (8, "Thumbs.db"),
        "hidden": (2, ".git/config"),
        "without a suffix": (1, "a.csv/x"),
    }


# Links


def test_linked_folders_are_read_once_each(tmp_path):
    disk = files_of(tmp_path / "disk", "2024/a.png", "2024/inner/b.png")
    files_of(tmp_path / "more", "c.png")
    photos = files_of(tmp_path / "photos", "own/d.png")
    (photos / "2024").symlink_to("../disk/2024")
    (photos / "more").symlink_to(tmp_path / "more")
    (photos / "latest").symlink_to("own")
    (photos / "e.png").symlink_to(tmp_path / "more" / "c.png")
    (disk / "2024" / "inner" / "back").symlink_to("..")
    (photos / "up").symlink_to("..")
    (photos / "self").symlink_to(".")
    (photos / "nowhere.png").symlink_to("/none/x.png")
    (photos / "circle").symlink_to("circle")
    manifest = discover(str(photos), "edit")
    wanted = ["2024/a.png", "2024/inner/b.png", "e.png", "more/c.png", "own/d.png"]
    assert pictures(photos) == wanted
    assert all(os.path.isfile(file.path) for file in list_pictures(str(photos)))
    assert {kind: count for kind, (count, _) in manifest.passed_over.items()} == {
        "link that leads back": 2,
        "link to a folder that is read already": 2,
        "link to nowhere": 2,
    }
    # A folder that is a link itself is what it leads to.
    (tmp_path / "here").symlink_to("photos")
    assert pictures(tmp_path / "here") == wanted
    assert pictures(f"{photos}/**/*.png") == wanted


def test_linked_parts_are_rows(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "m"
    for place, word in ((elsewhere, "b"), (folder, "a")):
        place.mkdir()
        pq.write_table(pa.table({"prompt": [word]}), place / "part.parquet")
    (folder / "year").symlink_to(elsewhere)
    assert rows_of(folder) == [{"prompt": "a"}, {"prompt": "b"}]
    assert found(folder, "generate") == ["part.parquet", "year/part.parquet"]


# Everything that is passed over


def test_the_words_account_for_every_file(tmp_path):
    suffixes = ["md", "yaml", "toml", "log", "bak", "tmp", "xlsx", "docx", "pdf", "zip", "tar", "mp4", "wav"]
    suffixes += ["npy", "npz", "pt", "safetensors", "html", "py", "ipynb", "lock"]
    files_of(tmp_path, "m.csv", data=b"prompt\nx\n")
    for number, suffix in enumerate(suffixes):
        files_of(tmp_path, *(f"{suffix}/f{index}.{suffix}" for index in range(1 + number % 3)))
    files_of(tmp_path, "LICENSE", "notes.txt", "config.json", "a.png", ".x/y", "_SUCCESS")
    (tmp_path / "gone").symlink_to("/nowhere")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        manifest = discover(str(tmp_path))
        words = skipped_in_words(manifest.passed_over)
        entries = sum(len(names) for _, _, names in os.walk(tmp_path))
    assert [file.relative for file in manifest.files] == ["m.csv"]
    counts = [
        int(number) for number in re.findall(r"(?:: |, )([0-9,]+) (?=[.a-z])", words.partition("manifest")[2])
    ]
    assert sum(counts) == entries - 1 == int(re.search(r"^(\d+) files? not read", words)[1])
    assert len(counts) == 29 and "\n" not in words
    for kind in (
        *(f".{suffix}" for suffix in suffixes),
        "without a suffix (LICENSE)",
        "link to nowhere (gone)",
    ):
        assert kind in words
    assert "2 pipe, socket or device (such as pipe)" in words
    # That is what a plan says.
    settings = PlanSettings.of(RunConfig("", ""))
    assert ScannedManifest(manifest, settings).warnings == [words]
    assert ScannedManifest(Manifest("", ()), settings).warnings == []


def test_many_kinds_are_counted_together(tmp_path):
    files_of(tmp_path, "m.csv", *(f"a.k{number}" for number in range(40)), "b.k0")
    words = skipped_in_words(discover(str(tmp_path)).passed_over)
    assert words.startswith("41 files not read") and words.endswith("10 of 10 other kinds.")
    assert "2 .k0 (such as a.k0)" in words
    # What may be a lost part of the manifest is always named.
    (tmp_path / "n.csv").symlink_to("/nowhere")
    (tmp_path / "in").symlink_to(".")
    os.mkfifo(tmp_path / "o.csv")
    words = skipped_in_words(discover(str(tmp_path)).passed_over)
    assert words.startswith(
        "44 files not read as a manifest: 1 link that leads back (in), 1 link to nowhere (n.csv), "
        "1 pipe, socket or device (o.csv), 2 .k0 (such as a.k0), 1 .k1 (a.k1), "
    )
    assert words.endswith("13 of 13 other kinds.")


# Patterns


@pytest.mark.parametrize("name", ["[2024] prompts", "what?", "a*b", "[!x]"])
def test_a_folder_that_looks_like_a_pattern_is_a_folder(tmp_path, name):
    folder = files_of(tmp_path / name, "a.csv", "in/b.csv", data=b"prompt\nx\n")
    assert found(folder, "generate") == ["a.csv", "in/b.csv"]
    assert found(folder / "a.csv", "generate") == ["a.csv"]
    assert [os.path.basename(one) for one in found(f"{folder}/*.csv", "generate")] == ["a.csv"]
    assert len(found(f"{folder}/**/*.csv", "generate")) == 2
    files_of(folder, "a.png", "[b].png")
    assert pictures(folder) == ["[b].png", "a.png"]
    assert len(pictures(f"{folder}/*.png")) == 2


def test_patterns_mean_what_they_meant(tmp_path):
    files_of(tmp_path, "a1.csv", "a2.csv", "b1.csv", "in/a1.csv", "in/deep/a3.csv", ".h.csv", ".in/a1.csv")
    for pattern, wanted in (
        ("a?.csv", ["a1.csv", "a2.csv"]),
        ("[ab]1.csv", ["a1.csv", "b1.csv"]),
        ("*/a1.csv", ["in/a1.csv"]),
        ("**/a*.csv", ["a1.csv", "a2.csv", "in/a1.csv", "in/deep/a3.csv"]),
        ("in/**", ["a1.csv", "deep/a3.csv"]),
        ("**", ["a1.csv", "a2.csv", "b1.csv", "in/a1.csv", "in/deep/a3.csv"]),
        ("**/deep/*.csv", ["in/deep/a3.csv"]),
    ):
        assert found(f"{tmp_path}/{pattern}", "generate") == wanted, pattern


@pytest.mark.parametrize(
    ("pattern", "counts"),
    [
        (
            "*.csv",
            {"link to nowhere": (1, "b.csv"), "folder": (1, "c.csv"), "pipe, socket or device": (1, "d.csv")},
        ),
        ("**/*.csv", {"link to nowhere": (2, "b.csv"), "pipe, socket or device": (1, "d.csv")}),
        ("i?/*", {"link to nowhere": (1, "in/b.csv"), "folder": (1, "in/deep"), ".md": (1, "in/x.md")}),
        ("a.*", {}),
    ],
)
def test_what_a_pattern_names_and_is_no_file_is_counted(tmp_path, pattern, counts):
    files_of(tmp_path, "a.csv", "in/a.csv", "in/x.md", "in/deep/y.md", "x.md", data=b"prompt\nx\n")
    for name in ("b.csv", "in/b.csv"):
        (tmp_path / name).symlink_to("/nowhere")
    (tmp_path / "c.csv").mkdir()
    os.mkfifo(tmp_path / "d.csv")
    assert discover(f"{tmp_path}/{pattern}").passed_over == counts


def test_patterns_on_s3(s3):
    root = f"{s3}/[a]*b"
    for name in ("x.csv", "in/y.csv"):
        storage.write_atomic(f"{root}/{name}", b"prompt\nx\n")
    storage.write_atomic(f"{s3}/plain/x.csv", b"prompt\nx\n")
    assert found(root, "generate") == ["in/y.csv", "x.csv"]
    assert found(f"{root}/x.csv", "generate") == ["x.csv"]
    assert [one.rpartition("/")[2] for one in found(f"{root}/*.csv", "generate")] == ["x.csv"]
    assert found(f"{s3}/pl*/x.csv", "generate") == ["plain/x.csv"]
    assert rows_of(root) == [{"prompt": "x"}] * 2


# Layouts of folders with pictures


def test_the_imagefolder_of_hugging_face(tmp_path):
    for split in ("train", "test"):
        files_of(tmp_path, f"{split}/1.png")
        line = json.dumps({"file_name": "1.png", "prompt": split})
        (tmp_path / split / "metadata.jsonl").write_text(line + "\n")
    (tmp_path / "stats.csv").write_text("file_name,n\nx,1\n")
    manifest = discover(str(tmp_path), "edit")
    assert [file.relative for file in manifest.files] == ["test/metadata.jsonl", "train/metadata.jsonl"]
    assert manifest.passed_over == {".csv that names no images": (1, "stats.csv")}
    # A picture that no row names is no row, which is said.
    files_of(tmp_path, "train/unnamed.png")
    words = "Of the 3 images beside the table, only those that its rows name are read."
    assert discover(str(tmp_path), "edit").notes == (words,)
    assert not discover(str(tmp_path / "train" / "metadata.jsonl"), "edit").notes
    names = column_names(
        pa.schema([("file_name", pa.string()), ("prompt", pa.string())]),
        PlanSettings.of(RunConfig("", "", "edit")),
    )
    assert (names["image"], names["prompt"]) == ("file_name", "prompt")


@pytest.mark.parametrize("name", ["x.jl", "x.tab", "x.psv", "x.jsonlines", "x.ldjson.gz"])
@pytest.mark.parametrize(
    ("part", "task"),
    [("a.jsonl", "generate"), ("a.json", "generate"), ("a.txt", "generate"), ("a.png", "edit")],
)
def test_outputs_of_versions_that_skipped_a_suffix_resume(tmp_path, part, task, name):
    """The files are those that were planned without it, and it is named."""
    files_of(tmp_path, part, data=b'{"prompt": "a", "image": "a.png"}')
    before = discover(str(tmp_path), task)
    files_of(tmp_path, name, data=b'{"prompt": "b", "image": "a.png"}\n')
    manifest = discover(str(tmp_path), task)
    assert manifest.identity() == before.identity()
    assert list(manifest.passed_over.values()) == [(1, name)]
    # Asked for, it is read, and so it is where nothing else is.
    assert found(tmp_path / name) == found(f"{tmp_path}/x*") == [name]
    (tmp_path / part).unlink()
    assert found(tmp_path, task) == [name]


def test_a_pattern_reads_all_suffixes(tmp_path):
    files_of(tmp_path, "a.jsonl", "b.jsonlines", data=b'{"prompt": "a"}\n')
    assert found(f"{tmp_path}/*.jsonl*") == ["a.jsonl", "b.jsonlines"]


@pytest.mark.parametrize("name", ["stray.csv", "stray.tsv", "stray.jsonl", "stray.parquet"])
def test_a_stray_table_among_pictures_is_no_manifest(tmp_path, name):
    files_of(tmp_path, "a.png", "b/c.jpg")
    if name.endswith("parquet"):
        pq.write_table(pa.table({"n": [1]}), tmp_path / name)
    else:
        (tmp_path / name).write_text('{"n": 1}\n' if name.endswith("jsonl") else "n\n1\n")
    manifest = discover(str(tmp_path), "understand")
    assert pictures(tmp_path) == ["a.png", "b/c.jpg"]
    assert name in skipped_in_words(manifest.passed_over)
    # Unless the run says which of its columns has pictures.
    assert found(tmp_path, image_column="n") == [name]
    # One that cannot be read is not thought to be a stray one.
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    if name.endswith("parquet"):
        assert found(tmp_path) == [name]


def test_texts_beside_pictures_are_their_captions(tmp_path):
    files_of(tmp_path, "a.png", "in/b.jpg", "c.webp", "notes.txt")
    (tmp_path / "a.txt").write_text("a cat\n", encoding="utf-8-sig")
    (tmp_path / "in" / "b.txt").write_text("一只狗", encoding="utf-16")
    manifest = discover(str(tmp_path), "edit")
    assert rows_of(tmp_path, "edit") == [
        {"id": "a.png", "image": str(tmp_path / "a.png"), "caption": "a cat"},
        {"id": "c.webp", "image": str(tmp_path / "c.webp"), "caption": None},
        {"id": "in/b.jpg", "image": str(tmp_path / "in/b.jpg"), "caption": "一只狗"},
    ]
    assert manifest.passed_over == {".txt": (1, "notes.txt")}
    settings = PlanSettings.of(RunConfig("", "", "edit"))
    assert ScannedManifest(manifest, settings).warnings[1].endswith("used as its caption: 2, 1 have none.")
    (tmp_path / "a.txt").write_text("a dog\n")
    assert discover(str(tmp_path), "edit").identity() != manifest.identity()
    (tmp_path / "a.txt").write_bytes(b"\xff\xffa")
    (file,) = discover(str(tmp_path), "edit").files
    (piece,) = scan(file).pieces
    (batch,) = read(piece, scan(file).schema)
    assert batch.faults == {0: "has a caption that is not valid UTF-8"}


def test_the_folders_of_img2dataset(tmp_path):
    files_of(tmp_path, "00000/000000001.jpg", "00000/000000002.jpg", "00000_stats.json")
    files_of(tmp_path, "00000/000000001.json", "00000/000000002.json", data=b"{}")
    files_of(tmp_path, "00000/000000001.txt", "00000/000000002.txt", data=b"a cat")
    table = pa.table({"url": ["u"] * 2, "caption": ["a cat"] * 2, "key": ["000000001", "000000002"]})
    pq.write_table(table, tmp_path / "00000.parquet")
    rows = rows_of(tmp_path, "edit")
    assert [(row["id"], row["caption"]) for row in rows] == [
        ("00000/000000001.jpg", "a cat"),
        ("00000/000000002.jpg", "a cat"),
    ]
    words = skipped_in_words(discover(str(tmp_path), "edit").passed_over)
    assert "3 .json" in words and "1 .parquet that names no images (00000.parquet)" in words


@pytest.mark.parametrize("column", ["jpg", "png", "webp"])
def test_the_parquet_of_img2dataset(tmp_path, column):
    path = tmp_path / "00000.parquet"
    table = pa.table({"url": ["u"], "caption": ["a cat"], "key": ["7"], column: [b"picture"]})
    pq.write_table(table, path)
    (row,) = rows_of(path, "edit")
    assert row[column] == f"{path}#{column}#0"
    schema = table.schema
    edit = column_names(schema, PlanSettings.of(RunConfig("", "", "edit")))
    assert (edit["image"], edit["prompt"], edit["id"]) == (column, "caption", "key")
    # A caption is no question, and none is needed where the run gives an instruction.
    assert column_names(schema, PlanSettings.of(RunConfig("", "", "understand")))["prompt"] == "prompt"
    assert column_names(schema, PlanSettings.of(RunConfig("", "", "edit", prompt="x")))["prompt"] == "prompt"
    generate = column_names(schema, PlanSettings.of(RunConfig("", "")))
    assert (generate["prompt"], generate["id"]) == ("caption", "key")
    warnings = check_columns(schema, PlanSettings.of(RunConfig("", "", "edit")))
    assert {re.search("'(.*?)'", words)[1] for words in warnings} == {"caption", "key", column}


# Folders of texts


def test_a_folder_of_texts_is_a_prompt_each(tmp_path):
    for name, text in (("0", "a cat\n"), ("1", "two\nlines"), ("in/2", "  猫 ")):
        files_of(tmp_path, f"{name}.txt", data=text.encode())
    files_of(tmp_path, "LICENSE", "info.md")
    assert rows_of(tmp_path) == [
        {"id": "0", "prompt": "a cat"},
        {"id": "1", "prompt": "two\nlines"},
        {"id": "in/2", "prompt": "猫"},
    ]
    assert discover(str(tmp_path)).passed_over == {"without a suffix": (1, "LICENSE"), ".md": (1, "info.md")}
    assert rows_of(f"{tmp_path}/[01].txt") == rows_of(tmp_path)[:2]
    with pytest.raises(InputError, match="no Parquet, CSV"):
        discover(str(tmp_path), "edit")
    (tmp_path / "m.csv").write_text("prompt\nx\n")
    assert found(tmp_path, "generate") == ["m.csv"]


def test_one_text_of_several_lines_is_ambiguous(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog  \n")
    with pytest.raises(InputError, match=r"one text of several lines.*give .*prompts\.txt itself"):
        discover(str(tmp_path))
    assert rows_of(path) == [{"prompt": "a cat"}, {"prompt": "a dog"}]
    path.write_text("a cat\n")
    assert rows_of(tmp_path) == [{"id": "prompts", "prompt": "a cat"}]


# The hub


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("hf://datasets/org/name/data/train.parquet", "hf download org/name --repo-type dataset --local-dir"),
        ("hf://datasets/org/name@main", "hf download org/name --repo-type dataset --local-dir"),
        ("hf://org/name", "hf download org/name --local-dir"),
        ("hf://spaces/org/name/a.csv", "hf download org/name --repo-type space --local-dir"),
        ("hf://buckets/org/name/a.csv", "is neither read nor written: download it, then give the folder."),
        ("https://huggingface.co/datasets/org/name/resolve/main/a.csv", "org/name --repo-type dataset"),
        ("org/data-set.v1", "hf download org/data-set.v1 --repo-type dataset --local-dir FOLDER"),
    ],
)
def test_data_sets_of_the_hub_are_downloaded_first(tmp_path, monkeypatch, path, command):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(command)) as caught:
        discover(path)
    assert "\n" not in str(caught.value)
    if "://" not in path:
        with pytest.raises(InputError, match=re.escape(command)):
            discover(storage.absolute_path(path))
        # What is there is no name of the hub.
        (tmp_path / "org").mkdir()
        with pytest.raises(InputError, match="there is no such file or folder: give"):
            discover(path)
