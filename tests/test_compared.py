"""Interquartile means, bands over seeds, intervals with seeds, claims and A/B sizes are right."""

import math

import numpy as np
import pytest

from evaluation.compared import Gap, band, claim, iqm, over_seeds, per_arm
from evaluation.online import by_household, interval


def test_the_iqm_is_the_mean_of_the_middle_half() -> None:
    assert iqm(np.array([100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -50.0])) == pytest.approx(3.5)
    table = np.arange(8.0)[:, None] * np.array([1.0, 10.0])
    assert iqm(table).tolist() == [3.5, 35.0]


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_have_a_curve_but_no_band(seeds) -> None:
    middle, low, high = band(np.array([[[1.0, 2.0]] * seeds]))
    assert middle.tolist() == [1.0, 2.0]
    assert np.isnan(low).all()
    assert np.isnan(high).all()


def test_equal_seeds_leave_nothing_unsure() -> None:
    middle, low, high = band(np.full((1, 5, 3), 0.7))
    assert low.tolist() == middle.tolist() == high.tolist()


def test_the_band_covers_the_mean_of_normal_seeds() -> None:
    rng, inside = np.random.default_rng(0), 0
    for i in range(200):
        _, low, high = band(rng.normal(3.0, 1.0, (1, 20, 1)), replicates=300, seed=i)
        inside += int(low[0] <= 3.0 <= high[0])
    assert 0.87 <= inside / 200 <= 0.99


def test_seeds_are_redrawn_within_their_environment() -> None:
    runs = np.stack([np.zeros((4, 1)), np.ones((4, 1))])  # strata that differ, seeds that do not
    middle, low, high = band(runs)
    assert low[0] == middle[0] == high[0] == pytest.approx(0.5)


@pytest.mark.parametrize("runs", [np.full((1, 2, 2), np.nan), np.zeros((1, 0, 2)),
                                  np.zeros((1, 2, 0))])  # fmt: skip
def test_curves_that_are_none_are_refused(runs) -> None:
    with pytest.raises(ValueError, match="curves must be finite"):
        band(runs)


def sessions(seeds: int, spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rewards (R, 3, 200) with a mean of their own for each seed, and 200 households."""
    rng = np.random.default_rng(seed)
    common = rng.normal(1.0, 1.0, (1, 3, 200))
    own = rng.normal(0.0, spread, (seeds, 1, 1))
    return common + own - own.mean(), np.arange(200)


def test_one_seed_has_the_interval_of_its_sessions() -> None:
    reward, who = sessions(1, 0.0)
    found = over_seeds(reward, who)
    assert (found.mean, found.low, found.high) == pytest.approx(
        interval(by_household(reward[0], who))
    )


def test_seeds_that_differ_widen_the_interval_by_what_they_differ() -> None:
    reward, who = sessions(5, 0.5)
    found, narrow = over_seeds(reward, who), over_seeds(reward.mean(axis=0, keepdims=True), who)
    assert found.mean == pytest.approx(narrow.mean)
    means = reward.mean(axis=(1, 2))
    assert found.high - found.low > 1.5 * (narrow.high - narrow.low)
    least = 1.96 * math.sqrt(means.var(ddof=1) / 5)
    assert (found.high - found.low) / 2 > least


def test_a_difference_counts_the_seeds_of_both_sides() -> None:
    reward, who = sessions(20, 1.0)
    base, _ = sessions(20, 1.0, seed=1)
    one = over_seeds(reward - base.mean(axis=0), who)
    both = over_seeds(reward, who, other=base)
    assert both.mean == pytest.approx(one.mean)
    assert both.high - both.low > 1.2 * (one.high - one.low)
    same = over_seeds(reward[:1], who, other=reward[:1])
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)


def test_the_interval_over_seeds_covers_the_truth() -> None:
    rng, inside = np.random.default_rng(1), 0
    for _ in range(150):
        own = rng.normal(0.0, 0.3, (5, 1, 1))
        reward = 2.0 + own + rng.normal(0.0, 1.0, (5, 2, 60))
        found = over_seeds(reward, np.arange(60))
        inside += int(found.low <= 2.0 <= found.high)
    assert inside / 150 >= 0.91


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        (Gap(0.1, 0.05, 0.15), "better than ease"),
        (Gap(0.005, 0.001, 0.009), "above ease by less than 1 %: no win"),
        (Gap(-0.1, -0.2, -0.05), "worse than ease"),
        (Gap(0.1, -0.05, 0.25), "not told apart from ease"),
        (Gap(0.0, 0.0, 0.0), "not told apart from ease"),
        (Gap(math.nan, math.nan, math.nan), "not told apart from ease"),
        (Gap(0.5, math.nan, math.nan), "not told apart from ease"),
    ],
)
def test_a_claim_needs_a_sign_and_one_percent(gap, words) -> None:
    assert claim(gap, 1.0, "ease").replace("1%", "1 %") == words


def test_the_size_of_an_ab_test_is_the_textbook_one() -> None:
    # two arms of sd 1, difference .5: (1.95996 + .84162)^2 * 2 / .25 = 62.79
    assert per_arm(1.0, 1.0, 0.5) == 63
    assert per_arm(1.0, 1.0, -0.5) == 63
    assert per_arm(1.0, 1.0, 0.0) is None


def test_an_ab_test_of_that_size_finds_the_difference_in_four_of_five() -> None:
    rng, found, n = np.random.default_rng(2), 0, per_arm(1.0, 4.0, 0.4)
    assert n is not None
    for _ in range(400):
        a, b = rng.normal(0.0, 1.0, n), rng.normal(0.4, 2.0, n)
        z = (b.mean() - a.mean()) / math.sqrt(a.var() / n + b.var() / n)
        found += int(abs(z) > 1.96)
    assert 0.74 <= found / 400 <= 0.86


def test_negative_variances_are_refused() -> None:
    with pytest.raises(ValueError, match="variances must be at least 0"):
        per_arm(-1.0, 1.0, 0.5)
