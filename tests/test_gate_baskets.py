"""The next basket: whose ten best items it holds, by hand and by brute force."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from encoders.items import interactions
from encoders.state import EMPTY
from experiments.from_logs import held_out_trips
from experiments.gate_baskets import again, basket_checks, paired, rankings, with_rivals
from simulators.fidelity import priced
from simulators.fit import moment
from simulators.gate import THRESHOLDS


@pytest.fixture(scope="module")
def held(fitted, shop, shelf):
    return priced(fitted.preference, held_out_trips(shop, shelf))


@pytest.fixture(scope="module")
def counts(shop, shelf):
    return interactions(shop.before(moment(shelf.as_of)), shelf.ids)[0]


def checks_of(held, counts, fitted):
    found = basket_checks(held, counts, fitted.preference.log_rate, THRESHOLDS, 0)
    return {check.check: check for check in found}


def test_who_knows_the_basket_is_above_all_rivals_and_who_has_it_backwards_below(
    held, counts, fitted
):
    for sign in (1, -1):
        known = replace(held, theta=sign * 20.0 * held.bought)
        found = checks_of(known, counts, fitted)
        assert set(found) == {name for name in THRESHOLDS if name.startswith("basket_")}
        for check in found.values():
            assert sign * check.value > 0.05
            assert (check.passed is True) == (sign > 0)


def test_recall_of_popularity_is_that_of_counting(held, counts, fitted):
    """Each household's first visit after the cut that bought, against the ten most bought items."""
    log_rate = fitted.preference.log_rate + 1e-3 * torch.arange(60)  # without ties
    rate = log_rate.numpy()
    assert len(np.unique(rate)) == 60
    best = set(np.argsort(-rate)[:10].tolist())
    recalls, ndcgs = [], []
    for user in np.unique(held.trips.user):
        row = np.flatnonzero(held.trips.user == user)[0]
        basket = set(held.bought[row].nonzero().squeeze(1).tolist())
        if not basket:
            continue
        recalls.append(len(basket & best) / len(basket))
        order = np.argsort(-rate)[:10].tolist()
        gain = sum(1 / np.log2(place + 2) for place, item in enumerate(order) if item in basket)
        ndcgs.append(gain / sum(1 / np.log2(place + 2) for place in range(min(10, len(basket)))))
    found = {c.check: c for c in basket_checks(held, counts, log_rate, THRESHOLDS, 0)}
    said = found["basket_recall10_over_popularity"].said
    assert f"popularity {np.mean(recalls):.3f}, {len(recalls)} households" in said
    assert f"popularity {np.mean(ndcgs):.3f}" in found["basket_ndcg10_over_popularity"].said


def test_rivals_know_the_past_only(held, counts, fitted):
    rows = torch.arange(3)
    scores = rankings(held, rows, counts, fitted.preference.log_rate, 0)
    past = held.trips[np.arange(3)].past
    own = [set(p[p != EMPTY].tolist()) for p in past]
    for row, known in enumerate(own):
        first = scores["decayed own counts"][row].topk(min(3, len(known))).indices.tolist()
        assert set(first) <= known
        age = dict(zip(past[row].tolist(), held.trips[np.array([row])].age[0], strict=True))
        weight = scores["decayed own counts"][row][list(known)]
        count = dict(zip(past[row].tolist(), held.trips[np.array([row])].count[0], strict=True))
        by_hand = [count[i] * np.exp(-age[i] / 60.0) for i in known]
        assert weight.numpy() == pytest.approx(np.array(by_hand), abs=2e-3)


def test_nobody_takes_again_what_nobody_has(held):
    assert again(held)
    never = replace(held, trips=replace(held.trips, past=np.full_like(held.trips.past, EMPTY)))
    assert not again(never)


def test_own_counts_are_no_rival_where_nobody_takes_an_item_again(held, counts, fitted):
    checks = list(checks_of(held, counts, fitted).values())
    assert with_rivals(checks, held) == (checks, [])
    never = replace(held, trips=replace(held.trips, past=np.full_like(held.trips.past, EMPTY)))
    kept, why = with_rivals(checks, never)
    assert {c.check for c in checks} - {c.check for c in kept} == {
        "basket_ndcg10_over_decayed_counts"
    }  # fmt: skip
    assert "nobody takes an item again" in why[0]


def test_the_interval_of_a_gain_is_paired():
    found = paired(torch.tensor([0.1, 0.3, 0.2, 0.2], dtype=torch.float64))
    assert found.value == pytest.approx(0.2)
    assert found.high - found.value == pytest.approx(
        1.96 * np.std([0.1, 0.3, 0.2, 0.2], ddof=1) / 2
    )
    assert np.isnan(paired(torch.zeros(0)).value)


def test_a_household_whose_first_visit_bought_nothing_is_not_scored(held, counts, fitted):
    bought = held.bought.clone()
    first = np.unique(held.trips.user, return_index=True)[1]
    some = bought[first].any(dim=1).sum()
    lost = first[bought[first].any(dim=1).numpy()][0]
    bought[lost] = False
    found = checks_of(replace(held, bought=bought), counts, fitted)
    assert f"{some - 1} households" in found["basket_ndcg10_over_item_knn"].said
    assert isinstance(counts, csr_matrix)
