"""Models of the logged action given features: shrunken counts in cells, classifiers.

Each gives `log_probs(inputs) -> (b, A)`, and `logged(inputs, action, temper) -> (b,)`, where
`temper` turns log-probabilities (b, A) into probabilities (b, A).
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Array = np.ndarray
Temper = Callable[[Array], Array]

STRENGTHS = 10.0 ** np.arange(-1, 7)  # prior counts, tried by leaving one out
CHUNK = 4_000_000  # numbers in a temporary (rows, A)
MAX_CELLS = 32  # groups of contexts that counts tell apart
MAX_TABLE = 4_000_000  # numbers in a table (cells, A)


class Model(Protocol):
    """What the logging policy may have been."""

    def log_probs(self, inputs: Array) -> Array:
        """Inputs of b rows to (b, A), -inf for actions it never saw."""
        ...

    def logged(self, inputs: Array, action: Array, temper: Temper) -> Array:
        """Tempered probability of each row's action, (b,)."""
        ...

    def refit(self, inputs: Array, action: Array, weight: Array) -> "Model":
        """The same model on the same rows, weighted anew."""
        ...


def strength(counts: Array, prior: Array) -> float:
    """How many counts the prior (A,) is worth beside counts (C, A), by leave-one-out likelihood."""
    cell, action = np.nonzero(counts)
    own, total = counts[cell, action], counts.sum(axis=1)[cell]
    likelihood = [
        float(own @ np.log((own - 1.0 + s * prior[action]) / (total - 1.0 + s))) for s in STRENGTHS
    ]
    return float(STRENGTHS[int(np.argmax(likelihood))])


def shrink(counts: Array, prior: Array, worth: float) -> Array:
    """Counts (C, A) to probabilities (C, A), `worth` counts of the prior (A,) added to each row."""
    return (counts + worth * prior) / (counts.sum(axis=1, keepdims=True) + worth)


@dataclass(frozen=True)
class Counts:
    """Probabilities table (C, A) of a few cells; `worths` are the strengths of its two priors."""

    table: Array
    worths: tuple[float, float]

    def log_probs(self, inputs: Array) -> Array:
        """Cells (b,) to (b, A)."""
        return np.log(self.table)[self._cell(inputs)]

    def logged(self, inputs: Array, action: Array, temper: Temper) -> Array:
        """Cells (b,) and actions (b,) to (b,), without (b, A)."""
        return temper(np.log(self.table))[self._cell(inputs), action]

    def refit(self, inputs: Array, action: Array, weight: Array) -> "Counts":
        """Count again, with as much trust in the priors."""
        cell = self._cell(inputs)
        return fit_counts(cell, action, *self.table.shape, weight=weight, worths=self.worths)

    def _cell(self, inputs: Array) -> Array:
        """The one cell, where it stands in for a classifier and is given features."""
        return inputs if inputs.ndim == 1 else np.zeros(len(inputs), dtype=np.int64)


def fit_counts(
    cell: Array,
    action: Array,
    cells: int,
    num_actions: int,
    *,
    weight: Array | None = None,
    worths: tuple[float, float] | None = None,
) -> Counts:
    """Cells and actions (n,): cells shrink to the popularity of all, popularity to uniform."""
    size = cells * num_actions
    counts = np.bincount(cell * num_actions + action, weight, size).astype(float)
    counts = counts.reshape(cells, num_actions)
    total, uniform = counts.sum(axis=0)[None], np.full(num_actions, 1.0 / num_actions)
    flat = strength(total, uniform) if worths is None else worths[0]
    popular = shrink(total, uniform, flat)[0]  # (A,)
    if cells == 1:
        return Counts(popular[None], (flat, 0.0))
    near = strength(counts, popular) if worths is None else worths[1]
    return Counts(shrink(counts, popular, near), (flat, near))


