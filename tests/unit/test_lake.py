"""Tables of Delta Lake, Iceberg and Hudi: their live rows alone, or one sentence."""

import datetime
import io
import json
import re
import shutil
import sys
import uuid
from types import SimpleNamespace

import deltalake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog.memory import InMemoryCatalog
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.transforms import IdentityTransform
from pyiceberg.types import NestedField, StringType

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.manifests import lake
from wallaroo.workflows.manifests.discover import discover
from wallaroo.workflows.manifests.listing import skipped_in_words
from wallaroo.workflows.manifests.read import read, scan
from wallaroo.workflows.manifests.schema import Columns
from wallaroo.workflows.storage.clients import s3_client


def load(path):
    manifest = discover(str(path))
    columns, scans, rows = Columns(), [scan(file) for file in manifest.files], []
    for number, (file, seen) in enumerate(zip(manifest.files, scans, strict=True)):
        columns.add(number, file.path, seen)
    schema = columns.schema()
    for seen in scans:
        for piece in seen.pieces:
            rows += [row for batch in read(piece, schema) for row in batch.table.to_pylist()]
    return schema, sorted(rows, key=lambda row: row["prompt"])


def prompts(*words, **columns):
    return pa.table({"prompt": list(words), **columns})


# Delta Lake


def test_the_live_rows_of_a_delta_table(tmp_path):
    path = tmp_path / "t"
    deltalake.write_deltalake(path, prompts("a", "b", n=[1, 2]))
    deltalake.write_deltalake(path, prompts("c", n=[3]), mode="append")
    deltalake.DeltaTable(path).delete("prompt = 'a'")
    assert load(path)[1] == [{"prompt": "b", "n": 2}, {"prompt": "c", "n": 3}]
    manifest = discover(str(path))
    assert len(manifest.files) == 2 and manifest.passed_over["that the table no longer has"][0] == 1
    assert "that the table no longer has" in skipped_in_words(manifest.passed_over)
    deltalake.write_deltalake(path, prompts("d", n=[4]), mode="overwrite")
    assert load(path)[1] == [{"prompt": "d", "n": 4}]
    assert discover(str(path)).identity() != manifest.identity()
    # A copy is the same manifest.
    shutil.copytree(path, tmp_path / "copy")
    assert discover(str(tmp_path / "copy")).identity() == discover(str(path)).identity()


def test_a_delta_table_with_checkpoints_compacted_files_and_new_columns(tmp_path):
    path = tmp_path / "t"
    for number in range(12):
        deltalake.write_deltalake(path, prompts(f"{number:02}"), mode="append")
    table = deltalake.DeltaTable(path)
    table.create_checkpoint()
    table.optimize.compact()
    words = [f"{number:02}" for number in range(12)]
    assert [row["prompt"] for row in load(path)[1]] == words and len(discover(str(path)).files) == 1
    table.vacuum(0, dry_run=False, enforce_retention_duration=False)
    assert [row["prompt"] for row in load(path)[1]] == words
    deltalake.write_deltalake(path, prompts("new", cfg=[2.0]), mode="append", schema_mode="merge")
    assert load(path)[1][-1] == {"prompt": "new", "cfg": 2.0} and load(path)[1][0]["cfg"] is None
    deltalake.DeltaTable(path).update(updates={"cfg": "3.0"}, predicate="prompt = '05'")
    assert [row["cfg"] for row in load(path)[1] if row["cfg"]] == [3.0, 2.0]


def test_partitions_of_a_delta_table_keep_their_types(tmp_path):
    days = [datetime.date(2024, 1, 2), datetime.date(2024, 1, 3), None]
    table = prompts("a", "b", "c", n=[1, 2, None], day=days, ok=[True, False, None], s=["x y", "é/=", None])
    deltalake.write_deltalake(tmp_path / "t", table, partition_by=["n", "day", "ok", "s"])
    schema, rows = load(tmp_path / "t")
    assert rows == table.to_pylist()
    assert (schema.field("n").type, schema.field("day").type) == (pa.int64(), pa.date32())
    assert schema.field("ok").type == pa.bool_()


