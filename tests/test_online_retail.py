"""Lines of invoices become purchases; what was left out is counted, what is garbled is refused."""

import inspect
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sources import online_retail as module
from sources.online_retail import clean, load, readable, without_services

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data" / "online_retail" / "online_retail.parquet"
UK = "United Kingdom"

LINES = (
    ("1", "22720", "SET/3 CAKE TINS ", 2, "2010-12-01 08:26", 4.0, 17850.0, UK),
    ("1", "22720", "SET/3 CAKE TINS ", 1, "2010-12-01 08:27", 1.0, 17850.0, UK),
    ("1", "85123A", "WHITE  HEART", 6, "2010-12-01 08:27", 2.5, 17850.0, UK),
    ("2", "22720", "tins, damaged", 1, "2010-12-02 09:00", 4.5, 12345.0, "France"),
    ("2", "POST", "POSTAGE", 1, "2010-12-02 09:00", 18.0, 12345.0, "France"),
    ("C3", "22720", "SET/3 CAKE TINS ", -2, "2010-12-03 10:00", 4.0, 17850.0, UK),
    ("4", "22720", "SET/3 CAKE TINS ", 1, "2010-12-03 11:00", 4.0, None, UK),
    ("5", "22720", "SET/3 CAKE TINS ", -1, "2010-12-03 12:00", 4.0, 17850.0, UK),
    ("6", "22720", "SET/3 CAKE TINS ", 1, "2010-12-03 13:00", 0.0, 17850.0, UK),
)


def table(lines=LINES):
    return pd.DataFrame(lines, columns=list(module.COLUMNS))


def write(path, frame):
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return path


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RECPLAY_CACHE", str(tmp_path / "cache"))


def test_lines_of_one_product_on_one_invoice_are_one_purchase(tmp_path):
    logs = load(write(tmp_path / "lines.parquet", table()))
    rows = logs.events.set_index(["basket", "item"])
    assert len(rows) == 3
    tins = rows.loc[("1", "22720")]
    assert (tins["quantity"], tins["value"], tins["price"]) == (3, 9, 3)
    assert rows.loc[("1", "85123A"), "value"] == 15
    assert set(rows["behaviour"]) == {"buy"}
    assert rows.loc["1", "time"].unique() == [pd.Timestamp("2010-12-01 08:26")]  # one per invoice


def test_what_is_left_out_is_counted_once(tmp_path):
    notes = load(write(tmp_path / "lines.parquet", table())).notes
    assert notes[:6] == (
        "9 lines read, the whole set has 541909",
        "1 lines without a customer dropped",
        "1 returns (invoices C...) dropped",
        "1 lines without units (corrections of stock) dropped",
        "1 lines without a price (gifts) dropped",
        "1 lines of services dropped: 1 POST (postage)",
    )
    assert "1 lines merged with another of the same product and invoice" in notes


def test_a_product_is_called_what_most_lines_call_it(tmp_path):
    logs = load(write(tmp_path / "lines.parquet", table()))
    names = dict(zip(logs.items["item"], logs.items["text"], strict=True))
    assert names == {"22720": "set of 3 cake tins", "85123A": "white heart"}
    nameless = table().assign(Description=[None, None, "x", "tins", *["y"] * 5])
    logs = load(write(tmp_path / "nameless.parquet", nameless))
    assert logs.items["text"].tolist() == ["tins", "x"]  # a name said once beats none said twice


def test_a_customer_of_two_countries_is_of_the_one_bought_from_most(tmp_path):
    lines = [("9", "85123A", "X", 1, "2010-12-01 08:00", 1.0, 17850.0, "Spain"), *LINES]
    users = load(write(tmp_path / "lines.parquet", table(lines))).users
    assert dict(zip(users["user"], users["country"], strict=True)) == {17850: UK, 12345: "France"}


@pytest.mark.parametrize("way", ["dates", "csv", "american csv", "latin-1 csv"])
def test_all_ways_to_save_it_give_the_same_log(tmp_path, way):
    expected = load(write(tmp_path / "lines.parquet", table()))
    frame, path = table(), tmp_path / ("given.parquet" if way == "dates" else "given.csv")
    dates = pd.to_datetime(frame["InvoiceDate"])
    if way == "dates":
        frame["InvoiceDate"] = dates
    if way == "american csv":
        frame["InvoiceDate"] = [f"{d.month}/{d.day}/{d.year} {d:%H:%M}" for d in dates]
    write(path, frame)
    if way == "latin-1 csv":
        dropped = frame.assign(Description="caf\xe9 \xa3")[frame["CustomerID"].isna()]
        kept = frame[frame["CustomerID"].notna()]
        path.write_bytes(pd.concat([kept, dropped]).to_csv(index=False).encode("latin-1"))
    assert load(path).fingerprint() == expected.fingerprint()


