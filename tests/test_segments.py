"""Kinds of users whose purchases are promised wrongly are found, and how sure that is."""

from dataclasses import replace

import numpy as np
import pytest

from simulators.fidelity import priced
from simulators.gate import THRESHOLDS
from simulators.segments import (
    Parts,
    by_prediction,
    candidates,
    clumping,
    parts,
    reliability,
    segment_checks,
    segments,
)
from simulators.trips import trips_from_logs
from sources.logs import Roles

RNG = np.random.default_rng


def test_sums_by_part_and_their_ratio_by_hand():
    found = parts(np.array([1.0, 2, 3, 0]), np.array([2.0, 2, 1, 1]), np.array([0, 0, 1, 1]),
                  np.array([0, 1, 1, 0]), 3)  # fmt: skip
    assert found.real.tolist() == [1, 5, 0]
    assert found.promised.tolist() == [3, 3, 0]
    assert found.ratio[:2].tolist() == pytest.approx([1 / 3, 5 / 3])
    # of part 0: user 0 is off by 1 - 2/3, user 1 by 0 - 1/3
    assert found.error[0] == pytest.approx((2 / 9) ** 0.5 * 2**0.5)  # of two users
    assert found.error[2] == np.inf
    assert found.users.tolist() == [2, 2, 0]
    one_user = parts(np.ones(3), np.full(3, 5.0), np.zeros(3, int), np.zeros(3, int), 1)
    assert one_user.error[0] == np.inf  # nothing is known of others


def test_the_error_of_a_ratio_is_what_other_users_would_have_made_of_it():
    """Users whose purchases go together, drawn a thousand times."""
    rng, users, rows = RNG(0), 60, 600
    user = np.arange(rows) % users
    part = np.zeros(rows, int)
    ratios, errors = [], []
    for _ in range(1000):
        real = rng.poisson(rng.gamma(2.0, 0.5, users)[user])
        found = parts(real.astype(float), np.ones(rows), user, part, 1)
        ratios.append(np.log(found.ratio[0]))
        errors.append(found.error[0])
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.1)
    alone = parts(real.astype(float), np.ones(rows), np.arange(rows), part, 1).error[0]
    assert alone < 0.7 * np.mean(errors)  # as if each row were of another user


def test_the_worst_part_is_the_one_furthest_from_promise_in_either_direction():
    found = Parts(np.array([10.0, 20, 8]), np.array([10.0, 13, 14]), np.array([0.1, 0.1, 0.1]),
                  np.full(3, 50))  # fmt: skip
    g, one = found.worst(np.arange(3))
    assert g == 2
    assert one.value == pytest.approx(8 / 14)
    assert one.low == pytest.approx(8 / 14 * np.exp(-0.196), rel=1e-3)
    many = found.worst(np.arange(3), looks=20)[1]
    assert many.low < one.low
    assert many.high > one.high
    none = Parts(np.zeros(1), np.array([10.0]), np.array([np.inf]), np.array([50]))
    nothing = none.worst(np.zeros(1, int))[1]
    assert (nothing.value, nothing.low) == (0.0, 0.0)
    assert nothing.high == pytest.approx(0.369)


def test_only_parts_that_can_be_told_are_judged_if_there_are_any():
    real, promised = np.array([100.0, 3, 300, 0, 0]), np.array([100.0, 6, 100, 9, 2])
    found = Parts(real, promised, np.array([0.02, 0.6, 0.2, np.inf, np.inf]), np.full(5, 50))
    # 1 and 4 are vague; 2 is wide but far beyond it; 3 was promised nine and bought nothing
    assert candidates(found, np.arange(5), 1.15).tolist() == [0, 2, 3]
    assert candidates(found, np.array([1, 4]), 1.15).tolist() == [1, 4]


def test_chances_that_come_true_lie_on_the_diagonal():
    rng = RNG(1)
    chance = rng.beta(0.5, 5.0, size=(400, 50)).clip(1e-6)
    real = rng.random(chance.shape) < chance
    curve = reliability(chance, real)
    assert sum(p["pairs"] for p in curve) == chance.size
    assert sum(p["pairs"] * p["bought"] for p in curve) == pytest.approx(real.sum())
    inside = [p["low"] <= p["predicted"] <= p["high"] for p in curve]
    assert np.mean(inside) > 0.8
    half = reliability(chance, real & (rng.random(chance.shape) < 0.5))
    big = [p for p in half if p["pairs"] * p["predicted"] > 50]
    assert big
    assert all(p["high"] < p["predicted"] for p in big)


