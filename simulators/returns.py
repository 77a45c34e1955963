"""When a household that has just been served comes back, in a session of several trips.

The hazard of coming on each day since a trip is that of rhythm.py, fitted to all trips of the log,
also to those that took nothing of the catalogue: days gone by, weekday and how often the household
comes. A gap is drawn by going down the distribution that follows from it; who would stay away for
longer than rhythm.LONGEST days is not followed: a session goes on with a household that returns.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from simulators.rhythm import (
    LONGEST,
    NARROW,
    WAITED,
    Memory,
    hour_of,
    logistic,
    own_weight,
    shares_of,
    waits,
    weekday_of,
)
from simulators.trips import Trips

SAMPLE = 8000  # gaps that are learnt from
FEWEST = 100  # gaps; from fewer nothing is learnt
SOON = 64  # quantiles kept of the gaps within a day
SOONEST = 1 / 96  # days: a quarter of an hour


@dataclass(frozen=True)
class Returns:
    """Log-odds of coming on a day are base + rate x slope + rate^2 x square."""

    base: Tensor  # (7, LONGEST + 1) by weekday of the trip and days since
    slope: Tensor  # (LONGEST + 1,)
    square: Tensor  # ()
    hours: Tensor  # (7, 24) what all households together say of the hour, by weekday
    soon: Tensor  # (SOON,) days between two trips on one day, from short to long

    def to(self, device: str) -> "Returns":
        return Returns(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def gap(self, uniform: Tensor, time: Tensor, trips: Tensor, days: Tensor) -> Tensor:
        """Days (R,) until the next trip, given `uniform` (R, 3) and the `time` (R,) of this one.

        `trips` (R,) were made so far, this one among them, in the `days` (R,) since the first.
        """
        today = time.floor()  # (R,)
        weekday = ((today + 3) % 7).long()  # (R,) as `weekday_of`
        rate = ((trips + 1) / (days + 7)).log().float()[:, None]  # (R, 1)
        log_odds = self.base[weekday] + rate * self.slope + rate.square() * self.square
        came = -torch.expm1(-softplus(log_odds).cumsum(dim=1))  # (R, LONGEST + 1) by that day
        until = (uniform[:, :1] * came[:, -1:]).contiguous()  # (R, 1)
        day = torch.searchsorted(came, until).squeeze(1).clamp_max(LONGEST)  # (R,)
        left = today + 1 - time  # (R,) of the day of this trip
        hour = ((1 - left) * 24).long().clamp(0, 23)
        near = torch.arange(24, device=time.device) - hour[:, None]  # (R, 24)
        near = torch.exp(-0.5 * (near / NARROW).square())
        share = near / near.sum(dim=1, keepdim=True) + self.hours[(weekday + day) % 7]
        share = share.cumsum(dim=1)  # (R, 24)
        wanted = (uniform[:, 1:2] * share[:, -1:]).contiguous()  # (R, 1)
        then = torch.searchsorted(share, wanted).squeeze(1).clamp_max(23)  # (R,)
        later = day + (then + uniform[:, 2].double()) / 24 - (1 - left)  # (R,)
        same = self.soon[(uniform[:, 1] * len(self.soon)).long()]
        gap = torch.where(day == 0, torch.minimum(same, left / 2), later)
        return gap.clamp_min(SOONEST).float()


def fit_returns(
    trips: Trips, weight: np.ndarray, *, until: float, rng: np.random.Generator
) -> Returns | None:
    """Learn from the gaps between trips weighted (n,), and from who had not come by `until`."""
    days = np.exp(trips.profile[:, 2].astype(np.float64))  # (n,) since the first trip, + 7
    before = np.exp(trips.profile[:, 1]) * days - 1  # (n,) trips
    came = np.isfinite(trips.gap) & (before > 0.5)  # (n,)
    if came.sum() < FEWEST or not weight[came].sum():
        return None
    last = np.append(trips.user[1:] != trips.user[:-1], True)  # (n,) the household's last trip
    gap = trips.gap.astype(np.float64)
    since = np.concatenate([(trips.time - gap)[came], trips.time[last]])
    then = np.concatenate([trips.time[came], np.full(last.sum(), until)])
    count = np.concatenate([before[came], before[last] + 1])
    first = (trips.time - days + 7)[np.concatenate([np.nonzero(came)[0], np.nonzero(last)[0]])]
    seen = np.arange(len(since)) < came.sum()
    times = np.concatenate([weight[came], weight[last]]).astype(np.int64)
    rows = np.repeat(np.arange(len(since)), times)
    rows = rng.permutation(rows)[:SAMPLE]
    memory = Memory.blank(len(rows))
    memory.count[:], memory.first[:], memory.last[:] = count[rows], first[rows], since[rows]
    wait = np.maximum(np.floor(then) - np.floor(since), 0.0)[rows]
    day = logistic(*waits(memory, wait, seen[rows], trips.time.min()))

    pairs = rows[seen[rows]]
    hour, weekday = hour_of(then[pairs]), weekday_of(then[pairs])
    hours = shares_of(hour, weekday)
    own = np.eye(24)[hour_of(since[pairs])]
    hours = hours * own_weight(hours, own, hour, weekday)
    soon = (then - since)[pairs][wait[seen[rows]] == 0]
    soon = np.quantile(soon if len(soon) else [1 / 24], (np.arange(SOON) + 0.5) / SOON)
    return _tables(day, hours, soon)


def _tables(day: np.ndarray, hours: np.ndarray, soon: np.ndarray) -> Returns:
    """The coefficients of rhythm.day_features by weekday and days waited."""
    waited = np.arange(LONGEST + 1)
    log, level = np.log1p(waited), np.searchsorted(WAITED, waited, side="right") - 1
    of_level, rest = day[: len(WAITED)], day[len(WAITED) :]
    of_weekday, (rate, same, far, square, once, twice, constant) = rest[:7], rest[7:]
    weekday = of_weekday[(np.arange(7)[:, None] + waited) % 7] * (waited > 0)  # (7, LONGEST + 1)
    base = of_level[level] + weekday + once * log + twice * log**2 + constant
    parts = base, rate + same * (waited == 0) + far * log, np.array(square), hours, soon
    return Returns(*(torch.from_numpy(np.asarray(x, np.float32)) for x in parts))
