"""What a run will take, from a look that measured it, and beside it what it took."""

import json
import re

import pytest

from wallaroo.model.errors import InputError
from wallaroo.workflows.outputs.run_log import read_records
from wallaroo.workflows.reports.estimate import compare, estimate
from wallaroo.workflows.runs.driver import run
from wallaroo.workflows.runs.setup import plan
from wallaroo.workflows.settings import RunConfig

ROWS = 24


def test_a_look_tells_what_the_whole_run_takes(local_ray, tmp_path):
    rows = [{"prompt": f"a red circle {i}", "width": 96, "height": 64} for i in range(ROWS)]
    manifest = tmp_path / "prompts.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    look, output = str(tmp_path / "look"), str(tmp_path / "out")
    config = RunConfig(str(manifest), output, price_per_hour=7200.0)

    found = estimate(plan(RunConfig(str(manifest), "", replicas=(1, 2))), config, "4")
    assert (found.rows, found.replicas, found.rate, found.seconds) == (ROWS, 1, 4, ROWS / 4)
    assert found.cost == pytest.approx(2 * ROWS / 4)
    assert found.output_bytes == ROWS * 96 * 64 * 3
    assert compare(look) == []

    run(RunConfig(str(manifest), look, limit=8))
    (record,) = read_records(look)[0]
    found = estimate(plan(config), config, look)
    assert found.rate == pytest.approx(8 / record.replica_seconds)
    assert found.bytes_from == look and found.output_bytes > 0
    assert any(f"as in {look}" in line for line in found.lines())

    run(config)
    (record,) = read_records(output)[0]
    lines = {line["name"]: line for line in compare(output)}
    assert lines["cost"]["happened"] == f"{2 * record.replica_seconds:,.2f}"
    assert lines["rows/s of a replica"]["estimated"] == f"{found.rate:.3g}"
    assert re.search(
        r"<h2>Estimate</h2>.*replica-hours", (tmp_path / "out" / "report.html").read_text(), re.S
    )


def test_memory_counts_what_sources_add_to_prompts():
    from wallaroo.workflows.plans.plan import Plan

    def found(**options):
        config = RunConfig("m.jsonl", "", "understand", device="cpu", slots=4, max_new_tokens=64, **options)
        return estimate(Plan(), config, None)

    # 512 bytes of keys and values a token and layer of the embedded checkpoint, in float32.
    own, wide = found(), found(max_pixels=784 * 1000)
    assert (own.source_tokens, wide.source_tokens) == (56, 1000)
    assert wide.kv_bytes - own.kv_bytes == own.kv_bytes // (128 + 56 + 64) * (1000 - 56)
    assert "keys and values at prompts of 128 tokens and sources of 1,000" in "\n".join(wide.lines())


@pytest.mark.parametrize("rate", ["0", "-1", "inf", "nan", "nowhere"])
def test_a_rate_that_is_none(rate, tmp_path, monkeypatch):
    from wallaroo.workflows.plans.plan import Plan

    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rate):
        estimate(Plan(), RunConfig("m.jsonl", ""), rate)
