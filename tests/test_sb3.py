"""SB3's algorithms learn as agents: its own learn, masks and propensities, resuming."""

import copy
import io
import random

import numpy as np
import pytest
import torch
from sb3_agents import agent_of, always
from test_sb3_env import sessions

from agents.base import AgentSpec
from agents.sb3 import ALGORITHMS, SB3, VALUES
from encoders.state import EMPTY, Observation
from simulators.base import SimSpec
from simulators.worlds import TinyWorld


def weights(agent):
    return torch.cat([p.detach().flatten() for p in agent.model.policy.parameters()])


class Identity:
    """Show the item that the profile names: a reward of 1, of at most 20 a session."""

    num_items, slate_size = 4, 1

    def __init__(self, num_envs, seed=0):
        self.num_envs, self.rng = num_envs, torch.Generator().manual_seed(seed)

    def see(self):
        self.wanted = torch.randint(4, (self.num_envs,), generator=self.rng)
        none = torch.full((self.num_envs, 1), EMPTY)
        zero = torch.zeros(self.num_envs, 1)
        return Observation(
            torch.eye(4)[self.wanted], none, zero, zero, none, zero[:, :, None], zero[:, :0]
        )

    def reset(self):
        self.steps = 0
        return self.see(), {"mask": None}

    def step(self, slate):
        reward = (slate[:, 0] == self.wanted).float()
        self.steps += 1
        obs, ends = self.see(), torch.full((self.num_envs,), self.steps % 20 == 0)
        info = {"mask": None}
        if ends.any():
            info |= {"final_obs": obs, "final_mask": None, "_final_obs": ends}
        return obs, reward, torch.zeros_like(ends), ends, info


def identity_spec():
    one = torch.ones(4)
    return AgentSpec(4, 1, torch.eye(4), one.long(), one, None, 4, 1, 1, 1, 0)


@pytest.mark.parametrize("head", ["dot", "dense"])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_sb3s_own_learn_runs_with_every_algorithm_and_head(algo, head):
    agent = agent_of(algo, head=head)
    before, seen, learnt = weights(agent), [], {}

    def watch(transition, logs):
        seen.append(transition)
        learnt.update(logs)
        return True

    agent.learn(sessions(), 128, watch)
    assert len(seen) == 16
    assert agent.model.num_timesteps == 128
    assert not torch.equal(before, weights(agent))
    name = "train/loss" if algo != "a2c" else "train/value_loss"
    assert torch.isfinite(learnt[name])
    assert agent.model.n_envs == 8


def test_learn_is_what_sb3_does_alone():
    from stable_baselines3 import PPO

    from agents.sb3_env import SessionsVecEnv
    from agents.sb3_policies import DotActorCriticPolicy

    agent = agent_of("ppo", seed=5)
    agent.learn(sessions(seed=3), 64, always)
    alone = PPO(
        DotActorCriticPolicy, SessionsVecEnv(sessions(seed=3), agent.read), learning_rate=1e-3,
        n_steps=2, batch_size=16, n_epochs=2, gamma=0.8, ent_coef=0.01, seed=None, device="cpu",
        policy_kwargs={"net_arch": [16, 16], "item_features": agent.read.items[:-1]},
    )  # fmt: skip
    alone.set_random_seed(5)
    alone.env._reset_seeds()  # the environment keeps its own
    alone._setup_model()
    alone.learn(64)
    assert torch.equal(
        torch.cat([p.detach().flatten() for p in alone.policy.parameters()]), weights(agent)
    )


@pytest.mark.parametrize("algo", ["dqn", "ppo"])
def test_identity_is_learnt(algo):
    settings = {"dqn": {"batch_size": 32, "learning_starts": 100, "target_every": 64,
                        "replay_ratio": 8.0, "exploration_fraction": 0.3},
                "ppo": {"batch_size": 64, "n_steps": 16}}  # fmt: skip
    agent = SB3(identity_spec(), algo=algo, gamma=0.4, width=32, lr=3e-3, **settings[algo])
    agent.learn(Identity(16), 2400, always)
    env = Identity(100, seed=9)
    obs, mask = env.reset()[0], None
    assert env.step(agent.act(obs, mask, explore=False).slate)[1].sum() >= 90


def test_maskable_ppo_never_shows_a_masked_item_while_it_trains():
    env = sessions(TinyWorld(SimSpec(None, None), items=6, households=30, dim=4, patience=0.0,
                             stop=(0.0,)), max_steps=6, num_envs=16)  # fmt: skip
    agent, shown = agent_of("maskable_ppo", env), []

    def watch(transition, logs):
        shown.append(transition.decision.slate)
        allowed = ~(transition.mask[:, :, None] == torch.arange(6)).any(dim=1)
        # at the last step of six one item of six is left
        assert transition.decision.propensity[allowed.sum(dim=1) == 1].allclose(torch.ones(1))
        return True

    agent.learn(env, 16 * 30, watch)
    assert (torch.cat(shown) != EMPTY).all()  # a masked item would be shown as an empty slot
    other, empty = agent_of("ppo", env), []
    other.learn(
        env, 16 * 30, lambda t, _: bool(empty.append((t.decision.slate == EMPTY).any())) | 1
    )
    assert any(empty)


