"""The relevance model: theta_ui = M(x_u, x_i), the logit that household u buys item i on this trip.

M sees features and history, never a user id, so that unseen users work: the household's own
purchases of the item (how often, how long ago against the item's usual gap), what else it bought of
the item's groups, how well the item goes with its past (item-to-item weights of EASE, Steck, 2019,
in low rank), and the moment. It knows nothing of the encoder that agents see the shop through.

A small net over these is trained on all trips of a window; the features of a trip come from before
it, the item-to-item weights from before the window, so what is learnt of their worth holds for the
future. Sampled non-purchases carry weights that undo the sampling: the probabilities are per trip
and catalogue item.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, embedding_bag, gelu
from tqdm import tqdm

from encoders.state import EMPTY, calendar
from simulators.trips import Trips

MOMENT = 9  # of the context: weekday and hour; weeks of a year not yet seen cannot be learnt
OWN, PAIR_PER_GROUP, AFFINITY = 6, 2, 2  # widths of the blocks of pair features
LONG_KNOWN = 4.6  # log days: after about 100 a household is known, whatever the date
RECENT = 30.0  # days in which the weight of a purchase falls to 1/e in the recent taste
BATCH = 8192  # pairs in a step of the optimiser
PAST_KEPT, FRESH = 0.3, 48  # share of not bought past items, number of new items, per trip sampled


@dataclass(frozen=True)
class ItemFacts:
    """What the model knows of N items at one moment, all from the log before it."""

    log_rate: Tensor  # (N,) log share of trips that buy it
    gap: Tensor  # (N,) log of the usual days between two purchases by one household
    groups: Tensor  # (N, G) int64: the finest categories
    source: Tensor  # (N, R): item-to-item weight of i on j is source_i . target_j
    target: Tensor  # (N, R)


def item_to_item(counts: csr_matrix, rank: int = 64, ridge: float = 300.0) -> tuple[Tensor, Tensor]:
    """EASE weights (Steck, 2019) of households x items (U, N) in low rank: (N, R) twice."""
    from sklearn.utils.extmath import randomized_svd

    bought = (counts > 0).astype(np.float64)
    gram = (bought.T @ bought).toarray()
    inverse = np.linalg.inv(gram + ridge * np.eye(len(gram)))
    weight = -inverse / np.diag(inverse)
    np.fill_diagonal(weight, 0.0)
    rank = min(rank, len(gram))
    left, scale, right = randomized_svd(weight, rank, n_iter=4, random_state=0)
    return torch.from_numpy(left * scale).float(), torch.from_numpy(right.T.copy()).float()


def blank(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """A layer of zeros: torch's own start would draw from the global generator."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Preference(nn.Module):
    """Logits of buying on this trip: `describe` a household once, then price any items for it."""

    extra = MOMENT + 3  # user features beside the profile
    log_rate: Tensor
    gap: Tensor
    groups: Tensor
    source: Tensor
    target: Tensor
    group_offset: Tensor  # (G,) first column of a group in the state's "groups"
    user_mean: Tensor
    user_scale: Tensor

    def __init__(self, facts: ItemFacts, profile_size: int, hidden: int = 32) -> None:
        super().__init__()
        for name, value in vars(facts).items():
            self.register_buffer(name, value.clone())
        n, g = facts.groups.shape
        sizes = facts.groups.amax(dim=0) + 1  # (G,)
        self.register_buffer("group_offset", sizes.cumsum(0) - sizes)  # (G,)
        self.group_total = int(sizes.sum())
        pair = AFFINITY + OWN + PAIR_PER_GROUP * g
        self.bias = nn.Parameter(torch.zeros(n))
        self.register_buffer("user_mean", torch.zeros(profile_size + self.extra))
        self.register_buffer("user_scale", torch.ones(profile_size + self.extra))
        self.of_user = blank(profile_size + self.extra, hidden)
        self.of_item = blank(2, hidden, bias=False)
        self.of_pair = blank(pair, hidden, bias=False)
        self.middle = blank(hidden, hidden)
        self.out = blank(hidden, 1)

    def describe(
        self, profile: Tensor, past: Tensor, count: Tensor, age: Tensor, time: Tensor
    ) -> dict[str, Tensor]:
        """All the model needs of B households at `time` (B,) days, as (B, ...) tensors."""
        past, order = past.sort(dim=1)  # EMPTY first: slate items are found by bisection
        count, age = count.gather(1, order), age.gather(1, order)  # (B, H)
        g = self.groups.shape[1]
        real = past != EMPTY  # (B, H)
        row = torch.where(real, past, 0)
        often = real.float()
        recent = torch.exp(-age / RECENT) * often  # (B, H)

        def taste(table: Tensor, weight: Tensor) -> Tensor:
            return embedding_bag(row, table, per_sample_weights=weight, mode="sum")  # (B, R)

        groups = torch.zeros(len(past), self.group_total, device=past.device)
        kinds = self.groups[row] + self.group_offset  # (B, H, G)
        groups.scatter_add_(1, kinds.flatten(1), (count * often).repeat_interleave(g, dim=1))
        total = (count * often).sum(dim=1)  # (B,)
        newest = torch.where(real, age, 365.0).amin(dim=1)  # (B,)
        scalars = torch.stack([newest.log1p(), total.log1p(), often.sum(dim=1).log1p()], dim=1)
        steady = profile.clone()
        steady[:, 2].clamp_(max=LONG_KNOWN)  # time goes on beyond the window: no trend to follow
        features = torch.cat([steady, scalars, calendar(time)[:, :MOMENT]], dim=1)
        user = self.of_user((features - self.user_mean) / self.user_scale)  # (B, hidden)
        return {
            "past": past,
            "count": count,
            "age": age,
            "features": features,
            "user": user,
            "often": taste(self.source, often),
            "recent": taste(self.source, recent),
            "groups": groups,  # (B, sum of the groups' sizes)
            # log of the trips so far + 1, log of the days, purchases
            "scalars": torch.stack([profile[:, 1] + profile[:, 2], profile[:, 2], total], dim=1),
        }

    def renew(self, facts: ItemFacts) -> None:
        """Take over what is known of the items at a later moment; what was learnt stays."""
        for name in ("source", "target", "gap"):
            getattr(self, name).copy_(getattr(facts, name))

    def own(self, state: dict[str, Tensor], items: Tensor) -> tuple[Tensor, Tensor]:
        """How often and how many days ago (B, K) the household bought each of `items` (B, K)."""
        past = state["past"]
        place = torch.searchsorted(past, items).clamp_max(past.shape[1] - 1)  # (B, K)
        known = (past.gather(1, place) == items) & (items != EMPTY)
        return state["count"].gather(1, place) * known, state["age"].gather(1, place) * known

    def own_board(self, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`own` of the whole catalogue, (B, N) each."""
        past, n = state["past"], len(self.bias)
        place = torch.where(past == EMPTY, n, past)  # (B, H)
        boards = (
            torch.zeros(len(past), n + 1, device=past.device).scatter_(1, place, state[k])[:, :n]
            for k in ("count", "age")
        )
        count, age = boards
        return count, age

    def same_group(self, state: dict[str, Tensor], items: Tensor) -> Tensor:
        """(B, K, G): purchases of the household in each group that the items (B, K) belong to."""
        kinds = self.groups[items] + self.group_offset  # (B, K, G) columns of state["groups"]
        b, k, g = kinds.shape
        return state["groups"].gather(1, kinds.view(b, k * g)).view(b, k, g)

    def pair_features(
        self,
        items: Tensor,
        count: Tensor,
        age: Tensor,
        affinity: Tensor,
        same: Tensor,
        user: Tensor,
    ) -> Tensor:
        """Features (..., F) of aligned pairs: own count and age (...), `affinity` (..., 2) to what
        was often and what was recently bought, `same` (..., G), and `user` (..., 3) scalars.
        """
        known = (count > 0).float()
        old = age.log1p() * known
        log_trips, log_days, total = user.unbind(-1)
        columns = torch.stack(
            [
                known,
                count.log1p(),
                old,
                (old - self.gap[items]) * known,
                (count + 0.02).log() - log_trips,
                ((age + 1) * count / log_days.exp() + 0.01).log() * known,
            ],
            dim=-1,
        )
        others = (same - count.unsqueeze(-1)).clamp_min(0.0)  # (..., G)
        share = ((others + 0.05) / (total.unsqueeze(-1) + 1)).log()
        return torch.cat([affinity, columns, others.log1p(), share], dim=-1)

    def score(self, user: Tensor, pair: Tensor, items: Tensor) -> Tensor:
        """Logits of aligned rows: user part (..., hidden), pair features (..., F), items (...)."""
        hidden = gelu(user + self.item_part()[items] + self.of_pair(pair))
        change = self.out(gelu(self.middle(hidden))).squeeze(-1)
        return self.log_rate[items] + self.bias[items] + change

    def item_part(self) -> Tensor:
        """What the first layer makes of the items alone, (N, hidden)."""
        return self.of_item(torch.stack([self.log_rate + 5, self.gap - 3], dim=1))  # near zero

    def logit(self, state: dict[str, Tensor], items: Tensor) -> Tensor:
        """theta (B, K) of items (B, K); EMPTY gives -inf."""
        empty = items == EMPTY
        items = torch.where(empty, 0, items)
        target = self.target[items]  # (B, K, R)
        affinity = torch.stack(
            [
                (state["often"][:, None] * target).sum(dim=2),
                (state["recent"][:, None] * target).sum(dim=2),
            ],
            dim=2,
        )
        count, age = self.own(state, items)
        scalars = state["scalars"][:, None].expand(-1, items.shape[1], -1)
        pair = self.pair_features(
            items, count, age, affinity, self.same_group(state, items), scalars
        )
        return self.score(state["user"][:, None], pair, items).masked_fill(empty, -torch.inf)

    def affinities(self, state: dict[str, Tensor]) -> Tensor:
        """(B, N, 2) affinity of each item to the household, as matrix products."""
        return torch.stack(
            [
                state["often"] @ self.target.T,
                state["recent"] @ self.target.T,
            ],
            dim=2,
        )

    def logits(self, state: dict[str, Tensor], rows: int = 16) -> Tensor:
        """theta (B, N) of the whole catalogue, `rows` households at a time."""
        n = len(self.bias)
        parts = []
        for start in range(0, len(state["past"]), rows):
            some = {k: v[start : start + rows] for k, v in state.items()}
            b = len(some["past"])
            items = torch.arange(n, device=self.bias.device).expand(b, -1)
            count, age = self.own_board(some)
            same = self.same_group(some, items)
            scalars = some["scalars"][:, None].expand(-1, n, -1)
            pair = self.pair_features(items, count, age, self.affinities(some), same, scalars)
            # `score` without a copy of the item part for every household
            hidden = self.of_pair(pair).add_(self.item_part()).add_(some["user"][:, None])
            change = self.out(gelu(self.middle(gelu(hidden)))).squeeze(-1)  # (b, N)
            parts.append(change.add_(self.log_rate + self.bias))
        return torch.cat(parts)


def fit_preference(
    trips: Trips,
    weight: np.ndarray,
    before: ItemFacts,
    *,
    epochs: int = 2,
    hidden: int = 32,
    lr: float = 4e-3,
    seed: int = 0,
    progress: str | None = None,
) -> Preference:
    """Learn from the trips of a window, weighted (n,), with item facts from before it."""
    generator = torch.Generator().manual_seed(seed)
    model = Preference(before, trips.profile.shape[1], hidden)
    for layer in (model.of_user, model.of_item, model.of_pair, model.middle, model.out):
        bound = layer.in_features**-0.5 if layer is not model.out else 0.0
        nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    features, *rows = sample_pairs(model, trips, weight, generator)
    order = torch.randperm(len(rows[0]), generator=generator)
    rows = [x[order] for x in rows]  # shuffled once: slices are cheap, random rows are not
    model.user_mean.copy_(features.mean(dim=0))
    model.user_scale.copy_(features.std(dim=0).clamp_min(1e-3))
    features = (features - model.user_mean) / model.user_scale
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    scale = len(order) / float(weight.sum())  # the loss is per trip
    starts = list(range(0, len(order), BATCH)) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=len(starts) + 1, pct_start=0.1
    )
    for start in tqdm(starts, desc=progress, disable=progress is None, unit="batch"):
        pair, trip, items, label, stands = (x[start : start + BATCH] for x in rows)
        theta = model.score(model.of_user(features[trip]), pair, items)
        loss = scale * binary_cross_entropy_with_logits(theta, label, stands)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not torch.isfinite(loss):
        raise ValueError(
            "fitting the preference model gave a loss that is not finite: "
            "look for NaN or extreme values in the users' profile"
        )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def sample_pairs(
    model: Preference, trips: Trips, weight: np.ndarray, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Trips to user features (n, U), and pair features (m, F), trip, item, label, weight (m,).

    Kept are all purchases, a share of the past items not bought, and some of the new ones. A row's
    weight is how many pairs it stands for, so that weighted sums are over the whole catalogue.
    """
    n = len(model.bias)
    chance = torch.tensor([min(1.0, FRESH / n), PAST_KEPT, 1.0])  # of new, past, bought
    chunk = max(1, 1_000_000 // n)
    features, parts = [], []
    for start in range(0, len(trips), chunk):
        some = trips[np.arange(start, min(start + chunk, len(trips)))]
        state = describe_trips(model, some)
        features.append(state["features"])
        count, age = model.own_board(state)  # (B, N) each
        bought = bought_board(some, n)  # (B, N)
        kind = torch.where(bought, 2, (count > 0).long())  # (B, N)
        coin = torch.rand(kind.shape, generator=generator)
        trip, item = (coin < chance[kind]).nonzero(as_tuple=True)  # (m,) each
        same = state["groups"][trip[:, None], model.groups[item] + model.group_offset]  # (m, G)
        affinity = model.affinities(state)[trip, item]  # (m, 2)
        own = count[trip, item], age[trip, item]
        pair = model.pair_features(item, *own, affinity, same, state["scalars"][trip])
        stands = torch.from_numpy(weight[start : start + chunk]).float()[trip]
        stands = stands / chance[kind[trip, item]]
        keep = stands > 0  # a bootstrap sample leaves households out
        row = (pair, trip + start, item, bought[trip, item].float(), stands)
        parts.append([x[keep] for x in row])
    pairs, trip, item, label, stands = (torch.cat(x) for x in zip(*parts, strict=True))
    return torch.cat(features), pairs, trip, item, label, stands


def describe_trips(model: Preference, trips: Trips) -> dict[str, Tensor]:
    """The state of the households of n trips just before them."""
    past = torch.from_numpy(trips.past).long()
    rest = (torch.from_numpy(x) for x in (trips.profile, trips.count, trips.age, trips.time))
    profile, count, age, time = rest
    return model.describe(profile, past, count, age, time)


def bought_board(trips: Trips, n: int) -> Tensor:
    """What n trips bought, as (trips, n) bool."""
    bought = torch.from_numpy(trips.padded())  # (B, M)
    board = torch.zeros(len(trips), n + 1, dtype=torch.bool)
    return board.scatter_(1, torch.where(bought == EMPTY, n, bought), True)[:, :n]
