"""Prioritised replay, quantiles, schedules and resuming them keep their known answers."""

from dataclasses import replace

import pytest
import torch

from agents.checks import NonFiniteLossError
from agents.dqn import DQN, next_value, quantile_huber, slot_targets
from agents.priorities import FLOOR, Priorities
from agents.replay import Replay
from agents.testing import synthetic_observation, synthetic_spec, synthetic_steps
from tests.test_dqn import QUICK, RIGHT, STATES, step_of, toy_dqn, toy_obs, toy_spec, trained, walk

PLANNED = replace(synthetic_spec(), total_steps=2000)
FAMILY = {"priority": 0.6, "n_step": 3}


def filled(alpha, surprise):
    """Priorities of as many places as there are surprises (M,)."""
    priorities = Priorities(alpha)
    priorities.add(slice(0, len(surprise)), len(surprise))
    priorities.update(torch.arange(len(surprise)), surprise)
    return priorities


@pytest.mark.parametrize("knobs", [{"priority": 0.6, "n_step": 2}, {"quantiles": 5}])
def test_the_corridor_has_its_known_values_however_it_is_learnt(knobs):
    spec = replace(toy_spec(), total_steps=3840)
    shape = {"replay_ratio": 4.0, "lr": 1e-2, "tau": 0.1, "width": 64, "schedule": "linear"}
    agent = toy_dqn(spec, **shape, **knobs)
    walk(agent, 60, right_only=knobs.get("n_step", 1) > 1)
    q = agent.scores(toy_obs(torch.arange(STATES - 1)))
    assert q[2:, 1].tolist() == pytest.approx(RIGHT[2:], abs=0.02)
    if "quantiles" in knobs:
        assert q[:, 1].tolist() == pytest.approx(RIGHT, abs=0.02)
        left = [0.9 * RIGHT[max(s - 1, 0)] for s in range(STATES - 1)]
        assert q[:, 0].tolist() == pytest.approx(left, abs=0.02)


def test_places_are_drawn_in_proportion_to_surprise_to_the_power_alpha():
    surprise = torch.rand(50, generator=torch.Generator().manual_seed(0)) * 5.0
    alpha, draws = 0.7, 200_000
    place = filled(alpha, surprise).draw(draws, torch.Generator().manual_seed(1))
    seen = torch.bincount(place, minlength=50).double()
    chance = (surprise.double() + 1e-3) ** alpha
    wanted = draws * chance / chance.sum()
    chi_square = float(((seen - wanted) ** 2 / wanted).sum())
    assert chi_square < 85.4  # p = .001 at 49 degrees of freedom
    other = draws * surprise.double() / surprise.sum()
    assert float(((seen - other) ** 2 / other).sum()) > 1000.0  # alpha = 1 is told apart


def test_importance_weights_undo_the_priorities():
    generator = torch.Generator().manual_seed(0)
    value = torch.rand(1000, generator=generator, dtype=torch.float64)
    priorities = filled(0.6, value.float() * 4.0)  # what is worth more is drawn more often
    place = priorities.draw(1_000_000, generator)
    assert float(value[place].mean() - value.mean()) > 0.05
    weight = priorities.weights(place, beta=1.0).double()
    corrected = (weight * value[place]).sum() / weight.sum()
    assert float(corrected) == pytest.approx(float(value.mean()), abs=1e-3)


def test_importance_weights_by_hand():
    priorities = filled(1.0, torch.tensor([1.0, 4.0, 16.0]) - 1e-3)
    place = torch.tensor([1, 2, 1])
    assert priorities.weights(place, 1.0).tolist() == pytest.approx([1.0, 0.25, 1.0])
    assert priorities.weights(place, 0.5).tolist() == pytest.approx([1.0, 0.5, 1.0])
    assert priorities.weights(place, 0.0).tolist() == [1.0, 1.0, 1.0]


def test_new_places_come_at_the_largest_priority_and_empty_ones_never():
    priorities = Priorities(1.0)
    priorities.add(slice(0, 2), 8)
    assert priorities.power.tolist() == [1.0, 1.0, *[0.0] * 6]
    priorities.update(torch.tensor([0, 1]), torch.tensor([5.0, -7.0]))
    priorities.add(slice(2, 4), 8)
    assert priorities.power[2:4].tolist() == pytest.approx([7.001, 7.001])
    place = priorities.draw(10_000, torch.Generator().manual_seed(0))
    assert set(place.tolist()) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="empty replay"):
        Priorities(1.0).draw(1, torch.Generator())


