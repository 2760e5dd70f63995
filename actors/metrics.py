"""The metrics of a run, each defined once: what replicas, stages and the driver count for Prometheus.

Ray exports them from every node with `ray_` before the name. Dashboards and alert rules use these names
and no others of ours. Knows nothing of dashboards.
"""

import functools
import string
import urllib.parse
from dataclasses import dataclass
from typing import Any

_PRINTABLE = "".join(set(string.printable) - set(string.whitespace) - {"%"}) + " "
"""Characters that a tag may hold as they are."""


@dataclass(frozen=True)
class Metric:
    """A metric of a run."""

    kind: str
    """`counter`, which only grows, or `gauge`."""
    help: str
    """What it measures."""
    tags: tuple[str, ...] = ()
    """Names of its labels."""


METRICS = {
    "wallaroo_rows_total": Metric("counter", "Rows written to an output, error rows included.", ("task",)),
    "wallaroo_errors_total": Metric("counter", "Error rows written to an output.", ("task", "kind")),
    "wallaroo_images_total": Metric("counter", "Images that replicas finished.", ("task",)),
    "wallaroo_prompt_tokens_total": Metric(
        "counter", "Prompt tokens of rows that replicas finished.", ("task",)
    ),
    "wallaroo_output_tokens_total": Metric(
        "counter", "Tokens that replicas drew for finished rows.", ("task",)
    ),
    "wallaroo_engine_seconds_total": Metric(
        "counter",
        "Seconds of the engine's rounds: prefill if a round took up a prompt, decode if it only drew tokens.",
        ("task", "phase"),
    ),
    "wallaroo_slots": Metric("gauge", "Rows that a replica can decode at once.", ("task", "replica")),
    "wallaroo_slots_busy": Metric("gauge", "Rows that a replica decodes now.", ("task", "replica")),
    "wallaroo_queue_rows": Metric(
        "gauge", "Rows that a replica holds and has not begun.", ("task", "replica")
    ),
    "wallaroo_fetch_seconds_total": Metric(
        "counter", "Seconds of loading shards and their sources.", ("task",)
    ),
    "wallaroo_encode_seconds_total": Metric(
        "counter", "Seconds of encoding the results of shards.", ("task",)
    ),
    "wallaroo_write_seconds_total": Metric("counter", "Seconds of writing shards.", ("task",)),
    "wallaroo_written_bytes_total": Metric("counter", "Bytes of the shards written.", ("task",)),
    "wallaroo_run_rows": Metric("gauge", "Planned rows of a run.", ("task", "output")),
    "wallaroo_run_done_rows": Metric("gauge", "Rows of a run that are finished.", ("task", "output")),
    "wallaroo_run_error_rows": Metric("gauge", "Error rows among them.", ("task", "output")),
    "wallaroo_run_replicas": Metric("gauge", "Replicas of a run that are up.", ("task", "output")),
    "wallaroo_run_replica_deaths": Metric("gauge", "Replicas of a run that died.", ("task", "output")),
}
"""Name -> metric. Seconds, bytes and rows are units; a counter ends in `_total`."""


@functools.cache
def _metric(name: str) -> Any:
    from ray.util.metrics import Counter, Gauge

    metric = METRICS[name]
    kind = {"counter": Counter, "gauge": Gauge}[metric.kind]
    return kind(name, metric.help, metric.tags)


def _tags(tags: dict[str, str]) -> dict[str, str]:
    """Tags as Ray takes them: ASCII, other characters as percent-encoded UTF-8."""
    return {name: urllib.parse.quote(value, safe=_PRINTABLE) for name, value in tags.items()}


def count(name: str, amount: float = 1, **tags: str) -> None:
    """Adds to a counter of METRICS.

    Args:
        name: Of the counter.
        amount: What is added; at least 0.
        **tags: A value for each of its tags.
    """
    if amount:
        _metric(name).inc(amount, _tags(tags))


def gauge(name: str, value: float, **tags: str) -> None:
    """Sets a gauge of METRICS.

    Args:
        name: Of the gauge.
        value: Its new value.
        **tags: A value for each of its tags.
    """
    _metric(name).set(value, _tags(tags))
