"""Fitted users keep the contract, and every assumption about them has an off switch."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from fitted_users import at, same_tensors

import simulators.fitted
from encoders.state import EMPTY
from envs import RecommendVectorEnv
from simulators.draws import Draws
from simulators.dynamics import return_gap
from simulators.fitted import BASKET, FittedSimulator, fill
from simulators.testing import check_simulator
from simulators.testing_dynamics import Dynamic, check_dynamics

MANY = torch.arange(400)


@pytest.fixture(scope="module")
def with_knobs(shelf, fitted):
    """The fitted users under other assumptions."""

    def make(**knobs):
        return FittedSimulator(shelf, fitted.preference, fitted.habits, fitted.users, **knobs)

    return make


def answer(sim, slate, rows=MANY, step=0):
    draws = at(rows, step)
    return sim.respond(sim.start(rows, draws), slate, draws)


def best(sim, rows=MANY, k=5):
    return sim.relevance(sim.start(rows, at(rows))).topk(k, dim=1).indices


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"trips": 3},
        {"trips": 2, "drift": 0.1, "exposure": 0.5, "position": 0.2, "satiation": 0.7},
        {"choice": "independent", "patience": 0.0},
        {"choice": "cascade", "trips": 3},
    ],
    ids=str,
)
def test_fitted_users_keep_the_contract(with_knobs, knobs):
    assert check_simulator(with_knobs(**knobs), seed=1) == []


def test_an_item_shown_alone_is_bought_as_often_as_its_relevance_says(fitted):
    rows = torch.arange(4000) % len(fitted.users)
    draws = Draws.root(5).at(rows, torch.arange(4000), torch.zeros_like(rows))
    state = fitted.start(rows, draws)
    for place in (0, 4, 20):
        promised, item = fitted.relevance(state).sort(dim=1, descending=True)
        promised, item = promised[:, place].double(), item[:, place : place + 1]
        response, _ = fitted.respond(state, item, draws)
        error = float((promised * (1 - promised)).sum().sqrt())
        assert abs(float(response.chosen["buy"].sum() - promised.sum())) < 4 * error
        assert torch.equal(response.chosen["buy"], response.organic)  # no effect of being shown


def test_what_is_bought_is_paid_at_the_price_of_the_catalogue(fitted, shelf):
    slate = best(fitted)
    response, _ = answer(fitted, slate)
    bought = response.chosen["buy"]
    assert bought.any()
    assert torch.equal(response.value, torch.where(bought, shelf.price[slate], 0.0))
    assert bought.sum(dim=1).max() == 1  # a logit chooses at most one


def test_a_product_without_a_price_is_worth_nothing_and_never_nan(shelf, fitted):
    bare = replace(shelf, price=torch.full_like(shelf.price, torch.nan))
    sim = FittedSimulator(bare, fitted.preference, fitted.habits, fitted.users)
    response, _ = answer(sim, best(sim))
    assert response.chosen["buy"].any()
    assert response.value.eq(0).all()


def test_who_is_patient_leaves_only_after_a_purchase_and_who_is_not_leaves_at_once(with_knobs):
    rare = with_knobs().relevance(with_knobs().start(MANY, at(MANY))).argsort(dim=1)[:, :2]
    for patience in (0.0, 1.0):
        response, _ = answer(with_knobs(patience=patience), rare)
        bought = response.chosen["buy"].any(dim=1)
        assert (~bought).sum() > 100
        assert response.left[~bought].all() == (patience == 1.0)
        assert response.left[~bought].any() == (patience == 1.0)


def test_exposure_raises_purchases_and_not_what_would_be_bought_anyway(with_knobs):
    slate = best(with_knobs())
    plain, shown = (answer(with_knobs(exposure=e), slate)[0] for e in (0.0, 1.0))
    assert shown.chosen["buy"].sum() > 1.1 * plain.chosen["buy"].sum()
    assert torch.equal(shown.organic, plain.organic)
    one, other = (with_knobs(exposure=e) for e in (0.0, 1.0))
    before, after = (s.relevance(s.start(MANY, at(MANY))) for s in (one, other))
    torch.testing.assert_close(after.logit(), before.logit() + 1.0, rtol=1e-3, atol=1e-3)


def test_position_lowers_the_later_slots_and_never_the_first(with_knobs):
    slate = best(with_knobs()).flip(1)  # the best is last
    knobs = {"choice": "independent"}
    plain, fading = (answer(with_knobs(position=p, **knobs), slate)[0] for p in (0.0, 1.5))
    lost = plain.chosen["buy"].sum(dim=0) - fading.chosen["buy"].sum(dim=0)  # (K,)
    assert lost[0] == 0
    assert (lost[1:] > 0).all()


def after_purchase(sim):
    """State before and after each household was shown its best, and who bought what."""
    state = sim.start(MANY, at(MANY))
    slate = best(sim, k=1)
    response, after = sim.respond(state, slate, at(MANY))
    return state, after, response.chosen["buy"][:, 0], slate[:, 0]


@pytest.mark.parametrize("strength", [0.0, 2.0, -1.0])
def test_a_purchase_changes_the_wish_for_its_category_only_and_by_satiation(with_knobs, strength):
    sim = with_knobs(satiation=strength, patience=0.0)
    state, after, bought, item = after_purchase(sim)
    assert bought.sum() > 50
    same = sim.catalog.category == sim.catalog.category[item][:, None]  # (B, N)
    change = (sim.relevance(after).logit() - sim.relevance(state).logit())[bought]
    expected = -strength * same[bought].float()
    torch.testing.assert_close(change, expected, rtol=1e-3, atol=2e-3)


def served(sim, steps=4, rows=MANY):
    """States on the way of households who are shown their best, step by step."""
    state, states = sim.start(rows, at(rows)), []
    slate = sim.relevance(state).topk(5 * steps, dim=1).indices
    for step in range(steps):
        _, state = sim.respond(state, slate[:, 5 * step : 5 * step + 5], at(rows, step))
        states.append(state)
    return states


@pytest.mark.parametrize(
    "knobs", [{}, {"trips": 3}, {"choice": "independent", "trips": 2, "drift": 0.1}], ids=str
)
def test_what_is_in_the_basket_changes_wishes_as_company_says(with_knobs, knobs):
    """On a slate and in the whole catalogue, whatever the steps so far; an empty slot is none."""
    sim = with_knobs(**knobs)
    slate = torch.stack([torch.randperm(60, generator=seeded(i))[:6] for i in range(len(MANY))])
    slate[::3, 2] = EMPTY
    states = served(sim)
    assert (states[-1]["purchases"] > 1).sum() > 20
    for state in states:
        change = sim.habits.company.change(state["basket"])  # (B, N)
        assert (change.abs().max(dim=1).values > 0.01).equal(state["purchases"] > 0)
        expected = sim.preference.logit(state, slate) + change.gather(1, slate.clamp_min(0))
        found = sim._theta(state, slate, sim.preference.logit(state, slate))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert found[slate == EMPTY].eq(-torch.inf).all()
        whole = (sim.preference.logits(state) + change).sigmoid()
        torch.testing.assert_close(sim.relevance(state), whole, rtol=1e-4, atol=1e-5)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_running_sums_are_those_of_the_basket_and_start_anew_with_a_trip(with_knobs):
    sim = with_knobs(choice="independent", trips=3)
    again = False
    for state in served(sim, steps=6):
        basket = state["basket"]
        sums = sim.habits.company.sums(basket, basket != EMPTY)
        torch.testing.assert_close(state["together"], sums, rtol=1e-4, atol=1e-4)
        again |= bool(((state["trip"] > 0) & (state["purchases"] == 0)).any())
    assert again


def test_a_number_for_satiation_or_no_company_leaves_the_constant_alone(with_knobs, fitted, shelf):
    blank = replace(fitted.habits, company=None)
    parts = fitted.preference, blank, fitted.users
    for sim, strength in (
        (with_knobs(satiation=0.0), 0.0),
        (with_knobs(satiation=0.7), 0.7),
        (FittedSimulator(shelf, *parts), fitted.habits.satiation),
    ):
        assert sim.satiation == strength
        state = served(sim, steps=1)[0]
        assert "together" not in state
        taken = sim.catalog.category[state["basket"][:, :1].clamp_min(0)]  # (B, 1)
        same = (sim.catalog.category == taken) & (state["purchases"] > 0)[:, None]
        expected = (sim.preference.logits(state) - strength * same).sigmoid()
        torch.testing.assert_close(sim.relevance(state), expected, rtol=1e-4, atol=1e-5)
    assert with_knobs().satiation is None


def test_what_the_log_says_of_baskets_is_seen_as_a_dynamic(with_knobs):
    moves = Dynamic("satiation", "moves", off=0.0, on=None)
    assert check_dynamics(lambda satiation: with_knobs(satiation=satiation), [moves]) == []


def test_days_until_the_next_trip_come_from_the_hazard(with_knobs, fitted, shelf):
    """Each row's gap is `Returns.gap` of its draws, its trips and its days so far."""
    sim = with_knobs(trips=4, patience=1.0)
    state = sim.start(MANY, at(MANY))
    nothing = torch.full((len(MANY), 1), EMPTY)
    for step in range(3):
        response, after = sim.respond(state, nothing, at(MANY, step))
        profile = fitted.users.profile.double()
        days = profile[:400, 2].exp() - 7
        trips = (profile[:400, 1] + profile[:400, 2]).exp() + step  # as it entered, and since
        days = days + state["time"] - fitted.users.start[:400]
        uniform = at(MANY, step).uniform("return", 3)
        gap = fitted.habits.returns.gap(uniform, state["time"], trips, days)
        torch.testing.assert_close(response.elapsed, gap, rtol=1e-4, atol=1e-3)
        state = after
    assert len(response.elapsed.unique()) > 300
    plain = replace(fitted.habits, returns=None)
    old = FittedSimulator(shelf, fitted.preference, plain, fitted.users, trips=2, patience=1.0)
    response, _ = old.respond(old.start(MANY, at(MANY)), nothing, at(MANY))
    every = torch.exp(-fitted.users.profile[:400, 1])
    expected = return_gap(at(MANY).uniform("return")[:, 0], every)
    torch.testing.assert_close(response.elapsed, expected)


