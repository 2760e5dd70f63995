"""The image tokenizer learns, and its codebook is spread over what patches look like."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.training.cases import losses_of, picture, recipe
from wallaroo.model.checkpoint import TINY, load
from wallaroo.model.training.fresh import fresh_model
from wallaroo.model.training.loop import optimise
from wallaroo.model.training.samples import draw
from wallaroo.model.training.vq import VQLearner, kind_means, patch_keys, spread_codebook, unlike
from wallaroo.model.vq import to_float


@pytest.mark.numerics
def test_the_image_tokenizer_learns_and_goes_on_exactly(tmp_path):
    pictures = [np.array(Image.open(io.BytesIO(picture(n, 32, 32)))) for n in range(40)]

    def run(folder, stop=None):
        made = recipe(
            part="vq", folder=str(folder), data={"vq": ""}, rows={"vq": 8}, steps=24, plain=8, revive=4,
            rate=2e-3, log_every=1, save_every=6, alike=2.0,
        )  # fmt: skip
        learner = VQLearner(fresh_model(load(TINY).config, 1).vq, pictures, made)
        said: dict[int, dict[str, float]] = {}

        def after(step):
            # Four pictures over what is made of them; looking at them changes nothing.
            assert step % 6 or draw(learner, step, []).shape == (64, 4 * 32, 3)
            if step == stop:
                raise KeyboardInterrupt

        try:
            optimise(learner, made, said.__setitem__, after=after)
        except KeyboardInterrupt:
            assert stop
        return said

    whole = run(tmp_path / "whole")
    assert whole[24]["absolute"] < 0.8 * whole[1]["absolute"]
    assert "codebook" in whole[9] and "codebook" not in whole[8]
    assert losses_of(run(tmp_path / "parts", stop=13) | run(tmp_path / "parts")) == losses_of(whole)


def test_latents_of_equal_patches_are_drawn_together():
    plain = np.full((32, 48, 3), 200, np.uint8)
    other = plain.copy()
    other[16:, 32:] = 7
    pixels = [to_float(torch.from_numpy(one[None])) for one in (plain, other, plain[:, :16])]
    keys = [patch_keys(one).tolist() for one in pixels]
    assert len({key for some in keys for key in some}) == 2
    assert [key == keys[0][0] for some in keys for key in some] == [True] * 11 + [False] + [True] * 2
    generator = torch.Generator().manual_seed(3)
    latents = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=-1).requires_grad_()
    kinds = torch.arange(40) % 7
    optimizer = torch.optim.SGD([latents], lr=1.0)
    for step in range(101):
        made = torch.nn.functional.normalize(latents, dim=-1)
        means, place = kind_means(made.detach(), kinds)
        told = (made @ means.T).argmax(-1) == place
        assert bool(told.all()) == (step == 100) or 0 < step < 100
        optimizer.zero_grad()
        unlike(made, means, place).backward()
        optimizer.step()
    codebook = torch.nn.functional.normalize(torch.randn(20, 8, generator=generator), dim=-1)
    tokens = (means @ codebook.T).argmax(-1)
    right = codebook[tokens][kinds]
    assert unlike(right, codebook, tokens[kinds]) < 0.1 < unlike(-right, codebook, tokens[kinds])


def test_a_common_patch_takes_one_entry_of_the_codebook():
    generator = torch.Generator().manual_seed(5)
    points = torch.nn.functional.normalize(torch.randn(10, 8, generator=generator), dim=-1)
    keys = torch.cat((torch.zeros(991, dtype=torch.int64), torch.arange(1, 10)))
    noise = 0.1 * torch.randn(1000, 8, generator=generator)
    means, place = kind_means(torch.nn.functional.normalize(points[keys] + noise, dim=-1), keys)
    assert place.tolist() == keys.tolist()
    codebook = spread_codebook(means, 10, generator)
    assert len({int(token) for token in (means @ codebook.T).argmax(-1)}) == 10
