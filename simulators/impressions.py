"""A log of impressions: what was shown to whom, in which session, and what they did with it."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from encoders.state import EMPTY, PAST
from simulators.base import UserTable
from sources.logs import Logs

MOST_BEHAVIOURS = 8  # the chance of each is summed over all combinations of those before it


@dataclass(frozen=True)
class Impressions:
    """n impressions, ordered by user and time."""

    users: np.ndarray  # (U,) outside ids
    user: np.ndarray  # (n,) int64 rows of `users`
    item: np.ndarray  # (n,) int64 catalogue items, EMPTY for others
    time: np.ndarray  # (n,) float64 days since 1970-01-01
    place: np.ndarray | None  # (n,) where it was shown, as logged
    position: np.ndarray | None  # (n,) float64 slot from 0, NaN where not logged
    answers: np.ndarray  # (n, F) bool, one column per behaviour
    value: np.ndarray  # (n,) float64 money or minutes
    session: np.ndarray  # (n,) int64, ascending
    nth: np.ndarray  # (n,) int64 place in its session from 0
    last: np.ndarray  # (n,) bool: nothing was shown after it in its session
    ended: np.ndarray  # (n,) bool: False on the last of a session that may go on after the log
    behaviours: tuple[str, ...]  # F, the most frequent first unless chosen

    def __len__(self) -> int:
        return len(self.user)

    def begun(self) -> np.ndarray:
        """When its session began, (n,) days."""
        return self.time[np.arange(len(self)) - self.nth]


def impressions_from_logs(
    logs: Logs,
    ids: np.ndarray,
    behaviours: tuple[str, ...] | None = None,
    *,
    impression: str = "shown",
    gap: float = 30.0,
) -> Impressions:
    """Join each event `impression` with the answers to it; `gap` minutes without one end a session.

    An answer belongs to the latest impression of its user and item, at its moment or up to `gap`
    minutes before; without one it was no answer to what was shown and is left out.
    """
    events = logs.events
    if "shown" in events:
        events = events[events["shown"]]
    count = events["behaviour"].astype(str).value_counts()
    names = chosen_behaviours(logs.name, count, behaviours, impression)
    shown = events[(events["behaviour"] == impression).to_numpy()]
    user, users = pd.factorize(shown["user"], sort=True)
    order = np.lexsort((shown["time"].to_numpy(), user))  # stable: ties as logged
    shown = shown.iloc[order].reset_index(drop=True)
    user = user[order]
    answers, value = _answers(events, shown, names, gap)
    if not answers.any():
        raise ValueError(
            f"{logs.name}: no answer {list(names)} comes within {gap:g} minutes of an impression "
            "of the same user and item: log both with the same ids and clock"
        )
    time = shown["time"].to_numpy().astype("datetime64[us]").astype(np.int64) / 86_400e6
    session, nth, last = _sessions(user, time, gap / 1_440)
    end = logs.events["time"].max().timestamp() / 86_400
    return Impressions(
        users=np.asarray(users),
        user=user.astype(np.int64),
        item=pd.Index(ids).get_indexer(shown["item"]).astype(np.int64),
        time=time,
        place=shown["place"].to_numpy() if "place" in shown else None,
        position=_positions(shown),
        answers=answers,
        value=value,
        session=session,
        nth=nth,
        last=last,
        ended=~(last & (time > end - gap / 1_440)),
        behaviours=names,
    )


def chosen_behaviours(
    name: str, count: pd.Series, wanted: tuple[str, ...] | None, impression: str
) -> tuple[str, ...]:
    """The behaviours to simulate, of those that occur `count` times."""
    count = count[count > 0]
    if impression not in count.index:
        raise ValueError(
            f"{name}: no event is an impression '{impression}', behaviours are {list(count.index)}:"
            " log what was shown, answered or not, as events of that name (or name yours with "
            "impression=), or fit simulators.fitted.FittedSimulator, which needs purchases only"
        )
    others = [str(b) for b in count.index if b != impression]  # the most frequent first
    names = tuple(others) if wanted is None else tuple(wanted)
    unknown = [b for b in names if b not in others]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"{name}: behaviours must be one or more of {others}, each once, got {list(names)}: "
            "an impression alone says nothing of what users like"
        )
    if len(names) > MOST_BEHAVIOURS:
        raise ValueError(
            f"{name}: {len(names)} behaviours {list(names)} are more than {MOST_BEHAVIOURS}: "
            "choose with behaviours=[...], the one that the others follow from first"
        )
    return names


def _answers(
    events: pd.DataFrame, shown: pd.DataFrame, names: tuple[str, ...], gap: float
) -> tuple[np.ndarray, np.ndarray]:
    """Answers (n, F) to impressions, and the value (n,): the largest of the impression's events."""
    keys = ["user", "item"]
    left = events[events["behaviour"].isin(names).to_numpy()].sort_values("time", kind="stable")
    right = shown[["user", "item", "time"]].assign(row=np.arange(len(shown)))
    joined = pd.merge_asof(
        left[["user", "item", "time", "behaviour", "value"]],
        right.sort_values("time", kind="stable"),
        on="time",
        by=keys,
        tolerance=pd.Timedelta(minutes=gap),
    ).dropna(subset="row")
    row = joined["row"].to_numpy(np.int64)
    column = pd.Index(names).get_indexer(pd.Index(joined["behaviour"].astype(str)))
    answers = np.zeros((len(shown), len(names)), bool)
    answers[row, column] = True
    value = shown["value"].to_numpy(np.float64, copy=True)
    np.maximum.at(value, row, joined["value"].to_numpy(np.float64))
    return answers, value


