"""Households come back when their log says: known hazards and hours are found again and drawn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp, kstest

from simulators.returns import SOON, Returns, _tables, fit_returns
from simulators.rhythm import LONGEST, WAITED, Memory, day_features, hour_of, weekday_of
from simulators.trips import Trips

MONDAY = 19_723.0  # 2024-01-01
UNTIL = MONDAY + 200


def trips_at(times: list[np.ndarray]) -> Trips:
    """Trips of households at these times each, as trips.py describes them."""
    user = np.repeat(np.arange(len(times)), [len(x) for x in times])
    time = np.concatenate(times)
    first = np.repeat([x[0] for x in times], [len(x) for x in times])
    before = np.concatenate([np.arange(len(x)) for x in times])
    days = time - first
    profile = np.zeros((len(time), 4), np.float32)
    profile[:, 1] = np.log((before + 1) / (days + 7))
    profile[:, 2] = np.log(days + 7)
    gap = np.where(before > 0, time - np.append(0.0, time[:-1]), np.nan)
    n, none = len(time), np.zeros((len(time), 1), np.float32)
    return Trips(
        user, time, none.astype(np.int32), none, none, profile, gap.astype(np.float32),
        np.zeros(n + 1, np.int64), np.zeros(0, np.int32),
    )  # fmt: skip


def every(days: np.ndarray, hour: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Households who come on each later day with chance 1 / `days` (U,), around an hour."""
    found = []
    for chance in 1 / days:
        came = np.nonzero(rng.random(200) < chance)[0]
        if len(came):
            moment = (hour + rng.normal(0, 0.3, len(came))) / 24
            found.append(MONDAY + came + moment)
    return found


def drawn(returns: Returns, count: int, trips: float, days: float, time: float = MONDAY + 0.5):
    """Gaps (count,) of alike households."""
    uniform = torch.rand(count, 3, generator=torch.Generator().manual_seed(0))
    same = torch.ones(count, dtype=torch.float64)
    return returns.gap(uniform, time * same, trips * same, days * same)


@pytest.fixture(scope="module")
def weekly():
    """Half of the households come every third day at ten, half every twelfth at six."""
    rng = np.random.default_rng(0)
    often, seldom = np.full(60, 3.0), np.full(60, 12.0)
    trips = trips_at(every(often, 10.0, rng) + every(seldom, 18.0, rng))
    return fit_returns(trips, np.ones(len(trips)), until=UNTIL, rng=rng)


@pytest.mark.parametrize("days", [3.0, 12.0])
def test_a_constant_hazard_is_found_whatever_it_is(weekly, days):
    gap = drawn(weekly, 4000, 200 / days, 200.0).numpy()
    came = np.floor(gap + 0.5).clip(1)  # days: from noon
    assert came.mean() == pytest.approx(days, rel=0.25)  # rates so far are noisy: waits tell too
    assert (came == 1).mean() == pytest.approx(1 / days, abs=0.06)


def test_households_come_back_at_the_hour_of_the_trip_before(weekly):
    for hour, other in ((10.5, 18.5), (18.5, 10.5)):
        time = MONDAY + hour / 24
        gap = drawn(weekly, 2000, 40.0, 200.0, time).double().numpy()
        then = hour_of(time + gap) + 0.5
        near = [(abs(then - x) <= 1.5).mean() for x in (hour, other)]
        assert near[0] > 0.5
        assert sum(near) > 0.85  # the shop is empty at other hours


def test_the_day_is_drawn_by_the_hazard_of_rhythm():
    """By hand: hazards of rhythm.day_features day by day, held against many draws."""
    rng = np.random.default_rng(1)
    width = len(WAITED) + 7 + 6
    day = rng.normal(0, 0.4, width + 1)
    day[len(WAITED) + 7 : -1] = [0.5, 0.3, -0.1, 0.05, 0.2, -0.1]
    day[-1] = -1.0
    returns = _tables(day, np.ones((7, 24)) / 24, np.full(SOON, 0.01))
    trips, known, start = 9.0, 40.0, MONDAY + 3  # a Thursday
    memory = Memory.blank(LONGEST + 1)
    memory.count[:], memory.first[:], memory.last[:] = trips, start - known, start
    waited = np.arange(LONGEST + 1)
    x = day_features(memory, waited, weekday_of(start + waited))
    hazard = 1 / (1 + np.exp(-(x @ day[:-1] + day[-1])))
    chance = hazard * np.cumprod(np.append(1.0, 1 - hazard[:-1]))
    chance /= chance.sum()
    gap = drawn(returns, 40_000, trips, known, start).numpy()
    share = np.bincount(np.floor(gap).astype(int), minlength=LONGEST + 1) / len(gap)
    assert share[0] > 0.01
    assert np.allclose(share, chance, atol=0.012)


def test_gaps_are_those_of_the_log(shop, shelf):
    from simulators.trips import trips_from_logs

    trips = trips_from_logs(shop, shelf.ids, since=shelf.as_of - 120)
    trips = trips[trips.time < shelf.as_of]
    rng = np.random.default_rng(0)
    returns = fit_returns(trips, np.ones(len(trips)), until=shelf.as_of, rng=rng)
    days = np.exp(trips.profile[:, 2].astype(float))
    count = np.exp(trips.profile[:, 1]) * days  # with this one
    uniform = torch.rand(len(trips), 3, generator=torch.Generator().manual_seed(1))
    known = (torch.from_numpy(x) for x in (trips.time, count, days - 7))
    gap = returns.gap(uniform, *known).numpy()
    real = trips.gap[np.isfinite(trips.gap)]
    assert ks_2samp(gap, real).statistic < 0.1
    alike = -np.log(rng.random(len(trips))) * days / count
    assert ks_2samp(gap, real).statistic < ks_2samp(alike, real).statistic


