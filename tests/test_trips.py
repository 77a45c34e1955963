"""Trips know what was bought before them, counted by hand, and nothing of what comes after."""

from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import torch
from synthetic import after_cut_replaced

from encoders.state import EMPTY, PAST
from simulators.trips import HABITS, Trips, trips_from_logs
from sources.logs import Logs, Roles

IDS = np.array(["milk", "eggs", "beer"])
DAY0 = pd.Timestamp("2024-03-01")
BEFORE = [f.name for f in fields(Trips) if f.name not in ("pointer", "bought")]


def log(rows, users=None, roles=None, **columns):
    """Rows of (user, item, day, basket, value) as a log."""
    events = pd.DataFrame(rows, columns=["user", "item", "day", "basket", "value"])
    events["time"] = DAY0 + pd.to_timedelta(events.pop("day"), unit="D")
    events["behaviour"] = "buy"
    return Logs.create(events.assign(**columns), users=users, roles=roles)


SIX = [
    (7, "milk", 0.0, "a", 2.0),
    (7, "milk", 0.0, "a", 3.0),  # twice in a basket counts once
    (7, "eggs", 4.0, "b", 4.0),
    (7, "soap", 6.0, "c", 9.0),  # not in the catalogue, yet a trip
    (7, "milk", 10.0, "d", 1.0),
    (3, "beer", 5.0, "e", 6.0),
]


@pytest.fixture(scope="module")
def six():
    return trips_from_logs(log(SIX), IDS)


def test_a_trip_knows_what_was_bought_before_it_counted_by_hand(six):
    day = six.time - DAY0.timestamp() / 86_400
    assert six.user.tolist() == [3, 7, 7, 7, 7]  # ordered by household and time
    np.testing.assert_allclose(day, [5, 0, 4, 6, 10])
    assert six.past[:, :3].tolist() == [
        [EMPTY] * 3,
        [EMPTY] * 3,
        [0, EMPTY, EMPTY],
        [1, 0, EMPTY],  # the latest first
        [1, 0, EMPTY],
    ]
    assert six.count[:, :2].tolist() == [[0, 0], [0, 0], [1, 0], [1, 1], [1, 1]]
    np.testing.assert_allclose(six.age[:, :2], [[0, 0], [0, 0], [4, 0], [2, 6], [6, 10]], rtol=1e-6)
    np.testing.assert_allclose(six.gap, [np.nan, np.nan, 4, 2, 4], rtol=1e-6)
    assert six.pointer.tolist() == [0, 1, 2, 3, 3, 4]
    assert six.bought.tolist() == [2, 0, 1, 0]


def test_habits_of_a_household_come_from_its_earlier_trips_by_hand(six):
    last = six.profile[4, :HABITS]  # 3 trips, 2 catalogue items and 18 of money in 10 days before
    np.testing.assert_allclose(last, np.log([3 / 4, 4 / 17, 17, 19 / 4]), rtol=1e-6)
    newcomer = np.log([1, 1 / 7, 7, 1])
    np.testing.assert_allclose(six.profile[0, :HABITS], newcomer, rtol=1e-6, atol=1e-7)


def test_counts_grow_by_one_a_trip():
    rows = [(1, "milk", float(d), f"b{d}", 1.0) for d in range(4)]
    trips = trips_from_logs(log(rows), IDS)
    assert trips.count[:, 0].tolist() == [0, 1, 2, 3]
    assert trips.age[:, 0].tolist() == [0, 1, 1, 1]


def test_without_baskets_a_trip_is_a_user_and_a_day():
    rows = [(1, "milk", 0.1, "", 1.0), (1, "eggs", 0.9, "", 1.0), (1, "milk", 1.1, "", 1.0)]
    logs = log(rows)
    logs = Logs.create(logs.events.drop(columns="basket"))
    trips = trips_from_logs(logs, IDS)
    assert np.diff(trips.pointer).tolist() == [2, 1]
    np.testing.assert_allclose(trips.gap[1], 1.0, rtol=1e-5)


def test_since_keeps_late_trips_with_all_they_knew(six):
    late = trips_from_logs(log(SIX), IDS, since=float(six.time[3]))  # the 6th day is kept
    expected = six[six.time >= six.time[3]]
    assert len(late) == 2
    for f in fields(Trips):
        np.testing.assert_array_equal(getattr(late, f.name), getattr(expected, f.name))


def test_of_a_long_past_the_most_recent_items_are_kept():
    ids = np.array([f"i{i:03d}" for i in range(PAST + 44)])
    rows = [(1, ids[i], float(i), f"b{i}", 1.0) for i in range(len(ids))]
    last = trips_from_logs(log(rows), ids)[np.array([-1])]
    newest = np.arange(len(ids) - 2, len(ids) - 2 - PAST, -1)
    assert last.past[0].tolist() == newest.tolist()
    assert last.age[0].tolist() == list(range(1, PAST + 1))


