"""Summaries: they say what the files hold, spare opening them, and without them all is the same."""

import dataclasses
import json
import shutil
from collections import Counter

import pyarrow as pa
import pytest

from tests.s3_proxy import proxy
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs import layout, shards, summary_files
from wallaroo.workflows.outputs.shards import open_shard, write_shard
from wallaroo.workflows.outputs.summary_files import read_lines
from wallaroo.workflows.plans.plan import read_plan
from wallaroo.workflows.reports import finish as reports_finish
from wallaroo.workflows.reports import summaries as reports_summaries
from wallaroo.workflows.reports import tally as reports_tally
from wallaroo.workflows.reports.finish import finish
from wallaroo.workflows.reports.summaries import ALL
from wallaroo.workflows.reports.survey import survey_output
from wallaroo.workflows.reports.tally import ShardTally, tally_of_file, tally_of_table
from wallaroo.workflows.reports.verify import verify
from wallaroo.workflows.runs.resume import find_remaining

PARTS, SHARDS, ROWS = 3, 4, 6
FAILED = {1: (2, 3), 6: (0,), 11: (5,)}


def put(output, shard, table):
    """A shard as a run writes it; what a run then tells its summaries."""
    text = tally_of_table(table, shard).to_json()
    return write_shard(str(output), shard, table, text), text.decode()


@pytest.fixture
def made(outputs, tmp_path):
    """An output of PARTS plan parts with SHARDS shards each, some with error rows, but for its end."""
    output = tmp_path / "out"
    outputs.make_output(output, [table(outputs, shard) for shard in range(SHARDS)], skip=range(SHARDS))
    for part in range(1, PARTS):
        outputs.write_plan(output, [table(outputs, part * SHARDS + n) for n in range(SHARDS)])
    for shard in range(PARTS * SHARDS):
        put(output, shard, outputs.result_table(table(outputs, shard), FAILED.get(shard, ())))
    return output


def table(outputs, shard):
    return outputs.plan_table(ROWS, ROWS * shard, shard, errors=(1,) if shard == 6 else ())


@pytest.fixture
def opened(monkeypatch):
    """Counts the shards that are opened for their tallies."""
    counts = Counter()

    def counting(output, shard, data=None):
        counts[shard] += 1
        return open_shard(output, shard, data)

    monkeypatch.setattr(reports_summaries, "open_shard", counting)
    return counts


def ended(output):
    """All that the end of a run says of an output, with a report's counts."""
    output = str(output)
    plan = read_plan(output)
    counts = finish(output, plan)
    files = [
        storage.read_bytes(storage.join(output, name))
        for name in (layout.SUCCESS_FILE, layout.ERRORS_FILE, layout.CARD_FILE)
    ]
    survey = survey_output(output, plan.parts)
    return counts, files, dataclasses.replace(survey, places={}), survey.choose(40)


def kept(output):
    """The summaries: name -> contents."""
    return {file.name: file.read_bytes() for file in (output / layout.SUMMARIES_FOLDER).iterdir()}


def test_a_finished_output_is_read_without_opening_a_file(made, opened):
    wanted = ended(made)
    assert sorted(opened) == [*range(12)] and set(opened.values()) == {1}
    assert sorted(kept(made)) == ["all.jsonl.gz", *(f"part-{n:05d}.jsonl.gz" for n in range(PARTS))]
    assert wanted[0].errors == {"engine": 4, "size": 1} and wanted[0].rows == 72
    opened.clear()
    assert ended(made) == wanted
    assert not opened


def test_summaries_say_what_the_columns_say(made, outputs):
    """Whoever counts, and by whichever way: the footer, the summary, the columns."""
    finish(str(made), read_plan(str(made)))
    for part in range(PARTS):
        for shard, stamp, values in read_lines(str(made), f"part-{part:05d}"):
            assert stamp == layout.list_shards(str(made))[shard]
            with open_shard(str(made), shard) as parquet:
                assert tally_of_file(parquet, shard, trusted=False).says(values)
                assert tally_of_file(parquet, shard).says(values)
            found = ShardTally.from_values(values)
            bad = len(FAILED.get(shard, ())) + (shard == 6)
            assert (found.tally.rows, found.tally.ok, len(found.failed)) == (ROWS, ROWS - bad, bad)
            assert found.tally.refused == (shard == 6)
            assert found.tally.environments == {"e" * 64: ROWS - bad}
            assert found.tally.seconds == 0.5 * (ROWS - (shard == 6))


