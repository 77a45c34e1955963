"""Advantages by hand, slates' log-probabilities by brute force, a critic that keeps its word."""

from dataclasses import fields, replace
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.explore import plackett_luce_probs
from agents.rollout import (
    FORGET,
    Critic,
    Rollout,
    entropy,
    explained_variance,
    gae,
    slate_log_probs,
    slot_advantages,
)
from agents.testing import synthetic_observation, synthetic_spec, synthetic_steps
from encoders.state import EMPTY

NO = torch.zeros(3, 1, dtype=torch.bool)


def column(*values):
    return torch.tensor(values)[:, None]


def test_the_return_to_go_without_a_critic_and_without_discount():
    zero = torch.zeros(3, 1)
    advantage = gae(torch.ones(3, 1), zero, zero, NO, NO, 1.0, 1.0)
    assert advantage.squeeze(1).tolist() == [3.0, 2.0, 1.0]


def test_leaving_is_worth_nothing_more_and_a_step_limit_what_the_last_view_is_worth():
    zero, later = torch.zeros(3, 1), torch.full((3, 1), 10.0)
    left = column(False, True, False)
    assert gae(torch.ones(3, 1), zero, later, left, NO, 1.0, 1.0).squeeze(1).tolist() == [
        12.0, 1.0, 11.0,
    ]  # fmt: skip
    cut = gae(torch.ones(3, 1), zero, later, NO, left, 1.0, 1.0).squeeze(1).tolist()
    assert cut == [22.0, 11.0, 11.0]  # the row's next user is in neither


def test_lambda_zero_is_the_one_step_error():
    generator = torch.Generator().manual_seed(0)
    reward, value, later = torch.randn(3, 4, 5, generator=generator).unbind(0)
    ends = torch.rand(4, 5, generator=generator) < 0.3
    none = torch.zeros_like(ends)
    found = gae(reward, value, later, ends, none, 0.9, 0.0)
    assert torch.allclose(found, reward + 0.9 * later * ~ends - value)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_advantages_are_the_weighted_sum_of_later_errors(seed, gamma, lam):
    generator = torch.Generator().manual_seed(seed)
    reward, value, later = torch.randn(3, 6, 2, generator=generator).double().unbind(0)
    left, cut = (torch.rand(2, 6, 2, generator=generator) < 0.2).unbind(0)
    found = gae(reward, value, later, left, cut, gamma, lam)
    for row in range(2):
        for t in range(6):
            total, weight = 0.0, 1.0
            for s in range(t, 6):
                after = 0.0 if left[s, row] else gamma * later[s, row]
                total += weight * float(reward[s, row] + after - value[s, row])
                if left[s, row] or cut[s, row]:
                    break
                weight *= gamma * lam
            assert float(found[t, row]) == pytest.approx(total, abs=1e-9)


def test_a_slot_keeps_its_own_surprise_and_what_came_after():
    advantage = torch.tensor([2.5])  # the slate earned 1 where .5 was expected, and 2 later
    slot_reward, expected = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.25, 0.25]])
    assert slot_advantages(advantage, slot_reward, expected).tolist() == [[2.75, 1.75]]
    assert slot_advantages(advantage, slot_reward[:, :1], expected[:, :1]).tolist() == [[2.5]]


def forbidden_logits(rows, items, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, items, generator=generator, dtype=dtype) * 3.0
    logits[:, 1] = -torch.inf
    return logits


def test_log_probabilities_of_slates_are_those_of_the_sampler():
    logp = forbidden_logits(6, 5, 0).log_softmax(dim=1)
    slate = torch.tensor(
        [[0, 2, 3], [4, 3, 2], [EMPTY, 4, 3], [3, 0, EMPTY], [0, 1, 2], [EMPTY, EMPTY, 3]]
    )
    found, real = slate_log_probs(logp, slate)
    expected = plackett_luce_probs(logp.exp(), slate)
    assert real.sum().item() == 13  # four slots are empty, one is forbidden
    assert torch.allclose(found.exp()[real].float(), expected[real], rtol=1e-5)
    assert (expected[~real] == 0).all()
    assert (found[~real] == 0).all()


