"""Intervals equal known numbers, cover known truths, and are no wider than they must be."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stdtrit

from evaluation import intervals
from evaluation.diagnostics import WeightSums, judge

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


# Worlds of known truth: few cells (context, action), so that a log is a draw of their counts


@dataclass(frozen=True)
class World:
    """Cells (M,): chance that a row is logged there, weight, mean reward; model and its value."""

    chance: np.ndarray
    weight: np.ndarray
    mean: np.ndarray
    q: np.ndarray
    v: np.ndarray

    @property
    def truth(self) -> float:
        return float((self.chance * self.weight * self.mean).sum())


def world(square: float, contexts: int = 6, actions: int = 10) -> World:
    """World with E[w^2] = square, by the temperature of the target."""
    rng = np.random.default_rng(5)
    behaviour = 1.5 * rng.normal(size=(contexts, actions))
    taste = rng.normal(size=(contexts, actions))
    mean = 0.1 + 0.8 * rng.random((contexts, actions))
    q = np.clip(mean + rng.normal(size=mean.shape) * 0.15, 0, 1)
    pi_b = np.exp(behaviour) / np.exp(behaviour).sum(axis=1, keepdims=True)

    def target(sharp: float) -> np.ndarray:
        logits = behaviour + sharp * taste
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    low, high = 0.0, 20.0
    for _ in range(60):
        sharp = (low + high) / 2
        spread = (target(sharp) ** 2 / pi_b).sum(axis=1).mean()
        low, high = (sharp, high) if spread < square else (low, sharp)
    pi = target(low)
    v = np.repeat((pi * q).sum(axis=1), actions)
    return World((pi_b / contexts).ravel(), (pi / pi_b).ravel(), mean.ravel(), q.ravel(), v)


def logs(w: World, n: int, repetitions: int, seed: int) -> np.ndarray:
    """Counts (repetitions, M, 2) of rows of each cell with reward 0 and 1."""
    rng = np.random.default_rng(seed)
    rows = rng.multinomial(n, w.chance / w.chance.sum(), repetitions)
    clicks = rng.binomial(rows, w.mean)
    return np.stack([rows - clicks, clicks], axis=2)


def moments(counts: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample variance of values (M, 2) in each log, (repetitions,)."""
    n = counts[0].sum()
    mean = np.einsum("kmr,mr->k", counts, values) / n
    square = np.einsum("kmr,mr->k", counts, values**2) / n
    return mean, (square - mean**2) * n / (n - 1)


def sums_of(w: World, count: np.ndarray) -> WeightSums:
    """Of one log, counts (M, 2), without listing its rows."""
    rows, clicks, seen = count.sum(axis=1), count[:, 1], count.sum(axis=1) > 0
    return WeightSums(
        n=int(rows.sum()), sw=float(rows @ w.weight), sw2=float(rows @ w.weight**2),
        sr=float(clicks.sum()), swr=float(clicks @ w.weight), sw2r=float(clicks @ w.weight**2),
        sw2r2=float(clicks @ w.weight**2), minimum=float(w.weight[seen].min()),
        maximum=float(w.weight[seen].max()), reward_low=0.0, reward_high=1.0,
    )  # fmt: skip


R = np.array([0.0, 1.0])
LIGHT, HEAVY = world(3.0), world(10.0)


def test_worlds_are_as_heavy_as_they_say() -> None:
    for w, square in ((LIGHT, 3.0), (HEAVY, 10.0)):
        assert (w.chance * w.weight).sum() == pytest.approx(1.0)
        assert (w.chance * w.weight**2).sum() == pytest.approx(square, rel=1e-6)


@pytest.mark.parametrize("n", [300, 2000])
def test_clt_of_doubly_robust_covers_as_it_says_on_the_light_world(n: int) -> None:
    values = LIGHT.v[:, None] + LIGHT.weight[:, None] * (R - LIGHT.q[:, None])
    mean, variance = moments(logs(LIGHT, n, 2000, seed=n), values)
    ends = np.array(
        [intervals.clt(m, math.sqrt(s / n)) for m, s in zip(mean, variance, strict=True)]
    )
    covered = ((ends[:, 0] <= LIGHT.truth) & (LIGHT.truth <= ends[:, 1])).mean()
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("n", [300, 2000])
def test_cressie_read_covers_on_the_heavy_world(n: int) -> None:
    counts = logs(HEAVY, n, 2000, seed=n + 1)
    span = (0.0, float(HEAVY.weight.max()))
    for weight_range in (span, (0.0, math.inf)):
        ends = np.array([intervals.cressie_read(sums_of(HEAVY, c), weight_range=weight_range)
                         for c in counts])  # fmt: skip
        covered = ((ends[:, 0] <= HEAVY.truth) & (HEAVY.truth <= ends[:, 1])).mean()
        assert covered >= 0.94
    assert (ends[:, 1] - ends[:, 0]).mean() < 0.9  # and says something


