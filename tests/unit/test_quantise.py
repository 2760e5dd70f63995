"""Weights in 8 bits: near the model's own, a row the same in any company, a sentence where they cannot be."""

import sys

import numpy as np
import pytest
import torch

from tests.unit.test_engine import text_prompt
from wallaroo.model.checkpoint import TINY, load
from wallaroo.model.engine.engine import Engine
from wallaroo.model.engine.options import EngineOptions
from wallaroo.model.engine.requests import Request, Result
from wallaroo.model.errors import InputError
from wallaroo.model.quantise import quantise
from wallaroo.model.sampling import Sampling
from wallaroo.model.wallaroo import Wallaroo

pytestmark = pytest.mark.numerics


def results(model: Wallaroo, rows: int, trace: bool = False) -> list[Result]:
    """Rows of random prompts; with `trace` all take the same tokens, so that logits can be compared."""
    rng = np.random.default_rng(0)
    size = min(model.config.size_list(), key=lambda size: size.height * size.width)
    null = text_prompt(rng, 12)
    forced = np.arange(8, dtype=np.int32) if trace else None
    asked = [
        Request(key, text_prompt(rng, 20 + key), null, size, key, Sampling(2.0), forced=forced)
        for key in range(rows)
    ]
    engine = Engine(model, "generate", EngineOptions(slots=8, group_rows=8, decode_vq=False, trace=trace))
    return sorted(engine.run(asked), key=lambda result: result.key)


def test_int8_is_near_and_a_row_is_the_same_in_any_company() -> None:
    pytest.importorskip("torchao")
    torch.set_num_threads(1)
    own, rounded = load(TINY, "generate"), load(TINY, "generate")
    assert quantise(rounded, "int8").startswith("int8, torchao ")
    weights = [layer.mlp.down_proj.weight for layer in rounded.language_model.layers]
    assert {type(weight).__name__ for weight in weights} == {"Int8Tensor"}
    one, other = (results(model, 1, trace=True)[0].logits[:9] for model in (own, rounded))
    assert 0 < np.abs(other - one).max() < 0.1 * np.abs(one).max()
    assert np.array_equal(results(rounded, 1)[0].tokens, results(rounded, 9)[0].tokens)


def test_without_torchao_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(InputError, match=r"^weights is int8, .* install the extra 'quant', .*\.$"):
        quantise(load(TINY, "generate"), "int8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_fp8_is_refused_where_no_gpu_multiplies_it() -> None:
    with pytest.raises(InputError, match="weights is fp8, but cpu is no GPU that multiplies fp8"):
        quantise(load(TINY, "generate"), "fp8")
