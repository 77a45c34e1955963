"""What judging is made of: session lists, households, openings, regret, plain JSON."""

import numpy as np
import pytest
import torch

from encoders.state import EMPTY, calendar
from experiments.oracle import regret
from experiments.policies import household_names, opening, session_list
from experiments.prepare import ReplayTrips, events_of
from experiments.run_folder import plain
from simulators.base import Catalog, UserTable


def test_regret_is_what_the_best_allowed_slate_had_more() -> None:
    relevance = torch.tensor([[0.9, 0.5, 0.1, 0.3]])
    nothing, best = torch.tensor([[-1]]), torch.tensor([[0]])
    assert regret(relevance, nothing, torch.tensor([[2, 0]])).tolist() == pytest.approx([0.2])
    assert regret(relevance, nothing, torch.tensor([[0, 1]])).tolist() == [0.0]
    assert regret(relevance, best, torch.tensor([[2]])).tolist() == pytest.approx([0.4])
    assert regret(relevance, nothing, torch.tensor([[-1]])).tolist() == pytest.approx([0.9])


def test_a_session_list_serves_all_users_before_any_twice() -> None:
    users, episodes = session_list(10, 25, "cpu")
    assert sorted(users[:10].tolist()) == sorted(users[10:20].tolist()) == list(range(10))
    assert episodes.tolist() == [0] * 10 + [1] * 10 + [2] * 5
    assert len(set(zip(users.tolist(), episodes.tolist(), strict=True))) == 25
    assert torch.equal(session_list(10, 25, "cpu")[0], users)


def tiny_catalog(items: int) -> Catalog:
    zeros = torch.zeros(items)
    vectors = torch.eye(items)
    return Catalog(np.arange(items), [""] * items, vectors, zeros.long(), zeros, zeros, 3.0, [""])


def user_table(profile: float, days: float = 3.0) -> UserTable:
    past = torch.tensor([[2, 0], [1, EMPTY]])
    count, age = torch.tensor([[3.0, 1.0], [4.0, 0.0]]), torch.zeros(2, 2)
    start = torch.full((2,), days, dtype=torch.float64)
    return UserTable(np.array([70, 71]), torch.full((2, 1), profile), past, count, age, start)


def test_past_purchases_are_the_interactions() -> None:
    catalog = tiny_catalog(4)
    events = events_of(user_table(0.0), catalog)
    assert events.counts().toarray().tolist() == [[1, 0, 3, 0], [0, 4, 0, 0]]
    assert events.timed
    assert (events.time == 3.0).all()
    assert events.vectors is not None
    assert torch.equal(events.vectors, catalog.vectors)


def test_households_are_one_cluster_only_where_they_are_the_same() -> None:
    rows, first = torch.tensor([1, 0]), user_table(0.0)
    assert household_names(user_table(0.0), rows, first, 1).tolist() == ["71", "70"]
    assert household_names(user_table(5.0), rows, first, 1).tolist() == ["1/71", "1/70"]


def test_a_replayed_trip_begins_with_what_was_known_and_no_history() -> None:
    trips = ReplayTrips(user_table(5.0), torch.tensor([[0], [1]]))
    obs = opening(trips.users, places=3, behaviours=2)
    assert torch.equal(obs.past, trips.users.past)
    assert obs.history.tolist() == [[EMPTY] * 3] * 2
    assert obs.feedback.shape == (2, 3, 2)
    assert torch.equal(obs.context, calendar(trips.users.start))


def test_what_is_no_number_is_null_in_json() -> None:
    nested = {"a": [float("nan"), torch.tensor(1.5)], 2: (float("inf"),)}
    assert plain(nested) == {"a": [None, 1.5], "2": [None]}
