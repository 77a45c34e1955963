"""Factors of values, not of choices: what was rated or spent, predicted by stochastic gradients.

A negative control: a model that knows only how much people liked what they chose cannot tell what
they choose. As histories carry no ratings, a user is the sum of what they had (Paterek, 2007).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from agents.interactions import FALLBACK, Interactions, or_popular, owned, popular_ranks, restore
from encoders.state import EMPTY, Observation

Weights = dict[str, Tensor]  # user_bias (U,), item_bias (N,), item (N, f), had (N + 1, f)
NAMES = ("user_bias", "item_bias", "item", "had")
BATCH = 32  # users whose values make one step


class MFSGD:
    """r = mean + b_u + b_i + q_i . sum of y_j over the history / sqrt of its size (Koren, 2008).

    Values of a user and an item are added up: the rating, the money spent, or how often, where no
    value is known. If all are equal nothing is to be learnt, and the scores are popularity.
    """

    def __init__(
        self,
        past: Any,
        *,
        factors: int = 16,
        regularization: float = 10.0,
        lr: float = 0.01,
        epochs: int = 10,
        log: bool = True,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        for name, whole in (("factors", factors), ("epochs", epochs)):
            if not (isinstance(whole, int) and whole >= 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {whole!r}")
        if not (lr > 0 and regularization >= 0):
            raise ValueError(
                f"lr must be above 0 and regularization at least 0, got {lr} and {regularization}"
            )
        past = Interactions.of(past)
        self.num_items = past.num_items
        self.ranks = popular_ranks(past, seed).to(device)  # (N,)
        user, item, value = cell_values(past, log)
        weights = start(past.num_users, past.num_items, factors, seed)
        self.losses: list[float] = []  # of the epochs, before regularisation
        if len(value) and np.ptp(value) > 0:
            level = torch.from_numpy((value - value.mean()) / value.std()).float()
            rows = (torch.from_numpy(user), torch.from_numpy(item), level)
            rng = np.random.default_rng(seed)
            free = {name: w.requires_grad_() for name, w in weights.items()}
            optimizer = torch.optim.Adam(free.values(), lr=lr)
            for _ in range(epochs):
                self.losses.append(epoch(free, rows, optimizer, regularization / len(value), rng))
            if not np.isfinite(self.losses[-1]):
                raise ValueError(f"the error of MFSGD is {self.losses[-1]}: lower lr, got {lr}")
        else:
            weights = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.item_bias, self.item, self.had = (
            weights[name].detach().to(device) for name in NAMES[1:]
        )

    def scores(self, obs: Observation) -> Tensor:
        """(B, N); popularity where a user has no history."""
        items, _, _ = owned(obs, self.num_items)
        taste = tastes(items, self.had)  # (B, f)
        predicted = self.item_bias + taste @ self.item.T  # (B, N)
        return or_popular(predicted + FALLBACK * self.ranks, items, self.ranks)

    def state_dict(self) -> dict[str, Any]:
        names = (*NAMES[1:], "ranks")
        return {"num_items": self.num_items, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state, self.num_items, *NAMES[1:], "ranks")


def cell_values(past: Interactions, log: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, items (n,) int64 and the sum of each pair's values (n,), or log(1 + it)."""
    key = past.user * past.num_items + past.item
    pair, back = np.unique(key, return_inverse=True)
    value = np.bincount(back, weights=past.value, minlength=len(pair))
    if log:
        if (value <= -1.0).any():
            raise ValueError(
                f"log needs values above -1, got a sum of {value.min():g} of a user and an item: "
                "drop refunds, or log=False"
            )
        value = np.log1p(value)
    return pair // max(1, past.num_items), pair % max(1, past.num_items), value


def start(users: int, items: int, factors: int, seed: int) -> Weights:
    """Zero biases and small random factors."""
    generator = torch.Generator().manual_seed(seed)
    item = 0.1 * torch.randn(items, factors, generator=generator)
    had = 0.1 * torch.randn(items + 1, factors, generator=generator)
    had[-1] = 0.0  # of EMPTY
    return {
        "user_bias": torch.zeros(users),
        "item_bias": torch.zeros(items),
        "item": item,
        "had": had,
    }


def tastes(items: Tensor, had: Tensor) -> Tensor:
    """Distinct items of histories (B, M) and what they say (N + 1, f) to users (B, f)."""
    ordered = items.sort(dim=1).values  # a session's item may stand in the past as well
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    real = (ordered != EMPTY) & ~again  # (B, M)
    size = real.sum(dim=1, keepdim=True).clamp(min=1).to(had.dtype)  # (B, 1)
    total = embedding_bag(torch.where(real, ordered, len(had) - 1), had, mode="sum")
    return total / size.sqrt()


def loss_of(
    weights: Weights, user: Tensor, item: Tensor, level: Tensor, regularization: float
) -> tuple[Tensor, Tensor]:
    """Whole histories of users, one row an item (m,), to the penalised and the plain mean error."""
    at = user.unique(return_inverse=True)[1]  # (m,)
    size = torch.bincount(at).to(level.dtype)  # (b,)
    first = size.long().cumsum(0) - size.long()  # (b,): rows are sorted by user
    q, y = weights["item"][item], weights["had"][item]  # (m, f) each
    b_user, b_item = weights["user_bias"][user], weights["item_bias"][item]  # (m,) each
    total = embedding_bag(item, weights["had"], first, mode="sum")  # (b, f)
    # Without the item itself: when it is recommended it is not in the history.
    taste = (total[at] - y) / (size - 1.0).clamp(min=1.0).sqrt()[at, None]  # (m, f)
    error = (b_user + b_item + (q * taste).sum(dim=1) - level).square().mean()
    # Per weight, not per value: a film that one person rated must not outdo what many rated.
    large = sum(w.square().sum() for w in weights.values())
    return error + regularization * large, error


def epoch(
    weights: Weights,
    rows: tuple[Tensor, Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    regularization: float,
    rng: np.random.Generator,
) -> float:
    """One pass over all users in an order drawn by `rng`; the mean error before each step."""
    user, item, level = rows
    size = user.unique_consecutive(return_counts=True)[1]  # (U',) of users with any
    begin = size.cumsum(0) - size
    total = 0.0
    order = torch.from_numpy(rng.permutation(len(size)))
    for batch in order.split(BATCH):
        parts = batch.sort().values  # (b,)
        step = size[parts].cumsum(0)
        at = torch.arange(int(step[-1]))  # (m,): places within the batch
        at += (begin[parts] - step + size[parts]).repeat_interleave(size[parts])
        loss, error = loss_of(weights, user[at], item[at], level[at], regularization)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(error.detach()) * len(at)
    return total / len(user)
