"""Balanced importance weights: a classifier tells what the target draws from what was logged."""

from typing import Any

import numpy as np

from evaluation.batch import Batch
from evaluation.folds import fold_of
from evaluation.targets import Target
from evaluation.terms import Array

FOLDS = 3
DRAWS = 3  # target draws of a logged row


def classifier_weights(batch: Batch, target: Target, num_actions: int, seed: int) -> Array:
    """P(target | x, a) / P(logged | x, a) at the logged rows, (n,) (Sondhi et al., 2020).

    Needs no propensities. Cross-fitted by cluster; the classifier is logistic in context, action
    and their products. Weights are left as they come: their mean falls below 1 where the target
    has what was never logged.
    """
    from sklearn.linear_model import LogisticRegression

    found = target.distribution(batch)
    if found is None:
        raise ValueError("balanced_ips draws from the target: make it from_matrix, from_lists, "
                         "from_function or from_ranker")  # fmt: skip
    items, probs = found
    rng = np.random.default_rng(seed)
    n = len(batch.action)
    # Target draws replace logged actions row by row, so both halves share their contexts.
    drawn = [drawn_items(items, probs, rng) for _ in range(DRAWS)]
    fold = fold_of(batch.cluster if batch.cluster is not None else batch.rows, FOLDS, seed)
    weight = np.empty(n)
    logged = features(batch.context, batch.action, num_actions)
    theirs = [features(batch.context, each, num_actions) for each in drawn]
    for held_out in range(FOLDS):
        train, test = fold != held_out, fold == held_out
        if not train.any() or not test.any():
            raise ValueError(f"balanced_ips needs clusters in each of {FOLDS} folds, too few given")
        model: Any = LogisticRegression(max_iter=500)
        model.fit(stacked([logged[train], *(x[train] for x in theirs)]),
                  np.repeat([0, 1], [train.sum(), DRAWS * train.sum()]))  # fmt: skip
        weight[test] = np.exp(model.decision_function(logged[test])) / DRAWS  # odds, equal halves
    return weight


def drawn_items(items: Array, probs: Array, rng: np.random.Generator) -> Array:
    """One item of each row's distribution, (n, k) to (n,)."""
    point = rng.random(len(probs))[:, None] * probs.sum(axis=1, keepdims=True)
    place = (probs.cumsum(axis=1) < point).sum(axis=1)
    return items[np.arange(len(items)), np.minimum(place, probs.shape[1] - 1)]


def features(context: Array | None, action: Array, num_actions: int) -> Any:
    """One-hot action and its products with the context, sparse (n, A (1 + d))."""
    from scipy import sparse

    n = len(action)
    x = np.ones((n, 1)) if context is None else np.column_stack([np.ones(n), context])
    d = x.shape[1]
    place = action[:, None] * d + np.arange(d)  # (n, 1 + d)
    rows = np.repeat(np.arange(n), d)
    return sparse.csr_matrix((x.ravel(), (rows, place.ravel())), shape=(n, num_actions * d))


def stacked(parts: list[Any]) -> Any:
    """Sparse rows below each other."""
    from scipy import sparse

    return sparse.vstack(parts, format="csr")
