"""A run on a cluster that grows for it, loses a node, and shrinks again; nobody but Ray adds a node."""

import re

from tests.autoscaling import GPU_NODES, ROWS, watched_run
from tests.e2e.test_generate import read_data


def test_a_cluster_from_no_gpu_to_four_and_back(tmp_path, s3):
    line = watched_run(tmp_path, f"{s3}/out")
    story = "\n".join(f"{seconds:6.1f} {words}" for seconds, words in line.events) + f"\n{line.said}"
    assert line.code == 0, story
    # All that the run can use at once, and a new one for the one that was killed; then none.
    assert line.most == GPU_NODES, story
    assert line.killed and len(line.after_kill) == 1, story
    assert len(line.nodes) == GPU_NODES + 1, story
    assert line.left == 0, story
    for node in line.nodes:
        assert node in line.autoscaler_log
    assert re.search(rf"waiting for (1 GPU|the model): [01] of {GPU_NODES} (GPUs )?up", line.said), story

    data = read_data(f"{s3}/out")
    ids = data.column("id").to_pylist()
    assert sorted(ids) == sorted(f"r{i}" for i in range(ROWS))
    assert set(data.column("status").to_pylist()) == {"ok"}
    assert len(set(data.column("replica").to_pylist())) >= GPU_NODES
    assert f"{ROWS} ok of {ROWS}" in line.said
