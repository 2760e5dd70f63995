"""The options of a run as flags. They are declared in `workflows.settings` and resolved by `config`."""

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from wallaroo.jobs.config import SECTIONS, resolve
from wallaroo.model.errors import InputError
from wallaroo.workflows.options import Kind, Option
from wallaroo.workflows.settings import OPTIONS, REMOVED, RunConfig
from wallaroo.workflows.tasks import PRESETS

Function = TypeVar("Function", bound=Callable[..., Any])


class Values(click.ParamType):
    """Values of an option that no run has, with the same rules and messages as those of a run.

    Args:
        kind: The values.
    """

    def __init__(self, kind: Kind):
        self.kind, self.name = kind, kind.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Reads a value.

        Args:
            value: The text, or a value that was read before.
            param: The option, for the message.
            ctx: Of click.

        Returns:
            The value.

        Raises:
            click.UsageError: The value breaks the rule.
        """
        named = param.opts[0] if param is not None else self.name
        try:
            return Option(None, "", self.kind, "").read(value, named)
        except InputError as error:
            raise click.UsageError(str(error), ctx) from None


class RunOption(click.Option):
    """The flag of an option of a run. Its value is checked with all others, by `configure`.

    Args:
        option: The option.
        task: The task of the command; None for a command of all tasks.
    """

    def __init__(self, option: Option, task: str | None = None):
        self.option, self.choices = option, option.kind.choices
        if option.name == "preset" and task is not None:
            self.choices = tuple(name for name in self.choices if PRESETS[name].task == task)
        names = [option.flag, option.name]
        if option.kind.metavar:
            metavar = "|".join(self.choices) or option.kind.metavar
            super().__init__(names, metavar=metavar, help=option.help_text)
        else:
            super().__init__(names, is_flag=True, default=None, help=option.help_text)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The choices that begin with what is typed."""
        return [CompletionItem(one) for one in self.choices if one.startswith(incomplete)]


class RemovedOption(click.Option):
    """The flag of an option that existed once: not in the help, and refused.

    Args:
        key: `section.key` of the option, in REMOVED.
    """

    def __init__(self, key: str):
        flag = "--" + key.partition(".")[2].replace("_", "-")

        def refuse(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
            if value is not None:
                raise click.UsageError(f"{flag} {REMOVED[key]}", ctx)

        super().__init__([flag], hidden=True, expose_value=False, callback=refuse)


class RunCommand(click.Command):
    """A command whose help shows the options of a run under the headings of their sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options under the headings of their sections."""
        groups: dict[str, list[tuple[str, str]]] = {heading: [] for heading in SECTIONS.values()}
        other = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            # click itself has shown the arguments above.
            if record is None or isinstance(param, click.Argument):
                continue
            if isinstance(param, RunOption):
                groups[SECTIONS[param.option.section]].append(record)
            else:
                other.append(record)
        for heading, records in [*groups.items(), ("Other options", other)]:
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def run_options(task: str | None = None) -> Callable[[Function], Function]:
    """Adds `--config`, `--set` and the options of a task, or of all tasks, to a command.

    The function gets them as keyword arguments, for `configure`.
    """

    def add(function: Function) -> Function:
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="SECTION.KEY=VALUE",
            help="Set an option by its key in a run file; may be repeated.",
        )(function)
        click.option("--config", "file", metavar="RUN.TOML", help="Run file; flags and --set override it.")(
            function
        )
        params: list[click.Parameter] = function.__click_params__  # type: ignore[attr-defined]
        # click reads them backwards, as decorators are applied.
        params.extend(
            RunOption(one, task) for one in reversed(OPTIONS.values()) if task is None or one.serves(task)
        )
        params.extend(map(RemovedOption, REMOVED))
        return function

    return add


def configure(
    task: str,
    manifest: str,
    output: str,
    given: dict[str, Any],
    environment: Mapping[str, str] = os.environ,
) -> RunConfig:
    """The configuration of a run.

    Args:
        task: `generate`, `edit` or `understand`.
        manifest: The argument MANIFEST.
        output: The argument OUTPUT.
        given: The keyword arguments that `run_options` added.
        environment: Has RAY_ADDRESS.

    Returns:
        The configuration.

    Raises:
        click.UsageError: An option breaks a rule.
    """
    flags = {name: value for name, value in given.items() if name in OPTIONS}
    try:
        return resolve(task, manifest, output, flags, given["assignments"], given["file"], environment)
    except InputError as error:
        raise click.UsageError(str(error)) from None
