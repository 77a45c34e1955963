"""A made-up shop's log of any size: to see what a fit costs before one's own log is at hand."""

import numpy as np
import pandas as pd

from sources.logs import Logs, Roles

DAYS, LINES = 365, 5.0  # span of the log, and lines of a visit on average
FAVOURITES, AGAIN = 20, 0.5  # of a user, and the share of lines that are one of them
SHELVES = 50


def load(
    *, events: int = 1_000_000, users: int = 50_000, items: int = 5_000, seed: int = 0
) -> Logs:
    """About `events` lines of users who have favourites, in a shop where few items sell most."""
    for name, value in (("events", events), ("users", users), ("items", items)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    rng = np.random.default_rng(seed)
    fame = 1.0 / np.arange(10, items + 10)  # (N,) by rank
    bound = np.cumsum(fame / fame.sum())  # (N,)
    liked = np.searchsorted(bound, rng.random((users, FAVOURITES))).astype(np.int32)

    eager = rng.gamma(2.0, size=users)  # (U,)
    visits = rng.poisson(events / LINES * eager / eager.sum())  # (U,) of each user
    user = np.repeat(np.arange(users, dtype=np.int32), visits)  # (v,)
    second = rng.integers(0, DAYS * 86_400, len(user), dtype=np.int32)  # (v,)
    lines = 1 + rng.poisson(LINES - 1.0, len(user))  # (v,)
    visit = np.repeat(np.arange(len(user), dtype=np.int32), lines)  # (n,)
    again = rng.random(len(visit), dtype=np.float32) < AGAIN  # (n,)
    item = np.searchsorted(bound, rng.random(len(visit))).astype(np.int32)  # (n,)
    item[again] = liked[user[visit[again]], rng.integers(0, FAVOURITES, int(again.sum()))]
    price = np.round(1.0 + rng.gamma(2.0, 2.0, items), 2)  # (N,)
    frame = pd.DataFrame(
        {
            "user": user[visit],
            "item": np.minimum(item, items - 1),
            "time": pd.Timestamp("2024-01-01") + pd.to_timedelta(second, unit="s")[visit],
            "behaviour": "buy",
            "value": price[np.minimum(item, items - 1)],
            "basket": visit,
        }
    )
    shelf = rng.integers(0, SHELVES, items)  # (N,)
    about = pd.DataFrame(
        {
            "item": np.arange(items),
            "title": [f"product {i} of shelf {s}" for i, s in enumerate(shelf)],
            "shelf": [f"shelf {s}" for s in shelf],
        }
    )
    roles = Roles(item_text=("title",), item_category=("shelf",))
    return Logs.create(frame.assign(price=frame["value"]), about, roles=roles, name="generated")
