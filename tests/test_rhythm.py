"""When users come and how much they take: known hazards come back, the past is summed right."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ks_2samp

from simulators.rhythm import (
    LONGEST,
    Memory,
    dawn_of,
    fit_rhythm,
    hour_of,
    waits,
    weekday_of,
)
from simulators.visits import Visits, lines_of, visits_of

MONDAY = 19_723.0  # 2024-01-01


def shoppers(rng, users=150, days=200, chance=None, mean_size=None, hour=None):
    """Visits of users who come each day by a coin of their own, for a geometric basket."""
    chance = rng.uniform(0.1, 0.4, users) if chance is None else np.full(users, chance)
    mean_size = rng.choice([2.0, 8.0], users) if mean_size is None else np.full(users, mean_size)
    came = rng.random((users, days)) < chance[:, None]
    user, day = np.nonzero(came)
    at = rng.normal(18, 1, len(user)).clip(0, 23.9) if hour is None else np.full(len(user), hour)
    size = np.minimum(rng.geometric(1 / mean_size[user]), 60)
    return Visits(user, MONDAY + day + at / 24, size), chance, mean_size


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(0)
    visits, chance, mean_size = shoppers(rng)
    rhythm = fit_rhythm(visits, 150, since=MONDAY + 50, until=MONDAY + 200)
    return rhythm, visits, chance, mean_size


def test_the_calendar_is_that_of_the_wall():
    days = np.array([MONDAY, MONDAY + 5.75, MONDAY + 6 + 23 / 24])
    assert weekday_of(days).tolist() == [0, 5, 6]
    assert hour_of(days).tolist() == [0, 18, 23]
    assert hour_of(np.array([MONDAY + h / 24 for h in range(24)])).tolist() == list(range(24))


def test_memory_is_what_a_loop_sums_up():
    visits, *_ = shoppers(np.random.default_rng(1), users=5, days=20)
    memory = Memory.after(visits, 6)
    for user in range(6):
        mine = visits.user == user
        time, size = visits.time[mine], visits.size[mine]
        assert memory.count[user] == mine.sum()
        if mine.any():
            assert memory.first[user] == time[0]
            assert memory.last[user] == time[-1]
        assert memory.log_size[user] == pytest.approx(np.log(size).sum())
        assert memory.spread[user] == pytest.approx((np.log(size) ** 2).sum())
        assert memory.hours[user].sum() == mine.sum()


def test_users_come_as_often_as_they_did(fitted):
    rhythm, visits, chance, _ = fitted
    memory = Memory.after(visits, 150)
    for waited in (1.0, 3.0):
        told = rhythm.comes(memory, np.full(150, waited), np.full(150, 2))
        assert np.corrcoef(told, chance)[0, 1] > 0.9
        assert told.mean() == pytest.approx(chance.mean(), abs=0.03)


def test_nobody_comes_twice_a_day_who_never_did(fitted):
    rhythm, visits, *_ = fitted
    memory = Memory.after(visits, 150)
    assert rhythm.comes(memory, np.zeros(150), np.full(150, 2)).max() < 0.01


def test_a_weekday_that_all_prefer_is_learnt():
    rng = np.random.default_rng(2)
    visits, *_ = shoppers(rng, chance=0.3)
    saturday = weekday_of(visits.time) == 5
    keep = saturday | (rng.random(len(visits)) < 0.3)
    some = Visits(visits.user[keep], visits.time[keep], visits.size[keep])
    rhythm = fit_rhythm(some, 150, since=MONDAY + 50, until=MONDAY + 200)
    memory = Memory.after(some, 150)
    told = [rhythm.comes(memory, np.full(150, 2.0), np.full(150, d)).mean() for d in range(7)]
    assert np.argmax(told) == 5
    assert told[5] == pytest.approx(0.3, abs=0.05)
    assert told[1] == pytest.approx(0.09, abs=0.04)


def test_sizes_are_those_of_the_user(fitted):
    rhythm, visits, _, mean_size = fitted
    rng = np.random.default_rng(3)
    memory = Memory.after(visits, 150).rows(np.repeat(np.arange(150), 20))
    n = len(memory.last)
    drawn = rhythm.sizes(memory, np.ones(n), np.full(n, 18), np.full(n, 2), rng)
    large = np.repeat(mean_size, 20) > 4
    assert drawn[large].mean() > 2.5 * drawn[~large].mean()
    for some, real in ((large, mean_size > 4), (~large, mean_size < 4)):
        assert ks_2samp(drawn[some], visits.size[real[visits.user]]).statistic < 0.08


def test_hours_are_the_users_own_and_a_second_visit_is_soon():
    early, *_ = shoppers(np.random.default_rng(4), users=60, hour=9.0)
    late, *_ = shoppers(np.random.default_rng(5), users=60, hour=20.0)
    user = np.concatenate([early.user, late.user + 60])
    time = np.concatenate([early.time, late.time])
    both = Visits(user, time, np.concatenate([early.size, late.size]))
    rhythm = fit_rhythm(both, 120, since=MONDAY + 50, until=MONDAY + 200)
    memory = Memory.after(both, 120)
    shares = rhythm.hour_shares(memory, np.zeros(120, np.int64))
    assert np.allclose(shares.sum(axis=1), 1)
    assert (shares[:60, 7:12].sum(axis=1) > 0.6).all()
    assert (shares[60:, 18:23].sum(axis=1) > 0.6).all()
    day = float(np.floor(memory.last.max()))
    today = memory.rows(np.nonzero(memory.last >= day)[0])
    again = rhythm.time(today, day, 0, np.random.default_rng(0))
    assert (again > today.last).all()
    assert (np.floor(again) == day).all()


def test_the_names_of_users_do_not_matter(fitted):
    rhythm, visits, *_ = fitted
    order = np.random.default_rng(6).permutation(150)
    user = order[visits.user]
    rows = np.lexsort((visits.time, user))
    mixed = Visits(user[rows], visits.time[rows], visits.size[rows])
    again = fit_rhythm(mixed, 150, since=MONDAY + 50, until=MONDAY + 200)
    memory, days = Memory.after(visits, 150), (np.full(150, 3.0), np.full(150, 4))
    told = [x.comes(memory, *days) for x in (again, rhythm)]  # users in their old order
    assert np.allclose(told[0], told[1], atol=2e-3)  # whoever is who
    assert np.allclose(again.hours, rhythm.hours)


def test_too_few_visits_say_so():
    few = Visits(np.zeros(5, np.int64), MONDAY + np.arange(5.0), np.ones(5, np.int64))
    with pytest.raises(ValueError, match="100 visits"):
        fit_rhythm(few, 1, since=MONDAY, until=MONDAY + 10)


def test_visits_are_baskets_of_the_catalogue(shop, shelf):
    users = shop.users["user"].to_numpy()
    visits = visits_of(lines_of(shop, shelf.ids, users))
    events = shop.events[shop.events["item"].isin(shelf.ids)]
    by = events.groupby(["user", "basket"])["item"].nunique() if "basket" in events else None
    if by is not None:
        assert len(visits) == len(by)
        assert visits.size.sum() == by.sum()
    assert (np.diff(visits.user) >= 0).all()
    assert (np.diff(visits.time)[np.diff(visits.user) == 0] >= 0).all()


def test_days_are_waited_until_somebody_comes_and_not_beyond_what_is_learnt_from():
    memory = Memory.blank(1)
    memory.note(np.array([0]), np.array([MONDAY + 0.5]), np.array([2]))
    for gap, came, labels in (
        (3, True, [0, 0, 0, 1]),
        (3, False, [0, 0, 0, 0]),  # the log ended
        (LONGEST + 30, True, [0] * (LONGEST + 1)),  # came, but later than is looked at
    ):
        features, label = waits(memory, np.array([gap]), np.array([came]), MONDAY)
        assert label.astype(int).tolist() == labels
        assert len(features) == len(labels)


def test_newcomers_come_at_the_hours_of_the_weekday_and_regulars_at_their_own():
    rng = np.random.default_rng(7)
    visits, *_ = shoppers(rng, users=120, chance=0.3)
    day = np.floor(visits.time)
    weekend = weekday_of(day) >= 5
    at = np.where(weekend, 10.0, 20.0) + rng.normal(0, 0.5, len(day))
    rhythm = fit_rhythm(
        Visits(visits.user, day + at / 24, visits.size), 120, since=MONDAY, until=MONDAY + 200
    )
    shares = rhythm.hour_shares(Memory.blank(2), np.array([2, 6]))
    assert shares[0, 18:23].sum() > 0.8
    assert shares[1, 8:13].sum() > 0.8
    assert rhythm.own > 8  # what users did themselves says little beside the weekday
    own = rng.uniform(7, 21, 120)[visits.user] + rng.normal(0, 0.5, len(day))
    regular = Visits(visits.user, day + own / 24, visits.size)
    assert fit_rhythm(regular, 120, since=MONDAY, until=MONDAY + 200).own < 2


def test_days_begin_when_hardly_anybody_comes():
    rng = np.random.default_rng(0)
    evening = np.round(rng.normal(22.0, 3.0, 4000)) % 24  # many come after midnight
    time = MONDAY + rng.integers(0, 50, 4000) + (evening + 0.5) / 24
    assert 6 <= dawn_of(time) <= 14
    assert dawn_of(time + 6 / 24) == (dawn_of(time) + 6) % 24


def test_a_memory_by_another_clock_is_that_of_visits_by_it():
    rng = np.random.default_rng(1)
    time = np.sort(MONDAY + rng.random(30) * 40)
    visits = Visits(np.zeros(30, np.int64), time, np.ones(30, np.int64))
    turned = Memory.after(visits, 1).by_clock(5)
    direct = Memory.after(Visits(visits.user, time - 5 / 24, visits.size), 1)
    for name in Memory.__dataclass_fields__:
        np.testing.assert_allclose(getattr(turned, name), getattr(direct, name))


def test_hours_follow_those_of_late():
    """Everybody comes at 18, and in the last weeks at 16: so does who comes next."""
    users, weeks = 150, 30
    user = np.repeat(np.arange(users), weeks)
    day = MONDAY + np.tile(np.arange(weeks) * 7, users) + user % 7
    hour = np.where(day >= MONDAY + (weeks - 6) * 7, 16, 18)
    hour = np.where(user % 10 == 0, 34 - hour, hour)  # some the other way round
    visits = Visits(user, day + (hour + 0.5) / 24, np.full(len(user), 2))
    until = MONDAY + weeks * 7.0
    rhythm = fit_rhythm(visits, users, since=MONDAY + 50, until=until)
    assert rhythm.shift[16] > 1.5 > 1 / 1.5 > rhythm.shift[18]
    assert rhythm.shift[3] == pytest.approx(1.0, abs=0.2)
    memory = Memory.after(visits, users)
    shares = rhythm.hour_shares(memory, np.zeros(users, np.int64)).mean(axis=0)
    plain = replace(rhythm, shift=np.ones(24))
    usual = plain.hour_shares(memory, np.zeros(users, np.int64)).mean(axis=0)
    assert shares[16] > 1.3 * usual[16]


def test_who_comes_seldom_is_not_taken_to_come_yet_more_seldom():
    """Days waited before the window count no more than visits before it do."""
    visits, *_ = shoppers(np.random.default_rng(5), users=400, chance=0.02, mean_size=2.0)
    rhythm = fit_rhythm(visits, 400, since=MONDAY + 160, until=MONDAY + 200)
    memory = Memory.after(visits, 400)
    memory = memory.rows(memory.count > 0)
    waited = MONDAY + 200 - np.floor(memory.last)
    came = rhythm.comes(memory, waited, np.full(len(waited), 2))
    assert came.mean() == pytest.approx(0.02, rel=0.2)
