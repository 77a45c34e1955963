"""LinUCB is closed-form ridge regression, explores what it does not know, and misses little."""

from dataclasses import replace

import pytest
import torch

from agents.bandit_algebra import downdated, grouped, level_of, sigma_of
from agents.linucb import LinUCB, optimistic
from agents.ridge import ridge_of
from agents.testing import check_agent, synthetic_observation, synthetic_spec, synthetic_steps
from experiments import bandit_speed
from experiments.bandit_speed import bandit_spec, observed, step_of


def disjoint(arms=10, features=5, seed=0, **knobs):
    settings = {"features": "disjoint", "dim": features + 1, "noise": 1.0, **knobs}
    return LinUCB(bandit_spec(seed, arms=arms, features=features), **settings)


@pytest.mark.parametrize("forget", [1.0, 0.9])
def test_disjoint_posteriors_are_the_closed_form_after_every_batch(forget):
    g = torch.Generator().manual_seed(0)
    agent = disjoint(arms=4, ridge=2.0, forget=forget)
    batches = []
    for size in (3, 40, 1, 12, 12):  # few rows per arm, and more than the context has numbers
        x = torch.randn(size, 5, generator=g)
        arm = torch.randint(0, 4, (size, 1), generator=g)
        reward = torch.rand(size, 1, generator=g)
        agent.update(step_of(x, arm, reward))
        batches.append((torch.cat([torch.ones(size, 1), x], dim=1), arm[:, 0], reward[:, 0]))
        age = torch.arange(len(batches) - 1, -1, -1)
        weight = torch.cat([torch.full((len(b[1]),), forget ** int(a)) for a, b in
                            zip(age, batches, strict=True)]).double()  # fmt: skip
        xs, arms, rs = (torch.cat(part) for part in zip(*batches, strict=True))
        xs, rs = xs.double(), rs.double()
        count = torch.zeros(4, dtype=torch.float64).index_add_(0, arms, weight)
        total = torch.zeros(4, dtype=torch.float64).index_add_(0, arms, weight * rs)
        level = ((total / (count + 1)).sum() / (count / (count + 1)).sum()).item()
        for a in range(4):
            mine = arms == a
            xa, wa = xs[mine], weight[mine]
            gram = 2.0 * torch.eye(6).double() + (xa * wa[:, None]).T @ xa
            theta = torch.linalg.solve(gram, (xa * wa[:, None]).T @ (rs[mine] - level))
            post = agent.model.post
            assert torch.allclose(post["inverse"][a], gram.inverse(), rtol=1e-4, atol=1e-6)
            assert torch.allclose(post["theta"][a], theta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("features", ["shared", "hybrid"])
@pytest.mark.parametrize("forget", [1.0, 0.9])
def test_shared_posteriors_are_ridge_with_a_column_for_every_intercept(features, forget):
    spec = synthetic_spec(num_items=6, slate_size=2)
    agent = LinUCB(spec, features=features, dim=4, ridge=0.5, forget=forget)
    g, parts = torch.Generator().manual_seed(0), []
    for step in synthetic_steps(agent, spec, 16, 4, g):
        slate, reward = step.decision.slate, torch.rand(16, 2, generator=g)
        x = agent.model.vectors(step.obs, slate).flatten(0, 1).double()
        agent.update(replace(step, reward=reward.sum(dim=1), slot_reward=reward))
        parts = [(x0, i, r, w * forget) for x0, i, r, w in parts]
        parts.append((x, slate.flatten(), reward.flatten().double(), 1.0))
    x, item, r = (torch.cat([part[i] for part in parts]) for i in range(3))
    weight = torch.cat([torch.full((len(p[1]),), p[3]) for p in parts]).double()
    one_hot = torch.nn.functional.one_hot(item, 6).double() * (features == "hybrid")
    wide = torch.cat([x, one_hot], dim=1)  # the intercepts as columns, none of them integrated out
    level = level_of(
        (weight[:, None] * torch.nn.functional.one_hot(item, 6)).sum(dim=0),
        ((weight * r)[:, None] * torch.nn.functional.one_hot(item, 6)).sum(dim=0),
    )
    gram = 0.5 * torch.eye(wide.shape[1]).double() + (wide * weight[:, None]).T @ wide
    theta = torch.linalg.solve(gram, (wide * weight[:, None]).T @ (r - level))
    obs = synthetic_observation(spec, 5, g)
    every = agent.model.vectors(obs, torch.arange(6).expand(5, -1)).double()  # (B, N, d)
    own = torch.eye(6).double().expand(5, -1, -1) * (features == "hybrid")
    every = torch.cat([every, own], dim=2)
    mean, width = agent.scores(obs), agent.model.width(agent.model.view(obs))
    assert torch.allclose(mean.double(), every @ theta + level, atol=1e-4)
    wanted = torch.einsum("bnd,de,bne->bn", every, gram.inverse(), every).sqrt()
    sigma = agent.model.post["sigma"]
    assert torch.allclose(width.double(), wanted * sigma, rtol=1e-3)
    left = (weight * (r - level - wide @ theta) ** 2).sum() + 0.5 * theta @ theta
    spread = (weight * (r - level) ** 2).sum() / weight.sum()
    assert sigma.item() == pytest.approx(((spread + left) / (1 + weight.sum())).sqrt().item())


@pytest.mark.parametrize("ridge", [0.1, 1.0, 10.0])
def test_an_untried_arm_is_alpha_over_root_ridge_wide(ridge):
    agent = disjoint(features=2, dim=1, ridge=ridge, alpha=0.7)  # the context is the intercept
    bound = agent.bounds(observed(torch.zeros(1, 2)))
    assert bound[0].tolist() == pytest.approx([0.7 / ridge**0.5] * 10)


def test_untried_arms_of_equal_bonus_are_drawn_evenly():
    agent, users = disjoint(), 4000
    x = torch.randn(users, 5, generator=torch.Generator().manual_seed(0))
    x = x / x.norm(dim=1, keepdim=True)
    decision = agent.act(observed(x), None)
    often = torch.bincount(decision.slate[:, 0], minlength=10) / users
    assert often.min() > 0.08
    assert torch.allclose(decision.propensity, torch.full((users, 1), 0.1))


def regret_of(agent, steps, batch=10, arms=10, seed=0):
    """Regret (steps,) of an agent and of random arms, in a world linear in 5 numbers."""
    g = torch.Generator().manual_seed(seed)
    theta = torch.randn(5, arms, generator=g)
    ours, random = [], []
    for _ in range(steps // batch):
        x = torch.randn(batch, 5, generator=g)
        paid = x @ theta  # (B, N)
        slate = agent.act(observed(x), None).slate
        mean = paid.gather(1, slate)
        agent.update(step_of(x, slate, mean + 0.1 * torch.randn(batch, 1, generator=g)))
        best = paid.amax(dim=1)
        ours.append((best - mean[:, 0]).sum())
        random.append((best - paid.mean(dim=1)).sum())
    return torch.stack(ours).cumsum(0), torch.stack(random).sum()


def test_regret_grows_slower_than_a_root_and_is_small():
    agent = disjoint(noise=0.1, alpha=1.0, ridge=0.1)
    regret, random = regret_of(agent, 16_000, batch=20)
    early, late = regret[49], regret[-1]  # after 1000 and after 16,000 decisions
    slope = (late / early).log() / torch.tensor(16.0).log()
    assert slope < 0.6
    assert late < 0.01 * random


def missed(agent, center, steps=60):
    """Share of random arms' regret that an agent has when arms pay around `center`."""
    g = torch.Generator().manual_seed(4)
    theta = torch.randn(8, 40, generator=g)
    theta, lost, even = theta / theta.norm(dim=0), 0.0, 0.0
    for _ in range(steps):
        x = torch.randn(100, 8, generator=g)
        x = x / x.norm(dim=1, keepdim=True)
        paid = center + 0.6 * x @ theta
        slate = agent.act(observed(x), None).slate
        mean = paid.gather(1, slate)
        agent.update(step_of(x, slate, mean + 0.1 * torch.randn(100, 1, generator=g)))
        lost += (paid.amax(dim=1) - mean[:, 0]).sum().item()
        even += (paid.amax(dim=1) - paid.mean(dim=1)).sum().item()
    return lost / even


def test_rewards_far_from_zero_do_not_turn_optimism_into_pessimism():
    low, high = (missed(disjoint(arms=40, features=8, alpha=0.3), c) for c in (0.0, 5.0))
    assert low < 0.5
    assert high < 1.2 * low


def test_forgetting_follows_a_switch_of_the_best_arm():
    def after_switch(forget):
        agent = disjoint(arms=2, features=1, dim=1, noise=0.1, forget=forget)
        g, x = torch.Generator().manual_seed(0), torch.zeros(8, 1)
        shown = []
        for t in range(120):
            paid = torch.tensor([0.8, 0.2] if t < 60 else [0.2, 0.8])
            slate = agent.act(observed(x), None).slate
            agent.update(step_of(x, slate, paid[slate] + 0.1 * torch.randn(8, 1, generator=g)))
            shown.append((slate == 1).float().mean())
        return torch.stack(shown)[-20:].mean().item()

    assert after_switch(0.9) > 0.9
    assert after_switch(1.0) < 0.5  # after as long again, the old mean is still in the way


def test_rare_solves_wait_and_then_agree():
    g = torch.Generator().manual_seed(0)
    often, rare = disjoint(arms=4), disjoint(arms=4, refresh=3)
    for turn in range(6):
        x, arm = torch.randn(9, 5, generator=g), torch.randint(0, 4, (9, 1), generator=g)
        step = step_of(x, arm, torch.rand(9, 1, generator=g))
        before = rare.scores(observed(x))
        often.update(step)
        rare.update(step)
        assert torch.equal(rare.scores(observed(x)), before) == (turn % 3 != 2)
    assert torch.allclose(often.bounds(observed(x)), rare.bounds(observed(x)), atol=1e-5)


def test_woodbury_and_groups_by_hand():
    item, x = torch.tensor([3, 1, 3]), torch.arange(6, dtype=torch.float64).reshape(3, 2)
    arms, rows = grouped(item, x)
    assert arms.tolist() == [1, 3]
    assert rows.tolist() == [[[2.0, 3.0], [0.0, 0.0]], [[0.0, 1.0], [4.0, 5.0]]]
    a = torch.eye(2).double().expand(2, 2, 2)
    wanted = (a + rows.transpose(1, 2) @ rows).inverse()
    assert torch.allclose(downdated(a, rows), wanted)


def test_the_level_is_the_mean_of_items_and_sigma_survives_equal_rewards():
    count, total = torch.tensor([1.0, 99.0, 0.0]), torch.tensor([0.0, 99.0, 0.0])
    assert level_of(count, total).item() == pytest.approx(0.99 / (0.5 + 0.99))
    none = {"count": torch.tensor([0.0]), "total": torch.tensor([0.0]), "square": torch.tensor(0.0)}
    assert sigma_of(none, torch.tensor(0.0), torch.tensor(0.0), None) == 1.0
    dull = none | {"count": torch.tensor([9.0])}
    assert 0.0 < sigma_of(dull, torch.tensor(0.0), torch.tensor(0.0), None) < 1e-3
    assert optimistic(torch.tensor([1.0]), torch.tensor([0.5]), 2.0).tolist() == [2.0]


def test_the_unit_of_the_reward_does_not_matter():
    g = torch.Generator().manual_seed(0)
    spec = synthetic_spec()
    cents, euros = LinUCB(spec), LinUCB(spec)
    for step in synthetic_steps(cents, spec, 32, 5, g):
        cents.update(replace(step, reward=100 * step.reward, slot_reward=100 * step.slot_reward))
        euros.update(step)
    obs = synthetic_observation(spec, 8, g)
    assert torch.allclose(cents.bounds(obs), 100 * euros.bounds(obs), rtol=1e-3)


@pytest.mark.parametrize("slate_size", [1, 3])
@pytest.mark.parametrize("features", ["shared", "hybrid", "disjoint"])
def test_every_kind_of_features_keeps_the_contract(features, slate_size):
    spec = synthetic_spec(slate_size=slate_size)
    assert check_agent(LinUCB(spec, features=features, dim=6, forget=0.99), spec) == []


@pytest.mark.parametrize("features", ["shared", "hybrid", "disjoint"])
def test_a_resumed_agent_goes_on_bit_for_bit(features):
    spec = synthetic_spec()
    agent = LinUCB(spec, features=features, refresh=2)
    other = LinUCB(replace(spec, seed=9), features=features, refresh=2)
    g = torch.Generator().manual_seed(0)
    for step in synthetic_steps(agent, spec, 16, 5, g):
        agent.update(step)
    other.load_state_dict(agent.state_dict())
    other.load_experience(agent.experience())
    for _ in range(4):
        obs = synthetic_observation(spec, 16, g)
        one, two = agent.act(obs, None), other.act(obs, None)
        assert torch.equal(one.slate, two.slate)
        reward = torch.rand(one.slate.shape, generator=g)
        for a, decision in ((agent, one), (other, two)):
            a.feedback(a.expect(obs, decision), reward)
        assert torch.equal(agent.bounds(obs), other.bounds(obs))


def test_a_saved_state_is_not_changed_by_learning_on():
    spec = synthetic_spec()
    agent, g = LinUCB(spec, features="disjoint", dim=6), torch.Generator().manual_seed(0)
    obs = synthetic_observation(spec, 4, g)
    saved, before = agent.state_dict(), agent.bounds(obs)
    for step in synthetic_steps(agent, spec, 16, 3, g):
        agent.update(step)
    agent.load_state_dict(saved)
    assert torch.equal(agent.bounds(obs), before)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"alpha": -1.0}, "alpha must be at least 0, got -1.0"),
        ({"features": "sparse"}, "features must be one of shared, hybrid, disjoint, got 'sparse'"),
        ({"forget": 0.0}, "forget must be above 0"),
        ({"forget": 1.1}, r"forget must be in \(0, 1\], got 1.1"),
        ({"ridge": 0.0}, "ridge must be above 0"),
        ({"dim": 0}, "dim must be a whole number of at least 1, got 0"),
        ({"noise": 0.0}, "noise must be above 0"),
        ({"pending": 0}, "pending must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(knobs, words):
    with pytest.raises(ValueError, match=words):
        LinUCB(synthetic_spec(), **knobs)


def test_matrices_for_every_item_are_refused_where_they_would_not_fit():
    spec = bandit_spec(0, arms=2000, features=100)
    with pytest.raises(ValueError, match=r"2000 matrices of 101 x 101 .*dim=45 would fit"):
        ridge_of(spec, features="disjoint", dim=101, ridge=1.0, forget=1.0, refresh=1, noise=None)


def test_checkpoints_of_another_form_and_rewards_that_are_no_numbers_are_refused():
    spec = synthetic_spec()
    agent = LinUCB(spec)
    with pytest.raises(ValueError, match="features=disjoint"):
        agent.load_state_dict(LinUCB(spec, features="disjoint").state_dict())
    with pytest.raises(ValueError, match="features and dim"):
        agent.load_state_dict(LinUCB(spec, dim=8).state_dict())
    step = next(synthetic_steps(agent, spec, 4, 1, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="slot_reward must be finite, row 0 is not"):
        agent.update(replace(step, slot_reward=step.slot_reward * torch.nan))
    nothing = torch.zeros(4, 24, dtype=torch.bool)
    with pytest.raises(ValueError, match="allows no item in row 0"):
        agent.act(step.obs, nothing)


def test_the_benchmark_says_speed_and_regret_of_every_policy():
    found = bandit_speed.rows(1, 0.0, 0, True)
    speed, regret = found[:2]
    assert "LinUCB: 100 arms" in speed["case"]
    assert (speed["peer_goal"], regret["peer_goal"]) == (1.3, 1.0)
    assert all(row["product"] > 0 and row["peer_name"] == bandit_speed.PEER for row in found)
    told = [row["product"] for row in found if "less regret" in row["case"]]
    assert all(1 < times < 100 for times in told)
    assert len({row["case"] for row in found}) == len(found) == 8


@pytest.mark.parametrize("features", ["shared", "hybrid", "disjoint"])
def test_a_state_put_back_brings_its_own_widths(features):
    spec = synthetic_spec(num_items=8)
    one, other = (LinUCB(spec, features=features, dim=4) for _ in range(2))
    for step in synthetic_steps(one, spec, 16, 3, torch.Generator().manual_seed(0)):
        one.update(step)
    bounds = one.bounds(step.obs)
    assert not torch.allclose(other.bounds(step.obs), bounds)  # and is kept until the next solve
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.bounds(step.obs), bounds)
