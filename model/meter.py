"""Counts what an engine does on a CUDA device without a GPU, round by round and operator by operator.

Knows nothing of what is asked of the engine.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from wallaroo.model.cuda.costs import COSTS
from wallaroo.model.cuda.fake import FakeCuda, Operator, Seen
from wallaroo.model.engine.engine import Engine
from wallaroo.model.engine.options import EngineOptions
from wallaroo.model.roofline import Cost, Gpu, Work
from wallaroo.model.wallaroo import Wallaroo

LAUNCHES = {
    "aten::native_group_norm": 3,
    "aten::sort": 4,
    "aten::topk": 4,
    "aten::cumsum": 2,
    "aten::scaled_dot_product_attention": 2,
}
"""Operator -> kernels that torch starts for it, if more than one."""

GATHERS = ("aten::index", "aten::index_select", "aten::embedding", "aten::gather")
"""Operators that read of their first argument what they give back."""

SCATTERS = ("aten::index_put_", "aten::_index_put_impl_", "aten::scatter_", "aten::index_copy_")
"""Operators that write of their first argument what they are given."""

OVERWRITES = ("aten::copy_", "aten::fill_", "aten::zero_", "aten::normal_", "aten::uniform_")
"""Operators that do not read what they write to."""


@dataclass
class Counted:
    """What one call of `Engine.step` took."""

    work: dict[str, Work] = field(default_factory=dict)
    """By phase, the innermost `record_function` of the engine."""
    seen: dict[str, Seen] = field(default_factory=dict)
    """What happened, by phase."""
    needed: float = 0
    """Bytes of keys and values of the sequences in slots."""

    def of(self, *phases: str) -> Work:
        """The work of some phases together, of all where none is named."""
        total = Work()
        for phase, work in self.work.items():
            if not phases or phase in phases:
                total.include(work)
        return total

    def include(self, other: "Counted") -> None:
        """Adds a round."""
        for phase, work in other.work.items():
            self.work.setdefault(phase, Work()).include(work)
        for phase, seen in other.seen.items():
            self.seen.setdefault(phase, Seen()).include(seen)

    def waits(self) -> list[str]:
        """The reason of each wait of the host."""
        return [reason for seen in self.seen.values() for reason in seen.waits.elements()]

    def to_device(self, *phases: str) -> int:
        """Copies to the device in some phases."""
        return sum(seen.to_device for phase, seen in self.seen.items() if phase in phases)


def tensor_bytes(tensor: Tensor) -> float:
    """Bytes of the numbers of a tensor `(n, m, ...)`, each counted once where it is expanded."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def lengths(group: Any) -> list[int]:
    """Keys of each sequence of a group after its last step; 0 where a slot is empty."""
    found = [0] * group.cache.rows
    for row in group.members:
        if row is not None:
            prompts = row.request.prompt, row.request.null
            for sequence, prompt in zip(row.sequences, prompts, strict=False):
                found[sequence] = len(prompt.ids) + row.step
    return found


