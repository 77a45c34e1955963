"""Features of visits by hand, distances of known size, a judge that finds what there is to find."""

import numpy as np
import pandas as pd
import pytest
import torch

from encoders.state import EMPTY
from simulators.base import Catalog, UserTable
from simulators.realism import (
    FEATURES,
    auc,
    difference,
    jensen_shannon,
    ks,
    over_users,
    spread,
    told_apart,
    visit_features,
)
from simulators.rhythm import Memory
from simulators.visits import Lines

MONDAY = 19_723.0  # 2024-01-01
LN = np.log1p


def small_catalog():
    """Four items in two categories; 0 and 1 alike, 2 across, 3 the opposite of 0."""
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    return Catalog(
        ids=np.arange(4), texts=list("abcd"), vectors=vectors, category=torch.tensor([0, 0, 1, 1]),
        price=torch.ones(4), popularity=torch.tensor([0.4, 0.3, 0.2, 0.1]), as_of=MONDAY,
        category_names=["x", "y"],
    )  # fmt: skip


def one_user():
    """Bought item 0 ten days before Monday."""
    return UserTable(
        ids=np.array([7]), profile=torch.zeros(1, 4), past=torch.tensor([[0, EMPTY]]),
        past_count=torch.tensor([[1.0, 0.0]]), past_age=torch.tensor([[10.0, 0.0]]),
        start=torch.tensor([MONDAY], dtype=torch.float64),
    )  # fmt: skip


def two_visits():
    """Tuesday noon: 0 and 2. Thursday 18:00: 1, 2 and 3."""
    memory = Memory.blank(1)
    memory.note(np.array([0]), np.array([MONDAY - 10]), np.array([1]))
    time = np.array([1.5, 1.5, 3.75, 3.75, 3.75]) + MONDAY
    lines = Lines(
        np.zeros(5, np.int64), np.array([0, 0, 1, 1, 1]), time, np.array([0, 2, 1, 2, 3]),
        np.array([2.0, 4.0, 1.0, 4.0, 1.0]), np.array([2.0, 4.0, 1.0, 4.0, 1.0]),
        np.array([0.0, 0.5, 0.0, 0.0, 0.2]),
    )  # fmt: skip
    return visit_features(lines, small_catalog(), one_user(), memory)


def test_features_by_hand():
    first, second = two_visits().to_dict("records")
    expected = {
        "size": 2, "spend": LN(6.0), "categories": 2, "repeats": 0.5, "repeat_age": LN(11.5),
        "top_items": 1.0, "hour": 12, "weekday": 1, "gap": LN(11.5), "discount": 0.5,
        "price": np.log(8.0) / 2, "entropy": np.log(2), "within": 0.0,
        "to_history": 1 / np.sqrt(2), "new_category": 0.5,
    }  # fmt: skip
    for name in FEATURES:
        assert first[name] == pytest.approx(expected[name]), name
    expected = {
        "size": 3, "spend": LN(6.0), "categories": 2, "repeats": 1 / 3, "repeat_age": LN(2.25),
        "hour": 18, "weekday": 3, "gap": LN(2.25), "discount": 1 / 3, "within": -1 / 3,
        "to_history": 0.0, "new_category": 0.0,
        "entropy": -(1 / 3 * np.log(1 / 3) + 2 / 3 * np.log(2 / 3)),
    }  # fmt: skip
    for name, value in expected.items():
        assert second[name] == pytest.approx(value, abs=1e-12), name


def test_what_a_log_without_prices_cannot_tell_is_nan():
    memory = Memory.blank(1)
    nan = np.full(1, np.nan)
    line = Lines(np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([MONDAY + 0.5]),
                 np.array([3]), np.ones(1), nan, nan)  # fmt: skip
    (row,) = visit_features(line, small_catalog(), one_user(), memory).to_dict("records")
    for name in ("price", "discount", "within", "gap", "repeat_age"):
        assert np.isnan(row[name]), name
    assert row["repeats"] == 0
    assert row["size"] == 1


def test_two_items_of_a_category_that_is_new_are_both_new():
    memory, nan, two = Memory.blank(1), np.full(2, np.nan), np.zeros(2, np.int64)
    lines = Lines(two, two, np.full(2, MONDAY + 0.5), np.array([2, 3]), np.ones(2), nan, nan)
    (row,) = visit_features(lines, small_catalog(), one_user(), memory).to_dict("records")
    assert row["new_category"] == 1
    assert row["repeats"] == 0


