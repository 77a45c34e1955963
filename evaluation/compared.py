"""Policies side by side: what several training seeds, households and simulators leave unsure."""

import math
from dataclasses import dataclass

import numpy as np

from evaluation.online import by_household, standard_error

LEAST_GAIN = 0.01  # of the baseline's reward: a smaller difference is not claimed as a win
POWER = 0.8
FEWEST = 3  # seeds, below which a band would mean nothing


@dataclass(frozen=True)
class Gap:
    """A mean, or a difference of means, with its interval."""

    mean: float
    low: float
    high: float


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean over the first axis (Agarwal et al., 2021): (S, ...) to (...)."""
    from scipy.stats import trim_mean

    return np.asarray(trim_mean(scores, 0.25, axis=0))


def band(
    runs: np.ndarray, *, alpha: float = 0.05, replicates: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """IQM of curves (E, S, T), environments by seeds by points, with a 1 - alpha band, (T,) each.

    Stratified bootstrap (Agarwal et al., 2021): seeds are redrawn within each environment, and all
    runs go into one interquartile mean. Fewer than three seeds have no band: NaN. With few seeds
    it is too narrow: of 3, 5 and 10 normal ones it holds the truth in 71, 90 and 92 %.
    """
    e, s, points = runs.shape
    if not s or not points or not np.isfinite(runs).all():
        raise ValueError(f"curves must be finite and not empty, got {runs.shape}")
    middle = iqm(runs.reshape(e * s, points))  # (T,)
    if s < FEWEST:
        return middle, np.full(points, np.nan), np.full(points, np.nan)
    rng = np.random.default_rng(seed)
    pick = rng.integers(0, s, (replicates, e, s))  # (R, E, S)
    drawn = runs[np.arange(e)[None, :, None], pick]  # (R, E, S, T)
    means = iqm(np.moveaxis(drawn.reshape(replicates, e * s, points), 1, 0))  # (R, T)
    low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2], axis=0)
    return middle, low, high


def over_seeds(
    reward: np.ndarray, household: np.ndarray, *, other: np.ndarray | None = None,
    alpha: float = 0.05,
) -> Gap:  # fmt: skip
    """Mean of rewards (R, S, M), training seeds by simulators by sessions, with its interval.

    To the error of households and simulators (`standard_error`) comes that of the seeds, the
    variance of their means over R; Student's freedom is that of the sum (Satterthwaite, 1946).
    With one seed nothing is known of what another one would have learned. With `other`
    (R', S, M) it is the difference to its mean, whose seeds count as well.
    """
    from scipy.stats import t

    sides = [reward] if other is None else [reward, other]
    gap = reward.mean(axis=0) - (0.0 if other is None else other.mean(axis=0))  # (S, M)
    mean, error, free = standard_error(by_household(gap, household))
    parts = [(error**2, free)]
    for x in sides:
        if len(x) > 1:
            parts.append((float(x.mean(axis=(1, 2)).var(ddof=1)) / len(x), len(x) - 1))
    total = sum(v for v, _ in parts)
    if total:
        free = total**2 / sum(v**2 / f for v, f in parts)
    reach = float(t.ppf(1 - alpha / 2, free)) * math.sqrt(total)
    return Gap(mean, mean - reach, mean + reach)


def claim(gap: Gap, baseline: float, name: str) -> str:
    """What a difference to a baseline of this mean allows to say.

    A win is sure of its sign and at least 1 % of the baseline: sessions of simulators are cheap,
    and enough of them make any difference significant.
    """
    known = all(math.isfinite(x) for x in (gap.mean, gap.low, gap.high))
    if not known or gap.low <= 0 <= gap.high:
        return f"not told apart from {name}"
    if gap.high < 0:
        return f"worse than {name}"
    if gap.mean < LEAST_GAIN * abs(baseline):
        return f"above {name} by less than {LEAST_GAIN:.0%}: no win"
    return f"better than {name}"


def per_arm(
    variance: float, other: float, difference: float, *, alpha: float = 0.05, power: float = POWER
) -> int | None:
    """Users in each arm of an A/B test that would find `difference` between two means.

    Two-sided, unpaired, one session a user: (z_{1-alpha/2} + z_power)^2 (variance + other) /
    difference^2. None where there is no difference to find.
    """
    from scipy.stats import norm

    if not (variance >= 0 and other >= 0):
        raise ValueError(f"variances must be at least 0, got {variance} and {other}")
    if not difference:
        return None
    reach = float(norm.ppf(1 - alpha / 2) + norm.ppf(power))
    return math.ceil(reach**2 * (variance + other) / difference**2)