def plain_cost(operator: Operator) -> Cost:
    """Work of an operator of torch.

    Its arguments are read and its results written once, except by operators that read or write parts of a
    tensor.
    """
    name, out = operator.name, operator.out
    schema = operator.func._schema.arguments
    given = [
        operator.args[i] if i < len(operator.args) else operator.kwargs.get(argument.name)
        for i, argument in enumerate(schema)
    ]
    storages = {_storage(tensor) for tensor in _tensors(given)}
    read = written = 0.0
    for argument, value in zip(schema, given, strict=True):
        changed = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(value):
            if argument.name == "self" and name in SCATTERS:
                continue
            if argument.name in ("self", "weight") and name in GATHERS:
                read += sum(tensor_bytes(one) for one in _tensors(out))
                continue
            if not (changed and (name in OVERWRITES or argument.kwarg_only)):
                read += tensor_bytes(tensor)
            written += tensor_bytes(tensor) if changed else 0
            if argument.name in ("values", "src", "source") and name in SCATTERS:
                written += tensor.numel() * tensor.element_size()
    written += sum(tensor_bytes(one) for one in _tensors(out) if _storage(one) not in storages)
    launches, flops, precision = LAUNCHES.get(name, 1), 0.0, "half"
    packet = operator.func._overloadpacket
    if name == "aten::scaled_dot_product_attention":
        query, key, value = operator.args[:3]
        flops = (
            2.0 * query.numel() * key.shape[-2]
            + 2.0 * query.numel() // query.shape[-1] * key.shape[-2] * value.shape[-1]
        )
    elif packet in flop_registry:
        flops = float(flop_registry[packet](*operator.args, **operator.kwargs, out_val=out))
    numbers = [tensor for tensor in _tensors(given) if tensor.is_floating_point()]
    if numbers and numbers[-1].dtype == torch.float32:
        convolves = name == "aten::convolution"
        backend = torch.backends.cudnn if convolves else torch.backends.cuda.matmul
        precision = "tf32" if backend.allow_tf32 else "float32"
    if name == "aten::convolution" and given[2] is not None:
        # cuDNN's result, to which another kernel adds the bias.
        launches, read, written = launches + 1, read + tensor_bytes(out), written + tensor_bytes(out)
    return Cost(launches, read, written, flops, precision=precision)


class Meter:
    """Takes an engine through rounds on a fake device, and counts what each took.

    Args:
        gpu: The GPU whose least times are computed.
    """

    def __init__(self, gpu: Gpu):
        self.gpu = gpu
        self.device = FakeCuda(self._watch, memory=int(gpu.memory * 0.98))
        self.round = Counted()
        self.engine: Engine | None = None
        self.weights: set[int] = set()
        self.keys: set[int] = set()

    def start(self, model: Wallaroo, task: str, options: EngineOptions) -> Engine:
        """Makes the engine that is counted from now on, in place of the one before.

        Args:
            model: The model, on the fake device.
            task: Of the rows.
            options: Of the engine.

        Returns:
            The engine.
        """
        self.weights = {_storage(one) for one in (*model.parameters(), *model.buffers())}
        self.engine = Engine(model, task, options)
        self.weights.add(_storage(self.engine.table))
        return self.engine

    def step(self) -> Counted:
        """One round of the engine."""
        engine = self.engine
        assert engine is not None
        self.device.clear()
        self.round = Counted()
        self.keys = {
            _storage(one) for group in engine.groups for one in _tensors(group.cache.keys, group.cache.values)
        }
        engine.step()
        self.round.seen = dict(self.device.seen)
        for phase, seen in self.round.seen.items():
            work = self.round.work.setdefault(phase, Work())
            work.operators, work.replays = seen.operators, seen.replays
        decoder = engine.model.config.decoder
        numbers = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
        keys = sum(length for group in engine.groups for length in lengths(group))
        self.round.needed = keys * numbers * engine.model.dtype.itemsize
        return self.round

    def _lengths(self, tensors: Iterable[Tensor]) -> list[int]:
        """Keys of the sequences of the group whose cache is among the tensors; none if no group's is."""
        found = {_storage(tensor) for tensor in tensors}
        for group in self.engine.groups if self.engine else ():
            if found & {_storage(one) for one in _tensors(group.cache.keys, group.cache.values)}:
                return lengths(group)
        return []

    def _watch(self, operator: Operator) -> None:
        tensors = _tensors(operator.args, operator.kwargs)
        if operator.name in COSTS:
            names = [argument.name for argument in operator.func._schema.arguments]
            given = dict(zip(names, operator.args, strict=False)) | operator.kwargs
            cost = COSTS[operator.name](given, self._lengths(tensors))
        else:
            cost = plain_cost(operator)
            if operator.name not in (*GATHERS, *SCATTERS, *OVERWRITES):
                cost = replace(
                    cost,
                    weights=sum(tensor_bytes(one) for one in tensors if _storage(one) in self.weights),
                    keys=sum(tensor_bytes(one) for one in tensors if _storage(one) in self.keys),
                )
        self.round.work.setdefault(operator.phase, Work()).add(cost, self.gpu)
