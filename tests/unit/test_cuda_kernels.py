"""The Triton kernels as far as a CPU can tell: what they compute, and that they compile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wallaroo.model.cuda import ops
from wallaroo.model.cuda.costs import COSTS
from wallaroo.model.cuda.operators import OPERATORS

ROOT = Path(__file__).parents[2]

pytest.importorskip("triton", reason="the GPU kernels are tested where Triton is installed")


def run(*command, tmp_path, **variables):
    # Settings of the pytest that runs this are not those of one inside it.
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    ours |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=ours | variables,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_kernels_equal_the_plain_code(tmp_path):
    said = run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/interpreted_kernels.py"),
        tmp_path=tmp_path,
        TRITON_INTERPRET="1",
    )
    assert " passed" in said and "skipped" not in said


@pytest.mark.parametrize(
    ("capability", "shared", "types"),
    [
        (80, 163, ["bfloat16"]),
        (89, 99, ["bfloat16"]),
        (90, 227, ["bfloat16", "float32"]),
        (100, 227, ["bfloat16"]),
    ],
)
def test_kernels_compile(capability, shared, types, tmp_path):
    """shared: KiB that a program can have there."""
    said = run("tests/unit/compiled_kernels.py", str(capability), *types, tmp_path=tmp_path)
    kernels = [json.loads(line) for line in said.splitlines()]
    names = {
        *("attend_split", "attend_combine", "attend_runs", "rotate_and_store", "rms_norm", "add_rms_norm"),
        *("swiglu", "guide", "draw", "feed", "group_sums", "group_scales", "group_apply"),
    }
    assert {kernel["kernel"] for kernel in kernels} == names
    assert {kernel["type"] for kernel in kernels} == set(types)
    for kernel in kernels:
        assert kernel["shared"] <= shared << 10, kernel
        assert kernel["spilled"] == 0, kernel
        multiplies = kernel["kernel"] in ("attend_split", "attend_runs") and kernel["type"] == "bfloat16"
        assert kernel["tensor_cores"] == multiplies, kernel


def test_every_operator_has_a_cost():
    assert COSTS.keys() == OPERATORS.keys() == ops.LAUNCHES.keys()


def test_kernels_refuse_what_they_would_read_wrongly():
    x = torch.zeros(8, 4).T
    with pytest.raises(ValueError, match=r"gate_up has strides \(1, 4\), but must be contiguous"):
        OPERATORS["wallaroo::swiglu"].launch(x, torch.zeros(4, 4))
    assert torch.equal(ops.swiglu(x), torch.zeros(4, 4))
