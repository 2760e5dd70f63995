"""The engine against the plain loop on random work: mixed sizes, prompts, sampling, groups and sharing.

The engine draws freely. The plain loop is then given its tokens one row at a time, and must see the same
logits at every step and find the engine's choice where the row's random number falls.
"""

import dataclasses
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.conformance import weights
from tests.numerics import logit_length, rounding
from wallaroo.model.checkpoint import TINY, disk_tensors, empty_model, load_config, load_tokenizer
from wallaroo.model.config import DecoderConfig, ModelConfig, Size, VisionConfig, VQConfig
from wallaroo.model.engine.engine import STOP_TOKENS, Engine
from wallaroo.model.engine.options import EngineOptions
from wallaroo.model.engine.requests import Request, Result
from wallaroo.model.prompts import edit_prompt, generate_prompt, understand_prompt
from wallaroo.model.reference import Reference, probabilities
from wallaroo.model.sampling import Sampling, draws
from wallaroo.model.wallaroo import Wallaroo

pytestmark = pytest.mark.numerics

LOGIT_SIZE = 3.0
"""The root mean square of the logits of one branch."""

DRAWN = 1e-5
"""How far a random number may lie from the share of the probability that its token has. Probabilities and
their running sums are float32 in the engine, and at most 1: rounding moves them by less than a millionth."""

SIZES = [Size(16, 16), Size(16, 64), Size(32, 48), Size(48, 32), Size(48, 48), Size(64, 16)]
PROMPTS = ["", "a cat", "two red boats on a lake at night", "一只猫", "{prompt} 7 x 9", "a cat" * 12]


@cache
def model(line_break: bool) -> Wallaroo:
    """All three tasks; only the vocabulary is that of the embedded checkpoint."""
    embedded = load_config(TINY)
    config = ModelConfig(
        decoder=DecoderConfig(embedded.decoder.vocab_size, 64, 96, 2, 4, 2, 1e-6, 1e4, (2, 3, 3)),
        vision=VisionConfig(2, 32, "silu", 48, 2, out_hidden_size=64, fullatt_block_indexes=(1,)),
        vq=VQConfig(channels=8, norm_groups=4, z_channels=16, codebook_size=96),
        layout=embedded.layout,
        indicators="text",
        line_break=line_break,
        sizes={f"{size.height / size.width:.2f}": tuple(size) for size in SIZES},
        token_ids=embedded.token_ids,
    )
    made = empty_model(config, None, "cpu", torch.float32).eval().requires_grad_(False)
    for name, place in disk_tensors(made).items():
        place.copy_(torch.from_numpy(weights.tensor("oracle", name, place.shape)))
    # Stop tokens come up now and then.
    made.lm_head.weight[[config.token_ids[name] for name in STOP_TOKENS]] *= 3
    return made


@cache
def plain_loop(line_break: bool) -> Reference:
    return Reference(model(line_break))


tokenizer = cache(lambda: load_tokenizer(TINY))


@st.composite
def requests(draw, task: str, config: ModelConfig) -> list[Request]:
    made = []
    for key in range(draw(st.integers(1, 7))):
        text = draw(st.sampled_from(PROMPTS) | st.text(max_size=40))
        language = draw(st.sampled_from(["en", "zh"]))
        size = draw(st.sampled_from(SIZES))
        sampling = Sampling(
            cfg=1.0 if task == "understand" else draw(st.sampled_from([0.0, 1.0, 1.5, 3.0, 7.5])),
            temperature=draw(st.sampled_from([0.0, 0.7, 1.0, 1.6])),
            top_k=draw(st.sampled_from([0, 1, 2, 20, 1000])),
            top_p=draw(st.sampled_from([0.3, 0.9, 1.0])),
        )
        rng = np.random.default_rng(draw(st.integers(0, 3)))
        grid = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
        semantic = rng.integers(0, 256, (28 * grid[0], 28 * grid[1], 3), np.uint8)
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        base = Request(key, None, None, size, draw(st.integers(0, 2**63 - 1)), sampling)
        if task == "understand":
            prompt = understand_prompt(tokenizer(), config, text, grid)
            count = draw(st.integers(1, 12))
            made.append(
                dataclasses.replace(base, prompt=prompt, size=None, semantic=semantic, max_new_tokens=count)
            )
            continue
        if task == "generate":
            both = [generate_prompt(tokenizer(), config, x, size, language) for x in (text, "")]
            sources = {}
        else:
            both = [edit_prompt(tokenizer(), config, x, size, grid, language) for x in (text, "")]
            sources = {"semantic": semantic, "pixels": pixels}
        null = both[1] if sampling.guided or draw(st.booleans()) else None
        made.append(dataclasses.replace(base, prompt=both[0], null=null, **sources))
    return made


