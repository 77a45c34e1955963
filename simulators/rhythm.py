"""When users come and how much they take: day, hour and size of the next visit, from the log.

Each visit starts a clock. On every day since (0: later the same day) the user comes with a hazard
that depends on the days gone by, the weekday and how often this user has come so far; at an hour
that is mostly one of the user's own; and stops after the nth item with a hazard that depends on the
sizes of the user's own visits, the days since the last one and the hour. Both hazards are logistic
regressions (Singer and Willett, 1993) of all users together: their own past is in the features.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from simulators.visits import Visits

WAITED = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 14, 15, 21, 22, 28, 29, 45])  # days: levels
NTH = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 19, 25, 32])  # items: levels of the size
LONGEST = 120  # days without a visit that are learnt from; who stays away longer is as after these
MOST = 60  # items of a visit
DAY = np.array([0, 6, 11, 14, 17, 20, 24])  # parts of a day, by hour
SURE = 7.0  # log-odds of what always happened
LATE = 42.0  # days that tell how hours have shifted since: evenings get dark earlier or later
NARROW = 1.0  # hours around an own one that count as like it


@dataclass
class Memory:
    """What is known of U users from their visits so far."""

    count: np.ndarray  # (U,) visits
    first: np.ndarray  # (U,) day of the first; nan before it
    last: np.ndarray  # (U,) day of the last
    log_size: np.ndarray  # (U,) sum over visits of log size
    spread: np.ndarray  # (U,) sum over visits of squared log size
    hours: np.ndarray  # (U, 24) visits at each hour

    @staticmethod
    def blank(users: int) -> "Memory":
        none = np.full(users, np.nan)
        zero = np.zeros(users)
        return Memory(
            zero.copy(), none, none.copy(), zero.copy(), zero.copy(), np.zeros((users, 24))
        )

    def note(self, user: np.ndarray, time: np.ndarray, size: np.ndarray) -> None:
        """Remember one visit each of users (R,), nobody twice."""
        self.first[user] = np.where(np.isnan(self.first[user]), time, self.first[user])
        self.last[user] = time
        self.count[user] += 1
        self.log_size[user] += np.log(size)
        self.spread[user] += np.log(size) ** 2
        self.hours[user, hour_of(time)] += 1

    def by_clock(self, dawn: int) -> "Memory":
        """The same on a clock whose days begin at the hour `dawn`."""
        hours = np.roll(self.hours, -dawn, axis=1)
        first, last = self.first - dawn / 24, self.last - dawn / 24
        return Memory(self.count, first, last, self.log_size, self.spread, hours)

    def rows(self, user: np.ndarray) -> "Memory":
        return Memory(*(getattr(self, name)[user] for name in self.__dataclass_fields__))

    @staticmethod
    def after(visits: Visits, users: int) -> "Memory":
        """Of all the visits."""
        memory = Memory.blank(users)
        rank = _rank(visits.user)
        for nth in range(int(rank.max(initial=-1)) + 1):
            now = rank == nth
            memory.note(visits.user[now], visits.time[now], visits.size[now])
        return memory


def hour_of(time: np.ndarray) -> np.ndarray:
    """Hour of the day (n,) int64 of days (n,); rounded to the second, as days are no exact sums."""
    seconds = np.round((time - np.floor(time)) * 86_400).astype(np.int64)
    return np.asarray(np.minimum(seconds // 3600, 23))


def dawn_of(time: np.ndarray) -> int:
    """Hour that the fewest come at (n,), neighbours counted by halves: days had better begin there.

    Else who comes late and goes on after midnight would be seen to come back the next day.
    """
    share = np.bincount(hour_of(time), minlength=24).astype(float)
    return int(np.argmin(share + 0.5 * (np.roll(share, 1) + np.roll(share, -1))))


def weekday_of(day: np.ndarray) -> np.ndarray:
    """0 for Monday, (n,) int64; 1970-01-01 was a Thursday."""
    return np.asarray((np.floor(day).astype(np.int64) + 3) % 7)


def day_features(memory: Memory, waited: np.ndarray, weekday: np.ndarray) -> np.ndarray:
    """(n, F) of days, `waited` (n,) days after the last visit."""
    rate = np.log((memory.count + 1) / (memory.last - memory.first + 7))  # (n,) visits a day
    level = np.searchsorted(WAITED, np.minimum(waited, LONGEST), side="right") - 1
    same_day = waited == 0
    return np.column_stack([
        np.eye(len(WAITED))[level], np.eye(7)[weekday] * ~same_day[:, None],
        rate, rate * same_day, rate * np.log1p(waited), rate**2,
        np.log1p(waited), np.log1p(waited) ** 2,
    ])  # fmt: skip


def size_features(
    memory: Memory, nth: np.ndarray, gap: np.ndarray, hour: np.ndarray, weekday: np.ndarray
) -> np.ndarray:
    """(n, F) of having taken `nth` (n,) items on a visit `gap` (n,) days after the last."""
    mean = memory.log_size / (memory.count + 1)  # (n,) one visit of one item is added
    spread = np.sqrt(np.maximum(memory.spread / (memory.count + 1) - mean**2, 0.0))  # (n,)
    level = np.searchsorted(NTH, nth, side="right") - 1
    far = np.log(nth) - mean  # (n,) beyond the usual size
    part = np.searchsorted(DAY, hour, side="right") - 1
    gap = np.log1p(np.minimum(gap, LONGEST))
    return np.column_stack([
        np.eye(len(NTH))[level], np.eye(len(DAY))[part], weekday >= 5,
        mean, mean**2, far, far**2, np.maximum(far, 0.0), spread, spread * far, gap, gap * far,
    ])  # fmt: skip


@dataclass(frozen=True)
class Rhythm:
    """Fitted hazards and hours."""

    day: np.ndarray  # (F,) log-odds of coming on a day; the last is the constant
    size: np.ndarray  # (F,) log-odds of stopping after the nth item; the last is the constant
    hours: np.ndarray  # (7, 24) share of all visits' hours, by weekday
    own: float  # visits that all users together count for, beside the own ones
    soon: np.ndarray  # (S,) days between two visits of a user on one day
    shift: np.ndarray  # (24,) share of the hours of late over that of all

    def comes(self, memory: Memory, waited: np.ndarray, weekday: np.ndarray) -> np.ndarray:
        """Chance (n,) to come on that day."""
        log_odds = day_features(memory, waited, weekday) @ self.day[:-1] + self.day[-1]
        return np.asarray(expit(log_odds))

    def hour_shares(self, memory: Memory, weekday: np.ndarray) -> np.ndarray:
        """Chances (n, 24) of the hour of a visit."""
        near = np.exp(-0.5 * ((np.arange(24)[:, None] - np.arange(24)) / NARROW) ** 2)
        shares = memory.hours @ (near / near.sum(axis=1, keepdims=True))
        shares = (shares + self.own * self.hours[weekday]) * (self.hours[weekday] > 0) * self.shift
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))

    def time(
        self, memory: Memory, day: float, weekday: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Draw the moments (n,) of visits on a day; a second one comes soon after the first."""
        days = np.full(len(memory.last), weekday)
        shares = self.hour_shares(memory, days).cumsum(axis=1)  # (n, 24)
        hour = (shares < rng.random((len(days), 1))).sum(axis=1).clip(0, 23)
        moment = day + (hour + rng.random(len(days))) / 24
        left = day + 1 - memory.last  # (n,) days, of this one, for who has been here today
        again = memory.last + np.minimum(rng.choice(self.soon, len(days)), left / 2)
        return np.where(memory.last >= day, again, moment)

    def sizes(
        self, memory: Memory, gap: np.ndarray, hour: np.ndarray, weekday: np.ndarray,
        rng: np.random.Generator,
    ) -> np.ndarray:  # fmt: skip
        """Draw the items taken on a visit, (n,) int64."""
        size = np.ones(len(gap), np.int64)
        going = np.arange(len(gap))
        while len(going):
            features = size_features(
                memory.rows(going), size[going], gap[going], hour[going], weekday[going]
            )
            stops = expit(features @ self.size[:-1] + self.size[-1])
            going = going[(rng.random(len(going)) >= stops) & (size[going] < MOST)]
            size[going] += 1
        return size


