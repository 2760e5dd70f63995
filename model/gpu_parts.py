"""The checks that need a GPU, in parts that run in processes of their own. `model.gpu_check` starts them.

Without a GPU the parts run at toy size, so that tests cover them.
"""

import functools
import gc
import importlib.metadata
import platform
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from wallaroo.model import checkpoint
from wallaroo.model.config import ModelConfig
from wallaroo.model.cuda.operators import OPERATORS
from wallaroo.model.engine.engine import Engine
from wallaroo.model.engine.options import EngineOptions, gpu_options
from wallaroo.model.engine.requests import Request, Result
from wallaroo.model.random_inputs import MODELS, random_model, text_requests
from wallaroo.model.wallaroo import Wallaroo

TINY = Path(__file__).parent / "tiny"
"""The embedded checkpoint."""

NEAR = 0.03
"""Of the largest number of a tensor: how far a kernel's result may be from the plain code's in bfloat16."""

Report = Callable[[str, Any], None]
"""Takes a number's name and value; one whose name begins with `is_` is a check."""


@dataclass
class Bench:
    """Where and how long a part runs."""

    device: torch.device
    """The device."""
    model: str
    """Name of the shapes of the random model, a key of MODELS."""
    end: float
    """When the part must end, by `time.monotonic`."""
    report: Report
    """Takes name and value of each result."""

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights: bfloat16 on a GPU, else float32."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def config(self) -> ModelConfig:
        """Configuration of the random model."""
        return MODELS[self.model]

    @property
    def side(self) -> int:
        """Of the pictures whose speed is measured."""
        return 512 if self.model == "7b" else 64

    def left(self) -> float:
        """Seconds until the part's time is over."""
        return self.end - time.monotonic()

    def options(self, config: ModelConfig, task: str = "generate", **given: Any) -> EngineOptions:
        """The options of the engine that a run would choose.

        Args:
            config: Of the model.
            task: Of the rows.
            **given: Options to take instead.

        Returns:
            The options.
        """
        if not self.on_gpu:
            return EngineOptions(**({"group_rows": 4, "slots": 8} | given))
        gc.collect()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        return gpu_options(config, free, self.dtype.itemsize, task, **given)

    def random_model(self, config: ModelConfig, task: str = "generate") -> Wallaroo:
        """Makes a model with random weights; its image tokenizer is float32.

        Args:
            config: Of the model.
            task: That the model must do.

        Returns:
            The model, on the device.
        """
        return random_model(config, (task,), self.device, self.dtype)

    def synchronise(self) -> None:
        """Waits until the device is idle."""
        if self.on_gpu:
            torch.cuda.synchronize()


def serve(model: Wallaroo, requests: Iterable[Request], options: EngineOptions) -> dict[Hashable, Result]:
    """Serves requests by a new engine.

    Args:
        model: The model.
        requests: The requests.
        options: Of the engine.

    Returns:
        Key of each request -> result.
    """
    return {result.key: result for result in Engine(model, model.tasks[0], options).run(requests)}


def same(ours: dict[Hashable, Result], theirs: dict[Hashable, Result]) -> tuple[bool, bool]:
    """Whether all of our rows have the tokens and the pixels of theirs.

    Args:
        ours: Key -> result.
        theirs: Key -> result; may have more keys.

    Returns:
        Whether all tokens are equal, and whether all pixels are.
    """
    tokens = all(np.array_equal(result.tokens, theirs[key].tokens) for key, result in ours.items())
    pictures = ((result.pixels, theirs[key].pixels) for key, result in ours.items())
    pixels = all(one is not None and other is not None and (one == other).all() for one, other in pictures)
    return tokens, pixels


# -- machine ------------------------------------------------------------------------------------------


