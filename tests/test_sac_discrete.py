"""Discrete SAC finds known soft values, keeps masks and its entropy, learns slates by slot."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from toys import toy_obs, toy_spec, toy_step

from agents.explore import plackett_luce_probs
from agents.sac_discrete import (
    SACDiscrete,
    entropy,
    huber,
    slot_policies,
    soft_value,
    temperature_loss,
)
from agents.testing import synthetic_observation, synthetic_spec, synthetic_steps
from encoders.state import EMPTY

QUICK = {"width": 16, "learning_starts": 64, "batch_size": 32, "replay_ratio": 1.0}


def test_the_soft_policy_and_its_value_by_hand():
    q = torch.tensor([1.0, 2.0, 0.0])
    logp = (q / 0.5).log_softmax(dim=0)
    assert logp.exp().tolist() == pytest.approx([0.1173, 0.8668, 0.0159], abs=5e-5)
    assert float(soft_value(q, logp, 0.5)) == pytest.approx(2.0715, abs=5e-5)
    assert float(soft_value(q, logp, 0.5)) == pytest.approx(0.5 * float((q / 0.5).logsumexp(0)))


def test_the_gradient_of_the_soft_value_leads_to_that_policy():
    q, logits = torch.tensor([[1.0, 2.0, 0.0]]), torch.zeros(1, 3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(120):
        optimizer.zero_grad()
        (-soft_value(q, logits.log_softmax(dim=1), 0.5).sum()).backward()
        optimizer.step()
    probs = logits.detach().softmax(dim=1)[0].tolist()
    assert probs == pytest.approx([0.1173, 0.8668, 0.0159], abs=2e-3)


def test_forbidden_items_have_no_part_and_no_gradient():
    q = torch.tensor([[1.0, 2.0, 1e9]])
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    logp = logits.log_softmax(dim=1)
    assert float(soft_value(q, logp, 1.0).detach()) == pytest.approx(1.5 + math.log(2))
    assert float(entropy(logp.detach())) == pytest.approx(math.log(2))
    soft_value(q, logp, 1.0).sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 2] == 0


def test_slots_choose_among_what_is_left_as_the_sampler_says():
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    logits[:, 1] = -torch.inf
    slate = torch.tensor([[3, 0, 2], [4, 2, 0]])
    logp = slot_policies(logits, slate)  # (2, 3, 5)
    assert torch.allclose(logp.exp().sum(dim=2), torch.ones(2, 3))
    found = logp.exp().gather(2, slate[:, :, None]).squeeze(2)
    assert torch.allclose(found, plackett_luce_probs(logits.softmax(dim=1), slate), rtol=1e-4)
    for slot in range(3):
        for above in range(slot):
            assert (logp[torch.arange(2), slot, slate[:, above]] == -torch.inf).all()


def test_where_nothing_is_left_there_is_no_policy_and_no_value():
    logits = torch.tensor([[0.5, -torch.inf, -torch.inf]], requires_grad=True)
    logp = slot_policies(logits, torch.tensor([[0, 1, 2]]))
    assert (logp[0, 1:] == -torch.inf).all()
    value = soft_value(torch.ones(1, 1, 3), logp, 0.5)
    assert value.tolist() == [[1.0, 0.0, 0.0]]
    value.sum().backward()
    assert logits.grad.isfinite().all()


def test_the_temperature_rises_where_entropy_is_below_its_target():
    for spread, sign in ((0.5, -1.0), (1.5, 1.0)):
        log_alpha = torch.zeros((), requires_grad=True)
        temperature_loss(log_alpha, torch.tensor([spread]), torch.tensor([1.0])).backward()
        assert float(log_alpha.grad.sign()) == sign  # descent goes the other way


def test_empty_slots_are_not_learnt_from():
    q = torch.tensor([[1.0, 50.0]], requires_grad=True)
    loss = huber(q, torch.zeros(1, 2), torch.tensor([[True, False]]))
    loss.backward()
    assert float(loss.detach()) == 0.5
    assert q.grad.tolist() == [[1.0, 0.0]]


def test_the_identity_is_learnt():
    agent = SACDiscrete(toy_spec(seed=3), gamma=0.4, lr=5e-3, **QUICK | {"replay_ratio": 4.0})
    generator = torch.Generator().manual_seed(3)
    state = torch.randint(0, 4, (8,), generator=generator)
    for t in range(1200 // 8):
        profile = F.one_hot(state, 4).float()
        decision = agent.act(toy_obs(profile), None)
        reward = (decision.slate == state[:, None]).float()
        state = torch.randint(0, 4, (8,), generator=generator)
        cut = torch.full((8,), (t + 1) % 100 == 0)
        agent.update(toy_step(profile, decision, reward, F.one_hot(state, 4).float(), cut=cut))
    state = torch.randint(0, 4, (100,), generator=generator)
    slate = agent.act(toy_obs(F.one_hot(state, 4).float()), None, explore=False).slate
    assert int((slate[:, 0] == state).sum()) >= 90


def test_every_slot_learns_its_own_reward():
    agent = SACDiscrete(toy_spec(items=6, slate_size=3), gamma=0.0, lr=5e-3, **QUICK)
    profile, pay = torch.eye(4)[:1].expand(32, 4), torch.tensor([0.0, 0.0, 0.5, 0.0, 1.0, 0.75])
    for _ in range(80):
        decision = agent.act(toy_obs(profile), None)
        left = torch.ones(32, dtype=torch.bool)
        agent.update(toy_step(profile, decision, pay[decision.slate], profile, left=left))
    assert agent.act(toy_obs(profile[:1]), None, explore=False).slate.tolist() == [[4, 5, 2]]


def fixed_policy(**knobs):
    """An agent whose temperature stays tiny: soft values are nearly the plain ones."""
    return SACDiscrete(
        toy_spec(),
        **(QUICK | {"alpha_start": 1e-4, "alpha_lr": 1e-9, "lr": 5e-3, "tau": 0.2} | knobs),
    )


def test_a_step_limit_does_not_stop_bootstrapping():
    agent = fixed_policy(gamma=0.9, n_step=5)
    profile, clock = torch.eye(4)[:1].expand(32, 4), torch.arange(32) % 10
    for _ in range(120):
        decision = agent.act(toy_obs(profile), None)
        clock = clock + 1
        over = clock == 10
        agent.update(toy_step(profile, decision, torch.ones(32, 1), profile, cut=over))
        clock = torch.where(over, 0, clock)
    q = agent.twins[0](toy_obs(profile[:1]))
    assert float(q.detach().mean()) == pytest.approx(10.0, abs=0.5)


def test_what_may_not_be_shown_next_is_worth_nothing_in_the_target():
    agent = fixed_policy(gamma=0.9)
    half = torch.arange(64) % 2  # even rows are in state 0, odd ones in state 1 where trips end
    pay = torch.tensor([0.2, 1.0, 0.0, 0.0])
    none = torch.full((64, 3), EMPTY)
    for _ in range(60):
        profile = F.one_hot(half, 4).float()
        decision = agent.act(toy_obs(profile), none)
        reward = (pay[decision.slate[:, 0]] * (half == 1))[:, None]
        # coming from 0, only item 0 may be shown in 1
        after = torch.where(half[:, None] == 0, torch.tensor([1, 2, 3]), EMPTY)
        later = F.one_hot(torch.ones_like(half), 4).float()
        agent.update(
            toy_step(profile, decision, reward, later, left=half == 1, mask=none, after=after)
        )
    q = agent.twins[1](toy_obs(torch.eye(4)[:1]))[0].detach()
    assert q.tolist() == pytest.approx([0.18] * 4, abs=0.05)  # .9 * .2, not .9 * 1


def test_the_entropy_is_held_at_its_share_of_the_most_there_could_be():
    agent = SACDiscrete(
        toy_spec(items=8), gamma=0.0, target_entropy=0.5, alpha_lr=0.03, lr=5e-3, **QUICK
    )
    profile, pay = torch.eye(4)[:1].expand(32, 4), torch.linspace(0.0, 1.0, 8)
    mask = torch.arange(8).expand(32, 8) < 6  # of six allowed items
    for _ in range(200):
        decision = agent.act(toy_obs(profile), mask)
        left = torch.ones(32, dtype=torch.bool)
        step = toy_step(
            profile, decision, pay[decision.slate], profile, left=left, mask=mask, after=mask
        )
        agent.update(step)
    probs = agent.action_probs(toy_obs(profile[:1]), mask[:1])[0, :6]
    found = -float((probs * probs.log()).sum())
    assert found == pytest.approx(0.5 * math.log(6), abs=0.2)


def trained(agent, steps, seed=0):
    """The agent after `steps` of one fixed stream of observations."""
    generator = torch.Generator().manual_seed(seed)
    logs = {}
    for transition in synthetic_steps(agent, agent.spec, 32, steps, generator):
        logs = agent.update(transition) or logs
    return agent, logs


@pytest.mark.parametrize("k", [1, 3])
def test_training_resumes_bit_for_bit(tmp_path, k):
    spec = synthetic_spec(slate_size=k)
    straight, logs = trained(SACDiscrete(spec, **QUICK), 8)
    assert {"train/critic_loss", "train/actor_loss", "train/ent_coef"} <= set(logs)
    trained(straight, 5, seed=5)
    first, _ = trained(SACDiscrete(spec, **QUICK), 8)
    torch.save([first.state_dict(), first.experience()], tmp_path / "state.pt")
    second = SACDiscrete(replace(spec, seed=77), **QUICK)
    state, experience = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(state)
    assert len(second.replay) == 0
    second.load_experience(experience)
    trained(second, 5, seed=5)
    obs = synthetic_observation(spec, 64, torch.Generator().manual_seed(9))
    assert torch.equal(straight.scores(obs), second.scores(obs))
    assert torch.equal(straight.targets[1](obs), second.targets[1](obs))
    assert torch.equal(straight.log_alpha, second.log_alpha)
    assert torch.equal(straight.act(obs, None).slate, second.act(obs, None).slate)
    assert straight.updates == second.updates == 12
    other, _ = trained(SACDiscrete(replace(spec, seed=1), **QUICK), 8)
    assert not torch.equal(other.scores(obs), first.scores(obs))


def test_a_reward_that_is_not_finite_is_refused_before_it_is_kept():
    agent = SACDiscrete(synthetic_spec(), **QUICK)
    step = next(synthetic_steps(agent, agent.spec, 8, 1, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="reward must be finite"):
        agent.update(replace(step, reward=step.reward * torch.nan))
    assert len(agent.replay) == agent.env_steps == 0


def test_checkpoints_of_others_are_refused():
    state = SACDiscrete(synthetic_spec()).state_dict()
    with pytest.raises(ValueError, match="catalogue of 24 items, this one has 30"):
        SACDiscrete(synthetic_spec(num_items=30)).load_state_dict(state)
    with pytest.raises(ValueError, match="net of another form"):
        SACDiscrete(synthetic_spec(), head="dense").load_state_dict(state)


@pytest.mark.parametrize(
    ("knob", "words"),
    [
        ({"lr": 0.0}, "lr must be above 0"),
        ({"gamma": 1.1}, "gamma must be in"),
        ({"target_entropy": 1.5}, "target_entropy must be in"),
        ({"alpha_start": 0.0}, "alpha_start must be above 0"),
        ({"tau": 0.0}, "tau must be above 0"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"schedule": "linear"}, "needs the env steps"),
    ],
)
def test_knobs_out_of_range_are_refused(knob, words):
    with pytest.raises(ValueError, match=words):
        SACDiscrete(synthetic_spec(), **knob)
