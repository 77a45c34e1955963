"""Fit the parts of a `FittedSimulator` to a log: all that is learnt, as plain tensors."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from encoders.items import interactions
from simulators.base import Catalog, SimSpec, UserTable
from simulators.catalog import finest_categories
from simulators.habits import Habits, learn_habits
from simulators.preference import ItemFacts, Preference, item_to_item
from simulators.prices import fit_elasticity
from simulators.trips import Trips, trips_from_logs
from simulators.visits import Lines, lines_of
from sources.cache import cached
from sources.logs import Logs

LATE, EASED = 28.0, 5.0  # days of the trend, and purchases that it is drawn to the usual with
SEASONS = 0.2  # weight of the whole past in an item's usual rate
STARTS = 6  # starting points of a household among its trips before the cut


def moment(day: float) -> pd.Timestamp:
    """Days since 1970-01-01 as a timestamp."""
    return pd.Timestamp(round(day * 86_400e6), unit="us")


def item_facts(
    logs: Logs, catalog: Catalog, log_rate: Tensor, weight: pd.Series | None,
    trend: tuple[Tensor, Tensor],
) -> ItemFacts:  # fmt: skip
    """What the model may know of the catalogue's items from `logs`, households weighted."""
    counts, users = interactions(logs, catalog.ids)
    if weight is not None:
        times = weight.reindex(users).fillna(0).to_numpy().astype(np.int64)
        counts = counts[np.repeat(np.arange(len(users)), times)]
    source, target = item_to_item(counts)
    items = logs.items.set_index("item").loc[catalog.ids]
    columns = finest_categories(logs, catalog.ids)
    codes = [pd.factorize(items[c].astype(object).fillna(""), sort=True)[0] for c in columns]
    groups = np.stack(codes or [np.zeros(len(catalog), np.int64)], axis=1)  # (N, G)
    return ItemFacts(
        log_rate=log_rate,
        gap=usual_gap(logs, catalog.ids),
        groups=torch.from_numpy(groups.astype(np.int64)),
        source=source,
        target=target,
        trend=trend[0],
        span=trend[1],
    )


def usual_rate(lines: Lines, trips: Trips, weight: pd.Series, n: int) -> Tensor:
    """Log share (N,) of the trips that buy an item: of a window, with some of the whole past.

    So that what was out of season all through the window is not thought gone. `lines` are those of
    the users that `weight` (users,) is of, in its order.
    """
    heavy = weight.loc[trips.user].to_numpy(np.float64)  # (n,)
    sold = np.bincount(trips.bought, np.repeat(heavy, np.diff(trips.pointer)), minlength=n)
    ever = np.bincount(lines.item, weight.to_numpy(np.float64)[lines.user], minlength=n)
    mixed = (1 - SEASONS) * sold + SEASONS * ever * sold.sum() / max(ever.sum(), 1.0)
    return torch.from_numpy(np.log((mixed + 0.5) / heavy.sum())).float()


def trends(
    lines: Lines, log_rate: Tensor, since: float, until: float, weight: pd.Series
) -> tuple[Tensor, Tensor]:
    """How much more than usual each item was bought in the LATE days before each week, (W, N) logs.

    Usual is its share `log_rate` (N,) of all purchases. Rows are a week apart from day `since` on,
    the last is `until`: nothing later is known. Also the first and last moment (2,).
    """
    moments = np.append(np.arange(since, until, 7.0), until)  # (W,)
    order = np.argsort(lines.time, kind="stable")
    time, item = lines.time[order], lines.item[order]
    heavy = weight.to_numpy(np.float64)[lines.user[order]]
    share = log_rate.double().exp().numpy()
    share = share / share.sum()
    rows = []
    for now in moments:
        late = slice(*np.searchsorted(time, [now - LATE, now]))
        seen = np.bincount(item[late], heavy[late], minlength=len(share))
        rows.append(np.log((seen + EASED) / (seen.sum() * share + EASED)))
    table = torch.from_numpy(np.array(rows, dtype=np.float32))  # (W, N)
    return table, torch.tensor([since, until], dtype=torch.float64)


def usual_gap(logs: Logs, ids: np.ndarray) -> Tensor:
    """Log of the median days (N,) between a household's purchases; of all items where none."""
    events = logs.events[logs.events["behaviour"].isin(logs.purchases)]
    row = pd.Index(ids).get_indexer(events["item"])
    bought = pd.DataFrame({"row": row, "user": events["user"], "time": events["time"]})[row >= 0]
    bought = bought.drop_duplicates().sort_values(["user", "row", "time"], kind="stable")
    gap = bought.groupby(["user", "row"])["time"].diff().dt.total_seconds() / 86_400
    median = gap.groupby(bought["row"]).median().reindex(range(len(ids)))
    typical = median.median() if median.notna().any() else 30.0
    usual = median.fillna(typical).clip(1, 200).to_numpy(np.float32, copy=True)  # (N,)
    return torch.from_numpy(usual).log()


