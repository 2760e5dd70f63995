"""The image tokenizer, from pixels to tokens and back."""

import math
from functools import cache

import numpy as np
import pytest
import torch

from tests.conformance.models import vq_model
from tests.conformance.published import Family, assert_close, assert_equal, cases, metadata, name_of
from tests.numerics import nearest_tolerance, rounding, spread, sums
from wallaroo.model.vq import to_float, to_uint8

pytestmark = pytest.mark.numerics

LEVEL = 1 / 127.5
"""How far apart two levels of a pixel are in the decoder's numbers."""

CASES = cases("vq")
PICTURES = [case for case in CASES if case["case"].startswith("v")]
RANDOM = [case for case in CASES if case["case"].startswith("r")]
LARGE = [case for case in CASES if case["case"].startswith("b")]


def test_every_kind_of_case_is_there():
    assert PICTURES and RANDOM and LARGE
    assert len(PICTURES) + len(RANDOM) + len(LARGE) == len(CASES)


def test_names_and_shapes_are_the_published_ones():
    published = {name: tuple(shape) for name, shape in metadata("vq_model")["tensors"]}
    published.pop("quantize.codebook_used")
    assert {name: tuple(values.shape) for name, values in vq_model().state_dict().items()} == published


@pytest.mark.parametrize("case", PICTURES + LARGE, ids=name_of)
def test_encoding(case: dict):
    arrays, vq = Family("vq", case["case"]), vq_model()
    length = sums(vq.encoder, vq.quant_conv)
    with torch.inference_mode():
        picture = to_float(torch.from_numpy(arrays["image"]))[None]
        if case in PICTURES:
            features = vq.encoder(picture)
            for name, found in (("encoder_out", features), ("pre_norm", vq.quant_conv(features))):
                assert_close(found[0], arrays.where(name), arrays[name], rounding(arrays[name], length))
        latents = vq.encode(picture)
        allowed = rounding(arrays["z"], length)
        assert_close(latents[0].movedim(0, -1), arrays.where("z"), arrays["z"], allowed)
        tokens = vq.quantise(latents).flatten().numpy()
        entries = vq.codebook()
    distances = torch.cdist(latents[0].flatten(1).T.double(), entries.double()).square()
    nearest = distances.topk(2, largest=False).values
    allowed = nearest_tolerance(allowed, entries.shape[1])
    assert_close(nearest[:, 1] - nearest[:, 0], arrays.where("margin"), arrays["margin"], allowed)
    clear = arrays["margin"] > allowed
    assert clear.mean() > 0.5
    assert_equal(np.where(clear, tokens, arrays["idx"]), arrays.where("idx"), arrays["idx"])


@cache
def decoded(name: str) -> torch.Tensor:
    """The picture of a case, float32 `(3, h, w)`."""
    [case] = (case for case in CASES if case["case"] == name)
    tokens = torch.from_numpy(Family("vq", name)["idx"]).long().view(1, case["h"] // 16, case["w"] // 16)
    with torch.inference_mode():
        return vq_model().decode(tokens)[0]


def decoder_length() -> int:
    return sums(vq_model().decoder, vq_model().post_quant_conv)


def crossings(difference: float, count: int) -> float:
    """How many of `count` uint8 values may be a level off where the numbers they are made of differ so on
    average.

    A number lies anywhere between the edges of its level, so a difference takes it across one with a
    probability of that difference in levels. Of the sum of these, the expectation, 5 deviations more are
    as good as never passed.
    """
    expected = difference / LEVEL * count
    return expected + 5 * math.sqrt(expected)


def check_large(arrays: Family, picture: torch.Tensor) -> None:
    """A large picture is stored in extracts: every 7th row and column, means of blocks, the centre."""
    wide = picture.double()
    blocks = wide.unflatten(2, (-1, 16)).unflatten(1, (-1, 16)).mean((2, 4))
    allowed = rounding(arrays["dec_stride7"], decoder_length())
    for name, found in (
        ("dec_stride7", wide[:, ::7, ::7]),
        ("dec_blockmean16", blocks),
        ("dec_mean", wide.mean((1, 2))),
        ("dec_std", wide.std((1, 2), correction=0)),
    ):
        assert_close(found, arrays.where(name), arrays[name], allowed)
    levels = to_uint8(picture).numpy()
    top, left = (levels.shape[0] - 96) // 2, (levels.shape[1] - 96) // 2
    centre = levels[top : top + 96, left : left + 96]
    assert_close(centre, arrays.where("u8_center"), arrays["u8_center"], 1)
    # As if all that are off were off in the same direction.
    difference = np.abs(wide[:, ::7, ::7].numpy() - arrays["dec_stride7"]).mean()
    allowed = crossings(difference, levels.shape[0] * levels.shape[1])
    assert_close(levels.sum((0, 1), dtype=np.int64), arrays.where("u8_sum"), arrays["u8_sum"], allowed)


@pytest.mark.parametrize("case", PICTURES + RANDOM, ids=name_of)
def test_decoding(case: dict):
    arrays = Family("vq", case["case"])
    picture, published = decoded(case["case"]), arrays["dec"]
    assert_close(picture, arrays.where("dec"), published, rounding(published, decoder_length()))
    assert_close(to_uint8(picture), arrays.where("u8"), arrays["u8"], 1)
    assert_equal(
        to_uint8(torch.from_numpy(published)), arrays.where("u8"), arrays["u8"], "of published numbers"
    )


@pytest.mark.parametrize("case", LARGE, ids=name_of)
def test_decoding_a_large_picture(case: dict):
    arrays = Family("vq", case["case"])
    check_large(arrays, decoded(case["case"]))


def test_hardly_any_pixel_is_another_one():
    """Over all cases: values are a level off no more often than float32 rounding moves one across an edge.

    The published numbers come from float32 kernels themselves, and are as far from exact arithmetic as ours.
    """
    differ = total = mean = 0
    for case in CASES:
        arrays, picture = Family("vq", case["case"]), decoded(case["case"])
        levels = to_uint8(picture).numpy()
        if case in LARGE:
            top, left = (levels.shape[0] - 96) // 2, (levels.shape[1] - 96) // 2
            levels, expected = levels[top : top + 96, left : left + 96], arrays["u8_center"]
            difference = picture[:, ::7, ::7].numpy() - arrays["dec_stride7"]
        else:
            expected, difference = arrays["u8"], picture.numpy() - arrays["dec"]
        assert levels.shape == expected.shape
        differ += int((levels != expected).sum())
        total += levels.size
        mean += np.abs(difference).mean() * levels.size
        # This keeps the bound below low, whatever the kernels.
        apart, typical = np.abs(difference).mean(), spread(picture, decoder_length())
        assert apart <= typical, (
            f"family vq, case {case['case']}: {apart:.3g} apart on average, not {typical:.3g}"
        )
    allowed = crossings(mean / total, total)
    assert differ <= allowed, f"family vq: {differ} of {total} uint8 values differ, at most {allowed:.0f} may"
