"""Promised against real purchases in parts of the log: bins of the prediction, kinds of users."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm
from torch import Tensor

from simulators.fidelity import QUANTILES, HeldOut, calibration
from simulators.realism import Distance
from simulators.verdicts import Check, at_most, within
from sources.logs import Logs

BINS = 10
CURVE = 16  # bins of the reliability curve, by powers of the predicted chance
FEW = 10  # purchases promised to a kind of users, and users; one with fewer is not looked at
NONE = 3.69  # that may have been expected where none came, in 97.5 of 100 (Poisson)
UNKNOWN = "not known"


@dataclass(frozen=True)
class Parts:
    """Real over promised purchases of G parts of the log, and how sure each is."""

    real: np.ndarray  # (G,)
    promised: np.ndarray  # (G,)
    error: np.ndarray  # (G,) standard error of the log of the ratio, over users
    users: np.ndarray  # (G,)

    @property
    def ratio(self) -> np.ndarray:
        return np.asarray(self.real / np.maximum(self.promised, 1e-12))

    def worst(self, some: np.ndarray, *, looks: int = 1) -> tuple[int, Distance]:
        """Which of the parts `some` is furthest from 1, its ratio and 95 % interval.

        The interval is that of the worst of `looks` parts (Bonferroni).
        """
        off = np.abs(np.log(np.maximum(self.ratio[some], 1e-9)))
        g = int(some[np.argmax(off)])
        value, by = float(self.ratio[g]), float(norm.isf(0.025 / looks) * self.error[g])
        if not self.real[g]:  # nothing bought: what a count of none allows (Poisson)
            return g, Distance(0.0, 0.0, float(NONE / max(self.promised[g], 1e-12)))
        return g, Distance(value, value * float(np.exp(-by)), value * float(np.exp(by)))


def parts(real: np.ndarray, promised: np.ndarray, user: np.ndarray, part: np.ndarray, n: int,
          ) -> Parts:  # fmt: skip
    """Sums over rows (m,) by `part` (m,) of n; the error is over users (m,), who are independent.

    A ratio's, linearised (Cochran, 1977).
    """
    sums = [np.bincount(part, x, minlength=n) for x in (real, promised)]
    ratio = sums[0] / np.maximum(sums[1], 1e-12)
    size = int(user.max(initial=-1)) + 1
    left = np.bincount(user * n + part, real - ratio[part] * promised, minlength=size * n)
    spread = np.sqrt(np.square(left.reshape(size, n)).sum(axis=0))
    users = np.bincount(np.unique(user * n + part) % n, minlength=n)
    spread *= np.sqrt(users / np.maximum(users - 1, 1))  # the ratio is from the same users
    error = np.where((sums[0] > 0) & (users > 1), spread / np.maximum(sums[0], 1e-12), np.inf)
    return Parts(sums[0], sums[1], error, users)


def calibration_checks(
    held: HeldOut, log_rate: Tensor, limits: Mapping[str, float]
) -> tuple[list[Check], dict[str, Any]]:
    """Predicted against real purchases: over all, by decile of the prediction, by activity."""
    found = calibration(held.theta, held.bought, log_rate)
    user = pd.factorize(held.trips.user)[0]
    chance = held.theta.sigmoid().double().numpy()  # (n, N)
    real = held.bought.numpy()
    by_chance, error = by_prediction(chance, real, user)
    before = np.exp(held.trips.profile[:, 1] + held.trips.profile[:, 2])  # trips so far
    rank = pd.Series(before).rank(method="first").to_numpy()
    decile = ((rank - 1) * BINS // len(rank)).astype(int)  # (n,)
    by_activity = parts(real.sum(axis=1), chance.sum(axis=1), user, decile, BINS)
    found["activity_deciles"] = by_activity.ratio.tolist()
    found["ece"] = found["calibration_error_over_base_rate"] * found["base_rate"]
    found["reliability"] = reliability(chance, real)
    said = (
        f"ECE {found['ece']:.5f} over the base rate {found['base_rate']:.5f}; {error:.3f} by chance"
    )
    return [
        at_most("calibration_error", found["calibration_error_over_base_rate"], limits, said,
                chance=error),
        worst_decile("calibration_decile", by_chance, limits, "bought / predicted in",
                     "of the prediction"),
        worst_decile("activity_decile", by_activity, limits, "bought / predicted in",
                     "of the users' activity"),
    ], found  # fmt: skip


def worst_decile(name: str, found: Parts, limits: Mapping[str, float], what: str, of: str) -> Check:
    """The decile furthest from what was promised."""
    g, ratio = found.worst(np.arange(len(found.real)), looks=len(found.real))
    return within(name, ratio, limits, f"{what} the worst decile {of} ({g + 1})")


def by_prediction(chance: np.ndarray, real: np.ndarray, user: np.ndarray) -> tuple[Parts, float]:
    """Parts by decile of the chances (n, N) of all rows and items, of users (n,).

    And the calibration error over the base rate that true chances would have, by percentile.
    """
    flat, bought = chance.ravel(), real.ravel().astype(float)
    order = np.argsort(flat, kind="stable")
    percentile = np.empty(len(flat), np.int64)
    percentile[order] = np.arange(len(flat)) * QUANTILES // len(flat)
    whose = np.repeat(user, chance.shape[1])
    fine = parts(bought, flat, whose, percentile, QUANTILES)
    found = parts(bought, flat, whose, percentile * BINS // QUANTILES, BINS)
    # a count's mean distance from its expectation (Poisson, many), and more so as users clump
    by_chance = np.sqrt(2 / np.pi * fine.promised).sum() / max(bought.sum(), 1.0)
    return found, float(by_chance * clumping(fine, np.bincount(percentile)))


def clumping(found: Parts, rows: np.ndarray) -> float:
    """How many times further counts in parts of `rows` (G,) stray than independent ones would.

    What one user does goes together. At least once.
    """
    some = np.isfinite(found.error)  # of others, none or one user's, it cannot be seen
    spread = found.error[some] * found.real[some]
    share = found.real[some] / rows[some]
    alone = np.sqrt(found.real[some] * (1 - share))
    return max(1.0, float(spread.sum() / max(alone.sum(), 1e-12)))


def reliability(chance: np.ndarray, real: np.ndarray) -> list[dict[str, float]]:
    """Mean chance and share bought in bins of the chance, with the 95 % interval of the share."""
    p, y = chance.ravel(), real.ravel().astype(float)
    edges = np.geomspace(max(p.min(), 1e-7), max(p.max(), 1e-6) * (1 + 1e-9), CURVE + 1)
    place = np.clip(np.searchsorted(edges, p, side="right") - 1, 0, CURVE - 1)
    rows, promised, bought = (np.bincount(place, w, minlength=CURVE) for w in (None, p, y))
    curve = []
    for n, expected, seen in zip(rows, promised, bought, strict=True):
        if not n:
            continue
        error = 1.96 * max(seen, 1.0) ** 0.5
        curve.append({"predicted": expected / n, "bought": seen / n, "pairs": float(n),
                      "low": max(seen - error, 0.0) / n, "high": (seen + error) / n})  # fmt: skip
    return curve


def segment_checks(
    held: HeldOut, logs: Logs, limits: Mapping[str, float]
) -> tuple[list[Check], list[dict[str, Any]], list[str]]:
    """The worst kind of users by what the log says of them; all kinds; why there is no line."""
    columns = segments(logs, held.trips.user)
    user = pd.factorize(held.trips.user)[0]
    real = held.bought.sum(dim=1).double().numpy()  # (n,)
    promised = held.theta.sigmoid().sum(dim=1).double().numpy()
    codes: list[np.ndarray] = []
    names: list[str] = []
    for name, values in columns.items():
        code, levels = pd.factorize(values, sort=True)
        codes.append(code + len(names))
        names += [f"{name}: {level}" for level in levels]
    if len(names) < 2:
        return [], [], ["segment: the log has no kinds of users, so activity_decile speaks for it"]
    many = len(codes)
    found = parts(np.tile(real, many), np.tile(promised, many), np.tile(user, many),
                  np.concatenate(codes), len(names))  # fmt: skip
    big = np.flatnonzero((found.promised >= FEW) & (found.users >= FEW))
    table = [
        {"segment": names[g], "users": int(found.users[g]), "bought": float(found.real[g]),
         "ratio": float(found.ratio[g]), "error": float(found.error[g])}
        for g in big
    ]  # fmt: skip
    if not len(big):
        return [], table, [f"segment: no kind of users has {FEW} of them with {FEW} purchases"]
    told = candidates(found, big, limits["segment"])
    g, ratio = found.worst(told, looks=len(told))
    said = (
        f"bought / predicted of the worst of {len(told)} kinds of users "
        f"({names[g]}, {found.users[g]} users)"
    )
    return [within("segment", ratio, limits, said)], table, []


def candidates(found: Parts, big: np.ndarray, limit: float) -> np.ndarray:
    """Those of the parts `big` that can be told: narrow intervals, or off beyond theirs; else all.

    One of few purchases is off by chance, and there are many.
    """
    if np.isnan(limit):  # a line that is not asked for
        return big
    off = np.abs(np.log(np.maximum(found.ratio[big], 1e-9)))
    by = norm.isf(0.025 / len(big)) * found.error[big]  # of the worst of them all (Bonferroni)
    none = (found.real[big] == 0) & (NONE * limit < found.promised[big])
    sure, clear = by <= np.log(limit), (off - by > np.log(limit)) | none
    return big[sure | clear] if (sure | clear).any() else big


def segments(logs: Logs, user: np.ndarray) -> dict[str, np.ndarray]:
    """The category columns of the users table that tell users (n,) apart, as words (n,)."""
    table = logs.users.set_index("user")
    found = {}
    for name in logs.roles.user_category:
        values = table[name].reindex(user).astype(object)
        words = values.where(values.notna(), UNKNOWN).astype(str).to_numpy()
        if len(np.unique(words)) > 1:
            found[name] = words
    return found
