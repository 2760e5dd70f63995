"""What a planned run will take: replica-hours, wall time, memory of a replica, bytes and cost.

All numbers follow from the plan, the checkpoint's shapes, and the rows/s of one replica, which is measured,
given, or computed for a GPU from the counts of a dry run. Knows nothing of how a row is made.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from wallaroo.model.config import SLOTS, ModelConfig
from wallaroo.model.errors import InputError
from wallaroo.model.prompts import source_tokens
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import ESTIMATE_FILE, PLAN_FOLDER, list_done, shard_path
from wallaroo.workflows.outputs.run_log import read_records
from wallaroo.workflows.outputs.schema import TEXT_TASKS
from wallaroo.workflows.plans.plan import Plan
from wallaroo.workflows.settings import RunConfig
from wallaroo.workflows.storage.checkpoints import read_checkpoint, read_files
from wallaroo.workflows.text import duration, rounded

PROMPT_TOKENS = 128
"""Prompts are not encoded for an estimate; most are shorter."""
LOSSLESS_PIXEL_BYTES = 3
MEASURED_SHARDS = 32


@dataclass(frozen=True)
class Estimate:
    """What a planned run will take."""

    rows: int
    """Rows to process."""
    replicas: int
    """Most replicas at once."""
    rate: float | None
    """Rows/s of one replica; None if unknown, and then `replica_hours`, `seconds` and `cost` are None too."""
    rate_from: str
    """Where the rate was measured; empty if it was given."""
    replica_hours: float | None
    """Hours of all replicas together."""
    seconds: float | None
    """Wall time with all replicas."""
    cost: float | None
    """Of the replica-hours; None without a price."""
    weight_bytes: int
    """Size of the checkpoint's files."""
    kv_bytes: int
    """Keys and values of all slots of a replica, at most."""
    output_bytes: int
    """Size of the data set."""
    bytes_from: str
    """Where the bytes of a row were measured; empty if they are the bound of lossless pictures."""
    computed: str = ""
    """What a computed rate assumes; empty if the rate was measured or given."""
    source_tokens: int = 0
    """Tokens that a source picture adds to a sequence, at most."""

    def lines(self) -> list[str]:
        """The estimate for people."""
        found = []
        if self.rate is None:
            found.append("  time: unknown; give --gpu, or --rate with rows/s of one replica or an output")
        else:
            assert self.replica_hours is not None and self.seconds is not None
            where = f", as in {self.rate_from}" if self.rate_from else ""
            where = f", computed, not measured ({self.computed})" if self.computed else where
            found.append(f"  rate: {rounded(self.rate)} rows/s per replica{where}")
            found.append(
                f"  time: {rounded(self.replica_hours)} replica-hours, {duration(self.seconds)} with "
                f"{self.replicas:,} {'replica' if self.replicas == 1 else 'replicas'}"
            )
        if self.cost is not None:
            found.append(f"  cost: {self.cost:,.2f}")
        found.append(
            f"  memory per replica: {size_in_words(self.weight_bytes)} of weights as stored, "
            f"{size_in_words(self.kv_bytes)} of keys and values at prompts of {PROMPT_TOKENS} tokens"
            + (f" and sources of {self.source_tokens:,}" if self.source_tokens else "")
        )
        where = f"as in {self.bytes_from}" if self.bytes_from else "if images cannot be compressed"
        found.append(f"  output: {size_in_words(self.output_bytes)}, {where}")
        return found


def estimate(plan: Plan, config: RunConfig, rate: str | None, gpu: str | None = None) -> Estimate:
    """The estimate of a plan, which is left in the output too, for the report to set beside what happened.

    Args:
        plan: What is to be made.
        config: Of the run.
        rate: Rows/s of one replica as text, or an output of a run that measured it.
        gpu: Name of a GPU that the rate is computed for, where none is given.

    Returns:
        The estimate.

    Raises:
        InputError: The rate is no positive number and no output that has measured one, the GPU is unknown, or
            nothing can be computed for the task.
    """
    from wallaroo.workflows.storage.checkpoints import model_path

    speed, row_bytes, measured = _measured(rate)
    folder = model_path(config.model)
    model, files = read_checkpoint(folder).config, read_files(folder)
    rows = plan.rows - plan.error_rows
    computed = ""
    if gpu is not None:
        if rate is not None:
            raise InputError(f"--rate is {rate} and --gpu is {gpu}, but only one can be given.")
        speed, computed = _computed(gpu, plan, config, model)
    replicas = min(config.replicas[1], max(1, len(plan.shards)))
    hours = None if speed is None else rows / speed / 3600
    price = config.price_per_hour
    bytes_from = measured if row_bytes else ""
    pixels = sum(count * size.height * size.width for size, count in plan.sizes.items())
    unsized = rows - sum(plan.sizes.values())
    largest = max(size.height * size.width for size in model.size_list())
    source = source_tokens(model.with_pixels(config.min_pixels, config.max_pixels), config.task)
    bound = 0 if config.task in TEXT_TASKS else (pixels + unsized * largest) * LOSSLESS_PIXEL_BYTES
    found = Estimate(
        rows=rows,
        replicas=replicas,
        rate=speed,
        rate_from=measured,
        replica_hours=hours,
        seconds=None if hours is None else hours * 3600 / replicas,
        cost=None if hours is None or price is None else hours * price,
        weight_bytes=sum(size for name, (size, _) in files.items() if name.endswith(".safetensors")),
        kv_bytes=_kv_bytes(plan, config, model, PROMPT_TOKENS + source),
        output_bytes=round(rows * row_bytes) if row_bytes else bound,
        bytes_from=bytes_from,
        computed=computed,
        source_tokens=source,
    )
    if config.output:
        data = json.dumps(dataclasses.asdict(found)).encode() + b"\n"
        storage.write_atomic(storage.join(config.output, PLAN_FOLDER, ESTIMATE_FILE), data)
    return found


