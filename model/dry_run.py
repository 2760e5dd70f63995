"""Counts what the engine would do on a GPU, without a GPU, and the least time that a named GPU needs for it.

The engine itself runs, on a device whose tensors have shapes and no numbers (model/cuda/fake.py). The counts
are those of its operators. The times are computed from them by model/roofline.py, not measured.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from wallaroo.model.config import ModelConfig, Size
from wallaroo.model.cuda.fake_runtime import missing
from wallaroo.model.engine.options import gpu_options
from wallaroo.model.engine.requests import steps_of
from wallaroo.model.errors import InputError
from wallaroo.model.meter import Counted, Meter, tensor_bytes
from wallaroo.model.random_inputs import MODELS, SAMPLING, random_model, text_requests
from wallaroo.model.roofline import Gpu, assumptions, find_gpu
from wallaroo.model.sampling import Sampling
from wallaroo.model.wallaroo import Wallaroo

IMAGES = (1, 16, 64, 128)
"""Pictures that are asked for at once."""

MANY = 128
"""Guided pictures that a GPU with room for them decodes at once."""

MIN_PREFILLED = 1024
"""Prompt tokens from which a forward of prefill can be full."""

WARM = 3
"""Steps until all recordings are made."""


def needed_weights(model: Wallaroo, task: str) -> float:
    """Size of the weights that a decode step of pictures reads.

    Args:
        model: The model.
        task: Of the rows.

    Returns:
        Bytes.
    """
    _, head = model.image_parts(task)
    decoder = model.language_model
    read = [*decoder.layers.parameters(), *decoder.norm.parameters(), *head.parameters()]
    return sum(tensor_bytes(one) for one in read)


def free_memory(model: Wallaroo, gpu: Gpu) -> int:
    """GPU memory that is free beside the model.

    Args:
        model: The model.
        gpu: The GPU; 2 % of its memory is kept back.

    Returns:
        Bytes.
    """
    return int(gpu.memory * 0.98 - sum(tensor_bytes(one) for one in model.parameters()))


def measure(
    meter: Meter,
    model: Wallaroo,
    images: int,
    size: Size,
    group_rows: int | None = None,
    sampling: Sampling = SAMPLING,
    **given: Any,
) -> dict[str, Any]:
    """Counts the work of an engine that draws pictures of one size, and computes the least times from it.

    A step is counted half-way through the pictures, an admission where a few rows end and others begin.

    Args:
        meter: Counts on a fake device.
        model: The model, on that device.
        images: How many pictures.
        size: Of the pictures, in pixels.
        group_rows: Rows that decode at once; by default what the memory allows.
        sampling: Of the rows.
        **given: Options of the engine.

    Returns:
        Name -> count or seconds.
    """
    config, gpu = model.config, meter.gpu
    if group_rows is not None:
        given |= {"group_rows": group_rows, "slots": group_rows}
    options = gpu_options(config, free_memory(model, gpu), model.dtype.itemsize, **given)
    engine = meter.start(model, "generate", options)
    spare = min(images, options.vq_slice)
    requests = text_requests(config, images + spare, [size], sampling)
    for request in requests[:images]:
        engine.submit(request)
    first = meter.step()
    prefill = dict(engine.counts)
    served = sum(group.active for group in engine.groups)
    for _ in range(WARM):
        meter.step()
    rows = [row for group in engine.groups for row in group.members if row is not None]
    steps = rows[0].steps
    for row in rows:
        row.step = steps // 2 + 4  # not at the end of a line, where nothing is drawn
    step = meter.step()
    for row in rows[:spare]:
        row.step = steps - 1
    ended = Counted()
    ended.include(meter.step())
    for _ in range(3):
        if any(phase == "tokenizer" for phase in ended.work):
            break
        ended.include(meter.step())
    decoded = engine.counts["vq_slices"] * min(options.vq_slice, spare)
    for request in requests[images:]:
        engine.submit(request)
    refill = meter.step()
    tokenizer = ended.of("tokenizer").least_seconds / max(1, decoded)
    seconds = {
        "prefill": first.of("prefill").least_seconds,
        "admit": first.of("admit").least_seconds,
        "decode": steps * step.of().least_seconds,
        "tokenizer": served * tokenizer,
        "results": served / spare * ended.of("results").least_seconds,
    }
    work = step.of()
    return {
        "images": images,
        "group_rows": options.group_rows,
        "slots": engine.slots,
        "decoding_at_once": served,
        "launches_per_step": work.launches,
        "host_operators_per_step": work.operators + work.replays,
        "kv_bytes_ratio": work.keys / step.needed,
        "weight_bytes_ratio": work.weights / needed_weights(model, "generate"),
        "host_syncs": len(step.waits()),
        "h2d_per_admission": refill.to_device("admit"),
        "launches_per_admission": refill.of("admit").launches / spare,
        "rows_per_admission": spare,
        "h2d_per_prefill_forward": first.to_device("prefill") / prefill["prefill_forwards"],
        "host_waits_of_admission": len(refill.waits()),
        "host_waits_of_results": len(ended.waits()),
        "prompt_tokens": prefill["prefill_tokens"],
        "prefill_forwards": prefill["prefill_forwards"],
        "prefill_tokens_per_forward": prefill["prefill_tokens"] / prefill["prefill_forwards"],
        "step_milliseconds": 1e3 * work.least_seconds,
        "step_milliseconds_of_gpu": 1e3 * work.seconds,
        "seconds": seconds,
        "predicted_images_per_second": served / sum(seconds.values()),
    }


def dry_run(
    config: ModelConfig, gpu: Gpu, side: int, images: Sequence[int] = IMAGES, **given: Any
) -> dict[str, Any]:
    """Counts and computed times of guided square pictures, by random weights of a model's shapes in bfloat16.

    Args:
        config: The model.
        gpu: Whose rates turn counts into times.
        side: Of the pictures in pixels.
        images: How many are asked for at once, in turn.
        given: Engine options that replace those chosen for the GPU's memory.

    Returns:
        `chosen`: see `measure`, by number of pictures, in the groups that a run chooses for the GPU;
        `fitting`: the same in groups of as many rows as pictures, which `--group-rows` asks for;
        `predicted_images_per_second` of these by number, with their rows in `predicted_with_group_rows`;
        `predicted_images_per_second_by_default` and `group_rows_by_default` of those that are chosen; of all
        other counts the worst.
    """
    meter, size = Meter(gpu), Size(side, side)
    with meter.device:
        model = random_model(config, ("generate",), torch.device("cuda"), torch.bfloat16)
        chosen = {str(count): measure(meter, model, count, size, **given) for count in images}
        fitting = {
            count: one
            if one["group_rows"] == one["images"]
            else measure(meter, model, one["images"], size, one["images"], **given)
            for count, one in chosen.items()
        }
    found = [*chosen.values(), *fitting.values()]
    full = [one for one in found if one["prompt_tokens"] >= MIN_PREFILLED] or found
    worst = ("launches_per_step", "kv_bytes_ratio", "weight_bytes_ratio", "host_syncs", "h2d_per_admission")
    return {
        "model": config.name,
        "size": f"{side}x{side}",
        "gpu": gpu.name,
        "computed": f"computed, not measured; {assumptions(gpu)}",
        **{key: max(one[key] for one in found) for key in worst},
        "prefill_tokens_per_forward": min(one["prefill_tokens_per_forward"] for one in full),
        "predicted_images_per_second": by_count(fitting, "predicted_images_per_second"),
        "predicted_with_group_rows": by_count(fitting, "group_rows"),
        "predicted_images_per_second_by_default": by_count(chosen, "predicted_images_per_second"),
        "group_rows_by_default": by_count(chosen, "group_rows"),
        "predicted_seconds_of_one_image": 1 / fitting["1"]["predicted_images_per_second"]
        if "1" in fitting
        else None,
        "chosen": chosen,
        "fitting": fitting,
    }


def by_count(measured: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Any]:
    """One value of each measurement.

    Args:
        measured: Number of pictures -> measurement.
        key: Name of the value.

    Returns:
        Number of pictures -> value.
    """
    return {count: one[key] for count, one in measured.items()}


def predicted_rate(
    config: ModelConfig, gpu: Gpu, sizes: Mapping[Size, int], sampling: Sampling, **given: Any
) -> tuple[float, int]:
    """Pictures a second of one GPU that makes many, computed and not measured, and the rows of its groups.

    The commonest size is counted, as by `measure`; others take time by their steps.

    Args:
        config: The model.
        gpu: Whose rates turn counts into times.
        sizes: Pictures to make by size.
        sampling: Of all rows; guided rows decode two sequences.
        given: Engine options that replace those chosen for the GPU's memory.

    Returns:
        Pictures/s, and rows of a group.

    Raises:
        InputError: No CUDA device can be made up in this process.
    """
    if reason := missing():
        raise InputError(f"--gpu needs a fake CUDA device, which cannot be made here: {reason}; give --rate.")
    common = max(sizes, key=lambda size: (sizes[size], size))
    rows = sum(sizes.values())
    meter = Meter(gpu)
    with meter.device:
        model = random_model(config, ("generate",), torch.device("cuda"), torch.bfloat16)
        images = min(rows, MANY if sampling.guided else 2 * MANY)
        found = measure(meter, model, images, common, sampling=sampling, **given)
    steps = {size: steps_of(size, config.line_break) for size in sizes}
    weighed = sum(count * steps[size] for size, count in sizes.items()) / steps[common]
    return float(found["predicted_images_per_second"] * rows / weighed), found["group_rows"]


ROWS = {
    "group_rows": "rows a group",
    "launches_per_step": "launches a step",
    "kv_bytes_ratio": "keys read / needed",
    "weight_bytes_ratio": "weights read / needed",
    "host_syncs": "host waits a step",
    "h2d_per_admission": "copies to the device an admission",
    "h2d_per_prefill_forward": "copies to the device a prefill forward",
    "launches_per_admission": "launches an admitted row",
    "host_waits_of_admission": "host waits an admission",
    "host_waits_of_results": "host waits a result",
    "prefill_tokens_per_forward": "tokens a prefill forward",
    "step_milliseconds": "ms a step",
    "predicted_images_per_second": "images/s",
}


def to_text(report: dict[str, Any]) -> str:
    """A dry run's report as a Markdown table, a column a number of pictures and rows of a group."""
    columns = dict(report["chosen"])
    columns |= {f"{n} fitting": one for n, one in report["fitting"].items() if one is not columns[n]}
    lines = [
        f"{report['model']}, {report['size']}, guided, {report['computed']}",
        "",
        "| images at once | " + " | ".join(str(one["images"]) for one in columns.values()) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for key, title in ROWS.items():
        lines.append(f"| {title} | " + " | ".join(f"{one[key]:.4g}" for one in columns.values()) + " |")
    if seconds := report["predicted_seconds_of_one_image"]:
        lines += ["", f"One image in a group of one row: {seconds:.3g} s, computed, not measured."]
    for count, one in report["fitting"].items():
        default = report["chosen"][count]
        if one is not default:
            lines.append(
                f"{count} at once: {one['predicted_images_per_second']:.3g} images/s with --group-rows "
                f"{one['group_rows']}, {default['predicted_images_per_second']:.3g} in the default group of "
                f"{default['group_rows']} rows."
            )
    return "\n".join(lines)


def print_dry_run(options: argparse.Namespace, sides: Sequence[int]) -> None:
    """Prints what a GPU would do, one report a size.

    Args:
        options: Those of `model.bench`.
        sides: Of the pictures, in pixels.

    Raises:
        InputError: No device can be made up in this process, or the GPU or its rates are unknown.
    """
    if options.device != "cuda":
        raise InputError(f"the device is {options.device}, but a dry run is of cuda: give --device cuda.")
    if any(count < 1 for count in options.images or ()):
        raise InputError(f"--images is {min(options.images)}, but must be at least 1.")
    if reason := missing():
        raise InputError(f"--dry-run cannot make a fake CUDA device here: {reason}.")
    rates = (rate and rate * 1e12 for rate in (options.bandwidth, options.flops))
    gpu = find_gpu(options.gpu, *rates)
    for side in sides:
        report = dry_run(MODELS[options.model], gpu, side, options.images or IMAGES)
        print(json.dumps(report) if options.json else to_text(report))
