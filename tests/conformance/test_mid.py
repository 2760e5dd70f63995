"""The eight-layer model: whether differences stay small over more layers and a longer picture."""

import numpy as np
import pytest

from tests.conformance.cases import GUIDED, PLAIN, SERVERS, serve, tolerances
from tests.conformance.models import mid
from tests.conformance.published import Family, assert_close, assert_greedy
from wallaroo.model.config import Size
from wallaroo.model.engine.requests import Request
from wallaroo.model.prompts import Prompt

pytestmark = pytest.mark.numerics

METHODS = {"line_break_128x128": True, "no_line_128x128": False}
SIZE = Size(128, 128)


def text_prompt(ids: np.ndarray) -> Prompt:
    return Prompt(ids, np.tile(np.arange(len(ids), dtype=np.int32), (3, 1)), len(ids))


def requests(method: str) -> list[Request]:
    """Named after the arrays they give. Without guidance there is no padding, so there `asis` is correct."""
    shared, arrays = Family("mid"), Family("mid", method)
    prompt, null, equal = (text_prompt(shared[x]) for x in ("ids", "null_ids", "null_ids_equal_length"))
    forced = arrays["tf_tokens"]
    return [
        Request((method, what), prompt, nothing, SIZE, 0, sampling, forced=tokens)
        for what, nothing, sampling, tokens in (
            ("cond_logits", None, PLAIN, forced),
            ("cfg3_correct", null, GUIDED, forced),
            ("eq_cfg3", equal, GUIDED, forced),
            ("greedy_cfg1_asis_cpu", None, PLAIN, None),
            ("eq_greedy_cfg3", equal, GUIDED, None),
        )
    ]


@pytest.fixture(scope="module", params=SERVERS)
def served(request: pytest.FixtureRequest) -> tuple[str, dict]:
    results = {}
    for method, line_break in METHODS.items():
        results |= serve(request.param, mid(line_break), "generate", requests(method))
    return request.param, results


@pytest.mark.parametrize("method", METHODS)
def test_logits(served: tuple[str, dict], method: str):
    server, results = served
    arrays = Family("mid", method)
    row, guided = tolerances(mid(), "generate", arrays)
    for array, allowed in (("cond_logits", row), ("cfg3_correct", guided), ("eq_cfg3", guided)):
        logits = results[method, array].logits[arrays["steps"]]
        assert_close(logits, arrays.where(array), arrays[array], allowed, server)


@pytest.mark.parametrize("method", METHODS)
def test_greedy_tokens(served: tuple[str, dict], method: str):
    server, results = served
    arrays = Family("mid", method)
    row, guided = tolerances(mid(), "generate", arrays)
    for array, margin, allowed in (
        ("greedy_cfg1_asis_cpu", "greedy_margin_cfg1_asis_cpu", row),
        ("eq_greedy_cfg3", "eq_greedy_margin", guided),
    ):
        result = results[method, array]
        gap = assert_greedy(result.tokens, result.logits, arrays.where(array), arrays[array], allowed, server)
        if result.tokens.tolist() == arrays[array].tolist():
            assert_close(gap, arrays.where(margin), arrays[margin], 2 * allowed, server)
