"""The speed of the engine, beside the plain loop and the limits of the machine.

`python -m wallaroo.model.bench --model mid --json` runs where Ray is absent. Everything is measured in one
process, interleaved, and reported as ratios and counts, since seconds vary on a shared machine.

tests/benchmarks/README.md shows where the time of a step goes, and what was tried.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from wallaroo.model.config import ModelConfig, Size
from wallaroo.model.counts import counted, flops_of, minimal_flops, step_bytes
from wallaroo.model.decoder import Layer, packed
from wallaroo.model.engine.engine import Engine
from wallaroo.model.engine.options import EngineOptions
from wallaroo.model.engine.requests import Request
from wallaroo.model.random_inputs import (
    MODELS,
    PROMPT_TOKENS,
    SAMPLING,
    edit_requests,
    random_model,
    text_prompt,
    text_requests,
)
from wallaroo.model.reference import Reference
from wallaroo.model.roofline import GPUS
from wallaroo.model.wallaroo import Wallaroo

REPEATS = 16
"""Times that a step's products are made in one measurement."""


@dataclass(frozen=True)
class Timed:
    """Seconds of several rounds."""

    median: float
    """Of the median round."""
    best: float
    """Of the fastest round."""


def synchronise(device: torch.device) -> None:
    """Waits until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def interleaved(
    device: torch.device, rounds: int, what: str = "", **subjects: Callable[[], object]
) -> dict[str, Timed]:
    """Times every subject once a round, in turn, after one unmeasured round.

    Args:
        device: The device that the subjects use.
        rounds: How many rounds are measured.
        what: Printed on stderr with the number of each round; nothing is printed if empty.
        **subjects: Name -> what is timed.

    Returns:
        Name -> times.
    """
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    begin = time.perf_counter()
    for number in range(rounds + 1):
        if what:
            done = f", {time.perf_counter() - begin:.0f} s so far" if number else ", not measured"
            _tell(f"{what}: round {number} of {rounds}{done}")
        for name, subject in subjects.items():
            gc.collect()
            synchronise(device)
            start = time.perf_counter()
            subject()
            synchronise(device)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timed(statistics.median(times), min(times)) for name, times in seconds.items()}


def decode_products(
    model: Wallaroo, task: str, rows: int, ready: Callable[[nn.Linear, int], nn.Module] | None = None
) -> Callable[[], None]:
    """Makes the matrix products of one decode step of guided rows, and nothing else.

    Each has its own weights, so that they are read from memory as in the step.

    Args:
        model: The model.
        task: Of the rows.
        rows: How many rows; each is two sequences.
        ready: Replaces a layer, given the number of its inputs; by default layers stay as they are.

    Returns:
        A function that computes the products.
    """
    _, head = model.image_parts(task)
    products: list[tuple[nn.Module, Tensor]] = []

    def add(linear: nn.Module, count: int = 2 * rows) -> None:
        assert isinstance(linear, nn.Linear)
        x = torch.randn(count, linear.in_features, device=model.device, dtype=model.dtype)
        products.append((ready(linear, count) if ready else linear, x))

    for layer in cast(list[Layer], list(model.language_model.layers)):
        add(layer.self_attn.qkv_proj)
        add(layer.self_attn.o_proj)
        add(layer.mlp.gate_up_proj)
        add(layer.mlp.down_proj)
    add(head[0])
    add(head[2], rows)

    @torch.inference_mode()
    def run() -> None:
        for product, x in products:
            product(x)

    return run


def repeated(products: Callable[[], None]) -> Callable[[], None]:
    """Repeats work REPEATS times: a step's products alone are too short to time."""

    def run() -> None:
        for _ in range(REPEATS):
            products()

    return run


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy, reads and writes counted, the best of five."""
    source = torch.empty(1 << 26, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    timed = interleaved(device, 5, copy=lambda: target.copy_(source))
    return 2 * source.numel() * 4 / timed["copy"].best


def occupancy(model: Wallaroo, sizes: Sequence[Size], rows: int = 200, slots: int = 16) -> float:
    """Mean share of slots in use from the first step to the last refill, with rows of mixed sizes.

    Args:
        model: The model.
        sizes: Sizes of the pictures, taken in turn.
        rows: How many rows.
        slots: Rows that decode at once.

    Returns:
        A share from 0 to 1.
    """
    engine = Engine(model, "generate", EngineOptions(slots=slots, group_rows=slots, decode_vq=False))
    for request in text_requests(model.config, rows, sizes):
        engine.submit(request)
    used = total = 0.0
    while engine.waiting:
        engine.step()
        used, total = engine.counts["row_steps"], engine.counts["slot_steps"]
    return used / total


def vq_decode(model: Wallaroo, size: Size) -> Callable[[], None]:
    """Makes the image tokenizer's part of one picture.

    Args:
        model: The model.
        size: Of the picture, in pixels.

    Returns:
        A function that decodes the picture.
    """
    assert model.vq is not None
    vq, tokens = model.vq, torch.zeros((1, *size.grid), dtype=torch.int64, device=model.device)

    @torch.inference_mode()
    def run() -> None:
        vq.decode(tokens)

    return run


def bench(name: str, slots: int, rounds: int, device: torch.device, sides: Sequence[int]) -> dict[str, Any]:
    """Measures the engine for pictures of the given sides.

    Args:
        name: Of the model, a key of MODELS.
        slots: Rows that decode at once.
        rounds: How many rounds are measured.
        device: The device.
        sides: Sides of the square pictures, in pixels.

    Returns:
        Name -> number. decode_gemm_fraction is the time that the step's matrix products take by `F.linear`,
        over that of the step: above 1 where the engine's own products are faster by more than all else takes.
        decode_own_gemm_fraction is the share of the step that its own products take. floor_fraction is, by
        phase, the least time over that taken: for all arithmetic at the rate of the faster of these products,
        or if that takes longer, for reading weights, keys and values at the rate of a copy.
    """
    config = MODELS[name]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = random_model(config, ("generate",), device, dtype)
    options = EngineOptions(slots=slots, group_rows=slots, decode_vq=False)
    smaller = replace(options, slots=max(1, slots // 4), group_rows=max(1, slots // 4))
    reference, copied = Reference(model), copy_rate(device)
    report: dict[str, Any] = {
        "model": name,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "slots": slots,
        "rounds": rounds,
        "sizes": {},
    }
    for side in sides:
        size = Size(side, side)
        requests = text_requests(config, slots, [size])

        def engine(requests: list[Request] = requests) -> None:
            list(Engine(model, "generate", options).run(requests))

        def same_batch(requests: list[Request] = requests) -> None:
            reference.images("generate", requests, decode_vq=False)

        def one(requests: list[Request] = requests) -> None:
            reference.images("generate", requests[:1], decode_vq=False)

        def few(requests: list[Request] = requests) -> None:
            list(Engine(model, "generate", smaller).run(requests[: smaller.slots]))

        products, double = (decode_products(model, "generate", count) for count in (slots, 2 * slots))
        own = decode_products(model, "generate", slots, packed)
        steps = size.grid[0] * (size.grid[1] + 1) - 1
        vq = vq_decode(model, size)

        decode_seconds: list[float] = []
        prefill_seconds: list[float] = []

        def decode(
            requests: list[Request] = requests,
            seconds: tuple[list[float], list[float]] = (decode_seconds, prefill_seconds),
            steps: int = steps,
        ) -> None:
            running = Engine(model, "generate", options)
            for request in requests:
                running.submit(request)
            start = time.perf_counter()
            # The prompts, and a step with the tokens that follow them.
            running.step()
            synchronise(device)
            first = time.perf_counter()
            for _ in range(steps - 2):
                running.step()
            synchronise(device)
            seconds[0].append((time.perf_counter() - first) / (steps - 2))
            seconds[1].append(first - start - seconds[0][-1])

        timed = interleaved(
            device,
            rounds,
            f"{name}, {side}x{side}",
            engine=engine,
            few=few,
            same=same_batch,
            one=one,
            gemms=repeated(products),
            gemms_own=repeated(own),
            gemms_double=repeated(double),
            decode=decode,
            vq=vq,
        )
        line, fused = size.grid[1] + 1, timed["gemms_double"].median / timed["gemms"].median
        step = statistics.median(decode_seconds[1:])
        products_once = min(timed["gemms"].median, timed["gemms_own"].median) / REPEATS
        rate, least = flops_of(products) / products_once, minimal_flops(config, requests)
        read = steps * step_bytes(model, requests) / copied
        report["sizes"][f"{side}x{side}"] = {
            "images_per_second": slots / timed["engine"].median,
            f"images_per_second_at_{smaller.slots}_slots": smaller.slots / timed["few"].median,
            "speedup_vs_reference_b1": timed["one"].median * slots / timed["engine"].median,
            "speedup_vs_reference_same_batch": timed["same"].median / timed["engine"].median,
            "decode_gemm_fraction": timed["gemms"].median / REPEATS / step,
            "decode_own_gemm_fraction": timed["gemms_own"].median / REPEATS / step,
            "floor_fraction": {
                "prefill": least["prefill"] / rate / statistics.median(prefill_seconds[1:]),
                "decode": max(least["decode"] / rate, read) / (step * steps),
                "vq": flops_of(vq) / rate / timed["vq"].median,
            },
            "line_end_fusion_bound": line / (line - 2 + fused),
            "decode_share": step * steps / timed["engine"].median,
        } | counted(model, requests, options)
    _tell(f"{name}: occupancy of slots")
    report["slot_occupancy"] = occupancy(model, config.size_list())
    report["copy_bytes_per_second"] = copied
    if name == "mid":
        report["edit_prefix_speedup"] = edit_prefix_speedup(config, slots, rounds, device, dtype)
    worst = list(report["sizes"].values())
    for key in ("speedup_vs_reference_b1", "speedup_vs_reference_same_batch", "decode_gemm_fraction"):
        report[key] = min(values[key] for values in worst)
    report["flops_ratio"] = max(values["flops_ratio"] for values in worst)
    report["forwards_per_image"] = {
        key: values["forwards_per_image"] for key, values in report["sizes"].items()
    }
    return report


def edit_prefix_speedup(
    config: ModelConfig, slots: int, rounds: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Time without prefix sharing over time with it, for edits at 256x256, each with another source.

    The image tokenizer has few channels: it encodes the sources on both sides, and its time is not meant.

    Args:
        config: Of the model.
        slots: Rows that decode at once.
        rounds: How many rounds are measured.
        device: The device.
        dtype: Of the weights.

    Returns:
        A ratio; above 1 if sharing is faster.
    """
    config = replace(config, vq=replace(config.vq, channels=32))
    model = random_model(config, ("edit",), device, dtype)
    requests = edit_requests(config, slots, Size(256, 256))
    tokens: dict[bool, dict[Hashable, bytes]] = {}

    def serve(sharing: bool) -> None:
        options = EngineOptions(slots=slots, group_rows=slots, decode_vq=False, prefix_sharing=sharing)
        results = Engine(model, "edit", options).run(requests)
        tokens[sharing] = {result.key: result.tokens.tobytes() for result in results}

    timed = interleaved(device, rounds, "edits", shared=lambda: serve(True), alone=lambda: serve(False))
    assert tokens[True] == tokens[False], "sharing a prefix changed an image"
    return timed["alone"].median / timed["shared"].median


