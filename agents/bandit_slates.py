"""Slates of bandits with exact propensities: uniform over ties, and mixtures of a few policies.

A posterior sample makes a policy: show the best items as if the sample were true. Thompson
sampling with `samples` draws that stay as they are between two updates is a uniform mixture of
that many policies, so the probability of a slate can be counted: it is exact for the policy that
is played. As an estimate of the probability p under endless draws it has the standard error
sqrt(p (1 - p) / samples).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from agents.base import Decision

TIE = 1e-6  # scores this near, relative to the best, are equal: rounding must not choose an item
BLOCK = 1 << 23  # most scores (samples x B x N) that are held at once

Sampled = Callable[[int, int], Tensor]  # first and last sample to their scores (B, m, N)


def tied_slate(
    scores: Tensor, allowed: Tensor, k: int, epsilon: float, generator: torch.Generator
) -> Decision:
    """Scores and allowed (B, N) to slates (B, K): per slot any of the best, or with epsilon any."""
    free = allowed.clone()  # (B, N) not yet shown
    slate = torch.empty(len(scores), k, dtype=torch.int64, device=scores.device)
    propensity = torch.empty(len(scores), k, device=scores.device)
    _need(allowed, k)
    coins = torch.rand(len(scores), k, generator=generator, device=scores.device) < epsilon
    for slot in range(k):
        best = _best(scores, free)  # (B, N)
        # a coin that shows heads draws from all that is free, the others from the best
        pool = torch.where(coins[:, slot, None], free, best) if epsilon > 0.0 else best
        item = _any(pool, generator)  # (B,)
        slate[:, slot] = item
        propensity[:, slot] = _chance(item, best, free, epsilon)
        free[torch.arange(len(item), device=item.device), item] = False
    return Decision(slate, propensity)


def tied_slate_probs(scores: Tensor, allowed: Tensor, slate: Tensor, epsilon: float) -> Tensor:
    """Probability (B, K) of each item given those above; 0 for EMPTY, repeats and forbidden."""
    free, probs = allowed.clone(), torch.zeros(slate.shape, device=scores.device)
    rows = torch.arange(len(slate), device=slate.device)
    for slot in range(slate.shape[1]):
        item = slate[:, slot].clamp(min=0)  # (B,)
        real = (slate[:, slot] >= 0) & free[rows, item]
        chance = _chance(item, _best(scores, free), free, epsilon)
        probs[:, slot] = torch.where(real, chance, 0.0)
        free[rows, item] &= ~real
    return probs


def tied_probs(scores: Tensor, allowed: Tensor, epsilon: float) -> Tensor:
    """Probability (B, N) of each item for the first slot."""
    best = _best(scores, allowed)  # (B, N)
    even = allowed / allowed.sum(dim=1, keepdim=True)
    return epsilon * even + (1.0 - epsilon) * best / best.sum(dim=1, keepdim=True)


def mixture_slates(sampled: Sampled, samples: int, allowed: Tensor, k: int) -> Tensor:
    """Best slates (B, M, K) of each of M samples, in blocks of samples."""
    _need(allowed, k)
    step = max(1, BLOCK // max(1, allowed.numel()))
    forbidden = ~allowed[:, None, :]  # (B, 1, N)
    parts = []
    for first in range(0, samples, step):
        scores = sampled(first, min(first + step, samples)).masked_fill_(forbidden, -torch.inf)
        best = scores.argmax(dim=2, keepdim=True) if k == 1 else scores.topk(k, dim=2).indices
        _need_finite(scores.gather(2, best).isfinite().all(dim=2).all(dim=1))  # nan is the highest
        parts.append(best)
    return torch.cat(parts, dim=1)


def mixture_slate(slates: Tensor, generator: torch.Generator) -> Decision:
    """Slates (B, M, K) to one of them for each user, drawn evenly."""
    users, samples, k = slates.shape
    pick = torch.randint(samples, (users, 1, 1), generator=generator, device=slates.device)
    slate = slates.gather(1, pick.expand(-1, -1, k)).squeeze(1)  # (B, K)
    return Decision(slate, mixture_slate_probs(slates, slate))


def mixture_slate_probs(slates: Tensor, slate: Tensor) -> Tensor:
    """Probability (B, K) of each item of `slate` (B, K) given those above, of M slates (B, M, K).

    What no sample would show above makes all below impossible: 0.
    """
    agree = (slates == slate[:, None, :]).cumprod(dim=2).sum(dim=1).float()  # (B, K)
    above = torch.cat([torch.full_like(agree[:, :1], slates.shape[1]), agree[:, :-1]], dim=1)
    return agree / above.clamp(min=1.0)


def mixture_probs(slates: Tensor, num_items: int) -> Tensor:
    """Probability (B, N) of each item for the first slot."""
    first = slates[:, :, 0]  # (B, M)
    even = torch.full(first.shape, 1.0 / first.shape[1], device=slates.device)
    return torch.zeros(len(first), num_items, device=slates.device).scatter_add_(1, first, even)


def seeded(seed: int, version: int, device: torch.device | str) -> torch.Generator:
    """A generator that is a function of a seed and of how often something was updated."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + version) % 2**63)


def _best(scores: Tensor, free: Tensor) -> Tensor:
    """Which of the free items (B, N) score best, up to rounding; none where none is free."""
    value = scores.masked_fill(~free, -torch.inf)  # (B, N)
    top = value.amax(dim=1, keepdim=True)  # (B, 1)
    _need_finite(~(top.isnan() | top.isposinf()).squeeze(1))
    return (value >= top - TIE * top.abs()) & free


def _chance(item: Tensor, best: Tensor, free: Tensor, epsilon: float) -> Tensor:
    """Probability (B,) of showing `item` (B,)."""
    greedy = best.gather(1, item[:, None]).squeeze(1) / best.sum(dim=1).clamp(min=1)
    if epsilon <= 0.0:
        return greedy
    return epsilon / free.sum(dim=1).clamp(min=1) + (1.0 - epsilon) * greedy


def _any(pool: Tensor, generator: torch.Generator) -> Tensor:
    """One item (B,) of each row's pool (B, N), drawn evenly."""
    item = pool.int().argmax(dim=1)  # (B,) all there is where the pool is of one
    rows = (pool.sum(dim=1) > 1).nonzero().squeeze(1)  # (R,)
    if len(rows):
        noise = torch.rand(len(rows), pool.shape[1], generator=generator, device=pool.device)
        item[rows] = noise.masked_fill_(~pool[rows], -1.0).argmax(dim=1)
    return item


def _need_finite(fine: Tensor) -> None:
    """Refuse rows (B,) whose scores are no numbers: nothing is the best of them."""
    if not fine.all():
        row = int((~fine).nonzero()[0])
        raise ValueError(f"scores must be finite, row {row} is not: look at the observation")


def _need(allowed: Tensor, k: int) -> None:
    """Refuse rows that allow fewer than K items."""
    left = allowed.sum(dim=1)  # (B,)
    if (left >= k).all():
        return
    row = int(left.argmin())
    raise ValueError(
        f"a slate of {k} needs {k} allowed items, row {row} has {int(left[row])}: "
        "shrink the slate, end the episode earlier or mask fewer items"
    )
