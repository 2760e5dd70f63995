"""Fixtures of the conformance suite, and the table that `-s` or a failure-free run may be summed up with."""

import os
from pathlib import Path

import pytest

from tests.conformance import published


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of published numbers."""
    return published.FOLDER


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With CONFORMANCE_TABLE set, what the table in this folder's README is made from."""
    if os.environ.get("CONFORMANCE_TABLE") and published.SEEN:
        terminalreporter.write_line("")
        for row in published.table():
            terminalreporter.write_line(row)
