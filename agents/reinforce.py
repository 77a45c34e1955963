"""REINFORCE (Williams, 1992), on policy or from a replay with top-K correction (Chen et al., 2019).

On policy: returns of a rollout, bootstrapped where it ends, less a learned baseline. Off policy: a
replay of what older policies showed, each shown item weighed by how much likelier it is now than it
was then. Both chances are of the same item in the same slot, given the items above it.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.checks import check_finite, check_loss, not_negative, positive, share, whole
from agents.explore import softmax_probs, softmax_slate, softmax_slate_probs
from agents.nets import QNet, Seen, linear
from agents.replay import Replay
from agents.rollout import (
    Critic,
    Rollout,
    entropy,
    explained_variance,
    gae,
    given_above,
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
from encoders.state import EMPTY, Observation

BEHAVIOURS = ("logged", "head")
FULL = 10_000  # items up to which the loss sums over all of them
Score = Callable[[Tensor | None], Tensor]  # ids (n, M) to logits (n, M); None: (n, N), all items


def top_k_factor(prob: Tensor, k: int) -> Tensor:
    """Slope of 1 - (1 - p)^K, the chance to be among K draws, at `prob` (Chen et al., 2019)."""
    return k * (1.0 - prob) ** (k - 1)


def importance(log_ratio: Tensor, cap: float) -> Tensor:
    """Chance now over chance then of the same items, from its logarithm, capped; no gradient."""
    return log_ratio.detach().exp().clamp(max=cap)


def score_function(logp: Tensor, credit: Tensor, weight: Tensor) -> Tensor:
    """What has the policy gradient as its gradient: (n, K) of each."""
    return (weight * credit).detach() * logp


def sampled_log_probs(
    shown: Tensor, real: Tensor, others: Tensor, count: Tensor, log_q: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n, K) and entropy (n,) from M items drawn by q, unbiased in the sum.

    Logits shown (n, K), others (n, M); `count` (n, M) says which draws are allowed and not shown,
    `log_q` (n, M) how likely each draw was. Shown items enter the sum exactly, the rest as a mean
    over draws of exp(logit) / q.
    """
    corrected = (others - log_q - math.log(others.shape[1])).masked_fill(~count, -1e30)  # (n, M)
    rest = corrected.logsumexp(dim=1, keepdim=True)  # (n, 1)
    logp = given_above(shown, real, rest)
    terms = torch.cat([corrected, shown.masked_fill(~real, -1e30)], dim=1)  # (n, M + K)
    total = terms.logsumexp(dim=1, keepdim=True)  # (n, 1) log of the whole sum
    mean = ((terms - total).exp() * torch.cat([others, shown], dim=1)).sum(dim=1)  # (n,)
    return logp, total.squeeze(1) - mean


