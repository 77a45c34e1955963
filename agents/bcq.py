"""Discrete batch-constrained Q-learning (Fujimoto et al., 2019): no item that nobody showed."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.checks import check_finite, check_loss, positive, share
from agents.dqn import next_value
from agents.explore import epsilon_greedy_probs, epsilon_greedy_slate, epsilon_greedy_slate_probs
from agents.nets import QNet
from agents.offline import (
    allowed_next,
    descend,
    follow,
    mean_of_shown,
    optimizer_over,
    shown_or_allowed,
    slate_nll,
)
from agents.saving import (
    catalog_signature,
    check_catalog,
    generator_state,
    load_net,
    load_optimizer,
    restore_generator,
)
from agents.schedules import check_schedule, lr_at, set_lr
from encoders.state import EMPTY, Observation


def relative_chance(logits: Tensor, allowed: Tensor) -> Tensor:
    """Chance of each allowed item over that of the likeliest one, (B, N); 0 where forbidden."""
    best = logits.masked_fill(~allowed, -torch.inf).amax(dim=1, keepdim=True)  # (B, 1)
    return (logits - best).exp().masked_fill(~allowed, 0.0)


def constrained(q: Tensor, chance: Tensor, threshold: float) -> Tensor:
    """Values (B, N) with all items of a relative chance up to `threshold` below all others.

    They stay in the order of their chance: a slate may need more items than the log supports.
    """
    supported = chance > threshold  # (B, N)
    low = q.masked_fill(~supported, torch.inf).amin(dim=1, keepdim=True)  # (B, 1)
    high = q.masked_fill(~supported, -torch.inf).amax(dim=1, keepdim=True)  # (B, 1)
    step = (high - low).clamp(min=1e-3 * low.abs().clamp(min=1e-3))  # (B, 1) a gap that is seen
    below = low - step * (2.0 - chance / max(threshold, 1e-12))  # (B, N) by one to two steps
    return torch.where(supported, q, torch.where(low.isfinite(), below, q))


class BCQ:
    """Double Q-learning over the items that a cloned behaviour policy gives enough of a chance.

    An item is left out where its chance is at most `threshold` times that of the likeliest. Every
    update is one step; running means of both nets are target and serve users.
    """

    offline = True

    def __init__(
        self,
        spec: AgentSpec,
        *,
        lr: float = 5e-3,
        schedule: str = "constant",
        gamma: float = 0.8,
        threshold: float = 0.3,
        tau: float = 0.01,
        head: str = "dot",
        width: int = 128,
        memory: bool = True,
        grad_clip: float = 10.0,
        shrink: float = 40.0,
        behaviour_shrink: float = 10.0,
    ) -> None:
        positive(lr=lr, tau=tau, grad_clip=grad_clip)
        share(gamma=gamma, tau=tau)
        if not 0.0 <= threshold < 1.0:
            raise ValueError(
                f"threshold must be in [0, 1), got {threshold}: at 0 every item may be chosen, "
                "near 1 the likeliest alone"
            )
        for name, decay in (("shrink", shrink), ("behaviour_shrink", behaviour_shrink)):
            if not decay >= 0:
                raise ValueError(f"{name} must be at least 0, got {decay}")
        check_schedule(schedule, spec.total_steps)
        self.spec, self.lr, self.schedule, self.tau = spec, lr, schedule, tau
        self.gamma, self.threshold, self.grad_clip = gamma, threshold, grad_clip
        self.q = QNet(spec, head=head, width=width, memory=memory)
        self.behaviour = QNet(spec, head=head, width=width, dueling=False, memory=memory)
        self.nets = nn.ModuleDict({"q": self.q, "behaviour": self.behaviour})
        self.q_mean, self.behaviour_mean = (
            copy.deepcopy(net).requires_grad_(False) for net in (self.q, self.behaviour)
        )
        self.means = nn.ModuleDict({"q": self.q_mean, "behaviour": self.behaviour_mean})
        self.optimizers = {
            "q": optimizer_over([self.q], lr, shrink),
            "behaviour": optimizer_over([self.behaviour], lr, behaviour_shrink),
        }
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.signature = catalog_signature(spec.item_vectors)
        self.updates = 0

    def scores(self, obs: Observation) -> Tensor:
        """Values (B, N), those of items without support below all others."""
        return self._values(obs, self._allowed(obs, None))

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        allowed = self._allowed(obs, mask)
        values = self._values(obs, allowed)
        return epsilon_greedy_slate(values, allowed, self.spec.slate_size, 0.0, self.generator)

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        allowed = self._allowed(obs, mask)
        return epsilon_greedy_slate_probs(self._values(obs, allowed), allowed, slate, 0.0)

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        allowed = self._allowed(obs, mask)
        return epsilon_greedy_probs(self._values(obs, allowed), allowed, 0.0)

    def update(self, transition: Transition) -> dict[str, Tensor]:
        """One gradient step of both nets on these rows of a log."""
        check_finite(transition)
        slate = transition.decision.slate
        real = slate != EMPTY  # (B, K)
        lr = lr_at(self.lr, self.schedule, self.updates, self.spec.total_steps)
        for optimizer in self.optimizers.values():
            set_lr(optimizer, lr)
        seen = self.q.read(transition.obs)
        could = shown_or_allowed(transition, self.spec.num_items)  # (B, N)
        nll = mean_of_shown(slate_nll(self.behaviour.values(seen), could, slate), real)
        descend(nll, self.optimizers["behaviour"], self.grad_clip)

        target, supported = self._targets(transition)  # (B, K), ()
        q = self.q.values_of(seen, slate)  # (B, K)
        loss = mean_of_shown(F.smooth_l1_loss(q, target, reduction="none"), real)
        norm = descend(loss, self.optimizers["q"], self.grad_clip)
        self.updates += 1
        follow(self.means, self.nets, self.tau)
        check_loss(loss + nll.detach(), self.updates, transition)
        return {
            "train/loss": loss.detach(),
            "train/q_mean": mean_of_shown(q.detach(), real),
            "train/td_error": mean_of_shown((q.detach() - target).abs(), real),
            "train/grad_norm": norm,
            "train/learning_rate": torch.tensor(lr),
            "offline/behaviour_loss": nll.detach(),
            "offline/supported": supported,
        }

    @torch.no_grad()
    def _targets(self, transition: Transition) -> tuple[Tensor, Tensor]:
        """What each slot (B, K) should be worth, and the mean number of items with support."""
        allowed = allowed_next(transition, self.spec.num_items)  # (B, N)
        seen = self.q.read(transition.next_obs)
        chance = relative_chance(self.behaviour_mean.values(seen), allowed)  # (B, N)
        choose = constrained(self.q.values(seen), chance, self.threshold)  # (B, N)
        later = self.q_mean.values(seen)  # (B, N)
        value = next_value(later, choose, allowed, self.spec.slate_size)  # (B,)
        discount = self.gamma * ~transition.terminated  # (B,)
        target = transition.slot_reward + (discount * value)[:, None]  # (B, K)
        return target, (chance > self.threshold).sum(dim=1).float().mean()

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {
            "nets": self.nets.state_dict(),
            "means": self.means.state_dict(),
            "optimizers": {name: x.state_dict() for name, x in self.optimizers.items()},
            "generator": generator_state(self.generator),
            "signature": self.signature,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_catalog(self.signature, state["signature"])
        load_net(self.nets, state["nets"])
        load_net(self.means, state["means"])
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, state["optimizers"][name])
        restore_generator(self.generator, state["generator"])
        self.updates = state["updates"]

    @torch.no_grad()
    def _values(self, obs: Observation, allowed: Tensor) -> Tensor:
        """Values (B, N) among `allowed`, those of items without support below all others."""
        seen = self.q.read(obs)
        chance = relative_chance(self.behaviour_mean.values(seen), allowed)  # (B, N)
        return constrained(self.q_mean.values(seen), chance, self.threshold)

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        return allowed_items(mask, len(obs), self.spec.num_items, obs.profile.device)
