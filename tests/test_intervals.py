"""Intervals equal known numbers, cover known truths, and are no wider than they must be."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stdtrit

from evaluation import intervals
from evaluation.diagnostics import WeightSums

DATA = Path(__file__).parent / "data" / "ope"
BANDITS = ("bandit_binary", "bandit_continuous_reward", "bandit_position")


def load(name: str) -> tuple[np.ndarray, np.ndarray, dict]:
    """Weights and rewards (n,) of a bandit fixture, and what is expected of them."""
    z = np.load(DATA / f"{name}.npz")
    rows = np.arange(len(z["action"]))
    slot = z["position"] if "position" in z else np.zeros(len(rows), dtype=int)
    weight = z["action_dist"][rows, z["action"], slot] / z["pscore"]
    return weight, z["reward"].astype(float), json.loads((DATA / f"{name}.json").read_text())


# Known numbers


@pytest.mark.parametrize("name", BANDITS)
def test_one_sided_bounds_of_the_reference_are_ends_of_two_sided_intervals(name: str) -> None:
    weight, reward, record = load(name)
    expected, x = record["expected"]["helper"], weight * reward
    n, span = len(x), (0.0, x.max())
    low = {
        "hoeffding": intervals.hoeffding(x.mean(), n, span, 0.1),
        "bernstein": intervals.empirical_bernstein(x.mean(), x.var(ddof=1), n, span, 0.1),
        "student_t": intervals.student_t(x.mean(), x.std(ddof=1) / math.sqrt(n), n, 0.1),
    }
    for kind, (end, _) in low.items():
        assert end == pytest.approx(expected[f"{kind}_lb_d05"], rel=1e-9), kind


def test_half_widths_are_the_right_ones_where_scope_rl_is_wrong() -> None:
    check = json.loads((DATA / "sequential_tabular.json").read_text())["ci_bug_check"]
    n, mean = 1000, check["x_uniform01_n1000_mean"]
    theirs = {name: check[f"scope_{name}"]["95.0% CI (upper)"] - mean
              for name in ("hoeffding", "ttest")}  # fmt: skip
    biggest = theirs["hoeffding"] / math.sqrt(math.log(2 / 0.05) / 2 * n)
    error = theirs["ttest"] / float(stdtrit(n - 1, 0.95))  # they took a quantile of 90 %
    high = intervals.hoeffding(mean, n, (0.0, biggest))[1]
    assert high - mean == pytest.approx(check["correct_hoeffding_halfwidth"], rel=1e-9)
    high = intervals.student_t(mean, error, n)[1]
    assert high - mean == pytest.approx(check["correct_t_halfwidth"], rel=1e-9)


def test_bernstein_of_trajectories_is_the_stored_one_sided_twice() -> None:
    z = np.load(DATA / "sequential_tabular.npz")
    pi_e = z["eval_action_dist"][np.arange(1500), z["action"].ravel()]
    ratio = (pi_e / z["pscore"]).reshape(300, 5).cumprod(axis=1)
    x = (ratio * z["gamma"] ** np.arange(5) * z["reward"]).sum(axis=1)
    stored = json.loads((DATA / "sequential_tabular.json").read_text())["expected"]["pdis"]
    ends = intervals.empirical_bernstein(x.mean(), x.var(ddof=1), 300, (0.0, x.max()), 0.1)
    assert ends[0] == pytest.approx(stored["ci_bernstein"]["95.0% CI (lower)"], rel=1e-9)
    assert ends[1] == pytest.approx(stored["ci_bernstein"]["95.0% CI (upper)"], rel=1e-9)


def test_clt_equals_vowpal_wabbit() -> None:
    weight, reward, _ = load("bandit_binary")
    modern = json.loads((DATA / "modern_on_bandit_binary.json").read_text())["expected"]
    x = weight * reward
    for alpha, ends in modern["vw.gaussian.Interval({})"].items():
        error = x.std(ddof=1) / math.sqrt(len(x))
        assert intervals.clt(x.mean(), error, float(alpha)) == pytest.approx(ends, rel=1e-9)


def test_cressie_read_equals_vowpal_wabbit() -> None:
    weight, reward, _ = load("bandit_binary")
    modern = json.loads((DATA / "modern_on_bandit_binary.json").read_text())["expected"]
    sums = WeightSums.of(weight, reward)
    wmax = 15.765570726708598
    ranges = {"{}": (0.0, math.inf), f"{{'wmin': 0.0, 'wmax': {wmax}}}": (0.0, wmax)}
    for key, weight_range in ranges.items():
        expected = modern[f"vw.cressieread.Estimator({key})"]
        assert intervals.cressie_read_estimate(sums, weight_range) == pytest.approx(
            expected, rel=1e-9
        )
    key = f"vw.cressieread.Interval({{'wmin': 0.0, 'wmax': {wmax}, 'rmin': 0.0, 'rmax': 1.0}})"
    for alpha, ends in modern[key].items():
        ours = intervals.cressie_read(sums, float(alpha), weight_range=(0.0, wmax))
        assert ours == pytest.approx(ends, rel=1e-9)


def optimum(
    w: np.ndarray, g: np.ndarray, budget: float | None = None, sign: int = 0
) -> tuple[float, float]:
    """Value of g (m,) under the p nearest to 1/m, or extreme within a budget; mass of the last."""
    m = len(w)
    constraints = np.stack([np.ones(m), w])
    inverse = np.linalg.pinv(constraints)
    u = inverse @ np.array([0.0, m - w.sum()])  # m p - 1
    if budget is not None:
        free = g - inverse @ (constraints @ g)
        room = budget - u @ u
        u = u + sign * math.sqrt(room) * free / np.linalg.norm(free) if room >= 0 else u * math.nan
    return float((1 + u) @ g / m), float(1 + u[-1]) / m


@pytest.mark.parametrize("scale", [0.4, 0.97, 1.0, 1.3])
@pytest.mark.parametrize("highest", [20.0, math.inf])
def test_cressie_read_from_sums_is_the_optimum_over_rows(scale: float, highest: float) -> None:
    """The quadratic programme of the dual, written out over all rows and the unseen one."""
    weight, reward, _ = load("bandit_binary")
    n = 60
    weight, reward = weight[:n] * scale / weight[:n].mean(), reward[:n]
    top = 1e6 if math.isinf(highest) else highest
    sums, span, close = WeightSums.of(weight, reward), (0.0, highest), 1e-4 if top > 20 else 1e-9
    unseen = top if sums.sw < n else 0.0
    w = np.append(weight, unseen)
    value, mass = optimum(w, w * np.append(reward, reward.mean()))
    if mass >= 0:  # else it is set to 0
        found = intervals.cressie_read_estimate(sums, span)
        assert found == pytest.approx(value, rel=close)
    nearest = (n + 1) * (1 - w.mean()) ** 2 / w.var()
    budget = nearest + float(stdtrit(n, 0.975)) ** 2
    ends = []
    for reward_unseen, sign in ((0.0, -1), (1.0, 1)):
        found_ends = []
        for last in (0.0, top):
            w = np.append(weight, last)
            g = w * np.append(reward, reward_unseen)
            found_ends.append(sign * optimum(w, g, budget, sign)[0])
        ends.append(float(np.clip(sign * np.nanmax(found_ends), 0.0, 1.0)))
    assert intervals.cressie_read(sums, weight_range=span) == pytest.approx(ends, abs=close)


@pytest.mark.parametrize("highest", [20.0, math.inf])
@pytest.mark.parametrize("scale", [0.5, 0.98, 1.0, 1.5])
def test_cressie_read_contributions_and_error_are_those_of_the_estimate(
    scale: float, highest: float
) -> None:
    weight, reward, _ = load("bandit_binary")
    span, n = (0.0, highest), len(weight)
    values = intervals.cressie_read_contributions(weight * scale, reward, span)
    sums = WeightSums.of(weight * scale, reward)
    assert values.mean() == pytest.approx(intervals.cressie_read_estimate(sums, span), rel=1e-12)
    error = intervals.cressie_read_std_error(sums, span)
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(n), rel=1e-9)
    if not 0.9 < scale < 1.1:
        return  # the error is that of a log whose weights average 1
    left_out = [
        intervals.cressie_read_estimate(WeightSums.of(np.delete(weight * scale, i),
                                                      np.delete(reward, i)), span)
        for i in range(n)
    ]  # fmt: skip
    jackknife = math.sqrt((n - 1) * np.var(left_out))
    assert error == pytest.approx(jackknife, rel=0.1)


def test_cressie_read_mirrors_when_rewards_become_costs() -> None:
    weight, reward, _ = load("bandit_binary")
    low, high = intervals.cressie_read(WeightSums.of(weight, reward))
    costs = WeightSums.of(weight, -reward)
    assert intervals.cressie_read(costs, reward_range=(-1.0, 0.0)) == pytest.approx((-high, -low))


def test_cressie_read_without_information_is_the_reward_range() -> None:
    assert intervals.cressie_read(WeightSums()) == (0.0, 1.0)
    assert math.isnan(intervals.cressie_read_estimate(WeightSums()))
    zeros = WeightSums.of(np.zeros(50), np.ones(50))
    assert intervals.cressie_read(zeros) == (0.0, 1.0)
    alike = WeightSums.of(np.ones(50), np.full(50, 0.5))  # the log's own policy
    low, high = intervals.cressie_read(alike, weight_range=(0.0, 10.0))
    assert low <= 0.5 <= high
    assert intervals.cressie_read_estimate(alike) == pytest.approx(0.5)


def test_holm_equals_a_worked_example_and_leaves_out_what_is_withheld() -> None:
    adjusted = intervals.holm(np.array([0.01, 0.04, 0.03, 0.005]))
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = intervals.holm(np.array([0.01, math.nan, 0.6, 0.7]))
    assert adjusted == pytest.approx([0.03, math.nan, 1.0, 1.0], nan_ok=True)
    assert len(intervals.holm(np.array([]))) == 0


def test_p_value_is_the_normal_two_sided() -> None:
    assert intervals.p_value(1.959963984540054, 1.0) == pytest.approx(0.05)
    assert intervals.p_value(-3.2905267314919255, 1.0) == pytest.approx(0.001)
    assert (intervals.p_value(0.0, 0.0), intervals.p_value(0.1, 0.0)) == (1.0, 0.0)
    assert math.isnan(intervals.p_value(math.nan, 1.0))


def test_too_few_units_give_no_interval() -> None:
    assert intervals.student_t(1.0, 0.1, 1) == (-math.inf, math.inf)
    assert intervals.empirical_bernstein(1.0, 0.1, 1, (0, 1)) == (-math.inf, math.inf)
    one = np.ones((1, 1))
    assert intervals.bootstrap(one, None, np.ones(1))[:2] == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: intervals.clt(0.0, 1.0, 95), "alpha must be in"),
        (lambda: intervals.hoeffding(0.0, 10, (1.0, 1.0)), "value_range must be"),
        (lambda: intervals.confidence_sequence(0.0, 1.0, 10, tuned_for=0), "tuned_for"),
        (
            lambda: intervals.cressie_read(WeightSums.of(np.ones(3), np.array([0.0, 1, 5]))),
            "the log has some from 0 to 5",
        ),
        (
            lambda: intervals.cressie_read_estimate(WeightSums.of(np.ones(3), np.ones(3)), (2, 3)),
            "weight_range must hold 1",
        ),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# Block sums


def in_blocks(columns: np.ndarray, block: np.ndarray, size: int) -> np.ndarray:
    """(n, J) summed by block, (size, J)."""
    return np.stack([np.bincount(block, c, minlength=size) for c in columns.T], axis=1)


def test_weights_without_mass_give_nan_and_no_crash() -> None:
    zero = np.zeros((20, 1))
    assert np.isnan(intervals.delta_gradient(np.zeros(2), True)).all()
    assert math.isnan(intervals.bootstrap(zero, zero, np.ones(20))[2])


def test_bootstrap_leaves_out_empty_blocks_and_repeats_itself_by_seed() -> None:
    rng = np.random.default_rng(0)
    top, count = rng.random((50, 2)), np.ones(50)
    padded = np.vstack([top, np.zeros((9, 2))])
    again = intervals.bootstrap(padded, None, np.append(count, np.zeros(9)), seed=4)
    assert again == intervals.bootstrap(top, None, count, seed=4)
    assert again != intervals.bootstrap(top, None, count, seed=5)


def test_bootstrap_draws_clusters_not_units() -> None:
    """Ten copies of each unit: errors are those of the units, not of their copies."""
    rng = np.random.default_rng(1)
    x = rng.random(400)
    block = np.repeat(np.arange(400), 10)
    top = in_blocks(np.repeat(x, 10)[:, None], block, 400)
    count = np.full(400, 10)
    expected = x.std(ddof=1) / 20
    _, _, error = intervals.bootstrap(top, None, count, replicates=2000)
    assert error == pytest.approx(expected, rel=0.08)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 100.0))
def test_scaling_all_weights_leaves_ratio_intervals_as_they_are(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.exponential(size=(40, 1))
    top, count = weight * rng.random((40, 1)), np.ones(40)
    one = intervals.bootstrap(top, weight, count, replicates=50)
    two = intervals.bootstrap(top * scale, weight * scale, count, replicates=50)
    assert one == pytest.approx(two, rel=1e-9)
