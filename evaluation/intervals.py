"""From sums to intervals (low, high): pure functions, no rows needed, alpha two-sided."""

import math
from statistics import NormalDist

import numpy as np

from evaluation.diagnostics import WeightSums

Array = np.ndarray
Interval = tuple[float, float]
REPLICATES_AT_ONCE = 1 << 22  # numbers of a bootstrap's (replicates, Bk) counts held in memory


def _check(alpha: float, value_range: Interval = (0.0, 1.0), name: str = "value_range") -> None:
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}: .05 gives a 95 % interval")
    if not value_range[0] < value_range[1]:
        raise ValueError(f"{name} must be (low, high) with low < high, got {value_range}")


def clt(value: float, std_error: float, alpha: float = 0.05) -> Interval:
    """Normal interval."""
    _check(alpha)
    half = NormalDist().inv_cdf(1.0 - alpha / 2.0) * std_error
    return value - half, value + half


def student_t(value: float, std_error: float, n: int, alpha: float = 0.05) -> Interval:
    """Student's interval of a mean of n, of whom one cannot tell a spread."""
    from scipy.special import stdtrit  # slow to import

    _check(alpha)
    half = float(stdtrit(n - 1, 1.0 - alpha / 2.0)) * std_error if n > 1 else math.inf
    return value - half, value + half


def hoeffding(mean: float, n: int, value_range: Interval, alpha: float = 0.05) -> Interval:
    """Interval of a mean of n values in value_range (Hoeffding, 1963), valid at every n."""
    _check(alpha, value_range)
    width = value_range[1] - value_range[0]
    half = width * math.sqrt(math.log(2.0 / alpha) / (2.0 * n)) if n else math.inf
    return mean - half, mean + half


def empirical_bernstein(
    mean: float, variance: float, n: int, value_range: Interval, alpha: float = 0.05
) -> Interval:
    """Interval by the sample variance (over n - 1) and the range (Maurer & Pontil, 2009)."""
    _check(alpha, value_range)
    if n < 2:
        return -math.inf, math.inf
    log = math.log(4.0 / alpha)  # each side has alpha / 2, each of its two bounds half of that
    half = math.sqrt(2.0 * variance * log / n)
    half += 7.0 * (value_range[1] - value_range[0]) * log / (3.0 * (n - 1))
    return mean - half, mean + half


def confidence_sequence(
    mean: float, variance: float, n: int, alpha: float = 0.05, *, tuned_for: int = 1000
) -> Interval:
    """Asymptotic confidence sequence (Waudby-Smith et al., 2021), tightest at n = tuned_for.

    It holds at all n at once, so one may look after each row and stop at will. It asks only that
    deviations from the mean be martingale differences whose average variance settles: it is also
    right for an adaptive log, where each propensity was chosen in view of the rows before.
    """
    from scipy.special import lambertw  # slow to import

    _check(alpha)
    if n < 1:
        return -math.inf, math.inf
    if tuned_for < 1:
        raise ValueError(f"tuned_for must be a number of rows, at least 1, got {tuned_for}")
    # the width at n is least where y = 1 + n rho^2 solves y exp(-y) = alpha^2 / e
    best = -float(lambertw(-(alpha**2) / math.e, k=-1).real) - 1.0
    x = best * n / tuned_for  # n rho^2
    half = math.sqrt(variance / n * 2.0 * (x + 1.0) / x * math.log(math.sqrt(x + 1.0) / alpha))
    return mean - half, mean + half


# Empirical likelihood of Cressie-Read power -2: probabilities p of the n rows and of one unseen row
# of weight w0, closest in squares to uniform among those with sum p = 1 and sum p w = 1.


def _unseen(sums: WeightSums, weight_range: Interval) -> float:
    """Weight of the unseen row: on the side of 1 where mass is missing."""
    if not weight_range[0] < 1.0 < weight_range[1]:
        raise ValueError(
            f"weight_range must hold 1 inside, got {weight_range}: weights average 1, give the "
            "smallest and largest that can occur, (0, inf) if unknown"
        )
    if sums.sw < sums.n:
        return max(weight_range[1], sums.maximum)
    return min(weight_range[0], sums.minimum)


