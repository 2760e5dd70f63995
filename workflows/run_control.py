"""The options of a run that say which of its rows are processed, when it stops, and where it runs.

None of them changes what a row is beyond rounding. Those that do are declared in `settings`.
"""

from dataclasses import dataclass

from wallaroo.workflows.options import (
    RANGE,
    SECONDS,
    SWITCH,
    choice,
    number,
    option,
    place,
    text,
    whole,
)


@dataclass(frozen=True, kw_only=True)
class RunControl:
    """The options of a RunConfig that change no row, beyond rounding."""

    limit: int | None = option(
        None,
        "run.limit",
        whole(1),
        "Process only the first N manifest rows; a later full run reuses them.",
        run_only=True,
    )
    where: str | None = option(
        None,
        "run.where",
        text("EXPR"),
        "Process only rows for which this SQL expression holds; a later full run reuses them.",
        run_only=True,
    )
    incremental: bool = option(
        False,
        "run.incremental",
        SWITCH,
        "Process only rows that are new or changed since the last run.",
        run_only=True,
    )
    max_error_rate: float | None = option(
        None,
        "run.max_error_rate",
        number("from 0 to 1 (0.05 is 5 %)", lambda share: 0 <= share <= 1, "SHARE"),
        "Stop when a larger share of the rows failed (0.05 is 5 %).",
        run_only=True,
    )
    retry_errors: bool = option(
        False,
        "run.retry_errors",
        SWITCH,
        "Retry failed rows of OUTPUT, except rows rejected at planning.",
        run_only=True,
    )
    grace: float = option(
        60.0,
        "run.grace",
        SECONDS,
        "Drain timeout for in-flight shards after Ctrl-C, SIGTERM or --deadline.",
        run_only=True,
    )
    deadline: float | None = option(
        None, "run.deadline", SECONDS, "Stop the run after this time, such as 6h.", run_only=True
    )
    strict: bool = option(
        False,
        "run.strict",
        SWITCH,
        "Refuse to resume where rounding could differ from earlier rows.",
        run_only=True,
    )
    # The minimum is what a run waits for; the run uses more replicas as the cluster gets room.
    replicas: tuple[int, int] = option((1, 1), "cluster.replicas", RANGE, "Model replicas, one per GPU.")
    slots: int | None = option(
        None, "cluster.slots", whole(1), "Rows that a replica decodes at once (default: as many as fit)."
    )
    # Part of what rounds a result, like `threads`.
    group_rows: int | None = option(
        None,
        "cluster.group_rows",
        whole(1),
        "Rows per decode step of a GPU (default: the most that fit); few rows lower the latency.",
        later=True,
    )
    no_cuda_graphs: bool = option(
        False,
        "cluster.no_cuda_graphs",
        SWITCH,
        "Run decode steps on GPUs without CUDA graphs; slower, for debugging.",
        later=True,
    )
    device: str = option(
        "auto",
        "cluster.device",
        choice("auto", "cpu", "cuda"),
        "auto uses GPUs if Ray has any; cuda waits for them.",
    )
    # Part of what rounds a result, so it is never derived from `replicas`. A wide model takes fewer where so
    # many would round a row by its place (`model.engine.even_threads`).
    threads: int = option(1, "cluster.threads", whole(1), "CPU threads per replica.")
    address: str | None = option(
        None,
        "cluster.address",
        place("ADDRESS"),
        "A running Ray cluster (default: $RAY_ADDRESS, or a local Ray).",
        run_only=True,
    )
    price_per_hour: float | None = option(
        None,
        "cluster.price_per_hour",
        number("a number of at least 0", lambda price: price >= 0, "PRICE"),
        "Price per hour of one replica; status and report then show the cost.",
        run_only=True,
    )
    # An attempt of Ray's takes 30 s at most, which nothing can change.
    ray_start_timeout: float = option(
        90.0,
        "cluster.ray_start_timeout",
        SECONDS,
        "How long to keep trying to start a local Ray on a busy machine.",
        run_only=True,
    )
