"""A CUDA device without a GPU: tensors on it have shapes and no numbers, and its operators are counted.

CPU tensors stay real, so that the host's part of a program runs as it is. What only a GPU can tell (numbers,
time, memory) is not here. Knows nothing of the engine.
"""

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wallaroo.model.cuda.fake_runtime import missing, stand_ins

READ_BY_HOST = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique",
    "aten::unique",
    "aten::equal",
    "aten::is_nonzero",
    "aten::bincount",
)
"""Operators whose result, or its shape, the host needs before it can go on; others by name below."""


ALLOCATIONS = (
    "aten::empty",
    "aten::new_empty",
    "aten::detach",
    "aten::_unsafe_view",
    "aten::lift_fresh",
    "aten::alias",
    "aten::resize_",
    "aten::set_",
)
"""Operators that start no kernel, beside views."""

WHOLE = ("aten::_fused_rms_norm",)
"""Operators that are made of others, but have a kernel of their own on CUDA."""


class Waited(RuntimeError):
    """The host waited for the device where it must not, as in a recording."""


@dataclass(frozen=True)
class Operator:
    """One call of an operator on the device."""

    func: Any
    """The operator."""
    args: tuple[Any, ...]
    """Its positional arguments."""
    kwargs: dict[str, Any]
    """Its keyword arguments."""
    out: Any
    """Its result."""
    phase: str
    """The `record_function` around it; empty outside all."""

    @property
    def name(self) -> str:
        """Such as `aten::mm`."""
        return str(self.func._schema.name)


