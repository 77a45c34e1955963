"""Slates filled slot by slot: what stands above counts; what act says is what is learnt from."""

import io
import itertools
from dataclasses import replace

import pytest
import torch
from toys import toy_obs, toy_spec, toy_step

from agents.base import Decision, Transition, allowed_items
from agents.slate_ppo import SlatePPO
from agents.testing import check_agent, synthetic_observation, synthetic_spec, synthetic_steps
from encoders.state import EMPTY

QUICK = {"width": 16, "steps": 4, "minibatch": 48, "epochs": 2}


@pytest.fixture(scope="module")
def taught():
    """The state of an agent of slates of three whose chances are far from even."""
    spec = synthetic_spec(num_items=12, slate_size=3)
    agent = SlatePPO(spec, **QUICK | {"lr": 2e-2})
    trained(agent, spec, 24)
    return spec, agent.state_dict()


def trained(agent, spec, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logs = {}
    for transition in synthetic_steps(agent, spec, 16, steps, generator):
        logs = agent.update(transition) or logs
    return logs


def saved(*parts):
    """Plain data as a checkpoint brings it back."""
    file = io.BytesIO()
    torch.save(parts, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def equal(one, other):
    """Whether nested states are the same bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


# chances


def test_chances_of_all_ordered_slates_sum_to_one_and_slates_come_as_often():
    spec = synthetic_spec(num_items=5, slate_size=3)
    agent = SlatePPO(spec, **QUICK | {"lr": 2e-2})
    trained(agent, spec, 12)
    one = synthetic_observation(spec, 1, torch.Generator().manual_seed(1))
    every = torch.tensor(list(itertools.permutations(range(5), 3)))  # (60, 3)
    chances = agent.slate_probs(one[torch.zeros(60, dtype=torch.int64)], None, every)
    product = chances.double().prod(dim=1)  # (60,)
    assert float(product.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(product.max() / product.min()) > 3.0  # what has been learnt is not the even chance
    draws = 20_000
    decision = agent.act(one[torch.zeros(draws, dtype=torch.int64)], None)
    code = torch.tensor([25, 5, 1])
    often = torch.bincount(decision.slate @ code, minlength=125)[every @ code] / draws
    slack = 5.0 * (product * (1.0 - product) / draws).sqrt() + 5.0 / draws
    assert ((often - product).abs() < slack).all()


@pytest.mark.parametrize("explore", [True, False])
@pytest.mark.parametrize("form", ["none", "bool", "ids"])
def test_act_says_the_chance_that_slate_probs_gives(taught, form, explore):
    spec, state = taught
    agent = SlatePPO(spec, **QUICK | {"temperature": 0.5})
    agent.load_state_dict(state)
    obs = synthetic_observation(spec, 64, torch.Generator().manual_seed(2))
    allowed = allowed_items(obs.history, 64, 12, "cpu")
    mask = {"none": None, "bool": allowed, "ids": obs.history}[form]
    decision = agent.act(obs, mask, explore=explore)
    probs = agent.slate_probs(obs, mask, decision.slate, explore=explore)
    torch.testing.assert_close(decision.propensity, probs)
    assert (decision.propensity > 0).all()
    assert (decision.slate.sort(dim=1).values.diff(dim=1) > 0).all()
    if mask is not None:
        assert allowed.gather(1, decision.slate).all()
        assert (~allowed.gather(1, agent.act(obs, None).slate)).any()  # the mask is what forbids


def test_both_forms_of_a_mask_say_the_same(taught):
    spec, state = taught
    agent = SlatePPO(spec, **QUICK)
    agent.load_state_dict(state)
    obs = synthetic_observation(spec, 64, torch.Generator().manual_seed(2))
    allowed = allowed_items(obs.history, 64, 12, "cpu")
    slate = agent.act(obs, allowed).slate
    one, other = (agent.slate_probs(obs, mask, slate) for mask in (allowed, obs.history))
    assert torch.equal(one, other)
    assert torch.equal(*(agent.action_probs(obs, mask) for mask in (allowed, obs.history)))


def test_chances_are_served_at_the_temperature_and_learnt_at_one(taught):
    spec, state = taught
    agent = SlatePPO(spec, **QUICK | {"temperature": 0.5})
    agent.load_state_dict(state)
    obs = synthetic_observation(spec, 8, torch.Generator().manual_seed(2))
    learnt = agent.scores(obs).softmax(dim=1)
    served = (agent.scores(obs) / 0.5).softmax(dim=1)
    torch.testing.assert_close(agent.action_probs(obs, None), learnt, rtol=1e-4, atol=1e-6)
    found = agent.action_probs(obs, None, explore=False)
    torch.testing.assert_close(found, served, rtol=1e-4, atol=1e-6)


def test_at_temperature_zero_the_best_of_each_slot_is_shown_without_chance(taught):
    spec, state = taught
    agent = SlatePPO(spec, **QUICK | {"temperature": 0.0})
    agent.load_state_dict(state)
    obs = synthetic_observation(spec, 32, torch.Generator().manual_seed(2))
    slates = [agent.act(obs, obs.history, explore=False) for _ in range(3)]
    assert all(torch.equal(slates[0].slate, other.slate) for other in slates)
    assert (slates[0].propensity == 1.0).all()
    probs = agent.slate_probs(obs, obs.history, slates[0].slate, explore=False)
    assert (probs == 1.0).all()
    best = agent.scores(obs).masked_fill(~allowed_items(obs.history, 32, 12, "cpu"), -torch.inf)
    assert torch.equal(slates[0].slate[:, 0], best.argmax(dim=1))
    assert len({str(agent.act(obs, None).slate.tolist()) for _ in range(3)}) == 3  # exploring


def test_equal_items_are_not_shown_in_the_order_of_their_ids():
    spec = toy_spec(items=30, slate_size=3)
    agent = SlatePPO(spec, **QUICK | {"temperature": 0.0})
    with torch.no_grad():
        for p in agent.policy:
            p.zero_()  # every item alike
    obs = toy_obs(torch.ones(2, 4))
    decision = agent.act(obs, None, explore=False)
    assert decision.slate.max() > 2
    assert torch.equal(decision.slate[0], decision.slate[1])
    assert (agent.slate_probs(obs, None, decision.slate, explore=False) == 1.0).all()


def test_empty_repeated_and_forbidden_slots_have_no_chance_and_change_nothing_below(taught):
    spec, state = taught
    agent = SlatePPO(spec, **QUICK)
    agent.load_state_dict(state)
    obs = synthetic_observation(spec, 1, torch.Generator().manual_seed(2))[torch.zeros(4).long()]
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[:, 9] = False
    slate = torch.tensor([[4, 7, 0], [4, EMPTY, 7], [4, 4, 7], [4, 9, 7]])
    probs = agent.slate_probs(obs, mask, slate)
    assert (probs[1:, 1] == 0.0).all()
    # two slots are two places: 7 in the third after nothing is not 7 in the second
    assert torch.equal(probs[1], probs[2])
    assert torch.equal(probs[1], probs[3])
    assert (probs[:, 0] == probs[0, 0]).all()
    zero = agent.slate_probs(obs[:1], mask[:1], torch.tensor([[EMPTY, 0, 7]]))
    assert zero[0, 0] == 0.0
    assert zero[0, 1] > 0.0  # an empty slot does not use item 0 up


@pytest.mark.parametrize("bad", [-2, 12])
def test_items_outside_the_catalogue_are_refused(taught, bad):
    spec, _ = taught
    agent = SlatePPO(spec, **QUICK)
    obs = synthetic_observation(spec, 1, torch.Generator().manual_seed(2))
    with pytest.raises(ValueError, match=r"slate must hold items in 0\.\.11 or -1"):
        agent.slate_probs(obs, None, torch.tensor([[bad, 1, 2]]))


def test_too_few_items_are_refused():
    agent = SlatePPO(toy_spec(slate_size=3), **QUICK)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, :2] = False
    with pytest.raises(ValueError, match="slate of 3 needs 3 allowed items, row 1 has 2"):
        agent.act(toy_obs(torch.ones(2, 4)), mask)
    mask[1] = False
    with pytest.raises(ValueError, match="allows no item in row 1"):
        agent.act(toy_obs(torch.ones(2, 4)), mask)
    mask[1, :3] = True
    assert sorted(agent.act(toy_obs(torch.ones(2, 4)), mask).slate[1].tolist()) == [0, 1, 2]


# learning


def test_rescaling_leaves_what_is_foretold_alone(taught):
    spec, state = taught
    agent = SlatePPO(spec, **QUICK)
    agent.load_state_dict(state)
    seen = agent.net.read(synthetic_observation(spec, 8, torch.Generator().manual_seed(2)))
    above = agent._above(torch.tensor([[0, 1, 2]]).expand(8, 3))
    with torch.no_grad():
        before, unit = agent._value(seen, above), agent._unit()
        agent._rescale(torch.tensor([90.0, 110.0]))
        after, now = agent._value(seen, above), agent._unit()
    assert float(now[0]) > float(unit[0]) + 1.0
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["none", "bool", "ids"])
def test_the_ratio_starts_at_one(taught, form):
    spec, state = taught
    agent = SlatePPO(spec, **QUICK | {"lr": 1e-12, "epochs": 1, "minibatch": 10_000})
    agent.load_state_dict(state)
    generator = torch.Generator().manual_seed(4)
    logs = {}
    for t in range(4):
        obs = synthetic_observation(spec, 32, generator)
        mask = {
            "none": None, "bool": allowed_items(obs.history, 32, 12, "cpu"), "ids": obs.history
        }[form]  # fmt: skip
        decision = agent.act(obs, mask)
        pay = torch.rand(32, 3, generator=generator)
        zeros = torch.zeros(32, dtype=torch.bool)
        logs = agent.update(
            Transition(obs, mask, decision, pay.sum(dim=1), pay > 0.5, pay, obs, mask, zeros, zeros)
        )
        assert bool(logs) == (t == 3)
    assert float(logs["train/approx_kl"]) < 1e-6
    assert float(logs["train/clip_fraction"]) == 0.0
    assert float(logs["train/policy_gradient_loss"]) == pytest.approx(0.0, abs=1e-5)


# states


@pytest.mark.parametrize("k", [1, 3])
def test_training_resumes_bit_for_bit_in_the_middle_of_a_rollout(k):
    spec = synthetic_spec(slate_size=k)
    agent = SlatePPO(spec, **QUICK)
    trained(agent, spec, 10)  # two rollouts of four and a half one
    state, lived = saved(agent.state_dict(), agent.experience())
    other = SlatePPO(replace(spec, seed=9), **QUICK)
    other.load_state_dict(state)
    other.load_experience(lived)
    logs = [trained(a, spec, 7, seed=5) for a in (agent, other)]
    assert equal(*logs)
    assert equal(agent.state_dict(), other.state_dict())
    assert equal(agent.experience(), other.experience())
    assert len(agent.rollout) == 1
    assert agent.updates == 4 * 2 * -(-64 // (48 // k))


def test_a_state_brings_no_open_rollout_and_is_not_changed_by_those_who_load_it():
    spec = synthetic_spec()
    agent = SlatePPO(spec, **QUICK)
    trained(agent, spec, 5)
    state, lived = agent.state_dict(), agent.experience()
    (kept,) = saved(state)
    other = SlatePPO(spec, **QUICK)
    trained(other, spec, 2)
    other.load_state_dict(kept)
    assert len(other.rollout) == 0
    (before,) = saved(kept)
    trained(other, spec, 9)
    assert equal(kept, before)
    assert len(lived["parts"]) == 1


def test_the_same_seed_trains_bit_equally_and_another_does_not():
    spec = synthetic_spec()
    agents = [SlatePPO(replace(spec, seed=s), **QUICK) for s in (1, 1, 2)]
    for agent in agents:
        trained(agent, spec, 8)
    one, same, other = (agent.state_dict() for agent in agents)
    assert equal(one, same)
    assert not equal(one["slots"], other["slots"])


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (3, 0.0)])
def test_it_conforms(k, temperature):
    spec = synthetic_spec(slate_size=k)
    assert check_agent(SlatePPO(spec, **QUICK | {"temperature": temperature}), spec) == []


def test_the_learning_rate_of_both_optimisers_follows_the_schedule():
    spec = toy_spec(total_steps=32)
    agent = SlatePPO(spec, **QUICK | {"schedule": "linear", "lr": 0.01, "steps": 1})
    decision = Decision(torch.zeros(8, 1, dtype=torch.int64), torch.full((8, 1), 0.25))
    for _ in range(2):
        logs = agent.update(toy_step(torch.ones(8, 4), decision, torch.ones(8, 1)))
    assert float(logs["train/learning_rate"]) == pytest.approx(0.005)
    for optimizer in (agent.optimizer, agent.critic_optimizer):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


# what is refused


@pytest.mark.parametrize("field", ["reward", "slot_reward"])
def test_a_reward_that_is_not_finite_is_refused_before_it_is_kept(field):
    agent = SlatePPO(toy_spec(), **QUICK)
    decision = agent.act(toy_obs(torch.ones(2, 4)), None)
    step = toy_step(torch.ones(2, 4), decision, torch.ones(2, 1))
    value = getattr(step, field).clone()
    value[1] = torch.nan
    with pytest.raises(ValueError, match=f"{field} must be finite, row 1"):
        agent.update(replace(step, **{field: value}))
    assert len(agent.rollout) == 0
    assert agent.env_steps == 0


def test_checkpoints_of_others_are_refused():
    spec = synthetic_spec()
    state = SlatePPO(spec, **QUICK).state_dict()
    with pytest.raises(ValueError, match="24 items, this one has 20"):
        SlatePPO(synthetic_spec(num_items=20), **QUICK).load_state_dict(state)
    turned = replace(spec, item_vectors=spec.item_vectors.flip(0))
    with pytest.raises(ValueError, match="another catalogue of the same size"):
        SlatePPO(turned, **QUICK).load_state_dict(state)
    with pytest.raises(ValueError, match="net of another form"):
        SlatePPO(spec, **QUICK | {"width": 8}).load_state_dict(state)
    agent = SlatePPO(spec, **QUICK)
    trained(agent, spec, 3)
    with pytest.raises(ValueError, match="saved rollout has 3 steps"):
        SlatePPO(spec, **QUICK | {"steps": 2}).load_experience(agent.experience())


@pytest.mark.parametrize(
    ("knob", "words"),
    [
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"entropy_weight": -1.0}, "entropy_weight must be at least 0"),
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\]"),
        ({"lam": -0.1}, r"lam must be in \[0, 1\]"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"grad_clip": 0.0}, "grad_clip must be above 0"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"epochs": 0}, "epochs must be a whole number"),
        ({"minibatch": 0.5}, "minibatch must be a whole number"),
        ({"width": 0}, "width must be a whole number"),
        ({"schedule": "linear"}, "total_steps"),
        ({"schedule": "stairs"}, "schedule"),
        ({"head": "wide"}, "head"),
    ],
)
def test_knobs_out_of_range_are_refused(knob, words):
    with pytest.raises(ValueError, match=words):
        SlatePPO(toy_spec(), **knob)
