"""From sums to a table: numbers where the log identifies them, else bounds and the model."""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation import diagnostics, intervals, tuning
from evaluation.accumulate import Accumulator, Estimate, Key, Sums, expanded, weighed
from evaluation.columns import Fits
from evaluation.diagnostics import IDENTIFIED, PARTIAL, WITHHELD, Diagnostics
from evaluation.estimators import ESTIMATORS
from evaluation.facts import about, diagnosed
from evaluation.log import DecisionLog
from evaluation.report import Table
from evaluation.shape import SHAPES, shape_rows
from evaluation.targets import Target

if TYPE_CHECKING:
    from evaluation.judge import Question

NAN = math.nan
ORDER = (IDENTIFIED, PARTIAL, WITHHELD)  # from best to worst
SHOWN = ("ess", "covered_mass", "mean_weight", "max_share", "pareto_k", "verdict")


@dataclass(frozen=True)
class Judged:
    """All that a verdict is made of."""

    parts: list[Accumulator]  # one, or one a logger
    question: "Question"
    log: DecisionLog
    targets: dict[str, Target]
    fits: Fits
    spread: dict[tuple[str, str, float | None], float]  # over refitted propensities
    propensity: Any  # FittedPropensity, or None

    @cached_property
    def acc(self) -> Accumulator:
        """The sums of all rows."""
        return reduce(operator.add, self.parts)

    def estimate(self, policy: str, name: str, lam: float | None) -> Estimate:
        """Of all rows, or of the loggers by inverse variance (Agarwal et al., 2017)."""
        found = [part.estimate(policy, name, lam) for part in self.parts]
        if len(found) == 1:
            return found[0]
        value, error = combined([(e.value, e.std_error) for e in found])
        return replace(found[0], value=value, std_error=error, n=sum(e.n for e in found))

    def difference(
        self, policy: str, baseline: str, name: str, lam: float | None
    ) -> tuple[float, float]:
        """Of a policy to another, and its paired error."""
        return combined([part.difference(policy, baseline, name, lam) for part in self.parts])

    @property
    def asked(self) -> str:
        """The estimators as they were typed."""
        return " ".join(self.question.estimators)

    def primary(self, policy: str) -> Diagnostics:
        """Of the weights that the log's unit calls for."""
        return self.diagnostics(policy, self.acc.kinds[0])

    def diagnostics(self, policy: str, kind: str | None) -> Diagnostics:
        """Of one kind of weights; a model alone has the primary ones."""
        kind = self.acc.kinds[0] if kind is None else kind
        error = self.acc.mean_weight_error(policy, kind) if self.acc.clustered else None
        if self.log.estimated or kind == "classifier":
            # fitted ratios miss 1 by more than sampling: the bound on the mean judges them alone
            error = max(error or 0.0, diagnostics.MEAN_OFF / diagnostics.Z999)
        return diagnostics.judge(self.acc.weights[policy, kind], mean_weight_error=error)

    def row(
        self, policy: str, name: str, numbers: dict[str, Any], kind: str | None, note: str = ""
    ) -> dict[str, Any]:
        """A row of the table; the verdict is that of the weights of this kind."""
        weights = self.diagnostics(policy, kind)
        shown = {key: getattr(weights, key) for key in SHOWN}
        known = ESTIMATORS.get(name)
        single = known is not None and known.unit == "row" and known.weight is not None
        blank = {"value": NAN, "std_error": NAN, "low": NAN, "high": NAN, "interval": "",
                 "lam": None, "n": weights.n,
                 "per": "row" if single and self.log.unit != "row" else ""}  # fmt: skip
        return {"policy": policy, "estimator": name, **blank, **numbers, **shown, "note": note}

    def withheld(self, policy: str, name: str) -> bool:
        """Whether an estimator's number may not be shown; a model's value is labelled instead."""
        kind = weighed(name)
        return kind is not None and self.diagnostics(policy, kind).verdict != IDENTIFIED


def combined(found: list[tuple[float, float]]) -> tuple[float, float]:
    """Independent values and errors to one of each: the surer count for more."""
    if len(found) == 1:
        return found[0]
    value, error = np.array(found).T
    precision = 1.0 / np.maximum(error, np.finfo(float).tiny) ** 2
    return float(precision @ value / precision.sum()), float(precision.sum() ** -0.5)


def judged(j: Judged) -> Table:
    """The table."""
    rows: list[dict[str, Any]] = []
    chosen: dict[tuple[str, str], Key] = {}
    for policy in j.targets:
        for spec in j.question.estimators:
            if spec in SHAPES:
                continue
            if spec.partition("(")[0] == "cressie_read":
                rows += cressie_read_rows(j, policy)
            else:
                chosen[policy, spec] = choose(j, policy, spec)
                rows += estimator_rows(j, policy, chosen[policy, spec])
        rows += instead(j, policy)
    rows += shape_rows(j)
    return Table(
        rows=rows, differences=differences(j, chosen), diagnosed=diagnosed(j), about=about(j)
    )


