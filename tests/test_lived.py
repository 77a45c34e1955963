"""A world's log is what its households would buy, and the world can be entered where it ends."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from encoders.state import EMPTY
from simulators.base import SimSpec
from simulators.draws import Draws
from simulators.fit import moment
from simulators.lived import as_logged, shopping_log
from simulators.trips import trips_from_logs
from simulators.worlds import TODAY, TinyWorld, wanted_again

DAYS = 200.0


@pytest.fixture(scope="module")
def world():
    return TinyWorld(SimSpec(None, None, seed=1), households=300)


@pytest.fixture(scope="module")
def logs(world):
    return shopping_log(world, days=DAYS, seed=2)


@pytest.fixture(scope="module")
def later(world, logs):
    return trips_from_logs(logs, np.arange(len(world.catalog)), since=TODAY - 30.0)


def test_a_log_ends_today_and_is_the_same_for_the_same_seed(world, logs):
    time = logs.events["time"]
    assert time.max() < moment(TODAY)
    assert time.min() >= moment(TODAY - DAYS)
    again = shopping_log(world, days=DAYS, seed=2)
    assert logs.fingerprint() == again.fingerprint()
    assert logs.fingerprint() != shopping_log(world, days=DAYS, seed=3).fingerprint()
    with pytest.raises(ValueError, match="days must be above 0"):
        shopping_log(world, days=0.0)


def test_households_come_as_often_as_they_do_in_truth(world, logs):
    """Visits that bought nothing are not in the log: those of households that buy much are."""
    visits = logs.events.drop_duplicates("basket").groupby("user").size()
    every = world.truth.every.numpy()
    keen = logs.events.groupby("user").size() / visits > 6.0  # hardly any visit buys nothing
    who = keen.index[keen]
    assert len(who) > 20
    assert visits[who].sum() == pytest.approx((DAYS / every[who.to_numpy()]).sum(), rel=0.1)


def test_items_are_bought_as_often_as_their_chances_say(world, logs, later):
    """What was promised to logged visits, given what each household had bought before."""
    trips = later
    at = torch.from_numpy(trips.user.astype(np.int64))
    n = len(world.catalog)
    count, age = torch.zeros(2, len(trips), n + 1)
    place = torch.where(torch.from_numpy(trips.past).long() == EMPTY, n,
                        torch.from_numpy(trips.past).long())  # fmt: skip
    count = count.scatter(1, place, torch.from_numpy(trips.count))[:, :-1]
    age = age.scatter(1, place, torch.from_numpy(trips.age))[:, :-1]
    truth = world.truth
    theta = truth.bias + world.taste * truth.taste[at] @ world.catalog.vectors.T
    chance = (theta + world.again * wanted_again(count, age, truth.gap)).sigmoid().double()
    some = 1 - (1 - chance).prod(dim=1, keepdim=True)  # a visit is logged if it buys anything
    promised = (chance / some).sum(dim=0).numpy()
    real = np.bincount(trips.bought, minlength=n)
    assert real.sum() == pytest.approx(promised.sum(), rel=0.03)
    assert np.abs(real - promised).max() < 5 * np.sqrt(promised.max())
    assert np.corrcoef(real, promised)[0, 1] > 0.98


def test_the_world_is_entered_as_the_log_leaves_it(world, later):
    users = later[np.unique(later.user, return_index=True)[1]].users()
    served = as_logged(world, users)
    rows = torch.arange(len(users))
    state = served.start(rows, Draws.root(0).at(rows, rows * 0, rows * 0))
    assert torch.equal(state["taste"], world.truth.taste[torch.from_numpy(users.ids.astype(int))])
    past, count, age = (state[k] for k in ("past", "past_count", "past_age"))
    assert (past.diff(dim=1)[past[:, 1:] != EMPTY] > 0).all()  # by item
    for row in range(5):
        told = {i: (c, a) for i, c, a in zip(users.past[row].tolist(),
                users.past_count[row].tolist(), users.past_age[row].tolist(), strict=True)
                if i != EMPTY}  # fmt: skip
        known = {i: (c, a) for i, c, a in zip(past[row].tolist(), count[row].tolist(),
                 age[row].tolist(), strict=True) if i != EMPTY}  # fmt: skip
        assert told == known
    assert torch.equal(served.users.profile, users.profile)
    assert served.users is not world.users  # the world itself is as it was
    assert len(world.users) == 300


def test_what_a_household_of_the_log_wants_is_what_it_would_have_bought(world, later):
    """The chances that the served world gives are those the log was drawn with."""
    rows = np.unique(later.user, return_index=True)[1]
    users = later[rows].users()
    served = as_logged(world, users)
    at = torch.arange(len(users))
    chance = served.relevance(served.start(at, Draws.root(0).at(at, at * 0, at * 0)))
    bought = later[rows].padded()
    wanted = torch.zeros_like(chance)
    row, place = np.nonzero(bought != EMPTY)
    wanted[row, bought[row, place]] = 1.0
    some = 1 - (1 - chance.double()).prod(dim=1, keepdim=True)
    assert wanted.sum().item() == pytest.approx((chance / some).sum().item(), rel=0.1)
    shuffled = as_logged(world, replace(users, ids=np.roll(users.ids, 1)))
    other = shuffled.relevance(shuffled.start(at, Draws.root(0).at(at, at * 0, at * 0)))
    fit = [(wanted * p.clamp(1e-6, 1 - 1e-6).logit()).sum().item() for p in (chance, other)]
    assert fit[0] > fit[1]  # of itself more than of its neighbour
    assert isinstance(users.ids, np.ndarray)
    assert pd.Series(users.ids).is_unique