@settings(max_examples=25)
@given(st.permutations(range(len(LINES))))
def test_the_order_of_lines_changes_no_purchase(order):
    def bought(lines):
        events = module._prepare(lines).events.drop(columns="behaviour")
        return events.sort_values(["basket", "item"]).reset_index(drop=True)

    pd.testing.assert_frame_equal(bought(table([LINES[i] for i in order])), bought(table()))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("Quantity", None, r"Quantity must be a number on every line.*row 0: nan.*cut off"),
        ("UnitPrice", float("inf"), r"UnitPrice must be a number on every line.*row 0: inf"),
        ("UnitPrice", "cheap", r"UnitPrice must be numbers, got 1 of 9 rows \(row 0: 'cheap'\)"),
        ("CustomerID", 1.5, r"user must be whole numbers or strings.*1\.5"),
        ("InvoiceDate", "yesterday", r"InvoiceDate must be ISO dates.*'yesterday'"),
        ("InvoiceNo", None, r"online_retail\.InvoiceNo is missing in 1 of 9 rows"),
        ("StockCode", None, r"online_retail\.StockCode is missing in 1 of 9 rows"),
    ],
)
def test_a_garbled_line_is_refused(column, value, message):
    frame = table()
    frame[column] = [value, *frame[column].tolist()[1:]]
    with pytest.raises(ValueError, match=message):
        module._prepare(frame)


def test_files_that_are_not_the_set_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lacks the column 'CustomerID'.*Did you mean 'Customer"):
        load(write(tmp_path / "b.csv", table().rename(columns={"CustomerID": "Customer ID"})))
    with pytest.raises(ValueError, match="there are no lines"):
        load(write(tmp_path / "c.csv", table()[:0]))
    with pytest.raises(ValueError, match="no line is a purchase: 1 lines without a customer"):
        load(write(tmp_path / "d.parquet", table([LINES[6]])))
    with pytest.raises(ValueError, match=r"all lines are services \(POST\)"):
        load(write(tmp_path / "e.parquet", table([LINES[4]])))
    (tmp_path / "f.xlsx").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"must be \.csv or \.parquet, got \.xlsx.*10\.24432/C5BW33"
    ):
        load(tmp_path / "f.xlsx")
    cut = write(tmp_path / "g.parquet", table())
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"g\.parquet cannot be read .*cut off"):
        load(cut)
    assert not list((tmp_path / "cache").glob("online-retail*"))  # nothing of them is kept


def test_without_a_path_only_the_whole_set_is_found(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"not in the cache: get .*C5BW33.*data\.path=FILE"):
        load()
    with pytest.raises(ValueError, match=r"no file .*data\.path=FILE"):
        load(tmp_path / "nowhere.csv")
    path = write(tmp_path / "lines.parquet", table())
    load(path)
    with pytest.raises(ValueError, match="not in the cache"):
        load()  # nine lines are a part: they do not pass for the set
    monkeypatch.setattr(module, "LINES", len(LINES))
    whole = load(write(tmp_path / "lines.csv", table()))
    assert load().fingerprint() == whole.fingerprint()


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("WHITE HANGING HEART T-LIGHT HOLDER", "white hanging heart t-light holder"),
        ("S/4 GROOVY CAT MAGNETS", "set of 4 groovy cat magnets"),
        ("RUSTIC CABINET,GLASS DOORS", "rustic cabinet, glass doors"),
        ('FRAME 4"X6" W LEAF & BELL .', "frame 4x6 with leaf and bell"),
        ("  ", ""),
    ],
)
def test_labels_as_a_person_says_them(label, text):
    assert readable(label) == text


@given(st.text('ABSETW /,.&+-"1 ', max_size=20))
def test_saying_it_twice_changes_nothing(label):
    assert readable(readable(label)) == readable(label)


@pytest.mark.parametrize("name", ["online_retail", "complete_journey"])
def test_the_yaml_repeats_the_defaults(name):
    about = yaml.safe_load((ROOT / f"experiments/conf/data/{name}.yaml").read_text())
    for key in (
        "models",
        "repeats",
        "split",
    ):  # what is fitted to the log, which rank_baselines reads
        about.pop(key, None)
    module_of, _, function = about.pop("_target_").rpartition(".")
    assert (module_of, function) == (f"sources.{name}", "load")
    source = __import__(module_of, fromlist=["load"])
    known = inspect.signature(source.load).parameters
    assert about == {key: known[key].default for key in about}


@pytest.mark.skipif(not REAL.is_file(), reason="../shared/data/online_retail is not there")
def test_the_real_set_has_its_documented_size():
    lines = pd.read_parquet(REAL)
    bought, notes = clean(lines)
    sizes = (len(bought), bought["CustomerID"].nunique(), bought["StockCode"].nunique())
    assert sizes == (397_884, 4_338, 3_665)
    assert notes[0] == "135080 lines without a customer dropped"
    goods, services = without_services(bought)
    assert len(goods) == 396_340
    assert "PADS" in set(goods["StockCode"])  # an odd code, but a product
    assert services[0].startswith("1544 lines of services dropped: 1099 POST (postage), 284 M ")
    logs = module._prepare(lines)
    assert not logs.events.duplicated(["basket", "item"]).any()
    assert (logs.events.groupby("basket")["time"].nunique() == 1).all()
    assert logs.events["value"].sum() == pytest.approx(
        (goods["Quantity"] * goods["UnitPrice"]).sum()
    )
    assert (logs.items["text"] != "").all()
