"""Whether simulated users may be believed: figures against thresholds, one line each.

Each check has a value, a 95 % interval over users where it has one, and a threshold that the value
(or, where it is a gain over a rival, the lower end of its interval) must keep.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from torch import Tensor

from encoders.state import EMPTY
from simulators.base import Catalog, UserTable
from simulators.fidelity import HeldOut, calibration
from simulators.fit import moment
from simulators.organic import Alone, table_at, walk
from simulators.realism import (
    DRAWS,
    Distance,
    difference,
    jensen_shannon,
    ks,
    over_users,
    spread,
    told_apart,
    visit_features,
)
from simulators.rhythm import Memory
from simulators.visits import Lines, lines_of, visits_of
from sources.logs import Logs

CURVES = ("size", "spend", "gap", "hour", "weekday", "repeat_age", "price", "entropy", "within")

THRESHOLDS: dict[str, float] = {
    "calibration_error": 0.10,  # of the base rate
    "calibration_decile": 1.18,  # observed over predicted, or the inverse, in the worst decile
    "activity_decile": 1.15,  # the same by how much users bought before
    "ks_size": 0.05, "ks_spend": 0.05, "ks_gap": 0.05, "ks_hour": 0.05, "ks_weekday": 0.05,
    "ks_repeat_age": 0.05, "ks_price": 0.05, "ks_entropy": 0.05, "ks_within": 0.05,
    "visits_per_user": 1.15,  # simulated over real, or the inverse
    "repeat_share": 0.03,  # difference of the shares of items bought before
    "js_category": 0.008, "js_items": 0.05,  # bits
    "two_sample_auc": 0.60,
    "hit10_new_over_ease": 0.0, "hit10_new_over_item_knn": 0.0, "hit10_new_over_popularity": 0.0,
    "hit10_over_own_counts": 0.0, "hit10_over_decayed_counts": 0.0,
    "ranking_agreement": 0.90,  # of policy pairs told apart, between users of disjoint households
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One line of the gate."""

    check: str
    value: float
    low: float | None
    high: float | None
    threshold: float
    passed: bool
    said: str  # in words


def at_most(name: str, found: Distance | float, limits: Mapping[str, float], said: str) -> Check:
    """A distance that must not exceed its threshold."""
    value, low, high = _spread(found)
    return Check(name, value, low, high, limits[name], bool(abs(value) <= limits[name]), said)


def within(name: str, found: Distance | float, limits: Mapping[str, float], said: str) -> Check:
    """A ratio that must not be further from 1 than its threshold or its inverse."""
    value, low, high = _spread(found)
    bound = limits[name]
    return Check(name, value, low, high, bound, bool(1 / bound <= value <= bound), said)


def above(name: str, found: Distance, limits: Mapping[str, float], said: str) -> Check:
    """A gain whose whole interval must lie above its threshold."""
    passed = bool(found.low > limits[name])
    return Check(name, found.value, found.low, found.high, limits[name], passed, said)


def at_least(name: str, found: Distance | float, limits: Mapping[str, float], said: str) -> Check:
    """A share that must reach its threshold."""
    value, low, high = _spread(found)
    return Check(name, value, low, high, limits[name], bool(value >= limits[name]), said)


def _spread(found: Distance | float) -> tuple[float, float | None, float | None]:
    if isinstance(found, Distance):
        return found.value, found.low, found.high
    return float(found), None, None