def test_chances_of_all_slates_sum_to_one_even_of_the_last_items_there_are():
    logp = forbidden_logits(1, 5, 1).log_softmax(dim=1)
    slates = torch.tensor(list(permutations([0, 2, 3, 4])))
    found, real = slate_log_probs(logp.expand(len(slates), -1), slates)
    assert real.all()
    assert found.sum(dim=1).exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    assert found[:, -1].abs().max().item() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("slates", [[[0], [2]], [[0, 2, 4], [3, EMPTY, 2]], [[4, 3, 2], [0, 2, 3]]])
def test_gradients_of_slates_are_finite_and_those_of_finite_differences(slates):
    slate = torch.tensor(slates)

    def total(logits):
        masked = logits.masked_fill(torch.tensor([False, True, False, False, False]), -torch.inf)
        return slate_log_probs(masked.log_softmax(dim=1), slate)[0].sum()

    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(total, (logits,))
    total(logits).backward()
    assert (logits.grad[:, 1] == 0).all()  # what may not be shown is not taught


def test_extreme_logits_keep_finite_log_probabilities():
    logits = torch.tensor([[200.0, -200.0, 0.0, -torch.inf]], requires_grad=True)
    found, _ = slate_log_probs(logits.log_softmax(dim=1), torch.tensor([[1, 2]]))
    assert found[0].tolist() == pytest.approx([-400.0, -200.0])
    found.sum().backward()
    assert logits.grad.isfinite().all()


def test_entropy_by_hand_and_of_a_certain_choice():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf, 3.0, -torch.inf]])
    logits.requires_grad_()
    found = entropy(logits.log_softmax(dim=1))
    assert found.tolist() == pytest.approx([0.693147, 0.0], abs=1e-6)
    found.sum().backward()
    assert logits.grad.isfinite().all()


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns).item() == 1.0
    assert explained_variance(torch.full((3,), 9.0), returns).item() == 0.0
    assert explained_variance(-returns, returns).item() == pytest.approx(-3.0)


def random_steps(spec, steps=4, users=3, seed=0):
    from agents.random import Random

    generator = torch.Generator().manual_seed(seed)
    return list(synthetic_steps(Random(spec), spec, users, steps, generator))


def test_values_after_steps_come_from_the_next_view_the_cut_view_or_the_end():
    spec = synthetic_spec()
    rollout = Rollout(3, spec)
    steps = random_steps(spec, 3, 2)
    cut = torch.tensor([[False, False], [True, False], [False, True]])
    for t, step in enumerate(steps):
        rollout.add(replace(step, truncated=cut[t], terminated=torch.zeros(2, dtype=torch.bool)))
    found = rollout.steps()
    value = torch.arange(6.0)  # of obs, step after step
    end = torch.tensor([100.0, 101.0, 110.0, 111.0])  # of the end, then of who was cut
    assert found.cut.tolist() == [2, 5]
    assert found.later(value, end).tolist() == [[2.0, 3.0], [110.0, 5.0], [100.0, 111.0]]
    assert torch.equal(found.ends.context[2], steps[1].next_obs.context[0])
    assert torch.equal(found.ends.context[:2], steps[2].next_obs.context)
    assert torch.equal(found.obs.history[2:4], steps[1].obs.history)


def test_a_step_that_is_both_left_and_cut_counts_as_left():
    spec = synthetic_spec()
    rollout = Rollout(1, spec)
    both = torch.ones(3, dtype=torch.bool)
    rollout.add(replace(random_steps(spec)[0], terminated=both, truncated=both))
    assert len(rollout.steps().cut) == 0


