"""Samples of a stage: for the same prompts each time, beside each other on a page and in TensorBoard."""

import dataclasses
import json
from html.parser import HTMLParser

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.unit.training.test_stage import recipes
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.samples import PAGE, SAMPLES, write_sample
from wallaroo.model.training.stage import train


class Page(HTMLParser):
    """What a browser finds: tags, sources of pictures and the items of lists."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.items, self._text = set(), [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "img":
            self.sources.append(dict(attributes)["src"])
        self._text = "" if tag == "li" else self._text

    def handle_data(self, data):
        if self._text is not None:
            self._text += data

    def handle_endtag(self, tag):
        if tag == "li":
            self.items.append(self._text)
            self._text = None


def test_a_stage_draws_its_prompts_on_the_way(tmp_path):
    """Given prompts, after two steps and after four, also where a run was resumed in between."""
    first = dataclasses.replace(
        Recipe.from_file(recipes(tmp_path), "first"), sample_prompts=("a red <b>circle</b>", "红色圆形")
    )
    train(first, lambda line: None)
    (tmp_path / "first" / "checkpoint").rename(tmp_path / "moved")
    folder = train(dataclasses.replace(first, steps=4), lambda line: None).parent
    page = Page((folder / PAGE).read_text(encoding="utf-8"))
    assert page.sources == ["sample-000004.png", "sample-000002.png"]
    assert page.items == ["a red <b>circle</b>", "红色圆形"] * 2
    assert not page.tags & {"script", "b", "link"}
    pictures = [np.array(Image.open(folder / name)) for name in page.sources]
    assert [one.shape for one in pictures] == [(64, 2 * 64, 3)] * 2
    boards = [EventAccumulator(str(file)).Reload() for file in sorted(folder.glob("events.out.*"))]
    drawn = {event.step: event.encoded_image_string for one in boards for event in one.Images("sample")}
    assert sorted(drawn) == [2, 4]
    texts = [event for one in boards for event in one.Tensors("sample_prompts/text_summary")]
    assert texts[0].tensor_proto.string_val[0].decode() == "1. a red <b>circle</b>\n2. 红色圆形"


def test_a_strip_that_is_drawn_again_replaces_the_one_before(tmp_path):
    for step, colour in ((2, 10), (4, 20), (2, 30)):
        write_sample(tmp_path, step, np.full((16, 16, 3), colour, np.uint8), [(f"grey {colour}", "en")])
    page = Page((tmp_path / PAGE).read_text(encoding="utf-8"))
    assert page.sources == ["sample-000004.png", "sample-000002.png"]
    assert page.items == ["grey 20", "grey 30"]
    assert len((tmp_path / SAMPLES).read_text().splitlines()) == 3
    assert json.loads((tmp_path / SAMPLES).read_text().splitlines()[0])["prompts"] == ["grey 10"]
    assert np.array(Image.open(tmp_path / "sample-000002.png")).max() == 30
