"""Rows to train on: their files and columns, and those in Ray's object store.

Knows nothing of workers and steps.
"""

import bisect
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wallaroo.model.checkpoint import load_config, load_tokenizer
from wallaroo.model.config import ModelConfig
from wallaroo.model.errors import InputError
from wallaroo.model.prompts import detect_language
from wallaroo.model.tokenizer import Tokenizer
from wallaroo.model.training.data import Row
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.rows import fits
from wallaroo.model.training.start import stage_config
from wallaroo.workflows import storage
from wallaroo.workflows.cluster import reason
from wallaroo.workflows.plans.dataset import blocks_in_order
from wallaroo.workflows.storage.checkpoints import fetch_folder

COLUMNS = {
    "generate": ("prompt", "picture"),
    "edit": ("prompt", "image", "picture"),
    "understand": ("prompt", "image", "answer"),
}
"""Task -> columns that its rows need; `language` is detected from the prompt where it is absent."""

PICTURES = ("picture", "image")

BLOCK_ROWS = 64
"""Rows of a block in the object store; a worker fetches all of them to read one."""


def find(named: Mapping[str, str], recipe: Recipe) -> dict[str, list[str]]:
    """Finds the Parquet files of each task, and checks their columns.

    Args:
        named: Task -> file, folder or pattern.
        recipe: The stage.

    Returns:
        Task -> its files, in order.

    Raises:
        InputError: A task is unknown, has no file, or a file lacks a column.
    """
    files = {}
    for task, path in named.items():
        if recipe.part == "lm" and task not in COLUMNS:
            raise InputError(f"The recipe has data of '{task}', but tasks are {', '.join(COLUMNS)}.")
        found = [file.path for file in storage.match_files(path)]
        if not found:
            found = [file.path for file in storage.list_files(path) if file.path.endswith(".parquet")]
        if not found:
            raise InputError(
                f"{path} is not a Parquet file, or a folder or pattern of them, to train {task} on."
            )
        for file in found:
            _check_columns(task, file)
        files[task] = found
    return files


def _check_columns(task: str, path: str) -> None:
    filesystem, inner = storage.parquet_filesystem(path)
    try:
        with storage.explained(path):
            names = pq.read_schema(inner, filesystem=filesystem).names
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a Parquet file ({error}).") from None
    missing = [] if _is_output(task, names) else [name for name in COLUMNS.get(task, ()) if name not in names]
    if missing or not any(name in names for name in PICTURES):
        raise InputError(
            f"{path} has no column {' or '.join(missing or PICTURES)}, which rows of {task} need; it has "
            f"{', '.join(names)}."
        )


def _is_output(task: str, names: Sequence[str]) -> bool:
    """Whether a file for `generate` has the columns of an output, whose pictures are in `image`."""
    return task == "generate" and "picture" not in names and {"status", "image", "prompt"} <= {*names}


class Rows(Sequence[Row]):
    """Rows in Ray's object store, by their index.

    Args:
        blocks: References to Arrow tables.
        ends: Number of rows up to the end of each, `(blocks,)`.
    """

    def __init__(self, blocks: Sequence[Any], ends: Sequence[int]):
        self.blocks, self.ends = blocks, ends

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: Any) -> Any:
        import ray

        block = bisect.bisect_right(self.ends, index)
        first = self.ends[block - 1] if block else 0
        return ray.get(self.blocks[block]).slice(index - first, 1).to_pylist()[0]


def read(task: str, paths: Sequence[str], recipe: Recipe) -> Rows:
    """Reads the rows of files that a stage trains on into the object store.

    Args:
        task: Of the rows.
        paths: Parquet files.
        recipe: The stage.

    Returns:
        The rows in the order of their files, each with the columns that the task needs.

    Raises:
        InputError: A column has another type or is empty in a row.
    """
    import ray

    filesystem, _ = storage.parquet_filesystem(paths[0])
    inner = [storage.parquet_filesystem(path)[1] for path in paths]
    dataset = ray.data.read_parquet(inner, filesystem=filesystem).map_batches(
        functools.partial(_fitting, task=task, recipe=recipe), batch_format="pyarrow", batch_size=BLOCK_ROWS
    )
    try:
        blocks, lengths = blocks_in_order(dataset.repartition(target_num_rows_per_block=BLOCK_ROWS))
    except Exception as error:
        raise reason(error) from None
    return Rows(blocks, list(itertools.accumulate(lengths)))


def needed(table: pa.Table, task: str) -> pa.Table:
    """Keeps the columns that a task needs, pictures as their encoded bytes.

    Args:
        table: Rows of a file, `(rows,)`.
        task: Of the rows.

    Returns:
        The same rows, with `language` where they have a prompt.

    Raises:
        InputError: A column has another type or is empty in a row.
    """
    if _is_output(task, table.column_names):
        table = table.rename_columns({"image": "picture"})
    made = {}
    for name in COLUMNS.get(task, [name for name in PICTURES if name in table.column_names]):
        column = table.column(name).combine_chunks()
        if name in PICTURES:
            if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
                # Unlike the child itself, it is null where the struct is.
                column = pc.struct_field(column, "bytes")
            if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
                raise InputError(
                    f"The column {name} is {column.type}, but rows to train on need encoded images: bytes, "
                    f"or a struct that has them."
                )
        if column.null_count:
            raise InputError(f"The column {name} is empty in rows of {task}; leave those rows out.")
        made[name] = column
    if "prompt" in made:
        given = table.column("language").to_pylist() if "language" in table.column_names else []
        prompts = made["prompt"].to_pylist()
        made["language"] = pa.array(
            [one or detect_language(prompt) for one, prompt in itertools.zip_longest(given, prompts)]
        )
        if "prompt_zh" in table.column_names:
            made["prompt_zh"] = table.column("prompt_zh")
    return pa.table(made)


def _fitting(table: pa.Table, task: str, recipe: Recipe) -> pa.Table:
    """`needed`, of the rows that a stage trains on; of an output those that are ok."""
    if _is_output(task, table.column_names):
        table = table.filter((pc.field("status") == "ok") & (pc.field("task") == task))
    found = needed(table, task)
    if recipe.part == "vq":
        return found
    fit = [fitting(row, task, recipe) for row in found.to_pylist()]
    return found.filter(pa.array(fit, pa.bool_()))


def fitting(row: Row, task: str, recipe: Recipe) -> bool:
    """Whether a stage trains on a row, see `model.training.rows.fits`.

    Args:
        row: With the columns that the task needs.
        task: Of the row.
        recipe: The stage; its base is fetched if it is on S3.

    Returns:
        True if it does.
    """
    config, tokenizer = _prompting(str(fetch_folder(recipe.base)))
    return fits(row, task, tokenizer, stage_config(config, recipe), recipe)


@functools.cache
def _prompting(folder: str) -> tuple[ModelConfig, Tokenizer]:
    return load_config(folder), load_tokenizer(folder)
