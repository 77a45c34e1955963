"""From this log, how good would these policies be, how sure are we, can the log answer at all?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from evaluation.accumulate import Accumulator
from evaluation.columns import Fits, columns, rows_where
from evaluation.estimators import ESTIMATORS, find, known, parse
from evaluation.fits import fitted, propensities, states_recur, unsorted
from evaluation.log import DecisionLog
from evaluation.report import Table
from evaluation.shape import SHAPES
from evaluation.target_kinds import AgentPolicy, Given
from evaluation.targets import Target
from evaluation.terms import Array
from evaluation.verdicts import Judged, judged

INTERVALS = ("clt", "student_t", "bootstrap", "empirical_bernstein", "hoeffding", "cressie_read",
             "confidence_sequence")  # fmt: skip
BATCH = 65_536  # rows in flight: a few columns of them stay in the cache
FIRST = {"row": "ips", "slate": "sips", "episode": "tis"}  # where nothing else is summed up
PRIMARY = {"row": "action", "slate": "joint", "episode": "trajectory"}  # ratio of the verdict


@dataclass(frozen=True)
class Question:
    """What is asked, checked."""

    estimators: tuple[str, ...]  # as given, such as `dros` or `dros(lam=10)`
    intervals: tuple[str, ...]
    baseline: str | None
    alpha: float
    gamma: float
    seed: int
    tuning: str
    pooling: str

    @property
    def names(self) -> list[str]:
        """Estimators without their lambdas; those of the distribution are not among them."""
        return [parse(e)[0] for e in self.estimators if e not in SHAPES]


def evaluate(
    log: DecisionLog,
    targets: Mapping[str, Target],
    *,
    estimators: Sequence[str] | None = None,
    intervals: Sequence[str] = ("clt",),
    reward_model: Any = None,
    baseline: str | None = None,
    alpha: float = 0.05,
    seed: int = 0,
    gamma: float = 1.0,
    clusters: Any = None,
    tuning: str = "slope",
    pooling: str = "pooled",
    propensity_model: str = "multinomial",
    replicates: int = 20,
    batch_rows: int = BATCH,
    progress: bool = False,
) -> Table:
    """Judge targets on a log; numbers that the log cannot give are nan, never printed with a doubt.

    `estimators` are names of ESTIMATORS, `name(lam=10)` where lambda is not to be chosen, or cdf,
    quantiles, cvar; None takes those that won `bench=ope_accuracy` among what the log allows.
    `reward_model` is a RewardModel (rows, slates) or a FittedQ (episodes), cross-fitted by cluster.
    `clusters` (A,) of the actions are for mips and offcem. `tuning` is slope or mse. `pooling` is
    weighted where each logger's rows are judged apart and combined by inverse variance. A log
    without propensities gets fitted ones, and intervals widened by `replicates` refits.

    Raises ValueError for unknown names, targets that do not fit the log, and what an estimator
    needs but nobody gave.
    """
    question = asked(log, targets, reward_model, estimators, intervals, baseline, alpha, gamma,
                     seed, tuning, pooling)  # fmt: skip
    whole, fit = log, None
    if not log.has("propensity"):
        whole, fit, order = propensities(log, propensity_model, seed)
    resolved = {name: target.resolved(whole) for name, target in targets.items()}
    for name, target in resolved.items():
        try:
            target.check(whole)
        except ValueError as error:
            raise ValueError(f"target {name!r}: {error}") from None
    fits = fitted(whole, resolved, question.names, reward_model, clusters, gamma, seed)
    parts = accumulated(whole, resolved, question, fits, batch_rows, progress)
    spread = {}
    if fit is not None and replicates:
        again = (unsorted(order, logged) for logged in fit.replicates(replicates, seed))
        spread = refitted(whole, resolved, question, fits, again)
    return judged(Judged(parts, question, whole, resolved, fits, spread, fit))


def asked(
    log: DecisionLog, targets: Mapping[str, Target], reward_model: Any,
    estimators: Sequence[str] | None, intervals: Sequence[str], baseline: str | None,
    alpha: float, gamma: float, seed: int, tuning: str, pooling: str,
) -> Question:  # fmt: skip
    """The question, or an error that says what cannot be asked."""
    if not targets:
        raise ValueError("expected at least one target: {'agent': Target...}")
    for name, target in targets.items():
        if not isinstance(target, Target):
            raise ValueError(
                f"target {name!r} is {type(target).__name__}: make it by Target.from_..."
            )
    if isinstance(estimators, str) or isinstance(intervals, str):
        raise ValueError("estimators and intervals are lists: estimators=['dr'], intervals=['clt']")
    known(intervals, INTERVALS, "interval")
    known([tuning], ("slope", "mse"), "tuning")
    known([pooling], ("pooled", "weighted"), "pooling")
    if pooling == "weighted" and not log.has("logger"):
        raise ValueError("pooling='weighted' combines loggers: give the log logger=(n,)")
    if pooling == "weighted" and not log.has("propensity"):
        raise ValueError("pooling='weighted' needs the propensities of each logger: give them")
    if baseline is not None:
        known([baseline], list(targets), "baseline")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}: .05 gives 95 % intervals")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    chosen = tuple(estimators) if estimators is not None else usual(log, targets, reward_model)
    for spec in chosen:
        if spec not in SHAPES and (unit := find(parse(spec)[0]).unit) not in ("row", log.unit):
            raise ValueError(f"{spec} judges {unit}s, this log has {log.unit}s: "
                             f"{remedy(unit)}")  # fmt: skip
    return Question(chosen, tuple(intervals), baseline, alpha, gamma, seed, tuning,
                    pooling)  # fmt: skip


def remedy(unit: str) -> str:
    """What a log must have for estimators of this unit."""
    return "give it decision and slot" if unit == "slate" else "give it episode and step"


def usual(log: DecisionLog, targets: Mapping[str, Target], reward_model: Any) -> tuple[str, ...]:
    """Estimators where none are named: by evidence (`bench=ope_accuracy`) and what is there."""
    model = reward_model is not None or all(map(brings_model, targets.values()))
    if log.unit == "row":
        return ("sndr", "dr", "snips", "dm") if model else ("snips", "ips")
    if log.unit == "slate":
        return ("snrips", "rips", "sips")
    if not (model and log.has("context")):
        return ("wpdis", "pdis")
    return (*(("drl",) if states_recur(log) else ()), "seq_sndr", "wpdis", "fqe")


def brings_model(target: Target) -> bool:
    """Whether a target came with its value and q of the logged actions."""
    kind = target.kind
    if not isinstance(kind, Given):
        return False
    return all(kind.columns[name] is not None for name in ("value", "q_logged"))


def has_model(target: Target, fits: Fits) -> bool:
    """Whether a value of the target is at hand for every row."""
    return brings_model(target) or (
        fits.reward is not None and not isinstance(target.kind, Given | AgentPolicy)
    )


def accumulated(
    log: DecisionLog, targets: Mapping[str, Target], question: Question, fits: Fits,
    batch_rows: int = BATCH, progress: bool = False,
) -> list[Accumulator]:  # fmt: skip
    """One pass over the log: sums of all rows, or of each logger's where they are pooled later."""
    summed = [e for e in question.estimators if e not in (*SHAPES, "cressie_read")]
    if log.unit == "row" and all(has_model(target, fits) for target in targets.values()):
        summed += ["dm"] * ("dm" not in summed)  # for where the log does not identify a value
    whole = not all(ESTIMATORS[parse(e)[0]].mergeable for e in summed)
    kinds = [PRIMARY[log.unit]]
    used = [ESTIMATORS[name] for name in question.names]
    if any((e.unit == "row" and e.weight) or e.weight == "occupancy" for e in used):
        kinds.append("action")
    by_row = any(e.unit == "row" and e.weight for e in used)
    clustered = log.has("cluster") or (log.unit != "row" and by_row)

    def empty() -> Accumulator:
        return Accumulator(
            list(targets), summed or [FIRST[log.unit]], gamma=question.gamma, whole=whole,
            horizon=log.horizon, weights=list(dict.fromkeys(kinds)), clustered=clustered,
            blocks="bootstrap" in question.intervals,
        )  # fmt: skip

    kinds = empty().kinds
    wanted = [*kinds, *(["match"] if "replay" in question.names else [])]
    fields = needed(log, fits, wanted, {name for t in targets.values() for name in t.needs})
    parts: dict[int, Accumulator] = {}
    bar = tqdm(total=log.num_rows, desc="evaluate", unit="row", disable=not progress)
    for batch in log.batches(log.num_rows + 1 if whole else batch_rows, columns=fields):
        found = columns(batch, targets, wanted, fits)
        for logger, rows in by_logger(batch.logger if question.pooling == "weighted" else None):
            part = parts.setdefault(logger, empty())
            part.update(found if rows is None else rows_where(found, rows))
        bar.update(len(batch.rows))
    bar.close()
    return list(parts.values())


