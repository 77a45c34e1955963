"""A fit of users says what it needs, is found again, and sees nothing after the cut."""

from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fitted_users import at, same_tensors
from synthetic import after_cut_replaced

import simulators.fitted
from encoders.state import EMPTY
from simulators.base import SimSpec
from simulators.fit import STARTS, item_facts, moment, starting_points, usual_gap
from simulators.fitted import FittedSimulator
from simulators.trips import trips_from_logs
from sources.logs import Logs

QUICK = {"window": 100.0, "epochs": 1, "hidden": 8}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"window": 0.0}, "window must be above 0 days, got 0.0"),
        ({"window": float("nan")}, "window must be above 0 days, got nan"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"members": 0}, "members must be at least 1, got 0"),
        ({"exposure": "display"}, "comes with no table of promotions"),
    ],
)
def test_a_fit_of_nothing_is_refused_before_the_work(shop, shelf, wrong, said, monkeypatch):
    monkeypatch.setattr(simulators.fitted, "fit_once", None)  # not reached
    with pytest.raises(ValueError, match=said):
        FittedSimulator.fit(SimSpec(shop, shelf), **wrong)


def test_a_fit_needs_a_log(shelf):
    with pytest.raises(ValueError, match="needs logs and a catalogue"):
        FittedSimulator.fit(SimSpec(None, shelf))


def test_too_short_a_log_says_how_much_is_needed(shop, shelf):
    ten = replace(shop, events=shop.events.iloc[:10].reset_index(drop=True))
    with pytest.raises(ValueError, match=r"too few to fit users to \(100 of each.*longer log"):
        FittedSimulator.fit(SimSpec(ten, shelf))
    with pytest.raises(ValueError, match=r"before the window of 9000 days.*smaller window"):
        FittedSimulator.fit(SimSpec(shop, shelf), **QUICK | {"window": 9000.0})


def test_users_with_one_event_are_served_with_an_empty_past(shop, shelf):
    early = shop.events["time"].iloc[-1] - pd.Timedelta(days=75)
    once = shop.events["user"].isin(range(20))
    last = shop.events[once & (shop.events["time"] < early)].drop_duplicates("user", keep="last")
    events = pd.concat([shop.events[~once], last])
    logs = Logs.create(events, shop.items, shop.users, roles=shop.roles)
    sim = FittedSimulator.fit(SimSpec(logs, shelf), **QUICK)
    newcomers = torch.from_numpy(np.isin(sim.users.ids, range(20)))
    assert newcomers.any()
    assert sim.users.past[newcomers].eq(EMPTY).all()
    state = sim.start(newcomers.nonzero()[:, 0], at(newcomers.nonzero()[:, 0]))
    assert sim.relevance(state).isfinite().all()


@pytest.fixture(scope="module")
def quick(shop, shelf):
    return FittedSimulator.fit(SimSpec(shop, shelf), **QUICK)


def test_a_fit_is_found_again_whatever_the_knobs(shop, shelf, quick, monkeypatch):
    monkeypatch.setattr("simulators.fit.fit_model", None)  # would fail if it were asked
    again = FittedSimulator.fit(SimSpec(shop, shelf), **QUICK, patience=0.3)
    assert same_tensors(again.preference.state_dict(), quick.preference.state_dict())
    assert again.fit_key == quick.fit_key
    for other in ({"epochs": 3}, {"window": 90.0}):
        with pytest.raises(TypeError):
            FittedSimulator.fit(SimSpec(shop, shelf), **QUICK | other)


