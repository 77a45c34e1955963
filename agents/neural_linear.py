"""Neural-linear bandit (Riquelme et al., 2018): learnt features, a Bayesian linear last layer.

A two-tower trunk learns to foresee rewards from a ring of the latest ones. Every `refit` updates a
copy of it takes over serving, and the normal posterior of its last layer is worked out anew from
the whole ring; in between the served features stand still, so the posterior stays exact in them.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from agents.bandit_algebra import factor
from agents.bandit_features import PairVectors
from agents.bandit_slates import (
    mixture_probs,
    mixture_slate,
    mixture_slate_probs,
    mixture_slates,
    seeded,
)
from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.checks import check_finite, check_loss, positive, whole
from agents.explore import epsilon_greedy_probs, epsilon_greedy_slate, epsilon_greedy_slate_probs
from agents.feedback import Pending, check_slots
from agents.nets import body_of, linear, tower_of
from agents.ridge import SPECK
from agents.saving import (
    catalog_signature,
    check_catalog,
    generator_state,
    load_net,
    restore_generator,
)
from encoders.state import EMPTY, Observation

MEMORY = 8  # learnt features of what a user did with the very item
WIDEST = 64  # features of the last layer


class Trunk(nn.Module):
    """State (n, U), item features (n, R + 1), traces (n, T) to features z (n, W + MEMORY + 1)."""

    def __init__(self, sizes: tuple[int, int, int], wide: int, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        state, item, trace = sizes
        self.body = body_of(state, width, generator)
        self.user = linear(width, wide, generator)
        self.item = tower_of(item, wide, generator)
        self.bend = linear(trace, 2 * MEMORY, generator)
        self.recall = linear(2 * MEMORY, MEMORY, generator)
        self.last = linear(wide + MEMORY + 1, 1, generator, gain=0.5)  # bias included: z ends in 1

    def users(self, state: Tensor) -> Tensor:
        """(n, U) to (n, W): 1 and what is like nothing but the user."""
        return self.user(self.body(state))

    def traced(self, traces: Tensor) -> Tensor:
        """(..., T) to (..., MEMORY), 0 where nothing is known."""
        known = (traces != 0.0).any(dim=-1, keepdim=True)
        return self.recall(torch.relu(self.bend(traces))) * known

    def forward(self, state: Tensor, item: Tensor, traces: Tensor) -> Tensor:
        both = self.users(state) * self.item(item)  # (n, W)
        one = torch.ones_like(both[:, :1])
        return torch.cat([both, self.traced(traces), one], dim=1)


def last_layer(gram: Tensor, paid: Tensor, prior: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weights (d,) and root (d, d) of their precision from z'z and z'r, around prior weights."""
    root = factor(gram, ridge)
    return torch.cholesky_solve((paid + ridge * prior)[:, None], root).squeeze(1), root


