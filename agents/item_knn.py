"""Item-based nearest neighbours (Sarwar et al., 2001): show what goes with what was bought."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.explore import (
    epsilon_greedy_probs,
    epsilon_greedy_slate,
    epsilon_greedy_slate_probs,
    seeded_ranks,
)
from encoders.state import EMPTY, Observation

ENTRIES = 1 << 23  # of a block of similarities: (items of a block, N) at most, if none is zero
GATHERED = 1 << 22  # neighbours that are summed up at once
FALLBACK = 1e-6  # of popularity beside similarity: it orders what no neighbour speaks for


def item_similarity(interactions: Any, neighbours: int = 100, shrink: float = 10.0) -> Any:
    """Cosines of items over users, (U, N) CSR to (N, N) CSR with at most `neighbours` a row.

    x . y / (|x| |y| + shrink), so that items few users know are like nothing. An item with users
    is a neighbour of its own: what was bought is bought again. The work is done in blocks of items.
    """
    from scipy.sparse import csr_matrix, vstack

    if neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, got {neighbours}")
    if not shrink >= 0:
        raise ValueError(f"shrink must be at least 0, got {shrink}")
    users = csr_matrix(interactions, dtype=np.float64, copy=True)  # (U, N)
    if not np.isfinite(users.data).all() or (users.data < 0).any():
        raise ValueError("interactions must be finite and at least 0: counts, or 1 where there are")
    users.eliminate_zeros()
    n = users.shape[1]
    items = users.T.tocsr()  # (N, U)
    norm = np.sqrt(np.asarray(items.multiply(items).sum(axis=1)).ravel())  # (N,)
    size, blocks = max(1, ENTRIES // max(n, 1)), []
    for start in range(0, n, size):
        dots = (items[start : start + size] @ users).tocoo()  # (b, N)
        value = dots.data / (norm[start + dots.row] * norm[dots.col] + shrink)
        order = np.lexsort((dots.col, -value, dots.row))  # by item, the nearest first
        row, col, value = dots.row[order], dots.col[order], value[order]
        first = np.searchsorted(row, np.arange(dots.shape[0]))  # (b,)
        keep = (np.arange(len(row)) - first[row] < neighbours) & (value > 0)
        blocks.append(csr_matrix((value[keep], (row[keep], col[keep])), shape=dots.shape))
    return vstack(blocks, format="csr") if blocks else csr_matrix((n, n))


class ItemKNN:
    """Show what is bought by those who bought the household's items; of no such items the popular.

    A score is the sum of the similarities to the items of the past, each times its log1p count.
    """

    def __init__(self, spec: AgentSpec, *, neighbours: int = 100, shrink: float = 10.0) -> None:
        if spec.interactions is None:
            raise ValueError(
                "ItemKNN learns from interactions (users, N), this environment has none: "
                "choose an agent that needs none, such as popularity"
            )
        self.spec = spec
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        ranks = seeded_ranks(spec.popularity.to(spec.device), self.generator)
        self.fallback = FALLBACK * ranks / spec.num_items  # (N,) in [0, FALLBACK)
        nearest = item_similarity(spec.interactions.log1p(), neighbours, shrink)  # (N, N) CSR
        index, value = padded(nearest, spec.num_items)
        self.index = index.to(spec.device)  # (N, k)
        self.value = value.to(spec.device)  # (N, k), 0 where there is no neighbour

    def scores(self, obs: Observation) -> Tensor:
        """Summed similarity (B, N) to the past."""
        weight = obs.past_count.log1p() * (obs.past != EMPTY)  # (B, H)
        past = obs.past.clamp(min=0)
        b, k = len(obs), self.index.shape[1]
        total = torch.zeros(b, self.spec.num_items, dtype=torch.float64, device=past.device)
        width = max(1, GATHERED // max(1, b * k))  # places of the past taken together
        for start in range(0, past.shape[1], width):
            own = past[:, start : start + width]  # (B, h)
            pull = self.value[own] * weight[:, start : start + width, None]  # (B, h, k)
            total.scatter_add_(1, self.index[own].flatten(1), pull.flatten(1).double())
        return (total + self.fallback).float()

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        allowed = self._allowed(obs, mask)
        return epsilon_greedy_slate(
            self.scores(obs), allowed, self.spec.slate_size, 0.0, self.generator
        )

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        return epsilon_greedy_slate_probs(self.scores(obs), self._allowed(obs, mask), slate, 0.0)

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        return epsilon_greedy_probs(self.scores(obs), self._allowed(obs, mask), 0.0)

    def update(self, transition: Transition) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index, "value": self.value, "fallback": self.fallback}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["index"]) != self.spec.num_items:
            raise ValueError(
                f"the checkpoint is of a catalogue of {len(state['index'])} items, this one has "
                f"{self.spec.num_items}: load it with the catalogue it was made on"
            )
        for name in ("index", "value", "fallback"):
            setattr(self, name, state[name].to(self.fallback.device))

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        return allowed_items(mask, len(obs), self.spec.num_items, obs.profile.device)


def padded(nearest: Any, num_items: int) -> tuple[Tensor, Tensor]:
    """Rows of a CSR (N, N) as indices and values (N, k), 0 of worth 0 behind the last."""
    lengths = np.diff(nearest.indptr)  # (N,)
    if nearest.shape[0] != num_items:
        raise ValueError(f"interactions are of {nearest.shape[0]} items, the spec of {num_items}")
    place = np.arange(lengths.max(initial=1)) < lengths[:, None]  # (N, k)
    index, value = np.zeros(place.shape, dtype=np.int64), np.zeros(place.shape, dtype=np.float32)
    index[place], value[place] = nearest.indices, nearest.data
    return torch.from_numpy(index), torch.from_numpy(value)
