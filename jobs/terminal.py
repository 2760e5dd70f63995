"""What all commands share on a terminal: exit codes, sentences, and how groups of commands behave."""

import signal

import click

OK, FATAL, USAGE, ERROR_ROWS, LOCKED, STOPPED = 0, 1, 2, 3, 4, 5
INTERRUPTED = 128 + signal.SIGINT

RUN_EXIT_CODES = """Exit codes: 0 all rows are ok; 1 the run failed; 2 wrong usage; 3 finished, but some
rows failed; 4 another run holds OUTPUT; 5 stopped by Ctrl-C, SIGTERM or --deadline."""

PLAN_EXIT_CODES = """Exit codes: 0 planned, with or without error rows; 1 nothing could be planned; 2 wrong
usage; 4 a run holds OUTPUT."""

MAX_CHARACTERS = 20_000
"""Characters of a message that are printed."""


def complain(sentence: str) -> None:
    """Prints one sentence to stderr."""
    click.echo(f"wallaroo: {printable(sentence)}", err=True)


def tell_run(output: str) -> bool:
    """Prints a line to stderr if an active run holds an output that a command reads.

    Returns:
        Whether one holds it.
    """
    from wallaroo.workflows.outputs.lock import at_work

    if words := at_work(output):
        click.echo(printable(words), err=True)
    return bool(words)


def printable(text: str) -> str:
    """Text of foreign files for a terminal: without control characters, and of limited length."""
    text = "".join(sign if sign.isprintable() or sign == "\n" else repr(sign)[1:-1] for sign in text)
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}..."


class Group(click.Group):
    """Lists its commands in the order of their declaration. Without arguments it prints its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of their declaration."""
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Prints the help if there are no arguments."""
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)
