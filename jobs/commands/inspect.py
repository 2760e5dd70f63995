"""Commands on the output of a run: `status`, `report`, `verify`, `evaluate`, `compact`."""

import click

from wallaroo.jobs.terminal import FATAL, OK, Group, printable

_output = click.argument("output", help="Folder of a run's results, local or s3://.")


@click.command(short_help="Show the progress of a run.")
@_output
def status(output: str) -> int:
    """Show the progress of the run of OUTPUT, active or not, from the records in OUTPUT. Starts nothing and
    reads little.

    Exit codes: 0; 1 OUTPUT is not the output of a run.
    """
    from wallaroo.workflows.reports.status import status as read_status

    click.echo(printable(read_status(output).text()))
    return OK


@click.command(short_help="Write report.html again.")
@_output
def report(output: str) -> int:
    """Write OUTPUT/report.html again, also while the run is active: counts, throughput over time,
    examples of errors and a gallery, in one file that needs no network.
    """
    from wallaroo.workflows.reports.page import write_report

    click.echo(write_report(output))
    return OK


@click.command(short_help="Check a data set row by row.")
@_output
@click.option(
    "--fast",
    is_flag=True,
    help="Compare names, sizes and counts only, by summaries and footers; open no image.",
)
def verify(output: str, fast: bool) -> int:
    """Read the data set in OUTPUT back and check it: every planned row exists once, every image
    decodes at its stated size and hash, and the schema is the declared one.

    Exit codes: 0 complete and as planned, with or without error rows; 1 incomplete or broken.
    """
    from wallaroo.jobs.progress import Display
    from wallaroo.workflows.reports.verify import verify as check

    with Display() as display:
        state = check(output, lambda line: click.echo(printable(line)), display, fast).state
    return OK if state == "complete" else FATAL


@click.command(short_help="Merge small shards.")
@_output
def compact(output: str) -> int:
    """Merge the small shards that runs with --incremental left in OUTPUT, which must be finished. Rows do
    not change. New files are written first; the old ones are deleted once the plan names the new ones.

    Exit codes: 0; 1 OUTPUT cannot be compacted; 4 a run holds it.
    """
    from wallaroo.jobs.progress import Display
    from wallaroo.workflows.datasets.compact import compact as merge

    with Display() as display:
        found = merge(output, display)
    words = f"{found.before:,} shards became {found.after:,}"
    click.echo(f"{output}: {words if found.after < found.before else 'its shards are large enough'}")
    return OK


@click.group(cls=Group, short_help="Score results.")
def evaluate() -> None:
    """Score results."""


@evaluate.command("shapes", short_help="Score results on drawn scenes.")
@_output
def evaluate_shapes(output: str) -> int:
    """Score the results in OUTPUT, of a run on manifests of `wallaroo data shapes`: images by number of
    objects, shape, colour, background and relation; edits by whether they were done and the rest was kept;
    answers by equality, ignoring case and punctuation.

    Pictures are scored by pixel checks of colours and forms, without a model. The table is printed, written
    to OUTPUT/evaluation.json and added to the report. Combinations seen in training are counted separately.
    """
    from wallaroo.workflows.reports.page import write_report
    from wallaroo.workflows.scenes.evaluate import evaluate, to_text

    click.echo(to_text(evaluate(output)))
    write_report(output)
    return OK
