"""Conservative Q-learning (Kumar et al., 2020): what was not shown is not thought to be good."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


def conservative_loss(
    q: Tensor, allowed: Tensor, slate: Tensor, target: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Values, allowed (B, N), slates and targets (B, K) to losses (B, K): Huber, and the gap.

    The gap is logsumexp over what could be shown in the slot minus the value of what was.
    """
    shown = q.gather(1, slate.clamp(min=0))  # (B, K)
    error = F.smooth_l1_loss(shown, target, reduction="none")  # (B, K)
    gap = slate_nll(q, allowed, slate)  # (B, K)
    return error + alpha * gap, gap


class CQL:
    """Double Q-learning that pushes all values down and those of what was shown up by `alpha`.

    Every update is one step; a running mean of the net is target and serves users, greedily.
    """

    offline = True

    def __init__(
        self,
        spec: AgentSpec,
        *,
        lr: float = 5e-3,
        schedule: str = "constant",
        gamma: float = 0.8,
        alpha: float = 0.05,
        tau: float = 0.01,
        head: str = "dot",
        width: int = 128,
        memory: bool = True,
        grad_clip: float = 10.0,
        shrink: float = 40.0,
    ) -> None:
        positive(lr=lr, tau=tau, grad_clip=grad_clip)
        share(gamma=gamma, tau=tau)
        for name, number in (("alpha", alpha), ("shrink", shrink)):
            if not number >= 0:
                raise ValueError(f"{name} must be at least 0, got {number}")
        check_schedule(schedule, spec.total_steps)
        self.spec, self.lr, self.schedule, self.tau = spec, lr, schedule, tau
        self.gamma, self.alpha, self.grad_clip = gamma, alpha, grad_clip
        self.net = QNet(spec, head=head, width=width, memory=memory)
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        self.optimizer = optimizer_over([self.net], lr, shrink)
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.signature = catalog_signature(spec.item_vectors)
        self.updates = 0

    @torch.no_grad()
    def scores(self, obs: Observation) -> Tensor:
        """Conservative values (B, N)."""
        return self.target(obs)

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        k, allowed = self.spec.slate_size, self._allowed(obs, mask)
        return epsilon_greedy_slate(self.scores(obs), allowed, k, 0.0, self.generator)

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        return epsilon_greedy_slate_probs(self.scores(obs), self._allowed(obs, mask), slate, 0.0)

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        return epsilon_greedy_probs(self.scores(obs), self._allowed(obs, mask), 0.0)

    def update(self, transition: Transition) -> dict[str, Tensor]:
        """One gradient step on these rows of a log."""
        check_finite(transition)
        slate = transition.decision.slate
        real = slate != EMPTY  # (B, K)
        target = self._targets(transition)  # (B, K)
        q = self.net(transition.obs)  # (B, N)
        could = shown_or_allowed(transition, self.spec.num_items)  # (B, N)
        losses, gap = conservative_loss(q, could, slate, target, self.alpha)  # (B, K) each
        loss = mean_of_shown(losses, real)
        lr = lr_at(self.lr, self.schedule, self.updates, self.spec.total_steps)
        set_lr(self.optimizer, lr)
        norm = descend(loss, self.optimizer, self.grad_clip)
        self.updates += 1
        follow(self.target, self.net, self.tau)
        check_loss(loss, self.updates, transition)
        shown = q.detach().gather(1, slate.clamp(min=0))  # (B, K)
        return {
            "train/loss": loss.detach(),
            "train/q_mean": mean_of_shown(shown, real),
            "train/td_error": mean_of_shown((shown - target).abs(), real),
            "train/grad_norm": norm,
            "train/learning_rate": torch.tensor(lr),
            "offline/conservative_gap": mean_of_shown(gap.detach(), real),
        }

    @torch.no_grad()
    def _targets(self, transition: Transition) -> Tensor:
        """What each slot (B, K) should be worth: its reward and the best items to follow."""
        allowed = allowed_next(transition, self.spec.num_items)  # (B, N)
        seen = self.net.read(transition.next_obs)
        later, choose = self.target.values(seen), self.net.values(seen)  # (B, N) each
        value = next_value(later, choose, allowed, self.spec.slate_size)  # (B,)
        discount = self.gamma * ~transition.terminated  # (B,)
        return transition.slot_reward + (discount * value)[:, None]

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {
            "net": self.net.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": generator_state(self.generator),
            "signature": self.signature,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_catalog(self.signature, state["signature"])
        load_net(self.net, state["net"])
        load_net(self.target, state["target"])
        load_optimizer(self.optimizer, state["optimizer"])
        restore_generator(self.generator, state["generator"])
        self.updates = state["updates"]

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        return allowed_items(mask, len(obs), self.spec.num_items, obs.profile.device)