def _moments(sums: WeightSums, unseen: float) -> tuple[float, float]:
    """Mean and variance of the n + 1 weights."""
    mean = (unseen + sums.sw) / (sums.n + 1)
    return mean, (unseen**2 + sums.sw2) / (sums.n + 1) - mean**2


def _tilt(sums: WeightSums, weight_range: Interval) -> tuple[float, float, float]:
    """Constant and slope of p(w), linear in the weight, and the mass sum p w left unseen."""
    unseen, n = _unseen(sums, weight_range), sums.n
    if math.isinf(unseen):
        constant, slope = 1.0 / n, 0.0
    else:
        mean, variance = _moments(sums, unseen)
        slope = (1.0 - mean) / variance / (n + 1)
        constant = 1.0 / (n + 1) - slope * mean
    return constant, slope, max(0.0, 1.0 - constant * sums.sw - slope * sums.sw2)


def cressie_read_estimate(sums: WeightSums, weight_range: Interval = (0.0, math.inf)) -> float:
    """Maximum empirical likelihood (Karampatziakis et al., 2019); unseen mass has mean reward."""
    if not sums.n:
        return math.nan
    constant, slope, outside = _tilt(sums, weight_range)
    return constant * sums.swr + slope * sums.sw2r + outside * sums.sr / sums.n


def _control(sums: WeightSums, weight_range: Interval) -> float:
    """Coefficient at which E[w] = 1 acts on w r: the estimate is mean(w r) + it (1 - mean(w))."""
    unseen, reward = _unseen(sums, weight_range), sums.sr / sums.n
    if math.isinf(unseen):
        return reward
    mean, variance = _moments(sums, unseen)
    value = (sums.swr + unseen * reward) / (sums.n + 1)
    return ((sums.sw2r + unseen**2 * reward) / (sums.n + 1) - mean * value) / variance


def cressie_read_contributions(
    weight: Array, reward: Array, weight_range: Interval = (0.0, math.inf)
) -> Array:
    """One number per unit, (n,): their mean is the estimate, their variance that of its error."""
    sums = WeightSums.of(weight, reward)
    if not sums.n:
        return np.empty(0)
    values = weight * reward + _control(sums, weight_range) * (1.0 - weight)
    return values + (cressie_read_estimate(sums, weight_range) - values.mean())


def cressie_read_std_error(sums: WeightSums, weight_range: Interval = (0.0, math.inf)) -> float:
    """Of the estimate, from the sums alone."""
    if sums.n < 2:
        return math.nan
    control, n = _control(sums, weight_range), sums.n
    square = sums.sw2r2 - 2.0 * control * sums.sw2r + control**2 * sums.sw2
    return math.sqrt(max(square / n - ((sums.swr - control * sums.sw) / n) ** 2, 0.0) / (n - 1))


def _extreme(sums: WeightSums, unseen: float, reward: float, budget: float, sign: int) -> float:
    """Extreme value over p within the budget, if the unseen row has this reward; nan if no p is."""
    n = sums.n
    # v = w (r - reward) is 0 at the unseen row, and sum p w r = reward + sum p v
    v = sums.swr - reward * sums.sw
    v2 = sums.sw2r2 - 2.0 * reward * sums.sw2r + reward**2 * sums.sw2
    if math.isinf(unseen):
        centre, spread, slack = reward + v / n, (v2 - v**2 / n) / (n + 1), budget - 1.0 / n
    else:
        mean, variance = _moments(sums, unseen)
        if variance <= 0:
            return math.nan
        cov = (sums.sw2r - reward * sums.sw2 - mean * v) / (n + 1)
        centre = reward + v / (n + 1) + (1.0 - mean) * cov / variance
        spread = v2 / (n + 1) - (v / (n + 1)) ** 2 - cov**2 / variance
        slack = budget - (1.0 - mean) ** 2 / variance
    return centre + sign * math.sqrt(slack * max(spread, 0.0)) if slack >= 0 else math.nan


