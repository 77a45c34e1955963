"""Deep Q-learning (Mnih et al., 2015) for slates: a slate is worth the sum of its items' values."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.explore import epsilon_greedy_probs, epsilon_greedy_slate, epsilon_greedy_slate_probs
from agents.nets import QNet
from agents.replay import Replay, Sample
from encoders.state import EMPTY, Observation

CHECK_EVERY = 100  # updates between looks at the loss: a look waits for the device


def next_value(q: Tensor, choose: Tensor, allowed: Tensor, k: int) -> Tensor:
    """Values, choosing values, allowed (B, N) each, to the mean value (B,) of the K items chosen.

    Double Q-learning (van Hasselt et al., 2016) when `choose` comes from another net than `q`.
    Where fewer than K are allowed the missing slots are worth nothing.
    """
    k = min(k, q.shape[1])
    best = choose.masked_fill(~allowed, -torch.inf).topk(k, dim=1).indices  # (B, K)
    return (q.gather(1, best) * allowed.gather(1, best)).mean(dim=1)


def slot_targets(slot_return: Tensor, discount: Tensor, value: Tensor) -> Tensor:
    """Return of each slot (B, K) plus its share of what comes after, `discount` 0 after leaving."""
    return slot_return + (discount * value)[:, None]


def huber(q: Tensor, target: Tensor, real: Tensor) -> Tensor:
    """Mean Huber loss of (B, K) over the slots that showed something."""
    loss = F.smooth_l1_loss(q, target, reduction="none") * real  # (B, K)
    return loss.sum() / real.sum().clamp(min=1)


def epsilon_at(steps: int, start: float, end: float, over: int) -> float:
    """Linear from start to end over the first `over` env steps."""
    return start + (end - start) * min(1.0, steps / over)


def optimizer_of(net: QNet, lr: float, shrink: float) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019) on the personal weights only.

    The best of thousands of items is wherever their values are wrong upwards: without decay more
    updates make a worse policy.
    """
    personal = net.personal()
    held = {id(p) for p in personal}
    rest = [p for p in net.parameters() if id(p) not in held]
    groups = [{"params": personal, "weight_decay": shrink}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


def catalog_signature(vectors: Tensor) -> Tensor:
    """Item vectors (N, D) to one number each (N,), alike on machines that round differently."""
    exact = vectors.detach().cpu().double()
    direction = torch.randn(exact.shape[1], generator=torch.Generator().manual_seed(7)).double()
    return (exact @ direction).float()


class DQN:
    """Double, dueling, n-step Q-learning with a replay of ids; acts epsilon-greedily per slot.

    The target net is the running mean of the net (Polyak and Juditsky, 1992), `tau` of the way at
    every update. It is also what serves users: among thousands of items the highest value of a net
    that still jitters is one that jittered upwards.
    """

    def __init__(
        self,
        spec: AgentSpec,
        *,
        lr: float = 5e-3,
        gamma: float = 0.8,
        epsilon_start: float = 0.3,
        epsilon_end: float = 0.2,
        epsilon_steps: int = 20_000,
        batch_size: int = 256,
        capacity: int = 200_000,
        replay_ratio: float = 2.0,
        tau: float = 0.01,
        n_step: int = 1,
        double: bool = True,
        dueling: bool = True,
        head: str = "dot",
        width: int = 128,
        memory: bool = True,
        learning_starts: int = 1000,
        grad_clip: float = 10.0,
        shrink: float = 40.0,
    ) -> None:
        for name, value in (("epsilon_start", epsilon_start), ("epsilon_end", epsilon_end)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        positive = {
            "lr": lr,
            "epsilon_steps": epsilon_steps,
            "batch_size": batch_size,
            "replay_ratio": replay_ratio,
            "tau": tau,
            "grad_clip": grad_clip,
        }
        for name, number in positive.items():
            if not number > 0:
                raise ValueError(f"{name} must be above 0, got {number}")
        if tau > 1:
            raise ValueError(f"tau must be in (0, 1], got {tau}: the share of the net in its mean")
        self.spec, self.gamma, self.batch_size = spec, gamma, batch_size
        self.epsilons = (epsilon_start, epsilon_end, epsilon_steps)
        self.replay_ratio, self.tau, self.double = replay_ratio, tau, double
        self.learning_starts, self.grad_clip = learning_starts, grad_clip
        self.net = QNet(spec, head=head, width=width, dueling=dueling, memory=memory)
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        if not shrink >= 0:
            raise ValueError(f"shrink must be at least 0, got {shrink}")
        self.optimizer = optimizer_of(self.net, lr, shrink)
        self.replay = Replay(capacity, spec=spec, n_step=n_step, gamma=gamma)
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.signature = catalog_signature(spec.item_vectors)
        self.env_steps, self.updates = 0, 0
        self.budget = 0.0  # samples earned by env steps and not yet drawn

    @property
    def epsilon(self) -> float:
        """The chance that a slot explores now, a function of the env steps seen."""
        return epsilon_at(self.env_steps, *self.epsilons)

    @torch.no_grad()
    def scores(self, obs: Observation) -> Tensor:
        """Value (B, N) of showing each item now."""
        return self.target(obs)

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
        means = {name: torch.stack([log[name] for log in logs]).mean() for name in logs[0]}
        return means | {"train/epsilon": torch.tensor(self.epsilon)}

    def _learn(self, sample: Sample) -> dict[str, Tensor]:
        """One gradient step."""
        batch, k = sample.transition, self.spec.slate_size
        slate, real = batch.decision.slate, batch.decision.slate != EMPTY  # (B, K)
        with torch.no_grad():
            allowed = allowed_items(
                batch.next_mask, len(slate), self.spec.num_items, slate.device, may_be_empty=True
            )  # (B, N); who has left may have seen everything
            seen = self.net.read(batch.next_obs)
            later = self.target.values(seen)  # (B, N)
            choose = self.net.values(seen) if self.double else later
            value = next_value(later, choose, allowed, k)  # (B,)
            target = slot_targets(sample.slot_return, sample.discount, value)  # (B, K)
        q = self.net.values_of(self.net.read(batch.obs), slate)  # (B, K)
        loss = huber(q, target, real)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.grad_clip)
        self.optimizer.step()

        self.updates += 1
        with torch.no_grad():
            pairs = zip(self.target.parameters(), self.net.parameters(), strict=True)
            for slow, fast in pairs:
                slow.lerp_(fast, self.tau)
        if self.updates % CHECK_EVERY == 0 and not loss.isfinite():
            raise ValueError(
                f"the loss is {float(loss.detach())} at update {self.updates}: "
                "lower agent.lr or scale the reward"
            )
        shown = real.sum().clamp(min=1)
        return {
            "train/loss": loss.detach(),
            "train/q_mean": (q.detach() * real).sum() / shown,
            "train/td_error": ((q.detach() - target).abs() * real).sum() / shown,
            "train/target_mean": (target * real).sum() / shown,
            "train/grad_norm": norm.detach(),
        }

    def state_dict(self, *, replay: bool = False) -> dict[str, Any]:
        """Plain tensors and numbers; with `replay` in it training resumes bit for bit."""
        state = {
            "net": self.net.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "device": self.generator.device.type,
            "signature": self.signature,
            "env_steps": self.env_steps,
            "updates": self.updates,
            "budget": self.budget,
        }
        return state | {"replay": self.replay.state_dict()} if replay else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_catalog(self.signature, state["signature"])
        try:
            self.net.load_state_dict(state["net"])
            self.target.load_state_dict(state["target"])
        except RuntimeError as error:
            raise ValueError(
                "the checkpoint has a net of another form (head, width, dueling, memory, sizes of "
                f"the observation): build the agent with the settings it was trained with. {error}"
            ) from error
        self.optimizer.load_state_dict(state["optimizer"])
        if state["device"] == self.generator.device.type:  # generators of devices do not translate
            self.generator.set_state(state["generator"].cpu())
        self.env_steps, self.updates = state["env_steps"], state["updates"]
        self.budget = state["budget"]
        self.replay.clear()  # what another net lived through is no part of this state
        if "replay" in state:
            self.replay.load_state_dict(state["replay"])

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        return allowed_items(mask, len(obs), self.spec.num_items, obs.profile.device)


def check_finite(transition: Transition) -> None:
    """Refuse a reward or an observation that is not finite before anything learns from it."""
    found = {"reward": transition.reward, "slot_reward": transition.slot_reward}
    for side in ("obs", "next_obs"):
        for name in ("profile", "past_count", "past_age", "feedback", "context"):
            found[f"{side}.{name}"] = getattr(getattr(transition, side), name)
    fine = torch.stack([value.isfinite().all() for value in found.values()])
    if fine.all():  # one wait for the device, however many fields
        return
    name = list(found)[int(fine.int().argmin())]
    bad = ~found[name].isfinite().flatten(1 if found[name].ndim > 1 else 0)  # (B, ...)
    row = int(bad.reshape(len(bad), -1).any(dim=1).nonzero()[0])
    raise ValueError(
        f"{name} must be finite, row {row} is not: look at the features and the reward"
    )


def check_catalog(mine: Tensor, theirs: Tensor) -> None:
    """Refuse a checkpoint whose items are not these."""
    if len(mine) != len(theirs):
        raise ValueError(
            f"the checkpoint is of a catalogue of {len(theirs)} items, this one has {len(mine)}: "
            "load it with the catalogue it was trained on"
        )
    spread = mine.std(correction=0).clamp(min=1e-12)
    if (mine - theirs.to(mine)).abs().mean() > 0.1 * spread:
        raise ValueError(
            "the checkpoint is of another catalogue of the same size (its item vectors differ): "
            "load it with the catalogue and the text encoder it was trained on"
        )
