"""Sizes: which bucket a source takes, how it is scaled to cover it, and how the vision tower sees it."""

import pytest

from tests.conformance.published import metadata
from wallaroo.model.config import ModelConfig, Size
from wallaroo.model.errors import RowError
from wallaroo.model.images import cover_size, smart_resize

TABLES = ("ASPECT_RATIO_512", "ASPECT_RATIO_256", "ASPECT_RATIO_384", "ASPECT_RATIO_1024")
MIN_PIXELS, MAX_PIXELS = 12544, {"smart_resize_stage4": 188160, "smart_resize_stage3": 254016}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    rows = metadata("buckets")
    assert rows, "family buckets: no sizes"
    return rows


def describe(row: dict) -> str:
    return f"family buckets, {row['h']} x {row['w']} (height x width)"


@pytest.mark.parametrize("table", TABLES)
def test_nearest_bucket(rows: list[dict], table: str):
    if table == "ASPECT_RATIO_512":
        config = ModelConfig()
    else:
        # Other tables are configuration; the keys that were ever nearest are enough to tell a wrong choice.
        sizes = {row[table]["key"]: tuple(row[table]["size"]) for row in rows}
        config = ModelConfig(sizes=dict(sorted(sizes.items(), key=lambda item: float(item[0]))))
    for row in rows:
        size = config.bucket(row["h"], row["w"])
        assert list(size) == row[table]["size"], describe(row)
        assert config.sizes[row[table]["key"]] == tuple(size), describe(row)


def test_covering_and_cropping(rows: list[dict]):
    for row in rows:
        size = Size(*row["ASPECT_RATIO_512"]["size"])
        height, width = cover_size(row["h"], row["w"], size)
        assert [height, width] == row["resize_hw"], describe(row)
        assert (height < size.height or width < size.width) == row["crop_pads"], describe(row)


@pytest.mark.parametrize("stage", MAX_PIXELS)
def test_vision_resize(rows: list[dict], stage: str):
    for row in rows:
        if row[stage] == "ValueError":
            with pytest.raises(RowError):
                smart_resize(row["h"], row["w"], MIN_PIXELS, MAX_PIXELS[stage])
        else:
            found = smart_resize(row["h"], row["w"], MIN_PIXELS, MAX_PIXELS[stage])
            assert list(found) == row[stage], describe(row)


def test_the_image_processor_would_leave_the_resized_picture_alone(rows: list[dict]):
    """The reference resizes twice; the second time must change nothing, since we do it once."""
    for row in rows:
        if row["smart_resize_stage4"] != "ValueError":
            assert row["hf_smart_resize_after_stage4"] == row["smart_resize_stage4"], describe(row)
            again = smart_resize(*row["smart_resize_stage4"], MIN_PIXELS, MAX_PIXELS["smart_resize_stage4"])
            assert list(again) == row["hf_smart_resize_after_stage4"], describe(row)
