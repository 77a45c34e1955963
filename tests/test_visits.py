"""Lines and visits by hand: a basket is one visit, begun with its first line, an item once."""

import numpy as np
import pandas as pd
import pytest

from simulators.visits import lines_of, visits_of
from sources.logs import Logs

ITEMS, USERS = np.array(["a", "b"]), np.array(["u", "v"])


def receipts(basket: bool) -> Logs:
    rows = [
        ("v", "a", "2024-01-02 09:30", 1.0, 7),
        ("u", "b", "2024-01-02 10:10", 4.0, 3),
        ("u", "a", "2024-01-02 10:00", 2.0, 3),
        ("u", "a", "2024-01-02 10:05", 2.0, 3),
        ("u", "c", "2024-01-02 08:00", 9.0, 3),  # not of the catalogue
        ("u", "a", "2024-01-02 18:00", 2.0, 4),
        ("w", "a", "2024-01-02 18:00", 2.0, 5),  # nobody that was asked for
    ]
    events = pd.DataFrame(rows, columns=["user", "item", "time", "value", "basket"])
    events = events.assign(behaviour="buy", time=pd.to_datetime(events["time"]))
    return Logs.create(events if basket else events.drop(columns="basket"), name="till")


def test_lines_are_in_order_of_visits_and_hold_an_item_once():
    lines = lines_of(receipts(True), ITEMS, USERS)
    ten = 19_724 + 10 / 24
    assert lines.user.tolist() == [0, 0, 0, 1]
    assert lines.item.tolist() == [0, 1, 0, 0]
    assert lines.visit.tolist() == [0, 0, 1, 2]
    assert lines.time == pytest.approx([ten, ten, 19_724.75, 19_724 + 9.5 / 24], abs=1e-6)
    assert lines.value.tolist() == [2.0, 4.0, 2.0, 1.0]
    assert np.isnan(lines.price).all()


def test_visits_are_as_large_as_their_distinct_items():
    visits = visits_of(lines_of(receipts(True), ITEMS, USERS))
    assert visits.user.tolist() == [0, 0, 1]
    assert visits.size.tolist() == [2, 1, 1]
    assert visits.time[0] == pytest.approx(19_724 + 10 / 24, abs=1e-6)


def test_without_baskets_a_day_is_a_visit():
    visits = visits_of(lines_of(receipts(False), ITEMS, USERS))
    assert visits.user.tolist() == [0, 1]
    assert visits.size.tolist() == [2, 1]


def test_nobody_who_was_asked_for_bought_anything():
    visits = visits_of(lines_of(receipts(True), ITEMS, np.array(["x"])))
    assert len(visits) == 0
