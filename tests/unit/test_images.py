import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wallaroo.model.config import ModelConfig, Size
from wallaroo.model.errors import RowError
from wallaroo.model.images import cover_size, most_tokens, patchify, pixel_image, semantic_image, smart_resize

sides = st.integers(1, 6000)


@given(sides, sides)
def test_smart_resize_keeps_the_limits(height, width):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(RowError, match="at most 200 times") as error:
            smart_resize(height, width, 12544, 188160)
        assert error.value.kind == "image"
        return
    rows, columns = smart_resize(height, width, 12544, 188160)
    assert rows % 28 == columns % 28 == 0
    assert 12544 <= rows * columns <= 188160


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ((126, 126), (112, 112)),  # 4.5 tokens a side round to the even 4
        ((154, 154), (168, 168)),  # 5.5 round to the even 6
        ((30, 6000), (28, 6000 // 28 * 28)),
        ((2000, 1000), (588, 280)),
        ((10, 10), (112, 112)),
    ],
)
def test_smart_resize_of_known_sizes(source, expected):
    assert smart_resize(*source, 12544, 188160) == expected


def test_smart_resize_leaves_no_empty_side_under_tiny_limits():
    assert smart_resize(10, 1900, 784, 28224) == (28, 2296)


@pytest.mark.parametrize(
    ("limits", "tokens"),
    [
        ((12544, 188160), 240),
        ((1003520, 12845056), 16384),
        # Strips, whose shorter side grows to whole tokens.
        ((1003520, 1003520), 1708),
        ((784, 784), 15),
    ],
)
def test_most_tokens_of_known_limits(limits, tokens):
    assert most_tokens(*limits) == tokens


@given(sides, sides, st.integers(784, 2_000_000), st.integers(0, 2_000_000))
def test_no_picture_has_more_tokens_than_most(height, width, least, more):
    if max(height, width) <= 200 * min(height, width):
        rows, columns = smart_resize(height, width, least, least + more)
        assert rows * columns <= 784 * most_tokens(least, least + more)


@given(sides, sides)
def test_a_covering_picture_covers_its_bucket(height, width):
    size = ModelConfig().bucket(height, width)
    rows, columns = cover_size(height, width, size)
    assert rows >= size.height and columns >= size.width
    assert rows == size.height or columns == size.width


@pytest.mark.parametrize(("excess", "offset"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (7, 4)])
def test_the_crop_offset_rounds_half_to_even(excess, offset):
    width = 32 + excess
    ramp = np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (32, width, 3))
    cropped = pixel_image(Image.fromarray(np.ascontiguousarray(ramp)), Size(32, 32))
    assert cropped.shape == (32, 32, 3)
    assert cropped[0, 0, 0] == offset


def test_semantic_image_has_the_resized_shape():
    assert semantic_image(Image.new("RGB", (120, 90)), 12544, 28224).shape == (112, 140, 3)


def test_patchify_puts_every_pixel_in_its_place():
    image = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
    patches, grid = patchify(image)
    assert grid == (4, 6)
    assert patches.shape == (24, 1176) and patches.dtype == np.float32
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    index = 0
    for block_row in range(2):
        for block_column in range(3):
            for row in (2 * block_row, 2 * block_row + 1):
                for column in (2 * block_column, 2 * block_column + 1):
                    patch = patches[index].reshape(3, 2, 14, 14)
                    tile = image[14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
                    for channel in range(3):
                        expected = (tile[:, :, channel] / 255 - mean[channel]) / std[channel]
                        np.testing.assert_allclose(patch[channel, 0], expected, atol=1e-6)
                    np.testing.assert_array_equal(patch[:, 0], patch[:, 1])
                    index += 1
