"""Neighbours of items and of users: show what goes with what a user had."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from agents.explore import break_ties
from agents.interactions import (
    FALLBACK,
    Interactions,
    owned,
    popular_ranks,
    restore,
    spread,
    weighed,
)
from encoders.state import EMPTY, Observation

ENTRIES = 1 << 23  # of a block of similarities: (items of a block, N) at most, if none is zero
GATHERED = 1 << 22  # neighbours that are summed up at once
TIES = 20_240_229  # of the order among equally similar items
LN2 = float(np.log(2.0))


class ItemKNN:
    """Item-based nearest neighbours (Sarwar et al., 2001).

    A score is the sum of the similarities to the items of the history, each times its evidence:
    1, log1p of its count, or its count. With `own` an item is a neighbour of its own: what was
    bought is bought again. Popularity orders what no neighbour speaks for.
    """

    def __init__(
        self,
        past: Any,
        *,
        neighbours: int = 100,
        shrink: float = 10.0,
        weight: str = "log",
        own: bool = True,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        past = Interactions.of(past)
        self.num_items, self.weight = past.num_items, weight
        self.fallback = (FALLBACK * popular_ranks(past, seed)).to(device)  # (N,)
        evidence = _evidence(past.counts(), weight)
        index, value = padded(item_similarity(evidence, neighbours, shrink, own=own))
        self.index = index.to(device)  # (N, k)
        self.value = value.to(device)  # (N, k), 0 where there is no neighbour

    def scores(self, obs: Observation) -> Tensor:
        """Summed similarity (B, N) to the history."""
        items, count, _ = owned(obs, self.num_items)
        total = pulled(items, _evidence(count, self.weight), self.index, self.value)
        return (total + self.fallback).float()

    def state_dict(self) -> dict[str, Any]:
        names = ("index", "value", "fallback")
        return {"num_items": self.num_items, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state, self.num_items, "index", "value", "fallback")


class RP3beta:
    """Random walks of three steps with popular ends penalised (Paudel et al., 2017).

    An item pulls another by the chance to walk from it to a user and on to the other, each step's
    chance to the power `alpha`, over the other's degree to the power `beta`.
    """

    def __init__(
        self,
        past: Any,
        *,
        alpha: float = 0.8,
        beta: float = 0.6,
        neighbours: int = 300,
        weight: str = "log",
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        past = Interactions.of(past)
        self.num_items, self.weight = past.num_items, weight
        self.fallback = (FALLBACK * popular_ranks(past, seed)).to(device)  # (N,)
        pull = walks(weighed(past.counts(), weight), alpha, beta, neighbours)
        index, value = padded(pull / max(pull.max(), np.finfo(float).tiny))  # beside the fallback
        self.index = index.to(device)  # (N, k)
        self.value = value.to(device)  # (N, k), 0 where there is no neighbour

    def scores(self, obs: Observation) -> Tensor:
        """Summed pull (B, N) of the history; the strongest single one is 1."""
        items, count, _ = owned(obs, self.num_items)
        total = pulled(items, weighed(count, self.weight), self.index, self.value)
        return (total + self.fallback).float()

    def state_dict(self) -> dict[str, Any]:
        names = ("index", "value", "fallback")
        return {"num_items": self.num_items, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state, self.num_items, "index", "value", "fallback")


class UserKNN:
    """User-based nearest neighbours (Herlocker et al., 1999): what users alike had.

    The history is compared with every user of the log by x . y / (|x| |y| + shrink); the nearest
    give their items, each times its similarity. A user of the log is the nearest to their own
    history: it takes one place and favours what they had, of new items it says nothing.
    """

    def __init__(
        self,
        past: Any,
        *,
        neighbours: int = 100,
        shrink: float = 100.0,
        weight: str = "log",
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        _check(neighbours, shrink)
        past = Interactions.of(past)
        self.num_items, self.weight = past.num_items, weight
        self.neighbours, self.shrink = neighbours, shrink
        self.fallback = (FALLBACK * popular_ranks(past, seed)).to(device)  # (N,)
        rows = weighed(past.counts().astype(np.float64), weight)  # (U, N)
        columns = rows.T.tocsr()  # (N, U)
        self.norm = torch.from_numpy(_norms(rows)).to(device)  # (U,)
        self.user_start, self.user_item, self.user_value = _parts(rows, device)
        self.item_start, self.item_user, self.item_value = _parts(columns, device)

    def scores(self, obs: Observation) -> Tensor:
        """Items (B, N) of the nearest users, summed."""
        items, count, _ = owned(obs, self.num_items)
        weight = weighed(count.double(), self.weight)  # (B, M)
        size = max(1, ENTRIES // max(len(self.norm), self.num_items, 1))
        parts = [
            self._of_nearest(spread(some, heavy, self.num_items))
            for some, heavy in zip(items.split(size), weight.split(size), strict=True)
        ]
        return (torch.cat(parts) + self.fallback).float()

    def state_dict(self) -> dict[str, Any]:
        return {"num_items": self.num_items, **{name: getattr(self, name) for name in KEPT}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state, self.num_items, *KEPT)

    def _of_nearest(self, own: Tensor) -> Tensor:
        """Histories (b, N) to what their nearest users had (b, N) float64."""
        dots = _times(self.user_start, self.user_item, self.user_value, own)  # (b, U)
        norm = own.square().sum(dim=1, keepdim=True).sqrt()  # (b, 1)
        near = dots / (norm * self.norm + self.shrink).clamp(min=1e-12)  # (b, U)
        user = break_ties(near).topk(min(self.neighbours, near.shape[1]), dim=1).indices
        kept = torch.zeros_like(near).scatter(1, user, near.gather(1, user))  # (b, U)
        return _times(self.item_start, self.item_user, self.item_value, kept)


KEPT = (
    "user_start", "user_item", "user_value", "item_start", "item_user", "item_value", "norm",
    "fallback",
)  # fmt: skip


def item_similarity(
    interactions: Any, neighbours: int = 100, shrink: float = 10.0, *, own: bool = True
) -> Any:
    """Cosines of items over users, (U, N) CSR to (N, N) CSR with at most `neighbours` a row.

    x . y / (|x| |y| + shrink), so that items few users know are like nothing. With `own`, an item
    that has users is among its neighbours. The work is done in blocks of items.
    """
    from scipy.sparse import csr_matrix

    _check(neighbours, shrink)
    users = csr_matrix(interactions, dtype=np.float64, copy=True)  # (U, N)
    if not np.isfinite(users.data).all() or (users.data < 0).any():
        raise ValueError("interactions must be finite and at least 0: counts, or 1 where there are")
    users.eliminate_zeros()
    items = users.T.tocsr()  # (N, U)
    norm = _norms(items)  # (N,)

    def blocks() -> Iterator[Any]:
        for start, dots in _products(items, users):
            dots.data /= norm[start + dots.row] * norm[dots.col] + shrink
            yield start, dots

    return _nearest(blocks(), users.shape[1], neighbours, own)


def walks(interactions: Any, alpha: float, beta: float, neighbours: int) -> Any:
    """Pulls of items on items, (U, N) CSR to (N, N) CSR with at most `neighbours` a row."""
    from scipy.sparse import csr_matrix

    _check(neighbours, 0.0)
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    users = csr_matrix(interactions, dtype=np.float64, copy=True)  # (U, N)
    users.eliminate_zeros()
    items = users.T.tocsr()  # (N, U)
    degree = np.maximum(np.asarray(items.sum(axis=1)).ravel(), np.finfo(float).tiny)  # (N,)
    for step in (users, items):  # rows become chances that sum to 1, then their powers
        total = np.asarray(step.sum(axis=1)).ravel()
        step.data = (step.data / np.repeat(total, np.diff(step.indptr))) ** alpha

    def blocks() -> Iterator[Any]:
        for start, chance in _products(items, users):
            chance.data /= degree[chance.col] ** beta
            yield start, chance

    return _nearest(blocks(), users.shape[1], neighbours, own=False)


def padded(nearest: Any) -> tuple[Tensor, Tensor]:
    """Rows of a CSR (N, N) as indices and values (N, k), 0 of worth 0 behind the last."""
    lengths = np.diff(nearest.indptr)  # (N,)
    place = np.arange(lengths.max(initial=1)) < lengths[:, None]  # (N, k)
    index, value = np.zeros(place.shape, dtype=np.int64), np.zeros(place.shape, dtype=np.float32)
    index[place], value[place] = nearest.indices, nearest.data
    return torch.from_numpy(index), torch.from_numpy(value)


def pulled(items: Tensor, weight: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Sums (B, N) float64 over items (B, M) of weight times their neighbours' values (N, k)."""
    (b, m), (n, k) = items.shape, index.shape
    weight = weight * (items != EMPTY)  # (B, M)
    items = items.clamp(min=0)
    total = torch.zeros(b, n, dtype=torch.float64, device=items.device)
    width = max(1, GATHERED // max(1, b * k))  # places of the history taken together
    for start in range(0, m, width):
        own = items[:, start : start + width]  # (B, m)
        pull = value[own] * weight[:, start : start + width, None]  # (B, m, k)
        total.scatter_add_(1, index[own].flatten(1), pull.flatten(1).double())
    return total


def _evidence(count: Any, weight: str) -> Any:
    """As `weighed`, with natural logarithms: `shrink` is an amount of these."""
    return weighed(count, weight) * (LN2 if weight == "log" else 1.0)


def _check(neighbours: int, shrink: float) -> None:
    if neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, got {neighbours}")
    if not shrink >= 0:
        raise ValueError(f"shrink must be at least 0, got {shrink}")


def _norms(rows: Any) -> np.ndarray:
    """Lengths of the rows of a CSR."""
    return np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel())