def test_a_broken_fit_is_made_again_with_a_line(shop, shelf, quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RECPLAY_CACHE", str(tmp_path))
    FittedSimulator.fit(SimSpec(shop, shelf), **QUICK)
    (entry,) = tmp_path.glob("fit*")
    entry.write_bytes(entry.read_bytes()[:1000])
    again = FittedSimulator.fit(SimSpec(shop, shelf), **QUICK)
    assert same_tensors(again.preference.state_dict(), quick.preference.state_dict())
    assert "cache of the fitted users is not readable" in capsys.readouterr().err


def test_a_bootstrap_sample_with_another_seed_is_another_model(shop, shelf, quick):
    samples = [
        FittedSimulator.fit(SimSpec(shop, shelf, seed=s, bootstrap=True), **QUICK) for s in (7, 8)
    ]
    rates = [s.preference.log_rate for s in (quick, *samples)]
    assert not torch.equal(rates[0], rates[1])
    assert not torch.equal(rates[1], rates[2])
    sold = [float(rate.exp().sum()) for rate in rates]
    assert sold[1:] == pytest.approx(sold[:1] * 2, rel=0.1)  # of the same shop


def test_shuffling_everything_after_the_cut_changes_no_bit_of_the_fit(
    shop, shelf, quick, monkeypatch
):
    shuffled = after_cut_replaced(shop, moment(shelf.as_of))
    assert not shuffled.events.equals(shop.events)
    monkeypatch.setattr("simulators.fit.cached", lambda key, make, *_, **__: make())
    again = FittedSimulator.fit(SimSpec(shuffled, shelf), **QUICK)
    assert same_tensors(again.preference.state_dict(), quick.preference.state_dict())
    assert torch.equal(again.habits.stop, quick.habits.stop)
    assert again.habits.satiation == quick.habits.satiation
    for f in fields(again.users):
        a, b = getattr(again.users, f.name), getattr(quick.users, f.name)
        assert np.array_equal(a, b), f.name


def test_users_asked_for_are_the_users_served(shop, shelf, quick):
    some = trips_from_logs(shop, shelf.ids, since=shelf.as_of)[np.arange(9)].users()
    sim = FittedSimulator.fit(SimSpec(shop, shelf, users=some), **QUICK)
    assert sim.users.ids.tolist() == some.ids.tolist()
    assert sim.users.start.min() >= shelf.as_of > quick.users.start.max()


def test_each_household_starts_from_a_few_of_its_trips(shop, shelf):
    past = shop.before(moment(shelf.as_of))
    trips = trips_from_logs(past, shelf.ids)
    rows = starting_points(trips, np.random.default_rng(0))
    _, trips_of = np.unique(trips.user, return_counts=True)
    _, starts = np.unique(trips.user[rows], return_counts=True)
    assert np.array_equal(starts, np.minimum(trips_of, STARTS))
    assert len(set(rows)) == len(rows)
    assert not np.array_equal(rows, starting_points(trips, np.random.default_rng(1)))


def test_the_usual_gap_is_the_median_of_days_between_purchases_by_hand():
    day = pd.to_timedelta([0, 4, 14, 0, 6], unit="D")
    events = pd.DataFrame(
        {
            "user": [1, 1, 1, 2, 2],
            "item": ["tea", "tea", "tea", "tea", "salt"],
            "time": pd.Timestamp("2024-01-01") + day,
            "behaviour": "buy",
            "value": 1.0,
        }
    )
    gap = usual_gap(Logs.create(events), np.array(["salt", "tea"])).exp()
    assert gap.tolist() == pytest.approx([7.0, 7.0])  # salt was never bought twice: as the others


def test_facts_weigh_households(shop, shelf):
    """Households with weight 2 count as two, with weight 0 as none."""
    past = shop.before(moment(shelf.as_of))
    half = [u for u in past.users["user"] if u % 2]
    weight = pd.Series(0, index=past.users["user"])
    weight[half] = 1
    rate, trend = torch.zeros(60), (torch.zeros(1, 60), torch.zeros(2))
    one = item_facts(past, shelf, rate, weight, trend)
    other = item_facts(past.only_users(half), shelf, rate, None, trend)
    torch.testing.assert_close(one.source @ one.target.T, other.source @ other.target.T)


@pytest.mark.parametrize(
    ("knob", "value"),
    [("patience", 2.0), ("trips", 0), ("choice", "best"), ("drift", float("nan"))],
)
def test_a_wrong_assumption_is_refused_before_the_fit(shop, shelf, knob, value, monkeypatch):
    monkeypatch.setattr("simulators.fit.fit_model", lambda *_: pytest.fail("fitted first"))
    with pytest.raises(ValueError, match=knob):
        FittedSimulator.fit(SimSpec(shop, shelf, seed=99), **{knob: value})


def test_whatever_goes_into_a_fit_is_in_its_key(shop, shelf):
    keys = {
        FittedSimulator.fit(spec, **QUICK | other).fit_key
        for spec, other in (
            (SimSpec(shop, shelf), {}),
            (SimSpec(shop, shelf, seed=1), {}),
            (SimSpec(shop, shelf, bootstrap=True), {}),
            (SimSpec(shop, shelf), {"window": 90.0}),
            (SimSpec(shop, shelf), {"hidden": 4}),
            (SimSpec(shop, shelf), {"epochs": 2}),
        )
    }
    assert len(keys) == 6
    same = FittedSimulator.fit(SimSpec(shop, shelf), **QUICK, patience=0.4)  # no part of the fit
    assert same.fit_key in keys


def test_displays_are_measured_before_the_cut_on_the_catalogue_where_there_are_any(
    shop, shelf, monkeypatch
):
    with pytest.raises(ValueError, match=r"synthetic comes with no table of promotions.*log_shift"):
        FittedSimulator.fit(SimSpec(shop, shelf), **QUICK, exposure="display")
    seen = []

    def measured(logs, items):
        seen.append((logs.events["time"].max(), items))
        return SimpleNamespace(log_shift=0.3)

    monkeypatch.setattr("simulators.promotions.fit_display_lift", measured)
    grocer = replace(shop, name="complete_journey")
    sim = FittedSimulator.fit(SimSpec(grocer, shelf), **QUICK, exposure="display")
    assert sim.exposure == 0.3
    ((last, items),) = seen
    assert last < moment(shelf.as_of)
    assert items is shelf.ids
    again = FittedSimulator.fit(SimSpec(grocer, shelf), **QUICK, exposure=0.1)
    assert again.exposure == 0.1
    assert len(seen) == 1  # a number needs no promotions
