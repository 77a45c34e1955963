"""What goes together on one trip: how a basket so far changes the wish for what comes next.

The preference model prices each item for a trip as if it were alone. Here the next item of a basket
is a conditional logit (McFadden, 1974) over the whole catalogue with utility theta + w . f, where f
tells how an item goes with those already in the basket: item-to-item weights learnt from baskets
(EASE, Steck, 2019, in low rank), likeness of the item vectors, and how many of the basket are of
its groups (categories, and items of one text); all of them once more times the log of the basket's
size, since small baskets hold variants of one thing and large ones a bit of all. The order within a
basket is not logged: it is drawn.

The weights are learnt on sampled alternatives, which leaves them consistent (McFadden, 1978). Which
of many wishes comes next says nothing of how many there are: a basket of usual kind is taken to
leave as much wished for as an empty one, and who has bought stops by habits.py.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.nn.functional import embedding, embedding_bag

from encoders.state import EMPTY
from simulators.base import Catalog
from simulators.preference import Preference, describe_trips
from simulators.trips import Trips

SAMPLE = 4000  # purchases that the weights are learnt on
FEWEST = 200  # trips of two items or more; from fewer nothing is learnt
RANK = 128  # of the item-to-item weights
RIDGE = 100.0
POWER, SPARE = 3, 10  # rounds and columns more than RANK in which its subspace is found
ALTERNATIVES = 200  # sampled items beside the one that came next, half of them of the own past
CHUNK = 256  # trips priced at once
DECAY = 1e-4  # weight decay of what is learnt
ROUNDS = 25  # of the optimiser


@dataclass(frozen=True)
class Company:
    """Tables of N items and what they are worth."""

    source: Tensor  # (N, R) item-to-item weight of i on j is source_i . target_j
    target: Tensor  # (N, R)
    vectors: Tensor  # (N, D) of the catalogue
    groups: Tensor  # (N, G) int64
    weight: Tensor  # (2 F,) of the features, and of the features times the log of the basket's size
    level: Tensor  # (N,) added once there is a basket: keeps categories as frequent as they are
    usual: Tensor  # (2,) what all of this adds to the wishes as a whole: constant, per log size

    def to(self, device: str) -> "Company":
        return Company(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @property
    def learnt(self) -> bool:
        """Whether there were baskets enough to learn from."""
        return bool((self.weight != 0).any())

    def sums(self, items: Tensor, taken: Tensor) -> Tensor:
        """What items (B, K), where `taken` (B, K), add to the running sums (B, R + D)."""
        rows, weight = torch.where(taken, items, 0), taken.float()
        tables = (self.source, self.vectors)
        parts = [embedding_bag(rows, t, per_sample_weights=weight, mode="sum") for t in tables]
        return torch.cat(parts, dim=1)

    def change(self, basket: Tensor) -> Tensor:
        """What a basket (B, M), EMPTY-padded, adds to the logits (B, N); 0 for an empty one."""
        real = basket != EMPTY  # (B, M)
        row = torch.where(real, basket, 0)
        worth, asked = self._asked(self.sums(row, real), real.sum(dim=1))
        r = self.source.shape[1]
        change = torch.addmm(self.level, asked[:, :r], self.target.T)  # (B, N)
        change.addmm_(asked[:, r:], self.vectors.T)
        for g, kinds in enumerate(self.groups.T):  # (N,)
            count = torch.zeros(len(basket), int(kinds.max()) + 1, device=basket.device)
            count = count.scatter_add_(1, kinds[row], real.float())  # (B, kinds)
            change += self._counted(count, worth, g)[:, kinds]
        change -= self._usual(real.sum(dim=1))
        return torch.where(real.any(dim=1, keepdim=True), change, 0.0)

    def beside(self, sums: Tensor, basket: Tensor, held: Tensor, items: Tensor) -> Tensor:
        """`change` of items (B, K) only, given the sums (B, R + D) over `held` (B,) > 0 items."""
        worth, asked = self._asked(sums, held)
        r = self.source.shape[1]
        change = self.level[items]  # (B, K)
        change += torch.bmm(embedding(items, self.target), asked[:, :r, None]).squeeze(2)
        change += torch.bmm(embedding(items, self.vectors), asked[:, r:, None]).squeeze(2)
        for g, count in enumerate(self._counts(basket, items)):
            change += self._counted(count, worth, g)
        return change - self._usual(held)

    def features(self, basket: Tensor, items: Tensor) -> Tensor:
        """(B, S, 2 F) of items (B, S) beside a basket (B, M) that is not empty."""
        real = basket != EMPTY  # (B, M)
        held = real.sum(dim=1).float()[:, None, None]  # (B, 1, 1)
        sums, r = self.sums(basket, real)[:, :, None], self.source.shape[1]  # (B, R + D, 1)
        affinity = torch.bmm(embedding(items, self.target), sums[:, :r])  # (B, S, 1)
        like = torch.bmm(embedding(items, self.vectors), sums[:, r:])  # (B, S, 1)
        count = torch.stack(self._counts(basket, items), dim=2)  # (B, S, G)
        parts = [affinity / held, like, like / held, (count > 0).float(), count.log1p()]
        found = torch.cat(parts, dim=2)  # (B, S, F)
        return torch.cat([found, found * held.log()], dim=2)

    def _counts(self, basket: Tensor, items: Tensor) -> list[Tensor]:
        """How many of a basket (B, M) are of each group of items (B, K), G times (B, K)."""
        real, row = basket != EMPTY, basket.clamp_min(0)
        counts = []
        for kinds in self.groups.T:  # (N,)
            theirs = torch.where(real, kinds[row], EMPTY)  # (B, M)
            counts.append((kinds[items][:, :, None] == theirs[:, None, :]).sum(dim=2).float())
        return counts

    def _asked(self, sums: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (B, F) at this size, and what tables are multiplied with, (B, R + D)."""
        held = held.clamp_min(1).float()[:, None]  # (B, 1)
        plain, by_log = self.weight.view(2, -1)
        worth = plain + by_log * held.log()  # (B, F)
        r = self.source.shape[1]
        affinity, like = worth[:, :1] / held, worth[:, 1:2] + worth[:, 2:3] / held  # (B, 1)
        return worth, torch.cat([sums[:, :r] * affinity, sums[:, r:] * like], dim=1)

    def _counted(self, count: Tensor, worth: Tensor, g: int) -> Tensor:
        """What counts (B, n) of the g-th group are worth."""
        some, log = worth[:, 3 + g], worth[:, 3 + self.groups.shape[1] + g]  # (B,) each
        return (count > 0) * some[:, None] + count.log1p() * log[:, None]

    def _usual(self, held: Tensor) -> Tensor:
        return (self.usual[0] + self.usual[1] * held.clamp_min(1).float().log())[:, None]  # (B, 1)


