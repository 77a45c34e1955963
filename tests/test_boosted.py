"""Trees in the place of the net: the same users by another model, bit by bit in any batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fitted_users import at, same_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import after_cut_replaced
from torch.nn.functional import binary_cross_entropy_with_logits

import simulators.boosted as boosted
from encoders.state import EMPTY
from simulators.base import SimSpec
from simulators.boosted import (
    BoostedSimulator,
    Trees,
    bin_edges,
    boost_preference,
    enough,
    grow,
    set_aside,
    walk,
)  # fmt: skip
from simulators.fit import item_facts, moment
from simulators.fitted import FittedSimulator
from simulators.preference import Preference, bought_board, describe_trips
from simulators.testing import check_simulator
from simulators.trips import trips_from_logs

NO_TREND = torch.zeros(1, 60), torch.zeros(2, dtype=torch.float64)
QUICK = {"window": 60.0, "trees": 3}
ROWS = torch.arange(60)


@pytest.fixture(scope="module")
def users(shop, shelf):
    return BoostedSimulator.fit(SimSpec(shop, shelf, seed=3), window=100.0, trees=30)


@pytest.fixture(scope="module")
def quick(shop, shelf):
    return BoostedSimulator.fit(SimSpec(shop, shelf), **QUICK)


@pytest.fixture(scope="module")
def held_out(shop, shelf):
    """All trips after the cut."""
    return trips_from_logs(shop, shelf.ids, since=shelf.as_of)


def test_a_walk_by_hand():
    left, right = torch.tensor([[0, 1, 0]]), torch.tensor([[1, 0, 0]])
    feature = torch.cat([left, right]).int()  # (T, 3)
    threshold = torch.tensor([[0.5, 2.0, torch.inf], [1.0, 0.0, torch.inf]])
    value = torch.tensor([[1.0, 2.0, 4.0, 99.0], [10.0, 20.0, 40.0, 99.0]]).double()
    x = torch.tensor([[0.5, 2.0], [0.5, 2.1], [0.6, 0.0], [-1.0, 1.0]])
    # the first tree asks column 0 at 0.5, then column 1 at 2; the second column 1, then column 0
    expected = [1.0 + 40.0, 2.0 + 40.0, 4.0 + 20.0, 1.0 + 10.0]
    assert walk(x, Trees(feature, threshold, value)).tolist() == expected
    assert walk(x[:0], Trees(feature, threshold, value)).shape == (0,)


def table(rows=4000, columns=6, seed=0):
    """Rows with a continuous, a constant and counted columns, labels and weights."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns)).astype(np.float32)
    x[:, 1] = 7.0
    x[:, 2:4] = rng.poisson(0.3, (rows, 2))
    chance = 1 / (1 + np.exp(-(x[:, 0] * x[:, 2] + x[:, 3] - 1)))
    label = (rng.random(rows) < chance).astype(np.float32)
    weight = rng.choice([1.0, 5.0], rows).astype(np.float32)
    return [torch.from_numpy(part) for part in (x, label, weight)]


def test_trees_say_what_scikit_learn_says(monkeypatch):
    models = []

    def noted(model, edges):
        models.append((model, edges))
        return boosted_trees_of(model, edges)

    boosted_trees_of = boosted.trees_of
    monkeypatch.setattr(boosted, "trees_of", noted)
    x, label, weight = table()
    trees = grow(x, label, weight, 30, seed=0)
    ((model, edges),) = models
    cuts = [torch.from_numpy(e) for e in edges if len(e)]
    on_edges = x[:100].clone()  # what is equal to a threshold goes left
    on_edges[:, 0] = cuts[0][torch.arange(100)]
    beyond = torch.cat([x[:1] * 0 - 1e30, x[:1] * 0 + 1e30])
    for rows in (x, on_edges, beyond):
        codes = [np.searchsorted(e, rows[:, f].numpy()) for f, e in enumerate(edges)]
        theirs = torch.from_numpy(model.decision_function(np.stack(codes, axis=1)))
        torch.testing.assert_close(walk(rows, trees), theirs, rtol=0, atol=1e-7)
    depths = {
        int(d) for (p,) in model._predictors for d in p.nodes["depth"][p.nodes["is_leaf"] > 0]
    }
    assert len(depths) > 2  # leaves at all heights


