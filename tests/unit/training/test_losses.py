"""Losses in chunks are those of all places at once, and so are their gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wallaroo.model.training import losses


@pytest.mark.parametrize("places", [0, 5, 8, 21])
@pytest.mark.parametrize("smoothed", ["not", "all alike", "each its own"])
def test_chunks_give_the_losses_and_gradients_of_the_whole(monkeypatch, places, smoothed):
    monkeypatch.setattr(losses, "CHUNK", 8)
    generator = torch.Generator().manual_seed(places)
    head = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 11, bias=False))
    hidden = torch.randn(places, 6, generator=generator)
    targets = torch.randint(11, (places,), generator=generator)
    share = {"not": 0.0, "all alike": 0.2, "each its own": torch.rand(places, generator=generator)}[smoothed]
    shares = share if isinstance(share, torch.Tensor) else torch.full((places,), share)

    def learned(made):
        made.sum().backward()
        found = [given.grad.clone(), *(one.grad.clone() for one in head.parameters())]
        head.zero_grad()
        return made.detach(), found

    given = hidden.clone().requires_grad_()
    ours = learned(losses.entropy(head, given, targets, share))
    given = hidden.clone().requires_grad_()
    rows = [
        F.cross_entropy(head(given[at : at + 1]), targets[at : at + 1], label_smoothing=float(shares[at]))
        for at in range(places)
    ]
    theirs = learned(torch.stack(rows) if rows else head(given).sum(-1))
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(ours[1], theirs[1], strict=True))


def test_no_more_logits_than_those_of_a_chunk_are_made_at_once(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 8)
    sizes = []

    class Head(nn.Linear):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    hidden = torch.randn(30, 4, requires_grad=True)
    losses.entropy(Head(4, 9), hidden, torch.zeros(30, dtype=torch.int64)).mean().backward()
    # Once forward and once more for the gradient.
    assert sorted(sizes) == sorted(2 * [8, 8, 8, 6])
