"""The lift of being shown: how much more a product sells in a store-week in which it is displayed.

Compared within product x week, across the stores that carry the product: season, price, mailer and
fame of the week are then the same on both sides. Sales are baskets with the product per trip to
that store in that week, so that busy stores do not drive it. Rate ratios are Mantel-Haenszel's
(Rothman, 1986), their intervals robust to whatever goes on within a product.

A store carries a product in a week if it sold it in another week of the log: were its own week to
count, stores would be chosen by the very sales that are compared.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t

from sources.cache import cached
from sources.checks import require_columns
from sources.logs import Logs

FORMAT = 1  # of a cached lift; raised when what is measured changes
LEAST = 20  # lines of a product in the log to be measured by default
BLOCK = 4000  # products whose promotions are read at a time
FEW = 20  # products that can be compared, below which a department is not listed by name
ROUNDS = 20  # in which effects of weeks and stores settle: 5 and 400 agree to seven digits
SECANTS = 12  # at most; four do
NONE = ("0", 0, None, math.nan)  # codes that say: no display, no mailer
WITHIN = "product x week"

Folder = Path | str | None
Row = dict[str, Any]  # one figure for each of COLUMNS
COLUMNS = ("ratio", "low", "high", "strata", "rows", "clusters", "sales")
Promotions = pd.DataFrame | Iterable[pd.DataFrame]  # item, place, week, display, mailer


@dataclass(frozen=True, eq=False)
class Lift:
    """Sales of a displayed product over those of the same product and week undisplayed.

    `log_shift` is what `exposure=` of FittedSimulator would be under the transfer assumption that a
    shelf display speaks for a personal slate: that both raise the odds of a purchase by one factor.
    No shop log can test that: a display is seen by passers-by, a slate by who it is shown to.
    """

    ratio: float
    low: float
    high: float
    strata: int  # product-weeks with a sale, displayed in some stores and not in others
    rows: int  # store-weeks of those
    by: pd.DataFrame  # kind, name, ratio, low, high, strata, rows, clusters, sales
    notes: tuple[str, ...] = ()

    @property
    def log_shift(self) -> float:
        """Log of the ratio: on a trip purchases are rare, so that rates and odds move alike."""
        return math.log(self.ratio)

    def save(self, file: Path) -> None:
        """Write all of it as one JSON file."""
        Path(file).write_text(json.dumps(asdict(self) | {"by": self.by.to_dict("records")}))

    @staticmethod
    def load(file: Path) -> "Lift":
        """Read what `save` wrote."""
        about = json.loads(Path(file).read_text())
        return Lift(**about | {"by": pd.DataFrame(about["by"]), "notes": tuple(about["notes"])})


class Shop(NamedTuple):
    """Trips, sales and promotions of I products in S stores over W weeks."""

    trips: np.ndarray  # (S, W), 0 where the promotions or the log do not cover the store-week
    sold: np.ndarray  # (3, n) item, store, week of where it sold
    sales: np.ndarray  # (n,) baskets with the product
    on: np.ndarray  # (n,) bool: displayed
    shown: np.ndarray  # (3, m) item, store, week of where it was displayed, sold or not
    mailed: np.ndarray  # (I, W) stores in whose mailer the product was
    discount: np.ndarray  # (I, W) median paid in the chain, NaN where it sold none


class Strata(NamedTuple):
    """Sales and trips, displayed or not, of strata of products; all (strata,)."""

    product: np.ndarray
    sales_on: np.ndarray
    sales_off: np.ndarray
    trips_on: np.ndarray
    trips_off: np.ndarray
    cells: np.ndarray


def fit_display_lift(
    logs: Logs | None = None, items: Iterable[int] | None = None, *, cache_dir: Folder = None
) -> Lift:
    """The lift in Complete Journey or a part of it, of `items` or all with 20 lines; made once."""
    from sources.complete_journey import load, promotions_of

    logs = load(cache_dir=cache_dir) if logs is None else logs
    count = logs.events["item"].value_counts()
    ids = np.unique(np.asarray(count.index[count >= LEAST] if items is None else list(items)))

    def make() -> Lift:
        blocks = np.array_split(ids, math.ceil(len(ids) / BLOCK) or 1)
        return display_lift(logs, (promotions_of(block) for block in blocks), ids)

    key = f"display-lift-{FORMAT}-{hashlib.sha256(ids.tobytes()).hexdigest()}-{logs.fingerprint()}"
    return cached(key, make, Lift.save, Lift.load, folder=cache_dir, what="the lift of displays")


def display_lift(logs: Logs, promotions: Promotions, items: Iterable[int]) -> Lift:
    """Measure the lift of `items` from sales and promotions; these may come in pieces.

    promotions: item, place, week and the codes display and mailer, "0" being none. A row missing
    for a product is no promotion; a store-week without any row is not covered and left out.
    """
    ids = pd.Index(np.unique(np.asarray(list(items))))
    shop, notes = _shop(logs, promotions, ids)
    strata = _within_week(shop, shop.trips.shape[1])
    main = pooled(strata)
    if main["strata"] == 0:
        raise ValueError(
            "no item was sold in a week in which some of the stores that carry it displayed it and "
            "others did not: there is nothing to compare; give more stores, weeks or items"
        )
    whole = (column.sum(keepdims=True) for column in strata[1:])  # products and weeks mixed
    tables = {
        ("display", "crude"): pooled(Strata(np.zeros(1, int), *whole)),
        ("display", "product x store"): pooled(_within_store(shop)),
        ("display", "product x discount decile"): pooled(_within_decile(strata, shop.discount)),
        ("display", WITHIN): main,
        ("display", "product x week, stores as clusters"): _by_store(shop, strata, main),
        ("display", "product x week, unmailed"): pooled(_some(strata, shop.mailed.ravel() == 0)),
        ("display", "product x week, sold within 8 weeks"): pooled(_within_week(shop, 8)),
        ("display", "product x week, product x store"): _two_way(shop, _informative(strata)),
        ("placebo", "displayed next week only"): pooled(_next_week(shop, strata)),
        ("joint", "mailer, week and price together"): pooled(_mailer(strata, shop.mailed)),
        **_departments(logs, ids, strata),
    }
    rows = [{"kind": kind, "name": name} | row for (kind, name), row in tables.items()]
    by = pd.DataFrame([row for row in rows if row["strata"] > 0])
    return Lift(**{name: main[name] for name in COLUMNS[:5]}, by=by, notes=tuple(notes))


def lines(lift: Lift) -> list[str]:
    """What was measured, for printing: all variants, departments and what was left out."""
    return [
        f"lift of being displayed: {lift.ratio:.3f} ({lift.low:.3f} to {lift.high:.3f}) within "
        f"{WITHIN}, a shift of {lift.log_shift:+.3f} in log odds if a display speaks for a slate",
        *lift.by.to_string(index=False, float_format="{:.2f}".format).splitlines(),
        *lift.notes,
    ]


def pooled(strata: Strata) -> Row:
    """Mantel-Haenszel rate ratio over strata that hold both sides, products being the clusters."""
    s = _informative(strata)
    n = s.trips_on + s.trips_off  # (strata,)
    on, off = s.sales_on * s.trips_off / n, s.sales_off * s.trips_on / n  # (strata,)
    if on.sum() == 0 or off.sum() == 0:
        return _row(math.nan, np.zeros(0), s) | {"strata": 0}
    gap = on / on.sum() - off / off.sum()  # (strata,) what each moves the log ratio by
    per_product = np.bincount(np.unique(s.product, return_inverse=True)[1], weights=gap)
    return _row(math.log(on.sum() / off.sum()), per_product, s)


def _row(log_ratio: float, gaps: np.ndarray, s: Strata) -> Row:
    """Ratio and interval from what each product moves the log ratio by, (products,)."""
    clusters, half = len(gaps), math.inf  # one product alone does not tell how products differ
    if clusters > 1:
        error = math.sqrt((gaps**2).sum() * clusters / (clusters - 1))
        half = error * float(t.ppf(0.975, clusters - 1))
    ratio, low, high = (float(np.exp(log_ratio + x)) for x in (0.0, -half, half))
    sales = int(s.sales_on.sum() + s.sales_off.sum())
    counts = (len(s.product), int(s.cells.sum()), clusters, sales)
    return dict(zip(COLUMNS, (ratio, low, high, *counts), strict=True))


def _informative(s: Strata) -> Strata:
    """Keep strata with trips on both sides and a sale on one: the others cannot speak."""
    return _some(s, (s.trips_on > 0) & (s.trips_off > 0) & (s.sales_on + s.sales_off > 0))


def _some(strata: Strata, keep: np.ndarray) -> Strata:
    return Strata(*(column[keep] for column in strata))


def _within_week(shop: Shop, window: int) -> Strata:
    """Strata of product x week over stores that sold it in another one of the `window`, (I W,)."""
    items, (stores, weeks) = len(shop.mailed), shop.trips.shape
    (item, store, when), (item_on, store_on, when_on) = shop.sold, shop.shown
    columns: list[tuple[np.ndarray, ...]] = []
    for week in range(weeks):
        near = (abs(when - week) <= window) & (when != week)  # (n,)
        carried = np.zeros((items, stores), dtype=bool)
        carried[item[near], store[near]] = True
        trips = shop.trips[:, week]  # (S,)
        now, seen = np.flatnonzero(when == week), np.flatnonzero(when_on == week)
        now = now[carried[item[now], store[now]]]
        seen = seen[carried[item_on[seen], store_on[seen]]]
        sales_on = np.bincount(item[now], shop.sales[now] * shop.on[now], items)  # (I,)
        sales_off = np.bincount(item[now], shop.sales[now] * ~shop.on[now], items)
        trips_on = np.bincount(item_on[seen], trips[store_on[seen]], items)
        cells = carried[:, trips > 0].sum(axis=1)
        columns.append((sales_on, sales_off, trips_on, carried @ trips - trips_on, cells))
    whole = (np.stack(column, axis=1).ravel() for column in zip(*columns, strict=True))
    return Strata(np.repeat(np.arange(items), weeks), *whole)


def _next_week(shop: Shop, now: Strata) -> Strata:
    """Strata of product x week, "on" where displayed the week after but not yet: no lift is due."""
    size = (len(shop.mailed), *shop.trips.shape)
    flat = np.ravel_multi_index(shop.shown, size)
    before = flat[(flat % size[2] > 0) & ~np.isin(flat - 1, flat)] - 1
    on = np.isin(np.ravel_multi_index(shop.sold, size), before)
    s = _within_week(shop._replace(shown=np.stack(np.unravel_index(before, size)), on=on), size[2])
    off = now.sales_off - s.sales_on, s.trips_on, now.trips_off - s.trips_on  # those displayed: out
    return Strata(s.product, s.sales_on, *off, s.cells)


def _by_store(shop: Shop, s: Strata, main: Row) -> Row:
    """The main figure with the interval that is due if sales go up and down by store."""
    item, store, week = shop.sold
    of, again = item * shop.trips.shape[1] + week, _board(shop, shop.sold, None)[item, store] > 1
    share = shop.sales * again / np.maximum(s.trips_on + s.trips_off, 1)[of]  # (n,)
    on, off = share * shop.on * s.trips_off[of], share * ~shop.on * s.trips_on[of]
    gap = np.bincount(store, on / on.sum() - off / off.sum())  # (S,)
    return _row(math.log(main["ratio"]), gap, _informative(s))


def _within_decile(strata: Strata, discount: np.ndarray) -> Strata:
    """Product-weeks put together to product x decile of the chain's discount, (I, W).

    With a store's own price, sales would stand in other strata than its weeks without a sale.
    """
    paid = pd.DataFrame(discount).ffill(axis=1).bfill(axis=1).to_numpy().ravel()  # (I W,)
    known = ~np.isnan(paid)
    s = _some(strata, known)
    if not known.any():
        return s
    edges = np.unique(np.quantile(paid[known], np.arange(1, 10) / 10))
    key = s.product * 10 + np.searchsorted(edges, paid[known], side="left")
    return Strata(np.arange(key.max() + 1) // 10, *(np.bincount(key, column) for column in s[1:]))


def _mailer(s: Strata, mailed: np.ndarray) -> Strata:
    """Strata of products, "on" being weeks in the mailer of most stores; displays left out."""
    most = 2 * mailed.ravel() > s.cells  # (I W,)
    columns = (s.sales_off * most, s.sales_off * ~most, s.trips_off * most, s.trips_off * ~most)
    totals = (np.bincount(s.product, column) for column in (*columns, s.cells))
    return Strata(np.arange(len(mailed)), *totals)


def _within_store(shop: Shop) -> Strata:
    """Strata of product x store over all weeks, (I S,) each: none of its sales picks a store."""
    _, store, week = shop.shown
    trips_on = _board(shop, shop.shown, shop.trips[store, week])  # (I, S)
    sales_on, sales = (_board(shop, shop.sold, x) for x in (shop.sales * shop.on, shop.sales))
    cells = np.broadcast_to((shop.trips > 0).sum(axis=1), sales.shape)
    columns = (sales_on, sales - sales_on, trips_on, shop.trips.sum(axis=1) - trips_on, cells)
    product = np.repeat(np.arange(len(sales)), len(shop.trips))
    return Strata(product, *(x.ravel() for x in columns))


def _board(shop: Shop, cells: np.ndarray, values: np.ndarray | None) -> np.ndarray:
    """Sum of `values` (or number) of cells (3, n) per product and store, (I, S)."""
    items, stores = len(shop.mailed), len(shop.trips)
    return np.bincount(cells[0] * stores + cells[1], values, items * stores).reshape(items, stores)


def _two_way(shop: Shop, strata: Strata) -> Row:
    """Ratio with an effect of each product x week and each product x store: conditional Poisson.

    What a store's customers like all year is removed too. Effects are fitted in turn to a given
    ratio; the ratio is where displayed sales are as many as expected.
    """
    (items, weeks), (item, store, week) = shop.mailed.shape, shop.shown
    trips, of_week = shop.trips[store, week], item * weeks + week  # (m,) each
    by_store = _board(shop, shop.sold, shop.sales)  # (I, S)
    item_week = shop.sold[0] * weeks + shop.sold[2]  # (n,)
    by_week = np.bincount(item_week, shop.sales, items * weeks).reshape(items, weeks)
    on = np.bincount(shop.sold[0], shop.sales * shop.on, items)  # (I,)
    liked = (by_store > 0).astype(float)  # (I, S)

    def gap(log_ratio: float) -> np.ndarray:  # (I,) displayed sales less those expected
        nonlocal liked
        more = trips * math.expm1(log_ratio)  # (m,)
        for _ in range(ROUNDS):
            extra = np.bincount(of_week, more * liked[item, store], items * weeks)
            due = liked @ shop.trips + extra.reshape(by_week.shape)  # (I, W)
            famed = by_week / np.maximum(due, 1e-300)
            due = famed @ shop.trips.T + _board(shop, shop.shown, more * famed[item, week])
            liked = by_store / np.maximum(due, 1e-300)  # (I, S)
        expected = trips * math.exp(log_ratio) * liked[item, store] * famed[item, week]
        return on - np.bincount(item, expected, items)

    log_ratio, step, gaps = 0.0, 0.2, gap(0.0)
    for _ in range(SECANTS):
        before, gaps = gaps, gap(log_ratio + step)
        slope = (gaps - before).sum() / step  # below 0: the more is expected, the smaller the gap
        if slope > -1e-4 * on.sum():
            return {"strata": 0}  # stores that always display and others that never do
        log_ratio, step = log_ratio + step, float(np.clip(-gaps.sum() / slope, -1.0, 1.0))
        if abs(step) < 1e-4:
            break
    return _row(log_ratio, (gaps / slope)[np.unique(strata.product)], strata)


def _departments(logs: Logs, ids: pd.Index, strata: Strata) -> dict[tuple[str, str], Row]:
    """The lift in each department that has products enough, and in the others together."""
    if not logs.roles.item_category:
        return {}
    names = logs.items.set_index("item")[logs.roles.item_category[0]].astype(object).reindex(ids)
    whole = _informative(strata)
    of = names.where(names.notna(), "none").to_numpy()[whole.product]  # (strata,)
    size = pd.Series(of).groupby(of).agg(lambda part: len(np.unique(whole.product[part.index])))
    parts = {str(name): of == name for name in size.index[size >= FEW]}
    parts["all others"] = np.isin(of, size.index[size < FEW])
    return {("department", name): pooled(_some(whole, part)) for name, part in parts.items()}


def _shop(logs: Logs, promotions: Promotions, ids: pd.Index) -> tuple[Shop, list[str]]:
    """Sales and promotions as arrays, and notes of what is left out."""
    why = "sales are compared across stores in a week"
    require_columns(logs.events, ("place", "week", "basket"), "events", why)
    events = logs.events[logs.events["behaviour"].isin(logs.purchases)]
    places, weeks = (pd.Index(np.sort(events[c].unique())) for c in ("place", "week"))
    axes = {"item": ids, "place": places, "week": weeks}
    mine = events[events["item"].isin(ids)].drop_duplicates([*axes, "basket"])
    if mine.empty:
        raise ValueError(f"none of the {len(ids)} items was ever sold: give items of the log")
    size = (len(ids), len(places), len(weeks))
    index = [axis.get_indexer(pd.Index(mine[c])) for c, axis in axes.items()]
    key = np.ravel_multi_index(index, size)  # (lines,)
    carried = np.isin(np.arange(size[0] * size[1]), key // size[2]).reshape(size[:2])
    shown, covered, mailed = _promoted(promotions, axes, carried)

    keep = covered.any(axis=1)  # (S,) the other stores say nothing of what was displayed
    visits = events[["place", "week", "basket"]].drop_duplicates()
    where = places.get_indexer(visits["place"]) * size[2] + weeks.get_indexer(visits["week"])
    trips = np.bincount(where, minlength=covered.size).reshape(size[1:]).astype(float)  # (S, W)
    notes = [f"{1 - trips[covered].sum() / trips.sum():.1%} of trips in store-weeks not covered"]
    trips[~covered] = 0.0
    open_, number = trips.ravel() > 0, keep.cumsum() - 1  # (S W,), (S,)

    def cells(flat: np.ndarray) -> np.ndarray:
        item, store, week = np.unravel_index(flat, size)
        return np.stack([item, number[store], week])

    sold, sales = np.unique(key[open_[key % open_.size]], return_counts=True)
    shown = shown[open_[shown % open_.size]]
    paid = mine if "discount" in mine else mine.assign(discount=np.nan)
    paid = paid.groupby(["item", "week"])["discount"].median().unstack().reindex(ids, columns=weeks)
    bare = 1 - len(sold) / (carried[:, keep].sum(axis=0) @ (trips[keep] > 0).sum(axis=1))
    notes += [f"{bare:.1%} of store-weeks made no sale: all have the discount of the chain's week,"]
    notes += [
        f"or of its last sale ({paid.isna().to_numpy().mean():.1%} of product-weeks have none)"
    ]
    parts = (cells(sold), sales.astype(float), np.isin(sold, shown), cells(shown))
    return Shop(trips[keep], *parts, mailed, paid.to_numpy()), notes


def _promoted(
    promotions: Promotions, axes: dict[str, pd.Index], carried: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Displayed cells as sorted flat indices, covered (S, W), stores that mailed it (I, W)."""
    size = [len(axis) for axis in axes.values()]
    covered, mailed = np.zeros(size[1:], dtype=bool), np.zeros((size[0], size[2]), dtype=np.int64)
    shown: list[np.ndarray] = []
    rows = 0
    for piece in [promotions] if isinstance(promotions, pd.DataFrame) else promotions:
        require_columns(piece, (*axes, "display", "mailer"), "promotions", "")
        rows += len(piece)
        item, place, week = (axis.get_indexer(pd.Index(piece[c])) for c, axis in axes.items())
        known = (place >= 0) & (week >= 0)
        covered[place[known], week[known]] = True
        known &= (item >= 0) & carried[item, place]  # a store that never sold it is not compared
        on = known & ~piece["display"].isin(NONE).to_numpy()
        shown.append(np.unique(np.ravel_multi_index([x[on] for x in (item, place, week)], size)))
        by_mail = known & ~piece["mailer"].isin(NONE).to_numpy()
        np.add.at(mailed, (item[by_mail], week[by_mail]), 1)
    if covered.any(axis=1).sum() < 2:
        raise ValueError(
            f"the {rows} rows of promotions are about {covered.any(axis=1).sum()} stores of the "
            "log: a display needs others to be compared with: give more, place and week as in it"
        )
    flat = np.unique(np.concatenate(shown))
    if len(flat) == 0:
        raise ValueError(
            f"none of the {rows} rows of promotions displays one of the {size[0]} items in a store "
            "that sells it: give other items, or promotions whose display is not '0'"
        )
    return flat, covered, mailed
