"""Data sets of drawn scenes, written as Parquet files and JSON lines."""

import base64
import functools
import io
import json
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wallaroo.model.config import Size
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.scenes.captions import examples
from wallaroo.workflows.scenes.world import KINDS, Example, png


def to_values(example: Example, identity: str) -> dict[str, Any]:
    """A row of the data set's Parquet files, which are manifests of their tasks.

    Args:
        example: The row.
        identity: Its id.

    Returns:
        Name of the column -> value. `picture` is the picture to make; `image` the one to edit or ask about.
    """
    values: dict[str, Any] = {"id": identity, "task": example.task, "prompt": example.prompt}
    values |= {"language": example.language, "kind": example.kind}
    values |= {"named": " ".join(example.named), "scene": example.scene.to_json()}
    if example.task == "generate":
        values |= {"width": example.scene.width, "height": example.scene.height}
    if example.source is not None:
        values["source_scene"] = example.source.to_json()
    if example.task != "generate":
        values["image"] = png(example.source or example.scene)
    if example.task == "understand":
        values["answer"] = example.answer
    else:
        values["picture"] = png(example.scene)
    return values


def to_line(values: dict[str, Any]) -> str:
    """A row as a line of JSON, its pictures in base64, as `python -m wallaroo.model.training` reads it."""
    plain = {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in values.items()}
    return json.dumps(plain, ensure_ascii=False)


_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_COLUMNS = {"image": _IMAGE, "picture": pa.binary(), "width": pa.int32(), "height": pa.int32()}
"""Types of the columns that are no text."""
GROUP_ROWS = 1000


def write(
    output: str,
    rows: int,
    held_out_rows: int,
    seed: int,
    sizes: list[Size],
    lines: bool = False,
    hard: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Writes the data set: for each task `train/TASK.parquet` and `held-out/TASK.parquet`.

    Each file is a manifest of its task. The held-out rows are of combinations that no training row has.

    Args:
        output: The folder, local or `s3://`.
        rows: How many training rows per task.
        held_out_rows: How many held-out rows per task.
        seed: Of the random numbers.
        sizes: Of the pictures, in pixels.
        lines: Also write `train/TASK.jsonl`, which `python -m wallaroo.model.training` reads.
        hard: Draw most training rows from the kinds in HARD; held-out rows stay the same.
        overwrite: Write into a folder that has files already.

    Returns:
        The paths of the files.

    Raises:
        InputError: A number of rows is below 1, or, without `overwrite`, the folder has files.
    """
    if rows < 1 or held_out_rows < 1:
        raise InputError(f"--rows is {rows} and --held-out is {held_out_rows}, but both must be at least 1.")
    found = [] if overwrite else storage.find_files(output, lambda name: True, 1)
    if found:
        raise InputError(
            f"{output} is not empty; it holds {found[0]:.100}: give a new folder, or --overwrite to replace "
            f"files of the same names."
        )
    written = []
    # No more processes than cores; they are spawned, since a fork would copy the locks of threads.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = (("train", rows, False, hard), ("held-out", held_out_rows, True, False))
        for folder, count, held, mostly_hard in parts:
            for task in KINDS:
                make = functools.partial(_group, folder, count, seed, sizes, held, mostly_hard, task)
                path = storage.join(output, folder, f"{task}.parquet")
                with storage.write_stream(path) as stream:
                    text = io.StringIO() if lines and not held else None
                    _write_parquet(stream, pool.map(make, range(0, count, GROUP_ROWS)), text)
                written.append(path)
                if text is not None:
                    written.append(storage.join(output, folder, f"{task}.jsonl"))
                    storage.write_atomic(written[-1], text.getvalue().encode())
    return written


def _group(
    folder: str, rows: int, seed: int, sizes: list[Size], held: bool, hard: bool, task: str, first: int
) -> list[dict[str, Any]]:
    """The rows of one group of a file, which begins with row `first`."""
    last = min(rows, first + GROUP_ROWS)
    numbered = enumerate(examples(last, seed, sizes, held, (task,), first, hard), first)
    return [to_values(example, f"{folder}-{task}-{number}") for number, example in numbered]


def _write_parquet(stream: Any, groups: Iterable[list[dict[str, Any]]], text: io.StringIO | None) -> None:
    writer = None
    for batch in groups:
        if text is not None:
            text.writelines(to_line(row) + "\n" for row in batch)
        if writer is None:
            writer = pq.ParquetWriter(
                stream,
                pa.schema([(name, _COLUMNS.get(name, pa.string())) for name in batch[0]]),
                compression="zstd",
            )
        for row in batch:
            if "image" in row:
                row["image"] = {"bytes": row["image"], "path": None}
        writer.write_table(pa.Table.from_pylist(batch, writer.schema))
    if writer is not None:
        writer.close()
