"""A ring of transitions that stores item ids, never embeddings: states are rebuilt when sampled.

What a user bought before a trip is wide (H items) and constant during it: it is stored once as a
"memory", and transitions point to it. A memory's place is free once the last transition that
points to it has been overwritten.

A transition's place is a number in [0, T * B): step in the ring times B plus column.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.base import AgentSpec, Decision, Mask, Transition
from encoders.state import Observation

MAX_BOOL_MASK = 20_000  # items; above, masks are excluded ids
CHANGING = ("history", "feedback", "context")  # within a trip; the rest of an Observation does not


@dataclass(frozen=True)
class Sample:
    """Windows of n steps: obs, mask and decision of the first, next_obs and done of the last."""

    transition: Transition  # of n rows; `reward` and `slot_reward` are the first step's
    slot_return: (
        Tensor  # (n, K): own reward of each slot plus its share of the discounted later ones
    )
    discount: Tensor  # (n,): what the value of next_obs counts, gamma^steps; 0 after leaving


class Replay:
    """Keep the last `capacity` transitions of B users who step together, one column each."""

    def __init__(
        self,
        capacity: int,
        *,
        spec: AgentSpec,
        n_step: int = 1,
        gamma: float = 0.9,
        device: torch.device | str | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 transition, got {capacity}")
        if n_step < 1:
            raise ValueError(f"n_step must be at least 1, got {n_step}")
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma must be in [0, 1], got {gamma}")
        self.capacity, self.spec, self.n_step, self.gamma = capacity, spec, n_step, gamma
        self.device = torch.device(spec.device if device is None else device)
        self.data: dict[str, Tensor] = {}  # (T, B, ...) ring of transitions
        self.memory: dict[str, Tensor] = {}  # (M, ...) memories
        self.expires = torch.zeros(0)  # (M,) int64: the add from which a memory's place is free
        self.last = torch.zeros(0)  # (B,) int64: memory of each row's latest next_obs
        self.clear()

    def clear(self) -> None:
        """Forget everything; the next `add` says how many users there are and the form of masks."""
        self.batch = 0  # B
        self.steps = 0  # adds so far
        self.mask_kind = ""  # none, history, ids or bool
        self.touched = 0  # memories beyond this one were never written: their pages cost nothing
        self.data, self.memory = {}, {}

    def __len__(self) -> int:
        return self.filled * self.batch

    @property
    def filled(self) -> int:
        """How many adds the ring holds by now."""
        return min(self.steps, self.length)

    @property
    def length(self) -> int:
        """T: how many adds the ring has room for."""
        return self.capacity // self.batch if self.batch else 0

    def add(self, transition: Transition) -> None:
        """Store one step of B users; row b follows row b of the last add, unless that was done."""
        check_shapes(transition, self.spec)
        kind = mask_kind(transition, self.mask_kind)
        if not self.batch:
            self._allocate(len(transition.reward), kind, transition.mask)
        if len(transition.reward) != self.batch:
            raise ValueError(
                f"every add must have the same users side by side, expected {self.batch} rows, "
                f"got {len(transition.reward)}: use one Replay per number of users"
            )
        if kind != self.mask_kind:
            raise ValueError(
                f"mask must keep the form of the first add ({self.mask_kind}), got {kind}: "
                "use None, the history, excluded ids or bool throughout"
            )
        t = self.steps % self.length
        self.data["memory"][t] = self._remember(transition.obs)
        self.data["next_memory"][t] = self._remember(transition.next_obs)
        for name, value in columns(transition, kind).items():
            if value.shape != self.data[name].shape[1:]:
                raise ValueError(
                    f"{name} must keep the shape of the first add, expected "
                    f"{tuple(self.data[name].shape[1:])}, got {tuple(value.shape)}"
                )
            self.data[name][t] = value.to(self.data[name].dtype)
        self.steps += 1

    def sample(self, batch: int, generator: torch.Generator) -> Sample:
        """Draw windows uniformly with replacement."""
        return self.at(self.draw(batch, generator))

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Places (n,) drawn uniformly with replacement."""
        if not len(self):
            raise ValueError("cannot sample an empty replay: add transitions first")
        draw = torch.randint(len(self), (batch,), generator=generator, device=self.device)  # (n,)
        age, column = draw // self.batch, draw % self.batch  # (n,) age 0 is the oldest
        first = (self.steps - self.filled + age) % self.length  # (n,)
        return first * self.batch + column

    def newest(self) -> slice:
        """The places that the last add has written."""
        start = (self.steps - 1) % self.length * self.batch
        return slice(start, start + self.batch)

    def at(self, place: Tensor) -> Sample:
        """The windows that start at places (n,); one that meets the newest step is cut there."""
        first, column = place // self.batch, place % self.batch  # (n,)
        age = (first - self.steps + self.filled) % self.length  # (n,)
        reward = self.data["reward"]  # (T, B)
        later = torch.zeros(len(place), device=self.device)
        discount = torch.full((len(place),), self.gamma, device=self.device)
        last = first
        alive = ~self._done(first, column) & (age + 1 < self.filled)  # (n,) the window goes on
        for step in range(1, self.n_step):
            at = (first + step) % self.length
            later = later + torch.where(alive, self.gamma**step * reward[at, column], 0.0)
            last = torch.where(alive, at, last)
            discount = torch.where(alive, discount * self.gamma, discount)
            alive = alive & ~self._done(at, column) & (age + step + 1 < self.filled)
        transition = self._read(first, last, column)
        slots = transition.slot_reward.shape[1]
        slot_return = transition.slot_reward + later[:, None] / slots  # (n, K)
        return Sample(transition, slot_return, discount * ~transition.terminated)

    def state_dict(self) -> dict[str, Any]:
        """Everything stored so far as plain tensors and numbers."""
        return {
            "capacity": self.capacity,
            "batch": self.batch,
            "steps": self.steps,
            "mask_kind": self.mask_kind,
            "last": self.last.clone(),
            "expires": self.expires[: self.touched].clone(),
            "data": {name: value[: self.filled].clone() for name, value in self.data.items()},
            "memory": {name: value[: self.touched].clone() for name, value in self.memory.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved ring of the same capacity."""
        if state["capacity"] != self.capacity:
            raise ValueError(
                f"replay was saved with capacity {state['capacity']}, this one has "
                f"{self.capacity}: "
                "use the same capacity, or load without the replay"
            )
        self.clear()
        if not state["batch"]:
            return
        mask = state["data"].get("mask")
        self._allocate(state["batch"], state["mask_kind"], None if mask is None else mask[0])
        self.steps, self.touched = state["steps"], len(state["expires"])
        self.last = state["last"].to(self.device)
        self.expires[: self.touched] = state["expires"].to(self.device)
        for mine, theirs in ((self.data, state["data"]), (self.memory, state["memory"])):
            for name, value in theirs.items():
                if mine[name].shape[1:] != value.shape[1:]:
                    raise ValueError(
                        f"replay field {name} was saved as {tuple(value.shape[1:])}, here it is "
                        f"{tuple(mine[name].shape[1:])}: it belongs to another environment"
                    )
                mine[name][: len(value)] = value.to(self.device)

    def _allocate(self, batch: int, mask_kind: str, mask: Mask) -> None:
        """Lay out the ring for B users: pages are only taken when written."""
        self.batch, self.mask_kind = batch, mask_kind
        if self.length < self.n_step:
            self.batch = 0
            raise ValueError(
                f"capacity {self.capacity} holds {self.capacity // batch} steps of {batch} users, "
                f"n_step needs {self.n_step}: raise capacity to at least {self.n_step * batch}"
            )
        s = self.spec
        k, width, f = s.slate_size, s.history_size, s.feedback_size
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "slate": ((k,), torch.int32),
            "propensity": ((k,), torch.float32),
            "reward": ((), torch.float32),
            "chosen": ((k,), torch.bool),
            "slot_reward": ((k,), torch.float32),
            "terminated": ((), torch.bool),
            "truncated": ((), torch.bool),
        }
        for side in ("", "next_"):
            layout[side + "memory"] = ((), torch.int32)
            layout[side + "history"] = ((width,), torch.int32)
            layout[side + "feedback"] = ((width, f), torch.float16)
            layout[side + "context"] = ((s.context_size,), torch.float32)
            if mask_kind in ("ids", "bool"):
                assert mask is not None
                dtype = torch.bool if mask_kind == "bool" else torch.int32
                layout[side + "mask"] = ((mask.shape[1],), dtype)
        rows = (self.length, batch)
        self.data = {
            name: torch.empty(*rows, *shape, dtype=dtype, device=self.device)
            for name, (shape, dtype) in layout.items()
        }
        places = 2 * self.length * batch  # the worst case: every view of every step is new
        self.memory = {
            name: torch.empty(places, wide, dtype=dtype, device=self.device)
            for name, wide, dtype in (
                ("past", s.past_size, torch.int32),
                ("past_count", s.past_size, torch.float32),
                ("past_age", s.past_size, torch.float32),
                ("profile", s.profile_size, torch.float32),
            )
        }
        self.expires = torch.zeros(places, dtype=torch.int64, device=self.device)
        self.last = torch.full((batch,), -1, dtype=torch.int64, device=self.device)

    def _remember(self, obs: Observation) -> Tensor:
        """Write the memories that differ from the row's last one; where each is kept (B,)."""
        last = self.last.clamp(min=0)
        same = self.last >= 0  # (B,)
        if self.touched:
            for name, kept in self.memory.items():
                same = same & (kept[last] == getattr(obs, name)).all(dim=1)
        until = self.steps + self.length  # the add that overwrites this step
        self.expires[last[same]] = until
        new = (~same).nonzero().squeeze(1)  # (R,)
        free = (self.expires[: self.touched] <= self.steps).nonzero().squeeze(1)[: len(new)]
        more = len(new) - len(free)  # untouched places only when no other is free: fewest pages
        fresh = torch.arange(self.touched, self.touched + more, device=self.device)
        place = torch.cat([free, fresh])  # (R,)
        self.touched += more
        for name, kept in self.memory.items():
            kept[place] = getattr(obs, name)[new].to(kept.dtype)
        self.expires[place] = until
        self.last = last.index_copy(0, new, place)
        return self.last

    def _done(self, t: Tensor, column: Tensor) -> Tensor:
        return self.data["terminated"][t, column] | self.data["truncated"][t, column]

    def _read(self, first: Tensor, last: Tensor, column: Tensor) -> Transition:
        """The transition (n rows) whose first step is at `first` and whose last is at `last`."""
        before, after = self.data["memory"][first, column], self.data["next_memory"][last, column]
        kept = self._memory(before)
        # on most steps nothing but the trip has changed; on a GPU it would wait to know
        same = before.device.type == "cpu" and torch.equal(before, after)
        obs = self._view("", first, column, kept)
        next_obs = self._view("next_", last, column, kept if same else self._memory(after))
        mask: Mask = None
        next_mask: Mask = None
        if self.mask_kind == "history":
            mask, next_mask = obs.history, next_obs.history
        elif self.mask_kind != "none":
            mask, next_mask = self.data["mask"][first, column], self.data["next_mask"][last, column]
            if self.mask_kind == "ids":
                mask, next_mask = mask.long(), next_mask.long()
        at_first = {n: self.data[n][first, column] for n in ("slate", "propensity", "chosen")}
        return Transition(
            obs=obs,
            mask=mask,
            decision=Decision(at_first["slate"].long(), at_first["propensity"]),
            reward=self.data["reward"][first, column],
            chosen=at_first["chosen"],
            slot_reward=self.data["slot_reward"][first, column],
            next_obs=next_obs,
            next_mask=next_mask,
            terminated=self.data["terminated"][last, column],
            truncated=self.data["truncated"][last, column],
        )

    def _memory(self, place: Tensor) -> dict[str, Tensor]:
        """Memories (n, ...) at places (n,)."""
        kept = {name: value[place] for name, value in self.memory.items()}
        return {**kept, "past": kept["past"].long()}

    def _view(self, side: str, t: Tensor, column: Tensor, kept: dict[str, Tensor]) -> Observation:
        """The observation (n rows) before (`side` "") or after ("next_") step t."""
        seen = {name: self.data[side + name][t, column] for name in CHANGING}
        return Observation(
            profile=kept["profile"],
            past=kept["past"],
            past_count=kept["past_count"],
            past_age=kept["past_age"],
            history=seen["history"].long(),
            feedback=seen["feedback"].float(),
            context=seen["context"],
        )


def mask_kind(transition: Transition, before: str = "") -> str:
    """The form of both masks: none, history (stored anyway), ids or bool; `before`: so far."""
    mask, obs, later = transition.mask, transition.obs, transition.next_mask
    if (mask is None) != (later is None) or (
        mask is not None and later is not None and mask.dtype != later.dtype
    ):
        raise ValueError("mask and next_mask must have the same form: None, excluded ids or bool")
    if mask is None or later is None:
        return "none"
    if mask.dtype == torch.bool:
        if mask.shape[1] > MAX_BOOL_MASK:
            raise ValueError(
                f"a replay keeps bool masks of at most {MAX_BOOL_MASK} items, got {mask.shape[1]}: "
                "pass excluded ids (B, M) instead"
            )
        return "bool"
    if before == "ids":
        return "ids"
    if mask is obs.history and later is transition.next_obs.history:
        return "history"
    equal = before == "history" and torch.equal(mask, obs.history)
    return "history" if equal and torch.equal(later, transition.next_obs.history) else "ids"


def columns(transition: Transition, kind: str) -> dict[str, Tensor]:
    """What is stored of each row besides its memories, by the name of its field."""
    t = transition
    result = {
        "slate": t.decision.slate,
        "propensity": t.decision.propensity,
        "reward": t.reward,
        "chosen": t.chosen,
        "slot_reward": t.slot_reward,
        "terminated": t.terminated,
        "truncated": t.truncated,
    }
    for side, obs, mask in (("", t.obs, t.mask), ("next_", t.next_obs, t.next_mask)):
        result[side + "history"] = obs.history
        result[side + "feedback"] = obs.feedback.clamp(-65504.0, 65504.0)  # what float16 holds
        result[side + "context"] = obs.context
        if kind in ("ids", "bool"):
            assert mask is not None
            result[side + "mask"] = mask
    return result


def check_shapes(transition: Transition, spec: AgentSpec) -> None:
    """Refuse a transition whose tensors are not as wide as the spec says."""
    b, k = len(transition.reward), spec.slate_size
    wide = {
        "profile": (b, spec.profile_size),
        "past": (b, spec.past_size),
        "past_count": (b, spec.past_size),
        "past_age": (b, spec.past_size),
        "history": (b, spec.history_size),
        "feedback": (b, spec.history_size, spec.feedback_size),
        "context": (b, spec.context_size),
    }
    found: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "reward": (transition.reward, (b,)),
        "terminated": (transition.terminated, (b,)),
        "truncated": (transition.truncated, (b,)),
        "decision.slate": (transition.decision.slate, (b, k)),
        "decision.propensity": (transition.decision.propensity, (b, k)),
        "chosen": (transition.chosen, (b, k)),
        "slot_reward": (transition.slot_reward, (b, k)),
    }
    for name, shape in wide.items():
        found["obs." + name] = (getattr(transition.obs, name), shape)
        found["next_obs." + name] = (getattr(transition.next_obs, name), shape)
    for name, (value, shape) in found.items():
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} as the AgentSpec says, got {tuple(value.shape)}"
            )
