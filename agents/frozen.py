"""A policy that learns no more and gives every allowed item a chance: it writes the log."""

from typing import Any, Protocol

import torch
from torch import Tensor

from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.explore import (
    epsilon_greedy_probs,
    epsilon_greedy_slate,
    epsilon_greedy_slate_probs,
    plackett_luce_probs,
    sample_slate,
    softmax_uniform,
    standardised,
)
from encoders.state import Observation


class Scorer(Protocol):
    """An agent that can say what it thinks of every item."""

    def scores(self, obs: Observation) -> Tensor:
        """(B, N), higher is better."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Frozen:
    """Softmax over an agent's standardised scores plus a uniform share, without replacement."""

    def __init__(
        self, agent: Scorer, spec: AgentSpec, *, temperature: float = 0.5, uniform: float = 0.1
    ) -> None:
        if not temperature > 0.0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if not 0.0 <= uniform <= 1.0:
            raise ValueError(f"uniform must be in [0, 1], got {uniform}")
        if not hasattr(agent, "scores"):
            raise ValueError(f"{type(agent).__name__} has no scores(obs): nothing to freeze")
        self.agent, self.spec = agent, spec
        self.temperature, self.uniform = temperature, uniform
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)

    def scores(self, obs: Observation) -> Tensor:
        """The agent's own (B, N)."""
        return self.agent.scores(obs)

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        if explore:
            return sample_slate(self._probs(obs, mask), self.spec.slate_size, self.generator)
        allowed = self._allowed(obs, mask)
        return epsilon_greedy_slate(
            self.scores(obs), allowed, self.spec.slate_size, 0.0, self.generator
        )

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        if explore:
            return plackett_luce_probs(self._probs(obs, mask), slate)
        allowed = self._allowed(obs, mask)
        return epsilon_greedy_slate_probs(self.scores(obs), allowed, slate, 0.0)

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        if explore:
            return self._probs(obs, mask).float()
        return epsilon_greedy_probs(self.scores(obs), self._allowed(obs, mask), 0.0)

    def update(self, transition: Transition) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "agent": self.agent.state_dict(),
            "temperature": self.temperature,
            "uniform": self.uniform,
            "generator": self.generator.get_state(),
            "device": self.generator.device.type,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.agent.load_state_dict(state["agent"])
        self.temperature, self.uniform = state["temperature"], state["uniform"]
        if state["device"] == self.generator.device.type:  # generators of devices do not translate
            self.generator.set_state(state["generator"].cpu())

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        return allowed_items(mask, len(obs), self.spec.num_items, obs.profile.device)

    def _probs(self, obs: Observation, mask: Mask) -> Tensor:
        """First-slot probabilities (B, N) float64: what a log divides by needs its tails."""
        allowed = self._allowed(obs, mask)
        level = standardised(self.scores(obs), allowed)
        return softmax_uniform(level, allowed, self.temperature, self.uniform)
