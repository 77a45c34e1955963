"""Linear Thompson sampling (Agrawal and Goyal, 2013): show what a draw of the posterior likes."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from agents.bandit_slates import (
    mixture_probs,
    mixture_slate,
    mixture_slate_probs,
    mixture_slates,
    seeded,
)
from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.checks import check_finite, positive, whole
from agents.explore import epsilon_greedy_probs, epsilon_greedy_slate, epsilon_greedy_slate_probs
from agents.feedback import Pending, check_slots
from agents.ridge import Draws, learn_logged, ridge_of
from agents.saving import (
    catalog_signature,
    check_catalog,
    generator_state,
    restore_generator,
)
from encoders.state import Observation


class LinTS:
    """Each user is shown the best K items of one of `samples` posterior draws.

    The draws stay as they are between two solves, so propensities are exact: the share of draws
    that show the item there, given those above. Every update draws anew. For Thompson sampling
    with endless draws they are estimates, standard error sqrt(p (1 - p) / samples), and nothing
    rarer than 1 / samples is seen. `scale` widens the posterior; `explore=False` shows the
    highest means.
    """

    def __init__(
        self,
        spec: AgentSpec,
        *,
        features: str = "shared",
        dim: int = 16,
        scale: float = 1.0,
        samples: int = 32,
        ridge: float = 1.0,
        forget: float = 1.0,
        refresh: int = 1,
        noise: float | None = None,
        pending: int = 20_000,
    ) -> None:
        positive(scale=scale)
        whole(1, samples=samples)
        self.spec, self.scale, self.samples = spec, scale, samples
        self.model = ridge_of(
            spec, features=features, dim=dim, ridge=ridge, forget=forget, refresh=refresh,
            noise=noise,
        )  # fmt: skip
        self.pending = Pending(pending, spec.device)
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.signature = catalog_signature(spec.item_vectors)
        self.seed = spec.seed  # of the draws
        self.drawn: tuple[int, Draws] | None = None  # and after how many updates they were made

    def scores(self, obs: Observation) -> Tensor:
        """Expected reward (B, N) of showing each item now."""
        return self.model.mean(self.model.view(obs))

    def slates(self, obs: Observation, allowed: Tensor) -> Tensor:
        """The best slates (B, M, K) of each draw."""
        view, draws = self.model.view(obs), self._draws()
        sampled = partial(draws.scores, view)
        return mixture_slates(sampled, self.samples, allowed, self.spec.slate_size)

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        allowed = self._allowed(obs, mask)
        if explore:
            return mixture_slate(self.slates(obs, allowed), self.generator)
        return epsilon_greedy_slate(
            self.scores(obs), allowed, self.spec.slate_size, 0.0, self.generator
        )

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        allowed = self._allowed(obs, mask)
        if explore:
            return mixture_slate_probs(self.slates(obs, allowed), slate)
        return epsilon_greedy_slate_probs(self.scores(obs), allowed, slate, 0.0)

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        allowed = self._allowed(obs, mask)
        if explore:
            return mixture_probs(self.slates(obs, allowed), self.spec.num_items)
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
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_catalog(self.signature, state["signature"])
        self.model.load_state_dict(state["model"])
        restore_generator(self.generator, state["generator"])
        self.pending.clear()
        self.seed, self.drawn = state["seed"], None

    def experience(self) -> dict[str, Any]:
        """The decisions that wait for feedback."""
        return self.pending.state_dict()

    def load_experience(self, state: dict[str, Any]) -> None:
        self.pending.load_state_dict(state)

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        return allowed_items(mask, len(obs), self.spec.num_items, obs.profile.device)

    def _draws(self) -> Draws:
        """The posterior draws of now, a function of the seed and of how often it was updated."""
        if self.drawn is None or self.drawn[0] != self.model.updates:
            generator = seeded(self.seed, self.model.updates, self.spec.device)
            draws = self.model.draw(self.samples, self.scale, generator)
            self.drawn = (self.model.updates, draws)
        return self.drawn[1]
