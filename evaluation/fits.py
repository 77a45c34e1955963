"""Models that an evaluation fits before its pass over the log: propensities, rewards, ratios."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluation import sequential
from evaluation.batch import Batch
from evaluation.columns import Fits, PerRow, step_ratio
from evaluation.estimators import ESTIMATORS
from evaluation.fqe import FittedQ
from evaluation.log import DecisionLog
from evaluation.propensity import FittedPropensity, fit_propensity
from evaluation.reward_model import RewardModel
from evaluation.target_kinds import Lists
from evaluation.targets import Target
from evaluation.terms import Array, Groups

MOST_ROWS = 5_000_000  # of an episode log whose products of ratios are looked at by step
LOOKED_AT = 10_000  # rows that tell whether states recur
MOST_STEPS = 20  # that a fitted Q has a number each for; longer episodes have a curve of time


def whole(log: DecisionLog) -> Batch:
    """All rows at once: for models that need them so."""
    return next(iter(log.batches(log.num_rows + 1)))  # one more: the last group too


def propensities(
    log: DecisionLog, model: str, seed: int
) -> tuple[DecisionLog, FittedPropensity, Array]:
    """The log with fitted propensities, the fit, and the row numbers (n,) in the fit's order."""
    rows = whole(log)
    fit = fit_propensity(
        rows.context, rows.action, log.num_actions, slot=rows.slot,
        cluster=rows.cluster if rows.cluster is not None else rows.rows,
        model=model, seed=seed,
    )  # fmt: skip
    return log.with_propensity(unsorted(rows.rows, fit.logged), estimated=True), fit, rows.rows


def fitted(
    log: DecisionLog, targets: Mapping[str, Target], names: Sequence[str], reward_model: Any,
    clusters: Any, gamma: float, seed: int,
) -> Fits:  # fmt: skip
    """What the estimators of these names need beyond the log and what the targets say."""
    kinds = {ESTIMATORS[name].weight for name in names}
    reward, rows = None, dict[str, PerRow]()
    models = any(ESTIMATORS[name].needs for name in names if name != "ix")
    if isinstance(reward_model, RewardModel) or hasattr(reward_model, "predict"):
        reward = learnt(log, reward_model, catalogue(log, targets))
    elif reward_model is not None and not isinstance(reward_model, FittedQ):
        raise ValueError(f"reward_model must be a RewardModel, or a FittedQ for episodes, got "
                         f"{type(reward_model).__name__}")  # fmt: skip
    if log.unit == "episode" and (models or "occupancy" in kinds):
        everything = whole(log)
        q = reward_model if isinstance(reward_model, FittedQ) else FittedQ(gamma=gamma, seed=seed)
        most = catalogue(log, targets)
        for policy, target in targets.items():
            fit = episodes(everything, target, names, q, reward is None, most)
            rows[policy] = {name: unsorted(everything.rows, x) for name, x in fit.items()}
    if "classifier" in kinds:
        from evaluation.balanced import classifier_weights

        everything = whole(log)
        for policy, target in targets.items():
            weight = classifier_weights(everything, target, catalogue(log, targets), seed)
            rows.setdefault(policy, {})["classifier_weight"] = unsorted(everything.rows, weight)
    logging = logging_policy(log, seed) if "cluster" in kinds else None
    groups = None if clusters is None else np.asarray(clusters)
    caps = reach(log, targets, gamma) if log.unit == "episode" else {}
    return Fits(reward=reward, rows=rows, logging=logging, clusters=groups, caps=caps)


def reach(
    log: DecisionLog, targets: Mapping[str, Target], gamma: float
) -> dict[str, sequential.HorizonCap]:
    """After how many steps too few effective episodes are left, by policy; of logs that fit."""
    if log.num_rows > MOST_ROWS:
        return {}
    everything = whole(log)
    groups = Groups(everything.episode, everything.step)
    ratios = {name: step_ratio(everything, t.logged(everything)) for name, t in targets.items()}
    return {name: sequential.horizon_cap(groups, groups.sort(ratio), gamma, log.reward_range)
            for name, ratio in ratios.items()}  # fmt: skip


def unsorted(rows: Array, x: Array) -> Array:
    """Values (n,) of the log's rows, numbered so, to the order of the log."""
    out = np.empty(len(x))
    out[rows] = x
    return out


def catalogue(log: DecisionLog, targets: Mapping[str, Target]) -> int:
    """Actions that the log or a target knows; a log alone knows none that it never shows."""
    most = log.num_actions
    some = next(iter(log.batches(1024)))
    for target in targets.values():
        kind = target.kind
        known = (kind.items, None) if isinstance(kind, Lists) else target.distribution(some)
        most = max(most, int(known[0].max()) + 1) if known is not None else most
    return most