class NeuralLinear:
    """Thompson sampling of the last layer: each user is shown the best of one of `samples` draws.

    The draws stay as they are between two updates, so propensities are exact for the policy played
    (standard error sqrt(p (1 - p) / samples) for endless draws). Learns from feedback that comes
    late as if it came now. `explore=False` shows the highest means.
    """

    def __init__(
        self,
        spec: AgentSpec,
        *,
        lr: float = 3e-3,
        width: int = 128,
        wide: int = 48,
        scale: float = 1.0,
        samples: int = 32,
        ridge: float = 1.0,
        batch_size: int = 256,
        capacity: int = 20_000,
        replay_ratio: float = 2.0,
        refit: int = 8,
        shrink: float = 0.01,
        pending: int = 20_000,
    ) -> None:
        positive(lr=lr, scale=scale, ridge=ridge, replay_ratio=replay_ratio)
        whole(1, width=width, wide=wide, samples=samples, batch_size=batch_size, refit=refit)
        whole(batch_size, capacity=capacity)
        if wide + MEMORY + 1 > WIDEST or not shrink >= 0.0:
            raise ValueError(
                f"wide must be at most {WIDEST - MEMORY - 1} and shrink at least 0, got "
                f"wide={wide} and shrink={shrink}"
            )
        self.spec, self.scale, self.samples, self.ridge = spec, scale, samples, ridge
        self.batch_size, self.capacity, self.refit = batch_size, capacity, refit
        self.replay_ratio, self.wide = replay_ratio, wide
        self.features = PairVectors(spec, dim=1)
        self.table = self.features.read.items  # (N + 1, R + 1)
        sizes = (self.features.read.size, self.table.shape[1], self.features.traced)
        self.net = Trunk(sizes, wide, width, spec.seed).to(spec.device)
        self.served = copy.deepcopy(self.net).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=lr, weight_decay=shrink)
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.signature = catalog_signature(spec.item_vectors)
        self.pending = Pending(pending, spec.device)
        self.ring: dict[str, Tensor] = {}
        self.added, self.updates, self.budget, self.seed = 0, 0, 0.0, spec.seed
        d = wide + MEMORY + 1
        eye = torch.eye(d, dtype=torch.float64, device=spec.device)
        one, zero = eye[0, 0].clone(), eye.new_zeros(())
        self.post = {
            "gram": eye.new_zeros(d, d), "paid": eye.new_zeros(d), "prior": eye.new_zeros(d),
            "unit": eye.new_ones(d), "level": zero, "spread": one, "sigma": one.clone(),
        }  # fmt: skip
        self.drawn: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def scores(self, obs: Observation) -> Tensor:
        """Expected reward (B, N) of showing each item now."""
        theta = self._mean()[0][None]
        base = torch.zeros(1, self.spec.num_items, device=obs.profile.device)
        value = self._sampled(*self._view(obs), theta, base, 0, 1).squeeze(1)
        return value * self.post["spread"].float() + self.post["level"].float()

    @torch.no_grad()
    def slates(self, obs: Observation, allowed: Tensor) -> Tensor:
        """The best slates (B, M, K) of each draw."""
        sampled = partial(self._sampled, *self._view(obs), *self._draws())
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
        rows = self._rows(transition.obs, transition.decision.slate)
        return self._learn(rows, transition.slot_reward)

    def expect(self, obs: Observation, decision: Decision) -> Tensor:
        """Ids (B,) under which `feedback` will learn what came of the decisions."""
        return self.pending.add(self._rows(obs, decision.slate))

    def feedback(self, ids: Tensor, slot_reward: Tensor) -> dict[str, Tensor]:
        """Learn rewards (n, K) of earlier decisions (n,), in any order."""
        slot_reward = check_slots(slot_reward, ids, self.spec.slate_size)
        rows, here = self.pending.take(ids)
        return self._learn(rows, slot_reward[here])

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "served": self.served.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "post": {name: value.clone() for name, value in self.post.items()},
            "counters": [self.updates, self.seed],
            "budget": self.budget,
            "generator": generator_state(self.generator),
            "signature": self.signature,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_catalog(self.signature, state["signature"])
        load_net(self.net, state["net"])
        load_net(self.served, state["served"])
        # torch takes over the moments as they are: two agents of one state must not share them
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.post = {n: v.to(self.spec.device, copy=True) for n, v in state["post"].items()}
        self.updates, self.seed = state["counters"]
        self.budget, self.drawn = state["budget"], None
        restore_generator(self.generator, state["generator"])
        self.pending.clear()
        self.ring, self.added = {}, 0

    def experience(self) -> dict[str, Any]:
        """The ring of rewards and the decisions that wait for theirs."""
        filled = min(self.added, self.capacity)
        ring = {name: value[:filled].clone() for name, value in self.ring.items()}
        return {"ring": ring, "added": self.added, "pending": self.pending.state_dict()}

    def load_experience(self, state: dict[str, Any]) -> None:
        self.pending.load_state_dict(state["pending"])
        self.added = state["added"]
        self.ring = {name: self._empty(value) for name, value in state["ring"].items()}
        for name, value in state["ring"].items():
            self.ring[name][: len(value)] = value.to(self.spec.device)

    def _rows(self, obs: Observation, slate: Tensor) -> dict[str, Tensor]:
        """What is learnt from a slate (B, K)."""
        seen = self.features.read(obs)
        return {
            "state": seen.state, "slate": slate, "traces": self.features.traces_of(obs, seen, slate)
        }  # fmt: skip

    def _learn(self, rows: dict[str, Tensor], reward: Tensor) -> dict[str, Tensor]:
        """Add the rewards (n, K), take the gradient steps they have earned, renew the posterior."""
        slate, k = rows["slate"], rows["slate"].shape[1]
        real = (slate != EMPTY).flatten()
        if not real.any():
            return {}
        fresh = {
            "state": rows["state"].repeat_interleave(k, dim=0)[real],
            "item": slate.flatten()[real],
            "traces": rows["traces"].flatten(0, 1)[real],
            "reward": reward.flatten()[real],
        }
        self._remember(fresh)
        self.updates += 1
        self.drawn = None
        if self.updates % self.refit == 0 or self.updates == 1:
            self._refit()
        else:
            self._add(fresh)
        self.budget += len(fresh["item"]) * self.replay_ratio
        losses = []
        while self.budget >= self.batch_size:
            self.budget -= self.batch_size
            losses.append(self._step())
        if not losses:
            return {}
        loss = torch.stack(losses).mean()
        return {"train/loss": loss, "bandit/sigma": (self.post["sigma"]).float()}

    def _step(self) -> Tensor:
        """One gradient step on rewards in standard deviations from their mean."""
        filled = min(self.added, self.capacity)
        pick = torch.randint(
            filled, (self.batch_size,), generator=self.generator, device=self.generator.device
        )
        batch = {name: value[pick] for name, value in self.ring.items()}
        z = self.net(batch["state"], self.table[batch["item"]], batch["traces"])
        wanted = (batch["reward"] - self.post["level"].float()) / self.post["spread"].float()
        loss = (self.net.last(z).squeeze(1) - wanted).square().mean()
        check_loss(loss, self.updates, batch)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 10.0)
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def _refit(self) -> None:
        """Serve the trunk of now, and its last layer's posterior from all that is remembered."""
        self.served.load_state_dict(self.net.state_dict())
        filled = min(self.added, self.capacity)
        ring = {name: value[:filled] for name, value in self.ring.items()}
        z = self.served(ring["state"], self.table[ring["item"]], ring["traces"]).double()
        r = ring["reward"].double()
        level, spread = r.mean(), r.std(correction=0)
        spread = torch.where(spread > 0.0, spread, 1.0)
        unit = z.square().mean(dim=0).sqrt().clamp(min=1e-6)  # (d,) one scale for the prior
        z, r = z / unit, (r - level) / spread
        prior = self.served.last.weight[0].double() * unit
        prior[-1] += self.served.last.bias[0].double()  # the last feature is 1
        gram, paid = z.T @ z, z.T @ r
        theta, _ = last_layer(gram, paid, prior, self.ridge)
        left = (r - z @ theta).square().sum()
        sigma = ((r.square().mean() + left) / (1.0 + filled)).sqrt()  # prior: one reward's spread
        self.post = {
            "gram": gram, "paid": paid, "prior": prior, "unit": unit, "level": level,
            "spread": spread, "sigma": sigma.clamp(min=SPECK),
        }  # fmt: skip

    @torch.no_grad()
    def _add(self, fresh: dict[str, Tensor]) -> None:
        """Add rewards to the posterior of the trunk that serves."""
        p = self.post
        z = self.served(fresh["state"], self.table[fresh["item"]], fresh["traces"]).double()
        z, r = z / p["unit"], (fresh["reward"].double() - p["level"]) / p["spread"]
        p["gram"] = p["gram"] + z.T @ z
        p["paid"] = p["paid"] + z.T @ r

    def _mean(self) -> tuple[Tensor, Tensor]:
        """Weights (d,) and root (d, d) of their precision, in units of features."""
        p = self.post
        return last_layer(p["gram"], p["paid"], p["prior"], self.ridge)

    def _draws(self) -> tuple[Tensor, Tensor]:
        """Draws of the last layer (M, d), and specks (M, N) that tell equal items apart."""
        if self.drawn is None:
            g = seeded(self.seed, self.updates, self.spec.device)
            theta, root = self._mean()
            noise = torch.randn(len(theta), self.samples, generator=g, dtype=torch.float64,
                                device=g.device)  # fmt: skip
            step = torch.linalg.solve_triangular(root.T, noise, upper=True).T  # (M, d)
            speck = torch.randn(self.samples, self.spec.num_items, generator=g, device=g.device)
            wide = self.scale * self.post["sigma"]
            self.drawn = theta + wide * step, SPECK * speck
        return self.drawn

    def _view(self, obs: Observation) -> tuple[Tensor, Tensor, Tensor]:
        """What users bring (B, W), items with traces (B, S), features of these (B, S, MEMORY)."""
        seen = self.features.read(obs)
        places, traces = self.features.traces(obs, seen)
        return self.served.users(seen.state), places, self.served.traced(traces)

    def _sampled(
        self, user: Tensor, places: Tensor, traced: Tensor, theta: Tensor, base: Tensor, *part: int
    ) -> Tensor:
        """What weights first..last of (M, d) promise of all items (B, m, N)."""
        weight = (theta / self.post["unit"])[slice(*part)].float()  # (m, d)
        item = self.served.item(self.table[:-1])  # (N, W)
        mine = user[:, None, :] * weight[:, : self.wide]  # (B, m, W)
        value = mine @ item.T + (base[slice(*part)] + weight[:, -1:])  # (B, m, N)
        extra = weight[:, self.wide : -1] @ traced.transpose(1, 2)  # (B, m, S)
        real = places < len(item)  # (B, S)
        place = torch.where(real, places, 0)[:, None, :].expand_as(extra)
        return value.scatter_add_(2, place, extra * real[:, None, :])

    def _remember(self, fresh: dict[str, Tensor]) -> None:
        """Write rows over the oldest of the ring."""
        rows = len(fresh["item"])
        keep = min(rows, self.capacity)
        at = (
            self.added + torch.arange(rows - keep, rows, device=self.table.device)
        ) % self.capacity
        for name, value in fresh.items():
            if name not in self.ring:
                self.ring[name] = self._empty(value)
            self.ring[name][at] = value[-keep:]
        self.added += rows

    def _empty(self, like: Tensor) -> Tensor:
        """Room for the ring's rows of one kind; pages are only taken when written."""
        shape = (self.capacity, *like.shape[1:])
        return torch.empty(shape, dtype=like.dtype, device=self.spec.device)

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        return allowed_items(mask, len(obs), self.spec.num_items, obs.profile.device)