def choose(j: Judged, policy: str, spec: str) -> Key:
    """The lambda of an estimator: the one given, or one of its grid by SLOPE or by error bound."""
    keys = list(expanded(spec))
    if len(keys) == 1:
        return keys[0]
    found = [j.estimate(policy, *key) for key in keys]
    n = found[0].n
    means = np.array([e.value for e in found])
    variances = np.array([e.std_error**2 * (n - 1) for e in found])  # over n, as tuning takes them
    if j.question.tuning == "slope":
        return keys[tuning.slope(means, variances, n)]
    sums = j.acc.weights[policy, weighed(keys[0][0]) or j.acc.kinds[0]]
    lams = np.array([lam for _, lam in keys], dtype=float)
    loose = int(lams.argmin() if keys[0][0].startswith("sg_") else lams.argmax())
    best, _ = tuning.mse(means, variances, n, means[loose],
                         mean_square_weight=sums.sw2 / sums.n, max_weight=sums.maximum)  # fmt: skip
    return keys[best]


def estimator_rows(j: Judged, policy: str, key: Key) -> Iterator[dict[str, Any]]:
    """One row an interval; where the log does not identify the value, one row without numbers."""
    (name, lam), estimator = key, ESTIMATORS[key[0]]
    estimate = j.estimate(policy, name, lam)
    note = f"assumes {estimator.assumes}" if estimator.assumes else ""
    tuned = lam is not None and len(list(expanded(name))) > 1 and f"{name}(" not in j.asked
    if tuned:
        said = "lambda chosen on this log: its bias is unknown, so no interval"
        note = "; ".join(filter(None, [note, said]))
    if estimator.weight is None:
        note = f"model only, its own error is unknown, so no interval; {note}"
    kind = weighed(name)
    if estimator.unit == "row" and j.log.unit == "episode" and kind is not None:
        said = "of single decisions, in the states that the log reached"
        note = "; ".join(filter(None, [note, said]))
    if j.withheld(policy, name):
        numbers = {"lam": lam, "n": estimate.n, "interval": "withheld"}
        yield j.row(policy, name, numbers, kind, note)
        return
    spread = j.spread.get((policy, name, lam), 0.0)
    error = math.hypot(estimate.std_error, spread)
    for interval in j.question.intervals:
        honest = estimator.covers and not tuned  # see bench=ope_accuracy: others cover 0 to 80 %
        low, high = limits(j, policy, key, interval) if honest else (NAN, NAN)
        low, high = widened(estimate.value, low, high, spread, j.question.alpha)
        numbers = {"value": estimate.value, "std_error": error, "low": low, "high": high,
                   "interval": interval, "lam": lam, "n": estimate.n}  # fmt: skip
        yield j.row(policy, name, numbers, kind, note)


def limits(j: Judged, policy: str, key: Key, interval: str) -> tuple[float, float]:
    """An interval of one estimate from its sums; nan where it would not be valid."""
    name, lam = key
    sums, estimate, alpha = j.acc.sums[key], j.estimate(policy, name, lam), j.question.alpha
    value, error, n = estimate.value, estimate.std_error, estimate.n
    if j.log.adaptive and interval != "confidence_sequence":
        return NAN, NAN  # rows depend on the rows before: only martingale bounds hold
    if interval == "clt":
        return intervals.clt(value, error, alpha)
    if len(j.parts) > 1:
        return NAN, NAN  # loggers apart have their errors, and no common sums
    if interval == "student_t":
        free = int((sums.counts > 0).sum()) if j.acc.clustered else n
        return intervals.student_t(value, error, free, alpha)
    if interval == "bootstrap":
        return bootstrapped(j, policy, sums)
    if interval == "cressie_read":
        if name not in ("ips", "snips") or lam is not None or j.acc.clustered:
            return NAN, NAN
        return empirical_likelihood(j, policy)
    if sums.bottomed or sums.terms > 1 or j.acc.clustered or j.spread:
        return NAN, NAN  # bounds for means of independent rows, of known weights
    if interval == "confidence_sequence":
        return intervals.confidence_sequence(value, error**2 * n, n, alpha)
    top, _ = sums.columns_of(j.acc.policies.index(policy))
    seen = (float(sums.moments.low[top][0]), float(sums.moments.high[top][0]))
    if seen[0] == seen[1]:
        return NAN, NAN  # a range of nothing bounds nothing
    if interval == "hoeffding":
        return intervals.hoeffding(value, n, seen, alpha)
    return intervals.empirical_bernstein(value, error**2 * n, n, seen, alpha)


def bootstrapped(j: Judged, policy: str, sums: Sums) -> tuple[float, float]:
    """Percentile interval over blocks of rows or clusters."""
    top, bottom = sums.columns_of(j.acc.policies.index(policy))
    below = None if bottom is None else sums.blocks[bottom].T
    low, high, _ = intervals.bootstrap(sums.blocks[top].T, below, sums.counts, j.question.alpha,
                                       seed=j.question.seed)  # fmt: skip
    return low, high


def empirical_likelihood(j: Judged, policy: str) -> tuple[float, float]:
    """Cressie-Read interval of rows: weights of twice the largest seen may still come."""
    sums = j.acc.weights[policy, "action"]
    least, most = j.log.reward_range
    if not least < most:
        return NAN, NAN
    ceiling = max(2.0 * sums.maximum, 2.0)
    return intervals.cressie_read(sums, j.question.alpha, weight_range=(0.0, ceiling),
                                reward_range=(least, most))  # fmt: skip


