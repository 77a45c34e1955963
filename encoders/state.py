"""What a recommender can see of a user: `Observation`, and its encoding into one state vector."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, one_hot

EMPTY = -1  # no item: padding of histories, an empty slot of a slate
PAST = 256  # H: distinct items of a user's past that are kept, the most recent ones
CONTEXT = 11  # C: weekday one-hot (7), hour of day (2), week of year (2)
LIMIT = 10.0  # bound of profile entries and of log-scaled numbers; e^10 days are 60 years
HUGE = 1e6  # weights and ages beyond it are noise; sums of them must stay finite


@dataclass(frozen=True)
class Observation:
    """What a shop could log of B users at one moment; never what only the simulator knows."""

    profile: Tensor  # (B, P) float32: attributes, spend level
    past: Tensor  # (B, H) int64: distinct items bought before this trip, EMPTY where fewer
    past_count: Tensor  # (B, H) float32: how often; 0 where empty
    past_age: Tensor  # (B, H) float32: days since the last time; 0 where empty
    history: Tensor  # (B, L) int64: shown on this trip in the order shown, EMPTY to the right
    feedback: Tensor  # (B, L, F) float32: what the user did with each, one column per behaviour
    context: Tensor  # (B, C) float32: weekday, hour, week

    def __len__(self) -> int:
        return self.profile.shape[0]

    def __getitem__(self, rows: Any) -> "Observation":
        return Observation(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device: torch.device | str) -> "Observation":
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def calendar(time: Tensor) -> Tensor:
    """Days since 1970-01-01 (B,) float64 to context (B, C): weekday, hour of day, week of year."""
    day = time.floor()  # (B,)
    weekday = ((day + 3) % 7).long()  # (B,) Monday is 0; 1970-01-01 was a Thursday
    hour, year = (time - day) * 2 * math.pi, (day / 365.2425) * 2 * math.pi  # (B,) angles
    waves = torch.stack([hour.sin(), hour.cos(), year.sin(), year.cos()], dim=1)  # (B, 4)
    return torch.cat([one_hot(weekday, 7).double(), waves], dim=1).float()  # (B, C)


def remember(
    past: Tensor, count: Tensor, age: Tensor, bought: Tensor, elapsed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Add a trip's purchases (B, M; EMPTY-padded) to a past (B, H); `elapsed` (B,) days go by.

    Items already known count one more and are `elapsed` old; new ones take the place of the item
    bought longest ago. Bought twice on one trip counts once. Returns new past, count, age.
    """
    past, count, age = past.clone(), count.clone(), age.clone()
    age = torch.where(past != EMPTY, age + elapsed[:, None], age)  # (B, H)
    for m in range(bought.shape[1]):  # M is a trip's purchases: few
        item = bought[:, m]  # (B,)
        real = (item != EMPTY) & ~(bought[:, :m] == item[:, None]).any(dim=1)  # (B,)
        rows = real.nonzero().squeeze(1)  # (R,) most trips are shorter than the longest
        item, then = item[rows], past[rows]  # (R,), (R, H)
        known = then == item[:, None]  # (R, H)
        # empty places first, then the oldest
        free = torch.where(then == EMPTY, torch.inf, age[rows])  # (R, H)
        place = torch.where(known.any(dim=1), known.int().argmax(dim=1), free.argmax(dim=1))
        old = known[torch.arange(len(rows), device=rows.device), place]  # (R,)
        count[rows, place] = torch.where(old, count[rows, place], 0.0) + 1.0
        past[rows, place] = item
        age[rows, place] = elapsed[rows].to(age.dtype)
    return past, count, age