def test_a_delta_table_on_s3(tmp_path, s3):
    deltalake.write_deltalake(tmp_path / "t", prompts("a", "b", n=[1, 2]), partition_by=["n"])
    deltalake.DeltaTable(tmp_path / "t").delete("prompt = 'a'")
    for file in storage.list_files(str(tmp_path / "t")):
        storage.write_atomic(f"{s3}/t/{file.relative}", storage.read_bytes(file.path))
    assert load(f"{s3}/t")[1] == [{"prompt": "b", "n": 2}]
    with pytest.raises(InputError, match=r"may be stale: give the folder s3://.*/t itself"):
        discover(f"{s3}/t/*/*.parquet")


@pytest.mark.parametrize(
    ("configuration", "words"),
    [({"delta.columnMapping.mode": "name"}, "names columns differently"), ({}, "lacks part-")],
)
def test_a_delta_table_that_its_files_do_not_tell_is_refused(tmp_path, configuration, words):
    path = tmp_path / "t"
    deltalake.write_deltalake(path, prompts("a"))
    if configuration:
        log = path / "_delta_log" / f"{0:020}.json"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for line in lines:
            if "metaData" in line:
                line["metaData"]["configuration"] = configuration
                schema = json.loads(line["metaData"]["schemaString"])
                for number, field in enumerate(schema["fields"], 1):
                    field["metadata"] = {
                        "delta.columnMapping.id": number,
                        "delta.columnMapping.physicalName": field["name"],
                    }
                line["metaData"]["schemaString"] = json.dumps(schema)
            if "protocol" in line:
                line["protocol"] = {"minReaderVersion": 2, "minWriterVersion": 5}
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        next(path.glob("*.parquet")).unlink()
    with pytest.raises(InputError, match=words) as caught:
        discover(str(path))
    assert "\n" not in str(caught.value)


def test_a_broken_log_is_named(tmp_path):
    deltalake.write_deltalake(tmp_path, prompts("a"))
    next((tmp_path / "_delta_log").glob("*.json")).write_text("{")
    with pytest.raises(InputError, match="is a table of Delta Lake that cannot be read"):
        discover(str(tmp_path))


