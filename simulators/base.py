"""The types of a user simulator: what it knows, what it is asked, what it answers."""

import hashlib
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from simulators.draws import Draws
from sources.logs import Logs

UserState = dict[str, Tensor]  # leading B; a plain value the env may mask, merge, move or save


@dataclass(frozen=True)
class Catalog:
    """N products. Every statistic is computed from events before `as_of`."""

    ids: np.ndarray  # (N,) outside ids; everywhere else an item is its row here
    texts: list[str]  # (N,) "" where the item has none
    vectors: Tensor  # (N, D) float32: fused, centred, unit length
    category: Tensor  # (N,) int64
    price: Tensor  # (N,) float32 money, median paid; NaN where never sold with a price
    popularity: Tensor  # (N,) float32: share of trips before `as_of` that bought it
    as_of: float  # days since 1970-01-01
    category_names: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """Tell catalogues apart: other items, or the same under other vectors."""
        digest = hashlib.sha256("\n".join(map(str, self.ids)).encode())
        digest.update(self.vectors.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def to(self, device: torch.device | str) -> "Catalog":
        tensors = ("vectors", "category", "price", "popularity")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


@dataclass(frozen=True)
class UserTable:
    """U starting points: a user at a moment and the past before it. A user may have several."""

    ids: np.ndarray  # (U,) outside user ids: the cluster of every interval
    profile: Tensor  # (U, P) float32
    past: Tensor  # (U, H) int64, EMPTY-padded
    past_count: Tensor  # (U, H) float32
    past_age: Tensor  # (U, H) float32 days before `start`
    start: Tensor  # (U,) float64 days since 1970-01-01

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "UserTable":
        tensors = ("profile", "past", "past_count", "past_age", "start")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


@dataclass(frozen=True)
class Response:
    """What B users did with a slate of K. An empty slot is never chosen."""

    chosen: dict[str, Tensor]  # behaviour -> (B, K) bool
    organic: Tensor  # (B, K) bool: would have bought it unshown, on the same draw
    value: Tensor  # (B, K) float32 money or minutes, 0 where not chosen
    left: Tensor  # (B,) bool
    elapsed: Tensor  # (B,) float32 days gone by before the next step; 0 within a trip
    uncertainty: Tensor  # (B, K) float32: how unsure the simulator is of its own probability
    items: Tensor | None = None  # (B, K) what was shown; the environment writes it in, for rewards


@runtime_checkable
class UserSimulator(Protocol):
    """Users who answer slates. It owns no state: `UserState` is handed in and out."""

    catalog: Catalog
    behaviours: tuple[str, ...]  # F names, the order of `Observation.feedback`
    users: UserTable

    def start(self, users: Tensor, draws: Draws) -> UserState:
        """Rows of `users` (B,) to the state (leading B) of B users who enter."""
        ...

    def respond(self, state: UserState, slate: Tensor, draws: Draws) -> tuple[Response, UserState]:
        """Answer a slate (B, K) of distinct items or EMPTY; the state handed in is not changed."""
        ...

    def relevance(self, state: UserState) -> Tensor:
        """(B, N) true probability that each item, shown alone now, is bought: for oracles only."""
        ...


@dataclass(frozen=True)
class SimSpec:
    """What a simulator is made from: `instantiate(cfg.env.simulator, spec)` is the only wiring."""

    logs: Logs | None  # None for synthetic worlds
    catalog: Catalog | None
    device: str = "cpu"
    seed: int = 0
    users: UserTable | None = None  # whom to serve; None: the simulator says
    bootstrap: bool = False  # fit to a sample of the log's households, drawn with `seed`
