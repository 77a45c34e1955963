"""Little Gymnasium environments of known answers, registered when this is imported."""

from dataclasses import fields
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from encoders.state import Observation
from envs.gym_vector import GymVectorEnv

EVENS = np.array([[i, 1.0, -i] for i in range(6)])  # (N, D) of the shop's items


class Walk(gym.Env):
    """Lasts 2 to 5 steps, drawn from its seed; shows that draw and the step; pays the action."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Discrete(3, start=1)
    board = SimpleNamespace(tiles=np.arange(6.0).reshape(3, 2))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = int(self.np_random.integers(2, 6))
        self.t = 0
        return self.seen(), {}

    def seen(self):
        return np.array([self.length, self.t], dtype=np.float32)

    def step(self, action):
        assert action in (1, 2, 3)
        self.t += 1
        return self.seen(), float(action), self.t >= self.length, False, {}


class Combo(gym.Env):
    """Shows and pays what combination was played; never ends."""

    observation_space = spaces.MultiDiscrete([3, 4])

    def __init__(self, nvec, start=None):
        self.action_space = spaces.MultiDiscrete(nvec, start=start)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, dtype=np.int64), {}

    def step(self, action):
        self.last = action
        return np.zeros(2, dtype=np.int64), float(action.reshape(-1) @ [100, 1]), False, False, {}


class Shop(gym.Env):
    """Six items, slates of two: even ones are bought; the reset has shown 4 and 1."""

    action_space = spaces.MultiDiscrete([6, 6])
    observation_space = spaces.Dict(
        items=spaces.MultiDiscrete([6, 6]),
        bought=spaces.MultiBinary(2),
        mood=spaces.Box(0.0, 100.0, (2,)),
    )

    def __init__(self, weights=(1.0, 1.0), reverse=False):
        self.features, self.names = EVENS, list("abcdef")
        self.catalog = SimpleNamespace(embeddings=EVENS)
        self.weights, self.reverse = np.array(weights), reverse

    def answer(self, slate):
        self.clicks = (slate % 2 == 0).astype(np.int8)
        return {"items": slate, "bought": self.clicks, "mood": np.array([25.0, 100.0])}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.answer(np.array([4, 1])), {}

    def step(self, slate):
        slate = np.array([0, 2]) if (slate == -1).all() else np.asarray(slate)
        obs = self.answer(slate[::-1] if self.reverse else slate)
        return obs, float(self.clicks @ self.weights), False, False, {}


class Masked(gym.Env):
    """Four actions, of which the one just played is forbidden; ends after `length`."""

    observation_space = spaces.Discrete(5)
    action_space = spaces.Discrete(4)

    def __init__(self, way="info", length=3, nothing=False):
        self.way, self.length, self.nothing = way, length, nothing
        if way == "method":
            self.action_masks = self.room

    def room(self):
        if self.nothing and self.t:
            return np.zeros(4, dtype=np.int8)
        return (np.arange(4) != self.last).astype(np.int8)

    def info(self):
        return {"action_mask": self.room()} if self.way == "info" else {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.last = 0, int(self.np_random.integers(4))
        return 0, self.info()

    def step(self, action):
        self.t, self.last = self.t + 1, int(action)
        return self.t, 1.0, self.t >= self.length, False, self.info()


class Garbage(gym.Env):
    """Two good steps, then what `what` says."""

    action_space = spaces.Discrete(2)

    def __init__(self, what="", space=None):
        self.what = what
        self.observation_space = space or spaces.Dict(
            x=spaces.Box(-1.0, 1.0, (2,)), y=spaces.Discrete(3)
        )

    def reset(self, *, seed=None, options=None):
        self.t = 0
        if self.what == "reset":
            return np.zeros(2)
        return {"x": np.zeros(2), "y": 1}, {}

    def step(self, action):
        self.t += 1
        good = {"x": np.zeros(2), "y": 1}
        if self.t < 3:
            return good, 0.0, False, False, {}
        return {
            "four": (good, 0.0, False, {}),
            "nothing": None,
            "reward": (good, None, False, False, {}),
            "nan reward": (good, float("nan"), False, False, {}),
            "info": (good, 0.0, False, False, None),
            "nan": ({"x": np.array([0.0, np.nan]), "y": 1}, 0.0, False, False, {}),
            "shape": ({"x": np.zeros(3), "y": 1}, 0.0, False, False, {}),
            "key": ({"x": np.zeros(2)}, 0.0, False, False, {}),
            "outside": ({"x": np.zeros(2), "y": 3}, 0.0, False, False, {}),
        }[self.what]


class Careless(Walk):
    """Draws its length from a generator of its own that no seed reaches."""

    own = np.random.default_rng(0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = int(self.own.integers(100, 1_000_000))
        return self.seen(), {}


class Drawn(Shop):
    """Every copy has items of its own."""

    copies = 0

    def __init__(self):
        super().__init__()
        Drawn.copies += 1
        self.features = EVENS + Drawn.copies


for _kind in (Walk, Combo, Shop, Masked, Garbage, Careless, Drawn):
    gym.register(f"gymtest/{_kind.__name__}-v0", entry_point=_kind)
gym.register("gymtest/Short-v0", entry_point=Walk, max_episode_steps=3)


def make(name: str, **settings) -> GymVectorEnv:
    return GymVectorEnv(f"gymtest/{name}-v0", **settings)


def shop(**settings) -> GymVectorEnv:
    return make("Shop", item_features="features", **settings)


def same(one: Observation, other: Observation) -> bool:
    return all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
