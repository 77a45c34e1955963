"""The best slate is the best of all slates, by enumeration; top-k of score times value is not."""

from itertools import combinations, permutations

import pytest
import torch

from agents.explore import break_ties
from agents.slates import (
    independent_scores,
    independent_value,
    logit_scores,
    logit_value,
    top_k,
)

EXACT = 1e-9


def problems(rows, items, seed, low=0.0):
    """Scores and gains (B, N) float64, gains from `low` up."""
    generator = torch.Generator().manual_seed(seed)
    s = torch.rand(rows, items, generator=generator, dtype=torch.float64) * 2.0
    gain = low + (1.0 - low) * torch.rand(rows, items, generator=generator, dtype=torch.float64)
    return s, gain, torch.ones(rows, items, dtype=torch.bool)


def every_value(s, gain, allowed, k):
    """Logit values (B, S) of all S slates, -inf where one shows what is not allowed."""
    slates = torch.tensor(list(combinations(range(s.shape[1]), k)))  # (S, K)
    weight = s[:, slates]  # (B, S, K)
    value = (weight * gain[:, slates]).sum(dim=2) / (1.0 + weight.sum(dim=2))
    return value.masked_fill(~allowed[:, slates].all(dim=2), -torch.inf)


def value_of(scores, s, gain, allowed, k):
    slate, real = top_k(scores, allowed, k)
    return logit_value(s.gather(1, slate), gain.gather(1, slate), real)


@pytest.mark.parametrize("low", [0.0, -1.0, -3.0])
@pytest.mark.parametrize(("items", "k"), [(8, 3), (12, 4), (6, 6), (5, 1)])
def test_a_few_top_k_find_the_best_of_all_slates(items, k, low):
    s, gain, allowed = problems(500, items, seed=items + k, low=low)
    best = every_value(s, gain, allowed, k).max(dim=1).values
    found = value_of(logit_scores(s, gain, allowed, k), s, gain, allowed, k)
    assert (found - best).abs().max() < EXACT


def test_gains_that_are_all_losses_still_fill_the_slate_as_well_as_it_goes():
    s, gain, allowed = problems(300, 8, seed=1)
    gain = gain - 2.0
    best = every_value(s, gain, allowed, 3).max(dim=1).values
    assert (best < 0).all()
    assert (value_of(logit_scores(s, gain, allowed, 3), s, gain, allowed, 3) - best).abs().max() < (
        EXACT
    )


def test_masked_items_are_no_part_of_the_best_slate_nor_of_its_value():
    s, gain, allowed = problems(400, 9, seed=2, low=-1.0)
    allowed = torch.rand(allowed.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    allowed[:, :3] = True
    scores = logit_scores(s, gain, allowed, 3)
    assert allowed.gather(1, top_k(scores, allowed, 3)[0]).all()
    best = every_value(s, gain, allowed, 3).max(dim=1).values
    assert (value_of(scores, s, gain, allowed, 3) - best).abs().max() < EXACT
    rubbish = torch.where(allowed, gain, 1e6)
    assert torch.equal(scores[allowed], logit_scores(s, rubbish, allowed, 3)[allowed])


def test_rows_with_fewer_items_than_slots_show_what_there_is():
    s, gain, allowed = problems(2, 5, seed=4)
    allowed[0, 2:] = False
    allowed[1] = False
    slate, real = top_k(logit_scores(s, gain, allowed, 3), allowed, 3)
    assert real.sum(dim=1).tolist() == [2, 0]
    assert set(slate[0, :2].tolist()) == {0, 1}
    value = logit_value(s.gather(1, slate), gain.gather(1, slate), real)
    both = (s[0, :2] * gain[0, :2]).sum() / (1.0 + s[0, :2].sum())
    assert value.tolist() == pytest.approx([float(both), 0.0])


def test_the_top_k_of_score_times_value_is_wrong_on_most_problems():
    s, gain, allowed = problems(500, 8, seed=5)
    best = every_value(s, gain, allowed, 3).max(dim=1).values
    wrong = (best - value_of(s * gain, s, gain, allowed, 3) > EXACT).double().mean()
    assert 0.6 < float(wrong) < 0.9


def test_scores_from_never_to_always_lose_nothing_to_rounding():
    generator = torch.Generator().manual_seed(6)
    v = torch.randn(200, 10, generator=generator) * 8.0  # float32, as nets give them
    gain = torch.randn(200, 10, generator=generator)
    s, allowed = v.clamp(-20.0, 20.0).exp(), torch.ones(200, 10, dtype=torch.bool)
    best = every_value(s.double(), gain.double(), allowed, 3).max(dim=1).values
    found = value_of(logit_scores(s, gain, allowed, 3), s.double(), gain.double(), allowed, 3)
    assert (found - best).abs().max() < EXACT


def test_a_slate_is_worth_what_users_take_by_hand():
    s, gain = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[4.0, 1.0, 9.0]])
    real = torch.tensor([[True, True, False]])
    assert logit_value(s, gain, real).tolist() == [6.0 / 4.0]
    p, attention = torch.tensor([[0.5, 0.2, 0.9]]), torch.tensor([1.0, 0.5, 0.25])
    value = independent_value(p, gain, attention, real)
    assert value.tolist() == pytest.approx([0.5 * 4.0 + 0.5 * 0.2 * 1.0])


@pytest.mark.parametrize("attention", [[1.0, 0.7, 0.5], [0.4, 1.0, 0.8], [0.5, 0.5, 0.5]])
@pytest.mark.parametrize("low", [0.0, -1.0, -9.0])
def test_the_best_items_in_the_best_places_are_the_best_of_all_orders(attention, low):
    p, gain, allowed = problems(300, 6, seed=7, low=low)
    p, places = p / 2.0, torch.tensor(attention, dtype=torch.float64)
    allowed[:, 1] = False
    scores = independent_scores(p, gain, allowed, places)
    slate, real = top_k(scores, allowed, 3)
    found = independent_value(p.gather(1, slate), gain.gather(1, slate), places, real)
    orders = torch.tensor(list(permutations([0, 2, 3, 4, 5], 3)))  # (S, K)
    every = (places * p[:, orders] * gain[:, orders]).sum(dim=2)  # (B, S)
    assert (found - every.max(dim=1).values).abs().max() < EXACT


def test_rows_that_run_short_keep_what_is_allowed_in_front():
    p, gain, allowed = problems(1, 4, seed=8)
    allowed[:, 1:] = False
    scores = independent_scores(p, gain, allowed, torch.tensor([0.1, 1.0, 0.5]))
    slate, real = top_k(scores, allowed, 3)
    assert real.tolist() == [[True, False, False]]
    assert int(slate[0, 0]) == 0


def test_equal_scores_are_ordered_as_exploration_orders_them_not_by_id():
    allowed = torch.ones(1, 40, dtype=torch.bool)
    slate, _ = top_k(torch.ones(1, 40), allowed, 5)
    assert slate.tolist() == break_ties(torch.ones(1, 40)).topk(5, dim=1).indices.tolist()
    assert sorted(slate[0].tolist()) != [0, 1, 2, 3, 4]


def test_forbidden_items_that_fill_a_short_slate_are_worth_nothing():
    s, gain = torch.ones(1, 4), torch.tensor([[1.0, 3.0, 50.0, 50.0]])
    scores = logit_scores(s, gain, torch.tensor([[True, True, False, False]]), 3)
    best = (1.0 + 3.0) / 3.0  # of both, with nothing taken as likely as either
    assert scores[0, :2].tolist() == pytest.approx([1.0 - best, 3.0 - best])
