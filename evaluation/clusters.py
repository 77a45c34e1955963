"""Weights over what items share, not over items: MIPS (Saito & Joachims, 2022), OffCEM (2023).

Both need the logging policy's probabilities of other items than the logged one: those of the log's
support or logging policy, or of a fitted one (`propensity.py`) if only propensities were logged.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evaluation.folds import checked_action, checked_context, fold_of, same_length
from evaluation.tuning import slope

Array = np.ndarray

CHUNK = 4_000_000  # numbers in a temporary (rows, A)
MAX_SUBSETS = 4096  # of embedding dimensions, in the exact search


def _mass(cluster: Array, own: Array, items: Any, probs: Any) -> Array:
    """Probability (n,) that a policy shows an item of cluster `own` (n,); EMPTY is in none."""
    p = np.asarray(probs, dtype=float)  # (n, k)
    shape = (len(own), len(cluster) if items is None else np.shape(items)[-1])
    if p.shape != shape:
        raise ValueError(f"probs must be {shape}, a row for each logged one, got {p.shape}")
    if items is None:
        return np.where(cluster == own[:, None], p, 0.0).sum(axis=1)
    ids = np.asarray(items)  # (n, k)
    if ids.shape != p.shape:
        raise ValueError(f"items must have the shape of probs, {p.shape}, got {ids.shape}")
    if ids.size and (ids.min() < -1 or ids.max() >= len(cluster)):
        raise ValueError(
            f"items must be in 0..{len(cluster) - 1} or -1 (none), got {ids.min()}..{ids.max()}: "
            "give a cluster for every action"
        )
    same = (cluster[ids] == own[:, None]) & (ids >= 0)  # (n, k)
    return np.where(same, p, 0.0).sum(axis=1)


def _ratio(top: Array, bottom: Array, what: str) -> Array:
    """Target over logging mass, (n,) each; what was logged has mass under its own policy."""
    bad = ~(bottom > 0)  # (n,)
    if bad.any():
        raise ValueError(
            f"the logging policy gives the logged {what} of row {int(bad.argmax())} no "
            "probability: check its distribution against the log"
        )
    return top / bottom


def cluster_ratio(
    cluster_of_action: Any,
    action: Any,
    pi_items: Any,
    pi_probs: Any,
    pb_items: Any,
    pb_probs: Any,
) -> Array:
    """p_pi(c|x) / p_b(c|x) at the logged item's cluster c, (n,); clusters (A,) of actions (n,).

    Policies are items and probs (n, k), -1 for none, or items None and dense probs (n, A).
    """
    cluster = np.asarray(cluster_of_action)
    if cluster.ndim != 1:
        raise ValueError(f"cluster_of_action must be (A,), got shape {cluster.shape}")
    same_length(action=action, pi_probs=pi_probs, pb_probs=pb_probs)
    own = cluster[checked_action(action, len(cluster))]  # (n,)
    top = _mass(cluster, own, pi_items, pi_probs)
    return _ratio(top, _mass(cluster, own, pb_items, pb_probs), "cluster")


def embedding_ratio(p_e_a: Sequence[Any], embedding: Any, pi_e: Any, pi_b: Any) -> Array:
    """p_pi(e|x) / p_b(e|x), (n,), where p_pi(e|x) = sum_a pi(a|x) prod_d p(e_d|a).

    p_e_a holds (A, V_d) for each dimension d, embedding (n, D) what was observed, pi (n, A).
    """
    e = np.asarray(embedding)
    n = same_length(embedding=embedding, pi_e=pi_e, pi_b=pi_b)
    target, logging = np.asarray(pi_e, dtype=float), np.asarray(pi_b, dtype=float)
    tables = [np.asarray(table, dtype=float) for table in p_e_a]
    if e.ndim != 2 or e.shape[1] != len(tables) or not tables:
        raise ValueError(f"embedding must be (n, {len(tables)}) as p_e_a has it, got {e.shape}")
    _check_policies(target, logging, len(tables[0]))
    for d, table in enumerate(tables):
        bad = (e[:, d] < 0) | (e[:, d] >= table.shape[1])  # (n,)
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"embedding must be in 0..{table.shape[1] - 1} in dimension {d}, "
                f"got {e[row, d]} in row {row}"
            )
    top, bottom = np.empty(n), np.empty(n)
    step = max(1, CHUNK // target.shape[1])
    for i in range(0, n, step):
        rows = slice(i, i + step)
        likelihood = np.ones(target[rows].shape)  # (s, A)
        for d, table in enumerate(tables):
            likelihood *= table[:, e[rows, d]].T
        top[rows] = (target[rows] * likelihood).sum(axis=1)
        bottom[rows] = (logging[rows] * likelihood).sum(axis=1)
    return _ratio(top, bottom, "embedding")


def _check_policies(pi_e: Array, pi_b: Array, num_actions: int) -> None:
    """Dense (n, A) both, of the same actions."""
    for name, pi in (("pi_e", pi_e), ("pi_b", pi_b)):
        if pi.ndim != 2 or pi.shape[1] != num_actions:
            raise ValueError(f"{name} must be (n, {num_actions}), got {pi.shape}")


def estimated_embedding_ratio(
    context: Any,
    action: Any,
    embedding: Any,
    pi_e: Any,
    pi_b: Any,
    *,
    cluster: Any = None,
    folds: int = 1,
    seed: int = 0,
) -> Array:
    """E[w(x, a) | x, e], (n,), when p(e|a) is not known: sum_a P(a|x, e) w(x, a).

    P is a logistic regression of the action on context and one-hot embedding (n, D) among actions
    the logging policy can take. In one fold it leans towards the row's own action, that is towards
    IPS: variance. More folds, by cluster, lean away from it, and weights then need not average 1.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import OneHotEncoder

    e, columns = np.asarray(embedding), {"context": context, "cluster": cluster}
    n = same_length(action=action, embedding=e, pi_e=pi_e, pi_b=pi_b, **columns)
    if e.ndim != 2:
        raise ValueError(f"embedding must be (n, D), got shape {e.shape}")
    target, logging = np.asarray(pi_e, dtype=float), np.asarray(pi_b, dtype=float)
    _check_policies(target, logging, logging.shape[-1])
    a = checked_action(action, logging.shape[1])
    x = checked_context(context, n)  # (n, d)
    x = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-12)
    hot = OneHotEncoder(handle_unknown="ignore").fit_transform(e).toarray()
    x = np.hstack([x, hot])  # (n, d + sum_d V_d)
    ratio = np.divide(target, logging, out=np.zeros_like(target), where=logging > 0)  # (n, A)
    fold = fold_of(np.arange(n) if cluster is None else cluster, folds, seed)
    out = np.empty(n)
    for f in np.unique(fold):
        own = fold == f
        train = np.ones(n, dtype=bool) if folds == 1 else ~own
        if len(np.unique(a[train])) < 2:
            raise ValueError(
                f"rows outside fold {f} have fewer than two actions: pass folds=1 or more rows"
            )
        model = LogisticRegression(max_iter=300).fit(x[train], a[train])
        posterior = np.zeros((int(own.sum()), logging.shape[1]))
        posterior[:, model.classes_] = model.predict_proba(x[own])
        posterior *= logging[own] > 0
        mass = posterior.sum(axis=1)  # (own,)
        none = ~(mass > 0)  # no action it knows can be taken here: the logged one was
        posterior[none, a[own][none]] = mass[none] = 1.0
        out[own] = (posterior * ratio[own]).sum(axis=1) / mass
    return out


