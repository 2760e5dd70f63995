"""Commands that make and measure models: `convert`, `train`, `merge`, `bench`."""

import os
from pathlib import Path

import click

from wallaroo.jobs.options import Values
from wallaroo.jobs.terminal import INTERRUPTED, OK, Group, complain, printable
from wallaroo.model.errors import InputError
from wallaroo.workflows.options import SECONDS
from wallaroo.workflows.stopping import Stop

RECIPES = os.path.relpath(Path(__file__).parents[1] / "train")
"""Folder of the recipes that the package has, as one would type it here."""
if RECIPES.startswith(os.pardir):
    RECIPES = os.path.abspath(RECIPES)


@click.command(short_help="Turn the published files into a checkpoint folder.")
@click.argument("output", help="New checkpoint folder.")
@click.option("--wallaroo", "weights", metavar="CKPT", help="The published model, a .ckpt file.")
@click.option("--vq", metavar="VQ_PT", help="The image tokenizer, LlamaGen's vq_ds16_t2i.pt.")
@click.option("--backbone", required=True, metavar="QWEN_DIR", help="Folder of Qwen2.5-VL-7B-Instruct.")
@click.option(
    "--new-heads",
    is_flag=True,
    help="Without --wallaroo: write the start of training, with new image heads and adapters.",
)
@click.option("--seed", type=int, metavar="N", help="With --new-heads: same seed, same heads (default 0).")
@click.option(
    "--understanding-only", is_flag=True, help="Write a stock Qwen2.5-VL folder for transformers instead."
)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), help="Type of the weights (default: as stored)."
)
@click.option(
    "--layout",
    type=click.Choice(["eval", "train"]),
    help="Place of size indicators in prompts: as published for evaluation (eval, default) or for training.",
)
@click.option(
    "--indicators",
    type=click.Choice(["added", "text"]),
    default="added",
    help="Size indicators as tokens of their own (added, default) or spelled out (text).",
)
@click.option(
    "--square",
    type=int,
    metavar="PIXELS",
    help="For checkpoints of stages 1 to 3-1: the side of their one size.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace a checkpoint, or files of the same names; others stay."
)
def convert(
    output: str,
    weights: str | None,
    vq: str | None,
    backbone: str,
    new_heads: bool,
    seed: int | None,
    understanding_only: bool,
    dtype: str | None,
    layout: str | None,
    indicators: str,
    square: int | None,
    overwrite: bool,
) -> int:
    """Turn the published files of Wallaroo into OUTPUT, a checkpoint folder for --model. All are local.

    \b
      wallaroo convert --wallaroo wallaroo.ckpt --vq vq_ds16_t2i.pt \\
          --backbone Qwen2.5-VL-7B-Instruct checkpoints/wallaroo-7b
      wallaroo generate prompts.jsonl out/first --model checkpoints/wallaroo-7b

    Training stage 1 starts from the backbone and the image tokenizer alone:

    \b
      wallaroo convert --new-heads --vq vq_ds16_t2i.pt \\
          --backbone Qwen2.5-VL-7B-Instruct checkpoints/start
    """
    if vq is None and not understanding_only:
        raise click.UsageError("--vq is missing, but images need it: give it, or --understanding-only.")
    if weights is None and not new_heads:
        raise click.UsageError("--wallaroo is missing: give the published .ckpt, or --new-heads.")
    given = {
        "--wallaroo": weights,
        "--understanding-only": understanding_only or None,
        "--layout": layout,
        "--square": square,
    }
    for name, value in given.items():
        if new_heads and value is not None:
            raise click.UsageError(f"{name} does not go with --new-heads; leave one of them out.")
    if seed is not None and not new_heads:
        raise click.UsageError(f"--seed is {seed}, but only --new-heads draws weights; leave it out.")
    import torch

    from wallaroo.model.convert import convert as write
    from wallaroo.model.convert import convert_start

    kind = None if dtype is None else getattr(torch, dtype)
    if weights is None:
        assert vq is not None
        convert_start(
            backbone, vq, output, seed=seed or 0, indicators=indicators, dtype=kind, overwrite=overwrite
        )
        click.echo(output)
        return OK
    write(
        weights,
        vq,
        backbone,
        output,
        understanding_only=understanding_only,
        layout=layout or "eval",
        indicators=indicators,
        square=square,
        dtype=kind,
        overwrite=overwrite,
    )
    click.echo(output)
    return OK


