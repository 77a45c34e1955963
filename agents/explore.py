"""From scores to slates with known propensities: pure functions, one coin per user and slot.

Exactly equal scores are ordered by a fixed pseudo-random number per item, never by id (popular
items tend to have small ids) and never by a fresh draw: `act` and `slate_probs` must agree who is
first.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.base import Decision
from encoders.state import EMPTY

TIE_SEED = 20_240_229  # any constant: the same order in every process and after every reload
BLOCK = 64  # items whose highest score is taken first: one pass instead of a heap of all
CELLS = 6_000_000  # scores held at once: 24 MB, more would be pages anew for every block


def row_blocks(rows: int, num_items: int, cells: int = CELLS) -> Iterator[slice]:
    """Slices of the rows, at least 32 in each, whose scores of all items are about `cells`."""
    step = max(32, cells // num_items)
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def joined(parts: list[Decision]) -> Decision:
    """Decisions about some rows each, as one about all."""
    slate, propensity = zip(*((part.slate, part.propensity) for part in parts), strict=True)
    return Decision(torch.cat(slate), torch.cat(propensity))


@lru_cache(maxsize=8)
def tie_noise(num_items: int, device: torch.device) -> Tensor:
    """A fixed number in [0, 1) for each item (N,), by which equal ones are told apart."""
    generator = torch.Generator().manual_seed(TIE_SEED)
    return torch.rand(num_items, generator=generator, dtype=torch.float64).to(device)


def break_ties(scores: Tensor, noise: Tensor | None = None) -> Tensor:
    """Scores (..., N) to float64 (..., N) in the same order, equal ones told apart by item.

    `noise` is that of the items where the scores are not those of all.
    """
    if noise is None:
        noise = tie_noise(scores.shape[-1], scores.device)
    # float32 neighbours are 6e-8 apart, relatively: 1e-9 never swaps them, 1e-30 parts the zeros.
    return scores.to(torch.float64, copy=True).mul_(1.0 + 1e-9 * noise).add_(1e-30 * noise)


def seeded_ranks(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Scores (N,) to ranks (N,) float32, 0 the lowest, equal scores in an order drawn once."""
    order = torch.randperm(len(scores), generator=generator, device=scores.device)  # (N,)
    order = order[scores[order].argsort(stable=True)]
    ranks = torch.empty(len(scores), device=scores.device)
    ranks[order] = torch.arange(len(scores), device=scores.device, dtype=ranks.dtype)
    return ranks


def epsilon_greedy_slate(
    scores: Tensor, allowed: Tensor, k: int, epsilon: float, generator: torch.Generator
) -> Decision:
    """Scores and allowed (B, N) to slates (B, K): per slot the best left, or with epsilon any."""
    value, greedy = _best(scores, allowed, k)  # (B, K) each
    _need(value, k, scores)
    if epsilon <= 0.0:
        return Decision(greedy, torch.ones(greedy.shape, device=scores.device))
    coins = torch.rand(greedy.shape, generator=generator, device=scores.device) < epsilon  # (B, K)
    # The head of one random order of the items: the first of it not yet shown is uniform among
    # those left, whatever the greedy slots above took. Rows that do not explore need none.
    uniform = greedy.clone()  # (B, K)
    rows = coins.any(dim=1).nonzero().squeeze(1)  # (R,)
    noise = torch.rand(len(rows), scores.shape[1], generator=generator, device=scores.device)
    uniform[rows] = noise.masked_fill_(~allowed[rows], -1.0).topk(k, dim=1).indices
    left = allowed.sum(dim=1)  # (B,)
    slate, propensity = torch.empty_like(greedy), torch.empty(greedy.shape, device=scores.device)
    free_greedy, free_uniform = (
        torch.ones_like(coins),
        torch.ones_like(coins),
    )  # (B, K) not yet shown
    for slot in range(k):
        best = _first(greedy, free_greedy)  # (B,)
        item = torch.where(coins[:, slot], _first(uniform, free_uniform), best)  # (B,)
        slate[:, slot] = item
        propensity[:, slot] = epsilon / (left - slot) + (1.0 - epsilon) * (item == best)
        free_greedy &= greedy != item[:, None]
        free_uniform &= uniform != item[:, None]
    return Decision(slate, propensity)


