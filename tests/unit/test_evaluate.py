"""The checker of drawn scenes: right on the truth, and not to be fooled."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from wallaroo.model.checkpoint import TINY, load_config
from wallaroo.model.errors import InputError
from wallaroo.workflows.scenes.captions import examples
from wallaroo.workflows.scenes.evaluate import (
    look,
    same_answer,
    score,
    score_edit,
    score_picture,
    tabulate,
    to_text,
)
from wallaroo.workflows.scenes.world import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, draw, held_out, png
from wallaroo.workflows.scenes.write import to_values

SIZES = load_config(TINY).size_list()


def drawn(count, task, held=False):
    return list(examples(count, 3, SIZES, held, (task,)))


def blurred(picture, seed=0):
    """What an image tokenizer does to a picture: soft edges, a little noise."""
    small = Image.fromarray(picture).resize(
        (picture.shape[1] * 2 // 3, picture.shape[0] * 2 // 3), Image.BILINEAR
    )
    soft = np.array(small.resize((picture.shape[1], picture.shape[0]), Image.BILINEAR)).astype(float)
    return np.clip(soft + np.random.default_rng(seed).normal(0, 5, soft.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("change", [lambda picture: picture, blurred], ids=["drawn", "blurred"])
def test_truth_is_right(change):
    for example in drawn(540, "generate"):
        scores = score_picture(change(draw(example.scene)), example.scene, example.named)
        assert all(scores.values()), (example.prompt, scores)
    for example in drawn(540, "edit"):
        scores = score_edit(change(draw(example.scene)), example.scene, example.source)
        assert all(scores.values()), (example.prompt, scores)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_look_is_told_from_the_others(shape, background):
    for colour in COLOURS:
        for size in ("small", "large"):
            scene = Scene(64, 96, background, (Thing(shape, colour, size, 0, 1),))
            ground, [seen] = look(draw(scene))
            assert (ground, seen.shape, seen.colour) == (background, shape, colour)


def altered(scene, **values):
    things = (dataclasses.replace(scene.things[0], **values), *scene.things[1:])
    return dataclasses.replace(scene, things=things)


def test_what_is_wrong_is_named():
    for example in drawn(120, "generate"):
        scene = example.scene
        thing = scene.things[0]
        used = {one.colour for one in scene.things}
        colour = next(name for name in COLOURS if name not in used)
        shape = next(name for name in SHAPES if name != thing.shape)
        background = next(name for name in BACKGROUNDS if name != scene.background)

        def failed(other, scene=scene):
            scores = score_picture(draw(other), scene, ("background",))
            return {name for name, right in scores.items() if not right}

        assert "colour" in failed(altered(scene, colour=colour))
        assert "shape" in failed(altered(scene, shape=shape))
        assert failed(dataclasses.replace(scene, background=background)) == {"background"}
        assert "count" in failed(dataclasses.replace(scene, things=scene.things[1:], relation=""))
        if scene.relation:
            first, second = scene.things
            swapped = (
                dataclasses.replace(second, shape=first.shape, colour=first.colour),
                dataclasses.replace(first, shape=second.shape, colour=second.colour),
            )
            assert failed(dataclasses.replace(scene, things=swapped)) == {"relation"}


def test_an_edit_that_does_nothing_or_too_much_is_wrong():
    for example in drawn(120, "edit"):
        before, after = draw(example.source), draw(example.scene)
        assert not score_edit(before, example.scene, example.source)["done"]
        assert score_edit(before, example.scene, example.source)["kept"]
        half = (after * 0.9).astype(np.uint8)
        assert not score_edit(half, example.scene, example.source)["kept"] or after.mean() < 80
    noise = np.random.default_rng(0).integers(0, 256, after.shape, np.uint8)
    assert not any(score_edit(noise, example.scene, example.source).values())


def test_noise_and_flat_pictures_show_nothing():
    scene = drawn(1, "generate")[0].scene
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert not score_picture(noise, scene, ("background",))["objects"]
    assert look(np.full((64, 64, 3), 255, np.uint8)) == ("white", [])
    assert look(np.full((64, 64, 3), (0, 255, 255), np.uint8))[0] == ""


def test_answers_are_compared_without_case_spaces_and_marks():
    assert same_answer(" Red. ", "red") and same_answer("红色。", "红色")
    assert not same_answer("red", "blue") and not same_answer("", "red")


def output_row(example, text="", picture=None, status="ok"):
    values = to_values(example, "x")
    image = {"bytes": png(picture or example.scene)}
    return values | {"status": status, "text": text, "image": image}


def test_the_table_counts_rows_by_kind_language_and_size():
    rows = [output_row(example) for example in drawn(90, "generate", held=True)]
    rows += [output_row(example, text=example.answer) for example in drawn(70, "understand")]
    rows[0] = rows[0] | {"status": "error"}
    table = tabulate(rows)
    single = next(line for line in table if (line.kind, line.language, line.size) == ("single", "all", "all"))
    assert (single.rows, single.right["right"]) == (30, (29, 30))
    assert sum(line.rows for line in table if line.language == "en") + sum(
        line.rows for line in table if line.language == "zh"
    ) == len(rows)
    assert "colour (trained)" in to_text(table)
    first, second = to_text(table).splitlines()[:2]
    assert first == "in all: 159 of 160 rows are right, 99.4 %" and second.split()[-1] == "right"
    assert score(output_row(drawn(1, "understand")[0], text="nonsense")) == {"right": False}


def test_other_rows_are_refused_with_a_remedy():
    with pytest.raises(InputError, match="no column 'scene'"):
        score({"task": "generate", "status": "ok"})
    with pytest.raises(InputError, match="is not a scene"):
        score({"task": "generate", "status": "ok", "scene": "{}", "kind": "single"})


def test_held_out_combinations_never_occur_in_training():
    """Neither side of an edit, nor from the other side of a relation."""
    training = [e for task in ("generate", "edit", "understand") for e in drawn(400, task)]
    for example in training:
        assert not held_out(example.scene)
        assert example.source is None or not held_out(example.source)
    assert all(held_out(example.scene) for task in ("generate", "edit") for example in drawn(60, task, True))
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    for example in drawn(90, "generate", True):
        if example.scene.relation:
            turned = example.scene.things[::-1]
            relation = opposite[example.scene.relation]
            assert held_out(dataclasses.replace(example.scene, things=turned, relation=relation))


def test_rows_depend_on_seed_and_number_alone():
    few, many = (list(examples(n, 7, SIZES, False)) for n in (20, 60))
    assert many[:20] == few
    assert list(examples(20, 8, SIZES, False)) != few
    assert [Scene.from_json(example.scene.to_json()) for example in few] == [example.scene for example in few]


def test_pictures_are_drawn_at_their_size():
    for example in drawn(30, "generate"):
        picture = np.array(Image.open(io.BytesIO(png(example.scene))))
        assert picture.shape == (example.scene.height, example.scene.width, 3)
        assert np.array_equal(picture, draw(example.scene))
