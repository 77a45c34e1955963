"""DQN finds known values, bootstraps where it should, and learns what a household buys again."""

from dataclasses import replace

import pytest
import torch
import toys

from agents.base import Decision, Transition
from agents.dqn import DQN, next_value, shown_mean, slot_targets
from agents.saving import catalog_signature
from agents.testing import synthetic_observation, synthetic_spec, synthetic_steps
from encoders.state import EMPTY

STATES = 6


def toy_spec(items=2, slate_size=1, seed=0):
    return toys.toy_spec(items, STATES, slate_size, seed)


def toy_obs(state):
    """States (B,) as one-hot profiles; nothing else is seen."""
    return toys.toy_obs(torch.nn.functional.one_hot(state, STATES).float())


def step_of(
    state, slate, slot_reward, later, terminated, truncated=None, mask=None, next_mask=None
):
    b = len(state)
    return Transition(
        obs=toy_obs(state),
        mask=mask,
        decision=Decision(slate, torch.ones(slate.shape)),
        reward=slot_reward.sum(dim=1),
        chosen=slot_reward > 0,
        slot_reward=slot_reward,
        next_obs=toy_obs(later),
        next_mask=next_mask,
        terminated=terminated,
        truncated=torch.zeros(b, dtype=torch.bool) if truncated is None else truncated,
    )


def toy_dqn(spec, **knobs):
    defaults = {
        "lr": 3e-3,
        "epsilon_end": 1.0,
        "batch_size": 64,
        "capacity": 6400,
        "tau": 0.05,
        "learning_starts": 64,
        "width": 32,
        "memory": False,
        "gamma": 0.9,
        "shrink": 0.0,
        "epsilon_start": 1.0,
        "replay_ratio": 1.0,
    }
    return DQN(spec, **(defaults | knobs))


