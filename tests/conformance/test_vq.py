"""The image tokenizer, from pixels to tokens and back."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conformance.models import vq_model
from tests.conformance.published import Family, assert_close, assert_equal, cases, metadata, name_of
from wallaroo.model.vq import to_float, to_uint8

LATENT, MARGIN, PIXEL = 5e-5, 1e-4, 2e-4
SHARE = 1e-4
"""Of all uint8 values, at most this share may be a level off."""

KERNELS = (("AVX2", 2), ("AVX2", 1), ("AVX512_CORE", 2))
"""Instruction set and threads that published numbers may have been made with; those here with the first."""

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
    with torch.inference_mode():
        picture = to_float(torch.from_numpy(arrays["image"]))[None]
        if case in PICTURES:
            features = vq.encoder(picture)
            assert_close(features[0], arrays.where("encoder_out"), arrays["encoder_out"], LATENT)
            assert_close(vq.quant_conv(features)[0], arrays.where("pre_norm"), arrays["pre_norm"], LATENT)
        latents = vq.encode(picture)
        assert_close(latents[0].movedim(0, -1), arrays.where("z"), arrays["z"], LATENT)
        tokens = vq.quantise(latents).flatten().numpy()
        entries = vq.codebook()
    distances = torch.cdist(latents[0].flatten(1).T.double(), entries.double()).square()
    nearest = distances.topk(2, largest=False).values
    assert_close(nearest[:, 1] - nearest[:, 0], arrays.where("margin"), arrays["margin"], MARGIN)
    clear = arrays["margin"] > MARGIN
    assert_equal(np.where(clear, tokens, arrays["idx"]), arrays.where("idx"), arrays["idx"])


def decoded(case: dict, arrays: Family) -> torch.Tensor:
    tokens = torch.from_numpy(arrays["idx"]).long().view(1, case["h"] // 16, case["w"] // 16)
    with torch.inference_mode():
        return vq_model().decode(tokens)[0]


def check_large(arrays: Family, picture: torch.Tensor) -> None:
    """A large picture is stored in extracts: every 7th row and column, means of blocks, the centre."""
    wide = picture.double()
    blocks = wide.unflatten(2, (-1, 16)).unflatten(1, (-1, 16)).mean((2, 4))
    for name, found in (
        ("dec_stride7", wide[:, ::7, ::7]),
        ("dec_blockmean16", blocks),
        ("dec_mean", wide.mean((1, 2))),
        ("dec_std", wide.std((1, 2), correction=0)),
    ):
        assert_close(found, arrays.where(name), arrays[name], PIXEL)
    levels = to_uint8(picture).numpy()
    top, left = (levels.shape[0] - 96) // 2, (levels.shape[1] - 96) // 2
    centre = levels[top : top + 96, left : left + 96]
    assert_close(centre, arrays.where("u8_center"), arrays["u8_center"], 1)
    # Were every value a level off in the same direction, this would be as large as the picture.
    allowed = SHARE * levels.shape[0] * levels.shape[1]
    assert_close(levels.sum((0, 1), dtype=np.int64), arrays.where("u8_sum"), arrays["u8_sum"], allowed)


@pytest.mark.parametrize("case", PICTURES + RANDOM, ids=name_of)
def test_decoding(case: dict):
    arrays = Family("vq", case["case"])
    picture = decoded(case, arrays)
    assert_close(picture, arrays.where("dec"), arrays["dec"], PIXEL)
    assert_close(to_uint8(picture), arrays.where("u8"), arrays["u8"], 1)


@pytest.mark.parametrize("case", LARGE, ids=name_of)
def test_decoding_a_large_picture(case: dict):
    arrays = Family("vq", case["case"])
    check_large(arrays, decoded(case, arrays))


def compare_pixels() -> None:
    """Prints how many uint8 values of all cases differ from the published ones, and how many there are."""
    differ = total = 0
    for case in CASES:
        arrays = Family("vq", case["case"])
        levels = to_uint8(decoded(case, arrays)).numpy()
        if case in LARGE:
            top, left = (levels.shape[0] - 96) // 2, (levels.shape[1] - 96) // 2
            levels, expected = levels[top : top + 96, left : left + 96], arrays["u8_center"]
        else:
            expected = arrays["u8"]
        assert levels.shape == expected.shape
        assert np.abs(levels.astype(int) - expected).max() <= 1
        differ += int((levels != expected).sum())
        total += levels.size
    print(differ, total)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="the published numbers were made with the kernels of another kind of CPU",
)
def test_pixels_are_equal_with_the_kernels_of_the_published_numbers():
    """At most one value in 10,000 is a level off; in those that come with the tests none is.

    Rounding alone moves one or two values in 10,000 across a level: other kernels sum in another order,
    and the published numbers are themselves that far from exact arithmetic. So the comparison is made
    with their kernels. A folder does not tell which these were, hence the short list.
    """
    counts = {}
    for isa, threads in KERNELS:
        environment = os.environ | {
            "ONEDNN_MAX_CPU_ISA": isa,
            "ATEN_CPU_CAPABILITY": isa.split("_")[0].lower(),
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads leave the processor to others
        }
        run = subprocess.run(
            [sys.executable, "-c", "from tests.conformance.test_vq import compare_pixels; compare_pixels()"],
            cwd=Path(__file__).parents[2],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        differ, total = map(int, run.stdout.split())
        counts[isa, threads] = f"{differ} of {total}"
        if differ <= SHARE * total:
            return
    raise AssertionError(f"family vq: too many uint8 values differ, by kernels and threads: {counts}")
