"""Users who shop alone: a free walk through a span of days, to be held against what happened.

Nobody recommends anything. Day by day users come, at an hour, for a number of items (rhythm.py);
which ones, the preference model says (preference.py), what so large a visit is for (missions.py)
and the basket so far (company.py), one item after another by a logit. What is bought becomes the
past of the next visit, so faults add up as days go by. Money comes from past lines of an item.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from encoders.state import EMPTY, remember
from simulators.base import Catalog, UserTable
from simulators.company import Company, fit_company
from simulators.fit import LATE, moment
from simulators.missions import Missions, fit_missions
from simulators.preference import Preference
from simulators.rhythm import Memory, Rhythm, dawn_of, fit_rhythm, hour_of, weekday_of
from simulators.trips import HABITS, trips_from_logs
from simulators.visits import Lines, lines_of, visits_of
from sources.logs import Logs

BANK = 32  # lines of the past that an item's price, discount and value are drawn from
A_DAY = 6  # visits of one user on one day at most
ROWS = 64  # users priced at once


def table_at(logs: Logs, items: np.ndarray, day: float) -> UserTable:
    """All users who came before `day`, as they stood then."""
    before = logs.before(moment(day))
    events = before.events
    users = events.loc[events["behaviour"].isin(logs.purchases), "user"].unique()
    visit = pd.DataFrame({"user": users, "item": -1, "time": moment(day), "value": 0.0})
    visit["item"] = pd.Series([-1] * len(users)).astype(events["item"].dtype, errors="ignore")
    visit["behaviour"] = pd.Categorical(
        [logs.purchases[0]] * len(users), categories=events["behaviour"].cat.categories
    )
    visit["time"] = visit["time"].astype(events["time"].dtype)
    if "basket" in events:  # a visit of its own
        codes = pd.factorize(events["basket"])[0]
        own = np.arange(len(users)) + codes.max() + 1
        events = events.assign(basket=codes)
        visit["basket"] = own
    columns = [c for c in ("user", "item", "time", "behaviour", "value", "basket") if c in events]
    asked = pd.concat([events[columns], visit[columns]], ignore_index=True)
    whole = Logs(asked, logs.items, logs.users, None, logs.roles, (), logs.name, logs.purchases)
    return trips_from_logs(whole, items, since=day).users()


@dataclass(frozen=True)
class Bank:
    """Value, price and discount of past lines of each item, and how many there are."""

    lines: np.ndarray  # (N, BANK, 3)
    held: np.ndarray  # (N,) int64, at least 1

    @staticmethod
    def of(lines: Lines, num_items: int, now: float, rng: np.random.Generator) -> "Bank":
        """Drawn from an item's lines, the later before day `now` the likelier (1/e in 28 days).

        An item without any costs what lines mostly cost.
        """
        table = np.column_stack([lines.value, lines.price, lines.discount])
        usual = np.array([np.nanmedian(c) if np.isfinite(c).any() else np.nan for c in table.T])
        bank = np.tile(usual, (num_items, BANK, 1))
        # the smallest of exponential keys: a sample weighted without replacement
        key = rng.exponential(size=len(lines)) * np.exp((now - lines.time) / LATE)
        order = np.lexsort((key, lines.item))
        item = lines.item[order]
        rank = np.arange(len(order)) - np.searchsorted(item, item)
        some = rank < BANK
        bank[item[some], rank[some]] = table[order[some]]
        held = np.bincount(lines.item, minlength=num_items).clip(1, BANK)
        return Bank(bank, held)

    def draw(self, item: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Value, price and discount (m, 3) of one line each of items (m,)."""
        place = (rng.random(len(item)) * self.held[item]).astype(np.int64)
        return np.asarray(self.lines[item, place])


@dataclass(frozen=True)
class Alone:
    """All that makes users who shop alone."""

    preference: Preference
    company: Company
    missions: Missions
    dawn: int  # hour that the days of the rhythm begin at
    rhythm: Rhythm
    bank: Bank


