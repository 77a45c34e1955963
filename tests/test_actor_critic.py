"""PPO and A2C learn toys with known answers, keep masks exactly, and go on where they stopped."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from toys import toy_obs, toy_spec, toy_step

from agents.actor_critic import ActorCritic, clipped_gain, divergence, standard
from agents.base import Decision
from agents.rollout import slate_log_probs
from agents.testing import check_agent, synthetic_observation, synthetic_spec, synthetic_steps
from encoders.state import EMPTY

A2C = {"epochs": 1, "clip": None, "minibatch": None}
PPO = {"epochs": 4, "minibatch": 32}
QUICK = {"width": 16, "steps": 4, "minibatch": 48, "epochs": 2}


def play_identity(agent, steps, users=8, seed=3):
    """The item must be the state: states are drawn anew each step, episodes last 100."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randint(0, 4, (users,), generator=generator)
    for t in range(steps // users):
        profile = F.one_hot(state, 4).float()
        decision = agent.act(toy_obs(profile), None)
        reward = (decision.slate == state[:, None]).float()
        state = torch.randint(0, 4, (users,), generator=generator)
        cut = torch.full((users,), (t + 1) % 100 == 0)
        agent.update(toy_step(profile, decision, reward, F.one_hot(state, 4).float(), cut=cut))
    state = torch.randint(0, 4, (100,), generator=generator)
    slate = agent.act(toy_obs(F.one_hot(state, 4).float()), None, explore=False).slate
    return int((slate[:, 0] == state).sum())


@pytest.mark.parametrize(
    "form", [PPO | {"steps": 8, "width": 64}, A2C | {"steps": 4}], ids=["ppo", "a2c"]
)
def test_the_identity_is_learnt_in_1200_steps(form):
    agent = ActorCritic(toy_spec(seed=3), lr=2e-3, gamma=0.4, **form)
    assert play_identity(agent, 1200) >= 90


def play_contexts(agent, updates, users=64, items=20):
    """Reward <s, e_a> of the slots' items, each step a session of its own."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        profile = torch.randn(users, items, generator=generator)
        decision = agent.act(toy_obs(profile), None)
        left = torch.ones(users, dtype=torch.bool)
        reward = profile.gather(1, decision.slate)
        agent.update(toy_step(profile, decision, reward, profile, left=left))
    profile = torch.randn(512, items, generator=generator)
    slate = agent.act(toy_obs(profile), None, explore=False).slate
    return float(profile.gather(1, slate).mean())


@pytest.mark.parametrize("k", [1, 4])
def test_items_that_fit_the_user_are_found(k):
    spec = toy_spec(items=20, states=20, slate_size=k)
    value = play_contexts(ActorCritic(spec, steps=4, minibatch=128, lr=3e-3, width=64), 120)
    assert value > 0.6  # at random 0; the standard error is .04


def test_a_slot_is_not_praised_for_the_clicks_of_its_neighbours():
    agent = ActorCritic(toy_spec(items=6, slate_size=3), steps=4, minibatch=64, lr=5e-3)
    profile, pay = torch.eye(4)[:1].expand(16, 4), torch.tensor([0.0, 0.0, 0.5, 0.0, 1.0, 0.75])
    for _ in range(60):
        decision = agent.act(toy_obs(profile), None)
        left = torch.ones(16, dtype=torch.bool)
        agent.update(toy_step(profile, decision, pay[decision.slate], profile, left=left))
    assert agent.act(toy_obs(profile[:1]), None, explore=False).slate.tolist() == [[4, 5, 2]]


def test_a_step_limit_does_not_stop_bootstrapping():
    agent = ActorCritic(toy_spec(), gamma=0.9, lam=0.95, steps=8, minibatch=64)
    profile, clock = torch.eye(4)[:1].expand(16, 4), torch.arange(16) % 10
    for _ in range(200):
        decision = agent.act(toy_obs(profile), None)
        clock = clock + 1
        over = clock == 10
        agent.update(toy_step(profile, decision, torch.ones(16, 1), profile, cut=over))
        clock = torch.where(over, 0, clock)
    seen = agent.net.read(toy_obs(profile[:1]))
    assert float(agent.critic.values(seen)) == pytest.approx(10.0, abs=0.3)


def test_leaving_stops_bootstrapping():
    agent = ActorCritic(toy_spec(), gamma=0.99, steps=4, minibatch=64, lr=5e-3)
    profile = torch.eye(4)[:1].expand(16, 4)
    for _ in range(100):
        decision = agent.act(toy_obs(profile), None)
        left = torch.ones(16, dtype=torch.bool)
        agent.update(toy_step(profile, decision, torch.ones(16, 1), profile, left=left))
    seen = agent.net.read(toy_obs(profile[:1]))
    assert float(agent.critic.values(seen)) == pytest.approx(1.0, abs=0.02)


def test_the_clip_takes_gain_away_and_never_loss():
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    found = clipped_gain(ratio, advantage, 0.2)
    assert found.tolist() == pytest.approx([1.2, 0.5, -1.5, -0.8, 1.1])
    assert torch.equal(clipped_gain(ratio, advantage, None), ratio * advantage)


def test_the_estimated_divergence_is_never_negative_and_right_in_the_mean():
    old, new = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    each = divergence((new / old).log())
    assert (each >= 0).all()
    assert float((old * each).sum()) == pytest.approx(float((old * (old / new).log()).sum()))


def test_advantages_are_standardised_and_equal_ones_are_nothing():
    found = standard(torch.tensor([[1.0, 3.0], [5.0, 7.0]]))
    assert float(found.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(found.square().mean()) == pytest.approx(1.0)
    assert (standard(torch.full((4,), 7.0)) == 0).all()


@pytest.mark.parametrize("k", [1, 3])
def test_the_ratio_starts_at_one_whatever_the_mask(k):
    spec = synthetic_spec(slate_size=k)
    agent = ActorCritic(spec, width=16)
    with torch.no_grad():
        agent.net.item.weight.mul_(30.0)  # a policy with opinions
    obs = synthetic_observation(spec, 64, torch.Generator().manual_seed(0))
    decision = agent.act(obs, obs.history)
    allowed = agent._allowed(obs, obs.history)
    logp = agent.net(obs).masked_fill(~allowed, -torch.inf).log_softmax(dim=1)
    new, real = slate_log_probs(logp, decision.slate)
    assert real.all()
    assert decision.propensity.min() < 0.03
    assert (new - decision.propensity.log()).abs().max() < 1e-4


def test_forbidden_items_are_never_sampled_even_where_they_are_far_better():
    agent = ActorCritic(toy_spec(items=4))
    with torch.no_grad():
        agent.net.bias.weight.copy_(200.0 * agent.net.items[0])  # item 0 by hundreds of logits
    mask = torch.tensor([[False, True, True, True]]).expand(50_000, 4)
    obs = toy_obs(torch.eye(4)[:1].expand(50_000, 4))
    for explore in (True, False):
        assert (agent.act(obs, mask, explore=explore).slate != 0).all()
        assert (agent.action_probs(obs, mask, explore=explore)[:, 0] == 0).all()
    assert (agent.act(obs[:9], None).slate == 0).all()


def test_users_are_served_the_best_or_at_a_temperature():
    spec = synthetic_spec(slate_size=3)
    obs = synthetic_observation(spec, 8, torch.Generator().manual_seed(0))
    agents = {t: ActorCritic(spec, width=16, temperature=t) for t in (0.0, 0.5, 1.0)}
    learnt = agents[0.0].action_probs(obs, None)
    best = learnt.argsort(dim=1, descending=True)[:, :3]
    assert torch.equal(agents[0.0].act(obs, None, explore=False).slate, best)
    served = {t: a.action_probs(obs, None, explore=False) for t, a in agents.items()}
    assert (served[0.0].max(dim=1).values == 1.0).all()
    assert torch.equal(served[1.0], learnt)
    sharper = learnt.square() / learnt.square().sum(dim=1, keepdim=True)
    assert torch.allclose(served[0.5], sharper, rtol=1e-4)
    for agent in agents.values():
        assert torch.equal(agent.action_probs(obs, None), learnt)  # learning is not touched by it
        assert check_agent(agent, spec) == []


def test_masks_are_kept_in_the_loss():
    agent = ActorCritic(toy_spec(), steps=2, lr=0.01, entropy_weight=1.0, normalize=False)
    profile = torch.eye(4)
    mask = torch.tensor([[True, True, False, False]]).expand(4, 4)
    for _ in range(8):
        decision = agent.act(toy_obs(profile), mask)
        reward = torch.zeros(4, 1)
        logs = agent.update(toy_step(profile, decision, reward, profile, mask=mask))
    # the most spread there can be is over the two allowed items, not over four
    assert -float(logs["train/entropy_loss"]) == pytest.approx(0.6931, abs=2e-3)


def trained(agent, steps, seed=0):
    """The agent after `steps` of one fixed stream of observations."""
    generator = torch.Generator().manual_seed(seed)
    logs = {}
    for transition in synthetic_steps(agent, agent.spec, 32, steps, generator):
        logs = agent.update(transition) or logs
    return agent, logs


def saved(agent, path):
    torch.save([agent.state_dict(), agent.experience()], path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("k", [1, 3])
def test_training_resumes_bit_for_bit_in_the_middle_of_a_rollout(tmp_path, k):
    spec = replace(synthetic_spec(slate_size=k), total_steps=2000)
    knobs = QUICK | {"schedule": "linear"}
    straight, _ = trained(ActorCritic(spec, **knobs), 10)
    trained(straight, 9, seed=5)
    first, _ = trained(ActorCritic(spec, **knobs), 10)
    assert len(first.rollout) == 2
    second = ActorCritic(replace(spec, seed=77), **knobs)
    state, experience = saved(first, tmp_path / "state.pt")
    second.load_state_dict(state)
    assert len(second.rollout) == 0
    second.load_experience(experience)
    trained(second, 9, seed=5)
    obs = synthetic_observation(spec, 64, torch.Generator().manual_seed(9))
    assert torch.equal(straight.scores(obs), second.scores(obs))
    seen = straight.net.read(obs)
    assert torch.equal(straight.critic.values(seen), second.critic.values(seen))
    assert torch.equal(straight.act(obs, None).slate, second.act(obs, None).slate)
    assert straight.updates == second.updates == 4 * 2 * 3


def test_the_same_seed_trains_bit_equally_and_another_does_not():
    spec = synthetic_spec()
    a, b, c = (trained(ActorCritic(replace(spec, seed=s), **QUICK), 8)[0] for s in (0, 0, 1))
    obs = synthetic_observation(spec, 4, torch.Generator().manual_seed(9))
    assert torch.equal(a.scores(obs), b.scores(obs))
    assert not torch.equal(a.scores(obs), c.scores(obs))


def test_a_rollout_is_learnt_from_when_it_is_full_and_what_is_learnt_is_logged():
    agent, logs = trained(ActorCritic(synthetic_spec(), **QUICK), 3)
    assert logs == {}
    assert agent.updates == 0
    _, logs = trained(agent, 1)
    assert agent.updates == 2 * 3  # 128 rows in minibatches of 48, twice
    assert {
        "train/loss", "train/policy_gradient_loss", "train/value_loss", "train/entropy_loss",
        "train/approx_kl", "train/clip_fraction", "train/explained_variance",
        "train/learning_rate", "train/grad_norm",
    } <= set(logs)  # fmt: skip


def test_passes_stop_where_the_policy_has_gone_too_far():
    knobs = QUICK | {"epochs": 50, "lr": 0.02}
    free, _ = trained(ActorCritic(synthetic_spec(), **knobs), 4)
    held, _ = trained(ActorCritic(synthetic_spec(), **knobs, target_kl=0.01), 4)
    assert free.updates == 150
    assert held.updates < 75
    assert held.updates % 3 == 0  # a pass is finished


def test_schedules_end_with_the_training():
    spec = replace(synthetic_spec(), total_steps=256)
    _, logs = trained(ActorCritic(spec, **QUICK, lr=1e-3, schedule="linear"), 4)
    assert float(logs["train/learning_rate"]) == pytest.approx(5e-4)
    with pytest.raises(ValueError, match="needs the env steps"):
        ActorCritic(synthetic_spec(), schedule="linear")


def test_empty_and_impossible_slots_teach_nothing():
    spec = synthetic_spec(slate_size=3)
    agents = [ActorCritic(spec, **QUICK | A2C | {"steps": 1}) for _ in range(2)]
    step = next(synthetic_steps(agents[0], spec, 32, 1, torch.Generator().manual_seed(0)))
    slate = step.decision.slate.clone()
    slate[:, 1] = EMPTY
    propensity = step.decision.propensity.clone()
    for agent, chance in zip(agents, (0.0, 0.7), strict=True):
        propensity[:, 1] = chance  # of a slot that showed nothing
        agent.generator.manual_seed(0)
        agent.update(replace(step, decision=Decision(slate, propensity.clone())))
    for a, b in zip(agents[0].net.parameters(), agents[1].net.parameters(), strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


@pytest.mark.parametrize("field", ["reward", "slot_reward"])
def test_a_reward_that_is_not_finite_is_refused_before_it_is_kept(field):
    agent = ActorCritic(synthetic_spec(), **QUICK)
    step = next(synthetic_steps(agent, agent.spec, 8, 1, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match=f"{field} must be finite"):
        agent.update(replace(step, **{field: getattr(step, field) * torch.nan}))
    assert len(agent.rollout) == agent.env_steps == 0


def test_checkpoints_of_others_are_refused():
    state = ActorCritic(synthetic_spec()).state_dict()
    with pytest.raises(ValueError, match="catalogue of 24 items, this one has 30"):
        ActorCritic(synthetic_spec(num_items=30)).load_state_dict(state)
    with pytest.raises(ValueError, match="net of another form"):
        ActorCritic(synthetic_spec(), width=64).load_state_dict(state)


@pytest.mark.parametrize(
    ("knob", "words"),
    [
        ({"lr": 0.0}, "lr must be above 0"),
        ({"gamma": 1.1}, "gamma must be in"),
        ({"lam": -0.1}, "lam must be in"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"minibatch": 0}, "minibatch must be"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"entropy_weight": -1.0}, "entropy_weight must be at least 0"),
        ({"temperature": -0.5}, "temperature must be at least 0"),
        ({"schedule": "square"}, "schedule must be one of"),
    ],
)
def test_knobs_out_of_range_are_refused(knob, words):
    with pytest.raises(ValueError, match=words):
        ActorCritic(synthetic_spec(), **knob)
