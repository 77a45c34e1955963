"""Claims about `Logs`: what it refuses, what it cleans, and that its splits leak nothing."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sources.cache import cached
from sources.logs import Logs, Roles

NOW = "2026-01-01"


def shop(**columns: object) -> pd.DataFrame:
    """Six purchases of three users, two of which share a moment."""
    table = {
        "user": [1, 1, 1, 2, 2, 3],
        "item": ["a", "b", "c", "a", "b", "a"],
        "time": [
            "2025-01-05",
            "2025-01-05",
            "2025-01-01",
            "2025-01-02",
            "2025-01-08",
            "2025-01-11",
        ],
        "behaviour": "buy",
        "value": 1.0,
    }
    return pd.DataFrame(table | columns)


def create(events: pd.DataFrame, *args: object, **kwargs: object) -> Logs:
    return Logs.create(events, *args, now=NOW, **kwargs)


def test_events_come_out_sorted_and_typed_and_the_table_given_is_not_touched():
    given_table = shop()
    logs = create(given_table)
    assert logs.events["item"].tolist() == ["c", "a", "a", "b", "b", "a"]  # by time, then as given
    assert str(logs.events["time"].dtype) == "datetime64[ns]"
    assert logs.items["item"].tolist() == ["c", "a", "b"]
    assert logs.users["user"].tolist() == [1, 2, 3]
    assert given_table.equals(shop())


@pytest.mark.parametrize("column", ["user", "item", "time", "behaviour", "value"])
def test_a_missing_column_is_named_with_those_there(column):
    with pytest.raises(ValueError, match=f"events lacks the column '{column}'.*it has.*rename"):
        create(shop().drop(columns=column))


def test_a_misspelt_column_gets_a_suggestion():
    with pytest.raises(ValueError, match="Did you mean 'behavior'"):
        create(shop().rename(columns={"behaviour": "behavior"}))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"time": ["2025-01-05"] * 4 + ["soon", "later"]},
            r"2 of 6 rows \(row 4: 'soon'.*time_format",
        ),
        ({"time": [1, 2, 3, 4, 5, 6]}, "must be dates, got numbers"),
        ({"time": ["2025-01-05"] * 5 + ["2031-01-01"]}, "after now.*1 of 6 rows.*row 5"),
        ({"user": [1, 1, None, 2, 2, 3]}, "user is missing in 1 of 6 rows.*row 2"),
        ({"user": [1, 1, 1.5, 2, 2, 3]}, "whole numbers or strings"),
        ({"item": ["a", "b", None, "a", "b", "a"]}, "item is missing in 1 of 6 rows"),
        ({"item": ["a", "b", 3, "a", "b", "a"]}, "make them one type"),
        ({"value": [1, 1, 1, np.nan, 1, 1]}, "value must be a finite number.*row 3: nan"),
        ({"value": [1, 1, 1, np.inf, 1, 1]}, "value must be a finite number.*row 3: inf"),
        ({"value": ["1", "1", "x", "1", "1", "1"]}, "value must be numbers.*row 2: 'x'"),
        ({"quantity": [1, 1, 1, np.nan, 1, 1]}, "quantity must be a finite"),
        ({"price": [1, 0, 1, 1, -2, 1]}, "price paid per unit above 0.*2 of 6 rows.*row 1: 0.0"),
        ({"discount": [0, 0, 0, 0, 0, 1.2]}, "discount must be a share"),
        ({"propensity": [0.0, 1, 1, 1, 1, 1]}, r"in \(0, 1\].*row 0: 0.0"),
        ({"propensity": [1.1, 1, 1, 1, 1, 1]}, r"in \(0, 1\].*row 0: 1.1"),
        ({"position": [-1, 0, 0, 0, 0, 0]}, "position must be the place"),
        ({"position": [0.5, 0, 0, 0, 0, 0]}, "position must be the place"),
        ({"shown": [2, 0, 0, 0, 0, 0]}, "shown must be true or false"),
        ({"behaviour": ["buy"] * 5 + [None]}, "behaviour is missing"),
        ({"behaviour": "click"}, r"purchases \['buy'\] never occur.*click"),
    ],
)
def test_bad_events_are_refused_with_count_row_and_remedy(columns, message):
    with pytest.raises(ValueError, match=message):
        create(shop(**columns))


def test_no_events_are_refused():
    with pytest.raises(ValueError, match="at least one row"):
        create(shop().iloc[:0])


def test_without_now_the_real_clock_judges_the_future():
    tomorrow = pd.Timestamp.now("UTC").tz_localize(None) + pd.Timedelta(days=2)
    with pytest.raises(ValueError, match="after now"):
        Logs.create(shop(time=["2025-01-05"] * 5 + [str(tomorrow)]))


def test_a_price_may_be_unknown():
    logs = create(shop(price=[1, np.nan, 1, 1, 1, 1]))
    assert logs.events["price"].isna().sum() == 1


def test_exact_duplicates_go_but_another_basket_or_time_is_another_purchase():
    twice = pd.concat([shop(), shop().iloc[[0]]], ignore_index=True)
    assert len(create(twice)) == 6
    assert "1 exact duplicate event rows dropped" in create(twice).notes
    assert len(create(twice.assign(basket=range(7)))) == 7
    assert len(create(twice.assign(time=[*shop()["time"], "2025-01-06"]))) == 7


def test_floats_that_were_integers_before_a_missing_value_become_integers_again():
    assert create(shop(user=[1.0, 1, 1, 2, 2, 3])).events["user"].dtype == "int64"


def test_zones_are_turned_to_utc():
    logs = create(shop(time=["2025-01-05T12:00:00+02:00", "2025-01-05T12:00:00Z"] * 3))
    assert logs.events["time"].unique().tolist() == [
        pd.Timestamp("2025-01-05 10:00"),
        pd.Timestamp("2025-01-05 12:00"),
    ]


def test_items_without_text_and_users_with_one_event_are_kept_and_noted():
    items = pd.DataFrame({"item": ["a", "b", "c", "d"], "title": ["Tea", None, " ", "Mug"]})
    logs = create(shop(), items, roles=Roles(item_text=("title",)))
    assert len(logs.items) == 4
    assert logs.notes == (
        "2 items without text",
        "1 items without events",
        "1 users with one event",
    )


def test_declared_texts_are_joined_and_missing_ones_skipped():
    items = pd.DataFrame(
        {"item": ["a", "b", "c"], "x": ["Tea", None, None], "y": ["green", "hot", None]}
    )
    text = create(shop(), items, roles=Roles(item_text=("x", "y"))).item_text()
    assert text.to_dict() == {"a": "Tea. green", "b": "hot", "c": ""}


def test_items_and_users_tables_are_judged():
    heavy = pd.DataFrame({"item": ["a", "b", "c"], "grams": [1, np.inf, np.nan]})
    with pytest.raises(ValueError, match=r"items lacks the column 'title'.*as text"):
        create(shop(), roles=Roles(item_text=("title",)))
    with pytest.raises(ValueError, match=r"users lacks the column 'age'.*roles declare"):
        create(shop(), roles=Roles(user_number=("age",)))
    with pytest.raises(ValueError, match=r"lacks: 1 of 6 rows.*row 0: 'c'"):
        create(shop(), pd.DataFrame({"item": ["a", "b"]}))
    with pytest.raises(ValueError, match="make the ids one type"):
        create(shop(), pd.DataFrame({"item": [1, 2, 3]}))
    with pytest.raises(ValueError, match=r"one row per item.*row 3: 'a'"):
        create(shop(), pd.DataFrame({"item": ["a", "b", "c", "a"]}))
    with pytest.raises(ValueError, match=r"items.grams must be finite.*row 1: inf"):
        create(shop(), heavy, roles=Roles(item_number=("grams",)))
    with pytest.raises(ValueError, match=r"items.price must be above 0"):
        create(shop(), pd.DataFrame({"item": ["a", "b", "c"], "price": [1.0, 0.0, np.nan]}))
    with pytest.raises(ValueError, match="relations lacks the column 'kind'"):
        create(shop(), relations=pd.DataFrame({"source": [1], "target": [2]}))


def test_users_that_the_table_lacks_are_added_without_attributes():
    logs = create(shop(), users=pd.DataFrame({"user": [9, 1], "age": [30.0, 40.0]}))
    assert logs.users["user"].tolist() == [9, 1, 2, 3]
    assert logs.users["age"].isna().tolist() == [False, False, True, True]


def test_cut_is_by_span_or_by_events():
    logs = create(shop())
    assert logs.cut(0.5) == pd.Timestamp("2025-01-06")  # the first is the 1st, the last the 11th
    assert logs.cut(0.5, by="events") == pd.Timestamp("2025-01-05")
    for share in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match=r"inside \(0, 1\)"):
            logs.cut(share)


def test_before_and_since_part_events_and_timed_relations_without_overlap():
    ends = {"source": [1, 2, 3], "target": [7, 7, 7], "kind": "campaign"}
    relations = pd.DataFrame(ends | {"time": pd.to_datetime(["2025-01-01", "2025-01-05", None])})
    logs = create(shop(), relations=relations)
    early, late = logs.before("2025-01-05"), logs.since("2025-01-05")
    assert (len(early), len(late)) == (2, 4)
    assert early.relations["source"].tolist() == [1, 3]  # undated relations are on both sides
    assert late.relations["source"].tolist() == [2, 3]
    assert early.users.equals(logs.users)
    assert early.items.equals(logs.items)


def test_only_users_and_only_items_keep_those_and_refuse_strangers():
    logs = create(shop())
    assert logs.only_users([3, 1]).events["user"].unique().tolist() == [1, 3]
    assert logs.only_users([3, 1]).users["user"].tolist() == [1, 3]
    assert logs.only_items(["b"]).events["item"].unique().tolist() == ["b"]
    with pytest.raises(ValueError, match="1 of 2 user ids are not in users"):
        logs.only_users([1, 77])
    with pytest.raises(ValueError, match=r"not in items.*'apple'"):
        logs.only_items(["a", "apple"])


def test_split_users_shares_no_user_and_follows_its_seed():
    logs = create(shop())
    left, right = logs.split_users(0.34, seed=0)
    assert set(left.users["user"]) | set(right.users["user"]) == {1, 2, 3}
    assert len(left.users) == 1
    assert set(left.events["user"]).isdisjoint(right.events["user"])
    assert len(left) + len(right) == 6
    assert {int(logs.split_users(0.34, seed=s)[0].users["user"].iloc[0]) for s in range(20)} == {
        1,
        2,
        3,
    }
    with pytest.raises(ValueError, match="without users"):
        logs.split_users(0.01)


def test_temporal_split_by_span_never_trains_on_the_future():
    train, test = create(shop()).temporal_split(0.5)
    assert train.events["time"].max() < test.events["time"].min()
    assert (len(train), len(test)) == (4, 2)


def test_an_empty_side_of_a_split_is_refused():
    one_moment = create(shop(time=["2025-01-05"] * 6))
    with pytest.raises(ValueError, match=r"all 6 events carry the time 2025-01-05 .*no earlier"):
        one_moment.temporal_split(0.5)
    with pytest.raises(ValueError, match="leaves no events in train"):
        create(shop()).temporal_split(0.1, by="events")
    singles = create(shop(user=[1, 2, 3, 4, 5, 6]))
    with pytest.raises(ValueError, match="leaves no events in test"):
        singles.leave_last_out()
    with pytest.raises(ValueError, match="leaves no events in test"):
        singles.temporal_split(0.5, by="user")


def test_per_user_split_gives_each_user_their_share_in_time_order():
    n = 100
    days = pd.Timestamp("2025-01-01") + pd.to_timedelta(np.arange(n)[::-1], unit="D")
    table = pd.DataFrame(
        {"user": np.arange(n) % 2, "item": range(n), "time": days, "behaviour": "buy", "value": 1.0}
    )
    train, test = create(table).temporal_split(0.58, by="user")
    assert train.events["user"].value_counts().to_dict() == {0: 29, 1: 29}  # .58 * 50 is 28.999...
    for user in (0, 1):
        mine, later = (s.events.loc[s.events["user"] == user, "time"] for s in (train, test))
        assert mine.max() < later.min()


def tied(items: list[int]) -> Logs:
    """One user who had all `items` at one moment."""
    table = {"user": 1, "item": items, "time": "2025-01-01", "behaviour": "buy", "value": 1.0}
    return create(pd.DataFrame(table))


def test_ties_are_drawn_and_not_decided_by_item_id():
    logs = tied([1, 2, 3, 4])
    last = [int(logs.leave_last_out(seed=s)[1].events["item"].iloc[0]) for s in range(200)]
    assert np.bincount(last, minlength=5)[1:].min() > 25  # each about a quarter
    again = [int(logs.leave_last_out(seed=s)[1].events["item"].iloc[0]) for s in range(20)]
    assert last[:20] == again


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)), st.integers(0, 99))
def test_renaming_items_changes_no_split_and_no_top_items(names, seed):
    events = shop(item=[0, 1, 2, 3, 4, 5], user=1, time="2025-01-05")
    renamed = events.assign(item=[names[i] for i in events["item"]])
    a, b = create(events), create(renamed)
    for split in (
        lambda logs: logs.leave_last_out(seed),
        lambda logs: logs.temporal_split(0.5, by="user", seed=seed),
    ):
        test = split(a)[1].events["item"]
        assert [names[i] for i in test] == split(b)[1].events["item"].tolist()
    assert [names[i] for i in a.top_items(3, seed)] == b.top_items(3, seed).tolist()


def test_leave_last_out_tests_each_users_last_and_trains_on_singles():
    train, test = create(shop()).leave_last_out()
    assert test.events["user"].tolist() == [1, 2]
    assert test.events["time"].tolist() == [pd.Timestamp("2025-01-05"), pd.Timestamp("2025-01-08")]
    assert 3 in train.events["user"].tolist()
    assert len(train) == 4


def test_top_items_count_purchases_and_draw_ties():
    views = shop(
        behaviour=["buy", "buy", "buy", "view", "buy", "view"], item=["a", "b", "c", "a", "b", "a"]
    )
    logs = create(views)
    assert logs.top_items(1).tolist() == ["b"]  # a has three lines, one of them a purchase
    assert {logs.top_items(2, seed=s)[1] for s in range(20)} == {"a", "c"}
    assert len(logs.top_items(99)) == 3
    assert create(views, purchases=()).top_items(1).tolist() == ["a"]


def test_a_saved_log_comes_back_equal(tmp_path):
    users = pd.DataFrame({"user": [1, 2, 3], "age": pd.Categorical(["old", "young", None])})
    users["age"] = users["age"].cat.set_categories(["young", "old"], ordered=True)
    relations = pd.DataFrame({"source": [1], "target": [2], "kind": "friend"})
    logs = create(shop(basket=range(6)), users=users, relations=relations, name="s",
                  roles=Roles(user_category=("age",)))  # fmt: skip
    logs.save(tmp_path)
    back = Logs.load(tmp_path)
    assert back.fingerprint() == logs.fingerprint()
    assert back.events.dtypes.equals(logs.events.dtypes)
    assert back.users["age"].cat.categories.tolist() == ["young", "old"]
    assert (back.roles, back.notes, back.name, back.purchases) == (
        logs.roles,
        logs.notes,
        "s",
        ("buy",),
    )
    create(shop()).save(tmp_path)
    assert Logs.load(tmp_path).relations is None  # nothing of the log that was there before
    with pytest.raises(ValueError, match="holds no saved log"):
        Logs.load(tmp_path / "elsewhere")


def test_any_change_of_content_changes_the_fingerprint():
    base = create(shop())
    others = [
        create(shop(value=[1, 1, 1, 1, 1, 2.0])),
        create(shop(item=["a", "b", "c", "a", "b", "b"])),
        create(shop(), pd.DataFrame({"item": ["c", "a", "b"], "title": "x"})),
        create(
            shop(),
            pd.DataFrame({"item": ["c", "a", "b"], "title": "x"}),
            roles=Roles(item_text=("title",)),
        ),
        base.before("2025-01-11"),
    ]
    assert len({base.fingerprint(), *(o.fingerprint() for o in others)}) == 6
    assert base.fingerprint() == create(shop()).fingerprint()


def test_a_half_written_log_is_rebuilt(tmp_path, capsys):
    logs = create(shop())
    for _ in range(2):
        back = cached("log", lambda: logs, Logs.save, Logs.load, folder=tmp_path)
        assert back.fingerprint() == logs.fingerprint()
        (entry,) = tmp_path.iterdir()
        events = entry / "events.parquet"
        events.write_bytes(events.read_bytes()[:100])
    assert "not readable" in capsys.readouterr().err
