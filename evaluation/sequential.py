"""Estimators of sessions: rows put together as episodes to Terms, one unit an episode.

Rows (n,) come sorted by `groups.sort`; episodes may differ in length. `weight` (n,) is what
multiplies a row's residual: the product of ratios up to the row, or the marginal ratio of its state
and action. An episode that is over stays in an absorbing state without reward and keeps its last
weight, so that the weights of every step average 1 over all episodes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from evaluation.terms import Array, Groups, Terms, plain

PARTIAL_RETURNS = 25  # that MAGIC blends at most
HALF = 0.6745  # standard errors on either side that hold half of a normal distribution
ENOUGH = 100  # effective episodes


def discounts(groups: Groups, gamma: float) -> Array:
    """gamma^t, (n,), t = 0 at the first row of an episode."""
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    return float(gamma) ** groups.place


def direct(groups: Groups, value: Array) -> Terms:
    """Value that a model gives the first state; no weights."""
    return plain(groups.first(value))


def tis(groups: Groups, weight: Array, reward: Array, gamma: float) -> Terms:
    """Trajectory-wise importance sampling: the last weight times the discounted return."""
    return plain(groups.last(weight) * groups.sum(discounts(groups, gamma) * reward))


def wtis(groups: Groups, weight: Array, reward: Array, gamma: float) -> Terms:
    """Weighted trajectory-wise importance sampling: `tis` over the mean of its weights."""
    return Terms(tis(groups, weight, reward, gamma).top, groups.last(weight)[:, None])


def pdis(groups: Groups, weight: Array, reward: Array, gamma: float) -> Terms:
    """Per-decision importance sampling (Precup, Sutton & Singh, 2000)."""
    return plain(groups.sum(discounts(groups, gamma) * weight * reward))


def wpdis(groups: Groups, weight: Array, reward: Array, gamma: float, horizon: int) -> Terms:
    """Per-decision importance sampling, each step over the mean of its weights.

    With marginal ratios as weights it is the self-normalised form of `marginalised`.
    """
    top = groups.padded(discounts(groups, gamma) * weight * reward, horizon)  # (G, horizon)
    return Terms(top, groups.padded(weight, horizon, groups.last(weight)))


def doubly_robust(
    groups: Groups,
    weight: Array,
    reward: Array,
    q_logged: Array,
    value: Array,
    gamma: float,
    weight_prev: Array | None = None,
) -> Terms:
    """sum_t gamma^t (W_t (r_t - Q_t) + W_{t-1} V_t), W_{-1} = 1 (Jiang & Li, 2016)."""
    if weight_prev is None:
        weight_prev = groups.previous(weight, 1.0)
    row = weight * (reward - q_logged) + weight_prev * value  # (n,)
    return plain(groups.sum(discounts(groups, gamma) * row))


def weighted_doubly_robust(
    groups: Groups,
    weight: Array,
    reward: Array,
    q_logged: Array,
    value: Array,
    gamma: float,
    horizon: int,
    value_next: Array | None = None,
) -> Terms:
    """WDR: `doubly_robust`, each step over the mean of its weights (Thomas & Brunskill, 2016).

    Column 0 is V(s_0), column t + 1 all that W_t multiplies: r_t + gamma V_{t+1} - Q_t.
    """
    if value_next is None:
        value_next = groups.next(value, 0.0)
    row = discounts(groups, gamma) * weight * (reward + gamma * value_next - q_logged)  # (n,)
    bottom = groups.padded(weight, horizon, groups.last(weight))  # (G, horizon)
    top = np.column_stack([groups.first(value), groups.padded(row, horizon)])
    return Terms(top, np.column_stack([np.ones(len(groups)), bottom]))


def marginalised(
    groups: Groups,
    weight: Array,
    reward: Array,
    gamma: float,
    q_logged: Array | None = None,
    value: Array | None = None,
    value_next: Array | None = None,
) -> Terms:
    """Marginalised importance sampling (Xie, Ma & Wang, 2019), with a model around its residuals.

    `value_next` (n,) is for episodes cut short; without it no value follows a last row.
    """
    if q_logged is None and value is None and value_next is None:
        return pdis(groups, weight, reward, gamma)
    if q_logged is None or value is None:
        raise ValueError("a model needs both q_logged and value, got only one: give both or none")
    if value_next is None:
        value_next = groups.next(value, 0.0)
    row = weight * (reward + gamma * value_next - q_logged)  # (n,)
    return plain(groups.first(value) + groups.sum(discounts(groups, gamma) * row))


def magic(
    groups: Groups,
    weight: Array,
    reward: Array,
    q_logged: Array,
    value: Array,
    gamma: float,
    horizon: int,
) -> Terms:
    """Blend of model and weighted doubly robust with the least error (Thomas & Brunskill, 2016).

    The blend is chosen on these rows and then held fixed.
    """
    terms = weighted_doubly_robust(groups, weight, reward, q_logged, value, gamma, horizon)
    return blended(terms, blend(terms))


def blended(terms: Terms, share: Array) -> Terms:
    """Terms of `weighted_doubly_robust`, each column scaled by the share (J,) that reaches it."""
    top = terms.top * share
    if terms.bottom is None:
        return Terms(top)
    return Terms(
        top, np.where(share > 0, terms.bottom, 1.0)
    )  # a column of share 0 may have no mass


def blend(terms: Terms) -> Array:
    """MAGIC's share, (J,), of each column of `weighted_doubly_robust`, falling from 1.

    The partial return g_j follows the weights through column j and the model from there, so its
    cumulative sums of columns; shares are the mass of blended partial returns with j at or behind
    a column. Covariances are by the delta method, the bias of g_j is its distance from the middle
    half of the interval of the longest.
    """
    bottom = np.ones_like(terms.top) if terms.bottom is None else terms.bottom
    mass = bottom.mean(axis=0)  # (J,)
    known = int((mass > 0).cumprod().sum())  # a step that no episode reached says nothing
    top, bottom, mass = terms.top[:, :known], bottom[:, :known], mass[:known]
    ratio = top.mean(axis=0) / mass  # (known,)
    chosen = np.unique(np.linspace(0, known - 1, min(known, PARTIAL_RETURNS)).round().astype(int))
    partial = ratio.cumsum()[chosen]  # (M,)
    influence = ((top - ratio * bottom) / mass).cumsum(axis=1)[:, chosen]  # (n, M)
    n = len(top)
    covariance = influence.T @ influence / (n * max(n - 1, 1))  # (M, M)
    half = HALF * np.sqrt(covariance[-1, -1])
    gap = partial - partial[-1]
    bias = np.sign(gap) * np.maximum(np.abs(gap) - half, 0.0)  # (M,)
    x = simplex_minimum(covariance + np.outer(bias, bias))  # (M,)
    share = np.zeros(terms.top.shape[1])
    share[chosen] = x
    return share[::-1].cumsum()[::-1]  # (J,)


def simplex_minimum(matrix: Array) -> Array:
    """The x >= 0, sum(x) = 1, of least x'Mx, for a positive semi-definite M (m, m).

    Non-negative least squares of F'x against 0 and of sum(x) against 1, M = FF', has its minimum
    at a multiple of it.
    """
    from scipy.optimize import nnls

    values, vectors = np.linalg.eigh(matrix)
    factor = vectors * np.sqrt(np.clip(values, 0.0, None))  # (m, m)
    rows = np.vstack([factor.T, np.ones(len(matrix))])
    x, _ = nnls(rows, np.append(np.zeros(len(matrix)), 1.0))
    return x / x.sum()


def sope_weights(groups: Groups, weight_marginal: Array, ratio: Array, k: int) -> Array:
    """w(s_{t-k}, a_{t-k}) rho_{t-k+1} ... rho_t, (n,) each (SOPE; Yuan et al., 2021).

    k = 0 are the marginal state-action ratios themselves; steps before the k-th have W_t, and so
    has every step from k = the longest episode on.
    """
    if k < 0:
        raise ValueError(f"k must be at least 0 ratios, got {k}")
    weight = np.asarray(weight_marginal, dtype=float)
    for _ in range(min(k, int(groups.lengths.max(initial=0)))):
        weight = groups.previous(weight, 1.0) * ratio
    return weight


def marginal_state_action_weights(groups: Groups, state: Array, ratio: Array) -> Array:
    """Marginal ratios w_t(s_t) rho_t, (n,), of a log with few states (Xie, Ma & Wang, 2019)."""
    _, code = np.unique(state, return_inverse=True)
    return _state_ratio(groups, code.reshape(-1), ratio) * ratio


def occupancy_ratio(groups: Groups, state: Array, ratio: Array, gamma: float) -> Array:
    """Ratios of discounted occupancies w(s_t) rho_t, (n,): the same state has one w at all times.

    Steadier than ratios by time, right where neither policy looks at the time.
    """
    _, code = np.unique(state, return_inverse=True)
    code = code.reshape(-1)
    discount = discounts(groups, gamma)
    target = np.bincount(code, discount * _state_ratio(groups, code, ratio))  # (S,)
    logged = np.bincount(code, discount)
    with np.errstate(divide="ignore", invalid="ignore"):
        w = np.where(logged > 0, target / logged, 0.0)  # gamma = 0: nothing but first states
    return w[code] * ratio


def _state_ratio(groups: Groups, code: Array, ratio: Array) -> Array:
    """w_t(s_t), (n,): the mean over episodes in s at t of the weight that brought them there."""
    w = np.ones(len(code))
    for t in range(1, int(groups.lengths.max(initial=0))):
        row = groups.starts[groups.lengths > t] + t  # (g,)
        _, here = np.unique(code[row], return_inverse=True)  # (g,) of the states seen at t
        w[row] = (np.bincount(here, w[row - 1] * ratio[row - 1]) / np.bincount(here))[here]
    return w


@dataclass(frozen=True)
class HorizonCap:
    """How far the products of ratios reach, and what is left out by stopping there."""

    horizon: int  # the most steps with enough effective episodes at each
    ess: float  # effective episodes after that many steps
    bias_bound: float  # the rewards of later steps are worth at most this
    ess_full: float  # effective episodes at the ends
    ess_implied: float  # the same were products log-normal: it knows of weights not yet drawn
    log_weight_variance: float  # of the products at the ends, of those that are not 0


def horizon_cap(
    groups: Groups, ratio: Array, gamma: float, reward_range: tuple[float, float]
) -> HorizonCap:
    """The longest horizon with 100 effective episodes, and the bias of ignoring what follows."""
    ess, log = [float(len(groups))], np.zeros(len(groups))
    for log in _log_products(groups, ratio):
        ess.append(_ess(log))
    longest = len(ess) - 1
    horizon = int((np.array(ess[1:]) >= ENOUGH).cumprod().sum())
    left = (float(gamma) ** np.arange(horizon, longest)).sum()
    alive = log[np.isfinite(log)]
    variance = float(alive.var()) if len(alive) else 0.0
    return HorizonCap(
        horizon=horizon,
        ess=ess[horizon],
        bias_bound=float(max(abs(bound) for bound in reward_range) * left),
        ess_full=ess[-1],
        ess_implied=float(len(alive) * np.exp(-variance)),
        log_weight_variance=variance,
    )


def effective_episodes(groups: Groups, ratio: Array) -> Array:
    """(sum W)^2 / sum W^2 over episodes after 1, 2, ... steps, (longest,), by logarithms."""
    return np.array([_ess(log) for log in _log_products(groups, ratio)])


def _log_products(groups: Groups, ratio: Array) -> Iterator[Array]:
    """log W after 1, 2, ... steps, (G,) each; an episode that is over keeps its last."""
    with np.errstate(divide="ignore"):
        step = np.log(np.asarray(ratio, dtype=float))  # (n,), -inf where the target never goes
    log = np.zeros(len(groups))
    for t in range(int(groups.lengths.max(initial=0))):
        on = groups.lengths > t  # (G,)
        log = log.copy()
        log[on] += step[groups.starts[on] + t]
        yield log


def _ess(log: Array) -> float:
    """Effective number of weights given by their logarithms (G,)."""
    peak = log.max()
    if not np.isfinite(peak):
        return 0.0
    weight = np.exp(log - peak)
    return float(weight.sum() ** 2 / (weight**2).sum())
