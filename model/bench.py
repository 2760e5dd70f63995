"""How fast the engine is: side by side with the plain loop and with the machine's own limits.

`python -m wallaroo.model.bench --model mid --json` runs where Ray is absent. Everything is measured in one
process, interleaved, and told as ratios and counts; seconds on a shared machine mean little.

Where the time of a step goes, and what was tried, stands in tests/benchmarks/README.md.
"""

import argparse
import gc
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from wallaroo.model.config import DecoderConfig, ModelConfig, Size, VisionConfig, VQConfig
from wallaroo.model.decoder import PACKS, Layer, packed
from wallaroo.model.engine import END_OF_LINE, Engine, EngineOptions, Request
from wallaroo.model.prompts import Prompt
from wallaroo.model.reference import Reference
from wallaroo.model.sampling import Sampling
from wallaroo.model.wallaroo import Wallaroo

PROMPT_TOKENS, NULL_TOKENS = 40, 24
SAMPLING = Sampling(cfg=3.0, temperature=1.0, top_k=100, top_p=1.0)
SYNCHRONISING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique")
"""Operators that make the host wait for the device; indexing by a mask is one too."""
FACTORIES = (
    "aten.empty",
    "aten.zeros",
    "aten.ones",
    "aten.full",
    "aten.new_",
    "aten.arange",
    "aten.scalar_tensor",
)
"""Operators that make a tensor from none."""

REPEATS = 16
"""Times that a step's products are made in one measurement."""

MODELS = {
    "tiny": ModelConfig(
        decoder=DecoderConfig(1100, 128, 384, 4, 4, 2, 1e-6, 1e4, (4, 6, 6)),
        vision=VisionConfig(4, 64, "silu", 128, 2, out_hidden_size=128, fullatt_block_indexes=(3,)),
        vq=VQConfig(channels=16, norm_groups=8, z_channels=32, codebook_size=512),
        name="tiny",
        sizes={"1.0": (128, 128)},
        token_ids={END_OF_LINE: 1000},
    ),
    "mid": ModelConfig(
        decoder=DecoderConfig(4096, 512, 1536, 8, 8, 2, 1e-6, 1e6, (8, 12, 12)),
        vision=VisionConfig(1, 32, "silu", 48, 2, out_hidden_size=512, fullatt_block_indexes=(0,)),
        vq=VQConfig(codebook_size=1024),
        name="mid",
        sizes={"1.0": (128, 128), "1.01": (256, 256)},
        token_ids={END_OF_LINE: 4010},
    ),
    "7b": ModelConfig(name="7b", token_ids={END_OF_LINE: 151669}),
}
"""Shapes that are measured; weights are random."""


@dataclass(frozen=True)
class Timed:
    """Median seconds of several rounds, and of the spread between them."""

    median: float
    best: float


def random_model(
    config: ModelConfig, tasks: tuple[str, ...], device: torch.device, dtype: torch.dtype
) -> Wallaroo:
    """A model whose weights are drawn with deviation 1/sqrt(fan-in); the image tokenizer is float32."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Wallaroo(config, tasks)
    model = model.to(dtype)
    if model.vq is not None:
        model.vq.float()
    model = model.to_empty(device=device)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.data.fill_(1.0)
    if model.visual is not None:
        visual = model.visual
        visual.rotary_pos_emb = type(visual.rotary_pos_emb)(visual.config).to(device)
    return model.requires_grad_(False)


def text_prompt(rng: np.random.Generator, tokens: int, vocabulary: int) -> Prompt:
    """A prompt of random ordinary tokens."""
    ids = rng.integers(0, min(vocabulary, 900), tokens).astype(np.int32)
    return Prompt(ids, np.tile(np.arange(tokens, dtype=np.int32), (3, 1)), tokens)


def text_requests(config: ModelConfig, count: int, sizes: Sequence[Size]) -> list[Request]:
    """Guided rows with prompts of their own and one null prompt a size, sizes taken in turn."""
    rng = np.random.default_rng(0)
    vocabulary = config.decoder.vocab_size
    nulls = {size: text_prompt(rng, NULL_TOKENS, vocabulary) for size in sizes}
    return [
        Request(
            key,
            text_prompt(rng, PROMPT_TOKENS, vocabulary),
            nulls[sizes[key % len(sizes)]],
            sizes[key % len(sizes)],
            key,
            SAMPLING,
        )
        for key in range(count)
    ]


def edit_requests(
    config: ModelConfig, count: int, size: Size, text: int = 60, seen: int = 8
) -> list[Request]:
    """Rows with sources of their own: a pixel block, `seen` x `seen` semantic tokens, `text` tokens.

    The null prompt, with a third of the text, is the same for all rows, since its picture is black.
    """
    rng = np.random.default_rng(0)
    rows, columns = size.grid
    line = np.arange(columns + 1)
    pixel = np.concatenate([1 + row * (columns + 1) + line[:columns] for row in range(rows)]).astype(np.int32)
    block = rows * (columns + 1) + 1

    def prompt(words: int) -> Prompt:
        tokens = block + seen * seen + 2 + words
        base = text_prompt(rng, tokens, config.decoder.vocab_size)
        return replace(base, semantic=(block + 1, block + 1 + seen * seen), pixel=pixel)

    null = prompt(text // 3)
    requests = []
    for key in range(count):
        semantic = rng.integers(0, 256, (28 * seen, 28 * seen, 3), dtype=np.uint8)
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        requests.append(Request(key, prompt(text), null, size, key, SAMPLING, semantic, pixels))
    return requests


def synchronise(device: torch.device) -> None:
    """Waits until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def interleaved(device: torch.device, rounds: int, **subjects: Callable[[], object]) -> dict[str, Timed]:
    """Times every subject once a round, in turn, after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds + 1):
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
    """The matrix products of one decode step of `rows` guided rows and nothing else, each with its own
    weights, so that they come from memory as they do in the step. ready: what a layer becomes, given how many
    inputs it will have; by default it stays what it is."""
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
    """The same REPEATS times: a step's products alone are too short to time."""

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