def fit_rhythm(visits: Visits, users: int, *, since: float, until: float) -> Rhythm:
    """Learn from the visits at `since` or later; the earlier ones are the users' past.

    Days run to `until`: that somebody did not come back before it is learnt from as well.
    """
    order = _rank(visits.user)
    memory = Memory.blank(users)
    days, sizes, hours, soon = [], [], [], [np.array([1 / 24])]
    late = until - LATE
    for nth in range(int(order.max(initial=-1)) + 1):
        now = np.nonzero(order == nth)[0]  # (R,) the nth visit of those who came so often
        user, time, size = visits.user[now], visits.time[now], visits.size[now]
        before = memory.rows(user)
        if nth:
            later = time >= since
            gap = np.floor(time) - np.floor(before.last)  # (R,) days
            days.append(waits(before.rows(later), gap[later], np.ones(later.sum(), bool), since))
            soon.append((time - before.last)[later & (gap == 0)])
            some = before.rows(later), gap[later], time[later], size[later]
            sizes.append(_stops(*some))
            when = time[later]
            hours.append((before.hours[later], hour_of(when), weekday_of(when), when >= late))
        memory.note(user, time, size)
    gone = memory.rows(memory.count > 0)
    away = np.floor(until) - np.floor(gone.last)
    days.append(waits(gone, away, np.zeros(len(away), bool), since))
    if sum(len(x[1]) for x in sizes) < 100:
        raise ValueError(
            "fewer than 100 visits of users who had come before are too few to learn when users "
            "come: give a longer log or a larger window"
        )
    day = logistic(*_joined(days))
    size_ = logistic(*_joined(sizes))
    own, hour, weekday, recent = (np.concatenate(x) for x in zip(*hours, strict=True))
    shares = shares_of(hour, weekday)
    heavy = own_weight(shares, own, hour, weekday)
    shift = shifted(hour[recent], hour)
    return Rhythm(day, size_, shares, heavy, np.concatenate(soon), shift)