def test_boosted_log_odds_follow_an_interaction_at_the_weighted_rate():
    x, label, weight = table(rows=8000)
    theta = walk(x, grow(x, label, weight, 60, seed=0))
    truth = x[:, 0] * x[:, 2] + x[:, 3] - 1  # two columns multiply
    assert torch.corrcoef(torch.stack([theta, truth.double()]))[0, 1] > 0.85
    chance = (weight * theta.sigmoid()).sum() / weight.sum()
    assert chance == pytest.approx(float((weight * label).sum() / weight.sum()), abs=0.005)
    lifted = walk(x, grow(x, label, weight * (1 + 4 * label), 60, seed=0))  # purchases count 5
    assert (lifted - theta).mean() == pytest.approx(np.log(5), abs=0.2)


def test_trees_that_learn_by_heart_are_left_out():
    x, label, weight = table(rows=2000)
    (fresh, truth, one), noise = table(rows=2000, seed=1), torch.Generator().manual_seed(0)
    learnt = torch.where(torch.rand(2000, generator=noise) < 0.3, 1 - label, label)
    trees = grow(x, learnt, weight, 100, seed=0)
    kept = enough(trees, fresh, truth, one)
    count = len(kept.feature)
    assert 1 <= count < 100
    losses = [
        float(binary_cross_entropy_with_logits(walk(fresh, Trees(*parts)), truth.double(), one))
        for parts in ([p[:n] for p in vars(trees).values()] for n in range(1, 101))
    ]
    assert count == 1 + int(np.argmin(losses))
    for name, part in vars(kept).items():
        assert torch.equal(part, getattr(trees, name)[:count])


def test_whole_households_are_set_aside_or_trips_of_few():
    user = np.repeat(np.arange(40), 5)
    held = set_aside(user, np.random.default_rng(0)).reshape(40, 5)
    assert held.any(axis=1).sum() == 6
    assert np.array_equal(held.all(axis=1), held.any(axis=1))
    assert set_aside(np.zeros(100), np.random.default_rng(0)).sum() == 15


@given(seed=st.integers(0, 999), split=st.integers(1, 700))
@settings(max_examples=8)
def test_a_row_has_one_bit_pattern_in_any_company(seed, split):
    generator = torch.Generator().manual_seed(seed)
    trees = Trees(
        torch.randint(0, 5, (50, 63), generator=generator).int(),
        torch.randn(50, 63, generator=generator),
        torch.round(torch.randn(50, 64, generator=generator).double() * boosted.EXACT)
        / boosted.EXACT,
    )
    x = torch.randn(700, 5, generator=generator)
    together = walk(x, trees)
    order = torch.randperm(700, generator=generator)
    parts = torch.cat([walk(some, trees) for some in x[order].split(split)])
    assert torch.equal(parts, together[order])
    shuffled = torch.randperm(50, generator=generator)
    turned = Trees(trees.feature[shuffled], trees.threshold[shuffled], trees.value[shuffled])
    assert torch.equal(walk(x, turned), together)  # sums are exact in any order


def test_bins_lie_between_values_and_a_rare_part_has_its_share():
    x = torch.zeros(10_000, 3)
    x[:500, 0] = torch.arange(500) + 1.0  # 5 % of the rows hold all that differs
    x[:, 1] = torch.arange(10_000) % 4
    many, four, none = bin_edges(x, np.random.default_rng(0))
    assert len(many) > 10
    assert four.tolist() == [0.5, 1.5, 2.5]
    assert len(none) == 0
    assert len(bin_edges(torch.arange(5000.0)[:, None], np.random.default_rng(0))[0]) == 254


def test_boosted_users_keep_the_contract(users):
    assert check_simulator(users, seed=1) == []


def test_boosted_users_keep_the_contract_over_several_trips(users, shelf):
    knobs = {"trips": 2, "drift": 0.1, "exposure": 0.5, "position": 0.2, "choice": "independent"}
    sim = FittedSimulator(shelf, users.preference, users.habits, users.users, **knobs)
    assert check_simulator(sim, seed=2) == []


def test_a_slate_is_priced_as_the_whole_catalogue_is_bit_by_bit(users, held_out):
    model = users.preference
    state = describe_trips(model, held_out[np.arange(200)])
    everything = model.logits(state)  # (B, N)
    slate = torch.rand(200, 60, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :7]
    assert torch.equal(model.logit(state, slate), everything.gather(1, slate))
    assert torch.equal(model.logits(state, rows=7), everything)
    assert everything.dtype == torch.float32
    slate[:, 2] = EMPTY
    theta = model.logit(state, slate)
    assert theta[:, 2].eq(-torch.inf).all()
    assert theta[:, [0, 1, 3]].isfinite().all()


