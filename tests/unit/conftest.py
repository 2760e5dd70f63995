"""Outputs to read: made in a moment by the functions that a run uses, but for pictures out of a hat."""

import dataclasses
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wallaroo.actors.rows import Outcome
from wallaroo.workflows.outputs import rows as outputs_rows
from wallaroo.workflows.outputs import run_file, shards
from wallaroo.workflows.outputs import schema as outputs_schema
from wallaroo.workflows.outputs import values as outputs_values
from wallaroo.workflows.outputs.rows import Producer, RunConstants, build_result_table
from wallaroo.workflows.outputs.schema import result_schema
from wallaroo.workflows.plans.columns import GIVEN
from wallaroo.workflows.plans.plan import PlanPart, Round, read_plan

STARTED = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
FIELDS = {"task": "generate", "seed": 0, "sampling": {"cfg": 3.0}, "save_tokens": False}
RUN = RunConstants(task="generate", model_digest="m" * 64, config_digest=outputs_values.digest(FIELDS))
CARRIED = pa.schema(
    [("tag", pa.string()), ("weight", pa.float32()), ("when", pa.timestamp("s")), ("include", pa.string())],
    metadata={b"wallaroo.json": b'["include"]', b"pandas": b"{}"},
)


def plan_table(rows=6, first_row=0, shard=0, errors=()):
    """A shard of a plan, two samples an id; `errors` are positions of rows that the plan refused."""
    values = [
        {
            "row_id": first_row + i,
            "shard": shard,
            "id": f"p{(first_row + i) // 2}",
            "version": 0,
            "sample": (first_row + i) % 2,
            "status": "error" if i in errors else "planned",
            "error_type": "size" if i in errors else "",
            "error_message": "width is 70" if i in errors else "",
            "prompt": f"a cat, number {first_row + i}",
            "width": 64 if i % 3 else 80,
            "height": 64,
            "language": "en",
            "seed": 1000 + first_row + i,
            "cfg": 3.0,
            "temperature": 1.0,
            "top_k": 1000,
            "top_p": 1.0,
            "tag": f"t{i}",
            "weight": i / 2,
            "when": datetime(2026, 1, 1),
            "include": '[{"class": "cat"}]',
        }
        for i in range(rows)
    ]
    names = [name for name in values[0] if name not in CARRIED.names]
    fields = [field for field in outputs_schema.RESULT_FIELDS if field.name in names]
    return pa.Table.from_pylist(values, schema=pa.schema([*fields, *CARRIED], metadata=CARRIED.metadata))


