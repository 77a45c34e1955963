"""Sessions as SB3 sees them: whose last view, why it ended, which masks, and nothing shared."""

from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from stable_baselines3 import DQN as SB3DQN
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize

from agents.base import AgentSpec
from agents.nets import Reader
from agents.sb3 import SB3
from agents.sb3_env import SessionsVecEnv, transition_of
from agents.sb3_model import on_replay
from agents.testing import synthetic_observation, synthetic_spec
from encoders.state import Observation
from envs import RecommendVectorEnv
from simulators.base import SimSpec
from simulators.worlds import TinyWorld

WORLD = TinyWorld(SimSpec(None, None), items=12, households=30, dim=4)
PATIENT = TinyWorld(
    SimSpec(None, None), items=12, households=30, dim=4, patience=0.0, stop=(0.0,)
)  # nobody leaves


def sessions(world=WORLD, **settings):
    given = {"num_envs": 8, "slate_size": 1, "max_steps": 5, "observation": "ids"}
    return RecommendVectorEnv(world, **(given | {"output": "torch"} | settings))


def spec_of(env, seed=0):
    obs, catalog = env.reset()[0], env.simulator.catalog
    return AgentSpec(
        env.num_items, env.slate_size, catalog.vectors, catalog.category, catalog.popularity, None,
        obs.profile.shape[1], obs.past.shape[1], obs.history.shape[1], obs.feedback.shape[2],
        obs.context.shape[1], seed=seed,
    )  # fmt: skip


def adapted(env=None, **settings):
    env = env or sessions()
    return SessionsVecEnv(env, Reader(spec_of(env), memory=False), **settings)


def actions(env, steps, seed=0):
    shape = (steps, env.num_envs, env.slate_size)
    drawn = torch.randint(env.num_items, shape, generator=torch.Generator().manual_seed(seed))
    return drawn.squeeze(2).numpy()  # (T, B), or (T, B, K)


def test_states_rewards_and_ends_are_those_of_the_environment():
    adapter, other = adapted(sessions(seed=3)), sessions(seed=3)
    spec_of(other)
    read = adapter.read
    assert np.array_equal(adapter.reset(), read.state(other.reset()[0]).numpy())
    ended = 0
    for action in actions(other, 20):
        state, reward, done, infos = adapter.step(action)
        obs, gained, terminated, truncated, info = other.step(torch.from_numpy(action)[:, None])
        assert np.array_equal(state, read.state(obs).numpy())
        assert np.array_equal(reward, gained.numpy())
        assert np.array_equal(done, (terminated | truncated).numpy())
        for row in range(8):
            if not done[row]:
                assert infos[row] == {}
                continue
            last = read.state(info["final_obs"][torch.tensor([row])])[0].numpy()
            assert infos[row]["terminal_observation"] == pytest.approx(last, abs=1e-6)
            assert np.abs(last - state[row]).max() > 0.01  # the next user is somebody else
            assert infos[row]["TimeLimit.truncated"] == bool(truncated[row])
            ended += 1
    assert ended > 20


def test_episodes_tell_their_reward_and_length():
    adapter = adapted()
    adapter.reset()
    returns, lengths, seen = np.zeros(8), np.zeros(8, dtype=int), 0
    for action in actions(adapter.env, 30):
        _, reward, done, infos = adapter.step(action)
        returns += reward
        lengths += 1
        for row in done.nonzero()[0]:
            episode = infos[row]["episode"]
            assert (episode["r"], episode["l"]) == (pytest.approx(returns[row]), lengths[row])
            seen += 1
        returns[done], lengths[done] = 0.0, 0
    assert seen > 20


def test_who_is_out_of_steps_has_not_left():
    adapter = adapted(sessions(PATIENT, max_steps=4))
    adapter.reset()
    for step, action in enumerate(actions(adapter.env, 8)):
        _, _, done, infos = adapter.step(action)
        assert done.all() == done.any() == (step % 4 == 3)
        if done.all():
            assert all(info["TimeLimit.truncated"] for info in infos)
            assert all(info["episode"]["l"] == 4 for info in infos)


