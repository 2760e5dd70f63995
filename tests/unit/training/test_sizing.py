"""The memory of a worker is planned from shapes alone: it adds up, and what cannot fit is refused."""

import dataclasses
from pathlib import Path

import pytest

from tests.unit.training.cases import recipe
from wallaroo.jobs import make_tiny
from wallaroo.model.checkpoint import TINY, load, load_config
from wallaroo.model.config import ModelConfig
from wallaroo.model.errors import InputError
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.sizing import Sizes
from wallaroo.model.training.start import stage_config

GB = 10**9
PUBLISHED = Path(make_tiny.__file__).parent / "train" / "published.toml"


@pytest.fixture(scope="module")
def published():
    """Recipe and sizes of a stage that learns nearly all, and of the first, at the published 7B."""
    made = {}
    for stage in ("stage-1", "stage-4"):
        one = dataclasses.replace(Recipe.from_file(PUBLISHED, stage), checkpointing=True, accumulate=1)
        made[stage] = Sizes(stage_config(ModelConfig(), one), one, half=True)
    return made


def test_the_published_model_is_counted_from_shapes(published):
    """Adapters are 8H + H and H^2 + H numbers, a head H^2 + H and H times the codebook."""
    hidden, codebook = 3584, 16384
    adapter = 8 * hidden + hidden + hidden**2 + hidden
    head = hidden**2 + hidden + hidden * codebook
    assert published["stage-1"].learning == adapter + head
    whole = published["stage-4"].learning + published["stage-4"].frozen
    assert whole == published["stage-1"].learning + published["stage-1"].frozen + 2 * adapter + head
    layer = published["stage-4"].layer
    assert layer == 2 * hidden + (3584 + 2 * 512) * (hidden + 1) + hidden**2 + 3 * hidden * 18944
    # Six operations a parameter that learns, four for those that pass gradients on.
    products = 28 * layer + head
    assert published["stage-4"].flops_per_token() == 6 * products
    assert published["stage-1"].flops_per_token() == 4 * products + 2 * head


@pytest.mark.parametrize("stage", ["stage-1", "stage-4"])
def test_states_of_shards_add_up_to_those_of_the_whole(published, stage):
    sizes = published[stage]
    whole = sizes.need(1, "none").parts
    assert whole["gradients"] + whole["optimizer"] == 12 * sizes.learning
    for workers in (8, 16, 64):
        parts = sizes.need(workers, "full").parts
        for name in ("gradients", "optimizer"):
            assert abs(parts[name] * workers - whole[name]) < workers
        frozen = parts["weights"] - 4 * sizes.learning // workers
        assert frozen == 2 * (sizes.frozen - sizes.tokenizer) + 4 * sizes.tokenizer
    assert sizes.need(64, "full").total < sizes.need(16, "full").total < sizes.need(8, "full").total
    assert sum(parts.values()) == sizes.need(64, "full").total


def test_the_first_spread_that_fits_is_chosen(published):
    assert published["stage-1"].choose(64, "auto", 80 * GB).shard == "none"
    assert published["stage-4"].choose(16, "auto", 80 * GB).shard == "full"
    assert published["stage-4"].choose(16, "auto", 300 * GB).shard == "none"


def test_a_stage_that_cannot_fit_is_refused_with_what_it_takes(published):
    with pytest.raises(
        InputError, match=r"on each of 2 workers, but a device has 80.0 GB; it takes 8 workers"
    ):
        published["stage-4"].choose(2, "auto", 80 * GB)
    with pytest.raises(InputError, match=r"it takes 8 workers and --shard full"):
        published["stage-4"].choose(4, "none", 80 * GB)
    with pytest.raises(InputError, match=r"no number of workers .* so set a larger accumulate"):
        published["stage-4"].choose(2, "auto", 16 * GB)


def test_recomputed_layers_and_smaller_pieces_take_less():
    config = load_config(TINY)
    values = {"data": {"generate": "x"}, "rows": {"generate": 8}}
    kept, again, pieces = (
        Sizes(config, recipe(**values, **more), half=False).need(1, "none").parts["activations"]
        for more in ({}, {"checkpointing": True}, {"accumulate": 4})
    )
    assert again < kept and pieces * 4 == kept


def test_what_no_task_uses_does_not_learn():
    config, values = load_config(TINY), {"data": {"generate": "x"}, "rows": {"generate": 8}, "frozen": []}
    sizes = Sizes(config, recipe(**values), half=False)
    named = load(TINY).named_parameters()
    used = ("language_model.", "lm_head.", "gen_", "vq.")
    assert sizes.learning == sum(one.numel() for name, one in named if name.startswith(used))
