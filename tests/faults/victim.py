"""A run in a process of its own that dies at a moment of its choosing, once; `test_kills` starts it."""

import fcntl
import functools
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import psutil

from tests.faults.test_poison import Sick
from wallaroo.actors.replica import Replica
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import list_done
from wallaroo.workflows.reports import summaries
from wallaroo.workflows.runs import driver as runs_driver
from wallaroo.workflows.runs import stages
from wallaroo.workflows.storage import files, local, s3

WRITE = stages.write


def kill(driver):
    """SIGKILL to a driver and all that it started, this process among them."""
    family = psutil.Process(driver).children(recursive=True)
    os.kill(driver, signal.SIGKILL)
    for one in family:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    os.kill(os.getpid(), signal.SIGKILL)


class DiesAtWork(Sick):
    """Ends its process with rows in its slots, or the node that it is on."""

    mark = Path()
    with_node = False

    def _turn(self, engine):
        step = engine.step

        def steps():
            found = step()
            if engine.counts["steps"] == 30 and not self.mark.exists():
                self.mark.touch()
                if self.with_node:
                    raylet = psutil.Process().parent()
                    assert raylet.name() == "raylet"
                    raylet.kill()
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        engine.step = steps
        super()._turn(engine)


def dying_write(row, mark, driver, least, output, retried, watch):
    """Kills everybody in the middle of writing a file, when so many are there."""
    # One after the other, or a file of another writer would appear when all are thought dead.
    with open(mark.with_suffix(".turn"), "wb") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if mark.exists():
            # Another writer kills us all; this one must not have its file done by then.
            time.sleep(600)
        if len(list_done(output)) >= least:

            def end(*_):
                mark.touch()
                kill(driver)

            local.sync = files.s3_client = s3.s3_client = end
        return WRITE(row, output, retried, watch)


def main(config_file, state, folder):
    config = pickle.loads(Path(config_file).read_bytes())
    mark = Path(folder) / state
    replica: type = Replica if config.retry_errors or state == "random" else Sick

    def die(*_):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    if state == "planning":
        put = storage.put_if_absent
        storage.put_if_absent = lambda path, data: die() if "/plan/part" in path else put(path, data)
    elif state in ("first", "writing", "retrying"):
        least = {"first": 0, "writing": 1, "retrying": 0}[state]
        runs_driver.write = functools.partial(dying_write, mark=mark, driver=os.getpid(), least=least)
    elif state == "summary":
        add = summaries.Summaries.add

        def dying_add(*rest):
            # The shard has its file; the summary that would say so is being written.
            summaries.WRITE_SHARDS, summaries.write_lines = 1, die
            add(*rest)

        summaries.Summaries.add = dying_add
    elif state == "success":
        marks = {"mark": Path(folder) / "replica", "with_node": not storage.is_s3(config.output)}
        replica = type("Dies", (DiesAtWork,), marks)
        runs_driver.finish = die
    summary = runs_driver.run(config, replica=replica)
    print(f"{summary.ok} ok of {summary.rows}", flush=True)


if __name__ == "__main__":
    from tests.faults import victim

    # Ray sends classes and functions by name, which must not be that of this script.
    victim.main(*sys.argv[1:])
    os._exit(0)
