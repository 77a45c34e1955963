"""Estimators of a policy's value: each maps logged rows to Terms, whose ratio of means is it.

All are a baseline plus weight times residual. `weight` is what multiplies a row's residual in the
formula: pi_e/pi_b of the row for bandits, the joint, prefix or item-position ratio for slates, the
cumulative W_t for episodes, the occupancy ratio for mis and drl.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation import sequential, slates
from evaluation.intervals import cressie_read_contributions
from evaluation.terms import Array, Groups, Terms, plain, stack

CLIPS = (2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1000.0, np.inf)
SHRINKS = (0.1, 1.0, 10.0, 100.0, 1000.0, 10_000.0, np.inf)
SMOOTHS = (0.0, 0.001, 0.01, 0.1, 0.5)  # at 1 sub-Gaussian weights forget the target: left out
ABSENT: Any = None  # an estimator's `needs` says which columns it finds


@dataclass(frozen=True)
class Rows:
    """Columns (n,) of logged rows, sorted by group where there are groups."""

    reward: Array
    weight: Array = ABSENT
    q_logged: Array = ABSENT
    value: Array = ABSENT
    propensity: Array = ABSENT
    weight_prev: Array | None = None
    value_next: Array | None = None
    lam: float = ABSENT
    gamma: float = 1.0
    horizon: int = 1
    groups: Groups = ABSENT
    stepwise: bool = False  # the groups are episodes: rewards come one after another


def clipped(weight: Array, lam: float | None) -> Array:
    """Weights (n,) not above lam."""
    return weight if lam is None or np.isinf(lam) else np.minimum(weight, lam)


def shrunk(weight: Array, lam: float) -> Array:
    """Optimistic shrinkage (Su et al., 2020): 0 trusts the model, inf the weights."""
    if np.isinf(lam):
        return weight
    if lam == 0:
        return np.zeros_like(weight)
    return lam * weight / (weight * weight + lam)


def sub_gaussian(weight: Array, lam: float) -> Array:
    """Harmonic correction with 1 (Metelli et al., 2021)."""
    return weight / (1.0 - lam + lam * weight)


def ips(r: Rows) -> Terms:
    """Inverse propensity score (Horvitz and Thompson, 1952)."""
    return plain(clipped(r.weight, r.lam) * r.reward)


def snips(r: Rows) -> Terms:
    """Self-normalised IPS (Swaminathan and Joachims, 2015)."""
    weight = clipped(r.weight, r.lam)
    return Terms(stack([weight * r.reward]), stack([weight]))


def direct(r: Rows) -> Terms:
    """The model's value of each row, of the slots of a slate together, of an episode's start."""
    if r.groups is None:
        return plain(r.value)
    return sequential.direct(r.groups, r.value) if r.stepwise else plain(r.groups.sum(r.value))


def dr(r: Rows) -> Terms:
    """Doubly robust (Dudik et al., 2011), with weights clipped at lam where it is given."""
    return plain(r.value + clipped(r.weight, r.lam) * (r.reward - r.q_logged))


def sndr(r: Rows) -> Terms:
    """Doubly robust with the residual self-normalised."""
    residual = r.weight * (r.reward - r.q_logged)
    return Terms(stack([r.value, residual]), stack([np.ones_like(r.value), r.weight]))


def switch_dr(r: Rows) -> Terms:
    """The model where weights exceed lam (Wang et al., 2017)."""
    weight = np.where(r.weight <= r.lam, r.weight, 0.0)
    return plain(r.value + weight * (r.reward - r.q_logged))


def dros(r: Rows) -> Terms:
    """Doubly robust with optimistic shrinkage (Su et al., 2020)."""
    return plain(r.value + shrunk(r.weight, r.lam) * (r.reward - r.q_logged))


def sg_ips(r: Rows) -> Terms:
    """Sub-Gaussian IPS (Metelli et al., 2021)."""
    return plain(sub_gaussian(r.weight, r.lam) * r.reward)


def sg_dr(r: Rows) -> Terms:
    """Sub-Gaussian doubly robust (Metelli et al., 2021)."""
    return plain(r.value + sub_gaussian(r.weight, r.lam) * (r.reward - r.q_logged))


def log_smoothing(r: Rows) -> Terms:
    """Logarithmic smoothing (Sakhi et al., 2024)."""
    if (r.reward < 0).any():
        row = int((r.reward < 0).argmax())
        raise ValueError(
            f"ls needs rewards of at least 0, got {r.reward[row]} in row {row}: use ips"
        )
    if np.isinf(r.lam):
        return ips(r)
    return plain(r.lam * np.log1p(r.weight * r.reward / r.lam))


def implicit_exploration(r: Rows) -> Terms:
    """pi_e / (pi_b + 1 / lam) (Kocak et al., 2014); without lam the weights are so already."""
    if r.lam is None:
        return plain(r.weight * r.reward)
    return plain(r.weight * r.propensity / (r.propensity + 1.0 / r.lam) * r.reward)


def replay(r: Rows) -> Terms:
    """Mean reward where the target agrees with the log (Li et al., 2011)."""
    match = r.weight > 0
    if match.any() and not np.isclose(r.weight[match], r.weight[match].max(), rtol=1e-6).all():
        row = int(np.flatnonzero(match & (r.weight < r.weight[match].max()))[0])
        raise ValueError(
            "replay judges deterministic policies on uniform logs: weights must be 0 or one "
            f"number, got {r.weight[row]:.6g} and {r.weight.max():.6g} in row {row}: use ips or dr"
        )
    agree = match.astype(float)
    return Terms(stack([agree * r.reward]), stack([agree]))


def cressie_read(r: Rows) -> Terms:
    """Empirical likelihood with E[w] = 1 imposed (Karampatziakis et al., 2020)."""
    return plain(cressie_read_contributions(r.weight, r.reward))


def slots(r: Rows) -> Terms:
    """Sum of the slate's weighted rewards."""
    return slates.weighted_slots(r.groups, r.weight, r.reward)