def walk(agent, updates, batch=64, right_only=False, seed=0):
    """A corridor: item 1 steps right, item 0 left; the right end pays 1 and ends the walk."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randint(0, STATES - 1, (batch,), generator=generator)
    for _ in range(updates):
        slate = agent.act(toy_obs(state), None).slate
        slate = torch.ones_like(slate) if right_only else slate
        later = (state + 2 * slate[:, 0] - 1).clamp(min=0)
        ends = later == STATES - 1
        agent.update(step_of(state, slate, ends[:, None].float(), later, ends))
        again = torch.randint(0, STATES - 1, (batch,), generator=generator)
        state = torch.where(ends, again, later)


RIGHT = [0.6561, 0.729, 0.81, 0.9, 1.0]


@pytest.mark.parametrize("form", [{}, {"head": "dense", "double": False, "dueling": False}])
def test_the_corridor_has_its_known_values(form):
    agent = toy_dqn(toy_spec(), replay_ratio=4.0, lr=1e-2, tau=0.1, width=64, **form)
    walk(agent, 60)
    agent.lr /= 10  # the last steps average the noise out
    walk(agent, 60)
    q = agent.scores(toy_obs(torch.arange(STATES - 1)))
    assert q[:, 1].tolist() == pytest.approx(RIGHT, abs=0.02)
    left = [0.9 * RIGHT[max(s - 1, 0)] for s in range(STATES - 1)]
    assert q[:, 0].tolist() == pytest.approx(left, abs=0.02)


def test_n_step_returns_reach_the_same_values_on_their_own_policy():
    agent = toy_dqn(toy_spec(), n_step=3, replay_ratio=4.0)
    walk(agent, 80, right_only=True)
    q = agent.scores(toy_obs(torch.arange(STATES - 1)))
    # only right was ever shown: the value of left is anything, the target must not read it
    assert q[3:, 1].tolist() == pytest.approx(RIGHT[3:], abs=0.02)


def test_a_step_limit_does_not_stop_bootstrapping():
    agent = toy_dqn(toy_spec(), tau=0.1, lr=1e-2, replay_ratio=4.0)
    state, b = torch.zeros(64, dtype=torch.int64), 64
    clock = torch.arange(b) % 10
    for _ in range(100):
        slate = agent.act(toy_obs(state), None).slate
        clock = clock + 1
        over = clock == 10
        agent.update(step_of(state, slate, torch.ones(b, 1), state, clock < 0, over))
        clock = torch.where(over, 0, clock)
    assert agent.scores(toy_obs(state[:1])).mean() == pytest.approx(10.0, abs=0.3)


def test_leaving_stops_bootstrapping():
    agent = toy_dqn(toy_spec(), gamma=0.99, replay_ratio=4.0)
    state = torch.zeros(64, dtype=torch.int64)
    for _ in range(50):
        slate = agent.act(toy_obs(state), None).slate
        agent.update(step_of(state, slate, torch.ones(64, 1), state, state == 0))
    assert agent.scores(toy_obs(state[:1]))[0].tolist() == pytest.approx([1.0, 1.0], abs=0.02)


def test_what_may_not_be_shown_next_is_worth_nothing_in_the_target():
    agent = toy_dqn(toy_spec(), replay_ratio=4.0)
    half = torch.arange(64) % 2  # even rows are in state 0, odd ones in state 1 where trips end
    pay = torch.tensor([0.2, 1.0])
    none = torch.full((64, 1), EMPTY)
    for _ in range(90):
        slate = agent.act(toy_obs(half), None).slate
        reward = (pay[slate[:, 0]] * (half == 1))[:, None]
        excluded = torch.where(half[:, None] == 0, 1, EMPTY)  # coming from 0, item 1 is masked in 1
        agent.update(
            step_of(half, slate, reward, torch.ones_like(half), half == 1, None, none, excluded)
        )
    q = agent.scores(toy_obs(torch.tensor([0, 1])))
    assert q[1].tolist() == pytest.approx([0.2, 1.0], abs=0.03)
    assert q[0].tolist() == pytest.approx([0.18, 0.18], abs=0.03)  # .9 * .2, not .9 * 1


def test_double_dqn_target_by_hand():
    value = next_value(
        q=torch.tensor([[5.0, 7.0, 9.0]] * 2),
        choose=torch.tensor([[2.0, 1.0, 3.0]] * 2),  # likes item 2, then 0; they are worth 9 and 5
        allowed=torch.tensor([[True, True, False], [True, True, True]]),
        k=1,
    )
    assert value.tolist() == [5.0, 9.0]
    target = slot_targets(torch.tensor([[1.0], [1.0]]), torch.tensor([0.5, 0.0]), value)
    assert target.tolist() == [[3.5], [1.0]]


def test_a_slate_is_worth_the_mean_of_its_best_items_and_missing_ones_nothing():
    q = torch.tensor([[4.0, 2.0, 9.0], [4.0, 2.0, 9.0]])
    allowed = torch.tensor([[True, True, False], [False, True, False]])
    assert next_value(q, q, allowed, 2).tolist() == [3.0, 1.0]


def test_two_estimators_take_away_the_bias_of_one():
    generator = torch.Generator().manual_seed(0)
    q, other = (torch.randn(4000, 1000, generator=generator) for _ in range(2))
    allowed = torch.ones_like(q, dtype=torch.bool)
    assert float(next_value(q, q, allowed, 1).mean()) == pytest.approx(3.245, abs=0.02)
    assert float(next_value(q, other, allowed, 1).mean()) == pytest.approx(0.0, abs=0.06)


def test_empty_slots_are_not_learnt_from():
    loss = torch.tensor([[0.5, 50.0], [1.5, 2.5]], requires_grad=True)
    mean = shown_mean(loss, torch.tensor([[True, False], [True, True]]))
    mean.backward()
    assert float(mean.detach()) == 1.5
    assert loss.grad.tolist() == [[pytest.approx(1 / 3), 0.0], [pytest.approx(1 / 3)] * 2]
    assert float(shown_mean(loss.detach(), torch.zeros(2, 2, dtype=torch.bool))) == 0.0


def test_every_slot_learns_its_own_reward():
    spec = toy_spec(items=5, slate_size=3)
    agent, b = toy_dqn(spec, replay_ratio=4.0), 64
    state, pay = torch.zeros(b, dtype=torch.int64), torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])
    for _ in range(70):
        slate = agent.act(toy_obs(state), None).slate
        agent.update(step_of(state, slate, pay[slate], state, state == 0))
    q = agent.scores(toy_obs(state[:1]))[0]
    assert q.tolist() == pytest.approx(pay.tolist(), abs=0.02)
    assert agent.act(toy_obs(state[:1]), None, explore=False).slate.tolist() == [[4, 3, 2]]


def household_reward(obs, slate):
    """1 where the item is of the user's own past and bought at least four times, else 0."""
    own = (slate[:, :, None] == obs.past[:, None, :]) & (obs.past_count >= 4)[:, None, :]
    return own.any(dim=2).float()


