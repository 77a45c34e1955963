"""The logging policy of a log that did not write its propensities: fitted, calibrated, doubted.

A row's propensity comes from models that have not seen its user. Each row is one draw of an action:
slots of a slate are told apart by `slot`; that a slate repeats no item is not modelled.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from evaluation.action_models import Features, Model, fit_classifier, fit_counts
from evaluation.diagnostics import calibration
from evaluation.folds import checked_action, checked_context, fold_of, others, same_length

Array = np.ndarray

MODELS = ("multinomial", "boosting", "counts")
MOST_ACTIONS = {"multinomial": 500, "boosting": 100}  # beyond, a simpler model
MAX_FIT = 10_000_000  # rows x actions that a classifier is trained on
MAX_SAMPLE = 2_000_000  # rows x actions that calibration looks at


def popularity_propensity(counts: Any, gamma: float) -> Array:
    """Propensity by popularity alone, (A,) to (A,): counts^((gamma + 1) / 2) (Yang et al., 2018).

    An approximation that ignores the context; gamma = 1 is the share of an item in the log.
    """
    n = np.asarray(counts, dtype=float)
    if n.ndim != 1 or not np.isfinite(n).all() or (n < 0).any() or not n.any():
        raise ValueError("counts must be (A,), finite, non-negative and somewhere positive")
    power = np.where(n > 0, n, 0.0) ** ((gamma + 1.0) / 2.0) * (n > 0)  # (A,)
    return power / power.sum()


def tempered(log_probs: Array, temperature: float, floor: float, seen: Array) -> Array:
    """Log-probabilities (b, A) to probabilities softmax(log p / T), at least `floor` where seen.

    Actions (A,) that nobody logged keep 0: their mass is not covered. Rows sum to 1.
    """
    z = log_probs / temperature
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p = np.maximum(p / p.sum(axis=1, keepdims=True), floor) * seen
    return p / p.sum(axis=1, keepdims=True)


def best_temperature(log_probs: Array, action: Array, floor: float, seen: Array) -> float:
    """T with the highest likelihood of held-out actions (n,) (Guo et al., 2017); > 1 is humbler."""
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(action))

    def loss(log_t: float) -> float:
        return -float(np.log(tempered(log_probs, np.exp(log_t), floor, seen)[rows, action]).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-2.0, 3.0), method="bounded").x))


class FittedPropensity:
    """Propensities `logged` (n,) by models blind to their rows, and a `report` of what they are."""

    def __init__(
        self,
        models: list[Model],
        num_actions: int,
        features: Features,
        inputs: Array,
        action: Array,
        fold: Array,
        train: list[Array],
        cluster: Array,
        seed: int,
    ) -> None:
        self.models, self.num_actions, self.features = models, num_actions, features
        self.seed = seed
        self.inputs, self.action, self.fold = inputs, action, fold  # (n, m) or cells (n,), (n,)
        self.train, self.cluster = train, cluster  # rows of each model; codes 0..G-1 (n,)
        self.temper: Any = None
        self.logged = np.empty(0)
        self.report: dict[str, Any] = {}

    def fold_of(self, cluster: Any) -> Array:
        """Folds (n,) of clusters, or of row numbers in the whole log if it names no clusters."""
        return fold_of(cluster, len(self.models), self.seed)

    def probs(self, context: Any, fold: Any, slot: Any = None) -> Array:
        """The logging policy (b, A) at context (b, d) or None, folds (b,), slots (b,)."""
        b = same_length(context=context, fold=fold, slot=slot)
        at = np.asarray(fold)
        if at.min() < 0 or at.max() >= len(self.models):
            raise ValueError(f"fold must be in 0..{len(self.models) - 1}, got {at.max()}")
        inputs = self.features(checked_context(context, b), None if slot is None else _slots(slot))
        return self.temper(self.log_probs(inputs, at))

    def log_probs(self, inputs: Array, fold: Array) -> Array:
        """Of each row (b,) by the model of its fold, not calibrated, (b, A)."""
        out = np.empty((len(fold), self.num_actions))
        for f in np.unique(fold):
            out[fold == f] = self.models[f].log_probs(inputs[fold == f])
        return out

    def predict_logged(self, models: list[Model]) -> Array:
        """Calibrated propensity of each logged action, (n,), by the model of its fold."""
        out = np.empty(len(self.action))
        for f, model in enumerate(models):
            own = self.fold == f
            out[own] = model.logged(self.inputs[own], self.action[own], self.temper)
        return out

    def replicates(self, count: int, seed: int = 0) -> Iterator[Array]:
        """Logged propensities (n,) of `count` models refitted to resampled clusters.

        The variance of an estimate over them is what its standard error owes to the propensities.
        """
        rng, clusters = np.random.default_rng(seed), int(self.cluster.max()) + 1
        for _ in range(count):
            times = rng.multinomial(clusters, np.full(clusters, 1.0 / clusters))  # (G,)
            weight = times[self.cluster].astype(float)  # (n,)
            models = []
            for model, train in zip(self.models, self.train, strict=True):
                if weight[train].any():
                    model = model.refit(self.inputs[train], self.action[train], weight[train])
                models.append(model)
            yield self.predict_logged(models)


def _slots(slot: Any) -> Array:
    """Slots (n,) as codes."""
    s = np.asarray(slot)
    if s.dtype.kind not in "iu" or (s < 0).any():
        raise ValueError(f"slot must be integers from 0, got dtype {s.dtype} from {s.min()}")
    return s.astype(np.int64)


def _simplest(model: str, num_actions: int, context: Array) -> tuple[str, str]:
    """The model that is fitted in place of `model`, and why."""
    if model == "counts":
        return model, ""
    if context.shape[1] == 0:
        return "counts", f"{model} needs a context, there is none: popularity"
    if num_actions > MOST_ACTIONS["multinomial"]:
        return "counts", f"{num_actions} actions are too many for {model}: counts by context group"
    if num_actions > MOST_ACTIONS[model]:
        return "multinomial", f"{num_actions} actions are too many for {model}: multinomial"
    return model, ""


def fit_propensity(
    context: Any,
    action: Any,
    num_actions: int,
    cluster: Any = None,
    slot: Any = None,
    model: str = "multinomial",
    folds: int = 3,
    calibrate: bool = True,
    clip: float = 1e-3,
    seed: int = 0,
) -> FittedPropensity:
    """P(action | context, slot) of a log, (n,) each, cross-fitted by cluster and calibrated.

    "counts" shrinks counts in groups of contexts to popularity, that to uniform; its smoothing is
    its calibration. Logged actions have at least about `clip` / A.
    """
    if model not in MODELS or folds < 1 or not 0.0 < clip < 1.0:
        raise ValueError(
            f"expected model in {MODELS}, folds >= 1 and clip in (0, 1), "
            f"got {model!r}, {folds}, {clip}"
        )
    n = same_length(action=action, context=context, cluster=cluster, slot=slot)
    x, a = checked_context(context, n), checked_action(action, num_actions)
    slots = None if slot is None else _slots(slot)
    kind, note = _simplest(model, num_actions, x)
    features = Features(kind, x, slots, num_actions, seed)
    inputs = features(x, slots)
    name = np.arange(n) if cluster is None else np.asarray(cluster)
    fold, rng = fold_of(name, folds, seed), np.random.default_rng(seed)
    models: list[Model] = []
    trains = []
    for f in range(folds):
        train = np.flatnonzero(others(fold, f, folds))
        if kind == "counts":
            models.append(fit_counts(inputs[train], a[train], features.cells, num_actions))
        else:
            most = max(1000, MAX_FIT // num_actions)
            if len(train) > most:
                train = np.sort(rng.choice(train, most, replace=False))
            models.append(fit_classifier(kind, inputs[train], a[train], num_actions, seed))
        trains.append(train)
    codes = np.unique(name, return_inverse=True)[1]  # (n,)
    fitted = FittedPropensity(models, num_actions, features, inputs, a, fold, trains, codes, seed)
    size = min(n, max(20, MAX_SAMPLE // num_actions))
    sample = np.sort(rng.choice(n, size, replace=False))
    _calibrate(fitted, sample, calibrate and kind != "counts", clip / num_actions)
    fitted.report = {"model": kind, "note": note, "folds": folds, **fitted.report}
    return fitted


def _calibrate(fitted: FittedPropensity, sample: Array, scaled: bool, floor: float) -> None:
    """Choose the temperature on held-out rows, then price each row and report how well it went."""
    num_actions = fitted.num_actions
    seen = np.bincount(fitted.action, minlength=num_actions) > 0  # (A,)
    action = fitted.action[sample]
    raw = fitted.log_probs(fitted.inputs[sample], fitted.fold[sample])  # (s, A)
    t = best_temperature(raw, action, floor, seen) if scaled else 1.0
    fitted.temper = partial(tempered, temperature=t, floor=floor, seen=seen)
    fitted.logged = fitted.predict_logged(fitted.models)
    quality = calibration(fitted.temper(raw), action)
    before = calibration(tempered(raw, 1.0, floor, seen), action)
    rows = np.arange(len(sample))
    unclipped = tempered(raw, t, 0.0, seen)[rows, action]  # (s,)
    popular = np.empty(len(fitted.action))
    for f, train in enumerate(fitted.train):
        cell = np.zeros(len(train), dtype=np.int64)
        share = fit_counts(cell, fitted.action[train], 1, num_actions).table[0]  # (A,)
        popular[fitted.fold == f] = share[fitted.action[fitted.fold == f]]
    fitted.report = {
        "temperature": t,
        "ece": quality.ece,
        "points": list(
            zip(
                quality.predicted.tolist(),
                quality.observed.tolist(),
                quality.count.tolist(),
                strict=True,
            )
        ),
        "ece_uncalibrated": before.ece,
        "brier": quality.brier,
        "log_loss": -float(np.log(fitted.logged).mean()),
        "log_loss_popularity": -float(np.log(popular).mean()),
        "share_clipped": float((unclipped < floor).mean()),
        "actions_never_logged": int((~seen).sum()),
    }