def _measured(rate: str | None) -> tuple[float | None, float, str]:
    """Rows/s of a replica, bytes of a row (0 if unknown), and the output that they are from."""
    if rate is None:
        return None, 0, ""
    try:
        given = float(rate)
    except ValueError:
        records = [one for one in read_records(rate)[0] if one.replica_seconds > 0 and one.done > one.before]
        if not records:
            raise InputError(
                f"the rate '{rate}' is neither a number nor an output whose runs have measured one: give "
                f"rows/s of one replica, or such an output."
            ) from None
        rows = sum(one.done - one.before for one in records)
        return rows / sum(one.replica_seconds for one in records), _row_bytes(rate), rate
    if not 0 < given < float("inf"):
        raise InputError(f"the rate is {rate}, but must be more than 0 rows/s.")
    return given, 0, ""


def _computed(gpu: str, plan: Plan, config: RunConfig, model: ModelConfig) -> tuple[float | None, str]:
    """Rows/s of a replica on a GPU, None without rows, and what is assumed."""
    from wallaroo.model.roofline import assumptions, find_gpu

    found = find_gpu(gpu)
    if config.task != "generate":
        raise InputError(
            f"--gpu is {gpu}, but rates are computed for generate, not for {config.task}: give --rate."
        )
    if not plan.sizes:
        return None, ""
    # Here, not above: it runs the engine on a made-up device, which needs torch.
    from wallaroo.model.dry_run import predicted_rate

    given = {} if config.group_rows is None else {"group_rows": config.group_rows}
    graphs = not config.no_cuda_graphs
    rate, group = predicted_rate(model, found, plan.sizes, config.sampling, graphs=graphs, **given)
    words = f"{assumptions(found)}; in groups of {group:,} rows"
    # A row without guidance takes half of a row.
    rows = math.ceil(sum(plan.sizes.values()) / (1 if config.sampling.guided else 2))
    if rows < group:
        words += f", of which {rows:,} are used: --group-rows {rows} is faster"
    return rate, words


def _row_bytes(output: str) -> float:
    from wallaroo.workflows.outputs.shards import open_finished

    size = rows = 0
    for shard in sorted(list_done(output))[:MEASURED_SHARDS]:
        found = storage.info(shard_path(output, shard))
        with open_finished(output, shard) as parquet:
            rows += parquet.metadata.num_rows
        size += found.size if found else 0
    return size / rows if rows else 0


def _kv_bytes(plan: Plan, config: RunConfig, model: ModelConfig, prompt: int) -> int:
    decoder = model.decoder
    largest = max(plan.sizes or model.size_list(), key=lambda size: size.height * size.width)
    height, width = largest.grid
    tokens = config.max_new_tokens if config.task in TEXT_TASKS else height * (width + model.line_break)
    branches = 2 if config.sampling.guided else 1
    element = 4 if config.device == "cpu" else 2
    row = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim * element
    # A GPU with room for fewer slots takes fewer.
    slots = config.slots or SLOTS["cpu" if config.device == "cpu" else "cuda"]
    return slots * branches * (prompt + tokens) * row


def size_in_words(count: float) -> str:
    """A number of bytes for people, in units of 1,024."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1024
    return f"{count:,.3g} TiB"


def compare(output: str) -> list[dict[str, Any]]:
    """What was estimated and what happened, a line each (`name`, `estimated`, `happened`); none without."""
    try:
        found = Estimate(**json.loads(storage.read_bytes(storage.join(output, PLAN_FOLDER, ESTIMATE_FILE))))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return []
    records = read_records(output)[0]
    replica_seconds = sum(one.replica_seconds for one in records)
    made = sum(one.done - one.before for one in records)
    costs = [one.cost for one in records if one.cost is not None]
    files = storage.list_files(storage.join(output, "data"))

    def line(name: str, estimated: str | None, happened: str | None) -> dict[str, Any]:
        return {"name": name, "estimated": estimated or "—", "happened": happened or "—"}

    return [
        line(
            "rows/s of a replica",
            rounded(found.rate) if found.rate else None,
            rounded(made / replica_seconds) if replica_seconds else None,
        ),
        line(
            "replica-hours",
            rounded(found.replica_hours) if found.replica_hours else None,
            rounded(replica_seconds / 3600),
        ),
        line(
            f"time, with at most {found.replicas:,} replicas",
            duration(found.seconds) if found.seconds else None,
            duration(sum(one.seconds for one in records)),
        ),
        line("cost", f"{found.cost:,.2f}" if found.cost else None, f"{sum(costs):,.2f}" if costs else None),
        line("data set", size_in_words(found.output_bytes), size_in_words(sum(file.size for file in files))),
    ]