@pytest.mark.parametrize("library", ["deltalake", "pyiceberg"])
def test_without_the_library_the_sentence_says_how_to_get_it(tmp_path, monkeypatch, library):
    kind, log = (
        ("_delta_log/0.json", "Delta Lake")
        if library == "deltalake"
        else ("metadata/v1.metadata.json", "Iceberg")
    )
    for name in (kind, "part-0.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    for name in (library, f"{library}.exceptions", f"{library}.table"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=re.escape("pip install 'wallaroo-batch[lake]'")) as caught:
        discover(str(tmp_path))
    assert f"table of {log}" in str(caught.value)


# Iceberg


@pytest.fixture
def catalog(tmp_path):
    made = InMemoryCatalog("test", warehouse=f"file://{tmp_path}/warehouse")
    made.create_namespace("n")
    return made


def test_the_live_rows_of_an_iceberg_table(tmp_path, catalog):
    table = catalog.create_table("n.t", schema=prompts("a").schema)
    table.append(prompts("a", "b"))
    table.append(prompts("c"))
    path = tmp_path / "warehouse" / "n" / "t"
    assert [row["prompt"] for row in load(path)[1]] == ["a", "b", "c"]
    table.delete("prompt == 'a'")
    assert [row["prompt"] for row in load(path)[1]] == ["b", "c"]
    assert discover(str(path)).passed_over["that the table no longer has"][0] == 1
    table.overwrite(prompts("d"))
    assert [row["prompt"] for row in load(path)[1]] == ["d"]


def test_an_iceberg_table_with_partitions_and_a_new_column(tmp_path, catalog):
    schema = Schema(NestedField(1, "prompt", StringType()), NestedField(2, "language", StringType()))
    spec = PartitionSpec(PartitionField(2, 1000, IdentityTransform(), "language"))
    table = catalog.create_table("n.t", schema, partition_spec=spec)
    table.append(prompts("a", "b", language=["en", "zh"]))
    with table.update_schema() as update:
        update.add_column("cfg", StringType())
    table.append(prompts("c", language=["en"], cfg=["2"]))
    path = tmp_path / "warehouse" / "n" / "t"
    assert load(path)[1] == [
        {"prompt": "a", "language": "en", "cfg": None},
        {"prompt": "b", "language": "zh", "cfg": None},
        {"prompt": "c", "language": "en", "cfg": "2"},
    ]


def test_an_iceberg_table_whose_columns_were_renamed_or_moved_is_refused(tmp_path, catalog):
    table = catalog.create_table("n.t", schema=prompts("a", x=["y"]).schema)
    table.append(prompts("a", x=["y"]))
    path = tmp_path / "warehouse" / "n" / "t"
    (tmp_path / "moved").mkdir()
    shutil.move(path, tmp_path / "moved" / "t")
    with pytest.raises(InputError, match="is a table of Iceberg that cannot be read"):
        discover(str(tmp_path / "moved" / "t"))
    shutil.move(tmp_path / "moved" / "t", path)
    with table.update_schema() as update:
        update.rename_column("x", "z")
    with pytest.raises(InputError, match="has other columns or column names"):
        discover(str(path))


# Others, and tables further down


def test_hudi_is_refused(tmp_path):
    (tmp_path / ".hoodie").mkdir()
    (tmp_path / ".hoodie" / "hoodie.properties").write_text("")
    pq.write_table(prompts("a"), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"is a table of Hudi.*folder of Parquet files"):
        discover(str(tmp_path))


def test_a_table_within_a_manifest_is_refused(tmp_path):
    deltalake.write_deltalake(tmp_path / "in" / "t", prompts("a"))
    with pytest.raises(InputError, match=r"in/t is a table of Delta Lake within the manifest"):
        discover(str(tmp_path))
    for pattern in ("in/t/*.parquet", "in/t/**/*.parquet"):
        with pytest.raises(InputError, match=r"may be stale: give the folder .*in/t itself"):
            discover(f"{tmp_path}/{pattern}")
    with pytest.raises(InputError, match=r"give the folder .*in/t itself"):
        discover(f"{tmp_path}/in/*/*.parquet")


def test_a_part_or_a_subfolder_of_a_table_is_refused(tmp_path, catalog):
    deltalake.write_deltalake(tmp_path / "delta", prompts("a", "b", n=["x", "y"]), partition_by=["n"])
    table = catalog.create_table("n.t", schema=Schema(NestedField(1, "prompt", StringType())))
    table.append(prompts("a"))
    iceberg = table.location().removeprefix("file://")
    (tmp_path / "hudi" / ".hoodie").mkdir(parents=True)
    pq.write_table(prompts("a"), tmp_path / "hudi" / "a.parquet")
    (part,) = (tmp_path / "delta" / "n=x").iterdir()
    for path, kind, folder in (
        (part, "Delta Lake", tmp_path / "delta"),
        (tmp_path / "delta" / "n=x", "Delta Lake", tmp_path / "delta"),
        (f"{iceberg}/data", "Iceberg", iceberg),
        (f"{iceberg}/data/*.parquet", "Iceberg", iceberg),
        (tmp_path / "hudi" / "a.parquet", "Hudi", tmp_path / "hudi"),
    ):
        with pytest.raises(
            InputError, match=rf"of a table of {kind}, some .* give the folder {folder} itself"
        ):
            discover(str(path))
    # Beside a table, and what is no part of one.
    pq.write_table(prompts("a"), tmp_path / "a.parquet")
    (tmp_path / "delta" / "own.jsonl").write_text('{"prompt": "a"}')
    for path in (tmp_path / "a.parquet", tmp_path / "delta" / "own.jsonl"):
        assert len(discover(str(path)).files) == 1


def test_a_part_or_a_subfolder_of_a_table_on_s3_is_refused(tmp_path, catalog, s3):
    deltalake.write_deltalake(tmp_path / "delta", prompts("a", "b", n=["x", "y"]), partition_by=["n"])
    deltalake.write_deltalake(tmp_path / "flat", prompts("a"))
    table = catalog.create_table("n.t", schema=Schema(NestedField(1, "prompt", StringType())))
    table.append(prompts("a"))
    places = {
        table.location().removeprefix("file://"): "ice",
        tmp_path / "delta": "delta",
        tmp_path / "flat": "flat",
    }
    for place, name in places.items():
        for file in storage.list_files(str(place)):
            storage.write_atomic(f"{s3}/{name}/{file.relative}", storage.read_bytes(file.path))
    part, flat, ice = (
        next(file.path for file in storage.list_files(f"{s3}/{name}") if file.path.endswith(".parquet"))
        for name in ("delta/n=x", "flat", "ice/data")
    )
    for path, kind, folder in (
        (part, "Delta Lake", "delta"),
        (f"{s3}/delta/n=x", "Delta Lake", "delta"),
        (f"{s3}/delta/n=*/*.parquet", "Delta Lake", "delta"),
        (flat, "Delta Lake", "flat"),
        (f"{s3}/flat/*.parquet", "Delta Lake", "flat"),
        (f"{s3}/ice/data", "Iceberg", "ice"),
        (f"{s3}/ice/data/*", "Iceberg", "ice"),
        (ice, "Iceberg", "ice"),
    ):
        with pytest.raises(
            InputError, match=rf"of a table of {kind}, some .* give the folder {s3}/{folder} it"
        ):
            discover(path)
    # Other files in such places.
    for name in (
        "own/data/a.parquet",
        "own/n=x/a.parquet",
        "own/part-00000-5a58ba2e-85b0-4810-b7f3-339286306ed5.pq",
    ):
        storage.write_atomic(f"{s3}/{name}", storage.read_bytes(flat))
        assert len(discover(f"{s3}/{name}").files) == 1
    assert len(discover(f"{s3}/own").files) == 3


@pytest.mark.parametrize("name", ["a.parquet", "data/a.parquet", "data/b/a.parquet"])
def test_metadata_that_is_not_of_iceberg_harms_no_file(tmp_path, name):
    part = tmp_path / "x" / name
    part.parent.mkdir(parents=True)
    pq.write_table(prompts("a"), part)
    metadata = tmp_path / "x" / "metadata"
    manifests = {part, part.parent, part.parent / "*.parquet", tmp_path / "x", tmp_path}

    def readable():
        return all(len(discover(str(one)).files) == 1 for one in manifests)

    metadata.write_text("a file of this name")
    assert readable()
    metadata.unlink()
    # Files beside pictures, and a log further down than a table has it.
    for one in ("photo.metadata.json", "sub/photo.metadata.json", "v1.json", "1-2.metadata.json"):
        (metadata / one).parent.mkdir(parents=True, exist_ok=True)
        (metadata / one).write_text("{}")
    assert readable()
    (metadata / "sub" / "v1.metadata.json").write_text("{}")
    assert readable()
    # A folder that cannot be listed, also for root.
    shutil.rmtree(metadata)
    metadata.symlink_to("metadata")
    assert readable()


@pytest.mark.parametrize(
    "name", ["v12", "v1.gz", f"00001-{uuid.UUID(int=7)}", f"123456-{uuid.UUID(int=7)}.gz"]
)
def test_parts_of_iceberg_are_told_by_the_names_of_its_metadata(tmp_path, name):
    part = tmp_path / "data" / "0101" / "n=1" / "a.parquet"
    part.parent.mkdir(parents=True)
    pq.write_table(prompts("a"), part)
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / f"{name}.metadata.json").write_text("{}")
    for path in (part, part.parent, tmp_path / "data", f"{tmp_path}/data/**/*.parquet"):
        with pytest.raises(InputError, match=rf"of a table of Iceberg, .* the folder {tmp_path} itself"):
            discover(str(path))
    with pytest.raises(InputError, match="is a table of Iceberg that cannot be read"):
        discover(str(tmp_path))


