"""Cross-fitted rewards q(x, a): a row's q comes from models that have not seen the row's user.

Folds are made of clusters (users), never of rows where clusters are known: a model that saw a
user's other rows flatters itself on this one (Chernozhukov et al., 2018). A fold is a hash of the
cluster, so a stream of batches needs no table of users.
"""

from typing import Any

import numpy as np

from evaluation.folds import checked_action, checked_context, fold_of, others, same_length
from evaluation.item_models import (
    Columns,
    Means,
    Rows,
    boosting,
    fit_linear,
    item_codes,
    losses,
    new,
    smoothed_means,
)

Array = np.ndarray

MAX_INTERACTIONS = 2000  # columns of context x item
MAX_ENTRIES = 50_000_000  # numbers in one design matrix: 400 MB


class FittedRewardModel:
    """q(x, a) of `folds` models, each blind to the users of its own fold."""

    def __init__(
        self, models: list[Any], ranges: Array, num_actions: int, num_context: int, seed: int
    ) -> None:
        self.models, self.ranges = models, ranges  # ranges (folds, 2): rewards seen in training
        self.num_actions, self.num_context, self.seed = num_actions, num_context, seed
        self.summary: dict[str, Any] = {}

    @property
    def folds(self) -> int:
        """How many models there are."""
        return len(self.models)

    def fold_of(self, cluster: Any) -> Array:
        """Folds (n,) of clusters, or of row numbers in the whole log if it names no clusters."""
        return fold_of(cluster, self.folds, self.seed)

    def predict(self, context: Any, items: Any, fold: Any = None) -> Array:
        """Context (b, d), items (b, k) or (k,) for all, folds (b,) to q (b, k); EMPTY has q = 0."""
        items = np.asarray(items)
        lengths = [len(c) for c in (context, fold) if c is not None]
        if items.ndim == 1:
            items = np.broadcast_to(items, (lengths[0] if lengths else 1, len(items)))
        b = len(items)
        x = checked_context(context, b)  # (b, d)
        if any(length != b for length in lengths) or x.shape[1] != self.num_context:
            raise ValueError(
                f"predict expects context ({b}, {self.num_context}) and fold ({b},) for items of "
                f"shape {items.shape}, got context {x.shape} and lengths {lengths}"
            )
        if items.size and (items.min() < -1 or items.max() >= self.num_actions):
            raise ValueError(
                f"items must be in 0..{self.num_actions - 1} or -1 (none), got "
                f"{items.min()}..{items.max()}: raise num_actions in fit"
            )
        if fold is None and self.folds > 1:
            raise ValueError("predict needs the fold of each row: pass fold=fold_of(cluster)")
        fold = np.zeros(b, dtype=np.int64) if fold is None or self.folds == 1 else np.asarray(fold)
        if b and (fold.min() < 0 or fold.max() >= self.folds):
            raise ValueError(f"fold must be in 0..{self.folds - 1}, got {fold.min()}..{fold.max()}")
        q, some = np.zeros(items.shape), np.maximum(items, 0)
        for f in np.unique(fold):
            rows = np.flatnonzero(fold == f)
            score = self.models[f].scores(x[rows], some[rows])
            q[rows] = np.clip(score, *self.ranges[f])
        return np.where(items >= 0, q, 0.0)

    def report(self) -> dict[str, Any]:
        """Whether it knows anything: its loss on unseen users against that of a constant."""
        return dict(self.summary)


