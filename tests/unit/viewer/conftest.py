"""Outputs to view, and a home of their own for the indexes of each test."""

import pytest

from tests.viewers import fill_index
from wallaroo.workflows.viewer import index
from wallaroo.workflows.viewer.output import Output


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder of indexes for each test."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def opened():
    """A function that opens an output with its index filled."""
    indexes = []

    def open_output(path, fill=True):
        made = index.Index([str(path)])
        indexes.append(made)
        output = Output(0, str(path), made)
        if fill:
            fill_index(output)
        return output

    yield open_output
    for one in indexes:
        one.close()


@pytest.fixture
def three(tmp_path, outputs):
    """120 rows in three shards, among them planned errors and one of the engine."""
    tables = [outputs.plan_table(40, 40 * i, i, errors=(3, 7)) for i in range(3)]
    outputs.make_output(tmp_path / "out", tables, failed={1: (5,)})
    return tmp_path / "out"
