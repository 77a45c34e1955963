"""Soft actor-critic for items (Haarnoja et al., 2018; Christodoulou, 2019): no action is sampled.

Expectations are taken over all allowed items. A slate is drawn one item after another; each slot's
expectation is over the items left after those drawn above it, and a slate is worth the mean of its
slots, as in `agents.dqn`.
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.checks import check_finite, check_loss, not_negative, positive, share, whole
from agents.explore import softmax_probs, softmax_slate, softmax_slate_probs
from agents.nets import QNet
from agents.replay import Replay, Sample
from agents.saving import (
    catalog_signature,
    check_catalog,
    generator_state,
    load_net,
    restore_generator,
)
from agents.schedules import check_schedule, lr_at, set_lr
from encoders.state import EMPTY, Observation


def soft_value(q: Tensor, logp: Tensor, alpha: Tensor | float) -> Tensor:
    """Mean of q - alpha log pi over items (..., N), -inf log-probabilities being impossible."""
    possible = logp > -torch.inf
    inside = q - alpha * logp.masked_fill(~possible, 0.0)
    return (logp.exp() * inside.masked_fill(~possible, 0.0)).sum(dim=-1)


def entropy(logp: Tensor) -> Tensor:
    """Entropy (...) of log-probabilities (..., N)."""
    return soft_value(torch.zeros_like(logp), logp, 1.0)


def slot_policies(logits: Tensor, slate: Tensor) -> Tensor:
    """Logits (n, N), -inf where forbidden, to log-probabilities (n, K, N) below the items above.

    Where nothing is left to show there is no policy: all -inf.
    """
    above = F.one_hot(slate, logits.shape[1]).cumsum(dim=1) - F.one_hot(slate, logits.shape[1])
    left = logits[:, None, :].masked_fill(above > 0, -torch.inf)  # (n, K, N)
    some = (left > -torch.inf).any(dim=2, keepdim=True)  # (n, K, 1)
    return left.masked_fill(~some, 0.0).log_softmax(dim=2).masked_fill(~some, -torch.inf)


def huber(q: Tensor, target: Tensor, real: Tensor) -> Tensor:
    """Mean Huber loss () of (n, K) over the slots that showed something."""
    loss = F.smooth_l1_loss(q, target, reduction="none") * real  # (n, K)
    return loss.sum() / real.sum().clamp(min=1)


def temperature_loss(log_alpha: Tensor, spread: Tensor, target: Tensor) -> Tensor:
    """Loss () that raises alpha where entropies (n,) are below their targets (n,)."""
    return (log_alpha.exp() * (spread - target).detach()).mean()


class SACDiscrete:
    """Twin Q, a policy that follows their minimum, and a temperature that keeps its entropy.

    `target_entropy` is the share of the most there could be, log of the number of allowed items;
    0.3 of a thousand items is a choice among eight.
    """

    def __init__(
        self,
        spec: AgentSpec,
        *,
        lr: float = 2e-3,
        gamma: float = 0.9,
        target_entropy: float = 0.3,
        alpha_start: float = 0.1,
        alpha_lr: float = 3e-3,
        batch_size: int = 256,
        capacity: int = 200_000,
        replay_ratio: float = 2.0,
        tau: float = 0.01,
        n_step: int = 1,
        learning_starts: int = 1000,
        grad_clip: float = 10.0,
        schedule: str = "constant",
        temperature: float = 1.0,
        head: str = "dot",
        width: int = 128,
        memory: bool = True,
    ) -> None:
        share(gamma=gamma, target_entropy=target_entropy, tau=tau)
        positive(
            lr=lr, alpha_start=alpha_start, alpha_lr=alpha_lr, replay_ratio=replay_ratio,
            tau=tau, grad_clip=grad_clip,
        )  # fmt: skip
        whole(1, batch_size=batch_size, width=width)
        whole(0, learning_starts=learning_starts)
        not_negative(temperature=temperature)
        check_schedule(schedule, spec.total_steps)
        self.temperature = temperature
        self.spec, self.lr, self.schedule = spec, lr, schedule
        self.gamma, self.tau, self.target_entropy = gamma, tau, target_entropy
        self.batch_size, self.replay_ratio = batch_size, replay_ratio
        self.learning_starts, self.grad_clip = learning_starts, grad_clip
        self.net = QNet(spec, head=head, width=width, dueling=False, memory=memory)
        self.twins = [
            QNet(spec, head=head, width=width, dueling=True, memory=memory, seed=spec.seed + i)
            for i in (1, 2)
        ]
        self.targets = [copy.deepcopy(twin).requires_grad_(False) for twin in self.twins]
        self.log_alpha = torch.full(
            (), math.log(alpha_start), device=spec.device, requires_grad=True
        )
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr)
        self.twin_optimizer = torch.optim.Adam(nn.ModuleList(self.twins).parameters(), lr=lr)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=alpha_lr)
        self.replay = Replay(capacity, spec=spec, n_step=n_step, gamma=gamma)
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.signature = catalog_signature(spec.item_vectors)
        self.env_steps, self.updates = 0, 0
        self.budget = 0.0  # samples earned by env steps and not yet drawn

    @torch.no_grad()
    def scores(self, obs: Observation) -> Tensor:
        """Logit (B, N) of each item."""
        return self.net(obs)

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        k, allowed = self.spec.slate_size, self._allowed(obs, mask)
        return softmax_slate(self.scores(obs), allowed, k, self._heat(explore), self.generator)

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        allowed = self._allowed(obs, mask)
        return softmax_slate_probs(self.scores(obs), allowed, slate, self._heat(explore))

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        return softmax_probs(self.scores(obs), self._allowed(obs, mask), self._heat(explore))

    def update(self, transition: Transition) -> dict[str, Tensor]:
        """Remember a step of B users, then make the gradient steps that it has earned."""
        check_finite(transition)
        self.replay.add(transition)
        users = len(transition.reward)
        self.env_steps += users
        if self.env_steps < self.learning_starts:
            return {}
        self.budget += users * self.replay_ratio
        logs: list[dict[str, Tensor]] = []
        while self.budget >= self.batch_size:
            self.budget -= self.batch_size
            logs.append(self._learn(self.replay.sample(self.batch_size, self.generator)))
        if not logs:
            return {}
        return {name: torch.stack([log[name] for log in logs]).mean() for name in logs[0]}

    def _learn(self, sample: Sample) -> dict[str, Tensor]:
        """One gradient step of the twins, of the policy and of the temperature."""
        lr = lr_at(self.lr, self.schedule, self.env_steps, self.spec.total_steps)
        set_lr(self.optimizer, lr)
        set_lr(self.twin_optimizer, lr)
        critic_loss, q = self._learn_twins(sample)
        actor_loss, spread, target = self._learn_policy(sample.transition)
        alpha_loss = temperature_loss(self.log_alpha, spread, target)
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()
        self.updates += 1
        with torch.no_grad():
            for target_net, twin in zip(self.targets, self.twins, strict=True):
                pairs = zip(target_net.parameters(), twin.parameters(), strict=True)
                for slow, fast in pairs:
                    slow.lerp_(fast, self.tau)
        return {
            "train/loss": critic_loss + actor_loss,
            "train/critic_loss": critic_loss,
            "train/actor_loss": actor_loss,
            "train/ent_coef": self.log_alpha.detach().exp(),
            "train/entropy_loss": -spread.mean(),
            "train/q_mean": q,
        }

    def _learn_twins(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """One gradient step of both Q; their loss and mean value."""
        batch = sample.transition
        slate, real = batch.decision.slate, batch.decision.slate != EMPTY  # (n, K)
        with torch.no_grad():
            allowed = self._allowed(batch.next_obs, batch.next_mask, may_be_empty=True)  # (n, N)
            later = self.net.read(batch.next_obs)
            logits = self.net.values(later).masked_fill(~allowed, -torch.inf)
            q = torch.minimum(*(twin.values(later) for twin in self.targets))  # (n, N)
            logp = slot_policies(logits, self._draw(logits))  # (n, K, N)
            value = soft_value(q[:, None, :], logp, self.log_alpha.exp()).mean(dim=1)  # (n,)
            target = sample.slot_return + (sample.discount * value)[:, None]  # (n, K)
        seen = self.net.read(batch.obs)
        guesses = [twin.values_of(seen, slate) for twin in self.twins]  # (n, K) each
        loss = huber(guesses[0], target, real) + huber(guesses[1], target, real)
        check_loss(loss, self.updates, sample)
        self.twin_optimizer.zero_grad()
        loss.backward()
        for twin in self.twins:
            nn.utils.clip_grad_norm_(twin.parameters(), self.grad_clip)
        self.twin_optimizer.step()
        shown = real.sum().clamp(min=1)
        return loss.detach(), (guesses[0].detach() * real).sum() / shown

    def _learn_policy(self, batch: Transition) -> tuple[Tensor, Tensor, Tensor]:
        """One gradient step of the policy; its loss, entropies (n,) and their targets (n,)."""
        allowed = self._allowed(batch.obs, batch.mask, may_be_empty=True)  # (n, N)
        seen = self.net.read(batch.obs)
        with torch.no_grad():
            q = torch.minimum(*(twin.values(seen) for twin in self.twins))  # (n, N)
        logits = self.net.values(seen).masked_fill(~allowed, -torch.inf)
        logp = slot_policies(logits, self._draw(logits.detach()))  # (n, K, N)
        loss = -soft_value(q[:, None, :], logp, self.log_alpha.detach().exp()).mean()
        check_loss(loss, self.updates, batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), self.grad_clip)
        self.optimizer.step()
        target = self.target_entropy * allowed.sum(dim=1).clamp(min=1).log()  # (n,)
        return loss.detach(), entropy(logp[:, 0].detach()), target

    def _draw(self, logits: Tensor) -> Tensor:
        """Slates (n, K) from logits (n, N); rows with fewer allowed end in forbidden items."""
        k = self.spec.slate_size
        wait = torch.rand(logits.shape, generator=self.generator, device=logits.device)
        noise = -wait.clamp_(min=1e-20).log_().neg_().log_()  # (n, N) Gumbel
        return (logits + noise).topk(k, dim=1).indices

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {
            "net": self.net.state_dict(),
            "twins": [twin.state_dict() for twin in self.twins],
            "targets": [twin.state_dict() for twin in self.targets],
            "log_alpha": self.log_alpha.detach().clone(),
            "optimizer": self.optimizer.state_dict(),
            "twin_optimizer": self.twin_optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "generator": generator_state(self.generator),
            "signature": self.signature,
            "env_steps": self.env_steps,
            "updates": self.updates,
            "budget": self.budget,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_catalog(self.signature, state["signature"])
        load_net(self.net, state["net"])
        for nets, saved in ((self.twins, state["twins"]), (self.targets, state["targets"])):
            for net, weights in zip(nets, saved, strict=True):
                load_net(net, weights)
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.twin_optimizer.load_state_dict(copy.deepcopy(state["twin_optimizer"]))
        self.alpha_optimizer.load_state_dict(copy.deepcopy(state["alpha_optimizer"]))
        restore_generator(self.generator, state["generator"])
        self.env_steps, self.updates = state["env_steps"], state["updates"]
        self.budget = state["budget"]
        self.replay.clear()  # what another policy lived through is no part of this state

    def experience(self) -> dict[str, Any]:
        """The replay: with it training goes on bit for bit."""
        return self.replay.state_dict()

    def load_experience(self, state: dict[str, Any]) -> None:
        self.replay.load_state_dict(state)

    def _heat(self, explore: bool) -> float:
        """Temperature of the softmax that acts."""
        return 1.0 if explore else self.temperature

    def _allowed(self, obs: Observation, mask: Mask, *, may_be_empty: bool = False) -> Tensor:
        return allowed_items(
            mask, len(obs), self.spec.num_items, obs.profile.device, may_be_empty=may_be_empty
        )
