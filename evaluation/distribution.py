"""The distribution of a target policy's reward, not only its mean: CDF, quantiles, CVaR.

The CDF at t is the value of the reward 1{r <= t}, so every estimator of a mean gives one (Huang et
al., 2021; Chandak et al., 2021). Units (n,) are rows, slates or episodes: `weight` is the unit's
whole ratio and `reward` what it returned. Thresholds (m,) rise; mass between two of them counts at
the upper one, so the grid must reach the largest reward.
"""

from collections.abc import Callable

import numpy as np

from evaluation.terms import Array, Terms

KINDS = ("snips", "ips", "dr", "sndr")
ROUNDING = 1e-9  # of a total mass of 1


def cdf(
    weight: Array,
    reward: Array,
    thresholds: Array,
    *,
    kind: str = "snips",
    q_logged: Array | None = None,
    value: Array | None = None,
) -> Array:
    """Estimate P(reward <= t) under the target at thresholds (m,): monotone, in [0, 1].

    For dr and sndr `q_logged` and `value` (n, m) are a model's CDF at the logged action and under
    the target. No (n, m) is made here: thresholds may be all distinct rewards.
    """
    weight, reward, thresholds = _checked(weight, reward, thresholds, kind, q_logged, value)
    reached = np.searchsorted(thresholds, reward, side="left")  # (n,) first threshold >= reward
    bins = np.bincount(reached, weights=weight, minlength=len(thresholds) + 1)
    top = bins[:-1].cumsum()  # (m,) sum of w 1{r <= t}
    total = weight.sum() if kind.startswith("sn") else float(len(weight))
    if q_logged is None or value is None:
        return _proper(_ratio(top, total))
    return _proper(np.mean(value, axis=0) + _ratio(top - weight @ q_logged, total))


def cdf_terms(
    weight: Array,
    reward: Array,
    thresholds: Array,
    *,
    kind: str = "snips",
    q_logged: Array | None = None,
    value: Array | None = None,
) -> Terms:
    """Columns (n, J) whose means `cdf_from_means` turns into the CDF: J is m, for sndr 2 m.

    Their sums over blocks and batches may be added; `bottom` is a view and takes no memory.
    """
    weight, reward, thresholds = _checked(weight, reward, thresholds, kind, q_logged, value)
    shape = (len(weight), len(thresholds))
    below = (reward[:, None] <= thresholds).astype(float)  # (n, m)
    if q_logged is None or value is None:
        bottom = np.broadcast_to(weight[:, None], shape) if kind == "snips" else None
        return Terms(weight[:, None] * below, bottom)
    residual = weight[:, None] * (below - q_logged)  # (n, m)
    if kind == "dr":
        return Terms(value + residual)
    ones = np.ones(len(weight))
    bottom = np.repeat(np.stack([ones, weight], axis=1), len(thresholds), axis=1)  # (n, 2 m)
    return Terms(np.concatenate([value, residual], axis=1), bottom)


def cdf_from_means(top: Array, bottom: Array | None, num_thresholds: int) -> Array:
    """Means or sums (..., J) of the columns of `cdf_terms` to CDFs (..., m).

    Without a bottom `top` must hold means.
    """
    parts = top if bottom is None else _ratio(top, bottom)  # (..., J)
    return _proper(parts.reshape(*parts.shape[:-1], -1, num_thresholds).sum(axis=-2))


def quantile(cdf: Array, thresholds: Array, level: float) -> Array:
    """Smallest threshold (...) that CDFs (..., m) reach `level` at; nan where none does."""
    _check_level(level)
    reached = np.asarray(cdf) >= level - ROUNDING  # (..., m)
    at = np.asarray(thresholds, dtype=float)[reached.argmax(axis=-1)]
    return np.where(reached.any(axis=-1), at, np.nan)


def cvar(cdf: Array, thresholds: Array, level: float) -> Array:
    """Mean (...) of the lowest `level` share of CDFs (..., m), their steps integrated exactly.

    A step is split where the level falls inside it; nan where the mass is less than the level.
    """
    _check_level(level)
    cdf = np.asarray(cdf)
    mass = np.diff(np.minimum(cdf, level), axis=-1, prepend=0.0)  # (..., m)
    held = mass.sum(axis=-1)
    return np.where(held >= level - ROUNDING, mass @ thresholds / level, np.nan)


