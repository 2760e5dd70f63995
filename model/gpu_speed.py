"""The parts of `model.gpu_check` that take time: pictures and edits a second, loading, and a profile."""

import functools
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wallaroo.model import checkpoint
from wallaroo.model.config import Size
from wallaroo.model.engine.engine import Engine
from wallaroo.model.engine.options import EngineOptions
from wallaroo.model.engine.requests import Request
from wallaroo.model.gpu_parts import TINY, Bench, timed
from wallaroo.model.random_inputs import edit_requests, text_requests
from wallaroo.model.vq import precision, to_uint8
from wallaroo.model.wallaroo import Wallaroo

PHASES = ("prefill", "admit", "decode", "results", "tokenizer")
"""What the engine calls its work in profiles."""

TOP_KERNELS = 25


def warm_engine(bench: Bench, model: Wallaroo, options: EngineOptions, requests: list[Request]) -> Engine:
    """Makes an engine that has compiled and recorded all it needs.

    Args:
        bench: Where the part runs.
        model: The model.
        options: Of the engine.
        requests: Rows like those that will be timed.

    Returns:
        The engine, without rows.
    """
    engine = Engine(model, model.tasks[0], options)
    small = Size(32, 32)
    if requests[0].pixels is None:
        few = text_requests(model.config, 2, [small])
    else:
        few = edit_requests(model.config, 2, small)
    list(engine.run(few))
    vq, size = engine.pictures.vq, requests[0].size
    if vq is not None and size is not None:
        tokens = torch.zeros(options.vq_slice, *size.grid, dtype=torch.int64, device=bench.device)
        with torch.inference_mode(), precision(options.vq_precision, bench.device):
            vq.decode(tokens)
    bench.synchronise()
    return engine


def rate(bench: Bench, engine: Engine, requests: list[Request], name: str) -> None:
    """Serves requests and reports pictures/s, and the seconds of a decode step.

    Args:
        bench: Where the part runs.
        engine: A warm engine.
        requests: The rows.
        name: First part of the names of the results.
    """
    steps: list[float] = []
    for request in requests:
        engine.submit(request)
    start = time.perf_counter()
    made = 0
    while engine.pending:
        before = time.perf_counter()
        made += len(engine.step())
        steps.append(time.perf_counter() - before)
        if bench.left() < 0:
            bench.report(f"{name}_ended_early_after_steps", len(steps))
            break
    bench.synchronise()
    seconds = time.perf_counter() - start
    # The host is at most a few rounds ahead, so the median round is a step of the device.
    bench.report(f"{name}_milliseconds_a_step", 1e3 * statistics.median(steps))
    if made == len(requests):
        bench.report(f"{name}_images_per_second", made / seconds)
        bench.report(f"{name}_seconds", seconds)


def speed(bench: Bench) -> None:
    """Reports pictures/s by number of pictures.

    One number is also measured in the small shape, and 64 also without graphs for some steps.
    """
    size = Size(bench.side, bench.side)
    start = time.perf_counter()
    model = bench.random_model(bench.config)
    bench.synchronise()
    bench.report("seconds_to_make_the_model", time.perf_counter() - start)
    counts: tuple[tuple[int, dict[str, Any]], ...] = (
        (128, {}),
        (64, {"group_rows": 64, "slots": 64}),
        (1, {"group_rows": 1, "slots": 1}),
        (16, {"group_rows": 16, "slots": 16}),
        (64, {}),
        (1, {}),
    )
    if not bench.on_gpu:
        counts = (4, {}), (1, {"group_rows": 1, "slots": 1})
    for count, given in counts:
        if bench.left() < 5 and bench.on_gpu:
            return
        requests = text_requests(bench.config, count, [size])
        options = bench.options(bench.config, prompt_tokens=128, **given)
        engine = warm_engine(bench, model, options, requests)
        rate(bench, engine, requests, f"{count}_pictures_in_groups_of_{options.group_rows}")
        if bench.on_gpu:
            bench.report(
                f"memory_of_groups_of_{options.group_rows}_gigabytes", torch.cuda.max_memory_allocated() / 1e9
            )
        del engine


def edit(bench: Bench) -> None:
    """Edits a second, sources of their own."""
    size = Size(bench.side, bench.side)
    model = bench.random_model(bench.config, "edit")
    count = 16 if bench.on_gpu else 2
    # In a picture of the vision tower's own size: 16 x 16 tokens, and 8 x 8 at toy size.
    requests = edit_requests(bench.config, count, size, seen=16 if bench.on_gpu else 2)
    given: dict[str, Any] = {"group_rows": 16, "slots": 16} if bench.on_gpu else {}
    options = bench.options(bench.config, "edit", prompt_tokens=128, **given)
    engine = warm_engine(bench, model, options, requests)
    rate(bench, engine, requests, f"{count}_edits")
    bench.report(
        "prefill_tokens_per_forward", engine.counts["prefill_tokens"] / engine.counts["prefill_forwards"]
    )


