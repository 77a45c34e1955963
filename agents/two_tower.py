"""A regression scorer sigma(M(x_u, x_i)) over what is known of user and item, linear or deep.

x_u is made of a history: sums of item features by count and by recency, and how much there is. x_i
is what the item is: text, popularity, and an embedding of its own, which is left out at random in
training so that items nobody had yet are placed by their text. Fitted as a logistic regression of
the next event against items drawn at random (noise-contrastive estimation; Gutmann and Hyvarinen,
2010), with the drawing's log-odds taken out of the logit.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.interactions import Interactions, or_popular, owned, popular_ranks, restore
from encoders.state import EMPTY, Observation

DECAY = 30.0  # days in which an event counts for 1/e of it in the recent mean
HIDDEN_ID = 0.3  # share of items whose embedding is left out in a step of training
HISTORY = 50  # latest events that a training example looks back on
EXAMPLES = 100_000  # next events that one epoch draws, at most
SMALL = 0.1  # of the scale of what weighs users' tastes as training begins
CHUNK = 1024  # histories scored at once


class Towers(nn.Module):
    """Users and items to vectors whose dot product, with the item's bias, is the logit."""

    def __init__(
        self,
        features: Tensor,
        bias: Tensor,
        dim: int,
        hidden: int,
        deep: bool,
        draw: torch.Generator,
    ) -> None:
        super().__init__()
        n, width = features.shape

        def weight(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=draw) * scale)

        self.deep = deep
        self.features: Tensor
        self.register_buffer("features", features)  # (N, D)
        self.own = weight(n + 1, dim, scale=0.1)  # the last row is no item
        self.bias = nn.Parameter(bias)  # (N,)
        first, last = (hidden, hidden) if deep else (dim, 0)
        self.item_in = weight(width, first, scale=max(width, 1) ** -0.5)
        self.own_in = weight(dim, first, scale=dim**-0.5)
        small = 1.0 if deep else SMALL
        known = 2 * width + 2 * dim + 1  # numbers known of a user
        self.user_in = weight(known, first, scale=small * known**-0.5)
        self.item_out = weight(last, dim, scale=hidden**-0.5) if deep else None
        self.user_out = weight(last, dim, scale=SMALL * hidden**-0.5) if deep else None

    def items(self, hidden: Tensor | None = None) -> Tensor:
        """All items as vectors (N, K); `hidden` (N,) ones are placed without their embedding."""
        own = self.own[:-1] if hidden is None else self.own[:-1] * ~hidden[:, None]
        x = self.features @ self.item_in + own @ self.own_in  # (N, H)
        return F.gelu(x) @ self.item_out if self.item_out is not None else x

    def users(self, items: Tensor, count: Tensor, age: Tensor) -> Tensor:
        """Histories (B, M) as vectors (B, K)."""
        real = items != EMPTY
        n = len(self.own) - 1
        place = torch.where(real, items, n)
        features = F.pad(self.features, (0, 0, 0, 1))  # (N + 1, D)
        parts = []
        for weight in (count.log1p() * real, torch.exp(-age / DECAY) * real):
            # of unit length: a mean of many vectors would be near none
            share = weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-12)  # (B, M)
            for table in (features, self.own):
                parts.append(F.embedding_bag(place, table, per_sample_weights=share, mode="sum"))
        much = real.sum(dim=1, keepdim=True).to(share.dtype).log1p()  # (B, 1)
        x = torch.cat([*parts, much], dim=1) @ self.user_in
        return F.gelu(x) @ self.user_out if self.user_out is not None else x


