"""Commands that make manifests and data sets: `prompts`, `data`, `select`, `export`."""

import os
import sys

import click

from wallaroo.jobs.terminal import ERROR_ROWS, OK, Group, printable, tell_run


@click.group(cls=Group, short_help="Make manifests of prompts.")
def prompts() -> None:
    """Make manifests of prompts. To split or filter one, see `wallaroo select`."""


@prompts.command(short_help="Expand templates and lists of values.")
@click.argument(
    "templates",
    metavar="TEMPLATE...",
    nargs=-1,
    help="Prompt templates with placeholders, such as 'a {colour} cat'.",
)
@click.argument("output", help="Manifest to write: .jsonl or .parquet, local or s3://.")
@click.option("--set", "lists", multiple=True, metavar="NAME=A,B,...", help="Values of {NAME} in templates.")
@click.option(
    "--set-file", "files", multiple=True, metavar="NAME=FILE", help="Values from the lines of a file."
)
@click.option("--templates", "more", metavar="FILE", help="More templates, one per line.")
@click.option("--sample", type=int, metavar="N", help="Write a random sample of N combinations.")
@click.option("--seed", type=int, default=0, metavar="N", help="Seed of --sample (default 0).")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
def expand(
    templates: tuple[str, ...],
    output: str,
    lists: tuple[str, ...],
    files: tuple[str, ...],
    more: str | None,
    sample: int | None,
    seed: int,
    overwrite: bool,
) -> int:
    """Write a manifest of every TEMPLATE with every combination of values to OUTPUT.

    \b
      wallaroo prompts expand 'a {colour} {animal}' '一只{colour}的{animal}' cats.jsonl \\
          --set colour=red,blue --set colour.zh=红色,蓝色 \\
          --set-file animal=animals.txt --set animal.zh=猫,狗 --set cfg=2,4

    NAME.zh and NAME.en apply only to templates in that language. A parameter of `generate` (cfg, seed,
    aspect_ratio, ...) that no template uses becomes a column. {{ and }} are literal braces. An id depends
    only on the values of its row, so lists may grow.
    """
    from wallaroo.workflows import storage
    from wallaroo.workflows.manifests.expand import expand as write
    from wallaroo.workflows.manifests.expand import read_list

    if not overwrite and storage.exists(output):
        raise click.UsageError(f"{output} exists already: name another file, or --overwrite to replace it.")
    values = {name: text.split(",") for name, text in map(_pair, lists)}
    values |= {name: read_list(path) for name, path in map(_pair, files)}
    texts = [*templates, *(read_list(more) if more else [])]
    click.echo(f"{output}: {write(texts, values, output, sample, seed):,} prompts")
    return OK


@click.group(cls=Group, short_help="Make data sets.")
def data() -> None:
    """Make data sets."""


@data.command(short_help="Draw scenes with captions, edits and questions.")
@click.argument("output", help="Folder to write to.")
@click.option("--rows", type=int, default=24_000, metavar="N", help="Training rows per task (default 24000).")
@click.option("--held-out", type=int, default=600, metavar="N", help="Held-out rows per task (default 600).")
@click.option("--seed", type=int, default=0, metavar="N", help="Same seed, same data (default 0).")
@click.option(
    "--model", default="tiny", metavar="FOLDER", help="Checkpoint whose image sizes to use (default tiny)."
)
@click.option("--square", type=int, metavar="PIXELS", help="Use one square size instead.")
@click.option("--lines", is_flag=True, help="Also write JSON lines for `python -m wallaroo.model.training`.")
@click.option(
    "--hard",
    is_flag=True,
    help="Mostly edits of one of two objects, and questions instead of captions, for training.",
)
@click.option("--overwrite", is_flag=True, help="Write into a folder that is not empty.")
def shapes(
    output: str,
    rows: int,
    held_out: int,
    seed: int,
    model: str,
    square: int | None,
    lines: bool,
    hard: bool,
    overwrite: bool,
) -> int:
    """Draw scenes of one to three objects and write them to the folder OUTPUT: train/ and held-out/, each
    with generate.parquet, edit.parquet and understand.parquet, which are manifests of those tasks.

    A hash holds out one in eight combinations of objects, relation and background.

    \b
      wallaroo data shapes out/shapes
      wallaroo generate out/shapes/held-out/generate.parquet out/drawn
      wallaroo evaluate shapes out/drawn
    """
    from wallaroo.model.checkpoint import TINY, load_config
    from wallaroo.model.config import VQ_FACTOR, Size
    from wallaroo.workflows.scenes.world import SPANS
    from wallaroo.workflows.scenes.write import write

    smallest = VQ_FACTOR * 2 * SPANS["small"]
    if square is not None and (square % VQ_FACTOR or square < smallest):
        raise click.UsageError(
            f"--square is {square}, but must be a multiple of {VQ_FACTOR}, and at least {smallest}."
        )
    sizes = [Size(square, square)] if square else load_config(TINY if model == "tiny" else model).size_list()
    for path in write(output, rows, held_out, seed, sizes, lines, hard, overwrite):
        click.echo(path)
    return OK