options = st.builds(
    EngineOptions,
    slots=st.integers(1, 9),
    group_rows=st.integers(1, 4),
    prefill_piece=st.sampled_from([1, 5, 8, 32]),
    prefill_pieces=st.integers(1, 5),
    vq_slice=st.integers(1, 3),
    prefix_sharing=st.booleans(),
    prefix_tokens=st.sampled_from([0, 100, 16384]),
    attention=st.sampled_from(["block", "sdpa", "triton"]),
    trace=st.just(True),
)


def miss(sampling: Sampling, logits: np.ndarray, number: float, tokens: list[int]) -> float:
    """How far a random number, or greedy choice, is from giving one of `tokens`; 0 if it gives it.

    logits: the engine's own. With those of the plain loop, a logit at the edge of top-k or top-p could be
    kept on one side and dropped on the other, which moves the choice by any amount.
    """
    if sampling.top_k == 1 or sampling.temperature == 0:
        return float(logits.max() - logits[tokens].max())
    upper = np.cumsum(probabilities(torch.from_numpy(logits[None]), sampling)[0].double().numpy())
    lower = np.append(0.0, upper)[:-1]
    place = number * upper[-1]
    return float(np.maximum(np.maximum(lower[tokens] - place, place - upper[tokens]), 0).min())


def check(task: str, line_break: bool, request: Request, result: Result) -> None:
    """One row of the engine's against the plain loop with the same tokens."""
    assert not result.error and result.prompt_tokens == len(request.prompt.ids)
    chosen: list[list[int]] = [[token] for token in result.tokens.tolist()]
    if task == "understand":
        if result.finish_reason == "stop":
            ids = model(line_break).config.token_ids
            chosen.append([ids[name] for name in STOP_TOKENS])
        else:
            assert len(chosen) == request.max_new_tokens
        assert len(chosen) <= request.max_new_tokens
        forced = np.append(result.tokens, -1).astype(np.int32)
        again = dataclasses.replace(request, forced=forced, max_new_tokens=len(chosen))
        expected = plain_loop(line_break).text(again, trace=True)
        places = np.arange(len(chosen))
    else:
        again = dataclasses.replace(request, forced=result.tokens)
        expected = plain_loop(line_break).images(task, [again], trace=True)[0]
        assert result.pixels.shape == expected.pixels.shape == (*request.size, 3)
        assert np.abs(result.pixels.astype(int) - expected.pixels).max() <= 1
        assert (result.pixels != expected.pixels).mean() < 0.01
        rows, columns = request.size.grid
        # A line end is a place too, and has a random number that nothing is drawn with.
        places = np.arange(rows * columns)
        places += places // columns if line_break else 0
    assert len(expected.logits) == len(chosen)
    difference = np.abs(result.logits[: len(chosen)] - expected.logits).max(initial=0)
    cfg = request.sampling.cfg
    # Errors of the two branches are independent; without guidance cfg is 1.
    allowed = math.hypot(cfg, cfg - 1) * rounding(LOGIT_SIZE, logit_length(model(line_break), task))
    assert difference <= allowed, f"row {request.key}: logits differ by {difference}, allowed {allowed}"
    numbers = draws(request.seed, int(places.max()) + 1)
    for place, logits, tokens in zip(places, result.logits[: len(chosen)], chosen, strict=True):
        gap = miss(request.sampling, logits, numbers[place], tokens)
        assert gap <= DRAWN, f"row {request.key}: token {tokens} at place {place} misses by {gap}"
    assert expected.tokens[: len(result.tokens)].tolist() == result.tokens.tolist()


@pytest.mark.parametrize("line_break", [True, False], ids=["lines", "square"])
@pytest.mark.parametrize("task", ["generate", "edit", "understand"])
def test_the_engine_is_the_plain_loop(task: str, line_break: bool):
    config = model(line_break).config

    # Not shrunk on failure, since that takes minutes: the first example that fails is small enough.
    @settings(
        max_examples=10,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
    )
    @given(requests(task, config), options)
    def rows_agree(rows: list[Request], chosen: EngineOptions) -> None:
        results = {result.key: result for result in Engine(model(line_break), task, chosen).run(rows)}
        assert sorted(results) == [row.key for row in rows]
        for row in rows:
            check(task, line_break, row, results[row.key])

    rows_agree()
