"""Rank the whole catalogue, never a sample of it, for every user and judge the lists.

Exactly equal scores are ordered by a random number per item that is drawn with `seed`: ids often go
with popularity, so an order by them flatters or punishes a model.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from encoders.state import EMPTY
from evaluation.ranking_table import (
    Array,
    bootstrap,
    catalogue,
    cells,
    checked_counts,
    cold_recall,
    metrics,
    paired,
    recall_among,
)

__all__ = [
    "Ranking", "bootstrap", "catalogue", "cold_recall", "evaluate", "metrics", "paired", "rank",
    "top_k",
]  # fmt: skip

Scores = Callable[[Tensor], Tensor]  # rows (b,) of the users to scores (b, N)
BLOCK = 64  # items whose highest score is taken first: one pass instead of a heap of all
AVERAGED = ("precision", "map", "mrr", "hit", "cold_recall")  # in a row, without an interval


@dataclass(frozen=True, eq=False)
class Ranking:
    """Lists for U' users who had something to find, and what they are worth at each k."""

    k: tuple[int, ...]  # ascending
    rows: Tensor  # (U',) which of the users
    top: Tensor  # (U', max k) best first, EMPTY where fewer were allowed
    relevant: csr_matrix  # (U', N)
    values: dict[int, dict[str, Tensor]]  # k to metric to (U',)
    figures: dict[int, dict[str, float]]  # k to what `catalogue` says
    seconds: float  # of CPU, to score and rank
    seed: int

    def row(self, k: int) -> dict[str, float | int | None]:
        """Plain numbers at k, 95 % intervals by bootstrap over users; None where undefined."""
        if k not in self.values:
            raise ValueError(f"k must be one that was ranked, {self.k}, got {k}")
        values = self.values[k]
        row: dict[str, float | int | None] = {}
        for name in ("recall", "ndcg"):
            three = bootstrap(values[name], seed=self.seed)
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), map(number, three), strict=True))
        row |= {name: number(float(values[name].nanmean())) for name in AVERAGED}
        row |= {name: number(x) for name, x in self.figures[k].items()}
        users = len(self.rows)
        return {**row, "predict_ms_per_user": 1e3 * self.seconds / users, "users": users}

    def recall_of(self, items: Tensor) -> float | None:
        """Recall at the smallest k of relevant items among `items` (N,) bool, a mean over users."""
        recall = recall_among(self.top[:, : self.k[0]], self.relevant, items)
        return number(float(recall.nanmean()))


def evaluate(
    scores: Scores,
    relevant: csr_matrix,
    known: csr_matrix | None,
    *,
    k: tuple[int, ...] = (10, 20),
    popularity: Array | Tensor,
    vectors: Tensor | None = None,
    cold: int = 10,
    seed: int = 0,
) -> Ranking:
    """Rank all items for users with relevant ones (U, N), those `known` (U, N) left out, and judge.

    `popularity` (N,) counts train events; an item with at most `cold` of them is cold. `vectors`
    (N, D) are of the items' texts.
    """
    if not k or min(k) < 1:
        raise ValueError(f"k must be one or more lengths of lists, at least 1 each, got {k}")
    relevant = cells(relevant, "relevant")
    checked_counts(popularity, relevant.shape[1])
    if known is not None:
        known = cells(known, "known")
        check_new(relevant, known)
    began = time.process_time()
    top, rows = rank(scores, relevant, known, k=max(k), seed=seed)
    seconds = time.process_time() - began
    relevant = relevant[rows.numpy()]
    lengths = tuple(sorted(set(k)))
    values, figures = {}, {}
    for length in lengths:
        lists = top[:, :length]
        values[length] = metrics(lists, relevant)
        values[length]["cold_recall"] = cold_recall(lists, relevant, popularity, cold=cold)
        figures[length] = catalogue(
            lists, popularity=popularity, vectors=vectors, num_items=relevant.shape[1],
            relevant=relevant,
        )  # fmt: skip
    return Ranking(lengths, rows, top, relevant, values, figures, seconds, seed)