def test_a_rollout_goes_on_from_its_state(tmp_path):
    spec = synthetic_spec()
    whole, part = Rollout(4, spec), Rollout(4, spec)
    steps = random_steps(spec)
    for step in steps:
        whole.add(step)
    for step in steps[:2]:
        part.add(step)
    torch.save(part.state_dict(), tmp_path / "state.pt")
    other = Rollout(4, spec)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in steps[2:]:
        assert not other.full
        other.add(step)
    assert other.full
    a, b = whole.steps(), other.steps()
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y)
        else:
            assert all(torch.equal(getattr(x, f.name), getattr(y, f.name)) for f in fields(x))
    empty = Rollout(4, spec)
    empty.load_state_dict(Rollout(4, spec).state_dict())
    assert len(empty) == 0
    with pytest.raises(ValueError, match="full at 2"):
        Rollout(2, spec).load_state_dict(part.state_dict())


def test_a_rollout_refuses_other_users_and_other_masks():
    spec = synthetic_spec()
    rollout = Rollout(4, spec)
    first, second = random_steps(spec, 2)
    with pytest.raises(ValueError, match="empty rollout"):
        rollout.steps()
    rollout.add(first)
    with pytest.raises(ValueError, match="expected 3 rows, got 5"):
        rollout.add(random_steps(spec, 1, users=5)[0])
    with pytest.raises(ValueError, match="mask must keep its form"):
        rollout.add(replace(second, mask=None))
    with pytest.raises(ValueError, match=r"decision\.slate must be"):
        Rollout(4, synthetic_spec(slate_size=3)).add(first)


def test_a_new_unit_does_not_change_what_the_critic_foretells():
    spec = synthetic_spec()
    critic = Critic(spec, lr=1e-2, width=16, grad_clip=0.5)
    seen = critic.net.read(synthetic_observation(spec, 8, torch.Generator().manual_seed(1)))
    slots = torch.zeros(8, 2)
    for returns in (torch.arange(8.0) * 500.0, torch.full((8,), 1e4), torch.zeros(8)):
        before = critic.values(seen)
        critic.rescale(returns, slots)
        assert torch.allclose(critic.values(seen), before, rtol=1e-3, atol=1e-2)
    assert critic.spread > 100


def test_a_critic_forgets_old_returns_but_never_the_newest_rollout():
    critic = Critic(synthetic_spec(), lr=1e-2, width=16, grad_clip=0.5)
    for _ in range(40):
        critic.rescale(torch.zeros(4), torch.zeros(4, 2))
    critic.rescale(torch.ones(4), torch.ones(4, 2))
    assert float(critic.mean) == pytest.approx(FORGET)
    assert critic.place.tolist() == pytest.approx([FORGET] * 2)


@pytest.mark.parametrize("unit", [0.01, 1.0, 1000.0])
def test_returns_of_any_unit_are_learnt_alike(unit):
    spec = synthetic_spec()
    critic = Critic(spec, lr=5e-3, width=32, grad_clip=0.5)
    obs = synthetic_observation(spec, 64, torch.Generator().manual_seed(1))
    seen, returns = critic.net.read(obs), (5.0 + obs.profile[:, 0]) * unit
    slots = torch.stack([obs.profile[:, 0], torch.ones(64)], dim=1)
    for _ in range(150):
        critic.rescale(returns, slots)
        critic.learn(seen, returns, slots)
    assert explained_variance(critic.values(seen), returns) > 0.9
    level = critic.expected(seen)
    assert explained_variance(level[:, 1], (slots.mean(dim=1))) > 0.9
    assert level.mean(dim=0).tolist() == pytest.approx(slots.mean(dim=0).tolist(), abs=0.1)


def test_a_critic_goes_on_from_its_state():
    spec = synthetic_spec()
    critics = [Critic(replace(spec, seed=s), lr=1e-2, width=16, grad_clip=0.5) for s in (0, 5)]
    obs = synthetic_observation(spec, 8, torch.Generator().manual_seed(1))
    seen, slots = critics[0].net.read(obs), torch.ones(8, 2)

    def teach(critic):
        critic.rescale(obs.profile[:, 0], slots)
        critic.learn(seen, obs.profile[:, 0], slots)

    teach(critics[0])
    critics[1].load_state_dict(critics[0].state_dict())
    for critic in critics:
        teach(critic)
    assert torch.equal(critics[0].values(seen), critics[1].values(seen))
    assert torch.equal(critics[0].expected(seen), critics[1].expected(seen))
