"""Intervals cover known truths as often as they say, or the verdict flags the log."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from test_intervals import in_blocks

from evaluation import intervals
from evaluation.diagnostics import WeightSums, judge

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