@click.command(short_help="Filter, deduplicate and split a data set.")
@click.argument("source", help="OUTPUT of a run, or a manifest.")
@click.argument("dest", help="New folder of the copy, local or s3://.")
@click.option("--filter", "filter_", metavar="MODULE:FUNCTION", help="Keep rows for which it returns True.")
@click.option(
    "--best-of", metavar="SCORE", help="Keep the best row of each id by a column or MODULE:FUNCTION."
)
@click.option("--scores", metavar="OUTPUT", help="Data set made from SOURCE, with the column of --best-of.")
@click.option(
    "--drop-near-duplicates",
    "near",
    type=int,
    metavar="BITS",
    help="Drop rows whose image hash differs in at most BITS of 64 from an earlier one (0 to 16; try 4).",
)
@click.option(
    "--split",
    "shares",
    metavar="NAME=SHARE,...",
    help="Split by a hash of the id, such as train=0.9,test=0.1.",
)
@click.option(
    "--group", default="id", metavar="COLUMN", help="Column to use in place of id for --best-of and --split."
)
@click.option("--overwrite", is_flag=True, help="Replace another selection, or write beside other files.")
def select(
    source: str,
    dest: str,
    filter_: str | None,
    best_of: str | None,
    scores: str | None,
    near: int | None,
    shares: str | None,
    group: str,
    overwrite: bool,
) -> int:
    """Copy selected rows of SOURCE to the new folder DEST.

    \b
      wallaroo select out/cats out/kept --drop-near-duplicates 4 --split train=0.9,test=0.1
      wallaroo select out/cats out/best --best-of text --scores out/judged
      wallaroo select prompts.jsonl out/clean --filter checks:is_harmless

    Steps in order: drop error rows, apply the filter, keep the best of each id, drop near-duplicates,
    split. A function gets a row as a dict; its module may be in the working directory. A row on which it
    raises is dropped. --best-of takes the first number of a text (8/10 is 8). A row is a near-duplicate if
    the 64-bit difference hash of its image differs in at most BITS from that of an earlier row that was
    kept. All rows of an id are in the same split.

    DEST gets data/*.parquet, or a folder per split; README.md; and _dropped.jsonl, with the reason for
    every row that was left out. Exit codes: 0; 3 if a function, a score or an image failed.
    """
    from wallaroo.jobs.progress import Display
    from wallaroo.workflows.datasets.rules import Rules
    from wallaroo.workflows.datasets.select import select as copy

    tell_run(source)
    # Last, and only where it is asked for: a folder of data may hold a module with the name of a library's.
    if any(name and ":" in name for name in (filter_, best_of)):
        sys.path.append(os.getcwd())
    split = {}
    for name, share in map(_pair, shares.split(",") if shares else ()):
        try:
            split[name] = float(share)
        except ValueError:
            raise click.UsageError(f"the share of {name} is '{share}', but must be a number.") from None
    rules = Rules(filter_, best_of, scores, near, split, group)
    with Display() as display:
        found = copy(source, dest, rules, overwrite, display)
    words = [f"{found.rows:,} rows: {found.kept:,} kept"]
    words += [f"{count:,} dropped ({reason})" for reason, count in found.dropped.items()]
    click.echo(", ".join(words))
    for name, count in found.splits.items():
        empty = "" if count else " (empty, not written)"
        click.echo(f"  {dest.rstrip('/')}/{name}  {count:,}{empty}")
    for reason, example in found.examples.items():
        click.echo(printable(f"  {reason}, the first row: {example}"), err=True)
    return ERROR_ROWS if found.failures else OK