def learnt(log: DecisionLog, model: Any, num_actions: int) -> Any:
    """The reward model, fitted to evenly spaced rows of the log, at most its `max_rows`."""
    if not hasattr(model, "fit"):
        return model  # fitted elsewhere: on another log, as is best
    every = -(-log.num_rows // model.max_rows)
    names = [n for n in ("action", "reward", "context", "cluster") if log.has(n)]
    found: dict[str, list[Array]] = {name: [] for name in (*names, "rows")}
    for batch in log.batches(columns=names):
        keep = (batch.rows % every == 0) & (batch.action >= 0)
        for name in found:
            found[name].append(getattr(batch, name)[keep])
    all_of = {name: np.concatenate(parts) for name, parts in found.items()}
    return model.fit(all_of.get("context"), all_of["action"], all_of["reward"],
                     all_of.get("cluster", all_of["rows"]), num_actions)  # fmt: skip


def episodes(
    batch: Batch, target: Target, names: Sequence[str], q: FittedQ, models: bool, num_actions: int
) -> PerRow:
    """Q and V of a target, and its occupancy ratio, of all rows; what it brings along is kept."""
    logged, groups = target.logged(batch), Groups(batch.episode, batch.step)
    out: PerRow = {}
    needs = {key for name in names for key in ESTIMATORS[name].needs}
    if models and needs and (logged.value is None or logged.q_logged is None):
        context, pi = timed(state(batch), groups), dense(batch, target, num_actions)
        fit = (context, batch.action, batch.reward, groups, pi, num_actions, batch.cluster)
        out["q_logged"], out["value"] = q.fit_predict(*fit)
        if "mrdr" in names:
            mrdr = FittedQ(**{**vars(q), "mrdr": True})
            out["mrdr.q_logged"], out["mrdr.value"] = mrdr.fit_predict(*fit, batch.propensity)
    occupancy = any(ESTIMATORS[name].weight == "occupancy" for name in names)
    if occupancy and (logged.marginal is None or batch.marginal is None):
        if not recurring(batch):
            raise ValueError(
                "mis and drl weigh states, and most states of this log are seen once: coarsen the "
                "context, or use seq_sndr"
            )
        ratio = step_ratio(batch, logged)
        _, code = np.unique(state(batch), axis=0, return_inverse=True)
        out["occupancy_weight"] = sequential.marginal_state_action_weights(
            groups, code.reshape(-1), ratio
        )
    return out


def state(batch: Batch) -> Array:
    """What an episode's model knows of a row, (n, d)."""
    if batch.context is None:
        raise ValueError(
            "fqe, mrdr, mis and drl learn from states: give the log a context (n, d), or the "
            "target value, q_logged and marginal"
        )
    return batch.context


def states_recur(log: DecisionLog) -> bool:
    """Whether occupancies of states can be told from the first rows of a log."""
    return recurring(next(iter(log.batches(LOOKED_AT))))


def recurring(batch: Batch) -> bool:
    """Whether a state is seen twice on average, or more."""
    return 2 * len(np.unique(state(batch), axis=0)) <= len(batch.rows)


def timed(context: Array, groups: Groups) -> Array:
    """States (n, d) with their step: what is still to come depends on how much time is left."""
    longest = int(groups.lengths.max())
    if longest <= MOST_STEPS:
        return np.column_stack([context, np.eye(longest)[groups.place]])
    t = groups.place / longest
    return np.column_stack([context, t, t**2])


def dense(batch: Batch, target: Target, num_actions: int) -> Array:
    """The target's probabilities of all actions, (n, A)."""
    found = target.distribution(batch)
    if found is None:
        raise ValueError(
            "a fitted Q asks the target for the probabilities of all actions: make it "
            "from_matrix, from_lists, from_function or from_ranker, or give value and q_logged"
        )
    items, probs = found
    out = np.zeros((len(batch.rows), num_actions))
    row, place = np.nonzero(items >= 0)
    out[row, items[row, place]] = probs[row, place]
    return out


class FittedLogging:
    """Fitted propensities as a whole distribution."""

    def __init__(self, fit: FittedPropensity, num_actions: int) -> None:
        self.fit, self.num_actions = fit, num_actions

    def distribution(self, batch: Batch) -> tuple[Array, Array]:
        """Items and probabilities, (n, A) each."""
        fold = self.fit.fold_of(batch.cluster if batch.cluster is not None else batch.rows)
        probs = self.fit.probs(batch.context, fold, batch.slot)
        return np.broadcast_to(np.arange(self.num_actions), probs.shape), probs


def logging_policy(log: DecisionLog, seed: int) -> Any:
    """The logging policy's whole distribution: given as the log's support, else fitted."""
    given = next(iter(log.batches(1))).logging_policy
    if given is not None:
        return given if hasattr(given, "distribution") else Target.from_function(given)
    _, fit, _ = propensities(log, "multinomial", seed)
    return FittedLogging(fit, log.num_actions)