class TwoTower:
    """Score an item by the logit that it is next; popularity where a user has no history."""

    def __init__(
        self,
        past: Any,
        *,
        deep: bool = True,
        dim: int = 64,
        hidden: int = 128,
        epochs: int = 10,
        batch_size: int = 256,
        negatives: int = 256,
        lr: float = 2e-3,
        decay: float = 1e-5,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        past = Interactions.of(past)
        if not past.timed:
            raise ValueError(
                "TwoTower learns from what came next, these events have no time: give Logs, or "
                "Interactions with times, in place of a matrix of counts"
            )
        if min(dim, hidden, epochs, batch_size, negatives) < 1 or not lr > 0 or not decay >= 0:
            raise ValueError(
                "dim, hidden, epochs, batch_size and negatives must be at least 1, lr above 0 and "
                f"decay at least 0, got dim={dim}, hidden={hidden}, epochs={epochs}, "
                f"batch_size={batch_size}, negatives={negatives}, lr={lr}, decay={decay}"
            )
        self.num_items = past.num_items
        self.ranks = popular_ranks(past, seed).to(device)  # (N,)
        draw = torch.Generator().manual_seed(seed)
        count = torch.from_numpy(past.popularity()).double() + 1.0
        bias = (count / count.sum()).log().float()  # the start: popularity, and tastes near none
        self.net = Towers(item_features(past), bias, dim, hidden, deep, draw).to(device)
        fit(self.net, past, epochs, batch_size, negatives, lr, decay, seed)

    @torch.no_grad()
    def scores(self, obs: Observation) -> Tensor:
        """(B, N) logits."""
        items, count, age = owned(obs, self.num_items)
        seen = latest(items, count, age)
        every = self.net.items()  # (N, K)
        found = [
            self.net.users(*(x[rows] for x in seen)) @ every.T + self.net.bias
            for rows in (slice(i, i + CHUNK) for i in range(0, len(items), CHUNK))
        ]
        logits = torch.cat(found) if found else self.ranks.new_zeros(0, self.num_items)
        return or_popular(logits, items, self.ranks)

    def state_dict(self) -> dict[str, Any]:
        return {"num_items": self.num_items, "ranks": self.ranks, "net": self.net.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state, self.num_items, "ranks")
        self.net.load_state_dict(state["net"])


def latest(items: Tensor, count: Tensor, age: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of histories (B, M) what training saw of one: the HISTORY latest, each (B, m)."""
    order = age.masked_fill(items == EMPTY, torch.inf).argsort(dim=1, stable=True)[:, :HISTORY]
    return items.gather(1, order), count.gather(1, order), age.gather(1, order)


def item_features(past: Interactions) -> Tensor:
    """What items are, (N, D): centred unit text vectors, where there are any, and popularity."""
    popular = torch.from_numpy(np.log1p(past.popularity())).float()
    popular = (popular - popular.mean()) / popular.std(correction=0).clamp(min=1e-6)
    if past.vectors is None:
        return popular[:, None]
    unit = F.normalize(past.vectors.float().cpu(), dim=1)
    there = unit.square().sum(dim=1, keepdim=True) > 0.5  # (N, 1): has a text
    mean = (unit * there).sum(dim=0) / there.sum().clamp(min=1)
    text = F.normalize(unit - mean, dim=1) * there
    return torch.cat([text * math.sqrt(text.shape[1]) * 0.3, popular[:, None]], dim=1)


def fit(
    net: Towers, past: Interactions, epochs: int, batch_size: int, negatives: int, lr: float,
    decay: float, seed: int,
) -> None:  # fmt: skip
    """Adam on the logistic loss of next events against a batch's common sample of items."""
    device = net.bias.device
    generator, rng = torch.Generator(device).manual_seed(seed), np.random.default_rng(seed)
    place = np.arange(len(past.user)) - np.searchsorted(past.user, past.user)  # in the user's order
    able = np.nonzero(place > 0)[0]  # events with something before them
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=decay)
    odds = math.log(negatives / past.num_items)  # expected draws of an item
    for _ in range(epochs if len(able) else 0):
        for rows in np.array_split(
            rng.permutation(able)[:EXAMPLES], -(-min(len(able), EXAMPLES) // batch_size)
        ):
            items, age = (x.to(device) for x in looked_back(past, rows, place))
            user = net.users(items, torch.ones_like(age), age)  # (b, K)
            hidden = torch.rand(past.num_items, generator=generator, device=device) < HIDDEN_ID
            every = net.items(hidden)  # (N, K)
            target = torch.from_numpy(past.item[rows]).to(device)  # (b,)
            pick = torch.randint(past.num_items, (negatives,), generator=generator, device=device)
            yes = (user * every[target]).sum(dim=1) + net.bias[target] - odds  # (b,)
            no = user @ every[pick].T + net.bias[pick] - odds  # (b, negatives)
            loss = F.softplus(-yes).mean() + F.softplus(no).sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def looked_back(past: Interactions, rows: np.ndarray, place: np.ndarray) -> tuple[Tensor, Tensor]:
    """The up to HISTORY events before each of `rows` (b,), the latest first, and ages: (b, M)."""
    width = int(min(HISTORY, place[rows].max(initial=1)))
    back = np.arange(1, width + 1)  # (M,)
    real = back <= place[rows][:, None]  # (b, M)
    index = np.where(real, rows[:, None] - back, 0)
    items = np.where(real, past.item[index], EMPTY)
    age = np.where(real, past.time[rows][:, None] - past.time[index], 0.0)
    return torch.from_numpy(items), torch.from_numpy(age).float()
