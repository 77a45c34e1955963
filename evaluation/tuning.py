"""Choose lambda of an estimator from the moments of its values: index functions, no state kept."""

import math

import numpy as np

Array = np.ndarray


def _check(means: Array, n: int, delta: float) -> None:
    if not len(means):
        raise ValueError("tuning needs at least one lambda, got none")
    if n < 2:
        raise ValueError(f"tuning needs at least 2 units, got {n}: give lambda itself")
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must be in (0, 1), got {delta}")


def slope(means: Array, variances: Array, n: int, delta: float = 0.05) -> int:
    """Index of the narrowest estimate in agreement with all wider ones (Su et al., 2020).

    Means and variances (over n) of an estimator's n values at each of m lambdas, (m,) each.
    """
    from scipy.special import stdtrit  # slow to import

    means, variances = np.asarray(means, dtype=float), np.asarray(variances, dtype=float)
    _check(means, n, delta)
    half = float(stdtrit(n - 1, 1.0 - delta)) * np.sqrt(variances / (n - 1))  # (m,)
    order = np.argsort(-half, kind="stable")  # widest, that is least biased, first
    for place in range(1, len(order)):
        now, wider = order[place], order[:place]
        allowed = half[now] + (math.sqrt(6.0) - 1.0) * half[wider]
        if (np.abs(means[wider] - means[now]) > allowed).any():
            return int(order[place - 1])
    return int(order[-1])


def mse(
    means: Array,
    variances: Array,
    n: int,
    unclipped: float,
    *,
    bias_ub: bool = True,
    mean_square_weight: float = 0.0,
    max_weight: float = 0.0,
    delta: float = 0.05,
) -> tuple[int, Array]:
    """Index of the least estimated error, and the errors (m,) (Su et al., 2020, section 5).

    `unclipped` is the estimate whose weights are left alone; bias_ub adds what the bias can be
    with probability 1 - delta, by E[w^2] and the largest w of the unclipped weights.
    """
    means, variances = np.asarray(means, dtype=float), np.asarray(variances, dtype=float)
    _check(means, n, delta)
    bias = np.abs(unclipped - means)  # (m,)
    if bias_ub:
        log = math.log(2.0 / delta)
        bias = bias + math.sqrt(2.0 * mean_square_weight * log / n)
        bias = bias + 2.0 * max_weight * log / (3.0 * n)
    errors = variances / n + bias**2
    return int(np.argmin(errors)), errors
