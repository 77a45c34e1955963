"""Each dynamic moves the way it should, and not at all when switched off."""

import torch

from encoders.state import EMPTY
from simulators import dynamics


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_purchase_satiates_its_category_and_no_other():
    theta = torch.tensor([[0.0, 1.0, 2.0, 0.5]])
    category = torch.tensor([[3, 4, 3, EMPTY]])
    bought = torch.tensor([[3, 3, 5, EMPTY, EMPTY]])
    lowered = dynamics.satiate(theta, category, bought, 0.5)
    assert lowered.tolist() == [[-1.0, 1.0, 1.0, 0.5]]  # two of category 3; no category is none


def test_satiation_off_or_nothing_bought_changes_no_bit():
    theta, category = normal(50, 6), torch.arange(6).expand(50, 6)
    bought = torch.arange(50)[:, None] % 6
    assert torch.equal(dynamics.satiate(theta, category, bought, 0.0), theta)
    nothing = torch.full_like(bought, EMPTY)
    assert torch.equal(dynamics.satiate(theta, category, nothing, 9.0), theta)


def test_taste_drifts_towards_what_was_bought_and_keeps_its_length():
    taste, bought = normal(50, 8), normal(50, 8, seed=1)
    moved = dynamics.drift(taste, bought, 0.2)
    cosine = torch.nn.functional.cosine_similarity
    assert (cosine(moved, bought) > cosine(taste, bought)).all()
    assert torch.allclose(moved.norm(dim=1), taste.norm(dim=1), rtol=1e-5)
    more = dynamics.drift(taste, bought, 0.4)
    assert (cosine(more, bought) > cosine(moved, bought)).all()


def test_taste_of_who_bought_nothing_or_without_drift_changes_no_bit():
    taste, bought = normal(50, 8), normal(50, 8, seed=1)
    assert torch.equal(dynamics.drift(taste, bought, 0.0), taste)
    bought[::2] = 0.0
    moved = dynamics.drift(taste, bought, 0.3)
    assert torch.equal(moved[::2], taste[::2])
    assert (moved[1::2] != taste[1::2]).any(dim=1).all()


def hazard(bought, stop, useless, patience=0.2):
    return dynamics.leave_hazard(
        torch.tensor(bought), torch.tensor(stop), torch.tensor(useless), patience
    )


def test_leaving_follows_the_stop_hazard_of_the_purchase_just_made():
    leaving = hazard([True, True, False], [0.1, 0.3, 0.3], [False] * 3)
    assert torch.allclose(leaving, torch.tensor([0.1, 0.3, 0.0]))


def test_a_useless_slate_costs_patience():
    leaving = hazard([False, False], [0, 3], [True, False])
    assert torch.allclose(leaving, torch.tensor([0.2, 0.0]))


def test_without_hazards_nobody_leaves():
    leaving = hazard([True, False], [0.0, 0.0], [False, True], patience=0.0)
    assert leaving.tolist() == [0.0, 0.0]


def test_return_gaps_are_exponential_and_at_least_a_quarter_of_a_day():
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    gap = dynamics.return_gap(uniform, torch.full_like(uniform, 7.0))
    assert gap.min() == dynamics.SHORTEST_GAP
    assert abs(gap.mean() - 7.0) < 0.05
    assert abs(gap.median() - 7.0 * torch.log(torch.tensor(2.0))) < 0.05
    assert (dynamics.return_gap(uniform, torch.full_like(uniform, 14.0)) >= gap).all()
    assert (dynamics.return_gap(uniform, torch.zeros_like(uniform)) == 0).all()
