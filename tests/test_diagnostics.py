"""A verdict says what a log can answer, in numbers that merge and reasons that can be read."""

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import diagnostics
from evaluation.diagnostics import KEPT, WeightSums, judge

DATA = Path(__file__).parent / "data" / "ope"


def weights(n: int, seed: int = 0, spread: float = 0.5) -> np.ndarray:
    """Log-normal, of mean 1, (n,)."""
    return np.exp(np.random.default_rng(seed).normal(size=n) * spread - spread**2 / 2)


def same(one: WeightSums, two: WeightSums) -> bool:
    """Alike up to the order of addition and of the largest weights."""
    for each in fields(WeightSums):
        a, b = getattr(one, each.name), getattr(two, each.name)
        if each.name == "top":
            a, b = np.sort(a), np.sort(b)
        if not np.allclose(a, b, rtol=1e-12):
            return False
    return True


# Sums


def test_sums_are_those_of_the_rows_over_several_chunks() -> None:
    n = 150_000
    w, rng = weights(n, spread=1.5), np.random.default_rng(1)
    r, covered = rng.random(n) - 0.3, rng.random(n)
    sums = WeightSums.of(w, r, covered)
    expected = {
        "n": n, "sw": w.sum(), "sw2": (w**2).sum(), "sr": r.sum(), "swr": (w * r).sum(),
        "sw2r": (w**2 * r).sum(), "sw2r2": (w**2 * r**2).sum(), "minimum": w.min(),
        "maximum": w.max(), "reward_low": r.min(), "reward_high": r.max(),
        "covered": covered.sum(), "covered_n": n,
    }  # fmt: skip
    for name, value in expected.items():
        assert getattr(sums, name) == pytest.approx(value, rel=1e-10), name
    assert np.array_equal(np.sort(sums.top), np.sort(w)[-KEPT:])
    assert sums.counts.sum() == n
    assert sums.counts[65] == ((w >= 1) & (w < 2)).sum()
    assert sums.counts[63] == ((w >= 0.25) & (w < 0.5)).sum()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 60), min_size=2, max_size=2))
def test_sums_merge_in_any_grouping_and_order(seed: int, cuts: list[int]) -> None:
    w, (r, mass) = weights(60, seed), np.random.default_rng(seed).random((2, 60))
    whole, first = WeightSums.of(w, r, mass), min(cuts)
    pieces = zip(*(np.split(column, sorted(cuts)) for column in (w, r, mass)), strict=True)
    parts = [WeightSums.of(*piece) for piece in pieces]
    assert same((parts[0] + parts[1]) + parts[2], whole)
    assert same(parts[2] + (parts[1] + parts[0]), whole)
    assert same(WeightSums() + whole, whole)
    assert same(parts[0].update(w[first:], r[first:], mass[first:]), whole)


def test_merging_keeps_the_largest_of_both() -> None:
    w = weights(3 * KEPT, spread=1.0)
    parts = [WeightSums.of(w[i::3], w[i::3]) for i in range(3)]
    merged = parts[0] + parts[1] + parts[2]
    assert np.array_equal(np.sort(merged.top), np.sort(w)[-KEPT:])


def test_float32_and_strided_columns_are_summed_in_float64() -> None:
    w = weights(1000).astype(np.float32)
    pair = np.stack([w, w], axis=1)
    sums = WeightSums.of(pair[:, 0], pair[:, 1])
    assert sums.sw2 == pytest.approx((w.astype(float) ** 2).sum(), rel=1e-12)