def mean_of(cdf: Array, thresholds: Array) -> Array:
    """Mean (...) of CDFs (..., m); mass the CDF lacks counts as reward 0, as it does in ips."""
    return np.diff(cdf, axis=-1, prepend=0.0) @ thresholds


def variance_of(cdf: Array, thresholds: Array) -> Array:
    """Variance (...) of the reward itself, not of an estimate, under CDFs (..., m)."""
    mass = np.diff(cdf, axis=-1, prepend=0.0)  # (..., m)
    centred = thresholds - mean_of(cdf, thresholds)[..., None]  # (..., m)
    return (mass * centred**2).sum(axis=-1)


def bootstrap(
    block_top: Array,
    block_weight: Array,
    thresholds: Array,
    statistic: Callable[[Array, Array], Array],
    *,
    alpha: float = 0.05,
    replicates: int = 1000,
    seed: int = 0,
) -> tuple[Array, Array]:
    """Percentile interval of a statistic of the CDF, by drawing blocks of units anew.

    `block_top` (Bk, J) are sums over blocks of the columns of `cdf_terms`, `block_weight` (Bk, J)
    or (Bk,) of its bottom (without one: the blocks' numbers of units). `statistic` maps
    (CDFs (B, m), thresholds) to (B, ...); both ends are (...).
    """
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}")
    blocks = len(block_top)
    if blocks < 2 or len(block_weight) != blocks:
        raise ValueError(
            f"expected sums over at least 2 blocks, one row each, got {blocks} rows of top and "
            f"{len(block_weight)} of weight"
        )
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(blocks, np.full(blocks, 1.0 / blocks), size=replicates)  # (B, Bk)
    bottom = np.asarray(block_weight, dtype=float).reshape(blocks, -1)  # (Bk, J) or (Bk, 1)
    cdfs = cdf_from_means(drawn @ block_top, drawn @ bottom, len(thresholds))  # (B, m)
    values = statistic(cdfs, np.asarray(thresholds))  # (B, ...)
    low, high = np.quantile(values, [alpha / 2, 1 - alpha / 2], axis=0)
    return low, high


def _ratio(top: Array, bottom: Array | float) -> Array:
    """Top over bottom, nan where there is no mass."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(bottom) > 0, top / np.asarray(bottom), np.nan)


def _proper(raw: Array) -> Array:
    """Running maximum of raw (..., m), clipped to [0, 1]; neither adds to the largest error."""
    return np.clip(np.maximum.accumulate(raw, axis=-1), 0.0, 1.0)


def _check_level(level: float) -> None:
    if not 0.0 < level <= 1.0:
        raise ValueError(f"level must be in (0, 1], a share of the mass, got {level}")


def _checked(
    weight: Array,
    reward: Array,
    thresholds: Array,
    kind: str,
    q_logged: Array | None,
    value: Array | None,
) -> tuple[Array, Array, Array]:
    """Weight (n,), reward (n,) and thresholds (m,) as float64, or what is wrong with them."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    weight, reward, thresholds = (np.asarray(x, dtype=float) for x in (weight, reward, thresholds))
    if weight.ndim != 1 or weight.shape != reward.shape or not len(weight):
        raise ValueError(
            f"weight and reward must be (n,) with n > 0, got {weight.shape} and {reward.shape}"
        )
    if thresholds.ndim != 1 or not len(thresholds) or not (np.diff(thresholds) > 0).all():
        raise ValueError("thresholds must be (m,) and rise strictly: sort them, drop repeats")
    bad = ~(np.isfinite(weight) & (weight >= 0) & np.isfinite(reward))  # (n,)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"weights must be finite and >= 0 and rewards finite, got weight {weight[row]} and "
            f"reward {reward[row]} in row {row}"
        )
    expected = (len(weight), len(thresholds))
    for name, model in (("q_logged", q_logged), ("value", value)):
        if (model is None) != (kind in ("snips", "ips")):
            raise ValueError(f"{name} is needed by dr and sndr and by no other kind, got {kind!r}")
        if model is not None and np.shape(model) != expected:
            raise ValueError(f"{name} must be {expected}, got {np.shape(model)}")
    return weight, reward, thresholds
