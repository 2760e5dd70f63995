"""The `wallaroo` command: assembles its commands and turns the result of one into an exit code.

Knows nothing of how anything is done.
"""

import os
import re
import sys
from collections.abc import Sequence

import click
from click.shell_completion import get_completion_class

from wallaroo.jobs.commands import cluster, data, inspect, model, run
from wallaroo.jobs.commands.view import view
from wallaroo.jobs.terminal import FATAL, INTERRUPTED, LOCKED, OK, STOPPED, USAGE, Group, complain
from wallaroo.model.errors import InputError
from wallaroo.workflows.options import OptionError
from wallaroo.workflows.stopping import RunStopped


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Help on a command: wallaroo COMMAND --help",
)
@click.version_option(package_name="wallaroo-batch", prog_name="wallaroo", message="%(prog)s %(version)s")
def cli() -> None:
    """Batch image generation, editing and understanding with the Wallaroo model on Ray.

    The input is a manifest, the output a Parquet data set of images or texts. Re-run the same command
    to resume an interrupted run.

    \b
      wallaroo generate prompts.jsonl out/first
      wallaroo understand out/first out/captions
      wallaroo status out/first
      wallaroo verify out/first
    """


@click.command(short_help="Print a script for shell completion.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), help="The shell that asks the script.")
def completion(shell: str) -> int:
    """Print the script that completes commands and options in SHELL.

    \b
      eval "$(wallaroo completion bash)"    # in ~/.bashrc
      eval "$(wallaroo completion zsh)"     # in ~/.zshrc, after compinit
      wallaroo completion fish > ~/.config/fish/completions/wallaroo.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "wallaroo", "_WALLAROO_COMPLETE").source())
    return OK


for command in (
    run.generate,
    run.edit,
    run.understand,
    run.plan,
    inspect.status,
    inspect.report,
    inspect.verify,
    inspect.compact,
    view,
    cluster.submit,
    cluster.jobs,
    data.prompts,
    data.data,
    data.select,
    data.export,
    inspect.evaluate,
    model.convert,
    model.train,
    model.merge,
    model.models,
    model.bench,
    completion,
):
    cli.add_command(command)


RESUMABLE = ("generate", "edit", "understand", "plan", "submit", "compact", "export", "train")
"""Commands that resume when they are run again."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits the process with one of the codes of `terminal`."""
    try:
        code = cli.main(
            args=None if arguments is None else list(arguments), prog_name="wallaroo", standalone_mode=False
        )
    except click.UsageError as error:
        # click lists choices a line each, but a complaint is one sentence.
        complain(error.format_message().replace("\n\t", " "))
        if error.ctx is not None:
            click.echo(f"Help: {error.ctx.command_path} --help", err=True)
        code = USAGE
    except InputError as error:
        complain(str(error))
        code = USAGE if isinstance(error, OptionError) else FATAL
    except RunStopped as error:
        complain(str(error))
        code = STOPPED
    except (KeyboardInterrupt, click.Abort):
        words = sys.argv[1:] if arguments is None else arguments
        remedy = " Re-run the same command to resume." if words and words[0] in RESUMABLE else ""
        complain(f"Interrupted.{remedy}")
        code = INTERRUPTED
    except RuntimeError as error:
        from wallaroo.workflows.outputs.lock import LockLost, RunInProgress

        if not isinstance(error, RunInProgress | LockLost):
            raise
        complain(str(error))
        code = LOCKED
    except UnicodeEncodeError:
        # Bytes of an argument that are not UTF-8 stand in it as halves of surrogate pairs.
        words = sys.argv[1:] if arguments is None else arguments
        bad = next((word for word in words if re.search("[\ud800-\udfff]", word)), None)
        if bad is None:
            raise
        complain(f"the argument {ascii(os.fsencode(bad))[2:-1][:200]} is not UTF-8: give it in UTF-8.")
        code = USAGE
    except BrokenPipeError:
        # Whoever read our output has left, as `head` does; Python must not complain of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FATAL
    sys.exit(code or OK)


if __name__ == "__main__":
    main()