class Behaviour(nn.Module):
    """Who showed what before: a head on a trunk that it does not teach."""

    def __init__(self, spec: AgentSpec, *, width: int, features: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(spec.seed + 3)
        self.user = linear(width, width, generator)
        self.item = linear(features, width, generator, gain=0.2)
        self.bias = linear(features, 1, generator, gain=0.1)
        self.scale = 1.0 / math.sqrt(width)
        self.to(spec.device)

    def forward(self, hidden: Tensor, items: Tensor) -> Tensor:
        """Hidden (n, W), item features (N, R) or (n, M, R) to logits (n, N) or (n, M)."""
        user = self.user(hidden.detach())  # (n, W)
        bias: Tensor = self.bias(items).squeeze(-1)
        if items.ndim == 2:
            return self.scale * user @ self.item(items).T + bias
        return self.scale * (self.item(items) @ user[:, :, None]).squeeze(2) + bias


def check_behaviour(behaviour: str, off_policy: bool, top_k: int) -> None:
    """Refuse corrections of what is not there."""
    if behaviour not in BEHAVIOURS:
        raise ValueError(f"behaviour must be one of {', '.join(BEHAVIOURS)}, got {behaviour!r}")
    if not off_policy and (top_k != 1 or behaviour != "logged"):
        raise ValueError(
            f"top_k={top_k} and behaviour={behaviour} correct what a replay holds: set "
            "off_policy=true, or leave top_k=1 and behaviour=logged"
        )


class Reinforce:
    """Sample slates from a softmax over f(s) . g(a), make what paid more than expected likelier.

    `off_policy` learns from a replay instead of rollouts. There `top_k` draws are what an item has
    to be among (None: the slate size), `cap` bounds the weights, and `behaviour` says where the
    chance then comes from: from the decision, or from a head that learns to foretell it.
    """

    def __init__(
        self,
        spec: AgentSpec,
        *,
        lr: float = 2e-3,
        gamma: float = 0.95,
        steps: int = 4,
        entropy_weight: float = 0.01,
        grad_clip: float = 0.5,
        schedule: str = "constant",
        temperature: float = 1.0,
        off_policy: bool = False,
        top_k: int | None = 1,
        cap: float = 5.0,
        behaviour: str = "logged",
        batch_size: int = 256,
        capacity: int = 50_000,
        replay_ratio: float = 2.0,
        n_step: int = 1,
        learning_starts: int = 1000,
        negatives: int = 256,
        head: str = "dot",
        width: int = 128,
        memory: bool = True,
    ) -> None:
        share(gamma=gamma)
        positive(lr=lr, grad_clip=grad_clip, cap=cap, replay_ratio=replay_ratio)
        whole(1, steps=steps, batch_size=batch_size, negatives=negatives, width=width)
        whole(0, learning_starts=learning_starts)
        k = spec.slate_size if top_k is None else top_k
        whole(1, top_k=k)
        not_negative(entropy_weight=entropy_weight, temperature=temperature)
        check_behaviour(behaviour, off_policy, k)
        check_schedule(schedule, spec.total_steps)
        self.spec, self.lr, self.schedule, self.gamma = spec, lr, schedule, gamma
        self.entropy_weight, self.temperature = entropy_weight, temperature
        self.off_policy, self.top_k, self.cap, self.behaviour = off_policy, k, cap, behaviour
        self.batch_size, self.replay_ratio, self.grad_clip = batch_size, replay_ratio, grad_clip
        self.learning_starts, self.negatives = learning_starts, negatives
        self.net = QNet(spec, head=head, width=width, dueling=False, memory=memory)
        self.past_policy = Behaviour(spec, width=width, features=self.net.items.shape[1])
        self.parameters = [*self.net.parameters()]
        if behaviour == "head":
            self.parameters += self.past_policy.parameters()
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, eps=1e-5)
        self.critic = Critic(spec, lr=lr, width=width, grad_clip=grad_clip, memory=memory)
        self.rollout = Rollout(steps, spec)
        self.replay = Replay(capacity, spec=spec, n_step=n_step, gamma=gamma)
        self.proposal = proposal(spec.popularity)  # (N,)
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
        """Learn from a full rollout, or make the gradient steps on the replay that are due."""
        check_finite(transition)
        users = len(transition.reward)
        logs: list[dict[str, Tensor]] = []
        if self.off_policy:
            self.replay.add(transition)
            self.env_steps += users
            if self.env_steps >= self.learning_starts:
                self.budget += users * self.replay_ratio
            while self.budget >= self.batch_size:
                self.budget -= self.batch_size
                logs.append(self._learn_from_replay())
        else:
            self.rollout.add(transition)
            self.env_steps += users
            if self.rollout.full:
                logs.append(self._learn_from_rollout())
        if not logs:
            return {}
        return {name: torch.stack([log[name] for log in logs]).mean() for name in logs[0]}

    def _learn_from_rollout(self) -> dict[str, Tensor]:
        rollout = self.rollout.steps()
        self.rollout.clear()
        seen = self.net.read(rollout.obs)
        value = self.critic.values(seen)  # (n,)
        later = rollout.later(value, self.critic.values(self.net.read(rollout.ends)))  # (T, B)
        advantage = gae(
            rollout.reward, value.view_as(later), later,
            rollout.terminated, rollout.truncated, self.gamma, 1.0,
        ).flatten()  # fmt: skip
        slot_reward = rollout.slot_reward.flatten(0, 1)  # (n, K)
        log = self._improve(
            seen, rollout.mask, rollout.slate, rollout.propensity, advantage, slot_reward
        )
        return log | self._baseline(seen, value, advantage + value, slot_reward)

    def _learn_from_replay(self) -> dict[str, Tensor]:
        sample = self.replay.sample(self.batch_size, self.generator)
        batch = sample.transition
        seen = self.net.read(batch.obs)
        value = self.critic.values(seen)  # (n,)
        later = self.critic.values(self.net.read(batch.next_obs))  # (n,)
        returns = sample.slot_return.sum(dim=1) + sample.discount * later  # (n,)
        slate, propensity = batch.decision.slate, batch.decision.propensity
        log = self._improve(seen, batch.mask, slate, propensity, returns - value, batch.slot_reward)
        return log | self._baseline(seen, value, returns, batch.slot_reward)

    def _baseline(
        self, seen: Seen, value: Tensor, returns: Tensor, slot_reward: Tensor
    ) -> dict[str, Tensor]:
        """Teach the baseline what was earned, after it has judged it."""
        self.critic.rescale(returns, slot_reward)
        return {
            "train/value_loss": self.critic.learn(seen, returns, slot_reward),
            "train/explained_variance": explained_variance(value, returns),
        }

    def _improve(
        self, seen: Seen, mask: Mask, slate: Tensor, propensity: Tensor,
        advantage: Tensor, slot_reward: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """One gradient step on n slates (n, K); advantages in spreads of the returns."""
        credit = slot_advantages(advantage, slot_reward, self.critic.expected(seen))  # (n, K)
        credit = credit / self.critic.spread
        draws = self._draw_negatives(len(slate))  # (n, M), or none where all items are summed over
        logp, real, spread = self._log_probs(self._policy(seen), mask, slate, draws)
        weight, loss = torch.ones_like(logp), -self.entropy_weight * spread.mean()
        if self.off_policy:
            log_beta = propensity.log()  # (n, K)
            if self.behaviour == "head":
                guess = self._guess(seen)
                log_beta, _, _ = self._log_probs(guess, mask, slate, draws)
                loss = loss - log_beta.sum() / real.sum().clamp(min=1)
            real = real & log_beta.isfinite()  # what could not have been shown teaches nothing
            ratio = (logp - log_beta).masked_fill(~real, 0.0)  # (n, K)
            weight = importance(ratio, self.cap)
            weight = weight * top_k_factor(logp.detach().exp(), self.top_k)
        shown = real.sum().clamp(min=1)
        gain = (score_function(logp, credit, weight) * real).sum() / shown
        loss = loss - gain
        check_loss(loss, self.updates, {"seen": seen, "slate": slate, "credit": credit})
        set_lr(self.optimizer, self._lr())
        set_lr(self.critic.optimizer, self._lr())
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        self.optimizer.step()

        self.updates += 1
        return {
            "train/loss": loss.detach(),
            "train/policy_gradient_loss": -gain.detach(),
            "train/entropy_loss": -spread.detach().mean(),
            "train/weight_mean": (weight * real).sum() / shown,
            "train/grad_norm": norm.detach(),
        }

    def _log_probs(
        self, score: Score, mask: Mask, slate: Tensor, draws: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability (n, K) of slots given those above, which are real, entropy (n,)."""
        n = self.spec.num_items
        if draws is None:
            allowed = allowed_items(mask, len(slate), n, slate.device)  # (n, N)
            every = score(None).masked_fill(~allowed, -torch.inf).log_softmax(dim=1)  # (n, N)
            logp, real = slate_log_probs(every, slate)
            return logp, real, entropy(every)
        real = (slate != EMPTY) & permitted(mask, slate.clamp(min=0))  # (n, K)
        fresh = ~(draws[:, :, None] == slate[:, None, :]).any(dim=2)  # (n, M)
        count = fresh & permitted(mask, draws)
        logits = score(torch.cat([slate.clamp(min=0), draws], dim=1))  # (n, K + M)
        shown, others = logits.split([slate.shape[1], draws.shape[1]], dim=1)
        logp, spread = sampled_log_probs(shown, real, others, count, self.proposal[draws].log())
        return logp, real, spread

    def _draw_negatives(self, rows: int) -> Tensor | None:
        """Items (n, M) drawn by `proposal`, the same for all rows; None: sum over all."""
        if self.spec.num_items <= FULL:
            return None
        draws = torch.multinomial(self.proposal, self.negatives, True, generator=self.generator)
        return draws.expand(rows, -1)

    def _policy(self, seen: Seen) -> Score:
        return lambda ids: self.net.values(seen) if ids is None else self.net.values_of(seen, ids)

    def _guess(self, seen: Seen) -> Score:
        hidden = self.net.body(seen.state).detach()  # (n, W): the trunk is the policy's
        table = self.net.items[:-1]
        return lambda ids: self.past_policy(hidden, table if ids is None else table[ids])

    def _lr(self) -> float:
        return lr_at(self.lr, self.schedule, self.env_steps, self.spec.total_steps)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {
            "net": self.net.state_dict(),
            "past_policy": self.past_policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "critic": self.critic.state_dict(),
            "generator": generator_state(self.generator),
            "signature": self.signature,
            "env_steps": self.env_steps,
            "updates": self.updates,
            "budget": self.budget,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_catalog(self.signature, state["signature"])
        load_net(self.net, state["net"])
        load_net(self.past_policy, state["past_policy"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.critic.load_state_dict(state["critic"])
        restore_generator(self.generator, state["generator"])
        self.env_steps, self.updates = state["env_steps"], state["updates"]
        self.budget = state["budget"]
        self.rollout.clear()  # what another policy lived through is no part of this state
        self.replay.clear()

    def experience(self) -> dict[str, Any]:
        """The open rollout and the replay: with them training goes on bit for bit."""
        return {"rollout": self.rollout.state_dict(), "replay": self.replay.state_dict()}

    def load_experience(self, state: dict[str, Any]) -> None:
        self.rollout.load_state_dict(state["rollout"])
        self.replay.load_state_dict(state["replay"])

    def _heat(self, explore: bool) -> float:
        """Temperature of the softmax that acts."""
        return 1.0 if explore else self.temperature

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        return allowed_items(mask, len(obs), self.spec.num_items, obs.profile.device)


def proposal(popularity: Tensor) -> Tensor:
    """Chances (N,) of being drawn as a negative: half even, half by popularity."""
    even = torch.full_like(popularity, 1.0 / len(popularity))
    total = popularity.sum()
    return 0.5 * even + 0.5 * torch.where(total > 0, popularity / total.clamp(min=1e-12), even)


def permitted(mask: Mask, ids: Tensor) -> Tensor:
    """Which of ids (n, M) a mask of either form lets through."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.dtype == torch.bool:
        return mask.gather(1, ids)
    return ~(ids[:, :, None] == mask[:, None, :]).any(dim=2)