def test_what_sb3_writes_into_rewards_does_not_reach_the_transition():
    adapter = adapted()
    adapter.reset()
    state, reward, _, _ = adapter.step(actions(adapter.env, 1)[0])
    before = adapter.transition.reward.clone()
    reward += 100.0
    state += 100.0
    assert torch.equal(adapter.transition.reward, before)
    assert adapter.transition.next_obs.profile.abs().max() < 50


def test_the_hook_gets_each_step_as_agents_see_it():
    seen = []
    adapter = adapted(sessions(slate_size=2), watch=seen.append)
    adapter.reset()
    asked = actions(adapter.env, 6)
    for action in asked:
        adapter.step(action)
    assert len(seen) == 6
    before = seen[0].next_obs
    for step, action in zip(seen, asked, strict=True):
        shown = step.decision.slate.numpy()
        assert ((shown == action) | (shown == -1)).all()
        assert step.decision.propensity.isnan().all()
        assert torch.allclose(step.slot_reward.sum(dim=1), step.reward)
        assert step.chosen.shape == (8, 2)
    for step, later in pairwise(seen):
        stays = ~(step.terminated | step.truncated)
        assert stays.any()
        for f in fields(before):
            assert torch.equal(
                getattr(step.next_obs, f.name)[stays], getattr(later.obs, f.name)[stays]
            )


@pytest.mark.parametrize("slate_size", [1, 2])
def test_masks_are_what_was_not_shown_on_this_trip(slate_size):
    adapter = adapted(sessions(slate_size=slate_size))
    adapter.reset()
    for action in actions(adapter.env, 4):
        adapter.step(action)
    masks = np.stack(adapter.env_method("action_masks"))
    assert masks.shape == (8, 12 * slate_size)
    allowed = adapter.env.action_masks()
    assert not allowed.all()
    for slot in range(slate_size):
        assert np.array_equal(masks[:, slot * 12 : slot * 12 + 12], allowed)
    assert np.array_equal(adapter.env_method("action_masks", indices=[2])[0], masks[2])


def test_an_environment_without_masks_allows_everything():
    class Free(RecommendVectorEnv):
        def arrival(self):
            return super().arrival() | {"mask": None}

    adapter = adapted(Free(WORLD, num_envs=3, max_steps=5, observation="ids", output="torch"))
    adapter.reset()
    assert adapter.action_masks().all()


def test_seeds_of_sb3_count_at_the_next_reset_and_once():
    adapter = adapted()
    first = adapter.reset()
    adapter.seed(7)
    again = adapter.reset()
    assert np.array_equal(again, adapter.read.state(sessions(seed=7).reset()[0]).numpy())
    adapter.seed(7)
    assert np.array_equal(adapter.reset(), again)
    assert not np.array_equal(adapter.reset(), again)
    assert not np.array_equal(first, again)


def test_what_sb3_asks_of_environments():
    adapter = adapted()
    adapter.reset()
    assert adapter.get_attr("render_mode") == [None] * 8
    assert adapter.has_attr("action_masks")
    assert not adapter.has_attr("kernel")
    assert adapter.env_is_wrapped(Monitor) == [True] * 8
    assert adapter.env_is_wrapped(VecNormalize, indices=[0]) == [False]
    with pytest.raises(AttributeError, match="one batch"):
        adapter.set_attr("mask", 1)
    with pytest.raises(AttributeError, match="no row has a method render"):
        adapter.env_method("render")


def test_sb3s_own_helpers_run_on_it():
    adapter = adapted()
    model = PPO("MlpPolicy", adapter, n_steps=4, batch_size=16, seed=0, device="cpu")
    model.learn(64)
    mean, spread = evaluate_policy(model, adapter, n_eval_episodes=20)
    assert 0 <= mean <= 5
    assert spread >= 0
    model = SB3DQN("MlpPolicy", VecNormalize(adapted(), norm_reward=False), learning_starts=16,
                   target_update_interval=64, buffer_size=500, device="cpu")  # fmt: skip
    assert model.learn(64).num_timesteps == 64