def choose_dimensions(
    weight_of: Callable[[tuple[int, ...]], Array],
    num_dimensions: int,
    reward: Any,
    *,
    method: str = "greedy",
    least: int = 1,
    delta: float = 0.05,
) -> tuple[int, ...]:
    """Dimensions of the embedding by SLOPE (Su et al., 2020): fewer while the estimates agree.

    `weight_of(dimensions)` gives weights (n,); "exact" tries all subsets from large to small,
    "greedy" drops the dimension whose loss narrows the interval least, one after the other.
    """
    r = np.asarray(reward, dtype=float)
    if method not in ("greedy", "exact"):
        raise ValueError(f"method must be greedy or exact, got {method!r}")
    if not 1 <= least <= num_dimensions:
        raise ValueError(f"least must be in 1..{num_dimensions}, got {least}")
    if method == "exact" and 2**num_dimensions > MAX_SUBSETS:
        raise ValueError(
            f"exact search of {num_dimensions} dimensions is over 2^{num_dimensions} subsets, "
            f"at most {MAX_SUBSETS} are tried: use method='greedy'"
        )
    chosen: list[tuple[tuple[int, ...], float, float]] = []  # dimensions, mean, variance
    now = tuple(range(num_dimensions))
    for size in range(num_dimensions, least - 1, -1):
        found = []
        for dimensions in itertools.combinations(now, size):
            values = weight_of(dimensions) * r  # (n,)
            found.append((dimensions, float(values.mean()), float(values.var())))
        found.sort(key=lambda candidate: -candidate[2])  # widest, that is least biased, first
        for candidate in found:
            _, means, variances = zip(*chosen, candidate, strict=True)
            best = slope(np.array(means), np.array(variances), len(r), delta)
            if variances[best] > min(variances):  # not down to the narrowest: it disagrees
                return min(chosen, key=lambda c: c[2])[0]
            chosen.append(candidate)
        if method == "greedy":
            now = found[0][0]
    return min(chosen, key=lambda c: c[2])[0]


def kmeans_clusters(vectors: Any, k: int, seed: int = 0) -> Array:
    """Cluster of each item, vectors (A, D) to (A,): mini-batch k-means (Sculley, 2010)."""
    from sklearn.cluster import MiniBatchKMeans

    x = checked_context(vectors, len(vectors))
    if not 1 <= k <= len(x):
        raise ValueError(f"k must be in 1..{len(x)}, the number of items, got {k}")
    model = MiniBatchKMeans(k, n_init=3, batch_size=4096, random_state=seed)
    return model.fit_predict(x).astype(np.int64)
