"""The relevance model: one number for a pair however it is asked, learnt without the future."""

from dataclasses import fields, replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix
from synthetic import after_cut_replaced, favourites
from torch.nn.functional import binary_cross_entropy_with_logits

import simulators.fit
from encoders.state import EMPTY
from simulators.fit import fit_model, item_facts, moment, trends, usual_rate
from simulators.preference import (
    ItemFacts,
    Preference,
    bought_board,
    describe_trips,
    item_to_item,
)
from simulators.preference_fit import fit_preference, resampled, sample_pairs
from simulators.trips import trips_from_logs
from simulators.visits import lines_of


@pytest.fixture(scope="module")
def held_out(shop, shelf):
    """All trips after the cut."""
    return trips_from_logs(shop, shelf.ids, since=shelf.as_of)


@pytest.fixture(scope="module")
def model(fitted):
    return fitted.preference


@pytest.fixture(scope="module")
def facts(model):
    return ItemFacts(*(getattr(model, field.name) for field in fields(ItemFacts)))


@pytest.fixture(scope="module")
def window(shop, shelf):
    """Trips of 60 days before the cut."""
    past = shop.before(moment(shelf.as_of))
    return trips_from_logs(past, shelf.ids, since=shelf.as_of - 60.0)


def test_a_slate_is_priced_as_the_whole_catalogue_is(model, held_out):
    state = describe_trips(model, held_out[np.arange(100)])
    everything = model.logits(state)  # (B, N)
    slate = torch.rand(100, 60, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :7]
    torch.testing.assert_close(model.logit(state, slate), everything.gather(1, slate))
    torch.testing.assert_close(model.logits(state, rows=7), everything)
    own = state | {"member": torch.arange(100) % model.bias.shape[1]}
    everything = model.logits(own)
    torch.testing.assert_close(model.logit(own, slate), everything.gather(1, slate))
    torch.testing.assert_close(model.logits(own, rows=7), everything)


def test_an_empty_slot_is_never_bought(model, held_out):
    state = describe_trips(model, held_out[np.arange(4)])
    slate = torch.tensor([[3, EMPTY, 5]]).expand(4, -1)
    theta = model.logit(state, slate)
    assert theta[:, 1].eq(-torch.inf).all()
    torch.testing.assert_close(theta[:, [0, 2]], model.logit(state, slate[:, [0, 2]]))


def test_a_batch_is_its_households_one_by_one(model, held_out):
    trips = held_out[np.arange(0, 90, 3)]
    together = model.logits(describe_trips(model, trips))
    alone = [model.logits(describe_trips(model, trips[np.array([r])])) for r in range(len(trips))]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-5)


def test_own_purchases_of_an_item_by_hand(model):
    past = torch.tensor([[5, 2, EMPTY], [EMPTY, EMPTY, EMPTY]])
    count = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    age = torch.tensor([[7.0, 40.0, 0.0], [0.0, 0.0, 0.0]])
    width = model.of_user.in_features - model.extra
    state = model.describe(torch.zeros(2, width), past, count, age, torch.zeros(2).double())
    items = torch.tensor([[2, 5, 4, EMPTY], [2, 5, 0, EMPTY]])
    often, ago = model.own(state, items)
    assert often.tolist() == [[1, 3, 0, 0], [0, 0, 0, 0]]
    assert ago.tolist() == [[40, 7, 0, 0], [0, 0, 0, 0]]
    boards = model.own_board(state)
    for board, direct in zip(boards, (often, ago), strict=True):
        assert board.shape == (2, 60)
        assert torch.equal(board.gather(1, items[:, :3]), direct[:, :3])
        assert board.sum() == direct.sum()


def test_purchases_of_a_group_are_counted_by_hand(model):
    items = torch.tensor([[0, 1, 2]])
    width = model.of_user.in_features - model.extra
    state = model.describe(
        torch.zeros(1, width),
        items,
        torch.tensor([[1.0, 2.0, 4.0]]),
        torch.ones(1, 3),
        torch.zeros(1).double(),
    )
    group = model.groups[:3]  # (3, G)
    expected = (group[:, None] == group[None]).float().mul(torch.tensor([1.0, 2, 4])[None, :, None])
    assert torch.equal(model.same_group(state, items)[0], expected.sum(dim=1))


def test_item_to_item_at_full_rank_is_ease():
    rng = np.random.default_rng(0)
    bought = (rng.random((80, 12)) < 0.3).astype(np.float32)
    source, target = item_to_item(csr_matrix(bought * 3), rank=12, ridge=5.0)
    precision = np.linalg.inv(bought.T @ bought + 5.0 * np.eye(12))
    ease = -precision / np.diag(precision)  # (N, N), as in the paper
    np.fill_diagonal(ease, 0.0)
    np.testing.assert_allclose((source @ target.T).numpy(), ease, atol=1e-5)
    other = item_to_item(csr_matrix(bought * 3), rank=12, ridge=5.0)
    assert torch.equal(other[0], source)


