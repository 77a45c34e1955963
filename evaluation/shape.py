"""The distribution of what a unit earns under a target, from mergeable sums."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation import distribution
from evaluation.accumulate import BLOCK_SEED, BLOCKS
from evaluation.columns import columns
from evaluation.diagnostics import IDENTIFIED
from evaluation.folds import fold_of
from evaluation.sequential import discounts
from evaluation.terms import Array, Groups

if TYPE_CHECKING:
    from evaluation.verdicts import Judged

SHAPES = ("cdf", "quantiles", "cvar")
GRID = 512  # thresholds at most: more distinct returns are put into as many bins
LEVELS = {"quantiles": (0.1, 0.25, 0.5, 0.75, 0.9), "cvar": (0.05, 0.1, 0.25, 0.5)}
POINTS = 11  # of the CDF that are rows of the table


def shape_rows(j: "Judged") -> Iterator[dict[str, Any]]:
    """One row a policy and statistic, withheld where the weights do not identify it."""
    wanted = [name for name in SHAPES if name in j.question.estimators]
    if not wanted:
        return
    thresholds = grid(j)
    masses = histograms(j, thresholds)
    for policy, mass in masses.items():
        verdict = j.primary(policy).verdict
        for name in wanted:
            for label, statistic in statistics(name, thresholds):
                if verdict != IDENTIFIED:
                    yield j.row(policy, label, {"interval": "withheld"}, j.acc.kinds[0])
                    continue
                yield j.row(policy, label, numbers(j, mass, thresholds, statistic), j.acc.kinds[0])


def returns(j: "Judged", batch: dict[str, Any]) -> tuple[Array, Groups | None]:
    """What each unit of a batch earned, discounted in episodes."""
    if batch["group"] is None:
        return batch["reward"], None
    groups = Groups(batch["group"])
    gamma = j.question.gamma if batch["step"] is not None else 1.0
    return groups.sum(discounts(groups, gamma) * batch["reward"]), groups


def batches(j: "Judged") -> Iterator[dict[str, Any]]:
    """The log again, with the primary weights."""
    for batch in j.log.batches():
        yield columns(batch, j.targets, [j.acc.kinds[0]], j.fits)


def grid(j: "Judged") -> Array:
    """Distinct returns (m,), or as many bins between the least and the most."""
    seen = np.empty(0)
    low, high = np.inf, -np.inf
    for batch in batches(j):
        earned, _ = returns(j, batch)
        low, high = min(low, earned.min()), max(high, earned.max())
        if len(seen) <= GRID:
            seen = np.union1d(seen, earned)
    return seen if len(seen) <= GRID else np.linspace(low, high, GRID)


def histograms(j: "Judged", thresholds: Array) -> dict[str, Array]:
    """Weights by block and return, (BLOCKS, m) a policy."""
    m, seen = len(thresholds), 0
    mass = {policy: np.zeros(BLOCKS * m) for policy in j.targets}
    for batch in batches(j):
        earned, groups = returns(j, batch)
        place = np.minimum(np.searchsorted(thresholds, earned), m - 1)
        if j.log.has("cluster"):
            block = fold_of(batch["cluster"], BLOCKS, BLOCK_SEED)
            block = block if groups is None else groups.first(block)
        else:
            block = (seen + np.arange(len(earned))) % BLOCKS
        seen += len(earned)
        for policy, weight in batch[f"{j.acc.kinds[0]}_weight"].items():
            own = weight if groups is None else groups.last(weight)
            mass[policy] += np.bincount(block * m + place, own, minlength=BLOCKS * m)
    return {policy: x.reshape(BLOCKS, m) for policy, x in mass.items()}


def statistics(name: str, thresholds: Array) -> list[tuple[str, Callable[[Array, Array], Array]]]:
    """Labelled functions of CDFs (..., m) and thresholds."""
    if name == "cdf":
        some = np.unique(np.linspace(0, len(thresholds) - 1, POINTS).round().astype(int))
        return [(f"cdf({thresholds[i]:.4g})", at(i)) for i in some]
    of = distribution.quantile if name == "quantiles" else distribution.cvar
    label = "quantile" if name == "quantiles" else "cvar"
    return [(f"{label}({level:g})", levelled(of, level)) for level in LEVELS[name]]


def at(index: int) -> Callable[[Array, Array], Array]:
    """The CDF at one threshold."""
    return lambda cdf, thresholds: cdf[..., index]


def levelled(
    of: Callable[[Array, Array, float], Array], level: float
) -> Callable[[Array, Array], Array]:
    """A statistic at one level."""
    return lambda cdf, thresholds: of(cdf, thresholds, level)


def numbers(
    j: "Judged", mass: Array, thresholds: Array, statistic: Callable[[Array, Array], Array]
) -> dict[str, Any]:
    """Value and bootstrap interval of a statistic, weights self-normalised."""
    there = mass.any(axis=1)
    top, weight = mass[there].cumsum(axis=1), mass[there].sum(axis=1)  # (Bk, m), (Bk,)
    cdf = distribution.cdf_from_means(top.sum(axis=0), weight.sum(), len(thresholds))
    low, high = distribution.bootstrap(
        top, weight, thresholds, statistic, alpha=j.question.alpha, seed=j.question.seed
    )
    return {"value": float(statistic(cdf, thresholds)), "low": float(low), "high": float(high),
            "interval": "bootstrap"}  # fmt: skip
