"""Probabilities after temperature, top-k and top-p, of the engine's sampler and of the plain loop's."""

import numpy as np
import pytest
import torch

from tests.conformance.published import Family, assert_close, assert_equal, cases, name_of
from wallaroo.model.reference import probabilities
from wallaroo.model.sampling import Sampling, kept_logits, sample

pytestmark = pytest.mark.numerics

ALLOWED, RELATIVE = 1e-6, 1e-4


@pytest.mark.parametrize("case", cases("sampling"), ids=name_of)
def test_probabilities(case: dict):
    arrays = Family("sampling", case["case"])
    logits = torch.from_numpy(arrays["logits"])
    sampling = Sampling(1.0, case["temperature"], case["top_k"], case["top_p"]).validate()
    columns = [
        torch.tensor([value] * len(logits))
        for value in (float(sampling.temperature), sampling.top_k, float(sampling.top_p))
    ]
    for what, found in (
        ("engine", kept_logits(logits, *columns).softmax(-1)),
        ("plain loop", probabilities(logits, sampling)),
    ):
        assert_close(found, arrays.where("probs"), arrays["probs"], ALLOWED, what, RELATIVE)
        kept = (found > 0).sum(-1).tolist()
        assert kept == case["kept"], f"family sampling, case {case['case']} ({what}): kept {kept}"
    assert logits.shape[-1] == case["vocab"]
    assert_equal(logits.argmax(-1), arrays.where("argmax"), arrays["argmax"], "engine")
    greedy = torch.ones_like(columns[1])
    greedy = sample(logits, columns[0], greedy, columns[2], torch.full((len(logits),), 0.999))
    assert_equal(greedy, arrays.where("argmax"), arrays["argmax"], "engine, greedy")


@pytest.mark.parametrize("case", cases("sampling"), ids=name_of)
def test_the_engine_draws_no_token_of_probability_zero(case: dict):
    arrays = Family("sampling", case["case"])
    count = 400
    logits = torch.from_numpy(arrays["logits"][:1]).repeat(count, 1)
    columns = [
        torch.full((count,), value)
        for value in (float(case["temperature"]), case["top_k"], float(case["top_p"]))
    ]
    tokens = sample(logits, *columns, torch.linspace(0, 1 - 1e-9, count, dtype=torch.float64)).numpy()
    assert (arrays["probs"][0][tokens] > 0).all()
    # Evenly spread uniform numbers give every token its share, to within one draw at either end.
    shares = np.bincount(tokens, minlength=case["vocab"]) / count
    assert np.abs(shares - arrays["probs"][0]).max() <= 2 / count
