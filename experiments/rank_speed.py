"""How fast all items are ranked and judged for many users, against a plain loop over users."""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from agents.linear import EASE
from evaluation.ranking import metrics, rank

Array = np.ndarray
USERS, ITEMS, KNOWN, RELEVANT, K = 1000, 10_000, 50, 20, 10
FITTED, FILLED = (943, 1682), 0.063  # users and items of ml-100k, and how full their table is


def rows(repeats: int) -> list[dict[str, Any]]:
    """The two races: CPU seconds of ours, of the other, and how many times ours is faster."""
    scores, relevant, known = world(USERS, ITEMS, KNOWN, RELEVANT, seed=0)
    ours = seconds(partial(batched, scores, relevant, known, K), repeats)
    loop = seconds(partial(one_by_one, scores, relevant, known, K), repeats)
    counts = csr_matrix(np.random.default_rng(0).random(FITTED) < FILLED, dtype=np.float32)
    fit = seconds(partial(EASE, counts), repeats)
    case = f"rank {USERS:,} users x {ITEMS:,} items, k={K}, with all metrics"
    return [
        {"bench": "rank", "case": case, "product": ours, "peer": loop, "ratio_to_peer": loop / ours,
         "peer_name": "a loop over users (NumPy)"},
        {"bench": "rank", "case": f"fit EASE on {FITTED[0]} users x {FITTED[1]} items",
         "product": fit, "peer": None, "ratio_to_peer": None, "peer_name": None},
    ]  # fmt: skip


def text(found: list[dict[str, Any]]) -> str:
    """A line for each."""
    lines = []
    for row in found:
        said = f"{row['case']}: {row['product']:.4f} CPU-seconds"
        if row["peer"]:
            said += f", {row['peer_name']} {row['peer']:.4f}: {row['ratio_to_peer']:.1f} x"
        lines.append(said)
    return "\n".join(lines)


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


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """CPU seconds, the median of some after one that nobody times."""
    work()
    spent = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return statistics.median(spent)
