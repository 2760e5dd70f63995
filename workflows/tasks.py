"""What the tasks differ in, as plain values: defaults and published presets.

Imports no library, because the command line reads it for its help.
"""

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
    sampling: dict[str, Any]
    samples: int = 1
    strip_quotes: bool = False


PRESETS = {
    "geneval": Preset("generate", {"cfg": 3.0, "temperature": 1.0, "top_k": 1000, "top_p": 1.0}, 4),
    "dpg": Preset(
        "generate", {"cfg": 4.0, "temperature": 1.0, "top_k": 1000, "top_p": 0.95}, 4, strip_quotes=True
    ),
    "imgedit": Preset("edit", {"cfg": 3.0, "temperature": 1.0, "top_k": 1000, "top_p": 1.0}),
}
"""The published settings. The size is not among them: theirs is the default of the checkpoint they used."""
