"""Commands that make and measure models: `convert`, `train`, `bench`."""

import click

from wallaroo.jobs.terminal import OK, Group
from wallaroo.model.errors import InputError


@click.command(short_help="Turn the published files into a checkpoint folder.")
@click.argument("output")
@click.option(
    "--wallaroo", "weights", required=True, metavar="CKPT", help="The published model, a .ckpt file."
)
@click.option("--vq", metavar="VQ_PT", help="Its image tokenizer, LlamaGen's vq_ds16_t2i.pt.")
@click.option("--backbone", required=True, metavar="QWEN_DIR", help="Folder of Qwen2.5-VL-7B-Instruct.")
@click.option(
    "--understanding-only", is_flag=True, help="Write a stock Qwen2.5-VL folder for transformers instead."
)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of the weights (default: as stored)."
)
@click.option(
    "--layout",
    type=click.Choice(["eval", "train"]),
    default="eval",
    help="Where prompts have their size indicators: eval (default) is that of the published evaluation.",
)
@click.option(
    "--indicators",
    type=click.Choice(["added", "text"]),
    default="added",
    help="Whether size indicators are tokens of their own (default) or spelt out.",
)
@click.option(
    "--square",
    type=int,
    metavar="PIXELS",
    help="For checkpoints of stages 1 to 3.1: the side of their one size.",
)
def convert(
    output: str,
    weights: str,
    vq: str | None,
    backbone: str,
    understanding_only: bool,
    dtype: str | None,
    layout: str,
    indicators: str,
    square: int | None,
) -> int:
    """Turn the published files of Wallaroo into OUTPUT, a checkpoint folder for --model. All are local.

    \b
      wallaroo convert --wallaroo wallaroo.ckpt --vq vq_ds16_t2i.pt \\
          --backbone Qwen2.5-VL-7B-Instruct checkpoints/wallaroo-7b
      wallaroo generate prompts.jsonl out/first --model checkpoints/wallaroo-7b
    """
    if vq is None and not understanding_only:
        raise click.UsageError("--vq is absent, but pictures need it: give it, or --understanding-only.")
    import torch

    from wallaroo.model.convert import convert as write

    write(
        weights,
        vq,
        backbone,
        output,
        understanding_only=understanding_only,
        layout=layout,
        indicators=indicators,
        square=square,
        dtype=None if dtype is None else getattr(torch, dtype),
    )
    click.echo(output)
    return OK


@click.command(short_help="Train a stage of the model.")
@click.argument("stage")
@click.option("--config", "file", required=True, metavar="RECIPES.TOML", help="The stages, a table each.")
@click.option("--workers", type=int, default=1, metavar="N", help="Processes, one a GPU (default 1).")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="As in a run.")
@click.option(
    "--address",
    envvar="RAY_ADDRESS",
    metavar="ADDRESS",
    help="A running Ray cluster (default: $RAY_ADDRESS, or a local Ray).",
)
def train(stage: str, file: str, workers: int, device: str, address: str | None) -> int:
    """Train STAGE, a table of RECIPES.TOML, with Ray Train, on rows in Parquet.

    \b
      wallaroo train stage-1 --config jobs/train/published.toml --workers 8

    jobs/train/published.toml has the stages of the 7B, jobs/train/tiny.toml those of a small model. The
    stage's folder gets metrics.jsonl, TensorBoard's files, samples and, at the end, the checkpoint. Given
    again, the command goes on with the last saved step, with any number of workers that share a step's
    rows evenly.

    Exit codes: 0; 1 the training failed; 2 a mistake in the command line or the recipe; 4 another
    training is at work in the folder.
    """
    from wallaroo.model.train import Recipe
    from wallaroo.workflows import training as on_ray

    try:
        recipe = on_ray.absolute(Recipe.from_file(file, stage))
        on_ray.check(recipe, workers)
    except InputError as error:
        raise click.UsageError(str(error)) from None
    click.echo(on_ray.train(recipe, workers, device, address, click.echo))
    return OK


@click.group(cls=Group, short_help="Measure how fast this machine is.")
def bench() -> None:
    """Measure how fast this machine is."""


@bench.command("engine", short_help="The engine beside the plain loop and the machine's own limits.")
@click.option(
    "--model", type=click.Choice(["tiny", "mid", "7b"]), default="mid", help="Shapes (default mid)."
)
@click.option("--slots", type=int, default=32, metavar="N", help="Pictures decoded at once (default 32).")
@click.option("--rounds", type=int, default=5, metavar="N", help="Rounds to take medians of (default 5).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench_engine(model: str, slots: int, rounds: int, as_json: bool) -> int:
    """Time the engine, with random weights, beside the plain loop over Hugging Face's modules, at batch 1
    and at the same batch, and count its work. The same as python -m wallaroo.model.bench, which has more
    options and runs where Ray is absent.
    """
    from wallaroo.model.bench import main

    given = ["--model", model, "--slots", str(slots), "--rounds", str(rounds)]
    main([*given, *(["--json"] if as_json else [])])
    return OK
