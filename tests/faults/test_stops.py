"""Runs that are stopped on purpose finish what they have begun, and the same command goes on."""

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.e2e.test_generate import write_jsonl
from tests.faults.conftest import ROWS
from wallaroo.jobs import cli
from wallaroo.workflows.outputs.layout import list_done
from wallaroo.workflows.outputs.run_log import read_records
from wallaroo.workflows.plans.plan import read_plan

ROOT = Path(__file__).parents[2]


def twenty_shards(folder):
    """A manifest of so many that something is left, however late the run is stopped."""
    rows = [{**row, "id": f"{row['id']}-{n}"} for row in ROWS for n in range(7)]
    return write_jsonl(folder / "prompts.jsonl", rows)


def suspended(process, output):
    """The replicas of a run, halted when it has a first shard."""
    while not list_done(str(output)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    replicas = [one for one in family if "Replica" in " ".join(one.cmdline())]
    for one in replicas:
        one.suspend()
    assert replicas
    return replicas


def test_shards_in_flight_are_finished_and_no_others_begun(tmp_path):
    manifest = twenty_shards(tmp_path)
    output = tmp_path / "out"
    command = [sys.executable, "-m", "wallaroo.jobs.cli", "generate", manifest, str(output), "--slots", "8"]
    command += ["--grace", "1h"]
    command += ["--on-finish", f"cat > {tmp_path}/news"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # Halted, or a slow machine would begin others before the signal arrives.
    replicas = suspended(process, output)
    process.send_signal(signal.SIGTERM)
    said = ""
    while "SIGTERM again stops now\n" not in said:
        said += process.stderr.readline()
        assert process.poll() is None, said
    before = list_done(str(output))
    for one in replicas:
        one.resume()
    said += process.stderr.read()
    assert process.wait() == 5, said
    told = re.search(r"finishing (\d+) shards? in flight, for at most \S+.*; SIGTERM again stops now\n", said)
    assert told and "Traceback" not in said
    plan = read_plan(str(output))
    done, shards = list_done(str(output)), set(plan.shards)
    kept = sum(pq.read_metadata(path).num_rows for path in (output / "data").glob("*.parquet"))
    words = f"Finished shards are kept, {kept} of {plan.rows} rows; re-run the same command to resume."
    assert said.splitlines()[-1] == f"wallaroo: stopped by SIGTERM. {words}"
    assert done < shards
    # Those that were there, and those in flight, of which some may have been written since they were counted.
    assert before <= done and 1 <= len(done) - len(before) <= int(told[1])
    record = read_records(str(output))[0][-1]
    assert record.state == "stopped" and record.message.startswith("stopped by SIGTERM")
    assert json.loads((tmp_path / "news").read_text())["state"] == "stopped"
    assert not (output / "lock.json").exists()
    assert not list(output.glob("**/.wallaroo-tmp-*"))


def test_a_deadline_that_comes_before_the_first_row(base, tmp_path, capsys):
    output = tmp_path / "out"
    # It has come when the replica starts. In this process, which has a Ray already.
    with pytest.raises(SystemExit) as left:
        cli.main(["generate", base[0].manifest, str(output), "--slots", "8", "--deadline", "1s"])
    said = capsys.readouterr().err
    assert left.value.code == 5, said
    assert "stopped by the deadline. Finished shards are kept" in said
    assert not list_done(str(output)) and not (output / "lock.json").exists()


def test_a_wish_that_is_repeated_is_not_made_to_wait(tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "wallaroo.jobs.cli", "generate"]
    command += [twenty_shards(tmp_path), str(output), "--slots", "8", "--grace", "1h"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    replicas = []
    try:
        replicas = suspended(process, output)  # so that they cannot finish what they have
        process.send_signal(signal.SIGTERM)
        said = iter(process.stderr.readline, "")
        assert any("SIGTERM again stops now" in line for line in said)
        process.send_signal(signal.SIGTERM)
        last = "".join(said)
        assert process.wait() == 5, last
        assert "re-run the same command to resume" in last and "Traceback" not in last
    finally:
        for one in replicas:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.kill()
    assert list_done(str(output)) < set(read_plan(str(output)).shards)
