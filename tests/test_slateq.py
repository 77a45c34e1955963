"""SlateQ plans where the myopic slate is wrong, and learns what users take from what they took."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
import toys

from agents.base import Decision, Transition
from agents.slateq import SlateQ, independent_loss, logit_loss, taken_of
from agents.testing import check_agent, synthetic_observation, synthetic_spec, synthetic_steps
from encoders.state import EMPTY

STATES = 2
LOGITS = torch.tensor([1.0, 0.5, 0.0, -1.0])  # of four items, whatever the state
PAYS = torch.tensor([[1.0, 0.3, 0.1, 0.6], [3.0, 0.9, 0.3, 1.8]])  # (state, item) once taken
LEADS_ON = torch.tensor([False, True, True, False])  # from state 0 to state 1; else users leave
GAMMA = 0.9


def toy_spec(items=4, slate_size=2, seed=0):
    return toys.toy_spec(items, STATES, slate_size, seed)


def toy_obs(state):
    """States (B,) as one-hot profiles; nothing else is seen."""
    return toys.toy_obs(torch.nn.functional.one_hot(state, STATES).float())


def step_of(state, slate, chosen, slot_reward, later, terminated, truncated=None):
    return Transition(
        obs=toy_obs(state),
        mask=None,
        decision=Decision(slate, torch.ones(slate.shape)),
        reward=slot_reward.sum(dim=1),
        chosen=chosen,
        slot_reward=slot_reward,
        next_obs=toy_obs(later),
        next_mask=None,
        terminated=terminated,
        truncated=torch.zeros_like(terminated) if truncated is None else truncated,
    )


def toy_agent(spec, **knobs):
    defaults = {
        "lr": 1e-2,
        "gamma": GAMMA,
        "epsilon_start": 1.0,
        "epsilon_end": 1.0,
        "capacity": 25_600,
        "replay_ratio": 4.0,
        "tau": 0.1,
        "width": 32,
        "memory": False,
        "learning_starts": 64,
        "shrink": 0.0,
    }
    return SlateQ(spec, **(defaults | knobs))


def logit_choice(slate, generator):
    """Which slot (B, K) users take who follow LOGITS with nothing at 0, at most one."""
    weight = torch.cat([torch.ones(len(slate), 1), LOGITS[slate].exp()], dim=1)  # (B, 1 + K)
    pick = torch.multinomial(weight, 1, generator=generator)  # (B, 1)
    return torch.zeros_like(weight, dtype=torch.bool).scatter(1, pick, True)[:, 1:]


def play(agent, steps, slates=None, batch=256):
    """Two steps at most: some items lead on to a second state that pays three times as much."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        state = torch.randint(0, STATES, (batch,), generator=generator)
        slate = agent.act(toy_obs(state), None).slate
        if slates is not None:
            slate = slates[torch.randint(0, len(slates), (batch,), generator=generator)]
        chosen = logit_choice(slate, generator)
        goes_on = (state == 0) & (LEADS_ON[slate] & chosen).any(dim=1)
        pay = PAYS[state[:, None], slate] * chosen
        agent.update(step_of(state, slate, chosen, pay, goes_on.long(), ~goes_on))


def exact_values(gamma):
    """Value of every slate in both states by enumeration, {slate: value} each."""
    second = {slate: slate_worth(PAYS[1], slate) for slate in combinations(range(4), 2)}
    later = PAYS[0] + gamma * LEADS_ON * max(second.values())
    return {slate: slate_worth(later, slate) for slate in second}, second


def slate_worth(pay, slate):
    weight = LOGITS[list(slate)].exp()
    return float((weight * pay[list(slate)]).sum() / (1.0 + weight.sum()))


WITH_THE_LAST = torch.tensor([[3, 0], [1, 3], [3, 2]])