def test_item_to_item_favours_what_goes_together():
    pairs = np.zeros((100, 6), np.float32)
    pairs[:50, [0, 1]] = 1
    pairs[50:, [2, 3]] = 1
    source, target = item_to_item(csr_matrix(pairs), rank=5, ridge=10.0)
    weight = source @ target.T
    assert weight[0, 1] > 0.3
    assert weight[0, 2].abs() < 0.01


def test_sampled_pairs_stand_for_the_whole_catalogue(facts, window):
    model = Preference(facts, window.profile.shape[1], 8)
    weight = np.ones(len(window))
    weight[::3] = 2.0
    weight[1::7] = 0.0
    features, pairs, trip, item, label, stands = sample_pairs(
        model, window, weight, torch.Generator().manual_seed(1)
    )
    assert len(features) == len(window)
    assert len(pairs) < 0.9 * len(window) * 60
    assert (stands * label).sum() == (weight * np.diff(window.pointer)).sum()  # exactly
    total = stands.double().sum() / weight.sum()
    assert float(total) == pytest.approx(60, rel=0.01)
    assert not (torch.from_numpy(weight)[trip] == 0).any()
    assert torch.equal(bought_board(window, 60)[trip, item].float(), label)
    again = sample_pairs(model, window, weight, torch.Generator().manual_seed(1))
    assert torch.equal(again[1], pairs)


def test_training_and_serving_see_the_same_features(facts, window):
    """A sampled pair is priced as `logits` prices it."""
    model = Preference(facts, window.profile.shape[1], 8)
    generator = torch.Generator().manual_seed(2)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2, generator=generator)
    features, pairs, trip, item, _, _ = sample_pairs(model, window, np.ones(len(window)), generator)
    with torch.no_grad():
        sampled = model.score(model.of_user(model.standard(features))[trip], pairs, item).squeeze(1)
        whole = model.logits(describe_trips(model, window))
    torch.testing.assert_close(sampled, whole[trip, item], rtol=1e-4, atol=1e-4)


def test_on_held_out_trips_the_fit_is_calibrated_and_beats_item_rates(model, held_out):
    theta = model.logits(describe_trips(model, held_out))  # (n, N)
    bought = bought_board(held_out, 60).float()
    predicted, real = float(theta.sigmoid().sum()), float(bought.sum())
    assert predicted == pytest.approx(real, rel=0.1)
    rate = model.log_rate.exp()
    flat = (rate / (1 - rate)).log().expand_as(theta)
    loss, flat_loss = (binary_cross_entropy_with_logits(x, bought) for x in (theta, flat))
    assert loss < 0.85 * flat_loss


def test_what_a_household_repeats_ranks_above_what_others_do(model, held_out, shelf):
    theta = model.logits(describe_trips(model, held_out))
    place = {item: row for row, item in enumerate(shelf.ids)}
    own = torch.zeros_like(theta, dtype=torch.bool)
    for row, user in enumerate(held_out.user):
        own[row, [place[f"i{i:02d}"] for i in favourites(user)]] = True
    rank = theta.argsort(1, descending=True).argsort(1)  # (n, N)
    assert rank[own].float().mean() < 6.0  # five favourites: 2.0 is perfect, 29.5 is chance
    assert theta[own].sigmoid().mean() == pytest.approx(0.35, abs=0.08)  # as the world has it


def test_who_bought_an_item_more_often_wants_it_more(model, held_out):
    trips = held_out[np.nonzero(held_out.count[:, 0] >= 2)[0][:200]]
    item = torch.from_numpy(trips.past[:, :1]).long()
    count = trips.count.copy()
    count[:, 0] *= 3
    more = replace(trips, count=count)
    before = model.logit(describe_trips(model, trips), item)
    after = model.logit(describe_trips(model, more), item)
    assert (after > before).float().mean() > 0.95


def test_a_fit_is_the_same_bit_by_bit_and_another_with_another_seed(facts, window):
    weight = np.ones(len(window))
    fits = [fit_preference(window, weight, facts, epochs=1, hidden=8, seed=s) for s in (0, 0, 1)]
    one, same, other = (f.state_dict() for f in fits)
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["of_pair.weight"], other["of_pair.weight"])
    assert not any(p.requires_grad for p in fits[0].parameters())


def test_fitting_draws_from_no_global_generator(facts, window):
    before = torch.get_rng_state()
    fit_preference(window, np.ones(len(window)), facts, epochs=1, hidden=8)
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_that_are_none_are_refused(facts, window):
    bad = replace(window, profile=np.where(window.profile > 1.0, np.nan, window.profile))
    with pytest.raises(ValueError, match="not finite"):
        fit_preference(bad, np.ones(len(bad)), facts, epochs=1, hidden=8)