def test_exposure_is_that_of_displays_where_it_was_measured(fitted, shelf, tmp_path):
    parts = fitted.preference, replace(fitted.habits, display=0.4), fitted.users
    shown, same = (FittedSimulator(shelf, *parts, exposure=e) for e in ("display", 0.4))
    slate = best(shown)
    one, other = answer(shown, slate)[0], answer(same, slate)[0]
    assert torch.equal(one.chosen["buy"], other.chosen["buy"])
    assert (one.chosen["buy"] & ~one.organic).any()  # bought because it was shown
    start = shown.start(MANY, at(MANY))
    assert torch.equal(shown.relevance(start), same.relevance(start))
    shown.save(tmp_path / "users")
    assert FittedSimulator.load(tmp_path / "users", shelf, exposure="display").exposure == 0.4
    with pytest.raises(ValueError, match="fitted with exposure=display to a log with a table of"):
        FittedSimulator(shelf, fitted.preference, fitted.habits, fitted.users, exposure="display")


def test_drift_turns_the_recent_taste_of_who_bought_only(with_knobs):
    for drift in (0.0, 1.0):
        state, after, bought, _ = after_purchase(with_knobs(drift=drift))
        moved = (after["recent"] != state["recent"]).any(dim=1)
        assert torch.equal(moved, bought & (drift > 0))


