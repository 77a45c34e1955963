"""Linear recommenders: a history times a matrix of items by items. EASE and PureSVD."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.interactions import (
    Interactions,
    or_popular,
    owned,
    popular_ranks,
    restore,
    spread,
    weighed,
)
from encoders.state import Observation

LARGEST = 20_000  # items: fitting holds about 40 bytes of each pair, 16 GB


class EASE:
    """The closed-form linear autoencoder whose diagonal is zero (Steck, 2019)."""

    def __init__(
        self,
        past: Any,
        *,
        lam: float = 300.0,
        weight: str = "log",
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        if not lam > 0:
            raise ValueError(f"lam must be above 0, got {lam}: without it items explain themselves")
        past = Interactions.of(past)
        self.num_items, self.weight = past.num_items, weight
        if past.num_items > LARGEST:
            raise ValueError(
                f"EASE keeps a matrix of items by items: at most {LARGEST} items, got "
                f"{past.num_items}: choose als, or a smaller catalogue"
            )
        self.ranks = popular_ranks(past, seed).to(device)  # (N,)
        self.pull = torch.from_numpy(ease(past.counts(), lam, weight)).to(device)  # (N, N)

    def scores(self, obs: Observation) -> Tensor:
        """(B, N); popularity where a user has no history."""
        items, count, _ = owned(obs, self.num_items)
        own = spread(items, weighed(count, self.weight), self.num_items)  # (B, N)
        return or_popular(own @ self.pull, items, self.ranks)

    def state_dict(self) -> dict[str, Any]:
        return {"num_items": self.num_items, "pull": self.pull, "ranks": self.ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state, self.num_items, "pull", "ranks")


class PureSVD:
    """A history projected on the log's leading axes of items (Cremonesi et al., 2010)."""

    def __init__(
        self,
        past: Any,
        *,
        factors: int = 32,
        weight: str = "log",
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        if factors < 1:
            raise ValueError(f"factors must be at least 1, got {factors}")
        past = Interactions.of(past)
        self.num_items, self.weight = past.num_items, weight
        self.ranks = popular_ranks(past, seed).to(device)  # (N,)
        self.axes = torch.from_numpy(axes(past.counts(), factors, weight, seed)).to(device)

    def scores(self, obs: Observation) -> Tensor:
        """(B, N); popularity where a user has no history."""
        items, count, _ = owned(obs, self.num_items)
        own = spread(items, weighed(count.double(), self.weight), self.num_items)  # (B, N)
        total = own @ self.axes @ self.axes.T  # (B, N)
        # Items of one worth differ by the last bits, otherwise in each batch: rounding makes ties.
        return or_popular(total.round(decimals=9).float(), items, self.ranks)

    def state_dict(self) -> dict[str, Any]:
        return {"num_items": self.num_items, "axes": self.axes, "ranks": self.ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state, self.num_items, "axes", "ranks")


def axes(counts: Any, factors: int, weight: str = "log", seed: int = 0) -> np.ndarray:
    """Counts (U, N) CSR to its leading right singular vectors (N, f), of a lower rank fewer."""
    from scipy.sparse.linalg import svds

    x = weighed(counts.astype(np.float64), weight)
    short = min(x.shape)
    if factors < short - 1:  # what iterates needs room; where there is none the whole is small
        first = np.random.default_rng(seed).standard_normal(short)
        _, size, right = (
            svds(x, k=factors, v0=first) if x.nnz else (0, np.zeros(0), x.toarray()[:0])
        )
    else:
        _, size, right = np.linalg.svd(x.toarray(), full_matrices=False)
    best = np.argsort(-size)[:factors]
    best = best[size[best] > 1e-9 * size.max(initial=0.0)]
    return np.ascontiguousarray(right[best].T)


def ease(counts: Any, lam: float, weight: str = "log") -> np.ndarray:
    """Counts (U, N) CSR to the pull (N, N) float32 of each item (row) on each other."""
    x = weighed(counts.astype(np.float64), weight)
    gram = (x.T @ x).toarray()  # (N, N)
    gram[np.diag_indices_from(gram)] += lam
    lower = torch.linalg.cholesky(torch.from_numpy(gram))
    inverse = torch.cholesky_inverse(lower).numpy()  # (N, N)
    pull = inverse / -np.diag(inverse)
    np.fill_diagonal(pull, 0.0)
    return pull.astype(np.float32)
