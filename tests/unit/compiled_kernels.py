"""Compiles every Triton kernel for a GPU that need not be there: `compiled_kernels.py 90 bfloat16`.

Prints a JSON object a kernel and type: bytes of shared memory, registers and spilled bytes a thread, and
whether tensor cores are used. Not a test itself, since Triton must not be imported for its interpreter.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from wallaroo.model.attention import KEY_BLOCK
from wallaroo.model.cuda import ops  # noqa: F401
from wallaroo.model.cuda.operators import OPERATORS

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
TYPES |= {torch.int64: "*i64", torch.float64: "*fp64"}
HEADS, KV_HEADS, DIM, HIDDEN, WIDE = 28, 4, 128, 3584, 18944
FUSED = (HEADS + 2 * KV_HEADS) * DIM
N, BLOCKS, STEPS = 4, 17, 1055


def arguments(dtype):
    """A call of each operator with the sizes of the 7B, as `(name, arguments)`."""

    def some(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def whole(*shape):
        return some(*shape, dtype=torch.int64)

    cache = some(N, KV_HEADS, BLOCKS, KEY_BLOCK, DIM)
    turns = some(N, DIM // 2)
    row, hidden = some(HIDDEN), some(N, HIDDEN)
    yield "attend", (some(N, FUSED), turns, turns, whole(N), cache, cache, some(N, HEADS * DIM))
    yield (
        "rotate_and_store",
        (some(N, FUSED), turns, turns, cache, cache, whole(N), whole(N), some(N, HEADS, DIM)),
    )
    yield (
        "cache_attention",
        (some(2, 16, HEADS, DIM), cache, cache, whole(2), whole(2, 16), 1024, some(2, 16, HEADS * DIM)),
    )
    yield "rms_norm", (hidden, row, 1e-6, hidden)
    yield "add_rms_norm", (hidden, hidden, row, 1e-6, hidden)
    yield "swiglu", (some(N, 2 * WIDE), some(N, WIDE))
    yield "guide", (hidden, some(2, 1, dtype=torch.float32), whole(2), some(2, HIDDEN))
    ints, numbers = whole(N), some(N, dtype=torch.float32)
    for vocabulary in 16384, 152064:
        logits, uniform = (
            some(N, vocabulary, dtype=torch.float32),
            some(N, STEPS, dtype=torch.float64),
        )
        yield "draw", (logits, numbers, ints, uniform, ints, ints, ints, whole(N, STEPS))
    for line_end in row, None:
        few = (ints, some(16384, HIDDEN), line_end, ints, ints, ints, ints, ints, ints)
        made = (hidden, hidden, turns, turns, ints)
        yield "feed", (*few, some(DIM // 2, dtype=torch.float32), row, 1e-6, *made)
    for pixels, channels in (512 * 512, 128), (32 * 32, 512):
        pictures, weight = some(N, pixels, channels), some(channels)
        yield "group_norm", (pictures, weight, weight, 32, 1e-6, True, pictures)


def launches(dtype):
    """What each call gives its kernels, as `(kernel, arguments by name, options)`."""
    taken = []

    def run(kernel, *args, grid, warmup, **named):
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        taken.append((kernel, dict(zip(kernel.arg_names, args, strict=False)), named, options))

    with mock.patch.object(JITFunction, "run", run):
        for name, given in arguments(dtype):
            OPERATORS[f"wallaroo::{name}"].launch(*given)
    return taken


def compiled(kernel, given, constants, options, capability):
    """The machine code of a kernel, specialised as a launch would have it."""
    signature, aligned = dict.fromkeys(constants, "constexpr"), {}
    for name, value in given.items():
        index = kernel.arg_names.index(name)
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and not kernel.params[index].do_not_specialize:
                aligned[(index,)] = [["tt.divisibility", 16]]
    signature = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(code):
    """Registers and bytes of local memory a thread."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(word.split(":") for word in said.split() if word.startswith(("REG:", "LOCAL:")))
    return int(found["REG"]), int(found["LOCAL"])


def main(capability, *types):
    seen = set()
    for dtype in (getattr(torch, name) for name in types):
        for kernel, given, constants, options in launches(dtype):
            code = compiled(kernel, given, constants, options, capability)
            if code.hash in seen:
                continue
            seen.add(code.hash)
            registers, spilled = resources(code)
            print(
                json.dumps(
                    {
                        "kernel": kernel.__name__,
                        "type": str(dtype).removeprefix("torch."),
                        "shared": code.metadata.shared,
                        "registers": registers,
                        "spilled": spilled,
                        "tensor_cores": "mma" in code.asm["ptx"],
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
