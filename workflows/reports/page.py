"""`report.html`: one file that needs no network and shows what a run made, how fast, and what went wrong."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import EVALUATION_FILE, REPORT_FILE
from wallaroo.workflows.outputs.run_file import read_run
from wallaroo.workflows.outputs.run_log import read_records
from wallaroo.workflows.outputs.values import flat
from wallaroo.workflows.plans.plan import Plan, read_plan
from wallaroo.workflows.reports.chart import draw_chart
from wallaroo.workflows.reports.estimate import compare
from wallaroo.workflows.reports.gallery import (
    Card,
    ReadSource,
    _flat,
    _in_order,
    _with_sources,
    fetch_source,
    read_cards,
)
from wallaroo.workflows.reports.survey import Place, shorten, survey_output
from wallaroo.workflows.reports.tally import MAX_PICTURES, Stratum
from wallaroo.workflows.text import duration, rounded

MAX_BYTES = 8_000_000
MAX_KINDS = 40
MAX_RUNS = 20
MAX_WARNINGS = 40
PICTURE_BYTES = 6_000_000
"""Of MAX_BYTES, what all thumbnails together may take, as base64."""
NOUNS = {"generate": ("image", "images"), "edit": ("edit", "edits"), "understand": ("answer", "answers")}
"""Task -> noun for one row, and for several."""
_TEMPLATES = Path(__file__).parent / "templates"


def write_report(output: str, read_source: ReadSource | None = None, plan: Plan | None = None) -> str:
    """Writes OUTPUT/report.html, before, during or after a run.

    Memory: the columns of a few shards, the row groups of the rows shown, and a few sources.

    Args:
        output: The folder of the run, local or `s3://`.
        read_source: Fetches the sources of edits and answers, `fetch_source` by default. Several threads may
            call it.
        plan: The plan of the output, for a caller that has read it.

    Returns:
        The path of the file.

    Raises:
        InputError: `output` is no output of a run.
    """
    path = storage.join(output, REPORT_FILE)
    storage.write_atomic(path, render_report(output, read_source, plan))
    return path


def render_report(output: str, read_source: ReadSource | None = None, plan: Plan | None = None) -> bytes:
    """The page; see `write_report`.

    Args:
        output: The folder of the run, local or `s3://`.
        read_source: Fetches the sources of edits and answers.
        plan: The plan of the output, for a caller that has read it.

    Returns:
        HTML in UTF-8, at most MAX_BYTES long.

    Raises:
        InputError: `output` is no output of a run.
    """
    run = read_run(output)
    preset = run["options"].get("preset")
    config = ({"preset": preset} if preset else {}) | run["config"]
    plan = plan or read_plan(output)
    survey = survey_output(output, plan.parts)
    records, _ = read_records(output)
    shown = records[-MAX_RUNS:]
    facts = {
        "output": output,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "config": {key: shorten(str(value), 300) for key, value in flat(config).items()},
        "planned": plan.rows,
        "planning": not plan.complete,
        "warnings": [shorten(words, 8000) for words in plan.warnings[:MAX_WARNINGS]],
        "missing": plan.rows - survey.rows,
        "survey": survey,
        "kinds": survey.errors.most_common(MAX_KINDS),
        "more_kinds": max(0, len(survey.errors) - MAX_KINDS),
        "strata": sorted(survey.pictures.items(), key=lambda item: (-item[1], item[0])),
        "runs": shown,
        "earlier_runs": len(records) - len(shown),
        "chart": draw_chart(shown),
        "scores": _scores(output),
        "estimate": compare(output),
        "seconds": sum(record.seconds for record in records),
        "images": sum(record.images for record in records),
        "nouns": NOUNS.get(str(config.get("task")), NOUNS["generate"]),
    }
    thumbnails = 2 if config.get("task") == "edit" else 1
    rows = MAX_PICTURES // thumbnails
    chosen = survey.choose(rows)
    # A byte is four thirds of a base64 letter.
    budget = PICTURE_BYTES // max(thumbnails * len(_flat(chosen)), 1) * 3 // 4
    cards = _with_sources(read_cards(output, chosen, budget), read_source or fetch_source, budget)
    while True:
        page = _render(
            facts, chosen, [cards[place] for place in sorted(_flat(chosen), key=_in_order) if place in cards]
        )
        # Thumbnails have a budget, so only words of unusual length can make the page too large.
        if len(page) <= MAX_BYTES or not rows:
            return page
        # Of fewer rows each is among those of more.
        rows //= 2
        chosen = survey.choose(rows)


def _scores(output: str) -> list[dict[str, Any]]:
    """Lines of the table of `wallaroo evaluate`, if there is one: where they are of, and shares by name."""
    path = storage.join(output, EVALUATION_FILE)
    if not storage.exists(path):
        return []
    try:
        lines = json.loads(storage.read_bytes(path))["lines"]
        return [
            {name: line[name] for name in ("task", "kind", "language", "size", "rows")}
            | {"right": {name: hits / of for name, (hits, of) in line["right"].items()}}
            for line in lines
        ]
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RecursionError):
        raise InputError(
            f"{path} is not a table of scores: move it elsewhere; `wallaroo evaluate` writes one."
        ) from None


def _render(facts: Mapping[str, Any], chosen: Mapping[Stratum, Sequence[Place]], cards: list[Card]) -> bytes:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["duration"] = duration
    environment.filters["rounded"] = rounded
    style = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    # Only this very script may run: one that came in with a prompt could not, even if it were not escaped.
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        environment.get_template("report.html.j2")
        .render(
            **facts,
            cards=cards,
            sampled={stratum: len(places) for stratum, places in chosen.items()},
            style=Markup(style),
            script=Markup(script),
            script_hash=script_hash,
        )
        .encode()
    )
