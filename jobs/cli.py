"""The `wallaroo` command: reads argv, calls a workflow, turns what became of it into an exit code.

Knows nothing of how anything is done. Imports no library of weight before a task needs it, so that
`wallaroo --help` and `wallaroo status` answer at once.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from wallaroo.jobs.config import SECTIONS, SETTINGS, Setting, resolve
from wallaroo.jobs.view import view
from wallaroo.model.errors import InputError
from wallaroo.workflows.stopping import RunStopped, Stop

if TYPE_CHECKING:
    from wallaroo.workflows.plans.plan import Plan
    from wallaroo.workflows.settings import RunConfig, RunSummary

OK, FATAL, USAGE, ERROR_ROWS, LOCKED, STOPPED = 0, 1, 2, 3, 4, 5
INTERRUPTED = 128 + signal.SIGINT

MAX_CHARACTERS = 20_000
"""Of a message."""

Function = TypeVar("Function", bound=Callable[..., Any])

EXIT_CODES = """Exit codes: 0 all rows ok; 1 the run failed; 2 a mistake in the command line; 3 finished,
with error rows; 4 another run is at work on this output; 5 stopped by Ctrl-C, SIGTERM or --deadline."""

PLACES = """MANIFEST is a Parquet, CSV or JSONL file, a folder of them or a quoted glob; OUTPUT is the
folder of the data set. Every path may be s3://bucket/key, with endpoint and credentials from the
usual AWS variables and profiles."""


PICTURES = """A picture is a path, relative to the manifest or absolute, s3://, https:// with --allow-https,
or bytes in a Parquet file, also as {bytes, path}. MANIFEST may also be a folder of pictures, or the
output of a finished run: of that the ok rows, with their pictures."""

SCHEDULED = "End with 0 also if rows are errors, or another run is at work, as schedulers want it."
ON_FINISH = "POST to a URL, or run a command, with how it ended as JSON."
DASHBOARD = "Of the cluster's dashboard (default: $RAY_API_SERVER_ADDRESS or $RAY_ADDRESS)."


class SettingOption(click.Option):
    """The option of a Setting."""

    def __init__(self, setting: Setting):
        self.setting = setting
        names = [setting.flag, setting.name.replace(".", "__")]
        if setting.metavar:
            super().__init__(names, metavar=setting.metavar, help=setting.help)
        else:
            super().__init__(names, is_flag=True, default=None, help=setting.help)


class RunCommand(click.Command):
    """A command whose help shows the settings of a run under the headings of their sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {heading: [] for heading in SECTIONS.values()}
        other = []
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is None:
                continue
            if isinstance(option, SettingOption):
                groups[SECTIONS[option.setting.section]].append(record)
            else:
                other.append(record)
        for heading, records in [*groups.items(), ("Run file and more", other)]:
            if not records:
                continue
            with formatter.section(heading):
                formatter.write_dl(records)


class OrderedGroup(click.Group):
    """Lists its commands in the order in which a person needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def run_options(task: str | None = None) -> Callable[[Function], Function]:
    """Adds the options of a task, or of all; the function gets them as keyword arguments."""
    return functools.partial(_with_options, task=task)


def _with_options(function: Function, task: str | None) -> Function:
    click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Any setting by its name in a run file; may be repeated.",
    )(function)
    click.option("--config", "file", metavar="RUN.TOML", help="A run file; flags and --set win over it.")(
        function
    )
    params: list[click.Parameter] = function.__click_params__  # type: ignore[attr-defined]
    # click reads them backwards, as decorators are applied.
    params.extend(
        SettingOption(setting) for setting in reversed(SETTINGS) if task is None or setting.serves(task)
    )
    return function


@click.group(
    cls=OrderedGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Help on a command: wallaroo COMMAND --help",
)
@click.version_option(package_name="wallaroo-batch", prog_name="wallaroo", message="%(prog)s %(version)s")
def cli() -> None:
    """Batch image generation, editing and understanding with the Wallaroo model on Ray.

    A manifest goes in, a Parquet data set of pictures or texts comes out. A run that is stopped, killed
    or cut off goes on where it was when the same command is given again.

    \b
      wallaroo generate prompts.jsonl out/first
      wallaroo understand out/first out/captions
      wallaroo status out/first
      wallaroo verify out/first
    """


@cli.command(
    cls=RunCommand,
    short_help="Make pictures from a manifest of prompts.",
    epilog=EXIT_CODES,
)
@click.argument("manifest")
@click.argument("output")
@run_options("generate")
@click.option("--scheduled", is_flag=True, help=SCHEDULED)
@click.option("--on-finish", metavar="URL|COMMAND", help=ON_FINISH)
def generate(manifest: str, output: str, scheduled: bool, on_finish: str | None, **options: Any) -> int:
    return _run("generate", manifest, output, options, scheduled, on_finish)


generate.help = f"""Make pictures from a manifest of prompts.

