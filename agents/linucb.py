"""LinUCB (Li et al., 2010): show what could be best, mean plus `alpha` standard deviations."""

from typing import Any

import torch
from torch import Tensor

from agents.bandit_slates import tied_probs, tied_slate, tied_slate_probs
from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.checks import check_finite
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


def optimistic(mean: Tensor, width: Tensor, alpha: float) -> Tensor:
    """Means and standard deviations (B, N) to upper bounds (B, N)."""
    return torch.add(mean, width, alpha=alpha)


class LinUCB:
    """Ridge regression of slot rewards; the K highest upper bounds, equal ones drawn evenly.

    Propensities are exact: 1, or 1 / ties. `alpha` is in standard deviations of what is expected,
    so it needs no tuning to the unit of the reward; `noise` fixes the standard deviation of one
    reward instead of estimating it. `explore=False` shows the highest means.
    """

    def __init__(
        self,
        spec: AgentSpec,
        *,
        features: str = "shared",
        dim: int = 16,
        alpha: float = 1.0,
        ridge: float = 1.0,
        forget: float = 1.0,
        refresh: int = 1,
        noise: float | None = None,
        pending: int = 20_000,
    ) -> None:
        if not alpha >= 0.0:
            raise ValueError(f"alpha must be at least 0, got {alpha}")
        self.spec, self.alpha = spec, alpha
        self.model = ridge_of(
            spec, features=features, dim=dim, ridge=ridge, forget=forget, refresh=refresh,
            noise=noise,
        )  # fmt: skip
        self.pending = Pending(pending, spec.device)
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.signature = catalog_signature(spec.item_vectors)

    def scores(self, obs: Observation) -> Tensor:
        """Expected reward (B, N) of showing each item now."""
        return self.model.mean(self.model.view(obs))

    def bounds(self, obs: Observation) -> Tensor:
        """What each item (B, N) could be worth."""
        view = self.model.view(obs)
        return optimistic(self.model.mean(view), self.model.width(view), self.alpha)

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        allowed, k = self._allowed(obs, mask), self.spec.slate_size
        if explore:
            return tied_slate(self.bounds(obs), allowed, k, 0.0, self.generator)
        return epsilon_greedy_slate(self.scores(obs), allowed, k, 0.0, self.generator)

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        allowed = self._allowed(obs, mask)
        if explore:
            return tied_slate_probs(self.bounds(obs), allowed, slate, 0.0)
        return epsilon_greedy_slate_probs(self.scores(obs), allowed, slate, 0.0)

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        allowed = self._allowed(obs, mask)
        if explore:
            return tied_probs(self.bounds(obs), allowed, 0.0)
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
