"""SlateQ (Ie et al., 2019): values of items once taken, a learnt model of what users take.

Assumed: what a slate brings, now and later, depends on what is taken from it, and adds up over the
items taken (exact where at most one is). The value of a step is then
    Q(s, nothing taken) + sum of gain(s, i) over the items i taken,
fitted to reward + gamma * value of the best slate in the NEXT state. What is taken follows one of
two models, fitted to the same replay by maximum likelihood:
    logit        at most one item: i with chance exp(v_i) / (1 + sum of exp(v) over the slate);
    independent  item i in slot j with chance attention_j * sigmoid(v_i), whatever else is shown
                 (position-based: Craswell et al., 2008);
`choice="auto"` takes logit until users have been seen to take several items of one slate.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.checks import check_finite, check_loss, positive, share, whole
from agents.explore import epsilon_greedy_probs, epsilon_greedy_slate, epsilon_greedy_slate_probs
from agents.nets import QNet, Seen, ValueNet
from agents.replay import Replay, Sample
from agents.saving import (
    catalog_signature,
    check_catalog,
    generator_state,
    load_net,
    load_optimizer,
    restore_generator,
)
from agents.schedules import check_schedule, linear, lr_at, set_lr
from agents.slates import (
    independent_scores,
    independent_value,
    logit_scores,
    logit_value,
    top_k,
)
from encoders.state import EMPTY, Observation

CHOICES = ("auto", "logit", "independent")
SEVERAL = 0.01  # share of slates with anything taken: above it users take several at once
FAR = 20.0  # logits beyond it are certainties; sums of their exp must stay finite


def logit_loss(v: Tensor, taken: Tensor, real: Tensor) -> Tensor:
    """Minus log-likelihood of what was taken of (B, K) under the conditional logit, its mean."""
    shown = v.masked_fill(~real, -torch.inf)  # (B, K)
    total = F.pad(shown, (1, 0)).logsumexp(dim=1)  # (B,) nothing taken has logit 0
    chosen = (v * taken).sum(dim=1) / taken.sum(dim=1).clamp(min=1)  # (B,)
    return (total - chosen).mean()


def independent_loss(v: Tensor, attention: Tensor, taken: Tensor, real: Tensor) -> Tensor:
    """The same per item shown where chances are sigmoid(attention (K,)) * sigmoid(v (B, K))."""
    w = attention.expand_as(v)
    both = F.logsigmoid(v) + F.logsigmoid(w)  # (B, K) log of the chance
    # 1 - sigmoid(a) sigmoid(b) without cancellation
    neither = torch.stack([-w, -v, -w - v]).logsumexp(dim=0) + both  # (B, K)
    return -(torch.where(taken, both, neither) * real).sum() / real.sum().clamp(min=1)


def taken_of(transition: Transition) -> Tensor:
    """Which slots (B, K) were taken: a single action that pays or costs something is."""
    taken = transition.chosen
    if taken.shape[1] == 1:  # an environment without clicks: what has an effect has been taken
        taken = taken | (transition.slot_reward != 0)
    return taken & (transition.decision.slate != EMPTY)


class SlateNet(nn.Module):
    """What users take (v, attention) and what it brings (nothing, gain)."""

    def __init__(self, spec: AgentSpec, *, head: str, width: int, memory: bool) -> None:
        super().__init__()
        form: dict[str, Any] = {"head": head, "width": width, "memory": memory}
        self.choice = QNet(spec, **form, seed=spec.seed)
        self.gain = QNet(spec, **form, seed=spec.seed + 1)
        self.nothing = ValueNet(spec, width=width, memory=memory, seed=spec.seed + 2)
        self.gain.read = self.nothing.read = self.choice.read  # one table of items for all
        self.attention = nn.Parameter(torch.full((spec.slate_size,), 2.0, device=spec.device))

    def read(self, obs: Observation) -> Seen:
        return self.choice.read(obs)

    def scores(self, seen: Seen, allowed: Tensor, independent: bool) -> Tensor:
        """Scores (B, N) whose best allowed items in order are the best slate."""
        v, gain = self.choice.values(seen), self.gain.values(seen)  # (B, N) each
        if independent:
            return independent_scores(v.sigmoid(), gain, allowed, self.attention.sigmoid())
        s = v.clamp(-FAR, FAR).exp()
        return logit_scores(s, gain, allowed, len(self.attention))

    def value(self, seen: Seen, slate: Tensor, real: Tensor, independent: bool) -> Tensor:
        """What a slate (B, K) is worth, (B,)."""
        v, gain = self.choice.values_of(seen, slate), self.gain.values_of(seen, slate)  # (B, K)
        if independent:
            more = independent_value(v.sigmoid(), gain, self.attention.sigmoid(), real)
        else:
            more = logit_value(v.clamp(-FAR, FAR).exp(), gain, real)
        return self.nothing(seen) + more

    def outcome(self, seen: Seen, slate: Tensor, taken: Tensor) -> Tensor:
        """What a slate was worth of which some items were taken, (B, K) each, to (B,)."""
        return self.nothing(seen) + (self.gain.values_of(seen, slate) * taken).sum(dim=1)


def optimizer_of(net: SlateNet, lr: float, shrink: float) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay on what gives every user an opinion of every item."""
    personal = net.choice.personal() + net.gain.personal()
    held = {id(p) for p in personal}
    rest = [p for p in net.parameters() if id(p) not in held]
    groups = [{"params": personal, "weight_decay": shrink}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


class SlateQ:
    """Plan over slates with exact best slates; acts epsilon-greedily per slot of the best one.

    The target net is the running mean of the net, `tau` of the way at every update; it serves
    users and prices the slate that the net picks (double).
    """

    def __init__(
        self,
        spec: AgentSpec,
        *,
        choice: str = "auto",
        lr: float = 3e-3,
        schedule: str = "constant",
        gamma: float = 0.8,
        epsilon_start: float = 0.3,
        epsilon_end: float = 0.1,
        epsilon_steps: int = 20_000,
        batch_size: int = 256,
        capacity: int = 200_000,
        replay_ratio: float = 4.0,
        tau: float = 0.01,
        double: bool = True,
        head: str = "dot",
        width: int = 128,
        memory: bool = True,
        learning_starts: int = 1000,
        grad_clip: float = 10.0,
        shrink: float = 0.0,
    ) -> None:
        if choice not in CHOICES:
            raise ValueError(f"choice must be one of {', '.join(CHOICES)}, got {choice!r}")
        share(gamma=gamma, epsilon_start=epsilon_start, epsilon_end=epsilon_end)
        positive(lr=lr, replay_ratio=replay_ratio, tau=tau, grad_clip=grad_clip)
        whole(
            1, epsilon_steps=epsilon_steps, batch_size=batch_size, learning_starts=learning_starts
        )
        check_schedule(schedule, spec.total_steps)
        if tau > 1:
            raise ValueError(f"tau must be in (0, 1], got {tau}: the share of the net in its mean")
        if not shrink >= 0:
            raise ValueError(f"shrink must be at least 0, got {shrink}")
        self.spec, self.choice, self.batch_size = spec, choice, batch_size
        self.lr, self.schedule = lr, schedule
        self.epsilons = (epsilon_start, epsilon_end, epsilon_steps)
        self.replay_ratio, self.tau, self.double = replay_ratio, tau, double
        self.learning_starts, self.grad_clip = learning_starts, grad_clip
        self.net = SlateNet(spec, head=head, width=width, memory=memory)
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        self.optimizer = optimizer_of(self.net, lr, shrink)
        self.replay = Replay(capacity, spec=spec, gamma=gamma)
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.signature = catalog_signature(spec.item_vectors)
        self.env_steps, self.updates = 0, 0
        self.budget = 0.0  # samples earned by env steps and not yet drawn
        self.tally = torch.zeros(2, device=spec.device)  # slates: something taken, several taken
        self.independent = choice == "independent"
        self.next_look = learning_starts  # env steps at which `auto` looks at the tally

    @property
    def epsilon(self) -> float:
        """The chance that a slot explores now, a function of the env steps seen."""
        return linear(self.env_steps, *self.epsilons)

    def scores(self, obs: Observation) -> Tensor:
        """Scores (B, N) whose best items in order are the best slate, none of them masked."""
        return self._scores(obs, self._allowed(obs, None))

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        allowed, epsilon = self._allowed(obs, mask), self.epsilon if explore else 0.0
        return epsilon_greedy_slate(
            self._scores(obs, allowed), allowed, self.spec.slate_size, epsilon, self.generator
        )

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        allowed, epsilon = self._allowed(obs, mask), self.epsilon if explore else 0.0
        return epsilon_greedy_slate_probs(self._scores(obs, allowed), allowed, slate, epsilon)

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        allowed, epsilon = self._allowed(obs, mask), self.epsilon if explore else 0.0
        return epsilon_greedy_probs(self._scores(obs, allowed), allowed, epsilon)

    def update(self, transition: Transition) -> dict[str, Tensor]:
        """Remember a step of B users, then make the gradient steps that it has earned."""
        check_finite(transition)
        self.replay.add(transition)
        users = len(transition.reward)
        self.env_steps += users
        taken = taken_of(transition).sum(dim=1)  # (B,)
        self.tally += torch.stack([(taken > 0).sum(), (taken > 1).sum()])
        if self.env_steps < self.learning_starts:
            return {}
        if self.choice == "auto" and self.env_steps >= self.next_look:
            some, several = self.tally.tolist()  # waits for the device: once per doubling
            self.independent, self.next_look = several > SEVERAL * some, 2 * self.env_steps
        self.budget += users * self.replay_ratio
        lr = lr_at(self.lr, self.schedule, self.env_steps, self.spec.total_steps)
        set_lr(self.optimizer, lr)
        logs: list[dict[str, Tensor]] = []
        while self.budget >= self.batch_size:
            self.budget -= self.batch_size
            logs.append(self._learn(self.replay.sample(self.batch_size, self.generator)))
        if not logs:
            return {}
        means = {name: torch.stack([log[name] for log in logs]).mean() for name in logs[0]}
        now = {"epsilon": self.epsilon, "learning_rate": lr, "independent": self.independent}
        return means | {f"train/{name}": torch.tensor(float(x)) for name, x in now.items()}

    def _learn(self, sample: Sample) -> dict[str, Tensor]:
        """One gradient step on what was taken and on what it brought."""
        batch, slate = sample.transition, sample.transition.decision.slate  # (B, K)
        real = slate != EMPTY
        taken = taken_of(batch)
        with torch.no_grad():
            target = batch.reward + sample.discount * self._next_value(batch)  # (B,)
        seen = self.net.read(batch.obs)
        outcome = self.net.outcome(seen, slate, taken)  # (B,)
        loss = F.mse_loss(outcome, target)  # a mean is what adds up
        v = self.net.choice.values_of(seen, slate)  # (B, K)
        if self.independent:
            choice_loss = independent_loss(v, self.net.attention, taken, real)
        else:
            choice_loss = logit_loss(v, taken, real)
        check_loss(loss + choice_loss, self.updates, sample)
        self.optimizer.zero_grad()
        (loss + choice_loss).backward()
        # the two losses share no weight: one must not shorten the steps of the other
        for part in (self.net.choice, self.net.gain, self.net.nothing):
            norm = nn.utils.clip_grad_norm_(part.parameters(), self.grad_clip)
        self.optimizer.step()

        self.updates += 1
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, self.tau)
        return {
            "train/loss": loss.detach(),
            "train/choice_loss": choice_loss.detach(),
            "train/q_mean": outcome.detach().mean(),
            "train/td_error": (outcome.detach() - target).abs().mean(),
            "train/target_mean": target.mean(),
            "train/grad_norm": norm,
        }

    def _next_value(self, batch: Transition) -> Tensor:
        """Value (B,) of the best slate in the next state: picked by the net, priced by its mean."""
        n, k = self.spec.num_items, self.spec.slate_size
        allowed = allowed_items(
            batch.next_mask, len(batch.reward), n, batch.reward.device, may_be_empty=True
        )  # (B, N); who has left may have seen everything
        seen = self.net.read(batch.next_obs)
        picks = self.net if self.double else self.target
        slate, real = top_k(picks.scores(seen, allowed, self.independent), allowed, k)
        return self.target.value(seen, slate, real, self.independent)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {
            "net": self.net.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": generator_state(self.generator),
            "signature": self.signature,
            "tally": self.tally.clone(),
            "independent": self.independent,
            "next_look": self.next_look,
            "env_steps": self.env_steps,
            "updates": self.updates,
            "budget": self.budget,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_catalog(self.signature, state["signature"])
        load_net(self.net, state["net"])
        load_net(self.target, state["target"])
        load_optimizer(self.optimizer, state["optimizer"])
        restore_generator(self.generator, state["generator"])
        self.tally = state["tally"].to(self.spec.device).clone()
        self.independent, self.next_look = state["independent"], state["next_look"]
        self.env_steps, self.updates = state["env_steps"], state["updates"]
        self.budget = state["budget"]
        self.replay.clear()  # what another net lived through is no part of this state

    def experience(self) -> dict[str, Any]:
        """The replay: with it training goes on bit for bit."""
        return self.replay.state_dict()

    def load_experience(self, state: dict[str, Any]) -> None:
        self.replay.load_state_dict(state)

    @torch.no_grad()
    def _scores(self, obs: Observation, allowed: Tensor) -> Tensor:
        return self.target.scores(self.target.read(obs), allowed, self.independent)

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        return allowed_items(mask, len(obs), self.spec.num_items, obs.profile.device)