def test_a_second_trip_of_a_day_comes_as_soon_as_in_the_log_and_on_that_day():
    day = np.zeros(len(WAITED) + 14)
    day[0] = 30.0  # everybody comes the same day
    soon = np.linspace(0.02, 0.1, SOON)
    returns = _tables(day, np.ones((7, 24)) / 24, soon)
    gap = drawn(returns, 2000, 5.0, 30.0)
    assert kstest(gap.numpy(), "uniform", (0.02, 0.08)).statistic < 0.05
    late = drawn(returns, 2000, 5.0, 30.0, MONDAY + 0.9)
    assert ((late > 0) & (late <= 0.05 + 1e-6)).all()  # half of what is left


def test_nobody_stays_away_for_longer_than_was_learnt_and_all_draws_are_above_zero(weekly):
    gap = drawn(weekly, 5000, 1.0, 300.0)  # hardly ever
    assert (gap > 0).all()
    assert (gap < LONGEST + 1).all()
    ends = torch.tensor([[1e-7] * 3, [1 - 1e-7] * 3])
    time, one = torch.full((2,), MONDAY + 0.999).double(), torch.ones(2).double()
    low, high = weekly.gap(ends, time, 20 * one, 60 * one)
    assert 0 < low < high < LONGEST + 1


def test_who_hardly_ever_comes_is_followed_as_one_who_returns():
    """A hazard of a thousandth a day: any day alike, and no heap on the last."""
    day = np.zeros(len(WAITED) + 14)
    day[-1] = -6.9
    returns = _tables(day, np.ones((7, 24)) / 24, np.full(SOON, 0.01))
    gap = np.floor(drawn(returns, 20_000, 5.0, 30.0, MONDAY).numpy())
    assert gap.mean() == pytest.approx(LONGEST / 2, rel=0.05)
    assert (gap == LONGEST).mean() < 0.02


def test_hours_are_those_of_the_weekday_that_is_come_on():
    day = np.zeros(len(WAITED) + 14)
    day[[0, -1]] = -30.0, -1.0  # not the same day
    hours = np.full((7, 24), 1e-3)
    hours[:5, 9], hours[5:, 20] = 1e3, 1e3
    returns = _tables(day, hours, np.full(SOON, 0.01))
    then = MONDAY + 0.5 + drawn(returns, 2000, 5.0, 30.0).double().numpy()
    week = weekday_of(then) < 5
    assert 0.5 < week.mean() < 0.95
    assert (hour_of(then)[week] == 9).mean() > 0.99
    assert (hour_of(then)[~week] == 20).mean() > 0.99


def test_each_household_is_drawn_by_itself(weekly):
    uniform = torch.rand(50, 3, generator=torch.Generator().manual_seed(2))
    time = MONDAY + torch.rand(50, generator=torch.Generator().manual_seed(3)).double() * 9
    trips, days = torch.arange(1.0, 51.0).double(), torch.full((50,), 100.0).double()
    whole = weekly.gap(uniform, time, trips, days)
    for row in range(0, 50, 7):
        some = slice(row, row + 1)
        alone = weekly.gap(uniform[some], time[some], trips[some], days[some])
        assert torch.equal(alone, whole[some])


def test_weights_say_whose_gaps_count():
    rng = np.random.default_rng(4)
    often, seldom = every(np.full(80, 2.0), 9.0, rng), every(np.full(80, 12.0), 9.0, rng)
    trips = trips_at(often + seldom)
    mine = (trips.user < len(often)).astype(float)
    fits = [fit_returns(trips, w, until=UNTIL, rng=rng) for w in (mine, 1 - mine)]
    first, second = (drawn(fit, 3000, 30.0, 100.0).mean() for fit in fits)
    assert first < 0.4 * second  # what a household of medium rate does, as told by the others


def test_who_has_not_come_yet_is_learnt_from():
    """Gaps of 40 days, seen for 60: those seen are 22 days long, what they come from are more."""
    rng = np.random.default_rng(5)
    later = rng.geometric(1 / 40, 1500)
    times = [MONDAY + np.arange(2) * x + 0.5 for x in later]
    trips = trips_at([x[x < MONDAY + 60] for x in times])
    assert np.nanmean(trips.gap) < 24
    returns = fit_returns(trips, np.ones(len(trips)), until=MONDAY + 60, rng=rng)
    assert drawn(returns, 3000, 1.0, 0.0).mean() > 29  # 34 where the rest is cut off at 120


def test_too_few_gaps_teach_nothing(weekly):
    trips = trips_at([MONDAY + np.arange(3.0)] * 20)
    assert fit_returns(trips, np.ones(60), until=UNTIL, rng=np.random.default_rng(0)) is None
    once = replace(trips, gap=np.full(60, np.nan, np.float32))
    assert fit_returns(once, np.ones(60), until=UNTIL, rng=np.random.default_rng(0)) is None
