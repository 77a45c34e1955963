"""PQN's returns by hand, its corridor, where it bootstraps, and resuming inside a rollout."""

from dataclasses import replace

import pytest
import torch

from agents.pqn import PQN, lambda_returns
from agents.testing import check_agent, synthetic_observation, synthetic_spec
from tests.test_dqn import RIGHT, STATES, step_of, toy_obs, toy_spec, trained, walk

QUICK = {"rollout": 4, "batch_size": 32, "width": 16}
NO = torch.zeros(3, 1, dtype=torch.bool)


def toy_pqn(**knobs):
    settings = {
        "lr": 1e-2, "gamma": 0.9, "trace": 0.0, "epsilon_start": 1.0, "epsilon_end": 1.0,
        "rollout": 4, "batch_size": 64, "width": 32, "memory": False, "shrink": 0.0,
        "schedule": "linear",
    }  # fmt: skip
    steps = knobs.pop("steps", 3840)
    return PQN(replace(toy_spec(), total_steps=steps), **(settings | knobs))


def returns(terminated=NO, truncated=NO, trace=0.5):
    reward = torch.tensor([[[1.0]], [[2.0]], [[4.0]]])
    value = torch.tensor([[10.0], [20.0], [30.0]])
    return lambda_returns(reward, value, terminated, truncated, 0.5, trace).flatten().tolist()


def test_lambda_returns_by_hand():
    # 4 + .5*30 = 19; 2 + .5*(.5*20 + .5*19) = 11.75; 1 + .5*(.5*10 + .5*11.75) = 6.4375
    assert returns() == [6.4375, 11.75, 19.0]
    assert returns(trace=0.0) == [6.0, 12.0, 19.0]  # one step each
    assert returns(trace=1.0) == [6.75, 11.5, 19.0]  # all rewards, then the value after the last


def test_returns_stop_after_leaving_and_go_on_from_the_last_view_after_a_step_limit():
    middle = torch.tensor([[False], [True], [False]])
    assert returns(terminated=middle) == [1.0 + 0.5 * (5.0 + 1.0), 2.0, 19.0]
    assert returns(truncated=middle) == [1.0 + 0.5 * (5.0 + 6.0), 12.0, 19.0]
    last = torch.tensor([[False], [False], [True]])
    assert returns(terminated=last)[2] == 4.0
    assert returns(truncated=last)[2] == 19.0


def test_a_slot_learns_its_own_reward_and_its_share_of_what_follows():
    reward = torch.tensor([[[1.0, 0.0]], [[2.0, 4.0]]])  # (T, B, K) = (2, 1, 2)
    value, no = torch.tensor([[5.0], [7.0]]), torch.zeros(2, 1, dtype=torch.bool)
    got = lambda_returns(reward, value, no, no, 0.5, 1.0)
    assert got[1, 0].tolist() == [2.0 + 3.5, 4.0 + 3.5]
    assert got[0, 0].tolist() == [1.0 + 0.5 * 6.5, 0.5 * 6.5]  # 6.5: mean over the slots
    whole = got.sum(dim=2)  # slates: r + gamma * the return of the next slate
    assert float(whole[0, 0]) == 1.0 + 0.5 * float(whole[1, 0])


def test_the_corridor_has_its_known_values():
    agent = toy_pqn(epochs=8, steps=7680)  # half as long is .02 to .06 off, by machine and seed
    walk(agent, 120)
    q = agent.scores(toy_obs(torch.arange(STATES - 1)))
    assert q[:, 1].tolist() == pytest.approx(RIGHT, abs=0.02)
    left = [0.9 * RIGHT[max(s - 1, 0)] for s in range(STATES - 1)]
    assert q[:, 0].tolist() == pytest.approx(left, abs=0.02)


def constant(agent, limit, leaves, steps=60):
    """A reward of 1 at each step of one state; after `limit` steps users leave, or time is up."""
    state = torch.zeros(64, dtype=torch.int64)
    clock = torch.arange(64) % limit
    for _ in range(steps):
        slate = agent.act(toy_obs(state), None).slate
        over = clock + 1 == limit
        ends = over if leaves else over & False
        agent.update(step_of(state, slate, torch.ones(64, 1), state, ends, over & ~ends))
        clock = torch.where(over, 0, clock + 1)
    return agent.scores(toy_obs(state[:1]))[0].tolist()