def cressie_read(
    sums: WeightSums,
    alpha: float = 0.05,
    *,
    weight_range: Interval = (0.0, math.inf),
    reward_range: Interval = (0.0, 1.0),
) -> Interval:
    """Empirical-likelihood interval of the value of w r (Karampatziakis et al., 2019).

    What the log has not shown may have any weight in weight_range and any reward in reward_range,
    so that it is honestly wide where weights are heavy.
    """
    from scipy.special import stdtrit  # slow to import

    _check(alpha, reward_range, "reward_range")
    if not sums.n:
        return reward_range
    if sums.reward_low < reward_range[0] or sums.reward_high > reward_range[1]:
        raise ValueError(
            f"reward_range {reward_range} must hold all rewards, the log has some from "
            f"{sums.reward_low:g} to {sums.reward_high:g}: give the range that can occur"
        )
    unseen, n = _unseen(sums, weight_range), sums.n
    if math.isinf(unseen):
        distance = 1.0 / n
    else:
        mean, variance = _moments(sums, unseen)
        distance = (1.0 - mean) ** 2 / variance
    # likelihood ratio against its F(1, n) quantile, the square of a t(n) quantile
    budget = distance + float(stdtrit(n, 1.0 - alpha / 2.0)) ** 2 / (n + 1)
    ends = min(weight_range[0], sums.minimum), max(weight_range[1], sums.maximum)
    low = np.nanmin([_extreme(sums, end, reward_range[0], budget, -1) for end in ends])
    high = np.nanmax([_extreme(sums, end, reward_range[1], budget, 1) for end in ends])
    return float(np.clip(low, *reward_range)), float(np.clip(high, *reward_range))


# Sums of Terms by block of whole clusters: top, bottom (Bk, J), count (Bk,) of units


def _blocks(top: Array, bottom: Array | None, count: Array) -> tuple[Array, Array]:
    """Blocks that have units, and ones as bottom of a plain mean: (Bk, J), (Bk, J or 1)."""
    kept = np.asarray(count) > 0
    if bottom is None:
        return top[kept].sum(axis=1, keepdims=True), count[kept, None].astype(float)
    return top[kept], bottom[kept]


def bootstrap(
    top: Array,
    bottom: Array | None,
    count: Array,
    alpha: float = 0.05,
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Percentile interval and standard error, blocks redrawn with replacement (Efron, 1979).

    Every replicate divides by its own weights: a frozen denominator makes SNIPS 1.65 x too wide.
    """
    _check(alpha)
    top, bottom = _blocks(top, bottom, count)
    size, rng = len(top), np.random.default_rng(seed)
    if size < 2:
        return -math.inf, math.inf, math.nan
    values = np.empty(replicates)
    step = max(1, REPLICATES_AT_ONCE // size)
    for start in range(0, replicates, step):
        some = min(step, replicates - start)
        drawn = rng.integers(size, size=(some, size)) + size * np.arange(some)[:, None]
        times = np.bincount(drawn.ravel(), minlength=some * size).reshape(some, size)
        times = times.astype(float)  # (some, Bk) multinomial
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = (times @ top) / (times @ bottom)  # (some, J)
        values[start : start + some] = ratio.sum(axis=1)
    values = values[np.isfinite(values)]  # a replicate without weight has no ratio
    if len(values) < 2:
        return -math.inf, math.inf, math.nan
    low, high = np.quantile(values, [alpha / 2.0, 1.0 - alpha / 2.0])
    return float(low), float(high), float(values.std(ddof=1))


def delta_gradient(mean: Array, has_bottom: bool) -> Array:
    """Derivative of sum_j top_j / bottom_j by its means [top, bottom] (2J,), or [top] (J,)."""
    if not has_bottom:
        return np.ones(len(mean))
    top, bottom = np.split(np.asarray(mean, dtype=float), 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.tile(bottom > 0, 2), np.append(1 / bottom, -top / bottom**2), np.nan)


def p_value(difference: float, std_error: float) -> float:
    """Two-sided, of no difference, by the normal."""
    if std_error == 0:
        return float(difference == 0)
    return math.erfc(abs(difference) / std_error / math.sqrt(2.0))


def holm(p_values: Array) -> Array:
    """Adjusted for all comparisons made (Holm, 1979), (m,); those withheld (nan) do not count."""
    p_values = np.asarray(p_values, dtype=float)
    adjusted, finite = np.full(len(p_values), np.nan), np.isfinite(p_values)
    order = np.argsort(p_values, kind="stable")[: int(finite.sum())]  # nan come last
    left = np.arange(len(order), 0, -1)  # hypotheses not yet rejected
    adjusted[order] = np.minimum(np.maximum.accumulate(left * p_values[order]), 1.0)
    return adjusted