Learn = Callable[[Trips, np.ndarray, ItemFacts], Preference]  # from trips, weighted (n,)


def fit_once(
    spec: SimSpec, learn: Learn, about: str, *, window: float, what: str
) -> tuple[str, dict[str, Any]]:
    """The fit of `fit_model` that `about` names, and its key: made once, found again by content.

    Everything that goes into `learn` must be in `about`.
    """
    if spec.logs is None or spec.catalog is None:
        raise ValueError(
            "a fitted simulator needs logs and a catalogue, got none: env.data is null"
        )
    logs, catalog = spec.logs.before(moment(spec.catalog.as_of)), spec.catalog
    key = (
        f"{about} {logs.fingerprint()} {catalog.fingerprint()} {window} {spec.seed} "
        f"{spec.bootstrap}"
    )

    def make() -> dict[str, Any]:
        return fit_model(logs, catalog, window, learn, spec.seed, spec.bootstrap)

    return key, cached(key, make, torch.save, load_state, what=what)


def fit_model(
    logs: Logs, catalog: Catalog, window: float, learn: Learn, seed: int, bootstrap: bool
) -> dict[str, Any]:
    """Fit preference and habits to the trips of the window; all the tensors that make the users."""
    since = catalog.as_of - window
    trips = trips_from_logs(logs, catalog.ids, since=since)
    if len(trips) < 100 or len(trips.bought) < 100:
        raise ValueError(
            f"{logs.name}: {len(trips)} trips with {len(trips.bought)} purchases of the catalogue "
            f"in the {window:g} days before the cut are too few to fit users to (100 of each): "
            "give a longer log, a larger window or a larger catalogue"
        )
    past = logs.before(moment(since))
    if (lines := interactions(past, catalog.ids)[0].sum()) < 100:
        raise ValueError(
            f"{logs.name}: {lines:g} purchases of the catalogue before the window of {window:g} "
            "days are too few to learn from what goes with what (100): choose a smaller window"
        )
    households = np.unique(trips.user)
    rng = np.random.default_rng(seed)
    size = len(households)
    times = rng.multinomial(size, np.full(size, 1 / size)) if bootstrap else np.ones(size, np.int64)
    drawn = pd.Series(times, index=households)
    weight = drawn.loc[trips.user].to_numpy(np.float64)  # (n,)
    lines = lines_of(logs, catalog.ids, households)
    log_rate = usual_rate(lines, trips, drawn, len(catalog))
    draw = drawn if bootstrap else None
    trend = trends(lines, log_rate, since, catalog.as_of, drawn)
    preference = learn(trips, weight, item_facts(past, catalog, log_rate, draw, trend))
    # From here on the model serves users after the window: item-to-item weights of all the past.
    preference.renew(item_facts(logs, catalog, log_rate, draw, trend))
    habits = learn_habits(preference, catalog, trips, weight, seed)
    habits = replace(habits, elasticity=fit_elasticity(lines, drawn.to_numpy()))
    users = trips[starting_points(trips, rng)].users()
    table = vars(users) | {"ids": users.ids.tolist(), "ids_type": str(users.ids.dtype)}
    return store(preference, habits) | {"users": table}


def starting_points(trips: Trips, rng: np.random.Generator) -> np.ndarray:
    """Rows (m,) of up to STARTS trips of each household, drawn at random."""
    order = np.lexsort((rng.random(len(trips)), pd.factorize(trips.user)[0]))
    user = trips.user[order]
    first = np.concatenate([[True], user[1:] != user[:-1]])
    rank = np.arange(len(user)) - np.maximum.accumulate(np.where(first, np.arange(len(user)), 0))
    return np.sort(order[rank < STARTS])


def store(preference: Preference, habits: Habits) -> dict[str, Any]:
    """A fit as plain tensors and numbers."""
    layer = preference.of_user
    sizes = layer.in_features, layer.out_features, preference.bias.shape[1]
    return {"preference": preference.state_dict(), "sizes": sizes, "habits": habits.plain()}


def restore(state: dict[str, Any]) -> tuple[Preference, Habits]:
    """The model and habits that `store` wrote."""
    weights: Mapping[str, Tensor] = state["preference"]
    facts = ItemFacts(**{field.name: weights[field.name] for field in fields(ItemFacts)})
    features, hidden, members = state["sizes"]
    preference = Preference(facts, features - Preference.extra, hidden, members)
    preference.load_state_dict(weights)
    return preference.eval().requires_grad_(False), Habits.of(state["habits"])


def load_state(path: Path) -> dict[str, Any]:
    """A stored fit, on the CPU."""
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return state


def user_table(state: dict[str, Any]) -> UserTable:
    """The users of a stored fit."""
    state = dict(state)
    kind = state.pop("ids_type")
    return UserTable(**state | {"ids": np.array(state["ids"], dtype=kind)})
