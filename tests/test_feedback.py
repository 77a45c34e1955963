"""Feedback may come late and in any order, once for each decision, and learns the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.bootstrapped import Bootstrapped
from agents.epsilon_greedy import EpsilonGreedy
from agents.feedback import Pending, check_slots
from agents.lints import LinTS
from agents.linucb import LinUCB
from agents.logistic_ts import LogisticTS
from agents.neural_linear import NeuralLinear
from agents.testing import synthetic_observation, synthetic_spec


def rows(first, count):
    return {"x": torch.arange(first, first + count, dtype=torch.float32)[:, None]}


def test_rows_come_back_under_their_ids_in_the_order_asked():
    pending = Pending(10)
    assert pending.add(rows(0, 3)).tolist() == [0, 1, 2]
    assert pending.add(rows(3, 3)).tolist() == [3, 4, 5]
    taken, here = pending.take(torch.tensor([4, 0, 5]))
    assert taken["x"][:, 0].tolist() == [4.0, 0.0, 5.0]
    assert here.all()
    assert len(pending) == 3


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1], "decision 1 has had its feedback"),
        ([9], r"decision 9 is unknown: ids are 0\.\.2"),
        ([-1], "decision -1 is unknown"),
        ([2, 2], "decision 2 is given twice in one call"),
    ],
)
def test_unknown_ids_and_second_feedback_are_refused(ids, words):
    pending = Pending(10)
    pending.add(rows(0, 3))
    pending.take(torch.tensor([1]))
    with pytest.raises(ValueError, match=words):
        pending.take(torch.tensor(ids))


def test_ids_must_be_a_list_of_whole_numbers():
    with pytest.raises(ValueError, match=r"\(n,\) int64 .* got \(1, 1\)"):
        Pending(3).take(torch.zeros(1, 1, dtype=torch.int64))


def test_what_fell_out_is_counted_and_not_learnt():
    pending = Pending(4)
    pending.add(rows(0, 3))
    pending.add(rows(3, 3))  # ids 0 and 1 fall out
    taken, here = pending.take(torch.tensor([0, 5, 1]))
    assert taken["x"][:, 0].tolist() == [5.0]
    assert here.tolist() == [False, True, False]
    assert (pending.lost, pending.late) == (2, 2)
    pending.clear()  # what is late stays late where nothing waits
    taken, here = pending.take(torch.tensor([1]))
    assert taken["x"].shape == (0, 1)
    assert not here.any()
    with pytest.raises(ValueError, match="raise pending"):
        pending.add(rows(0, 5))
    with pytest.raises(ValueError, match="at least 1"):
        Pending(0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(4, 30), st.randoms())
def test_every_decision_is_kept_lost_or_answered(sizes, keep, random):
    pending, answered = Pending(keep), 0
    for size in sizes:
        pending.add(rows(pending.next, size))
        waiting = pending.key[pending.key >= 0].tolist()
        ask = random.sample(waiting, random.randint(0, min(2, len(waiting))))
        taken, here = pending.take(torch.tensor(ask, dtype=torch.int64))
        assert here.all()
        assert taken["x"][:, 0].tolist() == ask
        answered += len(ask)
    assert answered + len(pending) + pending.lost == pending.next


def test_what_waits_survives_saving():
    pending, other = Pending(8), Pending(8)
    pending.add(rows(0, 6))
    pending.take(torch.tensor([2]))
    other.load_state_dict(pending.state_dict())
    assert other.add(rows(6, 1)).tolist() == [6]
    assert other.take(torch.tensor([5, 6]))[0]["x"][:, 0].tolist() == [5.0, 6.0]
    with pytest.raises(ValueError, match="has had its feedback"):
        other.take(torch.tensor([2]))
    with pytest.raises(ValueError, match="pending=8, here it is 9"):
        Pending(9).load_state_dict(pending.state_dict())


@pytest.mark.parametrize("features", ["shared", "hybrid", "disjoint"])
def test_late_shuffled_feedback_gives_the_posterior_of_immediate_feedback(features):
    spec = synthetic_spec(slate_size=3)
    now, late = (LinUCB(spec, features=features, dim=6) for _ in range(2))
    g = torch.Generator().manual_seed(0)
    ids, rewards = [], []
    for _ in range(6):
        obs = synthetic_observation(spec, 32, g)
        decision = now.act(obs, obs.history)
        reward = torch.rand(decision.slate.shape, generator=g)
        ids.append(late.expect(obs, decision))
        rewards.append(reward)
        first = now.expect(obs, decision)
        now.feedback(first, reward)  # at once
    ids, rewards = torch.cat(ids), torch.cat(rewards)
    for part in torch.randperm(len(ids), generator=g).split(50):
        late.feedback(ids[part], rewards[part])
    obs = synthetic_observation(spec, 8, g)
    assert torch.allclose(late.scores(obs), now.scores(obs), atol=1e-5)
    assert torch.allclose(late.bounds(obs), now.bounds(obs), atol=1e-5)
    assert len(late.pending) == 0


def test_pending_feedback_is_part_of_the_experience():
    spec = synthetic_spec(slate_size=2)
    for make in (LinUCB, NeuralLinear):
        agent, other = make(spec), make(spec)
        obs = synthetic_observation(spec, 5, torch.Generator().manual_seed(1))
        ids = agent.expect(obs, agent.act(obs, None))
        other.load_state_dict(agent.state_dict())
        other.load_experience(agent.experience())
        reward = torch.rand(5, 2, generator=torch.Generator().manual_seed(2))
        agent.feedback(ids, reward)
        other.feedback(ids, reward)
        assert torch.equal(agent.scores(obs), other.scores(obs))


def test_rewards_must_be_finite_and_one_per_slot():
    with pytest.raises(ValueError, match=r"slot_reward must be \(2, 3\).* got \(2, 1\)"):
        check_slots(torch.zeros(2, 1), torch.arange(2), 3)
    with pytest.raises(ValueError, match="row 1 is not"):
        check_slots(torch.tensor([[0.0], [torch.nan]]), torch.arange(2), 1)


@pytest.mark.parametrize(
    "kind", [Bootstrapped, EpsilonGreedy, LinTS, LinUCB, LogisticTS, NeuralLinear]
)
def test_a_state_put_back_forgets_what_waited_for_feedback(kind):
    spec = synthetic_spec()
    agent = kind(spec)
    obs = synthetic_observation(spec, 4, torch.Generator().manual_seed(0))
    ids = agent.expect(obs, agent.act(obs, None))
    agent.load_state_dict(agent.state_dict())
    assert len(agent.pending) == 0
    with pytest.raises(ValueError, match="forgotten by load_state_dict"):
        agent.feedback(ids, torch.ones(4, 2))


def test_the_oldest_that_is_still_kept_is_refused_a_second_time_not_late():
    pending = Pending(3)
    pending.add(rows(0, 3))
    pending.take(torch.tensor([0]))
    with pytest.raises(ValueError, match="decision 0 has had its feedback"):
        pending.take(torch.tensor([0]))
    assert pending.late == 0


def test_what_was_lost_and_late_is_counted_on_after_a_reload():
    one, other = Pending(2), Pending(2)
    one.add(rows(0, 2))
    one.add(rows(2, 2))
    one.take(torch.tensor([1]))
    other.load_state_dict(one.state_dict())
    assert (other.lost, other.late) == (one.lost, one.late) == (2, 1)
