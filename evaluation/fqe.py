"""Models of what a target earns from a state on, for sessions, never judged on their own rows.

Fitted Q evaluation (Le, Voloshin & Yue, 2019) regresses r_t + gamma V(s_{t+1}) again and again,
V(s) = sum_a pi(a|s) Q(s, a) of the regression before; nothing follows an episode's last row. Q is
the same at all times unless the context tells the time. More robust doubly robust estimation
(MRDR; Farajtabar, Chow & Ghavamzadeh, 2018) fits the Q under which the doubly robust estimator
varies least.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from evaluation.terms import Array, Groups

MODELS = ("linear", "boosting", "tabular")
SETTLED = 1e-9  # largest change of a target, of its own size, that ends the sweeps
NEGLIGIBLE = 1e-6  # gamma^sweeps that leaves nothing to be passed on
CELLS = 50_000_000  # of a table


@dataclass(frozen=True)
class Rows:
    """Rows as a model sees them: x (m, f) features, or (m,) codes of states."""

    x: Array
    action: Array  # (m,)
    pi: Array  # (m, A) target's probabilities

    def __getitem__(self, keep: Array) -> "Rows":
        return Rows(self.x[keep], self.action[keep], self.pi[keep])


class Model(Protocol):
    """A regression made for one set of rows, which gives one target after another to the same."""

    def fit(self, target: Array) -> None: ...

    def q(self, rows: Rows) -> Array:
        """Of the logged actions, (m,)."""

    def value(self, rows: Rows) -> Array:
        """Expected over the target's actions, (m,)."""


class LinearQ:
    """Ridge regression on [1, context], an own one for each action, drawn to that of all actions.

    An action without rows has the common one.
    """

    def __init__(self, rows: Rows, weight: Array, ridge: float) -> None:
        self.order = np.argsort(rows.action, kind="stable")  # (m,)
        self.x, self.weight = rows.x[self.order], weight[self.order]
        self.actions, self.starts = np.unique(rows.action[self.order], return_index=True)
        penalty = ridge * np.eye(rows.x.shape[1])  # (f, f)
        parts = np.split(np.arange(len(weight)), self.starts[1:])
        grams = [(self.x[p] * self.weight[p, None]).T @ self.x[p] for p in parts]
        self.gram = np.stack(grams) + penalty  # (K, f, f)
        self.pooled_gram = np.sum(grams, axis=0) + penalty  # (f, f)
        self.coef = np.zeros((rows.pi.shape[1], rows.x.shape[1]))  # (A, f)

    def fit(self, target: Array) -> None:
        y = target[self.order]
        pooled = np.linalg.solve(self.pooled_gram, self.x.T @ (self.weight * y))  # (f,)
        residual = self.weight * (y - self.x @ pooled)  # (m,)
        moment = np.add.reduceat(residual[:, None] * self.x, self.starts)  # (K, f)
        self.coef[:] = pooled
        self.coef[self.actions] += np.linalg.solve(self.gram, moment[..., None])[..., 0]

    def q(self, rows: Rows) -> Array:
        return np.einsum("mf,mf->m", rows.x, self.coef[rows.action])

    def value(self, rows: Rows) -> Array:
        return np.einsum("mf,mf->m", rows.x, rows.pi @ self.coef)  # no (m, A) beside pi


class TabularQ:
    """The mean of each state and action; of the state, or of all, where there were no rows."""

    def __init__(self, rows: Rows, weight: Array, states: int) -> None:
        self.shape = (states, rows.pi.shape[1])
        if states * self.shape[1] > CELLS:
            raise ValueError(
                f"a table of {states} distinct contexts by {self.shape[1]} actions is too large: "
                "use model='linear' or fewer context columns"
            )
        self.weight, self.cell = weight, rows.x * self.shape[1] + rows.action  # (m,)
        self.mass = self._sums(weight)  # (S, A)
        self.table = np.zeros(self.shape)

    def _sums(self, x: Array) -> Array:
        return np.bincount(self.cell, x, self.shape[0] * self.shape[1]).reshape(self.shape)

    def fit(self, target: Array) -> None:
        total = self._sums(self.weight * target)  # (S, A)
        everywhere = total.sum() / max(self.mass.sum(), np.finfo(float).tiny)
        by_state = _means(total.sum(axis=1), self.mass.sum(axis=1), everywhere)  # (S,)
        self.table = _means(total, self.mass, by_state[:, None])

    def q(self, rows: Rows) -> Array:
        return self.table[rows.x, rows.action]

    def value(self, rows: Rows) -> Array:
        return np.einsum("ma,ma->m", rows.pi, self.table[rows.x])