def shifted(late: np.ndarray, hour: np.ndarray) -> np.ndarray:
    """How much more than usual of the visits come at each hour (24,) of late."""
    seen, usual = np.bincount(late, minlength=24), np.bincount(hour, minlength=24) / len(hour)
    eased = 20.0  # visits that it is drawn to the usual with
    return np.asarray((seen + eased * usual + 1) / ((len(late) + eased) * usual + 1))


def shares_of(hour: np.ndarray, weekday: np.ndarray) -> np.ndarray:
    """Share of the hours (7, 24) of visits (n,) by weekday; a little of the other days' as well."""
    shares = np.zeros((7, 24))
    np.add.at(shares, (weekday, hour), 1.0)
    shares = shares + shares.sum(axis=0) / 7 * 0.1 + 1e-3
    return shares / np.asarray(shares.sum(axis=1, keepdims=True))


def waits(
    memory: Memory, gap: np.ndarray, came: np.ndarray, since: float
) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of every day from the last visit to the next, or to the end.

    Days before `since` are left out, as visits before it are: else days would outnumber visits.
    """
    came = came & (gap <= LONGEST)  # who came later than that did not come within it
    gap = np.minimum(gap, LONGEST).astype(np.int64)
    rows = np.repeat(np.arange(len(gap)), gap + 1)
    waited = np.arange(len(rows)) - np.repeat(np.cumsum(gap + 1) - gap - 1, gap + 1)
    label = (waited == gap[rows]) & came[rows]
    day = np.floor(memory.last[rows]) + waited
    inside = day >= np.floor(since)
    rows, waited, label, day = rows[inside], waited[inside], label[inside], day[inside]
    return day_features(memory.rows(rows), waited, weekday_of(day)).astype(np.float32), label


def _stops(
    memory: Memory, gap: np.ndarray, time: np.ndarray, size: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of every item of visits: whether it was the last one."""
    size = np.minimum(size, MOST)
    rows = np.repeat(np.arange(len(size)), size)
    nth = np.arange(len(rows)) - np.repeat(np.cumsum(size) - size, size) + 1
    at = time[rows]
    features = size_features(memory.rows(rows), nth, gap[rows], hour_of(at), weekday_of(at))
    return features.astype(np.float32), (nth == size[rows]) & (nth < MOST)


def _joined(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    features, label = zip(*parts, strict=True)
    return np.concatenate(features), np.concatenate(label)


def logistic(features: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Coefficients (F + 1,) of a logistic regression, the constant last."""
    from sklearn.linear_model import LogisticRegression

    if label.all() or not label.any():  # visits of one item each, say
        return np.append(np.zeros(features.shape[1]), SURE if label.all() else -SURE)
    scale = np.maximum(features.std(axis=0), 1e-6)  # (F,)
    model = LogisticRegression(C=100.0, max_iter=300)
    model.fit(features / scale, label)
    return np.append(model.coef_[0] / scale, model.intercept_[0]).astype(np.float64)


def own_weight(shares: np.ndarray, own: np.ndarray, hour: np.ndarray, weekday: np.ndarray) -> float:
    """How many visits all users together count for: the likeliest of a few numbers."""
    likelihood = {}
    for weight in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0):
        rhythm = Rhythm(np.zeros(1), np.zeros(1), shares, weight, np.zeros(1), np.ones(24))
        blank = Memory.blank(len(hour))
        blank.hours[:] = own
        chance = rhythm.hour_shares(blank, weekday)[np.arange(len(hour)), hour]
        likelihood[weight] = float(np.log(chance).sum())
    return max(likelihood, key=lambda w: likelihood[w])


def _rank(user: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... (n,) within each user of a list ordered by user."""
    first = np.concatenate([[True], user[1:] != user[:-1]]) if len(user) else np.zeros(0, bool)
    place = np.arange(len(user))
    return np.asarray(place - np.maximum.accumulate(np.where(first, place, 0)))
