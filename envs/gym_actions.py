"""Actions of any Gymnasium environment as slates of numbered items."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

FIT = "Discrete, or MultiDiscrete as a slate (equal sizes) or of few combinations"


def choices(space: spaces.Space[Any]) -> tuple[np.ndarray, np.ndarray]:
    """First value and number of values, int64 (M,) each, of Discrete or flat MultiDiscrete."""
    if isinstance(space, spaces.Discrete):
        return np.array([space.start], dtype=np.int64), np.array([space.n], dtype=np.int64)
    assert isinstance(space, spaces.MultiDiscrete)
    return np.ravel(space.start).astype(np.int64), np.ravel(space.nvec).astype(np.int64)


@dataclass(frozen=True)
class Actions:
    """How a slate of K among N items becomes an action of the environment."""

    space: spaces.Space[Any]
    num_items: int  # N
    slate_size: int  # K
    joint: bool  # an item is a combination of M choices
    start: np.ndarray  # (M,) int64
    count: np.ndarray  # (M,) int64

    def native(self, slate: np.ndarray) -> list[Any]:
        """Slates (R, K) to R actions as the environment takes them."""
        if isinstance(self.space, spaces.Discrete):
            return [int(item) for item in slate[:, 0] + self.start[0]]
        chosen = (
            np.stack(np.unravel_index(slate[:, 0], self.count), axis=1) if self.joint else slate
        )
        shaped = (chosen + self.start).astype(self.space.dtype)  # (R, M)
        return list(shaped.reshape(len(slate), *(self.space.shape or ())))

    def constant(self, value: int) -> Any:
        """An action that says `value` in every place."""
        if isinstance(self.space, spaces.Discrete):
            return value
        return np.full(self.space.shape or (), value, dtype=self.space.dtype)

    def allowed(self, mask: Any, where: str) -> np.ndarray:
        """A mask of the environment's own form to allowed items (N,) bool."""
        flat = np.ravel(np.asarray(mask)).astype(bool)
        if len(flat) == self.num_items:
            return flat
        if len(flat) == self.count.sum():  # choice by choice, as maskable learners want it
            each = np.split(flat, self.count.cumsum()[:-1])
            if self.joint:
                room = each[0]
                for choice in each[1:]:
                    room = np.logical_and.outer(room, choice)
                return room.reshape(-1)
            if all(np.array_equal(each[0], other) for other in each):
                return each[0]
            raise ValueError(
                f"{where}: the action mask differs between the slots of a slate: only one mask of "
                f"{self.num_items} items for all slots can be kept"
            )
        raise ValueError(
            f"{where}: the action mask must have {self.num_items} entries, one for each action, "
            f"got {len(flat)}"
        )


def read_actions(
    space: spaces.Space[Any],
    env_id: str,
    *,
    slate: bool | str,
    features: bool,
    max_actions: int,
) -> Actions:
    """Choose what is an item: an action, a slot's choice (slate), or a combination of choices."""
    if slate not in (True, False, "auto"):
        raise ValueError(f"slate must be auto, true or false, got {slate!r}")
    if not isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        raise ValueError(
            f"{env_id}: actions must be {FIT}; got {space}: agents here choose among items; wrap "
            "the environment so that its actions are numbered"
        )
    start, count = choices(space)  # (M,) each
    if isinstance(space, spaces.Discrete):
        if slate is True:
            raise ValueError(f"{env_id}: slate=true needs MultiDiscrete actions, got {space}")
        return Actions(space, int(count[0]), 1, False, start, count)
    size, n = len(count), int(count[0])
    could = bool((count == n).all()) and size <= n
    combinations = math.prod(int(c) for c in count)
    if slate is True and not could:
        raise ValueError(
            f"{env_id}: slate=true needs MultiDiscrete of equal sizes, no smaller than the slate "
            f"of distinct items, got {space}"
        )
    if slate is True or (slate == "auto" and could and (features or combinations > max_actions)):
        return Actions(space, n, size, False, start, count)
    if combinations > max_actions:
        raise ValueError(
            f"{env_id}: {space} has {combinations} combinations, more than "
            f"max_actions={max_actions}, and is no slate (equal sizes, distinct items): actions "
            f"must be {FIT}"
        )
    return Actions(space, combinations, 1, True, start, count)
