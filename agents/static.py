"""Policies that never learn from answers: the bars that a learner has to clear."""

from typing import Any

import torch
from torch import Tensor

from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.explore import (
    epsilon_greedy_probs,
    epsilon_greedy_slate,
    epsilon_greedy_slate_probs,
    seeded_ranks,
)
from encoders.state import EMPTY, Observation


class Popularity:
    """Show what most trips bought before the cut; equally popular items in an order drawn once."""

    def __init__(self, spec: AgentSpec) -> None:
        self.spec = spec
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        ranks = seeded_ranks(spec.popularity.to(spec.device), self.generator)
        self.ranks = ranks / spec.num_items  # (N,) in [0, 1)

    def scores(self, obs: Observation) -> Tensor:
        """Rank (B, N) by popularity, the same for everybody."""
        return self.ranks.expand(len(obs), -1)

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        allowed = _allowed(self.spec, obs, mask)
        return epsilon_greedy_slate(
            self.scores(obs), allowed, self.spec.slate_size, 0.0, self.generator
        )

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        allowed = _allowed(self.spec, obs, mask)
        return epsilon_greedy_slate_probs(self.scores(obs), allowed, slate, 0.0)

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        return epsilon_greedy_probs(self.scores(obs), _allowed(self.spec, obs, mask), 0.0)

    def update(self, transition: Transition) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": self.ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ranks = _loaded_ranks(self.ranks, state)


class BuyAgain:
    """Show what the household bought most often, of equals the latest first, then the popular."""

    def __init__(self, spec: AgentSpec) -> None:
        self.spec = spec
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        ranks = seeded_ranks(spec.popularity.to(spec.device), self.generator)
        self.ranks = ranks / spec.num_items  # (N,) in [0, 1)

    def scores(self, obs: Observation) -> Tensor:
        """Own items (B, N) by count, then recency, then popularity, from 1 up; others in [0, 1)."""
        known = obs.past != EMPTY  # (B, H)
        index = obs.past.clamp(min=0)
        order = self.ranks[index].argsort(dim=1)  # (B, H), least important key first
        for key in (-obs.past_age, obs.past_count.masked_fill(~known, -torch.inf)):
            order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
        place = torch.arange(order.shape[1], device=order.device, dtype=self.ranks.dtype)
        own = torch.zeros_like(obs.past_count).scatter(1, order, place.expand_as(obs.past_count))
        base = self.ranks.expand(len(obs), -1)  # (B, N)
        return base.scatter_reduce(1, index, (1.0 + own) * known, "amax")  # EMPTY adds a harmless 0

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        allowed = _allowed(self.spec, obs, mask)
        return epsilon_greedy_slate(
            self.scores(obs), allowed, self.spec.slate_size, 0.0, self.generator
        )

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        allowed = _allowed(self.spec, obs, mask)
        return epsilon_greedy_slate_probs(self.scores(obs), allowed, slate, 0.0)

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        return epsilon_greedy_probs(self.scores(obs), _allowed(self.spec, obs, mask), 0.0)

    def update(self, transition: Transition) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": self.ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ranks = _loaded_ranks(self.ranks, state)


def _allowed(spec: AgentSpec, obs: Observation, mask: Mask) -> Tensor:
    return allowed_items(mask, len(obs), spec.num_items, obs.profile.device)


def _loaded_ranks(mine: Tensor, state: dict[str, Any]) -> Tensor:
    """The saved ranks, if they are of as many items."""
    if state["ranks"].shape != mine.shape:
        raise ValueError(
            f"the checkpoint is of a catalogue of {len(state['ranks'])} items, this one has "
            f"{len(mine)}: "
            "load it with the catalogue it was made on"
        )
    return state["ranks"].to(mine.device)