def test_an_environment_that_shows_vectors_is_refused():
    read = adapted().read
    adapter = SessionsVecEnv(sessions(observation="vector"), read)
    with pytest.raises(ValueError, match='observation="ids", output="torch"'):
        adapter.reset()


def test_observations_of_another_size_are_refused():
    env = sessions()
    wider = Reader(replace(spec_of(env), profile_size=9), memory=False)
    with pytest.raises(ValueError, match=rf"the agent's spec says {wider.size}"):
        SessionsVecEnv(env, wider).reset()


def test_a_restored_environment_is_gone_on_from():
    env = sessions()
    adapter = adapted(env)
    obs, info = env.reset()
    for action in actions(env, 2):
        obs, *_, info = env.step(torch.from_numpy(action)[:, None])
    started = SessionsVecEnv(env, adapter.read, start=(obs, info))
    assert np.array_equal(started.reset(), adapter.read.state(obs).numpy())
    assert isinstance(started.obs, Observation)
    assert np.array_equal(started.action_masks(), env.action_masks())
    assert not np.array_equal(started.reset(), adapter.read.state(obs).numpy())


def test_a_transition_leads_to_the_last_view_of_who_is_gone():
    spec = synthetic_spec()
    obs, after, last = (
        synthetic_observation(spec, 2, torch.Generator().manual_seed(seed)) for seed in range(3)
    )
    slate, no = torch.tensor([[0, 1]] * 2), torch.zeros(2, dtype=torch.bool)
    info = {"mask": after.history, "slot_reward": torch.zeros(2, 2)}
    reward = torch.zeros(2)
    going = transition_of(obs, obs.history, slate, after, reward, no, no, info)
    assert going.next_obs is after
    assert going.next_mask is after.history
    ends = info | {"final_obs": last, "final_mask": last.history}
    gone = transition_of(obs, obs.history, slate, after, reward, no, ~no, ends)
    assert gone.next_obs is last
    assert gone.next_mask is last.history


def test_who_leaves_at_the_step_limit_is_no_time_limit_for_sb3():
    spec = synthetic_spec()
    obs = synthetic_observation(spec, 2, torch.Generator().manual_seed(0))

    class BothAtOnce:
        num_envs, num_items, slate_size = 2, spec.num_items, 2

        def reset(self):
            return obs, {"mask": obs.history}

        def step(self, slate):
            over = torch.ones(2, dtype=torch.bool)
            info = {"mask": obs.history, "final_obs": obs, "final_mask": obs.history}
            return obs, torch.zeros(2), torch.tensor([True, False]), over, info

    env = SessionsVecEnv(BothAtOnce(), Reader(spec, memory=False))
    env.reset()
    _, _, done, infos = env.step(np.array([[0, 1], [2, 3]]))
    assert done.all()
    assert [info["TimeLimit.truncated"] for info in infos] == [False, True]


def test_target_nets_of_sb3_are_renewed_by_env_steps():
    settings = SB3(synthetic_spec(slate_size=1), target_every=1024).settings
    assert on_replay(settings, 32, 500)["target_update_interval"] == 1024
    assert on_replay(settings, 2048, 5000)["target_update_interval"] == 2048


def test_moments_of_the_optimizer_move_to_a_model_for_more_users():
    agent = SB3(synthetic_spec(slate_size=1))
    policy = agent.model.policy
    sum(p.sum() for p in policy.q_net.parameters()).backward()
    policy.optimizer.step()
    before = policy.optimizer.state_dict()["state"]
    assert before
    agent._for_users(4)
    after = agent.model.policy.optimizer.state_dict()["state"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[i]["exp_avg"], after[i]["exp_avg"]) for i in before)


def test_values_of_quantiles_are_their_mean():
    spec = synthetic_spec(slate_size=1)
    agent = SB3(spec, algo="qrdqn", quantiles=5)
    obs = synthetic_observation(spec, 3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        quantiles = agent.model.policy.quantile_net(agent.read.state(obs))  # (B, Q, N)
    assert quantiles.shape[1] == 5
    assert torch.allclose(agent.scores(obs), quantiles.mean(dim=1))
