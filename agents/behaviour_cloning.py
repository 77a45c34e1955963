"""Behaviour cloning (Pomerleau, 1989): a softmax over items that shows what the log showed."""

import copy
from typing import Any

import torch
from torch import Tensor

from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.checks import check_finite, check_loss, positive
from agents.explore import softmax_probs, softmax_slate, softmax_slate_probs
from agents.nets import QNet
from agents.offline import (
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


class BehaviourCloning:
    """Learn the chance of each shown item given those above it; every update is one step.

    Exploring, slates are drawn from the softmax at `temperature`; else the most likely are shown.
    A running mean of the net, `tau` of the way at every update, serves users. Schedules end after
    `spec.total_steps` updates.
    """

    offline = True

    def __init__(
        self,
        spec: AgentSpec,
        *,
        lr: float = 5e-3,
        schedule: str = "constant",
        tau: float = 0.01,
        temperature: float = 1.0,
        head: str = "dot",
        width: int = 128,
        memory: bool = True,
        grad_clip: float = 10.0,
        shrink: float = 10.0,
    ) -> None:
        positive(lr=lr, tau=tau, temperature=temperature, grad_clip=grad_clip)
        if tau > 1:
            raise ValueError(f"tau must be in (0, 1], got {tau}: the share of the net in its mean")
        if not shrink >= 0:
            raise ValueError(f"shrink must be at least 0, got {shrink}")
        check_schedule(schedule, spec.total_steps)
        self.spec, self.lr, self.schedule, self.tau = spec, lr, schedule, tau
        self.temperature, self.grad_clip = temperature, grad_clip
        self.net = QNet(spec, head=head, width=width, dueling=False, memory=memory)
        self.mean = copy.deepcopy(self.net).requires_grad_(False)
        self.optimizer = optimizer_over([self.net], lr, shrink)
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.signature = catalog_signature(spec.item_vectors)
        self.updates = 0

    @torch.no_grad()
    def scores(self, obs: Observation) -> Tensor:
        """Logits (B, N) of the behaviour policy."""
        return self.mean(obs)

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        k, allowed = self.spec.slate_size, self._allowed(obs, mask)
        heat = self.temperature if explore else 0.0
        return softmax_slate(self.scores(obs), allowed, k, heat, self.generator)

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        heat = self.temperature if explore else 0.0
        return softmax_slate_probs(self.scores(obs), self._allowed(obs, mask), slate, heat)

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        heat = self.temperature if explore else 0.0
        return softmax_probs(self.scores(obs), self._allowed(obs, mask), heat)

    def update(self, transition: Transition) -> dict[str, Tensor]:
        """One gradient step on these rows of a log."""
        check_finite(transition)
        slate = transition.decision.slate
        real = slate != EMPTY  # (B, K)
        allowed = shown_or_allowed(transition, self.spec.num_items)  # (B, N)
        logits = self.net(transition.obs)  # (B, N)
        loss = mean_of_shown(slate_nll(logits, allowed, slate), real)
        lr = lr_at(self.lr, self.schedule, self.updates, self.spec.total_steps)
        set_lr(self.optimizer, lr)
        norm = descend(loss, self.optimizer, self.grad_clip)
        self.updates += 1
        follow(self.mean, self.net, self.tau)
        check_loss(loss, self.updates, transition)
        first = logits.detach().masked_fill(~allowed, -torch.inf).argmax(dim=1)  # (B,)
        return {
            "train/loss": loss.detach(),
            "train/grad_norm": norm,
            "train/learning_rate": torch.tensor(lr),
            "offline/agreement": mean_of_shown((first == slate[:, 0]).float(), real[:, 0]),
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {
            "net": self.net.state_dict(),
            "mean": self.mean.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": generator_state(self.generator),
            "signature": self.signature,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_catalog(self.signature, state["signature"])
        load_net(self.net, state["net"])
        load_net(self.mean, state["mean"])
        load_optimizer(self.optimizer, state["optimizer"])
        restore_generator(self.generator, state["generator"])
        self.updates = state["updates"]

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        return allowed_items(mask, len(obs), self.spec.num_items, obs.profile.device)
