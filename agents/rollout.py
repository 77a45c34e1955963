"""A rollout: the last T steps of B users, their advantages, and the critic that takes part in them.

Slates get credit slot by slot: what slot k earned itself, and what came after the whole slate. The
reward of the other slots of the same step is left out of slot k's credit: with ten slots it is nine
tenths of the variance, and hardly item k's doing.
"""

import copy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from agents.base import AgentSpec, Mask, Transition
from agents.nets import Seen, ValueNet
from agents.replay import check_shapes
from agents.saving import load_net
from encoders.state import EMPTY, Observation

FORGET = 0.1  # weight of the newest rollout in the running mean and spread of returns
LEAST_SPREAD = 0.01  # returns that never differ have no unit of their own
NEVER = -1e30  # a logarithm that weighs nothing in a sum, and has a gradient unlike -inf
PARTS = ("slate", "propensity", "reward", "slot_reward", "terminated", "truncated")


@dataclass(frozen=True)
class Steps:
    """T steps of B users; what nets read is flat, T * B rows, step after step."""

    obs: Observation  # T * B rows
    mask: Mask  # of the same rows
    slate: Tensor  # (T * B, K)
    propensity: Tensor  # (T * B, K)
    reward: Tensor  # (T, B)
    slot_reward: Tensor  # (T, B, K)
    terminated: Tensor  # (T, B)
    truncated: Tensor  # (T, B)
    ends: Observation  # B rows after the last step, then C rows where a step was truncated
    cut: Tensor  # (C,) int64: which of the T * B rows those follow

    def later(self, value: Tensor, end: Tensor) -> Tensor:
        """V of `obs` (T * B,) and of `ends` (B + C,) to V after each step (T, B)."""
        steps, users = self.reward.shape
        later = torch.cat([value[users:], end[:users]])  # (T * B,)
        return later.index_copy(0, self.cut, end[users:]).view(steps, users)


