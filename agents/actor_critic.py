"""A2C (Mnih et al., 2016) and PPO (Schulman et al., 2017): learn from what was just acted.

A slate is drawn one item after another without replacement, so its probability is a product of one
factor a slot. Each factor is learnt from with its own advantage and, in PPO, its own clipped ratio:
what the slot earned itself and what came after the slate, see `rollout.slot_advantages`. A click
does not praise the nine items beside it. What this leaves out is that a good item may take clicks
from its neighbours in the same step.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.checks import check_finite, check_loss, positive, share, whole
from agents.explore import softmax_probs, softmax_slate, softmax_slate_probs
from agents.nets import QNet, Seen
from agents.rollout import (
    Critic,
    Rollout,
    Steps,
    entropy,
    explained_variance,
    gae,
    rows_of,
    slate_log_probs,
    slot_advantages,
)
from agents.saving import (
    catalog_signature,
    check_catalog,
    generator_state,
    load_net,
    restore_generator,
)
from agents.schedules import check_schedule, lr_at, set_lr
from encoders.state import Observation


def clipped_gain(ratio: Tensor, advantage: Tensor, clip: float | None) -> Tensor:
    """Surrogate of (n, K) each: no gain from a ratio further than `clip` from 1; None: A2C's."""
    gain = ratio * advantage
    if clip is None:
        return gain
    return torch.minimum(gain, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)


def divergence(log_ratio: Tensor) -> Tensor:
    """Estimate KL(old || new) of (n, K) from samples of old: never negative (Schulman, 2020)."""
    return log_ratio.exp() - 1.0 - log_ratio


def standard(advantage: Tensor) -> Tensor:
    """Advantages of any shape with mean 0 and spread 1."""
    centred = advantage - advantage.mean()
    return centred / centred.square().mean().sqrt().clamp(min=1e-8)


