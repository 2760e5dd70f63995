"""The command `wallaroo view`. Imports nothing of weight before it runs."""

import webbrowser
from contextlib import suppress

import click


@click.command(short_help="Browse and compare outputs in a web browser, and vote.")
@click.argument(
    "outputs",
    metavar="OUTPUT...",
    nargs=-1,
    required=True,
    help="Folders of results, local or s3://bucket/key; several are compared.",
)
@click.option("--port", type=click.IntRange(0, 65535), metavar="N", help="Default: 8765, or a free port.")
@click.option(
    "--host",
    default="127.0.0.1",
    metavar="ADDRESS",
    help="Listen for other machines too; the printed address then holds a token.",
)
@click.option("--no-open", is_flag=True, help="Print the address, open no browser.")
@click.option(
    "--votes", metavar="PATH", help="Parquet file of votes (default OUTPUT.votes.parquet, beside the first)."
)
def view(outputs: tuple[str, ...], port: int | None, host: str, no_open: bool, votes: str | None) -> int:
    """Show OUTPUT, finished or running, as a page on this machine.

    The page has a grid with search, an SQL filter, facets and any order; each row at full size, with the
    command that makes it again; and the progress of an active run. Several outputs are shown side by
    side, by id or, if one was made from another, by source; a key press votes for one.

    \b
      wallaroo view out/first
      wallaroo view out/cfg-3 out/cfg-5 --votes out/choice.parquet
      wallaroo view s3://bucket/pictures --no-open

    Needs the extra `view`: pip install 'wallaroo-batch[view]'. Ctrl-C stops it. It writes only votes, and
    an index below ~/.cache/wallaroo/view.
    """
    if votes is not None and len(outputs) == 1:
        raise click.UsageError(
            f"--votes is {votes}, but votes need two outputs: name another, or leave it out."
        )
    from wallaroo.workflows.viewer.server import serve

    def ready(address: str) -> None:
        click.echo(address)
        if not no_open:
            webbrowser.open(address)

    # Ctrl-C is how it is meant to end.
    with suppress(KeyboardInterrupt):
        serve(outputs, port, host, votes, ready)
    return 0
