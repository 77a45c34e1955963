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
Bought = tuple[Tensor, Tensor]  # what is read of a past: for the state, and traces (B, T, H)
HEADS = ("dot", "dense", "two_tower")
Shop = tuple[Tensor | None, Tensor | None, Tensor]  # what values say of items, whoever looks


@dataclass(frozen=True)
class Seen:
    """What a net reads of B observations; no parameter is in it, so that nets may share it."""

    state: Tensor  # (B, U)
    past: Tensor  # (B, H) int64, EMPTY-padded
    traces: Tensor  # (B, T, H), zeros where the past is empty
    shown: Tensor  # (B, H) bool: items of the past that this trip has shown, and empty places

    def __len__(self) -> int:
        return len(self.state)

    def __getitem__(self, rows: slice) -> "Seen":
        return Seen(self.state[rows], self.past[rows], self.traces[rows], self.shown[rows])


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


class Reader(nn.Module):
    """Read observations into what nets see of them; nothing in it is learnt."""

    items: Tensor  # (N + 1, R + 1): main axes and log popularity, a row of zeros for EMPTY
    fame: Tensor  # (N + 1, 2): log popularity, and popularity itself

    def __init__(self, spec: AgentSpec, *, memory: bool = True) -> None:
        super().__init__()
        main = item_features(spec.item_vectors.cpu())  # (N, R)
        log = (spec.popularity.cpu() + 1e-4).log()  # (N,)
        log = (log - log.mean()) / log.std(correction=0).clamp(min=1e-6)
        table = F.pad(torch.cat([main, log[:, None]], dim=1), (0, 0, 0, 1))  # (N + 1, R + 1)
        share = spec.popularity.cpu().float() * 10.0  # near unit size for what sells well
        self.register_buffer("fame", F.pad(torch.stack([log, share], dim=1), (0, 0, 0, 1)))
        self.register_buffer("items", table)  # saved: axes may differ in sign on another machine
        self.memory = memory
        means = table.shape[1] * (3 + spec.feedback_size)
        self.size = spec.profile_size + spec.context_size + means + 3 + spec.feedback_size  # U
        self.to(spec.device)

    def described(self, ids: Tensor | None = None) -> Tensor:
        """What a dot head's values are linear in (..., R + 2): axes, log popularity, popularity."""
        some = slice(-1) if ids is None else ids  # of all items, or of these
        return torch.cat([self.items[some], self.fame[some][..., 1:]], dim=-1)

    def forward(self, obs: Observation, bought: Bought | None = None) -> Seen:
        bought = self.bought(obs) if bought is None else bought
        return Seen(self.state(obs, bought), obs.past, bought[1], self.used_up(obs))

    def pair(self, obs: Observation, later: Observation) -> tuple[Seen, Seen]:
        """What is seen before and after; a past that is the same tensor in both is read once."""
        names = ("past", "past_count", "past_age")
        bought = self.bought(obs)
        same = all(getattr(later, name) is getattr(obs, name) for name in names)
        return self(obs, bought), self(later, bought if same else None)

    def bought(self, obs: Observation) -> Bought:
        """Of what was bought before: its part of the state (B, 2 (R + 1) + 2), and its traces."""
        known = obs.past != EMPTY  # (B, H)
        count = obs.past_count * known  # (B, H)
        recent = torch.exp(-obs.past_age / RECENT) * known  # (B, H)
        sums = [known.sum(dim=1, keepdim=True), count.sum(dim=1, keepdim=True)]
        parts = [self.mean(obs.past, count), self.mean(obs.past, recent), *sums]
        traces = self.traces(obs) if self.memory else obs.past_count[:, None, :][:, :0]  # (B, 0, H)
        return torch.cat(parts, dim=1), traces

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

    def state(self, obs: Observation, bought: Bought | None = None) -> Tensor:
        """All that is seen of users, to one vector each (B, U)."""
        past = (self.bought(obs) if bought is None else bought)[0]
        shown = obs.history != EMPTY  # (B, L)
        liked = obs.feedback * shown[:, :, None]  # (B, L, F)
        means = [past[:, :-2], self.mean(obs.history, shown.to(past.dtype))]
        means += [self.mean(obs.history, column) for column in liked.unbind(dim=2)]
        counts = [past[:, -2:], shown.sum(dim=1, keepdim=True), liked.abs().sum(dim=1)]
        scalars = torch.cat(counts, dim=1)  # (B, 3 + F)
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


