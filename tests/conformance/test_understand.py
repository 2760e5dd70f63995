"""Understanding: the vision tower's way in, logits over text and greedy answers."""

import pytest
import torch
from PIL import Image

from tests.conformance.cases import SERVERS, serve, tolerances, understand_requests
from tests.conformance.models import tiny
from tests.conformance.published import (
    Family,
    assert_close,
    assert_equal,
    assert_greedy,
    cases,
    metadata,
    name_of,
)
from tests.numerics import NORMALISED, rounding, sums
from wallaroo.model.images import patchify, semantic_image
from wallaroo.model.vision import embed_picture

pytestmark = pytest.mark.numerics

CASES = cases("mmu")
LIMITS = metadata("i2i_meta")["seg"]["min_pixels"], metadata("i2i_meta")["seg"]["max_pixels"]


@pytest.fixture(scope="module", params=SERVERS)
def served(request: pytest.FixtureRequest) -> tuple[str, dict]:
    """What serves, and the results of all cases together."""
    requests = [request for case in CASES for request in understand_requests(case, *LIMITS)]
    return request.param, serve(request.param, tiny(), "understand", requests)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_semantic_pathway(case: dict):
    arrays = Family("mmu", case["case"])
    image = semantic_image(Image.fromarray(arrays["src"]), *LIMITS)
    assert image.shape == (case["seg_h"], case["seg_w"], 3)
    assert_equal(image, arrays.where("seg_image"), arrays["seg_image"])
    patches, grid = patchify(image)
    assert_equal([1, *grid], arrays.where("grid"), arrays["grid"])
    allowed = rounding(arrays["pixel_values"], NORMALISED)
    assert_close(patches, arrays.where("pixel_values"), arrays["pixel_values"], allowed)
    with torch.inference_mode():
        seen = embed_picture(tiny().visual, torch.from_numpy(patches), grid)
    allowed = rounding(arrays["semantic"], sums(tiny().visual))
    assert_close(seen, arrays.where("semantic"), arrays["semantic"], allowed)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_logits(served: tuple[str, dict], case: dict):
    server, results = served
    arrays = Family("mmu", case["case"])
    allowed, _ = tolerances(tiny(), "understand", arrays)
    forced = results[case["case"], "tf_logits"]
    assert forced.tokens.tolist() == arrays["tf_tokens"].tolist()
    assert_close(forced.logits, arrays.where("tf_logits"), arrays["tf_logits"], allowed, server)
    first = results[case["case"], "greedy"].logits[0]
    assert_close(first, arrays.where("greedy_logits_step0"), arrays["greedy_logits_step0"], allowed, server)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_greedy_answers(served: tuple[str, dict], case: dict):
    server, results = served
    arrays = Family("mmu", case["case"])
    allowed, _ = tolerances(tiny(), "understand", arrays)
    result = results[case["case"], "greedy"]
    assert result.finish_reason == "length"
    assert result.prompt_tokens == case["prompt_len"]
    where, greedy = arrays.where("greedy"), arrays["greedy"]
    gap = assert_greedy(result.tokens, result.logits, where, greedy, allowed, server)
    if result.tokens.tolist() == greedy.tolist():
        assert gap == pytest.approx(case["margin"], abs=2 * allowed)
        assert len(set(result.tokens.tolist())) == case["unique_greedy"]
