"""What the tasks differ in, as plain values: defaults and published presets.

Imports no library, because the command line reads it for its help.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

PICTURE_TASKS = ("edit", "understand")
"""Tasks that start from a picture."""

DRAWING_TASKS = ("generate", "edit")
"""Tasks that result in a picture."""

EXACT = "exact"
"""The mode of runs that take no lossy shortcut."""

SAMPLING: dict[str, dict[str, Any]] = {
    "generate": {},
    "edit": {},
    # The likeliest token, always.
    "understand": {"cfg": 1.0, "top_k": 1},
}
"""Task -> sampling parameters that differ from those of `model.sampling.Sampling`."""


class Preset(NamedTuple):
    """Parameters of a published evaluation."""

    task: str
    """The task that it is for."""
    sampling: dict[str, Any]
    """`cfg`, `temperature`, `top_k` and `top_p`."""
    samples: int = 1
    """Results per manifest row."""
    others: Mapping[str, int] = MappingProxyType({})
    """Values of other options."""


PRESETS = {
    "geneval": Preset("generate", {"cfg": 3.0, "temperature": 1.0, "top_k": 1000, "top_p": 1.0}, 4),
    "dpg": Preset(
        "generate",
        {"cfg": 4.0, "temperature": 1.0, "top_k": 1000, "top_p": 0.95},
        4,
        others={"strip_quotes": True},
    ),
    "imgedit": Preset("edit", {"cfg": 3.0, "temperature": 1.0, "top_k": 1000, "top_p": 1.0}),
    # What VLMEvalKit gives Qwen2.5-VL-7B-Instruct; its temperature and top-p leave the likeliest token too.
    "vlmevalkit": Preset(
        "understand",
        {"cfg": 1.0, "temperature": 1.0, "top_k": 1, "top_p": 1.0},
        others={"min_pixels": 1280 * 28 * 28, "max_pixels": 16384 * 28 * 28, "max_new_tokens": 2048},
    ),
}
"""The published settings. The size is not among them: theirs is the default of the checkpoint they used."""
