"""Epsilon-greedy flips a coin for each user and slot, and says the chance of what it shows."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from agents.bootstrapped import Bootstrapped
from agents.epsilon_greedy import EpsilonGreedy
from agents.lints import LinTS
from agents.linucb import LinUCB
from agents.logistic_ts import LogisticTS
from agents.neural_linear import NeuralLinear
from agents.testing import check_agent, synthetic_observation, synthetic_spec
from experiments.bandit_speed import bandit_spec, observed, step_of


def taught(epsilon, slate_size=1):
    """Arms 0..3 that pay .9, .6, .3 and 0, known for sure."""
    spec = bandit_spec(0, arms=4, features=1, slate_size=slate_size)
    agent = EpsilonGreedy(spec, features="disjoint", dim=1, epsilon=epsilon)
    arm = torch.arange(4).repeat(200)
    x, paid = torch.zeros(800, 1), torch.tensor([0.9, 0.6, 0.3, 0.0])
    slate = arm[:, None].repeat(1, slate_size)
    slate[:, 1:] = -1
    reward = torch.zeros(slate.shape)
    reward[:, 0] = paid[arm]
    agent.update(step_of(x, slate, reward))
    return agent


def test_means_are_learnt_and_the_best_is_shown():
    agent = taught(0.0)
    means = agent.scores(observed(torch.zeros(1, 1)))[0]
    assert means.tolist() == pytest.approx([0.9, 0.6, 0.3, 0.0], abs=0.01)
    decision = agent.act(observed(torch.zeros(9, 1)), None)
    assert (decision.slate == 0).all()
    assert (decision.propensity == 1).all()


def test_each_user_flips_their_own_coin():
    agent, shares = taught(0.5), []
    for _ in range(200):
        slate = agent.act(observed(torch.zeros(16, 1)), None).slate
        shares.append((slate != 0).float().mean())
    shares = torch.stack(shares)
    assert shares.mean() == pytest.approx(0.5 * 0.75, abs=0.03)
    # binomial of 16 coins; one coin for all would have a spread of .37 or more
    assert shares.std() == pytest.approx((0.375 * 0.625 / 16) ** 0.5, abs=0.03)


def test_each_slot_flips_its_own_coin():
    agent = taught(0.4, slate_size=2)
    slate = agent.act(observed(torch.zeros(20_000, 1)), None).slate
    first = slate[:, 0] == 0
    second = slate[:, 1] == torch.where(first, 1, 0)  # the best that is left
    assert first.float().mean() == pytest.approx(0.6 + 0.1, abs=0.01)
    assert second[first].float().mean() == pytest.approx(0.6 + 0.4 / 3, abs=0.015)
    assert second[~first].float().mean() == pytest.approx(0.6 + 0.4 / 3, abs=0.02)


def test_untried_arms_are_drawn_evenly():
    spec = bandit_spec(0, arms=5, features=2)
    agent = EpsilonGreedy(spec, features="disjoint", dim=3, epsilon=0.0)
    often = torch.bincount(agent.act(observed(torch.ones(5000, 2)), None).slate[:, 0]) / 5000
    assert often.tolist() == pytest.approx([0.2] * 5, abs=0.03)


def test_explore_false_flips_no_coin():
    agent = taught(1.0)
    assert (agent.act(observed(torch.zeros(99, 1)), None, explore=False).slate == 0).all()
    assert agent.action_probs(observed(torch.zeros(1, 1)), None)[0].tolist() == [0.25] * 4


@pytest.mark.parametrize("slate_size", [1, 3])
@pytest.mark.parametrize("features", ["shared", "hybrid", "disjoint"])
def test_every_kind_of_features_keeps_the_contract(features, slate_size):
    spec = synthetic_spec(slate_size=slate_size)
    assert check_agent(EpsilonGreedy(spec, features=features, dim=6), spec) == []


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"epsilon must be in \[0, 1\], got 1.5"):
        EpsilonGreedy(synthetic_spec(), epsilon=1.5)


@pytest.mark.parametrize(
    "make",
    [
        EpsilonGreedy,
        partial(LinUCB, features="disjoint"),
        LinTS,
        LogisticTS,
        NeuralLinear,
        Bootstrapped,
    ],
)
@pytest.mark.parametrize("slate_size", [1, 2])
def test_nothing_is_shown_where_the_observation_is_no_number(make, slate_size):
    spec = synthetic_spec(num_items=6, slate_size=slate_size)
    obs = synthetic_observation(spec, 3, torch.Generator().manual_seed(0))
    profile = obs.profile.clone()
    profile[1, 0] = torch.nan
    allowed = torch.ones(3, 6, dtype=torch.bool)
    allowed[:, 0] = False  # what was shown before this was refused, at a propensity of 0
    with pytest.raises(ValueError, match="scores must be finite, row 1 is not"):
        make(spec).act(replace(obs, profile=profile), allowed)
