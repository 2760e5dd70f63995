"""Exports from and to S3, against a real server: the same files as between local folders."""

import dataclasses
import hashlib
import io
import json

import boto3
import c2pa
import pytest
from PIL import Image

from tests.benchmarks.export_memory import write_output
from tests.unit.test_export_signed import write_signer
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.datasets.export import export
from wallaroo.workflows.outputs import layout, shards
from wallaroo.workflows.outputs.xmp import DIGITAL_SOURCE_TYPE, embed, xmp_packet
from wallaroo.workflows.reports.verify import verify
from wallaroo.workflows.runs.driver import run
from wallaroo.workflows.settings import RunConfig

ROWS, SHARD_ROWS, SIDE = 48, 16, 256
"""Pictures of noise, of which some dozens are more than one part of a multipart upload."""


def rows_of(output):
    found = []
    for shard in sorted(layout.list_done(output)):
        with shards.open_shard(output, shard) as parquet:
            found += parquet.read().to_pylist()
    return found


def files_of(folder):
    """Relative path -> bytes of every file below a folder, and relative path -> what a listing says."""
    listed = storage.list_files(folder)
    return {file.relative: storage.read_bytes(file.path) for file in listed}


def modified(folder):
    """Key -> time of its last change, of every object below a folder."""
    bucket, _, prefix = folder.removeprefix("s3://").partition("/")
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    return {one["Key"]: one["LastModified"] for page in pages for one in page.get("Contents", [])}


@pytest.fixture
def output(s3):
    write_output(f"{s3}/out", ROWS, SHARD_ROWS, SIDE)
    return f"{s3}/out"


@pytest.mark.parametrize("form", ["files", "webdataset", "geneval", "dpg", "openai-batch"])
def test_s3_and_local_folders_hold_the_same(s3, output, tmp_path, form):
    summary = export(output, f"{s3}/dest", form, embed_metadata=form == "dpg")
    assert (summary.exported, summary.errors, summary.unchanged) == (ROWS, 0, 0)
    export(output, str(tmp_path / "dest"), form, embed_metadata=form == "dpg")
    found = files_of(f"{s3}/dest")
    assert found == files_of(str(tmp_path / "dest"))
    assert len(found) == summary.files

    before = modified(f"{s3}/dest")
    again = export(output, f"{s3}/dest", form, embed_metadata=form == "dpg")
    assert again.unchanged == summary.files
    assert files_of(f"{s3}/dest") == found
    assert modified(f"{s3}/dest") == before


def test_pictures_are_those_of_the_rows(s3, output):
    export(output, f"{s3}/dest", "files")
    found = files_of(f"{s3}/dest")
    lines = [json.loads(line) for line in found["metadata.jsonl"].splitlines()]
    for row, line in zip(rows_of(output), lines, strict=True):
        assert (line["id"], line["sample"], line["sha256"]) == (row["id"], row["sample"], row["sha256"])
        assert found[line["file_name"]] == row["image"]["bytes"]
        with Image.open(io.BytesIO(found[line["file_name"]])) as image:
            assert image.size == (SIDE, SIDE)


def test_an_export_that_fails_leaves_no_half_object(s3, output):
    """The lines were already more than one part of the upload when it failed."""
    path = storage.join(output, "data", layout.shard_name(2))
    data = storage.read_bytes(path)
    storage.write_atomic(path, data[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        export(output, f"{s3}/dest", "openai-batch")
    assert files_of(f"{s3}/dest") == {}
    bucket = s3.removeprefix("s3://")
    assert not boto3.client("s3").list_multipart_uploads(Bucket=bucket).get("Uploads")
    storage.write_atomic(path, data)
    assert export(output, f"{s3}/dest", "openai-batch").exported == ROWS


def test_a_folder_of_the_output_is_refused(output):
    with pytest.raises(InputError, match="is inside"):
        export(output, f"{output}/data/x", "files")


def test_a_run_embeds_metadata_and_so_does_its_resumed_rest(tmp_path, local_ray):
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "a red circle", "id": "a"}\n{"prompt": "猫", "id": "b"}\n'
    )
    config = RunConfig(
        str(tmp_path / "prompts.jsonl"), str(tmp_path / "out"), embed_metadata=True, device="cpu"
    )
    plain = dataclasses.replace(config, output=str(tmp_path / "plain"), embed_metadata=False)
    run(config)
    run(plain)
    made, without = rows_of(config.output), rows_of(plain.output)
    for row, bare in zip(made, without, strict=True):
        packet = xmp_packet(row["prompt"], str(row["seed"]), row["model_digest"])
        assert DIGITAL_SOURCE_TYPE.encode() in packet
        assert row["image"]["bytes"] == embed(bare["image"]["bytes"], packet)
    with pytest.raises(InputError, match="embed_metadata is true in the output and absent in this run"):
        run(dataclasses.replace(config, embed_metadata=False))
    with pytest.raises(InputError, match="embed_metadata is absent in the output and true in this run"):
        run(dataclasses.replace(plain, embed_metadata=True))
    # As a run leaves it that was stopped before its shard was written.
    for name in (layout.SUCCESS_FILE, f"data/{layout.shard_name(0)}"):
        (tmp_path / "out" / name).unlink()
    run(config)
    again = rows_of(config.output)
    assert [row["sha256"] for row in again] == [row["sha256"] for row in made]
    assert verify(config.output).ok


def test_signed_pictures_on_s3_are_signed_once(s3, output, tmp_path):
    signer = write_signer(tmp_path)
    summary = export(output, f"{s3}/dest", "files", c2pa=signer)
    assert (summary.exported, summary.unchanged) == (ROWS, 0)
    before = modified(f"{s3}/dest")
    again = export(output, f"{s3}/dest", "files", c2pa=signer)
    assert again.unchanged == again.files == ROWS + 1 and modified(f"{s3}/dest") == before
    found = files_of(f"{s3}/dest")
    for line in map(json.loads, found["metadata.jsonl"].splitlines()):
        data = found[line["file_name"]]
        assert hashlib.sha256(data).hexdigest() == line["sha256"]
        with c2pa.Reader("image/png", io.BytesIO(data)) as reader:
            assert reader.get_validation_state() == "Valid"


def test_a_partial_export_on_s3_is_made_whole(s3, output):
    path = storage.join(output, "data", layout.shard_name(1))
    data = storage.read_bytes(path)
    storage.delete(path)
    with pytest.raises(InputError, match="1 of its 3 shards are missing"):
        export(output, f"{s3}/dest", "geneval")
    summary = export(output, f"{s3}/dest", "geneval", partial=True)
    assert (summary.exported, summary.missing_rows, summary.partial) == (ROWS - SHARD_ROWS, SHARD_ROWS, True)
    assert json.loads(files_of(f"{s3}/dest")["_partial.json"])["missing_rows"] == SHARD_ROWS
    first = modified(f"{s3}/dest")
    storage.write_atomic(path, data)
    whole = export(output, f"{s3}/dest", "geneval")
    assert (whole.exported, whole.partial) == (ROWS, False)
    export(output, f"{s3}/other", "geneval")
    assert files_of(f"{s3}/dest") == files_of(f"{s3}/other")
    now = modified(f"{s3}/dest")
    assert {key for key in first if key not in now} == {key for key in first if key.endswith("_partial.json")}
    assert all(now[key] == time for key, time in first.items() if key in now)
