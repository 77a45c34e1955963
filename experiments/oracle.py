"""The myopic oracle, greedy on the truth only a simulator knows: a line in tables, no agent."""

from typing import Any

import torch
from torch import Tensor

from agents.base import Decision, Mask, allowed_items
from encoders.state import EMPTY, Observation
from evaluation.online import Sessions, Watch, sessions


def play_oracle(
    env: Any, users: Tensor, episodes: Tensor, *, watch: Watch | None = None
) -> Sessions:
    """Serve each (user, episode), (M,) each, with the items most likely to be bought right now."""

    def choose(rows: Tensor, obs: Observation, mask: Mask) -> Decision:
        state = {name: x[rows] for name, x in env.state.items()}
        wanted = allowed_relevance(env.simulator.relevance(state), mask)  # (R, N)
        slate = wanted.topk(env.slate_size, dim=1).indices  # (R, K)
        return Decision(slate, torch.ones_like(slate, dtype=torch.float32))

    return sessions(env, choose, users, episodes, watch=watch)


def regret(relevance: Tensor, mask: Mask, slate: Tensor) -> Tensor:
    """How far a slate (B, K) is from the best allowed one, in relevance (B, N) per slot: (B,)."""
    best = allowed_relevance(relevance, mask).topk(slate.shape[1], dim=1).values  # (B, K)
    shown = relevance.gather(1, slate.clamp(min=0)) * (slate != EMPTY)  # (B, K)
    return (best - shown).mean(dim=1)


def allowed_relevance(relevance: Tensor, mask: Mask) -> Tensor:
    """Relevance (B, N), below zero where the mask forbids."""
    b, n = relevance.shape
    allowed = allowed_items(mask, b, n, relevance.device)  # (B, N)
    return relevance.masked_fill(~allowed, -1.0)