def sn_slots(r: Rows) -> Terms:
    """The same, each slot's weights over their mean."""
    return slates.self_normalised_slots(r.groups, r.weight, r.reward, r.horizon)


def cascade_dr(r: Rows) -> Terms:
    """Doubly robust under the cascade assumption (Kiyohara et al., 2022)."""
    return slates.cascade_doubly_robust(
        r.groups, r.weight, r.reward, r.q_logged, r.value, r.weight_prev
    )


def tis(r: Rows) -> Terms:
    """Trajectory-wise importance sampling (Precup et al., 2000)."""
    return sequential.tis(r.groups, r.weight, r.reward, r.gamma)


def pdis(r: Rows) -> Terms:
    """Per-decision importance sampling (Precup et al., 2000)."""
    return sequential.pdis(r.groups, r.weight, r.reward, r.gamma)


def wtis(r: Rows) -> Terms:
    """Weighted trajectory-wise importance sampling."""
    return sequential.wtis(r.groups, r.weight, r.reward, r.gamma)


def wpdis(r: Rows) -> Terms:
    """Weighted per-decision importance sampling."""
    return sequential.wpdis(r.groups, r.weight, r.reward, r.gamma, r.horizon)


def seq_dr(r: Rows) -> Terms:
    """Doubly robust for sequences (Jiang and Li, 2016)."""
    return sequential.doubly_robust(
        r.groups, r.weight, r.reward, r.q_logged, r.value, r.gamma, r.weight_prev
    )


def seq_sndr(r: Rows) -> Terms:
    """Weighted doubly robust for sequences (Thomas and Brunskill, 2016)."""
    return sequential.weighted_doubly_robust(
        r.groups, r.weight, r.reward, r.q_logged, r.value, r.gamma, r.horizon
    )


def magic(r: Rows) -> Terms:
    """Blend of the model and importance sampling (Thomas and Brunskill, 2016)."""
    return sequential.magic(
        r.groups, r.weight, r.reward, r.q_logged, r.value, r.gamma, r.horizon
    )  # fmt: skip


def mis(r: Rows) -> Terms:
    """Marginalised importance sampling (Xie et al., 2019), doubly robust where q is given."""
    return sequential.marginalised(
        r.groups, r.weight, r.reward, r.gamma, r.q_logged, r.value, r.value_next
    )


