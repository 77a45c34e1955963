"""The lift of displays is recovered from shops whose lift is known, and refused where it cannot."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from simulators.promotions import (
    Lift,
    Shop,
    Strata,
    _row,
    _within_week,
    display_lift,
    fit_display_lift,
    lines,
    pooled,
)
from sources.logs import Logs, Roles

ITEMS, STORES, WEEKS = 60, 24, 26
BREAD = 999  # of every trip
STORE, BOTH = "product x store", "product x week, product x store"


def shop(
    *,
    ratio: float = 1.0,
    ratio_odd: float | None = None,
    sales: float = 0.6,
    follow_week: float = 0.0,
    follow_store: float = 0.0,
    follow_moment: float = 0.0,
    busy: float = 1.0,
    mailer: float = 1.0,
    offer: float = 1.0,
    seed: int = 0,
) -> tuple[Logs, pd.DataFrame]:
    """Sales and promotions of a chain whose displays multiply sales by `ratio`.

    Stores display more often what sells well in the chain that week (`follow_week`), what their
    own customers like all year (`follow_store`) or just then (`follow_moment`). Half of the stores
    have `busy` times as many trips and more displays. In a third of weeks a product is in the
    mailer of all stores, which multiplies its sales by `mailer`; in other weeks at a discount,
    which multiplies them by `offer` and its displays too.
    """
    rng = np.random.default_rng(seed)
    size = (ITEMS, STORES, WEEKS)
    famed = rng.normal(size=(ITEMS, 1, WEEKS))
    liked, moment = rng.normal(size=(ITEMS, STORES, 1)), rng.normal(size=size)
    mailed = rng.random((ITEMS, 1, WEEKS)) < (1 / 3 if mailer != 1 else 0)
    cheap = rng.random((ITEMS, 1, WEEKS)) < (1 / 3 if offer != 1 else 0)
    first_half = (np.arange(STORES) < STORES // 2)[:, None]  # (S, 1)
    pull = follow_week * famed + follow_store * liked + follow_moment * moment - 1.5
    pull = pull + 2 * cheap + np.log(busy) * first_half
    shown = rng.random(size) < 1 / (1 + np.exp(-pull))
    trips = rng.poisson(30 * np.where(first_half, busy, 1), size=size[1:]) + 1
    lift = np.where(np.arange(ITEMS) % 2, ratio if ratio_odd is None else ratio_odd, ratio)
    taste = np.exp(0.5 * (famed + liked + moment) + 0.5 * rng.normal(size=(ITEMS, 1, 1)))
    chance = sales / 60 * taste * lift[:, None, None] ** shown * mailer**mailed * offer**cheap
    bought = rng.binomial(np.broadcast_to(trips, size), chance.clip(0, 1))
    return _log(bought, trips, cheap), _promotions(shown, mailed)


def _log(bought: np.ndarray, trips: np.ndarray, cheap: np.ndarray) -> Logs:
    """Every trip buys bread, which is item 999; `bought` (I, S, W) of them another item too."""
    weeks = bought.shape[2]
    first = np.concatenate([[0], trips.ravel().cumsum()])  # first basket of each store-week
    at = np.repeat(np.arange(trips.size), trips.ravel())
    count = bought.ravel()
    cell = np.repeat(np.arange(count.size), count)
    nth = np.arange(len(cell)) - np.repeat(count.cumsum() - count, count)  # of the cell's buyers
    where = np.concatenate([at, cell % trips.size])
    item = np.concatenate([np.full(len(at), BREAD), cell // trips.size])
    discount = np.zeros(len(where))
    discount[len(at) :] = 0.3 * cheap[:, 0, :][cell // trips.size, cell % weeks]
    basket = np.concatenate([np.arange(len(at)), first[cell % trips.size] + nth])
    events = pd.DataFrame({"item": item, "place": where // weeks, "week": where % weeks})
    events = events.assign(basket=basket, discount=discount, behaviour="buy", value=1.0)
    events["user"] = events["basket"] % 50
    events["time"] = pd.Timestamp("2020-01-06") + pd.to_timedelta(7 * events["week"], unit="D")
    items = pd.DataFrame({"item": [*range(len(bought)), BREAD]})
    items["department"] = np.where(items["item"] % 2 == 0, "even", "odd")
    return Logs.create(events, items, roles=Roles(item_category=("department",)), name="shop")


def _promotions(shown: np.ndarray, mailed: np.ndarray) -> pd.DataFrame:
    """Rows of what is displayed or in the mailer; bread is in it everywhere."""
    by_mail = np.broadcast_to(mailed, shown.shape)
    cells = pd.DataFrame(np.argwhere(shown | by_mail), columns=["item", "place", "week"])
    index = tuple(cells.to_numpy().T)
    cells["display"] = np.where(shown[index], "5", "0").astype(object)
    cells["mailer"] = np.where(by_mail[index], "A", "0").astype(object)
    place, week = (x.ravel() for x in np.indices(shown.shape[1:]))
    bread = pd.DataFrame({"item": BREAD, "place": place, "week": week, "display": "0"})
    return pd.concat([cells, bread.assign(mailer="A")], ignore_index=True)


def measured(**world: float) -> Lift:
    return display_lift(*shop(**world), range(ITEMS))


def ratio_of(lift: Lift, name: str) -> float:
    (found,) = lift.by.loc[lift.by["name"] == name, "ratio"]
    return float(found)


def covers(lift: Lift, name: str, truth: float) -> bool:
    (found,) = lift.by[lift.by["name"] == name].to_dict("records")
    return bool(found["low"] < truth < found["high"])


@pytest.mark.parametrize("ratio", [1.0, 1.6])
def test_a_known_lift_is_within_its_interval_and_no_lift_gives_one_around_1(ratio):
    lifts = [measured(ratio=ratio, seed=seed) for seed in range(4)]
    assert sum(lift.low < ratio < lift.high for lift in lifts) >= 3
    assert np.mean([x.log_shift for x in lifts]) == pytest.approx(math.log(ratio), abs=0.03)
    assert all(1.02 < lift.high / lift.low < 1.25 for lift in lifts)
    assert all(sum(covers(lift, name, ratio) for lift in lifts) >= 3 for name in (STORE, BOTH))


def test_a_confounder_of_the_whole_chain_is_removed_within_product_and_week():
    lift = measured(ratio=1.3, follow_week=1.5)
    assert ratio_of(lift, "crude") > 2
    assert ratio_of(lift, STORE) > 2  # its weeks differ as the chain's do
    assert lift.low < 1.3 < lift.high
    assert covers(lift, BOTH, 1.3)


def test_what_customers_of_a_store_like_all_year_needs_an_effect_of_product_and_store():
    lift = measured(ratio=1.3, follow_store=1.0)
    assert lift.low > 1.7  # the main figure is wrong here, and says nothing of it
    assert covers(lift, STORE, 1.3)
    assert covers(lift, BOTH, 1.3)


def test_where_a_store_always_displays_or_never_no_effect_of_product_and_store_is_possible():
    logs, promotions = shop(ratio=1.0)
    bread = promotions["item"] == BREAD
    every = pd.DataFrame({"item": np.arange(ITEMS)}).merge(
        promotions[bread & (promotions["place"] < 8)][["place", "week"]], how="cross"
    )
    always = pd.concat([promotions[bread], every.assign(display="3", mailer="0")])
    lift = display_lift(logs, always, range(ITEMS))
    assert lift.low < 1.1
    assert lift.rows > 0
    assert not {STORE, BOTH} & set(lift.by["name"])


def test_no_table_removes_displays_that_follow_the_wishes_of_one_store_and_week():
    lift = measured(ratio=1.3, follow_moment=1.0)
    display = lift.by[lift.by["kind"] == "display"]
    assert len(display) == 8
    assert (display["ratio"] > 1.7).all()
    assert (display["low"][display["name"] != "crude"] > 1.7).all()


def test_what_follows_the_price_is_removed_within_product_and_discount():
    lift = measured(ratio=1.3, offer=2.5)
    assert ratio_of(lift, "crude") > 1.7
    assert covers(lift, "product x discount decile", 1.3)
    assert lift.low < 1.3 < lift.high


def test_busy_stores_with_more_displays_do_not_drive_it():
    lift = measured(ratio=1.0, busy=3.0, sales=0.3)
    assert lift.low < 1.0 < lift.high
    assert ratio_of(lift, "crude") == pytest.approx(1.0, abs=0.1)  # sales a store-week would say 2


def test_a_mailer_is_one_effect_with_its_weeks_and_leaves_the_lift_of_displays_alone():
    lift = measured(ratio=1.3, mailer=2.0)
    assert lift.by.set_index("kind").loc["joint", "ratio"] == pytest.approx(2.0, rel=0.1)
    assert lift.low < 1.3 < lift.high
    assert covers(lift, "product x week, unmailed", 1.3)
    without = lift.by.set_index("name").loc["product x week, unmailed"]
    assert without["strata"] < 0.75 * lift.strata


def test_rarely_sold_products_are_not_biased_by_choosing_stores_that_sold_them():
    lifts = [measured(ratio=1.6, sales=0.05, seed=seed) for seed in range(4)]
    assert np.mean([x.log_shift for x in lifts]) == pytest.approx(math.log(1.6), abs=0.08)


def test_departments_have_their_own_lift():
    lift = measured(ratio=1.1, ratio_odd=2.0)
    assert covers(lift, "even", 1.1)
    assert covers(lift, "odd", 2.0)
    assert 1.1 < lift.ratio < 2.0
    by = lift.by.set_index("name")
    assert by.loc["even", "high"] < by.loc["odd", "low"]


def test_the_placebo_is_1_unless_displays_follow_what_a_store_sells_anyway():
    placebo = "displayed next week only"
    assert covers(measured(ratio=1.6), placebo, 1.0)
    assert covers(measured(ratio=1.3, follow_week=1.5), placebo, 1.0)
    assert ratio_of(measured(ratio=1.3, follow_store=1.0), placebo) > 1.2


def test_stores_as_clusters_keep_the_ratio_and_widen_the_interval_where_stores_differ():
    lift = measured(ratio=1.3, sales=1.0)
    by = lift.by.set_index("name")
    stores = by.loc["product x week, stores as clusters"]
    assert stores["ratio"] == pytest.approx(lift.ratio)
    assert stores["clusters"] == STORES
    assert stores["low"] < 1.3 < stores["high"]


strata_of = st.lists(
    st.tuples(st.integers(0, 3), *[st.integers(0, 9)] * 4), min_size=1, max_size=30
)


@given(strata_of)
@settings(max_examples=60, deadline=None)
def test_pooling_is_the_formula_of_mantel_and_haenszel(rows):
    above = below = 0.0
    for _, sales_on, sales_off, trips_on, trips_off in rows:
        if trips_on and trips_off and sales_on + sales_off:
            above += sales_on * trips_off / (trips_on + trips_off)
            below += sales_off * trips_on / (trips_on + trips_off)
    columns = np.array(rows, dtype=float).T
    found = pooled(Strata(columns[0].astype(int), *columns[1:], np.ones(len(rows))))
    if above == 0 or below == 0:
        assert found["strata"] == 0
    else:
        assert found["ratio"] == pytest.approx(above / below)
        assert found["low"] <= found["ratio"] <= found["high"]


def test_the_interval_is_that_of_leaving_out_one_product_after_the_other():
    rng = np.random.default_rng(0)
    product = np.repeat(np.arange(80), 5)
    trips_on, trips_off = rng.integers(5, 50, size=(2, 400)).astype(float)
    own = np.exp(0.4 * rng.normal(size=80))[product]  # lifts of products differ
    on, off = rng.poisson(0.1 * own * trips_on), rng.poisson(0.1 * trips_off)
    whole = Strata(product, *(x.astype(float) for x in (on, off, trips_on, trips_off, trips_on)))
    found = pooled(whole)
    without = [pooled(Strata(*(x[product != p] for x in whole)))["ratio"] for p in range(80)]
    jackknife = math.sqrt(79 / 80 * ((np.log(without) - np.mean(np.log(without))) ** 2).sum())
    half = math.log(found["high"] / found["low"]) / 2
    assert half == pytest.approx(1.99 * jackknife, rel=0.05)


def test_pieces_order_and_repeated_rows_change_nothing():
    logs, promotions = shop(ratio=1.3)
    whole = display_lift(logs, promotions, range(ITEMS))
    mixed = pd.concat([promotions, promotions.iloc[:500]]).sample(frac=1, random_state=0)
    codes = mixed.assign(display=mixed["display"].astype(int))  # 0 is none, as "0" is
    pieces = (codes.iloc[start : start + 1000] for start in range(0, len(codes), 1000))
    again = display_lift(logs, pieces, reversed(range(ITEMS)))
    assert (again.ratio, again.low, again.strata) == (whole.ratio, whole.low, whole.strata)


def test_store_weeks_without_any_row_are_left_out_not_taken_for_undisplayed():
    logs, promotions = shop(ratio=1.6)
    lost = (promotions["place"] + promotions["week"]) % 3 == 0
    lift = display_lift(logs, promotions[~lost], range(ITEMS))
    assert lift.low < 1.6 < lift.high
    assert lift.rows < 0.75 * display_lift(logs, promotions, range(ITEMS)).rows
    assert lift.notes[0].startswith("33.")


def test_a_log_without_discounts_or_departments_has_fewer_tables():
    logs, promotions = shop(ratio=1.3)
    bare = Logs.create(logs.events.drop(columns="discount"), name="bare")
    lift = display_lift(bare, promotions, range(ITEMS))
    assert set(lift.by["kind"]) == {"display", "placebo"}  # nothing of these is in a mailer either
    assert "product x discount decile" not in set(lift.by["name"])
    assert lift.ratio == display_lift(logs, promotions, range(ITEMS)).ratio


def test_one_product_has_a_ratio_but_no_interval_between_products():
    lift = display_lift(*shop(ratio=1.6), [0])
    assert (lift.low, lift.high) == (0.0, math.inf)
    assert 0.5 < lift.ratio < 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.iloc[:0], "the 0 rows of promotions are about 0 stores of the log"),
        (lambda p: p.assign(place=p["place"] + 1000), "are about 0 stores of the log"),
        (lambda p: p[p["place"] == 3], "are about 1 stores of the log: a display needs others"),
        (lambda p: p.assign(display="0"), "rows of promotions displays one of the 60 items"),
        (lambda p: p[p["item"] == BREAD], "give other items, or promotions whose display is not"),
        (lambda p: p.drop(columns="display"), "promotions lacks the column 'display'"),
        (lambda p: p.rename(columns={"place": "store"}), "promotions lacks the column 'place'"),
    ],
)
def test_promotions_that_cannot_tell_are_refused(change, message):
    logs, promotions = shop(sales=0.1)
    with pytest.raises(ValueError, match=message):
        display_lift(logs, change(promotions), range(ITEMS))


def test_logs_that_cannot_tell_are_refused():
    logs, promotions = shop(sales=0.1)
    one = replace(logs, events=logs.events[logs.events["place"] == 3])
    with pytest.raises(ValueError, match="are about 1 stores of the log"):
        display_lift(one, promotions, range(ITEMS))
    with pytest.raises(ValueError, match=r"events lacks the column 'place' \(sales are compared"):
        display_lift(replace(logs, events=logs.events.drop(columns="place")), promotions, [0])
    with pytest.raises(ValueError, match="none of the 2 items was ever sold"):
        display_lift(logs, promotions, [5000, 5001])
    everywhere = promotions[promotions["item"] == BREAD].assign(display="1")
    with pytest.raises(ValueError, match="there is nothing to compare"):
        display_lift(logs, everywhere, [BREAD])


def test_a_fit_is_made_once_and_read_back_as_it_was(tmp_path, monkeypatch):
    logs, promotions = shop(ratio=1.6, sales=0.2)
    asked: list[int] = []

    def promotions_of(items: np.ndarray) -> pd.DataFrame:
        asked.append(len(items))
        return promotions[promotions["item"].isin([*items, BREAD])]

    monkeypatch.setattr("sources.complete_journey.promotions_of", promotions_of)
    monkeypatch.setattr("simulators.promotions.BLOCK", 25)
    lift = fit_display_lift(logs, range(ITEMS), cache_dir=tmp_path)
    assert asked == [20, 20, 20]
    again = fit_display_lift(logs, range(ITEMS), cache_dir=tmp_path)
    assert asked == [20, 20, 20]
    assert lines(again) == lines(lift) == lines(display_lift(logs, promotions, range(ITEMS)))
    assert again.log_shift == math.log(lift.ratio)
    fit_display_lift(logs, range(30), cache_dir=tmp_path)
    assert asked == [20, 20, 20, 15, 15]  # other items are another fit


def test_lines_name_the_assumption_every_table_and_its_interval():
    lift = measured(ratio=1.6)
    said = lines(lift)
    assert "if a display speaks for a slate" in said[0]
    assert f"{lift.ratio:.3f} ({lift.low:.3f} to {lift.high:.3f})" in said[0]
    for name in lift.by["name"]:
        assert sum(f" {name} " in line for line in said[1:]) >= 1


def test_a_store_carries_what_it_sold_in_another_week():
    """Were its own week to count, stores would be chosen by the sales that are compared."""
    one = np.array([[0], [0], [0]])  # item, store, week of the only sale
    shop = Shop(np.ones((2, 2)), one, np.ones(1), np.ones(1, bool), one, np.zeros((1, 2)),
                np.full((1, 2), np.nan))  # fmt: skip
    found = _within_week(shop, 2)
    assert found.cells.tolist() == [0, 1]
    assert found.sales_on.tolist() == [0, 0]
    assert found.trips_off.tolist() == [0, 1]


def test_few_products_widen_the_interval():
    some = Strata(*(np.ones(2) for _ in Strata._fields))
    row = _row(0.0, np.array([0.1, -0.1]), some)
    assert np.log(row["high"]) == pytest.approx(0.2 * t.ppf(0.975, 1))
    assert _row(0.0, np.array([0.1]), some)["high"] == np.inf
