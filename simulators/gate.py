"""Whether simulated users may be believed: figures against thresholds, one line each.

Each check has a value, a 95 % interval over users where it has one, and a threshold that the value
(or, where it is a gain over a rival, the lower end of its interval) must keep.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from encoders.state import EMPTY
from simulators.base import Catalog, UserTable
from simulators.fit import moment
from simulators.organic import Alone, table_at, walk
from simulators.prices import Elasticity, held_out_slope
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
from simulators.segments import calibration_checks
from simulators.verdicts import Check, above, at_least, at_most, lines, within
from simulators.visits import Lines, lines_of, visits_of
from sources.logs import Logs

__all__ = [
    "THRESHOLDS", "Check", "Walked", "above", "at_least", "at_most", "calibration_checks",
    "left_out", "lines", "price_checks", "walk_checks", "walked", "within",
]  # fmt: skip

SPLITS = 40  # of the real visits in two, to see what differs by chance
CURVES = ("size", "spend", "gap", "hour", "weekday", "repeat_age", "price", "entropy", "within")

THRESHOLDS: dict[str, float] = {
    "calibration_error": 0.10,  # of the base rate
    "calibration_decile": 1.18,  # observed over predicted, or the inverse, in the worst decile
    "activity_decile": 1.15,  # the same by how much users bought before
    "segment": 1.15,  # and by what the users table says of them
    "ks_size": 0.05, "ks_spend": 0.05, "ks_gap": 0.05, "ks_hour": 0.05, "ks_weekday": 0.05,
    "ks_repeat_age": 0.05, "ks_price": 0.05, "ks_entropy": 0.05, "ks_within": 0.05,
    "visits_per_user": 1.15,  # simulated over real, or the inverse
    "repeat_share": 0.03,  # difference of the shares of items bought before
    "js_category": 0.008, "js_items": 0.05,  # bits
    "two_sample_auc": 0.60,
    "hit10_new_over_ease": 0.0, "hit10_new_over_item_knn": 0.0, "hit10_new_over_popularity": 0.0,
    "hit10_over_own_counts": 0.0, "hit10_over_decayed_counts": 0.0,
    "basket_recall10_over_popularity": 0.0, "basket_recall10_over_item_knn": 0.0,
    "basket_ndcg10_over_popularity": 0.0, "basket_ndcg10_over_item_knn": 0.0,
    "basket_ndcg10_over_decayed_counts": 0.0,
    "price_slope": 1.25,  # of sales by price, real over fitted, or the inverse
    "ranking_agreement": 0.90,  # of policy pairs told apart, between users of disjoint households
}  # fmt: skip


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
    names = [name for name in CURVES if name not in left_out(found, catalog)]
    figures = {name: (name, ks) for name in names} | {"repeat share": ("repeats", difference)}
    told = over_users(figures, real, simulated, rng)
    checks = []
    for name in names:
        chance = by_chance(real[name].to_numpy(), rng)
        said = f"largest distance of the curves of {WORDS[name]}; {chance:.3f} by chance"
        checks.append(at_most(f"ks_{name}", told[name], limits, said, chance=chance))
    ratio = visits_ratio(found, rng)
    checks.append(within("visits_per_user", ratio, limits, "simulated visits over real ones"))
    share = told["repeat share"]
    checks.append(at_most("repeat_share", share, limits, "share bought before, simulated - real"))
    category = catalog.category.cpu().numpy()
    kinds = (category, int(category.max()) + 1), (np.arange(len(catalog)), len(catalog))
    words = "divergence of the mix of categories", "and of items"
    for name, (kind, n), said in zip(("js_category", "js_items"), kinds, words, strict=True):
        if name in left_out(found, catalog):
            continue
        chance = halves_diverge(found.real_lines, kind, n, rng)
        said = f"{said}, in bits; {chance:.4f} by chance"
        mix = divergence(found, kind, n, rng)
        checks.append(at_most(name, mix, limits, said, chance=chance))
    apart, looks = told_apart(real, simulated, rng)
    said = f"AUC of a judge that tells them apart; it looks at {', '.join(list(looks)[:3])}"
    users = len(np.union1d(real["user"], simulated["user"]))
    return [*checks, at_most("two_sample_auc", apart, limits, said, users=users)], looks


def price_checks(
    elasticity: Elasticity | None, logs: Logs, catalog: Catalog, limits: Mapping[str, float]
) -> list[Check]:
    """Whether sales to the users of `logs` after the cut answer to prices as was fitted."""
    later = logs.since(moment(catalog.as_of))
    held = lines_of(later, catalog.ids, np.unique(later.events["user"]))
    slope = held_out_slope(elasticity, held) if elasticity else None
    if slope is None:
        return []
    words = "slope of what weeks with other prices sell on what the fit says"
    return [within("price_slope", slope, limits, words)]


def left_out(found: Walked, catalog: Catalog) -> dict[str, str]:
    """What the log cannot be asked about, and why."""
    why = {}
    if len(catalog.category.unique()) < 2:
        why["js_category"] = "js_category: all items of the catalogue are of one category"
    for name in CURVES:
        pair = [table[name].to_numpy(np.float64) for table in (found.real, found.simulated)]
        known = [x[np.isfinite(x)] for x in pair]
        if not len(known[0]):
            why[name] = f"ks_{name}: no visit of the log after the cut has {WORDS[name]}"
        elif len(known[1]) and np.ptp(np.concatenate(known)) < 1e-9:
            why[name] = f"ks_{name}: {WORDS[name]} are the same in all visits, real and simulated"
    return why


def by_chance(real: np.ndarray, rng: np.random.Generator) -> float:
    """Largest distance that two samples as large as the real one have in 95 of 100 draws."""
    real = real[np.isfinite(real)]
    drawn = []
    for _ in range(SPLITS):
        half = rng.permutation(len(real)) < len(real) // 2
        drawn.append(ks(real[half], real[~half]))
    # samples twice as large as the halves differ by a root of two less
    return float(np.nanpercentile(drawn, 95) / 2**0.5) if len(real) > 1 else 1.0


def halves_diverge(real: Lines, kind: np.ndarray, n: int, rng: np.random.Generator) -> float:
    """Jensen-Shannon divergence of two samples of visits as large as the real one, 95 of 100."""
    visits = int(real.visit.max()) + 1
    drawn = []
    for _ in range(SPLITS):
        half = (rng.random(visits) < 0.5)[real.visit]  # (m,) visits stay whole
        counts = [np.bincount(kind[real.item[x]], minlength=n) for x in (half, ~half)]
        drawn.append(jensen_shannon(*counts))
    return float(np.percentile(drawn, 95) / 2)  # it falls as samples grow


def visits_ratio(found: Walked, rng: np.random.Generator) -> Distance:
    """Simulated over real visits, interval over users."""
    counts = [np.bincount(t["user"], minlength=found.users) for t in (found.real, found.simulated)]
    drawn = []
    for _ in range(DRAWS):
        times = rng.multinomial(found.users, np.full(found.users, 1 / found.users))
        drawn.append(float(times @ counts[1]) / max(float(times @ counts[0]), 1.0))
    return spread(len(found.simulated) / max(len(found.real), 1), drawn)


WORDS = {
    "size": "basket size", "spend": "basket value", "gap": "days between visits",
    "hour": "hours", "weekday": "weekdays", "repeat_age": "days since a repeated purchase",
    "price": "mean price", "entropy": "categories in a basket",
    "within": "likeness within a basket",
}  # fmt: skip


def divergence(found: Walked, kind: np.ndarray, n: int, rng: np.random.Generator) -> Distance:
    """Jensen-Shannon divergence of what was bought, by `kind` (N,) of item; interval over users."""
    boards = []
    for bought in (found.real_lines, found.simulated_lines):
        ones = np.ones(len(bought))
        shape = (found.users, n)
        boards.append(csr_matrix((ones, (bought.user, kind[bought.item])), shape=shape))
    drawn = []
    for _ in range(DRAWS):
        times = rng.multinomial(found.users, np.full(found.users, 1 / found.users))
        drawn.append(jensen_shannon(*(board.T @ times for board in boards)))
    value = jensen_shannon(*(np.asarray(board.sum(axis=0)).ravel() for board in boards))
    return spread(value, drawn)