def drl(r: Rows) -> Terms:
    """Double reinforcement learning (Kallus and Uehara, 2020)."""
    return sequential.doubly_robust(  # the same form, W_t being the occupancy ratio
        r.groups, r.weight, r.reward, r.q_logged, r.value, r.gamma, r.weight_prev
    )


@dataclass(frozen=True)
class Estimator:
    """A function of rows and what it needs of them."""

    terms: Callable[[Rows], Terms]
    unit: str = "row"  # row, slate or episode
    weight: str | None = "action"  # which ratio multiplies the residual; None: the model alone
    needs: tuple[str, ...] = ()
    grid: tuple[float, ...] = ()  # lambdas among which one is chosen where none is given
    clips: bool = False  # takes a lam, but needs none
    mergeable: bool = True  # its terms of a batch do not depend on the other batches
    covers: bool = True  # its error is in its sums: else there is no honest interval
    assumes: str = ""  # beyond overlap


MODEL = ("q_logged", "value")
ESTIMATORS: dict[str, Estimator] = {
    "dm": Estimator(
        direct, weight=None, needs=("value",), covers=False, assumes="the reward model is right"
    ),
    "ips": Estimator(ips, clips=True),
    "snips": Estimator(snips, clips=True),
    "dr": Estimator(dr, needs=MODEL, clips=True),
    "sndr": Estimator(sndr, needs=MODEL),
    "switch_dr": Estimator(switch_dr, needs=MODEL, grid=CLIPS),
    "dros": Estimator(dros, needs=MODEL, grid=SHRINKS),
    "sg_ips": Estimator(sg_ips, grid=SMOOTHS),
    "sg_dr": Estimator(sg_dr, needs=MODEL, grid=SMOOTHS),
    "clipped_ips": Estimator(ips, grid=CLIPS),
    "ls": Estimator(log_smoothing, grid=CLIPS),
    "ix": Estimator(implicit_exploration, needs=("propensity",), grid=CLIPS),
    "mips": Estimator(ips, weight="cluster", assumes="items of a cluster answer alike"),
    "offcem": Estimator(
        dr, weight="cluster", needs=MODEL, assumes="the model ranks items within a cluster"
    ),
    "cressie_read": Estimator(cressie_read, mergeable=False),
    "replay": Estimator(replay, weight="match", assumes="the log is uniform"),
    "balanced_ips": Estimator(ips, weight="classifier", assumes="the classifier is right"),
    "sips": Estimator(slots, "slate", "joint"),
    "iips": Estimator(slots, "slate", "marginal", assumes="slots do not influence each other"),
    "rips": Estimator(slots, "slate", "prefix", assumes="users read from the top"),
    "snsips": Estimator(sn_slots, "slate", "joint"),
    "sniips": Estimator(
        sn_slots, "slate", "marginal", assumes="slots do not influence each other"
    ),
    "snrips": Estimator(sn_slots, "slate", "prefix", assumes="users read from the top"),
    "cascade_dr": Estimator(
        cascade_dr, "slate", "prefix", MODEL, assumes="users read from the top"
    ),
    "pi": Estimator(slots, "slate", "pseudo_inverse", assumes="rewards of slots add up"),
    "pbm": Estimator(slots, "slate", "position", assumes="attention times relevance"),
    "tis": Estimator(tis, "episode", "trajectory"),
    "pdis": Estimator(pdis, "episode", "trajectory"),
    "wtis": Estimator(wtis, "episode", "trajectory"),
    "wpdis": Estimator(wpdis, "episode", "trajectory"),
    "seq_dr": Estimator(seq_dr, "episode", "trajectory", MODEL),
    "seq_sndr": Estimator(seq_sndr, "episode", "trajectory", MODEL),
    "mrdr": Estimator(seq_dr, "episode", "trajectory", MODEL),
    "magic": Estimator(magic, "episode", "trajectory", MODEL, mergeable=False, covers=False),
    "mis": Estimator(
        mis, "episode", "occupancy", assumes="states are Markov, and occupancy ratios known"
    ),
    "drl": Estimator(drl, "episode", "occupancy", MODEL, assumes="states are Markov"),
    "fqe": Estimator(
        direct, "episode", None, ("value",), covers=False, assumes="the fitted Q is right"
    ),
}  # fmt: skip


