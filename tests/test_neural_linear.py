"""Neural-linear learns what no line can, with a closed-form posterior on its last layer."""

from dataclasses import replace

import pytest
import torch

from agents.epsilon_greedy import EpsilonGreedy
from agents.neural_linear import MEMORY, NeuralLinear, last_layer
from agents.testing import check_agent, synthetic_observation, synthetic_spec, synthetic_steps
from experiments.bandit_speed import bandit_spec, observed, step_of

FAST = {"width": 32, "wide": 16, "batch_size": 64, "capacity": 4000}


def xor_reward(agent, steps, batch=64, tail=10):
    """Mean reward of the last steps where item 0 pays if two signs differ, item 1 if they agree."""
    g, late = torch.Generator().manual_seed(0), []
    for turn in range(steps):
        x = torch.randn(batch, 2, generator=g).sign()
        slate = agent.act(observed(x), None).slate
        differ = (x[:, :1] != x[:, 1:]).long()  # (B, 1)
        reward = (slate == 1 - differ).float()
        agent.update(step_of(x, slate, reward))
        late += [reward.mean()] if turn >= steps - tail else []
    return torch.stack(late).mean().item()


def test_it_learns_a_xor_that_a_linear_bandit_cannot():
    spec = bandit_spec(0, arms=2, features=2)
    assert xor_reward(NeuralLinear(spec, **FAST, lr=1e-2, replay_ratio=4.0), 80) > 0.9
    assert xor_reward(EpsilonGreedy(spec, epsilon=0.1), 80) < 0.65


def test_the_last_layer_is_ridge_around_its_prior():
    g = torch.Generator().manual_seed(0)
    z, r = torch.randn(30, 4, generator=g).double(), torch.randn(30, generator=g).double()
    prior = torch.ones(4).double()
    theta, root = last_layer(z.T @ z, z.T @ r, prior, 2.0)
    shifted = torch.linalg.solve(2 * torch.eye(4).double() + z.T @ z, z.T @ (r - z @ prior))
    assert torch.allclose(theta, prior + shifted)
    assert torch.allclose(root @ root.T, 2 * torch.eye(4).double() + z.T @ z)
    assert torch.allclose(last_layer(0 * z.T @ z, 0 * z.T @ r, prior, 2.0)[0], prior)


def trained(spec, steps=10, **knobs):
    agent, g = NeuralLinear(spec, **FAST, **knobs), torch.Generator().manual_seed(0)
    for step in synthetic_steps(agent, spec, 32, steps, g):
        agent.update(step)
    return agent


def test_between_two_refits_the_posterior_is_that_of_all_that_is_remembered():
    spec = synthetic_spec()
    agent = trained(spec, steps=14, refit=8)  # the trunk of update 8 serves, 6 batches came after
    filled = agent.added
    ring = {name: value[:filled] for name, value in agent.ring.items()}
    z = agent.served(ring["state"], agent.table[ring["item"]], ring["traces"]).double().detach()
    z = z / agent.post["unit"]
    assert torch.allclose(agent.post["gram"], z.T @ z, rtol=1e-4, atol=1e-2)
    r = (ring["reward"].double() - agent.post["level"]) / agent.post["spread"]
    assert torch.allclose(agent.post["paid"], z.T @ r, rtol=1e-4, atol=1e-2)


def test_scores_of_all_items_are_those_of_whole_feature_vectors():
    spec = synthetic_spec()
    agent, obs = trained(spec), synthetic_observation(spec, 5, torch.Generator().manual_seed(1))
    rows = agent._rows(obs, torch.arange(24).expand(5, -1))
    state = rows["state"].repeat_interleave(24, dim=0)
    item = agent.table[:-1].repeat(5, 1)
    z = agent.served(state, item, rows["traces"].flatten(0, 1)).double()
    assert z.shape[1] == 16 + MEMORY + 1
    theta, _ = agent._mean()
    wanted = (z / agent.post["unit"]) @ theta * agent.post["spread"] + agent.post["level"]
    assert torch.allclose(agent.scores(obs).flatten().double(), wanted, atol=1e-4)