def _sessions(
    user: np.ndarray, time: np.ndarray, gap: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Session, place in it and whether it is the last, (n,) each, of rows by user and time."""
    fresh = np.ones(len(user), bool)
    fresh[1:] = (user[1:] != user[:-1]) | (np.diff(time) > gap)
    session = np.cumsum(fresh) - 1
    nth = np.arange(len(user)) - np.flatnonzero(fresh)[session]
    return session, nth, np.append(fresh[1:], True)


def _positions(shown: pd.DataFrame) -> np.ndarray | None:
    if "position" not in shown or shown["position"].nunique() < 2:
        return None
    return shown["position"].to_numpy(np.float64)


def before(
    group: np.ndarray, time: np.ndarray, what: np.ndarray, at: np.ndarray, when: np.ndarray
) -> np.ndarray:
    """Sum `what` (n, d) of each asked group `at` (q,) at times strictly before `when` (q,)."""
    moments = np.unique(time)
    size = len(moments) + 1
    key = group * size + np.searchsorted(moments, time)  # (n,)
    order = np.argsort(key, kind="stable")
    key = key[order]
    sums = np.concatenate([np.zeros((1, what.shape[1])), np.cumsum(what[order], axis=0)])
    until = np.searchsorted(key, at * size + np.searchsorted(moments, when))
    return np.asarray(sums[until] - sums[np.searchsorted(key, at * size)])  # (q, d)


def user_table(
    impressions: Impressions, rows: np.ndarray, profile: np.ndarray, num_items: int
) -> UserTable:
    """Users as they enter the sessions that begin at `rows` (m,), with profiles (m, P).

    The past holds what was answered with the first behaviour before.
    """
    liked = np.flatnonzero(impressions.answers[:, 0] & (impressions.item != EMPTY))
    owner, time, item = (x[liked] for x in (impressions.user, impressions.time, impressions.item))
    first = np.searchsorted(owner, impressions.user[rows])
    count = before(owner, time, np.ones((len(liked), 1)), impressions.user[rows],
                   impressions.time[rows])[:, 0].astype(np.int64)  # fmt: skip
    start = np.repeat(np.arange(len(rows)), count)  # one row per pair of a start and a like
    inside = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
    pair = np.repeat(first, count) + inside
    key = start * num_items + item[pair]
    distinct, place, often = np.unique(key, return_inverse=True, return_counts=True)
    latest = np.zeros(len(distinct))
    np.maximum.at(latest, place, time[pair])
    who = distinct // num_items
    order = np.lexsort((-latest, who))
    rank = np.empty(len(order), np.int64)
    sizes = np.bincount(who, minlength=len(rows))
    rank[order] = np.arange(len(order)) - np.repeat(sizes.cumsum() - sizes, sizes)
    kept = rank < PAST
    past = np.full((len(rows), PAST), EMPTY, np.int64)
    times, age = np.zeros((2, len(rows), PAST), np.float32)
    where = who[kept], rank[kept]
    past[where] = (distinct % num_items)[kept]
    times[where] = often[kept]
    age[where] = impressions.time[rows][who[kept]] - latest[kept]
    return UserTable(
        ids=impressions.users[impressions.user[rows]],
        profile=torch.from_numpy(profile.astype(np.float32)),
        past=torch.from_numpy(past),
        past_count=torch.from_numpy(times),
        past_age=torch.from_numpy(age),
        start=torch.from_numpy(impressions.time[rows]),
    )