def test_a_batch_is_its_households_one_by_one_bit_by_bit(users, held_out):
    trips = held_out[np.arange(0, 90, 3)]
    together = users.preference.logits(describe_trips(users.preference, trips))
    alone = [
        users.preference.logits(describe_trips(users.preference, trips[np.array([r])]))
        for r in range(len(trips))
    ]
    assert torch.equal(torch.cat(alone), together)


def test_trees_look_at_what_the_net_looks_at(users, held_out):
    """Features differ from those of `Preference` by rounding only."""
    trips = held_out[np.arange(50)]
    model, plain = users.preference, users.preference.seen
    ours, theirs = describe_trips(model, trips), describe_trips(plain, trips)
    items = torch.arange(60).expand(50, -1)
    for name in ("features", "often", "recent"):
        torch.testing.assert_close(ours[name].float(), theirs[name], rtol=1e-4, atol=1e-5)
    pairs = []
    for one, state in ((model, ours), (plain, theirs)):
        own, scalars = one.own_board(state), state["scalars"][:, None].expand(-1, 60, -1)
        same = plain.same_group(state, items)
        pairs.append(one.pair_features(items, *own, one.affinities(state), same, scalars))
    assert pairs[0].dtype == torch.float32
    torch.testing.assert_close(pairs[0], pairs[1], rtol=1e-4, atol=1e-4)


def test_held_out_purchases_are_predicted_and_rates_are_per_trip_and_item(users, held_out):
    model = users.preference
    theta = model.logits(describe_trips(model, held_out))
    bought = bought_board(held_out, 60).float()
    assert float(theta.sigmoid().sum()) == pytest.approx(float(bought.sum()), rel=0.1)
    rate = model.log_rate.exp()
    flat = (rate / (1 - rate)).log().expand_as(theta)
    loss, flat_loss = (binary_cross_entropy_with_logits(x, bought) for x in (theta, flat))
    assert loss < 0.87 * flat_loss


def test_two_models_of_one_log_agree_and_are_not_the_same(users, fitted, held_out):
    trees, net = (
        sim.preference.logits(describe_trips(sim.preference, held_out)) for sim in (users, fitted)
    )
    together = torch.corrcoef(torch.stack([trees.flatten(), net.flatten()]))[0, 1]
    assert 0.8 < together < 0.999


def test_who_bought_an_item_more_often_wants_it_more(users, held_out):
    trips = held_out[np.nonzero(held_out.count[:, 0] >= 2)[0][:200]]
    item = torch.from_numpy(trips.past[:, :1]).long()
    count = trips.count.copy()
    count[:, 0] *= 2
    before, after = (
        users.preference.logit(describe_trips(users.preference, t), item)
        for t in (trips, replace(trips, count=count))
    )
    assert (after - before).mean() > 0.15
    assert (after < before - 0.1).float().mean() < 0.15


def test_a_fit_is_found_again_and_saved_without_code(shop, shelf, quick, monkeypatch, tmp_path):
    monkeypatch.setattr("simulators.fit.fit_model", None)  # would fail if it were asked
    again = BoostedSimulator.fit(SimSpec(shop, shelf), **QUICK, patience=0.3)
    assert same_tensors(again.preference.state_dict(), quick.preference.state_dict())
    with pytest.raises(TypeError):
        BoostedSimulator.fit(SimSpec(shop, shelf), **QUICK | {"trees": 4})
    quick.save(tmp_path / "users")
    loaded = BoostedSimulator.load(tmp_path / "users", shelf, patience=0.3)
    slate = torch.arange(5).expand(60, -1)
    answers = [s.respond(s.start(ROWS, at(ROWS)), slate, at(ROWS)) for s in (again, loaded)]
    assert same_tensors(answers[0][1], answers[1][1])
    assert torch.equal(answers[0][0].left, answers[1][0].left)
    assert loaded.users.ids.dtype == quick.users.ids.dtype
    with pytest.raises(ValueError, match="fitted on another catalogue than the 60 items given"):
        BoostedSimulator.load(tmp_path / "users", replace(shelf, vectors=shelf.vectors.flip(0)))


