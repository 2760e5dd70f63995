"""The one point where we differ on purpose: what the null branch sees of the padding in front of it.

The published loop pads the null prompt on the left to the length of the other and lets decode steps
see the pads. Here that loop is rebuilt from the plain one, so that both can be told: our numbers are
others than the published ones, and padding is all that makes them so.
"""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.conformance.cases import GUIDED as GUIDED_SAMPLING
from tests.conformance.cases import SERVERS, edit_requests, generate_requests, serve, tolerances
from tests.conformance.models import mid, tiny
from tests.conformance.published import (
    Family,
    assert_close,
    assert_equal,
    assert_greedy,
    cases,
    metadata,
    name_of,
)
from tests.conformance.test_mid import METHODS, SIZE, text_prompt
from wallaroo.model.engine.engine import END_OF_LINE
from wallaroo.model.engine.requests import Request
from wallaroo.model.prompts import Prompt
from wallaroo.model.reference import Reference
from wallaroo.model.wallaroo import Wallaroo

pytestmark = pytest.mark.numerics

VARIANTS = ("asis_cpu", "asis_cuda")
IMAGE_FAMILIES = {"t2i": ("generate", generate_requests), "i2i": ("edit", edit_requests)}


@cache
def plain_loop(model: Wallaroo) -> Reference:
    return Reference(model)