def test_places_of_no_surprise_keep_a_chance_of_the_floor_to_the_power_alpha():
    assert filled(0.5, torch.tensor([0.0, 0.0399])).power.tolist() == pytest.approx(
        [FLOOR**0.5, (0.0399 + FLOOR) ** 0.5]
    )


@pytest.mark.parametrize(("double", "worth"), [(True, 5.0), (False, 9.0)])
def test_the_net_picks_the_next_slate_only_where_it_is_double(double, worth):
    agent = toy_dqn(toy_spec(items=3), double=double)
    for net, values in ((agent.net, [8.0, 1.0, 2.0]), (agent.target, [5.0, 7.0, 9.0])):
        known = torch.tensor([values])  # the net likes item 0, the target item 2
        net.ranking = lambda seen, shop, known=known: known
        net.values_of = lambda seen, slate, known=known: known.gather(1, slate)
    seen = agent.net.read(toy_obs(torch.tensor([1])))
    allowed, zero = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 1)
    _, target = agent._both(seen, seen, torch.tensor([[1]]), allowed, zero, torch.ones(1))
    assert target.tolist() == [[worth]]


def test_errors_of_opposite_sign_in_a_slate_do_not_cancel_in_its_priority():
    agent = trained(DQN(PLANNED, **QUICK | {"priority": 1.0}), 2)
    place = torch.arange(8)

    def off_by_one(seen, later, slate, *rest):
        q = agent.net.values_of(seen, slate)
        return q, q.detach() + torch.tensor([1.0, -1.0])

    agent.values_and_targets = off_by_one
    agent._learn(place, torch.ones(8))
    assert agent.priorities.power[place].tolist() == pytest.approx([1.0 + FLOOR] * 8)


def test_small_priorities_among_many_are_not_lost_to_rounding():
    surprise = torch.full((400_000,), 1.0)
    surprise[-1000:] = 0.01  # a float32 sum of 400,000 would step by .03
    place = filled(1.0, surprise).draw(2_000_000, torch.Generator().manual_seed(0))
    often = int((place >= 399_000).sum())
    assert often == pytest.approx(2e6 * 11.0 / (399_000 * 1.001 + 11.0), rel=0.4)


def test_the_newest_places_are_those_the_last_add_wrote():
    spec = synthetic_spec(slate_size=1)
    agent, replay = DQN(spec), Replay(12, spec=spec)
    for i, step in enumerate(synthetic_steps(agent, spec, 4, 7, torch.Generator().manual_seed(0))):
        replay.add(replace(step, reward=torch.full((4,), float(i)), terminated=step.terminated))
        place = torch.arange(12)[replay.newest()]
        assert replay.at(place).transition.reward.tolist() == [float(i)] * 4


def test_what_surprises_more_gets_a_higher_priority():
    agent = trained(DQN(PLANNED, **QUICK | FAMILY), 10)
    place = torch.arange(32)
    agent._learn(place, torch.ones(32))
    sample = agent.replay.at(place)
    power = agent.priorities.power[place]
    assert power.unique().numel() > 16
    batch = sample.transition
    q = agent.net.values_of(agent.net.read(batch.obs), batch.decision.slate).mean(dim=1)
    gap = (sample.slot_return.mean(dim=1) - q.detach()).abs()  # most of the error at random rewards
    assert float(torch.corrcoef(torch.stack([power, gap]))[0, 1]) > 0.5


def test_beta_weighs_the_loss_and_ends_at_one():
    agent = trained(DQN(PLANNED, **QUICK | {"priority": 1.0, "beta": 0.0}), 10)
    agent.env_steps = 0
    assert (agent._draw()[1] == 1.0).all()
    agent.env_steps = 2000
    place, weight = agent._draw()
    power = agent.priorities.power[place]
    assert torch.allclose(weight, power.min() / power)
    state = agent.experience()["priorities"]
    whole = agent._learn(place, torch.ones(len(place)))["train/grad_norm"]
    assert float(whole) > 0.0
    assert float(agent._learn(place, torch.zeros(len(place)))["train/grad_norm"]) == 0.0
    assert not torch.equal(state["power"], agent.priorities.power)


