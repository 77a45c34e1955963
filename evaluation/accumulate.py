"""Mergeable sums: all that values, errors, intervals and differences need of any number of rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.diagnostics import WeightSums, mean_weight
from evaluation.estimators import ABSENT, ESTIMATORS, MODEL, Rows, parse
from evaluation.folds import fold_of
from evaluation.intervals import delta_gradient
from evaluation.moments import Moments
from evaluation.terms import Array, Groups, Terms

BLOCKS = (
    1024  # of the block bootstrap; units are dealt to them in turn, or by hash of their cluster
)
BLOCK_SEED = 1  # another hash than that of the folds of a reward model
COLUMNS = ("q_logged", "value", "propensity", "weight_prev", "value_next")
Key = tuple[str, float | None]  # an estimator's name and its lambda


@dataclass(frozen=True)
class Estimate:
    """What the log says of one policy by one estimator, before anything is judged."""

    policy: str
    estimator: str
    lam: float | None
    value: float
    std_error: float
    n: int  # units: rows, slates or episodes


class Sums:
    """Moments of one estimator's terms over P policies, and their sums per block."""

    def __init__(self, policies: int, keep_blocks: bool) -> None:
        self.policies, self.keep_blocks = policies, keep_blocks
        self.terms = 0  # J
        self.bottomed = False
        self.moments: Moments = ABSENT
        self.blocks: Array = ABSENT  # (M, BLOCKS)
        self.counts = np.zeros(BLOCKS, dtype=np.int64)

    def add(self, terms: Sequence[Terms], block: Array | int) -> None:
        """Take in the units of a batch; `block` is (n,), or the number of units seen before."""
        if self.moments is None:
            self.terms, self.bottomed = terms[0].top.shape[1], terms[0].bottom is not None
            width = self.policies * self.terms * (1 + self.bottomed)
            self.moments = Moments(width, ranged=not self.bottomed and self.terms == 1)
            self.blocks = np.zeros((width, BLOCKS)) if self.keep_blocks else None
        parts = [half for t in terms for half in (t.top, t.bottom) if half is not None]
        columns = [x for part in parts for x in np.ascontiguousarray(part.T)]  # M of (n,)
        self.moments.add(columns)
        if self.keep_blocks:
            self.blocks += block_sums(columns, block)
            self.counts += block_counts(len(columns[0]), block)

    def merge(self, other: "Sums") -> None:
        """Take in what another has seen."""
        if other.moments is None:
            return
        if self.moments is None:
            self.terms, self.bottomed = other.terms, other.bottomed
            self.moments = Moments(len(other.moments.mean), other.moments.ranged)
            self.blocks = np.zeros_like(other.blocks) if self.keep_blocks else None
        self.moments.merge(other.moments)
        if self.keep_blocks:
            self.blocks = self.blocks + other.blocks
            self.counts = self.counts + other.counts

    def columns_of(self, policy: int) -> tuple[slice, slice | None]:
        """Where a policy's tops and bottoms stand among the columns."""
        begin = policy * self.terms * (1 + self.bottomed)
        middle = begin + self.terms
        return slice(begin, middle), slice(middle, middle + self.terms) if self.bottomed else None

    def value(self, policy: int) -> float:
        """The estimate; nan where the weights have no mass."""
        top, bottom = self.columns_of(policy)
        mean = self.moments.mean
        if bottom is None:
            return float(mean[top].sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(mean[bottom] > 0, mean[top] / mean[bottom], np.nan)
        return float(ratio.sum())

    def gradient(self, policy: int) -> Array:
        """Of the estimate by the column means, (M,): the delta method's coefficients."""
        width = self.terms * (1 + self.bottomed)
        own = slice(policy * width, (policy + 1) * width)
        out = np.zeros(len(self.moments.mean))
        out[own] = delta_gradient(self.moments.mean[own], self.bottomed)
        return out

    def std_error(self, gradient: Array, clustered: bool) -> float:
        """Of the estimate or difference with this gradient (M,), robust to clusters if told so."""
        n = self.moments.n
        if not clustered:
            return float(np.sqrt(max(gradient @ self.moments.covariance() @ gradient, 0.0) / n))
        there = self.counts > 0
        influence = gradient @ self.blocks - self.counts * (gradient @ self.moments.mean)  # (B,)
        used = int(there.sum())
        if used < 2:
            return float("nan")
        return float(np.sqrt((influence[there] ** 2).sum() * used / (used - 1)) / n)


def block_sums(columns: Sequence[Array], block: Array | int) -> Array:
    """M of (n,) to (M, BLOCKS): dealt in turn from block `block % BLOCKS`, or as (n,) says."""
    n = len(columns[0])
    if not isinstance(block, int):
        return np.stack([np.bincount(block, x, minlength=BLOCKS) for x in columns])
    whole = n // BLOCKS * BLOCKS
    out = np.stack([x[:whole].reshape(-1, BLOCKS).sum(axis=0) for x in columns])  # (M, BLOCKS)
    out[:, : n - whole] += np.stack([x[whole:] for x in columns])
    return np.roll(out, block % BLOCKS, axis=1)


def block_counts(n: int, block: Array | int) -> Array:
    """Units in each block, (BLOCKS,)."""
    if not isinstance(block, int):
        return np.bincount(block, minlength=BLOCKS)
    out = np.full(BLOCKS, n // BLOCKS)
    out[: n % BLOCKS] += 1
    return np.roll(out, block % BLOCKS)


class Accumulator:
    """Takes in batches of rows in any order and number; two of them add up.

    A batch maps column names to (n,) arrays, or to {policy: (n,)} where policies differ: `reward`,
    `weight`, `q_logged`, `value`, `propensity`, `weight_prev`, `value_next`, `cluster`, `group`
    (slate or episode, whole in one batch, its rows adjacent and in order), `covered` (exact covered
    mass). Estimators of another ratio find it as `cluster_weight`, `joint_weight`, ...; without
    that they take `weight`. Memory depends on the numbers of policies and estimators, not of rows.
    `whole` allows estimators that need all rows in one batch (magic, cressie_read).
    """

    def __init__(
        self,
        policies: Sequence[str] = ("policy",),
        estimators: Sequence[str] = ("ips", "snips"),
        *,
        gamma: float = 1.0,
        horizon: int = 1,
        weights: Sequence[str] = (),
        clustered: bool = False,
        blocks: bool = True,
        whole: bool = False,
    ) -> None:
        if not policies or not estimators:
            raise ValueError("expected at least one policy and one estimator")
        unmergeable = [e for e in estimators if not ESTIMATORS[parse(e)[0]].mergeable]
        if unmergeable and not whole:
            raise ValueError(
                f"{unmergeable[0]} is not made of mergeable sums: say whole=True and give all rows "
                "in one batch"
            )
        self.whole = whole
        self.policies, self.estimators = tuple(policies), tuple(estimators)
        self.gamma, self.horizon, self.clustered = gamma, horizon, clustered
        self.keep_blocks = blocks or clustered
        self.keys = list(dict.fromkeys(key for spec in estimators for key in expanded(spec)))
        self.sums = {key: Sums(len(self.policies), self.keep_blocks) for key in self.keys}
        kinds = [*weights, *(weighed(name) for name, _ in self.keys)]
        self.kinds = list(dict.fromkeys(kind for kind in kinds if kind is not None))
        self.mean_weights = {k: Sums(len(self.policies), self.keep_blocks) for k in self.kinds}
        self.weights: dict[tuple[str, str], WeightSums] = {}
        self.rows = self.groups = 0

    def update(self, batch: Mapping[str, Any]) -> None:
        """Take in a batch.

        Raises ValueError for a missing column and for unequal lengths.
        """
        reward = np.asarray(batch["reward"], dtype=float)
        if not len(reward):
            return
        if self.whole and self.rows:
            raise ValueError("this accumulator takes all rows in one batch: it has had one")
        groups = Groups(batch["group"]) if batch.get("group") is not None else None
        columns = [Columns(batch, policy, len(reward)) for policy in self.policies]
        blocks = {grouped: self._blocks(batch, groups if grouped else None)
                  for grouped in ((False, True) if groups is not None else (False,))}  # fmt: skip
        for (name, lam), sums in self.sums.items():
            grouped = is_grouped(name, groups)
            settings = Settings(lam, self.gamma, self.horizon, groups if grouped else None)
            terms = [column.terms(name, reward, settings) for column in columns]
            sums.add(terms, blocks[grouped])
        for kind in self.kinds:
            self._weigh(kind, columns, reward, groups, blocks)
        self.rows += len(reward)
        self.groups += len(groups) if groups is not None else 0

    def _blocks(self, batch: Mapping[str, Any], groups: Groups | None) -> Array | int:
        """Of the batch's units: by their cluster, else in turn."""
        if batch.get("cluster") is None:
            return self.rows if groups is None else self.groups
        block = fold_of(batch["cluster"], BLOCKS, BLOCK_SEED)
        return block if groups is None else groups.first(block)

    def _weigh(
        self, kind: str, columns: "list[Columns]", reward: Array, groups: Groups | None,
        blocks: dict[bool, Array | int],
    ) -> None:  # fmt: skip
        """Weights of the units, for the verdict: of a slate or an episode, its last."""
        grouped = kind in ("joint", "prefix", "trajectory", "pseudo_inverse") and groups is not None
        found = []
        for column in columns:
            weight, answer, covered = column.weight(kind), reward, column.get("covered")
            if grouped and groups is not None:
                weight, answer = groups.last(weight), groups.sum(reward)
                covered = None if covered is None else groups.first(covered)
            elif kind == "occupancy" and (ratio := column.get("action_weight")) is not None:
                # in episodes of unequal length occupancies need not average 1, step ratios must
                weight = weight * (ratio.mean() / max(weight.mean(), np.finfo(float).tiny))
            found.append(Terms(weight[:, None]))
            key = (column.policy, kind)
            self.weights[key] = self.weights.get(key, WeightSums()).update(weight, answer, covered)
        if self.clustered:  # else the weights' own sums say the error of their mean
            self.mean_weights[kind].add(found, blocks[grouped])

    def __add__(self, other: "Accumulator") -> "Accumulator":
        """What both have seen; they must have been made alike."""
        alike = ("policies", "estimators", "gamma", "horizon", "kinds", "clustered", "keep_blocks",
                 "whole")  # fmt: skip
        for name in alike:
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"accumulators differ in {name}: {getattr(self, name)!r} and "
                                 f"{getattr(other, name)!r}")  # fmt: skip
        both = Accumulator(
            self.policies, self.estimators, gamma=self.gamma, horizon=self.horizon,
            weights=self.kinds, clustered=self.clustered, blocks=self.keep_blocks, whole=self.whole,
        )  # fmt: skip
        if self.whole and self.rows and other.rows:
            raise ValueError("accumulators of whole logs do not add up")
        for one in (self, other):
            for mine, theirs in ((both.sums, one.sums), (both.mean_weights, one.mean_weights)):
                for key, sums in theirs.items():
                    mine[key].merge(sums)  # type: ignore[index]
            for pair, new in one.weights.items():
                both.weights[pair] = both.weights[pair] + new if pair in both.weights else new
            both.rows, both.groups = both.rows + one.rows, both.groups + one.groups
        return both

    def result(self) -> dict[tuple[str, str, float | None], Estimate]:
        """Estimates by (policy, estimator, lambda), not yet judged."""
        if not self.rows:
            raise ValueError("nothing was accumulated: update it with a batch first")
        return {
            (policy, name, lam): self.estimate(policy, name, lam)
            for name, lam in self.keys for policy in self.policies
        }  # fmt: skip

    def estimate(self, policy: str, name: str, lam: float | None) -> Estimate:
        """One of them."""
        sums, place = self.sums[name, lam], self.policies.index(policy)
        error = sums.std_error(sums.gradient(place), self.clustered)
        return Estimate(policy, name, lam, sums.value(place), error, sums.moments.n)

    def difference(
        self, policy: str, baseline: str, name: str, lam: float | None
    ) -> tuple[float, float]:
        """Value of a policy less that of another on the same rows, and its paired error."""
        sums = self.sums[name, lam]
        one, two = self.policies.index(policy), self.policies.index(baseline)
        gradient = sums.gradient(one) - sums.gradient(two)
        return sums.value(one) - sums.value(two), sums.std_error(gradient, self.clustered)

    def mean_weight_error(self, policy: str, kind: str) -> float:
        """Standard error of the mean weight, robust to clusters where there are."""
        if not self.clustered:
            return mean_weight(self.weights[policy, kind])[1]
        sums = self.mean_weights[kind]
        return sums.std_error(sums.gradient(self.policies.index(policy)), self.clustered)


@dataclass(frozen=True)
class Columns:
    """One policy's view of a batch of n rows."""

    batch: Mapping[str, Any]
    policy: str
    n: int

    def get(self, name: str) -> Array | None:
        """A column (n,), this policy's where policies differ."""
        found = self.batch.get(name)
        if found is None:
            return None
        found = found.get(self.policy) if isinstance(found, Mapping) else found
        if found is None:
            return None
        found = np.asarray(found, dtype=float)
        if found.shape != (self.n,):
            raise ValueError(f"{name} must be ({self.n},) like reward, got {found.shape}")
        return found

    def weight(self, kind: str) -> Array:
        """The ratio of this kind, else the only one there is."""
        for name in (f"{kind}_weight", "weight"):
            found = self.get(name)
            if found is not None:
                return found
        raise ValueError(f"the batch has no weight of {self.policy!r}: add {kind}_weight or weight")

    def terms(self, name: str, reward: Array, settings: "Settings") -> Terms:
        """Of one estimator; `mrdr.q_logged` is for mrdr alone, `q_logged` for all others."""
        estimator = ESTIMATORS[name]
        weight = self.weight(estimator.weight) if estimator.weight else ABSENT
        # a model fitted for others is not this one's: mis stays mis beside fqe
        read = [key for key in COLUMNS if key in estimator.needs or key not in MODEL]
        own = {key: self.get(f"{name}.{key}") for key in read}
        given = {key: self.get(key) if own[key] is None else own[key] for key in read}
        missing = [key for key in estimator.needs if given[key] is None]
        if missing:
            raise ValueError(f"{name} needs {' and '.join(missing)} of {self.policy!r}")
        rows: Any = given
        stepwise = self.batch.get("step") is not None
        return estimator.terms(Rows(reward=reward, weight=weight, stepwise=stepwise,
                                    **settings.given(), **rows))  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What an estimator is computed with beside the columns."""

    lam: float | None
    gamma: float
    horizon: int
    groups: Groups | None

    def given(self) -> dict[str, Any]:
        """Fields for `Rows`; what is not set keeps its default."""
        return {name: x for name, x in vars(self).items() if x is not None}


def expanded(spec: str) -> Iterator[Key]:
    """An estimator with its lambda, or with all of its grid."""
    name, lam = parse(spec)
    if lam is None and ESTIMATORS[name].grid:
        yield from ((name, each) for each in ESTIMATORS[name].grid)
    else:
        yield name, lam


def weighed(name: str) -> str | None:
    """The kind of ratio whose weights decide an estimator's verdict."""
    kind = ESTIMATORS[name].weight
    return "action" if kind == "match" else kind  # agreement alone says nothing of the support


def is_grouped(name: str, groups: Groups | None) -> bool:
    """Whether an estimator's units are slates or episodes here."""
    unit = ESTIMATORS[name].unit
    if unit != "row" and groups is None:
        raise ValueError(f"{name} judges {unit}s: the batch needs `group`")
    return unit != "row" or (name == "dm" and groups is not None)
