"""The least time of a GPU for counted work: bytes at the rate of its memory, arithmetic at that of its units.

Numbers from here are computed, not measured. Knows nothing of what the work is for; needs no torch.
"""

from dataclasses import dataclass

from wallaroo.model.errors import InputError, did_you_mean

LAUNCH_SECONDS = 1.2e-6
"""From the end of a kernel to the begin of the next inside a recorded CUDA graph."""
OPERATOR_SECONDS = 14e-6
"""Host time of an operator of torch outside a graph."""
REPLAY_SECONDS = 30e-6
"""Host time of the replay of a graph."""
PRECISIONS = {"half": 1.0, "tf32": 1 / 2, "float32": 1 / 15}
"""Rate of arithmetic in a type over that in bfloat16."""


@dataclass(frozen=True)
class Gpu:
    """A GPU and the rates that it is taken to reach."""

    name: str
    """Such as `H200`."""
    bandwidth: float
    """Bytes/s of a copy."""
    flops: float
    """16-bit multiplications and additions/s of large matrix products."""
    memory: float
    """Bytes."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", 4.3e12, 600e12, 141e9),
        Gpu("H100", 3.0e12, 600e12, 80e9),
        Gpu("A100", 1.8e12, 220e12, 80e9),
        Gpu("L40S", 0.77e12, 220e12, 48e9),
    )
}
"""Assumed rates: 0.9 of the memory rate and 0.6 to 0.7 of the arithmetic in the data sheets."""


@dataclass(frozen=True)
class Cost:
    """Work of one operator."""

    launches: int = 1
    """Kernels that it starts."""
    read: float = 0
    """Bytes."""
    written: float = 0
    """Bytes."""
    flops: float = 0
    """Multiplications and additions."""
    keys: float = 0
    """Bytes of `read` that are of the key-value cache."""
    weights: float = 0
    """Bytes of `read` that are of the model."""
    precision: str = "half"
    """Of the arithmetic, a key of PRECISIONS."""

    def seconds(self, gpu: Gpu) -> float:
        """Least time on the GPU, from the begin of its first kernel to that of the next operator's."""
        memory = (self.read + self.written) / gpu.bandwidth
        arithmetic = self.flops / (gpu.flops * PRECISIONS[self.precision])
        return max(memory, arithmetic) + self.launches * LAUNCH_SECONDS


@dataclass
class Work:
    """Work of a part of a program: the sum over its operators, and the host's part."""

    launches: int = 0
    """Kernels."""
    read: float = 0
    """Bytes."""
    written: float = 0
    """Bytes."""
    flops: float = 0
    """Multiplications and additions."""
    keys: float = 0
    """Bytes of `read` that are of the key-value cache."""
    weights: float = 0
    """Bytes of `read` that are of the model."""
    seconds: float = 0
    """Least time on the GPU."""
    operators: int = 0
    """Operators that the host started, without those of replayed recordings."""
    replays: int = 0
    """Recordings that the host replayed."""

    def add(self, cost: Cost, gpu: Gpu) -> None:
        """Adds an operator.

        Args:
            cost: Of the operator.
            gpu: For its seconds.
        """
        for name in ("launches", "read", "written", "flops", "keys", "weights"):
            setattr(self, name, getattr(self, name) + getattr(cost, name))
        self.seconds += cost.seconds(gpu)

    def include(self, other: "Work") -> None:
        """Adds other work."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def least_seconds(self) -> float:
        """Least time of GPU and host, which work at the same time."""
        return max(self.seconds, self.operators * OPERATOR_SECONDS + self.replays * REPLAY_SECONDS)


def find_gpu(name: str, bandwidth: float | None = None, flops: float | None = None) -> Gpu:
    """A known GPU, perhaps with other rates.

    Args:
        name: Such as `H200`, in any case.
        bandwidth: Bytes/s that it reaches; None for the known rate.
        flops: 16-bit operations/s that it reaches; None for the known rate.

    Returns:
        The GPU.

    Raises:
        InputError: The name is unknown, or a rate is not positive.
    """
    known = {each.lower(): gpu for each, gpu in GPUS.items()}
    gpu = known.get(name.lower())
    if gpu is None:
        raise InputError(
            f"the GPU is '{name}', but must be one of {', '.join(GPUS)}{did_you_mean(name, GPUS)}."
        )
    for what, rate in (("bandwidth", bandwidth), ("flops", flops)):
        if rate is not None and not 0 < rate < float("inf"):
            raise InputError(f"{what} is {rate}, but must be more than 0 a second.")
    return Gpu(gpu.name, bandwidth or gpu.bandwidth, flops or gpu.flops, gpu.memory)


def assumptions(gpu: Gpu) -> str:
    """A line with the assumptions of the computed times."""
    return (
        f"{gpu.name}: {gpu.bandwidth / 1e12:.3g} TB/s and {gpu.flops / 1e12:.3g} TFLOP/s reached "
        f"(half of it in TF32), {LAUNCH_SECONDS * 1e6:.2g} us a launch in a graph, "
        f"{OPERATOR_SECONDS * 1e6:.2g} us an operator outside"
    )
