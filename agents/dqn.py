"""Deep Q-learning (Mnih et al., 2015) for slates: a slate is worth the sum of its items' values.

Double (van Hasselt et al., 2016), dueling (Wang et al., 2016), n-step, prioritised (Schaul et al.,
2016) and with quantiles of the return (Dabney et al., 2018), each by a setting of its own.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.checks import check_finite, check_loss, not_negative, positive, share, whole
from agents.explore import (
    epsilon_greedy_probs,
    epsilon_greedy_slate,
    epsilon_greedy_slate_probs,
    highest,
    joined,
    row_blocks,
)
from agents.nets import QNet, Seen
from agents.priorities import Priorities, check_priority
from agents.replay import Replay
from agents.retrieval import Index, check_candidates, check_mask, greedy_probs, greedy_slates
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

NEAR = 2**18  # values of what comes next that are held at once: 2 MB


def next_value(q: Tensor, choose: Tensor, allowed: Tensor | None, k: int) -> Tensor:
    """Values, choosing values, allowed (B, N) each, to the mean value (B,) of the K items chosen.

    Values may be quantiles (B, N, Q), then the mean has them (B, Q). Double Q-learning (van Hasselt
    et al., 2016) when `choose` comes from another net than `q`. Where fewer than K are allowed the
    missing slots are worth nothing.
    """
    best, real = next_slate(choose, allowed, k)  # (B, K) each
    return (torch.take_along_dim(q, _like(best, q), dim=1) * _like(real, q)).mean(dim=1)


def next_slate(choose: Tensor, allowed: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Choosing values and allowed (B, N) to the K best (B, K), and which of them are allowed."""
    if allowed is not None:
        choose = torch.where(allowed, choose, -torch.inf)
    best = highest(choose, min(k, choose.shape[1]))[1]  # (B, K)
    real = torch.ones_like(best, dtype=torch.bool) if allowed is None else allowed.gather(1, best)
    return best, real


def slot_targets(slot_return: Tensor, discount: Tensor, value: Tensor) -> Tensor:
    """Return of each slot (B, K) plus its share of what comes after, `discount` 0 after leaving."""
    after = (_like(discount, value) * value)[:, None]  # (B, 1) or (B, 1, Q)
    return _like(slot_return, after) + after


def quantile_huber(q: Tensor, target: Tensor, kappa: float) -> Tensor:
    """Quantile Huber loss (B, K) of quantiles and target quantiles (B, K, Q).

    Dabney et al. (2018) sum over quantiles; the mean keeps lr and grad_clip what they are for one.
    Errors below `kappa` count squared, which makes expectiles of quantiles.
    """
    share = (torch.arange(q.shape[2], device=q.device) + 0.5) / q.shape[2]  # (Q,) the midpoints
    error = target[:, :, None, :] - q[:, :, :, None]  # (B, K, Q, Q'): each quantile to each target
    pull = (share[:, None] - (error.detach() < 0).to(q.dtype)).abs()  # (B, K, Q, Q')
    loss = F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=kappa) / kappa
    return (pull * loss).mean(dim=(2, 3))


def shown_mean(value: Tensor, real: Tensor) -> Tensor:
    """Mean of (B, K) over the slots that showed something."""
    return (value * real).sum() / real.sum().clamp(min=1)


def _like(value: Tensor, other: Tensor) -> Tensor:
    """The same value with dimensions of size 1 at its end until it has as many as `other`."""
    return value.view(*value.shape, *[1] * (other.ndim - value.ndim))


