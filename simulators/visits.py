"""The log as visits of users: lines of receipts, visit by visit, and how large each visit was."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from sources.logs import Logs


@dataclass(frozen=True)
class Lines:
    """m lines of receipts, visit by visit; visits are numbered by user and time."""

    user: np.ndarray  # (m,) int64 rows of a user table
    visit: np.ndarray  # (m,) int64
    time: np.ndarray  # (m,) float64 days
    item: np.ndarray  # (m,) int64
    value: np.ndarray  # (m,) float64 money of the line
    price: np.ndarray  # (m,) float64 of a unit; nan where none is logged
    discount: np.ndarray  # (m,) float64 share of the shelf price; nan where none is logged

    def __len__(self) -> int:
        return len(self.user)


def lines_of(logs: Logs, items: np.ndarray, users: np.ndarray) -> Lines:
    """Purchases of `items` by `users` as they stand in the log; a visit buys an item once."""
    events = logs.events[logs.events["behaviour"].isin(logs.purchases)]
    row = pd.Index(users).get_indexer(events["user"])
    item = pd.Index(items).get_indexer(events["item"])
    known = (row >= 0) & (item >= 0)
    time = days_of(events["time"])
    visit = events["basket"].to_numpy() if "basket" in events else np.floor(time)
    columns = {"user": row, "name": visit, "item": item, "time": time}
    for name in ("value", "price", "discount"):
        columns[name] = events[name].to_numpy(np.float64) if name in events else np.nan
    table = pd.DataFrame(columns)[known]
    first = table.groupby(["user", "name"])["time"].transform("min")
    table = table.assign(time=first).sort_values(["user", "time", "name", "item"], kind="stable")
    table = table.drop_duplicates(["user", "name", "item"])
    new = (table[["user", "name"]] != table[["user", "name"]].shift()).any(axis=1)
    table = table.assign(visit=new.cumsum() - 1)
    return Lines(*(table[name].to_numpy() for name in Lines.__dataclass_fields__))


@dataclass(frozen=True)
class Visits:
    """n visits, ordered by user and time."""

    user: np.ndarray  # (n,) int64 rows of a list of users
    time: np.ndarray  # (n,) float64 days since 1970-01-01
    size: np.ndarray  # (n,) int64 distinct items of the catalogue

    def __len__(self) -> int:
        return len(self.user)


def visits_of(lines: Lines) -> Visits:
    """Who came when, and for how many items."""
    first = np.nonzero(np.diff(lines.visit, prepend=-1))[0]  # (n,) a line of each visit
    size = np.diff(np.append(first, len(lines)))
    return Visits(lines.user[first], lines.time[first], size)


def days_of(time: pd.Series) -> np.ndarray:
    """Moments as days since 1970-01-01, (n,) float64."""
    moments = time.to_numpy().astype("datetime64[us]").astype(np.int64)
    return np.asarray(moments / 86_400e6)