def test_chance_moves_what_users_do_together_more_than_what_each_does_alone():
    rng, rows = RNG(3), 4000
    chance, part = np.full(rows, 0.05), np.arange(rows) % 4
    alone = (rng.random(rows) < chance).astype(float)
    user = np.arange(rows) % 200
    each = np.bincount(part)
    assert clumping(parts(alone, chance, user, part, 4), each) == pytest.approx(1.0, abs=0.15)
    nine = np.repeat((rng.random(rows // 10) < 0.05).astype(float), 10)  # ten rows as one
    together = clumping(parts(nine, chance, np.arange(rows) // 10, part, 4), each)
    assert 1.3 < together < 2.0  # each part has two or three of the ten: 2.5 ** .5
    half = clumping(parts(alone, chance / 2, user, part, 4), each)
    assert half == pytest.approx(1.0, abs=0.15)  # wrong chances are not clumps
    assert clumping(parts(nine * 0, chance, user, part, 4), each) == 1.0


def test_the_error_that_true_chances_have_is_that_of_draws():
    rng = RNG(4)
    chance = rng.beta(0.3, 20.0, size=(800, 40))
    user, none = np.arange(800) % 100, np.zeros(chance.shape, bool)
    real = rng.random(chance.shape) < chance
    _, promised = by_prediction(chance, real, user)
    order = np.argsort(chance.ravel(), kind="stable")

    def error(drawn):
        gaps = (drawn - chance).ravel()[order].reshape(100, -1).sum(axis=1)
        return np.abs(gaps).sum() / real.sum()

    drawn = [error(rng.random(chance.shape) < chance) for _ in range(30)]
    assert promised == pytest.approx(np.mean(drawn), rel=0.15)
    assert by_prediction(chance, none, user)[0].real.sum() == 0


@pytest.fixture(scope="module")
def held(fitted, shop, shelf):
    trips = trips_from_logs(shop, shelf.ids, since=shelf.as_of)
    return priced(fitted.preference, trips[~np.isnan(trips.gap)])


@pytest.fixture(scope="module")
def regions(shop):
    """The shop, of whose users half live in the north; of every ninth it is not known."""
    user = shop.users["user"].to_numpy()
    region = np.where(user % 9 == 0, None, np.where(user % 2, "north", "south"))
    users = shop.users.assign(region=region, same="all")
    return replace(shop, users=users, roles=Roles(user_category=("region", "same")))


def test_users_are_told_apart_by_the_columns_that_differ(regions):
    found = segments(regions, np.array([1, 2, 9, 1]))
    assert list(found) == ["region"]
    assert found["region"].tolist() == ["north", "south", "not known", "north"]


def test_a_kind_of_users_that_is_promised_half_is_found(held, regions):
    limits = {"segment": 1.4}
    checks, table, notes = segment_checks(held, regions, limits)
    assert notes == []
    assert {row["segment"] for row in table} == {
        "region: north", "region: south", "region: not known"
    }  # fmt: skip
    user = held.trips.user.astype(int)
    assert sum(row["users"] for row in table) == len(np.unique(user))
    assert sum(row["bought"] for row in table) == held.bought.sum()
    north = (user % 2 == 1) & (user % 9 != 0)
    theta = held.theta.clone()
    theta[north] -= np.log(3.0)
    (wrong,), _, _ = segment_checks(replace(held, theta=theta), regions, limits)
    assert wrong.passed is False
    assert wrong.value > 2
    assert "region: north" in wrong.said
    assert checks[0].value < 1.5


def test_kinds_of_a_few_users_are_not_looked_at(held, regions):
    own = regions.users["user"].to_numpy()
    users = regions.users.assign(region=np.where(own == 3, "Malta", "north"))
    alone = segment_checks(held, replace(regions, users=users), {"segment": 1.4})[1]
    assert [row["segment"] for row in alone] == ["region: north"]


def test_a_log_without_kinds_of_users_has_no_such_line(held, shop):
    checks, table, notes = segment_checks(held, shop, THRESHOLDS)
    assert (checks, table) == ([], [])
    assert "no kinds of users" in notes[0]
