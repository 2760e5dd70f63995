"""The lock on an output: refused while its owner lives, taken over when it does not, its loss noticed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs import lock as lock_module
from wallaroo.workflows.outputs.lock import LockLost, OutputLock, Owner, RunInProgress
from wallaroo.workflows.storage.local import folder_locked

LEASE = 0.5
STEADY = 60.0
"""A lease in which an owner on a busy machine surely beats once; see `brisk`."""
LONG = 3600.0
"""A lease that no test waits for: who gets the lock under it got it at once."""


def holder(output, lease=STEADY):
    """Another process that holds the lock until it is killed."""
    code = (
        "import sys, time; from wallaroo.workflows.outputs import lock\n"
        f"lock.BEATS_PER_LEASE = {max(1, round(lease / 0.1))}\n"
        f"with lock.OutputLock(sys.argv[1], 'other', lease={lease}):\n"
        "    print('held', flush=True); time.sleep(900)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, output],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout.readline() == b"held\n"
    return process


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "out")


@pytest.fixture
def brisk(monkeypatch):
    """Ten beats and looks a second under the lease STEADY."""
    for name in ("BEATS_PER_LEASE", "POLLS_PER_LEASE"):
        monkeypatch.setattr(lock_module, name, 10 * STEADY)


def write(output, **values):
    """A lock file of some owner, as if it had been left there."""
    storage.write_atomic(f"{output}/lock.json", dataclasses.replace(Owner.myself("left"), **values).to_json())


def test_a_free_lock_is_taken_beats_and_is_given_back(output):
    with OutputLock(output, "mine", lease=LEASE) as lock:
        first = json.loads(storage.read_bytes(lock.path))
        assert (first["run"], first["pid"]) == ("mine", os.getpid())
        beat = first
        while beat["heartbeat"] == first["heartbeat"]:
            time.sleep(0.01)
            beat = json.loads(storage.read_bytes(lock.path))
        lock.check()
    assert not os.path.exists(output)


def test_a_living_owner_is_named_and_left_alone(output, brisk):
    process = holder(output)
    try:
        with pytest.raises(
            RunInProgress, match=f"is locked by an active run .other, process {process.pid} on .*heartbeat"
        ) as caught:
            OutputLock(output, "mine", lease=STEADY).__enter__()
        assert "\n" not in str(caught.value)
        assert Owner.from_json(storage.read_bytes(f"{output}/lock.json")).run == "other"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_killed_owner_on_this_machine_is_taken_over_at_once(output):
    process = holder(output)
    process.kill()
    # Not waited for: a process is gone though its parent has not looked yet.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with OutputLock(output, "mine", lease=LONG) as lock:
        assert Owner.from_json(storage.read_bytes(lock.path)).run == "mine"
    process.wait()
    process.stdout.close()


def test_a_later_process_of_the_same_number_is_not_the_owner(output):
    write(output, started=Owner.myself("").started - 1)
    with OutputLock(output, "mine", lease=LONG) as lock:
        assert Owner.from_json(storage.read_bytes(lock.path)).run == "mine"


@pytest.mark.parametrize("left", [{"machine": "another", "host": "elsewhere"}, {}, None])
def test_a_silent_owner_is_taken_over_after_a_lease(output, left):
    """Whether it is on another machine, here but halted, or cannot be read at all."""
    if left is None:
        storage.write_atomic(f"{output}/lock.json", b'{"token": "ab')
    else:
        write(output, **left)
    began = time.monotonic()
    with OutputLock(output, "mine", lease=LEASE) as lock:
        assert Owner.from_json(storage.read_bytes(lock.path)).run == "mine"
    assert time.monotonic() - began >= LEASE


def test_of_many_watchers_of_a_dead_owner_one_wins(output, brisk):
    write(output, started=Owner.myself("").started - 1)
    barrier, outcomes, over = threading.Barrier(6), [], threading.Event()

    def watch(number):
        barrier.wait()
        try:
            with OutputLock(output, str(number), lease=STEADY) as lock:
                outcomes.append("held")
                over.wait()
                lock.check()
        except RunInProgress:
            outcomes.append("refused")
            if outcomes.count("refused") == 5:
                over.set()

    threads = [threading.Thread(target=watch, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held"] + ["refused"] * 5
    assert os.listdir(output) == []


def test_an_owner_notices_that_its_lock_was_taken(output):
    told = threading.Event()
    with OutputLock(output, "mine", lease=LEASE, on_lost=told.set) as lock:
        # Between two beats, as one who takes it over writes.
        with folder_locked(lock.path):
            write(output, token="thief", run="thief")
        assert told.wait(60)
        with pytest.raises(LockLost, match="took over"):
            lock.check()
    assert Owner.from_json(storage.read_bytes(lock.path)).run == "thief"


def test_an_owner_notices_that_its_lock_is_gone(output):
    with OutputLock(output, "mine", lease=LEASE) as lock:
        with folder_locked(lock.path):
            storage.delete(lock.path)
        assert lock.lost.wait(60)
    assert os.listdir(output) == []


def test_a_halted_owner_loses_its_lock_and_notices_when_it_goes_on(output):
    process = holder(output, LEASE)
    try:
        # Not within a beat, in which it would keep others from the folder.
        with folder_locked(f"{output}/lock.json"):
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        with OutputLock(output, "mine", lease=LEASE) as lock:
            process.send_signal(signal.SIGCONT)
            owner = Owner.from_json(storage.read_bytes(lock.path))
            while Owner.from_json(storage.read_bytes(lock.path)).heartbeat < owner.heartbeat + 8:
                time.sleep(0.02)
            lock.check()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_block_s_own_error_comes_through(output):
    with pytest.raises(ZeroDivisionError), OutputLock(output, "mine", lease=LEASE):
        _ = 1 / 0
    assert not os.path.exists(output)


def test_folders_that_only_the_lock_made_go_with_it(tmp_path):
    with pytest.raises(InputError, match="no manifest"), OutputLock(f"{tmp_path}/a/b/new", "one"):
        raise InputError("There is no manifest.")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with OutputLock(f"{tmp_path}/mine", "one"):
        pass
    with OutputLock(f"{tmp_path}/a/new", "one"):
        (tmp_path / "a" / "new" / "run.json").write_text("{}")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "a",
        "a/new",
        "a/new/run.json",
        "mine",
    ]