def optimizer_of(net: QNet, lr: float, shrink: float) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019) on the personal weights only.

    The best of thousands of items is wherever their values are wrong upwards: without decay more
    updates make a worse policy.
    """
    personal = net.personal()
    held = {id(p) for p in personal}
    rest = [p for p in net.parameters() if id(p) not in held]
    groups = [{"params": personal, "weight_decay": shrink}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


class DQN:
    """Double, dueling, n-step Q-learning with a replay of ids; acts epsilon-greedily per slot.

    The target net is the running mean of the net (Polyak and Juditsky, 1992), `tau` of the way at
    every update. It is also what serves users: among thousands of items the highest value of a net
    that still jitters is one that jittered upwards.
    """

    index: Index | None = None  # of what describes items: training does not change it

    def __init__(
        self,
        spec: AgentSpec,
        *,
        lr: float = 5e-3,
        schedule: str = "constant",
        gamma: float = 0.8,
        epsilon_start: float = 0.3,
        epsilon_end: float = 0.2,
        epsilon_steps: int = 20_000,
        batch_size: int = 256,
        capacity: int = 200_000,
        replay_ratio: float = 2.0,
        priority: float = 0.0,
        beta: float = 0.4,
        tau: float = 0.01,
        n_step: int = 1,
        double: bool = True,
        dueling: bool = True,
        quantiles: int = 1,
        kappa: float = 1.0,
        head: str = "dot",
        width: int = 128,
        memory: bool = True,
        learning_starts: int = 1000,
        grad_clip: float = 10.0,
        shrink: float = 40.0,
        candidates: int = 0,
        amp: bool = False,
        compile: bool = False,
    ) -> None:
        share(gamma=gamma, epsilon_start=epsilon_start, epsilon_end=epsilon_end, beta=beta)
        positive(
            lr=lr, epsilon_steps=epsilon_steps, batch_size=batch_size, replay_ratio=replay_ratio,
            tau=tau, grad_clip=grad_clip, kappa=kappa,
        )  # fmt: skip
        whole(1, quantiles=quantiles)
        check_schedule(schedule, spec.total_steps)
        if tau > 1:
            raise ValueError(f"tau must be in (0, 1], got {tau}: the share of the net in its mean")
        not_negative(shrink=shrink, priority=priority)
        check_priority(priority, spec.total_steps)
        self.spec, self.gamma, self.batch_size = spec, gamma, batch_size
        self.lr, self.schedule, self.beta, self.tau = lr, schedule, beta, tau
        self.epsilons = (epsilon_start, epsilon_end, epsilon_steps)
        self.replay_ratio, self.double, self.learning_starts = replay_ratio, double, learning_starts
        self.kappa, self.amp, self.grad_clip, self.candidates = kappa, amp, grad_clip, candidates
        form: dict[str, Any] = {"head": head, "width": width, "dueling": dueling}
        self.net = QNet(spec, memory=memory, quantiles=quantiles, **form)
        check_candidates(candidates, spec, self.net)
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        self.optimizer = optimizer_of(self.net, lr, shrink)
        self.replay = Replay(capacity, spec=spec, n_step=n_step, gamma=gamma)
        self.priorities = Priorities(priority, device=spec.device) if priority else None
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.signature = catalog_signature(spec.item_vectors)
        self.env_steps, self.updates, self.budget = 0, 0, 0.0  # of samples earned and not yet drawn
        # functions of tensors are compiled, not modules: state dicts keep their names
        self.values_and_targets = torch.compile(self._both) if compile else self._both

    @property
    def epsilon(self) -> float:
        """The chance that a slot explores now, a function of the env steps seen."""
        return linear(self.env_steps, *self.epsilons)

    @torch.no_grad()
    def scores(self, obs: Observation) -> Tensor:
        """Value (B, N) of showing each item now."""
        return self._mean(self.target(obs))

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        epsilon, k = self.epsilon if explore else 0.0, self.spec.slate_size
        if self.candidates and not explore:
            slate = self._found(obs, mask, k)
            return Decision(slate, torch.ones(slate.shape, device=slate.device))
        made = [
            epsilon_greedy_slate(q, allowed, k, epsilon, self.generator)
            for _, q, allowed in self._blocks(obs, mask)
        ]
        return joined(made)

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        epsilon = self.epsilon if explore else 0.0
        if self.candidates and not explore:
            return greedy_probs(self._found(obs, mask, slate.shape[1]), slate)
        return torch.cat([
            epsilon_greedy_slate_probs(q, allowed, slate[rows], epsilon)
            for rows, q, allowed in self._blocks(obs, mask)
        ])  # fmt: skip

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        epsilon = self.epsilon if explore else 0.0
        if self.candidates and not explore:
            return F.one_hot(self._found(obs, mask, 1)[:, 0], self.spec.num_items).float()
        return torch.cat([
            epsilon_greedy_probs(q, allowed, epsilon)
            for _, q, allowed in self._blocks(obs, mask)
        ])  # fmt: skip

    @torch.no_grad()
    def _found(self, obs: Observation, mask: Mask, k: int) -> Tensor:
        """Greedy slates (B, K) among candidates, among all items where these were too few."""
        check_mask(mask, len(obs), self.spec)
        if self.index is None:
            self.index = Index(self.target.read.described(), seed=self.spec.seed)
        seen = self.target.read(obs)
        slate, enough = greedy_slates(self.target, self.index, seen, mask, k, self.candidates)
        rest = (~enough).nonzero().squeeze(1)  # (R,)
        if len(rest):
            few, part = obs[rest], None if mask is None else mask[rest]
            exact = [
                epsilon_greedy_slate(q, allowed, k, 0.0, self.generator).slate
                for _, q, allowed in self._blocks(few, part)
            ]
            slate[rest] = torch.cat(exact)
        return slate

    @torch.no_grad()
    def _blocks(self, obs: Observation, mask: Mask) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, the order of their items (b, N) and what is allowed (b, N): never all users'."""
        shop = self.target.ranking_shop()
        for rows in row_blocks(len(obs), self.spec.num_items * self.net.quantiles):
            q = self._mean(self.target.ranking(self.target.read(obs[rows]), shop))  # (b, N)
            yield rows, q, self._allowed(obs[rows], None if mask is None else mask[rows])

    def update(self, transition: Transition) -> dict[str, Tensor]:
        """Remember a step of B users, then make the gradient steps that it has earned."""
        check_finite(transition)
        self.replay.add(transition)
        if self.priorities is not None:
            self.priorities.add(self.replay.newest(), self.replay.length * self.replay.batch)
        users = len(transition.reward)
        self.env_steps += users
        if self.env_steps < self.learning_starts:
            return {}
        self.budget += users * self.replay_ratio
        logs: list[dict[str, Tensor]] = []
        while self.budget >= self.batch_size:
            self.budget -= self.batch_size
            logs.append(self._learn(*self._draw()))
        if not logs:
            return {}
        means = {name: torch.stack([log[name] for log in logs]).mean() for name in logs[0]}
        rates = {"train/epsilon": self.epsilon, "train/learning_rate": self._lr()}
        return means | {name: torch.tensor(rate) for name, rate in rates.items()}

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Places in the replay and importance weights, (n,) each."""
        if self.priorities is None:
            place = self.replay.draw(self.batch_size, self.generator)
            return place, torch.ones(len(place), device=place.device)
        place = self.priorities.draw(self.batch_size, self.generator)
        beta = linear(self.env_steps, self.beta, 1.0, self.spec.total_steps or 1)
        return place, self.priorities.weights(place, beta)

    def _learn(self, place: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """One gradient step."""
        sample = self.replay.at(place)
        batch = sample.transition
        slate, real = batch.decision.slate, batch.decision.slate != EMPTY  # (B, K)
        allowed = (
            None
            if batch.next_mask is None
            else allowed_items(
                batch.next_mask, len(slate), self.spec.num_items, slate.device, may_be_empty=True
            )
        )  # (B, N); who has left may have seen everything
        seen, later = self.net.read.pair(batch.obs, batch.next_obs)
        q, target = self.values_and_targets(
            seen, later, slate, allowed, sample.slot_return, sample.discount
        )
        if q.ndim == 2:
            each = F.smooth_l1_loss(q, target, reduction="none")  # (B, K)
        else:
            each = quantile_huber(q, target, self.kappa)  # (B, K)
        loss = shown_mean(each * weight[:, None], real)
        check_loss(loss, self.updates, sample)
        set_lr(self.optimizer, self._lr())
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.grad_clip)
        self.optimizer.step()

        self.updates += 1
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.target.parameters()), list(self.net.parameters()), self.tau
            )
        q, target = self._mean(q.detach()), self._mean(target)  # (B, K)
        error = (q - target).abs()  # (B, K)
        if self.priorities is not None:
            shown = real.sum(dim=1).clamp(min=1)  # (B,)
            self.priorities.update(place, (error * real).sum(dim=1) / shown)
        return {
            "train/loss": loss.detach(),
            "train/q_mean": shown_mean(q, real),
            "train/td_error": shown_mean(error, real),
            "train/target_mean": shown_mean(target, real),
            "train/grad_norm": norm.detach(),
        }

    def _both(
        self, seen: Seen, later: Seen, slate: Tensor, allowed: Tensor | None,
        slot_return: Tensor, discount: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Values of what was shown and their targets, (B, K) or (B, K, Q) each."""
        with torch.no_grad(), self._precision():
            value = self._later(later, allowed)  # (B,) or (B, Q)
        with self._precision():  # one of its own: casts made without gradient are not to be reused
            q = self.net.values_of(seen, slate).float()
        return q, slot_targets(slot_return, discount, value)

    def _later(self, later: Seen, allowed: Tensor | None) -> Tensor:
        """What comes next is worth (B,) or (B, Q): the target prices no more than what is chosen.

        All items are looked at for a few rows at a time, whose values stay in caches.
        """
        chooser, k = self.net if self.double else self.target, self.spec.slate_size
        shop, slates = chooser.ranking_shop(), []
        for rows in row_blocks(len(later), self.spec.num_items * chooser.quantiles, NEAR):
            choose = self._mean(chooser.ranking(later[rows], shop))  # (b, N)
            slates.append(next_slate(choose, None if allowed is None else allowed[rows], k))
        best, real = (torch.cat(each) for each in zip(*slates, strict=True))  # (B, K)
        value = self.target.values_of(later, best).float()  # (B, K) or (B, K, Q)
        return (value * _like(real, value)).mean(dim=1)

    def _precision(self) -> torch.autocast:
        """Products in bfloat16 if wanted. Acting keeps float32: close values must stay apart."""
        return torch.autocast(self.generator.device.type, torch.bfloat16, enabled=self.amp)

    def _mean(self, q: Tensor) -> Tensor:
        """The mean over quantiles, if there are any."""
        return q if self.net.quantiles == 1 else q.mean(dim=2)

    def _lr(self) -> float:
        return lr_at(self.lr, self.schedule, self.env_steps, self.spec.total_steps)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {
            "net": self.net.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": generator_state(self.generator),
            "signature": self.signature,
            "env_steps": self.env_steps,
            "updates": self.updates,
            "budget": self.budget,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_catalog(self.signature, state["signature"])
        load_net(self.net, state["net"])
        load_net(self.target, state["target"])
        self.index = None  # its axes may be of another sign there
        load_optimizer(self.optimizer, state["optimizer"])
        restore_generator(self.generator, state["generator"])
        self.env_steps, self.updates = state["env_steps"], state["updates"]
        self.budget = state["budget"]
        self.replay.clear()  # what another net lived through is no part of this state
        if self.priorities is not None:
            self.priorities.clear()

    def experience(self) -> dict[str, Any]:
        """The replay: with it training goes on bit for bit."""
        priorities = {} if self.priorities is None else self.priorities.state_dict()
        return {"replay": self.replay.state_dict(), "priorities": priorities}

    def load_experience(self, state: dict[str, Any]) -> None:
        if (self.priorities is None) == bool(state["priorities"]):
            raise ValueError(
                "the experience was saved with priority "
                f"{'on' if state['priorities'] else 'off'}, this agent has it "
                f"{'off' if self.priorities is None else 'on'}: build it with the same setting"
            )
        self.replay.load_state_dict(state["replay"])
        if self.priorities is not None:
            self.priorities.load_state_dict(state["priorities"])

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        return allowed_items(mask, len(obs), self.spec.num_items, obs.profile.device)