def test_a_step_limit_does_not_stop_bootstrapping():
    agent = toy_pqn(lr=3e-2, epochs=8, trace=0.65, steps=7680)
    assert constant(agent, 10, leaves=False, steps=120) == pytest.approx([10.0, 10.0], abs=0.3)


def test_leaving_stops_bootstrapping():
    agent = toy_pqn(gamma=0.99, trace=0.65)
    assert constant(agent, 1, leaves=True) == pytest.approx([1.0, 1.0], abs=0.02)


def test_what_may_not_be_shown_next_is_worth_nothing_in_the_target():
    agent = toy_pqn(gamma=1.0, rollout=1)
    state = torch.zeros(4, dtype=torch.int64)
    slate, reward, no = torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 1), state == 1
    excluded = torch.tensor([[0], [1], [-1], [-1]])
    none = torch.full((4, 1), -1)
    ring = agent._ring(4)
    ring.add(step_of(state, slate, reward, state, no, None, none, excluded))
    q = agent.scores(toy_obs(state[:1]))[0]
    wanted = [float(q[1]), float(q[0]), float(q.max()), float(q.max())]
    assert agent._targets(ring).flatten().tolist() == pytest.approx(wanted)


def test_it_learns_once_a_rollout_is_complete_and_forgets_it():
    agent = PQN(synthetic_spec(), **QUICK)
    trained(agent, 3)
    assert agent.updates == 0
    assert agent.open.steps == 3
    trained(agent, 1)
    assert agent.updates == 2 * 4  # epochs * 128 transitions in batches of 32
    assert agent.open is None


def test_training_resumes_bit_for_bit_in_the_middle_of_a_rollout(tmp_path):
    straight = trained(trained(PQN(synthetic_spec(), **QUICK), 10), 9, seed=5)
    first = trained(PQN(synthetic_spec(), **QUICK), 10)
    assert first.open.steps == 2
    torch.save((first.state_dict(), first.experience()), tmp_path / "state.pt")
    second = PQN(replace(synthetic_spec(), seed=77), **QUICK)
    state, experience = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(state)
    second.load_experience(experience)
    trained(second, 9, seed=5)
    for a, b in zip(straight.net.parameters(), second.net.parameters(), strict=True):
        assert torch.equal(a, b)
    obs = synthetic_observation(first.spec, 64, torch.Generator().manual_seed(9))
    assert torch.equal(straight.act(obs, None).slate, second.act(obs, None).slate)
    assert straight.updates == second.updates == 4 * 8


def test_a_state_without_experience_opens_a_new_rollout():
    agent = trained(PQN(synthetic_spec(), **QUICK), 2)
    agent.load_state_dict(agent.state_dict())
    assert agent.open is None
    assert agent.experience() == {"rollout": {}}


@pytest.mark.parametrize("form", [{"head": "two_tower"}, {"head": "dense", "dueling": False}])
@pytest.mark.parametrize("slate_size", [1, 3])
def test_other_heads_keep_the_contract(form, slate_size):
    spec = synthetic_spec(slate_size=slate_size)
    assert check_agent(PQN(spec, **QUICK | form), spec) == []


@pytest.mark.parametrize(
    ("knob", "words"),
    [
        ({"rollout": 0}, "rollout must be a whole number"),
        ({"epochs": 0}, "epochs must be a whole number"),
        ({"trace": 1.5}, "trace must be in"),
        ({"gamma": -0.1}, "gamma must be in"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"shrink": -1.0}, "shrink must be at least 0"),
        ({"schedule": "cosine"}, r"AgentSpec\(total_steps"),
        ({"head": "wide"}, "head must be one of"),
    ],
)
def test_knobs_out_of_range_are_refused(knob, words):
    with pytest.raises(ValueError, match=words):
        PQN(synthetic_spec(), **knob)


def test_a_checkpoint_of_another_form_or_rollout_is_refused():
    agent = trained(PQN(synthetic_spec(), **QUICK), 2)
    with pytest.raises(ValueError, match="net of another form"):
        PQN(synthetic_spec(), **QUICK | {"head": "dense"}).load_state_dict(agent.state_dict())
    with pytest.raises(ValueError, match="same capacity"):
        PQN(synthetic_spec(), **QUICK | {"rollout": 8}).load_experience(agent.experience())
