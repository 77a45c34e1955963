"""Claims about tables of one's own, described by a yaml."""

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sources import headers, tables

SHOP = Path(__file__).parent / "data" / "shop"
RETAIL = (
    Path(__file__).parents[1] / ".." / "shared" / "data" / "online_retail" / "online_retail.parquet"
)


@pytest.fixture
def shop(tmp_path):
    """A copy of the example and a function that loads it with changes to its yaml."""
    folder = tmp_path / "shop"
    shutil.copytree(SHOP, folder)

    def load(**changes: object):
        about = yaml.safe_load((folder / "shop.yaml").read_text())
        for path, value in changes.items():
            part, *keys = path.split("__")
            place = about
            for step in [part, *keys][:-1]:
                place = place.setdefault(step, {})
            place[[part, *keys][-1]] = value
        (folder / "changed.yaml").write_text(yaml.safe_dump(about))
        return tables.load(folder / "changed.yaml", cache_dir=tmp_path / "cache")

    load.folder = folder
    return load


def test_the_example_shop_is_read_as_described(shop):
    logs = shop()
    assert logs.name == "corner shop"
    assert logs.events["user"].tolist() == ["007", "007", "008", "007", "009"]  # zeros survive
    assert logs.events["item"].tolist() == ["00123", "00200", "00123", "00123", "00300"]
    assert logs.events["time"].iloc[2] == pd.Timestamp("2025-01-04 17:40")  # day first, as told
    assert logs.events["value"].tolist() == [3.0, 3.2, 1.5, 2.9, 12.0]  # price x quantity
    assert logs.events["behaviour"].unique().tolist() == ["buy"]
    assert logs.events["basket"].tolist() == [1, 1, 2, 3, 4]
    assert logs.item_text().tolist() == ["Rye bread", "Goat cheese", "", "Oat milk"]
    assert logs.items["grams"].tolist()[:2] == [750, 200]
    assert "1 rows of events dropped: keep customer {'present': True}" in logs.notes
    assert "1 items without text" in logs.notes


def test_each_rule_of_keep_drops_what_it_says(shop):
    assert (
        len(shop(events__keep={"customer": {"present": True}, "kind": {"values": ["sale"]}})) == 5
    )
    assert len(shop(events__keep={"customer": {"present": True}, "qty": {"min": 2}})) == 2
    few = shop(events__keep={"customer": {"present": True}, "unit_price": {"min": 1.5, "max": 3.2},
                             "kind": {"values": ["sale"]}})  # fmt: skip
    assert few.events["price"].tolist() == [1.5, 3.2, 1.5]
    with pytest.raises(ValueError, match=r"keep\.kind.*cannot be compared"):
        shop(events__keep={"kind": {"min": 1}})