def test_planning_finds_the_slate_that_the_myopic_one_misses():
    """From slates that all show the last item: the best two are never shown together."""
    first, second = exact_values(GAMMA)
    best = max(first, key=first.get)
    myopic = max(exact_values(0.0)[0], key=exact_values(0.0)[0].get)
    assert best == (1, 2)
    assert set(myopic) != set(best)
    agent = toy_agent(toy_spec(), replay_ratio=2.0)
    play(agent, 60, WITH_THE_LAST)
    agent.lr /= 10  # the last steps average the noise out
    play(agent, 30, WITH_THE_LAST)
    obs = toy_obs(torch.arange(STATES))
    slate = agent.act(obs, None, explore=False).slate
    assert tuple(sorted(slate[0].tolist())) == best
    assert tuple(sorted(slate[1].tolist())) == max(second, key=second.get)
    seen, real = agent.target.read(obs), torch.ones_like(slate, dtype=torch.bool)
    value = agent.target.value(seen, slate, real, agent.independent).tolist()
    assert value == pytest.approx([max(first.values()), max(second.values())], abs=0.1)
    assert not agent.independent
    v = agent.target.choice.values(seen)  # (S, N)
    assert (v - LOGITS).abs().max() < 0.25


def test_without_a_future_the_best_slate_is_the_myopic_one():
    agent = toy_agent(toy_spec(), gamma=0.0, replay_ratio=2.0)
    play(agent, 50)
    values = exact_values(0.0)[0]
    slate = agent.act(toy_obs(torch.tensor([0])), None, explore=False).slate[0].tolist()
    assert tuple(sorted(slate)) == max(values, key=values.get)


def test_the_target_reads_the_next_state_where_the_best_item_flips():
    """RecSim's SlateQ prices the present state again (google-research/recsim #26)."""
    agent = toy_agent(toy_spec(items=2, slate_size=1))
    generator = torch.Generator().manual_seed(0)
    pay = torch.tensor([[0.0, 0.0], [0.2, 1.0]])
    for _ in range(80):
        state = torch.randint(0, STATES, (128,), generator=generator)
        slate = agent.act(toy_obs(state), None).slate
        reward, end = pay[state[:, None], slate], state == 1
        # half of the first steps end by the step limit: that does not stop bootstrapping
        cut = (torch.arange(128) % 2 == 0) & ~end
        taken = torch.ones_like(slate, dtype=torch.bool)
        agent.update(step_of(state, slate, taken, reward, torch.ones_like(state), end, cut))
    seen = agent.target.read(toy_obs(torch.arange(STATES)))
    both = torch.tensor([[0], [0]]), torch.tensor([[1], [1]])
    worth = [agent.target.outcome(seen, slate, torch.ones(2, 1)).tolist() for slate in both]
    assert worth[0] == pytest.approx([0.9, 0.2], abs=0.05)  # .9 * 1: the next state's best item
    assert worth[1] == pytest.approx([0.9, 1.0], abs=0.05)


def batch_of(agent):
    steps = synthetic_steps(agent, agent.spec, 32, 1, torch.Generator().manual_seed(3))
    return next(steps)


@torch.no_grad()
def test_the_value_of_what_comes_next_depends_on_the_next_state_alone():
    agent = SlateQ(synthetic_spec())
    batch = batch_of(agent)
    other = synthetic_observation(agent.spec, 32, torch.Generator().manual_seed(8))
    value = agent._next_value(batch)
    assert torch.equal(agent._next_value(replace(batch, obs=other)), value)
    moved = agent._next_value(replace(batch, next_obs=other))
    assert (moved != value).all()


@torch.no_grad()
@pytest.mark.parametrize("choice", ["logit", "independent"])
def test_what_may_not_be_shown_next_is_worth_nothing(choice):
    agent = SlateQ(synthetic_spec(), choice=choice)
    batch = batch_of(agent)
    n = agent.spec.num_items
    everything = torch.arange(n).expand(32, n)
    nothing = agent.target.nothing(agent.target.read(batch.next_obs))
    assert torch.allclose(agent._next_value(replace(batch, next_mask=everything)), nothing)
    allowed = torch.rand(32, n, generator=torch.Generator().manual_seed(1)) < 0.5
    free = agent._next_value(replace(batch, next_mask=None))
    masked = agent._next_value(replace(batch, next_mask=allowed))
    assert (masked <= free + 1e-6).all()  # both nets are equal here: the pick is the best
    assert (masked < free - 1e-6).any()


