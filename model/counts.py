"""Counts the work of the engine without a clock, beside the least work that its rows need."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from wallaroo.model.config import ModelConfig
from wallaroo.model.decoder import PACKS
from wallaroo.model.engine.engine import Engine
from wallaroo.model.engine.options import EngineOptions
from wallaroo.model.engine.requests import Request
from wallaroo.model.wallaroo import Wallaroo

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
"""Operators that allocate a tensor."""


def minimal_flops(config: ModelConfig, requests: Iterable[Request]) -> dict[str, float]:
    """Multiplications and additions that guided rows cannot do without.

    In prefill every prompt counts once; in decode every fed token once a branch, attention over the keys that
    exist, and the head once a drawn token.

    Args:
        config: Of the model.
        requests: The rows.

    Returns:
        Phase -> count.
    """
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
        # Under inference mode operators such as `to` and `reshape` come whole, and may be a copy or nothing.
        with self:
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        name = str(func)
        is_view = func.is_view or name.startswith("aten._unsafe_view")
        self.counts["views" if is_view else "operators"] += 1
        masked = name.startswith("aten.index.") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        waits = masked or name.startswith(SYNCHRONISING) or _copies_and_waits(func, args, kwargs or {})
        self.counts["synchronisations"] += waits
        self.counts["buffers"] += name.startswith(FACTORIES)
        return func(*args, **(kwargs or {}))


def _copies_and_waits(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator is a copy between host and device that the host waits for."""
    name = func._schema.name
    if name == "aten::_to_copy":
        other = torch.device(kwargs.get("device") or args[0].device)
        return other.type != args[0].device.type and not kwargs.get("non_blocking")
    if name == "aten::copy_":
        waits_not = args[2] if len(args) > 2 else kwargs.get("non_blocking")
        return args[0].device.type != args[1].device.type and not waits_not
    return False


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
    """Counts the work of serving requests. No clock is used.

    Args:
        model: The model.
        requests: Guided rows of `generate`.
        options: Of the engine.

    Returns:
        Name -> number, such as forwards per image, and operators per decode step.
    """
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


def step_bytes(model: Wallaroo, requests: Sequence[Request]) -> float:
    """Bytes that a decode step of guided rows has to read.

    Args:
        model: Its weights are read once.
        requests: The rows; keys and values of both branches count half-way through the pictures.

    Returns:
        Bytes.
    """
    decoder, item = model.config.decoder, model.dtype.itemsize
    _, head = model.image_parts("generate")
    weights = [*model.language_model.layers.parameters(), *head.parameters()]
    keys = 0.0
    for request in requests:
        assert request.null is not None
        keys += row_length(request) + (len(request.prompt.ids) + len(request.null.ids)) / 2
    cached = keys * 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
    return item * (sum(one.numel() for one in weights) + cached)