def rank(
    scores: Scores,
    relevant: csr_matrix,
    known: csr_matrix | None,
    *,
    k: int,
    seed: int = 0,
    chunk: int = 256,
) -> tuple[Tensor, Tensor]:
    """The k best items (U', k) of each user with a relevant one, and which users (U',) these are.

    Of U users only `chunk` at a time are scored; what is `known` (U, N) is in no list.
    """
    relevant = cells(relevant, "relevant")
    check_k(k, relevant.shape[1])
    known = None if known is None else cells(known, "known")
    if known is not None and known.shape != relevant.shape:
        raise ValueError(
            f"known must have the users and items of relevant, {relevant.shape}, got {known.shape}"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 user, got {chunk}")
    rows = torch.from_numpy(np.flatnonzero(np.diff(relevant.indptr)))  # (U',)
    if not len(rows):
        raise ValueError(
            f"none of {relevant.shape[0]} users has a relevant item, so there is nobody to test: "
            "hold out a larger part of the log, or count repeats as relevant"
        )
    order = tie_order(relevant.shape[1], seed)
    top = [ranked(scores, part, known, k, order) for part in rows.split(chunk)]
    return torch.cat(top), rows


def ranked(
    scores: Scores, users: Tensor, known: csr_matrix | None, k: int, order: Tensor
) -> Tensor:
    """The k best items (b, k) of the users (b,)."""
    given = scores(users)
    if given.shape != (len(users), len(order)):
        raise ValueError(
            f"scores of {len(users)} users must be of shape {(len(users), len(order))}, a column "
            f"for each item, got {tuple(given.shape)}"
        )
    given, own = floating(given), None
    if known is not None:
        own = known[users.numpy()]
        given = given.clone()  # the caller's scores stay as they are
        given[places(own)] = -torch.inf
    return best(given, k, order, partial(not_in, own, len(order)), users).cpu()


def top_k(scores: Tensor, allowed: Tensor | None, k: int, *, seed: int = 0) -> Tensor:
    """The k best of scores (B, N) among those `allowed` (B, N), (B, k) with EMPTY where no more."""
    if scores.ndim != 2:
        raise ValueError(f"scores must be of shape (B, N), got {tuple(scores.shape)}")
    check_k(k, scores.shape[1])
    given = floating(scores)
    if allowed is None:
        allowed = torch.ones(1, 1, dtype=torch.bool, device=given.device).expand(given.shape)
    elif allowed.shape != scores.shape or allowed.dtype != torch.bool:
        raise ValueError(
            f"allowed must say True or False of each score {tuple(scores.shape)}, got "
            f"{allowed.dtype} of shape {tuple(allowed.shape)}"
        )
    else:
        given = given.masked_fill(~allowed, -torch.inf)
    order = tie_order(scores.shape[1], seed)
    return best(given, k, order, allowed.__getitem__, torch.arange(len(scores)))


def best(
    scores: Tensor, k: int, order: Tensor, allowed: Callable[[Tensor], Tensor], users: Tensor
) -> Tensor:
    """The k best items (B, k) by score (B, N), -inf where forbidden, then by `order` (N,).

    `allowed` gives rows (R,) of the mask (R, N). Only rows whose last place is disputed need it:
    among equal scores topk takes whom it likes, and a score may be -inf where nothing is forbidden.
    """
    order = order.to(scores.device)
    value, item = highest(scores, min(k + 1, scores.shape[1]))  # (B, k + 1)
    lost = value[:, 0].isnan()  # to topk nothing is more
    if lost.any():
        row = int(users[int(lost.int().argmax())])
        raise ValueError(f"scores must be numbers, row {row} has NaN: look at how it was fitted")
    last = value[:, k - 1]  # (B,)
    disputed = last == -torch.inf
    if value.shape[1] > k:
        disputed |= last == value[:, k]
    value, item = value[:, :k], item[:, :k]
    by_order = order[item].argsort(dim=1)
    by_score = value.gather(1, by_order).argsort(dim=1, descending=True, stable=True)
    item = item.gather(1, by_order.gather(1, by_score))
    rows = disputed.nonzero().squeeze(1)  # (R,)
    if len(rows):
        tied = scores[rows] == last[rows, None]  # (R, N)
        short = last[rows] == -torch.inf
        tied[short] &= allowed(rows[short])
        item[rows] = settled(value[rows], item[rows], tied, order)
    lost = item[:, 0] == EMPTY
    if lost.any():
        row = int(users[int(lost.int().argmax())])
        raise ValueError(
            f"a row needs an allowed item, all items of row {row} are masked: mask fewer, or leave "
            "the row out"
        )
    return item


def highest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and items (B, k) as topk of (B, N), in the k blocks of items whose maxima are highest.

    A block that is not among them holds nothing higher than the k maxima of those that are.
    """
    blocks = scores.shape[1] // BLOCK
    if blocks < 4 * k:
        value, item = scores.topk(k, dim=1)
        return value, item
    table = scores[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))  # (B, N / BLOCK, BLOCK)
    block = table.amax(dim=2).topk(k, dim=1).indices  # (B, k)
    item = (block[:, :, None] * BLOCK + torch.arange(BLOCK, device=scores.device)).flatten(1)
    rest = torch.arange(blocks * BLOCK, scores.shape[1], device=scores.device)
    item = torch.cat([item, rest.expand(len(item), -1)], dim=1)  # (B, k * BLOCK + N % BLOCK)
    value, place = scores.gather(1, item).topk(k, dim=1)
    return value, item.gather(1, place)


def settled(value: Tensor, item: Tensor, tied: Tensor, order: Tensor) -> Tensor:
    """Lists (R, k) whose places at the last one's score go to the `tied` (R, N) first in order."""
    late = len(order)
    first, drawn = highest(torch.where(tied, -order, -late), item.shape[1])  # (R, k) each
    drawn = torch.where(first == -late, EMPTY, drawn)
    above = (value > value[:, -1:]).sum(dim=1, keepdim=True)  # (R, 1) are in whatever the order
    place = torch.arange(item.shape[1], device=item.device) - above  # (R, k) among the tied
    return torch.where(place < 0, item, drawn.gather(1, place.clamp(min=0)))


def tie_order(num_items: int, seed: int) -> Tensor:
    """Which of two equal items comes first: a place (N,) for each, drawn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_items, generator=generator, dtype=torch.int32)


def not_in(own: csr_matrix | None, num_items: int, rows: Tensor) -> Tensor:
    """Whether items are none of a user's own (b, N), for some rows (R,), (R, N) bool."""
    free = torch.ones(len(rows), num_items, dtype=torch.bool)
    if own is not None:
        free[places(own[rows.cpu().numpy()])] = False
    return free.to(rows.device)


def places(matrix: csr_matrix) -> tuple[Tensor, Tensor]:
    """Rows and columns (nnz,) of all cells."""
    row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    return torch.from_numpy(row), torch.from_numpy(matrix.indices).long()


def floating(scores: Tensor) -> Tensor:
    """Scores as floats, without a gradient."""
    return scores.detach() if scores.is_floating_point() else scores.detach().double()


def check_k(k: int, num_items: int) -> None:
    """Refuse lists that no catalogue fills."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if k > num_items:
        raise ValueError(
            f"k={k} is larger than the catalogue of {num_items}: ask for shorter lists"
        )


def check_new(relevant: csr_matrix, known: csr_matrix) -> None:
    """Refuse relevant items that are in no list because the user knows them."""
    if known.shape != relevant.shape:
        return  # `rank` says so
    both = relevant.multiply(known).tocoo()
    if both.nnz:
        raise ValueError(
            f"relevant items must be new where `known` is left out, {both.nnz} are not, such as "
            f"item {both.col[0]} of row {both.row[0]}: drop them from relevant, or give known=None "
            "to allow repeats"
        )


def number(x: float) -> float | None:
    """A float, or None where it says nothing."""
    return x if np.isfinite(x) else None
