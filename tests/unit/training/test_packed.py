"""Attention over packed rows: a kernel for all of them is what attention by row is, and is tried first."""

import itertools

import numpy as np
import pytest
import torch

from tests.unit.training.cases import recipe, rows
from wallaroo.model.training.lm import Batch, LMLosses
from wallaroo.model.training.packed import agrees, find_kernel
from wallaroo.model.training.rows import Rows

CPU = torch.device("cpu")


def kernel(causal):
    """Written out row by row from the ends that libraries are given."""

    def attend(q, k, v, ends, longest):
        assert ends.dtype == torch.int32 and int(ends[0]) == 0 and int(ends[-1]) == len(q)
        out = []
        for start, end in itertools.pairwise(ends.tolist()):
            assert end - start <= longest
            keys, values = (
                part[start:end].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v)
            )
            scores = torch.einsum("qhd,khd->hqk", q[start:end], keys) * q.shape[-1] ** -0.5
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf) if causal else scores
            out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        return torch.cat(out)

    return attend


def test_losses_and_gradients_are_those_of_padded_rows(model, tokenizer):
    """Of rows of several lengths and three tasks."""
    maker = Rows(model, tokenizer, recipe())
    batches = {
        task: Batch.of([maker.make(task, row, np.random.default_rng(0)) for row in some], model.config.vision)
        for task, some in rows(4).items()
    }
    assert len({length for batch in batches.values() for length in batch.lengths}) > 3
    found = []
    for chosen in (None, kernel(causal=True)):
        losses = LMLosses(model)
        losses.kernel = chosen
        made = losses(batches)
        model.zero_grad()
        sum(made.values()).backward()
        gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
        found.append(({name: float(loss.detach()) for name, loss in made.items()}, gradients))
    model.zero_grad()
    (padded, theirs), (packed, ours) = found
    assert packed == pytest.approx(padded, rel=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


def test_a_kernel_is_compared_with_attention_by_row_before_it_is_used():
    assert agrees(kernel(causal=True), CPU, 8, 2, 32)
    assert not agrees(kernel(causal=False), CPU, 8, 2, 32)

    def forgets_ends(q, k, v, ends, longest):
        return kernel(causal=True)(q, k, v, torch.tensor([0, len(q)], dtype=torch.int32), len(q))

    assert not agrees(forgets_ends, CPU, 8, 2, 32)


def test_a_cpu_attends_by_row():
    assert find_kernel(CPU, 8, 2, 32) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has a kernel that runs")
def test_a_library_that_does_not_run_is_told_and_left():
    with pytest.warns(RuntimeWarning, match="packed rows are not attended by torch: "):
        assert find_kernel(torch.device("cuda"), 8, 2, 32) is None