def test_other_behaviours_are_neither_trips_nor_purchases(six):
    seen = log([*SIX, (7, "beer", 2.0, "z", 0.0)])
    events = seen.events.assign(behaviour=np.where(seen.events["basket"] == "z", "view", "buy"))
    trips = trips_from_logs(Logs.create(events), IDS)
    np.testing.assert_array_equal(trips.past, six.past)
    with pytest.raises(ValueError, match="no purchases"):
        trips_from_logs(Logs.create(events).since("2024-03-20"), IDS)


@pytest.mark.parametrize(
    "rows", [np.array([4, 0, 2]), np.array([True, False, True, False, True]), np.array([], int)]
)
def test_rows_are_chosen_by_number_or_by_truth(six, rows):
    some = six[rows]
    wanted = np.arange(5)[rows]
    assert some.user.tolist() == six.user[wanted].tolist()
    sizes, values = [1, 1, 1, 0, 1], [[2], [0], [1], [], [0]]
    assert np.diff(some.pointer).tolist() == [sizes[r] for r in wanted]
    assert some.bought.tolist() == [v for r in wanted for v in values[r]]


def test_padded_is_one_row_a_trip():
    rows = [(1, "milk", 0.0, "a", 1.0), (1, "beer", 0.0, "a", 1.0), (1, "soap", 1.0, "b", 1.0)]
    assert trips_from_logs(log(rows), IDS).padded().tolist() == [[0, 2], [EMPTY, EMPTY]]


def test_users_of_trips_are_a_table_of_the_right_types(six):
    table = six.users()
    assert len(table) == 5
    assert table.past.dtype == torch.int64
    assert table.start.dtype == torch.float64
    assert table.past[4, :2].tolist() == [1, 0]


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_what_happens_at_or_after_a_trip_changes_nothing_it_knows(shop, cut):
    moment = shop.cut(cut)
    ids = shop.top_items(40)
    whole = trips_from_logs(shop, ids)
    day = moment.timestamp() / 86_400
    values = after_cut_replaced(shop, moment)
    values.events.loc[values.events["time"] >= moment, "value"] *= 31.7
    for other in (values, shop.before(moment)):
        changed = trips_from_logs(other, ids)
        known, same = whole[whole.time < day], changed[changed.time < day]
        assert 500 < len(known) < len(whole)
        for name in BEFORE:
            np.testing.assert_array_equal(getattr(known, name), getattr(same, name), err_msg=name)
        np.testing.assert_array_equal(known.padded(), same.padded())


def test_the_trip_itself_is_not_among_what_it_knows(shop):
    """A trip's own basket replaced by another leaves what is known before it as it was."""
    ids = shop.top_items(60)
    whole = trips_from_logs(shop, ids)
    last = int(np.nonzero(whole.user[:-1] != whole.user[1:])[0][0])  # of the first household
    time = whole.time[last]
    events = shop.events.copy()
    day = events["time"].to_numpy().astype("datetime64[us]").astype(np.int64) / 86_400e6
    own = (events["user"] == whole.user[last]) & (day == time)
    assert own.any()
    events.loc[own, ["item", "value"]] = ["i00", 999.0]
    other = trips_from_logs(Logs.create(events, shop.items, shop.users, roles=shop.roles), ids)
    for name in BEFORE:
        np.testing.assert_array_equal(
            getattr(whole, name)[: last + 1], getattr(other, name)[: last + 1], err_msg=name
        )


def test_numbers_of_users_are_standardised_and_missing_ones_are_marked():
    users = pd.DataFrame({"user": [3, 7, 9], "age": [30.0, 50.0, np.nan]})
    trips = trips_from_logs(
        log([*SIX, (9, "milk", 1.0, "f", 1.0)], users, Roles(user_number=("age",))), IDS
    )
    first = trips.profile[np.unique(trips.user, return_index=True)[1], HABITS:]
    assert first.tolist() == [[-1, 1], [1, 1], [0, 0]]


def test_categories_of_users_become_a_column_a_level():
    users = pd.DataFrame({"user": [3, 7], "town": ["north", "south"]})
    trips = trips_from_logs(log(SIX, users, Roles(user_category=("town",))), IDS)
    assert trips.profile[[0, 1], HABITS:].tolist() == [[1, -1, 1], [-1, 1, 1]]


def test_a_log_without_attributes_of_users_has_the_habits_and_a_zero(six):
    assert six.profile.shape[1] == HABITS + 1
    assert (six.profile[:, HABITS] == 0).all()


def test_refunds_beyond_the_spend_leave_numbers_and_other_households_alone():
    rows = [(7, "milk", 0.0, "a", -50.0), (7, "eggs", 2.0, "b", 1.0), *SIX[2:]]
    trips = trips_from_logs(log(rows), IDS)
    assert np.isfinite(trips.profile).all()


def test_a_fortune_spent_by_one_household_does_not_round_what_another_spent():
    rows = [(1, "milk", 9.0, "z", 1e17), (2, "milk", 0.0, "a", 3.0), (2, "eggs", 2.0, "b", 1.0)]
    last = trips_from_logs(log(rows), IDS).profile[-1]
    assert last[3] == pytest.approx(np.log(4 / 2))
