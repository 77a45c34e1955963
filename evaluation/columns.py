"""A batch of the log and the targets, as the columns that the accumulator takes in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evaluation import slates
from evaluation.batch import Batch
from evaluation.clusters import cluster_ratio
from evaluation.rankers import ByContext, Ranker
from evaluation.reward_model import FittedRewardModel, target_value
from evaluation.sequential import HorizonCap
from evaluation.targets import Logged, Target
from evaluation.terms import Array, Groups

PerRow = dict[str, Array]  # by column name, (n,) in the order of the log's rows


@dataclass(frozen=True)
class Fits:
    """What was fitted before the pass."""

    reward: FittedRewardModel | None = None
    rows: dict[str, PerRow] = field(default_factory=dict)  # policy -> fitted columns of all rows
    logging: Any = None  # the logging policy's whole distribution, for cluster weights
    clusters: Array | None = None  # (A,)
    caps: dict[str, HorizonCap] = field(default_factory=dict)  # policy -> how far products reach


def columns(
    batch: Batch, targets: Mapping[str, Target], kinds: Sequence[str], fits: Fits
) -> dict[str, Any]:
    """Rewards, groups and clusters, and of each policy its weights of these kinds and its model."""
    group = batch.episode if batch.episode is not None else batch.decision
    groups = Groups(group) if group is not None else None
    if batch.episode is not None and batch.slot is not None and batch.slot.any():
        raise ValueError(
            "episodes of slates cannot be judged as one: leave out slot and decision and give one "
            "row a step, or leave out episode and step and judge slates, with cluster=episode"
        )
    out: dict[str, Any] = {
        "reward": batch.reward, "propensity": batch.propensity, "group": group, "step": batch.step,
        "cluster": batch.cluster if batch.cluster is not None else group,
    }  # fmt: skip
    for policy, target in targets.items():
        logged = target.logged(batch)
        found = {f"{kind}_weight": weights(kind, batch, target, logged, groups, fits, policy)
                 for kind in kinds}  # fmt: skip
        found |= {name: x[batch.rows] for name, x in fits.rows.get(policy, {}).items()}
        found |= modelled(batch, target, logged, fits)
        covered = target.covered(batch)
        if covered is not None:
            found["covered"] = covered
        for name, x in found.items():
            out.setdefault(name, {})[policy] = x
    return out


def rows_where(found: dict[str, Any], keep: Array) -> dict[str, Any]:
    """The columns of some rows (n,) bool."""
    return {
        name: rows_where(x, keep) if isinstance(x, dict) else None if x is None else x[keep]
        for name, x in found.items()
    }


def modelled(batch: Batch, target: Target, logged: Logged, fits: Fits) -> PerRow:
    """q of the logged action and the target's value: the target's own, else the reward model's."""
    if logged.value is not None and logged.q_logged is not None:
        return {"value": logged.value, "q_logged": logged.q_logged}
    if fits.reward is None:
        return {} if logged.value is None else {"value": logged.value}
    fold = fits.reward.fold_of(batch.cluster if batch.cluster is not None else batch.rows)
    q_logged = fits.reward.predict(batch.context, batch.action[:, None], fold)[:, 0]
    whole = target.distribution(batch)
    if whole is None:
        return {"q_logged": q_logged}
    return {
        "value": target_value(fits.reward, batch.context, *whole, fold),
        "q_logged": q_logged,
    }


def step_ratio(batch: Batch, logged: Logged) -> Array:
    """pi_e / pi_b of each row given what stands above it, (n,); an empty slot weighs nothing."""
    ratio = logged.pi / batch.propensity
    empty = batch.action.min(initial=0) < 0
    return np.where(batch.action < 0, 1.0, ratio) if empty else ratio