def learn_households(memory, updates=150, batch=128):
    spec = replace(synthetic_spec(num_items=150, slate_size=2), past_size=20)
    agent = DQN(
        spec, gamma=0.0, epsilon_steps=10_000, batch_size=128, memory=memory, learning_starts=500
    )
    generator = torch.Generator().manual_seed(3)
    obs = synthetic_observation(spec, batch, generator)
    for _ in range(updates):
        decision = agent.act(obs, obs.history)
        reward = household_reward(obs, decision.slate)
        later = synthetic_observation(spec, batch, generator)
        left = torch.ones(batch, dtype=torch.bool)
        agent.update(
            Transition(
                obs=obs,
                mask=obs.history,
                decision=decision,
                reward=reward.sum(dim=1),
                chosen=reward > 0,
                slot_reward=reward,
                next_obs=later,
                next_mask=later.history,
                terminated=left,
                truncated=~left,
            )
        )
        obs = later
    test = synthetic_observation(spec, 512, generator)
    return float(household_reward(test, agent.act(test, None, explore=False).slate).mean())


def test_a_few_hundred_updates_find_what_a_household_buys_again():
    assert learn_households(memory=True) > 0.75  # some pasts are empty: about .85 is possible
    assert learn_households(memory=False, updates=60) < 0.3


def updates_of(steps, **knobs):
    spec = synthetic_spec(slate_size=1)
    agent = DQN(spec, **knobs)
    for transition in synthetic_steps(agent, spec, 64, steps, torch.Generator().manual_seed(0)):
        agent.update(transition)
    return agent.updates


def test_the_replay_ratio_is_sampled_transitions_per_env_step():
    knobs = {"learning_starts": 1, "batch_size": 48, "width": 8}
    for ratio in (0.25, 2.5):
        assert updates_of(16, replay_ratio=ratio, **knobs) == int(16 * 64 * ratio / 48)


def test_nothing_is_learnt_before_learning_starts():
    assert updates_of(7, learning_starts=449, batch_size=32, replay_ratio=1.0) == 0
    assert updates_of(8, learning_starts=449, batch_size=32, replay_ratio=1.0) == 2


def test_epsilon_is_a_function_of_env_steps():
    spec = synthetic_spec()
    agent = DQN(spec, epsilon_start=1.0, epsilon_end=0.05, epsilon_steps=128)
    for transition in synthetic_steps(agent, spec, 64, 1, torch.Generator().manual_seed(0)):
        agent.update(transition)
    assert agent.epsilon == pytest.approx((1.0 + 0.05) / 2)


def trained(agent, steps, seed=0):
    """The agent after `steps` of one fixed stream of observations, and its answers to the next."""
    generator = torch.Generator().manual_seed(seed)
    for transition in synthetic_steps(agent, agent.spec, 32, steps, generator):
        agent.update(transition)
    return agent


QUICK = {
    "replay_ratio": 1.0,
    "learning_starts": 64,
    "batch_size": 32,
    "width": 16,
    "n_step": 2,
    "capacity": 640,
}


def test_the_same_seed_trains_bit_equally_and_another_does_not():
    a, b, c = (
        trained(DQN(replace(synthetic_spec(), seed=seed), **QUICK), 20) for seed in (0, 0, 1)
    )
    obs = synthetic_observation(a.spec, 4, torch.Generator().manual_seed(9))
    assert torch.equal(a.scores(obs), b.scores(obs))
    assert not torch.equal(a.scores(obs), c.scores(obs))


