"""Any Gymnasium environment as B rows of users, actions or catalogue items being what is shown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from encoders.state import EMPTY, Observation
from envs.checks import as_options, as_slate, refuse_slate
from envs.gym_actions import read_actions
from envs.gym_features import Where, read_space
from envs.gym_make import (
    check_at_least_one,
    check_oracle,
    make_envs,
    mask_of,
    repeats,
    same_vectors,
    unknown_items,
)
from envs.gym_trace import Trace, outcome
from simulators.draws import Draws

TURNS = 1 << 40  # episodes of one row before its numbers run into the next row's
SEEDS = (1 << 31) - 1  # seeds every environment takes: 31 bits
LAST_USER = 1 << 62  # users are numbers here, not rows of a table


@dataclass(frozen=True)
class Taken:
    """What came of the slots (B, K), as the `Response` of a simulator says it."""

    chosen: dict[str, Tensor]


class GymVectorEnv:
    """Step B copies of a registered environment side by side; who is done restarts at once.

    Observation: profile (B, P): the environment's numbers, and with `item_features` what was taken
                 and skipped so far; history (B, L) with feedback (B, L, 1); past (B, H): taken in
                 this episode, ages in steps. No context.
    Action:      item ids (B, K): actions, or slots of a slate. A row of EMPTY alone is not stepped.
    Reward, terminated, truncated: the environment's own; who terminates is not truncated.

    Row b's j-th episode is a function of (seed, b, j), or of (seed, user, episode) where `reset` is
    told them: the environment is seeded anew for every episode. Environments of others cannot be
    saved; `restart` begins all episodes anew, and `state_dict` right after it can be gone on from.
    """

    behaviours = ("taken",)
    feedback_size, context_size = 1, 0

    def __init__(
        self,
        id: str,
        *,
        num_envs: int = 1,
        module: str | None = None,
        item_features: str | None = None,
        kwargs: dict[str, Any] | None = None,
        seed: int = 0,
        history: int = 20,
        past: int = 64,
        slate: bool | str = "auto",
        shown: str | None = None,
        feedback: str | None = None,
        oracle: int | None = None,
        max_actions: int = 100_000,
        max_steps: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = {"num_envs": num_envs, "history": history, "past": past, "max_actions": max_actions}
        check_at_least_one(sizes)
        self.id, self.num_envs, self.seed = id, num_envs, seed
        self.device = torch.device(device)
        self.kwargs = kwargs or {}
        self.envs, self.capped = make_envs(id, num_envs, module, self.kwargs, max_steps)
        first, known = self.envs[0], item_features is not None
        self.actions = read_actions(
            first.action_space, id, slate=slate, features=known, max_actions=max_actions
        )
        n, k = self.actions.num_items, self.actions.slate_size
        self.num_items, self.slate_size = n, k
        if past < k:
            raise ValueError(f"past must have room for a slate of {k}, got {past}")
        vectors = same_vectors(self.envs, item_features, n) if item_features else None
        self.reading = read_space(
            first.observation_space,
            id,
            num_items=n,
            slate_size=k,
            detect=n > 2 and (known or k > 1),
            shown=shown,
            feedback=feedback,
        )
        self.oracle = oracle
        check_oracle(oracle, id, told=self.reading.shown is not None)
        self.trace = Trace(num_envs, slate_size=k, history=history, past=past, vectors=vectors)
        table = unknown_items(n) if vectors is None else vectors  # (N, D)
        self.item_vectors = torch.from_numpy(table).to(self.device)
        self.single_action_space = spaces.Discrete(n) if k == 1 else spaces.MultiDiscrete([n] * k)
        self.profile_size = self.reading.size + self.trace.size  # P
        self.past_size, self.history_size = past, history * k  # H, L
        self.masked = [mask_of(env) for env in self.envs]  # methods, or None
        self.allowed: np.ndarray | None = None  # (B, N) bool, where the environment has masks
        self.profile = np.zeros((num_envs, self.profile_size), dtype=np.float32)  # (B, P)
        self.rows = np.arange(num_envs)  # (B,)
        self.turn = np.full(num_envs, -1, dtype=np.int64)  # (B,) j: episodes the row has begun
        self.user = self.episode = self.steps = np.zeros(num_envs, dtype=np.int64)  # (B,)
        self.view: Observation | None = None  # None until the first reset

    @property
    def time(self) -> Tensor:
        """Steps of the episode so far, (B,) float64, where shops have days."""
        return self._out(self.steps.astype(np.float64))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin anew with seed `seed`, or begin every row's next episode.

        `options` {"user": (B,), "episode": (B,)} says which episode each row is to play.
        """
        if seed is not None:
            if not isinstance(seed, int | np.integer) or isinstance(seed, bool):
                raise ValueError(f"seed must be one integer, got {seed!r}")
            self.seed = int(seed)
            self.turn = np.full_like(self.turn, -1)
        wanted = as_options(options or {}, self.num_envs, LAST_USER)
        self.turn = self.turn + 1
        self.user, self.episode = self.rows.copy(), self.rows * TURNS + self.turn
        for name, value in wanted.items():
            setattr(self, name, value.cpu().numpy())
        self.steps = np.zeros_like(self.turn)
        self._enter(self.rows)
        self.view = self._see()
        return self.view, self.arrival()

    def restart(self, turn: int | None = None) -> tuple[Observation, dict[str, Any]]:
        """Begin every row's next episode, numbered `turn` (beyond all so far) where it is given."""
        if turn is not None:
            if turn <= self.turn.max():
                raise ValueError(
                    f"turn must be above {self.turn.max()}, the episodes begun so far, got {turn}: "
                    "an episode would be played twice"
                )
            self.turn = np.full_like(self.turn, turn - 1)
        return self.reset()

    def state_dict(self) -> dict[str, Any]:
        """Which episodes have just begun; within episodes there is nothing that could be saved."""
        self._now()
        if self.steps.any():
            raise ValueError("episodes are under way and cannot be saved: call restart() first")
        state = {"turn": self.turn, "user": self.user, "episode": self.episode}
        return {"seed": self.seed, **{k: torch.from_numpy(v.copy()) for k, v in state.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> tuple[Observation, dict[str, Any]]:
        """Begin the saved episodes: what is seen is what was seen when they were saved."""
        if len(state["turn"]) != self.num_envs:
            raise ValueError(
                f"the saved environment has {len(state['turn'])} rows, this one {self.num_envs}: "
                "build it with the same num_envs"
            )
        self.seed = int(state["seed"])
        turn, user, episode = (state[x].cpu().numpy() for x in ("turn", "user", "episode"))
        self.turn = turn - 1
        return self.reset(options={"user": user, "episode": episode})

    def arrival(self) -> dict[str, Any]:
        """The `info` of a reset: which episodes have begun, and what may be done."""
        return {"mask": self._mask(), **self._whose()}

    def step(self, slate: Tensor) -> tuple[Observation, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Play the slates (B, K); rows of EMPTY alone rest, rows that are done show the next."""
        self._now()
        given = as_slate(slate, self.num_envs, self.slate_size).cpu().numpy().astype(np.int64)
        rest = (given == EMPTY).all(axis=1)  # (B,)
        wrong = (given < 0) & ~rest[:, None] | (given >= self.num_items)  # (B, K)
        if wrong.any():
            row, slot = np.argwhere(wrong)[0]
            if given[row, slot] == EMPTY:
                raise ValueError(
                    f"row {row} has an empty slot {slot}: {self.id} takes whole slates of "
                    f"{self.slate_size} (a row of {EMPTY} alone rests)"
                )
            refuse_slate(torch.from_numpy(given), self.num_items)
        rows = self.rows[~rest]  # (R,)
        return self._play(rows, given[rows], self.actions.native(given[rows]))

    def step_oracle(
        self, playing: Tensor | None = None
    ) -> tuple[Observation, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Let the environment play its own best action in the rows that are `playing` (B,) bool."""
        self._now()
        if self.oracle is None:
            raise ValueError(f"{self.id} was given no oracle: set oracle to the action it replaces")
        if playing is not None and (
            playing.dtype != torch.bool or playing.shape != (self.num_envs,)
        ):
            raise ValueError(
                f"playing must be {self.num_envs} bools, one for each row, got "
                f"{tuple(playing.shape)} {playing.dtype}"
            )
        rows = self.rows if playing is None else self.rows[playing.cpu().numpy()]  # (R,)
        best = self.actions.constant(self.oracle)
        return self._play(rows, None, [best] * len(rows))

    def notes(self) -> list[str]:
        """How the environment is read, a line each; what will not be reproducible among it."""
        read, n, k = self.reading, self.num_items, self.slate_size
        what = "combinations of choices" if self.actions.joint and k == 1 else "actions"
        of_items = f" of {self.item_vectors.shape[1]} features" if self.trace.size else ""
        slates = f", slates of {k}" if k > 1 else ""
        lines = [f"{self.id}: {n} {what}{of_items}{slates}, observations of {read.size} numbers"]
        if self.capped:
            lines.append(
                f"{self.id} registers no limit of its own: episodes are cut after {self.capped} "
                "steps (env.max_steps)"
            )
        if read.shown is not None:
            said = "the reward" if read.feedback is None else read.feedback.name
            lines.append(f"{self.id}: shown is read from {read.shown.name}, feedback from {said}")
        trial = make_envs(self.id, 1, None, self.kwargs)[0][0]
        if not repeats(trial, self.actions.native(np.arange(k)[None])[0]):
            lines.append(
                f"{self.id} does not repeat an episode from its seed: it draws from a generator "
                "that reset(seed=) does not set, so runs cannot be reproduced"
            )
        trial.close()
        return lines

    def close(self) -> None:
        """Close all copies."""
        for env in self.envs:
            env.close()

    def _play(
        self, rows: np.ndarray, slate: np.ndarray | None, actions: Sequence[Any]
    ) -> tuple[Observation, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Step rows (R,) with slates (R, K), or with actions that nobody knows the items of."""
        info: dict[str, Any] = self._whose()
        shape = (self.num_envs, self.slate_size)
        everywhere = np.full(shape, EMPTY, dtype=np.int64)  # (B, K) items shown
        slot_reward = np.zeros(shape, dtype=np.float32)  # (B, K)
        chosen = np.zeros(shape, dtype=bool)  # (B, K)
        illegal = np.zeros(self.num_envs, dtype=np.int64)  # (B,)
        reward = np.zeros(self.num_envs, dtype=np.float32)  # (B,)
        terminated, truncated = np.zeros((2, self.num_envs), dtype=bool)  # (B,) each
        if len(rows):
            if slate is not None:
                illegal[rows] = self._illegal(rows, slate)
            told = [self._answer(b, action) for b, action in zip(rows, actions, strict=True)]
            observations, gained, left, cut, infos = zip(*told, strict=True)
            self.steps = self.steps.copy()
            self.steps[rows] += 1
            reward[rows], terminated[rows] = gained, left
            late = (self.steps[rows] >= self.capped) & (self.capped > 0)  # (R,)
            truncated[rows] = (np.array(cut) | late) & ~terminated[rows]
            shown, feedback = self.reading.slates(observations, self._namer(rows))
            items, slots, took = outcome(slate, shown, feedback, np.array(gained))
            everywhere[rows], slot_reward[rows], chosen[rows] = items, slots, took
            given = slots if feedback is None else feedback  # (R, K)
            self.trace.add(rows, items if shown is None else shown, given)
            self._write(rows, observations, infos)
        done = terminated | truncated  # (B,)
        self.view = self._see()
        if done.any():
            last = {"final_obs": self.view, "_final_obs": self._out(done.copy())}
            info |= {**last, "final_mask": self._mask(done)}
            self._next(self.rows[done])
            self.view = self._see()
        result = self._out(chosen)
        info |= {
            "slate": self._out(everywhere),
            "illegal": self._out(illegal),
            "slot_reward": self._out(slot_reward),
            "chosen": {"taken": result},
            "response": Taken({"taken": result}),
            "mask": self._mask(),
        }
        ends = self._out(terminated), self._out(truncated)
        return self.view, self._out(reward), *ends, info

    def _answer(self, row: int, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """What one environment makes of one action, refused if it is not what step() promises."""
        told = self.envs[row].step(action)
        try:
            obs, reward, terminated, truncated, info = told
            gained, info = float(reward), dict(info)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self._name(row)}: step() must return observation, reward (a number), "
                f"terminated, truncated and info, got {told!r:.160}"
            ) from error
        if not math.isfinite(gained):
            raise ValueError(f"{self._name(row)}: reward must be finite, got {gained}")
        return obs, gained, bool(terminated), bool(truncated), info

    def _enter(self, rows: np.ndarray) -> None:
        """Begin the episodes of rows (R,) that `user` and `episode` name."""
        user, episode = (torch.from_numpy(x[rows]) for x in (self.user, self.episode))  # (R,) each
        key = Draws.root(self.seed).at(user, episode, torch.zeros_like(user)).key  # (R,)
        told = [
            self.envs[b].reset(seed=seed)
            for b, seed in zip(rows, (key & SEEDS).tolist(), strict=True)
        ]
        try:
            observations, infos = zip(*((obs, dict(info)) for obs, info in told), strict=True)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.id}: reset() must return observation and info, got {told[0]!r:.160}"
            ) from error
        self.trace.clear(rows)
        shown, feedback = self.reading.slates(observations, self._namer(rows))
        if shown is not None:
            given = np.zeros(shown.shape) if feedback is None else feedback
            self.trace.add(rows, shown, given)
        self._write(rows, observations, infos)

    def _next(self, rows: np.ndarray) -> None:
        """Begin the next episode of rows (R,) that are done."""
        for name in ("turn", "user", "episode", "steps"):
            setattr(self, name, getattr(self, name).copy())
        self.turn[rows] += 1
        self.user[rows], self.episode[rows] = rows, rows * TURNS + self.turn[rows]
        self.steps[rows] = 0
        self._enter(rows)

    def _write(self, rows: np.ndarray, observations: Sequence[Any], infos: Sequence[Any]) -> None:
        """Profile and mask of rows (R,) as their environments show them now."""
        numbers = self.reading.size
        self.profile[rows, :numbers] = self.reading.profile(observations, self._namer(rows))
        if self.trace.size:
            self.profile[rows, numbers:] = self.trace.summary(rows)
        if self.masked[0] is None and self.allowed is None and "action_mask" not in infos[0]:
            return
        if self.allowed is None:
            self.allowed = np.ones((self.num_envs, self.num_items), dtype=bool)
        for b, info in zip(rows, infos, strict=True):
            ask = self.masked[b]
            if ask is None and "action_mask" not in info:
                raise ValueError(f"{self._name(b)}: info has no action_mask, it had one before")
            mask = info["action_mask"] if ask is None else ask()
            self.allowed[b] = self.actions.allowed(mask, self._name(b))

    def _mask(self, over: np.ndarray | None = None) -> Tensor | None:
        """Allowed items (B, N); an end that allows too few allows all of them: nothing follows."""
        if self.allowed is None:
            return None
        few = np.asarray(self.allowed.sum(axis=1) < self.slate_size)  # (B,)
        stuck = few if over is None else few & ~over  # (B,)
        if stuck.any():
            row = int(stuck.argmax())
            raise ValueError(
                f"{self._name(row)}: the action mask allows {int(self.allowed[row].sum())} of "
                f"{self.num_items}, a slate needs {self.slate_size}"
            )
        return self._out(self.allowed | few[:, None])

    def _illegal(self, rows: np.ndarray, slate: np.ndarray) -> np.ndarray:
        """Slots (R,) that the mask forbade or that repeat an item: the environment judges them."""
        ordered = np.sort(slate, axis=1)  # (R, K)
        count = np.asarray((ordered[:, 1:] == ordered[:, :-1]).sum(axis=1))  # (R,)
        if self.allowed is None:
            return count
        return count + (~np.take_along_axis(self.allowed[rows], slate, axis=1)).sum(axis=1)

    def _see(self) -> Observation:
        """All rows as they are now, in tensors of their own."""
        t, out = self.trace, self._out
        past = out(t.past.copy()), out(t.count.copy()), out(t.age.copy())
        history, feedback = out(t.history.copy()), out(t.feedback[:, :, None].copy())
        context = out(np.zeros((self.num_envs, 0), dtype=np.float32))
        return Observation(out(self.profile.copy()), *past, history, feedback, context)

    def _whose(self) -> dict[str, Any]:
        """User, episode and step of every row."""
        names = {"user": self.user, "episode": self.episode, "step": self.steps}
        return {name: self._out(value.copy()) for name, value in names.items()}

    def _now(self) -> Observation:
        if self.view is None:
            raise ValueError("no episode has begun: call reset() first")
        return self.view

    def _name(self, row: int) -> str:
        return f"{self.id}, row {row}, step {self.steps[row]}"

    def _namer(self, rows: np.ndarray) -> Where:
        return lambda r: self._name(int(rows[r]))

    def _out(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)