def test_the_logit_is_recovered_from_what_was_taken():
    generator = torch.Generator().manual_seed(2)
    slate = torch.rand(40_000, 4, generator=generator).argsort(dim=1)[:, :3]
    taken = logit_choice(slate, generator)
    v = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=30)

    def loss():
        optimizer.zero_grad()
        value = logit_loss(v[slate], taken, torch.ones_like(taken))
        value.backward()
        return value

    optimizer.step(loss)
    assert v.tolist() == pytest.approx(LOGITS.tolist(), abs=0.05)


def test_chances_and_the_attention_of_slots_are_recovered_from_what_was_taken():
    generator = torch.Generator().manual_seed(4)
    p, attention = torch.tensor([0.9, 0.6, 0.3, 0.1]), torch.tensor([1.0, 0.6, 0.3])
    slate = torch.rand(40_000, 4, generator=generator).argsort(dim=1)[:, :3]
    taken = torch.rand(slate.shape, generator=generator) < p[slate] * attention
    v, w = torch.zeros(4, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([v, w], max_iter=60)

    def loss():
        optimizer.zero_grad()
        value = independent_loss(v[slate], w, taken, torch.ones_like(taken))
        value.backward()
        return value

    optimizer.step(loss)
    chance = v.sigmoid()[:, None] * w.sigmoid()  # (N, K)
    assert torch.allclose(chance, p[:, None] * attention, atol=0.015)


def test_losses_by_hand_and_empty_slots_count_for_nothing():
    v = torch.tensor([[0.0, 50.0]])
    taken, real = torch.tensor([[True, False]]), torch.tensor([[True, False]])
    half = torch.tensor(0.5).log()
    assert torch.allclose(logit_loss(v, taken, real), -half)
    far = torch.tensor([60.0, 60.0])  # slots that are always looked at
    assert torch.allclose(independent_loss(v, far, taken, real), -half)
    sure = independent_loss(torch.tensor([[40.0]]), torch.tensor([0.0]), taken[:, :1], real[:, :1])
    assert torch.allclose(sure, -half)
    never = independent_loss(torch.tensor([[-90.0]]), far[:1], ~taken[:, :1], real[:, :1])
    assert float(never) == pytest.approx(0.0, abs=1e-6)


def test_users_who_take_several_are_noticed_and_served_the_best_in_the_best_places():
    spec = toy_spec(items=5, slate_size=3)
    agent = toy_agent(spec, gamma=0.0, replay_ratio=2.0)
    p, attention = torch.tensor([0.1, 0.9, 0.3, 0.7, 0.5]), torch.tensor([1.0, 0.6, 0.4])
    generator, state = torch.Generator().manual_seed(5), torch.zeros(256, dtype=torch.int64)
    for _ in range(60):
        slate = agent.act(toy_obs(state), None).slate
        taken = torch.rand(slate.shape, generator=generator) < p[slate] * attention
        agent.update(step_of(state, slate, taken, taken.float(), state, state == 0))
    assert agent.independent
    slate = agent.act(toy_obs(state[:1]), None, explore=False).slate
    assert slate.tolist() == [[1, 3, 4]]
    real = torch.ones_like(slate, dtype=torch.bool)
    value = agent.target.value(agent.target.read(toy_obs(state[:1])), slate, real, True)
    assert float(value.detach()) == pytest.approx(0.9 + 0.6 * 0.7 + 0.4 * 0.5, abs=0.1)


def test_a_single_action_that_pays_or_costs_counts_as_taken():
    state = torch.zeros(3, dtype=torch.int64)
    none = torch.zeros(3, 1, dtype=torch.bool)
    reward = torch.tensor([[-1.0], [0.0], [2.0]])
    step = step_of(state, torch.tensor([[0], [1], [EMPTY]]), none, reward, state, state == 0)
    assert taken_of(step).tolist() == [[True], [False], [False]]
    pair = torch.tensor([[0, 1]])
    fine = torch.tensor([[-1.0, 0.0]])  # a price of the step, not of the item that stands first
    two = step_of(state[:1], pair, pair < 0, fine, state[:1], state[:1] == 0)
    assert not taken_of(two).any()


@pytest.mark.parametrize("choice", ["logit", "independent"])
@pytest.mark.parametrize("slate_size", [1, 3])
def test_both_models_of_choice_keep_the_contract(choice, slate_size):
    spec = synthetic_spec(slate_size=slate_size)
    assert check_agent(SlateQ(spec, choice=choice, head="two_tower"), spec) == []


QUICK = {"replay_ratio": 1.0, "learning_starts": 64, "batch_size": 32, "width": 16, "capacity": 640}


def trained(agent, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for transition in synthetic_steps(agent, agent.spec, 32, steps, generator):
        agent.update(transition)
    return agent


def test_training_resumes_bit_for_bit_in_an_agent_of_another_seed(tmp_path):
    spec = replace(synthetic_spec(), total_steps=2000)
    knobs = {**QUICK, "schedule": "cosine"}
    straight = trained(trained(SlateQ(spec, **knobs), 20), 15, seed=5)
    first = trained(SlateQ(spec, **knobs), 20)
    torch.save([first.state_dict(), first.experience()], tmp_path / "state.pt")
    state, experience = torch.load(tmp_path / "state.pt", weights_only=True)
    second = SlateQ(replace(spec, seed=77), **knobs)
    second.load_state_dict(state)
    second.load_experience(experience)
    trained(second, 15, seed=5)
    assert straight.updates == second.updates == 34
    for mine, theirs in zip(straight.net.parameters(), second.net.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    obs = synthetic_observation(spec, 64, torch.Generator().manual_seed(9))
    assert torch.equal(straight.act(obs, None).slate, second.act(obs, None).slate)
    assert straight.independent == second.independent
    assert torch.equal(straight.tally, second.tally)


def test_a_loaded_state_starts_with_an_empty_replay():
    agent = trained(SlateQ(synthetic_spec(), **QUICK), 5)
    agent.load_state_dict(agent.state_dict())
    assert len(agent.replay) == 0


def test_the_target_is_the_running_mean_and_serves_users():
    agent = SlateQ(synthetic_spec(), **QUICK | {"tau": 0.25})
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
    obs = synthetic_observation(agent.spec, 4, torch.Generator().manual_seed(9))
    served = agent.target.scores(agent.target.read(obs), torch.ones(4, 24) > 0, agent.independent)
    assert torch.equal(agent.scores(obs), served)


def test_a_checkpoint_of_other_settings_or_items_is_refused():
    spec = synthetic_spec()
    state = SlateQ(spec).state_dict()
    with pytest.raises(ValueError, match="net of another form"):
        SlateQ(spec, width=16).load_state_dict(state)
    with pytest.raises(ValueError, match="catalogue of 24 items, this one has 30"):
        SlateQ(synthetic_spec(num_items=30)).load_state_dict(state)


def test_a_reward_that_is_not_finite_is_refused_before_it_is_learnt_from():
    agent = SlateQ(synthetic_spec())
    batch = batch_of(agent)
    reward = batch.reward.clone()
    reward[5] = torch.nan
    with pytest.raises(ValueError, match="reward must be finite, row 5"):
        agent.update(replace(batch, reward=reward))
    assert agent.env_steps == len(agent.replay) == 0


def test_a_loss_that_is_not_finite_is_noticed():
    agent = trained(SlateQ(synthetic_spec(), **QUICK), 4)
    with torch.no_grad():
        agent.net.nothing.value.bias.fill_(torch.nan)
    agent.updates = 99
    with pytest.raises(ValueError, match=r"lower agent\.lr"):
        agent._learn(agent.replay.sample(32, agent.generator))


@pytest.mark.parametrize(
    ("knob", "words"),
    [
        ({"choice": "probit"}, "choice must be one of auto, logit, independent, got 'probit'"),
        ({"epsilon_start": 1.5}, "epsilon_start must be in"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"gamma": 1.1}, "gamma must be in"),
        ({"tau": 1.5}, r"tau must be in \(0, 1\]"),
        ({"shrink": -1.0}, "shrink must be at least 0"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"head": "wide"}, "head must be one of"),
        ({"schedule": "linear"}, "total_steps"),
    ],
)
def test_knobs_out_of_range_are_refused(knob, words):
    with pytest.raises(ValueError, match=words):
        SlateQ(synthetic_spec(), **knob)