def cressie_read_rows(j: Judged, policy: str) -> Iterator[dict[str, Any]]:
    """Empirical likelihood's estimate and its own interval."""
    kind = "action"
    if j.diagnostics(policy, kind).verdict != IDENTIFIED:
        yield j.row(policy, "cressie_read", {"interval": "withheld"}, kind)
        return
    sums = j.acc.weights[policy, kind]
    usable = not (j.acc.clustered or j.log.adaptive)
    low, high = empirical_likelihood(j, policy) if usable else (NAN, NAN)
    value, error = intervals.cressie_read_estimate(sums), intervals.cressie_read_std_error(sums)
    numbers = {"value": value, "std_error": error, "low": low, "high": high,
               "interval": "cressie_read"}  # fmt: skip
    yield j.row(policy, "cressie_read", numbers, kind)


def instead(j: Judged, policy: str) -> Iterator[dict[str, Any]]:
    """Where the value is not identified: its worst cases, and what the model alone says."""
    primary = j.primary(policy)
    if primary.verdict == IDENTIFIED:
        return
    if "dm" not in j.question.estimators and ("dm", None) in j.acc.sums:
        yield from estimator_rows(j, policy, ("dm", None))
    kind = j.acc.kinds[0]
    sums = j.acc.weights[policy, kind]
    error = math.sqrt(max(sums.sw2r2 / sums.n - (sums.swr / sums.n) ** 2, 0.0) / sums.n)
    if j.acc.clustered and ("ips", None) in j.acc.sums:
        error = max(error, j.estimate(policy, "ips", None).std_error)
    # what the weights did not bring to light counts as missing, be it covered or not
    seen = min(primary.covered_low, max(primary.mean_weight_low, 0.0))
    covered = (seen, max(seen, min(primary.covered_high, primary.mean_weight_high)))
    least, most = worst(j)
    low, high = diagnostics.bounds(sums.swr / sums.n, covered, (least, most), std_error=error,
                                   alpha=j.question.alpha)  # fmt: skip
    yield j.row(policy, "bounds", {"low": low, "high": high, "interval": "worst case"}, kind,
              f"rewards from {least:g} to {most:g} where the log shows nothing")  # fmt: skip


def worst(j: Judged) -> tuple[float, float]:
    """Least and most that a unit can be worth."""
    least, most = j.log.reward_range
    if j.log.unit == "row":
        return least, most
    steps = j.log.horizon
    gamma = j.question.gamma if j.log.unit == "episode" else 1.0
    total = steps if gamma == 1.0 else (1.0 - gamma**steps) / (1.0 - gamma)
    return min(least * total, least), max(most * total, most)


def differences(j: Judged, chosen: dict[tuple[str, str], Key]) -> list[dict[str, Any]]:
    """Each policy against the baseline on the same rows; Holm's steps over the policies compared.

    Not of estimators whose own error is unknown, as of models alone and of lambdas chosen on this
    log: what is wrong with them would pass for a difference.
    """
    baseline = j.question.baseline
    out: list[dict[str, Any]] = []
    for spec in j.question.estimators if baseline is not None else ():
        pairs = [(p, *chosen[p, spec]) for p in j.targets if p != baseline and (p, spec) in chosen]
        if pairs and len(list(expanded(spec))) == 1 and ESTIMATORS[pairs[0][1]].covers:
            gaps = [difference(j, policy, name, lam) for policy, name, lam in pairs]
            adjusted = intervals.holm(np.array([gap["p_value"] for gap in gaps]))
            out += [{**g, "p_holm": float(p)} for g, p in zip(gaps, adjusted, strict=True)]
    return out


def difference(j: Judged, policy: str, name: str, lam: float | None) -> dict[str, Any]:
    """A policy against the baseline; nothing where one of the two is not identified."""
    baseline = j.question.baseline or ""
    verdict = max(
        (j.diagnostics(p, weighed(name)).verdict for p in (policy, baseline)), key=ORDER.index
    )
    gap, error = j.difference(policy, baseline, name, lam)
    spread = (j.spread.get((p, name, lam), 0.0) for p in (policy, baseline))
    error = math.hypot(error, *spread)
    if verdict != IDENTIFIED or j.log.adaptive:
        gap = error = NAN
    low, high = intervals.clt(gap, error, j.question.alpha)
    return {
        "policy": policy, "baseline": baseline, "estimator": name, "difference": gap,
        "std_error": error, "low": low, "high": high, "p_value": intervals.p_value(gap, error),
        "verdict": verdict,
    }  # fmt: skip


def widened(
    value: float, low: float, high: float, spread: float, alpha: float
) -> tuple[float, float]:
    """An interval with an independent normal error of this standard deviation added."""
    if not spread:
        return low, high
    reach = NormalDist().inv_cdf(1.0 - alpha / 2.0) * spread
    return value - math.hypot(value - low, reach), value + math.hypot(high - value, reach)
