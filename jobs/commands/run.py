"""`generate`, `edit`, `understand`, and `plan`, which decides their rows without making any."""

from typing import TYPE_CHECKING, Any

import click

from wallaroo.jobs.options import RunCommand, configure, run_options
from wallaroo.jobs.terminal import ERROR_ROWS, OK, PLAN_EXIT_CODES, RUN_EXIT_CODES, printable
from wallaroo.model.errors import InputError
from wallaroo.workflows.settings import check_task
from wallaroo.workflows.stopping import RunStopped, Stop
from wallaroo.workflows.text import counted, duration

if TYPE_CHECKING:
    from wallaroo.workflows.plans.plan import Plan
    from wallaroo.workflows.progress import RunSummary
    from wallaroo.workflows.settings import RunConfig

_PATHS = """Every path may be s3://bucket/key, with endpoint and credentials from the usual AWS variables
and profiles."""

_SOURCES = """An image is a path (relative to the manifest, or absolute), s3://, https:// with --allow-https,
or bytes in a Parquet file, also as {bytes, path}. MANIFEST may also be a folder of images, or the
OUTPUT of a finished run, whose ok rows are then the input."""


def _places(**attributes: Any) -> Any:
    """Adds the arguments MANIFEST and OUTPUT. attributes: more of OUTPUT."""

    def add(function: Any) -> Any:
        function = click.argument(
            "output",
            help="Folder of the results: a Parquet data set, its plan, run records and report. Re-run the "
            "same command to resume.",
            **attributes,
        )(function)
        return click.argument(
            "manifest", help="Input rows: a Parquet, CSV or JSONL file, a folder of them, or a quoted glob."
        )(function)

    return add


def _ends(function: Any) -> Any:
    """Adds the options about the end of a run."""
    function = click.option(
        "--on-finish",
        metavar="URL|COMMAND",
        help="POST a JSON summary to a URL, or pipe it into a command, when the run ends.",
    )(function)
    return click.option(
        "--scheduled",
        is_flag=True,
        help="Exit 0 even if rows failed or another run holds OUTPUT (for schedulers).",
    )(function)


@click.command(cls=RunCommand, short_help="Generate images from prompts.", epilog=RUN_EXIT_CODES)
@_places()
@run_options("generate")
@_ends
def generate(**given: Any) -> int:
    return _run("generate", **given)


generate.help = f"""Generate images from a manifest of prompts.

{_PATHS}

The manifest needs a column `prompt` and may have id, samples, seed, cfg, temperature, top_k, top_p,
language, and width with height, or aspect_ratio. All other columns are carried through. An invalid
row becomes an error row with its reason; other rows are unaffected.

\b
  wallaroo generate prompts.jsonl out/first --samples 4
  wallaroo generate 's3://bucket/prompts/*.parquet' s3://bucket/pictures --replicas 8
  wallaroo generate prompts.csv out/look --limit 20 --cfg 4 --top-p 0.95
"""


@click.command(cls=RunCommand, short_help="Edit images by instructions.", epilog=RUN_EXIT_CODES)
@_places()
@run_options("edit")
@_ends
def edit(**given: Any) -> int:
    return _run("edit", **given)


edit.help = f"""Edit images by instructions.

{_PATHS}
{_SOURCES}

The manifest needs the columns `image` and, without --prompt, `prompt`; it may have id, samples, seed,
cfg, temperature, top_k, top_p and language. A result has the size of the model that is nearest to the
ratio of its source. ImgEdit's JSON of keys, each with id, prompt and edit_type, is a manifest too.

\b
  wallaroo edit edits.jsonl out/edited
  wallaroo edit photos/ out/winter --prompt 'make it winter' --restore-size
  wallaroo edit out/captions out/edited --prompt-column text
  wallaroo edit imgedit.json out/bench --image-root ImgEdit/singleturn --preset imgedit
"""


@click.command(cls=RunCommand, short_help="Describe images, or answer questions.", epilog=RUN_EXIT_CODES)
@_places()
@run_options("understand")
@_ends
def understand(**given: Any) -> int:
    return _run("understand", **given)


understand.help = f"""Describe images, or answer questions about them.

{_PATHS}
{_SOURCES}

The manifest needs a column `image` and may have prompt (a question; without one the image is
described), id, samples, seed, temperature, top_k, top_p and language. Decoding is greedy by default.

\b
  wallaroo understand photos/ out/captions
  wallaroo understand out/first out/captions --language zh
  wallaroo understand questions.parquet s3://bucket/answers --max-new-tokens 64
"""

TASK_COMMANDS = {"generate": generate, "edit": edit, "understand": understand}


def _known_task(context: click.Context, parameter: click.Parameter, task: str) -> str:
    check_task(task)
    return task