def find(name: str) -> Estimator:
    """The estimator of that name; an unknown one is an error that names the nearest."""
    known([name], [*ESTIMATORS], "estimator")
    return ESTIMATORS[name]


def known(names: Sequence[str], options: Sequence[str], what: str) -> None:
    """Refuse a name that is not an option."""
    for name in names:
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1, cutoff=0.4)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown {what} {name!r}{hint}; there are: {', '.join(options)}")


def contributions(
    name: str,
    *,
    weight: Any = None,
    reward: Any,
    q_logged: Any = None,
    value: Any = None,
    lam: float | None = None,
    group: Any = None,
    step: Any = None,
    gamma: float = 1.0,
    weight_prev: Any = None,
    value_next: Any = None,
    propensity: Any = None,
) -> Array:
    """One number per row, slate or episode, in order of appearance; their mean is the estimate.

    All but lam and gamma are (n,). `weight` is the ratio of the formula (see the module): joint
    weights repeated on the rows of a slate, the cumulative W_t in episodes. `group` are slates or
    episodes, `step` orders their rows. `weight_prev` and `value_next` default to the weight of the
    row before (1 at the first) and the value of the row after (0 after the last). `propensity` is
    for ix alone.

    Raises ValueError for an unknown name, what is missing, unequal lengths, and numbers that no
    log can have.
    """
    estimator = find(name)
    columns = {
        "reward": reward, "weight": weight, "q_logged": q_logged, "value": value,
        "weight_prev": weight_prev, "value_next": value_next, "propensity": propensity,
    }  # fmt: skip
    given = {k: np.asarray(x, dtype=float) for k, x in columns.items() if x is not None}
    checked(name, estimator, given, lam)
    grouped = estimator.unit != "row" or (name == "dm" and group is not None)
    groups = Groups(np.arange(len(given["reward"])) if group is None else group, step)
    if grouped:
        given = {key: groups.sort(x) for key, x in given.items()}
    settings: dict[str, Any] = {
        **given, "lam": lam, "gamma": gamma, "groups": groups if grouped else None
    }  # fmt: skip
    rows = Rows(
        **settings, horizon=int(groups.lengths.max(initial=1)),
        stepwise=step is not None or estimator.unit == "episode",
    )  # fmt: skip
    return estimator.terms(rows).values()


def checked(name: str, estimator: Estimator, given: dict[str, Array], lam: float | None) -> None:
    """Refuse what is missing, ragged or impossible."""
    n = given["reward"].shape
    if len(n) != 1 or not n[0]:
        raise ValueError(f"reward must be (n,) with at least one row, got {n}")
    needs = [*estimator.needs, *(["weight"] if estimator.weight else [])]
    if name == "ix" and lam is None:
        needs.remove("propensity")
    missing = [key for key in needs if key not in given]
    if missing:
        raise ValueError(f"{name} needs {' and '.join(missing)}")
    if estimator.grid and lam is None and name not in ("ix", "clipped_ips"):
        raise ValueError(f"{name} needs lam, e.g. one of {estimator.grid}")
    if name == "clipped_ips" and lam is None:
        raise ValueError("clipped_ips needs lam, the largest weight that counts in full")
    if lam is not None and not lam >= 0:
        raise ValueError(f"lam must be at least 0, got {lam}")
    for key, x in given.items():
        if x.shape != n:
            raise ValueError(f"{key} must be {n} like reward, got {x.shape}")
        bad = ~np.isfinite(x) | (
            (x < 0) if key in ("weight", "propensity") and name != "pi" else False
        )
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(f"{key} must be finite{' and at least 0' * (key == 'weight')}, "
                             f"got {x[row]} in row {row}")  # fmt: skip


def parse(spec: str) -> tuple[str, float | None]:
    """`dros` or `dros(lam=10)` to a name and a lambda."""
    name, bracket, inside = spec.partition("(")
    find(name)
    if not bracket:
        return name, None
    try:
        return name, float(inside.rstrip(")").removeprefix("lam="))
    except ValueError:
        raise ValueError(f"expected NAME or NAME(lam=NUMBER), got {spec!r}") from None