def test_distances_of_known_size():
    assert ks(np.arange(10.0), np.arange(10.0)) == 0
    assert ks(np.zeros(5), np.ones(5)) == 1
    assert ks(np.array([1.0, 2, 3, 4]), np.array([3.0, 4, 5, np.nan, 6])) == pytest.approx(0.5)
    assert jensen_shannon(np.array([2.0, 2]), np.array([5.0, 5])) == pytest.approx(0)
    assert jensen_shannon(np.array([3.0, 0]), np.array([0, 7.0])) == pytest.approx(1)
    p, q = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    m = (p + q) / 2
    by_hand = (p * np.log2(p / m)).sum() / 2 + (q * np.log2(q / m)).sum() / 2
    assert jensen_shannon(p, q) == pytest.approx(by_hand)
    assert difference(np.array([1.0, np.nan]), np.array([3.0, 4.0])) == pytest.approx(2.5)


def test_auc_counts_pairs():
    rng = np.random.default_rng(0)
    score, label = rng.integers(0, 5, 60).astype(float), rng.integers(0, 2, 60)
    one, zero = score[label == 1], score[label == 0]
    pairs = (one[:, None] > zero).mean() + 0.5 * (one[:, None] == zero).mean()
    assert auc(score, label) == pytest.approx(pairs)
    assert np.isnan(auc(score, np.ones(60)))


def drawn(rng, users=150, **shift):
    """Visits of users that differ from each other; `shift` moves a feature of all."""
    user = np.sort(rng.integers(0, users, 1200))
    own = np.random.default_rng(5).normal(size=users)[user]
    table = {name: own + rng.normal(size=1200) for name in FEATURES}
    for name, by in shift.items():
        table[name] = table[name] + by
    return pd.DataFrame(table | {"user": user, "time": 0.0})


def test_a_judge_cannot_tell_two_draws_of_one_world_apart():
    rng = np.random.default_rng(1)
    found, _ = told_apart(drawn(rng), drawn(rng), rng)
    assert found.low - 0.02 < 0.5 < found.high + 0.02
    assert abs(found.value - 0.5) < 0.05


def test_a_judge_finds_what_differs_and_says_what_it_was():
    rng = np.random.default_rng(2)
    found, looks = told_apart(drawn(rng), drawn(rng, gap=1.0), rng)
    assert found.low > 0.65
    assert next(iter(looks)) == "gap"
    weak, _ = told_apart(drawn(rng), drawn(rng, gap=0.4), rng)
    assert 0.5 < weak.value < found.value


def test_a_judge_is_asked_about_users_it_has_not_learnt_from():
    """Users known by a number of their own, on one side only: no use on other users."""
    rng = np.random.default_rng(3)
    real, simulated = drawn(rng), drawn(rng)
    mark = np.random.default_rng(9).permutation(150) * 1.0
    real["price"], simulated["price"] = mark[real["user"]], mark[simulated["user"]]
    real = real[real["user"] % 2 == 0]  # the number of a user tells the side
    simulated = simulated[simulated["user"] % 2 == 1]
    found, _ = told_apart(real, simulated, rng)
    assert found.value < 0.6


def test_the_spread_of_samples_is_put_about_the_figure():
    found = spread(0.03, [0.05, 0.06, 0.07])
    assert found.value == 0.03
    assert found.low == pytest.approx(0.0205)
    assert found.high == pytest.approx(0.0395)


def test_intervals_are_over_users():
    rng = np.random.default_rng(4)
    real, simulated = drawn(rng), drawn(rng, size=0.5)
    figures = {"a": ("size", difference), "b": ("size", ks)}
    found = over_users(figures, real, simulated, rng)
    assert found["a"].low < found["a"].value < found["a"].high
    near = over_users(figures, drawn(rng), drawn(rng), rng)["b"]  # a distance of nearly nothing
    assert near.low < near.value < near.high
    assert near.value - near.low == pytest.approx(near.high - near.value, rel=1.0)
    assert found["a"].value == pytest.approx(difference(real["size"], simulated["size"]))
    # a user's visits are alike, so 1200 visits of 12 users say less than of 150
    few = [table.assign(user=table["user"] % 12) for table in (real, simulated)]
    own = np.random.default_rng(6).normal(size=12) * 2
    few = [t.assign(size=t["size"] + own[t["user"]]) for t in few]
    fewer = over_users({"a": ("size", difference)}, *few, rng)["a"]
    assert fewer.high - fewer.low > found["a"].high - found["a"].low
