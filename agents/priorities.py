"""Prioritised replay (Schaul et al., 2016): surprising transitions are drawn more often.

Priorities are one flat tensor over the places of a `Replay`, drawn from by its running sum. That
reads every place at each draw, which up to half a million of them costs less than a tree.
"""

from typing import Any

import torch
from torch import Tensor

FLOOR = 1e-3  # added to every surprise, so that what was once well predicted is seen again


class Priorities:
    """Chances in proportion to surprise^alpha; what has not been learnt from yet comes first."""

    def __init__(self, alpha: float, *, device: torch.device | str = "cpu") -> None:
        self.alpha, self.device = alpha, torch.device(device)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.power = torch.zeros(0, device=self.device)  # (T * B,): surprise^alpha, 0 where empty
        self.filled = 0  # places that hold a transition: the first ones

    def add(self, new: slice, places: int) -> None:
        """Give newly written places of a ring of `places` the largest priority there is."""
        if len(self.power) != places:
            self.power = torch.zeros(places, device=self.device)
            self.filled = 0
        highest = self.power.max() if self.filled else torch.ones((), device=self.device)
        self.power[new] = highest
        self.filled = max(self.filled, new.stop)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Places (n,) in proportion to their priorities, with replacement."""
        if not self.filled:
            raise ValueError("cannot draw from an empty replay: add transitions first")
        # float64: a float32 sum of 200,000 terms has lost the small ones
        total = self.power[: self.filled].cumsum(dim=0, dtype=torch.float64)  # (M,)
        point = torch.rand(count, generator=generator, dtype=torch.float64, device=self.device)
        place = torch.searchsorted(total, point * total[-1], right=True)  # (n,)
        return place.clamp_(max=self.filled - 1)  # a product may round up to the total

    def weights(self, place: Tensor, beta: float) -> Tensor:
        """Importance weights (n,) of drawn places, (1 / (M P))^beta, the batch's largest being 1.

        M and the sum of priorities are the same for all and cancel.
        """
        power = self.power[place]  # (n,)
        return (power.min() / power) ** beta

    def update(self, place: Tensor, surprise: Tensor) -> None:
        """Set the priorities of places (n,) to what their error (n,) was just now."""
        self.power[place] = (surprise.detach().abs() + FLOOR) ** self.alpha

    def state_dict(self) -> dict[str, Any]:
        return {"power": self.power.clone(), "filled": self.filled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.power, self.filled = state["power"].to(self.device, copy=True), state["filled"]


def check_priority(priority: float, total: int | None) -> None:
    """Refuse prioritised replay where nothing says when its correction is to be whole."""
    if priority and total is None:
        raise ValueError(
            f"priority={priority} needs the env steps of the whole training, at whose end beta "
            "is 1: build the agent with AgentSpec(total_steps=...), or use priority=0"
        )