class ActorCritic:
    """Sample from a softmax over f(s) . g(a), learn from rollouts of `steps` steps.

    PPO by default: several passes over a rollout in minibatches, clipped. With one pass
    (`epochs=1`), no `clip` and the rollout as one batch (`minibatch=None`) it is A2C.
    `temperature` is of the softmax that serves users when exploration is off: 0 shows the best
    items, 1 goes on sampling as it learnt. Where variety pays, what was learnt is the sampling.
    """

    def __init__(
        self,
        spec: AgentSpec,
        *,
        lr: float = 1e-3,
        gamma: float = 0.95,
        lam: float = 0.9,
        steps: int = 16,
        epochs: int = 4,
        minibatch: int | None = 1024,
        clip: float | None = 0.2,
        entropy_weight: float = 0.01,
        target_kl: float | None = None,
        normalize: bool = True,
        grad_clip: float = 0.5,
        schedule: str = "constant",
        temperature: float = 1.0,
        head: str = "dot",
        width: int = 128,
        memory: bool = True,
    ) -> None:
        share(gamma=gamma, lam=lam)
        positive(lr=lr, grad_clip=grad_clip)
        whole(1, steps=steps, epochs=epochs, width=width)
        for name, knob in (("minibatch", minibatch), ("clip", clip), ("target_kl", target_kl)):
            if knob is not None:
                positive(**{name: knob})
        if not entropy_weight >= 0:
            raise ValueError(f"entropy_weight must be at least 0, got {entropy_weight}")
        if not temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        check_schedule(schedule, spec.total_steps)
        self.spec, self.lr, self.schedule = spec, lr, schedule
        self.gamma, self.lam, self.epochs, self.minibatch = gamma, lam, epochs, minibatch
        self.clip, self.entropy_weight, self.target_kl = clip, entropy_weight, target_kl
        self.normalize, self.grad_clip, self.temperature = normalize, grad_clip, temperature
        self.net = QNet(spec, head=head, width=width, dueling=False, memory=memory)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr, eps=1e-5)
        self.critic = Critic(spec, lr=lr, width=width, grad_clip=grad_clip, memory=memory)
        self.rollout = Rollout(steps, spec)
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.signature = catalog_signature(spec.item_vectors)
        self.env_steps, self.updates = 0, 0

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
        """Collect a step of B users; learn when the rollout is full, and start a new one."""
        check_finite(transition)
        self.rollout.add(transition)
        self.env_steps += len(transition.reward)
        if not self.rollout.full:
            return {}
        rollout = self.rollout.steps()
        self.rollout.clear()
        return self._learn(rollout)

    def _learn(self, rollout: Steps) -> dict[str, Tensor]:
        lr = lr_at(self.lr, self.schedule, self.env_steps, self.spec.total_steps)
        set_lr(self.optimizer, lr)
        set_lr(self.critic.optimizer, lr)
        with torch.no_grad():
            seen = self.net.read(rollout.obs)
        value = self.critic.values(seen)  # (n,)
        later = rollout.later(value, self.critic.values(self.net.read(rollout.ends)))  # (T, B)
        advantage = gae(
            rollout.reward, value.view_as(later), later,
            rollout.terminated, rollout.truncated, self.gamma, self.lam,
        ).flatten()  # fmt: skip
        returns = advantage + value  # (n,)
        slot_reward = rollout.slot_reward.flatten(0, 1)  # (n, K)
        credit = slot_advantages(advantage, slot_reward, self.critic.expected(seen))  # (n, K)
        self.critic.rescale(returns, slot_reward)
        credit = standard(credit) if self.normalize else credit
        old = rollout.propensity.double().log().float()  # (n, K) what act said, not a recomputation
        logs: list[dict[str, Tensor]] = []
        size = len(returns) if self.minibatch is None else self.minibatch
        for _ in range(self.epochs):
            order = torch.randperm(len(returns), generator=self.generator, device=returns.device)
            for rows in order.split(size):
                part = rows_of(seen, rows)
                log = self._improve(part, rollout, rows, old[rows], credit[rows])
                log["train/value_loss"] = self.critic.learn(part, returns[rows], slot_reward[rows])
                logs.append(log)
            if self.target_kl is not None and logs[-1]["train/approx_kl"] > 1.5 * self.target_kl:
                break
        means = {name: torch.stack([log[name] for log in logs]).mean() for name in logs[0]}
        return means | {
            "train/explained_variance": explained_variance(value, returns),
            "train/learning_rate": torch.tensor(lr),
            "train/value_mean": value.mean(),
        }

    def _improve(
        self, seen: Seen, rollout: Steps, rows: Tensor, old: Tensor, credit: Tensor
    ) -> dict[str, Tensor]:
        """One gradient step of the policy on some rows."""
        mask = None if rollout.mask is None else rollout.mask[rows]
        allowed = allowed_items(mask, len(rows), self.spec.num_items, rows.device)  # (n, N)
        logits = self.net.values(seen).masked_fill(~allowed, -torch.inf)
        logp = logits.log_softmax(dim=1)  # (n, N)
        new, real = slate_log_probs(logp, rollout.slate[rows])  # (n, K) each
        real = real & old.isfinite()
        log_ratio = torch.where(real, new - old, 0.0)
        shown = real.sum().clamp(min=1)
        ratio = log_ratio.exp()
        gain = (clipped_gain(ratio, credit, self.clip) * real).sum() / shown
        spread = entropy(logp).mean()
        loss = -gain - self.entropy_weight * spread
        check_loss(loss, self.updates, {"seen": seen, "old": old, "credit": credit})
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.grad_clip)
        self.optimizer.step()

        self.updates += 1
        with torch.no_grad():
            reach = 0.0 if self.clip is None else self.clip
            clipped = ((ratio - 1.0).abs() > reach) & real  # (n, K)
            return {
                "train/loss": loss.detach(),
                "train/policy_gradient_loss": -gain.detach(),
                "train/entropy_loss": -spread.detach(),
                "train/approx_kl": (divergence(log_ratio) * real).sum() / shown,
                "train/clip_fraction": clipped.sum() / shown,
                "train/grad_norm": norm.detach(),
            }

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "critic": self.critic.state_dict(),
            "generator": generator_state(self.generator),
            "signature": self.signature,
            "env_steps": self.env_steps,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_catalog(self.signature, state["signature"])
        load_net(self.net, state["net"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.critic.load_state_dict(state["critic"])
        restore_generator(self.generator, state["generator"])
        self.env_steps, self.updates = state["env_steps"], state["updates"]
        self.rollout.clear()  # what another policy did is no part of this state

    def experience(self) -> dict[str, Any]:
        """The open rollout: with it training goes on bit for bit."""
        return self.rollout.state_dict()

    def load_experience(self, state: dict[str, Any]) -> None:
        self.rollout.load_state_dict(state)

    def _heat(self, explore: bool) -> float:
        """Temperature of the softmax that acts."""
        return 1.0 if explore else self.temperature

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        return allowed_items(mask, len(obs), self.spec.num_items, obs.profile.device)