def test_ids_become_numbers_only_if_they_are_in_every_table(shop):
    products = shop.folder / "products.csv"
    products.write_text(products.read_text().replace("\n00", "\n"))
    sales = shop.folder / "sales.csv"
    sales.write_text(sales.read_text().replace(";00", ";"))
    assert shop().events["item"].tolist() == [123, 200, 123, 123, 300]
    products.write_text(products.read_text() + "x9,Salt,spices,500\n")
    logs = shop()
    assert logs.events["item"].tolist() == ["123", "200", "123", "123", "300"]
    assert "x9" in logs.items["item"].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evnts": {}}, "unknown key 'evnts'.*Did you mean 'events'"),
        (
            {"events__seperator": ","},
            "events has the unknown key 'seperator'.*Did you mean 'separator'",
        ),
        ({"roles__item_txt": ["title"]}, "roles has the unknown key 'item_txt'.*'item_text'"),
        ({"events__keep": {"qty": {"mni": 1}}}, "keep.qty has the unknown key 'mni'.*'min'"),
        ({"events__keep": {"qnt": {"min": 1}}}, "lacks the column 'qnt'.*keep.*Did you mean 'qty'"),
        (
            {"events__columns__user": "custmer"},
            "'custmer' .mapped to user.*means it. Did you mean 'cust",
        ),
        (
            {"events__file": "sale.csv"},
            "sale.csv, which does not exist: a path in the yaml is relative",
        ),
        (
            {"events__columns": {"item": "sku", "user": "customer", "time": "when"}},
            "says no behaviour: map a column",
        ),
        (
            {"events__columns": {"item": "sku", "user": "customer"}},
            r"events \(sales.csv\) lacks the column 'time' \(all events have one\).*columns: {time",
        ),
        ({"events__time_format": "%Y-%m-%d"}, r"like %Y-%m-%d, cannot read 5 of 5 rows"),
        ({"events__time_unit": "s"}, "both time_format and time_unit"),
        ({"events__behaviours": {"return": "back"}}, r"does not translate \['sale'\]"),
        (
            {"roles__item_text": ["titel"]},
            r"items \(products.csv\) lacks the column 'titel' \(roles.item_text names it\), it has "
            r"\['sku', 'title', 'shelf', 'grams'\].*Did you mean 'title'",
        ),
        (
            {"roles__user_category": ["town"]},
            r"roles.user_category names \['town'\], columns of users, and there is no part users",
        ),
        ({"roles__item_text": "title"}, "roles.item_text must be a list"),
        ({"purchases": ["purchase"]}, r"purchases \['purchase'\] never occur"),
        ({"events__encoding": "utf-99"}, "cannot be read.*encoding"),
        (
            {"items__separator": ";", "items__file": "sales.csv", "items__columns": {}},
            r"items \(sales.csv\) lacks the column 'item' \(all items have one\)",
        ),
        (
            {"events__separator": ","},
            r"sales.csv is one column, 'receipt.*say separator: \";\" \(and decimal: \",\"",
        ),
        (
            {"events__decimal": "."},
            r"events.price must be numbers.*1,50.*say decimal: \",\" beside the file",
        ),
        (
            {"events__decimal": ".", "events__keep": {"unit_price": {"min": 1.0}}},
            r"keep.unit_price: .* cannot be compared with str values.*say decimal: \",\" beside",
        ),
    ],
)
def test_mistakes_in_the_yaml_are_named_with_a_way_out(shop, changes, message):
    with pytest.raises(ValueError, match=message):
        shop(**changes)


@pytest.mark.parametrize(
    ("content", "separator", "message"),
    [
        ("", ",", "x.csv cannot be read.*whose first line names its columns"),
        ("a\tb\n1\t2\n", ",", r"is one column, .*say separator: \"\\t\" beside the file"),
        ("a,b\n1,2\n", ";", r"is one column, 'a,b'.*say separator: \",\" beside"),
    ],
)
def test_a_header_of_another_kind_of_table_is_refused(content, separator, message, tmp_path):
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        headers.header(tmp_path / "x.csv", {"separator": separator}, "my.yaml: events")


def test_headers_are_read_as_pandas_reads_them(tmp_path):
    (tmp_path / "x.csv").write_text('\n"a;1",a,a,\n1,2,3,4\n')
    names = headers.header(tmp_path / "x.csv", {}, "events")
    assert names == list(pd.read_csv(tmp_path / "x.csv").columns) == ["a;1", "a", "a.1",
                                                                    "Unnamed: 3"]  # fmt: skip
    pd.DataFrame({"q": [1], "r": [2]}).to_parquet(tmp_path / "x.parquet")
    assert headers.header(tmp_path / "x.parquet", {}, "events") == ["q", "r"]


def test_lines_with_more_fields_than_columns_are_refused_not_shifted(shop):
    sales = shop.folder / "sales.csv"
    head, *lines = sales.read_text().splitlines()
    sales.write_text("\n".join([head, *(f"{line};" for line in lines)]))
    with pytest.raises(ValueError, match=r"sales.csv: its lines have more fields than its first l"):
        shop()


def test_what_the_files_lack_is_said_before_any_is_read(shop, monkeypatch):
    monkeypatch.setattr(tables, "_read_file", None)  # not reached
    with pytest.raises(ValueError, match=r"lacks the column 'titel'"):
        shop(roles__item_text=["titel"])
    with pytest.raises(ValueError, match=r"say separator"):
        shop(items__separator=";")