def test_between_trips_the_basket_becomes_past_and_days_go_by(with_knobs):
    sim = with_knobs(trips=2, patience=1.0)  # a trip ends with the first useless slate at latest
    state, after, bought, item = after_purchase(sim)
    response, _ = sim.respond(state, item[:, None], at(MANY))
    back = response.elapsed > 0
    assert back.any()
    assert not response.left.any()
    torch.testing.assert_close(after["time"], state["time"] + response.elapsed.double())
    assert torch.equal(after["trip"], back.long())
    known = after["past"] == item[:, None]  # (B, H)
    rows = back & bought
    was = torch.where(state["past"] == item[:, None], state["count"], 0.0).sum(dim=1)
    now = torch.where(known, after["count"], 0.0).sum(dim=1)
    ago = torch.where(known, after["age"], 0.0).sum(dim=1)
    assert torch.equal(now[rows], was[rows] + 1)
    torch.testing.assert_close(ago[rows], response.elapsed[rows])
    assert after["purchases"][rows].eq(0).all()
    assert after["basket"][rows].eq(EMPTY).all()
    left, _ = sim.respond(after, item[:, None], at(MANY, step=1))
    assert left.left[back].any()  # the second trip is the last


def test_users_enter_as_their_table_says_described_at_once_or_not(with_knobs, monkeypatch):
    """Also where another table is given, as judges have it, and one too large to be kept."""
    sim = with_knobs()
    first = sim.start(MANY, at(MANY))
    sim.users = replace(sim.users, start=sim.users.start + 3.25)
    later = sim.start(MANY, at(MANY))
    assert not torch.equal(first["features"], later["features"])
    monkeypatch.setattr(simulators.fitted, "DESCRIBED", 0)
    for key, value in sim.start(MANY, at(MANY)).items():
        torch.testing.assert_close(value, later[key], rtol=1e-4, atol=1e-4)


