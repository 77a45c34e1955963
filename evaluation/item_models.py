"""Models of the reward of (context, item) pairs: item means, linear, any regressor or classifier.

Each has `scores(context (b, d), items (b, k)) -> (b, k)` and is trained on `Rows`.
"""

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray

PENALTIES = (
    1.0,
    10.0,
    100.0,
    1e3,
    1e4,
)  # of linear models on unit columns, tried on held-out users
SEARCH_ROWS = 20_000  # enough to choose a penalty
CHUNK = 2_000_000  # numbers in a temporary of `scores`


def smoothed_means(action: Array, reward: Array, num_actions: int, weight: Array) -> Array:
    """Mean reward of each item shrunken to the mean of all, (n,) to (A,).

    (sum r + k m) / (count + k), k = variance within items / variance between items, both by the
    one-way analysis of variance (Robbins, 1956; Searle et al., 1992); no spread: m for all.
    """
    count = np.bincount(action, weight, num_actions)  # (A,)
    total = np.bincount(action, weight * reward, num_actions)  # (A,)
    square = float(weight @ reward**2)
    n, seen = count.sum(), int((count > 0).sum())
    mean = float(total.sum() / n)
    own = np.divide(total, count, out=np.full(num_actions, mean), where=count > 0)  # (A,)
    within = max(0.0, square - float(count @ own**2)) / max(n - seen, 1.0)
    spread = float(count @ (own - mean) ** 2) - (seen - 1) * within
    between = max(0.0, spread) / max(n - float(count @ count) / n, 1e-12)
    if between <= 1e-12 * max(within, 1e-300):
        return np.full(num_actions, mean)
    k = within / between
    shrunken = (total + k * mean) / np.maximum(count + k, 1e-300)
    return np.where(count > 0, shrunken, mean)


@dataclass(frozen=True)
class Means:
    """q of an item in whatever context: values (A,)."""

    values: Array

    def scores(self, context: Array, items: Array) -> Array:
        """(b, d), (b, k) to (b, k)."""
        return self.values[items]


