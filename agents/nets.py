"""Values of items for users: Q(s, a) = f(s) . g(a), a bias, and a term for past purchases.

The state is rebuilt from ids: means of item vectors over the past and over this trip. The last
term (`memory`) reads how often and how long ago the user bought each item of the past and adds to
exactly those items' values. Without it a shared f(s) . g(a) of low rank has to encode a few dozen
personal items in one vector, and repeat purchases, most of retail, take far longer to show. Its
features are fixed and only their weights are learnt, as functions of the state: a few hundred
updates do.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.base import AgentSpec
from encoders.state import EMPTY, Observation

RANK = 64  # item vectors are rotated and cut to this many dimensions: about the rank BERT leaves
RECENT = 30.0  # days after which a purchase counts 1/e in the recency-weighted mean
FADES = (
    3.0,
    14.0,
    60.0,
)  # days: purchases of this age have lost 1/e of a feature of the memory term
BENDS = 16  # hidden units on the traces: wishes multiply, a straight line would go below zero
LEFT = 8  # best items of the past not shown yet that V(s) looks at
TRACES = 6 + 2 * len(FADES)  # features of the memory term


@dataclass(frozen=True)
class Seen:
    """What a net reads of B observations; no parameter is in it, so that nets may share it."""

    state: Tensor  # (B, U)
    past: Tensor  # (B, H) int64, EMPTY-padded
    traces: Tensor  # (B, T, H), zeros where the past is empty
    shown: Tensor  # (B, H) bool: items of the past that this trip has shown, and empty places


def linear(size: int, out: int, generator: torch.Generator, gain: float = 1.0) -> nn.Linear:
    """A layer drawn from `generator` alone: torch's own initialisation reads the global one."""
    layer = nn.utils.skip_init(nn.Linear, size, out)
    bound = gain / math.sqrt(size)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.zero_()
    return layer


def item_features(vectors: Tensor, rank: int = RANK) -> Tensor:
    """Item vectors (N, D) on their R = min(D, rank) main axes (N, R), rows of about unit length."""
    exact = vectors.double()
    _, axes = torch.linalg.eigh(exact.T @ exact)  # (D, D), largest last
    main = exact @ axes.flip(1)[:, :rank]  # (N, R); uncentred: one-hot vectors keep their full rank
    return (main / main.square().sum(dim=1).mean().sqrt().clamp(min=1e-12)).float()