def test_the_ring_keeps_the_latest_rewards():
    agent = trained(synthetic_spec(slate_size=1))
    fresh = {"item": torch.arange(10), "reward": torch.arange(10.0)}
    agent.ring, agent.added, agent.capacity = {}, 0, 4
    agent._remember({k: v[:3] for k, v in fresh.items()})
    agent._remember({k: v[3:] for k, v in fresh.items()})
    assert sorted(agent.ring["reward"].tolist()) == [6.0, 7.0, 8.0, 9.0]
    assert agent.added == 10


@pytest.mark.parametrize("slate_size", [1, 3])
def test_it_keeps_the_contract(slate_size):
    spec = synthetic_spec(slate_size=slate_size)
    assert check_agent(NeuralLinear(spec, **FAST), spec) == []


def test_a_resumed_agent_goes_on_bit_for_bit():
    spec, g = synthetic_spec(), torch.Generator().manual_seed(0)
    agent, other = trained(spec), NeuralLinear(replace(spec, seed=9), **FAST)
    other.load_state_dict(agent.state_dict())
    other.load_experience(agent.experience())
    for _ in range(10):
        obs = synthetic_observation(spec, 32, g)
        one, two = agent.act(obs, None), other.act(obs, None)
        assert torch.equal(one.slate, two.slate)
        reward = torch.rand(one.slate.shape, generator=g)
        for a, decision in ((agent, one), (other, two)):
            a.feedback(a.expect(obs, decision), reward)
    assert all(map(torch.equal, agent.net.state_dict().values(), other.net.state_dict().values()))
    assert torch.equal(agent.scores(obs), other.scores(obs))


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"wide": 60}, "wide must be at most 55"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"capacity": 10}, "capacity must be a whole number of at least 256"),
        ({"shrink": -1.0}, "shrink at least 0"),
        ({"refit": 0}, "refit must be a whole number of at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(knobs, words):
    with pytest.raises(ValueError, match=words):
        NeuralLinear(synthetic_spec(), **knobs)


def test_a_checkpoint_of_another_form_is_refused():
    spec = synthetic_spec()
    with pytest.raises(ValueError, match="the settings it was trained with"):
        NeuralLinear(spec).load_state_dict(NeuralLinear(spec, width=32).state_dict())


def test_draws_have_the_posterior_covariance():
    agent = NeuralLinear(synthetic_spec(), wide=1, samples=50_000, ridge=0.5)
    d = agent.wide + MEMORY + 1
    rows = torch.randn(2 * d, d, generator=torch.Generator().manual_seed(0)).double()
    rows[:, 0] = rows[:, 1] + 0.3 * rows[:, 0]  # two features that go together
    agent.post |= {"gram": rows.T @ rows, "sigma": torch.tensor(2.0).double()}
    wanted = 4.0 * torch.linalg.inv(rows.T @ rows + 0.5 * torch.eye(d).double())
    assert torch.allclose(agent._draws()[0].T.cov(), wanted, atol=0.02 * float(wanted.max()))


def test_the_prior_of_the_last_layer_has_the_bias_of_the_trunk():
    scores = []
    for bias in (0.0, 3.0):
        agent = NeuralLinear(synthetic_spec(), wide=4, width=8, ridge=1e9, replay_ratio=1e-6)
        with torch.no_grad():
            agent.net.last.bias += bias
        steps = synthetic_steps(agent, agent.spec, 16, 1, torch.Generator().manual_seed(0))
        step = next(steps)
        agent.update(step)
        scores.append(agent.scores(step.obs) / agent.post["spread"].float())
    assert torch.allclose(scores[1] - scores[0], torch.tensor(3.0), atol=1e-3)


def test_more_rewards_than_the_ring_holds_leave_the_newest_oldest_first_out():
    agent = NeuralLinear(synthetic_spec(), batch_size=4, capacity=4)
    for first, last in ((0, 6), (6, 7)):
        agent._remember({"item": torch.arange(first, last)})
    assert sorted(agent.ring["item"].tolist()) == [3, 4, 5, 6]
