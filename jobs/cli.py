"""The `wallaroo` command: reads argv, calls a workflow, turns what became of it into an exit code.

Knows nothing of how anything is done. Imports no library of weight before a task needs it, so that
`wallaroo --help` and `wallaroo status` answer at once.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from jobs.config import SECTIONS, SETTINGS, Setting, resolve
from model.errors import InputError

if TYPE_CHECKING:
    from workflows.run_config import RunConfig, RunSummary

OK, FATAL, USAGE, ERROR_ROWS, LOCKED = 0, 1, 2, 3, 4
INTERRUPTED = 128 + signal.SIGINT

Function = TypeVar("Function", bound=Callable[..., Any])

EXIT_CODES = """Exit codes: 0 all rows ok; 1 the run failed; 2 a mistake in the command line; 3 finished,
with error rows; 4 another run is at work on this output."""

PLACES = """MANIFEST is a Parquet, CSV or JSONL file, a folder of them or a quoted glob; OUTPUT is the
folder of the data set. Every path may be s3://bucket/key, with endpoint and credentials from the
usual AWS variables and profiles."""


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
            with formatter.section(heading):
                formatter.write_dl(records)


class OrderedGroup(click.Group):
    """Lists its commands in the order in which a person needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def run_options(function: Function) -> Function:
    """Adds the options that all tasks share; the function gets them as keyword arguments."""
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
    params.extend(SettingOption(setting) for setting in reversed(SETTINGS))
    return function


@click.group(
    cls=OrderedGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Help on a command: wallaroo COMMAND --help",
)
@click.version_option(package_name="wallaroo-batch", prog_name="wallaroo", message="%(prog)s %(version)s")
def cli() -> None:
    """Batch image generation with the Wallaroo model on Ray.

    A manifest of prompts goes in, a Parquet data set of pictures comes out. A run that is stopped,
    killed or cut off goes on where it was when the same command is given again.

    \b
      wallaroo generate prompts.jsonl out/first
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
@run_options
def generate(manifest: str, output: str, **options: Any) -> int:
    config = _configure("generate", manifest, output, options)
    from jobs.progress import Display
    from workflows.generate import run

    with Display() as display:
        summary = run(config, display)
    _say_summary(config, summary)
    return ERROR_ROWS if summary.errors else OK


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


@cli.command(short_help="Say how far a run is.")
@click.argument("output")
def status(output: str) -> int:
    """Say how far a run is, from the records in OUTPUT, running or not. Starts nothing and reads little.

    Exit codes: 0 there is something to tell; 1 OUTPUT is no output of a run.
    """
    from workflows.runs import status as read_status

    click.echo(read_status(output).text())
    return OK


@cli.command(short_help="Write report.html anew.")
@click.argument("output")
def report(output: str) -> int:
    """Write OUTPUT/report.html anew, at any time in the life of a run: counts, throughput over time,
    examples of errors and a gallery, in one file that needs no network.
    """
    from workflows.report import write_report

    click.echo(write_report(output))
    return OK


@cli.command(short_help="Read everything back and check it.")
@click.argument("output")
def verify(output: str) -> int:
    """Read the data set in OUTPUT back and check it: every planned row is there once, every picture
    decodes at its stated size and hash, the schema is as declared.

    Exit codes: 0 complete and as planned, error rows or not; 1 incomplete or broken.
    """
    from workflows.verify import verify as check

    return OK if check(output, click.echo).state == "complete" else FATAL


@cli.command(short_help="Turn the published files into a checkpoint folder.")
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

    from model.convert import convert as write

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


def _configure(task: str, manifest: str, output: str, options: dict[str, Any]) -> "RunConfig":
    """The configuration of a run, from the options that `run_options` added."""
    file, assignments = options.pop("file"), options.pop("assignments")
    flags = {name.replace("__", "."): value for name, value in options.items()}
    try:
        return resolve(task, manifest, output, flags, assignments, file)
    except InputError as error:
        raise click.UsageError(str(error)) from None


def _say_summary(config: "RunConfig", summary: "RunSummary") -> None:
    from workflows.results import DATA_FOLDER
    from workflows.runs import duration
    from workflows.storage import join

    made = summary.rows - summary.before
    errors = "1 error" if summary.errors == 1 else f"{summary.errors:,} errors"
    counts = f"{summary.rows:,} rows: {summary.ok:,} ok, {errors}"
    if made:
        click.echo(f"{counts}; {made:,} made in {duration(summary.seconds)}")
    else:
        click.echo(f"{counts}; all of them were there already, so there was nothing to do")
    click.echo(f"  pictures  {join(config.output, DATA_FOLDER)}")
    click.echo(f"  report    {join(config.output, 'report.html')}")
    if summary.errors:
        click.echo(f"  errors    {join(config.output, 'errors.jsonl')} (a manifest for a second try)")
    if config.model == "tiny":
        click.echo("The weights of the tiny model are random, not trained: its pictures are noise.")


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
        from workflows.run_config import OptionError

        _complain(str(error))
        code = USAGE if isinstance(error, OptionError) else FATAL
    except RuntimeError as error:
        from workflows.lock import LockLost, RunInProgress

        if not isinstance(error, RunInProgress | LockLost):
            raise
        _complain(str(error))
        code = LOCKED
    except (KeyboardInterrupt, click.Abort):
        _complain("stopped; the same command goes on where this one was.")
        code = INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left, as `head` does; Python must not complain of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FATAL
    sys.exit(code or OK)


def _complain(sentence: str) -> None:
    click.echo(f"wallaroo: {sentence}", err=True)


if __name__ == "__main__":
    main()