def test_ess_mean_and_maximum_equal_the_reference() -> None:
    for name in ("bandit_binary", "bandit_continuous_reward", "bandit_position"):
        z = np.load(DATA / f"{name}.npz")
        rows = np.arange(len(z["action"]))
        slot = z["position"] if "position" in z else np.zeros(len(rows), dtype=int)
        w = z["action_dist"][rows, z["action"], slot] / z["pscore"]
        found = judge(WeightSums.of(w, z["reward"]))
        expected = json.loads((DATA / f"{name}.json").read_text())["expected"]["helper"]
        assert found.ess == pytest.approx(expected["ess"], rel=1e-9)
        assert found.mean_weight == pytest.approx(expected["iw_mean"], rel=1e-9)
        assert found.max_weight == pytest.approx(expected["iw_max"], rel=1e-9)
        assert found.max_share == pytest.approx(w.max() / w.sum())


@pytest.mark.parametrize("shape", [0.1, 0.5, 0.9])
def test_pareto_k_finds_the_shape_of_a_tail(shape: float) -> None:
    rng = np.random.default_rng(3)
    found = [
        diagnostics.pareto_k(WeightSums.of(x, x))
        for x in (rng.random((20, 100_000)) ** -shape - 1) / shape
    ]
    assert np.mean(found) == pytest.approx(shape, abs=0.05)


def test_pareto_k_needs_a_tail() -> None:
    for w in (np.ones(1000), np.zeros(1000), weights(20), np.repeat([0.0, 3.0], [999, 1])):
        assert math.isnan(diagnostics.pareto_k(WeightSums.of(w, w)))
    assert math.isnan(diagnostics.pareto_k(WeightSums()))


def test_ccdf_is_the_part_of_weights_at_or_above() -> None:
    w = np.append(weights(9000, spread=2.0), np.zeros(1000))
    at, part = diagnostics.ccdf(WeightSums.of(w, w))
    assert (np.diff(at) >= 0).all()
    assert len(at) > KEPT
    assert part == pytest.approx((w >= at[:, None]).mean(axis=1))


# Verdicts


def test_full_partial_and_no_support_have_the_three_verdicts() -> None:
    """The target takes an item with chance 1; the log shows it to a part of the users, or never."""
    n, rng = 20_000, np.random.default_rng(0)
    expected = {1.0: "identified", 0.3: "partially identified", 0.0: "not identified"}
    for mass, verdict in expected.items():
        shown = np.arange(n) < mass * n
        w = np.where(shown & (rng.random(n) < 0.1), 10.0, 0.0)
        for covered in (None, shown.astype(float)):
            found = judge(WeightSums.of(w, np.ones(n), covered))
            assert found.verdict == verdict
            assert found.covered_exact == (covered is not None)
            assert found.covered_mass == pytest.approx(mass, abs=0.03)
            assert found.covered_low <= mass <= found.covered_high
            assert bool(found.reasons) == (verdict != "identified")


def test_the_logging_policy_itself_is_identified() -> None:
    found = judge(WeightSums.of(np.ones(150), np.zeros(150)))
    assert (found.verdict, found.z, found.ess, found.reasons) == ("identified", 0.0, 150.0, ())


@pytest.mark.parametrize(
    ("w", "verdict", "reason"),
    [
        (weights(4000) * 0.9, "partially identified", "covered mass 0.8.* below 0.99"),
        (weights(4000) * 1.05, "partially identified", "check the logged propensities"),
        (weights(500, 1, 1.5) * 1.4, "partially identified", "further than 0.1 from 1"),
        (weights(99), "partially identified", "effective sample size [0-9]+ is below 100: soften"),
        (np.append(np.full(300, 0.93), 21.0), "partially identified", "one unit has 7 %"),
        (np.zeros(50), "not identified", "covered mass 0 is below 0.001"),
        (np.full(5000, 0.0009), "not identified", "covered mass 0.0009"),
    ],
)
def test_each_failing_threshold_is_a_reason(w: np.ndarray, verdict: str, reason: str) -> None:
    found = judge(WeightSums.of(w, np.ones(len(w))))
    assert found.verdict == verdict
    assert any(re.search(reason, said) for said in found.reasons)


