"""How a session changes its user: pure functions, each exactly the identity at parameter 0."""

import torch
from torch import Tensor

from encoders.state import EMPTY

SHORTEST_GAP = 0.25  # days: two trips of a household are never at the same moment


def satiate(theta: Tensor, category: Tensor, bought: Tensor, strength: float) -> Tensor:
    """Lower theta (B, K) of items in `category` (B, K) by `strength` per purchase of that category.

    `bought` (B, M) holds the categories bought on this trip, EMPTY-padded.
    """
    same = (category[:, :, None] == bought[:, None, :]) & (bought != EMPTY)[:, None, :]  # (B, K, M)
    return theta - strength * same.sum(dim=2)


def drift(taste: Tensor, bought: Tensor, rate: float) -> Tensor:
    """Turn taste (B, D) towards `bought` (B, D; zero rows where nothing was); its length stays."""
    if rate == 0:
        return taste
    length = taste.norm(dim=1, keepdim=True)  # (B, 1)
    target = torch.nn.functional.normalize(bought, dim=1)  # (B, D)
    moved = torch.nn.functional.normalize(taste + rate * length * target, dim=1) * length  # (B, D)
    return torch.where((bought != 0).any(dim=1, keepdim=True), moved, taste)


def leave_hazard(bought: Tensor, stop: Tensor, useless: Tensor, patience: float) -> Tensor:
    """Probability to leave after this slate, (B,).

    `stop` (B,) is the hazard of going home after a purchase, where something was `bought` (B,);
    a slate that was `useless` (B,) costs `patience`.
    """
    return 1.0 - (1.0 - stop * bought) * (1.0 - patience * useless)


def return_gap(uniform: Tensor, mean_days: Tensor) -> Tensor:
    """Days until the next trip, (B,): exponential, at least a quarter of a day; mean 0 gives 0."""
    gap = (-mean_days * uniform.log()).clamp(min=SHORTEST_GAP)  # (B,)
    return torch.where(mean_days > 0, gap, 0.0)
