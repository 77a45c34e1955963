"""Rewards: functions of a `Response` to slot rewards (B, K), whose sum is the step's reward."""

from dataclasses import dataclass

import torch
from torch import Tensor

from simulators.base import Response


def units(response: Response) -> Tensor:
    """One for every item bought: the first behaviour."""
    return next(iter(response.chosen.values())).float()


def revenue(response: Response) -> Tensor:
    """Money, or minutes, of what was chosen."""
    return response.value


def incremental(response: Response) -> Tensor:
    """One for every item bought that would not have been bought unshown (Rubin, 1974)."""
    return (next(iter(response.chosen.values())) & ~response.organic).float()


@dataclass(frozen=True)
class Weighted:
    """A weighted sum of behaviours: `Weighted({"click": 0.1, "buy": 1.0})`."""

    weights: dict[str, float]

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("reward weights must name at least one behaviour, got none")

    def __call__(self, response: Response) -> Tensor:
        unknown = sorted(set(self.weights) - set(response.chosen))
        if unknown:
            raise ValueError(
                f"reward weights name {unknown}, but this simulator's behaviours are "
                f"{sorted(response.chosen)}: weigh some of those"
            )
        parts = [weight * response.chosen[name] for name, weight in self.weights.items()]
        return torch.stack(parts).sum(dim=0).float()  # (B, K)
