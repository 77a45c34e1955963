"""Parallelised Q-learning (Gallici et al., 2024): no replay, no target net, a net with LayerNorm.

Users step side by side for a few steps, then the net learns Q(lambda) returns of these steps and
forgets them. As for DQN a slate is worth the sum of its items' values, and every slot learns its
own reward plus its share of what comes after.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.checks import check_finite, check_loss, positive, share, whole
from agents.dqn import next_value, optimizer_of, shown_mean
from agents.explore import epsilon_greedy_probs, epsilon_greedy_slate, epsilon_greedy_slate_probs
from agents.nets import QNet
from agents.replay import Replay
from agents.saving import (
    catalog_signature,
    check_catalog,
    generator_state,
    load_net,
    load_optimizer,
    restore_generator,
)
from agents.schedules import check_schedule, linear, lr_at, set_lr
from encoders.state import EMPTY, Observation


def lambda_returns(
    slot_reward: Tensor, value: Tensor, terminated: Tensor, truncated: Tensor,
    gamma: float, trace: float,
) -> Tensor:  # fmt: skip
    """Q(lambda) returns (T, B, K) of slots (Peng and Williams, 1996), lambda being `trace`.

    `value` (T, B) is the mean value of the best slots of what follows each step. After `terminated`
    nothing follows; after `truncated`, and after the last step, only `value` says what does.
    """
    steps = len(value)
    after = torch.zeros_like(value)  # (T, B): a slot's share of what follows
    future = value[-1]  # (B,)
    for t in reversed(range(steps)):
        ends = truncated[t] if t < steps - 1 else torch.ones_like(truncated[t])  # (B,)
        mixed = (1.0 - trace) * value[t] + trace * future
        after[t] = gamma * torch.where(ends, value[t], mixed) * ~terminated[t]
        future = slot_reward[t].mean(dim=1) + after[t]
    return slot_reward + after[:, :, None]


class PQN:
    """Q(lambda) over rollouts of T steps of B users, in epochs; acts epsilon-greedily per slot."""

    def __init__(
        self,
        spec: AgentSpec,
        *,
        lr: float = 2e-3,
        schedule: str = "constant",
        gamma: float = 0.8,
        trace: float = 0.65,
        epsilon_start: float = 0.3,
        epsilon_end: float = 0.2,
        epsilon_steps: int = 20_000,
        rollout: int = 8,
        epochs: int = 2,
        batch_size: int = 256,
        dueling: bool = True,
        head: str = "dot",
        width: int = 128,
        memory: bool = True,
        grad_clip: float = 10.0,
        shrink: float = 40.0,
    ) -> None:
        share(epsilon_start=epsilon_start, epsilon_end=epsilon_end, gamma=gamma, trace=trace)
        positive(lr=lr, epsilon_steps=epsilon_steps, grad_clip=grad_clip)
        whole(1, rollout=rollout, epochs=epochs, batch_size=batch_size)
        check_schedule(schedule, spec.total_steps)
        if not shrink >= 0:
            raise ValueError(f"shrink must be at least 0, got {shrink}")
        self.spec, self.gamma, self.trace = spec, gamma, trace
        self.lr, self.schedule = lr, schedule
        self.epsilons = (epsilon_start, epsilon_end, epsilon_steps)
        self.rollout, self.epochs, self.batch_size = rollout, epochs, batch_size
        self.grad_clip = grad_clip
        self.net = QNet(spec, head=head, width=width, dueling=dueling, memory=memory)
        self.optimizer = optimizer_of(self.net, lr, shrink)
        self.open: Replay | None = None  # the rollout so far: T steps of B users, known when B is
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.signature = catalog_signature(spec.item_vectors)
        self.env_steps, self.updates = 0, 0

    @property
    def epsilon(self) -> float:
        """The chance that a slot explores now, a function of the env steps seen."""
        return linear(self.env_steps, *self.epsilons)

    @torch.no_grad()
    def scores(self, obs: Observation) -> Tensor:
        """Value (B, N) of showing each item now."""
        return self.net(obs)

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        epsilon = self.epsilon if explore else 0.0
        allowed = self._allowed(obs, mask)
        return epsilon_greedy_slate(
            self.scores(obs), allowed, self.spec.slate_size, epsilon, self.generator
        )

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        epsilon = self.epsilon if explore else 0.0
        return epsilon_greedy_slate_probs(
            self.scores(obs), self._allowed(obs, mask), slate, epsilon
        )

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        epsilon = self.epsilon if explore else 0.0
        return epsilon_greedy_probs(self.scores(obs), self._allowed(obs, mask), epsilon)

    def update(self, transition: Transition) -> dict[str, Tensor]:
        """Keep a step of B users; once the rollout is complete, learn from it and forget it."""
        check_finite(transition)
        users = len(transition.reward)
        if self.open is None:
            self.open = self._ring(users)
        self.open.add(transition)
        self.env_steps += users
        if self.open.steps < self.rollout:
            return {}
        target = self._targets(self.open)  # (T * B, K)
        logs: list[dict[str, Tensor]] = []
        for _ in range(self.epochs):
            order = torch.randperm(len(target), generator=self.generator, device=target.device)
            for place in order.tensor_split(max(1, len(target) // self.batch_size)):
                logs.append(self._learn(self.open, place, target[place]))
        self.open = None
        means = {name: torch.stack([log[name] for log in logs]).mean() for name in logs[0]}
        rates = {"train/epsilon": self.epsilon, "train/learning_rate": self._lr()}
        return means | {name: torch.tensor(rate) for name, rate in rates.items()}

    @torch.no_grad()
    def _targets(self, ring: Replay) -> Tensor:
        """Returns (T * B, K) of a complete rollout, by place, from the net as it is."""
        values, rewards, ends = [], [], []
        for t in range(self.rollout):  # a step at a time: values of all items are (B, N)
            column = torch.arange(ring.batch, device=ring.device)
            step = ring.at(t * ring.batch + column).transition
            allowed = self._allowed(step.next_obs, step.next_mask, may_be_empty=True)  # (B, N)
            q = self.net(step.next_obs)  # (B, N)
            values.append(next_value(q, q, allowed, self.spec.slate_size))  # (B,)
            rewards.append(step.slot_reward)
            ends.append(torch.stack([step.terminated, step.truncated]))
        terminated, truncated = torch.stack(ends, dim=1)  # (T, B) each
        returns = lambda_returns(
            torch.stack(rewards), torch.stack(values), terminated, truncated, self.gamma, self.trace
        )  # (T, B, K)
        return returns.flatten(0, 1)

    def _learn(self, ring: Replay, place: Tensor, target: Tensor) -> dict[str, Tensor]:
        """One gradient step on places (n,) of the rollout and their targets (n, K)."""
        batch = ring.at(place).transition
        slate, real = batch.decision.slate, batch.decision.slate != EMPTY  # (n, K)
        q = self.net.values_of(self.net.read(batch.obs), slate)  # (n, K)
        loss = shown_mean(F.smooth_l1_loss(q, target, reduction="none"), real)
        check_loss(loss, self.updates, {"transition": batch, "target": target})
        set_lr(self.optimizer, self._lr())
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.grad_clip)
        self.optimizer.step()

        self.updates += 1
        return {
            "train/loss": loss.detach(),
            "train/q_mean": shown_mean(q.detach(), real),
            "train/td_error": shown_mean((q.detach() - target).abs(), real),
            "train/target_mean": shown_mean(target, real),
            "train/grad_norm": norm.detach(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": generator_state(self.generator),
            "signature": self.signature,
            "env_steps": self.env_steps,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_catalog(self.signature, state["signature"])
        load_net(self.net, state["net"])
        load_optimizer(self.optimizer, state["optimizer"])
        restore_generator(self.generator, state["generator"])
        self.env_steps, self.updates = state["env_steps"], state["updates"]
        self.open = None  # steps of another policy are no part of this state

    def experience(self) -> dict[str, Any]:
        """The open rollout: with it training goes on bit for bit."""
        return {"rollout": {} if self.open is None else self.open.state_dict()}

    def load_experience(self, state: dict[str, Any]) -> None:
        self.open = None
        if state["rollout"]:
            self.open = self._ring(state["rollout"]["batch"])
            self.open.load_state_dict(state["rollout"])

    def _ring(self, users: int) -> Replay:
        return Replay(self.rollout * users, spec=self.spec, gamma=self.gamma)

    def _lr(self) -> float:
        return lr_at(self.lr, self.schedule, self.env_steps, self.spec.total_steps)

    def _allowed(self, obs: Observation, mask: Mask, *, may_be_empty: bool = False) -> Tensor:
        return allowed_items(
            mask, len(obs), self.spec.num_items, obs.profile.device, may_be_empty=may_be_empty
        )