def test_facts_of_items_come_from_before_the_window(shop, shelf, fitted):
    """Whatever is shuffled after a moment, the facts taken at that moment keep every bit."""
    since = moment(shelf.as_of)
    shuffled = after_cut_replaced(shop, since)
    rate = fitted.preference.log_rate
    trend = torch.zeros(1, 60), torch.zeros(2)
    one, other = (item_facts(x.before(since), shelf, rate, None, trend) for x in (shop, shuffled))
    for name in vars(one):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_item_weights_to_learn_with_come_from_before_the_window(shop, shelf, monkeypatch):
    """The worth of item-to-item weights is learnt on trips that those weights have not seen."""
    latest = []

    def noted(logs, *rest):
        latest.append(logs.events["time"].max())
        return item_facts(logs, *rest)

    monkeypatch.setattr(simulators.fit, "item_facts", noted)
    learn = partial(fit_preference, epochs=1, hidden=8, seed=0)
    fit_model(shop.before(moment(shelf.as_of)), shelf, 100.0, learn, 0, False)
    to_learn, to_serve = latest
    assert to_learn < moment(shelf.as_of - 100.0) < to_serve < moment(shelf.as_of)


def test_members_are_one_opinion_each_and_their_mean_speaks_for_who_has_none(model, held_out):
    state = describe_trips(model, held_out[np.arange(50)])
    slate = torch.rand(50, 60, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :7]
    said = model.opinions(state, slate)  # (B, K, M)
    assert said.shape == (50, 7, 5)
    torch.testing.assert_close(model.logit(state, slate), said.mean(dim=2))
    for member in range(5):
        own = state | {"member": torch.full((50,), member)}
        assert torch.equal(model.logit(own, slate), said[:, :, member])
    assert (said.std(dim=2) > 0).all()


def test_members_agree_more_on_what_the_log_shows_more_of(facts, window):
    """Each tenth household once, or all of them: the spread falls about with the root."""
    spread = []
    for keep in (10, 1):
        some = window[np.isin(window.user, np.unique(window.user)[::keep])]
        fit = fit_preference(some, np.ones(len(some)), facts, epochs=20, hidden=8)
        state = describe_trips(fit, window[np.arange(100)])
        slate = torch.arange(60).expand(100, -1)
        spread.append(float(fit.opinions(state, slate).std(dim=2).mean()))
    assert spread[1] < 0.7 * spread[0]


def test_every_member_has_its_own_sample_of_households():
    user = np.repeat(np.arange(200), 3)
    times = resampled(user, 4, np.random.default_rng(0))  # (n, M)
    by_user = times.view(200, 3, 4)
    assert (by_user == by_user[:, :1]).all()  # all trips of a household alike
    assert (by_user[:, 0].sum(dim=0) == 200).all()
    assert (by_user[:, 0] == 0).float().mean() == pytest.approx(np.exp(-1), abs=0.05)
    assert not torch.equal(times[:, 0], times[:, 1])
    assert torch.equal(resampled(user, 1, np.random.default_rng(0)), torch.ones(600, 1))


def test_a_trend_is_what_was_bought_of_late_over_the_usual(shop, shelf):
    past = shop.before(moment(shelf.as_of))
    users = pd.Series(1, index=np.unique(past.events["user"]))
    since = shelf.as_of - 40.0
    trips = trips_from_logs(past, shelf.ids)
    lines = lines_of(past, shelf.ids, users.index.to_numpy())
    rate = usual_rate(lines, trips, users, 60)
    table, span = trends(lines, rate, since, shelf.as_of, users)
    assert table.shape == (7, 60)  # six weeks begun, and the cut
    assert span.tolist() == [since, shelf.as_of]
    times = trips.time[np.repeat(np.arange(len(trips)), np.diff(trips.pointer))]
    share = rate.double().softmax(0).numpy()
    for row, now in ((0, since), (2, since + 14), (6, shelf.as_of)):
        late = trips.bought[(times >= now - 28) & (times < now)]
        seen = np.bincount(late, minlength=60)
        expected = np.log((seen + 5) / (len(late) * share + 5))
        np.testing.assert_allclose(table[row].numpy(), expected, rtol=1e-4, atol=1e-5)
    later = after_cut_replaced(shop, moment(since + 14)).before(moment(shelf.as_of))
    lines = lines_of(later, shelf.ids, users.index.to_numpy())
    early = trends(lines, rate, since, shelf.as_of, users)[0][:3]
    assert torch.equal(early, table[:3])  # what came later says nothing