def epsilon_greedy_slate_probs(
    scores: Tensor, allowed: Tensor, slate: Tensor, epsilon: float
) -> Tensor:
    """Probability (B, K) of each item given those above; 0 for EMPTY, repeats and forbidden."""
    k = slate.shape[1]
    value, greedy = _best(scores, allowed, k)  # (B, K) each, or all there are
    _need(value[:, :1], 1, scores)
    possible = _possible(allowed, slate)  # (B, K)
    left = allowed.sum(dim=1)  # (B,)
    probs = torch.zeros(slate.shape, device=scores.device)
    free = torch.ones(greedy.shape, dtype=torch.bool, device=scores.device)  # not yet shown
    for slot in range(k):
        item = slate[:, slot]
        chance = epsilon / left.clamp(min=1) + (1.0 - epsilon) * (item == _first(greedy, free))
        probs[:, slot] = torch.where(possible[:, slot], chance, 0.0)
        left = left - possible[:, slot].long()
        free &= greedy != item[:, None]
    return probs


def epsilon_greedy_probs(scores: Tensor, allowed: Tensor, epsilon: float) -> Tensor:
    """Probability (B, N) of each item for the first slot."""
    probs = epsilon * allowed / allowed.sum(dim=1, keepdim=True)  # (B, N)
    value, best = _best(scores, allowed, 1)  # (B, 1) each
    _need(value, 1, scores)
    return probs.scatter_add(1, best, torch.full(best.shape, 1.0 - epsilon, device=probs.device))


def standardised(scores: Tensor, allowed: Tensor) -> Tensor:
    """Scores (B, N) in standard deviations of the row's allowed ones: temperature gets a unit."""
    count = allowed.sum(dim=1, keepdim=True)  # (B, 1)
    exact = scores.double()
    mean = (exact * allowed).sum(dim=1, keepdim=True) / count
    centred = (exact - mean) * allowed  # (B, N)
    spread = (centred.square().sum(dim=1, keepdim=True) / count).sqrt()
    return centred / spread.clamp(min=1e-12)  # equal scores stay equal: all zero


def softmax_uniform(scores: Tensor, allowed: Tensor, temperature: float, uniform: float) -> Tensor:
    """Softmax over allowed scores (B, N) with a share spread evenly, to probabilities (B, N)."""
    logits = (scores.double() / temperature).masked_fill(~allowed, -torch.inf)  # (B, N)
    even = allowed / allowed.sum(dim=1, keepdim=True)  # (B, N)
    return (1.0 - uniform) * logits.softmax(dim=1) + uniform * even


def sample_slate(probs: Tensor, k: int, generator: torch.Generator) -> Decision:
    """Draw K of (B, N) one after another without replacement (Plackett, 1975; Luce, 1959)."""
    exact = probs.double()  # tails matter: a logged propensity becomes 1 / p
    wait = torch.rand(probs.shape, generator=generator, dtype=torch.float64, device=probs.device)
    wait = (
        wait.clamp_(min=1e-300).log_().neg_()
    )  # (B, N) exponential: who rings first is shown first
    rings = (exact / wait).masked_fill_(exact <= 0.0, -torch.inf)  # (B, N)
    first = rings.topk(min(k, probs.shape[1]), dim=1)
    _need(first.values, k, probs)
    return Decision(first.indices, plackett_luce_probs(exact, first.indices))


def plackett_luce_probs(probs: Tensor, slate: Tensor) -> Tensor:
    """Probability (B, K) of each item given those above; 0 for EMPTY, repeats and impossible."""
    exact = F.pad(probs.double(), (0, 1))  # (B, N + 1): EMPTY is the last, worth nothing
    index = torch.where(slate == EMPTY, probs.shape[1], slate)  # (B, K)
    shown = exact.gather(1, index) * _possible(probs > 0, slate)  # (B, K)
    rest = exact.scatter(1, index, 0.0).sum(dim=1, keepdim=True)  # (B, 1) never shown
    below = shown.flip(1).cumsum(dim=1).flip(1)  # (B, K) shown from here on
    remaining = rest + below  # sums of positives: no cancellation
    return torch.where(shown > 0, shown / remaining, 0.0).float()