@click.command(short_help="Train a stage of the model.")
@click.argument("stage", help="Name of a table of RECIPES.TOML.")
@click.option("--config", "file", required=True, metavar="RECIPES.TOML", help="The stages, a table each.")
@click.option("--workers", type=int, default=1, metavar="N", help="Workers, one per GPU (default 1).")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="As for a run.")
@click.option(
    "--address",
    envvar="RAY_ADDRESS",
    metavar="ADDRESS",
    help="A running Ray cluster (default: $RAY_ADDRESS, or a local Ray).",
)
@click.option(
    "--ray-start-timeout",
    type=Values(SECONDS),
    default="90s",
    help="How long to keep trying to start a local Ray on a busy machine (default 90s).",
)
@click.option(
    "--shard",
    type=click.Choice(["auto", "none", "full"]),
    default="auto",
    help="Each worker holds the whole model (none), a shard (full), or what fits (auto, default).",
)
@click.option(
    "--grace",
    type=Values(SECONDS),
    default="60s",
    help="Time to save the state after Ctrl-C or SIGTERM, such as 90s or 10m (default 60s).",
)
@click.option("--overwrite", is_flag=True, help="Write into a folder that holds other files.")
@click.option("--plan", is_flag=True, help="Print rows and memory per worker; start nothing.")
@click.option(
    "--gpu-memory", type=float, default=80.0, metavar="GB", help="With --plan: memory of a GPU (default 80)."
)
def train(
    stage: str,
    file: str,
    workers: int,
    device: str,
    address: str | None,
    ray_start_timeout: float,
    shard: str,
    grace: float,
    overwrite: bool,
    plan: bool,
    gpu_memory: float,
) -> int:
    from wallaroo.model.training.recipe import Recipe
    from wallaroo.workflows.training import driver as on_ray

    try:
        recipe = on_ray.absolute(Recipe.from_file(file, stage))
        on_ray.check(recipe, workers)
    except InputError as error:
        raise click.UsageError(str(error)) from None
    if plan:
        for line in on_ray.plan(recipe, workers, shard, gpu_memory):
            click.echo(line)
        return OK
    stop = Stop(grace, kept="The last saved state is kept")
    with stop.signals():
        click.echo(
            on_ray.train(
                recipe, workers, device, address, click.echo, shard, stop, overwrite, ray_start_timeout
            )
        )
    return OK


train.help = f"""Train STAGE, a table of RECIPES.TOML, with Ray Train, on rows in Parquet.

\b
  cp {RECIPES}/lora.toml .
  wallaroo train style --config lora.toml

Copy a file of {RECIPES} and put your paths in: published.toml has the stages of the 7B, lora.toml a style
from images, tiny.toml a small model from scratch. The stage's folder, on a disk or on S3, gets
metrics.jsonl, TensorBoard's files, samples, states and, at the end, the checkpoint. Re-run the same command
to resume from the last state, with any number of workers that share a step's rows evenly.

A folder that holds other files is refused without --overwrite.

Exit codes: 0; 1 the training failed; 2 a mistake in the command line or the recipe; 4 another training is
active in the folder.
"""


