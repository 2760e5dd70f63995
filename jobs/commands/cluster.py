"""Runs on a cluster: `submit`, and `jobs`, which lists, follows and stops them."""

import functools
from typing import Any

import click

from wallaroo.jobs.commands.run import TASK_COMMANDS
from wallaroo.jobs.options import configure
from wallaroo.jobs.terminal import FATAL, INTERRUPTED, OK, RUN_EXIT_CODES, STOPPED, Group, complain

_address = click.option(
    "--address",
    metavar="URL",
    help="Dashboard of the cluster (default: $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS, or one on this machine).",
)


@click.command(
    short_help="Run a command on a cluster.",
    epilog=RUN_EXIT_CODES,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@_address
@click.option("--name", metavar="NAME", help="Job name, accepted by `wallaroo jobs` in place of the ID.")
@click.option("--follow", is_flag=True, help="Stream the job's log and exit with its code.")
@click.argument(
    "command", nargs=-1, required=True, type=click.UNPROCESSED, help="Command to run, with its arguments."
)
@click.pass_context
def submit(
    context: click.Context, address: str | None, name: str | None, follow: bool, command: tuple[str, ...]
) -> int:
    """Run COMMAND (generate, edit or understand, with its arguments) as a job of a Ray cluster.

    \b
      wallaroo submit --address http://127.0.0.1:8265 --follow -- \\
          generate prompts.jsonl s3://bucket/pictures --model s3://bucket/wallaroo-7b --replicas 8

    The code is sent along, and so are a manifest and a run file given by relative paths. OUTPUT and the
    model must be where the cluster reaches them. Submitting an active run again returns its job;
    after it has ended, a new job resumes the run. The token comes from RAY_AUTH_TOKEN or ~/.ray/auth_token.
    Ctrl-C ends --follow, not the job.
    """
    from wallaroo.jobs import submit as remote

    task, *words = command
    if task not in TASK_COMMANDS:
        raise click.UsageError(f"'{task}' cannot be submitted; only {', '.join(TASK_COMMANDS)} can.")
    with TASK_COMMANDS[task].make_context(task, list(words), parent=context.parent) as inner:
        given = dict(inner.params)
    if (given["on_finish"] or "").startswith(("http://", "https://")):
        raise click.UsageError(
            "--on-finish is a URL, which everyone who sees the cluster's jobs could read: give a command "
            "that takes it from the environment there, such as 'curl -d @- $HOOK'."
        )
    config = configure(task, given["manifest"], given["output"], given, environment={})
    files = remote.carried(config, command)
    client = remote.connect(address)
    job, new = remote.submit(client, config, command, files, name)
    click.echo(f"{job}: submitted" if new else f"{job}: already active, submitted before")
    click.echo(f"  output  {config.output}")
    if not follow:
        click.echo(f"`wallaroo jobs status {job}` shows its progress.")
        return OK
    return _follow(client, job)


def _follow(client: Any, job: str) -> int:
    from wallaroo.jobs import submit as remote

    try:
        ended = remote.follow(client, job, functools.partial(click.echo, nl=False))
    except KeyboardInterrupt:
        complain(f"the job continues; `wallaroo jobs stop {job}` stops it.")
        return INTERRUPTED
    click.echo(f"{job}: {ended.state.lower()}" + (f", {ended.message}" if ended.state == "FAILED" else ""))
    if ended.exit_code is not None:
        return ended.exit_code
    return {"SUCCEEDED": OK, "STOPPED": STOPPED}.get(ended.state, FATAL)


@click.group(cls=Group, short_help="Jobs on a cluster: list, status, logs, stop.")
def jobs() -> None:
    """Jobs that `wallaroo submit` gave to a cluster."""


@jobs.command(name="list", short_help="List all jobs of the cluster.")
@_address
def jobs_list(address: str | None) -> int:
    """List the jobs of a cluster, newest first, each with its progress."""
    from wallaroo.jobs import submit as remote

    found = remote.jobs(remote.connect(address))
    for job in found:
        progress = remote.progress(job)
        click.echo(f"{job.id}  {job.state:<9}  {job.output}" + (f"  ({job.name})" if job.name else ""))
        words = progress.line() if progress else "its output does not exist yet or cannot be read from here"
        click.echo(f"    {words}")
    if not found:
        click.echo("The cluster has no jobs.")
    return OK


@jobs.command(name="status", short_help="Show the status of a job.")
@click.argument("job", help="ID, name or output folder of a job.")
@_address
def jobs_status(job: str, address: str | None) -> int:
    """Show what the cluster says of JOB, and its progress by its own records."""
    from wallaroo.jobs import submit as remote

    found = remote.find(remote.connect(address), job)
    click.echo(f"{found.id}: {found.state}" + (f", {found.message}" if found.message else ""))
    progress = remote.progress(found)
    click.echo(
        progress.text() if progress else f"{found.output} does not exist yet or cannot be read from here."
    )
    return OK


@jobs.command(name="logs", short_help="Show the log of a job.")
@click.argument("job", help="ID, name or output folder of a job.")
@click.option("--follow", is_flag=True, help="Stream the log until the job ends, and exit with its code.")
@_address
def jobs_logs(job: str, follow: bool, address: str | None) -> int:
    """Show the log of JOB. Without the cluster, read OUTPUT/runs/*.log."""
    from wallaroo.jobs import submit as remote

    client = remote.connect(address)
    found = remote.find(client, job)
    if follow:
        return _follow(client, found.id)
    click.echo(remote.logs(client, found.id), nl=False)
    return OK


@jobs.command(name="stop", short_help="Stop a job.")
@click.argument("job", help="ID, name or output folder of a job.")
@_address
def jobs_stop(job: str, address: str | None) -> int:
    """Stop JOB and wait until it has stopped. Finished rows are kept; submit it again to resume.

    Exit codes: 0 it has ended; 1 it does not stop.
    """
    from wallaroo.jobs import submit as remote

    ended = remote.stop(remote.connect(address), job)
    click.echo(f"{ended.id}: {ended.state.lower()}" + ("" if ended.over else " still"))
    return OK if ended.over else FATAL
