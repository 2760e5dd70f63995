"""The small model and its tokenizer, loaded once a file."""

import pytest

from wallaroo.model.checkpoint import TINY, load, load_tokenizer


@pytest.fixture(scope="module")
def model():
    return load(TINY)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)
