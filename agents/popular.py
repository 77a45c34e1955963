"""What needs no learning: what most people had, and what each had before (buy again)."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.interactions import Interactions, owned, popular_ranks, restore
from encoders.state import EMPTY, Observation, calendar

Array = np.ndarray
MOMENTS = {"weekday": 7, "hour": 24}
ORDERS = ("count", "recent", "due")
BLOCK = 1 << 20  # events whose moments are found at once
SECOND = 1.0 / 3600.0  # hours: the hand of a clock read from float32 waves may lag by less
FEW = 5.0  # gaps: an item with as many is half its own, half like all items
LAPSED = 0.25  # odds that after a purchase the item is never bought again
NARROWEST = 0.25  # least spread of log gaps: nothing is due to the day


class Popularity:
    """Score what most events were of, the same for everybody; by moment if asked to.

    With `by`, an item's events in a moment are compared with those expected of it there, both
    with `prior` events more: the score is its popularity times that ratio (an empirical Bayes
    lift; DuMouchel, 1999). A moment without events, and a rare item, are as popular as overall.
    """

    def __init__(
        self,
        past: Any,
        *,
        by: str | None = None,
        prior: float = 20.0,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        if by is not None and by not in MOMENTS:
            raise ValueError(f"by must be null or one of {', '.join(MOMENTS)}, got {by!r}")
        if not prior > 0:
            raise ValueError(f"prior must be above 0 events, got {prior}")
        past = Interactions.of(past)
        self.num_items, self.by = past.num_items, by
        ranks = popular_ranks(past, seed)[None]  # (1, N)
        if by is not None:
            _need_times(past, f"popularity by {by}", "by=null")
            ranks = _ranks_of_moments(past, by, prior, ranks[0].numpy())  # (moments, N)
        self.ranks = ranks.to(device)

    def scores(self, obs: Observation) -> Tensor:
        """Rank (B, N) in [0, 1) at the moment of each row."""
        if self.by is None:
            return self.ranks.expand(len(obs), -1)
        return self.ranks[_moment(obs.context, self.by)]

    def state_dict(self) -> dict[str, Any]:
        return {"num_items": self.num_items, "ranks": self.ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state, self.num_items, "ranks")


class BuyAgain:
    """Score what a user had before, from 1 up in some order; below stand others by popularity.

    Order `count`: most often first. `recent`: by count * exp(-age / tau), ages and `tau` in days.
    `due`: by count times the rate at its age at which an item is bought again, where the
    days between two purchases are log-normal with the item's own mean and spread and some never
    come back: just bought is not due, overdue for long is given up. Equals stand by count, then
    the latest first, then by popularity.
    """

    def __init__(
        self,
        past: Any,
        *,
        order: str = "count",
        tau: float = 120.0,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
        if not tau > 0:
            raise ValueError(f"tau must be above 0 days, got {tau}")
        past = Interactions.of(past)
        self.num_items, self.order, self.tau = past.num_items, order, tau
        self.ranks = popular_ranks(past, seed).to(device)  # (N,)
        mean, spread = gaps(past) if order == "due" else (torch.zeros(0), torch.zeros(0))
        self.mean, self.spread = mean.to(device), spread.to(device)  # (N,) of log days

    def scores(self, obs: Observation) -> Tensor:
        """(B, N): own items 1, 2, ... upwards, others their rank in [0, 1)."""
        items, count, age = owned(obs, self.num_items)  # (B, M) each
        real, count, age = _once(items, count, age, self.num_items)
        index = items.clamp(min=0)
        keys = (
            [-age, count] if self.order == "count" else [-age, count, self._key(index, count, age)]
        )
        keys[-1] = keys[-1].masked_fill(~real, -torch.inf)
        order = self.ranks[index].argsort(dim=1)  # (B, M), least important key first
        for key in keys:
            order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
        place = torch.arange(1, items.shape[1] + 1, device=items.device)  # (M,)
        place = place - (~real).sum(dim=1, keepdim=True)  # (B, M) 1 is the worst of one's own
        own = torch.zeros_like(count).scatter(1, order, place.to(count.dtype)) * real
        base = self.ranks.expand(len(obs), -1)  # (B, N)
        return base.scatter_reduce(1, index, own, "amax")  # what is not real adds a harmless 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_items": self.num_items,
            "ranks": self.ranks,
            "mean": self.mean,
            "spread": self.spread,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state, self.num_items, "ranks", "mean", "spread")

    def _key(self, index: Tensor, count: Tensor, age: Tensor) -> Tensor:
        """What own items (B, M) are ordered by; as a logarithm, for old ones would underflow."""
        count = count.double().clamp(min=1e-9)
        if self.order == "recent":
            return count.log() - age.double() / self.tau
        log_age = age.double().clamp(min=1.0).log()  # gaps are whole days, from 1 up
        mean, spread = self.mean[index], self.spread[index]  # (B, M)
        return count.log() + log_hazard(log_age, mean, spread)


def log_hazard(log_age: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """Log rate per day, f / (S + LAPSED): a log-normal's density f over who is still to come back.

    Without the lapsed the hazard f / S would fall as 1 / age only, and a weekly item that has not
    been bought for a year would stay as due as a monthly one on its day.
    """
    z = (log_age - mean) / spread
    left = torch.special.log_ndtr(-z)  # log S
    level = -0.5 * math.log(2 * math.pi) - spread.log() - log_age
    return level - 0.5 * z.square() - torch.logaddexp(left, left.new_tensor(LAPSED).log())


def gaps(past: Interactions) -> tuple[Tensor, Tensor]:
    """Mean and spread (N,) float64 of the log days between a user's purchases of an item.

    Both are drawn towards those of all items where an item has few gaps.
    """
    _need_times(past, "buy-again by due date", "order=count")
    day = np.floor(past.time)  # two events of a day are one trip
    order = np.lexsort((day, past.item, past.user))
    user, item, day = past.user[order], past.item[order], day[order]
    again = (np.diff(user) == 0) & (np.diff(item) == 0) & (np.diff(day) > 0)
    if not again.any():
        raise ValueError(
            "buy-again by due date learns from items bought again on a later day, these "
            "interactions have none: choose order=count"
        )
    log_gap, item = np.log(np.diff(day)[again]), item[1:][again]  # (g,) each
    many = np.bincount(item, minlength=past.num_items)  # (N,)
    mean = log_gap.mean()
    total = np.bincount(item, log_gap, minlength=past.num_items)
    own = (total + FEW * mean) / (many + FEW)  # (N,)
    square = np.bincount(item, (log_gap - own[item]) ** 2, minlength=past.num_items)
    variance = (square + FEW * log_gap.var()) / (many + FEW)
    spread = np.maximum(np.sqrt(variance), NARROWEST)
    return torch.from_numpy(own), torch.from_numpy(spread)


def _once(
    items: Tensor, count: Tensor, age: Tensor, num_items: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Where (B, M) an item stands first, its summed counts and least age, at every place."""
    b, m = items.shape
    index = torch.where(items == EMPTY, num_items, items)  # (B, M)
    place = torch.arange(m, device=items.device).expand(b, -1)  # (B, M)
    first = index.new_full((b, num_items + 1), m).scatter_reduce(1, index, place, "amin")
    total = count.new_zeros(b, num_items + 1).scatter_add(1, index, count)
    least = age.new_full((b, num_items + 1), torch.inf).scatter_reduce(1, index, age, "amin")
    real = (first.gather(1, index) == place) & (items != EMPTY)
    return real, total.gather(1, index), least.gather(1, index)