def _products(items: Any, users: Any) -> Iterator[Any]:
    """Blocks of the product (N, U) by (U, N), each with the item it starts at, as COO."""
    n = users.shape[1]
    size = max(1, ENTRIES // max(n, 1))
    for start in range(0, n, size):
        yield start, (items[start : start + size] @ users).tocoo()


def _nearest(blocks: Iterator[Any], n: int, neighbours: int, own: bool) -> Any:
    """The best columns of each row of blocks (b, N) as one CSR (N, N)."""
    from scipy.sparse import csr_matrix, vstack

    kept, draw = [], np.random.default_rng(TIES).random(n)  # ids often go with popularity
    for start, block in blocks:
        some = (block.data > 0) & (own | (block.col != start + block.row))
        row, col, value = block.row[some], block.col[some], block.data[some]
        order = np.lexsort((draw[col], -value, row))  # by item, the nearest first
        row, col, value = row[order], col[order], value[order]
        first = np.searchsorted(row, np.arange(block.shape[0]))  # (b,)
        near = np.arange(len(row)) - first[row] < neighbours
        kept.append(csr_matrix((value[near], (row[near], col[near])), shape=block.shape))
    return vstack(kept, format="csr") if kept else csr_matrix((n, n))


def _parts(rows: Any, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """A CSR as where its rows start, columns int64 and values float64."""
    return (
        torch.from_numpy(rows.indptr.astype(np.int64)).to(device),
        torch.from_numpy(rows.indices.astype(np.int64)).to(device),
        torch.from_numpy(rows.data.astype(np.float64)).to(device),
    )


def _times(start: Tensor, column: Tensor, value: Tensor, dense: Tensor) -> Tensor:
    """Rows (R, N) in parts times dense (b, N) transposed, as (b, R)."""
    table = dense.T.contiguous()  # (N, b): a row's sum is a bag of rows of this table
    bags = embedding_bag(
        column, table, start, mode="sum", per_sample_weights=value, include_last_offset=True
    )
    return bags.T
