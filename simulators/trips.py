"""The log as trips: what each household bought on a visit, and what it had bought before."""

from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import pandas as pd
import torch

from encoders.state import EMPTY, PAST
from simulators.base import UserTable
from sources.logs import Logs

HABITS = 4  # first columns of `profile`, all known before the trip: log items per trip, log trips
# per day, log days since the first trip (+ 7), log spend per trip; the users' attributes follow


@dataclass(frozen=True)
class Trips:
    """n visits to the shop, ordered by household and time. All but `bought` was known before it."""

    user: np.ndarray  # (n,) outside ids
    time: np.ndarray  # (n,) float64 days since 1970-01-01
    past: np.ndarray  # (n, H) int32: distinct items bought before, the latest first, EMPTY-padded
    count: np.ndarray  # (n, H) float32: on how many trips
    age: np.ndarray  # (n, H) float32: days since the last
    profile: np.ndarray  # (n, P) float32
    gap: np.ndarray  # (n,) float32 days since the previous trip, NaN on the first
    pointer: np.ndarray  # (n + 1,) int64 into `bought`
    bought: np.ndarray  # (m,) int32 catalogue items of the trips, one after another

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, rows: np.ndarray) -> "Trips":
        """Trips of a boolean or integer selection, in its order."""
        rows = np.arange(len(self))[rows]
        sizes = np.diff(self.pointer)[rows]
        pointer = np.concatenate([[0], np.cumsum(sizes)])
        inside = np.arange(pointer[-1]) - np.repeat(pointer[:-1], sizes)
        bought = self.bought[np.repeat(self.pointer[rows], sizes) + inside]
        rest = {
            f.name: getattr(self, f.name)[rows]
            for f in fields(self)
            if f.name not in ("pointer", "bought")
        }
        return Trips(pointer=pointer, bought=bought, **rest)

    def users(self) -> UserTable:
        """The households at the moment of their trips."""
        return UserTable(
            ids=self.user,
            profile=torch.from_numpy(self.profile),
            past=torch.from_numpy(self.past).long(),
            past_count=torch.from_numpy(self.count),
            past_age=torch.from_numpy(self.age),
            start=torch.from_numpy(self.time),
        )

    def padded(self) -> np.ndarray:
        """What was bought as (n, M) int64, EMPTY-padded to the largest basket."""
        sizes = np.diff(self.pointer)
        table = np.full((len(self), max(1, int(sizes.max(initial=0)))), EMPTY, np.int64)
        inside = np.arange(len(self.bought)) - np.repeat(self.pointer[:-1], sizes)
        table[np.repeat(np.arange(len(self)), sizes), inside] = self.bought
        return table


def trips_from_logs(logs: Logs, ids: np.ndarray, *, since: float = -np.inf) -> Trips:
    """Every basket (or, without baskets, user and day) of the purchases, from day `since` on.

    A visit that bought nothing of the catalogue counts as a trip. What is known of a household
    comes from all its trips in `logs` before; a household's first trip has an empty past.
    """
    events = logs.events[logs.events["behaviour"].isin(logs.purchases)]
    if events.empty:
        raise ValueError(
            f"{logs.name}: no purchases {logs.purchases} among the events, nothing to fit"
        )
    day = events["time"].to_numpy().astype("datetime64[us]").astype(np.int64) / 86_400e6
    user, users = pd.factorize(events["user"], sort=True)
    visit = events["basket"] if "basket" in events else pd.Series(np.floor(day), index=events.index)
    basket, first = pd.factorize(pd.MultiIndex.from_arrays([user, visit]))
    n = len(first)
    time, owner, spend = np.full(n, np.inf), np.zeros(n, np.int64), np.zeros(n)
    np.minimum.at(time, basket, day)
    owner[basket] = user
    np.add.at(spend, basket, events["value"].to_numpy(np.float64))
    order = np.lexsort((time, owner))
    place = np.empty(n, np.int64)
    place[order] = np.arange(n)
    owner, time, spend = owner[order], time[order], spend[order]

    item = pd.Index(ids).get_indexer(events["item"])  # -1: not in the catalogue
    known = item >= 0
    pairs = np.unique(place[basket[known]] * len(ids) + item[known])  # a trip buys an item once
    trip, item = pairs // len(ids), (pairs % len(ids)).astype(np.int32)
    pointer = np.searchsorted(trip, np.arange(n + 1))
    start = np.searchsorted(owner, np.arange(len(users) + 1))
    parts = [
        _pasts(time[a:z], trip[pointer[a] : pointer[z]] - a, item[pointer[a] : pointer[z]], since)
        for a, z in pairwise(start)
    ]
    past, count, age = (np.concatenate([p[k] for p in parts]) for k in range(3))
    keep = time >= since
    profile, gap = _profile(time, owner, start, np.diff(pointer), spend)
    known = _attributes(logs).reindex(users).to_numpy(np.float32)[owner]  # (n, A)
    profile = np.concatenate([profile, known], axis=1)
    sizes = np.where(keep, np.diff(pointer), 0)
    return Trips(
        np.asarray(users)[owner[keep]],
        time[keep],
        past,
        count,
        age,
        profile[keep],
        gap[keep],
        np.concatenate([[0], np.cumsum(sizes[keep])]),
        item[np.repeat(keep, np.diff(pointer))],
    )


