"""What the engine would do on a GPU, counted: the bounds that the 7B keeps, and that waste is seen."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from wallaroo.jobs.cli import cli
from wallaroo.model.config import Size
from wallaroo.model.counts import Operators
from wallaroo.model.cuda.fake_runtime import missing
from wallaroo.model.dry_run import dry_run, measure, to_text
from wallaroo.model.engine.options import EngineOptions
from wallaroo.model.errors import InputError
from wallaroo.model.meter import Meter, lengths
from wallaroo.model.random_inputs import MODELS, random_model, text_requests
from wallaroo.model.roofline import GPUS, LAUNCH_SECONDS, Cost, find_gpu
from wallaroo.workflows.plans.plan import Plan, PlanPart
from wallaroo.workflows.reports.estimate import estimate
from wallaroo.workflows.settings import RunConfig

needs_compiler = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def seven_billion() -> dict:
    """Guided 512x512 pictures by the 7B on an H200, computed."""
    return dry_run(MODELS["7b"], find_gpu("H200"), 512, images=(1, 64, 128))


@needs_compiler
def test_the_7b_keeps_its_bounds(seven_billion: dict) -> None:
    report = seven_billion
    assert report["launches_per_step"] <= 300
    assert 0.95 <= report["kv_bytes_ratio"] <= 1.05
    assert 1 <= report["weight_bytes_ratio"] <= 1.01
    assert report["host_syncs"] == 0
    assert report["h2d_per_admission"] == 1
    assert report["prefill_tokens_per_forward"] >= 256
    predicted = report["predicted_images_per_second"]
    assert predicted["128"] >= 13
    assert predicted["64"] >= 11
    assert report["predicted_seconds_of_one_image"] <= 3.8


@needs_compiler
def test_each_figure_says_the_group_that_it_belongs_to(seven_billion: dict) -> None:
    """Rows of a group that are empty cost arithmetic, so small runs ask for small groups."""
    report = seven_billion
    assert report["predicted_with_group_rows"] == {"1": 1, "64": 64, "128": 128}
    assert report["group_rows_by_default"] == {"1": 128, "64": 128, "128": 128}
    asked, default = report["predicted_images_per_second"], report["predicted_images_per_second_by_default"]
    assert asked["64"] > 1.4 * default["64"] and asked["128"] == default["128"]
    text = to_text(report)
    words = (
        f"{asked['64']:.3g} images/s with --group-rows 64, {default['64']:.3g} in the default group of 128"
    )
    assert f"64 at once: {words} rows." in text
    assert "128 at once" not in text


@needs_compiler
def test_the_7b_is_not_faster_than_the_roofline(seven_billion: dict) -> None:
    """The floor of reading all weights in each step, and of all arithmetic at the rate that is assumed."""
    gpu = find_gpu("H200")
    steps = 32 * 33 - 1
    assert seven_billion["predicted_seconds_of_one_image"] > steps * 13.1e9 / gpu.bandwidth
    for count, rate in seven_billion["predicted_images_per_second"].items():
        assert rate < gpu.flops / 27.7e12, count
    assert "computed, not measured" in to_text(seven_billion)


@needs_compiler
def test_waste_is_seen() -> None:
    """torch's own attention over the whole capacity, without graphs."""
    meter, size = Meter(find_gpu("H200")), Size(128, 128)
    with meter.device:
        model = random_model(MODELS["tiny"], ("generate",), torch.device("cuda"), torch.bfloat16)
        ours = measure(meter, model, 4, size, group_rows=8, prompt_tokens=512)
        theirs = measure(
            meter, model, 4, size, group_rows=8, prompt_tokens=512, attention="sdpa", graphs=False
        )
    assert theirs["kv_bytes_ratio"] > 5 > 1.05 > ours["kv_bytes_ratio"]
    assert theirs["launches_per_step"] > 2 * ours["launches_per_step"]
    assert ours["host_operators_per_step"] == 1 and theirs["host_operators_per_step"] > 100
    assert theirs["step_milliseconds"] > ours["step_milliseconds"]


@needs_compiler
def test_work_is_that_of_the_shapes() -> None:
    """Weights, keys and arithmetic of a step, by hand."""
    meter, config = Meter(find_gpu("H200")), MODELS["tiny"]
    with meter.device:
        model = random_model(config, ("generate",), torch.device("cuda"), torch.bfloat16)
        options = EngineOptions(slots=4, group_rows=4, attention="triton", prefill_piece=16, prompt_tokens=64)
        engine = meter.start(model, "generate", options)
        for request in text_requests(config, 3, [Size(128, 128)]):
            engine.submit(request)
        for _ in range(4):
            step = meter.step()
        work = step.of("decode")
    # Three of four slots, prompts of 40 and 24 tokens, four tokens fed.
    assert lengths(engine.groups[0]) == [44, 44, 44, 0, 28, 28, 28, 0]
    decoder = config.decoder
    a_token = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim * 2
    assert step.needed == 3 * (44 + 28) * a_token
    assert work.keys == 3 * (43 + 27) * a_token, "a new token's key comes from its product"
    hidden, mlp, codes = decoder.hidden_size, decoder.intermediate_size, config.vq.codebook_size
    width = decoder.num_attention_heads * decoder.head_dim
    kv = decoder.num_key_value_heads * decoder.head_dim
    layer = hidden * (width + 2 * kv) + width * hidden + 3 * hidden * mlp
    products = 2 * (8 * (decoder.num_hidden_layers * layer + hidden * hidden) + 4 * hidden * codes)
    attention = decoder.num_hidden_layers * 4 * 3 * (44 + 28) * width
    assert work.flops == products + attention


