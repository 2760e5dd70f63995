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


def test_shards_in_flight_are_finished_and_no_others_begun(tmp_path):
    # Twenty shards, so that there is something left.
    manifest = write_jsonl(
        tmp_path / "prompts.jsonl", [{**row, "id": f"{row['id']}-{n}"} for row in ROWS for n in range(7)]
    )
    output = tmp_path / "out"
    command = [sys.executable, "-m", "wallaroo.jobs.cli", "generate", manifest, str(output), "--slots", "8"]
    command += ["--grace", "1h"]
    command += ["--on-finish", f"cat > {tmp_path}/news"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list_done(str(output)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 5, said
    assert re.search(r"finishing \d+ shards? in flight, for at most \S+.*; SIGTERM again stops now\n", said)
    assert "Traceback" not in said
    plan = read_plan(str(output))
    done, shards = list_done(str(output)), set(plan.shards)
    kept = sum(pq.read_metadata(path).num_rows for path in (output / "data").glob("*.parquet"))
    words = f"Finished shards are kept, {kept} of {plan.rows} rows; re-run the same command to resume."
    assert said.splitlines()[-1] == f"wallaroo: stopped by SIGTERM. {words}"
    assert done < shards
    # That which was there, and what the replica had.
    assert 1 < len(done) <= 6
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
    command += [write_jsonl(tmp_path / "prompts.jsonl", ROWS), str(output), "--slots", "8", "--grace", "1h"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    replicas = []
    try:
        while not list_done(str(output)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        replicas = [one for one in family if "Replica" in " ".join(one.cmdline())]
        for one in replicas:
            one.suspend()  # so that it cannot finish what it has
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
