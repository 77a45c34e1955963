"""A small shop of known habits, for tests of what is fitted to logs."""

import hashlib

import numpy as np
import pandas as pd
import torch

from sources.logs import Logs, Roles

HOUSEHOLDS, ITEMS, CATEGORIES, FAVOURITES = 150, 60, 8, 5
DAYS, EVERY = 300, 12  # span of the log, and days between two trips of a household on average
AGAIN, CURIOUS = 0.35, 1.0  # chance of each favourite, and other items expected, on a trip
ROLES = Roles(("name",), ("kind", "brand"), (), (), ("age", "income"))


def load() -> Logs:
    """About 3,700 trips: each household buys its favourites again and again, and others at times.

    Item 0 is the most popular of the others; favourites are spread evenly over the items.
    """
    rng = np.random.default_rng(11)
    fame = 1.0 / np.arange(2, ITEMS + 2)
    fame = CURIOUS * fame / fame.sum()  # (N,)
    price = np.round(rng.uniform(1, 9, ITEMS), 2)
    rows = []
    for user in range(HOUSEHOLDS):
        chance = fame.copy()
        chance[favourites(user)] = AGAIN
        time = rng.exponential(EVERY / 2)
        while time < DAYS:
            items = np.nonzero(rng.random(ITEMS) < chance)[0]
            basket = f"{user}-{time:.3f}"
            rows += [(user, f"i{i:02d}", time, basket, price[i]) for i in items]
            time += 0.5 + rng.exponential(EVERY - 0.5)
    events = pd.DataFrame(rows, columns=["user", "item", "day", "basket", "value"])
    events["time"] = pd.Timestamp("2024-01-01") + pd.to_timedelta(
        (events.pop("day") * 86_400).round(), unit="s"
    )
    events["behaviour"], events["price"] = "buy", events["value"]
    return Logs.create(events, items_table(), users_table(rng), roles=ROLES, name="synthetic")


def favourites(user: int) -> np.ndarray:
    """What household `user` buys again and again, (FAVOURITES,)."""
    return np.random.default_rng(user).choice(ITEMS, FAVOURITES, replace=False)


def items_table() -> pd.DataFrame:
    numbers = np.arange(ITEMS)
    return pd.DataFrame(
        {
            "item": [f"i{i:02d}" for i in numbers],
            "name": [f"thing {i} of kind {i % CATEGORIES}" for i in numbers],
            "kind": [f"kind {i % CATEGORIES}" for i in numbers],
            "brand": [f"brand {i % 3}" for i in numbers],
        }
    )


def users_table(rng: np.random.Generator) -> pd.DataFrame:
    age = rng.integers(20, 80, HOUSEHOLDS).astype(float)
    income = rng.normal(50, 10, HOUSEHOLDS)
    age[::7] = income[::7] = np.nan  # of every seventh nothing is known
    return pd.DataFrame({"user": np.arange(HOUSEHOLDS), "age": age, "income": income})


class HashedTexts:
    """Stands in for `TextEncoder`: a text's vector is a hash of it, no weights are loaded."""

    def __init__(self, model: str = "", *, device: str = "auto", progress: bool = True) -> None:
        self.model = model

    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        seeds = [int(hashlib.sha256(t.encode()).hexdigest()[:8], 16) for t in texts]
        vectors = np.stack([np.random.default_rng(s).normal(size=12) for s in seeds])
        present = torch.tensor([bool(t) for t in texts])
        return torch.from_numpy(vectors).float() * present[:, None], present


def after_cut_replaced(logs: Logs, as_of: pd.Timestamp, seed: int = 0) -> Logs:
    """The same log with items, users, values and baskets after the cut shuffled among events."""
    events = logs.events.copy()
    late = np.nonzero((events["time"] >= as_of).to_numpy())[0]
    rng = np.random.default_rng(seed)
    for column in ("item", "user", "value", "price", "basket"):
        if column in events:
            events.loc[late, column] = events[column].to_numpy()[rng.permutation(late)]
    return Logs.create(
        events, logs.items, logs.users, roles=logs.roles, name=logs.name, purchases=logs.purchases
    )
