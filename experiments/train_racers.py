"""Learners that `bench=train` races: our DQN, and Stable-Baselines3's in its two set-ups.

Users are numbers drawn anew at each step, which make a state of 256 with the (empty) means over
past and history, so that the environment costs next to nothing; 1000 items, sessions of 20 steps,
nets of 256-256 for SB3.
"""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from agents.base import AgentSpec, Transition
from agents.dqn import DQN
from agents.sb3 import SB3
from encoders.state import EMPTY, Observation

USERS, ITEMS, LENGTH = 256, 1000, 20
SIZE, DIM = 256, 64  # of the state, of an item vector
PROFILE = SIZE - 3 * (DIM + 1) - 3  # numbers of a user; the rest of the state are means and counts


class Numbers:
    """B users who are random numbers; the reward is random too: nothing but the learner costs."""

    num_items, slate_size = ITEMS, 1

    def __init__(self, num_envs: int, seed: int, device: str = "cpu") -> None:
        self.num_envs, self.device = num_envs, device
        self.rng = torch.Generator(device).manual_seed(seed)
        none = torch.full((num_envs, 1), EMPTY, device=device)
        zero = torch.zeros(num_envs, 1, device=device)
        self.blank = (none, zero, zero, none, zero[:, :0, None].transpose(1, 2), zero[:, :0])
        self.chosen = torch.zeros(num_envs, 1, dtype=torch.bool, device=device)
        self.left = torch.zeros(num_envs, dtype=torch.bool, device=device)
        self.row = torch.arange(num_envs, device=device)

    def see(self) -> Observation:
        profile = torch.randn(self.num_envs, PROFILE, generator=self.rng, device=self.device)
        return Observation(profile, *self.blank)

    def reset(self) -> tuple[Observation, dict[str, Any]]:
        self.steps = 0
        return self.see(), {"mask": None}

    def step(self, slate: Tensor) -> tuple[Observation, Tensor, Tensor, Tensor, dict[str, Any]]:
        self.steps += 1
        obs = self.see()
        # a twentieth of the users goes at each step, as users who came at different times do
        ends = (self.row + self.steps) % LENGTH == 0
        reward = torch.rand(self.num_envs, generator=self.rng, device=self.device)
        info = {"mask": None, "final_obs": obs, "final_mask": None, "_final_obs": ends,
                "slot_reward": reward[:, None]}  # fmt: skip
        return obs, reward, self.left, ends, info


class OneUser(gym.Env[np.ndarray, np.int64]):
    """The same as a Gymnasium environment, for SB3 as its users mostly run it."""

    def __init__(self, seed: int) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (SIZE,), np.float32)
        self.action_space = spaces.Discrete(ITEMS)
        self.rng = np.random.default_rng(seed)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        self.steps = 0
        return self.rng.standard_normal(SIZE, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        obs = self.rng.standard_normal(SIZE, dtype=np.float32)
        return obs, float(self.rng.random()), False, self.steps >= LENGTH, {}


def spec_of(seed: int, device: str = "cpu") -> AgentSpec:
    """What an agent is told of it."""
    vectors = torch.randn(ITEMS, DIM, generator=torch.Generator().manual_seed(seed)).to(device)
    one = torch.ones(ITEMS, device=device)
    return AgentSpec(
        ITEMS, 1, vectors, one.long(), one / ITEMS, None, PROFILE, 1, 1, 0, 0, device, seed
    )


def ours(
    steps: int, seed: int, device: str = "cpu", *, replay_ratio: float = 1.0, **settings: Any
) -> Callable[[], int]:
    """Our DQN in the loop of train_agent, warm: each call plays and learns `steps` steps."""
    agent = DQN(spec_of(seed, device), replay_ratio=replay_ratio, **settings)
    return playing(agent, Numbers(USERS, seed, device), steps)


def playing(agent: DQN, env: Numbers, steps: int) -> Callable[[], int]:
    """An agent who serves and learns, warm: each call makes `steps` env steps."""
    state: list[Any] = list(env.reset())

    def play(steps: int) -> int:
        obs, info = state
        for _ in range(steps // USERS):
            mask, decision = info["mask"], agent.act(obs, info["mask"])
            later, reward, terminated, truncated, info = env.step(decision.slate)
            agent.update(Transition(
                obs, mask, decision, reward, env.chosen, info["slot_reward"], info["final_obs"],
                info["final_mask"], terminated, truncated,
            ))  # fmt: skip
            obs = later
        state[:] = obs, info
        return steps // USERS * USERS

    play(10 * USERS)
    return lambda: play(steps)


def through_adapter(steps: int, seed: int, device: str = "cpu") -> Callable[[], int]:
    """SB3's DQN with a dense head, its own, over all users at once."""
    spec = spec_of(seed, device)
    agent = SB3(spec, algo="dqn", head="dense", width=SIZE, replay_ratio=1.0)
    env = Numbers(USERS, seed, device)

    def play(steps: int) -> int:
        before = agent.model.num_timesteps
        agent.learn(env, steps, lambda transition, learnt: True)
        return int(agent.model.num_timesteps) - before

    play(10 * USERS)
    return lambda: play(steps)


def as_it_comes(steps: int, seed: int, device: str = "cpu") -> Callable[[], int]:
    """SB3's DQN as its constructor makes it, but for the size of the net and of the replay."""
    from stable_baselines3 import DQN as SB3DQN

    from agents.sb3 import global_generators_kept

    with global_generators_kept():
        model = SB3DQN(
            "MlpPolicy", OneUser(seed), policy_kwargs={"net_arch": [SIZE, SIZE]}, seed=seed,
            buffer_size=100_000, device=device,
        )  # fmt: skip

    def play(steps: int) -> int:
        with global_generators_kept():
            before = model.num_timesteps
            model.learn(steps, reset_num_timesteps=False)
        return model.num_timesteps - before

    play(256)  # beyond its learning_starts
    return lambda: play(steps)
