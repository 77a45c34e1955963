"""LinTS samples the posterior it says, and its propensities are those of what it plays."""

from dataclasses import replace

import pytest
import torch

from agents.lints import LinTS
from agents.testing import check_agent, synthetic_observation, synthetic_spec, synthetic_steps
from experiments.bandit_speed import bandit_spec, observed, step_of

ONE = torch.ones(1, 1)


def trained(features, samples=32, **knobs):
    spec = synthetic_spec(num_items=6, slate_size=1)
    agent = LinTS(spec, features=features, dim=4, samples=samples, **knobs)
    g = torch.Generator().manual_seed(0)
    for step in synthetic_steps(agent, spec, 16, 6, g):
        agent.update(step)
    return agent, synthetic_observation(spec, 1, g)


def test_marginal_draws_are_draws_of_theta_where_items_share_nothing():
    draws = 400_000
    agent, obs = trained("disjoint")
    model = agent.model
    view = model.view(obs)
    g = torch.Generator().manual_seed(1)
    ours = model.draw(draws, 1.0, g).scores(view, 0, draws)[0].argmax(dim=1)
    x = view[0].double()
    root = torch.linalg.cholesky(model.post["inverse"])  # (N, d, d)
    noise = torch.randn(draws, 6, len(x), generator=g, dtype=torch.float64)
    # x theta of every arm from a draw of the whole theta of every arm
    theta = (
        model.post["theta"] @ x
        + torch.einsum("d,nde,mne->mn", x, root, noise) * (model.post["sigma"])
    )
    wanted = theta.argmax(dim=1)
    one, other = (torch.bincount(best, minlength=6) / draws for best in (ours, wanted))
    # .002 is two standard errors of the difference of two such shares
    assert torch.allclose(one, other, atol=0.004)
    assert (one - other).abs().mean() < 0.002


@pytest.mark.parametrize("features", ["shared", "hybrid"])
def test_shared_draws_have_the_mean_and_the_width_of_the_posterior(features):
    agent, obs = trained(features, scale=2.0)
    model, draws = agent.model, 20_000
    view = model.view(obs)
    scores = model.draw(draws, 2.0, torch.Generator().manual_seed(1)).scores(view, 0, draws)[0]
    mean, width = model.mean(view)[0], 2.0 * model.width(view)[0]
    assert ((scores.mean(dim=0) - mean) / width).abs().max() < 5 / draws**0.5
    assert torch.allclose(scores.std(dim=0), width, rtol=0.03)


def test_draws_stay_until_the_next_update_and_follow_the_seed():
    agent, obs = trained("shared")
    many = obs[torch.zeros(2000, dtype=torch.int64)]
    before = agent.action_probs(obs, None)
    first, second = (agent.act(many, None) for _ in range(2))
    assert not torch.equal(first.slate, second.slate)  # every user draws at every step
    assert torch.equal(agent.action_probs(obs, None), before)
    assert (before * 32).round().allclose(before * 32)  # shares of 32 draws
    agent.update(step_of_spec(agent, obs))
    assert not torch.equal(agent.action_probs(obs, None), before)
    other, _ = trained("shared")
    assert torch.equal(other.action_probs(obs, None), before)


def step_of_spec(agent, obs):
    decision = agent.act(obs, None)
    reward = torch.zeros(len(obs), 1)
    step = step_of(obs.profile, decision.slate, reward)
    return replace(step, obs=obs, next_obs=obs)


def test_more_draws_come_nearer_to_thompson_sampling():
    agent, obs = trained("disjoint", samples=4096)
    few, _ = trained("disjoint", samples=64)
    fine, coarse = agent.action_probs(obs, None)[0], few.action_probs(obs, None)[0]
    error = (fine * (1 - fine) / 64).sqrt()
    assert ((fine - coarse).abs() < 4 * error + 1 / 64).all()