@click.command(short_help="Merge LoRA updates into a checkpoint folder.")
@click.argument("stage", help="Folder of a stage with `lora`.")
@click.argument("output", help="New checkpoint folder.")
@click.option("--start", default="", metavar="FOLDER", help="The checkpoint it started from, if moved.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Type of the weights (default: as in the start).",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace a checkpoint, or files of the same names; others stay."
)
def merge(stage: str, output: str, start: str, dtype: str | None, overwrite: bool) -> int:
    """Add the updates that STAGE, the folder of a stage with `lora`, has learned to the weights it began
    with, and write OUTPUT, a checkpoint folder for --model.

    \b
      wallaroo train style --config lora.toml
      wallaroo merge out/style checkpoints/style
      wallaroo generate prompts.jsonl out/drawn --model checkpoints/style
    """
    import torch

    from wallaroo.model.training.merge import merge as write
    from wallaroo.workflows.storage.checkpoints import model_path

    write(
        stage,
        output,
        start and model_path(start),
        None if dtype is None else getattr(torch, dtype),
        overwrite,
    )
    click.echo(output)
    return OK


@click.group(cls=Group, short_help="Inspect checkpoints.")
def models() -> None:
    """Inspect checkpoints."""


@models.command(short_help="Describe a checkpoint.")
@click.argument("model", help="Checkpoint folder, local or s3://, or tiny.")
def show(model: str) -> int:
    """Show tasks, sizes, layout, parameters, digest and memory by device of MODEL. Reads no weights.

    \b
      wallaroo models show tiny
      wallaroo models show checkpoints/wallaroo-7b
    """
    from wallaroo.workflows.reports.models import describe

    click.echo(printable("\n".join(describe(model))))
    return OK


@click.group(cls=Group, short_help="Measure the speed of this machine.")
def bench() -> None:
    """Measure the speed of this machine."""


@bench.command("engine", short_help="Compare the engine with the plain loop and the machine's limits.")
@click.option(
    "--model", type=click.Choice(["tiny", "mid", "7b"]), default="mid", help="Shapes (default mid)."
)
@click.option("--slots", type=int, default=32, metavar="N", help="Images decoded at once (default 32).")
@click.option("--rounds", type=int, default=5, metavar="N", help="Rounds to take medians of (default 5).")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda if there is one.")
@click.option("--dry-run", is_flag=True, help="Count without a GPU what --device cuda would do.")
@click.option(
    "--gpu", default="H200", metavar="NAME", help="For --dry-run: H200 (default), H100, A100, L40S."
)
@click.option(
    "--images", type=int, multiple=True, metavar="N", help="For --dry-run: images at once; repeatable."
)
@click.option("--bandwidth", type=float, metavar="TB/S", help="For --dry-run: reached memory bandwidth.")
@click.option("--flops", type=float, metavar="TFLOP/S", help="For --dry-run: reached 16-bit rate.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench_engine(
    model: str,
    slots: int,
    rounds: int,
    device: str | None,
    dry_run: bool,
    gpu: str,
    images: tuple[int, ...],
    bandwidth: float | None,
    flops: float | None,
    as_json: bool,
) -> int:
    """Time the engine, with random weights, and the plain loop over Hugging Face's modules, at batch 1 and
    at the same batch, and count the work of the engine. `python -m wallaroo.model.bench` does the same
    without Ray, and has more options.

    With --dry-run the engine runs on a fake CUDA device, which needs a C++ compiler and no GPU. Kernel
    launches, bytes, copies and waits are counted; times and images/s are computed from them, not measured.

    \b
      wallaroo bench engine --model 7b --device cuda --dry-run --gpu H100
    """
    from wallaroo.model.bench import main

    given = ["--model", model, "--slots", str(slots), "--rounds", str(rounds), "--gpu", gpu]
    values = {"--device": device, "--bandwidth": bandwidth, "--flops": flops}
    for name, value in values.items():
        given += [] if value is None else [name, str(value)]
    given += [word for count in images for word in ("--images", str(count))]
    flags = {"--json": as_json, "--dry-run": dry_run}
    try:
        main(given + [name for name, on in flags.items() if on])
    except KeyboardInterrupt:
        complain("Interrupted. A benchmark keeps nothing; fewer --rounds take less time.")
        return INTERRUPTED
    return OK
