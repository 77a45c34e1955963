"""Bootstrapped heads differ as the posterior does, agree where data is, and are drawn per user."""

from dataclasses import replace

import pytest
import torch

from agents.bootstrapped import Bootstrapped, online_weights
from agents.testing import check_agent, synthetic_observation, synthetic_spec, synthetic_steps


@pytest.mark.parametrize(("kind", "values"), [("poisson", None), ("double", {0.0, 2.0})])
def test_weights_have_mean_and_variance_one(kind, values):
    weight = online_weights(kind, (10, 20_000), torch.Generator().manual_seed(0))
    assert weight.mean() == pytest.approx(1.0, abs=0.01)
    assert weight.var() == pytest.approx(1.0, abs=0.02)
    assert values is None or set(weight.unique().tolist()) == values


def taught(spec, steps, **knobs):
    agent, g = Bootstrapped(spec, **knobs), torch.Generator().manual_seed(0)
    for step in synthetic_steps(agent, spec, 64, steps, g):
        agent.update(step)
    return agent


def test_a_head_is_ridge_on_its_own_weighted_rows_around_its_own_prior(monkeypatch):
    spec = synthetic_spec(num_items=6, slate_size=1)
    weight = torch.tensor([[0.0, 1.0, 3.0, 1.0], [2.0, 0.0, 1.0, 0.0]]).double()
    monkeypatch.setattr("agents.bootstrapped.online_weights", lambda *_: weight)
    agent = Bootstrapped(spec, dim=3, heads=2, ridge=0.5, prior=2.0)
    step = next(synthetic_steps(agent, spec, 4, 1, torch.Generator().manual_seed(0)))
    reward = torch.tensor([1.0, 0.0, 2.0, 1.0])
    agent.update(replace(step, reward=reward, slot_reward=reward[:, None]))
    x = agent.features.of(step.obs, step.decision.slate)[:, 0].double()
    r, d = reward.double() - agent.post["level"], x.shape[1]
    for head in range(2):
        w = weight[head][:, None]
        start = 2.0 / 0.5**0.5 * agent.start[head]  # sigma was 1 before anything was seen
        gram = 0.5 * torch.eye(d).double() + (x * w).T @ x
        theta = torch.linalg.solve(gram, (x * w).T @ r + 0.5 * start)
        assert torch.allclose(agent.post["theta"][head], theta, atol=1e-8)


def test_heads_come_to_agree_with_data_and_prior_functions_part_them_before():
    spec = synthetic_spec(slate_size=1)
    few, many = (taught(spec, steps, dim=4) for steps in (1, 60))
    spread = [a.post["theta"].std(dim=0).mean() / a.post["sigma"] for a in (few, many)]
    assert spread[1] < 0.7 * spread[0]
    assert Bootstrapped(spec, prior=0.0).post["theta"].abs().max() == 0
    assert Bootstrapped(spec).post["theta"].std(dim=0).mean() == pytest.approx(1.0, abs=0.1)


def test_every_user_draws_a_head_and_the_chance_is_the_share_of_heads():
    spec = synthetic_spec(slate_size=2)
    agent = taught(spec, 2, heads=8)
    obs = synthetic_observation(spec, 1, torch.Generator().manual_seed(1))
    many = obs[torch.zeros(4000, dtype=torch.int64)]
    decision = agent.act(many, None)
    probs = agent.action_probs(obs, None)[0]
    assert (probs * 8).round().allclose(probs * 8)
    assert (probs > 0).sum() > 1
    often = torch.bincount(decision.slate[:, 0], minlength=24) / 4000
    assert torch.allclose(often, probs, atol=0.04)


@pytest.mark.parametrize("slate_size", [1, 3])
@pytest.mark.parametrize("weights", ["poisson", "double"])
def test_it_keeps_the_contract(weights, slate_size):
    spec = synthetic_spec(slate_size=slate_size)
    agent = Bootstrapped(spec, dim=6, heads=5, weights=weights, forget=0.99)
    assert check_agent(agent, spec) == []


def test_a_resumed_agent_goes_on_bit_for_bit():
    spec, g = synthetic_spec(), torch.Generator().manual_seed(0)
    agent, other = taught(spec, 3, dim=6), Bootstrapped(replace(spec, seed=9), dim=6)
    other.load_state_dict(agent.state_dict())
    other.load_experience(agent.experience())
    for _ in range(3):
        obs = synthetic_observation(spec, 16, g)
        one, two = agent.act(obs, None), other.act(obs, None)
        assert torch.equal(one.slate, two.slate)
        reward = torch.rand(one.slate.shape, generator=g)
        for a, decision in ((agent, one), (other, two)):
            a.feedback(a.expect(obs, decision), reward)
        assert torch.equal(agent.post["theta"], other.post["theta"])


def test_settings_and_checkpoints_that_do_not_fit_are_refused():
    spec = synthetic_spec()
    for knobs in ({"heads": 0}, {"weights": "half"}, {"prior": -1.0}, {"forget": 1.5}):
        with pytest.raises(ValueError, match=next(iter(knobs))):
            Bootstrapped(spec, **knobs)
    with pytest.raises(ValueError, match="heads and dim"):
        Bootstrapped(spec).load_state_dict(Bootstrapped(spec, heads=3).state_dict())


def test_heads_see_rows_of_their_own_and_the_spread_is_not_of_their_priors():
    spec = synthetic_spec(slate_size=1)
    steps = list(synthetic_steps(Bootstrapped(spec), spec, 64, 3, torch.Generator().manual_seed(0)))
    sigmas = []
    for prior in (0.0, 5.0):
        agent = Bootstrapped(spec, dim=4, prior=prior)
        for step in steps:
            agent.update(step)
        assert len(agent.sums["gram"][:, 0, 0].unique()) > 1
        sigmas.append(float(agent.post["sigma"]))
    assert sigmas[0] == sigmas[1]
