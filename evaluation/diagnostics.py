"""Can the log answer the question? Sums of the weights, from them a verdict with its reasons."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist

import numpy as np

Array = np.ndarray
CHUNK = 1 << 16  # rows of a pass that stay in the cache
KEPT = 2000  # largest weights kept
COMPARED = 16  # bins of a histogram that are counted by comparing
EXPONENTS = 128  # bins of the histogram: bin e holds weights in [2^(e - 65), 2^(e - 64))
ROUNDED = 1e-6  # by which logged float32 probabilities may miss a mean of 1
Z999 = NormalDist().inv_cdf(0.9995)

IDENTIFIED, PARTIAL, WITHHELD = "identified", "partially identified", "not identified"
COVERED, UNCOVERED, MEAN_OFF, ESS, SHARE = 0.99, 0.001, 0.1, 100.0, 0.05


def _no_counts() -> Array:
    return np.zeros(EXPONENTS, dtype=np.int64)


@dataclass(frozen=True)
class WeightSums:
    """Mergeable sums over n units of weight w, reward r, covered mass; without arguments, none."""

    n: int = 0
    sw: float = 0.0
    sw2: float = 0.0
    sr: float = 0.0
    swr: float = 0.0
    sw2r: float = 0.0
    sw2r2: float = 0.0
    minimum: float = math.inf
    maximum: float = -math.inf
    reward_low: float = math.inf
    reward_high: float = -math.inf
    covered: float = 0.0  # sum, over the covered_n units whose support is known
    covered_n: int = 0
    top: Array = field(default_factory=lambda: np.empty(0))  # at most KEPT largest, in no order
    counts: Array = field(default_factory=_no_counts)  # (EXPONENTS,) histogram by power of two

    @classmethod
    def of(cls, weight: Array, reward: Array, covered: Array | None = None) -> "WeightSums":
        """Sums of (n,) each."""
        return cls().update(weight, reward, covered)

    def update(self, weight: Array, reward: Array, covered: Array | None = None) -> "WeightSums":
        """With further units, (n,) each: a new value."""
        weight = np.ascontiguousarray(weight, dtype=float)
        reward = np.ascontiguousarray(reward, dtype=float)
        sums = self
        for start in range(0, len(weight), CHUNK):
            rows = slice(start, start + CHUNK)
            mass = None if covered is None else np.asarray(covered[rows], dtype=float)
            sums = sums._chunk(weight[rows], reward[rows], mass)
        return sums

    def _chunk(self, w: Array, r: Array, covered: Array | None) -> "WeightSums":
        wr, high = w * r, float(w.max())
        top = self.top
        if len(top) < KEPT or high > top.min():
            floor = top.min() if len(top) >= KEPT else -math.inf
            top = _largest(np.append(top, w[w > floor]))
        return WeightSums(
            n=self.n + len(w),
            sw=self.sw + float(w.sum()),
            sw2=self.sw2 + float(w @ w),
            sr=self.sr + float(r.sum()),
            swr=self.swr + float(wr.sum()),
            sw2r=self.sw2r + float(w @ wr),
            sw2r2=self.sw2r2 + float(wr @ wr),
            minimum=min(self.minimum, float(w.min())),
            maximum=max(self.maximum, high),
            reward_low=min(self.reward_low, float(r.min())),
            reward_high=max(self.reward_high, float(r.max())),
            covered=self.covered + (0.0 if covered is None else float(covered.sum())),
            covered_n=self.covered_n + (0 if covered is None else len(covered)),
            top=top,
            counts=self.counts + _histogram(w),
        )

    @cached_property
    def pareto_k(self) -> float:
        """Shape of the tail, found once: every row of a table shows it."""
        return tail_shape(self.n, self.top)

    def __add__(self, other: "WeightSums") -> "WeightSums":
        return WeightSums(
            n=self.n + other.n,
            sw=self.sw + other.sw,
            sw2=self.sw2 + other.sw2,
            sr=self.sr + other.sr,
            swr=self.swr + other.swr,
            sw2r=self.sw2r + other.sw2r,
            sw2r2=self.sw2r2 + other.sw2r2,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            reward_low=min(self.reward_low, other.reward_low),
            reward_high=max(self.reward_high, other.reward_high),
            covered=self.covered + other.covered,
            covered_n=self.covered_n + other.covered_n,
            top=_largest(np.append(self.top, other.top)),
            counts=self.counts + other.counts,
        )


def _histogram(w: Array) -> Array:
    """Units in each bin, (EXPONENTS,): few bins are counted by comparing: bincount is slow.

    What decides is in the upper 16 bits of a float: its sign, its exponent and some of its digits.
    """
    upper = (w.view(np.int64) >> 48).astype(np.int16)  # (n,)
    low, high = (
        min(max((int(x) >> 4) - 958, 0), EXPONENTS - 1) for x in (upper.min(), upper.max())
    )
    if high - low > COMPARED:
        return np.bincount(np.clip((upper >> 4) - 958, 0, EXPONENTS - 1), minlength=EXPONENTS)
    counts, above = _no_counts(), 0
    for e in range(high, low, -1):
        reached = int(np.count_nonzero(upper >= (e + 958) << 4))  # weights from 2^(e - 65)
        counts[e], above = reached - above, reached
    counts[low] += len(w) - above
    return counts


def _largest(weight: Array) -> Array:
    return weight if len(weight) <= KEPT else np.partition(weight, -KEPT)[-KEPT:]


def ess(sums: WeightSums) -> float:
    """Effective sample size (Kish, 1965)."""
    return sums.sw**2 / sums.sw2 if sums.sw2 > 0 else 0.0


def max_share(sums: WeightSums) -> float:
    """Part of all weight that one unit has; nan if none has any."""
    return sums.maximum / sums.sw if sums.sw > 0 else math.nan


def mean_weight(sums: WeightSums) -> tuple[float, float]:
    """Mean and its standard error, of independent units."""
    if not sums.n:
        return math.nan, math.nan
    mean = sums.sw / sums.n
    if sums.n == 1:
        return mean, math.inf
    return mean, math.sqrt(max(sums.sw2 / sums.n - mean**2, 0.0) / (sums.n - 1))


def pareto_k(sums: WeightSums) -> float:
    """Shape of the weights' tail: above .7 means and their standard errors cannot be trusted."""
    return sums.pareto_k


