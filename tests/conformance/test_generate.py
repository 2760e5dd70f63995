"""Text to image: logits and greedy tokens of the decoding loop, line by line and square."""

import numpy as np
import pytest
import torch

from tests.conformance.cases import SERVERS, generate_requests, prompt_of, serve, tolerances
from tests.conformance.models import config_of, tiny
from tests.conformance.published import (
    Family,
    assert_close,
    assert_equal,
    assert_greedy,
    cases,
    metadata,
    name_of,
)
from tests.numerics import rounding, sums
from wallaroo.model.attention import causal_attention
from wallaroo.model.decoder import rope, rope_frequencies
from wallaroo.model.reference import Reference

pytestmark = pytest.mark.numerics

CASES = cases("t2i")


@pytest.fixture(scope="module", params=SERVERS)
def served(request: pytest.FixtureRequest) -> tuple[str, dict]:
    """What serves, and the results of all cases together, whatever their sizes."""
    results = {}
    for line_break in (True, False):
        requests = [
            request
            for case in CASES
            if (case["method"] == "line_break") == line_break
            for request in generate_requests(case)
        ]
        results |= serve(request.param, tiny(line_break), "generate", requests)
    return request.param, results


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_logits(served: tuple[str, dict], case: dict):
    server, results = served
    arrays = Family("t2i", case["case"])
    row, guided = tolerances(tiny(), "generate", arrays)
    for array, allowed in (("cond_logits", row), ("null_logits_correct", row), ("cfg3_correct", guided)):
        result = results[case["case"], array]
        assert result.tokens.tolist() == arrays["tf_tokens"].tolist()
        assert_close(result.logits, arrays.where(array), arrays[array], allowed, server)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_greedy_tokens(served: tuple[str, dict], case: dict):
    server, results = served
    arrays = Family("t2i", case["case"])
    row, guided = tolerances(tiny(), "generate", arrays)
    for array, margin, allowed in (
        ("greedy_cfg1", "margin_cfg1", row),
        ("greedy_cfg3_correct", "margin_cfg3_correct", guided),
    ):
        result = results[case["case"], array]
        gap = assert_greedy(result.tokens, result.logits, arrays.where(array), arrays[array], allowed, server)
        if result.tokens.tolist() == arrays[array].tolist():
            assert gap == pytest.approx(case[margin], abs=2 * allowed), f"case {case['case']}: {margin}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_hidden_states_of_the_prompt(case: dict):
    arrays = Family("t2i", case["case"])
    prompt = prompt_of(arrays["ids"], arrays["pos"])
    ids = torch.from_numpy(prompt.ids).long()
    positions = torch.from_numpy(prompt.positions).long()
    model = tiny()
    with torch.inference_mode():
        theirs = Reference(model).decoder(
            input_ids=ids[None], position_ids=positions[:, None], output_hidden_states=True
        )
        decoder, config = model.language_model, model.config.decoder
        x = decoder.embed_tokens(ids)
        turns = rope(positions, rope_frequencies(config), config.mrope_section, x.dtype)

        def attend(layer, q, k, v):
            return causal_attention(q[None], k[None], v[None])[0]

        for server, first, last in (
            ("plain loop", theirs.hidden_states[1][0], theirs.last_hidden_state[0]),
            ("decoder", decoder.layers[0](x, 0, *turns, attend), decoder(x, *turns, attend)),
        ):
            for array, found, modules in (
                ("prefill_hidden_l1", first, decoder.layers[:1]),
                ("prefill_hidden", last, decoder.layers),
            ):
                allowed = rounding(arrays[array], sums(*modules))
                assert_close(found, arrays.where(array), arrays[array], allowed, server)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_lengths_and_positions(case: dict):
    arrays = Family("t2i", case["case"])
    rows, columns = case["H"] // 16, case["W"] // 16
    lines = rows - 1 if case["method"] == "line_break" else 0
    assert (case["n_tokens"], case["n_eol"]) == (rows * columns, lines)
    for ids, pos, length in (("ids", "pos", "cond_len"), ("null_ids", "null_pos", "null_len")):
        assert len(arrays[ids]) == case[length]
        count = case[length] + rows * columns + lines
        assert_equal(np.tile(np.arange(count), (3, 1)), arrays.where(pos), arrays[pos])


def test_ids_of_the_reduced_vocabulary():
    """The fixtures' own mapping, so that what is tested on real ids holds for these too."""
    real = metadata("tokenizer_ids")["added_tokens"]
    reduced = config_of("tiny_model").token_ids | metadata("tiny_model")["token_ids"]
    control = {real[name]: number for name, number in reduced.items()}
    text = metadata("tiny_model")["text_vocab"]
    checked = 0
    for family, prefixes in (("t2i", ("", "null_")), ("i2i", ("", "null_")), ("mmu", ("",))):
        for case in cases(family):
            if case.get("lang") == "RAW":
                continue
            arrays = Family(family, case["case"])
            for prefix in prefixes:
                found = [control.get(int(i), int(i) % text) for i in arrays[f"real_{prefix}ids"]]
                assert_equal(found, arrays.where(f"{prefix}ids"), arrays[f"{prefix}ids"])
                checked += 1
    assert checked