def _pair(text: str) -> tuple[str, str]:
    """Both sides of NAME=VALUE."""
    name, mark, value = text.partition("=")
    if not (name.strip() and mark):
        raise click.UsageError(f"'{text}' must be NAME=VALUE.")
    return name.strip(), value


@click.command(short_help="Export results for another tool.")
@click.argument("format", help="Name in the list above, such as files or webdataset.")
@click.argument("output", help="Folder of a finished run; with --partial, of any run.")
@click.argument("dest", help="Folder to write to.")
@click.option(
    "--embed-metadata",
    is_flag=True,
    help="Write prompt, seed, model digest and IPTC's digital source type into the image files.",
)
@click.option(
    "--image-urls",
    metavar="URL",
    help="For openai-batch: write images to DEST/images, and their addresses below URL into the lines.",
)
@click.option(
    "--c2pa",
    nargs=2,
    metavar="CERT KEY",
    help="For files: sign Content Credentials with a certificate and its key (PEM); needs the extra c2pa.",
)
@click.option(
    "--partial", is_flag=True, help="Export the finished shards of a run that is active or was stopped."
)
@click.option(
    "--overwrite", is_flag=True, help="Replace files that differ, and write beside files of other tools."
)
def export(
    format: str,
    output: str,
    dest: str,
    embed_metadata: bool,
    image_urls: str | None,
    c2pa: tuple[str, str] | None,
    partial: bool,
    overwrite: bool,
) -> int:
    """Write the ok rows of OUTPUT to DEST in the format of another tool.

    \b
      files         images named by id and metadata.jsonl, Hugging Face's imagefolder
      webdataset    tar shards of images, prompts and metadata
      img2dataset   the same with the names and keys of img2dataset
      geneval       the tree that GenEval's evaluator reads
      dpg           grids of four samples for DPG-Bench
      dpg-single    the single samples, a folder per sample number
      wise          PROMPT_ID.png for WISE's evaluator
      t2i-compbench samples/PROMPT_NUMBER.png for T2I-CompBench
      imgedit       KEY.png for ImgEdit's evaluator
      gedit         results and sources in GEdit-Bench's tree
      jsonl         questions and answers, of `understand`
      vlmevalkit    a table of predictions, of `understand`
      openai-batch  result lines of OpenAI's batch API

    OUTPUT and DEST may be s3://bucket/key. Re-run to resume. A file with other content, or of another kind,
    is refused without --overwrite; none is deleted.

    \b
      wallaroo export files out/first marked --embed-metadata
      wallaroo export webdataset out/first s3://bucket/shards

    Exit codes: 0 every row was exported, with --partial every finished row; 1 nothing can be exported; 3
    there are error rows, or rows that the format cannot hold.
    """
    from wallaroo.jobs.progress import Display
    from wallaroo.workflows.datasets.export import export as write

    running = tell_run(output)
    with Display() as display:
        summary = write(
            output,
            dest,
            format,
            embed_metadata=embed_metadata,
            image_urls=image_urls,
            c2pa=c2pa,
            partial=partial,
            overwrite=overwrite,
            on_progress=display,
        )
    if running and not summary.partial:
        click.echo("The output is finished by now: the export is complete.", err=True)
    click.echo(summary.text())
    return ERROR_ROWS if summary.errors or summary.left_out else OK
