"""How many env steps a CPU-second learners make: ours, and SB3's DQN in its two set-ups.

All in one process, one after the other in turn, so that what else the machine does falls on all.
Users are numbers drawn anew at each step, which make a state of 256 with the (empty) means over
past and history, so that the environment costs next to nothing; 1000 items, sessions of 20 steps,
one update of 256 transitions for each 256 env steps, nets of 256-256 for SB3. Ours runs twice: as
the algorithm that SB3 has, and as it comes, with more arithmetic in it.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from omegaconf import DictConfig
from torch import Tensor

from agents.base import AgentSpec, Transition
from agents.dqn import DQN
from agents.sb3 import SB3
from encoders.state import EMPTY, Observation

Row = dict[str, Any]
USERS, ITEMS, LENGTH = 256, 1000, 20
SIZE, DIM = 256, 64  # of the state, of an item vector
PROFILE = SIZE - 3 * (DIM + 1) - 3  # numbers of a user; the rest of the state are means and counts
RACES = (  # ours, SB3's, and how many times ours is to be faster
    ("same", "adapter", 1.4),
    ("ours", "adapter", 1.4),
    ("ours", "default", 15.0),
)
STEPS = {"same": 20_480, "ours": 20_480, "adapter": 20_480, "default": 2048}  # timed env steps
QUICK = {"same": 2048, "ours": 2048, "adapter": 2048, "default": 256}
SAME: dict[str, Any] = {"double": False, "dueling": False, "memory": False}  # as SB3's DQN is
SAID = {
    "same": "agents.dqn.DQN without double, dueling and memory, which SB3's has not",
    "ours": "agents.dqn.DQN as it comes",
    "adapter": f"SB3 DQN, {USERS} users through our adapter, replay ratio 1",
    "default": "SB3 DQN, one env in a DummyVecEnv, its defaults",
}


class Numbers:
    """B users who are random numbers; the reward is random too: nothing but the learner costs."""

    num_items, slate_size = ITEMS, 1

    def __init__(self, num_envs: int, seed: int) -> None:
        self.num_envs = num_envs
        self.rng = torch.Generator().manual_seed(seed)
        none = torch.full((num_envs, 1), EMPTY)
        zero = torch.zeros(num_envs, 1)
        self.blank = (none, zero, zero, none, zero[:, :0, None].transpose(1, 2), zero[:, :0])
        self.chosen = torch.zeros(num_envs, 1, dtype=torch.bool)
        self.left = torch.zeros(num_envs, dtype=torch.bool)

    def see(self) -> Observation:
        return Observation(torch.randn(self.num_envs, PROFILE, generator=self.rng), *self.blank)

    def reset(self) -> tuple[Observation, dict[str, Any]]:
        self.steps = 0
        return self.see(), {"mask": None}

    def step(self, slate: Tensor) -> tuple[Observation, Tensor, Tensor, Tensor, dict[str, Any]]:
        self.steps += 1
        obs = self.see()
        # a twentieth of the users goes at each step, as users who came at different times do
        ends = (torch.arange(self.num_envs) + self.steps) % LENGTH == 0
        reward = torch.rand(self.num_envs, generator=self.rng)
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


def spec_of(seed: int) -> AgentSpec:
    """What an agent is told of it."""
    vectors = torch.randn(ITEMS, DIM, generator=torch.Generator().manual_seed(seed))
    one = torch.ones(ITEMS)
    return AgentSpec(
        ITEMS, 1, vectors, one.long(), one / ITEMS, None, PROFILE, 1, 1, 0, 0, seed=seed
    )


def ours(steps: int, seed: int, **settings: Any) -> Callable[[], int]:
    """Our DQN in the loop of train_agent, warm: each call plays and learns `steps` steps."""
    env = Numbers(USERS, seed)
    agent = DQN(spec_of(seed), replay_ratio=1.0, **settings)
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


def through_adapter(steps: int, seed: int) -> Callable[[], int]:
    """SB3's DQN with a dense head, its own, over all users at once."""
    agent = SB3(spec_of(seed), algo="dqn", head="dense", width=SIZE, replay_ratio=1.0)
    env = Numbers(USERS, seed)

    def play(steps: int) -> int:
        before = agent.model.num_timesteps
        agent.learn(env, steps, lambda transition, learnt: True)
        return int(agent.model.num_timesteps) - before

    play(10 * USERS)
    return lambda: play(steps)


def as_it_comes(steps: int, seed: int) -> Callable[[], int]:
    """SB3's DQN as its constructor makes it, but for the size of the net and of the replay."""
    from stable_baselines3 import DQN as SB3DQN

    from agents.sb3 import global_generators_kept

    with global_generators_kept():
        model = SB3DQN(
            "MlpPolicy", OneUser(seed), policy_kwargs={"net_arch": [SIZE, SIZE]}, seed=seed,
            buffer_size=100_000, device="cpu",
        )  # fmt: skip

    def play(steps: int) -> int:
        with global_generators_kept():
            before = model.num_timesteps
            model.learn(steps, reset_num_timesteps=False)
        return model.num_timesteps - before

    play(256)  # beyond its learning_starts
    return lambda: play(steps)


LEARNERS: dict[str, Callable[[int, int], Callable[[], int]]] = {
    "same": partial(ours, **SAME), "ours": ours, "adapter": through_adapter, "default": as_it_comes,
}  # fmt: skip


def speeds(repeats: int, seed: int, quick: bool) -> list[Row]:
    """Env steps per CPU-second of ours and of SB3, medians, and how many times ours is faster."""
    steps = QUICK if quick else STEPS
    plays = {name: make(steps[name], seed) for name, make in LEARNERS.items()}
    rates: dict[str, list[float]] = {name: [] for name in plays}
    for _ in range(repeats):
        for name, play in plays.items():
            begun = time.process_time()
            played = play()
            rates[name].append(played / (time.process_time() - begun))
    rows = []
    for own, name, goal in RACES:
        mine, other = statistics.median(rates[own]), statistics.median(rates[name])
        rows.append({
            "bench": "agents", "case": f"{SAID[own]}, {USERS} users, {ITEMS} items",
            "repeats": repeats,
            "against": SAID[name], "unit": "env steps per CPU-second", "ours": mine,
            "theirs": other, "ratio": mine / other, "goal": goal, "reached": mine / other >= goal,
            "min": min(rates[name]), "max": max(rates[name]),
        })  # fmt: skip
    return rows


def agents(cfg: DictConfig) -> None:
    """Measure and print; one thread, whatever was asked, since all are compared by CPU time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        print(text(speeds(cfg.repeats or 5, cfg.seed, cfg.quick)))
    finally:
        torch.set_num_threads(before)


def text(rows: list[Row]) -> str:
    """A line for each."""
    lines = []
    for row in rows:
        said = "reached" if row["reached"] else "not reached"
        lines.append(
            f"{row['case']}: {row['ours']:,.0f} {row['unit']}; {row['against']}: "
            f"{row['theirs']:,.0f} ({row['min']:,.0f} to {row['max']:,.0f}), "
            f"{row['ratio']:.2f} x (goal {row['goal']:g} x: {said})"
        )
    return "\n".join(lines)
