"""The policy that knows nothing: every allowed item is as likely as any other."""

from typing import Any

import torch
from torch import Tensor

from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.explore import epsilon_greedy_probs, epsilon_greedy_slate, epsilon_greedy_slate_probs
from encoders.state import Observation


class Random:
    """Uniform over allowed items without replacement, whether it may explore or not."""

    learns = False

    def __init__(self, spec: AgentSpec) -> None:
        self.spec = spec
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)

    def scores(self, obs: Observation) -> Tensor:
        """No item (B, N) is better than another."""
        return torch.zeros(len(obs), self.spec.num_items, device=obs.profile.device)

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        allowed = self._allowed(obs, mask)
        return epsilon_greedy_slate(
            self.scores(obs), allowed, self.spec.slate_size, 1.0, self.generator
        )

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        return epsilon_greedy_slate_probs(self.scores(obs), self._allowed(obs, mask), slate, 1.0)

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        return epsilon_greedy_probs(self.scores(obs), self._allowed(obs, mask), 1.0)

    def update(self, transition: Transition) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "device": self.generator.device.type}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["device"] == self.generator.device.type:  # generators of devices do not translate
            self.generator.set_state(state["generator"].cpu())

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        return allowed_items(mask, len(obs), self.spec.num_items, obs.profile.device)