def machine(bench: Bench) -> None:
    """Describes the machine, and measures what a roofline assumes: copies, products and launches."""
    report = bench.report
    report("python", platform.python_version())
    for name in ("torch", "transformers", "triton", "flash-attn"):
        try:
            report(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            report(name, "absent")
    count = 1 << (30 if bench.on_gpu else 20)
    source = torch.zeros(count, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = timed(bench, lambda: target.copy_(source))
    report("copy_terabytes_per_second", 2 * count / seconds / 1e12)
    width = 8192 if bench.on_gpu else 128
    for rows in (width, 256, 16):
        x = torch.randn(rows, width, device=bench.device, dtype=bench.dtype)
        weights = [torch.randn(width, width, device=bench.device, dtype=bench.dtype) for _ in range(8)]
        seconds = timed(bench, functools.partial(_products, x, weights)) / len(weights)
        report(f"teraflops_of_a_product_of_{rows}_rows", 2 * rows * width * width / seconds / 1e12)
        report(f"terabytes_per_second_of_a_product_of_{rows}_rows", weights[0].nbytes / seconds / 1e12)
    if not bench.on_gpu:
        return
    report("device", torch.cuda.get_device_name())
    report("memory_gigabytes", torch.cuda.get_device_properties(0).total_memory / 1e9)
    small, graph = torch.zeros(1024, device=bench.device), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(1000):
            small += 1
    report("microseconds_a_launch_in_a_graph", timed(bench, graph.replay) * 1e3)
    report(
        "microseconds_an_operator_outside", timed(bench, lambda: [small.add_(1) for _ in range(1000)]) * 1e3
    )


def _products(x: Tensor, weights: Sequence[Tensor]) -> None:
    for weight in weights:
        x @ weight


def timed(bench: Bench, work: Callable[[], object], rounds: int = 5) -> float:
    """Times some work. Stops early when the part's time is over.

    Args:
        bench: Where the part runs.
        work: What is timed.
        rounds: How many rounds are measured, after one that is not.

    Returns:
        Seconds of the fastest round; infinite if none was measured.
    """
    best = float("inf")
    for number in range(rounds + 1):
        bench.synchronise()
        start = time.perf_counter()
        work()
        bench.synchronise()
        if number:
            best = min(best, time.perf_counter() - start)
        if bench.left() < 0:
            break
    return best


# -- kernels ------------------------------------------------------------------------------------------


class Compared(TorchDispatchMode):
    """Runs the plain code of each of our operators beside it, on copies, and keeps the largest distances.

    Attributes:
        distance: Name of the operator -> largest difference from the plain code's numbers, over the largest
            number of the tensor; for whole numbers the share that differs.
        calls: Name of the operator -> number of calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.distance: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name not in OPERATORS:
            return func(*args, **(kwargs or {}))
        copies = tree_map_only(Tensor, Tensor.clone, args)
        made = func(*args, **(kwargs or {}))
        OPERATORS[name].plain(*copies)
        for argument, ours, plain in zip(func._schema.arguments, args, copies, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.distance[name] = max(self.distance.get(name, 0.0), distance(ours, plain))
        self.calls[name] = self.calls.get(name, 0) + 1
        return made


def distance(ours: Tensor, plain: Tensor) -> float:
    """How far two tensors are from each other.

    Args:
        ours: `(n, ...)`.
        plain: The right values, of the same shape.

    Returns:
        The largest difference over the largest right value; infinite where only one of two is finite. For
        whole numbers the share that differs.
    """
    if not ours.is_floating_point():
        return float((ours != plain).float().mean())
    ours, plain = ours.double(), plain.double()
    if not torch.equal(ours.isfinite(), plain.isfinite()):
        return float("inf")
    ours, plain = ours.nan_to_num(), plain.nan_to_num()
    return float((ours - plain).abs().max() / plain.abs().max().clamp(min=1e-6))


def kernels(bench: Bench) -> None:
    """Each kernel beside the plain code that it equals, on what an engine gives it.

    Four layers of the model's shapes, prompts of odd lengths, empty slots, rows that end.
    """
    config = bench.config
    few = replace(config.decoder, num_hidden_layers=min(4, config.decoder.num_hidden_layers))
    config = replace(config, decoder=few, sizes={"1.0": (64, 64)})
    model = bench.random_model(config)
    options = EngineOptions(
        slots=8, group_rows=8, prefill_piece=16, prefill_pieces=8, attention="triton", graphs=False,
        prompt_tokens=64, decode_vq=False,
    )  # fmt: skip
    requests = text_requests(config, 11, config.size_list())
    start = time.perf_counter()
    serve(model, requests[:1], options)
    bench.report("seconds_to_compile", time.perf_counter() - start)
    assert model.vq is not None
    tokenizer, tokens = model.vq.for_cuda(kernels=True), torch.zeros(2, 16, 12, dtype=torch.int64)
    with Compared() as compared, torch.inference_mode():
        serve(model, requests, options)
        tokenizer.decode(tokens.to(bench.device))
    for name, far in sorted(compared.distance.items()):
        short = name.partition("::")[2]
        bench.report(f"distance_{short}", far)
        bench.report(f"is_near_{short}", far <= NEAR)
    bench.report("is_every_operator_used", set(compared.calls) == set(OPERATORS))


# -- equality -----------------------------------------------------------------------------------------


def equality(bench: Bench, model: Wallaroo, requests: list[Request], **given: Any) -> None:
    """Reports whether rows are the same with and without graphs, in any order of slots, and alone.

    Args:
        bench: Where the part runs.
        model: The model.
        requests: The rows.
        **given: Options of the engine.
    """
    report = bench.report
    options = bench.options(model.config, **given)
    report("backend", Engine(model, "generate", options).backend)
    start = time.perf_counter()
    expected = serve(model, requests, options)
    report("seconds_in_company", time.perf_counter() - start)
    different = len({result.tokens.tobytes() for result in expected.values()})
    report("is_every_row_different", different == len(requests))
    last = requests[-1]
    cases: dict[str, Callable[[], dict[Hashable, Result]]] = {
        "without_graphs": lambda: serve(model, requests, replace(options, graphs=False)),
        "in_other_slots": lambda: serve(model, requests[::-1], options),
        "alone": lambda: serve(model, [last], options),
        "again": lambda: serve(model, requests, options),
    }
    for name, case in cases.items():
        if bench.left() < 2 * (time.perf_counter() - start) / (1 + len(cases)):
            break
        tokens, pixels = same(case(), expected)
        report(f"is_same_tokens_{name}", tokens)
        report(f"is_same_pixels_{name}", pixels)
    for backend in ("sdpa", "flash", "triton"):
        if bench.left() < 10 or (backend == "flash" and not _installed("flash_attn")):
            continue
        found = serve(model, requests, replace(options, attention=backend))
        equal = [np.mean(found[key].tokens == expected[key].tokens) for key in expected]
        # Backends round differently, so this is a number and no check.
        report(f"share_of_equal_tokens_{backend}", float(np.mean(equal)))


def _installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, OSError):
        return False
    return True


def equal_tiny(bench: Bench) -> None:
    """The embedded checkpoint, rows of all its sizes."""
    model = checkpoint.load(TINY, "generate", bench.device, bench.dtype)
    sizes = model.config.size_list()
    count = 40 if bench.on_gpu else 3
    equality(bench, model, text_requests(model.config, count, sizes), prompt_tokens=64)


def equal_random(bench: Bench) -> None:
    """Random weights of the model's shapes."""
    side = 256 if bench.model == "7b" else 32
    config = replace(bench.config, sizes={"1.0": (side, side)})
    model = bench.random_model(config)
    given: dict[str, Any] = {"group_rows": 16, "slots": 16} if bench.on_gpu else {}
    count = 24 if bench.on_gpu else 6
    equality(bench, model, text_requests(config, count, config.size_list()), prompt_tokens=64, **given)
