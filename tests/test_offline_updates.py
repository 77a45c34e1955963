"""What all agents that learn from logs share: resuming, means, rates, what is refused."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from offline_toys import steps, taught, toy_obs, toy_spec

from agents.bcq import BCQ
from agents.behaviour_cloning import BehaviourCloning
from agents.cql import CQL
from agents.iql import IQL
from agents.offline import follow
from agents.testing import synthetic_observation, synthetic_spec, synthetic_steps
from encoders.state import EMPTY

ALL = (BehaviourCloning, BCQ, CQL, IQL)


def trained(agent: Any, updates: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for batch in synthetic_steps(agent, agent.spec, 32, updates, generator):
        agent.update(batch)
    return agent


@pytest.mark.parametrize("kind", ALL)
def test_training_resumes_bit_for_bit_in_an_agent_of_another_seed(kind: Any, tmp_path: Any) -> None:
    spec = replace(synthetic_spec(), total_steps=40)
    knobs = {"width": 16, "schedule": "cosine"}
    straight = trained(trained(kind(spec, **knobs), 6, 0), 6, 5)
    first = trained(kind(spec, **knobs), 6, 0)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = kind(replace(spec, seed=7), **knobs)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    trained(second, 6, 5)
    obs = synthetic_observation(spec, 64, torch.Generator().manual_seed(9))
    assert torch.equal(straight.scores(obs), second.scores(obs))
    assert torch.equal(straight.act(obs, None).slate, second.act(obs, None).slate)
    assert straight.updates == second.updates == 12


@pytest.mark.parametrize("kind", ALL)
def test_rows_are_independent_of_their_order(kind: Any) -> None:
    batch = steps([0, 1, 2, 3], [[0], [1], [2], [0]], [[1.0], [0.0], [2.0], [0.5]], [1, 2, 3, 0])
    order = torch.tensor([2, 0, 3, 1])
    shuffled = steps(order, batch.decision.slate[order], batch.slot_reward[order],
                     (order + 1) % 4)  # fmt: skip
    spec = toy_spec()
    one, other = (taught(kind, spec, b, 3) for b in (batch, shuffled))
    obs = toy_obs(torch.arange(4))
    one, other = (agent.scores(obs) for agent in (one, other))  # (4, 3)
    if kind in (BehaviourCloning, IQL):  # a softmax does not know the level of its logits
        one, other = one.softmax(dim=1), other.softmax(dim=1)
    assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("kind", ALL)
def test_empty_slots_teach_nothing(kind: Any) -> None:
    spec = toy_spec(4, 2)
    full = steps([0, 1], [[1, EMPTY], [2, EMPTY]], [[1.0, 0.0], [0.5, 0.0]])
    loud = replace(full, slot_reward=full.slot_reward + torch.tensor([0.0, 9.0]))
    obs = toy_obs(torch.arange(2))
    one, other = (taught(kind, spec, b, 5).scores(obs) for b in (full, loud))
    assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ALL)
def test_every_update_is_one_step_and_the_mean_follows(kind: Any) -> None:
    spec = toy_spec()
    agent = kind(spec, width=16, lr=1e-2, tau=0.25)
    slow, fast = {
        BehaviourCloning: lambda: (agent.mean, agent.net), CQL: lambda: (agent.target, agent.net),
        BCQ: lambda: (agent.q_mean, agent.q), IQL: lambda: (agent.policy_mean, agent.policy),
    }[kind]()  # fmt: skip
    before = copy.deepcopy(slow)
    agent.update(steps([0, 1], [[0], [1]], [[1.0], [0.0]]))
    assert agent.updates == 1
    follow(before, fast, 0.25)
    for mine, theirs in zip(before.parameters(), slow.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ALL)
def test_the_learning_rate_goes_to_zero_with_the_last_update(kind: Any) -> None:
    agent = kind(replace(toy_spec(), total_steps=4), width=8, lr=0.1, schedule="linear")
    batch = steps([0, 1], [[0], [1]], [[1.0], [0.0]])
    rates = [float(agent.update(batch)["train/learning_rate"]) for _ in range(5)]
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.0])
    with pytest.raises(ValueError, match="total_steps"):
        kind(toy_spec(), schedule="cosine")


@pytest.mark.parametrize("kind", ALL)
def test_who_has_seen_everything_can_be_learnt_from(kind: Any) -> None:
    everything = torch.tensor([[0, 1, 2]]).expand(2, 3)
    batch = steps([0, 1], [[0], [1]], [[1.0], [0.0]], [1, 0], next_mask=everything)
    logs = kind(toy_spec(), width=8).update(batch)
    assert all(bool(value.isfinite()) for value in logs.values())


@pytest.mark.parametrize("kind", ALL)
def test_what_is_not_finite_is_refused_before_it_is_learnt_from(kind: Any) -> None:
    agent = kind(toy_spec(), width=8)
    assert agent.offline
    batch = steps([0, 1], [[0], [1]], [[1.0], [torch.nan]])
    with pytest.raises(ValueError, match="reward must be finite, row 1"):
        agent.update(batch)
    assert agent.updates == 0


@pytest.mark.parametrize("kind", ALL)
def test_a_checkpoint_of_another_catalogue_or_form_is_refused(kind: Any) -> None:
    state = kind(synthetic_spec(), width=8).state_dict()
    with pytest.raises(ValueError, match="catalogue of 24 items, this one has 30"):
        kind(synthetic_spec(num_items=30), width=8).load_state_dict(state)
    with pytest.raises(ValueError, match="net of another form"):
        kind(synthetic_spec(), width=16).load_state_dict(state)


@pytest.mark.parametrize(
    ("kind", "knob", "words"),
    [
        (BehaviourCloning, {"temperature": 0.0}, "temperature must be above 0"),
        (BehaviourCloning, {"shrink": -1.0}, "shrink must be at least 0"),
        (BCQ, {"threshold": 1.0}, "threshold must be in"),
        (BCQ, {"behaviour_shrink": -1.0}, "behaviour_shrink must be at least 0"),
        (CQL, {"alpha": -0.1}, "alpha must be at least 0"),
        (CQL, {"gamma": 1.1}, "gamma must be in"),
        (IQL, {"expectile": 1.0}, "expectile must be in"),
        (IQL, {"beta": 0.0}, "beta must be above 0"),
        (IQL, {"tau": 2.0}, "tau must be in"),
        (CQL, {"lr": 0.0}, "lr must be above 0"),
    ],
)
def test_knobs_out_of_range_are_refused(kind: Any, knob: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind(toy_spec(), **knob)
