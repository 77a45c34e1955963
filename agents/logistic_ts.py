"""Logistic Thompson sampling with a Laplace approximation (Chapelle and Li, 2011)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from agents.bandit_features import PairVectors, pair_scores
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
from agents.ridge import SPECK, SharedDraws
from agents.saving import (
    catalog_signature,
    check_catalog,
    generator_state,
    restore_generator,
)
from encoders.state import EMPTY, Observation

NEWTON = 8  # steps; from the last posterior a batch needs three or four
FAR = 4.0  # most that a logit moves in one step


def laplace(
    mode: Tensor, precision: Tensor, x: Tensor, y: Tensor, real: Tensor
) -> tuple[Tensor, Tensor]:
    """Normal posterior of logistic weights: mode (d,) and precision (d, d) after rows (m, d).

    Newton's method on the log posterior; `real` (m,) is 0 for rows that say nothing.
    """
    best = mode
    for _ in range(NEWTON):
        p = (x @ best).sigmoid()  # (m,)
        slope = precision @ (best - mode) + x.T @ ((p - y) * real)  # (d,)
        bend = precision + (x * (p * (1.0 - p) * real)[:, None]).T @ x  # (d, d)
        step = torch.cholesky_solve(slope[:, None], torch.linalg.cholesky(bend)).squeeze(1)
        far = (x @ step).abs().amax().clamp(min=FAR)  # logits leap no further: Newton overshoots
        best = best - step * (FAR / far)
    p = (x @ best).sigmoid()
    return best, precision + (x * (p * (1.0 - p) * real)[:, None]).T @ x


class LogisticTS:
    """What users choose as a logistic regression on phi(s, a), learnt batch after batch.

    Each user is shown the best K items of one of `samples` draws of the normal posterior; the
    draws stay as they are between two updates, so propensities are exact for the policy played
    (standard error sqrt(p (1 - p) / samples) for endless draws). Learns from `chosen`, yes or no,
    not from amounts; `feedback` takes anything above 0 as yes. `explore=False` shows the most
    likely items.
    """

    def __init__(
        self,
        spec: AgentSpec,
        *,
        dim: int = 16,
        scale: float = 1.0,
        samples: int = 32,
        ridge: float = 1.0,
        forget: float = 1.0,
        pending: int = 20_000,
    ) -> None:
        positive(scale=scale, ridge=ridge, forget=forget)
        whole(1, dim=dim, samples=samples)
        if forget > 1.0:
            raise ValueError(f"forget must be in (0, 1], got {forget}")
        self.spec, self.scale, self.samples = spec, scale, samples
        self.ridge, self.forget = ridge, forget
        self.features = PairVectors(spec, dim=dim)
        d = self.features.size
        self.mode = torch.zeros(d, dtype=torch.float64, device=spec.device)
        self.precision = ridge * torch.eye(d, dtype=torch.float64, device=spec.device)
        self.pending = Pending(pending, spec.device)
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.signature = catalog_signature(spec.item_vectors)
        self.seed, self.updates = spec.seed, 0  # the draws are a function of both
        self.drawn: SharedDraws | None = None

    def scores(self, obs: Observation) -> Tensor:
        """Chance (B, N) that each item is chosen if it is shown now."""
        none = torch.zeros(1, self.spec.num_items, device=obs.profile.device)
        view, q = self.features.factors(obs), self.features.apart
        return pair_scores(view, self.mode[None], q, none).squeeze(1).sigmoid_()

    def slates(self, obs: Observation, allowed: Tensor) -> Tensor:
        """The best slates (B, M, K) of each draw."""
        sampled = partial(self._draws().scores, self.features.factors(obs))
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
        """Learn from choices that come at once."""
        check_finite(transition)
        slate = transition.decision.slate
        return self._learn(self.features.of(transition.obs, slate), slate, transition.chosen)

    def expect(self, obs: Observation, decision: Decision) -> Tensor:
        """Ids (B,) under which `feedback` will learn what came of the decisions."""
        x = self.features.of(obs, decision.slate)
        return self.pending.add({"x": x, "slate": decision.slate})

    def feedback(self, ids: Tensor, slot_reward: Tensor) -> dict[str, Tensor]:
        """Learn choices (n, K), above 0 or not, of earlier decisions (n,), in any order."""
        slot_reward = check_slots(slot_reward, ids, self.spec.slate_size)
        rows, here = self.pending.take(ids)
        return self._learn(rows["x"], rows["slate"], slot_reward[here] > 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "precision": self.precision,
            "updates": self.updates,
            "generator": generator_state(self.generator),
            "signature": self.signature,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_catalog(self.signature, state["signature"])
        if state["mode"].shape != self.mode.shape:
            raise ValueError(
                f"the checkpoint has {len(state['mode'])} weights, this agent {len(self.mode)}: "
                "build the agent with the dim it was trained with"
            )
        self.mode = state["mode"].to(self.mode, copy=True)
        self.precision = state["precision"].to(self.mode, copy=True)
        self.updates = state["updates"]
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

    def _learn(self, x: Tensor, slate: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        """Learn choices (n, K) of items (n, K) with vectors (n, K, d)."""
        if not len(slate):
            return {}
        real = (slate != EMPTY).flatten().double()  # (m,)
        x, y = x.flatten(0, 1).double(), chosen.flatten().double()
        if self.forget < 1.0:  # towards the prior, never below it
            self.precision = self.forget * self.precision
            self.precision.diagonal().add_((1.0 - self.forget) * self.ridge)
        loss = binary_cross_entropy_with_logits(x @ self.mode, y, weight=real, reduction="sum")
        self.mode, self.precision = laplace(self.mode, self.precision, x, y, real)
        self.updates += 1
        self.drawn = None
        return {"train/loss": (loss / real.sum().clamp(min=1.0)).float()}

    def _draws(self) -> SharedDraws:
        """Draws of the posterior of now."""
        if self.drawn is None:
            g = seeded(self.seed, self.updates, self.spec.device)
            shape = (self.samples, len(self.mode))
            noise = torch.randn(*shape, generator=g, dtype=torch.float64, device=g.device)
            root = torch.linalg.cholesky(self.precision)
            step = torch.linalg.solve_triangular(root.T, noise.T, upper=True).T  # (M, d)
            speck = SPECK * torch.randn(
                self.samples, self.spec.num_items, generator=g, device=g.device
            )  # equal items are not told apart by their id
            theta = self.mode + self.scale * step
            self.drawn = SharedDraws(theta, speck, self.features.apart)
        return self.drawn
