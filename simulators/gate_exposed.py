"""The gate for users fitted to impressions: every answer as frequent as logged, for whom it counts.

On impressions of other users, after the cut: what the simulator expected of what was really shown.
Sessions are played on what was really shown too, so that their length can be compared.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from encoders.state import EMPTY
from simulators.draws import Draws
from simulators.exposed import ExposureSimulator, visitors
from simulators.exposure_calibration import (
    BINS,
    Promised,
    activity,
    calibration_error,
    promised,
)
from simulators.exposure_features import PULL, profiles
from simulators.fit import moment
from simulators.gate import by_chance
from simulators.impressions import impressions_from_logs, user_table
from simulators.realism import Distance, auc, ks, over_users
from simulators.segments import clumping, parts, reliability, worst_decile
from simulators.verdicts import Check, above, at_most, within
from sources.logs import Logs

EXPOSED: dict[str, float] = {  # of each behaviour: ece_click, ece_like, ...
    "ece": 0.10,  # calibration error over the rate, by decile of the prediction
    "prediction_decile": 1.18,  # logged over predicted, or the inverse, in the worst decile
    "activity_decile": 1.15,  # the same by how much users were shown before
    "auc_over_item_rate": 0.0,  # gain per user over how often items are answered
    "value": 1.15,  # minutes or money of an answer: logged over predicted, or the inverse
    "ks_length": 0.05,
    "ranking_agreement": 0.90,  # of policy pairs told apart, between users of disjoint halves
}
DRAWS = 60  # of answers with the chances promised
CHUNK = 512  # users priced at once
LONGEST = 200  # impressions of a session that is played


def kind_of(check: str) -> str:
    """Which of EXPOSED a check is of; "" for none."""
    return next((kind for kind in EXPOSED if check == kind or check.startswith(f"{kind}_")), "")


def limits_for(limits: Mapping[str, float | None], kind: str, behaviour: str) -> dict[str, float]:
    """What the check of this behaviour must keep: its own number, or that of all behaviours."""
    name = f"{kind}_{behaviour}"
    value = limits.get(name, limits[kind])
    return {name: float("nan") if value is None else value}


@torch.no_grad()
def exposed_checks(
    simulator: ExposureSimulator, halves: tuple[Logs, Logs], limits: Mapping[str, float | None], *,
    seed: int = 0,
) -> tuple[list[Check], dict[str, Any], list[str]]:  # fmt: skip
    """All checks; what the page draws; why lines are missing. The second half was not fitted on."""
    ours, others = halves
    found = promised(simulator, others)
    rng = np.random.default_rng(seed)
    read, rows, user = found.read, found.rows, found.user
    decile = activity(user, read.user[read.time < simulator.catalog.as_of], rng)
    asked = {
        name: (found.answers[:, k], found.chance[:, k], np.arange(len(rows)))
        for k, name in enumerate(read.behaviours)
    }
    ended = np.flatnonzero(read.ended[rows])
    asked["leave"] = read.last[rows][ended], found.leave[ended], ended
    checks: list[Check] = []
    notes: list[str] = []
    curves = {}
    for name, (real, chance, at) in asked.items():
        if not real.any():
            notes.append(f"{name}: never after the cut, so its rate is not compared")
            continue
        checks += behaviour_checks(name, real, chance, user[at], decile[at], limits, rng)
        curves[name] = reliability(chance, real)
    checks += order_checks(simulator, others, found, item_rates(simulator, ours), limits)
    value = read.value[rows]
    answered, drawn = found.worth(simulator, seed)
    if len(answered) and np.ptp(value[answered]) > 0:
        said = f"mean value of an answer, logged / predicted; {value[answered].mean():.3f} logged"
        one = parts(value[answered], drawn, user[answered], np.zeros(len(answered), int), 1)
        ratio = one.worst(np.zeros(1, int))[1]
        checks.append(within("value", ratio, _plain(limits, "value"), said))
    else:
        notes.append("value: all answers of the log are worth the same")
    lengths = session_lengths(simulator, others, seed=seed)
    checks.append(length_check(*lengths, limits, rng))
    kept = [c for c in checks if not np.isnan(c.threshold)]
    about = {"impressions": len(rows), "users": len(np.unique(user))}
    more = {"curves": curves, "lengths": lengths, "about": about}
    return kept, more, notes


def behaviour_checks(
    name: str, real: np.ndarray, chance: np.ndarray, user: np.ndarray, decile: np.ndarray,
    limits: Mapping[str, float | None], rng: np.random.Generator,
) -> list[Check]:  # fmt: skip
    """Rates of one behaviour over m impressions: in all, by decile of prediction and of users."""
    rate = float(real.mean())
    bins = np.array_split(np.argsort(chance, kind="stable"), BINS)
    drawn = [calibration_error(rng.random(len(chance)) < chance, chance, bins) / rate
             for _ in range(DRAWS)]  # fmt: skip
    place = np.empty(len(chance), np.int64)
    for nth, some in enumerate(bins):
        place[some] = nth
    by_bin = parts(real.astype(float), chance, user, place, BINS)
    rows = np.bincount(place, minlength=BINS)
    by_luck = float(np.percentile(drawn, 95)) * clumping(by_bin, rows)
    error = calibration_error(real, chance, bins) / rate
    said = (
        f"{name}: ECE {error * rate:.5f} over the rate {rate:.5f} ({chance.mean():.5f} predicted); "
        f"{by_luck:.3f} by chance"
    )
    kind = "ece"
    checks = [at_most(f"{kind}_{name}", error, limits_for(limits, kind, name), said,
                      chance=by_luck)]  # fmt: skip
    for kind, part, of in (("prediction_decile", place, "of the prediction"),
                           ("activity_decile", decile, "of the users' activity")):  # fmt: skip
        found = parts(real.astype(float), chance, user, part, BINS)
        limit = limits_for(limits, kind, name)
        checks.append(worst_decile(f"{kind}_{name}", found, limit, f"{name}: logged / predicted in",
                                   of))  # fmt: skip
    return checks


def item_rates(simulator: ExposureSimulator, logs: Logs) -> np.ndarray:
    """How often each item (N,) is answered with each behaviour (F,) before the cut, few pulled."""
    catalog = simulator.catalog
    before = logs.before(moment(catalog.as_of))
    read = impressions_from_logs(before, catalog.ids, **simulator.reading)
    inside = read.item != EMPTY
    shown = np.bincount(read.item[inside], minlength=len(catalog))
    yes = [np.bincount(read.item[inside], a, minlength=len(catalog))
           for a in read.answers[inside].T]  # fmt: skip
    mean = read.answers[inside].mean(axis=0)
    return np.asarray((np.stack(yes, axis=1) + PULL * mean) / (shown + PULL)[:, None])


def order_checks(
    simulator: ExposureSimulator, logs: Logs, found: Promised, rates: np.ndarray,
    limits: Mapping[str, float | None],
) -> list[Check]:  # fmt: skip
    """For each user who answered some and not others of what was shown: which the model foretold.

    As known when its first session after the cut began: what is learnt on the way tells the user's
    later rows from its earlier ones, not its items from each other. The gain in AUC over the rates
    (N, F) of items, a mean over users; of the first behaviour, as few have enough of the others.
    """
    name, kind, read = found.read.behaviours[0], "auc_over_item_rate", found.read
    began = np.flatnonzero((read.nth == 0) & (read.time >= simulator.catalog.as_of))
    began = began[np.unique(read.user[began], return_index=True)[1]]  # (u,) rows come by time
    profile = profiles(simulator.encoding, read, began, logs.users)
    served = served_by(simulator, user_table(read, began, profile, len(simulator.catalog)))
    place = np.full(len(read.users), -1)
    place[read.user[began]] = np.arange(len(began))
    some = found.rows[found.rows >= began[place[found.user]]]
    some = some[place[read.user[some]] >= 0]
    at, item = place[read.user[some]], read.item[some]
    table = pd.DataFrame({"user": at, "real": read.answers[some, 0].astype(int),
                          "model": foretold(served, at, item), "rate": rates[item, 0]})  # fmt: skip
    both = table.groupby("user")["real"].transform("mean")
    table = table[(both > 0) & (both < 1)]
    scored = np.array(
        [
            [auc(part[column].to_numpy(), part["real"].to_numpy()) for column in ("model", "rate")]
            for _, part in table.groupby("user")
        ]
    ).reshape(-1, 2)  # (u, 2)
    gain = scored[:, 0] - scored[:, 1]
    if not len(gain):
        return []
    error = 1.96 * float(gain.std()) / len(gain) ** 0.5
    model, rate = scored.mean(axis=0)
    said = (
        f"AUC of {name} per user: {model:.3f}, by the rates of items {rate:.3f}, {len(gain)} users"
    )
    mean = Distance(float(gain.mean()), float(gain.mean()) - error, float(gain.mean()) + error)
    limit = limits_for(limits, kind, name)
    return [above(f"{kind}_{name}", mean, limit, said, users=len(gain))]


def foretold(served: ExposureSimulator, user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Chance (m,) that users (m,) of its table answer items (m,) as their sessions begin."""
    chance = np.empty(len(user))
    device = served.taste.device
    for rows in np.array_split(np.arange(len(served.users)), -(-len(served.users) // CHUNK)):
        at = torch.from_numpy(rows).to(device)
        none = torch.zeros_like(at)
        found = served.relevance(served.start(at, Draws.root(0).at(at, none, none)))
        some = np.flatnonzero((user >= rows[0]) & (user <= rows[-1]))
        chance[some] = found.cpu().numpy()[user[some] - rows[0], item[some]]
    return chance


@torch.no_grad()
def session_lengths(
    simulator: ExposureSimulator, logs: Logs, *, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Impressions of one session after the cut of each user: logged, and played by the simulator.

    Played on what the log showed the user from then on, then on what it showed others.
    """
    catalog = simulator.catalog
    users = visitors(simulator, logs, since=catalog.as_of, seed=seed)
    read = impressions_from_logs(logs, catalog.ids, **simulator.reading)
    size = np.bincount(read.session)
    whole = np.bincount(read.session, read.ended) == size  # not cut off by the end of the log
    started = pd.MultiIndex.from_arrays([read.users[read.user], read.time])
    begin = np.flatnonzero(read.nth == 0)
    of = pd.Series(begin, index=started[begin]).reindex(
        pd.MultiIndex.from_arrays([users.ids, users.start.cpu().numpy()])
    )  # rows at which the users of the table begin
    row = of.to_numpy()
    keep = np.flatnonzero(whole[read.session[row]])
    row = row[keep]
    length = np.minimum(size[read.session[row]], LONGEST)
    slates = shown_from(read.user, read.item, row, np.random.default_rng(seed))
    served = served_by(simulator, users.to(simulator.catalog.vectors.device))
    played = np.full(len(row), LONGEST)
    at = torch.from_numpy(keep)
    root, state = Draws.root(seed), None
    playing = np.arange(len(row))
    for step in range(LONGEST):
        moment_of = root.at(at, torch.zeros_like(at), torch.full_like(at, step))
        state = served.start(at, moment_of) if state is None else state
        shown = torch.from_numpy(slates[playing, step])[:, None]
        response, state = served.respond(state, shown.to(served.taste.device), moment_of)
        left = response.left.cpu().numpy()
        played[playing[left]] = step + 1
        stay = torch.from_numpy(np.flatnonzero(~left))
        playing, at = playing[~left], at[stay]
        state = {name: value[stay.to(value.device)] for name, value in state.items()}
        if not len(playing):
            break
    who = pd.factorize(users.ids[keep])[0]
    return (pd.DataFrame({"user": who, "length": length}),
            pd.DataFrame({"user": who, "length": played}))  # fmt: skip


def served_by(simulator: ExposureSimulator, users: Any) -> ExposureSimulator:
    """The same simulator with other users."""
    return ExposureSimulator(
        simulator.catalog, simulator.encoding, simulator.funnel, simulator.items, users,
        simulator.reading, device=str(simulator.catalog.vectors.device),
    )  # fmt: skip


def shown_from(
    user: np.ndarray, item: np.ndarray, row: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Items (m, LONGEST) that the log showed from rows (m,) on, drawn from all once it ends."""
    known = item[item != EMPTY]
    slates = known[rng.integers(len(known), size=(len(row), LONGEST))]
    for place, begin in enumerate(row):
        after = slice(begin, begin + LONGEST)
        own = item[after][(user[after] == user[begin]) & (item[after] != EMPTY)]
        slates[place, : len(own)] = own
    return np.asarray(slates)


def length_check(
    real: pd.DataFrame, simulated: pd.DataFrame, limits: Mapping[str, float | None],
    rng: np.random.Generator,
) -> Check:  # fmt: skip
    """Distance of the curves of session length."""
    told = over_users({"length": ("length", ks)}, real, simulated, rng)["length"]
    chance = by_chance(real["length"].to_numpy(np.float64), rng)
    said = (
        f"largest distance of the curves of session length: mean {real['length'].mean():.1f} "
        f"logged, {simulated['length'].mean():.1f} simulated; {chance:.3f} by chance"
    )
    return at_most("ks_length", told, _plain(limits, "ks_length"), said, chance=chance)


def _plain(limits: Mapping[str, float | None], name: str) -> dict[str, float]:
    value = limits[name]
    return {name: float("nan") if value is None else value}