def fit_company(
    preference: Preference,
    catalog: Catalog,
    trips: Trips,
    rng: np.random.Generator,
    weight: np.ndarray | None = None,
) -> Company:
    """Learn from trips, counted `weight` (n,) times: tables from one half, worth on the other."""
    several = np.nonzero(np.diff(trips.pointer) >= 2)[0]
    texts = np.unique(np.array(catalog.texts, dtype=object).astype(str), return_inverse=True)[1]
    groups = torch.cat([preference.groups.cpu(), torch.from_numpy(texts)[:, None]], dim=1)
    n, size = len(catalog), 2 * (3 + 2 * groups.shape[1])
    none, vectors = torch.zeros(n, 1), catalog.vectors.cpu()
    blank = Company(none, none, vectors, groups, torch.zeros(size), torch.zeros(n), torch.zeros(2))
    if len(several) < FEWEST:  # nothing goes with anything
        return blank
    times = np.ones(len(trips)) if weight is None else weight
    order = rng.permutation(len(several))
    tables, worth = (
        np.repeat(x, times[x].astype(int)) for x in (several[order[::2]], several[order[1::2]])
    )
    source, target = _tables(trips[tables], n, rng)
    half = replace(blank, source=source, target=target)
    # by their purchases: else large baskets, where most is bought, would hardly be seen
    after = np.diff(trips.pointer)[worth] - 1.0
    some = rng.choice(worth, min(SAMPLE, len(worth)), p=after / after.sum())
    learnt = _learn(half, preference, trips[some], rng)
    source, target = _tables(trips[np.concatenate([tables, worth])], n, rng)
    return replace(half, source=source, target=target, **learnt)


