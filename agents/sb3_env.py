"""Batched sessions as Stable-Baselines3 wants its environments: a `VecEnv` of NumPy arrays."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from agents.base import Decision, Mask, Transition, allowed_items
from agents.nets import Reader
from encoders.state import Observation

Watch = Callable[[Transition, dict[str, Tensor]], bool]  # False: stop


class Sessions(Protocol):
    """B users at once; a row whose user is gone shows the next one in the same step.

    `info` has "mask", and on steps where somebody is done "final_obs", "final_mask" (dense) and
    "_final_obs" (B,).
    """

    num_envs: int
    num_items: int
    slate_size: int

    def reset(self) -> tuple[Observation, dict[str, Any]]: ...

    def step(self, slate: Tensor) -> tuple[Observation, Tensor, Tensor, Tensor, dict[str, Any]]: ...


def spaces_of(size: int, num_items: int, slate_size: int) -> tuple[spaces.Box, spaces.Space[Any]]:
    """What SB3 sees and does: a state (U,), and one item or a slate of them."""
    # unbounded: SB3 neither clips nor scales to bounds, and what is clipped is lost to the net
    seen = spaces.Box(-np.inf, np.inf, (size,), np.float32)
    if slate_size == 1:
        return seen, spaces.Discrete(num_items)
    return seen, spaces.MultiDiscrete([num_items] * slate_size)


class SessionsVecEnv(VecEnv):
    """Sessions for SB3: states (B, U) as `read` makes them, one action for each slot.

    `watch` is called with each `Transition`; `transition` is the last one. SB3 says nothing of
    probabilities here: the propensity is NaN. `start` is what a reset or a restored environment
    returned: the first reset of SB3 then goes on from there. Seeds that SB3 gives are passed on
    with the next reset.
    """

    def __init__(
        self,
        env: Sessions,
        read: Reader,
        *,
        watch: Callable[[Transition], object] | None = None,
        start: tuple[Observation, dict[str, Any]] | None = None,
    ) -> None:
        self.env, self.read, self.watch, self.start = env, read, watch, start
        self.transition: Transition | None = None
        self.obs: Observation | None = None
        self.mask: Mask = None
        self.begun = time.time()
        self.returns, self.lengths = np.zeros(env.num_envs), np.zeros(env.num_envs, dtype=int)
        self.nothing: list[dict[str, Any]] = [{}] * env.num_envs  # one dict, nobody writes into it
        super().__init__(env.num_envs, *spaces_of(read.size, env.num_items, env.slate_size))

    def reset(self) -> np.ndarray:
        seed = self._seeds[0]  # SB3 counts them up from the one it was given
        if self.start is not None:
            obs, info = self.start
        elif seed is None:
            obs, info = self.env.reset()
        else:
            obs, info = self.env.reset(seed=seed)  # type: ignore[call-arg]
        self.start = None
        self._reset_seeds()
        self._reset_options()
        self.returns[:], self.lengths[:] = 0.0, 0
        self.obs, self.mask = obs, info["mask"]
        return self.state(obs)

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    @torch.no_grad()
    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        obs, mask = self.obs, self.mask
        assert obs is not None, "SB3 resets before it steps"
        slate = torch.as_tensor(self.actions, dtype=torch.int64, device=obs.profile.device)
        slate = slate.reshape(self.num_envs, -1)  # (B, K)
        next_obs, reward, terminated, truncated, info = self.env.step(slate)
        self.obs, self.mask = next_obs, info["mask"]
        self.transition = transition_of(obs, mask, slate, next_obs, reward, terminated, truncated,
                                        info)  # fmt: skip
        rewards = reward.cpu().numpy().astype(np.float32)  # a copy: SB3 adds values to it in place
        infos = self.nothing
        self.returns += rewards
        self.lengths += 1
        done = (terminated | truncated).cpu().numpy()  # (B,)
        if done.any():
            infos = self.endings(done, truncated & ~terminated, info["final_obs"])
        if self.watch is not None:
            self.watch(self.transition)
        return self.state(next_obs), rewards, done, infos

    def endings(
        self, done: np.ndarray, out_of_steps: Tensor, final_obs: Observation
    ) -> list[dict[str, Any]]:
        """What SB3 is told of rows (B,) whose user is gone; a dict each, as it asks for them."""
        infos = list(self.nothing)
        rows = done.nonzero()[0]  # (R,)
        index = torch.as_tensor(rows, device=final_obs.profile.device)
        last = self.state(final_obs[index])  # (R, U)
        cut = out_of_steps.cpu().numpy()
        spent = round(time.time() - self.begun, 6)
        for row, state in zip(rows.tolist(), last, strict=True):
            infos[row] = {
                "terminal_observation": state,
                "TimeLimit.truncated": bool(cut[row]),
                "episode": {
                    "r": float(self.returns[row]), "l": int(self.lengths[row]), "t": spent,
                },
            }  # fmt: skip
        self.returns[rows], self.lengths[rows] = 0.0, 0
        return infos

    def state(self, obs: Observation) -> np.ndarray:
        """Observations of B users to a fresh array (B, U)."""
        if not isinstance(obs, Observation):
            raise ValueError(
                f"the environment must show Observations, got {type(obs).__name__}: make it with "
                'observation="ids", output="torch"'
            )
        states = self.read.state(obs)
        if states.shape[1] != self.read.size:
            raise ValueError(
                f"the environment's observations have {states.shape[1]} features, the agent's "
                f"spec says {self.read.size}: take the observation sizes of the spec from it"
            )
        array: np.ndarray = states.detach().cpu().numpy()
        return array

    def action_masks(self) -> np.ndarray:
        """Allowed actions (B, K * N), the same for each slot, as MaskablePPO asks for them."""
        assert self.obs is not None, "SB3 resets before it asks for masks"
        allowed = allowed_items(
            self.mask, self.num_envs, self.env.num_items, self.obs.profile.device, may_be_empty=True
        )  # (B, N)
        rows: np.ndarray = allowed.cpu().numpy()
        return np.tile(rows, self.env.slate_size)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        known = {"render_mode": None, "action_masks": self.action_masks}
        if attr_name not in known:
            raise AttributeError(f"sessions are one batch: no row has a {attr_name} of its own")
        return [known[attr_name]] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(f"sessions are one batch: {attr_name} cannot be set on a row")

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        if method_name != "action_masks":
            raise AttributeError(f"sessions are one batch: no row has a method {method_name}")
        masks = self.action_masks()
        return [masks[row] for row in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """A Monitor is what writes "episode" into infos, and that is written."""
        return [wrapper_class is Monitor] * len(list(self._get_indices(indices)))

    def close(self) -> None:
        """Leave the environment to who made it."""


def transition_of(
    obs: Observation, mask: Mask, slate: Tensor, next_obs: Observation, reward: Tensor,
    terminated: Tensor, truncated: Tensor, info: dict[str, Any],
) -> Transition:  # fmt: skip
    """One step as agents see it; a repeated or masked item was shown as an empty slot."""
    shown = info.get("slate", slate)  # (B, K)
    slot_reward = info.get("slot_reward")
    if slot_reward is None:  # an environment that knows of no slots: all belongs to the first
        slot_reward = torch.zeros(slate.shape, device=reward.device)
        slot_reward[:, 0] = reward
    response = info.get("response")
    chosen = slot_reward > 0 if response is None else next(iter(response.chosen.values()))
    nobody_knows = torch.full(slate.shape, torch.nan, device=slate.device)
    return Transition(
        obs, mask, Decision(shown, nobody_knows), reward, chosen, slot_reward,
        info.get("final_obs", next_obs), info.get("final_mask", info["mask"]),
        terminated, truncated,
    )  # fmt: skip


class Stopped(Exception):  # noqa: N818 (nothing is wrong)
    """`watch` wants no more; raised between two rollouts, where SB3 cannot be told otherwise."""


class Watcher(BaseCallback):
    """Hand each step, with what SB3 has logged last, to `watch`.

    The last step of a rollout waits until SB3 has stored it and trained on it: what is saved then
    can be gone on from exactly. Earlier steps of a rollout are told at once.
    """

    def __init__(self, env: SessionsVecEnv, watch: Watch, length: int) -> None:
        super().__init__()
        self.sessions, self.tell, self.length = env, watch, length
        self.taken = 0  # steps of this rollout
        self.waiting: Transition | None = None

    def _on_rollout_start(self) -> None:
        self.taken = 0
        if not self._told():
            raise Stopped

    def _on_step(self) -> bool:
        step = self.sessions.transition
        assert step is not None
        chances = self.locals.get("log_probs")  # of the whole action: exact where it is one item
        if chances is not None and step.decision.slate.shape[1] == 1:
            propensity = chances.detach().exp().reshape(-1, 1)  # (B, 1)
            step = replace(step, decision=replace(step.decision, propensity=propensity))
        self.waiting, self.taken = step, self.taken + 1
        return self.taken == self.length or self._told()

    def _on_training_end(self) -> None:
        self._told()

    def _told(self) -> bool:
        """Tell what waits; whether to go on."""
        step, self.waiting = self.waiting, None
        return step is None or self.tell(step, logged(self.model.logger))


def logged(logger: Any) -> dict[str, Tensor]:
    """What SB3's logger holds: the latest value of each name."""
    found = {k: v for k, v in logger.name_to_value.items() if not isinstance(v, str)}
    return {name: torch.tensor(float(value)) for name, value in found.items()}