def test_without_summaries_all_is_the_same(made):
    wanted = ended(made)
    before = kept(made)
    shutil.rmtree(made / layout.SUMMARIES_FOLDER)
    assert ended(made) == wanted
    assert kept(made) == before


def test_files_without_tallies_are_counted_by_their_columns(made, outputs, opened):
    """As version 0.1.0 wrote them."""
    wanted = ended(made)
    shutil.rmtree(made / layout.SUMMARIES_FOLDER)
    for shard in range(PARTS * SHARDS):
        write_shard(str(made), shard, outputs.result_table(table(outputs, shard), FAILED.get(shard, ())))
    assert ended(made) == wanted


@pytest.mark.parametrize("name", ["all", "part-00001"])
def test_a_summary_that_is_damaged_in_any_byte_is_none_or_says_the_same(made, name):
    wanted = ended(made)
    path = made / layout.SUMMARIES_FOLDER / layout.summary_name(name)
    data = path.read_bytes()
    lines = read_lines(str(made), name)
    assert lines
    ignored = 0
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :])
        found = read_lines(str(made), name)
        assert found in ([], lines)
        ignored += not found
        if place % 300 == 0:
            assert ended(made) == wanted
            assert read_lines(str(made), name) == lines
    # Of gzip's own header a few bytes mean nothing.
    assert ignored > len(data) - 10
    for cut in (0, 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        assert read_lines(str(made), name) == []
    path.write_bytes(data + data)
    assert read_lines(str(made), name) == []


@pytest.mark.parametrize("name", ["all", "part-00000"])
@pytest.mark.parametrize(
    "change",
    [
        lambda tally: tally.update(rows=2**63),
        lambda tally: tally.update(seconds=10**400),
        lambda tally: tally.update(ok=-1),
        lambda tally: tally["details"]["pictures"][0].__setitem__(5, [[99, 0, 0, 1]]),
        lambda tally: tally["details"]["pictures"][0].__setitem__(5, [[0, 0, 0, 2**40]]),
        lambda tally: tally["details"].update(sizes=[[1, 2]]),
    ],
)
def test_a_summary_that_cannot_be_so_is_passed_over(made, name, change):
    """Though its checksum holds."""
    wanted = ended(made)
    lines = read_lines(str(made), name)
    change(lines[0][2]["tally"] if name != "all" else lines[0][2])
    summary_files.write_lines(str(made), name, [json.dumps(line).encode() for line in lines])
    if name != "all":
        (made / layout.SUMMARIES_FOLDER / "all.jsonl.gz").unlink()
    assert ended(made) == wanted


@pytest.mark.parametrize(
    "lines",
    [
        [b"1", b"[]", b"null", b"{}"],
        [b'["part-00000","key",{}]', b'[0,"x",{"tally":{},"failed":[]}]'],
        [b'["part-00000",1,2]', b'[[],"x",null]', b'[true,"x",{"tally":1,"failed":1}]'],
    ],
)
def test_a_summary_of_other_values_is_passed_over(made, lines):
    wanted = ended(made)
    for name in (ALL, "part-00000", "part-00001"):
        summary_files.write_lines(str(made), name, lines)
    assert ended(made) == wanted


def test_a_summary_of_another_part_is_passed_over(made):
    wanted = ended(made)
    folder = made / layout.SUMMARIES_FOLDER
    shutil.copy(folder / "part-00001.jsonl.gz", folder / "part-00000.jsonl.gz")
    (folder / "all.jsonl.gz").unlink()
    assert read_lines(str(made), "part-00000") == []
    assert ended(made) == wanted


def test_a_file_that_changed_is_opened_and_no_other(made, outputs, opened):
    ended(made)
    opened.clear()
    put(made, 5, outputs.result_table(table(outputs, 5), failed=(0,)))
    counts = ended(made)[0]
    assert counts.errors == {"engine": 5, "size": 1} and opened == {5: 1}


def test_summaries_of_different_ages(made, outputs, opened):
    """Two starts in turn: what one left is older than files of the other, or newer."""
    ended(made)
    older = made.parent / "older"
    shutil.copytree(made / layout.SUMMARIES_FOLDER, older)
    put(made, 1, outputs.result_table(table(outputs, 1)))
    put(made, 6, outputs.result_table(table(outputs, 6), failed=(0, 2)))
    wanted = ended(made)
    newer = kept(made)
    for name in newer:
        mixed = {**newer, name: (older / name).read_bytes()}
        for one, data in mixed.items():
            (made / layout.SUMMARIES_FOLDER / one).write_bytes(data)
        opened.clear()
        assert ended(made) == wanted
        assert set(opened) <= {1, 6}


def test_a_run_writes_summaries_as_it_goes(made, outputs, opened, monkeypatch):
    wanted = ended(made)
    shutil.rmtree(made / layout.SUMMARIES_FOLDER)
    shutil.rmtree(made / layout.DATA_FOLDER)
    monkeypatch.setattr(reports_summaries, "WRITE_SHARDS", 3)
    monkeypatch.setattr(reports_summaries, "WRITE_PARTS", 2)
    output = str(made)
    summaries = find_remaining(output, read_plan(output)).summaries
    there = []
    for shard in [0, 4, 5, 6, 1, 2, 3, 7, 8]:
        rows = outputs.result_table(table(outputs, shard), FAILED.get(shard, ()))
        summaries.add(shard, *put(made, shard, rows))
        there.append(len(kept(made)) if (made / layout.SUMMARIES_FOLDER).exists() else 0)
    # The second part after three of its shards, the first likewise, and all of two parts when they are whole.
    assert there == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    opened.clear()
    # Cut off here, only the last shard is not in a summary.
    again = find_remaining(output, read_plan(output))
    assert again.shards == [9, 10, 11] and opened == {8: 1}
    assert (again.finished.rows, again.finished.errors) == (9 * ROWS, {"engine": 3, "size": 1})
    for shard in again.shards:
        rows = outputs.result_table(table(outputs, shard), FAILED.get(shard, ()))
        again.summaries.add(shard, *put(made, shard, rows))
    with again.summaries.saved():
        pass
    opened.clear()
    assert ended(made) == wanted
    assert not opened


def test_a_tally_that_is_too_long_says_how_many_rows_there_are(made, opened, monkeypatch):
    wanted = ended(made)
    shutil.rmtree(made / layout.SUMMARIES_FOLDER)
    monkeypatch.setattr(reports_tally, "MAX_BYTES", 100)
    opened.clear()
    assert ended(made) == wanted
    [found] = {json.dumps(values["failed"]) for _, _, values in read_lines(str(made), "part-00000")}
    assert found == "null"
    opened.clear()
    remaining = find_remaining(str(made), read_plan(str(made)))
    assert remaining.shards == [] and remaining.finished.errors == {"engine": 4, "size": 1} and not opened


def test_a_table_read_back_is_written_without_the_tally_of_its_file(made, outputs):
    with open_shard(str(made), 1) as parquet:
        rows = parquet.read()
    assert shards.TALLY_KEY in rows.schema.metadata
    write_shard(str(made), 1, rows)
    with open_shard(str(made), 1) as parquet:
        assert shards.TALLY_KEY not in parquet.metadata.metadata
        assert parquet.read().equals(rows)
        assert parquet.schema_arrow.equals(shards.without_tally(rows.schema), check_metadata=True)


def damaged(data):
    """Files that are no shard any more."""
    return {
        "empty": b"",
        "cut": data[:-7],
        "footer": data[:-200] + bytes(192) + data[-8:],
        "garbage": b"x" * 999,
    }


@pytest.mark.parametrize("kind", ["empty", "cut", "footer", "garbage"])
@pytest.mark.parametrize("place", ["local", "on_s3"])
def test_a_damaged_shard_is_moved_aside_and_made_again(made, outputs, caplog, request, place, kind):
    output = str(made)
    if place == "on_s3":
        output = request.getfixturevalue("s3") + "/out"
        for file in storage.list_files(str(made)):
            storage.write_atomic(storage.join(output, file.relative), storage.read_bytes(file.path))
    plan = read_plan(output)
    finish(output, plan)
    path = layout.shard_path(output, 5)
    whole = storage.read_bytes(path)
    storage.write_atomic(path, damaged(whole)[kind])
    with pytest.raises(InputError, match=r"shard-00000005\.parquet cannot be read .*move it elsewhere"):
        finish(output, plan)
    remaining = find_remaining(output, plan)
    assert remaining.shards == [5] and remaining.finished.rows == 11 * ROWS
    [said] = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    assert path in said and layout.unreadable_path(output, 5) in said and "made again" in said
    assert storage.read_bytes(layout.unreadable_path(output, 5)) == damaged(whole)[kind]
    assert layout.list_done(output) == {*range(12)} - {5}
    put(output, 5, outputs.result_table(table(outputs, 5)))
    finish(output, plan)
    assert verify(output, lambda line: None).state == "complete"


def test_requests_do_not_grow_with_shards(made, outputs, s3, s3_server, monkeypatch):
    """On S3, by a proxy that counts: a resume, the end of a run, a report's survey, and `verify`."""
    output = f"{s3}/out"
    for file in storage.list_files(str(made)):
        storage.write_atomic(storage.join(output, file.relative), storage.read_bytes(file.path))
    finish(output, read_plan(output))
    plan = read_plan(output)
    storage.delete(layout.shard_path(output, 7))
    with proxy(s3_server.endpoint, share=0) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        storage.forget_clients()
        # `all`, the part that lacks a shard, and both written anew.
        assert find_remaining(output, plan).shards == [7]
        assert server.take() == {"LIST": 2, "GET": 2, "PUT": 2}
        put(output, 7, outputs.result_table(table(outputs, 7)))
        server.take()
        assert reports_finish.finish(output, plan).rows == 72
        counts = server.take()
        # A footer is one or two ranges, and pyarrow asks for the size first. The part that the plan refused
        # a row of is looked into for what its manifest said.
        assert counts.pop("LIST") == 2 and counts.pop("HEAD") == 2 and counts.pop("GET") <= 8
        # A part's summary, `all`, errors, card and _SUCCESS.
        assert counts == {"PUT": 5}
        assert survey_output(output, plan.parts).rows == 72
        counts = server.take()
        assert counts.pop("LIST") == 2 and counts == {"GET": 1 + PARTS}  # each part has error rows to show
        assert verify(output, lambda line: None).state == "complete"
        counts = server.take()
        # Listings of plan (twice), data and summaries; every shard; run.json, _SUCCESS and `all`; and of a
        # part its JSON, its rows and its summary.
        assert counts == {"LIST": 4, "GET": PARTS * SHARDS + 3 + 3 * PARTS}
        assert counts["GET"] <= 2 * PARTS * SHARDS + 2 * PARTS
        assert verify(output, lambda line: None, fast=True).state == "complete"
        assert server.take()["GET"] == 3 + 2 * PARTS


def test_the_stamp_of_a_write_is_that_of_the_listing(tmp_path, s3):
    for folder in (str(tmp_path), f"{s3}/x"):
        for size in (0, 10, 20 << 20):
            path = storage.join(folder, f"file-{size}")
            stamp = storage.write_atomic(path, memoryview(pa.py_buffer(bytes(size))))
            found = storage.list_stamps(folder, str)
            assert found[f"file-{size}"] == stamp == storage.info(path).stamp
            assert storage.stamp_size(stamp) == size
