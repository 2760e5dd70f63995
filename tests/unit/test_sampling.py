"""The sampler: the distribution it draws from, its limits, and the rules for its parameters."""

import math

import numpy as np
import pytest
import torch

from wallaroo.model.errors import RowError
from wallaroo.model.sampling import Filters, Sampling, draws, kept_logits, sample

pytestmark = pytest.mark.numerics

VOCABULARY = 24


def filtered_probabilities(logits: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
    """Probabilities that a token is drawn from; the parameters are those of `kept_logits`."""
    return kept_logits(logits, *parameters).softmax(-1)


SETTINGS = [
    (1.0, 0, 1.0),
    (1.0, 5, 1.0),
    (1.0, 0, 0.7),
    (1.0, 12, 0.9),
    (0.5, 0, 1.0),
    (0.7, 8, 0.8),
    (1.5, 0, 0.95),
    (2.0, 20, 1.0),
    (0.3, 0, 0.99),
    (1.0, 1000, 0.5),
]


def rows(count: int, temperature: float, top_k: int, top_p: float) -> tuple[torch.Tensor, ...]:
    return (
        torch.full((count,), temperature),
        torch.full((count,), top_k, dtype=torch.int64),
        torch.full((count,), top_p),
    )


@pytest.mark.parametrize(("index", "setting"), list(enumerate(SETTINGS)))
def test_a_million_draws_follow_the_filtered_softmax(index: int, setting: tuple[float, int, float]) -> None:
    logits = torch.from_numpy(np.random.default_rng(index).normal(size=(1, VOCABULARY)) * 1.5).float()
    probabilities = filtered_probabilities(logits, *rows(1, *setting))[0].double()
    count, batch = 1_000_000, 50_000
    uniform = torch.from_numpy(draws(1234 + index, count))
    observed = torch.zeros(VOCABULARY, dtype=torch.float64)
    for first in range(0, count, batch):
        tokens = sample(logits.expand(batch, -1), *rows(batch, *setting), uniform[first : first + batch])
        observed += torch.bincount(tokens, minlength=VOCABULARY)
    kept = probabilities > 0
    assert observed[~kept].sum() == 0
    expected = probabilities[kept] * count
    statistic = ((observed[kept] - expected) ** 2 / expected).sum()
    freedom = torch.tensor((int(kept.sum()) - 1) / 2, dtype=torch.float64)
    assert int(kept.sum()) > 1
    assert torch.special.gammaincc(freedom, statistic / 2) > 0.001


def test_rows_with_different_seeds_are_uncorrelated() -> None:
    count = 1_000_000
    logits = torch.zeros(1, VOCABULARY)
    pair = []
    for seed in (7, 8):
        uniform = torch.from_numpy(draws(seed, count))
        pair.append(sample(logits.expand(count, -1), *rows(count, 1.0, 0, 1.0), uniform).double())
    correlation = torch.corrcoef(torch.stack(pair))[0, 1].abs()
    # Under independence the coefficient has deviation 1/sqrt(n); 4 of them leave 6 chances in 100,000.
    assert correlation < 4 / math.sqrt(count)
    assert not torch.equal(*pair)


def test_draws_are_fixed_by_seed_and_position() -> None:
    assert np.array_equal(draws(5, 10), draws(5, 100)[:10])
    assert not np.array_equal(draws(5, 10), draws(6, 10))
    assert draws(2**63 - 1, 1000).min() >= 0
    assert draws(0, 1000).max() < 1


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    assert sample(logits, *rows(1, 1.0, 1, 1.0), torch.tensor([0.99], dtype=torch.float64)).tolist() == [1]


def test_ties_at_the_top_k_threshold_stay() -> None:
    kept = filtered_probabilities(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), *rows(1, 1.0, 2, 1.0))[0]
    assert (kept > 0).tolist() == [True, True, True, False]


def test_top_p_keeps_the_shortest_prefix_and_at_least_one() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.81, 3), (1.0, 4)):
        assert int((filtered_probabilities(logits, *rows(1, 1.0, 0, top_p)) > 0).sum()) == kept


def test_temperature_zero_is_greedy_and_finite() -> None:
    kept = filtered_probabilities(torch.tensor([[1.0, 2.0, -1.0]]), *rows(1, 0.0, 0, 1.0))
    torch.testing.assert_close(kept, torch.tensor([[0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_give_kept_tokens(uniform: float) -> None:
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    token = sample(logits, *rows(1, 1.0, 0, 1.0), torch.tensor([uniform], dtype=torch.float64))
    assert token.item() in (1, 2)


def test_a_row_is_drawn_alike_in_any_company() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 512, generator=generator)
    uniform = torch.rand(16, generator=generator, dtype=torch.float64)
    settings = (
        torch.rand(16, generator=generator) + 0.5,
        torch.randint(0, 100, (16,), generator=generator),
        torch.rand(16, generator=generator) * 0.5 + 0.5,
    )
    together = sample(logits, *settings, uniform)
    order = torch.randperm(16, generator=generator)
    shuffled = sample(logits[order], *(x[order] for x in settings), uniform[order])
    assert torch.equal(together[order], shuffled)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cfg", math.nan),
        ("cfg", -1.0),
        ("cfg", math.inf),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(RowError, match=f"{name} is .*must be") as error:
        Sampling(**{name: value}).validate()
    assert error.value.kind == "sampling"


def test_the_filters_may_be_switched_off() -> None:
    assert Sampling(cfg=0, temperature=0, top_k=0, top_p=1).validate().guided is False


@pytest.mark.parametrize("top_ks", [[1, 7, 100], [0, 3, 64], [0, 0, 0], [512, 1000, 5]], ids=str)
def test_the_shorter_ways_keep_the_same_tokens(top_ks: list[int]) -> None:
    logits = torch.randn(3, 512, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    settings = (torch.ones(3), torch.tensor(top_ks), torch.ones(3))
    filters = Filters.of([Sampling(top_k=k) for k in top_ks], 512)
    assert not filters.nucleus
    assert torch.equal(kept_logits(logits, *settings, filters), kept_logits(logits, *settings))
