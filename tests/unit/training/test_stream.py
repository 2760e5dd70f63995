"""Streamed rows: each once an epoch, in an order of seed and place alone, a row group at a time."""

import itertools

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.training.stream import Groups, Streamed

ROWS = 8
"""Rows a step."""


def write(folder, sizes=((7, 7, 7), (5, 5, 1), (20,))):
    """Files of row groups of these sizes, with rows numbered through; gives their paths."""
    numbers, paths = itertools.count(), []
    for index, groups in enumerate(sizes):
        out = pa.BufferOutputStream()
        with pq.ParquetWriter(out, pa.schema({"number": pa.int64()})) as file:
            for size in groups:
                file.write_table(pa.table({"number": [next(numbers) for _ in range(size)]}))
        paths.append(f"{folder}/{index}.parquet")
        storage.write_atomic(paths[-1], out.getvalue().to_pybytes())
    return paths


def streamed(paths, fits=lambda row, task: True, rows=ROWS, seed=3, kept=64):
    return Streamed(
        {"generate": Groups.of(paths)}, {"generate": rows}, seed, lambda table, task: table, fits, kept
    )


def step_of(source, step, world=1, accumulate=1):
    """Numbers of the rows of a step, which processes take in pieces."""
    size = ROWS // world // accumulate
    first = step * ROWS
    return [
        row["number"]
        for part in range(world * accumulate)
        for row in source("generate", first + part * size, size)
    ]


def test_each_row_once_an_epoch_and_in_another_order(tmp_path):
    source = streamed(write(tmp_path))
    steps = 52 // ROWS
    epochs = [
        [number for step in range(epoch * steps, (epoch + 1) * steps) for number in step_of(source, step)]
        for epoch in range(3)
    ]
    for numbers in epochs:
        assert len(set(numbers)) == len(numbers) == steps * ROWS and set(numbers) <= set(range(52))
    assert epochs[0] != epochs[1] != epochs[2]
    # Those that are left out differ.
    assert set.intersection(*(set(range(52)) - set(numbers) for numbers in epochs)) == set()


def test_a_step_has_the_same_rows_however_it_is_shared_and_wherever_one_begins(tmp_path):
    paths = write(tmp_path)
    wanted = [step_of(streamed(paths), step) for step in range(20)]
    whole = streamed(paths)
    assert [step_of(whole, step) for step in range(20)] == wanted
    for world, accumulate in ((2, 1), (4, 2), (8, 1)):
        source = streamed(paths)
        assert [step_of(source, step, world, accumulate) for step in range(13, 20)] == wanted[13:]
    assert [step_of(streamed(paths, seed=4), step) for step in range(20)] != wanted


def test_a_worker_reads_the_groups_of_its_places_alone_and_keeps_few(tmp_path):
    paths = write(tmp_path, [(10,) * 40])
    source, read = streamed(paths, kept=4), []
    original = source._read
    source._read = lambda task, group: read.append(group) or original(task, group)
    # One of eight workers, for an epoch: its place is an eighth of the rows, which no ends cut.
    for step in range(50):
        source("generate", step * ROWS + 3, 1)
        assert len(source._tables) <= 4
    assert len(read) == len(set(read)) <= 6


def test_a_row_that_does_not_fit_gives_way_to_the_next(tmp_path):
    paths = write(tmp_path)
    plain, picky = streamed(paths), streamed(paths, lambda row, task: row["number"] % 3 != 0)
    for step in range(6):
        for place, number in enumerate(step_of(plain, step), step * ROWS):
            [row] = picky("generate", place, 1)
            if number % 3:
                assert row["number"] == number
            else:
                more = next(one for one in range(1, 99) if plain("generate", place, 1, one)[0]["number"] % 3)
                assert row == plain("generate", place, 1, more)[0]
    with pytest.raises(InputError, match="consecutive rows of generate are too long"):
        streamed(paths, lambda row, task: False)("generate", 0, 1)


def test_rows_are_streamed_from_s3(tmp_path, s3):
    local, there = streamed(write(tmp_path)), streamed(write(f"{s3}/rows"))
    assert [step_of(local, step) for step in range(8)] == [step_of(there, step) for step in range(8)]


def test_fewer_rows_than_a_step_and_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(InputError, match="has 3 rows, but a step takes 8; take fewer rows a step"):
        streamed(write(tmp_path, [(3,)]))
    (tmp_path / "none.parquet").write_text("hello")
    with pytest.raises(InputError, match=r"none.parquet is not a Parquet file"):
        Groups.of([f"{tmp_path}/none.parquet"])
