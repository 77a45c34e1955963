"""How fast all items are ranked and judged for many users, against a plain loop over users."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from agents.linear import EASE
from evaluation.ranking import metrics, rank
from experiments.bench_rows import Row, Work, in_turn, row

Array = np.ndarray
USERS, ITEMS, KNOWN, RELEVANT, K = 1000, 10_000, 50, 20, 10
FITTED, FILLED = (943, 1682), 0.063  # users and items of ml-100k, and how full their table is


def rows(repeats: int, seconds: float, seed: int, quick: bool, device: str = "cpu") -> list[Row]:
    """Ours against a loop over users, and the fit of EASE."""
    cut = 20 if quick else 1
    users, items = USERS // cut, ITEMS // cut
    scores, relevant, known = world(users, items, KNOWN, RELEVANT, seed=seed)

    def judge(way: Callable[..., Any]) -> int:
        way(scores, relevant, known, K)
        return users

    size = tuple(x // cut for x in FITTED)
    counts = csr_matrix(np.random.default_rng(seed).random(size) < FILLED, dtype=np.float32)

    def fit() -> int:
        EASE(counts)
        return 1

    works: dict[str, Work] = {
        "ours": partial(judge, batched),
        "loop": partial(judge, one_by_one),
        "fit": fit,
    }
    speeds = in_turn(works, repeats, seconds)
    case = f"rank {users:,} users x {items:,} items, k={K}, with all metrics"
    return [
        row("rank", case, "users per CPU-second", speeds["ours"], peer=speeds["loop"],
            peer_name="a loop over users (NumPy)"),
        row("rank", f"fit EASE on {size[0]} users x {size[1]} items", "fits per CPU-second",
            speeds["fit"]),
    ]  # fmt: skip


def world(
    users: int, items: int, known: int, relevant: int, *, seed: int
) -> tuple[Array, csr_matrix, csr_matrix]:
    """Scores (U, N) and as many relevant and known items of each user, none of them both."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(users, items)).astype(np.float32)
    mine = np.argsort(rng.random((users, items)), axis=1)[:, : known + relevant]
    return scores, listed(mine[:, known:], items), listed(mine[:, :known], items)


def listed(item: Array, num_items: int) -> csr_matrix:
    """Items (U, M) as ones in (U, N)."""
    user = np.repeat(np.arange(len(item)), item.shape[1])
    return csr_matrix((np.ones(item.size), (user, item.ravel())), shape=(len(item), num_items))


def batched(
    scores: Array, relevant: csr_matrix, known: csr_matrix, k: int
) -> dict[str, torch.Tensor]:
    """The metrics (U,) as `evaluation.ranking` finds them."""
    table = torch.from_numpy(scores)

    def given(rows: torch.Tensor) -> torch.Tensor:
        return table[rows[0] : rows[-1] + 1]  # a view: to score is no part of the race

    top, rows = rank(given, relevant, known, k=k)
    return metrics(top, relevant[rows.numpy()])


def one_by_one(
    scores: Array, relevant: csr_matrix, known: csr_matrix, k: int
) -> dict[str, torch.Tensor]:
    """The same by one user after another: sort the row, intersect with a set, add up."""
    values = []
    for user in range(len(scores)):
        row = scores[user].copy()
        row[known.indices[known.indptr[user] : known.indptr[user + 1]]] = -np.inf
        top = np.argsort(-row)[:k]
        wanted = set(relevant.indices[relevant.indptr[user] : relevant.indptr[user + 1]].tolist())
        values.append(judged(top.tolist(), wanted, k))
    return {
        name: torch.tensor([v[name] for v in values], dtype=torch.float64) for name in values[0]
    }


def judged(top: list[int], wanted: set[int], k: int) -> dict[str, float]:
    """The metrics of one list."""
    hits, gain, precisions, first = 0, 0.0, 0.0, 0.0
    for place, item in enumerate(top, start=1):
        if item in wanted:
            hits += 1
            gain += 1.0 / math.log2(place + 1)
            precisions += hits / place
            first = first or 1.0 / place
    best = min(k, len(wanted))
    ideal = sum(1.0 / math.log2(place + 1) for place in range(1, best + 1))
    return {
        "precision": hits / k, "recall": hits / len(wanted), "ndcg": gain / ideal,
        "map": precisions / best, "mrr": first, "hit": float(hits > 0),
    }  # fmt: skip