def tail_shape(n: int, largest: Array) -> float:
    """Pareto k by the `largest` of n weights (Zhang & Stephens, 2009), nan if the tail has under 5.

    Shrunk to .5 as by Vehtari et al. (2024).
    """
    size = min(math.ceil(min(0.2 * n, 3.0 * math.sqrt(n))), len(largest) - 1)
    if size < 5:
        return math.nan
    tail = np.sort(largest)[-size - 1 :]
    excess = tail[1:] - tail[0]
    excess = excess[excess > 0]  # (m,) ascending; ties with the threshold are no tail
    m = len(excess)
    if m < 5:
        return math.nan
    points = 30 + math.isqrt(m)
    quartile = excess[int(m / 4.0 + 0.5) - 1]
    spread = 1.0 - np.sqrt(points / (np.arange(1, points + 1) - 0.5))
    theta = 1.0 / excess[-1] + spread / (3.0 * quartile)  # (points,) inverse scales, of both signs
    theta = theta[theta != 0]
    k = np.log(1.0 - np.outer(theta, excess)).mean(axis=1)  # (points,) best shape at each theta
    likelihood = m * (np.log(-theta / k) - k - 1.0)  # profile
    chance = np.exp(likelihood - likelihood.max())
    best = float(theta @ chance / chance.sum())
    shape = float(np.log1p(-best * excess).mean())
    return (m * shape + 5.0) / (m + 10.0)  # prior: ten observations at shape .5


def covered_mass(
    sums: WeightSums, mean_error: float | None = None
) -> tuple[float, float, float, bool]:
    """Part of the target's choices that the log can show, low and high at 99.9 %, whether exact.

    Where the support is not known it is min(mean w, 1), as weights lose what was never logged.
    """
    if sums.n and sums.covered_n == sums.n:
        mass = sums.covered / sums.n
        return mass, mass, mass, True
    mean, error = mean_weight(sums)
    half = Z999 * (error if mean_error is None else mean_error)
    low, mass, high = np.clip([mean - half, mean, mean + half], 0.0, 1.0)
    return float(mass), float(low), float(high), False


def ccdf(sums: WeightSums) -> tuple[Array, Array]:
    """Weights (m,) ascending and the part of units at or above each: exact at the top KEPT."""
    top = np.sort(sums.top)
    edge = np.exp2(np.arange(EXPONENTS) - 65.0)  # lower edge of each bin
    above = np.cumsum(sums.counts[::-1])[::-1]  # units at or above the edge
    coarse = (sums.counts > 0) & (edge < (top[0] if len(top) else 0.0)) & (edge > edge[0])
    part = np.append(above[coarse], np.arange(len(top), 0, -1)) / max(sums.n, 1)
    return np.append(edge[coarse], top), part


@dataclass(frozen=True)
class Diagnostics:
    """What the weights say of a target on a log; intervals are at 99.9 %."""

    n: int
    ess: float
    mean_weight: float
    mean_weight_low: float
    mean_weight_high: float
    z: float
    max_share: float
    max_weight: float
    pareto_k: float
    covered_mass: float
    covered_low: float
    covered_high: float
    covered_exact: bool
    verdict: str
    reasons: tuple[str, ...]