def by_logger(logger: Array | None) -> Iterator[tuple[int, Array | None]]:
    """Each logger with its rows (n,) bool; all rows as one where they are not told apart."""
    if logger is None:
        yield 0, None
    else:
        yield from ((int(one), logger == one) for one in np.unique(logger))


def needed(log: DecisionLog, fits: Fits, kinds: Sequence[str], fields: set[str]) -> list[str]:
    """Fields of the log that the pass reads."""
    wanted = {"action", "reward", "propensity", "cluster", "logger", *fields}
    if fits.reward is not None or "cluster" in kinds:
        wanted.add("context")
    if {"marginal", "pseudo_inverse", "occupancy"} & set(kinds):
        wanted.add("marginal")
    return [*sorted(name for name in wanted if log.has(name)), "support"]


def refitted(
    log: DecisionLog, targets: Mapping[str, Target], question: Question, fits: Fits,
    replicates: Any,
) -> dict[tuple[str, str, float | None], float]:  # fmt: skip
    """Standard deviation of each estimate over refits of the logging policy."""
    found: dict[tuple[str, str, float | None], list[float]] = {}
    for propensity in replicates:
        again = log.with_propensity(propensity, estimated=True)
        (acc,) = accumulated(again, targets, question, fits)
        for key, estimate in acc.result().items():
            found.setdefault(key, []).append(estimate.value)
    return {key: float(np.std(values, ddof=1)) for key, values in found.items() if len(values) > 1}
