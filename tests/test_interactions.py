"""Interactions of logs and counts, histories against loops, ties by seed, bad input by name."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from agents.interactions import (
    Interactions,
    history,
    or_popular,
    owned,
    popular_ranks,
    spread,
    weighed,
)
from encoders.state import EMPTY, calendar
from sources.logs import Logs


def log(rows, **changed):
    """(user, item, day, value) rows as a log of purchases."""
    user, item, day, value = zip(*rows, strict=True)
    time = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(day, unit="D")
    frame = {"user": user, "item": item, "time": time, "behaviour": "buy", "value": value}
    return Logs.create(pd.DataFrame(frame | changed))


def random_events(seed, users=5, items=6, most=25):
    """Events of some users, several at one time."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, most))
    user = np.sort(rng.integers(0, users, n))
    time = rng.integers(0, 8, n) + 0.5
    order = np.lexsort((time, user))
    item = rng.integers(0, items, n)
    return Interactions(user[order], item, time[order], np.ones(n), users, items)


def test_interactions_of_a_log_are_its_purchases_by_user_and_time():
    rows = [("b", "y", 3.25, 2.0), ("a", "x", 2.0, 1.0), ("b", "x", 1.0, 4.0), ("a", "z", 5.0, 3.0)]
    looks = pd.Categorical(["buy", "buy", "buy", "view"])
    names = {"items": np.array(["x", "y", "z"]), "users": np.array(["a", "b"])}
    got = Interactions.of(log(rows, behaviour=looks), **names)
    first = pd.Timestamp("2024-01-01").timestamp() / 86_400
    assert got.user.tolist() == [0, 1, 1]
    assert got.item.tolist() == [0, 0, 1]
    assert got.time.tolist() == [first + 2, first + 1, first + 3.25]
    assert got.value.tolist() == [1.0, 4.0, 2.0]
    assert got.timed


def test_rows_of_items_and_users_are_those_given_and_others_are_left_out():
    rows = [("b", "y", 3.0, 1.0), ("a", "x", 2.0, 1.0), ("b", "x", 1.0, 1.0)]
    got = Interactions.of(log(rows), items=np.array(["y", "n", "x"]), users=np.array(["b"]))
    assert (got.num_users, got.num_items) == (1, 3)
    assert got.item.tolist() == [2, 0]
    none = Interactions.of(log(rows), items=np.array(["n"]))
    assert len(none.user) == 0
    assert none.histories().past.tolist() == [[EMPTY], [EMPTY]]


def test_events_of_one_moment_are_ordered_by_seed_and_not_by_id():
    tied = log([("a", f"i{j}", 1.0, 1.0) for j in range(9)])
    orders = [Interactions.of(tied, seed=seed).item.tolist() for seed in (0, 0, 1, 2)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(9)) and order != sorted(order) for order in orders)


def test_counts_come_back_as_they_were_and_have_no_times():
    counts = csr_matrix(np.array([[0.0, 2, 1], [0, 0, 0], [3, 0, 0]]))
    got = Interactions.of(counts)
    assert (got.counts() != counts).nnz == 0
    assert got.popularity().tolist() == [3, 2, 1]
    assert not got.timed
    obs = got.histories()
    assert spread(obs.past, obs.past_count, 3).tolist() == counts.toarray().tolist()
    assert (obs.past_age == 0).all()


def test_counts_named_twice_in_a_sparse_matrix_are_summed():
    twice = csr_matrix((np.array([1.0, 2.0]), (np.array([0, 0]), np.array([1, 1]))), shape=(1, 2))
    assert Interactions.of(twice).popularity().tolist() == [0, 3]


def test_interactions_of_interactions_are_the_same_with_vectors_if_given():
    one = random_events(0)
    assert Interactions.of(one) is one
    vectors = torch.ones(6, 2)
    assert Interactions.of(one, vectors=vectors).vectors is vectors
    assert one.vectors is None


@given(st.integers(0, 10_000), st.sampled_from([None, 1, 3, 50]), st.booleans())
def test_histories_are_those_of_a_loop_over_users(seed, width, asked):
    events = random_events(seed)
    rng = np.random.default_rng(seed)
    users = rng.integers(0, 5, 7) if asked else None
    now = rng.integers(4, 20, 7) + 0.25 if asked else None
    obs = events.histories(users, now, width)
    assert len(obs) == (7 if asked else 5)
    for b, user in enumerate(users if asked else range(5)):
        rows = [i for i in range(len(events.user)) if events.user[i] == user]
        last, often = {}, {}
        for i in rows:
            last[events.item[i]] = i
            often[events.item[i]] = often.get(events.item[i], 0) + 1
        items = sorted(last, key=lambda item: -last[item])[:width]
        moment = now[b] if asked else events.time[rows[-1]] if rows else 0.0
        real = obs.past[b] != EMPTY
        assert obs.past[b][real].tolist() == items
        assert not real[len(items) :].any()
        assert obs.past_count[b][real].tolist() == [often[item] for item in items]
        ages = [max(0.0, moment - events.time[last[item]]) for item in items]
        assert obs.past_age[b][real].tolist() == ages
        assert (obs.past_count[b][~real] == 0).all()
        assert (obs.past_age[b][~real] == 0).all()
        expected = calendar(torch.tensor([moment], dtype=torch.float64))[0]
        assert torch.equal(obs.context[b], expected)


