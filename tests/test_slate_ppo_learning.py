"""What slates filled slot by slot teach: advantages by hand, toys learnt, entropy, empty slots."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import toy_obs, toy_spec, toy_step

from agents.base import Decision
from agents.rollout import gae
from agents.slate_ppo import SlatePPO, slot_gae
from encoders.state import EMPTY

QUICK = {"width": 16, "steps": 4, "minibatch": 48, "epochs": 2}

PLAY = {"width": 32, "steps": 2, "minibatch": 64, "lr": 5e-3}
KIND = torch.tensor([0, 0, 0, 1, 1, 1])


def variety(slate):
    """One for each slot (n, 2) where the two kinds differ."""
    kind = KIND[slate]  # (n, 2)
    return (kind[:, :1] != kind[:, 1:]).float().expand(-1, 2)


def play_variety(agent, updates, users=64, *, masked=False):
    """Sessions of one step that pay for two kinds in a slate of two; the mean reward at the end."""
    generator = torch.Generator().manual_seed(0)
    profile, left = torch.ones(users, 4), torch.ones(users, dtype=torch.bool)
    earned = []
    for _ in range(updates):
        mask = two_of_each(users, generator) if masked else None
        decision = agent.act(toy_obs(profile), mask)
        reward = variety(decision.slate)
        agent.update(toy_step(profile, decision, reward, left=left, mask=mask))
        earned.append(reward.sum(dim=1).mean())
    return float(torch.stack(earned[-20:]).mean())


def two_of_each(users, generator):
    """Allow two random items of each kind, (users, 6)."""
    order = torch.rand(users, 2, 3, generator=generator).argsort(dim=2)
    return (order > 0).flatten(1)


@pytest.fixture(scope="module")
def varied():
    """An agent that has learnt to show two kinds."""
    agent = SlatePPO(toy_spec(items=6, slate_size=2), **PLAY | {"entropy_weight": 0.1})
    return agent, play_variety(agent, 90)


# advantages


def test_slot_advantages_by_hand():
    reward = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[:, None].expand(2, 3, 2)  # three users alike
    value = torch.tensor([[0.5, 1.0], [1.5, 2.0]])[:, None].expand(2, 3, 2)
    end = torch.tensor([[1.5, 0.0, 8.0], [6.0, 6.0, 6.0]])  # goes on, left, out of steps
    done = torch.tensor([[False, True, True], [False, False, False]])
    found = slot_gae(
        reward, value, end, done, 0.5, 0.25
    )  # half of the trace stays from slot to slot
    # second step: 4 + .5 * 6 - 2 = 5; 3 + 2 - 1.5 + .5 * 5 = 6
    assert found[1].tolist() == [[6.0, 5.0]] * 3
    # goes on: 2 + .5 * 1.5 - 1 + .5 * .5 * 6 = 3.25; left: 2 - 1 = 1; out: 2 + .5 * 8 - 1 = 5;
    # the slot above: 1 + 1 - .5 and half of that
    assert found[0].tolist() == [[3.125, 3.25], [2.0, 1.0], [4.0, 5.0]]


@settings(max_examples=30)
@given(st.integers(0, 1000), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_slates_of_one_have_the_advantages_of_steps(seed, gamma, lam):
    g = torch.Generator().manual_seed(seed)
    reward, value, later = torch.randn(3, 5, 4, generator=g, dtype=torch.float64)
    left, cut = (torch.rand(2, 5, 4, generator=g) < 0.3).unbind()
    found = slot_gae(reward[:, :, None], value[:, :, None], later * ~left, left | cut, gamma, lam)
    wanted = gae(reward, value, later, left, cut & ~left, gamma, lam)
    torch.testing.assert_close(found[:, :, 0], wanted)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_without_discount_and_fading_an_advantage_is_what_came_less_what_was_foretold(k):
    g = torch.Generator().manual_seed(k)
    reward, value = torch.randn(2, 3, 4, k, generator=g, dtype=torch.float64)
    end = torch.zeros(3, 4, dtype=torch.float64)
    end[:-1] = value[1:, :, 0]
    done = torch.zeros(3, 4, dtype=torch.bool)
    done[-1] = True
    found = slot_gae(reward, value, end, done, 1.0, 1.0)
    row = reward.transpose(0, 1).flatten(1)  # (B, T * K)
    rest = row.flip(1).cumsum(dim=1).flip(1).view(4, 3, k).transpose(0, 1)
    torch.testing.assert_close(found, rest - value)


# learning


def play_identity(agent, steps, users=8, seed=3):
    """The item must be the state, drawn anew each step; how many of 100 are right."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randint(0, 4, (users,), generator=generator)
    for _ in range(steps // users):
        profile = F.one_hot(state, 4).float()
        decision = agent.act(toy_obs(profile), None)
        reward = (decision.slate == state[:, None]).float()
        state = torch.randint(0, 4, (users,), generator=generator)
        agent.update(toy_step(profile, decision, reward, F.one_hot(state, 4).float()))
    state = torch.randint(0, 4, (100,), generator=generator)
    slate = agent.act(toy_obs(F.one_hot(state, 4).float()), None, explore=False).slate
    return int((slate[:, 0] == state).sum())


def test_the_identity_is_learnt():
    agent = SlatePPO(toy_spec(seed=3), lr=2e-3, gamma=0.4, steps=8, minibatch=32, width=64)
    assert play_identity(agent, 1600) >= 90


def test_variety_is_learnt(varied):
    assert varied[1] > 1.9  # two is the most, 1.2 at random


def test_chances_depend_on_the_items_above(varied):
    agent, _ = varied
    pairs = torch.tensor(list(itertools.permutations(range(6), 2)))  # (30, 2)
    second = agent.slate_probs(toy_obs(torch.ones(30, 4)), None, pairs)[:, 1]
    alike = KIND[pairs[:, 0]] == KIND[pairs[:, 1]]
    assert second[alike].max() < 0.1
    other = torch.zeros(6).index_add(0, pairs[:, 0], second * ~alike)  # by the item above
    assert other.min() > 0.9


def test_scores_of_single_items_cannot_say_what_is_learnt():
    agent = SlatePPO(toy_spec(items=6, slate_size=2), **PLAY)
    found = play_variety(agent, 80, masked=True)
    # Whatever scores single items ranks them, by chance or not: the best of all rankings bounds it.
    pairs = list(itertools.combinations(range(3), 2))
    shelves = [{*a, *(3 + i for i in b)} for a in pairs for b in pairs]
    best = 0.0
    for order in itertools.permutations(range(6)):
        first = [[item for item in order if item in shelf][:2] for shelf in shelves]
        best = max(best, float(variety(torch.tensor(first)).sum(dim=1).mean()))
    assert best < 1.8
    assert found > 1.9


@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_the_critic_foretells_what_is_still_to_come_at_any_scale(size):
    agent = SlatePPO(toy_spec(slate_size=2), **PLAY)
    profile, left = torch.ones(16, 4), torch.ones(16, dtype=torch.bool)
    reward = size * torch.tensor([[3.0, 5.0]]).expand(16, 2)
    for _ in range(100):
        decision = agent.act(toy_obs(profile), None)
        agent.update(toy_step(profile, decision, reward, left=left))
    seen = agent.net.read(toy_obs(profile))
    with torch.no_grad():
        value = agent._value(seen, agent._above(decision.slate)).mean(dim=0) / size
    assert value.tolist() == pytest.approx([8.0, 5.0], abs=0.15)


@pytest.mark.parametrize(("form", "wanted"), [("cut", 4.0), ("left", 2.0), ("on", 4.0)])
def test_a_step_limit_goes_on_in_value_and_leaving_does_not(form, wanted):
    agent = SlatePPO(toy_spec(slate_size=2), **PLAY, gamma=0.5, lam=0.5)
    profile, ends = torch.ones(16, 4), torch.ones(16, dtype=torch.bool)
    for _ in range(100):
        decision = agent.act(toy_obs(profile), None)
        flags = {} if form == "on" else {form: ends}
        agent.update(toy_step(profile, decision, torch.ones(16, 2), **flags))
    seen = agent.net.read(toy_obs(profile[:1]))
    with torch.no_grad():
        value = agent._value(seen, agent._nothing(seen), agent.place[:1])
    assert float(value) == pytest.approx(wanted, abs=0.15)  # 2 a step, the next worth half


def test_empty_slots_teach_nothing_and_use_no_item_up():
    """Slates of which all but one slot is empty: only what was shown counts, item 0 as well."""
    agent = SlatePPO(toy_spec(slate_size=3), **QUICK | {"lr": 1e-12, "epochs": 1, "steps": 1})
    obs = toy_obs(torch.ones(4, 4))
    slate = torch.tensor([[EMPTY, 0, 1], [2, EMPTY, 0], [EMPTY, EMPTY, 0], [EMPTY] * 3])
    said = agent.slate_probs(obs, None, slate)
    said = torch.where(slate == EMPTY, 1.0, said)  # whatever is said of a slot with nothing in it
    said = torch.where(slate == 0, said / 2.0, said)  # the chance of item 0 has doubled since
    logs = agent.update(toy_step(torch.ones(4, 4), Decision(slate, said), torch.ones(4, 3)))
    # five slots show something, three of them item 0: their ratio is 2, that of the others 1
    assert float(logs["train/clip_fraction"]) == pytest.approx(0.6)
    assert float(logs["train/approx_kl"]) == pytest.approx(0.6 * (1.0 - 0.6931), abs=1e-3)


def test_a_slate_cut_short_for_want_of_items_is_learnt_from():
    agent = SlatePPO(toy_spec(slate_size=3), **QUICK | {"steps": 1, "epochs": 1})
    with torch.no_grad():
        for p in agent.policy:
            p.zero_()  # every item alike
    mask = torch.tensor([[True, True, False, False]]).expand(4, 4)
    decision = Decision(torch.tensor([[0, 1, EMPTY]]).expand(4, 3), torch.full((4, 3), 0.5))
    logs = agent.update(toy_step(torch.ones(4, 4), decision, torch.ones(4, 3), mask=mask))
    assert all(bool(value.isfinite()) for value in logs.values())
    assert all(bool(p.isfinite().all()) for p in agent.policy)
    # two items for the first slot, one for the second, none for the third
    assert float(logs["train/entropy_loss"]) == pytest.approx(-0.6931 / 3.0, abs=1e-3)


def test_entropy_is_of_what_may_be_shown_in_each_slot():
    agent = SlatePPO(toy_spec(slate_size=2), **QUICK | {"lr": 1e-12, "epochs": 1, "steps": 1})
    with torch.no_grad():
        for p in agent.policy:
            p.zero_()  # every item alike
    mask = torch.tensor([[True, True, True, False]]).expand(4, 4)
    obs = toy_obs(torch.ones(4, 4))
    decision = agent.act(obs, mask)
    logs = agent.update(toy_step(torch.ones(4, 4), decision, torch.ones(4, 2), mask=mask))
    wanted = torch.tensor([3.0, 2.0]).log().mean()
    assert float(logs["train/entropy_loss"]) == pytest.approx(-float(wanted), abs=1e-5)
    assert float(decision.propensity[0].prod()) == pytest.approx(1 / 6, abs=1e-5)


def test_a_weight_on_entropy_keeps_chances_even():
    found = []
    for weight in (0.0, 1.0):
        spec = toy_spec(items=6, slate_size=2)
        agent = SlatePPO(spec, **QUICK | {"lr": 5e-3, "steps": 2, "entropy_weight": weight})
        play_variety(agent, 40, users=32)
        probs = agent.action_probs(toy_obs(torch.ones(1, 4)), None)
        found.append(float(-(probs * probs.log()).sum()))
    assert found[1] > 1.75  # log 6 is 1.79
    assert found[0] < found[1] - 0.02