def test_a_part_of_a_table_is_refused_by_its_name_alone_and_through_a_link(tmp_path, monkeypatch):
    deltalake.write_deltalake(tmp_path / "t", prompts("a", "b", n=["x", "y"]), partition_by=["n"])
    deltalake.write_deltalake(tmp_path / "t", prompts("c", n=["x"]), mode="overwrite", partition_by=["n"])
    (tmp_path / "link").symlink_to(tmp_path / "t" / "n=x")
    monkeypatch.chdir(tmp_path / "t" / "n=x")
    part, *_ = [file.name for file in (tmp_path / "t" / "n=x").iterdir()]
    for path in (
        part,
        f"./{part}",
        "*.parquet",
        ".",
        f"{tmp_path}/link/{part}",
        f"{tmp_path}/link/*.parquet",
    ):
        with pytest.raises(InputError, match=rf"stale: give the folder {tmp_path}/t itself"):
            discover(path)


def put_part(path):
    """Writes a Parquet file of one prompt to storage; returns its path."""
    file = io.BytesIO()
    pq.write_table(prompts("a"), file)
    storage.write_atomic(path, file.getvalue())
    return path


def test_metadata_on_s3_that_is_not_of_iceberg_harms_no_file(s3):
    part = put_part(f"{s3}/set/data/sub/a.parquet")
    names = ["photo.metadata.json", "sub/v1.metadata.json", "video.metadata.json", "v1/v1.metadata.json"]
    for name in names:
        storage.write_atomic(f"{s3}/set/metadata/{name}", b"{}")
    for path in (part, f"{s3}/set", f"{s3}/set/data", f"{s3}/set/data/*/*.parquet", f"{s3}/set/data/sub"):
        assert len(discover(path).files) == 1
    storage.write_atomic(f"{s3}/set/metadata/v2.metadata.json", b"{}")
    for path in (part, f"{s3}/set/data", f"{s3}/set/data/*/*.parquet", f"{s3}/set/data/sub"):
        with pytest.raises(InputError, match=rf"of a table of Iceberg, .* the folder {s3}/set itself"):
            discover(path)