def test_a_missing_or_malformed_yaml_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        tables.load(tmp_path / "no.yaml", cache_dir=tmp_path)
    for text, message in (
        ("events: [", "is not yaml"),
        ("- 1", "must be a mapping"),
        ("when,card\n1,2\n", "it begins with 'when,card.*is it one of the tables"),
        ("name: x", "'events'"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            tables.load(tmp_path / "bad.yaml", cache_dir=tmp_path)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["file", "columns", "keep", "item_text", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(about=st.dictionaries(st.sampled_from(list(tables.KEYS[""])), anything, max_size=4))
def test_any_yaml_that_describes_nothing_is_a_value_error(tmp_path_factory, about):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(about))
    with pytest.raises(ValueError, match=r"any\.yaml"):
        tables.load(path, cache_dir=path.parent / "cache")


def test_it_is_prepared_once_and_again_when_a_table_changes(shop, monkeypatch):
    prepared = []
    prepare = tables._prepare
    monkeypatch.setattr(tables, "_prepare", lambda *args: prepared.append(1) or prepare(*args))
    assert shop().fingerprint() == shop().fingerprint()
    assert len(prepared) == 1
    sales = shop.folder / "sales.csv"
    sales.write_text(sales.read_text() + "6;009;00123;14.02.2025 12:30;1;1,50;sale\n")
    os.utime(sales, (1, 1))  # a clock too coarse to see it would still see the size
    assert len(shop()) == 6
    assert len(prepared) == 2


def test_seconds_parquet_several_files_and_relations(tmp_path):
    lines = {"user": [1.0, 2.0, None], "sku": [7, 8, 7], "stars": [4.0, 5.0, 1.0]}
    lines["at"] = [0, 86400, 86401]
    pd.DataFrame(lines).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame(lines | {"at": [5, 6, 7]}).to_parquet(tmp_path / "b.parquet")
    pd.DataFrame({"source": [1], "target": [2]}).to_csv(tmp_path / "friends.csv", index=False)
    about = {
        "events": {
            "file": ["a.parquet", "b.parquet"],
            "columns": {"item": "sku", "time": "at", "value": "stars"},
            "keep": {"user": {"present": True}},
            "time_unit": "s",
            "behaviour": "rate",
        },
        "relations": {"file": "friends.csv", "kind": "friend"},
        "purchases": ["rate"],
    }
    (tmp_path / "stars.yaml").write_text(yaml.safe_dump(about))
    logs = tables.load(tmp_path / "stars.yaml", cache_dir=tmp_path / "cache")
    assert logs.events["user"].tolist() == [1, 1, 2, 2]
    assert logs.events["time"].max() == pd.Timestamp("1970-01-02")
    assert logs.relations["kind"].tolist() == ["friend"]
    assert logs.name == "stars"


def test_long_ids_keep_every_digit(tmp_path):
    (tmp_path / "e.csv").write_text("user,item,time,value\n9007199254740993,1,2025-01-01,1\n")
    about = {"events": {"file": "e.csv", "behaviour": "buy"}}
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(about))
    logs = tables.load(tmp_path / "e.yaml", cache_dir=tmp_path / "cache")
    assert logs.events["user"].tolist() == [9007199254740993]


@pytest.mark.skipif(not RETAIL.is_file(), reason="the UCI Online Retail table is not here")
def test_online_retail_is_described_by_a_yaml(tmp_path):
    columns = {"user": "CustomerID", "item": "StockCode", "time": "InvoiceDate",
               "basket": "InvoiceNo", "quantity": "Quantity", "price": "UnitPrice"}  # fmt: skip
    about = {
        "name": "online retail",
        "events": {
            "file": str(RETAIL.resolve()),
            "columns": columns,
            "behaviour": "buy",
            "keep": {
                "CustomerID": {"present": True},
                "Quantity": {"min": 1},
                "UnitPrice": {"min": 0.001},
            },
        },
        "items": {
            "file": str(RETAIL.resolve()),
            "columns": {"item": "StockCode", "text": "Description"},
            "keep": {"Description": {"present": True}},
            "first_of_each": True,
        },
        "roles": {"item_text": ["text"]},
    }
    (tmp_path / "retail.yaml").write_text(yaml.safe_dump(about))
    logs = tables.load(tmp_path / "retail.yaml", cache_dir=tmp_path / "cache")
    # 397,884 sound lines, of which 5,194 repeat another in all columns that are mapped
    assert (len(logs), len(logs.users), logs.events["item"].nunique()) == (392_690, 4338, 3665)
    assert logs.item_text().loc["85123A"] == "WHITE HANGING HEART T-LIGHT HOLDER"