def _moment(context: Tensor, by: str) -> Tensor:
    """Weekday or hour (B,) of a context (B, C)."""
    if by == "weekday":
        return context[:, :7].argmax(dim=1)
    turn = torch.atan2(context[:, 7].double(), context[:, 8].double()) / (2 * torch.pi)  # (B,)
    return (turn * 24 + SECOND).floor().long() % 24


def _ranks_of_moments(past: Interactions, by: str, prior: float, overall: Array) -> Tensor:
    """Ranks (moments, N) in [0, 1), equal scores in the order of `overall` (N,)."""
    moments, n = MOMENTS[by], past.num_items
    flat = np.zeros(moments * n)
    for start in range(0, len(past.time), BLOCK):
        part = slice(start, start + BLOCK)
        moment = _moment(calendar(torch.from_numpy(past.time[part])), by).numpy()
        flat += np.bincount(moment * n + past.item[part], minlength=moments * n)
    count = flat.reshape(moments, n)
    share = count.sum(axis=0) / max(count.sum(), 1.0)  # (N,)
    expected = count.sum(axis=1, keepdims=True) * share  # (moments, N)
    score = share * (count + prior) / (expected + prior)
    ranks = np.empty((moments, n), dtype=np.float32)
    for m in range(moments):
        ranks[m, np.lexsort((overall, score[m]))] = np.arange(n, dtype=np.float32) / n
    return torch.from_numpy(ranks)


def _need_times(past: Interactions, what: str, instead: str) -> None:
    if not past.timed:
        raise ValueError(
            f"{what} needs the time of every event, these interactions are counts without times: "
            f"fit it on Logs or on Interactions with times, or choose {instead}"
        )