def test_what_a_check_of_a_part_on_s3_requests(s3):
    part = put_part(f"{s3}/set/data/a.parquet")
    asked, answers = [], []

    def listed(params, **_):
        asked.append((params["query_string"]["prefix"], params["query_string"].get("delimiter")))
        return answers.pop() if answers else None

    client = s3_client()
    client.meta.events.register("before-call.s3.ListObjectsV2", listed)
    found = [storage.info(part)]
    lake.refuse_parts(part, found)
    assert asked == [("set/metadata/", "/"), ("set/metadata/v", "/")]
    # Of a folder that is listed anyway, nothing more is.
    asked.clear()
    lake.refuse_parts(f"{s3}/set", found)
    assert asked == []
    # Who may read but not list has a manifest all the same.
    denied = {"Error": {"Code": "AccessDenied", "Message": "no"}}
    answers.append((SimpleNamespace(status_code=403), denied))
    assert len(discover(part).files) == 1 and not answers
    # A bucket of this name is no folder.
    assert not list(lake._suspects_on_s3("s3://data/a.parquet", "s3://data/a.parquet"))


def test_logs_are_told_by_their_paths():
    names = [
        "_delta_log/00.json",
        "a/_delta_log/_commits/x",
        f"metadata/00001-{uuid.uuid4()}.metadata.json",
        ".hoodie/x",
    ]
    found = [next(kind for kind, log in lake._LOGS.items() if log.fullmatch(name)) for name in names]
    assert found == ["Delta Lake", "Delta Lake", "Iceberg", "Hudi"]
    assert not lake._LOGS["Iceberg"].fullmatch("metadata/photo.metadata.json")
    for name in ("metadata.jsonl", "metadata/x.json", "my_delta_log/x", "a.hoodie/x", "_delta_log"):
        assert not any(log.fullmatch(name) for log in lake._LOGS.values())