def minimal_flops(config: ModelConfig, requests: Iterable[Request]) -> dict[str, float]:
    """Multiplications and additions that guided rows cannot do without, by phase: in prefill every prompt
    once, in decode every fed token once a branch, attention over the keys that are there, and the head once
    a drawn token."""
    decoder = config.decoder
    width = decoder.num_attention_heads * decoder.head_dim
    linear = decoder.hidden_size * (width + 2 * decoder.num_key_value_heads * decoder.head_dim)
    linear += width * decoder.hidden_size + 3 * decoder.hidden_size * decoder.intermediate_size
    layers = decoder.num_hidden_layers

    def through(first: int, last: int) -> float:
        """Tokens at positions first to last - 1 through all layers."""
        keys = (first + 1 + last) * (last - first) / 2
        return layers * (2.0 * linear * (last - first) + 4.0 * width * keys)

    flops, prompts = {"prefill": 0.0, "decode": 0.0}, set()
    for request in requests:
        assert request.size is not None and request.null is not None
        rows, columns = request.size.grid
        fed = rows * columns - 1 + (rows - 1 if config.line_break else 0)
        for prompt in (request.prompt, request.null):
            length = len(prompt.ids)
            if prompt.ids.tobytes() not in prompts:
                prompts.add(prompt.ids.tobytes())
                flops["prefill"] += through(0, length)
            flops["decode"] += through(length, length + fed)
        head = 2 * decoder.hidden_size**2 + decoder.hidden_size * config.vq.codebook_size
        flops["decode"] += 2.0 * rows * columns * head
    return flops


