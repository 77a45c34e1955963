"""What a visit is for: how the mix of categories goes with how much is bought.

Who comes for one thing buys other things than who fills a trolley (top-up and stock-up shopping:
Kahn and Schmittlein, 1989), and neither the household's habits nor the basket so far tell it at the
first item. A conditional logit (McFadden, 1974) over sampled alternatives gives each category a
level for the first item, one for those after it, and a slope over the log of the basket's size.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from encoders.state import EMPTY
from simulators.company import Company, sampled_alternatives
from simulators.preference import Preference, describe_trips
from simulators.trips import Trips

LINES = 150_000  # purchases that missions are learnt from: of few, their noise shows in the mix
BESIDE = 30  # sampled items beside each: more lines with few beat few lines with more
FEWEST = 1000  # purchases; from fewer nothing is learnt
DECAY = 3e-4  # weight decay: categories hardly seen stay as they are
ROUNDS = 30  # of the optimiser
CHUNK = 512  # purchases priced at once


@dataclass(frozen=True)
class Missions:
    """Added to the logits of N items of C categories."""

    kind: Tensor  # (N,) int64
    worth: Tensor  # (3, C): of a first item, of a later one, and per unit of the centred log size
    middle: float  # log size that the slope is zero at

    def change(self, size: Tensor, nth: int) -> Tensor:
        """(B, N) to the logits of the `nth` item, from 0 on, of baskets that will hold `size`."""
        log = size.float().log()[:, None] - self.middle  # (B, 1)
        return (self.worth[min(nth, 1)] + self.worth[2] * log)[:, self.kind]


def fit_missions(
    preference: Preference, company: Company, trips: Trips, rng: np.random.Generator
) -> Missions:
    """Learn from purchases drawn at random, each beside what its basket held before it."""
    kind = preference.groups.cpu()[:, min(1, preference.groups.shape[1] - 1)]  # (N,)
    size = np.diff(trips.pointer)
    middle = float(np.log(size[size > 0]).mean()) if (size > 0).any() else 0.0
    blank = Missions(kind, torch.zeros(3, int(kind.max()) + 1), middle)
    if len(trips.bought) < FEWEST:
        return blank
    lines = np.sort(rng.permutation(len(trips.bought))[:LINES])
    trip = np.searchsorted(trips.pointer, lines, side="right") - 1  # (m,)
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
    utilities, kinds, later = [], [], []
    with torch.no_grad():
        for at in range(0, len(lines), CHUNK):
            some = trips[trip[at : at + CHUNK]]
            inside = lines[at : at + CHUNK] - trips.pointer[trip[at : at + CHUNK]]
            basket, following = cut_before(some, inside, rng)
            state = describe_trips(preference, some)
            items, log_drawn = sampled_alternatives(preference, state, following, generator, BESIDE)
            utility = preference.logit(state, items).float() - log_drawn  # (B, 1 + S)
            held = (basket != EMPTY).sum(dim=1)  # (B,)
            rows = held.nonzero().squeeze(1)
            if company.learnt and len(rows):
                sums = company.sums(basket[rows], basket[rows] != EMPTY)
                beside = company.beside(sums, basket[rows], held[rows], items[rows])
                utility = utility.index_add(0, rows, beside)
            taken = (items[:, :, None] == basket[:, None, :]).any(dim=2)
            utilities.append(utility.masked_fill(taken, -torch.inf))
            kinds.append(kind[items])
            later.append((held > 0).long())
    log = torch.from_numpy(np.log(size[trip])).float() - middle
    worth = _learn(torch.cat(utilities), torch.cat(kinds), torch.cat(later), log, blank.worth)
    return Missions(kind, worth, middle)


def cut_before(trips: Trips, which: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Baskets (B, M) before the item in place `which` (B,), and it (B,), in a drawn order."""
    padded = trips.padded()
    rows = np.arange(len(padded))
    following = padded[rows, which]
    key = np.where(padded == EMPTY, np.inf, rng.random(padded.shape))
    before = key < key[rows, which][:, None]
    width = max(1, int(before.sum(axis=1).max()))
    order = np.argsort(~before, axis=1, kind="stable")[:, :width]
    basket = np.take_along_axis(np.where(before, padded, EMPTY), order, axis=1)
    return torch.from_numpy(basket), torch.from_numpy(following)


def _learn(utility: Tensor, kind: Tensor, later: Tensor, log: Tensor, start: Tensor) -> Tensor:
    """The likeliest worth (3, C) given utilities and kinds (m, 1 + S) of the chosen and others."""
    worth = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([worth], max_iter=ROUNDS, line_search_fn="strong_wolfe")
    level = kind + later[:, None] * worth.shape[1]  # (m, 1 + S) into the first two rows

    def loss() -> Tensor:
        optimizer.zero_grad()
        change = worth[:2].flatten()[level] + worth[2][kind] * log[:, None]
        value = -(utility + change).log_softmax(dim=1)[:, 0].mean() + DECAY * worth.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return worth.detach()