def _tables(trips: Trips, num_items: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Item-to-item weights of baskets x items, (N, R) twice."""
    ones = np.ones(len(trips.bought), np.float32)
    baskets = csr_matrix((ones, trips.bought, trips.pointer), shape=(len(trips), num_items))
    gram = torch.from_numpy((baskets.T @ baskets).toarray())  # (N, N)
    gram.diagonal().add_(RIDGE)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    weight = -inverse / inverse.diagonal()
    weight.fill_diagonal_(0.0)
    rank = min(RANK, num_items)
    some = rng.standard_normal((num_items, min(rank + SPARE, num_items)), np.float32)
    span = torch.linalg.qr(weight @ torch.from_numpy(some)).Q  # (N, R + SPARE)
    for _ in range(POWER):
        span = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ span).Q).Q
    left, scale, right = torch.linalg.svd(span.T @ weight, full_matrices=False)
    return span @ left[:, :rank] * scale[:rank], right[:rank].T.contiguous()


@torch.no_grad()
def _learn(
    company: Company, preference: Preference, trips: Trips, rng: np.random.Generator
) -> dict[str, Tensor]:
    """The likeliest weights of the features, levels of the items, and the usual sum of both."""
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
    utilities, found, sampled, sizes = [], [], [], []
    for at in range(0, len(trips), CHUNK):
        some = trips[np.arange(at, min(at + CHUNK, len(trips)))]
        basket, following = _cut(some, rng)
        state = describe_trips(preference, some)
        items, log_drawn = sampled_alternatives(
            preference, state, following, generator
        )  # (B, 1 + S)
        inside = (items[:, :, None] == basket[:, None, :]).any(dim=2)  # (B, 1 + S)
        utility = preference.logit(state, items).float() - log_drawn
        utilities.append(utility.masked_fill(inside, -torch.inf))
        found.append(company.features(basket, items))
        sampled.append(items)
        sizes.append((basket != EMPTY).sum(dim=1))
    utility, f, items = torch.cat(utilities), torch.cat(found), torch.cat(sampled)
    scale = f.flatten(0, 1).std(dim=0).clamp_min(1e-3)  # (2 F,)
    f /= scale
    groups = company.groups[:, min(1, company.groups.shape[1] - 1)]  # (N,)
    kind = groups[items]  # (B, 1 + S)
    with torch.enable_grad():
        weight = torch.zeros(f.shape[2], requires_grad=True)
        level = torch.zeros(int(groups.max()) + 1, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, level], max_iter=ROUNDS, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = -(utility + f @ weight + level[kind]).log_softmax(dim=1)[:, 0].mean()
            value = value + DECAY * (weight.square().sum() + level.square().sum())
            value.backward()
            return value

        optimizer.step(loss)
    weight, level = weight.detach(), level.detach()
    changed = utility + f @ weight + level[kind]  # of the sampled only: what came next is no sample
    more = changed[:, 1:].logsumexp(dim=1) - utility[:, 1:].logsumexp(dim=1)  # (B,)
    more, size = more.nan_to_num(0.0), torch.cat(sizes).float().log()  # NaN: all are in the basket
    known = torch.stack([torch.ones_like(size), size], dim=1)  # (B, 2)
    ridge = 1e-3 * torch.eye(2)  # baskets may be of one size
    usual = torch.linalg.solve(known.T @ known + ridge, known.T @ more)
    return {"weight": weight / scale, "level": level[groups], "usual": usual}


def sampled_alternatives(
    preference: Preference,
    state: dict[str, Tensor],
    following: Tensor,
    generator: torch.Generator,
    count: int = ALTERNATIVES,
) -> tuple[Tensor, Tensor]:
    """What came next and a sample, items (B, 1 + S); log of how often each is drawn on average.

    Half come by their rate among all, half are of the household's past: the likeliest by far.
    """
    half, b = count // 2, len(following)
    rate = preference.log_rate.softmax(dim=0)  # (N,)
    any_item = torch.multinomial(rate, 2 * half * b, replacement=True, generator=generator)
    fame, instead = any_item.view(2, b, half)
    past = state["past"]  # (B, H)
    real = (past != EMPTY).float()
    size = real.sum(dim=1, keepdim=True)  # (B, 1)
    drawn = torch.multinomial(
        torch.where(size > 0, real, 1.0), half, replacement=True, generator=generator
    )
    own = torch.where(size > 0, past.gather(1, drawn), instead)  # newcomers have no past
    items = torch.cat([following[:, None], fame, own], dim=1)
    place = torch.searchsorted(past, items).clamp_max(past.shape[1] - 1)  # `describe` sorts it
    known = past.gather(1, place) == items  # (B, 1 + S)
    often = rate[items] + torch.where(size > 0, known / size.clamp_min(1), rate[items])
    return items, (half * often).log()


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
