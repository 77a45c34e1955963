"""What goes together: pairs that were always bought together are learnt, chance is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from encoders.state import EMPTY
from simulators.company import fit_company, without
from simulators.trips import trips_from_logs


@pytest.fixture(scope="module")
def trips(shop, shelf):
    found = trips_from_logs(shop, shelf.ids, since=shelf.as_of - 200)
    return found[np.nonzero(np.diff(found.pointer) >= 2)[0]]


def refilled(trips, baskets):
    """The same trips with other baskets."""
    sizes = [len(basket) for basket in baskets]
    pointer = np.concatenate([[0], np.cumsum(sizes)])
    return replace(trips, pointer=pointer, bought=np.concatenate(baskets).astype(np.int32))


@pytest.fixture(scope="module")
def paired(fitted, shelf, trips):
    """Whoever takes 2 i takes 2 i + 1."""
    rng = np.random.default_rng(0)
    some = [
        rng.choice(len(shelf) // 2, rng.integers(1, 3), replace=False) for _ in range(len(trips))
    ]
    baskets = [np.concatenate([2 * x, 2 * x + 1]) for x in some]
    return fit_company(fitted.preference, shelf, refilled(trips, baskets), rng)


def test_partners_are_wished_for(paired, shelf):
    for item in range(0, len(shelf), 2):
        change = paired.change(torch.tensor([[item]]))[0]
        change[item] = -torch.inf
        assert int(change.argmax()) == item + 1


def test_a_wish_that_is_fulfilled_is_over(paired, shelf):
    alone, both = paired.change(torch.tensor([[0, EMPTY], [0, 1]]))
    assert alone[1] > alone[2:].max()
    assert alone[1] - alone[2:].mean() > 1.0
    assert both[2:].max() - both[2:].mean() < alone[1] - alone[2:].mean()


def test_chance_teaches_little(fitted, shelf, trips):
    rng = np.random.default_rng(1)
    baskets = [rng.choice(len(shelf), 4, replace=False) for _ in range(len(trips))]
    company = fit_company(fitted.preference, shelf, refilled(trips, baskets), rng)
    change = company.change(torch.arange(len(shelf))[:, None]) - company.level  # (N, N)
    assert change.std() < 0.25  # .55 where tables and their worth are learnt on the same baskets


def test_an_empty_basket_changes_nothing_and_its_order_neither(paired):
    baskets = torch.tensor([[EMPTY, EMPTY, EMPTY], [4, 9, EMPTY], [9, EMPTY, 4]])
    change = paired.change(baskets)
    assert (change[0] == 0).all()
    assert torch.allclose(change[1], change[2], atol=1e-5)
    for row in range(3):
        assert torch.allclose(paired.change(baskets[row : row + 1])[0], change[row], atol=1e-5)


def test_too_few_baskets_teach_nothing(fitted, shelf, trips):
    company = fit_company(fitted.preference, shelf, trips[np.arange(50)], np.random.default_rng(0))
    assert (company.change(torch.tensor([[3, 5]])) == 0).all()


def test_what_is_in_the_basket_comes_no_more():
    theta = torch.arange(6.0).reshape(2, 3)
    left = without(theta, torch.tensor([[2, EMPTY], [EMPTY, EMPTY]]))
    assert left[0].tolist() == [0.0, 1.0, -torch.inf]
    assert torch.equal(left[1], theta[1])
    assert torch.equal(theta, torch.arange(6.0).reshape(2, 3))


def test_features_by_hand(paired):
    """Means over the basket are means, whatever its size; counts are counts."""
    three = torch.tensor([[0, 5, 8, EMPTY]])
    found = paired.features(three)[0]  # (N, 2 F)
    affinity = (paired.source[three[0, :3]] @ paired.target.T).mean(dim=0)  # (N,)
    likeness = (paired.vectors[three[0, :3]] @ paired.vectors.T).sum(dim=0)
    assert torch.allclose(found[:, 0], affinity, atol=1e-5)
    assert torch.allclose(found[:, 1], likeness, atol=1e-5)
    assert torch.allclose(found[:, 2], likeness / 3, atol=1e-5)
    g = paired.groups.shape[1]
    same = (paired.groups[:, None] == paired.groups[three[0, :3]][None]).sum(dim=1)  # (N, G)
    assert torch.equal(found[:, 3 : 3 + g], (same > 0).float())
    assert torch.allclose(found[:, 3 + g : 3 + 2 * g], same.float().log1p())
    half = found.shape[1] // 2
    assert torch.allclose(found[:, half:], found[:, :half] * np.log(3.0), atol=1e-5)