def test_a_week_of_the_trend_is_over_before_the_trip(model):
    first, last = model.span.tolist()
    rows = len(model.trend) - 1
    time = torch.tensor([first - 9, first, first + 6.9, first + 7, last - 1e-3, last, last + 99])
    week = model.week(time.double())
    assert week[:4].tolist() == [0, 0, 0, 1]
    assert week[4:].tolist() == [int((last - 1e-3 - first) // 7), rows, rows]


def test_an_item_in_demand_is_wanted_more(facts, window):
    """Purchases thinned to .3 where the trend is low: much of that is found."""
    week = ((window.time - float(facts.span[0])) // 7).astype(int)
    rng = np.random.default_rng(0)
    table = torch.from_numpy(rng.choice([0.0, 1.0], (week.max() + 1, 60))).float()
    trip = np.repeat(np.arange(len(window)), np.diff(window.pointer))
    high = table[week[trip], window.bought].numpy() > 0
    kept = high | (rng.random(len(trip)) < 0.3)
    pointer = np.append(0, np.bincount(trip[kept], minlength=len(window)).cumsum())
    thin = replace(window, bought=window.bought[kept], pointer=pointer)
    made = replace(facts, trend=table)
    fit = fit_preference(thin, np.ones(len(thin)), made, epochs=15, hidden=8)
    state = describe_trips(fit, thin[np.arange(200)])
    state["week"] = torch.zeros(200, dtype=torch.long)
    found = []
    for level in (0.0, 1.0):
        fit.trend[0] = level
        found.append(fit.logits(state).sigmoid().mean())
    assert 0.25 < float(found[0] / found[1]) < 0.7


def test_an_item_out_of_season_all_through_the_window_is_not_thought_gone(shop, shelf):
    """One item leaves the window: with the whole past in it, its rate falls but stays."""
    past = shop.before(moment(shelf.as_of))
    gone = (past.events["item"] == shelf.ids[0]) & (
        past.events["time"] >= moment(shelf.as_of - 60.0)
    )
    without = replace(past, events=past.events[~gone].reset_index(drop=True))
    trips = trips_from_logs(without, shelf.ids, since=shelf.as_of - 60.0)
    users = pd.Series(1, index=np.unique(without.events["user"]))
    lines = lines_of(without, shelf.ids, users.index.to_numpy())
    rate = usual_rate(lines, trips, users, 60).exp()
    assert not (trips.bought == 0).any()
    ever = (without.events["item"] == shelf.ids[0]).sum() / without.events["item"].isin(
        shelf.ids
    ).sum()
    assert float(rate[0]) == pytest.approx(0.2 * ever * len(trips.bought) / len(trips), rel=0.1)


def test_item_weights_of_a_longer_past_are_put_on_the_scale_learnt_with(facts):
    model = Preference(facts, 4, 8)
    later = replace(facts, source=facts.source * 3.0, gap=facts.gap + 0.4)
    model.renew(later)
    torch.testing.assert_close(model.source, facts.source)
    torch.testing.assert_close(model.gap, facts.gap)
    swapped = replace(facts, source=facts.source.flip(0) * 2.0, gap=facts.gap.flip(0) + 1.0)
    model.renew(swapped)
    assert float(torch.corrcoef(torch.stack([model.gap, facts.gap.flip(0)]))[0, 1]) > 0.999
    blank = replace(facts, source=torch.zeros_like(facts.source))
    model.renew(blank)
    assert torch.equal(model.source, blank.source)


def test_a_small_log_gets_its_steps(facts, window):
    """Of forty trips too something is learnt: the items' rates are not left where they began."""
    few = window[np.arange(40)]
    flat = replace(facts, log_rate=torch.full((60,), -6.0))
    fit = fit_preference(few, np.ones(40), flat, epochs=6, hidden=8)
    theta = fit.logits(describe_trips(fit, few))
    assert float(theta.sigmoid().sum()) == pytest.approx(len(few.bought), rel=0.15)


def test_what_never_varied_in_the_fit_says_nothing_of_others(facts, window):
    """A country that nobody came from, or a number beyond all that was seen."""
    profile = np.concatenate([window.profile, np.ones((len(window), 1), np.float32)], axis=1)
    constant = replace(window, profile=profile)
    fit = fit_preference(constant, np.ones(len(window)), facts, epochs=2, hidden=8)
    elsewhere = profile.copy()
    elsewhere[:, -1] = 1e6
    one, other = (
        fit.logits(describe_trips(fit, replace(constant, profile=p)[np.arange(50)]))
        for p in (profile, elsewhere)
    )
    torch.testing.assert_close(one, other)
    far, further = profile.copy(), profile.copy()
    far[:, 3] += 1e3
    further[:, 3] += 1e6
    one, other = (
        fit.logits(describe_trips(fit, replace(constant, profile=p)[np.arange(50)]))
        for p in (far, further)
    )
    torch.testing.assert_close(one, other)