@dataclass(frozen=True)
class Classifier:
    """An estimator with predict_proba, whose classes are the actions it was trained on."""

    model: Any
    num_actions: int

    def log_probs(self, inputs: Array) -> Array:
        """Features (b, m) to (b, A)."""
        out = np.full((len(inputs), self.num_actions), -np.inf)
        out[:, self.model.classes_] = np.log(np.maximum(self.model.predict_proba(inputs), 1e-300))
        return out

    def logged(self, inputs: Array, action: Array, temper: Temper) -> Array:
        """Features (b, m) and actions (b,) to (b,), some rows at a time."""
        out, step = np.empty(len(inputs)), max(1, CHUNK // self.num_actions)
        for i in range(0, len(inputs), step):
            probs = temper(self.log_probs(inputs[i : i + step]))  # (s, A)
            out[i : i + step] = probs[np.arange(len(probs)), action[i : i + step]]
        return out

    def refit(self, inputs: Array, action: Array, weight: Array) -> "Classifier":
        """From where it stands: a few steps lead to the optimum near by."""
        model = copy.deepcopy(self.model)
        if hasattr(model, "coef_"):
            model.set_params(warm_start=True, max_iter=20)
        _fit(model, inputs, action, weight)
        return Classifier(model, self.num_actions)


def _fit(model: Any, inputs: Array, action: Array, weight: Array | None) -> None:
    """Fit and keep quiet about an optimum not quite reached."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(inputs, action, sample_weight=weight)


def fit_classifier(kind: str, inputs: Array, action: Array, num_actions: int, seed: int) -> Model:
    """Multinomial logistic regression or boosted trees; of one action only, its count."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression

    if np.ptp(action) == 0:
        return fit_counts(np.zeros(len(action), dtype=np.int64), action, 1, num_actions)
    model = LogisticRegression(max_iter=300)
    if kind == "boosting":
        model = HistGradientBoostingClassifier(
            max_iter=50, max_leaf_nodes=15, early_stopping=False, random_state=seed
        )
    _fit(model, inputs, action, None)
    return Classifier(model, num_actions)


class Features:
    """Context (b, d) and slot (b,) to what a kind of model is given, as it was at fitting."""

    def __init__(
        self, kind: str, context: Array, slot: Array | None, num_actions: int, seed: int
    ) -> None:
        self.kind, self.center = kind, context.mean(axis=0)
        spread = context.std(axis=0)  # (d,)
        self.scale = np.where(spread > 1e-12, spread, 1.0)
        self.slots = 0 if slot is None else int(slot.max()) + 1
        self.groups: Any = None
        most = MAX_TABLE // (num_actions * max(1, self.slots))
        k = min(MAX_CELLS, len(context) // 500, most)
        if kind == "counts" and context.shape[1] and k > 1:
            from sklearn.cluster import MiniBatchKMeans

            self.groups = MiniBatchKMeans(k, n_init=3, batch_size=4096, random_state=seed)
            self.groups.fit((context - self.center) / self.scale)

    @property
    def cells(self) -> int:
        """Groups of contexts times slots."""
        return (1 if self.groups is None else self.groups.n_clusters) * max(1, self.slots)

    def __call__(self, context: Array, slot: Array | None) -> Array:
        """Cells (b,) for counts, else standardised context and one-hot slot (b, m)."""
        if context.shape[1] != len(self.center) or (slot is None) != (self.slots == 0):
            raise ValueError(
                f"the model was fitted to {len(self.center)} context columns and "
                f"{self.slots} slots, got context {context.shape} and "
                f"{'no slot' if slot is None else 'slots'}"
            )
        if slot is not None and len(slot) and not (slot.min() >= 0 and slot.max() < self.slots):
            raise ValueError(f"slot must be in 0..{self.slots - 1}, got {slot.min()}..{slot.max()}")
        x = (context - self.center) / self.scale  # (b, d)
        if self.kind != "counts":
            return x if slot is None else np.hstack([x, np.eye(self.slots)[slot]])
        cell = np.zeros(len(x), dtype=np.int64)
        if self.groups is not None and len(x):
            cell = self.groups.predict(x).astype(np.int64)
        return cell if slot is None else cell * self.slots + slot