def decode_steps(
    name: str, slots: int, steps: int, device: torch.device, side: int, graphs: bool = False
) -> None:
    """Prints a JSON line for each of several cache lengths.

    A line has the seconds of a decode step, those of its matrix products alone, and the pictures/s if all
    steps were alike. All rows have one prompt as long as the cache shall be, so no picture is drawn up to
    there.

    Args:
        name: Of the model, a key of MODELS.
        slots: Rows that decode at once.
        steps: How many steps are measured.
        device: The device.
        side: Side of the square pictures, in pixels.
        graphs: Whether steps are recorded and replayed.
    """
    config, size = MODELS[name], Size(side, side)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = random_model(config, ("generate",), device, dtype)
    options = EngineOptions(slots=slots, group_rows=slots, decode_vq=False, graphs=graphs)
    drawn = size.grid[0] * (size.grid[1] + 1) - 1
    products = interleaved(device, 5, products=decode_products(model, "generate", slots))["products"].median
    rng = np.random.default_rng(0)
    for share in (0.0, 0.5, 1.0):
        length = PROMPT_TOKENS + int(share * drawn)
        prompts = [text_prompt(rng, length, config.decoder.vocab_size) for _ in range(2)]
        running = Engine(model, "generate", options)
        for key in range(slots):
            running.submit(Request(key, prompts[0], prompts[1], size, key, SAMPLING))
        for _ in range(3):
            running.step()
        synchronise(device)
        start = time.perf_counter()
        for _ in range(steps):
            running.step()
        synchronise(device)
        step = (time.perf_counter() - start) / steps
        values = {
            "model": name,
            "slots": slots,
            "graphs": graphs,
            "keys": length,
            "seconds_per_step": step,
            "seconds_of_products": products,
            "images_per_second": slots / (step * drawn),
        }
        print(json.dumps(values), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a report, or with `--json` one JSON object; with `--steps` a JSON line a cache length."""
    parser = argparse.ArgumentParser(
        prog="python -m wallaroo.model.bench", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="mid", help="shapes to measure")
    parser.add_argument("--slots", type=int, default=32, help="images decoded at once")
    parser.add_argument("--rounds", type=int, default=5, help="rounds to take the median of")
    parser.add_argument(
        "--side", type=int, action="append", help="side of the images in pixels; may be repeated"
    )
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="time so many decode steps alone, nothing else")
    parser.add_argument("--graphs", action="store_true", help="with --steps, on CUDA: as recorded graphs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--dry-run", action="store_true", help="count without a GPU what --device cuda would do, in its times"
    )
    parser.add_argument(
        "--images",
        type=int,
        action="append",
        help="of --dry-run: images asked for at once; may be repeated",
    )
    parser.add_argument("--gpu", default="H200", help=f"of --dry-run: {', '.join(GPUS)} (default H200)")
    parser.add_argument("--bandwidth", type=float, help="of --dry-run: TB/s that the GPU's memory reaches")
    parser.add_argument("--flops", type=float, help="of --dry-run: 16-bit TFLOP/s that the GPU reaches")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    sides = options.side or {"tiny": [128], "mid": [128, 256], "7b": [512]}[options.model]
    if options.dry_run:
        # Here, not above: it needs much of torch that nothing else does.
        from wallaroo.model.dry_run import print_dry_run

        print_dry_run(options, sides)
        return
    if options.steps:
        for side in sides:
            device = torch.device(options.device)
            decode_steps(options.model, options.slots, options.steps, device, side, options.graphs)
        return
    report = bench(options.model, options.slots, options.rounds, torch.device(options.device), sides)
    if options.json:
        print(json.dumps(report))
        return
    for key, value in report.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, inner in value.items():
                print(f"  {name}: {_shown(inner)}")
        else:
            print(f"{key}: {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