class Branch:
    """One sequence with `pads` pad tokens in front, and the published masks."""

    def __init__(self, plain: Reference, embedded: Tensor, positions: np.ndarray, pads: int, variant: str):
        self.decoder, self.cache = plain.decoder, DynamicCache(config=plain.decoder.config)
        self.positions, self.place = torch.from_numpy(positions).long(), 0
        length = len(embedded)
        lowest = torch.finfo(torch.float32).min
        mask = torch.full((length, length), lowest).triu(1)
        mask[:, :pads] = lowest
        if variant == "asis_cuda":
            # Rows that may see nothing are opened to all of the prompt. With `asis_cpu` they stay shut: the
            # lowest number swallows every score, so that softmax spreads evenly.
            mask[:pads] = 0
        self.feed(embedded, mask)

    def feed(self, embedded: Tensor, mask: Tensor | None = None) -> None:
        """Tokens (n, H); without a mask they see everything before them, pads included."""
        positions = self.positions[:, self.place : self.place + len(embedded)]
        self.place += len(embedded)
        self.hidden = self.decoder(
            inputs_embeds=embedded[None],
            attention_mask={"full_attention": None if mask is None else mask[None, None]},
            position_ids=positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[0, -1]


def padded_positions(prompt: Prompt, length: int, generated: int) -> np.ndarray:
    """Positions (3, length + generated): pads have 1, then those of the prompt, then what follows."""
    pads = np.ones((3, length - len(prompt.ids)), np.int64)
    following = np.tile(prompt.next_position + np.arange(generated), (3, 1))
    return np.concatenate((pads, prompt.positions, following), axis=1)


@torch.inference_mode()
def published_loop(
    model: Wallaroo, task: str, request: Request, variant: str, pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (n,), null logits and guided logits (n, V) of one guided request with padding.

    pad: token id that the null prompt is padded with.
    """
    plain = plain_loop(model)
    prompt, null = request.prompt, request.null
    rows, columns = request.size.grid
    generated = rows * (columns + 1)
    length = len(prompt.ids)
    pads = length - len(null.ids)
    black = [None if image is None else np.zeros_like(image) for image in (request.semantic, request.pixels)]
    embedded_null = plain.embed_prompt(null, *black)
    front = model.language_model.embed_tokens.weight[pad].expand(pads, -1)
    branches = [
        Branch(
            plain,
            plain.embed_prompt(prompt, request.semantic, request.pixels),
            padded_positions(prompt, length, generated),
            0,
            variant,
        ),
        Branch(
            plain, torch.cat((front, embedded_null)), padded_positions(null, length, generated), pads, variant
        ),
    ]
    adapter, head = model.image_parts(task)
    line_end = model.language_model.embed_tokens.weight[model.config.token_ids[END_OF_LINE]]
    codebook = model.vq.codebook()
    tokens, null_logits, guided = [], [], []
    for step in range(rows * columns):
        with_prompt, without = (head(branch.hidden) for branch in branches)
        null_logits.append(without)
        guided.append(without + request.sampling.cfg * (with_prompt - without))
        tokens.append(int(guided[-1].argmax() if request.forced is None else request.forced[step]))
        fed = [adapter(codebook[tokens[-1]])]
        if model.config.line_break and (step + 1) % columns == 0:
            fed.append(line_end)
        for branch in branches:
            for embedded in fed:
                branch.feed(embedded[None])
    return np.array(tokens), torch.stack(null_logits).numpy(), torch.stack(guided).numpy()


IMAGE_CASES = [
    pytest.param(family, case, id=f"{family}-{name_of(case)}")
    for family in IMAGE_FAMILIES
    for case in cases(family)
]


def requests_of(family: str, case: dict) -> tuple[str, Wallaroo, dict[str, Request]]:
    task, make = IMAGE_FAMILIES[family]
    model = tiny(case.get("method", "line_break") == "line_break")
    return task, model, {request.key[1]: request for request in make(case)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("family", "case"), IMAGE_CASES)
def test_with_its_padding_the_plain_loop_is_the_published_one(family: str, case: dict, variant: str):
    arrays = Family(family, case["case"])
    task, model, requests = requests_of(family, case)
    row, guided_row = tolerances(model, task, arrays)
    pad = metadata("tiny_model")["token_ids"]["<|endoftext|>"]
    forced = requests["cfg3_correct"]
    generated = case["n_tokens"] + case["n_eol"]
    positions = padded_positions(forced.null, case["cond_len"], generated)
    assert_equal(positions, arrays.where("null_pos_padded"), arrays["null_pos_padded"])

    _, null_logits, guided = published_loop(model, task, forced, variant, pad)
    null_array, guided_array, greedy_array = (
        f"{name}_{variant}" for name in ("null_logits", "cfg3", "greedy_cfg3")
    )
    assert_close(null_logits, arrays.where(null_array), arrays[null_array], row, "plain loop, padded")
    assert_close(guided, arrays.where(guided_array), arrays[guided_array], guided_row, "plain loop, padded")
    apart = np.abs(arrays[guided_array] - arrays["cfg3_correct"])
    assert apart.max() == pytest.approx(case[f"maxdiff_vs_correct_{variant}"], abs=1e-6)
    assert apart[0].max() == pytest.approx(case[f"maxdiff_step0_{variant}"], abs=1e-6)

    tokens, _, logits = published_loop(model, task, requests["greedy_cfg3_correct"], variant, pad)
    gap = assert_greedy(
        tokens, logits, arrays.where(greedy_array), arrays[greedy_array], guided_row, "plain loop, padded"
    )
    if tokens.tolist() == arrays[greedy_array].tolist():
        assert gap == pytest.approx(case[f"margin_cfg3_{variant}"], abs=2 * guided_row)
        changed = int((arrays[greedy_array] != arrays["greedy_cfg3_correct"]).sum())
        assert changed == case[f"greedy_differs_{variant}"]


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(("family", "case"), IMAGE_CASES)
def test_ours_leaves_the_published_one_exactly_where_pads_are_seen(family: str, case: dict, server: str):
    arrays = Family(family, case["case"])
    task, model, requests = requests_of(family, case)
    _, allowed = tolerances(model, task, arrays)
    ours = serve(server, model, task, [requests["cfg3_correct"]])[case["case"], "cfg3_correct"].logits
    for variant in VARIANTS:
        apart = np.abs(ours - arrays[f"cfg3_{variant}"]).max(-1)
        # The prompt's own forward masks the pads, so that the first step agrees.
        assert apart[0] <= allowed, f"family {family}, case {case['case']}, {variant}: first step differs"
        if case["null_pad"]:
            assert apart.max() > 100 * allowed, (
                f"family {family}, case {case['case']}: equal in spite of pads"
            )
        else:
            assert apart.max() <= allowed, f"family {family}, case {case['case']}: differs without pads"


@pytest.mark.parametrize("method", METHODS)
def test_eight_layers(method: str):
    shared, arrays, model = Family("mid"), Family("mid", method), mid(METHODS[method])
    prompt, null = text_prompt(shared["ids"]), text_prompt(shared["null_ids"])
    pad = metadata("mid_model")["token_ids"]["pad"]
    _, allowed = tolerances(model, "generate", arrays)
    for variant in VARIANTS:
        request = Request("", prompt, null, SIZE, 0, GUIDED_SAMPLING, forced=arrays["tf_tokens"])
        _, _, guided = published_loop(model, "generate", request, variant, pad)
        array = f"cfg3_{variant}"
        ours = guided[arrays["steps"]]
        assert_close(ours, arrays.where(array), arrays[array], allowed, "plain loop, padded")
        assert np.abs(arrays[array] - arrays["cfg3_correct"]).max() > 100 * allowed
    greedy = Request("", prompt, null, SIZE, 0, GUIDED_SAMPLING)
    tokens, _, logits = published_loop(model, "generate", greedy, "asis_cpu", pad)
    array, margin = "greedy_cfg3_asis_cpu", "greedy_margin_cfg3_asis_cpu"
    gap = assert_greedy(tokens, logits, arrays.where(array), arrays[array], allowed, "plain loop, padded")
    if tokens.tolist() == arrays[array].tolist():
        assert_close(gap, arrays.where(margin), arrays[margin], 2 * allowed, "plain loop, padded")
