"""REINFORCE follows the exact gradient on and off policy, with all items summed over or sampled."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from toys import toy_obs, toy_spec, toy_step

import agents.reinforce
from agents.base import Decision
from agents.reinforce import (
    Reinforce,
    importance,
    permitted,
    proposal,
    sampled_log_probs,
    score_function,
    top_k_factor,
)
from agents.rollout import entropy, slate_log_probs
from agents.testing import check_agent, synthetic_observation, synthetic_spec, synthetic_steps
from encoders.state import EMPTY

OFF = {"off_policy": True, "learning_starts": 64, "batch_size": 32, "replay_ratio": 1.0}


@pytest.mark.parametrize("form", [{"steps": 4}, OFF], ids=["rollouts", "replay"])
def test_the_identity_is_learnt_in_1200_steps(form):
    agent = Reinforce(toy_spec(seed=3), lr=2e-3, gamma=0.4, **form)
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


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize(
    "form", [{"steps": 1}, OFF | {"batch_size": 64, "top_k": None}], ids=["rollouts", "replay"]
)
def test_items_that_fit_the_user_are_found(form, k):
    spec, generator = toy_spec(items=20, states=20, slate_size=k), torch.Generator().manual_seed(0)
    agent = Reinforce(spec, lr=5e-3, width=32, **form)
    for _ in range(80):
        profile = torch.randn(64, 20, generator=generator)
        decision = agent.act(toy_obs(profile), None)
        reward, left = profile.gather(1, decision.slate), torch.ones(64, dtype=torch.bool)
        agent.update(toy_step(profile, decision, reward, profile, left=left))
    profile = torch.randn(512, 20, generator=generator)
    slate = agent.act(toy_obs(profile), None, explore=False).slate
    assert float(profile.gather(1, slate).mean()) > 0.35  # at random 0; the standard error is .04


@pytest.mark.parametrize(
    "form",
    [{"steps": 2}, OFF | {"n_step": 5, "capacity": 480, "replay_ratio": 2.0}],
    ids=["rollouts", "replay"],
)
def test_a_step_limit_does_not_stop_bootstrapping(form):
    agent = Reinforce(toy_spec(), gamma=0.9, width=32, lr=3e-3, **form)
    profile, clock = torch.eye(4)[:1].expand(16, 4), torch.arange(16) % 10
    for _ in range(240):
        decision = agent.act(toy_obs(profile), None)
        clock = clock + 1
        over = clock == 10
        agent.update(toy_step(profile, decision, torch.ones(16, 1), profile, cut=over))
        clock = torch.where(over, 0, clock)
    value = agent.critic.values(agent.net.read(toy_obs(profile[:1])))
    assert float(value) == pytest.approx(10.0, abs=0.5)


def test_the_top_k_factor_is_the_slope_of_being_among_k():
    prob = torch.tensor([0.001, 0.01, 0.1, 0.5], dtype=torch.float64, requires_grad=True)
    (1.0 - (1.0 - prob) ** 16).sum().backward()
    assert torch.allclose(top_k_factor(prob.detach(), 16), prob.grad)
    found = top_k_factor(prob.detach(), 16).tolist()
    assert found == pytest.approx([15.76, 13.76, 3.294, 0.0005], rel=2e-3, abs=5e-5)
    assert (top_k_factor(prob.detach(), 1) == 1.0).all()


def test_weights_are_capped_and_have_no_gradient():
    logp = torch.tensor([0.5, 0.1]).log().requires_grad_()
    weight = importance(logp - torch.tensor([0.05, 0.2]).log(), 5.0)
    assert weight.tolist() == pytest.approx([5.0, 0.5])
    assert not weight.requires_grad
    score_function(logp, torch.tensor([2.0, 3.0]), weight).sum().backward()
    assert logp.grad.tolist() == pytest.approx([10.0, 1.5])


ROWS = 400_000  # logged decisions: the error left is of about .001
LOGITS = torch.tensor([0.4, -0.9, 1.1, -1.6, 0.7])
BETA = torch.tensor([0.1, 0.3, 0.1, 0.3, 0.2])
PAY = torch.tensor([1.0, 0.2, 0.7, 0.1, 0.0])


def logged_gradient(k, **knobs):
    """The gradient of the logits that the agent takes from decisions of another policy."""
    agent = Reinforce(
        toy_spec(items=5, states=1),
        head="dense", width=4, memory=False, off_policy=True, top_k=k, cap=1e9,
        entropy_weight=0.0, grad_clip=1e9, **knobs,
    )  # fmt: skip
    with torch.no_grad():
        for part in (agent.net.dense, agent.net.famous):
            part.weight.zero_()
        agent.net.famous.bias.zero_()
        agent.net.dense.bias.copy_(LOGITS)
    generator = torch.Generator().manual_seed(0)
    slate = torch.multinomial(BETA, ROWS, True, generator=generator)[:, None]
    seen = agent.net.read(toy_obs(torch.ones(len(slate), 1)))
    agent._improve(seen, None, slate, BETA[slate], PAY[slate][:, 0], PAY[slate])
    return -agent.net.dense.bias.grad


def test_logged_decisions_of_another_policy_give_the_exact_gradient():
    # the weight is of the logged action above and below: other pairings have other signs
    probs = LOGITS.softmax(dim=0)
    exact = probs * (PAY - (probs * PAY).sum())
    assert (logged_gradient(1) - exact).abs().max() < 0.003


def test_with_top_k_it_is_the_gradient_of_being_among_k_draws():
    logits = LOGITS.clone().requires_grad_()
    (PAY * (1.0 - (1.0 - logits.softmax(dim=0)) ** 4)).sum().backward()
    assert (logged_gradient(4) - logits.grad).abs().max() < 0.006


def behaviour_agent(**knobs):
    return Reinforce(
        toy_spec(items=5, states=2),
        **(OFF | {"behaviour": "head", "grad_clip": 1e9, "entropy_weight": 0.0} | knobs),
    )  # fmt: skip


def test_the_behaviour_head_learns_who_showed_what_and_does_not_teach_the_trunk():
    agent = behaviour_agent(lr=1e-2, width=16)
    generator = torch.Generator().manual_seed(0)
    chances = torch.stack([BETA, BETA.flip(0)])  # two kinds of user were shown other items
    kind = torch.randint(0, 2, (512,), generator=generator)
    seen = agent.net.read(toy_obs(F.one_hot(kind, 2).float()))
    trunk = [p.clone() for p in agent.net.parameters()]
    for _ in range(150):
        slate = torch.multinomial(chances[kind], 1, generator=generator)
        unknown = torch.ones(512, 1)  # propensities that say nothing
        agent._improve(seen, None, slate, unknown, torch.zeros(512), torch.zeros(512, 1))
    for before, now in zip(trunk, agent.net.parameters(), strict=True):
        assert torch.equal(before, now)
    probs = agent._guess(seen)(None).softmax(dim=1)
    assert (probs - chances[kind]).abs().max() < 0.06


def test_the_behaviour_head_corrects_as_the_logged_chances_do():
    agents = [behaviour_agent(width=16, behaviour=b) for b in ("head", "logged")]
    seen = agents[0].net.read(toy_obs(torch.ones(2, 2)))
    slate = torch.tensor([[0], [3]])
    with torch.no_grad():
        logp = agents[0]._guess(seen)(None).log_softmax(dim=1)  # (2, 5)
        beta = logp.gather(1, slate).exp()
    grads = []
    for agent in agents:
        agent._improve(seen, None, slate, beta, torch.tensor([1.0, -0.5]), torch.zeros(2, 1))
        grads.append(agent.net.user.weight.grad)
    assert torch.allclose(grads[0], grads[1], atol=1e-6)
    assert grads[1].abs().max() > 0


def test_sampled_items_give_the_gradient_of_the_full_softmax():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 40, generator=generator, dtype=torch.float64) * 2.0
    logits.requires_grad_()
    allowed = torch.rand(3, 40, generator=generator) < 0.8
    slate = torch.tensor([[0, 7], [5, EMPTY], [9, 2]])
    allowed.scatter_(1, slate.clamp(min=0), True)
    full = logits.masked_fill(~allowed, -torch.inf).log_softmax(dim=1)
    logp, real = slate_log_probs(full, slate)
    (logp.sum() + entropy(full).sum()).backward()
    exact = logits.grad.clone()
    logits.grad = None

    rounds, m = 400, 1000
    q = proposal(torch.rand(40, generator=generator).double() ** 3)
    draws = torch.multinomial(q.expand(rounds, -1), m, True, generator=generator)
    draws = draws.repeat_interleave(3, dim=0)  # (3 R, m): every round's, for each row
    many, ids = logits.repeat(rounds, 1), slate.repeat(rounds, 1)
    fresh = ~(draws[:, :, None] == ids[:, None, :]).any(dim=2)
    count = fresh & permitted(allowed.repeat(rounds, 1), draws)
    shown, others = many.gather(1, ids.clamp(min=0)), many.gather(1, draws)
    found, spread = sampled_log_probs(shown, real.repeat(rounds, 1), others, count, q[draws].log())
    ((found.sum() + spread.sum()) / rounds).backward()
    assert torch.allclose(found.detach().view(rounds, 3, 2).mean(dim=0), logp.detach(), atol=0.01)
    spreads = spread.detach().view(rounds, 3).mean(dim=0)
    assert torch.allclose(spreads, entropy(full).detach(), atol=0.02)
    assert (logits.grad - exact).abs().max() < 0.02
    assert exact.abs().max() > 0.5
    assert (logits.grad[~allowed] == 0).all()


@pytest.mark.parametrize("mask", ["ids", "bool", "none"])
def test_a_large_catalogue_is_learnt_from_samples_as_from_all(monkeypatch, mask):
    spec = synthetic_spec(slate_size=3, num_items=60)
    obs = synthetic_observation(spec, 32, torch.Generator().manual_seed(1))
    full = Reinforce(spec, width=16, grad_clip=1e9)
    allowed = full._allowed(obs, obs.history)
    given = {"ids": obs.history, "bool": allowed, "none": None}[mask]
    slate = full.act(obs, given).slate
    advantage = torch.randn(32, generator=torch.Generator().manual_seed(2))
    grads = []
    for limit in (60, 59):
        monkeypatch.setattr(agents.reinforce, "FULL", limit)
        agent = Reinforce(spec, width=16, grad_clip=1e9, negatives=4000)
        seen = agent.net.read(obs)
        agent._improve(seen, given, slate, torch.ones(32, 3), advantage, torch.zeros(32, 3))
        grads.append(torch.cat([p.grad.flatten() for p in agent.net.parameters()]))
    assert not torch.equal(*grads)
    assert float(F.cosine_similarity(*grads, dim=0)) > 0.995
    assert float(grads[1].norm() / grads[0].norm()) == pytest.approx(1.0, abs=0.05)


def test_the_contract_holds_where_items_are_sampled_and_behaviour_is_guessed(monkeypatch):
    monkeypatch.setattr(agents.reinforce, "FULL", 10)
    spec = synthetic_spec(slate_size=3)
    agent = Reinforce(spec, off_policy=True, behaviour="head", top_k=3, negatives=16, width=16)
    assert check_agent(agent, spec) == []


def test_negatives_are_drawn_by_popularity_and_evenly_where_nothing_is_popular():
    assert proposal(torch.tensor([0.0, 3.0, 1.0, 0.0])).tolist() == [0.125, 0.5, 0.25, 0.125]
    assert proposal(torch.zeros(4)).tolist() == [0.25] * 4


def trained(agent, steps, seed=0):
    """The agent after `steps` of one fixed stream of observations."""
    generator = torch.Generator().manual_seed(seed)
    for transition in synthetic_steps(agent, agent.spec, 32, steps, generator):
        agent.update(transition)
    return agent


@pytest.mark.parametrize(
    "form", [{"steps": 4}, OFF | {"behaviour": "head", "top_k": 2}], ids=["rollouts", "replay"]
)
def test_training_resumes_bit_for_bit(tmp_path, form):
    spec, knobs = synthetic_spec(), {"width": 16} | form
    straight = trained(trained(Reinforce(spec, **knobs), 10), 9, seed=5)
    first = trained(Reinforce(spec, **knobs), 10)
    torch.save([first.state_dict(), first.experience()], tmp_path / "state.pt")
    second = Reinforce(replace(spec, seed=77), **knobs)
    state, experience = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(state)
    assert len(second.rollout) == len(second.replay) == 0
    second.load_experience(experience)
    trained(second, 9, seed=5)
    obs = synthetic_observation(spec, 64, torch.Generator().manual_seed(9))
    assert torch.equal(straight.scores(obs), second.scores(obs))
    assert torch.equal(straight.act(obs, None).slate, second.act(obs, None).slate)
    assert straight.updates == second.updates == (18 if "off_policy" in form else 4)
    other = trained(Reinforce(replace(spec, seed=1), **knobs), 10)
    assert not torch.equal(other.scores(obs), first.scores(obs))


def test_what_could_not_have_been_shown_teaches_nothing():
    spec = synthetic_spec(slate_size=3)
    agents_ = [Reinforce(spec, **OFF, width=16) for _ in range(2)]
    obs = synthetic_observation(spec, 16, torch.Generator().manual_seed(0))
    seen, slate = agents_[0].net.read(obs), torch.arange(3).expand(16, 3).clone()
    reward = torch.rand(16, 3, generator=torch.Generator().manual_seed(1))
    slate[:, 1] = EMPTY
    for agent, chance in zip(agents_, (0.0, 0.3), strict=True):
        propensity = torch.tensor([0.2, chance, 0.5]).expand(16, 3)
        agent._improve(seen, None, slate, propensity, reward.sum(dim=1), reward)
    for a, b in zip(agents_[0].net.parameters(), agents_[1].net.parameters(), strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", [{}, OFF], ids=["rollouts", "replay"])
def test_a_reward_that_is_not_finite_is_refused_before_it_is_kept(form):
    agent = Reinforce(synthetic_spec(), **form)
    step = next(synthetic_steps(agent, agent.spec, 8, 1, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="reward must be finite"):
        agent.update(replace(step, reward=step.reward * torch.nan))
    assert len(agent.rollout) == len(agent.replay) == agent.env_steps == 0


def test_a_logged_slate_of_others_is_weighed_by_its_own_chances():
    """The policy is untouched by how the log was made when its chances are the policy's own."""
    spec = synthetic_spec(slate_size=2)
    on, off = (Reinforce(spec, width=16, off_policy=o) for o in (False, True))
    obs = synthetic_observation(spec, 32, torch.Generator().manual_seed(0))
    decision = on.act(obs, obs.history)
    for agent in (on, off):
        seen, reward = agent.net.read(obs), torch.ones(32, 2)
        agent._improve(seen, obs.history, decision.slate, decision.propensity, reward[:, 0], reward)
    for a, b in zip(on.net.parameters(), off.net.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)
    assert isinstance(decision, Decision)


@pytest.mark.parametrize(
    ("knob", "words"),
    [
        ({"lr": 0.0}, "lr must be above 0"),
        ({"gamma": 1.1}, "gamma must be in"),
        ({"cap": 0.0}, "cap must be above 0"),
        ({"top_k": 0}, "top_k must be a whole number"),
        ({"top_k": 3}, "set off_policy=true"),
        ({"behaviour": "head"}, "set off_policy=true"),
        ({"behaviour": "guess"}, "behaviour must be one of logged, head"),
        ({"entropy_weight": -1.0}, "entropy_weight must be at least 0"),
        ({"schedule": "cosine"}, "needs the env steps"),
    ],
)
def test_knobs_out_of_range_are_refused(knob, words):
    with pytest.raises(ValueError, match=words):
        Reinforce(synthetic_spec(), **knob)