def test_fill_puts_purchases_behind_each_other_and_drops_what_does_not_fit():
    basket = torch.tensor([[7, EMPTY, EMPTY], [7, 8, 9]])
    slate = torch.tensor([[1, 2, 3], [4, 5, 6]])
    chosen = torch.tensor([[True, False, True], [False, True, False]])
    full, count = fill(basket, torch.tensor([1, 3]), slate, chosen)
    assert full.tolist() == [[7, 1, 3], [7, 8, 9]]
    assert count.tolist() == [3, 4]


def test_a_household_with_a_full_basket_goes_home(with_knobs):
    sim = with_knobs(choice="independent", exposure=50.0, patience=0.0)
    sim.habits = replace(sim.habits, stop=torch.full_like(sim.habits.stop, -50.0))
    rows, slates = MANY[:20], torch.arange(60).expand(20, 60)
    first, state = sim.respond(sim.start(rows, at(rows)), slates[:, : BASKET - 1], at(rows))
    assert not first.left.any()
    assert sim.respond(state, slates[:, BASKET:], at(rows, 1))[0].left.all()


def test_no_hidden_state_is_observed(fitted, shelf):
    """Users with other wishes and habits but the same past look the same until they answer."""
    wishes, _ = simulators.fitted.restore(simulators.fitted.store(fitted.preference, fitted.habits))
    wishes.bias += 3.0
    habits = replace(fitted.habits, satiation=5.0)
    seen = []
    for model, knobs in ((fitted.preference, fitted.habits), (wishes, habits)):
        sim = FittedSimulator(shelf, model, knobs, fitted.users, patience=0.0)
        env = RecommendVectorEnv(sim, num_envs=50, observation="ids", output="torch")
        first, _ = env.reset(seed=0)
        seen.append((first, env.step(torch.full((50, 1), EMPTY))[0]))
        for name in ("profile", "past", "past_count", "past_age"):  # all of it is in the log
            assert torch.equal(getattr(first, name), getattr(fitted.users, name)[env.user])
    for one, other in zip(*seen, strict=True):
        for f in fields(one):
            assert torch.equal(getattr(one, f.name), getattr(other, f.name)), f.name


def test_what_is_saved_answers_the_same_when_loaded(fitted, shelf, tmp_path):
    fitted.save(tmp_path / "users")
    knobs = {"trips": 3, "patience": 0.5}
    loaded = FittedSimulator.load(tmp_path / "users", shelf, **knobs)
    assert loaded.habits.company is not None
    assert loaded.habits.returns is not None
    parts = fitted.preference, fitted.habits, fitted.users
    ways = served(FittedSimulator(shelf, *parts, **knobs)), served(loaded)
    assert any((state["trip"] > 0).any() for state in ways[0])
    for state, after in zip(*ways, strict=True):
        assert same_tensors(state, after)
    assert np.array_equal(loaded.users.ids, fitted.users.ids)
    assert loaded.users.ids.dtype == fitted.users.ids.dtype
    assert loaded.habits.satiation == fitted.habits.satiation


def test_another_catalogue_is_refused_on_loading(fitted, shelf, tmp_path):
    fitted.save(tmp_path / "users")
    other = replace(shelf, vectors=shelf.vectors.flip(0))
    with pytest.raises(ValueError, match="fitted on another catalogue than the 60 items given"):
        FittedSimulator.load(tmp_path / "users", other)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"patience": 1.5}, r"patience must be a probability in \[0, 1\], got 1.5"),
        ({"patience": float("nan")}, "patience must be"),
        ({"trips": 0}, "trips must be at least 1, got 0"),
        ({"choice": "softmax"}, "choice must be logit, independent or cascade, got 'softmax'"),
        ({"exposure": "shelf"}, "exposure must be a number or display, got 'shelf'"),
    ],
)
def test_wrong_knobs_are_refused(with_knobs, knobs, message):
    with pytest.raises(ValueError, match=message):
        with_knobs(**knobs)


def test_users_of_another_log_and_models_of_another_catalogue_are_refused(shelf, fitted):
    parts = fitted.preference, fitted.habits
    wide = replace(fitted.users, profile=torch.zeros(len(fitted.users), 99))
    with pytest.raises(ValueError, match=r"profiles of .* numbers"):
        FittedSimulator(shelf, *parts, wide)
    short = replace(shelf, ids=shelf.ids[:5])
    with pytest.raises(ValueError, match="prices 60 items, the catalogue has 5"):
        FittedSimulator(short, *parts, fitted.users)