def test_a_fit_of_a_net_is_not_taken_for_trees(fitted, shelf, tmp_path):
    fitted.save(tmp_path / "users")
    with pytest.raises(ValueError, match=r"without trees: FittedSimulator.load reads"):
        BoostedSimulator.load(tmp_path / "users", shelf)


def test_a_fit_knows_its_seed_and_nothing_after_the_cut(shop, shelf, quick, monkeypatch):
    monkeypatch.setattr("simulators.fit.cached", lambda key, make, *_, **__: make())
    shuffled = after_cut_replaced(shop, moment(shelf.as_of))
    before = torch.get_rng_state()
    same, other = (
        BoostedSimulator.fit(spec, **QUICK)
        for spec in (SimSpec(shuffled, shelf), SimSpec(shop, shelf, seed=7, bootstrap=True))
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert same_tensors(same.preference.state_dict(), quick.preference.state_dict())
    assert torch.equal(same.habits.stop, quick.habits.stop)
    assert not torch.equal(other.preference.log_rate, quick.preference.log_rate)
    assert not torch.equal(other.preference.threshold, quick.preference.threshold)


def test_trees_of_very_many_trips_are_grown_on_some_of_them(shop, shelf, quick, monkeypatch):
    """The rates stay those of a trip and an item."""
    past = shop.before(moment(shelf.as_of))
    trips = trips_from_logs(past, shelf.ids, since=shelf.as_of - 120.0)
    facts = item_facts(past, shelf, quick.preference.log_rate, None, NO_TREND)
    monkeypatch.setattr(boosted, "MOST", 300)
    assert len(trips) > 600
    model = boost_preference(trips, np.ones(len(trips)), facts, trees=10)
    predicted = float(model.logits(describe_trips(model, trips)).sigmoid().sum())
    assert predicted == pytest.approx(len(trips.bought), rel=0.1)


@pytest.mark.parametrize("wrong", [{"window": 0.0}, {"window": float("nan")}, {"trees": 0}])
def test_a_fit_of_nothing_is_refused(shop, shelf, wrong):
    with pytest.raises(ValueError, match=r"window must be above 0 days|trees must be at least 1"):
        BoostedSimulator.fit(SimSpec(shop, shelf), **wrong)


def test_wrong_input_is_refused_with_what_is_missing(shop, shelf):
    with pytest.raises(ValueError, match="needs logs and a catalogue"):
        BoostedSimulator.fit(SimSpec(None, shelf))
    with pytest.raises(ValueError, match=r"patience must be a probability"):
        BoostedSimulator.fit(SimSpec(shop, shelf), patience=2.0)
    ten = replace(shop, events=shop.events.iloc[:10].reset_index(drop=True))
    with pytest.raises(ValueError, match=r"too few to fit users to \(100 of each.*longer log"):
        BoostedSimulator.fit(SimSpec(ten, shelf))
    with pytest.raises(ValueError, match=r"0 purchases of the catalogue before the window"):
        BoostedSimulator.fit(SimSpec(shop, shelf), **QUICK | {"window": 9000.0})


def test_numbers_that_are_none_are_refused(shop, shelf, quick):
    past = shop.before(moment(shelf.as_of))
    trips = trips_from_logs(past, shelf.ids, since=shelf.as_of - 30.0)
    bad = replace(trips, profile=np.where(trips.profile > 1.0, np.nan, trips.profile))
    facts = item_facts(past, shelf, quick.preference.log_rate, None, NO_TREND)
    with pytest.raises(ValueError, match="not finite"):
        boost_preference(bad, np.ones(len(bad)), facts, trees=1)


def test_users_are_served_with_what_goes_with_what_up_to_the_cut(shop, shelf, quick):
    past = shop.before(moment(shelf.as_of))
    now = item_facts(past, shelf, quick.preference.log_rate, None, NO_TREND)
    early = past.before(moment(shelf.as_of - QUICK["window"]))
    then = item_facts(early, shelf, quick.preference.log_rate, None, NO_TREND)
    seen = Preference(then, 4, 1)
    assert not torch.equal(seen.source, now.source)
    seen.renew(now)
    for name in ("source", "target", "gap"):
        assert torch.equal(getattr(quick.preference.seen, name), getattr(seen, name))
