"""SASRec: causal self-attention over a user's items in time order (Kang and McAuley, 2018)."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.interactions import Interactions, or_popular, owned, popular_ranks, restore
from encoders.state import EMPTY, Observation

FULL = 20_000  # items up to which the loss looks at all of them
NEGATIVES = 2_000  # drawn per batch above that
CHUNK = 512  # users scored at a time: bounds the memory of attention


class Net(nn.Module):
    """Items (B, L), oldest first, to hidden states (B, L, D); each sees those up to itself."""

    def __init__(
        self,
        bias: Tensor,
        *,
        max_length: int,
        dim: int,
        layers: int,
        heads: int,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()

        def draw(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * scale)

        self.heads, self.dropout = heads, dropout
        self.item = draw(len(bias), dim, scale=1.0 / math.sqrt(dim))  # read and predicted with
        self.place = draw(max_length, dim, scale=0.1)
        self.bias = nn.Parameter(bias)  # (N,)
        into = 1.0 / math.sqrt(dim)
        self.attend = nn.ParameterList([draw(dim, 3 * dim, scale=into) for _ in range(layers)])
        self.mix = nn.ParameterList([draw(dim, dim, scale=0.1 * into) for _ in range(layers)])
        self.wide = nn.ParameterList([draw(dim, 2 * dim, scale=into) for _ in range(layers)])
        self.narrow = nn.ParameterList(
            [draw(2 * dim, dim, scale=0.1 * into) for _ in range(layers)]
        )
        self.norm = nn.ModuleList([nn.LayerNorm(dim) for _ in range(2 * layers + 1)])

    def forward(self, items: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Drop units where a generator is given, as training does."""
        # What stands right of a place cannot change it: padding to the right needs no mask.
        b, length = items.shape
        x = F.embedding(items.clamp(min=0), self.item) * math.sqrt(self.item.shape[1])
        x = self._drop(x + self.place[:length], generator)  # (B, L, D)
        for i in range(len(self.attend)):
            parts = (self.norm[2 * i](x) @ self.attend[i]).chunk(3, dim=2)  # (B, L, D) each
            q, k, v = (p.view(b, length, self.heads, -1).transpose(1, 2) for p in parts)
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, L, d)
            x = x + self._drop(seen.transpose(1, 2).reshape(b, length, -1) @ self.mix[i], generator)
            hidden = F.gelu(self.norm[2 * i + 1](x) @ self.wide[i])
            x = x + self._drop(hidden @ self.narrow[i], generator)
        return self.norm[-1](x)  # (B, L, D)

    def _drop(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Dropout drawn from `generator`: torch's own reads the global one."""
        if generator is None or not self.dropout:
            return x
        kept = torch.rand(x.shape, generator=generator, device=x.device) >= self.dropout
        return x * kept / (1.0 - self.dropout)


class SASRec:
    """Score the next item by what a user had, in which order; all of it, by attention.

    Learns from events as logged, repeats included, in windows of `max_length`; asked about a
    history, it reads the last `max_length` distinct items of it.
    """

    def __init__(
        self,
        past: Any,
        *,
        max_length: int = 100,
        dim: int = 64,
        layers: int = 1,
        heads: int = 2,
        epochs: int = 20,
        batch_size: int = 32,
        lr: float = 5e-3,
        dropout: float = 0.5,
        progress: bool = False,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        if min(max_length, dim, layers, heads, batch_size) < 1 or epochs < 0 or dim % heads:
            raise ValueError(
                "max_length, dim, layers, heads and batch_size must be at least 1, epochs at least "
                f"0 and dim a multiple of heads, got max_length={max_length}, dim={dim}, "
                f"layers={layers}, heads={heads}, batch_size={batch_size}, epochs={epochs}"
            )
        if not lr > 0:
            raise ValueError(f"lr must be above 0, got {lr}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        past = Interactions.of(past)
        if not past.timed:
            raise ValueError(
                "SASRec learns from the order of events, these have no times: give Logs or "
                "Interactions with times, or choose a model of counts, such as ease"
            )
        self.num_items, self.max_length = past.num_items, max_length
        self.ranks = popular_ranks(past, seed).to(device)  # (N,)
        count = torch.from_numpy(past.popularity()).float() + 1.0
        start = torch.Generator().manual_seed(seed)
        self.net = Net(
            (count / count.sum()).log(), max_length=max_length, dim=dim, layers=layers, heads=heads,
            dropout=dropout, generator=start,
        ).to(device)  # fmt: skip
        self._fit(past, epochs, batch_size, lr, progress, torch.Generator(device).manual_seed(seed))

    def _fit(
        self, past: Interactions, epochs: int, batch_size: int, lr: float, progress: bool,
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        """Predict every event of every window from those before it."""
        from tqdm import tqdm

        cuts = windows(past, self.max_length).to(generator.device)  # (W, 2)
        if not len(cuts):
            return  # nobody has two events: nothing follows anything
        item = torch.tensor(past.item, device=generator.device)  # (n,)
        optimizer = torch.optim.Adam(self.net.parameters(), lr=lr, betas=(0.9, 0.98))
        steps = epochs * -(-len(cuts) // batch_size)
        slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        for _ in tqdm(range(epochs), desc="Fit SASRec", leave=False, disable=not progress):
            order = torch.randperm(len(cuts), generator=generator, device=generator.device)
            for batch in order.split(batch_size):
                rows = rows_of(cuts[batch])  # (b, L + 1)
                items = torch.where(rows == EMPTY, EMPTY, item[rows])
                real = items[:, 1:] != EMPTY  # (b, L)
                hidden = self.net(items[:, :-1], generator)[real]  # (P, D)
                loss = next_item_loss(hidden, items[:, 1:][real], self.net, generator)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                slower.step()

    @torch.no_grad()
    def scores(self, obs: Observation) -> Tensor:
        """(B, N); popularity where a user has no history."""
        items, _, age = owned(obs, self.num_items)
        blocks = zip(items.split(CHUNK), age.split(CHUNK), strict=True)
        logits = torch.cat([self._logits(*block) for block in blocks])  # (B, N)
        return or_popular(logits, items, self.ranks)

    def _logits(self, items: Tensor, age: Tensor) -> Tensor:
        """Items (B, M), the latest first, and ages (B, M) to (B, N)."""
        sequence = oldest_first(items, age, self.max_length)  # (B, L)
        last = ((sequence != EMPTY).sum(dim=1) - 1).clamp(min=0)  # (B,)
        hidden = self.net(sequence)[torch.arange(len(last), device=last.device), last]  # (B, D)
        return hidden @ self.net.item.T + self.net.bias

    def state_dict(self) -> dict[str, Any]:
        net = self.net.state_dict()
        return {"num_items": self.num_items, "ranks": self.ranks, "net": net}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state, self.num_items, "ranks")
        self.net.load_state_dict(state["net"])


def next_item_loss(hidden: Tensor, target: Tensor, net: Net, generator: torch.Generator) -> Tensor:
    """Cross entropy of targets (P,) given hidden states (P, D), over all items or over a sample.

    Sampled items stand for all others: their share of the sum is scaled up to them (Bengio and
    Senecal, 2008, with uniform draws).
    """
    n = len(net.item)
    if n <= FULL:
        return F.cross_entropy(torch.addmm(net.bias, hidden, net.item.T), target)
    drawn = torch.randint(n, (NEGATIVES,), generator=generator, device=hidden.device)  # (S,)
    others = torch.addmm(net.bias[drawn], hidden, net.item[drawn].T)  # (P, S)
    others = others + math.log(n / NEGATIVES)  # hits of the target count for nobody
    others = others.masked_fill(drawn == target[:, None], -torch.inf)
    own = (hidden * net.item[target]).sum(dim=1) + net.bias[target]  # (P,)
    return (torch.cat([own[:, None], others], dim=1).logsumexp(dim=1) - own).mean()


def windows(past: Interactions, length: int) -> Tensor:
    """First row and row after the last (W, 2) of runs of up to `length` + 1 events of one user.

    Runs are cut from the latest event back; neighbours share one event, the last that the earlier
    run predicts and the first that the later one reads. Users with one event have none.
    """
    start = np.searchsorted(past.user, np.arange(past.num_users + 1))  # (U + 1,)
    steps = np.diff(start) - 1  # (U,) events that have one before them
    many = np.maximum(-(-steps // length), 0)  # (U,) runs of each user
    user = np.repeat(np.arange(past.num_users), many)  # (W,)
    back = np.arange(len(user)) - np.repeat(np.cumsum(many) - many, many)  # (W,) 0: the latest
    end = start[user + 1] - back * length
    return torch.from_numpy(np.stack([np.maximum(start[user], end - length - 1), end], axis=1))


def rows_of(cuts: Tensor) -> Tensor:
    """Runs of events (W, 2) to their rows (W, L), EMPTY to the right of shorter ones."""
    size = cuts[:, 1] - cuts[:, 0]  # (W,)
    place = torch.arange(int(size.max()), device=cuts.device)  # (L,)
    return torch.where(place < size[:, None], cuts[:, :1] + place, EMPTY)


def oldest_first(items: Tensor, age: Tensor, length: int) -> Tensor:
    """Items (B, M), the latest first among equal ages, to the last `length` of them in time order.

    EMPTY to the right, no wider than the longest.
    """
    age = torch.where(items == EMPTY, -torch.inf, age)  # (B, M)
    order = age.flip(1).argsort(dim=1, descending=True, stable=True)  # (B, M)
    items = items.flip(1).gather(1, order)  # oldest first, EMPTY to the right
    size = (items != EMPTY).sum(dim=1, keepdim=True)  # (B, 1)
    width = max(1, min(length, int(size.max())))
    place = torch.arange(width, device=items.device)  # (L,)
    kept = items.gather(1, ((size - length).clamp(min=0) + place).clamp(max=items.shape[1] - 1))
    return torch.where(place < size, kept, EMPTY)