class QNet(nn.Module):
    """Observation to values (B, N)."""

    items: Tensor  # (N + 1, R + 1): main axes and log popularity, a row of zeros for EMPTY
    fame: Tensor  # (N + 1, 2): log popularity, and popularity itself

    def __init__(
        self,
        spec: AgentSpec,
        *,
        head: str = "dot",
        width: int = 128,
        dueling: bool = True,
        memory: bool = True,
    ) -> None:
        if head not in ("dot", "dense"):
            raise ValueError(f"head must be dot or dense, got {head!r}")
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        super().__init__()
        generator = torch.Generator().manual_seed(spec.seed)
        main = item_features(spec.item_vectors.cpu())  # (N, R)
        log = (spec.popularity.cpu() + 1e-4).log()  # (N,)
        log = (log - log.mean()) / log.std(correction=0).clamp(min=1e-6)
        table = F.pad(torch.cat([main, log[:, None]], dim=1), (0, 0, 0, 1))  # (N + 1, R + 1)
        share = spec.popularity.cpu().float() * 10.0  # near unit size for what sells well
        self.register_buffer("fame", F.pad(torch.stack([log, share], dim=1), (0, 0, 0, 1)))
        self.register_buffer("items", table)  # saved: axes may differ in sign on another machine
        self.head, self.dueling, self.memory = head, dueling, memory
        self.scale = 1.0 / math.sqrt(width)
        size = table.shape[1]
        means = size * (3 + spec.feedback_size)
        scalars = 3 + spec.feedback_size
        state = spec.profile_size + spec.context_size + means + scalars
        self.body = nn.Sequential(
            linear(state, width, generator),
            nn.LayerNorm(width),
            nn.ReLU(),
            linear(width, width, generator, gain=math.sqrt(3.0)),
            nn.ReLU(),
        )
        self.famous = linear(2, 1, generator, gain=0.1)
        if head == "dot":
            self.user = linear(width, width, generator)
            self.item = linear(size, width, generator, gain=0.2)  # values start near zero
            self.bias = linear(size, 1, generator, gain=0.1)
        else:
            self.dense = linear(width, spec.num_items, generator, gain=0.1)
        if dueling:
            self.value = linear(width, 1, generator, gain=0.1)
        if memory:
            self.recall = nn.Parameter(torch.zeros(TRACES))
            self.bend = linear(TRACES, BENDS, generator)
            self.bent = nn.Parameter(torch.zeros(BENDS))
            self.left = linear(min(LEFT, spec.past_size), 1, generator, gain=0.1)
        self.to(spec.device)

    def forward(self, obs: Observation) -> Tensor:
        return self.values(self.read(obs))  # (B, N)

    def personal(self) -> list[nn.Parameter]:
        """The weights that give every user an opinion of every item: they fit noise first."""
        layers = (self.user, self.item, self.bias) if self.head == "dot" else (self.dense,)
        return [p for layer in layers for p in layer.parameters()]

    def read(self, obs: Observation) -> Seen:
        """Observations to the input of any net of this catalogue."""
        traces = self.traces(obs) if self.memory else obs.past_count[:, None, :][:, :0]  # (B, 0, H)
        return Seen(self.state(obs), obs.past, traces, self.used_up(obs))

    def values(self, seen: Seen) -> Tensor:
        """Values (B, N) of all items."""
        hidden = self.body(seen.state)  # (B, W)
        table = self.items[:-1]  # (N, R + 1)
        if self.head == "dot":
            item = self.item(table)  # (N, W)
            q = torch.addmm(
                self.bias(table).T, self.user(hidden), item.T, alpha=self.scale
            )  # (B, N)
        else:
            q = self.dense(hidden)  # (B, N)
        q = q + self.famous(self.fame[:-1]).T  # (B, N)
        extra = self.extra(hidden, seen)  # (B, H)
        q.scatter_add_(1, seen.past.clamp(min=0), extra)
        return q.add_(self.level(hidden, extra, seen.shown))

    def values_of(self, seen: Seen, slate: Tensor) -> Tensor:
        """Values of a slate (B, K) alone, as `values` gives them: far cheaper to learn from."""
        hidden = self.body(seen.state)  # (B, W)
        index = slate.clamp(min=0)  # (B, K)
        if self.head == "dot":
            chosen = self.items[index]  # (B, K, R + 1)
            fit = (self.item(chosen) * self.user(hidden)[:, None, :]).sum(dim=2)  # (B, K)
            q = self.scale * fit + self.bias(chosen).squeeze(2)
        else:
            weight, bias = self.dense.weight[index], self.dense.bias[index]  # (B, K, W), (B, K)
            q = (weight * hidden[:, None, :]).sum(dim=2) + bias
        q = q + self.famous(self.fame[index]).squeeze(2)
        extra = self.extra(hidden, seen)  # (B, H)
        match = index[:, :, None] == seen.past[:, None, :]  # (B, K, H)
        return q + (match * extra[:, None, :]).sum(dim=2) + self.level(hidden, extra, seen.shown)

    def extra(self, hidden: Tensor, seen: Seen) -> Tensor:
        """What items of the past are worth besides (B, H): their traces, weighed by the state."""
        if not self.memory:
            return torch.zeros(seen.past.shape, device=hidden.device)
        straight = (self.recall[:, None] * seen.traces).sum(dim=1)  # (B, H)
        bends = torch.relu(self.bend.weight @ seen.traces + self.bend.bias[:, None])  # (B, J, H)
        return straight + (self.bent[:, None] * bends).sum(dim=1) * seen.traces[:, 0]

    def level(self, hidden: Tensor, extra: Tensor, shown: Tensor) -> Tensor:
        """What moves every item's value (B, 1) so that their mean is V(s) (Wang et al., 2016)."""
        if not self.dueling:
            return torch.zeros_like(hidden[:, :1])
        if self.head == "dot":  # linear in the item: the mean value is the value of the mean item
            average = self.items[:-1].mean(dim=0, keepdim=True)  # (1, R + 1)
            mean = self.scale * (self.user(hidden) @ self.item(average).T) + self.bias(average)
        else:
            weight, bias = self.dense.weight.mean(dim=0), self.dense.bias.mean()  # (W,), ()
            mean = (hidden @ weight)[:, None] + bias  # (B, 1)
        mean = mean + extra.sum(dim=1, keepdim=True) / (len(self.items) - 1)
        mean = mean + self.famous(self.fame[:-1].mean(dim=0))
        value = self.value(hidden)
        if self.memory:
            # tenths: V(s) moves by much more than one item's value, and must not learn that slowly
            left = 10.0 * extra.detach().masked_fill(shown, 0.0)  # (B, H)
            value = value + self.left(left.topk(min(LEFT, left.shape[1]), dim=1).values)
        return value - mean

    def used_up(self, obs: Observation) -> Tensor:
        """Which places (B, H) of the past are empty or were shown on this trip."""
        board = torch.zeros(
            len(obs.past), len(self.items), dtype=torch.bool, device=obs.past.device
        )  # (B, N + 1): the last column for EMPTY
        board.scatter_(1, obs.history.remainder(len(self.items)), True)
        board[:, -1] = True
        return board.gather(1, obs.past.remainder(len(self.items)))

    def traces(self, obs: Observation) -> Tensor:
        """Fixed features (B, T, H) of items of the past: how often, how long ago, how popular."""
        known = (obs.past != EMPTY).to(obs.past_count.dtype)  # (B, H)
        count = obs.past_count * known
        often, share = count.log1p(), count / count.sum(dim=1, keepdim=True).clamp(min=1.0)
        popular = self.items[:, -1][obs.past]  # (B, H); EMPTY reads the last row, zeros
        rows = [
            known,
            often,
            share * 10.0,
            popular,
            often * often,
            obs.past_age.log1p() * known / 4.0,
        ]
        for days in FADES:
            fresh = torch.exp(-obs.past_age / days) * known  # (B, H)
            rows += [fresh, fresh * often]
        return torch.stack(rows, dim=1)

    def state(self, obs: Observation) -> Tensor:
        """All that is seen of users, to one vector each (B, U)."""
        known, shown = obs.past != EMPTY, obs.history != EMPTY  # (B, H), (B, L)
        count = obs.past_count * known  # (B, H)
        recent = torch.exp(-obs.past_age / RECENT) * known  # (B, H)
        liked = obs.feedback * shown[:, :, None]  # (B, L, F)
        means = [self.mean(obs.past, count), self.mean(obs.past, recent)]
        means.append(self.mean(obs.history, shown.to(count.dtype)))
        means += [self.mean(obs.history, column) for column in liked.unbind(dim=2)]
        scalars = torch.cat(
            [
                known.sum(dim=1, keepdim=True),
                count.sum(dim=1, keepdim=True),
                shown.sum(dim=1, keepdim=True),
                liked.abs().sum(dim=1),
            ],
            dim=1,
        )  # (B, 3 + F)
        return torch.cat([obs.profile, obs.context, *means, scalars.log1p()], dim=1)

    def mean(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Weighted means (B, R + 1) of item features over ids (B, M); 0 where nothing weighs."""
        total = F.embedding_bag(
            torch.where(ids == EMPTY, len(self.items) - 1, ids),
            self.items,
            mode="sum",
            per_sample_weights=weight,
        )  # (B, R + 1)
        return total / weight.abs().sum(dim=1, keepdim=True).clamp(min=1e-6)