def test_the_verdict_flags_the_logs_on_which_clt_misses() -> None:
    n = 300
    counts = logs(HEAVY, n, 2000, seed=7)
    mean, variance = moments(counts, HEAVY.weight[:, None] * R)
    half = 1.96 * np.sqrt(variance / n)
    missed = np.abs(mean - HEAVY.truth) > half
    flagged = np.array([judge(sums_of(HEAVY, c)).verdict != "identified" for c in counts])
    assert missed.mean() > 0.06  # 5 % was promised
    assert flagged[missed].mean() > 0.9


def test_snips_bootstrap_is_as_wide_as_the_delta_method_and_covers() -> None:
    """A denominator frozen at its first value made it 1.65 x too wide."""
    n, ratios, covered = 2000, [], 0
    counts, rng = logs(LIGHT, n, 60, seed=11), np.random.default_rng(2)
    for seed, count in enumerate(counts):
        cells = np.repeat(np.arange(count.size), count.ravel())
        rng.shuffle(cells)
        weight, reward = LIGHT.weight[cells // 2], R[cells % 2]
        block = np.arange(n) % 500
        top = in_blocks((weight * reward)[:, None], block, 500)
        bottom = in_blocks(weight[:, None], block, 500)
        low, high, _ = intervals.bootstrap(top, bottom, np.full(500, 4), replicates=400, seed=seed)
        pair = np.stack([weight * reward, weight])
        gradient = intervals.delta_gradient(pair.mean(axis=1), True)
        error = math.sqrt(gradient @ np.cov(pair) @ gradient / n)
        ratios.append((high - low) / (2 * 1.96 * error))
        covered += low <= LIGHT.truth <= high
    assert 0.9 <= np.mean(ratios) <= 1.1
    assert covered >= 51


def test_hoeffding_narrows_by_the_root_of_n() -> None:
    widths = [np.diff(intervals.hoeffding(0.0, n, (0.0, 5.0)))[0] * math.sqrt(n)
              for n in (10, 300, 2000, 10**6)]  # fmt: skip
    assert widths == pytest.approx([widths[0]] * 4)


def test_confidence_sequence_covers_at_all_n_at_once() -> None:
    rng, n, repetitions = np.random.default_rng(9), 2000, 1000
    values = (LIGHT.v[:, None] + LIGHT.weight[:, None] * (R - LIGHT.q[:, None])).ravel()  # (2 M,)
    chance = (LIGHT.chance[:, None] * np.stack([1 - LIGHT.mean, LIGHT.mean], axis=1)).ravel()
    drawn = np.searchsorted(chance.cumsum() / chance.sum(), rng.random((repetitions, n)))
    x = values[drawn]
    seen = np.arange(1, n + 1)
    mean = x.cumsum(axis=1) / seen
    variance = (x**2).cumsum(axis=1) / seen - mean**2
    unit = np.array([intervals.confidence_sequence(0.0, 1.0, int(i))[1] for i in seen])
    missed = (np.abs(mean - LIGHT.truth) > unit * np.sqrt(variance))[:, 99:]
    assert missed.any(axis=1).mean() <= 0.05
    once = 1.96 * np.sqrt(variance / seen)
    assert (np.abs(mean - LIGHT.truth) > once)[:, 99:].any(axis=1).mean() > 0.2  # a clt would not


def test_confidence_sequence_is_tightest_where_it_was_tuned() -> None:
    at = {t: intervals.confidence_sequence(0.0, 1.0, 500, tuned_for=t)[1]
          for t in (50, 300, 450, 500, 550, 800, 5000)}  # fmt: skip
    assert min(at, key=lambda t: at[t]) == 500
    assert at[500] > 1.96 / math.sqrt(500)