def test_quantiles_of_a_uniform_return_are_where_they_should_be():
    generator = torch.Generator().manual_seed(0)
    q = torch.zeros(1, 1, 5, requires_grad=True)
    optimizer = torch.optim.SGD([q], lr=1.0)
    for i in range(600):
        target = torch.rand(1, 1, 2000, generator=generator)
        optimizer.param_groups[0]["lr"] = 2.0 / (1.0 + 0.05 * i)
        optimizer.zero_grad()
        quantile_huber(q, target, kappa=1e-3).sum().backward()
        optimizer.step()
    assert q[0, 0].tolist() == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9], abs=0.01)


def test_quantile_huber_by_hand():
    q, target = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[0.5, 4.0]]])
    # errors .5, 4 of the quantile at .25 and -1.5, 2 of the one at .75; Huber .125 3.5 1 1.5
    by_hand = (0.25 * 0.125 + 0.25 * 3.5 + 0.25 * 1.0 + 0.75 * 1.5) / 4
    assert float(quantile_huber(q, target, kappa=1.0)) == pytest.approx(by_hand)


def test_quantiles_of_the_next_best_slate_by_hand():
    q = torch.tensor([[[1.0, 3.0], [5.0, 9.0], [2.0, 2.0]]])
    choose = torch.tensor([[9.0, 1.0, 5.0]])  # likes items 0 and 2
    allowed = torch.tensor([[True, True, True]])
    assert next_value(q, choose, allowed, 2).tolist() == [[1.5, 2.5]]
    assert next_value(q, choose, ~allowed, 2).tolist() == [[0.0, 0.0]]
    target = slot_targets(
        torch.tensor([[1.0, 0.0]]), torch.tensor([0.5]), torch.tensor([[1.5, 2.5]])
    )
    assert target.tolist() == [[[1.75, 2.25], [0.75, 1.25]]]


def test_quantiles_act_on_their_mean():
    agent = DQN(synthetic_spec(), quantiles=4)
    obs = synthetic_observation(agent.spec, 6, torch.Generator().manual_seed(0))
    assert torch.equal(agent.scores(obs), agent.target(obs).mean(dim=2))


