"""What goes together: pairs that were always bought together are learnt, chance is not."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from encoders.state import EMPTY
from simulators import company
from simulators.company import fit_company, without
from simulators.preference import ItemFacts, Preference
from simulators.trips import trips_from_logs

FACTS = tuple(f.name for f in fields(ItemFacts))


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


def mixed(rng, paired):
    """Baskets (200, 6) of up to six items, some empty, and slates (200, 8)."""
    n = len(paired.level)
    basket = torch.from_numpy(np.stack([rng.permutation(n)[:6] for _ in range(200)]))
    held = torch.from_numpy(rng.integers(0, 7, 200))
    basket = torch.where(torch.arange(6) < held[:, None], basket, EMPTY)
    return basket, held, torch.from_numpy(rng.integers(0, n, (200, 8)))


def test_the_change_is_that_of_the_features_less_the_usual_one(paired):
    basket, held, _ = mixed(np.random.default_rng(2), paired)
    some = held > 0
    items = torch.arange(len(paired.level)).expand(int(some.sum()), -1)
    whole = paired.features(basket[some], items) @ paired.weight + paired.level
    usual = paired.usual[0] + paired.usual[1] * held[some].float().log()
    expected = whole - usual[:, None]
    torch.testing.assert_close(paired.change(basket)[some], expected, rtol=1e-4, atol=1e-4)


def test_a_slate_changes_by_running_sums_as_the_catalogue_does(paired):
    basket, held, slate = mixed(np.random.default_rng(3), paired)
    sums = torch.zeros(200, paired.source.shape[1] + paired.vectors.shape[1])
    for m in range(6):  # one purchase after another
        sums += paired.sums(basket[:, m : m + 1].clamp_min(0), basket[:, m : m + 1] != EMPTY)
    some = held > 0
    found = paired.beside(sums[some], basket[some], held[some], slate[some])
    expected = paired.change(basket).gather(1, slate)[some]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_basket_of_usual_kind_leaves_as_much_wished_for_as_an_empty_one(fitted, shelf, trips):
    """Of the trips learnt from: small baskets and large ones, summed over the catalogue."""
    company = fit_company(fitted.preference, shelf, trips, np.random.default_rng(0))
    theta = fitted.preference.log_rate  # (N,)
    basket = torch.from_numpy(trips.padded()[:1500])
    size = (basket != EMPTY).sum(dim=1)
    before, after = (
        without(x, basket).logsumexp(dim=1)
        for x in (theta.expand(len(basket), -1), theta + company.change(basket))
    )
    for kind in (size <= 3, size > 3):
        assert abs(float((after - before)[kind].mean())) < 0.15
    assert (after - before).std() > 0.01


def drawn_by(rate, count, rng):
    """Baskets of two to four items, one after another by their rates."""
    noise = np.log(rate) + rng.gumbel(size=(count, len(rate)))
    order = np.argsort(-noise, axis=1)
    return [order[row, : rng.integers(2, 5)] for row in range(count)]


def test_sampled_alternatives_leave_rates_as_they_are(fitted, shelf, trips):
    """Some items are bought 20 times as often as others; baskets say no more than that."""
    rng = np.random.default_rng(4)
    facts = {x: getattr(fitted.preference, x) for x in FACTS}
    rate = np.exp(rng.normal(0, 1.0, len(shelf)))
    facts["log_rate"] = torch.from_numpy(np.log(rate)).float() - 6
    flat = Preference(ItemFacts(**facts), trips.profile.shape[1], 8)  # unfitted: rates alone
    many = trips[np.tile(np.arange(len(trips)), 3)]
    baskets = drawn_by(rate, len(many), rng)
    company = fit_company(flat, shelf, refilled(many, baskets), rng)
    change = company.change(torch.arange(len(shelf))[:, None])  # (N, N)
    assert abs(change.mean(dim=0)).max() < 0.3
    assert abs(float(np.corrcoef(change.mean(dim=0), np.log(rate))[0, 1])) < 0.5
    wrong = change.mean(dim=0).std() / np.log(rate).std()
    assert wrong < 0.1


def test_trips_count_as_often_as_their_weight_says(fitted, shelf, trips):
    rng = np.random.default_rng(5)
    half = len(trips) // 2
    pairs = rng.choice(len(shelf) // 2, (half, 2))
    first = [np.unique([2 * a, 2 * a + 1, 2 * b]) for a, b in pairs]  # goes with its neighbour
    second = [np.unique([a, (a + 30) % 60]) for a in rng.choice(60, len(trips) - half)]
    both = refilled(trips, [np.sort(x) for x in first + second])
    weight = (np.arange(len(trips)) < half) * 2.0
    company = fit_company(fitted.preference, shelf, both, rng, weight)
    change = company.change(torch.arange(0, 60, 2)[:, None])  # (N / 2, N)
    rows = torch.arange(30)
    assert (change[rows, 2 * rows + 1] > change[rows, (2 * rows + 30) % 60] + 1).all()


def test_too_few_baskets_teach_nothing(fitted, shelf, trips):
    company = fit_company(fitted.preference, shelf, trips[np.arange(50)], np.random.default_rng(0))
    assert (company.change(torch.tensor([[3, 5]])) == 0).all()
    assert not company.learnt


def test_what_is_in_the_basket_comes_no_more():
    theta = torch.arange(6.0).reshape(2, 3)
    left = without(theta, torch.tensor([[2, EMPTY], [EMPTY, EMPTY]]))
    assert left[0].tolist() == [0.0, 1.0, -torch.inf]
    assert torch.equal(left[1], theta[1])
    assert torch.equal(theta, torch.arange(6.0).reshape(2, 3))


def test_features_by_hand(paired):
    """Means over the basket are means, whatever its size; counts are counts."""
    three = torch.tensor([[0, 5, 8, EMPTY]])
    found = paired.features(three, torch.arange(len(paired.level))[None])[0]  # (N, 2 F)
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


def test_worth_is_learnt_from_purchases_not_from_visits(fitted, shelf, trips, monkeypatch):
    """A visit of n items is seen n - 1 times as often as one of two."""
    seen = []
    learn = company._learn

    def noted(*known):
        seen.append(known[2])
        return learn(*known)

    monkeypatch.setattr(company, "_learn", noted)
    fit_company(fitted.preference, shelf, trips, np.random.default_rng(0))
    size = np.diff(trips.pointer)
    size = size[size >= 2]
    assert size.std() > 0.5
    expected = (size * (size - 1.0)).sum() / (size - 1.0).sum()
    assert np.diff(seen[0].pointer).mean() == pytest.approx(expected, rel=0.05)
    assert expected > 1.1 * size.mean()