@click.command(cls=RunCommand, short_help="Plan a run without running it.", epilog=PLAN_EXIT_CODES)
@click.argument(
    "task",
    # Checked first: without it, a path stands in its place.
    is_eager=True,
    callback=_known_task,
    help="generate, edit or understand; options are those of the task.",
)
@_places(required=False)
@run_options()
@click.option("--estimate", is_flag=True, help="Add time, memory, bytes and, with --price-per-hour, cost.")
@click.option(
    "--rate",
    metavar="N|OUTPUT",
    help="Rows/s of one replica, or an OUTPUT to take the measured rate from; implies --estimate.",
)
@click.option(
    "--gpu",
    metavar="NAME",
    help="Compute the rate of an H200, H100, A100 or L40S instead; implies --estimate.",
)
@click.option(
    "--errors",
    metavar="FILE",
    help="Write all refused rows as JSON lines, with reason and place in the manifest.",
)
def plan(
    task: str,
    manifest: str,
    output: str | None,
    estimate: bool,
    rate: str | None,
    gpu: str | None,
    errors: str | None,
    **given: Any,
) -> int:
    config = configure(task, manifest, output or "", given)
    from wallaroo.jobs.progress import Display
    from wallaroo.workflows import storage
    from wallaroo.workflows.reports.refused import Refused, first_of_each_kind, refused_rows
    from wallaroo.workflows.runs.setup import plan as make

    if errors and storage.exists(errors):
        raise click.UsageError(f"{errors} exists already: name another file.")
    examples: dict[str, list[Refused]] = {}

    def look(folder: str, found: "Plan") -> None:
        examples.update(first_of_each_kind(refused_rows(folder, found, task), errors))

    with Display() as display:
        made = make(config, display, look)
    click.echo(_plan_text(made, {kind: [one.text() for one in rows] for kind, rows in examples.items()}))
    if errors and made.error_rows and not examples:
        raise InputError(
            "--errors needs a written plan on a cluster, and for very large manifests: give OUTPUT."
        )
    if errors:
        click.echo(f"  all of them: {errors}" if made.error_rows else f"  {errors} is not written: no errors")
    if estimate or rate or gpu:
        from wallaroo.workflows.reports.estimate import estimate as reckon

        click.echo("\n".join(reckon(made, config, rate, gpu).lines()))
    if output:
        click.echo(f"Written to {output}; `wallaroo {task}` with the same options uses this plan.")
    return OK


plan.help = f"""Plan a run without running it: validate, number and count all rows.

With OUTPUT the plan is written there, and the task uses it; without OUTPUT nothing is written. {_PATHS}

The first rows of each kind of error are shown with their place in the manifest, counted from 0, except on
a cluster without OUTPUT.

\b
  wallaroo plan generate prompts.jsonl
  wallaroo plan generate prompts.jsonl out/first --samples 4
  wallaroo plan generate prompts.jsonl --estimate --rate out/look --replicas 8
  wallaroo plan generate prompts.jsonl --estimate --gpu H200
  wallaroo plan understand photos/
"""


def _run(task: str, manifest: str, output: str, scheduled: bool, on_finish: str | None, **given: Any) -> int:
    """Does a run and prints how it ended."""
    config = configure(task, manifest, output, given)
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
        click.echo(f"{error} With --scheduled this is no error; the next start tries again.")
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
    _print_summary(config, summary)
    return ERROR_ROWS if summary.errors and not scheduled else OK


def _print_summary(config: "RunConfig", summary: "RunSummary") -> None:
    from wallaroo.workflows.outputs.layout import DATA_FOLDER, ERRORS_FILE, REPORT_FILE
    from wallaroo.workflows.storage import join

    counts = f"{summary.ok:,} ok, {counted(summary.errors, 'error')}"
    click.echo(f"{counted(summary.rows, 'row')}: {counts}; {_made(config.task, summary)}")
    made_of = "texts   " if config.task == "understand" else "images  "
    click.echo(f"  {made_of}  {join(config.output, DATA_FOLDER)}")
    click.echo(f"  report    {join(config.output, REPORT_FILE)}")
    if summary.errors:
        click.echo(f"  errors    {join(config.output, ERRORS_FILE)} (a manifest for a second try)")
    if config.model == "tiny":
        click.echo("The tiny model handles only coloured shapes on plain backgrounds (model/tiny/README.md).")


def _made(task: str, summary: "RunSummary") -> str:
    """What one start of a run made, in words."""
    if summary.before == summary.rows:
        return "all finished before, so there was nothing to do"
    noun = "text" if task == "understand" else "image"
    words = f"{counted(summary.made, noun)} made in {duration(summary.seconds)}"
    return f"{words}, {counted(summary.before, 'row')} finished before" if summary.before else words


def _plan_text(plan: "Plan", examples: dict[str, list[str]]) -> str:
    """Counts of a plan as a few lines for people. examples: kind -> the first rows of it, in words."""
    errors = counted(plan.error_rows, "error")
    to_make = plan.rows - plan.error_rows
    counts = f"{counted(plan.rows, 'row')} in {counted(len(plan.shards), 'shard')}"
    lines = [f"{counts}: {to_make:,} to make, {errors}"]
    for size, count in sorted(plan.sizes.items(), key=lambda item: -item[1]):
        rows, columns = size.grid
        tokens = count * rows * columns
        lines.append(f"  {size.width} x {size.height} pixels: {count:,}, which is {tokens:,} image tokens")
    unsized = to_make - sum(plan.sizes.values())
    if unsized:
        lines.append(f"  {unsized:,} start from images; their sizes are known once they are loaded")
    for kind, count in sorted(plan.errors.items()):
        lines.append(f"  error rows of kind {kind}: {count:,}")
        lines += [f"    {printable(words)}" for words in examples.get(kind, ())]
    return "\n".join(lines)