class RewardModel:
    """How to fit q: "linear", "boosting", or an estimator (or its factory) as sklearn has them.

    Linear: logistic if rewards are 0/1, else ridge, on [context, item, context x item]; items are
    their features, one-hot without; the penalty is chosen on held-out users. With neither context
    nor features it is the items' smoothed mean reward. Others see [context, features], or without
    features [context, smoothed mean reward, log count].
    """

    def __init__(
        self,
        model: Any = "linear",
        *,
        folds: int = 3,
        item_features: Any = None,
        interactions: bool = True,
        max_rows: int = 500_000,
        seed: int = 0,
    ) -> None:
        if isinstance(model, str) and model not in ("linear", "boosting"):
            raise ValueError(f"model must be linear, boosting or an estimator, got {model!r}")
        if folds < 1 or max_rows < 1:
            raise ValueError(f"folds and max_rows must be positive, got {folds} and {max_rows}")
        self.model, self.folds, self.seed = model, folds, seed
        self.features = None if item_features is None else np.asarray(item_features, dtype=float)
        if self.features is not None and self.features.ndim != 2:
            raise ValueError(f"item_features must be (A, f), got shape {self.features.shape}")
        self.interactions, self.max_rows = interactions, max_rows

    def fit(
        self,
        context: Any,
        action: Any,
        reward: Any,
        cluster: Any,
        num_actions: int,
        weight: Any = None,
    ) -> FittedRewardModel:
        """Context (n, d) or None, columns (n,); without clusters a fold is of row numbers 0..n-1.

        `weight` (n,) weighs the squared errors or log likelihoods of rows.
        """
        n = same_length(
            action=action, reward=reward, context=context, cluster=cluster, weight=weight
        )
        rows = self._rows(n, context, action, reward, cluster, num_actions, weight)
        fold = fold_of(np.arange(n) if cluster is None else cluster, self.folds, self.seed)
        keep = self._keep(n, rows.context.shape[1], num_actions)  # (m,)
        rows, fold = rows[keep], fold[keep]
        binary = bool(np.isin(rows.reward, (0.0, 1.0)).all())
        models, ranges, constant = [], [], np.empty(len(keep))
        for f in range(self.folds):
            own = fold == f  # (m,)
            train = rows[others(fold, f, self.folds)]
            models.append(self._fit_one(train, num_actions, binary))
            ranges.append([train.reward.min(), train.reward.max()])
            constant[own] = np.average(train.reward, weights=train.weight)
        fitted = FittedRewardModel(
            models, np.array(ranges), num_actions, rows.context.shape[1], self.seed
        )
        seen = rows.context if rows.context.shape[1] else None
        q = fitted.predict(seen, rows.action[:, None], fold)[:, 0]
        own_loss = float(losses(rows.reward, q, binary).mean())
        dull = float(losses(rows.reward, constant, binary).mean())
        fitted.summary = {
            "model": self.model if isinstance(self.model, str) else type(new(self.model)).__name__,
            "folds": self.folds,
            "rows": len(keep),
            "loss": "log loss" if binary else "squared error",
            "out_of_fold": own_loss,
            "constant": dull,
            "explained": 1.0 - own_loss / dull if dull > 0 else 0.0,  # R2, or its like for log loss
        }
        return fitted

    def _rows(
        self,
        n: int,
        context: Any,
        action: Any,
        reward: Any,
        cluster: Any,
        num_actions: int,
        weight: Any,
    ) -> Rows:
        """Checked columns; one user in five is held out when a penalty is chosen."""
        if self.features is not None and len(self.features) != num_actions:
            raise ValueError(
                f"item_features must have a row for each of {num_actions} actions, "
                f"got {len(self.features)}"
            )
        r = np.asarray(reward, dtype=float)  # (n,)
        w = np.ones(n) if weight is None else np.asarray(weight, dtype=float)  # (n,)
        for name, column in (("reward", r), ("weight", w)):
            bad = ~np.isfinite(column)
            if bad.any():
                raise ValueError(f"{name} is not finite in row {int(bad.argmax())}: drop the row")
        if (w < 0).any() or not w.any():
            raise ValueError("weight must be non-negative and somewhere positive")
        held = fold_of(np.arange(n) if cluster is None else cluster, 5, self.seed + 1) == 0
        x = checked_context(context, n)
        return Rows(x, checked_action(action, num_actions), r, w / w.mean(), held)

    def _crossed(self, d: int, size: int) -> bool:
        """Whether interactions are asked for and few enough."""
        width = size if self.features is None else self.features.shape[1]
        return self.interactions and 0 < d * width <= MAX_INTERACTIONS

    def _keep(self, n: int, d: int, size: int) -> Array:
        """The rows to fit on: all, or a random sample that fits into memory."""
        f = 1 if self.features is None else self.features.shape[1]
        most = min(self.max_rows, MAX_ENTRIES // (d + f + d * f * self._crossed(d, size)))
        if n <= most:
            return np.arange(n)
        return np.sort(np.random.default_rng(self.seed).choice(n, most, replace=False))

    def _fit_one(self, rows: Rows, size: int, binary: bool) -> Any:
        """The model of one fold."""
        d = rows.context.shape[1]
        if np.ptp(rows.reward) == 0:
            return Means(np.full(size, rows.reward[0]))  # a classifier needs two classes
        if isinstance(self.model, str) and self.model == "linear":
            if d == 0 and self.features is None:
                return Means(smoothed_means(rows.action, rows.reward, size, rows.weight))
            return fit_linear(rows, self.features, size, self._crossed(d, size), binary)
        codes = item_codes(rows, self.features, size)  # (A, c)
        columns = np.hstack([rows.context, codes[rows.action]])
        model = new(boosting(binary, self.seed) if self.model == "boosting" else self.model)
        given = {} if np.ptp(rows.weight) == 0 else {"sample_weight": rows.weight}
        return Columns(model.fit(columns, rows.reward, **given), codes)


def target_value(
    fitted: FittedRewardModel, context: Any, items: Any, probs: Any, fold: Any = None
) -> Array:
    """What a policy earns by the model, (b,): sum_k probs q of items (b, k); EMPTY earns 0."""
    q = fitted.predict(context, items, fold)  # (b, k)
    p = np.asarray(probs, dtype=float)
    if p.shape != q.shape:
        raise ValueError(f"probs must have the shape of items, {q.shape}, got {p.shape}")
    return (p * q).sum(axis=1)