class BoostedQ:
    """Gradient-boosted trees on the context and the action, a category where there are few."""

    def __init__(self, rows: Rows, weight: Array, seed: int) -> None:
        from sklearn.ensemble import HistGradientBoostingRegressor

        self.rows, self.weight = rows, weight
        few = rows.pi.shape[1] <= 255  # the most categories that the trees take
        self.trees = HistGradientBoostingRegressor(
            early_stopping=False,
            categorical_features=[rows.x.shape[1]] if few else None,
            random_state=seed,
        )

    def fit(self, target: Array) -> None:
        self.trees.fit(np.column_stack([self.rows.x, self.rows.action]), target, self.weight)

    def q(self, rows: Rows) -> Array:
        return self.trees.predict(np.column_stack([rows.x, rows.action]))

    def value(self, rows: Rows) -> Array:
        out = np.zeros(len(rows.action))
        for action in np.flatnonzero(rows.pi.any(axis=0)):  # one at a time: no (m A, f) array
            taken = rows.pi[:, action] > 0
            x = np.column_stack([rows.x[taken], np.full(taken.sum(), action)])
            out[taken] += rows.pi[taken, action] * self.trees.predict(x)
        return out


def _means(total: Array, mass: Array, otherwise: Any) -> Array:
    """total / mass, `otherwise` without mass."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(mass > 0, total / mass, otherwise)


@dataclass(frozen=True, kw_only=True)
class FittedQ:
    """Fit Q and V of a target from sessions and price each with the model of the other folds.

    `mrdr` weighs rows by gamma^2t W_{t-1}^2 rho_t^2 (1 - pi_b) and aims at the reweighted rest of
    the session: the diagonal of the paper's Omega, which is all of it for a deterministic target.
    """

    model: str = "linear"
    gamma: float = 1.0
    iterations: int | None = None  # sweeps; None: the longest episode, fewer if gamma ends them
    folds: int = 2
    ridge: float = 1e-3  # pseudo-rows of unit features that draw an action to the common model
    mrdr: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}, got {self.model!r}")
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma must be in [0, 1], got {self.gamma}")
        if self.folds < 2:
            raise ValueError(f"folds must be at least 2, got {self.folds}: no row judges its own")
        if self.iterations is not None and self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        if self.ridge <= 0:
            raise ValueError(f"ridge must be above 0, got {self.ridge}: an action may have one row")

    def fit_predict(
        self,
        context: Array,
        action: Array,
        reward: Array,
        groups: Groups,
        pi: Array,
        num_actions: int,
        cluster: Array | None = None,
        propensity: Array | None = None,
    ) -> tuple[Array, Array]:
        """Rows (n, ...), sorted by `groups.sort`, to (q_logged (n,), value (n,)).

        `pi` (n, A) is the target's; `cluster` (n,) keeps episodes of one user in one fold;
        `propensity` (n,) of the logged action is for MRDR.
        """
        context, action, pi = np.asarray(context, dtype=float), np.asarray(action), np.asarray(pi)
        reward = np.asarray(reward, dtype=float)
        self._check(context, action, reward, groups, pi, num_actions)
        rows, states = self._rows(context, action, pi)
        weight, target = np.ones(len(action)), None
        if self.mrdr:
            weight, target = self._variance_loss(action, reward, groups, pi, propensity)
        fold = self._folds(groups, cluster)  # (n,)
        q_logged, value = np.empty(len(action)), np.empty(len(action))
        for held_out in range(self.folds):
            train, test = np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)
            model = self._model(rows[train], weight[train], states)
            if target is None:
                self._sweep(model, rows[train], reward[train], Groups(groups.index[train]))
            else:
                model.fit(target[train])
            q_logged[test], value[test] = model.q(rows[test]), model.value(rows[test])
        return q_logged, value

    def _sweep(self, model: Model, rows: Rows, reward: Array, groups: Groups) -> None:
        """Pass the rewards back one step at a time until nothing moves."""
        target = reward  # (m,)
        for _ in range(self._iterations(groups) - 1):
            model.fit(target)
            before = target
            target = reward + self.gamma * groups.next(model.value(rows), 0.0)  # of s', not of s
            if np.abs(target - before).max() <= SETTLED * np.abs(target).max():
                break
        model.fit(target)

    def _iterations(self, groups: Groups) -> int:
        if self.iterations is not None:
            return self.iterations
        longest = int(groups.lengths.max())
        if self.gamma == 0.0:
            return 1
        if self.gamma == 1.0:
            return longest
        return min(longest, int(np.ceil(np.log(NEGLIGIBLE) / np.log(self.gamma))))

    def _variance_loss(
        self, action: Array, reward: Array, groups: Groups, pi: Array, propensity: Array | None
    ) -> tuple[Array, Array]:
        """Weights and targets of MRDR's regression, (n,) each."""
        if propensity is None:
            raise ValueError("mrdr needs the propensity (n,) of the logged action, got none")
        propensity = np.asarray(propensity, dtype=float)
        ratio = pi[np.arange(len(action)), action] / propensity  # (n,)
        product = groups.cumulative_product(ratio)
        scaled = product / max(product.max(), np.finfo(float).tiny)  # squares stay finite
        weight = self.gamma ** (2 * groups.place) * scaled**2 * (1.0 - propensity)
        target = reward.copy()
        for t in range(int(groups.lengths.max()) - 2, -1, -1):
            row = groups.starts[groups.lengths > t + 1] + t
            target[row] += self.gamma * ratio[row + 1] * target[row + 1]
        mean = weight.mean()
        return (weight / mean if mean > 0 else weight), target

    def _folds(self, groups: Groups, cluster: Array | None) -> Array:
        """Fold of each row, (n,): whole episodes, and whole clusters if they are given."""
        owner = groups.index if cluster is None else groups.first(np.asarray(cluster))[groups.index]
        names, code = np.unique(owner, return_inverse=True)
        if len(names) < self.folds:
            raise ValueError(
                f"{self.folds} folds need as many episodes or clusters, got {len(names)}: "
                "lower folds or leave out cluster"
            )
        order = np.random.default_rng(self.seed).permutation(len(names))
        return (order % self.folds)[code]

    def _rows(self, context: Array, action: Array, pi: Array) -> tuple[Rows, int]:
        """Rows as the model sees them, and the number of states of a table."""
        if self.model == "tabular":
            names, code = np.unique(context, axis=0, return_inverse=True)
            return Rows(code.reshape(-1), action, pi), len(names)
        if self.model == "linear":
            context = np.column_stack([np.ones(len(context)), context])
        return Rows(context, action, pi), 0

    def _model(self, rows: Rows, weight: Array, states: int) -> Model:
        if self.model == "linear":
            return LinearQ(rows, weight, self.ridge)
        if self.model == "tabular":
            return TabularQ(rows, weight, states)
        return BoostedQ(rows, weight, self.seed)

    def _check(
        self,
        context: Array,
        action: Array,
        reward: Array,
        groups: Groups,
        pi: Array,
        num_actions: int,
    ) -> None:
        n = len(groups.index)
        if context.shape[:1] != (n,) or context.ndim != 2:
            raise ValueError(f"context must be (n, d) = ({n}, d), got {context.shape}")
        if action.shape != (n,) or reward.shape != (n,):
            raise ValueError(
                f"action and reward must be (n,) = ({n},), got {action.shape} and {reward.shape}"
            )
        if pi.shape != (n, num_actions):
            raise ValueError(f"pi must be (n, A) = ({n}, {num_actions}), got {pi.shape}")
        wrong = np.flatnonzero((action < 0) | (action >= num_actions))
        if len(wrong):
            raise ValueError(
                f"action must be in 0..{num_actions - 1}, got {action[wrong[0]]} in row {wrong[0]}"
            )
        wrong = np.flatnonzero(~np.isfinite(reward) | ~np.isfinite(context).all(axis=1))
        if len(wrong):
            raise ValueError(
                f"reward and context must be finite, they are not in row {wrong[0]}: "
                "drop the row's episode or fill it in"
            )