def _best(scores: Tensor, allowed: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and items (B, K) of the K best allowed, best first; -inf where no more are allowed.

    Only rows in which the last place is disputed are looked at in float64: elsewhere the K highest
    are the same, and only these have to be put in order.
    """
    n = scores.shape[1]
    k = min(k, n)
    if scores.dtype != torch.float32 or k == n:
        return _best_exact(scores, allowed, k)
    given = scores if bool(allowed.all()) else torch.where(allowed, scores, -torch.inf)  # (B, N)
    value, item = highest(given, k + 1)  # (B, K + 1) each
    disputed = (value[:, k - 1] == value[:, k]) | value[:, 0].isnan()  # to topk nan is the most
    item = item[:, :k]
    exact = break_ties(value[:, :k], tie_noise(n, scores.device)[item])  # (B, K)
    exact, order = exact.sort(dim=1, descending=True, stable=True)
    item = item.gather(1, order)
    rows = disputed.nonzero().squeeze(1)  # (R,)
    if len(rows):
        for part in row_blocks(len(rows), n):  # in float64, a few at a time
            some = rows[part]
            exact[some], item[some] = _best_exact(scores[some], allowed[some], k)
    return exact, item


def _best_exact(scores: Tensor, allowed: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same with every score in float64."""
    ranked = break_ties(scores).masked_fill_(~allowed, -torch.inf)  # (B, N)
    first = ranked.topk(k, dim=1)
    return first.values, first.indices


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


def _first(items: Tensor, free: Tensor) -> Tensor:
    """The first of `items` (B, K) that is still `free` (B, K), as (B,)."""
    return items.gather(1, free.int().argmax(dim=1, keepdim=True)).squeeze(1)


def _possible(allowed: Tensor, slate: Tensor) -> Tensor:
    """Whether each slot (B, K) holds a real item that is allowed (B, N) and not shown above."""
    if ((slate < EMPTY) | (slate >= allowed.shape[1])).any():
        raise ValueError(
            f"slate must hold items in 0..{allowed.shape[1] - 1} or {EMPTY} for an empty slot, "
            f"got {int(slate.min())}..{int(slate.max())}"
        )
    possible = (slate != EMPTY) & allowed.gather(1, slate.clamp(min=0))  # (B, K)
    repeat = torch.ones(2 * [slate.shape[1]], dtype=torch.bool, device=slate.device).tril(-1)
    return possible & ~((slate[:, :, None] == slate[:, None, :]) & repeat).any(dim=2)


def _need(best: Tensor, k: int, values: Tensor) -> None:
    """Refuse rows whose `best` values (B, K) are not K finite ones, saying why."""
    fine = best.isfinite().sum(dim=1)  # (B,)
    if best.shape[1] == k and (fine == k).all():
        return
    row = int(fine.argmin())
    if (values[row].isnan() | values[row].isposinf()).any():
        raise ValueError(
            f"scores and probabilities must be finite, row {row} is not: look at the loss"
        )
    raise ValueError(
        f"a slate of {k} needs {k} allowed items, row {row} has {int(fine[row])}: "
        "shrink the slate, end the episode earlier or mask fewer items"
    )


def softmax_slate(
    scores: Tensor, allowed: Tensor, k: int, temperature: float, generator: torch.Generator
) -> Decision:
    """Slates (B, K) by the softmax of scores (B, N); temperature 0 shows the best."""
    if temperature:
        return sample_slate(softmax_uniform(scores, allowed, temperature, 0.0), k, generator)
    return epsilon_greedy_slate(scores, allowed, k, 0.0, generator)


def softmax_slate_probs(
    scores: Tensor, allowed: Tensor, slate: Tensor, temperature: float
) -> Tensor:
    """Probability (B, K) of each item of what `softmax_slate` draws, given those above."""
    if temperature:
        return plackett_luce_probs(softmax_uniform(scores, allowed, temperature, 0.0), slate)
    return epsilon_greedy_slate_probs(scores, allowed, slate, 0.0)


def softmax_probs(scores: Tensor, allowed: Tensor, temperature: float) -> Tensor:
    """Probability (B, N) of each item for the first slot of `softmax_slate`."""
    if temperature:
        return softmax_uniform(scores, allowed, temperature, 0.0).float()
    return epsilon_greedy_probs(scores, allowed, 0.0)
