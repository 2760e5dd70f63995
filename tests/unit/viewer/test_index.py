"""The index follows the shards, and survives damage and other viewers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.damage import flip_bit
from tests.viewers import fill_index, mark, walk
from wallaroo.model.errors import InputError
from wallaroo.workflows.outputs import layout
from wallaroo.workflows.outputs import shards as outputs_shards
from wallaroo.workflows.viewer import index
from wallaroo.workflows.viewer.query import Query


def test_index_is_kept_and_follows_the_shards(three, opened, outputs):
    first = opened(three)
    assert first.progress().complete
    first.index.close()
    second = opened(three, fill=False)
    assert second.progress().complete and second.rows.count(Query()) == 120
    second.index.close()
    # One shard is made anew with another row wrong, one is gone.
    table = outputs.result_table(outputs.plan_table(40, 40, 1), failed=(9,))
    outputs_shards.write_shard(str(three), 1, table)
    os.unlink(layout.shard_path(str(three), 2))
    third = opened(three, fill=False)
    assert [shard.number for shard in third.missing()] == [1]
    fill_index(third)
    assert third.rows.count(Query()) == 80
    failed = third.rows.page(Query(where="error_type = 'engine'"), None, 10)
    assert [mark(row) for row in failed] == [(1, 9)]


def test_output_that_was_made_anew_is_indexed_anew(tmp_path, outputs, opened):
    path = tmp_path / "out"
    outputs.make_output(path, [outputs.plan_table(10)])
    opened(path).index.close()
    shutil.rmtree(path)
    plan = outputs.plan_table(20).append_column("more", pa.array(["m"] * 20))
    outputs.make_output(path, [plan])
    output = opened(path)
    assert not output.unreadable and output.rows.count(Query(where="more = 'm'")) == 20


SECOND = """
import sys, threading
from wallaroo.workflows.viewer import index, output
from wallaroo.workflows.viewer.query import Query

made = index.Index([sys.argv[1]])
one = output.Output(0, sys.argv[1], made)
print(one.progress().indexed)
for _ in one.fill(threading.Event()):
    pass
print(one.rows.count(Query()))
"""


def test_two_viewers_and_a_damaged_index(three, opened):
    first = opened(three)
    command = [sys.executable, "-c", SECOND, str(three)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "120"]
    first.index.close()
    (path,) = index.cache_folder().glob("*.duckdb")
    path.write_bytes(b"nothing of the kind" * 1000)
    assert opened(three).rows.count(Query()) == 120


def test_old_indexes_go_and_other_files_of_the_folder_stay(three, opened):
    folder = index.cache_folder()
    folder.mkdir(parents=True)
    old = [folder / name for name in (f"{'a' * 32}-0.duckdb", f"{'b' * 32}-1.duckdb.wal", "mine.duckdb")]
    for path in (*old, folder / f"{'c' * 32}-1.duckdb"):
        path.write_text("x")
    for path in old:
        os.utime(path, (0, 0))
    opened(three, fill=False)
    assert [path.exists() for path in old] == [False, False, True]
    assert (folder / f"{'c' * 32}-1.duckdb").exists()


def test_shard_that_cannot_be_read_harms_no_other(three, opened):
    Path(layout.shard_path(str(three), 0)).write_bytes(b"PAR1 nothing PAR1")
    before = opened(three, fill=False)
    assert [mark(row) for row in walk(before, Query(), 9)] == [
        mark(row) for row in all_rows_of(three, (1, 2))
    ]
    before.index.close()
    after = opened(three)
    assert after.unreadable and after.rows.count(Query()) == 80
    with pytest.raises(InputError, match=r"shard-00000000\.parquet cannot be shown"):
        after.row(0, 0)


def test_a_page_with_a_wrong_bit_is_one_sentence(three, opened):
    flip_bit(layout.shard_path(str(three), 0), "prompt")
    made = opened(three)
    assert made.unreadable and made.rows.count(Query()) == 80
    with pytest.raises(InputError, match=r"shard-00000000\.parquet cannot be shown \(.*CRC"):
        made.row(0, 0)


def all_rows_of(path, shards):
    found = []
    for number in shards:
        rows = pq.read_metadata(layout.shard_path(str(path), number)).num_rows
        found += [{"shard": number, "position": place} for place in range(rows)]
    return found
