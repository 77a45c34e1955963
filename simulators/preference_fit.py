"""Learn the relevance model of preference.py from the trips of a window."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from simulators.preference import ItemFacts, Preference, bought_board, describe_trips
from simulators.trips import Trips

NEVER = 1e30  # the spread of what does not vary
BATCH, STEPS = 8192, 20  # pairs in a step of the optimiser at most, steps in an epoch at least
PAST_KEPT, FRESH = 0.3, 48  # share of not bought past items, number of new items, per trip sampled


def fit_preference(
    trips: Trips,
    weight: np.ndarray,
    before: ItemFacts,
    *,
    epochs: int = 4,
    hidden: int = 32,
    members: int = 5,
    lr: float = 4e-3,
    seed: int = 0,
    progress: str | None = None,
) -> Preference:
    """Learn from the trips of a window, weighted (n,), with item facts from before it."""
    generator = torch.Generator().manual_seed(seed)
    model = Preference(before, trips.profile.shape[1], hidden, members)
    for layer in (model.of_user, model.of_item, model.of_pair, model.middle, model.out):
        bound = layer.in_features**-0.5 if layer is not model.out else 0.0
        nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    features, *rows = sample_pairs(model, trips, weight, generator)
    order = torch.randperm(len(rows[0]), generator=generator)
    rows = [x[order] for x in rows]  # shuffled once: slices are cheap, random rows are not
    model.user_mean.copy_(features.mean(dim=0))
    spread = features.std(dim=0)
    model.user_scale.copy_(torch.where(spread > 1e-3, spread, NEVER))
    features = model.standard(features)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    scale = len(order) / float(weight.sum())  # the loss is per trip
    times = resampled(trips.user, members, np.random.default_rng(seed))  # (n, M)
    batch = min(BATCH, max(64, len(order) // STEPS))  # small logs too need their steps
    starts = list(range(0, len(order), batch)) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=len(starts) + 1, pct_start=0.1
    )
    for start in tqdm(starts, desc=progress, disable=progress is None, unit="batch"):
        pair, trip, items, label, stands = (x[start : start + batch] for x in rows)
        theta = model.score(model.of_user(features[trip]), pair, items)  # (m, M)
        heavy = stands[:, None] * times[trip]  # (m, M)
        bought = label[:, None].expand_as(theta)
        loss = scale * binary_cross_entropy_with_logits(theta, bought, heavy)
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


def resampled(user: np.ndarray, members: int, rng: np.random.Generator) -> Tensor:
    """How often each member sees the trips (n,) of users, (n, M): bootstrap samples of users."""
    who = np.unique(user, return_inverse=True)[1]
    if members == 1:  # one opinion is that of the whole log
        return torch.ones(len(user), 1)
    count = who.max() + 1
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=members)  # (M, households)
    return torch.from_numpy(drawn.T[who]).float()


@torch.no_grad()
def sample_pairs(
    model: Preference, trips: Trips, weight: np.ndarray, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Trips to user features (n, U), and pair features (m, F), trip, item, label, weight (m,).

    Kept are all purchases, a share of the past items not bought, and some of the new ones. A row's
    weight is how many pairs it stands for, so that weighted sums are over the whole catalogue.
    """
    n = len(model.log_rate)
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
        affinity = model.affinities(state)[trip, item]  # (m, 3)
        own = count[trip, item], age[trip, item]
        pair = model.pair_features(item, *own, affinity, same, state["scalars"][trip])
        stands = torch.from_numpy(weight[start : start + chunk]).float()[trip]
        stands = stands / chance[kind[trip, item]]
        keep = stands > 0  # a bootstrap sample leaves households out
        row = (pair, trip + start, item, bought[trip, item].float(), stands)
        parts.append([x[keep] for x in row])
    pairs, trip, item, label, stands = (torch.cat(x) for x in zip(*parts, strict=True))
    return torch.cat(features), pairs, trip, item, label, stands
