"""States and results of a training on a real S3 server."""

import contextlib
import shutil

import pytest
import torch

from tests.unit.training.cases import learning, losses_of
from wallaroo.model.checkpoint import TINY, load
from wallaroo.model.training.loop import optimise
from wallaroo.workflows import storage
from wallaroo.workflows.storage.checkpoints import fetch_folder
from wallaroo.workflows.training.states import Published, S3States


class Killed(Exception):
    pass


@pytest.mark.parametrize("muon", [False, True])
def test_a_killed_run_goes_on_from_s3_to_the_same_losses(tmp_path, s3, muon):
    def run(where, steps, after=lambda step: None):
        learner, made, said, report = learning(tmp_path / "local", steps=steps, muon=muon)
        files = S3States(f"{s3}/{where}/state")
        with contextlib.suppress(Killed):
            optimise(learner, made, report, after=after, files=files)
        return said, files

    def kill(step):
        if step == 5:
            raise Killed

    whole, _ = run("whole", 8)
    first, files = run("parts", 8, kill)
    assert sorted(files.whole()) == ["step-00000002", "step-00000004"] == files.folders()
    second, files = run("parts", 8)
    assert min(second) == 5
    assert losses_of(first | second) == losses_of(whole)
    assert sorted(files.whole()) == ["step-00000006", "step-00000008"] == files.folders()
    assert not (tmp_path / "local" / "state").exists()


def test_a_state_without_its_last_file_is_none(tmp_path, s3):
    learner, made, said, report = learning(tmp_path, steps=4)
    optimise(learner, made, report, files=S3States(f"{s3}/state"))
    storage.delete(f"{s3}/state/step-00000004/.metadata")
    learner, made, said, report = learning(tmp_path, steps=4)
    optimise(learner, made, report, files=S3States(f"{s3}/state"))
    assert list(said) == [3, 4]


def test_logs_and_checkpoints_are_published(tmp_path, s3):
    local, out = tmp_path / "local", f"{s3}/out"
    shutil.copytree(TINY, local / "checkpoint")
    published = Published(str(local), out)
    published.fetch_log()
    (local / "metrics.jsonl").write_text('{"step": 1}\n')
    for name in ("errors.jsonl", "samples.jsonl"):
        (local / name).write_text("{}\n")
    published.publish()
    (local / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    published.publish()
    published.publish_result("checkpoint")
    assert storage.read_bytes(f"{out}/metrics.jsonl") == (local / "metrics.jsonl").read_bytes()
    again = tmp_path / "again"
    again.mkdir()
    Published(str(again), out).fetch_log()
    for name in ("metrics.jsonl", "errors.jsonl", "samples.jsonl"):
        assert (again / name).read_bytes() == (local / name).read_bytes()
    fetched = load(fetch_folder(f"{out}/checkpoint", cache=tmp_path / "cache")).state_dict()
    assert all(torch.equal(tensor, fetched[name]) for name, tensor in load(TINY).state_dict().items())