def fit_alone(
    preference: Preference, logs: Logs, catalog: Catalog, *, window: float, seed: int = 0,
    company: Company | None = None,
) -> Alone:  # fmt: skip
    """Learn rhythm and company from the `window` days of `logs` before the catalogue's cut.

    A `company` that was learnt there already (Habits.company) is not learnt again.
    """
    past = logs.before(moment(catalog.as_of))
    since = catalog.as_of - window
    rng = np.random.default_rng(seed)
    users = past.users["user"].to_numpy()
    lines = lines_of(past, catalog.ids, users)
    visits = visits_of(lines)
    dawn = dawn_of(visits.time)
    clock = replace(visits, time=visits.time - dawn / 24)
    span = {"since": since - dawn / 24, "until": catalog.as_of - dawn / 24}
    rhythm = fit_rhythm(clock, len(users), **span)
    trips = trips_from_logs(past, catalog.ids, since=since)
    if company is None:
        company = fit_company(preference, catalog, trips, rng)
    missions = fit_missions(preference, company, trips, rng)
    recent = lines_of(past.since(moment(since)), catalog.ids, users)
    bank = Bank.of(recent, len(catalog), catalog.as_of, rng)
    return Alone(preference, company, missions, dawn, rhythm, bank)


@torch.no_grad()
def walk(
    alone: Alone, users: UserTable, memory: Memory, *, until: float, rng: np.random.Generator
) -> Lines:
    """Let users (U,), of whom `memory` tells the rhythm, live from `start` to the day `until`."""
    rhythm, dawn = alone.rhythm, alone.dawn / 24
    start = float(users.start.min().item())
    memory = memory.rows(np.arange(len(users))).by_clock(alone.dawn)  # its own copy
    table = {
        "past": users.past.clone(), "count": users.past_count.clone(),
        "age": users.past_age.clone(), "profile": users.profile.clone(),
        "time": users.start.clone(),
    }  # fmt: skip
    habits = _Habits(users.profile, users.start)
    found: list[tuple[np.ndarray, ...]] = []
    for day in range(int(np.floor(start - dawn)), int(np.ceil(until - dawn))):
        who = np.nonzero(memory.count > 0)[0]
        weekday = int(weekday_of(np.array([day]))[0])
        for _ in range(A_DAY):
            waited = np.maximum(day - np.floor(memory.last[who]), 0.0)
            came = rhythm.comes(memory.rows(who), waited, np.full(len(who), weekday))
            who = who[rng.random(len(who)) < came]
            if not len(who):
                break
            time = rhythm.time(memory.rows(who), day, weekday, rng)
            inside = (time + dawn >= start) & (time + dawn < until)
            who, time = who[inside], time[inside]
            if not len(who):
                break
            now = memory.rows(who)
            days = np.full(len(who), weekday)
            gap = np.maximum(day - np.floor(now.last), 0.0)
            size = rhythm.sizes(now, gap, hour_of(time), days, rng)
            rows, at = torch.from_numpy(who), torch.from_numpy(time + dawn)
            _go_on(table, rows, at)
            table["profile"][rows, :HABITS] = habits.columns(rows, at)
            baskets = _baskets(alone, table, rows, size, rng)
            spent = _note(found, baskets, who, time + dawn, alone.bank, rng)
            _remember(table, rows, baskets)
            habits.note(rows, size, spent)
            memory.note(who, time, size)
    return _numbered(found)


def _go_on(table: dict[str, Tensor], rows: Tensor, time: Tensor) -> None:
    """Let the days pass for users `rows` (R,) until `time` (R,)."""
    gone = (time - table["time"][rows]).float()[:, None]  # (R, 1)
    real = table["past"][rows] != EMPTY
    table["age"][rows] = torch.where(real, table["age"][rows] + gone, 0.0)
    table["time"][rows] = time


