"""What a visit is for: large and small baskets differ, and nothing is made up where they do not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from encoders.state import EMPTY
from simulators.company import Company
from simulators.fit import moment
from simulators.missions import Missions, cut_before, fit_missions
from simulators.trips import trips_from_logs


@pytest.fixture(scope="module")
def trips(shop, shelf):
    past = shop.before(moment(shelf.as_of))
    return trips_from_logs(past, shelf.ids, since=shelf.as_of - 120.0)


@pytest.fixture(scope="module")
def nothing(fitted):
    """Company that knows of nothing that goes together."""
    n, none = 60, torch.zeros(60, 1)
    groups = fitted.preference.groups
    size = 2 * (3 + 2 * groups.shape[1])
    return Company(none, none, none, groups, torch.zeros(size), torch.zeros(n), torch.zeros(2))


def sorted_by_size(trips, kind, rng):
    """The same trips, where small ones keep kind 0 and large ones mostly lose it."""
    size = np.diff(trips.pointer)
    trip = np.repeat(np.arange(len(size)), size)
    zero = kind[trips.bought] == 0
    drop = np.where(size[trip] >= 3, zero, ~zero) & (rng.random(len(trip)) < 0.8)
    drop &= size[trip] > 0
    kept = ~drop
    pointer = np.append(0, np.bincount(trip[kept], minlength=len(size)).cumsum())
    return replace(trips, bought=trips.bought[kept], pointer=pointer)


def test_what_small_baskets_hold_is_wanted_in_small_baskets(fitted, trips, nothing):
    kind = fitted.preference.groups[:, min(1, fitted.preference.groups.shape[1] - 1)].numpy()
    made = sorted_by_size(trips, kind, np.random.default_rng(0))
    found = fit_missions(fitted.preference, nothing, made, np.random.default_rng(1))
    small, large = found.change(torch.tensor([1, 6]), 0)  # (N,) each
    contrast = (small - large)[kind == 0].mean() - (small - large)[kind != 0].mean()
    plain = fit_missions(fitted.preference, nothing, trips, np.random.default_rng(1))
    small, large = plain.change(torch.tensor([1, 6]), 0)
    usual = (small - large)[kind == 0].mean() - (small - large)[kind != 0].mean()
    assert float(contrast) > float(usual) + 0.5
    assert abs(float(usual)) < 0.5  # the world's baskets have no missions


def test_the_first_item_has_a_level_of_its_own():
    worth = torch.tensor([[1.0, 0.0], [5.0, -1.0], [0.5, 0.0]])
    missions = Missions(torch.tensor([0, 1, 0]), worth, middle=0.0)
    size = torch.tensor([1, 3])
    log = float(np.log(3))
    torch.testing.assert_close(
        missions.change(size, 0), torch.tensor([[1.0, 0, 1], [1 + log / 2, 0, 1 + log / 2]])
    )
    torch.testing.assert_close(
        missions.change(size, 1), torch.tensor([[5.0, -1, 5], [5 + log / 2, -1, 5 + log / 2]])
    )
    assert torch.equal(missions.change(size, 1), missions.change(size, 7))


def test_from_few_purchases_nothing_is_learnt(fitted, trips, nothing):
    few = trips[np.arange(50)]
    found = fit_missions(fitted.preference, nothing, few, np.random.default_rng(0))
    assert not found.change(torch.tensor([1, 9]), 0).any()


def test_a_basket_is_cut_before_an_item_in_an_order_drawn_anew(trips):
    size = np.diff(trips.pointer)
    rows = np.nonzero(size >= 3)[0][:400]
    some = trips[rows]
    which = np.full(len(rows), 2)
    basket, following = cut_before(some, which, np.random.default_rng(0))
    padded = some.padded()
    assert np.array_equal(following.numpy(), padded[:, 2])
    for row in range(len(rows)):
        held = basket[row][basket[row] != EMPTY].tolist()
        assert set(held) <= set(padded[row].tolist()) - {int(following[row]), EMPTY}
        assert len(set(held)) == len(held)
    share = ((basket != EMPTY).sum(dim=1).numpy() / (size[rows] - 1)).mean()
    assert share == pytest.approx(0.5, abs=0.05)  # any place of the order is as likely


def test_the_seed_says_all(fitted, trips, nothing):
    one, same, other = (
        fit_missions(fitted.preference, nothing, trips, np.random.default_rng(s)) for s in (0, 0, 1)
    )
    assert torch.equal(one.worth, same.worth)
    assert not torch.equal(one.worth, other.worth)