def calibration_checks(
    held: HeldOut, log_rate: Tensor, limits: Mapping[str, float]
) -> tuple[list[Check], dict[str, Any]]:
    """Predicted against real purchases: over all, by decile of the prediction, by activity."""
    found = calibration(held.theta, held.bought, log_rate)
    deciles = np.array(found["observed_over_predicted_deciles"])
    predicted = held.theta.sigmoid().sum(dim=1).double().numpy()  # (n,)
    real = held.bought.sum(dim=1).double().numpy()
    before = np.exp(held.trips.profile[:, 1] + held.trips.profile[:, 2])  # trips so far
    active = pd.Series(before).rank(method="first").to_numpy()
    decile = ((active - 1) * 10 // len(active)).astype(int)  # (n,)
    by_activity = np.bincount(decile, real) / np.maximum(np.bincount(decile, predicted), 1e-12)
    found["activity_deciles"] = by_activity.tolist()
    return [
        at_most("calibration_error", found["calibration_error_over_base_rate"], limits,
                "calibration error over the base rate"),
        within("calibration_decile", _worst(deciles), limits,
               "bought / predicted in the worst decile of the prediction"),
        within("activity_decile", _worst(by_activity), limits,
               "bought / predicted in the worst decile of the users' activity"),
    ], found  # fmt: skip


def _worst(ratios: np.ndarray) -> float:
    return float(ratios[np.argmax(np.abs(np.log(np.maximum(ratios, 1e-9))))])


@dataclass(frozen=True)
class Walked:
    """Real and simulated visits of the same users over the same days."""

    real: pd.DataFrame
    simulated: pd.DataFrame
    real_lines: Lines
    simulated_lines: Lines
    days: float
    users: int


def walked(alone: Alone, logs: Logs, catalog: Catalog, *, seed: int = 0) -> Walked:
    """Let the users of `logs` (none of whom was fitted on) walk alone from the cut to its end."""
    day = float(np.ceil(catalog.as_of))
    until = float(np.floor(logs.events["time"].max().timestamp() / 86_400))
    if until <= day:
        raise ValueError(
            f"{logs.name}: no whole day after the cut to walk through: choose an earlier cut"
        )
    rng = np.random.default_rng(seed)
    users = table_at(logs, catalog.ids, day)
    users = users_with_past(users)
    past = lines_of(logs.before(moment(day)), catalog.ids, users.ids)
    memory = Memory.after(visits_of(past), len(users))
    simulated = walk(alone, users, memory, until=until, rng=rng)
    later = logs.since(moment(day)).before(moment(until))
    real = lines_of(later, catalog.ids, users.ids)
    if not len(real) or not len(simulated):
        raise ValueError(
            f"{logs.name}: {len(real)} real and {len(simulated)} simulated lines after the cut: "
            "nothing to compare, choose an earlier cut or a larger catalogue"
        )
    features = [visit_features(x, catalog, users, memory) for x in (real, simulated)]
    return Walked(features[0], features[1], real, simulated, until - day, len(users))


def users_with_past(users: UserTable) -> UserTable:
    """Those who took something of the catalogue before."""
    known = (users.past != EMPTY).any(dim=1)
    return UserTable(
        users.ids[known.numpy()], users.profile[known], users.past[known],
        users.past_count[known], users.past_age[known], users.start[known],
    )  # fmt: skip


def walk_checks(
    found: Walked, catalog: Catalog, limits: Mapping[str, float], *, seed: int = 0
) -> tuple[list[Check], dict[str, float]]:
    """How like the real visits the simulated ones are; what the judge looks at, beside."""
    rng = np.random.default_rng(seed)
    real, simulated = found.real, found.simulated
    names = [name for name in CURVES if np.isfinite(real[name]).any()]
    figures = {name: (name, ks) for name in names} | {"repeat share": ("repeats", difference)}
    told = over_users(figures, real, simulated, rng)
    checks = [
        at_most(
            f"ks_{name}", told[name], limits, f"largest distance of the curves of {WORDS[name]}"
        )
        for name in names
    ]
    ratio = len(simulated) / max(len(real), 1)
    checks.append(within("visits_per_user", ratio, limits, "simulated visits over real ones"))
    share = told["repeat share"]
    checks.append(at_most("repeat_share", share, limits, "share bought before, simulated - real"))
    category = catalog.category.cpu().numpy()
    kinds = (category, int(category.max()) + 1), (np.arange(len(catalog)), len(catalog))
    for name, (kind, n) in zip(("js_category", "js_items"), kinds, strict=True):
        said = "divergence of the mix of categories" if n < len(catalog) else "and of items"
        checks.append(at_most(name, divergence(found, kind, n, rng), limits, f"{said}, in bits"))
    apart, looks = told_apart(real, simulated, rng)
    said = f"AUC of a judge that tells them apart; it looks at {', '.join(list(looks)[:3])}"
    return [*checks, at_most("two_sample_auc", apart, limits, said)], looks


WORDS = {
    "size": "basket size", "spend": "basket value", "gap": "days between visits",
    "hour": "hours", "weekday": "weekdays", "repeat_age": "days since a repeated purchase",
    "price": "mean price", "entropy": "categories in a basket",
    "within": "likeness within a basket",
}  # fmt: skip


def divergence(found: Walked, kind: np.ndarray, n: int, rng: np.random.Generator) -> Distance:
    """Jensen-Shannon divergence of what was bought, by `kind` (N,) of item; interval over users."""
    boards = []
    for lines in (found.real_lines, found.simulated_lines):
        ones = np.ones(len(lines))
        shape = (found.users, n)
        boards.append(csr_matrix((ones, (lines.user, kind[lines.item])), shape=shape))
    drawn = []
    for _ in range(DRAWS):
        times = rng.multinomial(found.users, np.full(found.users, 1 / found.users))
        drawn.append(jensen_shannon(*(board.T @ times for board in boards)))
    value = jensen_shannon(*(np.asarray(board.sum(axis=0)).ravel() for board in boards))
    return spread(value, drawn)


def lines(checks: list[Check]) -> list[str]:
    """The gate as aligned text, PASS or FAIL first."""
    name = max(len(c.check) for c in checks)
    said = []
    for c in checks:
        spread = "" if c.low is None else f"{c.low:.4f} to {c.high:.4f}"
        said.append(
            f"{'PASS' if c.passed else 'FAIL'}  {c.check:<{name}}  {c.value:>8.4f}  {spread:<18}  "
            f"limit {c.threshold:<6g}  {c.said}"
        )
    failed = sum(not c.passed for c in checks)
    said.append(f"{len(checks) - failed} of {len(checks)} checks passed")
    return said