def test_mean_weight_off_one_is_never_identified_however_certain_the_support() -> None:
    w = weights(50_000) * 0.97
    found = judge(WeightSums.of(w, w, np.ones(len(w))))
    assert (found.covered_mass, found.verdict) == (1.0, "partially identified")
    assert found.z < -3.29
    assert found.mean_weight_low < found.mean_weight < found.mean_weight_high < 1.0


def test_an_estimated_mass_below_the_threshold_by_chance_is_no_reason() -> None:
    w = weights(400, spread=0.8)
    w = w * 0.96 / w.mean()
    assert judge(WeightSums.of(w, w)).verdict == "identified"
    exact = judge(WeightSums.of(w, w, np.full(400, 0.96)))
    assert exact.verdict == "partially identified"
    assert "covered mass 0.960 is below 0.99" in exact.reasons[0]


def test_the_error_of_clustered_units_can_be_given() -> None:
    w = weights(4000) * 1.05
    alone = judge(WeightSums.of(w, w))
    clustered = judge(WeightSums.of(w, w), mean_weight_error=0.05)
    assert alone.verdict == "partially identified"
    assert clustered.verdict == "identified"
    assert clustered.z == pytest.approx((alone.mean_weight - 1) / 0.05)


def test_no_rows_have_no_verdict_but_withheld() -> None:
    assert judge(WeightSums()).verdict == "not identified"
    assert judge(WeightSums.of(np.zeros(1), np.zeros(1))).verdict == "not identified"


# Bounds and calibration


@pytest.mark.parametrize(
    ("ips", "mass", "expected"),
    [
        (0.473, 1.0, (0.473, 0.473)),
        (0.149, 0.317, (0.149, 0.832)),
        (0.0, 0.0, (0.0, 1.0)),
        (0.008, 0.012, (0.008, 0.996)),
    ],
)
def test_worst_case_bounds_equal_known_answers(
    ips: float, mass: float, expected: tuple[float, float]
) -> None:
    assert diagnostics.bounds(ips, mass, (0.0, 1.0)) == pytest.approx(expected)


def test_bounds_widen_by_what_is_not_certain() -> None:
    low, high = diagnostics.bounds(0.2, 0.5, (0.0, 1.0), std_error=0.05)
    assert (low, high) == pytest.approx((0.2 - 0.098, 0.7 + 0.098), abs=1e-4)
    assert diagnostics.bounds(0.2, (0.4, 0.6), (0.0, 1.0)) == pytest.approx((0.2, 0.8))
    assert diagnostics.bounds(2.2, (0.4, 0.6), (2.0, 5.0)) == pytest.approx((3.0, 5.0))
    with pytest.raises(ValueError, match="reward_range"):
        diagnostics.bounds(0.0, 0.5, (1.0, 0.0))


def test_calibration_tells_right_from_wrong_probabilities() -> None:
    rng, n, actions = np.random.default_rng(0), 5000, 6
    logits = rng.normal(size=(n, actions))
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    action = (probs.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    right = diagnostics.calibration(probs, action)
    sharp = probs**3 / (probs**3).sum(axis=1, keepdims=True)
    wrong = diagnostics.calibration(sharp, action)
    assert right.ece < 0.01 < 0.05 < wrong.ece
    assert right.brier < wrong.brier
    assert right.count.sum() == n * actions
    assert right.predicted @ right.count / n == pytest.approx(1.0)
    assert right.observed @ right.count / n == pytest.approx(1.0)


def test_calibration_of_a_worked_example() -> None:
    probs = np.array([[0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.8, 0.2]])
    found = diagnostics.calibration(probs, np.array([0, 0, 1, 1]))
    assert found.ece == pytest.approx(0.3)
    assert found.brier == pytest.approx((0.08 + 0.08 + 1.28 + 1.28) / 4)
    assert (found.predicted, found.observed) == (
        pytest.approx([0.2, 0.8]),
        pytest.approx([0.5, 0.5]),
    )
    with pytest.raises(ValueError, match="got 0 rows"):
        diagnostics.calibration(np.empty((0, 2)), np.empty(0, dtype=int))
