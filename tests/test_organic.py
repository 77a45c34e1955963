"""Users who shop alone: their past at a moment, their lines, and a walk that is reproducible."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from encoders.state import EMPTY
from simulators.company import Company
from simulators.fit import moment
from simulators.missions import Missions
from simulators.organic import Bank, _baskets, fit_alone, table_at, walk
from simulators.rhythm import Memory
from simulators.trips import trips_from_logs
from simulators.visits import Lines, lines_of, visits_of
from sources.logs import Logs


@pytest.fixture(scope="module")
def living(fitted, shop, shelf):
    return fit_alone(fitted.preference, shop, shelf, window=120.0)


@pytest.fixture(scope="module")
def walked(living, shop, shelf):
    return on_foot(living, shop, shelf, seed=0)


def on_foot(living, shop, shelf, seed):
    day = float(np.ceil(shelf.as_of))
    users = table_at(shop, shelf.ids, day)
    memory = Memory.after(
        visits_of(lines_of(shop.before(moment(day)), shelf.ids, users.ids)), len(users)
    )
    rng = np.random.default_rng(seed)
    return walk(living, users, memory, until=day + 30, rng=rng), users, memory, day


def test_a_past_at_a_moment_is_that_of_a_trip_at_that_moment(shop, shelf):
    trips = trips_from_logs(shop, shelf.ids, since=shelf.as_of)
    for row in (0, len(trips) // 2, len(trips) - 1):
        table = table_at(shop, shelf.ids, float(trips.time[row]))
        mine = table.ids == trips.user[row]
        if not mine.any():  # the first trip of a newcomer
            continue
        one = int(np.nonzero(mine)[0][0])
        assert table.past[one].tolist() == trips.past[row].tolist()
        assert table.past_count[one].tolist() == trips.count[row].tolist()
        assert np.allclose(table.past_age[one].numpy(), trips.age[row], atol=1e-3)
        assert np.allclose(table.profile[one].numpy(), trips.profile[row], atol=1e-4)


def test_lines_are_those_of_the_log(shop, shelf):
    users = shop.users["user"].to_numpy()
    lines = lines_of(shop, shelf.ids, users)
    bought = shop.events[shop.events["behaviour"].isin(shop.purchases)]
    bought = bought[bought["item"].isin(shelf.ids)]
    visit = "basket" if "basket" in bought else bought["time"].dt.floor("D")
    whole = bought.assign(visit=bought[visit] if isinstance(visit, str) else visit)
    whole = whole.drop_duplicates(["user", "visit", "item"])
    assert len(lines) == len(whole)
    assert lines.value.sum() == pytest.approx(whole["value"].sum())
    assert (np.diff(lines.visit) >= 0).all()
    together = pd.DataFrame({"visit": lines.visit, "user": lines.user, "time": lines.time})
    assert (together.groupby("visit").nunique() == 1).all().all()
    assert (lines.user[1:] >= lines.user[:-1]).all()


def test_a_walk_is_one_of_visits_in_the_days_asked_for(walked, shelf):
    lines, users, _, day = walked
    assert len(lines) > 100
    assert lines.time.min() >= day
    assert lines.time.max() < day + 30
    assert lines.user.max() < len(users)
    assert ((lines.item >= 0) & (lines.item < len(shelf))).all()
    pairs = pd.DataFrame({"visit": lines.visit, "item": lines.item})
    assert not pairs.duplicated().any()
    one = pd.DataFrame({"visit": lines.visit, "user": lines.user, "time": lines.time})
    assert (one.groupby("visit").nunique() == 1).all().all()
    assert np.isfinite(lines.value).all()


def test_the_same_seed_walks_the_same_way_and_leaves_what_it_was_given(walked, living, shop, shelf):
    lines, users, memory, day = walked
    again, *_ = on_foot(living, shop, shelf, seed=0)
    for name in Lines.__dataclass_fields__:
        assert np.array_equal(getattr(lines, name), getattr(again, name), equal_nan=True), name
    assert torch.equal(users.past, table_at(shop, shelf.ids, day).past)
    fresh = table_at(shop, shelf.ids, day)
    assert torch.equal(users.profile, fresh.profile)
    assert torch.equal(users.past_age, fresh.past_age)
    before = lines_of(shop.before(moment(day)), shelf.ids, users.ids)
    assert np.array_equal(memory.count, Memory.after(visits_of(before), len(users)).count)
    different, *_ = on_foot(living, shop, shelf, seed=1)
    assert not np.array_equal(lines.item[:50], different.item[:50])


def test_users_stay_themselves(walked, shelf):
    """Users of this log buy favourites: most of what they take alone they have had before."""
    lines, users, *_ = walked
    past = users.past.numpy()
    known = np.array(
        [i in past[u][past[u] != EMPTY] for u, i in zip(lines.user, lines.item, strict=True)]
    )
    chance = np.mean([(past[u] != EMPTY).sum() / len(shelf) for u in lines.user])
    assert known.mean() > 1.5 * chance


def test_money_comes_from_lines_of_the_same_item():
    rng = np.random.default_rng(0)
    item = np.repeat([0, 2], [5, 100])
    zero = np.zeros(105)
    price = np.where(item == 0, 3.0, rng.uniform(7, 9, 105))
    lines = Lines(zero.astype(int), zero.astype(int), zero, item, 2 * price, price, zero)
    bank = Bank.of(lines, 3, 1.0, rng)
    drawn = bank.draw(np.array([0] * 50 + [2] * 50 + [1] * 50), rng)
    assert (drawn[:50, 1] == 3.0).all()
    assert (drawn[:50, 0] == 6.0).all()
    assert ((drawn[50:100, 1] > 7) & (drawn[50:100, 1] < 9)).all()
    assert len(np.unique(drawn[50:100, 1])) > 10
    assert np.allclose(drawn[:100, 0], 2 * drawn[:100, 1])
    assert np.isfinite(drawn[100:]).all()  # never sold: what lines mostly cost


def test_late_lines_make_the_money_of_an_item():
    rng = np.random.default_rng(0)
    many = 4000
    time = np.arange(many) % 150.0
    one = np.ones(many)
    lines = Lines(one.astype(int), one.astype(int), time, np.arange(many) % 40, one, time, one)
    bank = Bank.of(lines, 40, 150.0, rng)
    ages = 150.0 - bank.lines[:, :, 1][np.arange(32)[None] < bank.held[:, None]]
    assert 25.0 < ages.mean() < 45.0  # 75 if drawn alike; 32 of each 100 without replacement


class Spy:
    """A preference that notes what it is told of users."""

    def __init__(self, preference):
        self.preference, self.bias, self.told = preference, preference.bias, []

    def describe(self, *known):
        self.told.append([x.clone() for x in known])
        return self.preference.describe(*known)

    def logits(self, state):
        return self.preference.logits(state)


def test_what_is_known_before_each_visit_is_what_a_log_of_the_walk_tells(living, shop, shelf):
    """Past, counts, ages and habits go on as trips.py reads them off receipts."""
    spy = Spy(living.preference)
    lines, users, _, day = on_foot(replace(living, preference=spy), shop, shelf, seed=2)
    before = shop.before(moment(day)).events[["user", "item", "time", "behaviour", "value"]]
    before = before.assign(basket=pd.factorize(shop.before(moment(day)).events["basket"])[0])
    later = pd.DataFrame({
        "user": users.ids[lines.user], "item": shelf.ids[lines.item],
        "time": pd.to_datetime(np.round(lines.time * 86_400e6).astype(np.int64), unit="us"),
        "behaviour": "buy", "value": lines.value, "basket": 10**6 + lines.visit,
    })  # fmt: skip
    whole = Logs.create(
        pd.concat([before, later], ignore_index=True), shop.items, shop.users, roles=shop.roles
    )
    trips = trips_from_logs(whole, shelf.ids, since=day)
    profile, past, count, age, time = (torch.cat(x) for x in zip(*spy.told, strict=True))
    assert len(time) == len(trips) == lines.visit[-1] + 1
    order = np.argsort(trips.time, kind="stable")
    mine = torch.argsort(time)
    assert np.allclose(time[mine].numpy(), trips.time[order], atol=1e-6)
    assert np.allclose(profile[mine][:, :4].numpy(), trips.profile[order][:, :4], atol=2e-3)
    for row, trip in zip(mine.tolist(), order.tolist(), strict=True):
        told = {int(i): (float(c), float(a)) for i, c, a in
                zip(past[row], count[row], age[row], strict=True) if i != EMPTY}  # fmt: skip
        real = {int(i): (float(c), float(a)) for i, c, a in
                zip(trips.past[trip], trips.count[trip], trips.age[trip], strict=True)
                if i != EMPTY}  # fmt: skip
        assert told.keys() == real.keys()
        for item, (often, days) in real.items():
            assert told[item][0] == often
            assert told[item][1] == pytest.approx(days, abs=1e-3)


def test_baskets_are_drawn_by_the_logit_of_what_is_wished(living):
    theta = torch.tensor([0.0, 1.0, 2.0]).expand(4000, -1)
    wishes = SimpleNamespace(
        bias=torch.zeros(3), describe=lambda *known: known[0], logits=lambda state: state.clone()
    )
    none = Company(
        torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, 1).long(),
        torch.zeros(10), torch.zeros(3), torch.zeros(2),
    )  # fmt: skip
    alone = replace(
        living,
        preference=wishes,
        company=none,
        missions=Missions(torch.zeros(3).long(), torch.zeros(3, 1), 0.0),
    )
    table = dict.fromkeys(("profile", "past", "count", "age", "time"), theta)
    rng = np.random.default_rng(0)
    rows, size = torch.arange(4000), np.full(4000, 2)
    first, second = _baskets(alone, table, rows, size, rng).T
    assert (first != second).all()
    p = theta[0].softmax(dim=0)
    share = torch.bincount(first, minlength=3) / 4000
    assert torch.allclose(share, p, atol=0.03)
    after = p / (1 - p[2])  # who took the last first
    given = torch.bincount(second[first == 2], minlength=3) / int((first == 2).sum())
    assert torch.allclose(given[:2], after[:2], atol=0.03)


def test_nobody_comes_before_the_walk_begins_or_after_its_end(living, shop, shelf):
    """Though the days of the rhythm begin at an hour of their own."""
    late = replace(living, dawn=7)
    lines, users, _, day = on_foot(late, shop, shelf, seed=3)
    assert float(users.start.min()) == day <= lines.time.min() < day + 1.5
    assert day + 28.5 < lines.time.max() < day + 30


def test_what_a_visit_is_for_is_heeded(living, shop, shelf):
    """A mission that forbids all but one kind of item fills baskets with it."""
    kind = living.missions.kind
    worth = torch.full((3, int(kind.max()) + 1), -50.0)
    worth[2] = 0.0
    worth[:2, 0] = 0.0
    lines, *_ = on_foot(
        replace(living, missions=replace(living.missions, worth=worth)), shop, shelf, seed=0
    )
    assert (kind[torch.from_numpy(lines.item)] == 0).float().mean() > 0.95
