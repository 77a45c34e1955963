"""Epsilon-greedy on a ridge regression of rewards: the bandit that all others have to beat."""

from typing import Any

import torch
from torch import Tensor

from agents.bandit_slates import tied_probs, tied_slate, tied_slate_probs
from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.checks import check_finite, share
from agents.explore import epsilon_greedy_probs, epsilon_greedy_slate, epsilon_greedy_slate_probs
from agents.feedback import Pending, check_slots
from agents.ridge import learn_logged, ridge_of
from agents.saving import (
    catalog_signature,
    check_catalog,
    generator_state,
    restore_generator,
)
from encoders.state import Observation


class EpsilonGreedy:
    """The highest mean, or with `epsilon` any allowed item: a coin for each user and slot.

    Propensities are exact; items of equal mean are drawn evenly. `explore=False` shows the highest
    means.
    """

    def __init__(
        self,
        spec: AgentSpec,
        *,
        features: str = "shared",
        dim: int = 16,
        epsilon: float = 0.1,
        ridge: float = 1.0,
        forget: float = 1.0,
        refresh: int = 1,
        pending: int = 20_000,
    ) -> None:
        share(epsilon=epsilon)
        self.spec, self.epsilon = spec, epsilon
        self.model = ridge_of(
            spec, features=features, dim=dim, ridge=ridge, forget=forget, refresh=refresh,
            noise=None,
        )  # fmt: skip
        self.pending = Pending(pending, spec.device)
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.signature = catalog_signature(spec.item_vectors)

    def scores(self, obs: Observation) -> Tensor:
        """Expected reward (B, N) of showing each item now."""
        return self.model.mean(self.model.view(obs))

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        allowed, k = self._allowed(obs, mask), self.spec.slate_size
        if explore:
            return tied_slate(self.scores(obs), allowed, k, self.epsilon, self.generator)
        return epsilon_greedy_slate(self.scores(obs), allowed, k, 0.0, self.generator)

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        allowed = self._allowed(obs, mask)
        if explore:
            return tied_slate_probs(self.scores(obs), allowed, slate, self.epsilon)
        return epsilon_greedy_slate_probs(self.scores(obs), allowed, slate, 0.0)

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        allowed = self._allowed(obs, mask)
        if explore:
            return tied_probs(self.scores(obs), allowed, self.epsilon)
        return epsilon_greedy_probs(self.scores(obs), allowed, 0.0)

    def update(self, transition: Transition) -> dict[str, Tensor]:
        """Learn from rewards that come at once."""
        check_finite(transition)
        slate = transition.decision.slate
        x = self.model.vectors(transition.obs, slate)
        return learn_logged(self.model, x, slate, transition.slot_reward)

    def expect(self, obs: Observation, decision: Decision) -> Tensor:
        """Ids (B,) under which `feedback` will learn what came of the decisions."""
        x = self.model.vectors(obs, decision.slate)
        return self.pending.add({"x": x, "slate": decision.slate})

    def feedback(self, ids: Tensor, slot_reward: Tensor) -> dict[str, Tensor]:
        """Learn rewards (n, K) of earlier decisions (n,), in any order."""
        slot_reward = check_slots(slot_reward, ids, self.spec.slate_size)
        rows, here = self.pending.take(ids)
        return learn_logged(self.model, rows["x"], rows["slate"], slot_reward[here])

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "generator": generator_state(self.generator),
            "signature": self.signature,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_catalog(self.signature, state["signature"])
        self.model.load_state_dict(state["model"])
        restore_generator(self.generator, state["generator"])
        self.pending.clear()

    def experience(self) -> dict[str, Any]:
        """The decisions that wait for feedback."""
        return self.pending.state_dict()

    def load_experience(self, state: dict[str, Any]) -> None:
        self.pending.load_state_dict(state)

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        return allowed_items(mask, len(obs), self.spec.num_items, obs.profile.device)
