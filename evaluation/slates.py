"""Slates: what the weight of a slot is, and the terms of the estimators that use it.

Each weight buys less variance with an assumption on rewards. Joint: none. Prefix: a slot's reward
depends on the items down to it. Item at position: on its own item and place only. Pseudo-inverse:
the slate's reward is a sum over its places. Position-based: an item looked at is worth the same
everywhere. Slots (n,) come sorted by their groups, one group a slate.
"""

from itertools import permutations
from math import perm

import numpy as np

from evaluation.terms import Array, Groups, Terms, plain

MAX_RANKINGS = 1_000_000  # lists that may be enumerated
LOG_STEP = 0.3  # of log time in item_position_marginals: an error of about exp(-9 / LOG_STEP)
FIRST_LOG_TIME = -32.0  # nothing has arrived by exp(-32) but for a share of 1e-14


def weighted_slots(groups: Groups, weight: Array, reward: Array) -> Terms:
    """Sum of w r over the slots (n,) of a slate: sips, rips, iips, pi and pbm differ in w alone."""
    return plain(groups.sum(weight * reward))


def self_normalised_slots(groups: Groups, weight: Array, reward: Array, horizon: int) -> Terms:
    """Each position's weight over its mean over slates, (G, horizon) ratios.

    A slate without the position earns nothing there and counts with its last weight: the mean of
    the weights then stays 1 even if the items decide how long a slate gets.
    """
    return Terms(
        top=groups.padded(weight * reward, horizon),
        bottom=groups.padded(weight, horizon, fill=groups.last(weight)),
    )


def cascade_doubly_robust(
    groups: Groups,
    weight: Array,
    reward: Array,
    q_logged: Array,
    value: Array,
    weight_prev: Array | None = None,
) -> Terms:
    """Prefix weights with a model of each slot's reward to go (Kiyohara et al., 2022).

    `q_logged` and `value` (n,) are the model at the logged item and under the target, both given
    the items above; `weight_prev` is the weight of the slot above, 1 at the first.
    """
    if weight_prev is None:
        weight_prev = groups.previous(weight, fill=1.0)  # (n,)
    return plain(groups.sum(weight * (reward - q_logged) + weight_prev * value))


def joint_weights(groups: Groups, ratio: Array) -> Array:
    """Ratios (n,) given the items above to the ratio of the whole slate, on each of its slots."""
    return groups.last(groups.cumulative_product(ratio))[groups.index]  # (n,)


def prefix_weights(groups: Groups, ratio: Array) -> Array:
    """Ratios (n,) given the items above to the ratio of the slate down to each slot."""
    return groups.cumulative_product(ratio)  # (n,)


def pseudo_inverse_product_weights(groups: Groups, marginal_ratio: Array) -> Array:
    """Pseudo-inverse weight of positions drawn independently (Swaminathan et al., 2017), (n,).

    `marginal_ratio` (n,) is of the item at its position. Weights may be negative.
    """
    return (1.0 - groups.lengths + groups.sum(marginal_ratio))[groups.index]  # (n,)


def pseudo_inverse_weights(slates: Array, probs_b: Array, probs_e: Array, logged: Array) -> Array:
    """Pseudo-inverse weights of slates (G, L) logged in one context (Swaminathan et al., 2017).

    `slates` (m, L) are all that the logging policy or the target may show there, with their
    probabilities (m,) each. Target mass at an (item, position) never logged is lost: the mean
    weight falls below 1.
    """
    slates, logged = np.asarray(slates), np.asarray(logged)
    if slates.ndim != 2 or logged.ndim != 2 or slates.shape[1] != logged.shape[1]:
        raise ValueError(
            f"slates (m, L) and logged (G, L) must be of one length, "
            f"got shapes {slates.shape} and {logged.shape}"
        )
    if len(probs_b) != len(slates) or len(probs_e) != len(slates):
        raise ValueError(
            f"every slate needs one probability of each policy, got {len(slates)} slates, "
            f"{len(probs_b)} of the logging policy and {len(probs_e)} of the target"
        )
    items = np.unique(slates)  # (A,)
    unknown = ~np.isin(logged, items).all(axis=1)  # (G,)
    if unknown.any():
        raise ValueError(
            f"row {int(unknown.argmax())} of logged shows an item that is in none of the slates: "
            f"enumerate all slates the logging policy may show"
        )
    shown = _indicators(slates, items)  # (m, L A)
    gamma = shown.T @ (np.asarray(probs_b)[:, None] * shown)  # (L A, L A) = E_b[1 1^T]
    target = np.asarray(probs_e) @ shown  # (L A,) marginals of the target
    # the positions' blocks sum to the same 1: L - 1 eigenvalues are 0 but for rounding
    return _indicators(logged, items) @ np.linalg.pinv(gamma, rcond=1e-12, hermitian=True) @ target