def picture(seed, height=64, width=64):
    """Noise, uint8 [height, width, 3], the same for the same seed."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def outcomes(plan, failed=()):
    """An outcome of every row that the plan did not refuse; `failed` are positions of error rows."""
    return [
        Outcome(row=i, error_type="engine", error_message="no", started_at=STARTED, seconds=0.5)
        if i in failed
        else Outcome(
            row=i,
            pixels=picture(row["seed"], row["height"], row["width"]),
            tokens=np.arange(20, dtype=np.int32),
            finish_reason="length",
            prompt_tokens=30,
            started_at=STARTED,
            seconds=0.5,
        )
        for i, row in enumerate(plan.to_pylist())
        if row["status"] == "planned"
    ]


def result_table(plan, failed=(), save_tokens=False, run=RUN, made=None):
    """The result rows of a shard of a plan."""
    carried = pa.schema(
        [field for field in plan.schema if field.name not in outputs_schema.RESULT_NAMES | {GIVEN}],
        metadata=plan.schema.metadata,
    )
    schema = result_schema(carried, save_tokens)
    made = made or Producer("replica 1", "e" * 64, 1)
    return build_result_table(plan, outcomes(plan, failed), run, made, schema)


def write_plan(output, tables, complete=True):
    """One part with a shard a table."""
    folder = Path(output, "plan")
    folder.mkdir(parents=True, exist_ok=True)
    part = len(list(folder.glob("*.json")))
    first = tables[0].to_pylist()[0]
    name = f"part-{part:05d}-test.parquet"
    with pq.ParquetWriter(folder / name, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=len(table))
    rows = sum(len(table) for table in tables)
    errors = sum(table.column("status").to_pylist().count("error") for table in tables)
    carried = pq.read_schema(folder / name)
    carried = pa.schema(
        [f for f in carried if f.name not in outputs_schema.RESULT_NAMES | {GIVEN}], metadata=carried.metadata
    )
    written = PlanPart(
        part=part,
        file=name,
        round=part,
        first_row_id=first["row_id"],
        rows=rows,
        first_shard=first["shard"],
        shards=len(tables),
        shard_rows=len(tables[0]),
        error_rows=errors,
        errors={"size": errors} if errors else {},
        sizes={"64x64": rows - errors},
        complete=complete,
    )
    opening = Round(
        rows=rows,
        shard_rows=len(tables[0]),
        selected=np.ones(rows, bool),
        settings={},
        model_digest="m" * 64,
        manifest=[],
        carried=carried,
        warnings=[],
    )
    values = dataclasses.asdict(written) | {"format": 1, "opening": opening.to_values()}
    (folder / f"part-{part:05d}.json").write_text(json.dumps(values))


def make_output(output, tables, failed=None, skip=(), edit=lambda row: row):
    """A whole output but for its end: run.json, a plan of `tables`, the files of all shards not in `skip`.

    failed: shard -> positions of rows that became errors. edit: is given every planned row first.
    """
    output = str(output)
    run_file.put_run(output, FIELDS)
    tables = [pa.Table.from_pylist([edit(row) for row in t.to_pylist()], schema=t.schema) for t in tables]
    write_plan(output, tables)
    for table in tables:
        shard = table.column("shard")[0].as_py()
        if shard not in skip:
            shards.write_shard(output, shard, result_table(table, (failed or {}).get(shard, ())))
    return read_plan(output)


def make_task_output(output, task, rows=6, bad=(), failed=(), samples=2, more=None):
    """A whole output of `edit` or `understand` but for its end, in one shard; its sources lie beside it.

    bad: positions of rows whose source cannot be had; failed: of those that the engine gave up. more:
    row -> values in place of what is planned. An answer says which row it is of, and a score of 0 to 9.
    """
    output = Path(output)
    folder = output.parent / "sources"
    folder.mkdir(exist_ok=True)
    fields = FIELDS | {"task": task}
    run_file.put_run(str(output), fields)
    planned, loaded = [], []
    for row in plan_table(rows).to_pylist():
        number = row["row_id"]
        image = outputs_rows.encode_image(picture(500 + number // samples, 40, 60), "png")[0]
        uri = folder / f"s{number // samples}.png"
        uri.write_bytes(image)
        values = {"id": f"p{number // samples}", "sample": number % samples, "width": None, "height": None}
        row |= values | {"source": {"uri": str(uri), "row_id": None}} | (more(number) if more else {})
        planned.append(row)
        if number in bad:
            words = f"'{uri}' does not exist: correct the path."
            loaded.append(row | {"status": "error", "error_type": "image", "error_message": words})
        else:
            known = {"sha256": hashlib.sha256(image).hexdigest(), "width": 60, "height": 40}
            loaded.append(row | {"source": known | row["source"]})
    schema = plan_table(1).schema.append(pa.field("source", outputs_schema.SOURCE_TYPE))
    given = [
        Outcome(
            row=position,
            error_type="engine" if position in failed else "",
            error_message="no" if position in failed else "",
            pixels=picture(row["seed"], 48, 64) if task == "edit" else None,
            tokens=np.array([row["row_id"], 3 * row["row_id"] % 10], np.int32),
            finish_reason="stop",
            prompt_tokens=30,
            started_at=STARTED,
            seconds=0.5,
        )
        for position, row in enumerate(loaded)
        if row["status"] == "planned"
    ]
    write_plan(output, [pa.Table.from_pylist(planned, schema)])
    table = build_result_table(
        pa.Table.from_pylist(loaded, schema),
        given,
        dataclasses.replace(RUN, task=task, config_digest=outputs_values.digest(fields)),
        Producer("replica 1", "e" * 64, 1),
        result_schema(pa.schema(CARRIED, metadata=CARRIED.metadata)),
        decode=lambda ids: f"Score {ids[1]}/10: row {ids[0]}, ein Känguru 袋鼠",
    )
    shards.write_shard(str(output), 0, table)
    return read_plan(str(output))


@pytest.fixture
def outputs():
    """The functions above."""
    return SimpleNamespace(
        STARTED=STARTED,
        FIELDS=FIELDS,
        RUN=RUN,
        CARRIED=CARRIED,
        plan_table=plan_table,
        picture=picture,
        outcomes=outcomes,
        result_table=result_table,
        write_plan=write_plan,
        make_output=make_output,
        make_task_output=make_task_output,
    )


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """A folder that is not there yet, on a disk and on S3."""
    return str(tmp_path / "place") if request.param == "local" else request.getfixturevalue("s3") + "/place"