class Operators(TorchDispatchMode):
    """Counts the operators that run, those of them that wait for the device, and those that make buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts["views" if func.is_view else "operators"] += 1
        name = str(func)
        masked = name.startswith("aten.index.") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        self.counts["synchronisations"] += masked or name.startswith(SYNCHRONISING)
        self.counts["buffers"] += name.startswith(FACTORIES)
        return func(*args, **(kwargs or {}))


def _packed_flops(x: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """Of a product by a packed matrix, by the shapes of its first argument and of its result."""
    return 2 * math.prod(x) * out_shape[-1]


def flops_of(work: Callable[[], object]) -> int:
    """Multiplications and additions in it."""
    formulas = {torch.ops.mkldnn._linear_pointwise: _packed_flops} if PACKS else {}
    with FlopCounterMode(display=False, custom_mapping=formulas) as flops:
        work()
    return flops.get_total_flops()


def counted(model: Wallaroo, requests: Sequence[Request], options: EngineOptions) -> dict[str, float]:
    """What serving `requests` took in work, whatever the clock says."""
    engine = Engine(model, "generate", options)
    flops = flops_of(lambda: list(engine.run(requests)))
    counts = engine.counts
    needed = sum(row_length(request) for request in requests) / len(requests)
    capacity = engine.groups[0].cache.capacity

    engine = Engine(model, "generate", options)
    for request in requests:
        engine.submit(request)
    engine.step()
    with Operators() as operators:
        for _ in range(8):
            engine.step()
    return {
        "flops_ratio": flops / sum(minimal_flops(model.config, requests).values()),
        "forwards_per_image": counts["forwards"] * engine.groups[0].rows / len(requests),
        "prefill_forwards": counts["prefill_forwards"],
        "slot_occupancy_full_batch": counts["row_steps"] / counts["slot_steps"],
        "padded_row_share": 1 - counts["row_steps"] / counts["slot_steps"],
        "operators_per_step": operators.counts["operators"] / 8,
        "synchronisations_per_step": operators.counts["synchronisations"] / 8,
        "allocations_per_step": operators.counts["buffers"] / 8,
        "kv_bytes_over_needed": capacity / needed,
    }


def row_length(request: Request) -> float:
    """Keys a sequence of this row ends with, the mean of its branches."""
    assert request.size is not None and request.null is not None
    rows, columns = request.size.grid
    return (len(request.prompt.ids) + len(request.null.ids)) / 2 + rows * columns + rows - 1


def occupancy(model: Wallaroo, sizes: Sequence[Size], rows: int = 200, slots: int = 16) -> float:
    """Mean share of slots in use from the first step to the last refill, rows of mixed sizes."""
    engine = Engine(model, "generate", EngineOptions(slots=slots, group_rows=slots, decode_vq=False))
    for request in text_requests(model.config, rows, sizes):
        engine.submit(request)
    used = total = 0.0
    while engine.waiting:
        engine.step()
        used, total = engine.counts["row_steps"], engine.counts["slot_steps"]
    return used / total


def step_bytes(model: Wallaroo, requests: Sequence[Request]) -> float:
    """Bytes that a decode step of guided rows has to read: weights once, and half-way through the pictures
    the keys and values of both branches."""
    decoder, item = model.config.decoder, model.dtype.itemsize
    _, head = model.image_parts("generate")
    weights = [*model.language_model.layers.parameters(), *head.parameters()]
    keys = 0.0
    for request in requests:
        assert request.null is not None
        keys += row_length(request) + (len(request.prompt.ids) + len(request.null.ids)) / 2
    cached = keys * 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
    return item * (sum(one.numel() for one in weights) + cached)


def vq_decode(model: Wallaroo, size: Size) -> Callable[[], None]:
    """The image tokenizer's part of one picture."""
    assert model.vq is not None
    vq, tokens = model.vq, torch.zeros((1, *size.grid), dtype=torch.int64, device=model.device)

    @torch.inference_mode()
    def run() -> None:
        vq.decode(tokens)

    return run


def bench(name: str, slots: int, rounds: int, device: torch.device, sides: Sequence[int]) -> dict[str, Any]:
    """Everything this module measures, for pictures of the given sides.

    decode_gemm_fraction is the time that the step's matrix products take by `F.linear`, over that of the
    step: above 1 where the engine's own products are faster by more than all else takes.
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
    """Time without prefix sharing over time with it, for edits at 256x256 with sources of their own.

    The image tokenizer has few channels: it encodes the sources on both sides, and its time is not meant.
    """
    config = replace(config, vq=replace(config.vq, channels=32))
    model = random_model(config, ("edit",), device, dtype)
    requests = edit_requests(config, slots, Size(256, 256))
    tokens: dict[bool, dict[Hashable, bytes]] = {}

    def serve(sharing: bool) -> None:
        options = EngineOptions(slots=slots, group_rows=slots, decode_vq=False, prefix_sharing=sharing)
        results = Engine(model, "edit", options).run(requests)
        tokens[sharing] = {result.key: result.tokens.tobytes() for result in results}

    timed = interleaved(device, rounds, shared=lambda: serve(True), alone=lambda: serve(False))
    assert tokens[True] == tokens[False], "sharing a prefix changed a picture"
    return timed["alone"].median / timed["shared"].median


def decode_steps(
    name: str, slots: int, steps: int, device: torch.device, side: int, graphs: bool = False
) -> None:
    """Prints a JSON line for each of several cache lengths: seconds of a decode step, of its matrix
    products alone, and the pictures a second that follow if all steps were like it.

    All rows have one prompt, as long as the cache shall be, so that no picture has to be drawn up to there.
    graphs: whether steps are recorded and replayed.
    """
    config, size = MODELS[name], Size(side, side)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = random_model(config, ("generate",), device, dtype)
    options = EngineOptions(slots=slots, group_rows=slots, decode_vq=False, capture=graphs)
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
    parser.add_argument("--slots", type=int, default=32, help="pictures decoded at once")
    parser.add_argument("--rounds", type=int, default=5, help="rounds to take the median of")
    parser.add_argument(
        "--side", type=int, action="append", help="side of the pictures in pixels; may be repeated"
    )
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="time so many decode steps alone, nothing else")
    parser.add_argument("--graphs", action="store_true", help="with --steps, on CUDA: as recorded graphs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    sides = options.side or {"tiny": [128], "mid": [128, 256], "7b": [512]}[options.model]
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