def test_training_resumes_bit_for_bit_in_an_agent_of_another_seed(tmp_path):
    straight = trained(trained(DQN(synthetic_spec(), **QUICK), 20), 15, seed=5)
    first = trained(DQN(synthetic_spec(), **QUICK), 20)
    torch.save((first.state_dict(), first.experience()), tmp_path / "state.pt")
    second = DQN(replace(synthetic_spec(), seed=77), **QUICK)
    state, experience = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(state)
    second.load_experience(experience)
    trained(second, 15, seed=5)
    obs = synthetic_observation(first.spec, 64, torch.Generator().manual_seed(9))
    assert torch.equal(straight.scores(obs), second.scores(obs))
    assert torch.equal(straight.act(obs, None).slate, second.act(obs, None).slate)
    assert straight.updates == second.updates == 34


def test_a_state_without_replay_starts_with_an_empty_one():
    agent = trained(DQN(synthetic_spec(), **QUICK), 5)
    agent.load_state_dict(agent.state_dict())
    assert len(agent.replay) == 0
    trained(agent, 5)


def test_the_target_net_is_the_running_mean_of_the_net():
    spec = synthetic_spec()
    agent = DQN(spec, **QUICK | {"tau": 0.25})
    mean = [p.clone() for p in agent.net.parameters()]
    seen = 0
    for _ in range(4):
        trained(agent, 1)
        if agent.updates > seen:
            seen = agent.updates
            mean = [m.lerp(p, 0.25) for m, p in zip(mean, agent.net.parameters(), strict=True)]
    assert seen == 3
    for slow, expected in zip(agent.target.parameters(), mean, strict=True):
        assert torch.allclose(slow, expected)


def test_decay_falls_on_the_personal_weights_alone():
    spec = synthetic_spec()
    for head in ("dot", "dense"):
        agent = DQN(spec, **QUICK | {"shrink": 5.0, "head": head})
        personal = {id(p) for p in agent.net.personal()}
        for group in agent.optimizer.param_groups:
            inside = [id(p) in personal for p in group["params"]]
            assert all(inside) if group["weight_decay"] == 5.0 else not any(inside)
        assert sum(len(g["params"]) for g in agent.optimizer.param_groups) == len(
            list(agent.net.parameters())
        )


def test_users_are_served_by_the_running_mean():
    spec = synthetic_spec()
    agent = DQN(spec, **QUICK)
    trained(agent, 4)
    obs = synthetic_observation(spec, 4, torch.Generator().manual_seed(9))
    assert torch.equal(agent.scores(obs), agent.target(obs))
    assert not torch.equal(agent.scores(obs), agent.net(obs))


def test_a_checkpoint_of_another_catalogue_is_refused():
    spec = synthetic_spec()
    state = DQN(spec).state_dict()
    with pytest.raises(ValueError, match="catalogue of 24 items, this one has 30"):
        DQN(synthetic_spec(num_items=30)).load_state_dict(state)
    shuffled = replace(spec, item_vectors=spec.item_vectors.roll(1, dims=0))
    with pytest.raises(ValueError, match="another catalogue of the same size"):
        DQN(shuffled).load_state_dict(state)
    rounded = replace(spec, item_vectors=spec.item_vectors.bfloat16().float())
    DQN(rounded).load_state_dict(state)  # another machine's rounding is the same catalogue
    with pytest.raises(ValueError, match="net of another form"):
        DQN(spec, head="dense").load_state_dict(state)


def test_a_signature_tells_catalogues_apart():
    vectors = synthetic_spec().item_vectors
    assert torch.equal(catalog_signature(vectors), catalog_signature(vectors.clone()))
    assert not torch.allclose(catalog_signature(vectors), catalog_signature(vectors.flip(0)))


@pytest.mark.parametrize("field", ["reward", "slot_reward", "obs.past_age", "next_obs.context"])
def test_what_is_not_finite_is_refused_before_it_is_learnt_from(field):
    spec = synthetic_spec()
    agent = DQN(spec)
    transition = next(synthetic_steps(agent, spec, 8, 1, torch.Generator().manual_seed(0)))
    side, _, name = field.rpartition(".")
    holder = getattr(transition, side) if side else transition
    value = getattr(holder, name).clone()
    value[5] = torch.nan
    holder = replace(holder, **{name: value})
    with pytest.raises(ValueError, match=f"{field} must be finite, row 5"):
        agent.update(replace(transition, **{side: holder}) if side else holder)
    assert agent.env_steps == 0
    assert len(agent.replay) == 0