@pytest.mark.parametrize("algo", ["dqn", "ppo"])
def test_propensities_of_training_are_the_policys_or_unknown(algo):
    env = sessions()
    agent, found = agent_of(algo, env), []
    first = agent.scores(env.reset()[0])

    def watch(transition, logs):
        found.append(transition)
        return False

    agent.learn(env, 8, watch)
    step = found[0].decision
    assert len(found) == 1
    if algo == "dqn":
        assert step.propensity.isnan().all()
    else:
        assert first.shape == (8, 12)
        rows = (step.slate != EMPTY)[:, 0]
        again = agent.slate_probs(found[0].obs, None, step.slate)
        assert torch.allclose(again[rows], step.propensity[rows], rtol=1e-5)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_watch_stops_training_at_once(algo):
    steps = []
    agent, env = agent_of(algo), sessions()
    agent.learn(env, 10_000, lambda t, _: bool(steps.append(env.steps.clone())) or len(steps) < 5)
    assert len(steps) == 5
    assert agent.model.num_timesteps == 40


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_same_seed_is_the_same_to_the_last_bit(algo):
    first, again = agent_of(algo, seed=3), agent_of(algo, seed=3)
    for agent in (first, again):
        agent.learn(sessions(seed=3), 96, always)
        torch.randn(3)  # what others draw changes nothing
    other = agent_of(algo, seed=4)
    other.learn(sessions(seed=3), 96, always)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_run_goes_on_bit_for_bit(algo):
    straight, env = agent_of(algo, seed=1), sessions(seed=1)
    straight.learn(env, 192, always)
    first, other = agent_of(algo, seed=1), agent_of(algo, seed=2)
    env, saved = sessions(seed=1), {}

    def watch(transition, logs):
        if first.model.num_timesteps < 96:
            return True
        file = io.BytesIO()
        parts = {"agent": first.state_dict(), "experience": first.experience()}
        torch.save({**parts, "env": env.state_dict()}, file)
        file.seek(0)
        saved.update(torch.load(file, weights_only=True))
        return False

    first.learn(env, 192, watch)
    other.load_state_dict(saved["agent"])
    other.load_experience(saved["experience"])
    env = sessions(seed=9)
    start = env.load_state_dict(saved["env"])
    other.learn(env, 96, always, start=start)
    assert other.model.num_timesteps == 192
    assert torch.equal(weights(straight), weights(other))
    assert other.epsilon == straight.epsilon


@pytest.mark.parametrize("algo", ["dqn", "ppo"])
def test_two_agents_of_one_state_do_not_share_an_optimiser(algo):
    one, other = agent_of(algo), agent_of(algo, seed=1)
    one.learn(sessions(), 96, always)
    other.load_state_dict(one.state_dict())
    before = str(one.state_dict()["optimizer"])
    other.learn(sessions(), 96, always)
    assert str(one.state_dict()["optimizer"]) == before


@pytest.mark.parametrize("slate_size", [1, 2])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_copy_shares_nothing(algo, slate_size):
    if slate_size > 1 and algo in VALUES:
        return
    env, copies = sessions(slate_size=slate_size), []
    agent = agent_of(algo, env)

    def watch(transition, logs):
        copies.append(copy.deepcopy(agent))
        return len(copies) < 5

    agent.learn(env, 96, watch)
    before, replay = weights(agent), agent.experience()
    other, obs = copies[-1], env.reset()[0]
    assert torch.equal(weights(other), before)
    assert torch.equal(other.act(obs, None).slate, agent.act(obs, None).slate)
    assert torch.equal(other.streams["torch"], agent.streams["torch"])
    other.learn(env, 96, always)
    other.load_state_dict(other.state_dict())
    assert not torch.equal(weights(other), before)
    assert torch.equal(weights(agent), before)
    assert str(agent.experience()) == str(replay)


def test_global_generators_are_left_as_they_were():
    def states():
        return (torch.get_rng_state().tolist(), str(np.random.get_state()),  # noqa: NPY002
                random.getstate())  # fmt: skip

    before = states()
    agent = agent_of("dqn")
    agent.learn(sessions(), 64, always)
    agent.load_state_dict(agent.state_dict())
    with pytest.raises(RuntimeError, match="stop here"):
        agent.learn(sessions(), 64, stop_here)
    assert states() == before


def stop_here(transition, learnt):
    raise RuntimeError("stop here")


def test_many_users_get_as_many_updates_as_the_replay_ratio_says():
    for ratio, users, updates in ((2.0, 16, 2), (1.0, 16, 1), (0.25, 16, 0.25), (1.0, 4, 0.25)):
        agent = agent_of("dqn", replay_ratio=ratio)
        agent.learn(sessions(num_envs=users), users * 20, always)
        expected = updates * 20
        assert abs(agent.model._n_updates - expected) <= max(2, updates * 2)
        assert agent.model.target_update_interval >= users