def test_quantiles_tell_a_sure_return_from_a_coin():
    """State 0 pays 1/2 for sure, state 1 pays 0 or 1: the same mean, other quantiles."""
    agent = toy_dqn(toy_spec(), quantiles=8, kappa=0.05, replay_ratio=4.0, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    state = torch.arange(64) % 2
    none = torch.zeros(64, dtype=torch.int64)
    for _ in range(40):
        slate = agent.act(toy_obs(state), None).slate
        coin = (torch.rand(64, generator=generator) < 0.5).float()
        reward = torch.where(state == 0, 0.5, coin)[:, None]
        agent.update(step_of(state, slate, reward, none, none == 0))
    q = agent.target(toy_obs(torch.tensor([0, 1])))[:, 1]  # (2, Q)
    assert q.mean(dim=1).tolist() == pytest.approx([0.5, 0.5], abs=0.12)
    spread = q.max(dim=1).values - q.min(dim=1).values
    assert float(spread[0]) < 0.25
    assert float(spread[1]) > 0.7


@pytest.mark.parametrize("knobs", [FAMILY, {"quantiles": 3, "schedule": "cosine"}])
def test_the_family_resumes_bit_for_bit_in_an_agent_of_another_seed(knobs, tmp_path):
    settings = QUICK | knobs
    straight = trained(trained(DQN(PLANNED, **settings), 20), 15, seed=5)
    first = trained(DQN(PLANNED, **settings), 20)
    torch.save((first.state_dict(), first.experience()), tmp_path / "state.pt")
    second = DQN(replace(PLANNED, seed=77), **settings)
    state, experience = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(state)
    second.load_experience(experience)
    trained(second, 15, seed=5)
    for a, b in zip(straight.net.parameters(), second.net.parameters(), strict=True):
        assert torch.equal(a, b)
    obs = synthetic_observation(PLANNED, 64, torch.Generator().manual_seed(9))
    assert torch.equal(straight.act(obs, None).slate, second.act(obs, None).slate)
    if straight.priorities is not None:
        assert torch.equal(straight.priorities.power, second.priorities.power)


def test_experience_of_another_setting_is_refused_and_a_state_alone_empties_it():
    agent = trained(DQN(PLANNED, **QUICK | FAMILY), 5)
    with pytest.raises(ValueError, match="saved with priority on, this agent has it off"):
        DQN(PLANNED, **QUICK).load_experience(agent.experience())
    with pytest.raises(ValueError, match="saved with priority off, this agent has it on"):
        agent.load_experience(DQN(PLANNED, **QUICK).experience())
    agent.load_state_dict(agent.state_dict())
    assert agent.priorities.filled == len(agent.replay) == 0
    trained(agent, 5)


def test_the_learning_rate_falls_to_zero_over_the_planned_steps():
    spec = replace(synthetic_spec(), total_steps=640)
    agent = trained(DQN(spec, **QUICK | {"schedule": "linear", "lr": 0.1}), 10)
    assert agent.env_steps == 320
    assert agent.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    trained(agent, 10)
    assert agent.optimizer.param_groups[1]["lr"] == 0.0


def test_states_of_compiled_and_plain_agents_load_into_each_other():
    compiled, plain = (DQN(PLANNED, **QUICK | {"compile": c}) for c in (True, False))
    assert compiled.state_dict()["net"].keys() == plain.state_dict()["net"].keys()
    plain.load_state_dict(trained(compiled, 1).state_dict())
    compiled.load_state_dict(plain.state_dict())
    assert compiled.env_steps == plain.env_steps == 32


def test_products_in_bfloat16_give_nearly_the_same_values_and_targets():
    agents = [DQN(PLANNED, **QUICK | {"amp": amp}) for amp in (False, True)]
    sample = trained(agents[0], 4).replay.at(torch.arange(32))
    agents[1].load_state_dict(agents[0].state_dict())
    batch = sample.transition
    plain, rough = (
        a._both(
            a.net.read(batch.obs), a.net.read(batch.next_obs), batch.decision.slate,
            torch.ones(32, 24, dtype=torch.bool), sample.slot_return, sample.discount,
        ) for a in agents
    )  # fmt: skip
    for exact, near in zip(plain, rough, strict=True):
        assert near.dtype == torch.float32
        assert not torch.equal(exact, near)
        assert torch.allclose(exact, near, atol=0.03)
    obs = synthetic_observation(PLANNED, 8, torch.Generator().manual_seed(1))
    assert torch.equal(agents[0].scores(obs), agents[1].scores(obs))  # acting stays exact


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_every_user_flips_a_coin_of_their_own(share):
    agent = DQN(synthetic_spec(slate_size=1, num_items=200), epsilon_start=share, epsilon_end=share)
    one = synthetic_observation(agent.spec, 1, torch.Generator().manual_seed(0))
    obs = one[torch.zeros(16, dtype=torch.int64)]
    greedy = agent.act(obs, None, explore=False).slate
    counts = torch.tensor(
        [int((agent.act(obs, None).slate != greedy).sum()) for _ in range(400)]
    ).double()
    p = share * 199 / 200
    assert float(counts.mean()) == pytest.approx(16 * p, abs=0.3)
    assert float(counts.var()) == pytest.approx(16 * p * (1 - p), rel=0.3)  # one coin: 16 times it


def test_a_loss_that_is_not_finite_is_noticed():
    agent = trained(DQN(synthetic_spec(), **QUICK), 4)
    with torch.no_grad():
        agent.net.value.bias.fill_(torch.nan)
    agent.updates = 99
    with pytest.raises(NonFiniteLossError, match=r"lower agent\.lr") as caught:
        agent._learn(*agent._draw())
    assert caught.value.batch["transition"]["reward"].shape == (32,)


@pytest.mark.parametrize(
    ("knob", "words"),
    [
        ({"epsilon_start": 1.5}, "epsilon_start must be in"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"gamma": 1.1}, "gamma must be in"),
        ({"n_step": 0}, "n_step must be at least 1"),
        ({"replay_ratio": -1.0}, "replay_ratio must be above 0"),
        ({"tau": 1.5}, "tau must be in"),
        ({"shrink": -1.0}, "shrink must be at least 0"),
        ({"priority": -0.5}, "priority must be at least 0"),
        ({"priority": 0.6}, r"AgentSpec\(total_steps"),
        ({"schedule": "linear"}, r"AgentSpec\(total_steps"),
        ({"beta": 2.0}, "beta must be in"),
        ({"quantiles": 0}, "quantiles must be a whole number"),
        ({"kappa": 0.0}, "kappa must be above 0"),
    ],
)
def test_knobs_out_of_range_are_refused(knob, words):
    with pytest.raises(ValueError, match=words):
        DQN(synthetic_spec(), **knob)
