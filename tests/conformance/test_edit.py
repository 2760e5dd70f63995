"""Editing: both pathways of the source, the black picture of the null branch, logits and greedy tokens."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conformance.cases import SERVERS, edit_requests, serve, tolerances
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
from tests.numerics import NORMALISED, nearest_tolerance, rounding, sums
from wallaroo.model.config import Size
from wallaroo.model.images import cover_size, patchify, pixel_image, semantic_image
from wallaroo.model.vision import embed_picture
from wallaroo.model.vq import to_float

pytestmark = pytest.mark.numerics

CASES = cases("i2i")
LIMITS = metadata("i2i_meta")["seg"]


@pytest.fixture(scope="module", params=SERVERS)
def served(request: pytest.FixtureRequest) -> tuple[str, dict]:
    """What serves, and the results of all cases together."""
    requests = [request for case in CASES for request in edit_requests(case)]
    return request.param, serve(request.param, tiny(), "edit", requests)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_semantic_pathway(case: dict):
    arrays = Family("i2i", case["case"])
    image = semantic_image(Image.fromarray(arrays["src"]), LIMITS["min_pixels"], LIMITS["max_pixels"])
    assert_equal(image, arrays.where("seg_image"), arrays["seg_image"])
    patches, grid = patchify(image)
    assert_equal([1, *grid], arrays.where("grid"), arrays["grid"])
    allowed = rounding(arrays["pixel_values"], NORMALISED)
    assert_close(patches, arrays.where("pixel_values"), arrays["pixel_values"], allowed)
    black, _ = patchify(np.zeros_like(image))
    first = arrays["null_pixel_value_rows"]
    assert_close(black[:1], arrays.where("null_pixel_value_rows"), first, rounding(first, NORMALISED))
    assert (black == black[0]).all()
    for name, values in (("semantic", patches), ("null_semantic", black)):
        with torch.inference_mode():
            seen = embed_picture(tiny().visual, torch.from_numpy(values), grid)
        assert_close(seen, arrays.where(name), arrays[name], rounding(arrays[name], sums(tiny().visual)))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_pixel_pathway(case: dict):
    arrays, model = Family("i2i", case["case"]), tiny()
    size = config_of("tiny_model").bucket(case["src_h"], case["src_w"])
    assert (size.height, size.width) == (case["H"], case["W"])
    assert tuple(metadata("i2i_meta")["bucket_table"][case["bucket"]]) == tuple(size)
    assert list(cover_size(case["src_h"], case["src_w"], size)) == case["resize"]
    cropped = pixel_image(Image.fromarray(arrays["src"]), size)
    assert_equal(cropped, arrays.where("pixel_crop"), arrays["pixel_crop"])
    with torch.inference_mode():
        both = np.stack((cropped, np.zeros_like(cropped)))
        latents = model.vq.encode(to_float(torch.from_numpy(both)))
        rows = latents.flatten(2).transpose(1, 2)
        embedded = model.pixel_adapter(rows)
        distances = torch.cdist(rows[0].double(), model.vq.codebook().double()).square()
        tokens = model.vq.quantise(latents)[0].flatten()
    allowed = rounding(arrays["z"], sums(model.vq.encoder, model.vq.quant_conv))
    assert_close(rows[0], arrays.where("z"), arrays["z"], allowed)
    nearest = distances.topk(2, largest=False).values
    clear = (nearest[:, 1] - nearest[:, 0] > nearest_tolerance(allowed, rows.shape[-1])).numpy()
    assert_equal(np.where(clear, tokens, arrays["idx"]), arrays.where("idx"), arrays["idx"])
    length = sums(model.vq.encoder, model.vq.quant_conv, model.pixel_adapter)
    for found, name in zip(embedded, ("vae", "null_vae"), strict=True):
        assert_close(found, arrays.where(name), arrays[name], rounding(arrays[name], length))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_logits(served: tuple[str, dict], case: dict):
    server, results = served
    arrays = Family("i2i", case["case"])
    row, guided = tolerances(tiny(), "edit", arrays)
    for array, allowed in (("cond_logits", row), ("null_logits_correct", row), ("cfg3_correct", guided)):
        result = results[case["case"], array]
        assert result.tokens.tolist() == arrays["tf_tokens"].tolist()
        assert_close(result.logits, arrays.where(array), arrays[array], allowed, server)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_greedy_tokens(served: tuple[str, dict], case: dict):
    server, results = served
    arrays = Family("i2i", case["case"])
    row, guided = tolerances(tiny(), "edit", arrays)
    for array, margin, allowed in (
        ("greedy_cfg1", "margin_cfg1", row),
        ("greedy_cfg3_correct", "margin_cfg3_correct", guided),
    ):
        result = results[case["case"], array]
        gap = assert_greedy(result.tokens, result.logits, arrays.where(array), arrays[array], allowed, server)
        if result.tokens.tolist() == arrays[array].tolist():
            assert gap == pytest.approx(case[margin], abs=2 * allowed), f"case {case['case']}: {margin}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_lengths_and_the_null_branch(case: dict):
    arrays = Family("i2i", case["case"])
    conditional, nothing = (
        next(r for r in edit_requests(case) if r.key[1] == what)
        for what in ("cond_logits", "null_logits_correct")
    )
    assert len(conditional.prompt.ids) == case["cond_len"] == len(nothing.prompt.ids) + case["null_pad"]
    assert len(nothing.prompt.ids) == case["null_len"]
    rows, columns = Size(case["H"], case["W"]).grid
    assert (case["n_tokens"], case["n_eol"]) == (rows * columns, rows - 1)
    assert arrays["pos"].shape[1] == case["cond_len"] + case["n_tokens"] + case["n_eol"]
    # The null branch holds a picture of the same size, black: only the prompt's words are fewer.
    for prompt in (conditional.prompt, nothing.prompt):
        assert len(prompt.pixel) == rows * columns
        assert prompt.semantic[1] - prompt.semantic[0] == case["seg_h"] * case["seg_w"] // 28**2
    assert conditional.prompt.semantic == nothing.prompt.semantic