@dataclass
class Seen:
    """What happened in one phase."""

    operators: int = 0
    """Operators that the host started."""
    replays: int = 0
    """Recordings that the host replayed."""
    to_device: int = 0
    """Copies from host to device."""
    to_device_bytes: int = 0
    """Bytes of these copies."""
    to_host: int = 0
    """Copies from device to host."""
    entered: int = 0
    """How often the phase was entered."""
    waits: Counter[str] = field(default_factory=Counter)
    """Reason why the host waited -> how often."""

    def include(self, other: "Seen") -> None:
        """Adds what happened elsewhere."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class FakeCuda(TorchDispatchMode):
    """A device `cuda` that exists inside `with FakeCuda() as device:`.

    Args:
        watch: Called with every operator that would start a kernel, also with those of a replayed recording.
        memory: Bytes that the device says it has, all of them free.

    Attributes:
        seen: Phase -> what happened in it. A phase is the innermost `torch.profiler.record_function`.
    """

    def __init__(self, watch: Callable[[Operator], None] | None = None, memory: int = 139 << 30):
        super().__init__()
        self.watch = watch
        self.memory = memory
        self.seen: dict[str, Seen] = {}
        self.phases: list[str] = []
        self.recording: list[Operator] | None = None
        self.fake = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
        # By address of the storage, since a view of pinned memory is pinned too; kept alive, so that an
        # address never means another tensor.
        self._pinned: dict[int, Tensor] = {}
        self._stack, self._depth = contextlib.ExitStack(), 0
        self._asked, self._number = False, torch.zeros(0)

    def __enter__(self) -> "FakeCuda":
        self._depth += 1
        if self._depth == 1:
            self._set_up()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._depth -= 1
        if not self._depth:
            self._stack.close()

    def _set_up(self) -> None:
        reason = missing()
        if reason:
            raise RuntimeError(f"no CUDA device can be made up here: {reason}")
        for owner, name, value in stand_ins(self):
            self._stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        # `torch.tensor` makes its numbers on the host, then asks the dispatcher for the copy.
        before = torch._C._only_lift_cpu_tensors()
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        torch._C._set_only_lift_cpu_tensors(True)

    @property
    def now(self) -> Seen:
        """What happened so far in the current phase."""
        return self.seen.setdefault(self.phases[-1] if self.phases else "", Seen())

    def waits(self) -> Counter[str]:
        """Reasons why the host waited, of all phases."""
        return sum((seen.waits for seen in self.seen.values()), Counter())

    def clear(self) -> None:
        """Forgets what was seen so far."""
        self.seen.clear()

    def wait(self, reason: str) -> None:
        """The host waits for the device."""
        if self.recording is not None:
            raise Waited(f"operation not permitted when stream is capturing: {reason}")
        self.now.waits[reason] += 1

    # -- operators ----------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        asked, self._asked = self._asked, name.startswith("prim::")
        if self._asked:  # a tensor is asked for its device, as it is before a number is put into it
            return func(*args, **kwargs)
        if asked and name == "aten::lift_fresh" and not args[0].dim():
            self._number = func(*args, **kwargs)
            return self._number
        if name.startswith("profiler::"):
            return self._phase(func, name, args, kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(leaf.device.type == "cuda" for leaf in leaves)
        if not on_device and not _wants_device(args, kwargs):
            return self._on_host(func, name, args, kwargs)
        if name == "aten::scaled_dot_product_attention":
            return self._attention(func, args, kwargs)
        if name not in WHOLE and (on_device or name in ("aten::to", "aten::_to_copy")):
            with self:
                taken_apart = func.decompose(*args, **kwargs)
            if taken_apart is not NotImplemented:
                return taken_apart
        if name == "aten::_to_copy":
            return self._copied(func, args, kwargs)
        if name == "aten::copy_" and args[0].device != args[1].device:
            return self._copied_into(func, *args, **kwargs)
        reason = _reads(func, name, args, kwargs)
        if reason:
            self.wait(reason)
            if name == "aten::_local_scalar_dense":
                return torch.zeros((), dtype=args[0].dtype).item()
            if name in ("aten::equal", "aten::is_nonzero"):
                return True
            if name == "aten::nonzero":
                return self._run(torch.empty, (0, args[0].dim()), dtype=torch.int64, device="cuda")
        try:
            return self._counted(func, args, kwargs)
        except fake_tensor.DynamicOutputShapeException:
            raise Waited(
                f"{reason or name}: the shape of what follows is known to a real device only"
            ) from None

    def _phase(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if "enter" in name:
            self.phases.append(args[0])
            self.now.entered += 1
        elif self.phases:
            self.phases.pop()
        return func(*args, **kwargs)

    def _on_host(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        pin = name in ("aten::pin_memory", "aten::_pin_memory") or kwargs.get("pin_memory")
        if name == "aten::is_pinned":
            return self.is_pinned(args[0])
        if name in ("aten::pin_memory", "aten::_pin_memory"):
            made = args[0].clone()
        else:
            made = func(*args, **(kwargs | {"pin_memory": False} if pin else kwargs))
        if pin:
            self._pin(made)
        return made

    def _pin(self, tensor: Tensor) -> None:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a CPU tensor `(n, ...)` lies in pinned memory."""
        return tensor.untyped_storage().data_ptr() in self._pinned

    def _run(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        with self.fake:
            return func(*args, **kwargs)

    def _counted(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = self._run(func, *args, **kwargs)
        if not func.is_view and not func._schema.name.startswith(ALLOCATIONS):
            self._watch(Operator(func, args, kwargs, out, self.phases[-1] if self.phases else ""))
        return out

    def _watch(self, operator: Operator) -> None:
        if self.recording is not None:
            # What is being recorded does not run.
            self.recording.append(operator)
            return
        self.now.operators += 1
        self._start(operator)

    def _start(self, operator: Operator) -> None:
        if self.watch:
            self.watch(operator)

    def replay(self, tape: list[Operator]) -> None:
        """All operators of a recording, as one launch of the host."""
        self.now.replays += 1
        for operator in tape:
            self._start(operator)

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """One operator, since which kernels it becomes is chosen where there is a GPU."""
        query, value = args[0], args[2]
        batch, heads, tokens, _ = query.shape
        shape = batch, tokens, heads, value.shape[-1]
        made = self._run(torch.empty, shape, dtype=query.dtype, device=query.device).transpose(1, 2)
        self._watch(Operator(func, args, kwargs, made, self.phases[-1] if self.phases else ""))
        return made

    # -- copies between host and device -------------------------------------------------------------

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Any:
        source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
        if source.device.type == target.type:
            return self._counted(func, args, kwargs)
        waits_not = bool(kwargs.get("non_blocking"))
        if target.type == "cuda":
            made = self._run(
                torch.empty, source.shape, dtype=kwargs.get("dtype") or source.dtype, device=target
            )
            self._to_device(source, waits_not)
            return made
        made = torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if waits_not:
            self._pin(made)  # torch takes pinned memory for it
        self._to_host(source, waits_not)
        return made

    def _copied_into(self, func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if source is self._number:
            # `tensor[i] = 1`: a real device fills a tensor of its own, and copies that.
            for _ in range(2):
                self._counted(torch.ops.aten.fill_.Scalar, (target, 0), {})
        elif target.device.type == "cuda":
            self._to_device(source, non_blocking)
        else:
            self._to_host(source, non_blocking and self.is_pinned(target))
        return target

    def _to_device(self, source: Tensor, non_blocking: bool) -> None:
        if not (non_blocking and self.is_pinned(source)):
            self.wait("a blocking copy to the device")
        self.now.to_device += 1
        self.now.to_device_bytes += source.numel() * source.element_size()

    def _to_host(self, source: Tensor, waits_not: bool) -> None:
        if not waits_not:
            self.wait("a blocking copy to the host")
        elif self.recording is not None:
            raise Waited("a copy to the host is part of a recording")
        self.now.to_host += 1


def _wants_device(args: Any, kwargs: Any) -> bool:
    devices = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
    return any(device.type == "cuda" for device in devices)


def _reads(func: Any, name: str, args: Any, kwargs: Any) -> str:
    """What the host reads from the device in this operator; empty if nothing."""
    short = name.partition("::")[2]
    if name.startswith(READ_BY_HOST):
        return "a number read" if short == "_local_scalar_dense" else short
    if short in ("index", "index_put_", "index_put", "_index_put_impl_"):
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        return "indices by a mask" if masks else ""
    if short == "repeat_interleave" and kwargs.get("output_size") is None:
        return "repetitions counted on the device"
    return ""