def _indicators(slates: Array, items: Array) -> Array:
    """Slates (m, L) to 1 at each (position, item) they show, (m, L A)."""
    return (slates[:, :, None] == items).reshape(len(slates), -1).astype(float)


def position_based_weights(pi_e_at: Array, pi_b_at: Array, examination: Array) -> Array:
    """Weights (n,) if a reward is the place's examination times the item's worth (Li et al., 2018).

    `pi_e_at` and `pi_b_at` (n, L) are the probabilities of the row's item at every place,
    `examination` (L,) how likely each is looked at; all ones: the item model.
    """
    examination = np.asarray(examination, dtype=float)
    if np.shape(pi_e_at) != np.shape(pi_b_at) or np.shape(pi_b_at)[1:] != examination.shape:
        raise ValueError(
            f"pi_e_at and pi_b_at must be (n, L) for the {examination.shape} of examination, "
            f"got {np.shape(pi_e_at)} and {np.shape(pi_b_at)}"
        )
    seen_b = np.asarray(pi_b_at) @ examination  # (n,)
    if (seen_b <= 0).any():
        raise ValueError(
            f"row {int((seen_b <= 0).argmax())} shows an item at no place that is examined under "
            f"the logging policy: a logged item cannot have been impossible"
        )
    return np.asarray(pi_e_at) @ examination / seen_b


def all_rankings(num_items: int, k: int) -> Array:
    """All ordered lists of k different items, (m, k), for problems small enough to enumerate."""
    if not 1 <= k <= num_items:
        raise ValueError(f"k must be in 1..{num_items}, the number of items, got {k}")
    if perm(num_items, k) > MAX_RANKINGS:
        raise ValueError(
            f"{num_items} items have {perm(num_items, k)} lists of {k}, more than {MAX_RANKINGS}: "
            f"use item_position_marginals"
        )
    return np.array(list(permutations(range(num_items), k)))


def ranking_probs(logits: Array, rankings: Array) -> Array:
    """Plackett-Luce probability of each ranking (m, k) under logits (..., A), (..., m)."""
    logits = np.asarray(logits, dtype=float)
    left = np.repeat(logits[..., None, :], len(rankings), axis=-2)  # (..., m, A) not yet shown
    rows = np.arange(len(rankings))
    log_prob = np.zeros(left.shape[:-1])  # (..., m)
    for item in np.asarray(rankings).T:  # (m,) at each position
        rest = np.logaddexp.reduce(left, axis=-1)  # (..., m), -inf if nothing possible is left
        log_prob += left[..., rows, item] - np.where(np.isfinite(rest), rest, 0.0)
        left[..., rows, item] = -np.inf
    return np.exp(log_prob)


def item_position_marginals(probs: Array, items: Array, k: int) -> Array:
    """Probability of each row's item at each of k places, (n, k), if a slate is drawn from `probs`.

    `probs` (n, A) is of the first slot, the rest is Plackett-Luce. Items arrive like exponential
    clocks of rate `probs` (n, A), so an item is at place l if l others came before it: one integral
    over its arrival, by the trapezoid rule in log time, to about 1e-12 (no sampling error).
    """
    probs, items = np.asarray(probs, dtype=float), np.asarray(items)
    n, num_items = probs.shape
    if not 1 <= k <= num_items or len(items) != n:
        raise ValueError(
            f"expected one item a row and k in 1..{num_items}, got {len(items)} items for {n} rows "
            f"and k = {k}"
        )
    probs = probs / probs.sum(axis=1, keepdims=True)
    rate = probs[np.arange(n), items]  # (n,)
    out = np.zeros((n, k))
    possible = np.flatnonzero(rate > 0)
    if not len(possible):
        return out
    last = np.log(40.0 / rate[possible].min())  # by then every item asked for has arrived
    time = np.exp(np.arange(FIRST_LOG_TIME, last + LOG_STEP, LOG_STEP))  # (Q,)
    size = max(1, 1_000_000 // (len(time) * k))  # rows at once: some ten megabytes
    for rows in np.split(possible, np.arange(size, len(possible), size)):
        others = probs[rows]  # (c, A)
        others[np.arange(len(rows)), items[rows]] = 0.0
        before = np.zeros((k, len(rows), len(time)))  # that l others have arrived
        before[0] = 1.0
        for p in others.T:  # (c,) item by item
            waits = np.exp(-p[:, None] * time)  # (c, Q)
            arrived = -np.expm1(-p[:, None] * time)
            before[1:] = before[1:] * waits + before[:-1] * arrived
            before[0] *= waits
        own = rate[rows, None] * time  # (c, Q)
        out[rows] = LOG_STEP * np.einsum("kcq,cq->ck", before, own * np.exp(-own))
    return out