def judge(sums: WeightSums, *, mean_weight_error: float | None = None) -> Diagnostics:
    """Verdict on the weights of n units.

    mean_weight_error is the standard error of their mean where units are clustered.
    """
    mean, error = mean_weight(sums)
    error = error if mean_weight_error is None else mean_weight_error
    low, high = mean - Z999 * error, mean + Z999 * error
    if abs(mean - 1.0) <= ROUNDED:
        z = 0.0
    else:
        z = (mean - 1.0) / error if error != 0 else math.copysign(math.inf, mean - 1.0)
    mass, mass_low, mass_high, exact = covered_mass(sums, error)
    size, share = ess(sums), max_share(sums)
    reasons = _reasons(mass, mass_high, exact, mean, low, high, size, share)
    verdict = PARTIAL if reasons else IDENTIFIED
    if not mass >= UNCOVERED:
        verdict = WITHHELD
    return Diagnostics(
        n=sums.n,
        ess=size,
        mean_weight=mean,
        mean_weight_low=low,
        mean_weight_high=high,
        z=z,
        max_share=share,
        max_weight=sums.maximum if sums.n else math.nan,
        pareto_k=pareto_k(sums),
        covered_mass=mass,
        covered_low=mass_low,
        covered_high=mass_high,
        covered_exact=exact,
        verdict=verdict,
        reasons=reasons,
    )


def _reasons(
    mass: float,
    mass_high: float,
    exact: bool,
    mean: float,
    low: float,
    high: float,
    size: float,
    share: float,
) -> tuple[str, ...]:
    """What keeps a target from being identified, each with its remedy."""
    if not mass >= UNCOVERED:
        return (
            f"covered mass {mass:.2g} is below {UNCOVERED}: the log shows nothing of what the "
            "target would do; only a reward model can speak of it, or a log that shows its items",
        )
    reasons = []
    if not mass_high >= COVERED:  # an estimate by chance below .99 says nothing
        source = "" if exact else f" (estimated by the mean weight, at most {mass_high:.3f})"
        reasons.append(
            f"covered mass {mass:.3f}{source} is below {COVERED}: restrict the target to items "
            "that the log shows, or log with a policy that shows its items"
        )
    if not low - ROUNDED <= 1.0 <= high + ROUNDED:
        reasons.append(
            f"the mean weight {mean:.3f} is not 1 (99.9 % interval {low:.3f} to {high:.3f}): "
            "check the logged propensities, and that the log shows all that the target chooses"
        )
    if not abs(mean - 1.0) <= MEAN_OFF:
        reasons.append(
            f"the mean weight {mean:.3f} is further than {MEAN_OFF} from 1: check the logged "
            "propensities, soften the policy (Target.soften) or collect more rows"
        )
    if not size >= ESS:
        reasons.append(
            f"effective sample size {size:.0f} is below {ESS:.0f}: "
            "soften the policy (Target.soften) or collect more rows"
        )
    if not share <= SHARE:
        reasons.append(
            f"one unit has {100 * share:.0f} % of all weight, more than {100 * SHARE:.0f} %: "
            "soften the policy (Target.soften), clip the weights or collect more rows"
        )
    return tuple(reasons)


def bounds(
    value: float,
    covered: float | tuple[float, float],
    reward_range: tuple[float, float],
    *,
    std_error: float = 0.0,
    alpha: float = 0.05,
) -> tuple[float, float]:
    """Worst cases: IPS of the covered part, the rest at the least and at the most reward.

    `covered` is a mass, or (low, high) where it is estimated; std_error, of IPS, widens both ends.
    """
    least, most = reward_range
    if not least <= most:
        raise ValueError(
            f"reward_range must be (least, most) with least <= most, got {reward_range}"
        )
    missing = 1.0 - np.clip(np.atleast_1d(covered).astype(float), 0.0, 1.0)
    half = NormalDist().inv_cdf(1.0 - alpha / 2.0) * std_error
    low, high = value + (missing * least).min() - half, value + (missing * most).max() + half
    return float(np.clip(low, least, most)), float(np.clip(high, least, most))


@dataclass(frozen=True)
class Calibration:
    """How well predicted action probabilities agree with actions taken; points (b,) for a plot."""

    ece: float
    brier: float
    predicted: Array
    observed: Array
    count: Array


def calibration(probs: Array, action: Array, bins: int = 10) -> Calibration:
    """Of probs (n, A) and actions taken (n,): expected calibration error over equally full bins
    of all (row, action) pairs (Nixon et al., 2019), and the Brier score of a row (Brier, 1950).
    """
    probs, rows = np.asarray(probs, dtype=float), np.arange(len(action))
    if bins < 1 or not len(rows):
        raise ValueError(f"calibration needs rows and bins, got {len(rows)} rows and {bins} bins")
    taken = np.zeros_like(probs)
    taken[rows, action] = 1.0
    flat = probs.ravel()
    edges = np.unique(np.quantile(flat, np.arange(1, bins) / bins))  # equal probabilities: one bin
    index = np.searchsorted(edges, flat, side="right")
    count = np.bincount(index)
    filled = count > 0
    predicted = np.bincount(index, flat)[filled] / count[filled]
    observed = np.bincount(index, taken.ravel())[filled] / count[filled]
    count = count[filled]
    return Calibration(
        ece=float(count @ np.abs(predicted - observed)) / len(flat),
        brier=float(np.square(probs - taken).sum(axis=1).mean()),
        predicted=predicted,
        observed=observed,
        count=count,
    )
