"""Rank items that no model has seen by what their texts say: what text vectors are worth."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.content import ContentKNN, tfidf
from agents.explore import break_ties
from agents.interactions import Interactions
from sources.logs import Logs

K = 10
HIDDEN = 0.2  # of all items
CHUNK = 500  # users at a time
Encode = Callable[[list[str]], Tensor]
Scores = Callable[[Tensor], Tensor]  # rows of users (b,) to scores (b, N)


def cold_table(
    logs: Logs, encode: Encode, *, seeds: int = 5, seed: int = 0
) -> list[dict[str, Any]]:
    """Hide a fifth of the items, `seeds` times, and rank only those for users who had any of them.

    `encode` turns texts (N,) into vectors (N, D). Means over the seeds, from `seed` on;
    `recall_sd` is between them. The oracle ranks hidden items by the very events that were
    hidden: no model can know it.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    past = Interactions.of(logs)
    texts = [str(text) for text in logs.item_text()]
    if not any(text.strip() for text in texts):
        raise ValueError(
            f"{logs.name}: cold items are ranked by their texts and none has one: declare "
            "item_text in the roles, or choose another split"
        )
    bert, words = encode(texts), tfidf(texts)  # (N, D), (N, V)
    found: dict[str, list[dict[str, float]]] = {}
    for drawn in range(seed, seed + seeds):
        rng = np.random.default_rng(drawn)
        hidden = np.zeros(past.num_items, dtype=bool)  # (N,)
        hidden[rng.permutation(past.num_items)[: round(HIDDEN * past.num_items)]] = True
        rest, kept_out = only(past, ~hidden), only(past, hidden)
        for name, scores in cold_models(rest, kept_out, bert, words, rng).items():
            found.setdefault(name, []).append(ranked(scores, rest, kept_out, hidden))
    return [mean_row(name, rows) for name, rows in found.items()]


def only(past: Interactions, items: np.ndarray) -> Interactions:
    """The events of some items (N,) bool; rows of users and items stay as they are."""
    keep = items[past.item]
    return Interactions(
        past.user[keep], past.item[keep], past.time[keep], past.value[keep],
        past.num_users, past.num_items,
    )  # fmt: skip


def cold_models(
    rest: Interactions,
    kept_out: Interactions,
    bert: Tensor,
    words: Tensor,
    rng: np.random.Generator,
) -> dict[str, Scores]:
    """What ranks hidden items, by name; the first and the last frame the others."""
    noise = torch.from_numpy(rng.random((rest.num_users, rest.num_items)))  # (U, N)
    popular = torch.from_numpy(kept_out.popularity()).double()  # (N,)

    def by_text(vectors: Tensor, centred: bool) -> Scores:
        model = ContentKNN(Interactions.of(rest, vectors=vectors), centred=centred)
        return lambda rows: model.scores(rest.histories(rows.numpy()))

    return {
        "random": lambda rows: noise[rows],
        "tfidf": by_text(words, True),
        "bert plain": by_text(bert, False),
        "bert centred": by_text(bert, True),
        "oracle: popularity among hidden": lambda rows: popular.expand(len(rows), -1),
    }


def ranked(
    scores: Scores, rest: Interactions, kept_out: Interactions, hidden: np.ndarray
) -> dict[str, float]:
    """Recall and NDCG at 10 of hidden items, for users with any of them and with a history."""
    some = (np.bincount(kept_out.user, minlength=rest.num_users) > 0) & (
        np.bincount(rest.user, minlength=rest.num_users) > 0
    )
    users = torch.from_numpy(np.flatnonzero(some))  # (u,)
    columns = torch.from_numpy(np.flatnonzero(hidden))  # (n,)
    wanted = kept_out.counts() > 0  # (U, N)
    k = min(K, len(columns))
    discount = 1.0 / torch.arange(2.0, k + 2.0, dtype=torch.float64).log2()  # (k,)
    recall, ndcg = [], []
    for rows in users.split(CHUNK):
        best = break_ties(scores(rows)[:, columns]).topk(k, dim=1).indices  # (b, k)
        real = torch.from_numpy(wanted[rows.numpy()].toarray())[:, columns]  # (b, n) bool
        hit = real.gather(1, best).double()  # (b, k)
        size = real.sum(dim=1)  # (b,)
        recall.append(hit.sum(dim=1) / size)
        ideal = discount.cumsum(0)[size.clamp(max=k) - 1]  # (b,)
        ndcg.append((hit * discount).sum(dim=1) / ideal)
    return {
        "recall": float(torch.cat(recall).mean()) if recall else float("nan"),
        "ndcg": float(torch.cat(ndcg).mean()) if ndcg else float("nan"),
        "users": float(len(users)),
        "items": float(len(columns)),
    }


def mean_row(name: str, rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The mean over seeds, and the standard deviation of recall between them."""
    mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    spread = [row["recall"] for row in rows]
    return {
        "model": name,
        f"recall@{K}": mean["recall"],
        "recall_sd": float(np.std(spread, ddof=1)) if len(rows) > 1 else float("nan"),
        f"ndcg@{K}": mean["ndcg"],
        "users": round(mean["users"]),
        "items": round(mean["items"]),
    }
