"""Fixtures of the conformance suite, and the table that its README is made from."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conformance import published
from tests.conformance.models import published_tensors
from tests.conformance.released import MIB, Released, byte_tokenizer_json


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of published numbers."""
    return published.FOLDER


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are too small to share out: threads that wait for each other cost more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def fixture_files(tmp_path_factory: pytest.TempPathFactory) -> Released:
    """The weights of the published numbers in the published layout, written and converted."""
    files = Released(
        tmp_path_factory.mktemp("fixture"),
        dict(published_tensors("tiny_model")),
        dict(published_tensors("vq_model")),
        {**published.metadata("tiny_model")["config"], "model_type": "qwen2_5_vl"},
        byte_tokenizer_json(),
    )
    files.convert(shard_bytes=32 * MIB)
    return files


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With CONFORMANCE_TABLE set, what was compared and the largest differences, as Markdown."""
    if os.environ.get("CONFORMANCE_TABLE") and published.SEEN:
        terminalreporter.write_line("")
        for row in published.table():
            terminalreporter.write_line(row)