def _pasts(
    time: np.ndarray, trip: np.ndarray, item: np.ndarray, since: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Past, count and age (T, H) before each of one household's T trips from `since` on."""
    items, column = np.unique(item, return_inverse=True)
    rows = np.nonzero(time >= since)[0]  # (R,)
    past = np.full((len(rows), PAST), EMPTY, np.int32)
    count, age = np.zeros((2, len(rows), PAST), np.float32)
    if len(items) == 0 or len(rows) == 0:
        return past, count, age
    bought = np.zeros((len(time) + 1, len(items)), bool)
    bought[trip + 1, column] = True  # row t holds what trip t - 1 bought, so sums to t are before t
    times = np.concatenate([[-np.inf], time])[:, None]  # (T + 1, 1)
    last = np.maximum.accumulate(np.where(bought, times, -np.inf))[:-1][rows]  # (R, I)
    often = np.cumsum(bought, axis=0, dtype=np.float32)[:-1][rows]  # (R, I)
    latest = np.argsort(-last, axis=1, kind="stable")[:, :PAST]  # (R, min(I, H))
    width = latest.shape[1]
    when = np.take_along_axis(last, latest, axis=1)
    real = np.isfinite(when)
    past[:, :width] = np.where(real, items[latest], EMPTY)
    count[:, :width] = np.where(real, np.take_along_axis(often, latest, axis=1), 0.0)
    age[:, :width] = np.where(real, time[rows, None] - np.where(real, when, 0.0), 0.0)
    return past, count, age


def _profile(
    time: np.ndarray, owner: np.ndarray, start: np.ndarray, size: np.ndarray, spend: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Profile (n, P) and days since the previous trip (n,) from a household's earlier trips."""
    first = start[owner]  # (n,) row of the household's first trip
    before = np.arange(len(time)) - first  # (n,) earlier trips

    def earlier(x: np.ndarray) -> np.ndarray:
        # Per household: a sum over all would round by what others do, even after the trip.
        return np.concatenate([np.cumsum(np.append(0.0, x[a:z]))[:-1] for a, z in pairwise(start)])

    days = time - time[first]
    # one trip of one item and a week are added: a newcomer has finite, unremarkable values
    profile = np.stack(
        [
            np.log((earlier(size) + 1) / (before + 1)),
            np.log((before + 1) / (days + 7)),
            np.log(days + 7),
            np.log((earlier(spend).clip(0.0) + 1) / (before + 1)),  # refunds may exceed the spend
        ],
        axis=1,
    )
    gap = np.where(before > 0, time - np.concatenate([[0.0], time[:-1]]), np.nan)
    return profile.astype(np.float32), gap.astype(np.float32)


def _attributes(logs: Logs) -> pd.DataFrame:
    """Declared attributes of users as numbers (U, A), indexed by user; the last tells who has any.

    Numbers are standardised by those known, 0 where missing; a log with categories only has a
    column for each of their levels.
    """
    users = logs.users.set_index("user")
    numbers = users[list(logs.roles.user_number)].astype(float)
    if numbers.shape[1] == 0 and logs.roles.user_category:
        numbers = pd.get_dummies(users[list(logs.roles.user_category)], dtype=float)
    spread = numbers.std(ddof=0).replace(0.0, 1.0)
    table = ((numbers - numbers.mean()) / spread).fillna(0.0)
    declared = [*logs.roles.user_number, *logs.roles.user_category]
    table["known"] = users[declared].notna().any(axis=1).astype(float)
    return table