{PLACES}

The manifest needs a column `prompt` and may have id, samples, seed, cfg, temperature, top_k, top_p,
language, and width with height, or aspect_ratio. All other columns are carried through. A row that
cannot be served becomes an error row with its reason; it stops nobody else's.

\b
  wallaroo generate prompts.jsonl out/first --samples 4
  wallaroo generate 's3://bucket/prompts/*.parquet' s3://bucket/pictures --replicas 8
  wallaroo generate prompts.csv out/look --limit 20 --cfg 4 --top-p 0.95
"""


@cli.command(
    cls=RunCommand,
    short_help="Edit pictures as a manifest instructs.",
    epilog=EXIT_CODES,
)
@click.argument("manifest")
@click.argument("output")
@run_options("edit")
@click.option("--scheduled", is_flag=True, help=SCHEDULED)
@click.option("--on-finish", metavar="URL|COMMAND", help=ON_FINISH)
def edit(manifest: str, output: str, scheduled: bool, on_finish: str | None, **options: Any) -> int:
    return _run("edit", manifest, output, options, scheduled, on_finish)


edit.help = f"""Edit pictures as a manifest instructs.

{PLACES}
{PICTURES}

The manifest needs the columns `image` and, without --prompt, `prompt`; it may have id, samples, seed,
cfg, temperature, top_k, top_p and language. Results have the size of the checkpoint that is nearest to
the source's ratio. ImgEdit's JSON of keys, each with id, prompt and edit_type, is a manifest too.

\b
  wallaroo edit edits.jsonl out/edited
  wallaroo edit photos/ out/winter --prompt 'make it winter' --restore-size
  wallaroo edit out/captions out/edited --prompt-column text
  wallaroo edit imgedit.json out/bench --image-root ImgEdit/singleturn --preset imgedit
"""


@cli.command(
    cls=RunCommand,
    short_help="Describe pictures, or answer questions about them.",
    epilog=EXIT_CODES,
)
@click.argument("manifest")
@click.argument("output")
@run_options("understand")
@click.option("--scheduled", is_flag=True, help=SCHEDULED)
@click.option("--on-finish", metavar="URL|COMMAND", help=ON_FINISH)
def understand(manifest: str, output: str, scheduled: bool, on_finish: str | None, **options: Any) -> int:
    return _run("understand", manifest, output, options, scheduled, on_finish)


understand.help = f"""Describe pictures, or answer questions about them.

{PLACES}
{PICTURES}

The manifest needs a column `image` and may have prompt (a question; without one the picture is
described), id, samples, seed, temperature, top_k, top_p and language. By default the likeliest token
is taken, always.

\b
  wallaroo understand photos/ out/captions
  wallaroo understand out/first out/captions --language zh
  wallaroo understand questions.parquet s3://bucket/answers --max-new-tokens 64
"""


@cli.command(
    cls=RunCommand,
    short_help="Plan a run, and make nothing yet.",
    epilog=EXIT_CODES,
)
@click.argument("task")
@click.argument("manifest")
@click.argument("output", required=False)
@run_options()
@click.option("--estimate", is_flag=True, help="Add time, memory, bytes and, with --price-per-hour, cost.")
@click.option(
    "--rate", metavar="N|OUTPUT", help="For it: rows a second of one replica, or an output that measured it."
)
def plan(
    task: str, manifest: str, output: str | None, estimate: bool, rate: str | None, **options: Any
) -> int:
    config = _configure(task, manifest, output or "", options)
    from wallaroo.jobs.progress import Display
    from wallaroo.workflows.runs.setup import plan as make

    with Display() as display:
        made = make(config, display)
    click.echo(_plan_text(made))
    if estimate or rate:
        from wallaroo.workflows.reports.estimate import estimate as reckon

        click.echo("\n".join(reckon(made, config, rate).lines()))
    if output:
        click.echo(f"Written to {output}; `wallaroo {task}` with the same options goes on with it.")
    return OK


plan.help = f"""Decide every row of a run and count them, without making any.

