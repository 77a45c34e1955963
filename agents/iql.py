"""Implicit Q-learning (Kostrikov et al., 2022): better than the log, asking only about the log."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.checks import check_finite, check_loss, positive, share
from agents.explore import softmax_probs, softmax_slate, softmax_slate_probs
from agents.nets import QNet, ValueNet
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

MOST = 100.0  # weight of one item in the policy's likelihood


def expectile_loss(error: Tensor, expectile: float) -> Tensor:
    """Squared errors of any shape, those above zero weighed `expectile`, others one less that."""
    return (expectile - (error < 0).to(error.dtype)).abs() * error.square()


def advantage_weight(advantage: Tensor, square: Tensor, beta: float) -> Tensor:
    """Advantages (B, K) to weights of a likelihood: exp(beta * standard deviations), at most 100.

    `square` () is of returns around V(s): `beta` means the same whether rewards are clicks or
    money, and differences that are small beside the noise stay small.
    """
    return (beta * advantage / square.sqrt().clamp(min=1e-6)).exp().clamp(max=MOST)


class IQL:
    """Expectiles of Q over what was shown, and a softmax policy weighed by advantage.

    No value of an item that was not shown is ever asked for. Exploring, slates are drawn from the
    policy at `temperature`; else the likeliest are shown. Running means of Q and of the policy are
    target and serve users.
    """

    offline = True

    def __init__(
        self,
        spec: AgentSpec,
        *,
        lr: float = 5e-3,
        schedule: str = "constant",
        gamma: float = 0.8,
        expectile: float = 0.7,
        beta: float = 3.0,
        tau: float = 0.01,
        temperature: float = 1.0,
        head: str = "dot",
        width: int = 128,
        memory: bool = True,
        grad_clip: float = 10.0,
        shrink: float = 40.0,
        policy_shrink: float = 10.0,
    ) -> None:
        positive(lr=lr, tau=tau, beta=beta, temperature=temperature, grad_clip=grad_clip)
        share(gamma=gamma, tau=tau)
        if not 0.0 < expectile < 1.0:
            raise ValueError(f"expectile must be in (0, 1), got {expectile}: .5 is the mean")
        for name, decay in (("shrink", shrink), ("policy_shrink", policy_shrink)):
            if not decay >= 0:
                raise ValueError(f"{name} must be at least 0, got {decay}")
        check_schedule(schedule, spec.total_steps)
        self.spec, self.lr, self.schedule, self.tau = spec, lr, schedule, tau
        self.gamma, self.expectile, self.beta = gamma, expectile, beta
        self.temperature, self.grad_clip = temperature, grad_clip
        self.q = QNet(spec, head=head, width=width, memory=memory)
        self.value = ValueNet(spec, width=width, memory=memory)
        self.policy = QNet(spec, head=head, width=width, dueling=False, memory=memory)
        self.nets = nn.ModuleDict({"q": self.q, "value": self.value, "policy": self.policy})
        self.q_mean, self.policy_mean = (
            copy.deepcopy(net).requires_grad_(False) for net in (self.q, self.policy)
        )
        self.followed = nn.ModuleDict({"q": self.q, "policy": self.policy})
        self.means = nn.ModuleDict({"q": self.q_mean, "policy": self.policy_mean})
        self.square = torch.zeros((), device=spec.device)  # running, of returns around V(s)
        self.optimizers = {
            "q": optimizer_over([self.q, self.value], lr, shrink),
            "policy": optimizer_over([self.policy], lr, policy_shrink),
        }
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.signature = catalog_signature(spec.item_vectors)
        self.updates = 0

    @torch.no_grad()
    def scores(self, obs: Observation) -> Tensor:
        """Logits (B, N) of the policy."""
        return self.policy_mean(obs)

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
        """One gradient step of all nets on these rows of a log."""
        check_finite(transition)
        slate = transition.decision.slate
        real = slate != EMPTY  # (B, K)
        lr = lr_at(self.lr, self.schedule, self.updates, self.spec.total_steps)
        for optimizer in self.optimizers.values():
            set_lr(optimizer, lr)
        seen = self.q.read(transition.obs)
        with torch.no_grad():
            shown = self.q_mean.values_of(seen, slate)  # (B, K)
            later = self.value(self.q.read(transition.next_obs))  # (B,) of one slot
            discount = self.gamma * ~transition.terminated  # (B,)
            target = transition.slot_reward + (discount * later)[:, None]  # (B, K)
        value = self.value(seen)  # (B,)
        advantage = shown - value[:, None]  # (B, K)
        value_loss = mean_of_shown(expectile_loss(advantage, self.expectile), real)
        q = self.q.values_of(seen, slate)  # (B, K)
        q_loss = mean_of_shown(F.smooth_l1_loss(q, target, reduction="none"), real)
        norm = descend(q_loss + value_loss, self.optimizers["q"], self.grad_clip)

        could = shown_or_allowed(transition, self.spec.num_items)  # (B, N)
        square = mean_of_shown((target - value.detach()[:, None]).square(), real)  # ()
        self.square = square if self.updates == 0 else self.square.lerp(square, self.tau)
        weight = advantage_weight(advantage.detach(), self.square, self.beta)  # (B, K)
        nll = slate_nll(self.policy.values(seen), could, slate)  # (B, K)
        policy_loss = mean_of_shown(weight * nll, real)
        descend(policy_loss, self.optimizers["policy"], self.grad_clip)
        self.updates += 1
        follow(self.means, self.followed, self.tau)
        check_loss(q_loss + value_loss + policy_loss, self.updates, transition)
        return {
            "train/loss": q_loss.detach(),
            "train/value_loss": value_loss.detach(),
            "train/policy_gradient_loss": policy_loss.detach(),
            "train/q_mean": mean_of_shown(q.detach(), real),
            "train/td_error": mean_of_shown((q.detach() - target).abs(), real),
            "train/grad_norm": norm,
            "train/learning_rate": torch.tensor(lr),
            "offline/advantage": mean_of_shown(advantage.detach(), real),
            "offline/weight_max": (weight * real).max(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {
            "nets": self.nets.state_dict(),
            "means": self.means.state_dict(),
            "square": self.square.clone(),
            "optimizers": {name: x.state_dict() for name, x in self.optimizers.items()},
            "generator": generator_state(self.generator),
            "signature": self.signature,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_catalog(self.signature, state["signature"])
        load_net(self.nets, state["nets"])
        load_net(self.means, state["means"])
        self.square = state["square"].to(self.square.device)
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, state["optimizers"][name])
        restore_generator(self.generator, state["generator"])
        self.updates = state["updates"]

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        return allowed_items(mask, len(obs), self.spec.num_items, obs.profile.device)
