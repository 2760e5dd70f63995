"""Storages that are out of order for a while: a run waits, or stops with one sentence and goes on later."""

import dataclasses
import functools
import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest

from tests import conftest
from tests.e2e.test_generate import read_data
from tests.faults.test_poison import AllSick, many
from tests.s3_proxy import proxy
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import list_done
from wallaroo.workflows.outputs.lock import OutputLock
from wallaroo.workflows.outputs.run_log import read_records
from wallaroo.workflows.outputs.schema import VOLATILE
from wallaroo.workflows.reports.verify import verify
from wallaroo.workflows.runs import driver, stages
from wallaroo.workflows.runs.driver import run
from wallaroo.workflows.runs.pool import WRITERS
from wallaroo.workflows.storage import clients, retries

ROOT = Path(__file__).parents[2]
OUTAGE_SECONDS = 30
LIMIT_SECONDS = 900
WRITE = stages.write


def same(output, wanted):
    said = []
    assert verify(output, said.append).state == "complete", said
    return read_data(output).drop_columns(VOLATILE).equals(wanted.drop_columns(VOLATILE))


def started(config, variables, log):
    """The command of a run as a process of its own, with a Ray of its own."""
    command = [sys.executable, "-m", "wallaroo.jobs.cli", "generate", config.manifest, config.output]
    command += ["--slots", "8", "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return subprocess.Popen(command, cwd=ROOT, env=environment | variables, stdout=log, stderr=log)


def ended(process, log):
    try:
        code = process.wait(LIMIT_SECONDS)
    finally:
        process.kill()
    assert code == 3, Path(log).read_text()  # one row is refused, as in `base`


def test_a_storage_that_fails_at_a_fifth_of_all_requests(base, s3, s3_server, tmp_path):
    config, wanted = base
    other = dataclasses.replace(config, output=f"{s3}/out")
    with proxy(s3_server.endpoint, share=0.2, seed=6) as between, open(tmp_path / "log", "wb") as log:
        ended(started(other, s3_server.variables(between.endpoint), log), tmp_path / "log")
        assert between.faults.total() > 10 and len(between.faults) == 5, between.faults
    assert same(other.output, wanted)
    assert read_records(other.output)[0][-1].retries["requests to S3"] > 0


def test_a_server_that_is_killed_and_started_again_half_a_minute_later(
    base, s3_server, tmp_path, monkeypatch
):
    config, wanted = base
    folder = Path("/tmp") / f"weed-{secrets.token_hex(4)}"
    server = conftest._start(s3_server.command[0], folder)
    assert server is not None
    pid = server.pid
    try:
        for name, value in server.variables().items():
            monkeypatch.setenv(name, value)
        storage.forget_clients()
        boto3.session.Session().client("s3").create_bucket(Bucket="own")
        other = dataclasses.replace(config, output="s3://own/out")
        with open(tmp_path / "log", "wb") as log:
            process = started(other, server.variables(), log)
            while not list_done(other.output):
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            time.sleep(OUTAGE_SECONDS)
            assert process.poll() is None, (tmp_path / "log").read_text()
            with open(folder / "log", "ab") as said:
                pid = subprocess.Popen(server.command, stdout=said, stderr=said, start_new_session=True).pid
            ended(process, tmp_path / "log")
        assert same(other.output, wanted)
        assert len(read_records(other.output)[0]) == 1
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        storage.forget_clients()


class Marks(AllSick):
    """Writes down how many shards are finished and not written, whenever one is finished."""

    marks = Path()
    output = ""

    async def __call__(self, row):
        made = await super().__call__(row)
        mark = self.marks / str(row["shard"])
        mark.touch()
        finished = len(list(self.marks.iterdir()))
        mark.write_text(str(finished - len(list_done(self.output))))
        return made


def slow_write(row, output, retried, watch, marks):
    # At first until replicas are ahead, however slow they are.
    while len(list(marks.iterdir())) <= 2:
        time.sleep(0.1)
    time.sleep(0.5)
    return WRITE(row, output, retried, watch)


def test_few_finished_shards_wait_for_a_slow_storage(base, tmp_path, monkeypatch):
    other = many(base, tmp_path, "slow", replicas=(2, 2))
    (tmp_path / "marks").mkdir()
    kind = type("Counted", (Marks,), {"marks": tmp_path / "marks", "output": other.output})
    monkeypatch.setattr(driver, "write", functools.partial(slow_write, marks=tmp_path / "marks"))
    assert run(other, replica=kind).errors == 400
    counts = [int(mark.read_text()) for mark in (tmp_path / "marks").iterdir()]
    assert len(counts) == len(list_done(other.output)) > 20
    # Two for each replica, and one for each writer.
    assert 2 < max(counts) < 2 * 2 + 2 * WRITERS


def test_what_stays_out_of_order_stops_the_run_with_a_sentence(s3, s3_server, monkeypatch):
    storage.write_atomic(f"{s3}/file", b"one")
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    # Only pauses take time of this clock, of which the first one is the last.
    monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(retries, "RETRY_SECONDS", retries.MIN_BACKOFF / 2)
    with proxy(s3_server.endpoint, share=1.0, seed=2) as between:
        between._random.choice = lambda faults: "throttle"
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
        storage.forget_clients()
        with storage.retries_enabled(), pytest.raises(InputError) as caught:
            storage.read_bytes(f"{s3}/file")
    assert "throttles requests" in str(caught.value) and "re-run the same command to resume" in str(
        caught.value
    )
    assert "\n" not in str(caught.value) and between.requests == 2 * clients.ATTEMPTS


def test_a_lock_is_given_back_when_the_storage_fails_at_the_last_moment(s3, s3_server, monkeypatch):
    # An answer that breaks off, and more refusals than botocore takes by itself.
    faults = ["truncate", "truncate", *["throttle"] * 4]
    with proxy(s3_server.endpoint, share=0.0) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
        storage.forget_clients()
        with OutputLock(f"{s3}/out", "mine", lease=3600.0):
            between.fault = lambda: faults.pop(0) if faults else ""
        assert not faults and not storage.list_files(f"{s3}/out")


def test_credentials_that_expire_are_looked_for_again(s3, s3_server, tmp_path, monkeypatch):
    """The file of a profile is renewed by somebody else while a run waits."""
    storage.write_atomic(f"{s3}/file", b"one")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    profile = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    expired = "[default]\naws_access_key_id = old\naws_secret_access_key = old\n"
    renewed = f"[default]\naws_access_key_id = {s3_server.key}\naws_secret_access_key = {s3_server.secret}\n"
    profile.write_text(expired)
    storage.forget_clients()
    tries = []

    def read():
        data = (
            tries.append(1)
            or clients.s3_client().get_object(Bucket=s3.removeprefix("s3://"), Key="file")["Body"].read()
        )
        return data

    def answered():
        try:
            return read()
        except Exception as error:
            # SeaweedFS knows no credentials that expire, so what it says of unknown ones is put so.
            error.response["Error"]["Code"] = "ExpiredToken"
            profile.write_text(renewed)
            raise

    with storage.retries_enabled():
        assert storage.with_retries(f"{s3}/file", answered) == b"one"
    assert len(tries) == 2


@contextmanager
def mounted(folder, megabytes):
    """A small disk."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder])
    if made.returncode:
        pytest.skip("only root may mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_and_a_read_only_one_stop_the_run_and_it_goes_on_with_room(base, tmp_path):
    config, wanted = base
    disk = tmp_path / "disk"
    other = dataclasses.replace(config, output=str(disk / "out"))
    with mounted(disk, 16):
        # Room for the plan and the first shard, not for all.
        shard = max(path.stat().st_size for path in (Path(config.output) / "data").iterdir())
        (disk / "filler").write_bytes(bytes((16 << 20) - 2 * shard - (128 << 10)))
        with pytest.raises(InputError, match="its disk is full: make room and start again") as caught:
            run(other)
        assert "\n" not in str(caught.value)
        there = list_done(other.output)
        assert len(there) < len(list_done(config.output))
        (disk / "filler").unlink()

        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(InputError, match="its file system is read-only: choose another place"):
            run(other)
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)

        run(other)
        assert there <= list_done(other.output)
        assert same(other.output, wanted)
        assert not list(disk.glob("**/.wallaroo-tmp-*"))
