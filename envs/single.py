"""One user at a time, as most of the Gymnasium ecosystem expects it."""

from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch

from envs.excluded import Excluded
from envs.recommend import RecommendVectorEnv
from envs.rewards import Margin, Reward, units
from envs.spaces import first_row
from simulators.base import UserSimulator


class RecommendEnv(gym.Env[Any, Any]):
    """One user at a time: row `row` of a `RecommendVectorEnv` of any size, step by step.

    Observation, action, reward and ends are those of the batch, without the leading B.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        simulator: UserSimulator,
        *,
        slate_size: int = 1,
        max_steps: int = 20,
        reward: Reward | Margin = units,
        excluded: Excluded | None = None,
        pessimism: float = 0.0,
        observation: Literal["vector", "ids"] = "vector",
        output: Literal["numpy", "torch"] = "numpy",
        seed: int = 0,
        row: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self.batch = RecommendVectorEnv(
            simulator,
            slate_size=slate_size,
            max_steps=max_steps,
            reward=reward,
            excluded=excluded,
            pessimism=pessimism,
            observation=observation,
            output=output,
            seed=seed,
            row=row,
            device=device,
        )
        self.observation_space = self.batch.single_observation_space
        self.action_space = self.batch.single_action_space
        self.render_mode = None
        self._waiting: tuple[Any, dict[str, Any]] | None = None  # the next user, already in
        self._over = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Let the next user in, or the one of `options` {"user": int, "episode": int}."""
        super().reset(seed=seed)
        waiting, self._waiting, self._over = self._waiting, None, False
        if waiting is not None and seed is None and not options:
            return waiting
        wanted = {k: np.atleast_1d(v) for k, v in options.items()} if options else None
        obs, info = self.batch.reset(seed=seed, options=wanted)
        return first_row(obs), first_row(info)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Show one slate, (K,) or a single item."""
        if self._over:
            raise ValueError("this episode is over: call reset() before the next step()")
        batched = action[None] if torch.is_tensor(action) else np.asarray(action)[None]
        obs, reward, terminated, truncated, told = self.batch.step(batched)
        obs, info = first_row(obs), first_row(told)
        self._over = bool(terminated[0] | truncated[0])
        if self._over:  # the batch has let the next user in; here that waits for reset()
            final, mask = info.pop("final_obs"), info.pop("final_mask")
            del info["_final_obs"]
            self._waiting = obs, first_row(self.batch.arrival())
            obs, info["mask"] = final, mask
        return obs, float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def action_masks(self) -> np.ndarray:
        """Allowed items, (N,) bool."""
        allowed: np.ndarray = self.batch.action_masks()[0]
        return allowed
