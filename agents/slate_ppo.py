"""PPO (Schulman et al., 2017) for slates, slot by slot: what stands above changes what fits below.

A slate is filled from the top, one item a slot (as Metz et al., 2017, choose one dimension after
another), and each slot is a decision of its own: it sees the state and the items above, earns its
own slot's reward, and hands on to the next slot, the last one to the next step. So a policy can
learn that three of a kind are too many, which scores of single items cannot say, and the critic,
which sees the items above as well, says which slot was to blame.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from agents.actor_critic import clipped_gain, divergence, standard
from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.checks import check_finite, check_loss, not_negative, positive, share, whole
from agents.explore import break_ties
from agents.nets import QNet, Seen, body_of, linear
from agents.rollout import LEAST_SPREAD, Rollout, Steps, explained_variance, rows_of
from agents.saving import (
    catalog_signature,
    check_catalog,
    generator_state,
    load_net,
    restore_generator,
)
from agents.schedules import check_schedule, lr_at, set_lr
from encoders.state import EMPTY, Observation

FORGET = 0.1  # weight of the newest rollout in the running mean and spread of returns


def slot_gae(
    reward: Tensor, value: Tensor, end: Tensor, done: Tensor, gamma: float, lam: float
) -> Tensor:
    """Advantages of slots (T, B, K) from their rewards and values (T, B, K).

    `end` (T, B) is what the state after each step is worth, 0 where the user left; `done` (T, B)
    lets no advantage of the row's next user through. Within a slate nothing is discounted, and the
    trace fades by the K-th root of `lam` a slot: by `lam` a step, whatever K is.
    """
    steps, _, k = reward.shape
    fade = lam ** (1.0 / k)
    advantage, total = torch.empty_like(reward), torch.zeros_like(reward[0, :, 0])
    for t in range(steps - 1, -1, -1):
        delta = reward[t, :, -1] + gamma * end[t] - value[t, :, -1]  # (B,)
        total = delta + gamma * fade * total * ~done[t]
        advantage[t, :, -1] = total
        for slot in range(k - 2, -1, -1):
            delta = reward[t, :, slot] + value[t, :, slot + 1] - value[t, :, slot]
            total = delta + fade * total
            advantage[t, :, slot] = total
    return advantage


class Slots(nn.Module):
    """State and items above to a vector (n, K, out) for each slot."""

    def __init__(
        self, spec: AgentSpec, *, size: int, features: int, out: int, width: int, seed: int
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.body = body_of(size, width, generator)
        self.join = linear(width + features + 2, width, generator)
        self.out = linear(width, out, generator, gain=0.1)
        self.to(spec.device)

    def forward(self, state: Tensor, above: Tensor, place: Tensor) -> Tensor:
        """State (n, U), sums above (n, K, R + 1) and how many these are (K,)."""
        n, k, _ = above.shape
        hidden = self.body(state)[:, None, :].expand(n, k, -1)  # (n, K, W)
        count = place[None, :, None].expand(n, k, 1)
        inputs = [hidden, above / (1.0 + count), count / 10.0, count.log1p()]
        found: Tensor = self.out(torch.relu(self.join(torch.cat(inputs, dim=2))))
        return found


class SlatePPO:
    """Fill slates slot by slot, learn from rollouts of `steps` steps in clipped passes.

    `temperature` is of the softmax that serves users when exploration is off: 1 samples as it
    learnt, 0 shows the best of each slot.
    """

    def __init__(
        self,
        spec: AgentSpec,
        *,
        lr: float = 1e-3,
        gamma: float = 0.95,
        lam: float = 0.9,
        steps: int = 16,
        epochs: int = 3,
        minibatch: int = 512,
        clip: float = 0.2,
        entropy_weight: float = 0.003,
        grad_clip: float = 0.5,
        schedule: str = "constant",
        temperature: float = 1.0,
        head: str = "dot",
        width: int = 128,
        memory: bool = True,
    ) -> None:
        share(gamma=gamma, lam=lam)
        positive(lr=lr, clip=clip, grad_clip=grad_clip)
        whole(1, steps=steps, epochs=epochs, minibatch=minibatch, width=width)
        not_negative(entropy_weight=entropy_weight, temperature=temperature)
        check_schedule(schedule, spec.total_steps)
        self.spec, self.lr, self.schedule, self.gamma, self.lam = spec, lr, schedule, gamma, lam
        self.epochs, self.minibatch, self.clip = epochs, minibatch, clip
        self.entropy_weight, self.grad_clip, self.temperature = (
            entropy_weight, grad_clip, temperature,
        )  # fmt: skip
        self.net = QNet(spec, head=head, width=width, dueling=False, memory=memory)
        features = self.net.items.shape[1]
        sizes = {"size": self.net.read.size, "features": features, "width": width}
        self.slots = Slots(spec, out=features, seed=spec.seed + 1, **sizes)
        self.critic = Slots(spec, out=1, seed=spec.seed + 2, **sizes)
        self.policy = [*self.net.parameters(), *self.slots.parameters()]
        self.optimizer = torch.optim.Adam(self.policy, lr=lr, eps=1e-5)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=lr, eps=1e-5)
        self.unit = torch.tensor([0.0, 1.0], device=spec.device)  # mean and mean square of returns
        self.rollout = Rollout(steps, spec)
        self.place = torch.arange(spec.slate_size, device=spec.device).float()  # (K,)
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.signature = catalog_signature(spec.item_vectors)
        self.env_steps, self.updates, self.rollouts = 0, 0, 0

    @torch.no_grad()
    def scores(self, obs: Observation) -> Tensor:
        """Logit (B, N) of each item for the first slot."""
        seen = self.net.read(obs)
        return self._base(seen) + self._shift(seen, self._nothing(seen), self.place[:1])[:, 0]

    @torch.no_grad()
    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        free = self._allowed(obs, mask).clone()  # (B, N) not shown above either
        k = self.spec.slate_size
        if (free.sum(dim=1) < k).any():
            row = int((free.sum(dim=1) < k).nonzero()[0])
            raise ValueError(
                f"a slate of {k} needs {k} allowed items, row {row} has {int(free[row].sum())}: "
                "shrink the slate, end the episode earlier or mask fewer items"
            )
        seen = self.net.read(obs)
        base, above = self._base(seen), self._nothing(seen)  # (B, N), (B, 1, R + 1)
        items, chances = [], []
        for slot in range(k):
            logits = base + self._shift(seen, above, self.place[slot : slot + 1])[:, 0]
            probs = self._probs(logits, free, explore)  # (B, N)
            item = self._draw(probs)  # (B,)
            items.append(item)
            chances.append(probs.gather(1, item[:, None]).squeeze(1))
            free.scatter_(1, item[:, None], False)
            above = above + self.net.items[item][:, None, :]
        return Decision(torch.stack(items, dim=1), torch.stack(chances, dim=1).float())

    @torch.no_grad()
    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        if ((slate < EMPTY) | (slate >= self.spec.num_items)).any():
            raise ValueError(
                f"slate must hold items in 0..{self.spec.num_items - 1} or {EMPTY} for an empty "
                f"slot, got {int(slate.min())}..{int(slate.max())}"
            )
        free = self._allowed(obs, mask).clone()  # (B, N)
        seen = self.net.read(obs)
        base, above = self._base(seen), self._nothing(seen)
        chances = []
        for slot, item in enumerate(slate.unbind(dim=1)):
            logits = base + self._shift(seen, above, self.place[slot : slot + 1])[:, 0]
            index = item.clamp(min=0)[:, None]  # (B, 1)
            real = (item != EMPTY) & free.gather(1, index).squeeze(1)  # (B,)
            chance = self._probs(logits, free, explore).gather(1, index).squeeze(1)
            chances.append(torch.where(real, chance, 0.0))
            free.scatter_(1, index, free.gather(1, index) & ~real[:, None])
            above = above + (self.net.items[index[:, 0]] * real[:, None])[:, None, :]
        return torch.stack(chances, dim=1).float()

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        return self._probs(self.scores(obs), self._allowed(obs, mask), explore).float()

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
        """Passes over a rollout in minibatches of states, all their slots at once."""
        lr = lr_at(self.lr, self.schedule, self.env_steps, self.spec.total_steps)
        set_lr(self.optimizer, lr)
        set_lr(self.critic_optimizer, lr)
        steps, users, k = rollout.slot_reward.shape
        with torch.no_grad():
            seen = self.net.read(rollout.obs)
            above = self._above(rollout.slate)  # (T * B, K, R + 1)
            value = self._value(seen, above)  # (T * B, K)
            ends = self.net.read(rollout.ends)
            end = self._value(ends, self._nothing(ends), self.place[:1])[:, 0]
            later = rollout.later(value[:, 0], end) * ~rollout.terminated  # (T, B)
            done = rollout.terminated | rollout.truncated
            shape = (steps, users, k)
            advantage = slot_gae(
                rollout.slot_reward, value.view(shape), later, done, self.gamma, self.lam
            ).view(-1, k)  # (T * B, K)
            returns = advantage + value
            self._rescale(returns)
            credit = standard(advantage)
            old = rollout.propensity.double().log().float()  # what act said
        logs: list[dict[str, Tensor]] = []
        for _ in range(self.epochs):
            order = torch.randperm(len(old), generator=self.generator, device=old.device)
            for rows in order.split(max(1, self.minibatch // k)):
                part = rows_of(seen, rows)
                log = self._improve(part, above[rows], rollout, rows, old[rows], credit[rows])
                log["train/value_loss"] = self._follow(part, above[rows], returns[rows])
                logs.append(log)
        means = {name: torch.stack([log[name] for log in logs]).mean() for name in logs[0]}
        return means | {
            "train/explained_variance": explained_variance(value.flatten(), returns.flatten()),
            "train/learning_rate": torch.tensor(lr),
            "train/value_mean": value[:, 0].mean(),
        }

    def _improve(
        self, seen: Seen, above: Tensor, rollout: Steps, rows: Tensor, old: Tensor, credit: Tensor
    ) -> dict[str, Tensor]:
        """One gradient step of the policy on some rows."""
        slate = rollout.slate[rows]  # (n, K)
        mask = None if rollout.mask is None else rollout.mask[rows]
        free = allowed_items(mask, len(rows), self.spec.num_items, rows.device)  # (n, N)
        n, k = slate.shape
        size = self.spec.num_items + 1  # the last column takes EMPTY
        gone = torch.zeros(n, k, size, dtype=torch.bool, device=rows.device)
        for slot in range(k - 1):  # an item shown stays out of all slots below
            place = slate[:, slot].remainder(size)[:, None, None].expand(n, k - 1 - slot, 1)
            gone[:, slot + 1 :].scatter_(2, place, True)
        shut = gone[:, :, :-1] | ~free[:, None, :]  # (n, K, N)
        none = shut.all(dim=2, keepdim=True)  # nothing is left for this slot: it teaches nothing
        logits = self._base(seen)[:, None, :] + self._shift(seen, above, self.place)  # (n, K, N)
        logp = logits.masked_fill(shut & ~none, -torch.inf).log_softmax(dim=2)
        logp = logp.masked_fill(none, -torch.inf)
        new = logp.gather(2, slate.clamp(min=0)[:, :, None]).squeeze(2)  # (n, K)
        real = (slate != EMPTY) & new.isfinite() & old.isfinite()
        log_ratio = torch.where(real, new, 0.0) - torch.where(real, old, 0.0)
        shown = real.sum().clamp(min=1)
        ratio = log_ratio.exp()
        gain = (clipped_gain(ratio, credit, self.clip) * real).sum() / shown
        spread = -(logp.exp() * logp.masked_fill(logp.isneginf(), 0.0)).sum(dim=2).mean()
        loss = -gain - self.entropy_weight * spread
        check_loss(loss, self.updates, {"seen": seen, "old": old, "credit": credit})
        norm = descend(self.optimizer, loss, self.policy, self.grad_clip)
        self.updates += 1
        with torch.no_grad():
            clipped = ((ratio - 1.0).abs() > self.clip) & real  # (n, K)
            return {
                "train/loss": loss.detach(),
                "train/policy_gradient_loss": -gain.detach(),
                "train/entropy_loss": -spread.detach(),
                "train/approx_kl": (divergence(log_ratio) * real).sum() / shown,
                "train/clip_fraction": clipped.sum() / shown,
                "train/grad_norm": norm,
            }

    def _follow(self, seen: Seen, above: Tensor, returns: Tensor) -> Tensor:
        """One gradient step of the critic towards returns (n, K); its loss ()."""
        mean, spread = self._unit()
        found = self.critic(seen.state, above, self.place).squeeze(2)  # (n, K)
        loss: Tensor = 0.5 * (found - (returns - mean) / spread).square().mean()
        descend(self.critic_optimizer, loss, [*self.critic.parameters()], self.grad_clip)
        return loss.detach()

    def _unit(self) -> tuple[Tensor, Tensor]:
        """Mean and spread () of the returns seen: the critic foretells in these."""
        mean, square = self.unit
        return mean, (square - mean.square()).clamp(min=0.0).sqrt().clamp(min=LEAST_SPREAD)

    def _rescale(self, returns: Tensor) -> None:
        """Take returns into the unit without changing what is foretold (PopArt)."""
        mean, spread = self._unit()
        weight = max(FORGET, 1.0 / (1 + self.rollouts))  # the first few count alike
        self.unit = self.unit.lerp(torch.stack([returns.mean(), returns.square().mean()]), weight)
        self.rollouts += 1
        now, width = self._unit()
        self.critic.out.weight.mul_(spread / width)
        self.critic.out.bias.mul_(spread).add_(mean - now).div_(width)

    def _value(self, seen: Seen, above: Tensor, place: Tensor | None = None) -> Tensor:
        """V (n, K) before each slot, in units of the reward."""
        mean, spread = self._unit()
        found: Tensor = self.critic(seen.state, above, self.place if place is None else place)
        return mean + spread * found.squeeze(2)

    def _base(self, seen: Seen) -> Tensor:
        return self.net.values(seen)  # (n, N)

    def _shift(self, seen: Seen, above: Tensor, place: Tensor) -> Tensor:
        """What the items above add to each logit (n, K, N)."""
        wish: Tensor = self.slots(seen.state, above, place)  # (n, K, R + 1)
        return wish @ self.net.items[:-1].T / math.sqrt(wish.shape[2]) * 4.0

    def _above(self, slate: Tensor) -> Tensor:
        """Sums of features (n, K, R + 1) of the items above each slot of slates (n, K)."""
        shown = self.net.items[slate]  # (n, K, R + 1); EMPTY reads the last row, zeros
        return shown.cumsum(dim=1) - shown

    def _nothing(self, seen: Seen) -> Tensor:
        return seen.state.new_zeros(len(seen.state), 1, self.net.items.shape[1])

    def _probs(self, logits: Tensor, free: Tensor, explore: bool) -> Tensor:
        """Logits and free items (B, N) to chances (B, N) float64."""
        exact = logits.double().masked_fill(~free, -torch.inf)
        temperature = 1.0 if explore else self.temperature
        if temperature:
            return (exact / temperature).softmax(dim=1)
        best = break_ties(logits).masked_fill(~free, -torch.inf).argmax(dim=1, keepdim=True)
        return torch.zeros_like(exact).scatter_(1, best, 1.0)

    def _draw(self, probs: Tensor) -> Tensor:
        """One item (B,) by its chance (B, N): who rings first."""
        wait = torch.rand(
            probs.shape, generator=self.generator, dtype=torch.float64, device=probs.device
        )
        wait = wait.clamp_(min=1e-300).log_().neg_()
        return (probs / wait).argmax(dim=1)

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        return allowed_items(mask, len(obs), self.spec.num_items, obs.profile.device)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {
            "net": self.net.state_dict(),
            "slots": self.slots.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "unit": self.unit,
            "generator": generator_state(self.generator),
            "signature": self.signature,
            "counters": [self.env_steps, self.updates, self.rollouts],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_catalog(self.signature, state["signature"])
        for name in ("net", "slots", "critic"):
            load_net(getattr(self, name), state[name])
        for name in ("optimizer", "critic_optimizer"):
            getattr(self, name).load_state_dict(copy.deepcopy(state[name]))
        self.unit = state["unit"].to(self.unit.device).clone()
        restore_generator(self.generator, state["generator"])
        self.env_steps, self.updates, self.rollouts = state["counters"]
        self.rollout.clear()  # what another policy did is no part of this state

    def experience(self) -> dict[str, Any]:
        """The open rollout: with it training goes on bit for bit."""
        return self.rollout.state_dict()

    def load_experience(self, state: dict[str, Any]) -> None:
        self.rollout.load_state_dict(state)


def descend(
    optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[nn.Parameter], clip: float
) -> Tensor:
    """One clipped gradient step; the gradient's norm before clipping ()."""
    optimizer.zero_grad()
    loss.backward()
    norm: Tensor = nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    return norm.detach()