{PLACES} With OUTPUT the plan is written, and the task goes on with it; without, nothing is.
Options are those of the task.

\b
  wallaroo plan generate prompts.jsonl
  wallaroo plan generate prompts.jsonl out/first --samples 4
  wallaroo plan generate prompts.jsonl --estimate --rate out/look --replicas 8
  wallaroo plan understand photos/
"""


@cli.command(short_help="Merge the small files of many increments.")
@click.argument("output")
def compact(output: str) -> int:
    """Merge the many small shards that starts with --incremental left in OUTPUT. Rows stay as they are; new
    files come first, and old ones go when the plan names the new. OUTPUT must be finished.

    Exit codes: 0; 1 OUTPUT cannot be compacted; 4 a run is at work on it.
    """
    from wallaroo.workflows.datasets.compact import compact as merge

    found = merge(output)
    words = f"{found.before:,} shards became {found.after:,}"
    click.echo(f"{output}: {words if found.after < found.before else 'its shards are large enough'}")
    return OK


@cli.command(short_help="Say how far a run is.")
@click.argument("output")
def status(output: str) -> int:
    """Say how far a run is, from the records in OUTPUT, running or not. Starts nothing and reads little.

    Exit codes: 0 there is something to tell; 1 OUTPUT is no output of a run.
    """
    from wallaroo.workflows.reports.status import status as read_status

    click.echo(_printable(read_status(output).text()))
    return OK


@cli.command(short_help="Write report.html anew.")
@click.argument("output")
def report(output: str) -> int:
    """Write OUTPUT/report.html anew, at any time in the life of a run: counts, throughput over time,
    examples of errors and a gallery, in one file that needs no network.
    """
    from wallaroo.workflows.reports.page import write_report

    click.echo(write_report(output))
    return OK


@cli.command(short_help="Read everything back and check it.")
@click.argument("output")
def verify(output: str) -> int:
    """Read the data set in OUTPUT back and check it: every planned row is there once, every picture
    decodes at its stated size and hash, the schema is as declared.

    Exit codes: 0 complete and as planned, error rows or not; 1 incomplete or broken.
    """
    from wallaroo.workflows.reports.verify import verify as check

    state = check(output, lambda line: click.echo(_printable(line))).state
    return OK if state == "complete" else FATAL


@cli.command(
    short_help="Run a command on a cluster.",
    epilog=EXIT_CODES,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("--address", metavar="URL", help=DASHBOARD)
@click.option("--name", metavar="NAME", help="By which `wallaroo jobs` finds the run, beside its id.")
@click.option("--follow", is_flag=True, help="Show what it says until it ends, and end as it does.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def submit(address: str | None, name: str | None, follow: bool, command: tuple[str, ...]) -> int:
    """Run COMMAND (generate, edit or understand, with its arguments) as a job of a Ray cluster.

    \b
      wallaroo submit --address http://127.0.0.1:8265 --follow -- \\
          generate prompts.jsonl s3://bucket/pictures --model s3://bucket/wallaroo-7b --replicas 8

    The job brings its code along, and a manifest or run file that is given by a relative path; output
    and model must be where the cluster reaches them. A run that is submitted again while it is at work is
    found, not started twice; after it ended a new job goes on where it was. A token is taken from
    RAY_AUTH_TOKEN or ~/.ray/auth_token. Ctrl-C ends --follow, not the job.
    """
    from wallaroo.jobs import submit as remote
    from wallaroo.model.config import TASKS

    task, *words = command
    if task not in TASKS:
        raise click.UsageError(f"'{task}' cannot be submitted, but {', '.join(TASKS)} can.")
    inner = cli.commands[task]
    with inner.make_context(task, list(words), parent=click.Context(cli, info_name="wallaroo")) as context:
        options = dict(context.params)
    if (options.pop("on_finish") or "").startswith(("http://", "https://")):
        raise click.UsageError(
            "--on-finish is a URL, which all who see the cluster's jobs could read: give a command that "
            "takes it from the environment there, such as 'curl -d @- $HOOK'."
        )
    del options["scheduled"]
    config = _configure(task, options.pop("manifest"), options.pop("output"), options, environment={})
    files = remote.carried(config, command)
    client = remote.connect(address)
    job, new = remote.submit(client, config, command, files, name)
    click.echo(f"{job}: submitted" if new else f"{job}: at work already, submitted before")
    click.echo(f"  output  {config.output}")
    if not follow:
        click.echo(f"`wallaroo jobs status {job}` says how far it is.")
        return OK
    return _follow(client, job)


def _follow(client: Any, job: str) -> int:
    from wallaroo.jobs import submit as remote

    try:
        ended = remote.follow(client, job, functools.partial(click.echo, nl=False))
    except KeyboardInterrupt:
        _complain(f"the job goes on; `wallaroo jobs stop {job}` ends it.")
        return INTERRUPTED
    click.echo(f"{job}: {ended.state.lower()}" + (f", {ended.message}" if ended.state == "FAILED" else ""))
    if ended.exit_code is not None:
        return ended.exit_code
    return {"SUCCEEDED": OK, "STOPPED": STOPPED}.get(ended.state, FATAL)


@cli.group(short_help="Runs on a cluster: list, status, logs, stop.")
def jobs() -> None:
    """Runs that were given to a cluster by `wallaroo submit`. JOB is an id, a name, or an output."""


@jobs.command(name="list", short_help="All runs that the cluster knows.")
@click.option("--address", metavar="URL", help=DASHBOARD)
def jobs_list(address: str | None) -> int:
    """List the runs of a cluster, newest first, each with its own count of rows."""
    from wallaroo.jobs import submit as remote

    found = remote.jobs(remote.connect(address))
    for job in found:
        told = remote.progress(job)
        click.echo(f"{job.id}  {job.state:<9}  {job.output}" + (f"  ({job.name})" if job.name else ""))
        click.echo(
            f"    {told.line() if told else 'its output cannot be read from here, or is not there yet'}"
        )
    if not found:
        click.echo("The cluster knows no run.")
    return OK


@jobs.command(name="status", short_help="How far one is.")
@click.argument("job")
@click.option("--address", metavar="URL", help=DASHBOARD)
def jobs_status(job: str, address: str | None) -> int:
    """Say what the cluster knows of JOB, and how far it is by its own records."""
    from wallaroo.jobs import submit as remote

    found = remote.find(remote.connect(address), job)
    click.echo(f"{found.id}: {found.state}" + (f", {found.message}" if found.message else ""))
    told = remote.progress(found)
    click.echo(told.text() if told else f"{found.output} cannot be read from here, or is not there.")
    return OK


@jobs.command(name="logs", short_help="What one said.")
@click.argument("job")
@click.option("--follow", is_flag=True, help="Go on until it ends, and end as it does.")
@click.option("--address", metavar="URL", help=DASHBOARD)
def jobs_logs(job: str, follow: bool, address: str | None) -> int:
    """Show what JOB said. Once the cluster is gone, it stands in OUTPUT/runs/*.log."""
    from wallaroo.jobs import submit as remote

    client = remote.connect(address)
    found = remote.find(client, job)
    if follow:
        return _follow(client, found.id)
    click.echo(remote.logs(client, found.id), nl=False)
    return OK


@jobs.command(name="stop", short_help="Stop one; submitted again, it goes on.")
@click.argument("job")
@click.option("--address", metavar="URL", help=DASHBOARD)
def jobs_stop(job: str, address: str | None) -> int:
    """Stop JOB and wait until it has stopped; what it finished is kept.

    Exit codes: 0 it is over; 1 it does not stop.
    """
    from wallaroo.jobs import submit as remote

    ended = remote.stop(remote.connect(address), job)
    click.echo(f"{ended.id}: {ended.state.lower()}" + ("" if ended.over else " still"))
    return OK if ended.over else FATAL


@cli.command(short_help="Turn the published files into a checkpoint folder.")
@click.argument("output")
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
    "--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of the weights (default: as stored)."
)
@click.option(
    "--layout",
    type=click.Choice(["eval", "train"]),
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
        raise click.UsageError("--vq is absent, but pictures need it: give it, or --understanding-only.")
    if weights is None and not new_heads:
        raise click.UsageError("--wallaroo is absent: give the published .ckpt, or --new-heads to train one.")
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
        convert_start(backbone, vq, output, seed=seed or 0, indicators=indicators, dtype=kind)
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
    )
    click.echo(output)
    return OK


@cli.command(short_help="Write results in the format of another tool.")
@click.argument("format")
@click.argument("output")
@click.argument("dest")
@click.option(
    "--embed-metadata",
    is_flag=True,
    help="Write prompt, seed, model digest and IPTC's digital source type into the picture files.",
)
@click.option(
    "--image-urls",
    metavar="URL",
    help="For openai-batch: pictures become files in DEST/images, and lines hold URLs below this one.",
)
def export(format: str, output: str, dest: str, embed_metadata: bool, image_urls: str | None) -> int:
    """Write the ok rows of a finished OUTPUT into the folder DEST in the format of another tool.

    \b
      files         pictures named by id and metadata.jsonl, Hugging Face's imagefolder
      webdataset    tar shards of pictures, prompts and metadata
      geneval       the tree that GenEval's evaluator reads
      dpg           grids of four samples for DPG-Bench
      imgedit       KEY.png for ImgEdit's evaluator
      jsonl         questions and answers, of `understand`
      openai-batch  result lines of OpenAI's batch API

    OUTPUT and DEST may be s3://bucket/key. Given again, it goes on and leaves what is there as it is.

    \b
      wallaroo export files out/first pictures --embed-metadata
      wallaroo export webdataset out/first s3://bucket/shards

    Exit codes: 0 every row is exported; 1 nothing can be; 3 error rows or rows that the format has no
    place for are left out.
    """
    from wallaroo.workflows.datasets.export import export as write

    summary = write(output, dest, format, embed_metadata=embed_metadata, image_urls=image_urls)
    click.echo(summary.text())
    return ERROR_ROWS if summary.errors or summary.left_out else OK


cli.add_command(view)


@cli.group(short_help="Make manifests of prompts.")
def prompts() -> None:
    """Make manifests of prompts. To split or filter one, see `wallaroo select`."""


@prompts.command(short_help="Templates and lists of values become a manifest.")
@click.argument("templates", metavar="TEMPLATE...", nargs=-1)
@click.argument("output")
@click.option("--set", "lists", multiple=True, metavar="NAME=A,B,...", help="Values of {NAME} in templates.")
@click.option(
    "--set-file", "files", multiple=True, metavar="NAME=FILE", help="The same, from the lines of a file."
)
@click.option("--templates", "more", metavar="FILE", help="More templates, one a line of a file.")
@click.option("--sample", type=int, metavar="N", help="Draw N of the combinations.")
@click.option("--seed", type=int, default=0, metavar="N", help="Of that draw (default 0).")
def expand(
    templates: tuple[str, ...],
    output: str,
    lists: tuple[str, ...],
    files: tuple[str, ...],
    more: str | None,
    sample: int | None,
    seed: int,
) -> int:
    """Write OUTPUT, a .jsonl or .parquet manifest of every TEMPLATE with every combination of values.

    \b
      wallaroo prompts expand 'a {colour} {animal}' '一只{colour}的{animal}' cats.jsonl \\
          --set colour=red,blue --set colour.zh=红色,蓝色 \\
          --set-file animal=animals.txt --set animal.zh=猫,狗 --set cfg=2,4

    NAME.zh and NAME.en are for templates in that language alone. A parameter of `generate` (cfg, seed,
    aspect_ratio, ...) that no template has becomes a column. {{ and }} are braces. Ids depend on what
    is in a row alone, so lists may grow.
    """
    from wallaroo.workflows.manifests.expand import expand as write
    from wallaroo.workflows.manifests.expand import read_list

    values = {name: text.split(",") for name, text in map(_pair, lists)}
    values |= {name: read_list(path) for name, path in map(_pair, files)}
    texts = [*templates, *(read_list(more) if more else [])]
    click.echo(f"{output}: {write(texts, values, output, sample, seed):,} prompts")
    return OK


@cli.group(short_help="Make data sets.")
def data() -> None:
    """Make data sets."""


@data.command(short_help="A world of drawn scenes, with captions, edits and questions.")
@click.argument("output")
@click.option("--rows", type=int, default=24_000, metavar="N", help="To train on, a task (default 24000).")
@click.option("--held-out", type=int, default=600, metavar="N", help="To evaluate on, a task (default 600).")
@click.option("--seed", type=int, default=0, metavar="N", help="Same seed, same data (default 0).")
@click.option(
    "--model", default="tiny", metavar="FOLDER", help="Checkpoint whose sizes to draw (default tiny)."
)
@click.option("--square", type=int, metavar="PIXELS", help="Draw one size, of this side, instead.")
@click.option(
    "--lines", is_flag=True, help="Also as JSON lines, which `python -m wallaroo.model.training` reads."
)
@click.option(
    "--hard", is_flag=True, help="To train on, mostly edits of one object of two, and questions for captions."
)
def shapes(
    output: str,
    rows: int,
    held_out: int,
    seed: int,
    model: str,
    square: int | None,
    lines: bool,
    hard: bool,
) -> int:
    """Write drawn scenes of one to three objects to the folder OUTPUT: train/ and held-out/, each with
    generate.parquet, edit.parquet and understand.parquet, which are manifests of those tasks.

    One combination in eight of objects, relation and background is held out, by a hash.

    \b
      wallaroo data shapes out/shapes
      wallaroo generate out/shapes/held-out/generate.parquet out/drawn
      wallaroo evaluate shapes out/drawn
    """
    from wallaroo.model.checkpoint import TINY, load_config
    from wallaroo.model.config import VQ_FACTOR, Size
    from wallaroo.workflows.scenes.world import SPANS
    from wallaroo.workflows.scenes.write import write

    least = VQ_FACTOR * 2 * SPANS["small"]
    if square is not None and (square % VQ_FACTOR or square < least):
        raise click.UsageError(f"--square is {square}, but must be a multiple of {VQ_FACTOR} from {least}.")
    sizes = [Size(square, square)] if square else load_config(TINY if model == "tiny" else model).size_list()
    for path in write(output, rows, held_out, seed, sizes, lines, hard):
        click.echo(path)
    return OK


@cli.command(short_help="Train a stage of the model.")
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
@click.option(
    "--shard",
    type=click.Choice(["auto", "none", "full"]),
    default="auto",
    help="Each worker holds the whole model (none), a shard (full), or what fits (auto, default).",
)
@click.option(
    "--grace",
    type=float,
    default=60.0,
    metavar="SECONDS",
    help="Time to save the state after Ctrl-C or SIGTERM (default 60).",
)
@click.option("--plan", is_flag=True, help="Print rows and memory a worker, and start nothing.")
@click.option(
    "--gpu-memory", type=float, default=80.0, metavar="GB", help="With --plan: of a GPU (default 80)."
)
def train(
    stage: str,
    file: str,
    workers: int,
    device: str,
    address: str | None,
    shard: str,
    grace: float,
    plan: bool,
    gpu_memory: float,
) -> int:
    """Train STAGE, a table of RECIPES.TOML, with Ray Train, on rows in Parquet.

    \b
      wallaroo train stage-1 --config jobs/train/published.toml --workers 8

    jobs/train/published.toml has the stages of the 7B, jobs/train/tiny.toml those of a small model. The
    stage's folder, on a disk or on S3, gets metrics.jsonl, TensorBoard's files, samples, states and, at the
    end, the checkpoint. Re-run the same command to resume from the last state, with any number of workers
    that share a step's rows evenly.

    Exit codes: 0; 1 the training failed; 2 a mistake in the command line or the recipe; 4 another
    training is at work in the folder.
    """
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
    stop = Stop(grace)
    with stop.signals():
        click.echo(on_ray.train(recipe, workers, device, address, click.echo, shard, stop))
    return OK


@cli.command(short_help="Turn what LoRA has learned into a checkpoint folder.")
@click.argument("stage")
@click.argument("output")
@click.option("--start", default="", metavar="FOLDER", help="The weights it began with, if they have moved.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Of the weights (default: that of the start).",
)
def merge(stage: str, output: str, start: str, dtype: str | None) -> int:
    """Add the updates that STAGE, the folder of a stage with `lora`, has learned to the weights it began
    with, and write OUTPUT, a checkpoint folder for --model.

    \b
      wallaroo train style --config jobs/train/lora.toml
      wallaroo merge out/style checkpoints/style
      wallaroo generate prompts.jsonl out/drawn --model checkpoints/style
    """
    import torch

    from wallaroo.model.training.lora import merge as write

    write(stage, output, start, None if dtype is None else getattr(torch, dtype))
    click.echo(output)
    return OK


@cli.group(short_help="Measure how fast this machine is.")
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


@cli.group(short_help="Score results.")
def evaluate() -> None:
    """Score results."""


@evaluate.command("shapes", short_help="Whether pictures and answers are right, of drawn scenes.")
@click.argument("output")
def evaluate_shapes(output: str) -> int:
    """Look at the results in OUTPUT, of a run on manifests of `wallaroo data shapes`, and count what is
    right: of pictures number of objects, shape, colour, background and relation; of edits whether they
    were done and the rest kept; of answers whether they are the same but for case and punctuation.

    A checker that knows colours and forms looks; nothing in it learns. The table is printed, written
    to OUTPUT/evaluation.json, and is part of the report from then on. Rows of combinations that
    occur in training are counted apart.
    """
    from wallaroo.workflows.reports.page import write_report
    from wallaroo.workflows.scenes.evaluate import evaluate, to_text

    click.echo(to_text(evaluate(output)))
    write_report(output)
    return OK


@cli.command(short_help="Copy the rows of a data set that are worth keeping.")
@click.argument("source")
@click.argument("dest")
@click.option("--filter", "filter_", metavar="MODULE:FUNCTION", help="Keep rows it returns True for.")
@click.option("--best-of", metavar="SCORE", help="Keep the best row of each id: a column or MODULE:FUNCTION.")
@click.option("--scores", metavar="OUTPUT", help="The data set made from SOURCE that has that column.")
@click.option(
    "--drop-near-duplicates", "near", type=int, metavar="BITS", help="0 to 16 bits of 64; 4 is a good start."
)
@click.option(
    "--split", "shares", metavar="NAME=SHARE,...", help="Such as train=0.9,test=0.1, by a hash of the id."
)
@click.option("--group", default="id", metavar="COLUMN", help="In place of id in the two above.")
def select(
    source: str,
    dest: str,
    filter_: str | None,
    best_of: str | None,
    scores: str | None,
    near: int | None,
    shares: str | None,
    group: str,
) -> int:
    """Copy rows of SOURCE, the output of a run or a manifest, to the new folder DEST.

    \b
      wallaroo select out/cats out/kept --drop-near-duplicates 4 --split train=0.9,test=0.1
      wallaroo select out/cats out/best --best-of text --scores out/judged
      wallaroo select prompts.jsonl out/clean --filter checks:is_harmless

    Error rows go first, then the filter decides, then the best of each id, then near-duplicates; what
    is left is split. A function gets a row as a dict, and is looked for in the present folder too; a
    row that it raises on is dropped. --best-of takes the first number of a text (8/10 is 8). A row is
    a near-duplicate if the 64-bit difference hash of its picture differs in at most BITS from that of
    an earlier row that stays. An id is always on the same side of a split.

    DEST gets data/*.parquet, or a folder for each split; README.md; and _dropped.jsonl, which says of
    every other row why it is not there. Exit codes: 0; 3 if a function, a score or a picture failed.
    """
    from wallaroo.workflows.datasets.rules import Rules
    from wallaroo.workflows.datasets.select import select as copy

    # Last, and only where it is asked for: a folder of data may hold a module with the name of a library's.
    if any(name and ":" in name for name in (filter_, best_of)):
        sys.path.append(os.getcwd())
    split = {}
    for name, share in map(_pair, shares.split(",") if shares else ()):
        try:
            split[name] = float(share)
        except ValueError:
            raise click.UsageError(f"the share of {name} is '{share}', but must be a number.") from None
    found = copy(source, dest, Rules(filter_, best_of, scores, near, split, group))
    words = [f"{found.rows:,} rows: {found.kept:,} kept"]
    words += [f"{count:,} dropped ({reason})" for reason, count in found.dropped.items()]
    click.echo(", ".join(words))
    for name, count in found.splits.items():
        click.echo(f"  {dest.rstrip('/')}/{name}  {count:,}")
    return ERROR_ROWS if found.failures else OK


def _pair(text: str) -> tuple[str, str]:
    """Both sides of NAME=VALUE."""
    name, mark, value = text.partition("=")
    if not (name.strip() and mark):
        raise click.UsageError(f"'{text}' must be NAME=VALUE.")
    return name.strip(), value


def _run(
    task: str,
    manifest: str,
    output: str,
    options: dict[str, Any],
    scheduled: bool,
    on_finish: str | None,
) -> int:
    """Does a run and says how it ended."""
    config = _configure(task, manifest, output, options)
    from wallaroo.jobs.progress import Display
    from wallaroo.workflows.outputs.lock import RunInProgress
    from wallaroo.workflows.runs.driver import run

    stop = Stop(config.grace, config.deadline)
    news: dict[str, Any] = {"task": task, "output": output, "state": "failed", "message": ""}
    try:
        with stop.signals(), Display() as display:
            summary = run(config, display, stop=stop)
        news |= {name: getattr(summary, name) for name in ("rows", "ok", "errors", "before", "seconds")}
        news["state"] = "finished"
    except RunInProgress as error:
        on_finish = None  # it is not this run that will finish
        if not scheduled:
            raise
        click.echo(f"{error} This one ends, as --scheduled asks; the next one looks again.")
        return OK
    except RunStopped as error:
        news |= {"state": "stopped", "message": str(error)}
        raise
    except BaseException as error:
        news["message"] = str(error) if isinstance(error, InputError) else type(error).__name__
        raise
    finally:
        if on_finish:
            from wallaroo.jobs.notify import notify

            notify(on_finish, news)
    _say_summary(config, summary)
    return ERROR_ROWS if summary.errors and not scheduled else OK


def _configure(
    task: str,
    manifest: str,
    output: str,
    options: dict[str, Any],
    environment: Mapping[str, str] = os.environ,
) -> "RunConfig":
    """The configuration of a run, from the options that `run_options` added."""
    file, assignments = options.pop("file"), options.pop("assignments")
    flags = {name.replace("__", "."): value for name, value in options.items()}
    try:
        return resolve(task, manifest, output, flags, assignments, file, environment)
    except InputError as error:
        raise click.UsageError(str(error)) from None


def _say_summary(config: "RunConfig", summary: "RunSummary") -> None:
    from wallaroo.workflows.outputs.layout import DATA_FOLDER
    from wallaroo.workflows.storage import join
    from wallaroo.workflows.text import duration

    made = summary.rows - summary.before
    errors = "1 error" if summary.errors == 1 else f"{summary.errors:,} errors"
    counts = f"{summary.rows:,} rows: {summary.ok:,} ok, {errors}"
    if made:
        click.echo(f"{counts}; {made:,} made in {duration(summary.seconds)}")
    else:
        click.echo(f"{counts}; all of them were there already, so there was nothing to do")
    made_of = "texts   " if config.task == "understand" else "pictures"
    click.echo(f"  {made_of}  {join(config.output, DATA_FOLDER)}")
    click.echo(f"  report    {join(config.output, 'report.html')}")
    if summary.errors:
        click.echo(f"  errors    {join(config.output, 'errors.jsonl')} (a manifest for a second try)")
    if config.model == "tiny":
        click.echo(
            "The tiny model knows coloured shapes on plain backgrounds, nothing else (model/tiny/README.md)."
        )


def _plan_text(plan: "Plan") -> str:
    """Counts of a plan as a few lines for people."""
    errors = "1 error" if plan.error_rows == 1 else f"{plan.error_rows:,} errors"
    to_make = plan.rows - plan.error_rows
    lines = [f"{plan.rows:,} rows in {len(plan.shards):,} shards: {to_make:,} to make, {errors}"]
    for size, count in sorted(plan.sizes.items(), key=lambda item: -item[1]):
        rows, columns = size.grid
        tokens = count * rows * columns
        lines.append(f"  {size.width} x {size.height} pixels: {count:,}, which is {tokens:,} image tokens")
    unsized = to_make - sum(plan.sizes.values())
    if unsized:
        lines.append(f"  {unsized:,} start from pictures, whose sizes are learnt when they are loaded")
    lines += [f"  error rows of kind {kind}: {count:,}" for kind, count in sorted(plan.errors.items())]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits the process with one of the codes above."""
    try:
        code = cli.main(
            args=None if arguments is None else list(arguments), prog_name="wallaroo", standalone_mode=False
        )
    except click.UsageError as error:
        _complain(error.format_message())
        if error.ctx is not None:
            click.echo(f"Help: {error.ctx.command_path} --help", err=True)
        code = USAGE
    except InputError as error:
        from wallaroo.workflows.settings import OptionError

        _complain(str(error))
        code = USAGE if isinstance(error, OptionError) else FATAL
    except RunStopped as error:
        _complain(str(error))
        code = STOPPED
    except (KeyboardInterrupt, click.Abort):
        _complain("stopped; the same command goes on where this one was.")
        code = INTERRUPTED
    except RuntimeError as error:
        from wallaroo.workflows.outputs.lock import LockLost, RunInProgress

        if not isinstance(error, RunInProgress | LockLost):
            raise
        _complain(str(error))
        code = LOCKED
    except BrokenPipeError:
        # Whoever read our output has left, as `head` does; Python must not complain of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FATAL
    sys.exit(code or OK)


def _complain(sentence: str) -> None:
    click.echo(f"wallaroo: {_printable(sentence)}", err=True)


def _printable(text: str) -> str:
    """Text of files that are not ours, for a terminal: no control characters, and not without end."""
    text = "".join(sign if sign.isprintable() or sign == "\n" else repr(sign)[1:-1] for sign in text)
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}..."


if __name__ == "__main__":
    main()
