"""Gymnasium environments: users who are shown slates until they leave or the steps run out."""

from dataclasses import fields, replace
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from encoders.state import EMPTY, Observation, StateEncoder, calendar, remember
from envs.checks import (
    as_options,
    as_slate,
    check_pessimism,
    check_sizes,
    check_word,
    refuse_reward,
    refuse_slate,
)
from envs.excluded import Excluded, among
from envs.rewards import Margin, Reward, doubt, units
from envs.saved import env_state, restore_env
from envs.shown import Shown, repeated
from envs.spaces import observation_space, to_numpy, within
from simulators.base import Response, UserSimulator, UserState
from simulators.draws import Draws

TURNS = 1 << 20  # episodes of one row before its numbers run into the next row's


class RecommendVectorEnv(VectorEnv[Any, Any, Any]):
    """Show B users a slate of K items each step until they leave or `max_steps` have passed.

    Observation: profile (B, P), past (B, H) with counts and ages, history (B, L), feedback
                 (B, L, F), context (B, C), as a shop has; or their encoding, one vector (B, U).
    Action:      item ids (B, K). What was shown on this trip before, and what `excluded` forbids
                 the user, is shown as an empty slot.
    Reward:      a function of the `Response`, summed over slots, less `pessimism` times what the
                 simulator is unsure of (`envs.rewards.doubt`).
    Terminated:  the user left.      Truncated: `max_steps` reached, user still there.

    Row b's j-th user is a function of (seed, b, j); answers of (seed, user, episode, step). `info`
    of a step tells user, episode ("episode_id" in NumPy) and step that were acted on; obs and mask
    are what comes next.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        simulator: UserSimulator,
        *,
        num_envs: int = 1,
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
        num_items = len(simulator.catalog)
        check_sizes(num_items, num_envs, slate_size, max_steps, excluded.width if excluded else 0)
        check_pessimism(pessimism)
        check_word("observation", observation, ("vector", "ids"))
        check_word("output", output, ("numpy", "torch"))
        self.device = simulator.catalog.vectors.device
        if device is not None and torch.device(device).type != self.device.type:
            raise ValueError(
                f"the simulator's catalogue is on {self.device}, the environment was asked for "
                f"{device}: make the simulator with SimSpec(device={str(device)!r})"
            )
        self.simulator, self.excluded, self.pessimism = simulator, excluded, pessimism
        self.reward = reward.of(simulator.catalog) if isinstance(reward, Margin) else reward
        self.num_envs, self.num_items = num_envs, num_items
        self.slate_size, self.max_steps = slate_size, max_steps
        self.observation, self.output, self.seed = observation, output, seed
        self.encode: StateEncoder | None = None
        if observation == "vector":
            self.encode = StateEncoder(
                simulator.catalog.vectors,
                profile_size=simulator.users.profile.shape[1],
                behaviours=len(simulator.behaviours),
            )
        self.single_observation_space = observation_space(
            simulator, self.encode, slate_size * max_steps
        )
        self.single_action_space = (
            spaces.Discrete(num_items)
            if slate_size == 1
            else spaces.MultiDiscrete([num_items] * slate_size)
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = None
        self.rows = torch.arange(row, row + num_envs, device=self.device)  # (B,)
        self.slots = torch.arange(slate_size, device=self.device)  # (K,)
        self.draws = Draws.root(seed, self.device)
        self.turn = torch.full_like(self.rows, -1)  # (B,) j: how many users the row has had
        self.view: Observation | None = None  # None until the first reset

    @property
    def mask(self) -> Tensor:
        """Excluded ids (B, M), EMPTY where none: shown on this trip, or forbidden by a rule."""
        history = self._now().history  # (B, L)
        return history if self.never is None else torch.cat([history, self.never], dim=1)

    def action_masks(self) -> np.ndarray:
        """Allowed items, (B, N) bool, as maskable learners ask for them."""
        mask = self.mask  # (B, M)
        room = torch.ones(self.num_envs, self.num_items + 1, dtype=torch.bool, device=self.device)
        room.scatter_(1, torch.where(mask == EMPTY, self.num_items, mask), False)
        return room[:, :-1].cpu().numpy()

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin anew with seed `seed`, or let every row's next user in.

        `options` {"user": (B,), "episode": (B,)} says whom to serve and on which draws.
        """
        if seed is not None:
            if not isinstance(seed, int | np.integer):
                raise ValueError(
                    f"seed must be one integer, got {seed!r}: every row's users follow from it"
                )
            self.seed = int(seed)
            super().reset(seed=self.seed)
            self.draws = Draws.root(self.seed, self.device)
            self.turn = torch.full_like(self.turn, -1)
        self.turn = self.turn + 1
        self.user, self.episode = self._whom(self.rows, self.turn)  # (B,) each
        wanted = as_options(options or {}, self.num_envs, len(self.simulator.users))
        self.user = wanted.get("user", self.user).to(self.device)
        self.episode = wanted.get("episode", self.episode).to(self.device)
        self.steps = torch.zeros_like(self.turn)  # (B,) of the episode
        self.trip_steps = torch.zeros_like(self.turn)  # (B,) of the trip: where history goes on
        self.time = self.simulator.users.start[self.user]  # (B,)
        draws = self.draws.at(self.user, self.episode, self.steps)
        self.state: UserState = self.simulator.start(self.user, draws)
        self.mine: dict[str, Tensor] = {}  # what of the state nobody else has
        self.forbid()
        self.view = self._enter(self.user)
        self.fresh_board()
        self.seen = self._encoded(self.view)
        return self._out(self.seen), self.arrival()

    def forbid(self) -> None:
        """Look up what the users who are here must not be shown."""
        self.never: Tensor | None = None if self.excluded is None else self.excluded.rows(self.user)

    def fresh_board(self) -> None:
        """Nothing was shown to anybody on this trip."""
        self.shown = Shown(self.num_envs, self.num_items, self.device)

    def state_dict(self) -> dict[str, Any]:
        """Where all sessions are, as plain tensors."""
        return env_state(self)

    def load_state_dict(self, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Go on with saved sessions: what a reset would return, of where they were."""
        restore_env(self, state)
        return self._out(self.seen), self.arrival()

    def arrival(self) -> dict[str, Any]:
        """The `info` of a reset: who is there now, and what may not be shown."""
        info = {"mask": self.mask, "user": self.user, "episode": self.episode, "step": self.steps}
        return self._told(info)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Show the slates (B, K); rows whose user is gone already show the next one."""
        now = self._now()
        slate = as_slate(actions, self.num_envs, self.slate_size)
        slate = slate.to(self.device, torch.int64)  # (B, K)
        allowed = self._allowed(slate)  # (B, K)
        shown = torch.where(allowed, slate, EMPTY)  # repeats show nothing
        draws = self.draws.at(self.user, self.episode, self.steps)
        response, state = self.simulator.respond(self.state, shown, draws)
        response = replace(response, items=shown)
        slot_reward = self._rewarded(response)  # (B, K)
        reward = slot_reward.sum(dim=1)  # (B,)
        terminated = response.left  # (B,)
        truncated = ~terminated & (self.steps + 1 >= self.max_steps)  # (B,)
        done, moved = terminated | truncated, response.elapsed > 0  # (B,) each
        wrong = (slate < EMPTY) | (slate >= self.num_items)  # (B, K)
        flags = torch.stack([wrong.any(), ~slot_reward.isfinite().all(), done.any(), moved.any()])
        any_wrong, not_finite, any_done, any_moved = flags.tolist()  # the one host sync of a step
        if any_wrong:  # refused before anything of the session has changed
            refuse_slate(slate, self.num_items)
        if not_finite:
            refuse_reward(_name(self.reward), slot_reward)
        info: dict[str, Any] = {
            "user": self.user,
            "episode": self.episode,
            "step": self.steps,
            "slate": shown,
            "illegal": (~allowed).sum(dim=1),  # (B,)
            "slot_reward": slot_reward,
            "response": response,
        }
        self.state = state
        self.view = self._append(now, shown, response)
        self.steps, self.trip_steps = self.steps + 1, self.trip_steps + 1
        if any_moved:
            self._next_trip(moved.nonzero().squeeze(1), response.elapsed)
        self.seen = self._encoded(self.view)
        if any_done:
            info |= {"final_obs": self._out(self.seen), "_final_obs": done, "final_mask": self.mask}
            self.mine = {k: v for k, v in self.mine.items() if not part_of(response, v)}
            self._restart(done.nonzero().squeeze(1))
        info["mask"] = self.mask
        told = self._told(info)
        if self.output == "torch":
            return self.seen, reward, terminated, truncated, told
        outcome = (x.cpu().numpy() for x in (reward, terminated, truncated))
        return self._out(self.seen), *outcome, told

    def _now(self) -> Observation:
        if self.view is None:
            raise ValueError("the environment has no users yet: call reset() before step() or mask")
        return self.view

    def _whom(self, rows: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """Users and episodes, (R,) each, of rows at their turns; no two rows share an episode."""
        key = self.draws.at(rows, turn, torch.zeros_like(turn)).key  # (R,)
        return (key & torch.iinfo(torch.int64).max) % len(self.simulator.users), rows * TURNS + turn

    def _enter(self, user: Tensor) -> Observation:
        """What is seen of users (R,) who come in."""
        users = self.simulator.users
        columns = (users.profile, users.past, users.past_count, users.past_age, users.start)
        return self._fresh(*(x.index_select(0, user) for x in columns))

    def _fresh(
        self, profile: Tensor, past: Tensor, count: Tensor, age: Tensor, time: Tensor
    ) -> Observation:
        """An observation of R users at the beginning of a trip: nothing shown yet."""
        length = self.slate_size * self.max_steps  # L
        shape = (len(profile), length)
        history = torch.full(shape, EMPTY, device=self.device)  # (R, L)
        feedback = torch.zeros(*shape, len(self.simulator.behaviours), device=self.device)
        return Observation(profile, past, count, age, history, feedback, calendar(time))

    def _allowed(self, slate: Tensor) -> Tensor:
        """Which slots (B, K) show an item not shown on this trip before, nor higher up."""
        allowed = ~(self.shown.before(slate, self._now().history) | repeated(slate))
        return allowed if self.never is None else allowed & ~among(slate, self.never)

    def _rewarded(self, response: Response) -> Tensor:
        slot_reward = self.reward(response)
        if slot_reward.shape != response.value.shape:
            raise ValueError(
                f"reward {_name(self.reward)} must give slot rewards "
                f"{tuple(response.value.shape)}, got {tuple(slot_reward.shape)}"
            )
        if self.pessimism:
            unsure = doubt(self.reward, response, self.simulator.catalog.price)  # (B, K)
            slot_reward = slot_reward - self.pessimism * unsure
        return slot_reward.float()

    def _append(self, view: Observation, shown: Tensor, response: Response) -> Observation:
        """Write what was shown (B, K) and what came of it behind the history."""
        place = self.trip_steps[:, None] * self.slate_size + self.slots  # (B, K)
        did = torch.stack([response.chosen[b] for b in self.simulator.behaviours], dim=2).float()
        behaviours = torch.arange(did.shape[2], device=self.device)  # (F,)
        cells = place[:, :, None] * did.shape[2] + behaviours  # (B, K, F) of feedback as (B, L * F)
        feedback = view.feedback.flatten(1).scatter(1, cells.flatten(1), did.flatten(1))
        self.shown.note(shown)
        return replace(
            view,
            history=view.history.scatter(1, place, shown),
            feedback=feedback.view_as(view.feedback),  # two dimensions are twice as fast as three
        )

    def _next_trip(self, rows: Tensor, elapsed: Tensor) -> None:
        """Rows (R,) come back after `elapsed` days: what they bought is past, nothing is shown."""
        seen, gone = self._now()[rows], elapsed[rows]
        took = seen.feedback[:, :, 0] > 0  # (R, L) bought: the first behaviour
        order = took.int().argsort(dim=1, descending=True, stable=True)
        order = order[:, : int(took.sum(dim=1).max())]  # (R, M)
        bought = seen.history.masked_fill(~took, EMPTY).gather(1, order)  # (R, M)
        past = remember(seen.past, seen.past_count, seen.past_age, bought, gone)
        time = self.time[rows] + gone  # (R,)
        self.time = self.time.index_copy(0, rows, time)
        fresh = self._fresh(seen.profile, *past, time)
        view = self._now()
        # `_append` has just made these two: nobody has got them yet
        view.history.index_copy_(0, rows, fresh.history)
        view.feedback.index_copy_(0, rows, fresh.feedback)
        names = ("past", "past_count", "past_age", "context")
        changed = {k: getattr(view, k).index_copy(0, rows, getattr(fresh, k)) for k in names}
        self.view = replace(view, **changed)
        self._blank(rows)

    def _restart(self, rows: Tensor) -> None:
        """Let the next users into rows (R,)."""
        self.turn = self.turn.index_add(0, rows, torch.ones_like(rows))
        user, episode = self._whom(self.rows[rows], self.turn[rows])  # (R,) each
        steps = torch.zeros_like(rows)  # (R,)
        fresh = self.simulator.start(user, self.draws.at(user, episode, steps))
        self.state = {k: self._replaced(k, rows, fresh[k]) for k in self.state}
        self.user = self.user.index_copy(0, rows, user)
        self.episode = self.episode.index_copy(0, rows, episode)
        self.steps = self.steps.index_copy(0, rows, steps)
        self.time = self.time.index_copy(0, rows, self.simulator.users.start[user])
        if self.excluded is not None and self.never is not None:
            self.never = self.never.index_copy(0, rows, self.excluded.rows(user))
        view = self._enter(user)
        self.view = _merge(self._now(), rows, view)
        self._blank(rows)
        self.seen = (
            self._now() if self.encode is None else _merge(self.seen, rows, self.encode(view))
        )

    def _replaced(self, name: str, rows: Tensor, fresh: Tensor) -> Tensor:
        """The simulator's tensor `name` with rows (R,) from `fresh` (R, ...).

        In place if this environment made it and the simulator only handed it on: any other may be
        the simulator's own, or the same under another name.
        """
        held = self.state[name]
        if held is self.mine.get(name):
            return held.index_copy_(0, rows, fresh)
        self.mine[name] = held.index_copy(0, rows, fresh)
        return self.mine[name]

    def _blank(self, rows: Tensor) -> None:
        """Rows (R,) begin a trip: nothing was shown yet."""
        self.trip_steps = self.trip_steps.index_fill(0, rows, 0)
        self.shown.forget(rows)

    def _encoded(self, view: Observation) -> Observation | Tensor:
        return view if self.encode is None else self.encode(view)

    def _out(self, seen: Observation | Tensor) -> Any:
        """What is seen as the caller wants it: tensors, or NumPy within the space."""
        return seen if self.output == "torch" else within(seen, self.single_observation_space)

    def _told(self, info: dict[str, Any]) -> dict[str, Any]:
        if self.output == "torch":
            return info
        arrays: dict[str, Any] = to_numpy(info)
        # RecordEpisodeStatistics and Stable-Baselines3 keep their own record under "episode".
        return {"episode_id" if k == "episode" else k: v for k, v in arrays.items()}


def part_of(response: Response, tensor: Tensor) -> bool:
    """Whether the response tells memory of the state itself: what was told must stay as it is."""
    rest = (response.organic, response.value, response.left, response.elapsed, response.uncertainty)
    at = tensor.untyped_storage().data_ptr()
    return any(x.untyped_storage().data_ptr() == at for x in (*response.chosen.values(), *rest))


def _merge(old: Any, rows: Tensor, new: Any) -> Any:
    """`old` of B users with rows (R,) from `new` of R; `old` itself stays as it is."""
    if isinstance(old, Tensor):
        return old.index_copy(0, rows, new)
    pairs = ((f.name, getattr(old, f.name), getattr(new, f.name)) for f in fields(old))
    return Observation(**{name: a.index_copy(0, rows, b) for name, a, b in pairs})


def _name(reward: Reward) -> str:
    return getattr(reward, "__name__", type(reward).__name__)
