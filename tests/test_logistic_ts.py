"""Logistic Thompson sampling finds the posterior's mode and width, and learns who chooses what."""

from dataclasses import replace

import pytest
import torch

from agents.logistic_ts import LogisticTS, laplace
from agents.testing import check_agent, synthetic_observation, synthetic_spec, synthetic_steps
from experiments.bandit_speed import observed, step_of


def answers(rows=400, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d, generator=g, dtype=torch.float64)
    p = (x @ torch.linspace(-2, 2, d).double()).sigmoid()
    return x, (torch.rand(rows, generator=g, dtype=torch.float64) < p).double()


@pytest.mark.parametrize("ridge", [0.01, 1.0, 100.0])
def test_the_mode_is_that_of_a_penalised_regression(ridge):
    from sklearn.linear_model import LogisticRegression

    x, y = answers()
    prior = ridge * torch.eye(6).double()
    mode, precision = laplace(torch.zeros(6).double(), prior, x, y, torch.ones(400).double())
    model = LogisticRegression(C=1 / ridge, fit_intercept=False, tol=1e-10, max_iter=1000)
    wanted = torch.from_numpy(model.fit(x.numpy(), y.numpy()).coef_[0])
    assert torch.allclose(mode, wanted, atol=1e-4)
    p = (x @ mode).sigmoid()
    assert torch.allclose(precision, prior + x.T @ (x * (p * (1 - p))[:, None]))


def test_wild_rows_do_not_make_newton_leap():
    x, y = answers()
    mode, precision = laplace(
        torch.zeros(6).double(), 1e-3 * torch.eye(6).double(), 50 * x, y, torch.ones(400).double()
    )
    p = (50 * x @ mode).sigmoid()
    slope = 1e-3 * mode + 50 * x.T @ (p - y)
    assert torch.linalg.solve(precision, slope).norm() < 1e-3 * mode.norm()


def test_rows_that_say_nothing_change_nothing():
    x, y = answers()
    real = (torch.arange(400) < 100).double()
    some = laplace(torch.zeros(6).double(), torch.eye(6).double(), x, y, real)
    only = laplace(torch.zeros(6).double(), torch.eye(6).double(), x[:100], y[:100], real[:100])
    for a, b in zip(some, only, strict=True):
        assert torch.allclose(a, b)


def test_batches_end_near_the_mode_of_all():
    x, y = answers(2000)
    mode, precision = torch.zeros(6).double(), torch.eye(6).double()
    one = torch.ones(2000).double()
    whole, _ = laplace(mode, precision, x, y, one)
    for part in torch.arange(2000).split(200):
        mode, precision = laplace(mode, precision, x[part], y[part], one[part])
    assert (mode - whole).abs().max() < 0.25
    deviation = precision.inverse().diagonal().sqrt()
    assert ((mode - whole).abs() < 3 * deviation).all()


def test_draws_have_the_posterior_covariance():
    spec = synthetic_spec(num_items=6, slate_size=1)
    agent, g = LogisticTS(spec, dim=3, samples=20_000), torch.Generator().manual_seed(0)
    for step in synthetic_steps(LogisticTS(spec, dim=3), spec, 32, 4, g):
        agent.update(step)
    theta = agent._draws().theta
    covariance = torch.cov(theta.T)
    assert (covariance - agent.precision.inverse()).abs().max() < 0.05
    assert (theta.mean(dim=0) - agent.mode).abs().max() < 0.05


def test_it_learns_which_user_chooses_which_item():
    spec = replace(synthetic_spec(num_items=2, slate_size=1), item_vectors=torch.eye(2),
                   popularity=torch.ones(2), profile_size=1, past_size=1, history_size=1,
                   feedback_size=0, context_size=0)  # fmt: skip
    agent, g = LogisticTS(spec, dim=3), torch.Generator().manual_seed(0)
    for _ in range(25):
        x = torch.randn(64, 1, generator=g).sign()
        slate = agent.act(observed(x), None).slate
        likes = torch.where((slate == 0) == (x > 0), 0.8, 0.2)
        chosen = (torch.rand(64, 1, generator=g) < likes).float()
        agent.update(step_of(x, slate, chosen))
    chance = agent.scores(observed(torch.tensor([[1.0], [-1.0]])))
    assert chance.diagonal().tolist() == pytest.approx([0.8, 0.8], abs=0.08)
    assert chance.flip(1).diagonal().max() < 0.6  # seldom shown since it was found to be worse
    probs = agent.action_probs(observed(torch.tensor([[1.0]])), None)[0]
    assert probs[0] > 0.9


def test_amounts_do_not_count_only_whether():
    spec = synthetic_spec()
    one, other = LogisticTS(spec, dim=4), LogisticTS(spec, dim=4)
    step = next(synthetic_steps(one, spec, 32, 1, torch.Generator().manual_seed(0)))
    one.update(step)
    other.feedback(other.expect(step.obs, step.decision), 7.0 * step.slot_reward)
    assert torch.equal(one.mode, other.mode)


def test_forgetting_keeps_the_prior():
    spec = synthetic_spec()
    agent = LogisticTS(spec, dim=4, forget=0.5, ridge=2.0)
    step = next(synthetic_steps(agent, spec, 32, 1, torch.Generator().manual_seed(0)))
    empty = replace(step.decision, slate=torch.full_like(step.decision.slate, -1))
    agent.update(step)
    for _ in range(40):  # nothing shown: all is forgotten but the prior
        agent.update(replace(step, decision=empty))
    assert torch.allclose(agent.precision, 2.0 * torch.eye(len(agent.mode)).double(), atol=1e-6)


@pytest.mark.parametrize("slate_size", [1, 3])
def test_it_keeps_the_contract(slate_size):
    spec = synthetic_spec(slate_size=slate_size)
    assert check_agent(LogisticTS(spec, dim=6, forget=0.99), spec) == []


def test_a_resumed_agent_goes_on_bit_for_bit():
    spec, g = synthetic_spec(), torch.Generator().manual_seed(0)
    agent, other = LogisticTS(spec), LogisticTS(replace(spec, seed=9))
    for step in synthetic_steps(agent, spec, 16, 3, g):
        agent.update(step)
    other.load_state_dict(agent.state_dict())
    other.load_experience(agent.experience())
    for _ in range(2):
        obs = synthetic_observation(spec, 16, g)
        one, two = agent.act(obs, None), other.act(obs, None)
        assert torch.equal(one.slate, two.slate)
        for a, decision in ((agent, one), (other, two)):
            a.feedback(a.expect(obs, decision), (decision.slate % 2).float())
        assert torch.equal(agent.mode, other.mode)


def test_settings_and_checkpoints_that_do_not_fit_are_refused():
    spec = synthetic_spec()
    for knobs in ({"scale": 0.0}, {"samples": 0}, {"forget": 2.0}, {"ridge": -1.0}):
        with pytest.raises(ValueError, match=next(iter(knobs))):
            LogisticTS(spec, **knobs)
    with pytest.raises(ValueError, match="dim it was trained with"):
        LogisticTS(spec).load_state_dict(LogisticTS(spec, dim=4).state_dict())
