"""A catalogue is chosen, counted and encoded from events before the cut only."""

from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import torch
from synthetic import HashedTexts, after_cut_replaced, items_table

import simulators.catalog
from simulators.base import Catalog
from simulators.catalog import (
    catalog_from_logs,
    days,
    finest_categories,
    load_catalog,
    save_catalog,
)
from sources.logs import Logs, Roles

CUT = {"cut": 0.8, "dim": 8, "progress": False}


@pytest.fixture(autouse=True)
def hashed(monkeypatch):
    monkeypatch.setattr(simulators.catalog, "TextEncoder", HashedTexts)


def assert_same(one: Catalog, other: Catalog):
    for f in fields(Catalog):
        a, b = getattr(one, f.name), getattr(other, f.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)), f.name
        else:
            assert np.array_equal(a, b), f.name


def small(**columns):
    """Four items over ten days; `late` is sold most, but only after the cut."""
    rows = [
        (1, "milk", 0.0, "a", 2.0), (1, "milk", 0.0, "a", 4.0), (1, "eggs", 0.0, "a", 3.0),
        (1, "milk", 2.0, "b", 3.0), (2, "eggs", 3.0, "c", 5.0), (2, "soap", 4.0, "d", 1.0),
        *((2, "late", 9.0 + i / 9, f"e{i}", 1.0) for i in range(9)), (1, "late", 10.0, "f", 1.0),
    ]  # fmt: skip
    events = pd.DataFrame(rows, columns=["user", "item", "day", "basket", "value"])
    events["time"] = pd.Timestamp("2024-03-01") + pd.to_timedelta(events.pop("day"), unit="D")
    return events.assign(behaviour="buy", price=events["value"]).assign(**columns)


def test_most_bought_before_the_cut_are_chosen_most_first():
    catalog = catalog_from_logs(Logs.create(small()), size=3, **CUT)
    assert catalog.ids.tolist() == ["milk", "eggs", "soap"]
    assert catalog.as_of == pytest.approx(days(pd.Timestamp("2024-03-09")))


def test_popularity_is_the_share_of_trips_and_price_the_median_by_hand():
    catalog = catalog_from_logs(Logs.create(small()), size=3, **CUT)
    assert catalog.popularity.tolist() == [0.5, 0.5, 0.25]  # of four trips; twice on one is once
    assert catalog.price.tolist() == [3.0, 4.0, 1.0]


def test_without_baskets_popularity_is_of_users_and_days():
    logs = Logs.create(small().drop(columns="basket"))
    assert catalog_from_logs(logs, size=3, **CUT).popularity.tolist() == [0.5, 0.5, 0.25]


def test_shuffling_everything_after_the_cut_changes_no_bit(shop):
    first = catalog_from_logs(shop, size=40, **CUT)
    shuffled = after_cut_replaced(shop, shop.cut(0.8))
    late = shuffled.events["time"] >= shop.cut(0.8)
    shuffled.events.loc[late, ["value", "price"]] *= 7.0
    assert_same(first, rebuilt(shuffled, size=40))


def rebuilt(logs: Logs, size: int) -> Catalog:
    """The catalogue made anew, past any cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulators.catalog, "cached", lambda key, make, *_, **__: make())
        return catalog_from_logs(logs, size=size, **CUT)


def test_what_is_saved_is_what_is_loaded(shelf, tmp_path):
    save_catalog(shelf, tmp_path / "catalog")
    assert_same(load_catalog(tmp_path / "catalog"), shelf)
    assert load_catalog(tmp_path / "catalog").fingerprint() == shelf.fingerprint()


def test_a_second_run_finds_the_catalogue_and_another_size_makes_another(shop, monkeypatch):
    first = catalog_from_logs(shop, size=30, **CUT)
    monkeypatch.setattr(simulators.catalog, "TextEncoder", None)  # would fail if it were asked
    assert_same(catalog_from_logs(shop, size=30, **CUT), first)
    with pytest.raises(TypeError):
        catalog_from_logs(shop, size=31, **CUT)


def test_items_without_text_and_logs_without_prices_or_categories_have_a_catalogue():
    items = pd.DataFrame(
        {"item": ["milk", "eggs", "soap", "late"], "name": ["Milk", None, "", "x"]}
    )
    events = small().drop(columns="price")
    catalog = catalog_from_logs(Logs.create(events, items, roles=Roles(("name",))), size=3, **CUT)
    assert catalog.texts == ["Milk", "", ""]
    assert catalog.price.isnan().all()
    assert catalog.category.tolist() == [0, 0, 0]
    assert catalog.category_names == [""]
    assert catalog.vectors.isfinite().all()


def test_an_item_never_sold_with_a_price_has_none():
    events = small()
    events.loc[events["item"] == "eggs", "price"] = np.nan
    catalog = catalog_from_logs(Logs.create(events), size=3, **CUT)
    assert catalog.price.isnan().tolist() == [False, True, False]


def test_category_is_the_coarser_of_the_two_finest_that_group(shop, shelf):
    assert finest_categories(shop, shelf.ids) == ["kind", "brand"]
    assert shelf.category_names == ["brand 0", "brand 1", "brand 2"]
    brand = items_table().set_index("item").loc[shelf.ids, "brand"]
    assert [shelf.category_names[c] for c in shelf.category] == brand.tolist()


def test_columns_that_name_every_item_or_all_of_them_group_nothing(shop):
    items = items_table().assign(kind="all", brand=items_table()["name"])
    logs = Logs.create(shop.events, items, roles=Roles(item_category=("kind", "brand")))
    assert finest_categories(logs, items["item"].to_numpy()) == []


@pytest.mark.parametrize("wrong", [{"size": 1}, {"dim": 1}])
def test_too_small_a_catalogue_is_refused(shop, wrong):
    with pytest.raises(ValueError, match="at least 2"):
        catalog_from_logs(shop, **wrong)


def test_one_product_is_no_catalogue():
    events = small()
    with pytest.raises(ValueError, match="1 products were bought before the cut"):
        catalog_from_logs(Logs.create(events[events["item"] == "milk"]), size=5, **CUT)


def test_a_broken_cache_file_is_made_again_with_a_line(shop, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RECPLAY_CACHE", str(tmp_path))
    first = catalog_from_logs(shop, size=20, **CUT)
    (entry,) = tmp_path.glob("catalog*")
    entry.write_bytes(b"not a catalogue")
    assert_same(catalog_from_logs(shop, size=20, **CUT), first)
    assert "cache of the catalogue is not readable" in capsys.readouterr().err
