"""A recipe is checked before anything is loaded, and those that come along can be followed."""

from pathlib import Path

import pytest

from tests.unit.training.cases import recipe
from wallaroo.jobs import make_tiny
from wallaroo.model.errors import InputError
from wallaroo.model.training.recipe import Recipe


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stepps": 3}, "unknown key 'stepps'.*steps"),
        ({"part": "five"}, "'five'"),
        ({"rows": {"edit": 3}}, "same tasks"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": "many"}, "steps is 'many', but must be a whole number"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"rows": {"edit": 2.5}}, "a table, each item a whole number"),
        ({"null_smoothing": 1.5}, "null_smoothing is 1.5, but a share is at most 1"),
        ({"frozen": "vq."}, "a list, each item a text"),
        ({"size": 72}, "size is 72, but must be a multiple of 16"),
        ({"part": "vq", "stream": True}, "streams rows, but the image tokenizer needs them all"),
        ({"lengths": {"genrate": 9}}, "lengths has 'genrate', which is not a task; did you mean 'generate'"),
        ({"templates": {"edit_fr": ["x"]}}, "templates has 'edit_fr', which no prompt has"),
        ({"sample_prompts": ["a cat"]}, "draws from prompts only if it trains generate"),
        ({"precision": "fp8"}, "precision is 'fp8', but must be one of auto, float32, bfloat16"),
        ({"held_out": {"edit": "x"}}, "need both, so give both or neither"),
        ({"held_out": {"edit": "x"}, "validate_every": 2}, "held_out names 'edit', but must name tasks"),
        (
            {"data": {"edit": ""}, "rows": {"edit": 3}, "accumulate": 2},
            "3 rows of edit.*multiple of 2",
        ),
    ],
)
def test_wrong_recipes_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        recipe(**values)


def test_the_recipes_that_come_along_can_be_followed():
    """Each stage starts from the one before, and the published ones can be shared by eight workers."""
    folder = Path(make_tiny.__file__).parent / "train"
    for name, workers, stages in (
        ("tiny", 1, make_tiny.STAGES),
        ("published", 8, ("stage-1", "stage-2", "stage-3-1", "stage-3-2", "stage-4")),
    ):
        made = [Recipe.from_file(folder / f"{name}.toml", stage) for stage in stages]
        assert all(one.share(workers) for one in made)
        assert [one.start for one in made[1:]] == [f"{one.folder}/checkpoint" for one in made[:-1]]
    rates = [(one.rate, one.size, one.lengths["generate"], one.semantic_pixels) for one in made]
    assert rates == [
        (1e-4, 384, 832, 0), (1e-4, 384, 768, 254016), (4e-5, 512, 1600, 254016), (1e-5, 0, 1632, 254016),
        (1e-5, 0, 1632, 188160),
    ]  # fmt: skip
