"""The best slate under two models of what users take, and what a slate is worth: pure functions.

Gains are relative to nothing being taken. Conditional logit (McFadden, 1974): at most one item is
taken, i of slate A with chance s_i / (1 + sum of s over A), so that a slate is worth a ratio of two
sums, and the best one is found by a few top-k (Dinkelbach, 1967), never by a search. Independent:
item i in slot j is taken with chance attention_j * p_i whatever else is shown, so that a slate is
worth a sum and the best items in the best places are the best slate.
"""

import torch
from torch import Tensor

from agents.explore import break_ties

ROUNDS = 6  # random problems need two, scores from e^-20 to e^20 four


def top_k(scores: Tensor, allowed: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores (B, N) to the K best items (B, K), and whether each is allowed: rows may run short."""
    ranked = break_ties(scores).masked_fill_(~allowed, -torch.inf)  # (B, N)
    best = ranked.topk(min(k, scores.shape[1]), dim=1)
    return best.indices, best.values > -torch.inf


def logit_value(s: Tensor, gain: Tensor, real: Tensor) -> Tensor:
    """Scores, gains and what is really shown, (B, K) each, to the slate's expected gain (B,)."""
    weight = s * real  # (B, K)
    return (weight * gain).sum(dim=1) / (1.0 + weight.sum(dim=1))


def logit_scores(s: Tensor, gain: Tensor, allowed: Tensor, k: int, rounds: int = ROUNDS) -> Tensor:
    """Scores (B, N) whose K best allowed items are the slate of K of the highest `logit_value`.

    They are s (gain - best), `best` the value sought: a slate is worth more than some number
    exactly where its sum of s (gain - number) is above that number, so the top-k at a number
    is better than it, or it is the optimum. The rounds are fixed: to ask whether all rows are done
    would wait for the device. Float64: next to `best` a large s multiplies what rounding left.
    """
    s, gain = s.double(), gain.double()
    best = torch.zeros_like(s[:, :1])  # (B, 1): of showing nothing
    for _ in range(rounds):
        ranked = (s * (gain - best)).masked_fill(~allowed, -torch.inf)  # (B, N)
        slate = ranked.topk(min(k, s.shape[1]), dim=1).indices  # (B, K)
        value = logit_value(s.gather(1, slate), gain.gather(1, slate), allowed.gather(1, slate))
        best = value[:, None]
    return s * (gain - best)


def independent_value(p: Tensor, gain: Tensor, attention: Tensor, real: Tensor) -> Tensor:
    """Chances, gains, what is really shown (B, K), attention of slots (K,), to the gain (B,)."""
    return (attention[: p.shape[1]] * p * gain * real).sum(dim=1)


def independent_scores(p: Tensor, gain: Tensor, allowed: Tensor, attention: Tensor) -> Tensor:
    """Scores (B, N) whose K best allowed items, best first, are the best filling of the slots.

    The items are those of the largest p * gain. Where a slot further down gets more attention
    they trade scores, so that the best item still goes to the best slot.
    """
    scores = p * gain  # (B, N)
    slate, real = top_k(scores, allowed, len(attention))  # (B, K) each
    rank = attention.argsort(descending=True, stable=True).argsort()[: slate.shape[1]]  # (K,)
    traded = scores.scatter(1, slate[:, rank], scores.gather(1, slate))  # (B, N)
    return torch.where(real.all(dim=1, keepdim=True), traded, scores)