def test_a_width_keeps_the_latest_and_never_widens():
    events = Interactions(
        np.zeros(4, int), np.array([2, 0, 1, 0]), np.arange(4.0), np.ones(4), 1, 3
    )
    assert events.histories(width=2).past.tolist() == [[0, 1]]
    assert events.histories(width=9).past.tolist() == [[0, 1, 2]]
    assert events.histories(width=9).past_count.tolist() == [[2.0, 1.0, 1.0]]


def test_what_was_chosen_in_the_session_stands_before_the_past():
    obs = history([[4, 2], [1]], count=[[3, 1], [2]], age=[[5.0, 9.0], [7.0]])
    shown = torch.tensor([[0, 4, 3], [2, 0, EMPTY]])
    chosen = torch.tensor([[[1.0], [1.0], [0.0]], [[0.0], [0.0], [1.0]]])
    items, count, age = owned(replace(obs, history=shown, feedback=chosen), 5)
    assert items.tolist() == [[4, 0, EMPTY, 2], [EMPTY, EMPTY, 1, EMPTY]]
    assert count.tolist() == [[4, 1, 0, 1], [0, 0, 2, 0]]
    assert age.tolist() == [[0, 0, 5, 9], [0, 0, 7, 0]]
    assert spread(items, count, 5).tolist() == [[1, 0, 1, 0, 4], [0, 2, 0, 0, 0]]


@pytest.mark.parametrize("item", [5, -2])
def test_an_item_that_the_catalogue_does_not_have_is_an_error(item):
    with pytest.raises(ValueError, match=rf"0\.\.4 or -1 \(none\), got {item} in row 1"):
        owned(history([[1], [2, item]]), 5)
    obs = history([[1], [2]])
    shown, chosen = torch.tensor([[0], [item]]), torch.ones(2, 1, 1)
    with pytest.raises(ValueError, match=f"got {item} in row 1"):
        owned(replace(obs, history=shown, feedback=chosen), 5)


def test_counts_are_weighed_so_that_once_is_one():
    counts = csr_matrix(np.array([[0.0, 1, 3]]))
    for weight, worth in (("binary", [0, 1, 1]), ("log", [0, 1, 2]), ("count", [0, 1, 3])):
        assert weighed(counts, weight).toarray().tolist() == [worth]
        assert weighed(torch.tensor([0.0, 1, 3]), weight).tolist() == pytest.approx(worth)
    with pytest.raises(ValueError, match="one of binary, log, count, got 'tfidf'"):
        weighed(counts, "tfidf")


def test_popular_ranks_follow_events_and_equal_ones_the_seed():
    past = Interactions.of(csr_matrix(np.array([[1.0, 1, 5, 1, 1, 1]])))
    ranks = [popular_ranks(past, seed) for seed in (0, 0, 1, 2)]
    assert torch.equal(ranks[0], ranks[1])
    assert len({tuple(r.tolist()) for r in ranks}) == 3
    assert all(r[2] == r.max() for r in ranks)
    assert sorted(ranks[0].tolist()) == pytest.approx([i / 6 for i in range(6)])
    scores = or_popular(torch.zeros(2, 6), torch.tensor([[EMPTY], [3]]), ranks[0])
    assert torch.equal(scores, torch.stack([ranks[0], torch.zeros(6)]))


def test_what_cannot_be_meant_is_refused():
    good = random_events(1)
    with pytest.raises(ValueError, match="must be Interactions, Logs or a scipy sparse matrix"):
        Interactions.of(np.ones((2, 2)))
    with pytest.raises(ValueError, match="got list"):
        Interactions.of([[1, 2]])
    with pytest.raises(ValueError, match=r"holds whole counts, got 2\.5: ratings come with Logs"):
        Interactions.of(csr_matrix(np.array([[2.5, 1.0]])))
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="finite and at least 0"):
            Interactions.of(csr_matrix(np.array([[bad]])))
    with pytest.raises(ValueError, match=r"user must be rows in 0\.\.1, got 0\.\.4"):
        replace(good, num_users=2, user=np.sort(np.arange(len(good.user)) % 5))
    with pytest.raises(ValueError, match=r"item must be rows in 0\.\.1"):
        replace(good, num_items=2)
    with pytest.raises(ValueError, match="rows must be sorted by user"):
        replace(good, user=good.user[::-1])
    value = np.ones(len(good.user))
    value[2] = np.nan
    with pytest.raises(ValueError, match="value must be finite, got nan in row 2"):
        replace(good, value=value)
    with pytest.raises(ValueError, match="a row for each of 6 items, got 5"):
        replace(good, vectors=torch.zeros(5, 2))


def test_a_log_with_a_value_that_is_no_number_is_refused():
    rows = [("a", "x", 1.0, 3.0), ("a", "y", 2.0, np.nan)]
    with pytest.raises(ValueError, match="value"):
        Interactions.of(log(rows))