def bernoulli_regret(runs, steps, seed=0):
    """Mean regret of `runs` two-armed bandits of means .5 and .4 that share one agent's arms."""
    spec = replace(
        bandit_spec(seed, arms=2 * runs, features=0), item_vectors=torch.ones(2 * runs, 1)
    )
    agent = LinTS(spec, features="disjoint", dim=1, samples=2, noise=0.5, ridge=1.0)
    mask = torch.eye(runs, dtype=torch.bool).repeat_interleave(2, dim=1)  # each run has its own two
    paid, x = torch.tensor([0.5, 0.4]), torch.zeros(runs, 0)
    g, worse = torch.Generator().manual_seed(seed), 0.0
    for _ in range(steps):
        slate = agent.act(observed(x), mask).slate
        mean = paid[slate % 2]
        agent.update(step_of(x, slate, (torch.rand(runs, 1, generator=g) < mean).float()))
        worse += (0.5 - mean).sum().item()
    return worse / runs


def test_two_coins_cost_what_gaussian_thompson_sampling_costs():
    regret = bernoulli_regret(100, 1500)
    # four seeds gave 10.6 to 17.1; 200 runs of 10,000 gave 20.0. Random arms would cost 75.
    assert 6.0 < regret < 20.0


@pytest.mark.parametrize("slate_size", [1, 3])
@pytest.mark.parametrize("features", ["shared", "hybrid", "disjoint"])
def test_every_kind_of_features_keeps_the_contract(features, slate_size):
    spec = synthetic_spec(slate_size=slate_size)
    assert check_agent(LinTS(spec, features=features, dim=6, forget=0.99), spec) == []


@pytest.mark.parametrize("features", ["shared", "hybrid", "disjoint"])
def test_a_resumed_agent_goes_on_bit_for_bit(features):
    spec = synthetic_spec()
    agent, other = (LinTS(replace(spec, seed=s), features=features, dim=6) for s in (0, 9))
    g = torch.Generator().manual_seed(0)
    for step in synthetic_steps(agent, spec, 16, 5, g):
        agent.update(step)
    other.load_state_dict(agent.state_dict())
    other.load_experience(agent.experience())
    for _ in range(3):
        obs = synthetic_observation(spec, 16, g)
        one, two = agent.act(obs, None), other.act(obs, None)
        assert torch.equal(one.slate, two.slate)
        assert torch.equal(one.propensity, two.propensity)
        reward = torch.rand(one.slate.shape, generator=g)
        for a, decision in ((agent, one), (other, two)):
            a.feedback(a.expect(obs, decision), reward)


def test_a_user_is_served_alone_as_in_a_batch():
    agent, _ = trained("shared")
    obs = synthetic_observation(agent.spec, 9, torch.Generator().manual_seed(3))
    alone = torch.cat([agent.action_probs(obs[i : i + 1], None) for i in range(9)])
    assert torch.allclose(alone, agent.action_probs(obs, None))


@pytest.mark.parametrize("knobs", [{"scale": 0.0}, {"samples": 0}, {"forget": 2.0}])
def test_settings_out_of_range_are_refused(knobs):
    with pytest.raises(ValueError, match=next(iter(knobs))):
        LinTS(synthetic_spec(), **knobs)


def test_scale_widens_the_draws_that_act():
    one, three = (LinTS(synthetic_spec(), scale=scale)._draws() for scale in (1.0, 3.0))
    assert torch.allclose(3.0 * one.theta, three.theta)  # nothing is known: draws around zero


def test_a_state_put_back_brings_its_own_draws():
    one, _ = trained("shared")
    other, _ = trained("shared", scale=2.0)
    other.model.learn(torch.ones(1, 1, one.model.features.size), torch.zeros(1, 1).long(), ONE)
    one.model.learn(torch.ones(1, 1, one.model.features.size), torch.zeros(1, 1).long(), -ONE)
    other.scale = 1.0
    assert not torch.equal(one._draws().theta, other._draws().theta)  # as many updates, others
    other.load_state_dict(one.state_dict())
    assert torch.equal(one._draws().theta, other._draws().theta)
