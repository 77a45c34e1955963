"""The types of an agent: what it is built from, what it decides, what it learns from."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from agents.interactions import Interactions
from encoders.state import EMPTY, Observation

Mask = Tensor | None  # None, allowed (B, N) bool, or excluded ids (B, M) int64 with EMPTY


@dataclass(frozen=True)
class Decision:
    """B slates of K items with what `act` knew of their probability."""

    slate: Tensor  # (B, K) int64, distinct in a row
    propensity: Tensor  # (B, K) float32: of each item given those above it


@dataclass(frozen=True)
class Transition:
    """One step of B users; rows are independent."""

    obs: Observation
    mask: Mask
    decision: Decision
    reward: Tensor  # (B,) float32
    chosen: Tensor  # (B, K) bool: bought, clicked: the first behaviour
    slot_reward: Tensor  # (B, K) float32, sums to `reward`
    next_obs: Observation  # the last view of who is gone, where done
    next_mask: Mask
    terminated: Tensor  # (B,) bool: left
    truncated: Tensor  # (B,) bool: out of steps, still there


@dataclass(frozen=True)
class AgentSpec:
    """All that an agent may know before it starts: the log before the cut, not the simulator."""

    num_items: int
    slate_size: int
    item_vectors: Tensor  # (N, D) float32
    category: Tensor  # (N,) int64
    popularity: Tensor  # (N,) float32: share of trips that bought it
    interactions: Any  # scipy CSR (users, N) float32 counts before the cut, or None
    profile_size: int  # P
    past_size: int  # H
    history_size: int  # L
    feedback_size: int  # F
    context_size: int  # C
    device: str = "cpu"
    seed: int = 0
    events: Interactions | None = None  # the same one by one, in time order; None: only the counts
    total_steps: int | None = None  # env steps of the whole training: schedules end with it

    def __post_init__(self) -> None:
        if not 1 <= self.slate_size <= self.num_items:
            raise ValueError(
                f"slate_size must be in 1..{self.num_items}, the catalogue, got {self.slate_size}: "
                "shrink the slate or enlarge the catalogue"
            )
        for name in ("past_size", "history_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}: where there is nothing "
                    "to remember, one place stays EMPTY"
                )
        for name in ("item_vectors", "popularity"):
            values = getattr(self, name)
            if values.shape[0] != self.num_items:
                raise ValueError(
                    f"{name} must have one row per item, expected {self.num_items}, "
                    f"got {values.shape[0]}"
                )
            bad = ~values.reshape(self.num_items, -1).isfinite().all(dim=1)  # (N,)
            if bad.any():
                raise ValueError(f"{name} must be finite, item {int(bad.nonzero()[0])} is not")


@runtime_checkable
class Agent(Protocol):
    """A policy that may learn. `slate_probs` is the policy: `act` samples from it.

    A learner may also have `experience()` and `load_experience(state)`: what it has lived through
    and not yet forgotten (replay, open rollout, pending feedback). `state_dict` is what serving
    needs; both together are what training needs to go on bit for bit. `scores(obs)` (B, N) lets it
    be frozen into a stochastic policy.
    """

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision: ...

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        """(B, K): probability of each item of `slate` (B, K) given those above it."""
        ...

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        """(B, N): probability of each item for the first slot."""
        ...

    def update(self, transition: Transition) -> dict[str, Tensor]:
        """Learn; scalars to log as tensors, {} when nothing was learnt."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def allowed_items(
    mask: Mask,
    batch: int,
    num_items: int,
    device: torch.device | str,
    *,
    may_be_empty: bool = False,
) -> Tensor:
    """Any form of mask to allowed (B, N) bool; a row may allow nothing only if told so."""
    if mask is None:
        return torch.ones(batch, num_items, dtype=torch.bool, device=device)
    if mask.dtype != torch.bool:
        mask = _allowed_from_excluded(mask, batch, num_items)  # (B, N)
    if mask.shape != (batch, num_items):
        raise ValueError(
            f"mask must be ({batch}, {num_items}) allowed items or ({batch}, M) excluded ids, "
            f"got {tuple(mask.shape)} {mask.dtype}"
        )
    some = mask.any(dim=1)  # (B,)
    if not may_be_empty and not some.all():
        row = int((~some).nonzero()[0])
        raise ValueError(f"mask allows no item in row {row}: at least one must stay allowed")
    return mask


def _allowed_from_excluded(mask: Tensor, batch: int, num_items: int) -> Tensor:
    """Excluded ids (B, M) with EMPTY to allowed (B, N)."""
    if mask.ndim != 2 or mask.shape[0] != batch or mask.is_floating_point():
        raise ValueError(
            f"mask must be None, ({batch}, {num_items}) bool or ({batch}, M) excluded item ids, "
            f"got {tuple(mask.shape)} {mask.dtype}"
        )
    outside = (mask < EMPTY) | (mask >= num_items)  # (B, M)
    if outside.any():
        row = int(outside.any(dim=1).nonzero()[0])
        raise ValueError(
            f"mask must exclude items in 0..{num_items - 1} or {EMPTY} (none), row {row} does not: "
            "excluded ids are catalogue rows, not outside ids"
        )
    room = torch.ones(batch, num_items + 1, dtype=torch.bool, device=mask.device)
    room.scatter_(
        1, torch.where(mask == EMPTY, num_items, mask).long(), False
    )  # the last takes EMPTY
    return room[:, :num_items]