class QNet(nn.Module):
    """Observation to values (B, N), or to their quantiles (B, N, Q); a policy's logits as well."""

    def __init__(
        self,
        spec: AgentSpec,
        *,
        head: str = "dot",
        width: int = 128,
        dueling: bool = True,
        memory: bool = True,
        quantiles: int = 1,
        seed: int | None = None,
    ) -> None:
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
        for name, number in (("width", width), ("quantiles", quantiles)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        super().__init__()
        generator = torch.Generator().manual_seed(spec.seed if seed is None else seed)
        self.read = Reader(spec, memory=memory)
        self.head, self.dueling, self.memory, self.quantiles = head, dueling, memory, quantiles
        self.width, self.scale = width, 1.0 / math.sqrt(width)
        size = self.items.shape[1]  # R + 1
        self.body = body_of(self.read.size, width, generator)
        self.famous = linear(2, 1, generator, gain=0.1)
        if head == "dense":
            self.dense = linear(width, spec.num_items * quantiles, generator, gain=0.1)
        else:
            self.user = linear(width, width * quantiles, generator)
            self.item: nn.Module = (
                linear(size, width, generator, gain=0.2)  # values start near zero
                if head == "dot"
                else tower_of(size, width, generator)
            )
            self.bias = linear(size, 1, generator, gain=0.1)
        if dueling or quantiles > 1:
            self.value = linear(width, quantiles, generator, gain=0.1)
        if memory:
            self.recall = nn.Parameter(torch.zeros(TRACES))
            self.bend = linear(TRACES, BENDS, generator)
            self.bent = nn.Parameter(torch.zeros(BENDS))
            if dueling:
                self.left = linear(min(LEFT, spec.past_size), 1, generator, gain=0.1)
        self.to(spec.device)

    @property
    def items(self) -> Tensor:
        """Features (N + 1, R + 1) of items, a row of zeros for EMPTY."""
        return self.read.items

    def forward(self, obs: Observation) -> Tensor:
        return self.values(self.read(obs))  # (B, N)

    def personal(self) -> list[nn.Parameter]:
        """The weights that give every user an opinion of every item: they fit noise first."""
        layers = (self.dense,) if self.head == "dense" else (self.user, self.item, self.bias)
        return [p for layer in layers for p in layer.parameters()]

    def shop(self) -> Shop:
        """Layers (N, W), biases and fame (N, 1) of the items; a dense head has but fame."""
        table, famous = self.items[:-1], self.famous(self.read.fame[:-1])  # (N, R + 1), (N, 1)
        if self.head == "dense":
            return None, None, famous
        return self.item(table), self.bias(table), famous

    def values(self, seen: Seen, shop: Shop | None = None) -> Tensor:
        """Values (B, N) of all items; with quantiles (B, N, Q). `shop`: that of `shop()`."""
        hidden = self.body(seen.state)  # (B, W)
        q, extra = self._differences(hidden, seen, self.shop() if shop is None else shop)
        level = self.level(hidden, extra, seen.shown)  # (B, 1) or (B, Q)
        return q + level[:, None, :] if self.quantiles > 1 else q.add_(level)

    def ranking(self, seen: Seen, shop: Shop | Tensor | None = None) -> Tensor:
        """What orders the items of each row (B, N) or (B, N, Q) as `values` does, for less.

        `shop` is that of `ranking_shop()`.
        """
        hidden = self.body(seen.state)  # (B, W)
        shop = self.ranking_shop() if shop is None else shop
        if not isinstance(shop, Tensor):
            return self._differences(hidden, seen, shop)[0]
        q = (self.wishes(hidden) @ shop.T).float()  # (B, N)
        return q.scatter_add_(1, seen.past.clamp(min=0), self.extra(hidden, seen))

    def ranking_shop(self) -> Shop | Tensor:
        """What `ranking` needs of the items, whoever looks."""
        return self.read.described() if self.linear else self.shop()

    @property
    def linear(self) -> bool:
        """Whether values are products of `wishes` and what describes items, but for their past."""
        return self.head == "dot" and self.quantiles == 1

    def wishes(self, hidden: Tensor) -> Tensor:
        """Hidden (B, W) to what each number that describes an item is worth (B, R + 2).

        The item's layer is applied to the user instead, which is the same sum in another order.
        """
        layer, famous = self.item.get_parameter("weight"), self.famous.weight
        own = torch.addmm(
            self.bias.weight, self.user(hidden), layer, alpha=self.scale
        )  # (B, R + 1)
        return F.pad(own, (0, 1)) + F.pad(famous, (own.shape[1] - 1, 0))  # fame is the last two

    def _differences(self, hidden: Tensor, seen: Seen, shop: Shop) -> tuple[Tensor, Tensor]:
        """Values before what moves all of a row, and the extra (B, H) of the past in them."""
        item, bias, famous = shop
        if self.quantiles > 1:
            q = self.spread(hidden, item)
            if bias is not None:
                q = q + bias
            q = q + famous  # (B, N, Q)
        elif item is None or bias is None:
            q = self.dense(hidden).add_(famous.T)  # (B, N)
        else:
            q = torch.addmm(bias.T, self.user(hidden), item.T, alpha=self.scale)  # (B, N)
            q = q.add_(famous.T)  # in place: it is large
        q = q.float()  # autocast makes products bfloat16
        extra = self.extra(hidden, seen)  # (B, H)
        past = seen.past.clamp(min=0)  # (B, H)
        if self.quantiles > 1:
            wide = (*past.shape, self.quantiles)  # (B, H, Q)
            return q.scatter_add(
                1, past[:, :, None].expand(wide), extra[:, :, None].expand(wide)
            ), extra
        return q.scatter_add_(1, past, extra), extra

    def values_of(self, seen: Seen, slate: Tensor) -> Tensor:
        """Values of a slate (B, K) alone, as `values` gives them: far cheaper to learn from."""
        hidden = self.body(seen.state)  # (B, W)
        index = slate.clamp(min=0)  # (B, K)
        if self.head == "dense":
            weight = self.dense.weight.view(-1, self.quantiles, self.width)[index]  # (B, K, Q, W)
            bias = self.dense.bias.view(-1, self.quantiles)[index]  # (B, K, Q)
            q = (weight * hidden[:, None, None, :]).sum(dim=3) + bias
        else:
            chosen = self.items[index]  # (B, K, R + 1)
            user = self.user(hidden).view(len(hidden), 1, self.quantiles, self.width)
            fit = (self.item(chosen)[:, :, None, :] * user).sum(dim=3)  # (B, K, Q)
            q = self.scale * fit + self.bias(chosen)
        q = q + self.famous(self.read.fame[index])  # (B, K, Q)
        extra = self.extra(hidden, seen)  # (B, H)
        match = index[:, :, None] == seen.past[:, None, :]  # (B, K, H)
        q = q + (match * extra[:, None, :]).sum(dim=2, keepdim=True)
        q = q + self.level(hidden, extra, seen.shown)[:, None, :]
        return q.squeeze(2) if self.quantiles == 1 else q

    def spread(self, hidden: Tensor, item: Tensor | None) -> Tensor:
        """Hidden (B, W) and items (N, W) to quantiles (B, N, Q) before biases."""
        b = len(hidden)
        if item is None:
            return self.dense(hidden).view(b, -1, self.quantiles)
        user = self.user(hidden).view(b * self.quantiles, self.width)
        return self.scale * (user @ item.T).view(b, self.quantiles, -1).transpose(1, 2)

    def extra(self, hidden: Tensor, seen: Seen) -> Tensor:
        """What items of the past are worth besides (B, H): their traces, weighed by the state."""
        if not self.memory:
            return torch.zeros(seen.past.shape, device=hidden.device)
        straight = (self.recall[:, None] * seen.traces).sum(dim=1)  # (B, H)
        bends = torch.relu(self.bend.weight @ seen.traces + self.bend.bias[:, None])  # (B, J, H)
        return straight + (self.bent[:, None] * bends).sum(dim=1) * seen.traces[:, 0]

    def level(self, hidden: Tensor, extra: Tensor, shown: Tensor) -> Tensor:
        """What moves all values (B, 1 or Q) so that their mean is V(s) (Wang et al., 2016)."""
        if not self.dueling:
            if self.quantiles > 1:
                return self.value(hidden)
            return torch.zeros_like(hidden[:, :1])
        mean = self.mean_value(hidden)  # (B, Q)
        mean = mean + extra.sum(dim=1, keepdim=True) / (len(self.items) - 1)
        mean = mean + self.famous(self.read.fame[:-1].mean(dim=0))
        value = self.value(hidden)
        if self.memory:
            # tenths: V(s) moves by much more than one item's value, and must not learn that slowly
            left = 10.0 * extra.detach().masked_fill(shown, 0.0)  # (B, H)
            value = value + self.left(left.topk(min(LEFT, left.shape[1]), dim=1).values)
        return value - mean

    def mean_value(self, hidden: Tensor) -> Tensor:
        """The head's mean (B, Q) over all items."""
        if self.head == "dense":
            weight = self.dense.weight.view(-1, self.quantiles, self.width).mean(dim=0)  # (Q, W)
            return hidden @ weight.T + self.dense.bias.view(-1, self.quantiles).mean(dim=0)
        table = self.items[:-1]
        average = table.mean(dim=0, keepdim=True)  # (1, R + 1)
        # a dot head is linear in the item: the mean value is the value of the mean item
        item = self.item(average if self.head == "dot" else table).mean(dim=0)  # (W,)
        user = self.user(hidden).view(len(hidden), self.quantiles, self.width)
        return self.scale * (user @ item) + self.bias(average)


class ValueNet(nn.Module):
    """What is read of observations to V(s), (B,)."""

    def __init__(
        self, spec: AgentSpec, *, width: int = 128, memory: bool = True, seed: int | None = None
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(spec.seed if seed is None else seed)
        self.read = Reader(spec, memory=memory)
        self.body = body_of(self.read.size, width, generator)
        self.value = linear(width, 1, generator, gain=0.1)
        self.to(spec.device)

    def forward(self, seen: Seen) -> Tensor:
        value: Tensor = self.value(self.body(seen.state))
        return value.squeeze(1)


def body_of(size: int, width: int, generator: torch.Generator) -> nn.Sequential:
    """State (B, U) to a hidden layer (B, W)."""
    return nn.Sequential(
        linear(size, width, generator),
        nn.LayerNorm(width),
        nn.ReLU(),
        linear(width, width, generator, gain=math.sqrt(3.0)),
        nn.ReLU(),
    )


def tower_of(size: int, width: int, generator: torch.Generator) -> nn.Sequential:
    """Item features (N, R + 1) to (N, W), bent: a tower of its own."""
    return nn.Sequential(
        linear(size, width, generator, gain=math.sqrt(3.0)),
        nn.ReLU(),
        linear(width, width, generator, gain=0.5),
    )