def weights(
    kind: str, batch: Batch, target: Target, logged: Logged, groups: Groups | None, fits: Fits,
    policy: str,
) -> Array:  # fmt: skip
    """Ratios (n,) of one kind."""
    fitted = fits.rows.get(policy, {}).get(f"{kind}_weight")
    if fitted is not None:
        return fitted[batch.rows]
    if kind == "cluster":
        return cluster_weights(batch, target, fits)
    if kind == "match":
        return logged.pi
    if kind == "pseudo_inverse":
        independent(batch)
    if kind in ("marginal", "pseudo_inverse", "occupancy"):
        ratio = marginal_ratio(kind, batch, target, logged)
        return ratio if kind != "pseudo_inverse" else PREFIXED[kind](needed(kind, groups), ratio)
    if kind == "position":
        raise ValueError(
            "pbm needs the probability of each item at every position: make its weights with "
            "slates.position_based_weights and call estimators.contributions('pbm', ...)"
        )
    ratio = step_ratio(batch, logged)
    return ratio if kind == "action" else PREFIXED[kind](needed(kind, groups), ratio)


PREFIXED: dict[str, Callable[[Groups, Array], Array]] = {
    "joint": slates.joint_weights,
    "prefix": slates.prefix_weights,
    "trajectory": lambda groups, ratio: groups.cumulative_product(ratio),
    "pseudo_inverse": slates.pseudo_inverse_product_weights,
}


def needed(kind: str, groups: Groups | None) -> Groups:
    """Slates or episodes; a log without them cannot have such weights."""
    if groups is None:
        raise ValueError(
            f"{kind} weights need slates or episodes: give the log decision and slot, or episode "
            "and step"
        )
    return groups


def independent(batch: Batch) -> None:
    """Refuse a log whose slots depend on each other: the product form of pi is not for it."""
    if batch.marginal is None:
        return
    apart = ~np.isclose(batch.marginal, batch.propensity, rtol=1e-4) & (batch.action >= 0)
    if apart.any():
        row = int(apart.argmax())
        raise ValueError(
            f"pi is computed for slots that are drawn independently; in row {batch.rows[row]} the "
            f"item has propensity {batch.propensity[row]:.4g} given the items above and "
            f"{batch.marginal[row]:.4g} whatever is above: make weights with "
            "slates.pseudo_inverse_weights and call estimators.contributions('pi', ...)"
        )


def marginal_ratio(kind: str, batch: Batch, target: Target, logged: Logged) -> Array:
    """Target's marginal over the log's, (n,); at a slate's first slot it is the step's ratio."""
    if logged.marginal is not None and batch.marginal is not None:
        return logged.marginal / batch.marginal
    alone = batch.slot is None or not batch.slot.any()
    if kind != "occupancy" and alone:
        return step_ratio(batch, logged)
    if batch.marginal is not None and logged.marginal is None and kind == "marginal":
        found = plackett_luce_marginal(batch, target)
        if found is not None:
            return found / batch.marginal
    who = "the log (marginal=...)" if batch.marginal is None else "the target (marginal=...)"
    raise ValueError(
        f"{kind} weights need the probability of each item at its slot whatever stands above it; "
        f"{who} does not say it: give it, or use rips or sips"
    )


def plackett_luce_marginal(batch: Batch, target: Target) -> Array | None:
    """Probability of each row's item at its slot, (n,), if the target draws its lists so."""
    soft = isinstance(target.kind, ByContext | Ranker) and not target.deterministic
    whole = target.distribution(batch) if soft else None
    if whole is None or batch.slot is None or batch.decision is None:
        return None
    groups = Groups(batch.decision)
    first = groups.starts[groups.index]  # (n,) row of the slate's first slot
    places = int(batch.slot.max()) + 1
    at = slates.item_position_marginals(whole[1][first], np.maximum(batch.action, 0), places)
    return np.where(batch.action < 0, 1.0, at[np.arange(len(first)), batch.slot])


def cluster_weights(batch: Batch, target: Target, fits: Fits) -> Array:
    """Probability of the logged action's cluster under the target over that under the log, (n,)."""
    if fits.clusters is None:
        raise ValueError("mips and offcem need clusters=(A,): the cluster of each action")
    theirs, ours = target.distribution(batch), fits.logging.distribution(batch)
    if theirs is None or ours is None:
        raise ValueError(
            "mips and offcem need whole distributions: make the target from_matrix, from_lists or "
            "from_ranker"
        )
    return cluster_ratio(fits.clusters, batch.action, *theirs, *ours)
