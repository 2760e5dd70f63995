"""Exports from and to S3, against a real server: the same files as between local folders."""

import io
import json

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from actors.rows import Outcome
from model.errors import InputError
from workflows import results, storage
from workflows.export import export
from workflows.plan import FOLDER, PlanPart, Round
from workflows.plan_rows import plan_schema
from workflows.results import Made, RunConstants, build_result_table, result_schema

ROWS, SHARD_ROWS, SIDE = 48, 16, 256
"""Pictures of noise, of which some dozens are more than one part of a multipart upload."""


def make_output(output):
    """A finished output on S3; returns its rows."""
    fields = {"task": "generate", "save_tokens": False}
    results.put_run(output, fields)
    run = RunConstants("generate", "m" * 64, results.digest(fields))
    carried = pa.schema([("tag", pa.string())])
    shards = range(-(-ROWS // SHARD_ROWS))
    tables = [
        pa.Table.from_pylist(
            [
                {
                    "row_id": number,
                    "shard": shard,
                    "id": f"p/{number // 4}",
                    "version": 0,
                    "sample": number % 4,
                    "status": "planned",
                    "error_type": "",
                    "error_message": "",
                    "prompt": f"prompt {number // 4}",
                    "width": SIDE,
                    "height": SIDE,
                    "language": "en",
                    "seed": number,
                    "cfg": 3.0,
                    "temperature": 1.0,
                    "top_k": 1000,
                    "top_p": 1.0,
                    "tag": "color",
                }
                for number in range(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS)
            ],
            schema=plan_schema(carried),
        )
        for shard in shards
    ]
    name = "part-00000-test.parquet"
    with (
        storage.write_stream(storage.join(output, FOLDER, name)) as stream,
        pq.ParquetWriter(stream, tables[0].schema) as writer,
    ):
        for table in tables:
            writer.write_table(table)
    part = PlanPart(0, name, 0, 0, ROWS, 0, len(shards), SHARD_ROWS, 0, {}, {}, True)
    opening = Round(ROWS, SHARD_ROWS, np.ones(ROWS // 4, bool), {}, "m" * 64, [], carried, [])
    values = vars(part) | {"format": 1, "opening": opening.to_values()}
    storage.write_atomic(storage.join(output, FOLDER, "part-00000.json"), json.dumps(values).encode())
    for shard, table in enumerate(tables):
        outcomes = [
            Outcome(
                row=position,
                pixels=np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8),
                tokens=np.arange(4, dtype=np.int32),
                finish_reason="length",
                prompt_tokens=3,
            )
            for position, seed in enumerate(table.column("seed").to_pylist())
        ]
        built = build_result_table(table, outcomes, run, Made("r", "e", 1), result_schema(carried))
        results.write_shard(output, shard, built)


def rows_of(output):
    found = []
    for shard in sorted(results.list_done(output)):
        with results.open_shard(output, shard) as parquet:
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
    make_output(f"{s3}/out")
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
    streamed = {"files": 1, "openai-batch": 1}.get(form, 0)
    assert again.unchanged == summary.files - streamed
    assert files_of(f"{s3}/dest") == found
    after = modified(f"{s3}/dest")
    kept = [key for key in before if not key.endswith(".jsonl") or form == "geneval"]
    assert [after[key] for key in kept] == [before[key] for key in kept]


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
    path = storage.join(output, "data", results.shard_name(2))
    data = storage.read_bytes(path)
    storage.write_atomic(path, data[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        export(output, f"{s3}/dest", "openai-batch")
    assert files_of(f"{s3}/dest") == {}
    bucket = s3.removeprefix("s3://")
    assert not boto3.client("s3").list_multipart_uploads(Bucket=bucket).get("Uploads")
    storage.write_atomic(path, data)
    assert export(output, f"{s3}/dest", "openai-batch").exported == ROWS


def test_places_that_cannot_be_used_are_told(s3, output):
    with pytest.raises(InputError, match="its bucket does not exist"):
        export(output, "s3://no-such-bucket-at-all/x", "files")
    with pytest.raises(InputError, match="lies in"):
        export(output, f"{output}/data/x", "files")