@dataclass(frozen=True)
class Linear:
    """Intercept + context . x + item_a + (x left) . right_a, through a logistic link if asked."""

    center: Array  # (d,)
    scale: Array  # (d,)
    intercept: float
    context: Array  # (d,)
    item: Array  # (A,)
    left: Array | None  # (d, f), None for the identity
    right: Array | None  # (A, f), None without interactions
    logistic: bool

    def scores(self, context: Array, items: Array) -> Array:
        """(b, d), (b, k) to (b, k), without a row of features for each pair."""
        x = (context - self.center) / self.scale  # (b, d)
        score = self.intercept + (x @ self.context)[:, None] + self.item[items]  # (b, k)
        if self.right is not None:
            x = x if self.left is None else x @ self.left  # (b, f)
            if len(self.right) <= 4 * items.shape[1]:
                score += np.take_along_axis(x @ self.right.T, items, axis=1)
            else:
                step = max(1, CHUNK // (items.shape[1] * self.right.shape[1]))
                for i in range(0, len(x), step):
                    rows = slice(i, i + step)
                    score[rows] += np.einsum("bf,bkf->bk", x[rows], self.right[items[rows]])
        return _sigmoid(score) if self.logistic else score


@dataclass(frozen=True)
class Columns:
    """Any regressor or classifier on the columns [context, codes of the item]."""

    model: Any
    codes: Array  # (A, c)

    def scores(self, context: Array, items: Array) -> Array:
        """(b, d), (b, k) to (b, k)."""
        k, out = items.shape[1], np.empty(items.shape)
        step = max(1, CHUNK // max(1, k * (context.shape[1] + self.codes.shape[1])))
        for i in range(0, len(items), step):
            part = items[i : i + step]  # (s, k)
            rows = np.repeat(context[i : i + step], k, axis=0)  # (s k, d)
            columns = np.hstack([rows, self.codes[part.ravel()]])
            out[i : i + step] = _predict(self.model, columns).reshape(part.shape)
        return out


def _sigmoid(x: Array) -> Array:
    """The logistic function, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _predict(model: Any, columns: Any) -> Array:
    """Expected reward (n,): the probability of a 1 if the model is a classifier."""
    if hasattr(model, "predict_proba"):
        return np.asarray(model.predict_proba(columns))[:, 1]
    return np.asarray(model.predict(columns), dtype=float).reshape(-1)


def losses(reward: Array, q: Array, binary: bool) -> Array:
    """Log loss of 0/1 rewards, squared error of others, (n,)."""
    if not binary:
        return (reward - q) ** 2
    p = np.clip(q, 1e-6, 1.0 - 1e-6)
    return -(reward * np.log(p) + (1.0 - reward) * np.log(1.0 - p))


@dataclass(frozen=True)
class Rows:
    """What a model is trained on; `held` (n,) are users on which its penalty is chosen."""

    context: Array  # (n, d)
    action: Array  # (n,)
    reward: Array  # (n,)
    weight: Array  # (n,), of mean 1
    held: Array  # (n,) bool

    def __getitem__(self, index: Array) -> "Rows":
        return Rows(
            self.context[index],
            self.action[index],
            self.reward[index],
            self.weight[index],
            self.held[index],
        )


def regress(design: Any, rows: Rows, penalty: float, binary: bool) -> Any:
    """Logistic regression or ridge of the rewards on the design."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge

    if not binary:
        return Ridge(alpha=penalty).fit(design, rows.reward, sample_weight=rows.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # q need not be the exact optimum
        model = LogisticRegression(C=1.0 / penalty, max_iter=200)
        return model.fit(design, rows.reward, sample_weight=rows.weight)


def best_penalty(design: Any, rows: Rows, binary: bool) -> float:
    """The largest penalty that held users cannot tell from their best (Breiman et al., 1984).

    One standard error of the paired difference decides: a few clicks must not choose a loose one.
    """
    index = np.arange(0, len(rows.held), -(-len(rows.held) // SEARCH_ROWS))
    old, new = index[~rows.held[index]], index[rows.held[index]]
    if not len(old) or not len(new) or np.ptp(rows.reward[old]) == 0:
        return PENALTIES[0]
    found = []
    for penalty in PENALTIES:
        model = regress(design[old], rows[old], penalty, binary)
        found.append(losses(rows.reward[new], _predict(model, design[new]), binary))
    best = found[int(np.argmin([loss.mean() for loss in found]))]  # (held,)
    excess = [loss - best for loss in found]
    near = [e.mean() <= e.std() / len(e) ** 0.5 for e in excess]
    return PENALTIES[int(np.flatnonzero(near).max())]


def design_of(x: Array, action: Array, features: Array | None, size: int, crossed: bool) -> Any:
    """Columns [context, item, context x item]: sparse if items are one-hot (features None)."""
    n, d = x.shape
    if features is not None:
        z = features[action]  # (n, f)
        pairs = (x[:, :, None] * z[:, None, :]).reshape(n, -1) if crossed else x[:, :0]
        return np.hstack([x, z, pairs])
    import scipy.sparse as sp

    parts = [sp.csr_matrix(x), sp.csr_matrix((np.ones(n), action, np.arange(n + 1)), (n, size))]
    if crossed:
        column = (action[:, None] * d + np.arange(d)).ravel()  # item-major: (A, d) when unfolded
        parts.append(sp.csr_matrix((x.ravel(), column, np.arange(n + 1) * d), (n, size * d)))
    return sp.hstack(parts, format="csr")


def _scale(values: Array) -> tuple[Array, Array]:
    """Mean and deviation (d,) of columns (n, d); a constant column is left in its own unit."""
    spread = values.std(axis=0)  # (d,)
    return values.mean(axis=0), np.where(spread > 1e-12, spread, 1.0)


def fit_linear(rows: Rows, features: Array | None, size: int, crossed: bool, binary: bool) -> Any:
    """Logistic regression or ridge, taken apart into context, item and interaction."""
    center, scale = _scale(rows.context)
    if features is not None:
        middle, unit = _scale(features)
        features = (features - middle) / unit  # (A, f)
    x = (rows.context - center) / scale  # (n, d)
    design = design_of(x, rows.action, features, size, crossed)
    model = regress(design, rows, best_penalty(design, rows, binary), binary)
    coef, d = np.ravel(model.coef_), x.shape[1]
    width = size if features is None else features.shape[1]
    item, pairs = coef[d : d + width], coef[d + width :]
    left, right = None, None
    if crossed and features is None:
        right = pairs.reshape(size, d)
    elif crossed and features is not None:
        table = pairs.reshape(d, width)  # x P z, written in the shorter of two ways
        left, right = (None, features @ table.T) if d < width else (table, features)
    values = item if features is None else features @ item  # (A,)
    intercept = float(np.ravel(model.intercept_)[0])
    return Linear(center, scale, intercept, coef[:d], values, left, right, binary)


def item_codes(rows: Rows, features: Array | None, size: int) -> Array:
    """Columns (A, c) that stand for items: their features, or smoothed mean reward and count."""
    if features is not None:
        return features
    count = np.bincount(rows.action, minlength=size)  # (A,)
    mean = smoothed_means(rows.action, rows.reward, size, rows.weight)  # (A,)
    return np.stack([mean, np.log1p(count)], axis=1)


def boosting(binary: bool, seed: int) -> Any:
    """Boosted trees, small ones: clicks are rare."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    kind = HistGradientBoostingClassifier if binary else HistGradientBoostingRegressor
    return kind(
        learning_rate=0.05,
        max_iter=60,
        max_leaf_nodes=8,
        min_samples_leaf=50,
        l2_regularization=10.0,
        early_stopping=False,
        random_state=seed,
    )


def new(model: Any) -> Any:
    """An unfitted copy of an estimator, or what its factory makes."""
    if isinstance(model, str):
        return model
    if isinstance(model, type) or not hasattr(model, "fit"):
        return model()
    return copy.deepcopy(model)
