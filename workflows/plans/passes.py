"""A pass of planning: a function of every item of a manifest, in Ray tasks."""

import functools
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage

MAX_BLOCKS = 256
"""Most Ray tasks of one pass."""
Item = TypeVar("Item")
Answer = TypeVar("Answer")


def each(
    items: Mapping[int, Item], task: Callable[..., Answer], **constants: Any
) -> Iterator[tuple[int, Answer]]:
    """Runs `task(item, **constants)` for every item, in Ray tasks.

    Args:
        items: Index -> item.
        task: Function of an item.
        **constants: Further arguments, the same for all items.

    Yields:
        Index of an item and the answer of its task, in any order.

    Raises:
        InputError: A task raised it. It travels as a value, so that its sentence arrives unchanged.
    """
    import ray.data

    # As columns, all values would get one Arrow type, and each dict the keys of all others.
    rows = [{"index": index, "item": pickle.dumps(item)} for index, item in items.items()]
    answer = functools.partial(_answer, task=task, constants=constants)
    blocks = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS))
    for row in blocks.map(answer, num_cpus=1).iter_rows():
        storage.count_retries(row["retries"])
        if row["fault"]:
            raise InputError(row["fault"])
        yield row["index"], pickle.loads(row["answer"])


def _answer(row: dict[str, Any], task: Callable[..., Any], constants: dict[str, Any]) -> dict[str, Any]:
    storage.enable_retries()
    found, fault = None, ""
    try:
        found = task(pickle.loads(row["item"]), **constants)
    except InputError as error:
        fault = str(error)
    return {
        "index": row["index"],
        "answer": pickle.dumps(found),
        "fault": fault,
        "retries": storage.take_retries(),
    }


def pack_bits(bits: np.ndarray) -> bytes:
    """Packs bool [n] into bytes, 8 values a byte."""
    return np.packbits(bits).tobytes()


def unpack_bits(data: bytes, count: int) -> np.ndarray:
    """Reverses `pack_bits`.

    Args:
        data: The packed bits.
        count: Number of values.

    Returns:
        bool [count].
    """
    return np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(bool)
