"""Logs of decisions whose propensities are known, as arrays: what off-policy evaluation reads."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class BanditLog:
    """n logged decisions among A actions."""

    name: str
    action: np.ndarray  # (n,) int64
    reward: np.ndarray  # (n,) float64
    propensity: np.ndarray  # (n,) of the logged action
    uniform: np.ndarray  # (n,) what a policy that prefers nothing says of the logged action
    context: np.ndarray  # (n, d) float64
    context_names: tuple[str, ...]
    num_actions: int
    item_features: np.ndarray  # (A, f) float64
    item_feature_names: tuple[str, ...]
    position: np.ndarray | None = None  # (n,) slot from 0, a decision of its own
    time: np.ndarray | None = None  # (n,) datetime64[ns], UTC
    cluster: np.ndarray | None = None  # (n,) user
    notes: list[str] = field(default_factory=list)


def one_hot(values: Sequence[str], categories: Sequence[str]) -> np.ndarray:
    """Values (n,) to (n, C): 1 at their category."""
    place = {category: i for i, category in enumerate(categories)}
    out = np.zeros((len(values), len(categories)))
    out[np.arange(len(values)), [place[value] for value in values]] = 1.0
    return out
