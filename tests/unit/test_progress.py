"""What is shown while a run goes on."""

import io
from types import SimpleNamespace

import pytest

from wallaroo.jobs.progress import Display, Rate, line
from wallaroo.workflows.datasets import progress as phases
from wallaroo.workflows.progress import Progress
from wallaroo.workflows.text import rounded


def test_rate_is_that_of_the_last_minute():
    rate = Rate()
    assert rate(0, 100) == 0
    assert rate(10, 120) == 2
    # After a long pause at first, the present speed is what counts.
    for second in range(20, 200, 10):
        rate(second, 120 + 5 * second)
    assert rate(200, 120 + 5 * 200) == 5


def test_line():
    progress = Progress(rows=2212, done=120, errors=2)
    assert line(progress, 3.4) == "120 of 2,212 rows (5 %), 3.4 rows/s, 2 errors, 10 min 15 s left"
    assert line(Progress(rows=10, done=1, errors=1), 0) == "1 of 10 rows (10 %), 0 rows/s, 1 error"


@pytest.mark.parametrize(
    ("rate", "words"),
    [(0.0, "0"), (0.03337, "0.0334"), (3.4, "3.4"), (26.28, "26.3"), (999.6, "1,000"), (12345.6, "12,346")],
)
def test_a_slow_rate_is_not_nothing_and_a_fast_one_has_no_exponent(rate, words):
    assert rounded(rate) == words
    assert f", {words} rows/s, " in line(Progress(rows=10, done=1), rate)


def test_line_names_the_phase_of_a_command_that_goes_over_the_rows_several_times():
    progress = Progress(rows=100_000, done=25_000, phase="comparing")
    assert line(progress, 5000) == "comparing: 25,000 of 100,000 rows (25 %), 5,000 rows/s, 15 s left"
    assert "1 error" in line(Progress(rows=2, done=1, errors=1, phase="reading"), 1)


def test_the_rate_of_a_phase_is_its_own():
    now = [0.0]
    stream = io.StringIO()
    with Display(stream, clock=lambda: now[0]) as display:
        for second, done, phase in ((0, 0, "reading"), (10, 1000, "reading"), (20, 50, "writing")):
            now[0] = float(second)
            display(Progress(rows=2000, done=done, phase=phase))
    assert stream.getvalue().splitlines()[1:] == [
        "reading: 1,000 of 2,000 rows (50 %), 100 rows/s, 10 s left",
        "writing: 50 of 2,000 rows (2 %), 0 rows/s",
    ]


def test_a_phase_tells_its_rate_from_its_first_line_on(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(phases, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stream = io.StringIO()
    with Display(stream, clock=lambda: now[0]) as display:
        phase = phases.Phase(display, "reading", 2000)
        now[0] = 104.0
        phase.count(1000, errors=1)
    assert stream.getvalue() == "reading: 1,000 of 2,000 rows (50 %), 250 rows/s, 1 error, 4 s left\n"


def test_line_says_what_is_waited_for():
    waiting = "waiting for a replica: 0 of 2 up"
    assert line(Progress(waiting=waiting), 0) == waiting
    assert line(Progress(rows=10, waiting=waiting), 0) == f"0 of 10 rows (0 %), {waiting}"


def test_elsewhere_than_on_a_terminal_a_line_every_ten_seconds():
    now = [0.0]
    stream = io.StringIO()
    with Display(stream, clock=lambda: now[0]) as display:
        for second in range(0, 31):
            now[0] = float(second)
            display(Progress(rows=100, done=second, before=0))
    assert stream.getvalue().splitlines() == [
        "0 of 100 rows (0 %), 0 rows/s, 0 errors",
        "10 of 100 rows (10 %), 1 rows/s, 0 errors, 1 min 30 s left",
        "20 of 100 rows (20 %), 1 rows/s, 0 errors, 1 min 20 s left",
        "30 of 100 rows (30 %), 1 rows/s, 0 errors, 1 min 10 s left",
    ]


def test_a_drain_is_told_at_once_and_then_every_ten_seconds():
    now = [0.0]
    stream = io.StringIO()
    with Display(stream, clock=lambda: now[0]) as display:
        display(Progress(rows=4, done=1))
        for second in range(1, 13):
            now[0] = float(second)
            waiting = f"finishing 2 shards in flight, for at most {60 - second} s"
            display(Progress(rows=4, done=1, waiting=waiting, stopping=True))
    assert stream.getvalue().splitlines() == [
        "1 of 4 rows (25 %), 0 rows/s, 0 errors",
        "1 of 4 rows (25 %), finishing 2 shards in flight, for at most 59 s",
        "1 of 4 rows (25 %), finishing 2 shards in flight, for at most 49 s",
    ]


def test_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Display(stream) as display:
        display(Progress(waiting="planning"))
        display(Progress(rows=4, done=1))
        display(Progress(rows=4, done=4))
    assert "4 of 4 rows (100 %)" in stream.getvalue()
    assert "━" in stream.getvalue()