def tokenizer(bench: Bench) -> None:
    """Milliseconds of a decoded picture by pictures a slice and precision, and what the precision costs."""
    model = bench.random_model(bench.config)
    vq = model.vq
    assert vq is not None
    if bench.on_gpu:
        backend = Engine(model, "generate", bench.options(bench.config)).backend
        vq = vq.for_cuda(kernels=backend == "triton")
    grid = Size(bench.side, bench.side).grid
    generator = torch.Generator().manual_seed(0)
    codes = bench.config.vq.codebook_size

    def decoded(tokens: Tensor, kind: str) -> Tensor:
        with torch.inference_mode(), precision(kind, bench.device):
            return vq.decode(tokens)

    for count in (1, 4, 8):
        tokens = torch.randint(codes, (count, *grid), generator=generator).to(bench.device)
        for kind in ("tf32", "float32"):
            if bench.left() < 0:
                return
            seconds = timed(bench, functools.partial(decoded, tokens, kind), 3)
            bench.report(f"milliseconds_a_picture_in_slices_of_{count}_{kind}", 1e3 * seconds / count)
        exact, fast = (to_uint8(decoded(tokens, kind)).double() for kind in ("float32", "tf32"))
        error = float((exact - fast).square().mean())
        bench.report(
            f"psnr_of_tf32_in_slices_of_{count}",
            min(99.0, 10 * torch.log10(torch.tensor(255**2 / max(error, 1e-9))).item()),
        )


def loading(bench: Bench) -> None:
    """Bytes a second from files to the device: layers of the model's shapes, saved before."""
    layers = 6 if bench.on_gpu else 1
    config = replace(
        bench.config, decoder=replace(bench.config.decoder, num_hidden_layers=layers), tasks=("generate",)
    )
    # The tokenizer is that of the embedded checkpoint, and so are the ids of its control tokens.
    text, ids = (TINY / "tokenizer.json").read_text(), checkpoint.load_config(TINY).token_ids
    config = replace(config, token_ids=ids)
    model = bench.random_model(config)
    with tempfile.TemporaryDirectory() as folder:
        places = checkpoint.disk_tensors(model.to("cpu"))
        checkpoint.save(places, config, text, Path(folder, "model"))
        count = sum(tensor.nbytes for tensor in places.values())
        for name in ("first", "again"):
            start = time.perf_counter()
            checkpoint.load(Path(folder, "model"), "generate", bench.device, bench.dtype)
            bench.synchronise()
            seconds = time.perf_counter() - start
            bench.report(f"gigabytes_per_second_{name}", count / seconds / 1e9)
            if bench.left() < 2 * seconds:
                break
        bench.report("gigabytes", count / 1e9)


@contextmanager
def _profiled(bench: Bench) -> Iterator[Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        yield profile
        bench.synchronise()


def profile(bench: Bench) -> None:
    """Milliseconds by phase and by kernel, while rows come in, decode and end.

    Once with graphs and once without, where the device's time is known by phase too.
    """
    size = Size(bench.side, bench.side)
    model = bench.random_model(bench.config)
    count = 64 if bench.on_gpu else 4
    requests = text_requests(bench.config, 2 * count, [size])
    given: dict[str, Any] = {"group_rows": count, "slots": count}
    for graphs in (True, False):
        if bench.left() < 10 and bench.on_gpu:
            return
        name = "with_graphs" if graphs else "without_graphs"
        options = bench.options(bench.config, prompt_tokens=128, graphs=graphs, **given)
        engine = warm_engine(bench, model, options, requests)
        for request in requests[:count]:
            engine.submit(request)
        with _profiled(bench) as coming:
            engine.step()
        report(bench, coming, f"{name}_coming", 1)
        for _ in range(5):
            engine.step()
        with _profiled(bench) as stepping:
            for _ in range(10):
                engine.step()
        report(bench, stepping, f"{name}_step", 10)
        if bench.left() < 15 and bench.on_gpu:
            return
        while engine.pending:
            if any(row and row.step >= row.steps - 2 for group in engine.groups for row in group.members):
                break
            engine.step()
        for request in requests[count : count + 4]:
            engine.submit(request)
        with _profiled(bench) as ending:
            for _ in range(6):
                engine.step()
        report(bench, ending, f"{name}_ending", 1)


def report(bench: Bench, profile: Any, name: str, times: int) -> None:
    """Reports milliseconds of a round by phase, on host and device, and by kernel.

    Args:
        bench: Where the part runs.
        profile: Of `torch.profiler`.
        name: First part of the names of the results.
        times: Rounds in the profile.
    """
    events = profile.key_averages()
    phases = {event.key: event for event in events if event.key in PHASES}
    by_phase = {
        phase: {
            "host_milliseconds": event.cpu_time_total / 1e3 / times,
            "device_milliseconds": event.device_time_total / 1e3 / times,
        }
        for phase, event in phases.items()
    }
    bench.report(f"{name}_by_phase", by_phase)
    spent = [event for event in events if event.self_device_time_total > 0 and event.key not in PHASES]
    if not bench.on_gpu:
        spent = [event for event in events if event.key not in PHASES]

    def milliseconds(event: Any) -> float:
        used = event.self_device_time_total if bench.on_gpu else event.self_cpu_time_total
        return float(used) / 1e3 / times

    spent = sorted(spent, key=milliseconds, reverse=True)
    bench.report(f"{name}_milliseconds", sum(milliseconds(event) for event in spent))
    bench.report(f"{name}_kernels", sum(event.count for event in spent) / times)
    top = {event.key[:80]: [milliseconds(event), event.count / times] for event in spent[:TOP_KERNELS]}
    bench.report(f"{name}_by_kernel", top)
