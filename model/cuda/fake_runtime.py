"""The parts of torch that a simulated CUDA device needs beside its dispatcher.

They are a device guard, and stubs in `torch.cuda`. Knows nothing of operators.
"""

import contextlib
import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch._subclasses import fake_tensor

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar registrar(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
"""
"""What a torch without CUDA lacks to take tensors of that device through its dispatcher."""

COMPILERS = "g++", "c++", "clang++"


@functools.cache
def missing() -> str:
    """Why there can be no such device in this process; empty if there can."""
    try:
        if torch.backends.cuda.is_built():
            torch._C._ensureCUDADeviceGuardSet()
        else:
            _register_guard()
    except (OSError, subprocess.SubprocessError) as error:
        return f"a C++ compiler with torch's headers is needed, but {error}"
    return ""


@functools.cache
def _register_guard() -> None:
    base = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
        options = ["-shared", "-fPIC", "-std=c++20", abi, "-I", str(base / "include")]
        link = ["-L", str(base / "lib"), "-lc10"]
        wanted = os.environ.get("CXX")
        problem: Exception = FileNotFoundError("none was found")
        for compiler in (wanted,) if wanted else COMPILERS:
            try:
                command = [compiler, *options, str(source), "-o", str(made), *link]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
            except FileNotFoundError as error:
                problem = error
            else:
                ctypes.CDLL(str(made))
                return
        raise problem


class Host(Protocol):
    """What stand-ins call: see `FakeCuda`."""

    memory: int
    recording: list[Any] | None

    def wait(self, reason: str) -> None:
        """Called where the host waits for the device, with the reason."""
        ...

    def replay(self, tape: list[Any]) -> None:
        """Called where a recording is replayed."""
        ...


class _Stream:
    """Order is not modelled: whatever was begun counts as done."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any):
        self.device, self.priority = torch.device("cuda:0"), priority
        self.cuda_stream = 0

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or torch.cuda.Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        torch.cuda.synchronize()


def stand_ins(device: Host) -> Iterator[tuple[Any, str, Any]]:
    """What reaches past the dispatcher: module, name, and what stands there meanwhile."""

    class Event:
        def __init__(self, *_: Any, **__: Any): ...

        def record(self, stream: Any = None) -> None: ...

        def wait(self, stream: Any = None) -> None: ...

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            device.wait("an event")

    class Graph:
        def __init__(self, *_: Any, **__: Any):
            self.tape: list[Any] | None = None

        def capture_begin(self, *_: Any, **__: Any) -> None:
            if device.recording is not None:
                raise RuntimeError("a recording is going on already")
            device.recording = []

        def capture_end(self) -> None:
            self.tape, device.recording = device.recording, None

        def replay(self) -> None:
            assert self.tape is not None, "replayed before it was recorded"
            device.replay(self.tape)

        def reset(self) -> None:
            self.tape = None

        def pool(self) -> tuple[int, int]:
            return (0, 1)

    @contextlib.contextmanager
    def graph(made: Graph, *_: Any, **__: Any) -> Iterator[None]:
        made.capture_begin()
        try:
            yield
        finally:
            made.capture_end()

    @contextlib.contextmanager
    def stream(_: Any) -> Iterator[None]:
        yield

    main = _Stream()
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, total_memory=device.memory, multi_processor_count=132
    )
    values: dict[str, Any] = {
        "Stream": _Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 1),
        "stream": stream,
        "current_stream": lambda *_: main,
        "default_stream": lambda *_: main,
        "set_stream": lambda *_: None,
        "synchronize": lambda *_: device.wait("a synchronisation"),
        "empty_cache": lambda: None,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: device.recording is not None,
        "mem_get_info": lambda *_: (device.memory, device.memory),
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "device": lambda *_: contextlib.nullcontext(),
        "_lazy_init": lambda: None,
    }
    for name, value in values.items():
        yield torch.cuda, name, value
    # Small constants would be computed with for real, which needs the device.
    yield fake_tensor, "CONSTANT_NUMEL_LIMIT", -1
