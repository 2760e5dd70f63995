"""Rows that kill their replica, devices that break, error rows made once more, and a budget of them."""

import dataclasses
import os
import resource
from collections import Counter
from pathlib import Path

import pyarrow.compute as pc
import pytest
import ray

from tests.e2e.test_generate import read_data, write_jsonl
from tests.faults.conftest import ROWS
from wallaroo.actors.replica import Replica
from wallaroo.model.errors import InputError
from wallaroo.workflows.api import map_dataset
from wallaroo.workflows.outputs.layout import list_done
from wallaroo.workflows.outputs.run_log import read_records
from wallaroo.workflows.outputs.schema import VOLATILE
from wallaroo.workflows.outputs.success import read_success
from wallaroo.workflows.plans.plan import read_plan
from wallaroo.workflows.reports.verify import verify
from wallaroo.workflows.runs.driver import MIN_ROWS, run

ABORTS, GREEDY = 5, 17
SICK = (3, 4, 20)


class Submits(Replica):
    """A replica that looks at each row before its engine gets it."""

    def look(self, request):
        raise NotImplementedError

    def _load(self, *arguments):
        engine = super()._load(*arguments)
        submit = engine.submit
        engine.submit = lambda request: submit(self.look(request))
        return engine


class Poisoned(Submits):
    """Aborts on one row, and allocates without bound on another."""

    def look(self, request):
        if request.seed == ABORTS:
            os.abort()
        if request.seed == GREEDY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + (1 << 30)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            held = []
            while True:
                held.append(bytearray(64 << 20))
        return request


class Sick(Submits):
    """Gives some rows back as errors, which they are not."""

    def look(self, request):
        if request.seed not in SICK:
            return request
        return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, cfg=-1.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("poison")


class AllSick(Sick):
    """Gives all rows back as errors, which takes no time."""

    def look(self, request):
        return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, cfg=-1.0))


def many(base, folder, output, **changes):
    """A run of rows enough for many shards."""
    rows = [{**ROWS[0], "id": f"m{number}"} for number in range(400)]
    manifest = write_jsonl(folder / f"{output}.jsonl", rows)
    return dataclasses.replace(base[0], manifest=manifest, output=str(folder / output), **changes)


def test_rows_of_a_dataset_that_kill_their_replica_become_error_rows(base):
    ds = ray.data.from_items([{**row, "seed": row["seed"] + 4} for row in ROWS[:4]])
    made = map_dataset("generate", ds, {"slots": 2, "device": "cpu"}, Poisoned).to_pandas()
    assert made.set_index("seed").status.to_dict() == {4: "ok", ABORTS: "error", 6: "ok", 7: "ok"}


def test_rows_that_kill_their_replica_become_error_rows_and_their_neighbours_survive(base, folder):
    config, wanted = base
    other = dataclasses.replace(config, output=str(folder / "poisoned"))
    summary = run(other, replica=Poisoned)
    table = read_data(other.output)
    assert (summary.ok, summary.errors) == (22, 3)
    errors = table.filter(pc.equal(table["status"], "error"))
    assert list(zip(errors["seed"].to_pylist(), errors["error_type"].to_pylist(), strict=True))[:2] == [
        (ABORTS, "crash"),
        (GREEDY, "crash"),
    ]
    assert "crashed its replica repeatedly" in errors["error_message"][0].as_py()
    bad = pc.is_in(table["row_id"], errors["row_id"].combine_chunks())
    good, same = (one.filter(pc.invert(bad)).drop_columns(VOLATILE) for one in (table, wanted))
    assert good.equals(same)
    # Four deaths for each of them, two of them alone.
    assert read_records(other.output)[0][-1].retries["replicas that died"] <= 8
    said = []
    assert verify(other.output, said.append).state == "complete", said


def test_a_device_error_that_no_row_causes_blames_none(base, folder):
    config, wanted = base
    marks = folder / "broken"
    marks.mkdir()

    class Breaks(Replica):
        def _turn(self, engine):
            step = engine.step

            def breaks():
                found = step()
                if engine.counts["steps"] == 20 and len(list(marks.iterdir())) < 3:
                    (marks / str(os.getpid())).touch()
                    raise RuntimeError("CUDA error: unspecified launch failure")
                return found

            engine.step = breaks
            super()._turn(engine)

    other = dataclasses.replace(config, output=str(folder / "broken-out"))
    assert run(other, replica=Breaks).errors == 1
    assert len(list(marks.iterdir())) == 3
    assert read_data(other.output).drop_columns(VOLATILE).equals(wanted.drop_columns(VOLATILE))


def test_error_rows_are_made_once_more_and_no_others(base, folder):
    config, wanted = base
    other = dataclasses.replace(config, output=str(folder / "sick"))
    assert run(other, replica=Sick).errors == 4
    before = read_data(other.output)
    assert Counter(before["error_type"].to_pylist()) == {"": 21, "engine": 3, "prompt": 1}
    # Without the option nothing is left to do; with it the sick stay so at first.
    assert run(other, replica=Sick).before == 25
    again = dataclasses.replace(other, retry_errors=True)
    assert run(again, replica=Sick).errors == 4
    summary = run(again)
    assert (summary.ok, summary.errors, summary.before) == (24, 1, 22)
    table = read_data(other.output)
    assert table.drop_columns(VOLATILE).equals(wanted.drop_columns(VOLATILE))
    kept = pc.invert(pc.is_in(table["seed"], pc.cast(list(SICK), table.schema.field("seed").type)))
    assert table.filter(kept).equals(before.filter(kept))
    assert read_records(other.output)[0][-1].images == 3
    assert read_success(other.output)["errors"] == {"prompt": 1}
    said = []
    assert verify(other.output, said.append).state == "complete", said


def test_too_many_error_rows_stop_a_run_soon(base, folder):
    other = many(base, folder, "budget", max_error_rate=0.1)
    with pytest.raises(InputError, match=r"are errors \(\d+ engine\), more than the --max-error-rate of 0.1"):
        run(other, replica=AllSick)
    shard_rows = read_plan(other.output).parts[0].shard_rows
    assert 1 <= len(list_done(other.output)) <= -(-MIN_ROWS // shard_rows) + 2
    assert read_success(other.output) is None