def _baskets(
    alone: Alone, table: dict[str, Tensor], rows: Tensor, size: np.ndarray,
    rng: np.random.Generator,
) -> Tensor:  # fmt: skip
    """What users `rows` (R,) take, (R, M) items, EMPTY-padded."""
    preference, company, missions = alone.preference, alone.company, alone.missions
    size = np.minimum(size, len(preference.bias))
    out = torch.full((len(rows), int(size.max())), EMPTY)
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
    for at in range(0, len(rows), ROWS):
        some = rows[at : at + ROWS]
        known = (table[k][some] for k in ("profile", "past", "count", "age", "time"))
        theta = preference.logits(preference.describe(*known))  # (r, N)
        wanted = torch.from_numpy(size[at : at + ROWS])
        for nth in range(int(wanted.max())):
            still = (wanted > nth).nonzero().squeeze(1)  # (q,)
            now = theta[still] + missions.change(wanted[still], nth)  # (q, N)
            if nth:
                now = now + company.change(out[at + still, :nth])
            noise = torch.empty_like(now).exponential_(generator=generator).log()
            best = (now - noise).argmax(dim=1)  # (q,) Gumbel-max
            out[at + still, nth] = best
            theta[still, best] = -torch.inf
    return out


def _note(
    found: list[tuple[np.ndarray, ...]], baskets: Tensor, who: np.ndarray, time: np.ndarray,
    bank: Bank, rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Write down the lines of R baskets; what each came to, (R,)."""
    row, slot = np.nonzero(baskets.numpy() != EMPTY)
    item = baskets.numpy()[row, slot]
    money = bank.draw(item, rng)  # (m, 3)
    found.append((who[row], time[row], item, *money.T))
    return np.bincount(row, np.nan_to_num(money[:, 0]), minlength=len(who))


def _remember(table: dict[str, Tensor], rows: Tensor, baskets: Tensor) -> None:
    """Baskets (R, M) become past."""
    past, count, age = (table[name][rows] for name in ("past", "count", "age"))
    gone = torch.zeros(len(rows))
    past, count, age = remember(past, count, age, baskets, gone)
    table["past"][rows], table["count"][rows], table["age"][rows] = past, count, age


class _Habits:
    """Sums behind the first columns of a profile (trips.py), so that they go on as visits come."""

    def __init__(self, profile: Tensor, start: Tensor) -> None:
        per_trip, rate, days, spend = profile[:, :HABITS].double().T
        self.trips = (rate.exp() * days.exp() - 1).clamp_min(0).round()  # (U,)
        self.items = per_trip.exp() * (self.trips + 1) - 1
        self.spend = spend.exp() * (self.trips + 1) - 1
        self.days = days.exp()  # since the first trip, + 7
        self.time = start.double().clone()  # (U,) that `days` run to

    def columns(self, rows: Tensor, time: Tensor) -> Tensor:
        """The first columns (R, 4) of the profiles of users `rows` at `time` (R,)."""
        self.days[rows] += time - self.time[rows]
        self.time[rows] = time
        trips, days = self.trips[rows] + 1, self.days[rows]
        parts = (
            (self.items[rows] + 1) / trips, trips / days, days,
            (self.spend[rows].clamp_min(0.0) + 1) / trips,
        )  # fmt: skip
        return torch.stack([x.log() for x in parts], dim=1).float()

    def note(self, rows: Tensor, size: np.ndarray, spend: np.ndarray) -> None:
        """Count one visit each of users `rows` (R,)."""
        self.trips[rows] += 1
        self.items[rows] += torch.from_numpy(size)
        self.spend[rows] += torch.from_numpy(spend)


def _numbered(found: list[tuple[np.ndarray, ...]]) -> Lines:
    """Lines in order of user and time, visits numbered."""
    if not found:
        empty = np.zeros(0)
        return Lines(empty.astype(np.int64), empty.astype(np.int64), empty,
                     empty.astype(np.int64), empty, empty, empty)  # fmt: skip
    user, time, item, value, price, discount = (np.concatenate(x) for x in zip(*found, strict=True))
    order = np.lexsort((item, time, user))
    user, time = user[order], time[order]
    new = np.concatenate([[True], (user[1:] != user[:-1]) | (time[1:] != time[:-1])])
    rest = (x[order] for x in (item, value, price, discount))
    return Lines(user, np.cumsum(new) - 1, time, *rest)
