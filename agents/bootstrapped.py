"""Bootstrapped exploration (Osband et al., 2016): heads that saw the data with other weights."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from agents.bandit_algebra import factor, level_of, sigma_of
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

WEIGHTS = ("poisson", "double")


def online_weights(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """How often each head sees each row, mean 1: Poisson(1), or twice or not at all."""
    even = torch.ones(shape, dtype=torch.float64, device=generator.device)
    if kind == "poisson":
        return torch.poisson(even, generator=generator)
    return 2.0 * torch.bernoulli(0.5 * even, generator=generator)


class Bootstrapped:
    """`heads` ridge regressions on phi(s, a), each on rows weighted by draws of its own.

    Every user is shown the best K items of one head, drawn evenly at each step: propensities are
    exact. A head starts from a random prior function `prior` posterior deviations wide (Osband et
    al., 2018): without it all heads agree where nothing was seen. `explore=False` shows the
    highest mean over heads.
    """

    def __init__(
        self,
        spec: AgentSpec,
        *,
        dim: int = 16,
        heads: int = 10,
        weights: str = "poisson",
        prior: float = 1.0,
        ridge: float = 1.0,
        forget: float = 1.0,
        pending: int = 20_000,
    ) -> None:
        positive(ridge=ridge, forget=forget)
        whole(1, dim=dim, heads=heads)
        if weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
        if forget > 1.0 or not prior >= 0.0:
            raise ValueError(
                f"forget must be in (0, 1] and prior at least 0, got forget={forget} and "
                f"prior={prior}"
            )
        self.spec, self.weights, self.prior = spec, weights, prior
        self.ridge, self.forget = ridge, forget
        self.features = PairVectors(spec, dim=dim)
        d, n = self.features.size, spec.num_items
        self.sums = {
            name: torch.zeros(shape, dtype=torch.float64, device=spec.device)
            for name, shape in {
                "gram": (heads, d, d), "paid": (heads, d), "seen": (heads, d), "count": (n,),
                "total": (n,), "square": (),
            }.items()
        }  # fmt: skip
        self.pending = Pending(pending, spec.device)
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.signature = catalog_signature(spec.item_vectors)
        first = seeded(spec.seed, 0, spec.device)
        self.start = torch.randn(heads, d, generator=first, dtype=torch.float64,
                                 device=spec.device)  # fmt: skip
        speck = torch.randn(heads, n, generator=first, device=spec.device)
        self.speck = SPECK * speck  # (M, N): equal items are not told apart by their id
        self.post: dict[str, Tensor] = {}
        self.solve()

    def solve(self) -> None:
        """The weights of all heads (M, d) after all that was added so far."""
        s = self.sums
        level = level_of(s["count"], s["total"])
        sigma = self.post.get("sigma", torch.ones_like(level))
        paid = s["paid"] - level * s["seen"]  # (M, d)
        origin = self.prior * sigma / self.ridge**0.5 * self.start  # (M, d)
        root = factor(s["gram"], self.ridge)  # (M, d, d)
        right = torch.stack([paid, paid + self.ridge * origin], dim=2)  # (M, d, 2)
        plain, theta = torch.cholesky_solve(right, root).unbind(dim=2)
        explained = (plain * paid).sum(dim=1).mean()
        sigma = sigma_of(s, level, explained, None)
        self.post = {"theta": theta, "level": level, "sigma": sigma}

    def scores(self, obs: Observation) -> Tensor:
        """Expected reward (B, N) of showing each item now, the mean over heads."""
        mean = self.post["theta"].mean(dim=0, keepdim=True)  # (1, d)
        base = self.post["level"].expand(1, self.spec.num_items)
        return pair_scores(self.features.factors(obs), mean, self.features.apart, base).squeeze(1)

    def slates(self, obs: Observation, allowed: Tensor) -> Tensor:
        """The best slates (B, M, K) of each head."""
        base = (self.post["sigma"] * self.speck).float()
        heads = SharedDraws(self.post["theta"], base, self.features.apart)
        sampled = partial(heads.scores, self.features.factors(obs))
        return mixture_slates(sampled, len(base), allowed, self.spec.slate_size)

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
        x = self.features.of(transition.obs, slate)
        return self._learn(x, slate, transition.slot_reward)

    def expect(self, obs: Observation, decision: Decision) -> Tensor:
        """Ids (B,) under which `feedback` will learn what came of the decisions."""
        x = self.features.of(obs, decision.slate)
        return self.pending.add({"x": x, "slate": decision.slate})

    def feedback(self, ids: Tensor, slot_reward: Tensor) -> dict[str, Tensor]:
        """Learn rewards (n, K) of earlier decisions (n,), in any order."""
        slot_reward = check_slots(slot_reward, ids, self.spec.slate_size)
        rows, here = self.pending.take(ids)
        return self._learn(rows["x"], rows["slate"], slot_reward[here])

    def state_dict(self) -> dict[str, Any]:
        return {
            "sums": {name: value.clone() for name, value in self.sums.items()},
            "post": self.post,
            "start": self.start,
            "speck": self.speck,
            "generator": generator_state(self.generator),
            "signature": self.signature,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_catalog(self.signature, state["signature"])
        if state["start"].shape != self.start.shape:
            raise ValueError(
                f"the checkpoint has heads and weights {tuple(state['start'].shape)}, this agent "
                f"{tuple(self.start.shape)}: build the agent with the heads and dim it was "
                "trained with"
            )
        device = self.start.device
        self.sums, self.post = (
            {n: v.to(device, copy=True) for n, v in state[part].items()}
            for part in ("sums", "post")
        )
        self.start, self.speck = state["start"].to(device), state["speck"].to(device)
        restore_generator(self.generator, state["generator"])
        self.pending.clear()

    def experience(self) -> dict[str, Any]:
        """The decisions that wait for feedback."""
        return self.pending.state_dict()

    def load_experience(self, state: dict[str, Any]) -> None:
        self.pending.load_state_dict(state)

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        return allowed_items(mask, len(obs), self.spec.num_items, obs.profile.device)

    def _learn(self, x: Tensor, slate: Tensor, reward: Tensor) -> dict[str, Tensor]:
        """Learn rewards (n, K) of items (n, K) with vectors (n, K, d)."""
        if not len(slate):
            return {}
        real = (slate != EMPTY).flatten().double()  # (m,)
        x, r = x.flatten(0, 1).double() * real[:, None], reward.flatten().double() * real
        item, s, post = slate.flatten().clamp(min=0), self.sums, self.post
        guess = x @ post["theta"].mean(dim=0) + post["level"] * real  # (m,)
        if self.forget < 1.0:
            for value in s.values():
                value.mul_(self.forget)
        weight = online_weights(self.weights, (len(self.start), len(x)), self.generator)  # (M, m)
        s["gram"] += (weight[:, :, None] * x).transpose(1, 2) @ x
        s["paid"] += (weight * r) @ x
        s["seen"] += weight @ x
        s["count"].index_add_(0, item, real)
        s["total"].index_add_(0, item, r)
        s["square"] += r @ r
        self.solve()
        loss = (guess - r).square().sum() / real.sum().clamp(min=1.0)
        return {"train/loss": loss.float(), "bandit/sigma": self.post["sigma"].float()}