class StateEncoder:
    """Encode an `Observation` into one state vector (B, U), cheap enough for every step.

    Blocks in order: profile (P); means of item vectors (D each) over the past by count, over the
    past by recency, over what was shown on this trip, and over the same by each behaviour (F);
    context (C); logs of past size, of days since the last purchase, of items shown and of how
    often each behaviour followed (3 + F).
    """

    def __init__(
        self, item_vectors: Tensor, *, profile_size: int, behaviours: int, decay_days: float = 30.0
    ) -> None:
        if item_vectors.ndim != 2 or not item_vectors.numel() or not item_vectors.isfinite().all():
            raise ValueError(
                f"item_vectors must be finite and (N, D), got {tuple(item_vectors.shape)}: "
                "take them from Catalog.vectors"
            )
        if not decay_days > 0:
            raise ValueError(f"decay_days must be above 0, got {decay_days}")
        self.profile_size, self.behaviours, self.decay_days = profile_size, behaviours, decay_days
        padding = item_vectors.new_zeros(1, item_vectors.shape[1])
        self.table = torch.cat([item_vectors, padding]).float()  # (N + 1, D); the last row is EMPTY
        means = item_vectors.shape[1] * (3 + behaviours)
        reach = float(item_vectors.abs().max())  # no mean goes beyond it
        sizes = torch.tensor(
            [profile_size, means, CONTEXT, 3 + behaviours], device=self.table.device
        )
        self.high = sizes.new_tensor([LIMIT, reach, 1.0, LIMIT], dtype=torch.float32)
        self.high = self.high.repeat_interleave(sizes)  # (U,)
        self.low = -self.high  # (U,)
        self.low[-3 - behaviours :] = 0.0
        self.size = len(self.high)  # U

    def __call__(self, obs: Observation) -> Tensor:
        """Observation of B users to states (B, U) within `low` and `high`."""
        self._check(obs)
        known, shown = obs.past != EMPTY, obs.history != EMPTY  # (B, H), (B, L)
        past, history = self._rows(obs.past, known), self._rows(obs.history, shown)
        age = obs.past_age.clamp(0.0, HUGE).masked_fill(~known, torch.inf)  # (B, H)
        youngest = age.amin(dim=1, keepdim=True)  # (B, 1), inf where nothing was ever bought
        # Relative to the latest purchase: the mean is the same and old pasts do not underflow.
        recency = ((youngest.clamp(max=HUGE) - age) / self.decay_days).exp()  # (B, H)
        count = obs.past_count.clamp(0.0, HUGE).masked_fill(~known, 0.0)  # (B, H)
        feedback = obs.feedback.clamp(-HUGE, HUGE) * shown[:, :, None]  # (B, L, F)
        numbers = [known.sum(dim=1), youngest.squeeze(1), shown.sum(dim=1)]  # (B,) each
        followed = feedback.sum(dim=1).clamp(min=0.0)  # (B, F)
        state = torch.cat(
            [
                obs.profile,
                self._mean(past, count),
                self._mean(past, recency),
                self._mean(history, shown.float()),
                *(self._mean(history, feedback[:, :, f]) for f in range(self.behaviours)),
                obs.context,
                torch.stack([n.float() for n in numbers], dim=1).log1p(),
                followed.log1p(),
            ],
            dim=1,
        )  # (B, U)
        return torch.minimum(torch.maximum(state, self.low), self.high)

    def _rows(self, items: Tensor, real: Tensor) -> Tensor:
        """Items (B, M) to rows of the table: EMPTY is the zero row at the end."""
        return torch.where(real, items, len(self.table) - 1)

    def _mean(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Weighted mean (B, D) of item vectors (B, M); zero where all weights are."""
        total = weight.abs().sum(dim=1, keepdim=True)  # (B, 1)
        share = weight / total.clamp(min=torch.finfo(torch.float32).tiny)  # (B, M)
        return embedding_bag(rows, self.table, mode="sum", per_sample_weights=share)

    def _check(self, obs: Observation) -> None:
        """Refuse an observation of other sizes than those this encoder was built for."""
        expected = (self.profile_size, CONTEXT, self.behaviours)  # P, C, F
        got = (obs.profile.shape[1], obs.context.shape[1], obs.feedback.shape[2])
        if got != expected:
            raise ValueError(
                f"observation must have profile, context and feedback of widths {expected}, "
                f"got {got}: build StateEncoder with the profile_size and behaviours of the env"
            )
        if obs.past.shape[1] == 0 or obs.history.shape[1] == 0:
            raise ValueError(
                f"past and history need at least one column, got {tuple(obs.past.shape)} and "
                f"{tuple(obs.history.shape)}: pad with EMPTY"
            )
