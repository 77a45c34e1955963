"""What goes together on one trip: how a basket so far changes the wish for what comes next.

The preference model prices each item for a trip as if it were alone. Here the next item of a basket
is a conditional logit (McFadden, 1974) over the whole catalogue with utility theta + w . f, where f
tells how an item goes with those already in the basket: item-to-item weights learnt from baskets
(EASE, Steck, 2019, in low rank), likeness of the item vectors, and how many of the basket are of
its groups (categories, and items of one text); all of them once more times the log of the basket's
size, since small baskets hold variants of one thing and large ones a bit of all. The order within a
basket is not logged: it is drawn.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.nn.functional import cross_entropy

from encoders.state import EMPTY
from simulators.base import Catalog
from simulators.preference import Preference, describe_trips, item_to_item
from simulators.trips import Trips

SAMPLE = 4000  # trips that the weights are learnt on
FEWEST = 200  # trips of two items or more; from fewer nothing is learnt
RANK = 128  # of the item-to-item weights
RIDGE = 100.0
CHUNK = 256  # trips priced at once
DECAY = 1e-4  # weight decay of what is learnt


@dataclass(frozen=True)
class Company:
    """Tables of N items and what they are worth."""

    source: Tensor  # (N, R) item-to-item weight of i on j is source_i . target_j
    target: Tensor  # (N, R)
    vectors: Tensor  # (N, D) of the catalogue
    groups: Tensor  # (N, G) int64
    weight: Tensor  # (2 F,) of the features, and of the features times the log of the basket's size
    level: Tensor  # (N,) added once there is a basket: keeps categories as frequent as they are

    def change(self, basket: Tensor) -> Tensor:
        """What a basket (B, M), EMPTY-padded, adds to the logits (B, N); 0 for an empty one."""
        some = (basket != EMPTY).any(dim=1, keepdim=True)  # (B, 1)
        return torch.where(some, self.features(basket) @ self.weight + self.level, 0.0)

    def features(self, basket: Tensor) -> Tensor:
        """(B, N, 2 F) of every item beside a basket (B, M)."""
        real = basket != EMPTY  # (B, M)
        row = torch.where(real, basket, 0)
        held = real.sum(dim=1).clamp(min=1).float()[:, None, None]  # (B, 1, 1)
        shown = real[:, :, None].float()  # (B, M, 1)
        affinity = (self.source[row] * shown).sum(dim=1) @ self.target.T  # (B, N)
        likeness = (self.vectors[row] * shown).sum(dim=1) @ self.vectors.T  # (B, N)
        counts = []
        for kinds in self.groups.T:  # (N,)
            count = torch.zeros(len(basket), int(kinds.max()) + 1, device=basket.device)
            counts.append(count.scatter_add_(1, kinds[row], real.float())[:, kinds])  # (B, N)
        count = torch.stack(counts, dim=2)  # (B, N, G)
        like = likeness[..., None]
        parts = [affinity[..., None] / held, like, like / held, (count > 0).float(), count.log1p()]
        found = torch.cat(parts, dim=2)  # (B, N, F)
        return torch.cat([found, found * held.log()], dim=2)


def fit_company(
    preference: Preference, catalog: Catalog, trips: Trips, rng: np.random.Generator
) -> Company:
    """Learn from trips: tables from one half, what they are worth on the other."""
    several = np.nonzero(np.diff(trips.pointer) >= 2)[0]
    texts = np.unique(np.array(catalog.texts, dtype=object).astype(str), return_inverse=True)[1]
    groups = torch.cat([preference.groups.cpu(), torch.from_numpy(texts)[:, None]], dim=1)
    n, size = len(catalog), 2 * (3 + 2 * groups.shape[1])
    none = torch.zeros(n, 1)
    blank = Company(none, none, catalog.vectors.cpu(), groups, torch.zeros(size), torch.zeros(n))
    if len(several) < FEWEST:  # nothing goes with anything
        return blank
    order = rng.permutation(len(several))
    tables, worth = several[order[::2]], several[order[1::2]][:SAMPLE]
    source, target = _tables(trips[tables], n)
    half = replace(blank, source=source, target=target)
    weight, level = _learn(half, preference, trips[worth], rng)
    source, target = _tables(trips[several], n)
    return replace(half, source=source, target=target, weight=weight, level=level)


def _tables(trips: Trips, num_items: int) -> tuple[Tensor, Tensor]:
    """Item-to-item weights of baskets x items."""
    ones = np.ones(len(trips.bought), np.float32)
    baskets = csr_matrix((ones, trips.bought, trips.pointer), shape=(len(trips), num_items))
    return item_to_item(baskets, rank=RANK, ridge=RIDGE)


@torch.no_grad()
def _learn(
    company: Company, preference: Preference, trips: Trips, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """The likeliest weights of the features, (2 F,), and levels of the items, (N,)."""
    theta, features, wanted = [], [], []
    for at in range(0, len(trips), CHUNK):
        some = trips[np.arange(at, min(at + CHUNK, len(trips)))]
        basket, following = _cut(some, rng)
        priced = preference.logits(describe_trips(preference, some))  # (B, N)
        theta.append(without(priced, basket))
        features.append(company.features(basket).half())  # (B, N, 2 F): held for all trips at once
        wanted.append(following)
    utility, f, following = torch.cat(theta), torch.cat(features), torch.cat(wanted)
    scale = torch.stack([x.float().std() for x in f.unbind(dim=2)]).clamp_min(1e-3)  # (2 F,)
    kind = company.groups[:, min(1, company.groups.shape[1] - 1)]  # (N,)
    with torch.enable_grad():
        weight = torch.zeros(f.shape[2], requires_grad=True)
        level = torch.zeros(int(kind.max()) + 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, level], max_iter=25, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = torch.zeros(())
            for at in range(0, len(f), CHUNK):  # in pieces: f in float32 would be twice as large
                rows = slice(at, at + CHUNK)
                priced = utility[rows] + f[rows].float() @ (weight / scale) + level[kind]
                part = cross_entropy(priced, following[rows], reduction="sum") / len(f)
                part.backward()
                value = value + part.detach()
            decay = DECAY * (weight.square().sum() + level.square().sum())
            decay.backward()
            return value + decay.detach()

        optimizer.step(loss)
    return (weight / scale).detach(), level.detach()[kind]


def without(theta: Tensor, basket: Tensor) -> Tensor:
    """Logits (B, N) with -inf for what is in the basket (B, M)."""
    wide = torch.nn.functional.pad(theta, (0, 1))  # the last column takes the empty places
    place = torch.where(basket != EMPTY, basket, theta.shape[1])
    return wide.scatter_(1, place, -torch.inf)[:, :-1]


def _cut(trips: Trips, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Of each trip a basket so far (B, M) and the item that came next (B,), in a drawn order."""
    padded = trips.padded()
    size = np.diff(trips.pointer)
    key = np.where(padded == EMPTY, np.inf, rng.random(padded.shape))
    mixed = np.take_along_axis(padded, np.argsort(key, axis=1), axis=1)
    held = 1 + (rng.random(len(size)) * (size - 1)).astype(np.int64)  # 1 to size - 1
    following = mixed[np.arange(len(size)), held]
    so_far = np.where(np.arange(mixed.shape[1]) < held[:, None], mixed, EMPTY)
    return torch.from_numpy(so_far), torch.from_numpy(following)