class Rollout:
    """Collect `length` steps of B users who step together."""

    def __init__(self, length: int, spec: AgentSpec) -> None:
        self.length, self.spec = length, spec
        self.clear()

    def clear(self) -> None:
        self.obs: list[Observation] = []
        self.masks: list[Tensor] = []  # one a step, or none at all
        self.parts: list[dict[str, Tensor]] = []
        self.cuts: list[Observation] = []  # of each step: the last view of who was truncated
        self.end: Observation | None = None

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def full(self) -> bool:
        return len(self) >= self.length

    def add(self, transition: Transition) -> None:
        """Keep one step; row b follows row b of the last one, unless that was done."""
        t = transition
        check_shapes(t, self.spec)
        if self.parts and len(t.reward) != len(self.parts[0]["reward"]):
            raise ValueError(
                "every step of a rollout must have the same users side by side, expected "
                f"{len(self.parts[0]['reward'])} rows, got {len(t.reward)}: finish the rollout "
                "first, or use one agent per number of users"
            )
        if self.parts and (form_of(t.mask) != (form_of(self.masks[0] if self.masks else None))):
            raise ValueError(
                "mask must keep its form and width within a rollout, got "
                f"{form_of(self.masks[0] if self.masks else None)}, then {form_of(t.mask)}: "
                "pass None, bool or excluded ids throughout"
            )
        self.obs.append(t.obs)
        if t.mask is not None:
            self.masks.append(t.mask)
        self.parts.append(
            {
                "slate": t.decision.slate,
                "propensity": t.decision.propensity,
                "reward": t.reward,
                "slot_reward": t.slot_reward,
                "terminated": t.terminated,
                "truncated": t.truncated & ~t.terminated,
            }
        )
        self.cuts.append(t.next_obs[self.parts[-1]["truncated"]])
        self.end = t.next_obs

    def steps(self) -> Steps:
        """All that was collected."""
        if self.end is None:
            raise ValueError("an empty rollout has no steps: add transitions first")
        parts = {name: torch.stack([part[name] for part in self.parts]) for name in PARTS}
        return Steps(
            obs=joined(self.obs),
            mask=torch.cat(self.masks) if self.masks else None,
            slate=parts.pop("slate").flatten(0, 1),
            propensity=parts.pop("propensity").flatten(0, 1),
            ends=joined([self.end, *self.cuts]),
            cut=parts["truncated"].flatten().nonzero().squeeze(1),
            **parts,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything collected so far as plain tensors."""
        return {
            "obs": [tensors(obs) for obs in self.obs],
            "masks": list(self.masks),
            "parts": [dict(part) for part in self.parts],
            "cuts": [tensors(obs) for obs in self.cuts],
            "end": {} if self.end is None else tensors(self.end),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the middle of a saved rollout."""
        if len(state["parts"]) >= self.length:
            raise ValueError(
                f"the saved rollout has {len(state['parts'])} steps, one of this agent is full at "
                f"{self.length}: use the rollout length it was saved with"
            )
        self.clear()
        device = self.spec.device
        self.obs = [Observation(**obs).to(device) for obs in state["obs"]]
        self.masks = [mask.to(device) for mask in state["masks"]]
        self.parts = [{n: v.to(device) for n, v in part.items()} for part in state["parts"]]
        self.cuts = [Observation(**obs).to(device) for obs in state["cuts"]]
        self.end = Observation(**state["end"]).to(device) if state["end"] else None


def form_of(mask: Mask) -> str:
    """How a mask is written, for comparison and for messages."""
    return "None" if mask is None else f"{mask.dtype} of width {mask.shape[1]}"


def joined(parts: list[Observation]) -> Observation:
    """Observations one below the other."""
    names = [field.name for field in fields(Observation)]
    return Observation(**{n: torch.cat([getattr(part, n) for part in parts]) for n in names})


def tensors(obs: Observation) -> dict[str, Tensor]:
    """An observation's fields by name."""
    return {field.name: getattr(obs, field.name) for field in fields(obs)}


def rows_of(seen: Seen, rows: Tensor) -> Seen:
    """Some rows of what nets read."""
    return Seen(**{field.name: getattr(seen, field.name)[rows] for field in fields(seen)})


def gae(
    reward: Tensor,
    value: Tensor,
    later: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """Generalised advantages (T, B) (Schulman et al., 2016) of (T, B) each.

    `later` is V after each step. Leaving is worth nothing more; a step limit is worth V of the last
    view. Neither lets the advantage of the row's next user through.
    """
    delta = reward + gamma * later * ~terminated - value  # (T, B)
    carry = gamma * lam * (~(terminated | truncated)).to(delta.dtype)  # (T, B)
    advantage, total = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        total = delta[t] + carry[t] * total  # (B,)
        advantage[t] = total
    return advantage


def slot_advantages(advantage: Tensor, slot_reward: Tensor, expected: Tensor) -> Tensor:
    """Advantages of slates (n,), rewards of slots (n, K) and those expected (n, K) to (n, K).

    A slot keeps its own surprise and the surprise of what came after the slate; the surprises of
    the slots beside it in this step are taken out. With one slot the advantage is the slate's.
    """
    if slot_reward.shape[1] == 1:
        return advantage[:, None]
    surprise = slot_reward - expected  # (n, K)
    return (advantage - surprise.sum(dim=1))[:, None] + surprise


def slate_log_probs(logp: Tensor, slate: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability (n, K) of each item of slates (n, K) given those above, and which are real.

    `logp` (n, N) are the first slot's, -inf where forbidden: an item above leaves the sum. Empty
    and forbidden slots are not real and get 0.
    """
    shown = logp.gather(1, slate.clamp(min=0))  # (n, K)
    real = (slate != EMPTY) & shown.isfinite()  # (n, K)
    if slate.shape[1] == 1:
        return torch.where(real, shown, 0.0), real
    first = slate.gather(1, real.int().argmax(dim=1, keepdim=True))  # (n, 1) one that was shown
    gone = torch.where(real, slate, first.clamp(min=0))  # (n, K)
    rest = logp.scatter(1, gone, NEVER).logsumexp(dim=1, keepdim=True)  # (n, 1) never shown
    return given_above(shown, real, rest), real


def given_above(shown: Tensor, real: Tensor, rest: Tensor) -> Tensor:
    """Logits shown (n, K), log-sum of the rest (n, 1) to log-probabilities (n, K), given above."""
    shown = torch.where(real, shown, NEVER)
    left = torch.cat([rest.clamp(min=NEVER), shown.flip(1)], dim=1).logcumsumexp(dim=1)
    return torch.where(real, shown - left[:, 1:].flip(1), 0.0)


def entropy(logp: Tensor) -> Tensor:
    """Entropy (n,) of log-probabilities (n, N), -inf where forbidden."""
    return -(logp.exp() * logp.masked_fill(logp.isneginf(), 0.0)).sum(dim=1)


def explained_variance(value: Tensor, returns: Tensor) -> Tensor:
    """1 where values foretell the returns, 0 where a constant would do as well."""
    spread = returns.var(correction=0).clamp(min=1e-12)
    return 1.0 - (returns - value).var(correction=0) / spread


class Critic:
    """V(s) and, for slates, the reward of each slot now; each in units of what was seen so far.

    Returns of 0.1 and of 1,000 are learnt alike: targets are standardised by their running mean and
    spread, and the last layer is rewritten so that what it says stays put (PopArt, van Hasselt et
    al., 2016).
    """

    def __init__(
        self, spec: AgentSpec, *, lr: float, width: int, grad_clip: float, memory: bool = True
    ) -> None:
        self.net = ValueNet(spec, width=width, memory=memory, seed=spec.seed + 1)
        self.now = ValueNet(spec, width=width, memory=memory, seed=spec.seed + 2)
        self.slots, self.grad_clip = spec.slate_size, grad_clip
        self.parameters = [*self.net.parameters()]
        if self.slots > 1:  # one slot's reward is the slate's: V knows of it
            self.parameters += self.now.parameters()
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, eps=1e-5)
        self.mean = torch.zeros((), device=spec.device)
        self.square = torch.ones((), device=spec.device)  # running mean of squares
        self.place = torch.zeros(self.slots, device=spec.device)  # (K,) mean reward of each slot
        self.rollouts = 0

    @property
    def spread(self) -> Tensor:
        """Standard deviation () of the returns seen."""
        return (self.square - self.mean.square()).clamp(min=0.0).sqrt().clamp(min=LEAST_SPREAD)

    @torch.no_grad()
    def values(self, seen: Seen) -> Tensor:
        """V (n,) in units of the reward."""
        value: Tensor = self.net(seen)
        return self.mean + self.spread * value

    @torch.no_grad()
    def expected(self, seen: Seen) -> Tensor:
        """Reward (n, K) of each slot now: the user's level on top of the slot's mean."""
        if self.slots == 1:
            return torch.zeros(len(seen.state), 1, device=seen.state.device)
        level: Tensor = self.now(seen)  # (n,)
        return self.place + level[:, None]

    @torch.no_grad()
    def rescale(self, returns: Tensor, slot_reward: Tensor) -> None:
        """Take new returns (n,) into the unit without changing what is foretold."""
        mean, spread = self.mean, self.spread
        weight = max(FORGET, 1.0 / (1 + self.rollouts))  # the first few count alike
        self.mean = mean.lerp(returns.mean(), weight)
        self.square = self.square.lerp(returns.square().mean(), weight)
        self.place = self.place.lerp(slot_reward.mean(dim=0), weight)
        self.rollouts += 1
        last: nn.Linear = self.net.value
        last.weight.mul_(spread / self.spread)
        last.bias.mul_(spread).add_(mean - self.mean).div_(self.spread)

    def learn(self, seen: Seen, returns: Tensor, slot_reward: Tensor) -> Tensor:
        """One gradient step towards returns (n,) and slot rewards (n, K); the loss of V ()."""
        target = (returns - self.mean) / self.spread  # (n,)
        loss: Tensor = 0.5 * (self.net(seen) - target).square().mean()
        total = loss
        if self.slots > 1:
            level = (slot_reward - self.place).mean(dim=1)  # (n,)
            total = total + 0.5 * (self.now(seen) - level).square().mean()
        self.optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "now": self.now.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mean": self.mean,
            "square": self.square,
            "place": self.place,
            "rollouts": self.rollouts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_net(self.net, state["net"])
        load_net(self.now, state["now"])
        self.optimizer.load_state_dict(
            copy.deepcopy(state["optimizer"])
        )  # it keeps what it is given
        device = self.mean.device
        self.mean, self.square = state["mean"].to(device), state["square"].to(device)
        self.place, self.rollouts = state["place"].to(device), state["rollouts"]
