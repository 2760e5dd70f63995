"""The chart of a report: rows over time, in SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wallaroo.workflows.outputs.run_log import RunRecord
from wallaroo.workflows.text import duration

BINS = 120
"""Points of the throughput graph."""


@dataclass(frozen=True)
class Chart:
    """Rows over time while drivers ran, as coordinates of an SVG drawing, in its own units."""

    width: int
    """Of the drawing."""
    height: int
    """Of the drawing."""
    line: str
    """Points of the curve."""
    area: str
    """Points of the area below it."""
    x_ticks: list[tuple[float, str]]
    """Coordinate and label of each mark of the time axis."""
    y_ticks: list[tuple[float, str]]
    """Coordinate and label of each mark of the row axis."""
    starts: list[tuple[float, int]]
    """Coordinate and number of each run, where it begins."""


def draw_chart(records: Sequence[RunRecord]) -> Chart | None:
    """Rows/s over time; the pauses between runs take no room. None if nothing was measured."""
    records = [record for record in records if record.seconds > 0 and len(record.samples) > 1]
    total = sum(record.seconds for record in records)
    if not records:
        return None
    width, height, left, top, bottom = 960, 240, 56, 12, 28
    rates: list[tuple[float, float]] = []
    starts = []
    offset = 0.0
    for record in records:
        times = np.array([0.0, *(sample[0] for sample in record.samples)])
        done = np.array([record.before, *(sample[1] for sample in record.samples)], float)
        end = max(float(times[-1]), 1e-3)
        bins = max(1, round(BINS * record.seconds / total))
        edges = np.linspace(0, end, bins + 1)
        per_second = np.diff(np.interp(edges, times, done)) / np.diff(edges)
        starts.append((offset, record.run))
        for index, rate in enumerate(per_second.clip(min=0)):
            rates += [(offset + edges[index], rate), (offset + edges[index + 1], rate)]
        offset += end
    y_step = _step(max(rate for _, rate in rates) or 1.0)
    y_top = y_step * max(1, math.ceil(max(rate for _, rate in rates) / y_step))
    x_step = _step(offset, (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200, 86400))

    def x(seconds: float) -> float:
        return round(left + seconds / offset * (width - left - 8), 1)

    def y(rate: float) -> float:
        return round(top + (1 - rate / y_top) * (height - top - bottom), 1)

    line = " ".join(f"{x(seconds)},{y(rate)}" for seconds, rate in rates)
    return Chart(
        width=width,
        height=height,
        line=line,
        area=f"{x(0)},{y(0)} {line} {x(offset)},{y(0)}",
        x_ticks=[(x(n * x_step), duration(n * x_step)) for n in range(int(offset / x_step) + 1)],
        y_ticks=[(y(n * y_step), f"{n * y_step:g}") for n in range(round(y_top / y_step) + 1)],
        starts=[(x(seconds), run) for seconds, run in starts],
    )


def _step(span: float, nice: Sequence[float] | None = None) -> float:
    """A round distance between about five ticks on `span`."""
    want = span / 5
    if nice is not None and want <= nice[-1]:
        return next(step for step in nice if step >= want)
    power = 10.0 ** math.floor(math.log10(want))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= want * 0.999)