def test_a_cost_takes_the_longer_of_memory_and_arithmetic() -> None:
    gpu = find_gpu("h200", bandwidth=2e12, flops=100e12)
    assert Cost(read=2e9, written=2e9, flops=1e9).seconds(gpu) == pytest.approx(2e-3 + LAUNCH_SECONDS)
    assert Cost(read=2e6, flops=1e12).seconds(gpu) == pytest.approx(1e-2 + LAUNCH_SECONDS)
    assert Cost(launches=3, flops=1e12, precision="tf32").seconds(gpu) == pytest.approx(
        2e-2 + 3 * LAUNCH_SECONDS
    )


def test_an_unknown_gpu_or_rate_is_named() -> None:
    with pytest.raises(InputError, match=r"the GPU is 'H20', .*H200.*did you mean"):
        find_gpu("H20")
    with pytest.raises(InputError, match="bandwidth is -1"):
        find_gpu("A100", bandwidth=-1)
    assert all(find_gpu(name).name == name for name in GPUS)


@needs_compiler
def test_the_command_prints_counts_and_what_it_assumes() -> None:
    command = ["bench", "engine", "--model", "tiny", "--device", "cuda", "--dry-run", "--gpu", "L40S"]
    command += ["--images", "2", "--images", "4", "--bandwidth", "0.5", "--json"]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    report = json.loads(result.output)
    assert report["gpu"] == "L40S" and "0.5 TB/s" in report["computed"]
    assert set(report["predicted_images_per_second"]) == {"2", "4"}
    keys = "launches_per_step kv_bytes_ratio weight_bytes_ratio host_syncs h2d_per_admission"
    assert set(keys.split()) | {"prefill_tokens_per_forward"} <= set(report)


def test_a_dry_run_of_a_cpu_is_refused() -> None:
    result = CliRunner().invoke(cli, ["bench", "engine", "--dry-run", "--device", "cpu"])
    assert result.exit_code != 0
    assert "give --device cuda" in str(result.exception or result.output)


def planned(**sizes: int) -> Plan:
    """A plan of one shard with so many rows by size, such as s96x64, and an error row."""
    rows = sum(sizes.values()) + 1
    by_name = {name.removeprefix("s"): count for name, count in sizes.items()}
    part = PlanPart(0, "part.parquet", 0, 0, rows, 0, 1, rows, 1, {"size": 1}, by_name, complete=True)
    return Plan((part,))


@needs_compiler
def test_an_estimate_computes_the_rate_of_a_gpu() -> None:
    plan, config = planned(s96x96=6, s96x64=2), RunConfig("prompts.jsonl", "")
    found = estimate(plan, config, None, "H100")
    assert found.rate is not None and found.seconds == pytest.approx(8 / found.rate)
    assert any("computed, not measured (H100: 3 TB/s" in line for line in found.lines())
    slower = estimate(plan, replace(config, no_cuda_graphs=True), None, "H100")
    assert slower.rate is not None and slower.rate < found.rate
    small = estimate(planned(s96x64=8), config, None, "H100")
    assert small.rate is not None and small.rate > found.rate
    assert "in groups of 128 rows, of which 8 are used: --group-rows 8 is faster)" in found.lines()[0]
    asked = estimate(plan, replace(config, group_rows=8), None, "H100")
    assert asked.rate is not None and asked.rate > found.rate
    assert asked.lines()[0].endswith("; in groups of 8 rows)")


def test_an_estimate_refuses_what_cannot_be_computed() -> None:
    plan, config = planned(s96x96=1), RunConfig("prompts.jsonl", "")
    with pytest.raises(InputError, match="--rate is 2 and --gpu is H100"):
        estimate(plan, config, "2", "H100")
    with pytest.raises(InputError, match=r"not for edit: give --rate"):
        estimate(plan, replace(config, task="edit"), None, "H100")
    with pytest.raises(InputError, match=r"the GPU is 'V100'"):
        estimate(plan, config, None, "V100")


def test_operators_within_others_are_counted() -> None:
    with torch.inference_mode():
        x = torch.zeros(4, 4)
        for work, name, count in (
            (lambda: x.to(torch.float64), "operators", 1),
            (lambda: x.to(torch.float32), "operators", 0),
            (lambda: x.reshape(16), "operators", 0),
            (lambda: x.t().reshape(16), "operators", 1),
            (lambda: x.to("meta"), "synchronisations", 1),
            (lambda: x.to("meta", non_blocking=True), "synchronisations", 0),
        ):
            with Operators() as seen:
                work()
            assert seen.counts[name] == count
