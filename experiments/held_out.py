"""A log cut in two for ranking: what models are fitted on, and what they have to find."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from scipy.sparse import csr_matrix

from agents.interactions import Interactions
from sources.logs import Logs

SPLITS = ("user_time", "leave_last_out", "global_time", "random")


@dataclass(frozen=True, eq=False)
class Parts:
    """Interactions to fit on and what users did afterwards, over the same users and items."""

    past: Interactions
    later: Interactions
    now: np.ndarray  # (U,) days: when each user's later part begins
    split: str
    outside: int  # later events of items that nobody could be fitted on
    texts: list[str]  # (N,)

    def relevant(self, *, repeats: bool) -> csr_matrix:
        """What is to be found, (U, N) of ones; without `repeats` only what is new to the user."""
        later = self.later.counts()
        if not repeats:
            later = later - later.multiply(self.past.counts() > 0)
            later.eliminate_zeros()
        found = csr_matrix(later)
        found.data[:] = 1.0
        return found

    def words(self) -> str:
        """One line on the sizes."""
        return (
            f"{self.split}: {len(self.past.user):,} events of {self.past.num_users:,} users with "
            f"{self.past.num_items:,} items to fit on, {len(self.later.user):,} later ones to "
            f"find; {self.outside:,} of other users or items are left out"
        )


def split_of(cfg: DictConfig, logs: Logs, seed: int) -> Parts:
    """Split the log as the configuration says, ties in time by a draw with `seed`."""
    train, test = cut(cfg.split, logs, cfg.share, seed)
    return parts_of(train, test, cfg.size, seed, described(cfg.split, cfg.share))


def described(split: str, share: float) -> str:
    """The split in words."""
    return {
        "user_time": f"the last {1 - share:.0%} of each user",
        "leave_last_out": "the last event of each user",
        "global_time": f"the last {1 - share:.0%} of the time",
        "random": f"{1 - share:.0%} of each user drawn at random (leaks the future)",
    }[split]


def cut(split: str, logs: Logs, share: float, seed: int) -> tuple[Logs, Logs]:
    """(train, test) of a log."""
    if split == "leave_last_out":
        return logs.leave_last_out(seed)
    if split == "global_time":
        return logs.temporal_split(share)
    return logs.temporal_split(share, by="user" if split == "user_time" else "draw", seed=seed)


def parts_of(train: Logs, test: Logs, size: int | None, seed: int, split: str) -> Parts:
    """Both sides over the users and the `size` most frequent items of the first."""
    events = train.events[train.events["behaviour"].isin(train.purchases)]
    items = train.top_items(size or len(train.items), seed)
    users = np.sort(events["user"].unique())
    past = Interactions.of(train, items=items, users=users, seed=seed)
    later = Interactions.of(test, items=items, users=users, seed=seed)
    bought = test.events[test.events["behaviour"].isin(test.purchases)]
    return Parts(
        past, later, beginnings(bought, users, past), split, len(bought) - len(later.user),
        train.item_text().loc[items].tolist(),
    )  # fmt: skip


def beginnings(events: pd.DataFrame, users: np.ndarray, past: Interactions) -> np.ndarray:
    """Days (U,) of each user's first later event; of others the end of what is fitted on."""
    time = events["time"].to_numpy().astype("datetime64[us]").astype(np.int64) / 86_400e6
    now = np.full(len(users), np.inf)
    row = pd.Index(users).get_indexer(events["user"])
    np.minimum.at(now, row[row >= 0], time[row >= 0])
    last: Any = past.time.max() if len(past.time) else 0.0
    return np.where(np.isfinite(now), now, last)
